"""`report.html` and the pages of commands: what each of them shows. How it looks stands in templates/*.html."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlsi_cache.errors import CacheIncompleteError, CacheNotFoundError, command_line
from vlsi_cache.io import write_atomically
from vlsi_cache.run_files import of_this_student, read_ablation, read_demo, read_exits
from vlsi_cache.runs.diagnostics import findings_of
from vlsi_cache.runs.metrics import RunFiles, curve, layer_curves, read_json, read_run, stages_of
from vlsi_cache.store.location import UrlPath, place_of

from . import ablation, figures
from .describe import response_text
from .example import MAX_TOKENS, Trace, grid_of
from .layers import CacheStats, LayerStats, big_number, cache_stats, stats_notes, stats_rows
from .matches import Matches, matches_of
from .mixing import Mixing, mixing_of_run
from .text import (
    RECIPE_NAMES,
    Table,
    check_page,
    demo_exit_rows,
    demo_exits,
    demo_rows,
    evaluation_parts,
    exits_parts,
    kinds_of,
    layer_names,
    mean,
    percent,
    render,
    write_file,
    write_page,
)

if TYPE_CHECKING:
    from vlsi_cache.store.reader import Cache

REPORT_NAME = "report.html"
EXAMPLE_NAME = "example.json"  # of a demo: the sample that its report shows
SHOWN_AT = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # where the paper's Appendix B reads the verbalizers' losses
WINDOW = 0.05  # of the steps, on either side of a point: single steps are noisy
MONOTONE_NATS = 0.02  # a deeper layer may be so much worse: the noise of such a mean
SPEEDS = {
    "tokens_per_s": "speed {:,.0f} response tokens/s",
    "data_wait_pct": "waiting for data {:,.1f} %",
    "memory_gib": "peak memory {:,.2f} GiB",
}
PROBES = (  # title, unit, the student's number, the teacher's
    ("KL of student from teacher", "nats", "kl", None),
    ("loss of the response", "nats", "student_loss", "teacher_loss"),
    ("entropy", "nats", "student_entropy", "teacher_entropy"),
    ("mass on the teacher's top-k", "[%]", "student_mass", "kept_mass"),
    ("top-k in common", "[%]", "overlap", None),
    ("same top word", "[%]", "top1_agreement", None),
)


def write_report(path: Path | str, out: Path | None = None) -> Path:
    """Write the page of a cache, a run, an ablation or a demo to the file `out`; returns the file.

    By default it is `report.html` in the folder; of a cache on an object store, whose `path` is a URL,
    `report-NAME.html` in the current folder. Raises CacheNotFoundError when nothing of these is there, and what
    opening a cache raises.
    """
    folder = place_of(path, "folder")
    if isinstance(folder, UrlPath):
        return _write_remote_report(folder, out or Path(f"report-{folder.name}.html"))
    check_page(out)
    file = out or folder / REPORT_NAME
    if (folder / "demo.json").exists():
        return write_demo_report(folder, file=file)
    if (folder / "ablation.json").exists():
        return write_page(file, ablation_page(read_ablation(folder / "ablation.json")))
    if (folder / "run.json").exists():
        return write_page(file, run_page(read_run(folder)))
    if (folder / "cache.json").is_file():
        from vlsi_cache.store.reader import open

        return write_page(file, cache_page(open(folder, allow_incomplete=True)))
    raise CacheNotFoundError(
        f"{folder} is neither a cache, nor a run, an ablation or a demo; what is below it: {command_line('ls', folder)}"
    )


def _write_remote_report(url: UrlPath, file: Path) -> Path:
    from vlsi_cache.store.reader import open

    check_page(file)
    return write_page(file, cache_page(open(url, allow_incomplete=True)))


def ensure_report(folder: Path) -> None:
    """Write the report of a finished run unless it is there: a kill can come between the two."""
    if not (folder / REPORT_NAME).is_file():
        write_report(folder)


def write_demo_report(folder: Path | str, *, example: dict[str, Any] | None = None, file: Path | None = None) -> Path:
    """Write the report of a demo; `example` (see example_of) is kept in its folder, so that it can be written again."""
    folder = Path(folder)
    again = f"run: {command_line('demo', '-o', folder)}"
    demo = read_demo(folder / "demo.json", again)
    cache = None
    if (folder / demo["cache"] / "cache.json").is_file():
        from vlsi_cache.store.reader import open

        cache = open(folder / demo["cache"], allow_incomplete=True)
    if example is not None:
        layers = example["layers"] or (cache.layers if cache else list(range(1, len(example["grid"]) + 1)))
        write_atomically(folder / EXAMPLE_NAME, json.dumps({**example, "layers": layers}, ensure_ascii=False, indent=1))
    return write_page(file or folder / REPORT_NAME, demo_page(folder, demo, read_json(folder / EXAMPLE_NAME), cache))


def _ancestor(parent: dict[str, Any]) -> tuple[str, str]:
    if parent.get("operation") == "sync":  # which has the same path
        return "before", f"{parent.get('num_samples')} samples, digest {str(parent.get('digest'))[:12]}"
    return "parent", str(parent.get("path", parent))


def run_page(run: RunFiles) -> str:
    """How a run went: result, what looks wrong, loss curves, layers, matches, and the settings."""
    record = run.record
    kind = {"train-verbalizers": "Verbalizers", "distill": "Distillation"}.get(record["kind"], record["kind"])
    status = record.get("status")
    state = status if status in ("done", "failed", "interrupted") else "not finished"
    name = (record.get("spec") or {}).get("name", "")
    findings = [f"the run has failed: {record['message']}"] if status == "failed" else []
    exits = read_exits(run.path)
    if exits is not None and not of_this_student(exits, run.path):
        findings.append(f"its exits were measured on another student; run: {command_line('exits', run.path)}")
        exits = None
    curves = {stage: {"loss": curve(run.metrics, stage)} for stage in stages_of(run.metrics)}
    last = run.metrics[-1] if run.metrics else {}
    scores = evaluation_parts(run.evaluation or {})
    return render(
        "run.html",
        title=f"{kind} {run.path.resolve().name}",
        lead=f"{name}; {record.get('recipe') or record['kind']}; {state}".lstrip("; "),
        evaluation=run.evaluation,
        scores=scores,
        kinds=[[one, str(num), percent(share)] for one, num, share in scores["kinds"]],
        findings=[*findings, *(one.text for one in findings_of(run))],
        losses=figures.loss_curves(curves) if curves else None,
        speed=", ".join(text.format(last[key]) for key, text in SPEEDS.items() if last.get(key) is not None),
        verbalizer_losses=_verbalizer_losses(run),
        **_matched(run),
        probes=_probe_curves(run),
        **_mixing(mixing_of_run(run.path)),
        **_exits(exits),
        record=record,
    )


def cache_page(cache: "Cache") -> str:
    """What a cache is, what its layers know, what it costs, and one sample of it."""
    from vlsi_cache.store.reader import surprise_warning

    header, layers = cache.header, _layers_of(cache)
    state = "complete" if cache.is_complete else f"{len(cache.parts)} of {header.num_parts} parts"
    first_id, sample = next(iter(cache), None), None
    if first_id is not None:
        grid = grid_of(cache[first_id], layers=cache.layers, text=cache.token_text, tokens=slice(MAX_TOKENS))
        sample = {**grid, "png": [], "id": first_id}
    rows = [
        [
            name,
            f"{one.gold_nll:.3f}",
            f"{one.entropy['mean']:.3f}",
            percent(one.top1_agreement),
            percent(one.gold_in_top_k),
            percent(one.kept_mass["mean"] if one.kept_mass else None),
        ]
        for name, one in zip(layer_names(cache.layers), layers, strict=False)
    ]
    provenance = [("made by", header.created_by), ("format version", str(header.format_version))]
    provenance += [_ancestor(parent) for parent in header.parents]
    provenance += [("responses", response_text(origin)) for origin in header.responses]
    return render(
        "cache.html",
        title=f"Cache {header.spec.get('name') or cache.path.name}",
        lead=f"{header.spec.get('description') or 'a vlsi-cache'}; {state}",
        cache=cache,
        warning=surprise_warning(cache),
        layer_figure=figures.layer_figure(layers) if layers else None,
        layer_rows=rows,
        sample=sample,
        stored=_stored_bytes(cache.bytes_per_layer_token()),
        left_out=[[str(one["id"]), str(one["reason"])] for one in header.skipped],
        provenance=provenance,
        fingerprint="\n".join(f"{key}: {value}" for key, value in header.fingerprint.items()),
    )


def demo_page(folder: Path, demo: dict[str, Any], example: dict[str, Any] | None, cache: "Cache | None") -> str:
    """Four recipes against one cache, on questions that none of them has seen; `cache` is None when it is gone."""
    runs: dict[str, list[RunFiles | None]] = {}  # None for a run whose folder is gone
    for recipe, entries in demo["runs"].items():
        paths = [folder / entry["run"] for entry in entries]
        runs[recipe] = [read_run(path) if (path / "run.json").is_file() else None for path in paths]
    first = {recipe: found[0] for recipe, found in runs.items() if found and found[0] is not None}
    vlsi = first.get("vlsi")
    teacher = (demo.get("teacher") or {}).get("exact_match") or {}
    points, by_kind = {}, {}
    for recipe in demo["recipes"]:
        matches = [entry["exact_match"] for entry in demo["runs"][recipe] if entry.get("exact_match")]
        points[recipe] = [100 * match["all"] for match in matches]
        by_kind[recipe] = {kind: [match[kind] for match in matches if kind in match] for kind in kinds_of(matches)}
    best, *others = reversed(demo["recipes"])
    layers, bytes_per = _layers_of(cache) if cache else [], demo.get("bytes_per_layer_token")
    return render(
        "demo.html",
        title="Four ways to teach a small model",
        lead="A frozen teacher ran once and left what each of its layers says about every response token. Then small "
        "students were trained against that cache: sft sees the labels only, last also the teacher's last layer, vlsi "
        "all layers, and any-depth too, to the end and as much as its last layer does not feel.",
        demo=demo,
        recipe_names=RECIPE_NAMES,
        points=points,
        teacher=teacher,
        gains={other: [a - b for a, b in zip(points[best], points[other], strict=False)] for other in others},
        chance=_standard_error(points[best], first),
        accuracy=figures.accuracy_bars(by_kind, kinds_of(list(by_kind.values())), teacher),
        scores=demo_rows(demo),
        layer_figure=figures.layer_figure(layers) if layers else None,
        sample=example,
        losses=_demo_losses(first),
        **(_matched(vlsi) if vlsi else {"matched": None, "match_map": None}),
        exit_lines=figures.exit_lines(found) if (found := demo_exits(demo)) else None,
        exit_rows=demo_exit_rows(demo),
        verbalizer_losses=_verbalizer_losses(vlsi) if vlsi else None,
        stored=_stored_bytes(bytes_per) if isinstance(bytes_per, dict) else None,
        record=vlsi.record if vlsi else {},
        header=cache.header if cache else None,
    )


def ablation_page(record: dict[str, Any]) -> str:
    """The tables of an ablation, also of one that is not finished."""
    lead = "Variants of one method, trained against the same cache with the same seeds and the same number of steps"
    tables = record.get("tables") or {}
    if others := ablation.own_steps(tables, record["default"]) if tables else {}:
        lead += f", but for {', '.join(others)}"
    return render(
        "ablation.html",
        title="Ablation",
        lead=f"{lead}.",
        record=record,
        tables=[_ablation_table(record, axis) for axis in tables],
        num_variants=len(ablation.runs_of(record)) if tables else 0,
        num_failed=ablation.num_failed(record) if tables else 0,
        ruler_note=ablation.ruler_note(record) if tables else [],
    )


def _ablation_table(record: dict[str, Any], axis: str) -> dict[str, Any]:
    heads, rows = ablation.table_rows(record, axis)
    drawn = {ablation.label(row): row["run"] for row in record["tables"][axis] if row["run"] is not None}
    default = next(label for label, run in drawn.items() if run == record["default"])
    panels = {}
    for metric in ablation.shown_metrics(record):
        panels[metric.title] = {
            label: [metric.scale * value for value in ablation.values_by_seed(record, run, metric.key).values()]
            for label, run in drawn.items()
        }
    svg = ablation.ablation_dots(panels, list(drawn), default, name=f"ablation-{axis}") if panels else None
    return {
        "title": ablation.title(record, axis),
        "svg": svg,
        "heads": heads,
        "rows": rows,
        "default": default,
        "remarks": ablation.remarks(record, axis),
        "meanings": "\n".join(f"{ablation.label(row)}: {row['what']}" for row in record["tables"][axis]),
    }


def write_stats_page(stats: CacheStats, file: Path) -> Path:
    """Write the page of `stats`, tables and heat maps of what the layers of a cache say; returns the file."""
    names = layer_names([one.layer for one in stats.layers])
    shown_P = stats.tokens_P > 0
    html = render(
        "stats.html",
        title=f"Layers of cache {stats.name}",
        lead=stats_notes(stats)[0],
        stats=stats,
        perplexity=big_number(stats.layers[-1].perplexity),
        tables=stats_rows(stats),
        notes=stats_notes(stats),
        layer_figure=figures.layer_figure(stats.layers),
        entropy_spread=figures.distribution_map(stats.entropy_share_LB, stats.entropy_edges, names),
        entropy_by_position=figures.position_map(
            stats.entropy_LP[:, shown_P],
            stats.position_edges_P[shown_P].tolist(),
            stats.tokens_P[shown_P].tolist(),
            names,
        ),
        kl_map=None if stats.kl_LL is None else figures.kl_map(stats.kl_LL, names),
    )
    return write_page(file, html)


def write_match_page(found: Matches, file: Path) -> Path:
    """Write the heat maps and the table of `match` as a page; returns the file."""
    title = f"Matched layers of run {Path(found.run).resolve().name}"
    svg = figures.match_map(found)
    return write_page(file, render("match.html", title=title, lead=found.heading, found=found, svg=svg))


def write_match_png(found: Matches, file: Path) -> Path:
    """Write the heat maps as a PNG; returns the file."""
    return write_file(file, figures.match_png(found))


def write_trace_page(trace: Trace, file: Path) -> Path:
    """Write pictures and prompt, and a line of coloured tokens for each layer, as a page; returns the file."""
    lead = f"{len(trace.said)} layers of {Path(trace.model).name}"
    title, mixing = "What each layer would answer", _mixing(trace.mixing)
    return write_page(file, render("trace.html", title=title, lead=lead, trace=trace, **mixing))


def _mixing(found: Mixing | None) -> dict[str, Any]:
    """How layers of a traversed student mix their passes, and its picture; None of a plain student."""
    return {"mixing": found, "mixing_map": None if found is None else figures.mixing_map(found)}


def _exits(result: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a run's exits say and cost, and the picture of their rules; None where they were not measured."""
    return {"exits": result and exits_parts(result), "exit_curves": result and figures.exit_curves(result)}


