"""How many tokens a batch of the build may have on this machine: found by trying, for `run.batch_tokens: auto`.

Each try runs the heaviest batch that the build itself would run, so it meets the most padded tokens and their rows.
"""

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from vlsi_cache.data.collate import plan_batches
from vlsi_cache.errors import BatchTooLargeError
from vlsi_cache.progress import say

from .forward import NO_PART, PartBatch, Teacher
from .inputs import TeacherInputs

USED_SHARE = 0.8  # of the memory that is available before the first try
GAIN = 1.05  # tokens per second that a batch of twice the size must bring
MOST_TOKENS = 1 << 18
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Trial:
    """What one batch took: its padded tokens, its share of the available memory, and its real tokens per second."""

    num_tokens: int
    memory_share: float
    tokens_per_s: float


def find_batch_tokens(teacher: Teacher, parts: list[list[int]]) -> int:
    """The number for these parts on this machine; says which and why. Raises BatchTooLargeError if no sample fits."""
    inputs = teacher.inputs
    devices = {parameter.device for parameter in teacher.backbone.model.parameters()}
    share = memory_gauge({device for device in devices if device.type != "meta"})  # meta: offloaded to the disk

    def run(batch: list[int]) -> Trial:
        seconds, used = [], 0.0
        prepared = teacher.prepare(PartBatch(NO_PART, batch))  # not timed: a thread does it while the teacher works
        for _ in range(2):  # the first run at a new size pays for memory and compilation
            started = time.monotonic()
            used = max(used, share(lambda: teacher.collect(teacher.launch(prepared))))
            seconds.append(time.monotonic() - started)
        return Trial(inputs.padded_tokens(batch), used, sum(inputs.lengths(batch)) / min(seconds))

    longest = max(inputs.lengths([i for part in parts for i in part]), default=1)
    start = 1 << math.ceil(math.log2(longest))
    number, reason = grow(lambda tokens: heaviest_batch(inputs, parts, tokens), inputs.padded_tokens, run, start)
    say(f"batch tokens: {number} ({reason})")
    return number


def heaviest_batch(inputs: TeacherInputs, parts: list[list[int]], batch_tokens: int) -> list[int]:
    """Of all batches that the build would run, the one with the most padded and response tokens."""
    plans = ((part, plan_batches(inputs.lengths(part), batch_tokens)) for part in parts)
    batches = [[part[j] for j in batch] for part, plan in plans for batch in plan]
    return max(batches, key=lambda b: inputs.padded_tokens(b) + sum(len(inputs.response_ids[i]) for i in b), default=[])


def grow(
    heaviest: Callable[[int], list[int]],
    padded_tokens: Callable[[list[int]], int],
    run: Callable[[list[int]], Trial],
    start: int,
) -> tuple[int, str]:
    """Double the tokens as long as the memory does and it pays; the last number that was good, and why no larger one.

    What a size needs is foretold from the one before, in proportion to its tokens, and not tried if it is too much.
    """
    number, batch = start, heaviest(start)
    if not batch:
        return number, "there is no data"
    last = run(batch)
    while True:
        more = heaviest(2 * number)
        at = f"{last.memory_share:.0%} of the available memory, {last.tokens_per_s:.0f} tokens/s"
        foretold = last.memory_share * padded_tokens(more) / last.num_tokens
        if more == batch:
            return number, f"{at}; a larger one would not put more samples together"
        if 2 * number > MOST_TOKENS:
            return number, f"{at}; larger ones are not tried"
        if foretold > USED_SHARE:
            return number, f"{at}; {2 * number} would take about {foretold:.0%}"
        try:
            trial = run(more)
        except BatchTooLargeError:
            return number, f"{at}; {2 * number} is out of memory"
        if trial.memory_share > USED_SHARE:
            return number, f"{at}; {2 * number} takes {trial.memory_share:.0%}"
        if trial.tokens_per_s < GAIN * last.tokens_per_s:
            return number, f"{at}; {2 * number} is no faster ({trial.tokens_per_s:.0f} tokens/s)"
        number, batch, last = 2 * number, more, trial


def memory_gauge(devices: set[torch.device]) -> Callable[[Callable[[], object]], float]:
    """A function that runs some work and returns the share it took of the memory that is available now."""
    available = {device: available_bytes(device) for device in devices}
    before = {device: _used_bytes(device) for device in devices}

    def share(work: Callable[[], object]) -> float:
        for device in devices:
            _forget_peak(device)
        work()
        return max((_peak_bytes(device) - before[device]) / max(1, available[device]) for device in devices)

    return share


def available_bytes(device: torch.device) -> int:
    """What may still be allocated there: of the GPU, or of the machine and of the limits this process is under."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min([_machine_bytes(), *_cgroup_bytes()])


def _cgroup_bytes() -> Iterator[int]:
    """What the limits of this process (version 2 or 1 of control groups) leave, with the file cache that can go."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError, KeyError):  # no such file, or `max`: no limit
            allowed, used = (int((CGROUP / name).read_text()) for name in (limit, usage))
            stat = dict(line.split() for line in (CGROUP / limit).with_name("memory.stat").read_text().splitlines())
            yield allowed - used + int(stat[cache])


def _machine_bytes() -> int:
    with suppress(OSError):
        return _status_bytes(Path("/proc/meminfo"), "MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # no Linux: half of what is built in


def _used_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        return _status_bytes(Path("/proc/self/status"), "VmRSS")
    return 0


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # where it cannot be reset, an old peak is taken for the new one: too careful, no harm
            Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        return _status_bytes(Path("/proc/self/status"), "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status_bytes(file: Path, key: str) -> int:
    """The value of a `key:   123 kB` line."""
    return next(int(line.split()[1]) * 1024 for line in file.read_text().splitlines() if line.startswith(f"{key}:"))
