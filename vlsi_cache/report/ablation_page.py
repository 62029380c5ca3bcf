"""The page of an ablation: a figure and a table for each of its tables."""

from typing import Any

import yaml

from .ablation_figure import ablation_dots
from .ablation_table import (
    TITLES,
    Record,
    label,
    num_failed,
    own_steps,
    remarks,
    ruler_note,
    shown_metrics,
    table_rows,
    values_by_seed,
)
from .page import details, facts_table, figure, html_table, page, paragraph, section, tiles

LEAD = "Variants of one method, trained against the same cache with the same seeds and the same number of steps."


def ablation_page(record: dict[str, Any]) -> str:
    """The whole page, also of an ablation that is not finished."""
    if "tables" not in record:
        return page("Ablation", LEAD, [paragraph("Nothing has run yet.")])
    other = own_steps(record["tables"], record["default"])
    lead = f"{LEAD.removesuffix('.')}, but for {', '.join(other)}." if other else LEAD
    runs = {row["run"] for rows in record["tables"].values() for row in rows if row["run"] is not None}
    numbers = [(str(len(runs)), "variants"), (str(len(record["seeds"])), "seeds")]
    failed = num_failed(record)
    return page(
        "Ablation",
        lead,
        [
            tiles([*numbers, *([(str(failed), "runs failed")] if failed else [])]),
            *(paragraph(line, note=True) for line in ruler_note(record)),
            *(section(f"{axis}: {TITLES[axis]}", *_axis_html(record, axis)) for axis in record["tables"]),
            section("How it was run", *_how(record)),
        ],
    )


def _axis_html(record: Record, axis: str) -> list[str]:
    heads, rows = table_rows(record, axis)
    drawn = [row for row in record["tables"][axis] if row["run"] is not None]
    panels = {
        metric.title: {
            label(row): [metric.scale * value for value in values_by_seed(record, row["run"], metric.key).values()]
            for row in drawn
        }
        for metric in shown_metrics(record)
    }
    default = next(label(row) for row in drawn if row["run"] == record["default"])
    names, several = [label(row) for row in drawn], len(record["seeds"]) > 1
    caption = "A dot is a seed, a bar the mean of several, the dashed line the mean of the default."
    meanings = "\n".join(f"{label(row)}: {row['what']}" for row in record["tables"][axis])
    spread = "In brackets the smallest and the largest seed, and the standard deviation from three seeds on. "
    return [
        figure(ablation_dots(panels, names, default, name=f"ablation-{axis}"), caption) if panels else "",
        html_table(heads, rows, strong=default),
        paragraph(
            f"{spread if several else ''}Differences from {record['default']} are means over the seeds both have, with "
            "the number of seeds that go the same way.",
            note=True,
        ),
        *(paragraph(line, note=True) for line in remarks(record, axis)),
        details("what the names mean", meanings),
    ]


def _how(record: Record) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    facts = [
        ("budget", record["budget"]),
        ("seeds", ", ".join(map(str, record["seeds"]))),
        ("cache", record["cache"]),
        ("student", record["student"]),
        ("device", record["device"]),
        ("versions", versions),
    ]
    spec = yaml.safe_dump(record["spec"], sort_keys=False, allow_unicode=True)
    return [facts_table(facts), details("the resolved spec", spec)]
