"""The stages against the plain forward and supervised steps of the same models: time, waiting for data, memory.

    python tests/benchmarks/stages.py [--real] [--samples N] [--steps N] [--threads N] [--device D] [--out F]

The demo's tiny Qwen2-VL, or with `--real` SmolLM2-135M and a copy of it cut to 12 layers. Steps take turns on the same
micro-batches; times are wall-clock, since stages work in more than one thread. `--tiny` is the demo with few rows, all
in this process: it shows that the benchmark runs, no more.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from measuring import MIB, Report, Took, in_turns, ratio, setting
from processes import Answer, peak, remote, serve, start_peak
from students import (
    PACKAGES,
    TINY,
    Step,
    first_batches,
    forward_step,
    interact_step,
    load_student,
    plain_step,
    prepare,
    sft_step,
    touch,
    verbalize_step,
)

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import load_spec
from vlsi_cache.data.collate import Batch, collate, plan_batches, plan_parts
from vlsi_cache.run_files import read_metrics
from vlsi_cache.store import reader
from vlsi_cache.teacher import build
from vlsi_cache.teacher.forward import Teacher, load_teacher
from vlsi_cache.teacher.inputs import TeacherInputs, open_teacher_inputs
from vlsi_cache.train.distill import distill
from vlsi_cache.train.student import StudentState

SCRIPT = Path(__file__).name
FORWARD, PLAIN, PLAIN_HEAD = "plain forward, no head", "plain sft: adapter", "plain sft: adapter, head, embeddings"
STEPS: dict[str, Callable[[StudentState], Step]] = {
    FORWARD: forward_step,
    "verbalize": verbalize_step,
    PLAIN: partial(plain_step, with_head=False),
    "interact": interact_step,
    PLAIN_HEAD: partial(plain_step, with_head=True),
    "sft": sft_step,
}
TRAINED = [PLAIN, "interact", PLAIN_HEAD, "sft"]  # with an adapter


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--samples", type=int, help="rows; 300 by default, 100 with --real")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each kind")
    parser.add_argument("--rounds", type=int, default=2, help="builds")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, metavar=("STEP", "CHECKPOINTING", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.worker:
        name, checkpointing, folder = args.worker
        serve(memory_of(name, checkpointing == "yes", Path(folder), args.device))
        return
    report = Report("Stages against plain steps")
    report.say(setting(arguments, SCRIPT, torch.device(args.device), PACKAGES))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_samples = args.samples or (32 if args.tiny else 100 if args.real else 300)
        options = {"device": args.device, "overrides": TINY if args.tiny else ()}
        spec = prepare("smollm2" if args.real else "demo", folder, num_samples=num_samples, **options)
        build_part(spec, folder, report, args)
        stage_part(folder, report, args)
        step_part(folder, report, args)
        memory_part(folder, report, args)
    if args.out:
        report.write(args.out)


def build_part(spec: CacheSpec, folder: Path, report: Report, args: argparse.Namespace) -> None:
    """Whole builds, rows that are thrown away, and forward passes, in turns."""
    inputs = open_teacher_inputs(spec)
    teacher, batches = load_teacher(inputs, device=args.device), planned_batches(inputs)
    tokens = sum(len(ids) for ids in inputs.response_ids)
    began = time.perf_counter()
    encoded = [encode(inputs, batch).to(teacher.device) for batch in batches]
    encode_s = time.perf_counter() - began
    works: dict[str, Callable[[], object]] = {
        "forward of the backbone, encoded before": lambda: forward_all(teacher, encoded),
        "rows, nothing written": lambda: [teacher.rows(batch) for batch in batches],
        "build_teacher without loading": lambda: whole_build(spec, inputs, teacher, folder, args.device),
    }
    forward_all(teacher, encoded[-1:])
    times = in_turns(works, args.rounds, teacher.device)
    forward, rows, whole = works
    num_parts = reader.open(folder / "cache").header.num_parts
    # Small parts are padded more than those of the whole spec, in all three alike.
    in_spec = "" if args.tiny else f" ({padding(open_teacher_inputs(load_spec(spec.name))):.1f} in the whole spec)"
    report.say(
        f"## Build\n\nSpec `{spec.name}`, {len(inputs.records)} samples, {tokens} response tokens, {num_parts} parts, "
        f"{len(batches)} batches of at most {spec.run.batch_tokens} tokens, {padding(inputs):.1f} % padding{in_spec}. "
        f"Encoding everything took {encode_s:.2f} s by itself. Medians of {args.rounds} rounds.\n"
    )
    report.table(
        "", "wall, s", "response tokens/s", "/ rows", "/ forward", "CPU of all threads, s", "/ rows", "/ forward"
    )
    for name, took in times.items():
        typical = [statistics.median(x) for x in zip(*took, strict=True)]
        ratios = [[f"{ratio(took, times[base], clock):.3f}" for base in (rows, forward)] for clock in (0, 1)]
        report.row(name, f"{typical[0]:.2f}", f"{tokens / typical[0]:.0f}", *ratios[0], f"{typical[1]:.2f}", *ratios[1])
    report.say(f"\nThe build takes **{ratio(times[whole], times[rows]):.3f}** of the rows alone.\n")


def padding(inputs: TeacherInputs) -> float:
    """Percent of the positions that go through the teacher."""
    lengths = [[int(inputs.num_prompt_N[i]) + len(inputs.response_ids[i]) for i in b] for b in planned_batches(inputs)]
    return 100 * (1 - sum(map(sum, lengths)) / sum(len(batch) * max(batch) for batch in lengths))


def planned_batches(inputs: TeacherInputs) -> list[list[int]]:
    """The batches of a whole build."""
    responses = [len(ids) for ids in inputs.response_ids]
    seed, per_part = inputs.spec.rows.seed, build.part_tokens(inputs)
    batches: list[list[int]] = []
    for part in plan_parts(responses, seed=seed, tokens_per_part=per_part):
        lengths = [int(inputs.num_prompt_N[i]) + responses[i] for i in part]
        batches += [[part[j] for j in batch] for batch in plan_batches(lengths, inputs.spec.run.batch_tokens)]
    return batches


def encode(inputs: TeacherInputs, batch: list[int]) -> Batch:
    return collate([inputs.encoder.encode(inputs.records[i]) for i in batch], pad_id=inputs.encoder.pad_id)


@torch.inference_mode()
def forward_all(teacher: Teacher, batches: Sequence[Batch]) -> None:
    for batch in batches:
        teacher.backbone.capture(batch.inputs, [], batch.rows_T, batch.positions_T)


def whole_build(spec: CacheSpec, inputs: TeacherInputs, teacher: Teacher, folder: Path, device: str) -> None:
    """`build_teacher` with inputs and teacher that are there already; the first cache is kept for the students."""
    num_built = len(list(folder.glob("cache*")))
    with (
        patch.object(build, "open_teacher_inputs", lambda _: inputs),
        patch.object(build, "load_teacher", lambda *_, **__: teacher),
    ):
        build.build_teacher(spec, out=folder / ("cache" if not num_built else f"cache-{num_built}"), device=device)


def stage_part(folder: Path, report: Report, args: argparse.Namespace) -> None:
    """The stages themselves, as `distill` runs them and logs them."""
    num = max(3, args.steps)
    lengths = [f"distill.{key}.steps={num}" for key in ("verbalize", "interact.schedule", "sft.schedule")]
    run = distill(
        folder / "cache",
        student=str(folder / "student"),
        out=folder / "run",
        overrides=[*lengths, "distill.checkpoint_steps=1000000"],
        device=args.device,
    )
    lines = read_metrics(run / "metrics.jsonl")
    report.say(f"\n## Stages of `distill`, {num} steps each, the first left out\n")
    report.table("stage", "response tokens/s, median", "waiting for data, %: mean", "largest")
    for stage in ("verbalize", "interact", "sft"):
        own = [line for line in lines if line["stage"] == stage][1:]
        speed = statistics.median(line["tokens_per_s"] for line in own)
        waits = [line["data_wait_pct"] for line in own]
        report.row(stage, f"{speed:.0f}", f"{statistics.mean(waits):.2f}", f"{max(waits):.2f}")


def step_part(folder: Path, report: Report, args: argparse.Namespace) -> None:
    """One step of every kind on each micro-batch, each with a student of its own."""
    steps = {name: make(load_student(folder, args.device)) for name, make in STEPS.items()}
    state = load_student(folder, args.device)
    micros = first_batches(state, args.steps + 2)
    for step in steps.values():
        for micro in micros[:2]:
            step(micro)
    times: dict[str, list[Took]] = {name: [] for name in steps}
    for micro in micros[2:]:
        works = {name: partial(step, micro) for name, step in steps.items()}
        for name, took in in_turns(works, 1, state.device).items():
            times[name] += took
    batches = [micro.batch for micro in micros[2:]]
    tokens = statistics.mean(len(batch.gold_T) for batch in batches)
    positions = statistics.mean(batch.labels_BS.numel() for batch in batches)
    padded = 1 - statistics.mean(float(batch.inputs["attention_mask"].sum()) for batch in batches) / positions
    report.say(
        f"\n## Steps, update included, in turns on {args.steps} micro-batches of {state.spec.distill.micro_batch_size} "
        f"samples\n\n{tokens:.0f} response tokens of {positions:.0f} positions (mean), {100 * padded:.1f} % of them "
        f"padding; {len(state.layers)} student target layers and the last, {len(state.teacher_layers)} cached teacher "
        "layers. No data is waited for.\n"
    )
    report.table(
        "step", "ms, median", "response tokens/s", f"/ {FORWARD}", f"/ {PLAIN}", f"/ {PLAIN_HEAD}", "/ sft", "CPU ms"
    )
    for name, took in times.items():
        wall_s, cpu_s = (statistics.median(x) for x in zip(*took, strict=True))
        ratios = (f"{ratio(took, times[base]):.2f}" for base in (FORWARD, PLAIN, PLAIN_HEAD, "sft"))
        report.row(name, f"{1e3 * wall_s:.0f}", f"{tokens / wall_s:.0f}", *ratios, f"{1e3 * cpu_s:.0f}")


def memory_part(folder: Path, report: Report, args: argparse.Namespace) -> None:
    """The peak of each training step in a process of its own, with gradient checkpointing and without."""
    kind = "allocated on the GPU" if args.device.startswith("cuda") else "resident"
    report.say(f"\n## Peak memory of a step, MiB {kind} above what was there after loading, two steps\n")
    report.table(
        "step", "gradient checkpointing", "after loading", "above it", f"/ {PLAIN}", f"/ {PLAIN_HEAD}", "/ sft"
    )
    for checkpointing in ("yes",) if args.tiny else ("no", "yes"):
        found: dict[str, Answer] = {}
        for name in TRAINED:
            if args.tiny:
                answers = memory_of(name, checkpointing == "yes", folder, args.device)
            else:
                options = ["--threads", str(args.threads), "--device", args.device]
                answers = remote(SCRIPT, ["--worker", name, checkpointing, str(folder), *options])
            (found[name],) = answers
        for name, answer in found.items():
            ratios = (f"{answer['above'] / max(1, found[base]['above']):.2f}" for base in (PLAIN, PLAIN_HEAD, "sft"))
            values = (f"{answer[key] / MIB:.0f}" for key in ("loaded", "above"))
            report.row(name, checkpointing, *values, *ratios)
    report.say(
        "\nThe student, its adapter, frozen verbalizers and two micro-batches with their rows are there after loading; "
        "activations, gradients and the optimizer's state are above. `sft` and the plain step beside it train head and "
        "embeddings too.\n"
    )


def memory_of(name: str, checkpointing: bool, folder: Path, device: str) -> Iterator[Answer]:
    state = load_student(folder, device, checkpointing=checkpointing)
    micros = first_batches(state, 2)
    step = STEPS[name](state)
    touch(state.model)
    loaded = start_peak(state.device)
    for micro in micros:
        step(micro)
    yield {"loaded": loaded, "above": peak(state.device) - loaded}


if __name__ == "__main__":
    main(sys.argv[1:])
