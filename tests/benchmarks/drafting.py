"""What drafting from a layer is worth: words a second and text against the model's own greedy decoding.

    python tests/benchmarks/drafting.py --run RUN [--limit N] [--batch-sizes 1 8]    # exits on its held-out rows
    python tests/benchmarks/drafting.py                    # random weights of a size where layers outweigh the head

A run's exits are `RUN/exits`, else `RUN/verbalizers`, else norm and head. The random model's layers above the exit add
so little that it drafts as a trained one does (`agreement` says how well). Times are CPU seconds of one thread, or
seconds of a GPU; each contestant has its turn in every round. A ratio in brackets is that behind the prompts, whose
time (our own loop, one token) is taken off both sides. Prediction: `teacher/draft_plan.py` along the greedy answers.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Report, setting, timed
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.data.collate import collate_prompts
from vlsi_cache.data.records import read_records
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.draft_costs import CONFIDENCE, NUM_DRAFTS, Answer, Costs, drafts_of
from vlsi_cache.models.drafting import Drafter, decode
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.verbalizer import Verbalizers, load_exits, logit_lens
from vlsi_cache.models.verbalizer_files import of_run
from vlsi_cache.run_files import read_run
from vlsi_cache.teacher.draft_plan import costs_of

PACKAGES = ("torch", "transformers")
WAYS = ((4, 0.0), (NUM_DRAFTS, CONFIDENCE))  # drafts at a time, and the probability below which they end
RANDOM = {"layers": 16, "width": 768, "vocab": 4096, "exit": 2, "rest": 0.0003, "prompts": 1, "length": 32, "new": 96}
TINY = {"layers": 4, "width": 64, "vocab": 200, "exit": 1, "rest": 0.01, "prompts": 2, "length": 6, "new": 8}
Batches = list[dict[str, torch.Tensor]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a distill run")
    parser.add_argument("--layers", type=int, nargs="+", help="exits to look at; default: all")
    parser.add_argument("--limit", type=int, default=400, help="held-out rows")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a look at whether it runs")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    device, report = torch.device(given.device), Report("Drafting from a layer")
    report.say(setting(list(sys.argv[1:] if arguments is None else arguments), "drafting.py", device, PACKAGES))
    if given.run is None:
        sizes = TINY if given.tiny else RANDOM
        model, prompts = random_model(sizes, device)
        backbone = Backbone(model)
        exits: Verbalizers = logit_lens(backbone, [sizes["exit"]])
        ids: dict[str, Any] = {"eot_id": sizes["vocab"] - 1, "vocab_size": sizes["vocab"]}
        report.say(f"Random weights: {sizes}.\n")
        compare(report, backbone, exits, exits.layers, [prompts], ids, sizes["new"], given.rounds)
    else:
        backbone, exits, encoder, records = student_of(given.run, given.limit, device)
        layers = given.layers or exits.layers
        ids = {"eot_id": encoder.eot_id, "vocab_size": encoder.vocab_size}
        for size in given.batch_sizes:
            batches = [
                collate_prompts(
                    [encoder.encode(one, with_response=False) for one in records[start : start + size]],
                    pad_id=encoder.pad_id,
                    device=str(device),
                )
                for start in range(0, len(records), size)
            ]
            report.say(f"## {given.run.name}: {len(records)} held-out questions in batches of {size}\n")
            compare(report, backbone, exits, layers, batches, ids, given.max_new_tokens, given.rounds)
    if given.out is not None:
        report.write(given.out)


def random_model(sizes: dict[str, Any], device: torch.device) -> tuple[Any, dict[str, torch.Tensor]]:
    """A Llama whose layers above the exit add little, and prompts for it."""
    torch.manual_seed(0)
    width = sizes["width"]
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": sizes["layers"]}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 256)}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=sizes["vocab"], **shape, **heads)).eval().to(device)
    with torch.no_grad():
        for layer in model.model.layers[sizes["exit"] :]:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.mul_(sizes["rest"] * sizes["width"] ** 0.5)
    ids_BP = torch.randint(3, sizes["vocab"] - 1, (sizes["prompts"], sizes["length"]), device=device)
    return model, {"input_ids": ids_BP, "attention_mask": torch.ones_like(ids_BP)}


def student_of(run: Path, limit: int, device: torch.device) -> tuple[Backbone, Verbalizers, Any, list[Any]]:
    record = read_run(run)
    spec = spec_from_dict(record["spec"], where=str(run))
    student, folder = ModelRef(str(run / "student"), dtype="float32" if device.type == "cpu" else "auto"), of_run(run)
    backbone = Backbone(student.load(str(device)))
    assert spec.evaluate is not None
    if folder is not None:
        exits = load_exits(folder, backbone, student=student.digest, start=record.get("student_digest"))
    else:
        exits = logit_lens(backbone, list(range(1, backbone.num_layers)))
    return backbone, exits, student.encoder(), list(read_records(spec.evaluate.data, limit=limit))


def compare(
    report: Report,
    backbone: Backbone,
    exits: Verbalizers,
    layers: list[int],
    batches: Batches,
    ids: dict[str, Any],
    new: int,
    rounds: int,
) -> None:
    """A table: each exit and number of drafts against greedy decoding, with and without our own loop."""
    model, vocab_size = backbone.model, ids["vocab_size"]
    num_rows = model.get_output_embeddings().weight.shape[0]
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=ids["eot_id"],
        pad_token_id=0,
        suppress_tokens=list(range(vocab_size, num_rows)) or None,
    )
    none = (0, 0.0)
    drafters = {(none, exits.layers[0]): Drafter(backbone, exits, exits.layers[0], *none)}
    for layer in layers:
        drafters |= {(way, layer): Drafter(backbone, exits, layer, *way) for way in WAYS}
    works: dict[Any, Callable[[], list[list[int]]]] = {"transformers": lambda: greedy(model, batches, ids["eot_id"])}
    for key, drafter in drafters.items():
        works[key] = lambda drafter=drafter: [
            said for batch in batches for said in decode(drafter, batch, max_new_tokens=new, **ids)
        ]
    works["prompts"] = lambda: [
        said for batch in batches for said in decode(drafters[none, exits.layers[0]], batch, max_new_tokens=1, **ids)
    ]
    said = {key: work() for key, work in works.items()}
    counts = {key: drafter.counts for key, drafter in drafters.items()}
    took: dict[Any, list[float]] = {key: [] for key in works}
    for _ in range(rounds):
        for key, work in works.items():
            took[key].append(timed(work, backbone.device))
    predicted = dict(predictions(backbone, exits, said["transformers"], batches))
    plain, prompts = took["transformers"], took["prompts"]

    def faster(slow: list[float], quick: list[float]) -> str:
        whole = statistics.median(a / b for a, b in zip(slow, quick, strict=True))
        behind = statistics.median((a - p) / (b - p) for a, b, p in zip(slow, quick, prompts, strict=True))
        return f"{whole:.2f} ({behind:.2f})"

    num_tokens = sum(map(len, said["transformers"]))
    of_prompts = statistics.median(p / a for a, p in zip(plain, prompts, strict=True))
    report.say(
        f"{num_tokens} words of greedy decoding, {num_tokens / statistics.median(plain):.1f} a second; "
        f"{100 * of_prompts:.0f} % of the time for prompts.\n"
    )
    report.table(
        "exit", "drafts, probability", "texts that are the same", "drafts that stand", "predicted", "words a pass",
        "against transformers", "against our loop without drafts", "by weights read",
    )  # fmt: skip
    for key in drafters:
        (num_drafts, confidence), layer = key
        same = sum(one == other for one, other in zip(said[key], said["transformers"], strict=True))
        acceptance, by_weights = predicted.get(key, (None, None))
        report.row(
            str(layer) if num_drafts else "none",
            f"{num_drafts}, {confidence:g}" if num_drafts else "",
            f"{same} of {len(said[key])}",
            f"{counts[key]['acceptance']:.3f}" if num_drafts else "",
            "" if acceptance is None else f"{acceptance:.3f}",
            f"{counts[key]['tokens_per_pass']:.2f}",
            faster(plain, took[key]),
            faster(took[none, exits.layers[0]], took[key]),
            "" if by_weights is None else f"{by_weights:.2f}",
        )
    report.say("")


def greedy(model: Any, batches: Batches, eot_id: int) -> list[list[int]]:
    found: list[list[int]] = []
    with torch.inference_mode():
        for batch in batches:
            rows = model.generate(**batch)[:, batch["input_ids"].shape[1] :].tolist()
            found += [ids[: ids.index(eot_id) + 1] if eot_id in ids else ids for ids in rows]
    return found


@torch.inference_mode()
def predictions(
    backbone: Backbone, exits: Verbalizers, said: list[list[int]], batches: Batches
) -> Iterator[tuple[Any, tuple[float, float]]]:
    """By way and exit: the share of drafts that will stand and the speed-up by weights, along these answers."""
    sizes = {layer: sum(p.numel() for p in exits.by_layer[str(layer)].parameters()) for layer in exits.layers}
    costs: Costs = costs_of(backbone.plain, sizes)
    along: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {layer: [] for layer in exits.layers}
    answers = iter(said)
    for batch in batches:
        for row, (ids_P, mask_P) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            answer, prompt_P = next(answers), ids_P[mask_P.bool()]
            if set(batch) - {"input_ids", "attention_mask"} and len(batch["input_ids"]) > 1:
                continue  # pictures of one row of several are not cut out here
            given = {key: value for key, value in batch.items() if key not in ("input_ids", "attention_mask")}
            ids_1S = torch.cat([prompt_P, prompt_P.new_tensor(answer)])[None]
            given |= {"input_ids": ids_1S, "attention_mask": torch.ones_like(ids_1S)}
            if "mm_token_type_ids" in given:
                types = given["mm_token_type_ids"][row][mask_P.bool()]
                given["mm_token_type_ids"] = torch.cat([types, types.new_zeros(len(answer))])[None]
            places_T = torch.arange(len(prompt_P) - 1, len(prompt_P) - 1 + len(answer))
            hidden = backbone.capture(given, exits.layers, torch.zeros_like(places_T), places_T)
            last_T = torch.tensor(answer)
            for layer in exits.layers:
                logits_TV = exits.apply(layer, hidden[layer]) @ backbone.head_weight.T
                best_T, first_T = logits_TV.softmax(-1).cpu().max(-1)
                along[layer].append(((first_T == last_T).numpy(), best_T.numpy()))
    for layer, found in along.items():
        for num_drafts, confidence in WAYS if found else ():
            drafts = drafts_of([Answer(agrees_T, best_T >= confidence) for agrees_T, best_T in found], num_drafts)
            yield ((num_drafts, confidence), layer), (drafts.acceptance, costs.speedup(layer, drafts))


if __name__ == "__main__":
    main()
