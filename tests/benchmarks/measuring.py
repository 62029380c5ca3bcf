"""Time against a plain product, peak memory, tables and results files: what the benchmarks share.

Times are ratios: a round runs the plain product once and then every contestant once, the ratio is the median over the
rounds. On one CPU thread the clock is the process's own, which stands still while others have the core.

Peak memory is what was allocated at the highest moment above what lay there before, outputs included: on a GPU torch's
allocator counts it, on a CPU the sum of torch's own records of every allocation and release, temporaries inside an
operation too. Only the scratch memory that a BLAS library takes without torch is not seen.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler announces every use

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 1 << 20
LONG_S = 4.0  # a first run longer than this, or twice this for our own, is the only one
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Work:
    """A contestant. `skip`: why it does not run here; `needs_bytes`: a generous guess, compared with the limit."""

    name: str
    run: Callable[[], object]
    needs_bytes: float = 0.0
    skip: str = ""
    own: bool = False  # ours: never skipped for its length


@dataclass(frozen=True)
class Measured:
    name: str
    ratio: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    num_runs: int = 0
    skip: str = ""


@dataclass(frozen=True)
class Limits:
    """What a contestant may take before it is left out, with the reason."""

    num_bytes: float = 6e9
    seconds: float = 25.0
    num_rounds: int = 3
    warm_up: bool = False  # one run before all others, for whatever is compiled


def measure(
    base: Callable[[], object],
    works: Sequence[Work],
    device: torch.device,
    limits: Limits,
    known: Mapping[str, float] | None = None,
) -> list[Measured]:
    """The base, then every work against it.

    `known` has ratios found at smaller shapes, to foresee what would take too long.
    """
    base_s = [timed(base, device)]
    if base_s[0] <= LONG_S:
        base_s = [timed(base, device)]
    found: dict[str, Measured] = {}
    times: dict[str, list[float]] = {}
    for work in works:
        reason = work.skip or _too_much(work, base_s[0], limits, known or {})
        if not reason:
            try:
                if limits.warm_up:
                    work.run()
                seconds, peak = timed_with_peak(work.run, device)
                times[work.name] = [seconds]
                found[work.name] = Measured(work.name, peak_bytes=peak)
            except Exception as error:  # one contestant that breaks must not end the run of the others
                reason = failure(error)
        if reason:
            found[work.name] = Measured(work.name, skip=reason)
    again = [work for work in works if work.name in times and times[work.name][0] <= LONG_S * (1 + work.own)]
    for _ in range(limits.num_rounds if again else 0):
        base_s.append(timed(base, device))
        for work in again:
            times[work.name].append(timed(work.run, device))
    for name, seconds in times.items():
        # The first run paid for the profiler and the first touch of its memory: it counts only where it is alone.
        pairs = list(zip(seconds, base_s, strict=False))[1 if len(seconds) > 1 else 0 :]
        ratio = statistics.median(a / b for a, b in pairs)
        typical = statistics.median(a for a, _ in pairs)
        found[name] = Measured(name, ratio, typical, found[name].peak_bytes, len(pairs))
    plain = Measured("(plain products)", 1.0, statistics.median(base_s), 0, len(base_s))
    return [plain, *[found[work.name] for work in works]]


def _too_much(work: Work, base_s: float, limits: Limits, known: Mapping[str, float]) -> str:
    if work.needs_bytes > limits.num_bytes:
        return f"skipped: needs about {work.needs_bytes / 1e9:.1f} GB, the limit is {limits.num_bytes / 1e9:.0f}"
    expected_s = known.get(work.name, 0.0) * base_s
    if expected_s > limits.seconds and not work.own:
        return f"skipped: would take about {expected_s:.0f} s a run, the limit is {limits.seconds:.0f}"
    return ""


def failure(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"failed: {type(error).__name__}: {lines[0][:160]}"


def timed(run: Callable[[], object], device: torch.device) -> float:
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    _wait(device)
    began = clock()
    result = run()
    _wait(device)
    seconds = clock() - began
    del result
    return seconds


def timed_with_peak(run: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds, and the bytes at the highest moment above those that lay there before."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds = timed(run, device)
        return seconds, torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        seconds = timed(run, device)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    records: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        live += record.nbytes()
        peak = max(peak, live)
    return seconds, peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Took(NamedTuple):
    wall_s: float
    cpu_s: float  # of all threads of the process


def in_turns(works: dict[str, Callable[[], object]], num_rounds: int, device: torch.device) -> dict[str, list[Took]]:
    """What every work took in every round."""
    times: dict[str, list[Took]] = {name: [] for name in works}
    for _ in range(num_rounds):
        for name, work in works.items():
            began = clocks(device)
            work()
            times[name].append(since(began, device))
    return times


def clocks(device: torch.device) -> Took:
    _wait(device)
    return Took(time.perf_counter(), time.process_time())


def since(began: Took, device: torch.device) -> Took:
    now = clocks(device)
    return Took(now.wall_s - began.wall_s, now.cpu_s - began.cpu_s)


def ratio(times: Sequence[Took], base: Sequence[Took], clock: int = 0) -> float:
    """Median over the rounds, of wall (0) or CPU time (1)."""
    return statistics.median(a[clock] / b[clock] for a, b in zip(times, base, strict=True))


class Report:
    """Lines that are printed as they come and kept for the results file."""

    def __init__(self, title: str) -> None:
        self.lines: list[str] = []
        self.say(f"# {title}, {date.today()}\n")

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)

    def table(self, *columns: str) -> None:
        self.row(*columns)
        self.row(*["---"] * len(columns))

    def row(self, *cells: str) -> None:
        self.say(f"| {' | '.join(cells)} |")

    def measured(self, shape: str, rows: Sequence[Measured]) -> None:
        for row in rows:
            if row.skip:
                self.row(shape, row.name, row.skip, "", "", "")
            else:
                ms, mib = f"{1e3 * row.seconds:.4g}", f"{row.peak_bytes / MIB:.4g}" if row.peak_bytes else ""
                self.row(shape, row.name, f"{row.ratio:.2f}", ms, mib, str(row.num_runs))

    def write(self, path: Path) -> None:
        path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")


def ratios(rows: Sequence[Measured]) -> dict[str, float]:
    return {row.name: row.ratio for row in rows if not row.skip}


def setting(
    arguments: Sequence[str],
    script: str,
    device: torch.device,
    names: Sequence[str] = ("torch", "numpy", "triton", "liger_kernel"),
) -> str:
    """Command, machine, versions of the packages `names` and commit."""
    packages = []
    for name in names:
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"no {name}")
    command = " ".join(["python", f"tests/benchmarks/{script}", *arguments])
    hardware = f"{_processor()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        hardware += f"; {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return (
        f"    {command}\n\n{hardware}; {torch.get_num_threads()} thread(s). Python {platform.python_version()}, "
        f"{', '.join(packages)}. Commit {_commit()}.\n"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'processor'} ({platform.machine()})"


def _commit() -> str:
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True).stdout.strip()

    try:
        # Results of earlier runs are no change of what is measured.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../../vlsi_cache")
        return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")
    except OSError:
        return "unknown"
