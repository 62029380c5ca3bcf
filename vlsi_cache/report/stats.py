"""Numbers about caches and runs, in numpy.

Shape suffixes: L layers, T response tokens with a row, K kept entries, S student layers, M teacher layers.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vlsi_cache import run_files
from vlsi_cache.errors import CacheNotFoundError, VlsiCacheError
from vlsi_cache.run_files import read_metrics

if TYPE_CHECKING:
    from vlsi_cache.sparse.rows import SparseRows
    from vlsi_cache.store.part import Row
    from vlsi_cache.store.reader import Cache

MAX_SUMMARY_PARTS = 8  # parts that are read for the per-layer summary: enough for stable means, cheap for any size


@dataclass(frozen=True)
class LayerSummary:
    """Means over response tokens of one cached layer; nats, shares between 0 and 1; `kept_mass` of draws is NaN."""

    layer: int
    entropy: float
    kept_mass: float
    gold_nll: float
    top1_agreement: float  # share of tokens whose top word is also the top word of the final layer
    gold_in_top_k: float


@dataclass(frozen=True)
class RunFiles:
    """What a run folder says about itself."""

    path: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None


def gold_ids(row: "Row") -> np.ndarray:
    """[T]: the response token that each row of the cache is about."""
    return np.asarray(row.response_ids_R)[np.asarray(row.positions_T)].astype(np.int64)


def gold_ranks(row: "Row") -> np.ndarray:
    """[L, T]: rank of the response token among the kept entries, from 0; -1 when it is not among them."""
    return ranks_of(row, gold_ids(row))


def ranks_of(rows: "SparseRows", ids_T: np.ndarray) -> np.ndarray:
    """[L, T]: rank of a token id among the kept entries, from 0; -1 when it is not among them."""
    hits_LTK = np.asarray(rows.ids_LTK).astype(np.int64) == ids_T[None, :, None]
    hits_LTK &= np.isfinite(rows.logprobs_LTK)  # padding has an id too
    return np.where(hits_LTK.any(axis=2), hits_LTK.argmax(axis=2), -1)


def layer_summaries(cache: "Cache", *, max_parts: int = MAX_SUMMARY_PARTS) -> list[LayerSummary]:
    """One summary per cached layer, over evenly spaced parts (all of them in a small cache)."""
    chosen = spaced(cache.parts, max_parts)
    sums = np.zeros((5, len(cache.layers)))
    num_tokens = 0
    for row in (row for part in chosen for row in cache.read_part(part)):
        sums += _row_sums(row)
        num_tokens += row.num_tokens
    means = sums / max(1, num_tokens)
    if cache.header.row_kind == "sampled":
        means[1] = np.nan  # draws have no tail that could be left out
    return [LayerSummary(layer, *(float(x) for x in means[:, i])) for i, layer in enumerate(cache.layers)]


def spaced(items: Sequence[int], num: int) -> list[int]:
    """`num` evenly spaced ones of the items, the first and the last among them; all of them for 0."""
    if not num or num >= len(items):
        return list(items)
    return [items[index] for index in sorted(set(np.linspace(0, len(items) - 1, num).round().astype(int).tolist()))]


def _row_sums(row: "Row") -> np.ndarray:
    top_LT = np.asarray(row.ids_LTK)[:, :, 0]
    return np.stack(
        [
            np.sum(row.entropy_LT, axis=1, dtype=np.float64),
            np.sum(1.0 - np.asarray(row.tail_mass_LT), axis=1, dtype=np.float64),
            np.sum(-np.asarray(row.gold_logprob_LT), axis=1, dtype=np.float64),
            np.sum(top_LT == top_LT[-1:], axis=1),
            np.sum(gold_ranks(row) >= 0, axis=1),
        ]
    )


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


def read_record(file: Path, keys: Iterable[str], *, advice: str) -> dict[str, Any]:
    """What one of our commands has written, told from other files of that name by its `keys`."""
    record = read_json(file)
    if not isinstance(record, dict) or not set(keys) <= record.keys():
        raise CacheNotFoundError(
            f"{file.parent} has no readable {file.name}: it is missing, damaged or of something else; {advice}"
        )
    return cast("dict[str, Any]", record)


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
