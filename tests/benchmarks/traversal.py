"""What layer traversing costs and is worth: a traversed student beside the plain one.

    python tests/benchmarks/traversal.py --case cost    # prefill, decode, a training step: time and memory (minutes)
    python tests/benchmarks/traversal.py --case worth   # the demo's pair at equal FLOPs of the student, three seeds

`cost` is of random weights: which they are changes neither time nor memory (TroL, Tables 4f and 9). `worth` trains, for
each seed, from the demo's warm start: recipe vlsi plain and traversed with the steps of the spec, and plain once more
with as many steps more as the FLOPs of the traversed one would pay, counted by torch. All of it is reported.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import MIB, Report, Took, in_turns, ratio, setting, timed_with_peak
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import vlsi_cache as vc
from vlsi_cache.config.training import TraversalSpec
from vlsi_cache.demo.run import _warm_start as warm_start
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.traversal import add_traversal

KINDS = {
    "plain": None,
    "traversed, prompt": TraversalSpec(),
    "traversed, all": TraversalSpec(mode="all"),
    "3 passes, prompt": TraversalSpec(num_passes=3),
}
WORKS = ("prefill", "prefill and answer", "training step")
CPU = torch.device("cpu")
TINY = ("data.options.num_samples=64", "evaluate.data.options.num_samples=16", "store.part_mib=0.1")
PACKAGES = ("torch", "transformers", "peft")
Rows = list[list[str]]


def student(num_layers: int, width: int, settings: TraversalSpec | None) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": num_layers}
    sizes |= {"num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 192)}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, **sizes)).eval()
    if settings is not None:
        add_traversal(model, settings)
    return model


def works_of(model: Any, ids_BS: torch.Tensor, num_new: int) -> dict[str, Callable[[], object]]:
    """What of a student is timed: the prompt, prompt and answer, forward and backward of both."""

    @torch.no_grad()
    def prefill() -> object:
        return model(ids_BS, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def answer() -> object:
        return model.generate(ids_BS, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, pad_token_id=0)

    def train() -> object:
        model(ids_BS, labels=ids_BS, use_cache=False).loss.backward()
        return model.zero_grad()

    return dict(zip(WORKS, (prefill, answer, train), strict=True))


def cost(*, num_layers: int, width: int, num_prompt: int, num_new: int, num_rounds: int) -> Rows:
    """Ratios to the plain student, each the median over rounds in which every kind runs once."""
    ids_BS = torch.randint(0, 8192, (1, num_prompt))
    works: dict[str, Callable[[], object]] = {}
    for kind, settings in KINDS.items():
        of_kind = works_of(student(num_layers, width, settings), ids_BS, num_new)
        works |= {f"{kind}: {name}": run for name, run in of_kind.items()}
    in_turns(works, 1, CPU)  # to warm up
    took = in_turns(works, num_rounds, CPU)
    rows: Rows = []
    for kind in KINDS:
        row = [kind]
        for name in WORKS:
            peak = timed_with_peak(works[f"{kind}: {name}"], CPU)[1]
            row.append(f"{ratio(took[f'{kind}: {name}'], took[f'plain: {name}'], 1):.2f} ({peak / MIB:.0f} MiB)")
        own, plain = (_behind(took[f"{one}: {WORKS[1]}"], took[f"{one}: {WORKS[0]}"]) for one in (kind, "plain"))
        rows.append([*row, f"{own / plain:.2f}"])
    return rows


def _behind(whole: Sequence[Took], prefill: Sequence[Took]) -> float:
    """CPU seconds of the answer behind its prompt, the median over the rounds."""
    return statistics.median(one.cpu_s - before.cpu_s for one, before in zip(whole, prefill, strict=True))


def flops_of_a_step(folder: Path, settings: TraversalSpec | None) -> int:
    """Of forward and backward through the student's text stack, as torch counts them."""
    model: Any = ModelRef(folder).load()
    if settings is not None:
        add_traversal(model, settings)
    model.requires_grad_(True)
    with FlopCounterMode(display=False) as counted:
        model(input_ids=torch.randint(3, 50, (1, 96)), use_cache=False).logits.sum().backward()
    return counted.get_total_flops()


