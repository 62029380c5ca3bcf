"""Record every number that a tiny run of each stage and the demo give, and compare it after a change of the code.

    python tools/same_numbers.py record FILE [--demo]     before the change
    python tools/same_numbers.py check FILE [--demo]      after it, on the same machine: exits 1 if one digit differs

It drives the command line alone, so code of any shape can be compared. Losses, caches and students are compared to
the last digit, which holds on one machine and its libraries only: this is no test.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "sees", "has", "the", "a", "big", "small", "and"]
# Name of the run, recipe, and what it changes of the spec's `distill` section.
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("vlsi", "vlsi", {}),
    ("last", "last", {}),
    ("sft", "sft", {}),
    ("full", "sft", {"sft.mode": "full"}),
    ("layers", "vlsi", {"interact.mode": "layers", "sft.mode": "full", "lora.rank": 64, "lora.alpha": 64}),
    ("samples", "vlsi", {"batch_reduction": "sample"}),
    ("checkpointing", "vlsi", {"gradient_checkpointing": True}),
    ("jsd", "vlsi", {"interact.intermediate": {"op": "jsd", "beta": 0.3}, "interact.layer_reduction": "mean"}),
    ("skewed", "vlsi", {"interact.intermediate": {"op": "skewed_kl", "skew": 0.2}}),
    ("reverse", "vlsi", {"interact.intermediate": {"op": "reverse_kl"}, "interact.last": {"op": "ce"}}),
    ("l2", "vlsi", {"interact.intermediate": {"op": "l2_topk"}, "interact.last": {"op": "none"}}),
    ("tau", "vlsi", {"interact.tau": 2.0, "interact.alpha_ce": 0.25}),
    ("labels", "vlsi", {"interact.intermediate": {"op": "ce"}}),
    ("no-layers", "vlsi", {"interact.intermediate": {"op": "none"}}),
    ("fade", "vlsi", {"interact.layers_full_until": 0.2, "interact.layers_zero_from": 0.6}),
    ("fixed", "vlsi", {"interact.matching": {"mode": "vlsi", "temperature": "fixed", "fixed_temperature": 0.5}}),
    ("printed", "vlsi", {"interact.matching": {"mode": "vlsi", "temperature": "printed", "scale": 3.0}}),
    ("bottom-k", "vlsi", {"interact.matching": {"mode": "bottom_k", "bottom_k": 2}}),
    *(
        (mode, "vlsi", {"interact.matching": {"mode": mode}})
        for mode in ("order", "range", "multinomial", "uniform", "uniform_stretch", "random")
    ),
]
FLAT = {"op": None, "mode": None}  # keys of a nested choice that the older, flat spelling gave to the choice itself


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--demo", action="store_true", help="the demo with its four recipes too (minutes)")
    parser.add_argument("--flat", action="store_true", help="spell choices as older specs did: `matching: order`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        numbers = tiny_stages(Path(folder), flat=options.flat)
        if options.demo:
            cli("demo", "-o", f"{folder}/demo")
            numbers |= of_folder(Path(folder) / "demo", "demo")
    if options.action == "record":
        options.file.write_text(json.dumps(numbers, indent=0, sort_keys=True) + "\n")
        print(f"{len(numbers)} numbers and digests recorded")
        return 0
    before = json.loads(options.file.read_text())
    keys = sorted(key for key in before if options.demo or not key.startswith("demo/"))
    wrong = [
        f"{key}: {before[key]} before, {numbers.get(key, 'missing')} now"
        for key in keys
        if before[key] != numbers.get(key)
    ]
    print("\n".join([*wrong[:40], f"{len(keys) - len(wrong)} of {len(keys)} are equal"]))
    return bool(wrong)


def cli(*arguments: str) -> str:
    """What a command prints; its messages go to stderr as they come."""
    from vlsi_cache_cli.main import main as vlsi_cache

    printed = io.StringIO()
    sys.argv = ["vlsi-cache", *arguments, "-q"]
    with contextlib.redirect_stdout(printed):
        code = vlsi_cache()
    if code:
        raise SystemExit(f"vlsi-cache {' '.join(arguments)} ended with {code}:\n{printed.getvalue()}")
    return printed.getvalue()


def tiny_stages(folder: Path, *, flat: bool) -> dict[str, Any]:
    """Every stage once, the student's with every choice of its interaction step."""
    teacher = save_model(folder / "teacher", num_layers=5, hidden=32, seed=1)
    student = save_model(folder / "student", num_layers=3, hidden=16, seed=2)
    spec = write_spec(folder, teacher)
    cli("train-verbalizers", str(spec), "-o", str(folder / "verbalizers"))
    with_verbalizers = ["--set", f"teacher.verbalizers={folder / 'verbalizers'}"]
    cli("build-teacher", str(spec), "-o", str(folder / "cache"), *with_verbalizers)
    sampled = ["--set", "rows.kind=sampled", "--set", "rows.num_draws=20"]
    cli("build-teacher", str(spec), "-o", str(folder / "sampled"), *with_verbalizers, *sampled)
    cli("prune", str(folder / "cache"), "-o", str(folder / "pruned"), "--layers", "2,4,last", "--top-k", "4")
    cli("generate", str(spec), "-o", str(folder / "generated.parquet"), "--temperature", "1", "--limit", "12")
    for name, recipe, changes in RUNS:
        sets = [f"distill.{key}={value}" for key, value in spelled(changes, flat)]
        options = ["--student", str(student), "--recipe", recipe, *(x for one in sets for x in ("--set", one))]
        cli("distill", str(folder / "cache"), "-o", str(folder / "runs" / name), *options)
    cli("distill", str(folder / "sampled"), "-o", str(folder / "runs" / "sampled"), "--student", str(student))
    cli("distill", str(folder / "pruned"), "-o", str(folder / "runs" / "pruned"), "--student", str(student))
    cli("evaluate", str(folder / "runs" / "vlsi"))
    numbers = of_folder(folder, "tiny")
    import pyarrow.parquet as pq

    numbers["tiny/generated"] = hashlib.sha256(
        json.dumps(pq.read_table(folder / "generated.parquet").to_pylist(), default=str).encode()
    ).hexdigest()
    for command in (["stats", f"{folder}/cache"], ["match", f"{folder}/runs/vlsi"], ["plan", str(spec)]):
        for key, value in leaves(json.loads(cli(*command, "--json"))):
            if is_number(key, value):
                numbers[f"tiny/{command[0]}/{key}"] = value
    return numbers