def _layers_of(cache: "Cache") -> list[LayerStats]:
    """What each layer knows; nothing where no rows are written yet."""
    try:
        return cache_stats(cache, with_kl=False).layers
    except CacheIncompleteError:
        return []


def _stored_bytes(per_layer_token: dict[str, float]) -> dict[str, Any]:
    arrays = {name: value for name, value in per_layer_token.items() if name != "total"}
    return {"svg": figures.bytes_bars(arrays), "total": per_layer_token.get("total", sum(arrays.values()))}


def _verbalizer_losses(run: RunFiles) -> dict[str, Any] | None:
    """Loss of every verbalizer over the verbalize stage; None without that stage."""
    steps, layers = layer_curves(run.metrics, "verbalize")
    if not steps:
        return None
    svg = figures.verbalizer_losses(steps, layers)
    heads, rows = progress_rows(run.metrics)
    return {"svg": svg, "heads": heads, "rows": rows, "note": progress_note(run.metrics)}


def progress_rows(metrics: Sequence[Mapping[str, Any]]) -> Table:
    """Loss of every layer at some shares of the stage's steps (VLsI, Appendix B), as far as it has come."""
    points = _progress(metrics)
    heads = ["layer", *(f"{100 * share:.0f} %" for share in next(iter(points.values()), {}))]
    return heads, [[str(layer), *(f"{nats:.3f}" for nats in at.values())] for layer, at in points.items()]


