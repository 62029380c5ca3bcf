"""Text and pages: tables, templates filled with texts that nobody can trust, and the scores of evaluations and demos.

Every page is one file with everything inside, so that it needs no network. jinja2 is imported when it is used.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlsi_cache.errors import SpecError
from vlsi_cache.io import check_file, refuse_url, write_atomically
from vlsi_cache.progress import human_bytes, human_seconds, printable

if TYPE_CHECKING:
    from jinja2 import Environment

Table = tuple[list[str], list[list[str]]]  # head and rows
RECIPE_NAMES = {
    "sft": "labels only",
    "last": "last layer",
    "vlsi": "all layers",
    "any-depth": "layers to the end",
    "trol": "labels, traversed",
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEAD_BYTES = 4096
FIRST = 5  # of many names that are shown
OPENING = b":root { color-scheme: light dark; --paper: #ffffff;"  # of the style of every page that we have written
KEPT = (0.995, 0.99, 0.98, 0.95, 0.9)  # shares of the last layer's words whose depth is shown


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns with a line under the head; a column that holds numbers only is set to the right."""
    rows = [[printable(cell, keep="") for cell in row] for row in rows]
    columns = list(zip(headers, *rows, strict=True)) if rows else [(head,) for head in headers]
    widths = [max(map(len, column)) for column in columns]
    right = [bool(rows) and all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = []
    for cells in (headers, ["-" * width for width in widths], *rows):
        aligned = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-." or cell in ("", "n/a")


def percent(share: float | None) -> str:
    return "n/a" if share is None or share != share else f"{100 * share:.1f} %"


def mean(values: Sequence[float]) -> float:
    """NaN where there are none."""
    return sum(values) / len(values) if values else math.nan


def mean_and_spread(
    values: Sequence[float], *, scale: float = 100.0, digits: int = 1, seeds_for_deviation: int | None = None
) -> str:
    """Mean, and smallest to largest when there are several: `91.2 (90.1 to 92.4)`.

    From `seeds_for_deviation` values on also the standard deviation: `91.2 (90.1 to 92.4, sd 0.9)`.
    """
    if not values:
        return "n/a"
    shown = [f"{scale * value:.{digits}f}" for value in (statistics.fmean(values), min(values), max(values))]
    if len(values) == 1:
        return shown[0]
    deviation = ""
    if seeds_for_deviation is not None and len(values) >= seeds_for_deviation:
        deviation = f", sd {scale * statistics.stdev(values):.{digits}f}"
    return f"{shown[0]} ({shown[1]} to {shown[2]}{deviation})"


def layer_names(layers: Sequence[int]) -> list[str]:
    """Numbers of the layers, `last` for the final one."""
    return [*map(str, layers[:-1]), "last"]


def visible(word: str) -> str:
    """A token's text with what is invisible made visible."""
    if not word.strip(" "):
        return word.replace(" ", "\u2423") or "\u2205"
    shown = {"\n": "\u21b5", "\t": "\u21e5"}
    return "".join(char if char.isprintable() else shown.get(char, "\ufffd") for char in word)


def render(template: str, **content: Any) -> str:
    """A page (`.html`) or a text (`.txt`) from its template; what the template asks for is in `content`."""
    return _templates().get_template(template).render(content)


def lines_of(template: str, **content: Any) -> list[str]:
    """The lines of a text from its template."""
    return render(template, **content).splitlines()


@cache
def _templates() -> "Environment":
    """The templates. Users' texts are escaped in pages and their control characters written out; what is missing is an
    error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    templates = Environment(
        loader=PackageLoader("vlsi_cache.report"),
        autoescape=select_autoescape(["html"]),
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "bytes": human_bytes,
        "percent": percent,
        "seconds": human_seconds,
        "mean": mean,
        "some": _some,
        "short": short,
        "sentence": lambda text: text[0].upper() + text[1:],
        "visible": visible,
        "yaml": _yaml,
    }
    return templates


def short(value: Any) -> str:
    """The value as text, its end cut off where it is long."""
    text = str(value)
    return text if len(text) <= 72 else f"{text[:69]}..."


def _some(names: Sequence[Any]) -> str:
    """The first of the names, with dots where there are more."""
    shown = ", ".join(map(str, names[:FIRST]))
    return f"{shown}, ..." if len(names) > FIRST else shown


def _yaml(value: Any) -> str:
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the one in C is ten times as fast, where PyYAML has it
    return yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True)


def write_page(file: Path, html: str) -> Path:
    """Write one self-contained HTML document; returns the file."""
    _check_page_name(file)
    return write_file(file, html.encode())


def check_page(file: Path | None) -> None:
    """Raise SpecError for a name that is none of a page, or a place where none can go or where one is not ours."""
    if file is None:
        return
    _check_page_name(file)
    check_file(file)
    if file.exists() and OPENING not in file.read_bytes()[:HEAD_BYTES]:
        raise SpecError(f"{file} exists and is no page of vlsi-cache; choose another name with -o, or move it away")


def check_picture(file: Path | None) -> None:
    """Raise SpecError for a name that is none of a PNG file, or a place where none can go."""
    if file is None:
        return
    if file.suffix.lower() != ".png":
        raise SpecError(f"{file} is to be a picture: its name must end in .png")
    check_file(file)
    if file.exists() and not file.read_bytes().startswith(PNG_SIGNATURE):
        raise SpecError(f"{file} exists and is no PNG file; choose another name, or move it away")


def _check_page_name(file: Path) -> None:
    refuse_url(file, "page")
    if file.suffix.lower() not in (".html", ".htm"):
        raise SpecError(f"{file} is to be a page: its name must end in .html")


def write_file(file: Path, content: bytes) -> Path:
    """Write a file that is there whole or not at all; returns it. Raises SpecError where there is a folder."""
    if file.is_dir():
        raise SpecError(f"{file} is a folder; name a file")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)
    return file


def kinds_of(scores: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """All kinds of questions that occur, `all` first."""
    found = {kind: None for score in scores for kind in score or {}}
    return sorted(found, key=lambda kind: (kind != "all", kind))


def demo_table(demo: Mapping[str, Any]) -> str:
    """Exact match of every recipe on held-out questions, for the terminal: mean and spread over the seeds."""
    headers, rows = demo_rows(demo)
    title = f"exact match on held-out questions, %, {len(demo['seeds'])} seed(s)"
    return f"{title}\n{table(headers, rows)}"


def demo_rows(demo: Mapping[str, Any]) -> Table:
    """The headline table: kinds of questions, then perplexity and time; one column per recipe."""
    runs, teacher = demo["runs"], demo.get("teacher") or {}
    match = teacher.get("exact_match") or {}
    rows = []
    for kind in kinds_of([match, *(run["exact_match"] for of in runs.values() for run in of)]):
        by_recipe = [
            [run["exact_match"][kind] for run in runs[recipe] if kind in (run["exact_match"] or {})]
            for recipe in demo["recipes"]
        ]
        by_recipe.append([match[kind]] if kind in match else [])
        rows.append([kind, *map(mean_and_spread, by_recipe)])
    for key, name, digits in (("perplexity", "perplexity", 3), ("seconds", "training, s", 0)):
        cells = []
        for of in (*(runs[recipe] for recipe in demo["recipes"]), [teacher]):
            values = [run[key] for run in of if run.get(key) is not None]
            cells.append(mean_and_spread(values, scale=1.0, digits=digits))
        rows.append([name, *cells[:-1], cells[-1] if key in teacher else ""])
    heads = [f"{recipe} ({RECIPE_NAMES.get(recipe, recipe)})" for recipe in demo["recipes"]]
    return ["questions", *heads, "teacher"], rows


def demo_exits_table(demo: Mapping[str, Any]) -> str:
    """What the layers of the students answer, for the terminal; empty where it was not measured."""
    found = demo_exit_rows(demo)
    return f"next words of held-out answers, by the layer that says them\n{table(*found)}" if found else ""


def demo_exit_rows(demo: Mapping[str, Any]) -> Table | None:
    """Right words and loss at every layer of the recipes that have exits: mean and spread over the seeds."""
    exits = demo_exits(demo)
    layers = sorted({layer for of_layer in exits.values() for layer in of_layer})
    rows = []
    for layer in layers:
        found = [of_layer.get(layer, []) for of_layer in exits.values()]
        right = [mean_and_spread([one["accuracy"] for one in of_seeds]) for of_seeds in found]
        nats = [mean_and_spread([one["nll"] for one in of_seeds], scale=1.0, digits=3) for of_seeds in found]
        rows.append([f"{layer} (last)" if layer == layers[-1] else str(layer), *right, *nats])
    heads = [*(f"{recipe}: right, %" for recipe in exits), *(f"{recipe}: nats" for recipe in exits)]
    return (["layer", *heads], rows) if rows else None


def demo_exits(demo: Mapping[str, Any]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """What was measured of exits by recipe and layer, one for each seed."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for recipe, runs in demo["runs"].items():
        for one in (one for run in runs for one in run.get("exits") or []):
            found.setdefault(recipe, {}).setdefault(one["layer"], []).append(one)
    return found


def evaluation_table(result: Mapping[str, Any]) -> str:
    """The content of `evaluation.json` for the terminal."""
    parts = evaluation_parts(result)
    lines = [f"held-out samples: {result['num_samples']}{parts['left_out']}"] if "num_samples" in result else []
    lines += [f"{name}: {result[name]:.4g}" for name in ("perplexity", "nll") if result.get(name) is not None]
    if parts["kinds"]:
        rows = [[kind, str(count), f"{100 * share:.1f}"] for kind, count, share in parts["kinds"]]
        lines += ["", table(["kind", "samples", "exact match, %"], rows)]
    blocks = ["\n".join(lines), "\n".join(parts["notes"]), parts["layers"] and table(*parts["layers"])]
    blocks += ["\n".join(parts["teacher"]), parts["divergences"] and table(*parts["divergences"])]
    return "\n\n".join(block for block in blocks if block)


DRAFT_HEADS = ["drafts that stand, %", "words a pass", "times as fast"]


def exit_plan_table(exits: Sequence[Mapping[str, Any]]) -> str:
    """What cached layers could draft, for the terminal."""
    rows = [[str(one["layer"]), f"{100 * one['agreement']:.1f}", *_drafts(one)] for one in exits]
    return table(["layer", "agrees, %", *DRAFT_HEADS], rows)


def exits_parts(result: Mapping[str, Any]) -> dict[str, Any]:
    """What `exits.json` says, for the terminal and for a page: a table of exits, and one of depth by rule."""
    heads = ["layer", "right, %", "nats per token", "agrees, %", "weights, M", "ms per token", *DRAFT_HEADS]
    *exits, last = result["exits"]
    rows = [[str(one["layer"]), *_exit(one), *_drafts(one)] for one in exits]
    rows.append([f"{last['layer']} (last)", *_exit(last), *_drafts(last)])
    kept = [[f"{100 * share:g}", *(_depth_for(points, share) for points in result["rules"].values())] for share in KEPT]
    return {
        "exits": (heads, rows),
        "rules": (["of the last layer's words, %", *(f"mean depth by {rule}" for rule in result["rules"])], kept),
        "note": f"{_measured_on(result)}; exits are read by {_reader(result)}; speed-up by weights read.",
    }


def _exit(one: Mapping[str, Any]) -> list[str]:
    """What an exit says, reads and takes."""
    scores = [f"{100 * one['accuracy']:.1f}", f"{one['nll']:.3f}", f"{100 * one['agreement']:.1f}"]
    return [*scores, f"{one['weights'] / 1e6:,.3g}", "" if one["seconds"] is None else f"{1e3 * one['seconds']:.2f}"]


def _drafts(one: Mapping[str, Any]) -> list[str]:
    """What its drafts come to; nothing of an exit that cannot draft, and of the last layer."""
    if one.get("acceptance") is None:
        return ["", "", ""]
    return [f"{100 * one['acceptance']:.1f}", f"{one['tokens_per_pass']:.2f}", f"{one['speedup']:.2f}"]


def _measured_on(result: Mapping[str, Any]) -> str:
    where = "held-out samples" if result["rows"] == "evaluate" else f"samples of {result['rows']}"
    trained = {
        None: "",
        False: "",
        True: f", NOT HELD OUT: the run was trained on {result.get('num_trained_on')} of them",
    }
    return f"{result['num_samples']:,} {where}{trained[result.get('trained_on')]}"


def _reader(result: Mapping[str, Any]) -> str:
    return result["verbalizers"] or "the student's own norm and head"


def _depth_for(points: Sequence[Mapping[str, float]], share: float) -> str:
    """The least mean depth of a rule that keeps this share of the last layer's words."""
    depths = [point["depth"] for point in points if point["agreement"] >= share]
    return f"{min(depths):.2f}" if depths else ""


def exits_table(result: Mapping[str, Any]) -> str:
    """The content of `exits.json` for the terminal."""
    parts = exits_parts(result)
    return "\n\n".join([parts["note"], table(*parts["exits"]), table(*parts["rules"])])


def evaluation_parts(result: Mapping[str, Any]) -> dict[str, Any]:
    """What `evaluation.json` says, for the terminal and for a page: sentences, and tables (None where there is none).

    `kinds` are the kinds of questions, each with its number of samples and its share of right answers.
    """
    match, counts = result.get("exact_match") or {}, result.get("num_by_kind") or {}
    nlls, found = result.get("layers") or {}, result.get("cache") or {}
    divergences = None
    if found.get("layers"):  # of every verbalized student layer from every cached teacher layer
        heads = ["KL, nats: student layer", *(f"to {layer}" for layer in found["teacher_layers"][:-1]), "to last"]
        divergences = heads, [[layer, *(f"{kl:.3f}" for kl in kls)] for layer, kls in found["layers"].items()]
    return {
        "left_out": f" ({result['num_skipped']:,} left out)" if result.get("num_skipped") else "",
        "kinds": [(kind, counts.get(kind, result["num_samples"]), match[kind]) for kind in kinds_of([match])],
        "notes": lines_of(
            "evaluation_notes.txt",
            beams=result.get("num_beams") or 1,
            drafts=result.get("drafts"),
            borrowed=result.get("verbalizers"),
        ),
        "layers": (["layer", "nats per token"], [[n, f"{nll:.3f}"] for n, nll in nlls.items()]) if nlls else None,
        "teacher": lines_of("teacher_notes.txt", found=found, num_trained_on=found.get("num_trained_on"))
        if found
        else [],
        "divergences": divergences,
    }