def worth(folder: Path, *, seeds: int, share: float, device: str, overrides: Sequence[str]) -> tuple[Rows, str]:
    """Exact match and perplexity on the held-out rows of the demo, all seeds."""
    spec = vc.load_spec("demo", overrides=overrides)
    cache = vc.build_teacher(spec, out=folder / "cache", device=device)
    stages = spec.distill
    steps = {
        "verbalize": stages.verbalize.steps,
        "interact.schedule": stages.interact.schedule.steps,
        "sft.schedule": stages.sft.schedule.steps,
    }
    steps = {name: max(2, round(share * (count or 0))) for name, count in steps.items()}
    gates = max(2, steps["verbalize"] // 2)
    found: dict[str, list[dict[str, Any]]] = {}
    factor = 1.0
    for seed in range(seeds):
        start = warm_start(spec, cache, folder / f"seed-{seed}", seed, device)
        if not seed:
            factor = flops_of_a_step(start, TraversalSpec()) / flops_of_a_step(start, None)
        traversal = {"gate_bias": "true", "gate_init": "near_zero", "schedule.steps": gates}
        traversed = [f"distill.traversal.{name}={value}" for name, value in traversal.items()]
        # The verbalizers of both read a frozen student; what the traversed one takes more goes into the other stages.
        more = {name: round(factor * count) for name, count in steps.items()}
        more["interact.schedule"] += round(gates * factor)
        for name, count, changes in (
            ("plain, the same steps", steps, []),
            ("plain, the same FLOPs", more, []),
            ("traversed", steps, traversed),
        ):
            lengths = [f"distill.{stage}.steps={number}" for stage, number in count.items()]
            run = vc.distill(
                cache,
                student=str(start),
                out=folder / f"seed-{seed}" / name.replace(", ", "-").replace(" ", "-"),
                overrides=[*lengths, *changes, f"distill.seed={seed}"],
                device=device,
            )
            found.setdefault(name, []).append(vc.evaluate(run, device=device))
    rows = [
        [name, *(f"{100 * one['exact_match']['all']:.1f} % ({one['perplexity']:.3f})" for one in scores)]
        for name, scores in found.items()
    ]
    return rows, f"A traversed step takes {factor:.2f} times the FLOPs of a plain one. Steps: {steps}, gates {gates}."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("cost", "worth"), default="cost")
    parser.add_argument("--tiny", action="store_true", help="a look at whether it runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of the demo's stages")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    report = Report(f"Layer traversing: {given.case}")
    said = list(sys.argv[1:] if arguments is None else arguments)
    report.say(setting(said, "traversal.py", CPU, PACKAGES))
    if given.case == "cost":
        sizes = {"num_layers": 2, "width": 64, "num_prompt": 8, "num_new": 2, "num_rounds": 1}
        if not given.tiny:
            sizes = {"num_layers": 8, "width": 384, "num_prompt": 256, "num_new": 48, "num_rounds": 5}
        report.say(f"## Time against the plain student, and peak memory\n\nRandom weights; {sizes}.\n")
        report.table("student", *WORKS, "answer alone")
        for row in cost(**sizes):
            report.row(*row)
    else:
        share, seeds = (0.02, 1) if given.tiny else (given.share, given.seeds)
        few = TINY if given.tiny else ()
        with tempfile.TemporaryDirectory(prefix="vlsi-cache-worth-") as folder:
            rows, note = worth(Path(folder), seeds=seeds, share=share, device=given.device, overrides=few)
        report.say(f"## Exact match on the demo's held-out rows (perplexity)\n\n{note}\n")
        report.table("student", *(f"seed {seed}" for seed in range(seeds)))
        for row in rows:
            report.row(*row)
    if given.out is not None:
        report.write(given.out)


if __name__ == "__main__":
    main()
