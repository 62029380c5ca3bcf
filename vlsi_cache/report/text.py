"""Numbers and tables in plain text."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlsi_cache.progress import printable

RECIPE_NAMES = {"sft": "labels only", "last": "last layer", "vlsi": "all layers"}


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns with a line under the head; a column that holds numbers only is set to the right."""
    rows = [[printable(cell, keep="") for cell in row] for row in rows]
    columns = list(zip(headers, *rows, strict=True)) if rows else [(head,) for head in headers]
    widths = [max(map(len, column)) for column in columns]
    right = [bool(rows) and all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = [list(headers), ["-" * width for width in widths], *map(list, rows)]
    return "\n".join(_line(cells, widths, right) for cells in lines)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    set_cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
    return "  ".join(set_cells).rstrip()


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-." or cell in ("", "n/a")


def human_bytes(num_bytes: float) -> str:
    """`1234567` -> `1.2 MB`; decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 999.5:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def human_seconds(seconds: float) -> str:
    """`754` -> `12 min 34 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float | None) -> str:
    return "n/a" if share is None or share != share else f"{100 * share:.1f} %"


def mean_and_spread(values: Sequence[float], *, scale: float = 100.0, digits: int = 1) -> str:
    """Mean, and smallest to largest when there are several: `91.2 (90.1 to 92.4)`."""
    if not values:
        return "n/a"
    scaled = [scale * value for value in values]
    mean = f"{sum(scaled) / len(scaled):.{digits}f}"
    return mean if len(scaled) == 1 else f"{mean} ({min(scaled):.{digits}f} to {max(scaled):.{digits}f})"


def layer_name(layer: int, layers: Sequence[int]) -> str:
    """`last` for the final layer, else its number."""
    return "last" if layer == layers[-1] else str(layer)


def kinds_of(scores: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """All kinds of questions that occur, `all` first."""
    found = {kind: None for score in scores for kind in score or {}}
    return sorted(found, key=lambda kind: (kind != "all", kind))


def demo_table(demo: Mapping[str, Any]) -> str:
    """Exact match of every recipe on held-out questions, for the terminal: mean and spread over the seeds."""
    headers, rows = demo_rows(demo)
    title = f"exact match on held-out questions, %, {len(demo['seeds'])} seed(s)"
    return f"{title}\n{table(headers, rows)}"


def demo_rows(demo: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the headline table: kinds of questions, then perplexity and time; one column per recipe."""
    runs, teacher = demo["runs"], demo.get("teacher") or {}
    match = teacher.get("exact_match") or {}
    kinds = kinds_of([match, *(run["exact_match"] for of in runs.values() for run in of)])
    rows = []
    for kind in kinds:
        cells = [mean_and_spread(_values(runs[recipe], kind)) for recipe in demo["recipes"]]
        rows.append([kind, *cells, mean_and_spread([match[kind]] if kind in match else [])])
    for key, name in (("perplexity", "perplexity"), ("seconds", "training, s")):
        cells = [_plain_values(runs[recipe], key) for recipe in demo["recipes"]]
        rows.append([name, *cells, _plain_values([teacher], key) if key in teacher else ""])
    heads = [f"{recipe} ({RECIPE_NAMES.get(recipe, recipe)})" for recipe in demo["recipes"]]
    return ["questions", *heads, "teacher"], rows


def _values(runs: Sequence[Mapping[str, Any]], kind: str) -> list[float]:
    return [run["exact_match"][kind] for run in runs if kind in (run["exact_match"] or {})]


def _plain_values(runs: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [run[key] for run in runs if run.get(key) is not None]
    return mean_and_spread(values, scale=1.0, digits=0 if key == "seconds" else 3)
