"""The page of a demo: three recipes against one cache, on questions that none of them has seen."""

import math
from pathlib import Path
from typing import Any

from vlsi_cache.runs.metrics import RunFiles, curve, read_run

from . import figures
from .cache_page import bytes_html
from .example import example_html
from .layers import LayerSummary
from .page import facts_table, figure, html_table, page, paragraph, section, spec_details, tiles
from .run_parts import match_html, verbalizer_html
from .text import RECIPE_NAMES, demo_rows, human_seconds, kinds_of

Demo = dict[str, Any]
FIRST_LINES = (
    "A frozen teacher ran once and left what each of its layers says about every response token. Then small students "
    "were trained against that cache: sft sees the labels only, last also the teacher's last layer, vlsi all layers."
)


def demo_page(folder: Path, demo: Demo, example: Demo | None, summaries: list[LayerSummary], header: Any | None) -> str:
    """The whole page; `header` is that of the cache, None when the cache is gone."""
    runs = _first_runs(folder, demo)
    vlsi = runs.get("vlsi")
    bytes_per = demo.get("bytes_per_layer_token")
    return page(
        "Three ways to teach a small model",
        FIRST_LINES,
        [
            _tiles(demo),
            section("Questions none of the students has seen", *_result(demo, runs)),
            section("What the cache holds", _cached_layers(summaries), example_html(example) if example else ""),
            section(
                "How the students learned", _losses(runs), match_html(vlsi) if vlsi else "", _layer_losses(folder, demo)
            ),
            section("The student's verbalizers", verbalizer_html(vlsi) if vlsi else ""),
            section("What the cache costs", bytes_html(bytes_per) if isinstance(bytes_per, dict) else "", _times(demo)),
            section("How it was run", *_how(demo, vlsi, header)),
        ],
    )


def _tiles(demo: Demo) -> str:
    items = []
    for recipe in demo["recipes"]:
        seeds = f", mean of {len(demo['seeds'])} seeds" if len(demo["seeds"]) > 1 else ""
        name = f"{recipe}: {RECIPE_NAMES.get(recipe, recipe)}{seeds}"
        items.append((f"{mean_of(_scores(demo, recipe)):.1f} %", name))
    teacher = ((demo.get("teacher") or {}).get("exact_match") or {}).get("all")
    return tiles([*items, *([(f"{100 * teacher:.1f} %", "teacher")] if teacher is not None else [])])


def _result(demo: Demo, runs: dict[str, RunFiles]) -> list[str]:
    teacher = (demo.get("teacher") or {}).get("exact_match") or {}
    scores = {recipe: _by_kind(demo, recipe) for recipe in demo["recipes"]}
    svg = figures.accuracy_bars(scores, kinds_of(list(scores.values())), teacher)
    several = len(demo["seeds"]) > 1
    spread = " Thin lines go from the worst to the best seed." if several else ""
    return [
        *(paragraph(text) for text in _sentences(demo, runs)),
        figure(svg, f"Greedy answers that are the right answer, word for word.{spread}"),
        html_table(*demo_rows(demo), strong="all"),
        paragraph(
            "Exact match in percent" + ("; in brackets the worst and the best seed." if several else "."), note=True
        ),
    ]


def _sentences(demo: Demo, runs: dict[str, RunFiles]) -> list[str]:
    """What can be said and what cannot: differences seed by seed, and how far chance alone reaches."""
    best, *others = reversed(demo["recipes"])
    lines = [_difference(demo, best, other) for other in others]
    evaluations = [run.evaluation for run in runs.values() if run.evaluation]
    num = evaluations[0]["num_samples"] if evaluations else 0
    if num:
        share = mean_of(_scores(demo, best)) / 100
        error = 100 * math.sqrt(max(share * (1 - share), 0.0) / num)
        lines.append(
            f"{num} questions and {len(demo['seeds'])} seed(s): the choice of questions alone moves a number by about "
            f"{error:.1f} points (one standard error)."
        )
    return lines


def _difference(demo: Demo, recipe: str, other: str) -> str:
    gains = [a - b for a, b in zip(_scores(demo, recipe), _scores(demo, other), strict=False)]
    by_seed = f" (by seed: {', '.join(f'{gain:+.1f}' for gain in gains)})" if len(gains) > 1 else ""
    return f"{recipe} minus {other}: {mean_of(gains):+.1f} points of exact match{by_seed}."


def _cached_layers(summaries: list[LayerSummary]) -> str:
    if not summaries:
        return ""
    caption = (
        "The teacher's verbalized layers on the training responses: how surprised each layer is by the right word, how "
        "unsure it is, and how often its top word is the one of the last layer."
    )
    return figure(figures.layer_figure(summaries), caption)


def _losses(runs: dict[str, RunFiles]) -> str:
    """Comparable losses only: divergence from the last layer in the interaction, cross-entropy of the labels in sft."""
    panels = {
        "interact: divergence from the last layer": {
            name: curve(r.metrics, "interact", "kl_last") for name, r in runs.items()
        },
        "sft: cross-entropy of the labels": {name: curve(r.metrics, "sft") for name, r in runs.items()},
    }
    shown = {title: {n: line for n, line in lines.items() if line[0]} for title, lines in panels.items()}
    shown = {title: lines for title, lines in shown.items() if lines}
    caption = "First seed. Each step faint, its running mean on top; the stages of the recipes differ in length."
    return figure(figures.loss_curves(shown), caption) if shown else ""


def _layer_losses(folder: Path, demo: Demo) -> str:
    losses: dict[str, dict[int, list[float]]] = {}
    for recipe, entries in demo["runs"].items():
        for entry in entries:
            run = _read(folder, entry)
            for layer, nll in ((run.evaluation or {}).get("layers") or {}).items() if run else ():
                losses.setdefault(recipe, {}).setdefault(int(layer), []).append(float(nll))
    caption = "How surprised each verbalized layer of the trained student is by the right words of held-out answers."
    return figure(figures.layer_losses(losses), caption) if losses else ""


def _times(demo: Demo) -> str:
    facts = [("teacher pass and writing", demo.get("build_s")), ("reading it all back to verify", demo.get("verify_s"))]
    return facts_table((name, human_seconds(value)) for name, value in facts if value is not None)


def _how(demo: Demo, run: RunFiles | None, header: Any | None) -> list[str]:
    record = run.record if run else {}
    versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
    device = str(record.get("device") or "")
    facts = [("seeds", ", ".join(map(str, demo["seeds"]))), ("device", device), ("versions", versions)]
    facts += [("cache made by", header.created_by if header else "")]
    spec = record.get("spec") or (header.spec if header else None)
    return [paragraph(str(demo.get("budget") or "")), facts_table(facts), spec_details(spec)]


def _first_runs(folder: Path, demo: Demo) -> dict[str, RunFiles]:
    found = {recipe: _read(folder, entries[0]) for recipe, entries in demo["runs"].items() if entries}
    return {recipe: run for recipe, run in found.items() if run is not None}


def _read(folder: Path, entry: Demo) -> RunFiles | None:
    path = folder / entry["run"]
    return read_run(path) if (path / "run.json").is_file() else None


def _scores(demo: Demo, recipe: str) -> list[float]:
    return [100 * entry["exact_match"]["all"] for entry in demo["runs"][recipe] if entry.get("exact_match")]


def _by_kind(demo: Demo, recipe: str) -> dict[str, list[float]]:
    matches = [entry["exact_match"] for entry in demo["runs"][recipe] if entry.get("exact_match")]
    return {kind: [match[kind] for match in matches if kind in match] for kind in kinds_of(matches)}


def mean_of(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
