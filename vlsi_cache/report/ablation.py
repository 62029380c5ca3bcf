"""The tables of an ablation as text and CSV: means, spreads, and differences from the default seed by seed."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .figures import ACCENT, GREY, INK, styled_figure, svg_of
from .text import table

Record = Mapping[str, Any]  # the content of ablation.json


SEEDS_FOR_DEVIATION = 3


TITLES = {
    "matching": "choice of teacher layers (Table 4e)",
    "operations": "loss at the matched layers + at the last one (Table 4d)",
    "verbalizer": "verbalizers of the student (Table 4f)",
    "sft": "finetuning after the interaction (Table 4c)",
    "loss": "losses",
    "k": "entries kept of each row",
    "layers": "teacher layers kept",
}


LAYERS_NOTE = (
    "layer nll: through the verbalizers that a student was trained with, for last and sft through the default's. These "
    "two have moved away from them: verbalizers of their own would read their layers better."
)


NOTES = {
    "operations": "x: nothing is trained there; l2: variance of the difference of the log-probs over the kept entries. "
    "x+kld has the verbalizers' steps in the interaction, too.",
    "sft": "What stops early takes the first steps of the same schedule.",
    "verbalizer": "The student's side alone: the teacher's rows are what the cache holds.",
}


CSV_HEAD = (
    "axis",
    "variant",
    "seed",
    "status",
    "exact_match",
    "nll",
    "perplexity",
    "layer_nll",
    "steps",
    "seconds",
    "run",
    "message",
)


@dataclass(frozen=True)
class Metric:
    """A score by the key under which `value_of` finds it; shown are `scale` times the value."""

    key: str
    title: str
    scale: float
    digits: int
    higher_is_better: bool


METRICS = (
    Metric("exact_match", "exact match, %", 100.0, 1, True),
    Metric("nll", "nll, nats", 1.0, 3, False),
    Metric("layer_nll", "layer nll, nats", 1.0, 3, False),
)


@dataclass(frozen=True)
class Difference:
    """A variant minus the default, seed by seed: the mean, and in how many of the seeds it is better and worse."""

    mean: float
    num_better: int
    num_worse: int
    num_seeds: int


def value_of(entry: Mapping[str, Any], key: str) -> float | None:
    """A score of one run; None where it was not measured or the run has failed."""
    if key == "exact_match":
        match = entry.get("exact_match")
        return match["all"] if match else None
    if key == "layer_nll":
        layers = entry.get("layers") or {}
        return statistics.fmean(layers.values()) if layers else None
    return entry.get(key)


def values_by_seed(record: Record, run: str | None, key: str) -> dict[int, float]:
    """A score of every seed that has it."""
    entries = record["runs"].get(run, {})
    found = {seed: value_of(entries.get(str(seed), {}), key) for seed in record["seeds"]}
    return {seed: value for seed, value in found.items() if value is not None}


def difference(record: Record, run: str | None, metric: Metric) -> Difference | None:
    """Of the seeds that both the run and the default have; None where there are none."""
    ours, default = (values_by_seed(record, name, metric.key) for name in (run, record["default"]))
    gaps = [ours[seed] - default[seed] for seed in ours if seed in default]
    if not gaps or run == record["default"]:
        return None
    sign = 1 if metric.higher_is_better else -1
    better, worse = sum(sign * gap > 0 for gap in gaps), sum(sign * gap < 0 for gap in gaps)
    return Difference(statistics.fmean(gaps), better, worse, len(gaps))


def spread_cell(values: Sequence[float], metric: Metric) -> str:
    """`91.2 (90.1 to 92.4, sd 0.9)`; the standard deviation from three seeds on."""
    if not values:
        return "n/a"
    shown = [
        f"{metric.scale * value:.{metric.digits}f}" for value in (statistics.fmean(values), min(values), max(values))
    ]
    if len(values) == 1:
        return shown[0]
    deviation = ""
    if len(values) >= SEEDS_FOR_DEVIATION:
        deviation = f", sd {metric.scale * statistics.stdev(values):.{metric.digits}f}"
    return f"{shown[0]} ({shown[1]} to {shown[2]}{deviation})"


def difference_cell(found: Difference | None, metric: Metric) -> str:
    """`-1.3 (3/3 worse)`: the seeds counted are those that go the way of the mean."""
    if found is None:
        return ""
    is_better = (found.mean > 0) == metric.higher_is_better
    count, word = (found.num_better, "better") if is_better else (found.num_worse, "worse")
    told = f"{count}/{found.num_seeds} {word}" if found.num_better or found.num_worse else "the same"
    return f"{metric.scale * found.mean:+.{metric.digits}f} ({told})"


def shown_metrics(record: Record) -> list[Metric]:
    """Those that were measured at all."""
    return [one for one in METRICS if any(values_by_seed(record, run, one.key) for run in record["runs"])]


def table_rows(record: Record, axis: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of one table; variants that were not possible are not in it."""
    metrics = shown_metrics(record)
    heads = ["variant"]
    for metric in metrics:
        heads += [metric.title, f"minus {record['default']}"]
    rows = [
        [label(row), *_score_cells(record, row["run"], metrics), *_cost_cells(record, row["run"])]
        for row in record["tables"][axis]
        if row["run"] is not None
    ]
    return [*heads, "steps", "training, s"], rows


def _score_cells(record: Record, run: str, metrics: Sequence[Metric]) -> list[str]:
    cells = []
    for metric in metrics:
        cells.append(spread_cell(list(values_by_seed(record, run, metric.key).values()), metric))
        cells.append(difference_cell(difference(record, run, metric), metric))
    return cells