def progress_note(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What the table is, and which layers end worse than a shallower one."""
    points = _progress(metrics)
    ends = {layer: at[SHOWN_AT[-1]] for layer, at in points.items() if SHOWN_AT[-1] in at}
    pairs = zip(list(ends)[:-1], list(ends)[1:], strict=True)
    worse = [f"{b} ({ends[b]:.3f}) after {a} ({ends[a]:.3f})" for a, b in pairs if ends[b] > ends[a] + MONOTONE_NATS]
    text = "Nats per response token at these shares of the training, each the mean of the steps around it."
    if worse:
        text += f" The losses do not fall with depth at the end: layer {', layer '.join(worse)}."
    return text


def _progress(metrics: Sequence[Mapping[str, Any]]) -> dict[int, dict[float, float]]:
    """Mean loss by layer and share of the stage, for the shares that it has reached."""
    steps, layers = layer_curves(metrics, "verbalize")
    if not steps:
        return {}
    num_steps = next(int(line["num_steps"]) for line in metrics if line["stage"] == "verbalize")
    around = {}
    for share in SHOWN_AT:
        if round(share * num_steps) <= steps[-1]:
            centre = max(1.0, share * num_steps)
            around[share] = np.abs(np.array(steps) - centre) <= max(0.5, WINDOW * num_steps)
    return {
        layer: {share: float(np.mean(np.array(values)[near])) for share, near in around.items()}
        for layer, values in layers.items()
    }


def _matched(run: RunFiles) -> dict[str, Any]:
    """Where the student's layers were matched, and its picture; None where nothing was."""
    found = matches_of(run)
    return {"matched": found, "match_map": None if found is None else figures.match_map(found)}


def _probe_curves(run: RunFiles) -> str | None:
    """Student layers beside their teacher layers at some steps of the interaction."""
    lines = [line for line in run.metrics if line.get("probe")]
    if not lines:
        return None
    layers = sorted({int(layer) for line in lines for layer in line["probe"]})

    def series(key: str | None, unit: str) -> dict[int, list[float]]:
        """A probed number by layer, NaN at the steps without it; layers that never have it are left out."""
        scale, found = 100.0 if unit == "[%]" else 1.0, {}
        for layer in layers:
            values = [line["probe"].get(str(layer), {}).get(key) for line in lines]
            if any(value is not None for value in values):
                found[layer] = [np.nan if value is None else scale * value for value in values]
        return found

    panels = [figures.Panel(title, unit, series(own, unit), series(other, unit)) for title, unit, own, other in PROBES]
    return figures.probe_curves([panel for panel in panels if panel.student], [line["step"] for line in lines], layers)


def _standard_error(points: list[float], runs: dict[str, RunFiles]) -> tuple[int, float] | None:
    """Number of questions, and by how many points the choice of that many alone moves a mean; None without them."""
    num = next((run.evaluation["num_samples"] for run in runs.values() if run.evaluation), 0)
    share = mean(points) / 100
    return (num, 100 * math.sqrt(max(share * (1 - share), 0.0) / num)) if num else None


def _demo_losses(runs: dict[str, RunFiles]) -> str | None:
    """Comparable losses only: divergence from the last layer in the interaction, cross-entropy of the labels in sft."""
    panels = {
        "interact: divergence from the last layer": ("interact", "kl_last"),
        "sft: cross-entropy of the labels": ("sft", "loss"),
    }
    shown = {}
    for title, (stage, key) in panels.items():
        curves = {
            recipe: curve(run.metrics, stage, "ce_last" if stage == "sft" and recipe == "any-depth" else key)
            for recipe, run in runs.items()
        }
        if logged := {recipe: found for recipe, found in curves.items() if found[0]}:
            shown[title] = logged
    return figures.loss_curves(shown) if shown else None
