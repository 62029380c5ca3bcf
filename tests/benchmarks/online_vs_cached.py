"""The interaction step with the teacher in the process, over the whole vocabulary, against the step from the cache.

    python tests/benchmarks/online_vs_cached.py [--verbalizers DIR] [--samples N] [--steps N] [--threads N] [--out F]

SmolLM2-135M (30 layers) teaches a copy of itself cut to 12 layers. Both students start alike and see the same batches.
`--tiny` takes the demo's models and does everything in this process: it shows that the benchmark runs, no more.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import MIB, Report, setting
from online import Teacher, dense_values, now, online_step
from processes import Answer, peak, remote, serve, start_peak
from students import (
    PACKAGES,
    TINY,
    Trained,
    cached_step,
    feed,
    for_interaction,
    load_student,
    prepare,
    read_spec,
    touch,
)

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.models.backbone import head_of
from vlsi_cache.runtime import autocast
from vlsi_cache.sparse.kl import LayerRows, candidate_kl
from vlsi_cache.teacher.build import build_teacher
from vlsi_cache.train.loader import MicroBatch

SCRIPT = Path(__file__).name
MODES = ("online", "cached")
WARM_UP = 2  # steps that are not timed


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--verbalizers", help="a folder of the teacher's verbalizers; fresh ones otherwise")
    parser.add_argument("--samples", type=int, help="rows of one epoch, 400 by default")
    parser.add_argument("--steps", type=int, default=12, help="timed steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("MODE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.worker:
        serve(worker(args.worker[0], Path(args.worker[1]), args.device, args.steps))
        return
    report = Report("A step with the teacher in the process and from its cache")
    report.say(setting(arguments, SCRIPT, torch.device(args.device), PACKAGES))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compare(args, folder, report)
    if args.out:
        report.write(args.out)


def compare(args: argparse.Namespace, folder: Path, report: Report) -> None:
    options = {"verbalizers": args.verbalizers, "device": args.device, "overrides": TINY if args.tiny else ()}
    num_samples = args.samples or (48 if args.tiny else 400)
    spec = prepare("demo" if args.tiny else "smollm2", folder, num_samples=num_samples, **options)

    def start(mode: str) -> Iterator[Answer]:
        if args.tiny:
            return worker(mode, folder, args.device, args.steps)
        options = ["--steps", str(args.steps), "--threads", str(args.threads), "--device", args.device]
        return remote(SCRIPT, ["--worker", mode, str(folder), *options])

    (build,) = start("build")
    workers = {mode: start(mode) for mode in MODES}
    loaded = {mode: next(answers) for mode, answers in workers.items()}
    steps: dict[str, list[Answer]] = {mode: [] for mode in MODES}
    for _ in range(WARM_UP + args.steps):
        for mode, answers in workers.items():  # in turns
            steps[mode].append(next(answers))
    last = {mode: next(answers) for mode, answers in workers.items()}

    describe(spec, build, loaded["online"], args, report)
    times = {mode: [step["seconds"] for step in steps[mode][WARM_UP:]] for mode in MODES}
    time_table(times, steps, report)
    memory_table({mode: loaded[mode] | last[mode] for mode in MODES}, report, args)
    totals({mode: statistics.median(times[mode]) for mode in MODES}, build, spec, report)
    agreement(steps, last, report)


def worker(mode: str, folder: Path, device: str, num_steps: int) -> Iterator[Answer]:
    """What was there before and after loading; every step; the peak and the values for one more batch."""
    where = torch.device(device)
    imported = start_peak(where)
    if mode == "build":
        yield built(folder, device)
        return
    state = load_student(folder, device)
    student = for_interaction(state)
    teacher = Teacher(folder, device) if mode == "online" else None
    for model in (state.model, teacher.backbone.model) if teacher else (state.model,):
        touch(model)
    yield {
        "imported": imported,
        "loaded": start_peak(where),
        "parameters": num_parameters(state.model, student.verbalizers),
        "teacher_parameters": num_parameters(teacher.backbone.model, teacher.verbalizers) if teacher else 0,
    }
    with feed(state, with_rows=teacher is None) as batches:
        used_s = time.process_time()
        for step in range(WARM_UP + num_steps):
            began = now(where)
            micro, marks = batches.next(), [now(where)]
            if teacher is None:
                terms = cached_step(student, micro, step)
            else:
                terms = online_step(teacher, student, micro.batch, step, marks)
            seconds, parts, before_s = now(where) - began, [b - a for a, b in pairwise(marks)], used_s
            used_s = time.process_time()
            yield {
                "seconds": seconds,
                "cpu_s": used_s - before_s,  # of all threads, also while the other worker had its turn
                "wait_s": marks[0] - began,
                "parts": parts,
                "values": terms[:, 0].tolist(),
                "matches": terms[:, 1].tolist(),
                "tokens": len(micro.batch.gold_T),
                "positions": micro.batch.labels_BS.numel(),
            }
        top = peak(where)
        micro = batches.next()
        # The adapter starts at zero: without it both are the student that both began with.
        with student.model.disable_adapter(), torch.no_grad():
            values = dense_values(teacher, student, micro.batch) if teacher else sparse_values(student, micro)
    yield {"peak": top, **values}


def num_parameters(*modules: torch.nn.Module) -> int:
    """Of the models as they were loaded: what trains in an adapter is left out."""
    named = [pair for module in modules for pair in module.named_parameters()]
    return sum(parameter.numel() for name, parameter in named if "lora_" not in name)


def built(folder: Path, device: str) -> Answer:
    began = time.perf_counter()
    cache = build_teacher(read_spec(folder), out=folder / "cache", device=device)
    size = sum(cache.bytes_by_array().values())
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "samples": len(cache), "tokens": cache.num_tokens, "bytes": size}


def sparse_values(student: Trained, micro: MicroBatch) -> Answer:
    """The same from the cache: the unbiased estimate that matching uses, and the ghost value that is trained."""
    state, batch = student.state, micro.batch
    rows = LayerRows.of(micro.rows, tau=state.spec.distill.interact.tau, device=state.device)
    with autocast(state.device):
        hidden: dict[int, Any] = dict(student.verbalizers.capture(batch.inputs, batch.rows_T, batch.positions_T))
        matching, trained = [], []
        for layer in [*student.verbalizers.layers, student.backbone.num_layers]:
            is_last = layer == student.backbone.num_layers
            verbal_TD = hidden[layer] if is_last else student.verbalizers.apply(layer, hidden[layer])
            found = candidate_kl(verbal_TD, head_of(student.backbone), rows)
            matching.append(found.matching_M.tolist())
            trained.append(found.ghost_MT.mean(1).tolist())
    return {"matching": matching, "trained": trained}


def describe(spec: CacheSpec, build: Answer, online: Answer, args: argparse.Namespace, report: Report) -> None:
    distill = spec.distill
    verbalizers = args.verbalizers or ("the spec's" if args.tiny else "fresh")
    report.say(
        f"Spec `{spec.name}`, {build['samples']} samples, {build['tokens']} response tokens; teacher targets "
        f"{list(spec.teacher.layers)} and the last (verbalizers: {verbalizers}); student targets "
        f"{list(distill.layers)} and the last (fresh verbalizers); a step is one micro-batch of "
        f"{distill.micro_batch_size} samples and an update of the adapter of rank {distill.lora.rank}. Parameters: "
        f"teacher {online['teacher_parameters'] / 1e6:.1f} M, student {online['parameters'] / 1e6:.1f} M, with their "
        "verbalizers.\n"
    )
    if args.tiny:
        report.say("Tiny: everything in one process, so memory and times say nothing.\n")


def time_table(times: dict[str, list[float]], steps: dict[str, list[Answer]], report: Report) -> None:
    timed = {mode: steps[mode][WARM_UP:] for mode in MODES}
    tokens, positions = (statistics.mean(step[key] for step in timed["cached"]) for key in ("tokens", "positions"))
    report.say(f"## Time of a step\n\n{tokens:.0f} response tokens of {positions:.0f} positions, mean\n")
    report.table("", "online", "cached", "online / cached")
    pairs = [a / b for a, b in zip(times["online"], times["cached"], strict=True)]
    wall = [statistics.median(times[mode]) for mode in MODES]
    report.row("wall, s: median", *(f"{s:.3f}" for s in wall), f"**{statistics.median(pairs):.2f}** (of each pair)")
    used = [statistics.mean(step["cpu_s"] for step in timed[mode]) for mode in MODES]
    report.row("CPU of the whole process, s: mean", *(f"{s:.3f}" for s in used), f"{used[0] / used[1]:.2f}")
    waits = [statistics.mean(step["wait_s"] for step in timed[mode]) for mode in MODES]
    report.row("waiting for data, s: mean", *(f"{s:.4f}" for s in waits), "")
    names = ("teacher's forward pass", "teacher's log-probs of all targets", "student's part")
    for name, parts in zip(names, zip(*(step["parts"] for step in timed["online"]), strict=True), strict=True):
        report.row(f"of it {name}, s: median", f"{statistics.median(parts):.3f}", "", "")
    report.say("")


def memory_table(found: dict[str, Answer], report: Report, args: argparse.Namespace) -> None:
    kind = "allocated on the GPU" if args.device.startswith("cuda") else "resident"
    report.say(f"## Peak memory of the steps, MiB {kind}\n")
    report.table("", "online", "cached", "cached / online")

    def row(name: str, key: str, less: str = "") -> None:
        values = [found[mode][key] - (found[mode][less] if less else 0) for mode in MODES]
        report.row(name, *(f"{v / MIB:.0f}" for v in values), f"{values[1] / max(values[0], 1):.2f}")

    row("before anything was loaded", "imported")
    row("after loading the models", "loaded")
    row("peak", "peak")
    row("peak above what was there before anything was loaded", "peak", "imported")
    row("peak above what was there after loading", "peak", "loaded")
    report.say("\nThe teacher's weights count online. The optimizer's state comes with the first step.\n")


def totals(step_s: dict[str, float], build: Answer, spec: CacheSpec, report: Report) -> None:
    num_steps = -(-build["samples"] // spec.distill.micro_batch_size)
    rate = build["tokens"] / build["seconds"]
    report.say(
        f"## One epoch, {num_steps} steps: extrapolated from the median step\n\nThe cache was built once in "
        f"{build['seconds']:.1f} s, loading included: {rate:.0f} response tokens/s, {build['bytes'] / 1e6:.1f} MB.\n"
    )
    report.table("students of one epoch", "online, s", "cached with its build, s", "online / cached")
    for num in (1, 10):
        online, cached = (num * num_steps * step_s[mode] for mode in MODES)
        cached += build["seconds"]
        report.row(str(num), f"{online:.0f}", f"{cached:.0f}", f"{online / cached:.2f}")
    saved_s = num_steps * (step_s["online"] - step_s["cached"])
    report.say(f"\nThe build is paid back after {build['seconds'] / saved_s:.1f} epochs of students.\n")


def agreement(steps: dict[str, list[Answer]], last: dict[str, Answer], report: Report) -> None:
    """Both losses on the same batches; the values of one batch for students that have not trained."""
    report.say("## Do both compute the same?\n")
    dense, sparse = (np.array(last[mode]["matching"]) for mode in MODES)
    off, apart = np.abs(sparse - dense), dense > 0.01  # no ratios where the student's layers still are the teacher's
    percent, share = 100 * off[apart] / dense[apart], np.array(last["cached"]["trained"])[apart] / dense[apart]
    num_same = int((dense[:-1, :-1].argmin(1) == sparse[:-1, :-1].argmin(1)).sum())
    report.say(
        f"One batch, students that have not trained, {dense.size} pairs of layers, dense KL {dense.min():.3f} to "
        f"{dense.max():.3f} nats: the value that matches layers is off it by {off.mean():.4f} nats on average, "
        f"{off.max():.4f} at most ({percent.mean():.2f} % and {percent.max():.2f} %); the ghost value that is trained "
        f"is {share.min():.3f} to {share.max():.3f} of it. The nearest teacher layer is the same for {num_same} of "
        f"{len(dense) - 1} student layers.\n"
    )
    losses = {mode: np.array([sum(step["values"]) for step in steps[mode]]) for mode in MODES}
    matches = [np.array([step["matches"] for step in steps[mode]])[:, 1:] for mode in MODES]
    ratio = losses["cached"] / losses["online"]
    first, final = ((losses["online"][i], losses["cached"][i]) for i in (0, -1))
    report.say(
        f"While training, summed over the layers: {first[0]:.3f} online and {first[1]:.3f} cached in the first step, "
        f"{final[0]:.3f} and {final[1]:.3f} in step {len(ratio)}; cached / online {ratio.min():.3f} to "
        f"{ratio.max():.3f}. {100 * (matches[0] == matches[1]).mean():.0f} % of the matches are the same: a draw that "
        "falls between the two estimates differs, and from then on so do the students.\n"
    )
    report.say(NOTES)


NOTES = """## What is fair about it, and what is not

- Both take the same student, adapter, verbalizers, optimizer, batches and draws, and read batches ahead in a thread;
  the online one reads no rows. Steps alternate, so a cached step may find rows that were decoded during the other's
  turn: the CPU time of the whole process counts that too.
- The online step runs the teacher once per micro-batch without gradients, at the response positions and the real
  vocabulary alone; it keeps the probabilities of all targets as one [L, T, V], makes each student layer's logits once,
  serves all candidates with them, and has one layer's graph at a time. Nothing in it is compiled.
- What a cache saves grows with the teacher, and this teacher is small.
- The cached step trains the ghost value, the online one the dense KL. The cost of the teacher's verbalizers is in
  neither, since both need them.
"""

if __name__ == "__main__":
    main(sys.argv[1:])