def _cost_cells(record: Record, run: str) -> list[str]:
    steps, seconds = (list(values_by_seed(record, run, key).values()) for key in ("steps", "seconds"))
    usual = list(values_by_seed(record, record["default"], "steps").values())
    of = f" of {usual[0]:.0f}" if steps and usual and steps[0] != usual[0] else ""
    return [f"{steps[0]:.0f}{of}" if steps else "n/a", f"{statistics.fmean(seconds):.1f}" if seconds else "n/a"]


def label(row: Mapping[str, Any]) -> str:
    """All names of a row: `vlsi = kld+kld`."""
    return " = ".join(row["names"])


def own_steps(tables: Mapping[str, Sequence[Mapping[str, Any]]], default: str) -> dict[str, int]:
    """Steps of the rows that are about their number and take others than the default."""
    rows = [row for table in tables.values() for row in table if row.get("num_steps")]
    usual = next((row["num_steps"] for row in rows if row["run"] == default), None)
    return {label(row): row["num_steps"] for row in rows if row["num_steps"] != usual}


def remarks(record: Record, axis: str) -> list[str]:
    """What the numbers of a table do not say: what was not possible, what failed, what is still to come."""
    lines = [NOTES[axis]] if axis in NOTES else []
    for row in record["tables"][axis]:
        if row["run"] is None:
            lines.append(f"not possible: {label(row)}: {row['reason']}")
            continue
        entries = record["runs"].get(row["run"], {})
        lines += [
            f"failed: {label(row)}, seed {seed}: {entries[str(seed)]['message']}"
            for seed in record["seeds"]
            if entries.get(str(seed), {}).get("status") == "failed"
        ]
        left = [str(seed) for seed in record["seeds"] if str(seed) not in entries]
        lines += [f"not run yet: {label(row)}, seed {', '.join(left)}"] if left else []
    return [*lines, *_not_made_alike(record, axis)]


def _not_made_alike(record: Record, axis: str) -> list[str]:
    """Device and versions that are not the same for all runs of a table: the numbers may differ for that reason."""
    runs: dict[str, dict[str, list[str]]] = {}  # by what differs and its value
    for row in record["tables"][axis]:
        for seed, entry in record["runs"].get(row["run"], {}).items():
            facts = {"device": entry.get("device"), **(entry.get("versions") or {})}
            for name, value in facts.items():
                if value is not None:  # runs of an earlier release do not say it
                    runs.setdefault(name, {}).setdefault(value, []).append(f"{label(row)}, seed {seed}")
    lines = []
    for name, by_value in runs.items():
        usual, *others = sorted(by_value, key=lambda value: len(by_value[value]), reverse=True)
        told = "".join(f", {value} in {len(by_value[value])} ({'; '.join(by_value[value])})" for value in others)
        lines += [f"not made alike: {name} {usual} in {len(by_value[usual])} run(s){told}"] if others else []
    return lines


def ruler_note(record: Record) -> list[str]:
    """Through what the layers were read, if they were."""
    return [LAYERS_NOTE] if any(one.key == "layer_nll" for one in shown_metrics(record)) else []


def num_failed(record: Record) -> int:
    """Runs of the tables that have failed, each counted once."""
    used = {row["run"] for rows in record["tables"].values() for row in rows if row["run"] is not None}
    entries = [record["runs"].get(run, {}).get(str(seed), {}) for run in used for seed in record["seeds"]]
    return sum(entry.get("status") == "failed" for entry in entries)


def ablation_text(record: Record) -> str:
    """All tables for the terminal."""
    blocks = ["\n".join([f"{len(record['seeds'])} seed(s), {record['budget']}", *ruler_note(record)])]
    for axis in record["tables"]:
        heads, rows = table_rows(record, axis)
        blocks.append("\n".join([f"{axis}: {TITLES[axis]}", table(heads, rows), *remarks(record, axis)]))
    return "\n\n".join(blocks)


def ablation_csv(record: Record) -> str:
    """One line for each table, variant and seed; numbers as they were measured."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for axis, rows in record["tables"].items():
        for row in rows:
            if row["run"] is None:
                line = {"axis": axis, "variant": label(row), "status": "not possible", "message": row["reason"]}
                writer.writerow([line.get(key, "") for key in CSV_HEAD])
                continue
            for seed in record["seeds"]:
                entry = record["runs"].get(row["run"], {}).get(str(seed), {"status": "not run yet"})
                scores = {metric.key: value_of(entry, metric.key) for metric in METRICS}
                line = {**entry, **scores, "axis": axis, "variant": label(row), "seed": seed}
                writer.writerow(["" if line.get(key) is None else line[key] for key in CSV_HEAD])
    return buffer.getvalue()


SeedValues = Mapping[str, Sequence[float]]  # label of a variant -> one value a seed


def ablation_dots(panels: Mapping[str, SeedValues], labels: Sequence[str], default: str, *, name: str) -> str:
    """One panel a score, one line a variant: dots are seeds, the bar their mean, the dashed line the default's."""
    with styled_figure(2.4 + 2.5 * len(panels), 1.0 + 0.3 * len(labels), len(panels), sharey=True) as (figure, axes_N):
        for axes, (title, values) in zip(axes_N, panels.items(), strict=True):
            if values.get(default):
                axes.axvline(float(np.mean(values[default])), color=INK, lw=0.9, linestyle=(0, (3, 2)))
            for y, label in enumerate(labels):
                colour, seeds = ACCENT if label == default else GREY, values.get(label, ())
                axes.plot(seeds, [y] * len(seeds), "o", color=colour, ms=5, alpha=0.75, mew=0)
                if len(seeds) > 1:
                    axes.vlines(float(np.mean(seeds)), y - 0.3, y + 0.3, color=colour, lw=2)
            axes.set(xlabel=title)
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=5)
            axes.grid(axis="x")
        return svg_of(figure, name, "Scores of every variant and seed")