def spelled(changes: dict[str, Any], flat: bool) -> list[tuple[str, str]]:
    """Overrides, with nested choices as they are or in the flat spelling."""
    found = []
    for key, value in changes.items():
        if not isinstance(value, dict) or not flat:
            found.append((key, json.dumps(value)))
            continue
        for name, inner in value.items():
            found.append((key if name in FLAT else f"{key.rpartition('.')[0]}.{name}", json.dumps(inner)))
    return found


def of_folder(folder: Path, name: str) -> dict[str, Any]:
    """Everything that training, caches, students and evaluations below a folder say."""
    numbers: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        key = f"{name}/{file.relative_to(folder)}"
        if file.name == "metrics.jsonl":
            for number, line in enumerate(file.read_text().splitlines()):
                numbers |= {f"{key}/{number}/{k}": v for k, v in leaves(json.loads(line)) if is_number(k, v)}
        elif file.name in ("evaluation.json", "demo.json", "teacher-evaluation.json"):
            numbers |= {f"{key}/{k}": v for k, v in leaves(json.loads(file.read_text())) if is_number(k, v)}
        elif file.suffix == ".safetensors" and "checkpoint" not in str(file):
            numbers[key] = tensors_digest(file)
        elif file.name == "cache.json":
            numbers |= {f"{name}/{file.parent.relative_to(folder)}/{k}": v for k, v in arrays_digests(file.parent)}
    return numbers


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Path and value of everything within nested JSON."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in leaves(value[key], f"{path}.{key}" if path else str(key))]
    if isinstance(value, list):
        return [leaf for index, one in enumerate(value) for leaf in leaves(one, f"{path}.{index}")]
    return [(path, value)]


def is_number(key: str, value: Any) -> bool:
    """Whether it is one that the code decides and no clock, no memory and no path."""
    measured = ("_s", "seconds", "per_s", "bytes_alive", "memory", "time", "mib", "gib", "pct", "hours", "tokens_per_s")
    named = [part for part in key.split(".") if any(part == m or part.endswith(m) for m in measured)]
    return isinstance(value, int | float) and not named


def tensors_digest(file: Path) -> str:
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def arrays_digests(cache: Path) -> list[tuple[str, str]]:
    """Digest of every array of every part, read by zarr alone."""
    import zarr

    found = []
    for file in sorted(cache.rglob("zarr.json")):
        if json.loads(file.read_text())["node_type"] == "array":
            array = zarr.open_array(file.parent, mode="r")
            data = array[...].tobytes()  # type: ignore[union-attr]
            found.append((str(file.parent.relative_to(cache)), hashlib.sha256(data).hexdigest()))
    return found


def save_model(folder: Path, *, num_layers: int, hidden: int, seed: int) -> Path:
    """A random Llama and a byte-level tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": ["<|im_start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_spec(folder: Path, teacher: Path) -> Path:
    """A small spec over generated rows, a few parts long."""
    for name, first, count in (("rows", 0, 40), ("heldout", 1000, 12)):
        lines = []
        for index in range(first, first + count):
            words = [WORDS[(index * 7 + j * j) % len(WORDS)] for j in range(1 + index % 7)]
            asked = {"role": "user", "content": f"say {index} {WORDS[index % len(WORDS)]}"}
            answered = {"role": "assistant", "content": " ".join(words)}
            lines.append(json.dumps({"id": f"row-{index}", "messages": [asked, answered]}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    stage = {"batch_size": 4, "micro_batch_size": 2, "checkpoint_steps": 2}
    spec = {
        "name": "tiny",
        "teacher": {"model": str(teacher), "dtype": "float32", "layers": [1, 2, 3, 4]},
        "data": {"path": "rows.jsonl", "max_length": 64},
        "rows": {"top_k": 8, "tail_samples": 3, "taus": [1.0, 2.0]},
        "store": {"part_mib": 0.02},
        "train_verbalizers": {"schedule": {"steps": 6, "learning_rate": 0.01}, **stage},
        "distill": {
            "layers": [1, 2],
            "verbalize": {"steps": 4, "learning_rate": 0.01},
            "interact": {"schedule": {"steps": 5, "learning_rate": 0.01}},
            "sft": {"schedule": {"steps": 4, "learning_rate": 0.01}},
            "lora": {"rank": 4, "alpha": 4},
            "window_parts": 2,
            **stage,
        },
        "evaluate": {"data": {"path": "heldout.jsonl", "max_length": 64}, "max_new_tokens": 8, "batch_size": 4},
        "run": {"device": "cpu", "batch_tokens": 200},
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder / "spec.yaml"


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
