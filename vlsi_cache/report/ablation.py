"""The tables of an ablation as text and CSV: means, spreads, and differences from the default seed by seed."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .figures import ACCENT, GREY, INK, styled_figure, svg_of
from .text import mean_and_spread, table

Record = Mapping[str, Any]  # the content of ablation.json
Row = Mapping[str, Any]  # of one of its tables
SEEDS_FOR_DEVIATION = 3
LAYERS_NOTE = (
    "layer nll: through what a student was trained with (its verbalizers, or its own norm and head), for last and sft "
    "through the default's verbalizers. These two have moved away from them: verbalizers of their own would read their "
    "layers better."
)
SCORES = ("exact_match", "nll", "perplexity", "layer_nll")
CSV_HEAD: tuple[str, ...] = ("axis", "variant", "seed", "status", *SCORES, "steps", "seconds", "run", "message")


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


def spread_cell(values: Sequence[float], metric: Metric) -> str:
    """`91.2 (90.1 to 92.4, sd 0.9)`; the standard deviation from three seeds on."""
    return mean_and_spread(values, scale=metric.scale, digits=metric.digits, seeds_for_deviation=SEEDS_FOR_DEVIATION)


def difference_cell(record: Record, run: str, metric: Metric) -> str:
    """A run minus the default, the mean over the seeds that both have: `-1.3 (3/3 worse)`.

    The seeds counted are those that go the way of the mean.
    """
    ours, default = (values_by_seed(record, name, metric.key) for name in (run, record["default"]))
    gaps = [ours[seed] - default[seed] for seed in ours if seed in default]
    if not gaps or run == record["default"]:
        return ""
    mean = statistics.fmean(gaps)
    same_way = sum((gap > 0) == (mean > 0) for gap in gaps if gap)
    word = "better" if (mean > 0) == metric.higher_is_better else "worse"
    told = f"{same_way}/{len(gaps)} {word}" if any(gaps) else "the same"
    return f"{metric.scale * mean:+.{metric.digits}f} ({told})"


def shown_metrics(record: Record) -> list[Metric]:
    """Those that were measured at all."""
    return [one for one in METRICS if any(values_by_seed(record, run, one.key) for run in record["runs"])]


def table_rows(record: Record, axis: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of one table; variants that were not possible are not in it."""
    metrics, default = shown_metrics(record), record["default"]
    heads = ["variant"]
    for metric in metrics:
        heads += [metric.title, f"minus {default}"]
    usual = list(values_by_seed(record, default, "steps").values())
    rows = []
    for row in trained_rows(record, axis):
        cells = [label(row)]
        for metric in metrics:
            values = values_by_seed(record, row["run"], metric.key)
            cells += [spread_cell(list(values.values()), metric), difference_cell(record, row["run"], metric)]
        steps, seconds = (list(values_by_seed(record, row["run"], key).values()) for key in ("steps", "seconds"))
        of = f" of {usual[0]:.0f}" if steps and usual and steps[0] != usual[0] else ""
        cells.append(f"{steps[0]:.0f}{of}" if steps else "n/a")
        cells.append(f"{statistics.fmean(seconds):.1f}" if seconds else "n/a")
        rows.append(cells)
    return [*heads, "steps", "training, s"], rows


def trained_rows(record: Record, axis: str) -> list[Row]:
    """The rows of a table that have a run."""
    return [row for row in record["tables"][axis] if row["run"] is not None]


def label(row: Row) -> str:
    """All names of a row: `vlsi = kld+kld`."""
    return " = ".join(row["names"])


def title(record: Record, axis: str) -> str:
    """`k: entries kept of each row`; an earlier release did not record the titles."""
    titles = record.get("titles", {})
    return f"{axis}: {titles[axis]}" if axis in titles else axis


def own_steps(tables: Mapping[str, Sequence[Row]], default: str) -> dict[str, int]:
    """Steps of the rows that are about their number and take others than the default."""
    rows = [row for table in tables.values() for row in table if row.get("num_steps")]
    usual = next((row["num_steps"] for row in rows if row["run"] == default), None)
    return {label(row): row["num_steps"] for row in rows if row["num_steps"] != usual}


