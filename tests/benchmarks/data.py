"""What the shape of the data costs: turns of a conversation, and responses to one prompt, as one sequence against each
by itself; and padding.

    .venv/bin/python tests/benchmarks/data.py [--layers 30 --hidden 576 --rounds 3] [-o results/FILE.md]

A random Llama of SmolLM2's shape builds two caches in turns, in one process: over rows of 4 turns of 64 tokens, and
over the same turns as rows of their own. The rows of both caches are compared. So with 4 responses of 64 tokens to
each prompt of 512, kept together and not; a student of 12 layers trains on both caches (interact, all layers). Then 12
layers with an adapter run forward and backward over the same micro-batches, padded and packed, in turns.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import setting
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import vlsi_cache as vc
from vlsi_cache.data.collate import collate
from vlsi_cache.data.sequence import Encoded
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.lora import add_lora
from vlsi_cache.run_files import read_metrics
from vlsi_cache.store.reader import Cache

NUM_TURNS, TURN_TOKENS = 4, 64
NUM_ANSWERS, PROMPT_TOKENS = 4, 512
VOCABULARY = 49_152
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_teacher(folder: Path, *, num_layers: int, hidden: int, vocab_size: int = VOCABULARY) -> None:
    """A random model with a tokenizer in which each of the words w0, w1, ... is a token."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "\n", "user", "assistant"]
    words = [f"w{index}" for index in range(vocab_size - len(special) - 1)]
    vocabulary = {word: index for index, word in enumerate(["<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # type: ignore[assignment]
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    core.add_special_tokens(special[:3])
    core.add_tokens(special[3:])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(config_of(num_layers, hidden, vocab_size)).save_pretrained(folder)


def config_of(num_layers: int, hidden: int, vocab_size: int = VOCABULARY) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )


def conversations(num_rows: int) -> list[dict[str, Any]]:
    """Rows of NUM_TURNS questions and answers, each of TURN_TOKENS tokens with what the template writes around them."""
    draw = random.Random(0)

    def said(role: str) -> dict[str, Any]:
        return {"role": role, "content": " ".join(f"w{draw.randrange(40_000)}" for _ in range(TURN_TOKENS - 5))}

    return [
        {"id": f"r{n}", "messages": [said(role) for _ in range(NUM_TURNS) for role in ("user", "assistant")]}
        for n in range(num_rows)
    ]


def apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same turns, each in a row of its own with the turns before it as history."""
    found = []
    for row in rows:
        for turn in range(1, NUM_TURNS + 1):
            history = [{**one, "train": False} if one["role"] == "assistant" else one for one in row["messages"]]
            messages = [*history[: 2 * turn - 1], row["messages"][2 * turn - 1]]
            found.append({"id": f"{row['id']}/{turn}", "messages": messages})
    return found


def answered(num_prompts: int) -> list[dict[str, Any]]:
    """NUM_ANSWERS answers of TURN_TOKENS tokens to each prompt of PROMPT_TOKENS."""
    draw = random.Random(1)

    def said(role: str, length: int) -> dict[str, Any]:
        return {"role": role, "content": " ".join(f"w{draw.randrange(40_000)}" for _ in range(length))}

    rows = []
    for number in range(num_prompts):
        question = said("user", PROMPT_TOKENS - 8)
        for k in range(NUM_ANSWERS):
            rows.append({"id": f"p{number}#{k}", "messages": [question, said("assistant", TURN_TOKENS - 1)]})
    return rows


def spec_of(folder: Path, rows: list[dict[str, Any]], name: str, layers: list[int], keep: str = "prompt") -> Any:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {
        "name": name,
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "layers": layers},
        "data": {"path": f"{name}.jsonl", "keep_together": keep},
        "store": {"profile": "exact"},
        "run": {"device": "cpu", "batch_tokens": 2048},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(spec))
    return vc.load_spec(folder / f"{name}.yaml")


def fastest(builds: dict[str, Callable[[Path], Cache]], folder: Path, rounds: int) -> tuple[dict[str, float], Any]:
    """The least seconds of each build, in turns so that all meet the same machine, and the last cache of each."""
    seconds, caches = {name: float("inf") for name in builds}, {}
    for _ in range(rounds):
        for name, build in builds.items():
            shutil.rmtree(folder / f"cache-{name}", ignore_errors=True)
            started = time.monotonic()
            caches[name] = build(folder / f"cache-{name}")
            seconds[name] = min(seconds[name], time.monotonic() - started)
    return seconds, caches


def difference(one: Cache, other: Cache) -> tuple[float, float]:
    """Largest difference of a log-prob, by rank, and the share of kept ids that are not the same."""
    most, changed, total = 0.0, 0, 0
    for name in one:
        a, b = one[name], other[name]
        most = max(most, float(np.abs(a.logprobs_LTK - b.logprobs_LTK).max()))
        changed, total = changed + int((a.ids_LTK != b.ids_LTK).sum()), total + a.ids_LTK.size
    return most, changed / total


def interacting(folder: Path, cache: Cache, *, num_layers: int, hidden: int, rounds: int) -> float:
    """Seconds of an interact step over two prompts and all their answers; the least of some steps."""
    student = folder / "student"
    if not student.exists():
        shutil.copytree(folder / "teacher", student)
        torch.manual_seed(1)
        LlamaForCausalLM(config_of(num_layers, hidden)).save_pretrained(student)
    size = 2 * NUM_ANSWERS
    changes = [f"distill.batch_size={size}", f"distill.micro_batch_size={size}", "distill.num_layers=1"]
    changes += ["distill.verbalize.steps=1", f"distill.interact.schedule.steps={rounds}", "distill.sft.fraction=0"]
    out = folder / f"run-{cache.path.name}"
    vc.distill(cache, student=str(student), out=out, overrides=changes)
    lines = [line for line in read_metrics(out / "metrics.jsonl") if line["stage"] == "interact" and "loss" in line]
    return min(size * TURN_TOKENS / line["tokens_per_s"] for line in lines)


def shared_prompts(folder: Path, args: argparse.Namespace) -> list[str]:
    rows, targets = answered(args.rows), [args.layers // 2]
    specs = {"prompt": "once for its 4 answers", "row": "with each answer"}
    builds = {
        keep: lambda out, keep=keep: vc.build_teacher(spec_of(folder, rows, keep, targets, keep), out=out)
        for keep in specs
    }
    seconds, caches = fastest(builds, folder, args.rounds)
    most, changed = difference(caches["prompt"], caches["row"])
    student = {"num_layers": max(2, args.layers * 2 // 5), "hidden": args.hidden, "rounds": args.rounds + 2}
    steps = {keep: interacting(folder, cache, **student) for keep, cache in caches.items()}
    return [
        f"{args.rows} prompts of {PROMPT_TOKENS} tokens with {NUM_ANSWERS} answers of {TURN_TOKENS}; a student of "
        f"{student['num_layers']} layers, batches of {2 * NUM_ANSWERS}.",
        "",
        "| a prompt runs | build, s | of each | interact step, s | of each |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {seconds[keep]:.1f} | {seconds[keep] / seconds['row']:.2f} | {steps[keep]:.2f} | "
            f"{steps[keep] / steps['row']:.2f} |"
            for keep, name in specs.items()
        ),
        "",
        f"Largest difference of a log-prob {most:.1e} nats, {100 * changed:.3f} % of the kept ids at another rank.",
        "",
    ]


def padding(num_layers: int, hidden: int, rounds: int) -> list[str]:
    """Micro-batches of 8 samples whose lengths spread like those of docstrings: seconds, and the share of padding."""
    torch.manual_seed(0)
    model = add_lora(
        LlamaForCausalLM(config_of(num_layers, hidden)).requires_grad_(False), rank=64, alpha=64, dropout=0.0
    )
    backbone, draw = Backbone(model.train()), np.random.default_rng(0)
    batches = []
    for _ in range(6):
        lengths = np.clip(draw.lognormal(4.6, 0.45, 8), 30, 400).astype(int)
        ids = [draw.integers(3, 40_000, length) for length in lengths]
        batches.append([Encoded(one, len(one) * 3 // 5, one[len(one) * 3 // 5 :]) for one in ids])
    seconds = np.full((2, len(batches)), np.inf)
    tokens = [0, 0]
    for turn in range(rounds):
        for packed in (0, 1):
            for number, samples in enumerate(batches):
                batch = collate(samples, pad_id=0, row_width=4096 * packed)
                tokens[packed] += batch.inputs["input_ids"].numel() if turn == 0 else 0
                started = time.perf_counter()
                hidden_states = backbone.capture(batch.inputs, [num_layers // 2], batch.rows_T, batch.positions_T)
                torch.stack([state.square().mean() for state in hidden_states.values()]).sum().backward()
                seconds[packed, number] = min(seconds[packed, number], time.perf_counter() - started)
    total = sum(len(one.input_ids) for samples in batches for one in samples)
    padded_s, packed_s = seconds.sum(1)
    return [
        f"Student of {num_layers} layers, adapter of rank 64, forward and backward, no losses; 6 micro-batches of 8.",
        "",
        "| batches | seconds | of padded | padding |",
        "|---|---|---|---|",
        f"| padded | {padded_s:.2f} | 1.00 | {1 - total / tokens[0]:.1%} |",
        f"| packed | {packed_s:.2f} | {packed_s / padded_s:.2f} | {1 - total / tokens[1]:.1%} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher", num_layers=args.layers, hidden=args.hidden)
        rows, targets = conversations(args.rows), [args.layers // 2]
        specs = {
            "together": spec_of(folder, rows, "together", targets),
            "apart": spec_of(folder, apart(rows), "apart", targets),
        }
        builds = {name: lambda out, spec=spec: vc.build_teacher(spec, out=out) for name, spec in specs.items()}
        seconds, caches = fastest(builds, folder, args.rounds)
        most, changed = difference(caches["together"], caches["apart"])
        of_prompts = shared_prompts(folder, args)
    lines = [
        "# Turns of a conversation as one sequence\n",
        setting(sys.argv[1:], "data.py", torch.device("cpu"), ("torch", "transformers", "numpy")),
        f"Random Llama, {args.layers} layers, d {args.hidden}, V {VOCABULARY}; {args.rows} rows of {NUM_TURNS} turns, "
        f"{TURN_TOKENS} tokens each of question and answer; 2 cached layers, top-k 64; least of {args.rounds} rounds.",
        "",
        "| build | seconds | of apart |",
        "|---|---|---|",
        *(f"| turns {name} | {s:.1f} | {s / seconds['apart']:.2f} |" for name, s in seconds.items()),
        "",
        f"Largest difference of a log-prob {most:.1e} nats, {100 * changed:.3f} % of the kept ids at another rank.",
        "",
        *of_prompts,
        *padding(max(1, args.layers * 2 // 5), args.hidden, args.rounds),
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
