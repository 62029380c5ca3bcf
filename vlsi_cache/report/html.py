"""`write_report`: one self-contained HTML file about a cache, a run, an ablation or a demo. It needs no network."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlsi_cache.errors import CacheNotFoundError, command_line
from vlsi_cache.io import refuse_url
from vlsi_cache.run_files import read_ablation
from vlsi_cache.runs.metrics import RunFiles, curve, read_record, read_run, stages_of

from . import figures
from .ablation import ablation_page
from .cache_page import cache_page
from .demo_page import demo_page
from .evaluation import evaluation_html
from .example import load_example, save_example
from .layers import layer_summaries
from .page import facts_table, figure, page, paragraph, section, spec_details, write_page
from .run_parts import findings_html, match_html, probe_html, verbalizer_html
from .text import human_seconds

if TYPE_CHECKING:
    from vlsi_cache.store.reader import Cache

REPORT_NAME = "report.html"


def write_report(path: Path | str) -> Path:
    """Write `report.html` into the folder of a cache, a run, an ablation or a demo; returns the file.

    Raises CacheNotFoundError when the folder is none of them, and what opening a cache raises.
    """
    refuse_url(path, "folder")
    folder, file = Path(path), Path(path) / REPORT_NAME
    if (folder / "demo.json").exists():
        return write_demo_report(folder)
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


def ensure_report(folder: Path) -> None:
    """Write the report of a finished run unless it is there: a kill can come between the two."""
    if not (folder / REPORT_NAME).is_file():
        write_report(folder)


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
    return write_page(folder / REPORT_NAME, demo_page(folder, demo, load_example(folder), summaries, header))


def run_page(run: RunFiles) -> str:
    """How a run went: result, loss curves, layers, matches, and the settings."""
    record = run.record
    names = {"train-verbalizers": "Verbalizers", "distill": "Distillation"}
    state = {name: name for name in ("done", "failed", "interrupted")}.get(record.get("status", ""), "not finished")
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
    return [facts_table(facts), spec_details(record.get("spec"))]


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


def _open_if_there(path: Path) -> "Cache | None":
    if not (path / "cache.json").is_file():
        return None
    from vlsi_cache.store.reader import open

    return open(path, allow_incomplete=True)