def remarks(record: Record, axis: str) -> list[str]:
    """What the numbers of a table do not say: its note, what was not possible, what failed, what is still to come."""
    lines = [note] if (note := record.get("notes", {}).get(axis)) else []
    made: dict[str, dict[str, list[str]]] = {}  # of device and versions: which -> its value -> the runs
    for row in record["tables"][axis]:
        if row["run"] is None:
            lines.append(f"not possible: {label(row)}: {row['reason']}")
            continue
        entries, left = record["runs"].get(row["run"], {}), []
        for seed in record["seeds"]:
            entry = entries.get(str(seed))
            if entry is None:
                left.append(str(seed))
                continue
            if entry["status"] == "failed":
                lines.append(f"failed: {label(row)}, seed {seed}: {entry['message']}")
            for name, value in {"device": entry.get("device"), **(entry.get("versions") or {})}.items():
                if value is not None:  # runs of an earlier release do not say it
                    made.setdefault(name, {}).setdefault(value, []).append(f"{label(row)}, seed {seed}")
        if left:
            lines.append(f"not run yet: {label(row)}, seed {', '.join(left)}")
    for name, by_value in made.items():  # numbers may differ for the reason that runs were not made alike
        usual, *others = sorted(by_value, key=lambda value: len(by_value[value]), reverse=True)
        told = "".join(f", {value} in {len(by_value[value])} ({'; '.join(by_value[value])})" for value in others)
        lines += [f"not made alike: {name} {usual} in {len(by_value[usual])} run(s){told}"] if others else []
    return lines


def ruler_note(record: Record) -> list[str]:
    """Through what the layers were read, if they were."""
    return [LAYERS_NOTE] if any(one.key == "layer_nll" for one in shown_metrics(record)) else []


def runs_of(record: Record) -> set[str]:
    """All runs of the tables."""
    return {row["run"] for axis in record["tables"] for row in trained_rows(record, axis)}


def num_failed(record: Record) -> int:
    """Runs of the tables that have failed, each counted once."""
    entries = [record["runs"].get(run, {}).get(str(seed), {}) for run in runs_of(record) for seed in record["seeds"]]
    return sum(entry.get("status") == "failed" for entry in entries)


def ablation_text(record: Record) -> str:
    """All tables for the terminal."""
    blocks = ["\n".join([f"{len(record['seeds'])} seed(s), {record['budget']}", *ruler_note(record)])]
    for axis in record["tables"]:
        blocks.append("\n".join([title(record, axis), table(*table_rows(record, axis)), *remarks(record, axis)]))
    return "\n\n".join(blocks)


def preview_text(plan: dict[str, Any]) -> str:
    """The variants of every table with their steps, and how much is left to do."""
    blocks = []
    for axis, rows in plan["tables"].items():
        cells, reasons = [], []
        for row in rows:
            steps = plan["steps"].get(row["run"], {})
            parts = ", ".join(f"{stage} {count}" for stage, count in steps.items())
            cells.append([label(row), row["what"], f"{sum(steps.values())} ({parts})" if steps else "not possible"])
            if row["run"] is None:
                reasons.append(f"not possible: {label(row)}: {row['reason']}")
        blocks.append("\n".join([title(plan, axis), table(["variant", "what", "steps"], cells), *reasons]))
    runs = f"{plan['num_runs']} runs ({len(plan['seeds'])} seed(s)), {plan['num_remaining']} of them remain"
    return "\n\n".join([*blocks, f"{plan['budget']}\n{runs}"])


def ablation_csv(record: Record) -> str:
    """One line for each table, variant and seed; numbers as they were measured."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_HEAD, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for axis, rows in record["tables"].items():
        for row in rows:
            where = {"axis": axis, "variant": label(row)}
            if row["run"] is None:
                writer.writerow({**where, "status": "not possible", "message": row["reason"]})
                continue
            for seed in record["seeds"]:
                entry = record["runs"].get(row["run"], {}).get(str(seed), {"status": "not run yet"})
                scores = {metric.key: value_of(entry, metric.key) for metric in METRICS}
                writer.writerow({**entry, **scores, **where, "seed": seed})
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
