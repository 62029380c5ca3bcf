"""`metrics.jsonl`: the log that training writes, and what is read out of it and the other files of a run folder.

Shape suffixes: S student layers, M teacher layers.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vlsi_cache import run_files
from vlsi_cache.errors import CacheNotFoundError, VlsiCacheError
from vlsi_cache.io import with_null, write_atomically
from vlsi_cache.progress import Bar, say
from vlsi_cache.run_files import read_metrics

from .trackers import Trackers


class MetricsLog:
    """`metrics.jsonl` of a run and the progress bar that shows its newest line; units are in the keys.

    One that does not write (`writes`) is that of a process beside the one that does. `trackers` get every line too.
    """

    def __init__(self, folder: Path, *, writes: bool = True, trackers: Trackers | None = None) -> None:
        self.path = folder / "metrics.jsonl"
        self._trackers, self._steps_before = trackers, 0
        self._writes = writes
        self._file: TextIO | None = None
        self._bar: Bar | None = None
        self._started = time.monotonic()

    def start_stage(self, stage: str, *, step: int, num_steps: int) -> None:
        """Begin (or go on with) a stage at `step`; lines that a lost attempt wrote beyond it are dropped."""
        if not self._writes:
            return
        if self._file is not None:
            self._file.close()
        kept = [line for line in read_metrics(self.path) if line["stage"] != stage or line["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        if step and not any((line["stage"], line["step"]) == (stage, step) for line in kept):
            say(f"warning: {self.path} has no line of {stage} step {step}, where training goes on: curves have a gap")
        if self._bar is None:  # the clock goes on where an earlier attempt has stopped
            self._started = time.monotonic() - (kept[-1]["elapsed_s"] if kept else 0.0)
        else:
            self._bar.close()
        self._bar = Bar(stage, unit="step", total=num_steps, done=step)
        last = {line["stage"]: line["step"] for line in kept if line["stage"] != stage}
        self._steps_before = sum(last.values())
        if self._trackers is not None:
            self._trackers.start(self._steps_before + step)

    def write(self, **metrics: Any) -> None:
        if not self._writes:
            return
        assert self._file is not None
        assert self._bar is not None
        metrics["elapsed_s"] = round(time.monotonic() - self._started, 3)
        self._file.write(json.dumps(with_null(metrics)) + "\n")
        self._file.flush()
        speed, waited = int(metrics["tokens_per_s"]), metrics["data_wait_pct"]
        self._bar.note(f"loss={metrics['loss']:.3f}, tok/s={speed}, data={waited:.0f}%")
        self._bar.update()
        if self._trackers is not None:
            self._trackers.log(metrics, self._steps_before + metrics["step"])

    def stage_seconds(self, stage: str) -> float:
        """Time from the first to the last line of a stage, summed over attempts."""
        total, previous = 0.0, 0.0
        for line in read_metrics(self.path):
            # In the logs of earlier releases a new attempt starts its clock again.
            step_s = line["elapsed_s"] - previous if line["elapsed_s"] >= previous else line["elapsed_s"]
            total += step_s if line["stage"] == stage else 0.0
            previous = line["elapsed_s"]
        return total

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._trackers is not None:
            self._trackers.close()


@dataclass(frozen=True)
class RunFiles:
    """What a run folder says about itself."""

    path: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None


def read_run(path: Path) -> RunFiles:
    """Read a run folder; a metrics line that a kill cut short is left out. Raises CacheCorruptError, and
    CacheNotFoundError for another folder."""
    if not (path / run_files.RUN).exists():
        raise CacheNotFoundError(
            f"{path} has no readable {run_files.RUN}: it is no run; runs are listed by: vlsi-cache ls"
        )
    record, metrics = run_files.read_run(path), read_metrics(path / run_files.METRICS)
    return RunFiles(path, record, metrics, run_files.read_evaluation(path))


def next_step(record: Mapping[str, Any]) -> str:
    """What to do about a run that is not finished; one that has failed would only fail again."""
    if record.get("status") == "failed":
        return f"it has failed: {record.get('message')}"
    return f"go on with: {record.get('command')}"


def read_json(path: Path) -> Any:
    """The content of a JSON file; None when it is not there or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def stages_of(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    """Stages in the order in which they ran."""
    return list(dict.fromkeys(str(line["stage"]) for line in metrics))


def curve(metrics: Iterable[Mapping[str, Any]], stage: str, key: str = "loss") -> tuple[list[int], list[float]]:
    """Steps and values of one metric in one stage."""
    lines = [line for line in metrics if line["stage"] == stage and line.get(key) is not None]
    return [int(line["step"]) for line in lines], [float(line[key]) for line in lines]


def layer_curves(metrics: Iterable[Mapping[str, Any]], stage: str) -> tuple[list[int], dict[int, list[float]]]:
    """Steps, and the loss of every layer at each of them, from the `layers` of a stage."""
    lines = [line for line in metrics if line["stage"] == stage and line.get("layers")]
    layers = sorted(int(layer) for layer in lines[0]["layers"]) if lines else []
    return [int(line["step"]) for line in lines], {
        layer: [_or_nan(line["layers"].get(str(layer))) for line in lines] for layer in layers
    }


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def final_loss(values: Sequence[float]) -> float:
    """Mean over the last tenth of the steps, at least one."""
    return float(np.mean(values[-max(1, len(values) // 10) :]))


def match_shares(
    metrics: Iterable[Mapping[str, Any]], teacher_layers: Sequence[int]
) -> tuple[np.ndarray, list[int]] | None:
    """(share of micro-batches [S, M] in which student layer s was matched with teacher layer m, student layers)."""
    lines = [line for line in metrics if any(line.get("matched_layers") or [])]
    matches = [match for line in lines for match in _per_micro_batch(line["matched_layers"]) if match]
    if not matches:
        return None
    column = {layer: index for index, layer in enumerate(teacher_layers)}
    counts = np.zeros((len(matches[0]), len(column)))
    for match in matches:
        for s, layer in enumerate(match):
            counts[s, column[layer]] += 1
    student = lines[-1].get("student_layers") or sorted(int(layer) for layer in lines[-1]["layers"])
    return counts / len(matches), [int(layer) for layer in student]


def _per_micro_batch(matched: list[Any]) -> list[list[int]]:
    """One list of teacher layers per micro-batch, also where a step logged only one."""
    return matched if isinstance(matched[0], list) else [matched]


def teacher_layers(run: RunFiles) -> tuple[list[int], bool]:
    """The teacher's intermediate layers that a run could match, of its log or else of its cache, and True.

    Those that it has met, and False, for a run of an earlier release whose cache is gone or another one by now.
    """
    for line in run.metrics:
        if line.get("teacher_layers"):
            return [int(layer) for layer in line["teacher_layers"]], True
    of_cache = _layers_of_cache(run.record)
    if of_cache is not None:
        return of_cache[:-1], True
    lines = [line["matched_layers"] for line in run.metrics if any(line.get("matched_layers") or [])]
    return sorted({layer for line in lines for match in _per_micro_batch(line) for layer in match}), False


def _layers_of_cache(record: Mapping[str, Any]) -> list[int] | None:
    """The layers of the cache that a run was trained against, if it is still where it was."""
    from vlsi_cache.store.files import load_header

    try:
        header = load_header(Path(record["cache"]))
    except (KeyError, TypeError, OSError, VlsiCacheError):
        return None
    return header.layers if header.digest == record.get("cache_digest") else None


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Centred running mean; the window shrinks at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(0, index - window // 2), np.minimum(len(values), index + window // 2 + 1)
    return (sums[high] - sums[low]) / (high - low)
