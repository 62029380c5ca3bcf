"""`write_report`: one self-contained HTML file about a cache, a run, an ablation or a demo. It needs no network."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlsi_cache.errors import CacheNotFoundError, command_line

from . import figures
from .ablation_page import ablation_page
from .demo_page import demo_page
from .describe import response_text
from .evaluation import evaluation_html
from .example import MAX_TOKENS, example_html, grid_of, load_example, save_example
from .page import details, facts_table, figure, html_table, page, paragraph, section, tiles
from .run_parts import findings_html, match_html, probe_html, verbalizer_html
from .stats import (
    LayerSummary,
    RunFiles,
    curve,
    layer_summaries,
    read_record,
    read_run,
    stages_of,
)
from .text import human_bytes, human_seconds, layer_name, percent

if TYPE_CHECKING:
    from vlsi_cache.store.reader import Cache

REPORT_NAME = "report.html"


def write_report(path: Path | str) -> Path:
    """Write `report.html` into the folder of a cache, a run, an ablation or a demo; returns the file.

    Raises CacheNotFoundError when the folder is none of them, and what opening a cache raises.
    """
    folder = Path(path)
    if (folder / "demo.json").is_file():
        return write_demo_report(folder)
    if (folder / "ablation.json").is_file():
        again = f"run again: {command_line('ablate', 'SPEC', '-o', folder)}"
        return _write(folder, ablation_page(read_record(folder / "ablation.json", ("runs",), advice=again)))
    if (folder / "run.json").is_file():
        return _write(folder, run_page(read_run(folder)))
    if (folder / "cache.json").is_file():
        from vlsi_cache.store.reader import open

        return _write(folder, cache_page(open(folder, allow_incomplete=True)))
    raise CacheNotFoundError(
        f"{folder} is neither a cache, nor a run, an ablation or a demo; what is below it: {command_line('ls', folder)}"
    )


def write_demo_report(folder: Path | str, *, example: dict[str, Any] | None = None) -> Path:
    """Write the report of a demo; `example` (see example_of) is kept beside it, so that it can be written again."""
    folder = Path(folder)
    again = f"run: {command_line('demo', '-o', folder)}"
    demo = read_record(folder / "demo.json", ("cache", "recipes", "runs", "seeds"), advice=again)
    cache = _open_if_there(folder / demo["cache"])
    if example is not None:
        layers = example["layers"] or (cache.layers if cache else list(range(1, len(example["grid"]) + 1)))
        save_example(folder, {**example, "layers": layers})
    summaries = layer_summaries(cache) if cache else []
    header = cache.header if cache else None
    return _write(folder, demo_page(folder, demo, load_example(folder), summaries, header))


def cache_page(cache: "Cache") -> str:
    """What a cache is, what its layers know, what it costs, and one sample of it."""
    from vlsi_cache.store.surprise import surprise_warning

    header = cache.header
    state = "complete" if cache.is_complete else f"{len(cache.parts)} of {header.num_parts} parts"
    lead = f"{header.spec.get('description') or 'a vlsi-cache'}; {state}"
    numbers = tiles(
        [
            (f"{cache.num_samples:,}", "samples"),
            (f"{cache.num_tokens:,}", "response tokens"),
            (str(len(cache.layers)), "layers"),
            (human_bytes(sum(cache.bytes_by_array().values())), "on disk"),
        ]
    )
    return page(
        f"Cache {header.spec.get('name') or cache.path.name}",
        lead,
        [
            numbers,
            section("What the layers know", paragraph(surprise_warning(cache)), *_layers_html(layer_summaries(cache))),
            section("One sample", _sample_html(cache)),
            section("Bytes", bytes_html(cache.bytes_per_layer_token())),
            section("Rows left out", *_skipped_html(header.skipped)),
            section("How it was made", *_provenance_html(header)),
        ],
    )


def run_page(run: RunFiles) -> str:
    """How a run went: result, loss curves, layers, matches, and the settings."""
    record = run.record
    names = {"train-verbalizers": "Verbalizers", "distill": "Distillation"}
    state = {"done": "done", "failed": "failed"}.get(record.get("status", ""), "not finished")
    spec = record.get("spec") or {}
    lead = f"{spec.get('name', '')}; {record.get('recipe') or record['kind']}; {state}".lstrip("; ")
    return page(
        f"{names.get(record['kind'], record['kind'])} {run.path.resolve().name}",
        lead,
        [
            section("Result on held-out rows", *evaluation_html(run.evaluation)),
            section("What looks wrong", findings_html(run)),
            section("Training", *_training_html(run)),
            section("Verbalizers", verbalizer_html(run)),
            section("Matched layers", match_html(run)),
            section("Student beside teacher", probe_html(run)),
            section("How it was run", *how_html(record)),
        ],
    )


def bytes_html(per_layer_token: dict[str, float]) -> str:
    """Where the bytes of a cache go."""
    total = per_layer_token.get("total", sum(per_layer_token.values()))
    arrays = {name: value for name, value in per_layer_token.items() if name != "total"}
    caption = f"Bytes on disk per layer and response token; {total:.1f} in all. In a small cache metadata weighs more."
    return figure(figures.bytes_bars(arrays), caption)


def how_html(record: dict[str, Any]) -> list[str]:
    """Command, device, versions and the resolved spec of a run."""
    stages = "; ".join(
        f"{s['name']} {_steps_run(s)} steps in {human_seconds(s['seconds'])}" for s in record.get("stages") or []
    )
    facts = [
        ("command", record.get("command") or ""),
        ("cache", record.get("cache") or ""),
        ("student", record.get("student") or ""),
        ("device", record.get("device") or ""),
        ("stages", stages),
        ("versions", ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())),
    ]
    return [facts_table(facts), details("the resolved spec", _yaml(record.get("spec")))]


def _steps_run(stage: dict[str, Any]) -> str:
    whole = stage.get("schedule_steps", stage["steps"])
    return f"{stage['steps']} of {whole}" if stage["steps"] < whole else f"{stage['steps']}"


def _training_html(run: RunFiles) -> list[str]:
    curves = {stage: {"loss": curve(run.metrics, stage)} for stage in stages_of(run.metrics)}
    if not curves:
        return [paragraph("No step has been logged yet.")]
    caption = (
        "Each step faint, its running mean on top. The loss is what is trained: in verbalize the sum over layers, "
        "in interact the last layer's and, by their weight, the matched layers'."
    )
    last = run.metrics[-1]
    speed = ", ".join(
        f"{label} {last[key]:,.{digits}f} {unit}"
        for key, label, unit, digits in (
            ("tokens_per_s", "speed", "response tokens/s", 0),
            ("data_wait_pct", "waiting for data", "%", 1),
            ("memory_gib", "peak memory", "GiB", 2),
        )
        if last.get(key) is not None
    )
    return [
        figure(figures.loss_curves(curves), caption),
        paragraph(f"At the last step: {speed}." if speed else "", note=True),
    ]


def _layers_html(summaries: list[LayerSummary]) -> list[str]:
    layers = [one.layer for one in summaries]
    rows = [
        [
            layer_name(one.layer, layers),
            f"{one.gold_nll:.3f}",
            f"{one.entropy:.3f}",
            percent(one.top1_agreement),
            percent(one.gold_in_top_k),
            percent(one.kept_mass),
        ]
        for one in summaries
    ]
    heads = ["layer", "loss, nats", "entropy, nats", "top word as last", "response word kept", "kept mass"]
    return [
        figure(
            figures.layer_figure(summaries), "Means over response tokens; the loss is that of the response's words."
        ),
        html_table(heads, rows),
    ]


def _sample_html(cache: "Cache") -> str:
    sample_id = next(iter(cache), None)
    if sample_id is None:
        return ""
    grid = grid_of(cache[sample_id], layers=cache.layers, text=cache.token_text, tokens=slice(MAX_TOKENS))
    note = "" if cache.header.text_xxh3 else "The cache carries no token texts: words are token ids."
    return example_html({**grid, "png": [], "id": sample_id, "question": "", "answer": ""}) + paragraph(note, note=True)


def _skipped_html(skipped: list[dict[str, Any]], *, limit: int = 20) -> list[str]:
    if not skipped:
        return [paragraph("None.")]
    rows = [[str(one["id"]), str(one["reason"])] for one in skipped[:limit]]
    more = len(skipped) - len(rows)
    return [html_table(["row", "reason"], rows), paragraph(f"and {more} more, listed in cache.json" if more else "")]


def _provenance_html(header: Any) -> list[str]:
    facts = [("made by", header.created_by), ("format version", str(header.format_version))]
    facts += [("parent", str(parent.get("path", parent))) for parent in header.parents]
    facts += [("responses", response_text(origin)) for origin in header.responses]
    fingerprint = "\n".join(f"{key}: {value}" for key, value in header.fingerprint.items())
    return [
        facts_table(facts),
        details("the fingerprint", fingerprint),
        details("the resolved spec", _yaml(header.spec)),
    ]


def _open_if_there(path: Path) -> "Cache | None":
    if not (path / "cache.json").is_file():
        return None
    from vlsi_cache.store.reader import open

    return open(path, allow_incomplete=True)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True) if value else ""


def _write(folder: Path, html: str) -> Path:
    """Replace the report in one step."""
    file, temporary = folder / REPORT_NAME, folder / f".{REPORT_NAME}.tmp"
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(file)
    return file
