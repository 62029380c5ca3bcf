"""Stage ablate: all variants of a table from one cache, with the same budget and the same seeds.

DIR/cache                      the cache, unless another one is named
DIR/caches/NAME                smaller caches cut from it
DIR/runs/seed-S/NAME           one run for each variant and seed
DIR/ablation.json              settings, tables and scores; written again after every run
DIR/ablation.csv, report.html  the tables, when all has run

The first run of a seed is the default; the others take its verbalizers. The layers of a student are measured through
the verbalizers that it was trained with, those of a student without any (`last`, `sft`) through the default's.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.errors import ModelError
from vlsi_cache.evaluation.scores import evaluate
from vlsi_cache.io import refuse_url, write_atomically
from vlsi_cache.progress import say
from vlsi_cache.report.ablation import ablation_csv, own_steps
from vlsi_cache.run_files import read_run
from vlsi_cache.runs.run_dir import locked, versions
from vlsi_cache.runtime import pick_device
from vlsi_cache.store.derive.prune import plan_prune, read_cuts, run_prune
from vlsi_cache.teacher.build import build_teacher
from vlsi_cache.train.distill import distill, distill_spec

from .plan import AblationPlan, PlannedRun, Row, add_up, overrides_between
from .setup import (
    RECORD,
    Ablation,
    check_held_out,
    check_student,
    finished_cache,
    header_to_come,
    identity_of,
    open_ablation,
    read_record,
)
from .variants import DEFAULT

if TYPE_CHECKING:
    from vlsi_cache.store.reader import Cache

TABLE = "ablation.csv"
SECTIONS = ("data", "verbalizer", "distill", "evaluate", "run")  # of the spec, and not of the one in the cache
SCORES = ("exact_match", "nll", "perplexity", "layers", "num_samples")


def ablate(
    spec: CacheSpec,
    *,
    axes: Sequence[str],
    out: Path | str,
    seeds: int = 1,
    cache: Path | str | None = None,
    student: str | None = None,
    variants: Iterable[str] | None = None,
    device: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train and measure every variant of the tables `axes` with `seeds` seeds into the folder `out`, or go on with it.

    The cache is `out/cache`, built when it is missing, or the one named. Seeds count from `distill.seed`. `variants`
    leaves out others than these and the default. A run that diverges is recorded as failed, and tried again the next
    time. Other axes, variants and more seeds may be asked of the same folder: what is finished is taken, and the
    tables add up.

    Returns what `out/ablation.json` holds, or with `dry_run` what there is to do. Raises SpecError,
    FingerprintMismatchError (`out` or the cache is of other settings), RunBusyError, and what build and distill raise.
    """
    refuse_url(out, "out")
    ablation = open_ablation(
        spec, axes=axes, out=Path(out), seeds=seeds, cache=cache, student=student, variants=variants, device=device
    )
    identity = identity_of(ablation)
    record = read_record(ablation.out, identity)
    found = finished_cache(ablation)
    header = found.header if found else header_to_come(ablation.spec)
    check_student(ablation, header)
    check_held_out(ablation)
    plan = ablation.plan(header, found)
    if dry_run:
        return _preview(ablation, plan, record.get("runs", {}))
    ablation.out.mkdir(parents=True, exist_ok=True)
    with locked(ablation.out):
        for leftover in ablation.out.glob(".ablation.*"):
            leftover.unlink()
        record = {"runs": {}, **read_record(ablation.out, identity), **identity}  # now that no other process writes it
        _save(ablation, record)
        if found is None:
            found = build_teacher(ablation.spec, out=ablation.cache_path, device=device)
            plan = ablation.plan(found.header, found)
        record |= _described(ablation, plan, record)
        _run_all(ablation, plan, found, record)
        return record


def _described(ablation: Ablation, plan: AblationPlan, earlier: dict[str, Any]) -> dict[str, Any]:
    """What the record says beside the scores; tables, rows and seeds of earlier calls stay in it."""
    before = {axis: [_row(row) for row in rows] for axis, rows in earlier.get("tables", {}).items()}
    tables = {
        axis: add_up(rows, before.get(axis, []), plan.names[axis], earlier["runs"])
        for axis, rows in plan.tables.items()
    }
    tables = {**earlier.get("tables", {}), **_as_json(tables)}
    return {
        "device": ablation.device or ablation.spec.run.device,
        "versions": versions(),
        "budget": _budget(plan, tables),
        "default": DEFAULT.name,
        "seeds": sorted({*ablation.seeds, *earlier.get("seeds", [])}),
        "tables": tables,
    }


def _run_all(ablation: Ablation, plan: AblationPlan, cache: "Cache", record: dict[str, Any]) -> None:
    """Every run that is not done, seed by seed; then the tables."""
    from vlsi_cache.report.pages import write_report

    say(f"budget: {record['budget']}")
    jobs = [(seed, run) for seed in ablation.seeds for run in plan.runs.values()]
    for number, (seed, run) in enumerate(jobs, start=1):
        _save(ablation, record)
        if _is_done(ablation, record["runs"], run.name, seed):
            continue
        say(f"run {number} of {len(jobs)}: seed {seed}, {run.name} ({run.variant.what})")
        record["runs"].setdefault(run.name, {})[str(seed)] = _one_run(ablation, run, cache, seed)
    _save(ablation, record)
    write_atomically(ablation.out / TABLE, ablation_csv(record))
    write_report(ablation.out)


def _one_run(ablation: Ablation, run: PlannedRun, cache: "Cache", seed: int) -> dict[str, Any]:
    """Train and measure one variant with one seed; one that fails is an entry with its message."""
    folder, default = ablation.folder(run.name, seed), ablation.folder(DEFAULT.name, seed)
    where = {"run": str(folder.relative_to(ablation.out))}
    ruler = _verbalizers_of(default)
    if run.name != DEFAULT.name and ruler is None:
        return _failed(
            where, f"{default} has left no verbalizers, which the other runs of its seed take or are read by"
        )
    source = _cut(ablation, run, cache)
    changes = _overrides(run, source, seed, ruler if run.takes_verbalizers else None)
    try:
        distill(source, student=ablation.student, out=folder, overrides=changes, device=ablation.device)
        scores = _measure(ablation, folder, _verbalizers_of(folder) or _verbalizers_of(default))
    except ModelError as error:
        return _failed(where, str(error))
    trained = read_run(folder)
    stages = trained["stages"]
    steps = sum(stage["steps"] for stage in stages)
    assert steps == sum(run.steps.values()), f"{folder} took {steps} steps, {run.steps} were planned"
    if run.takes_verbalizers:  # the time of training them belongs to every run that has them
        stages += [one for one in read_run(default)["stages"] if one["name"] == "verbalize"]
    return {
        **where,
        "status": "done",
        "steps": steps,
        "seconds": sum(stage["seconds"] for stage in stages),
        "device": _hardware(ablation.device or ablation.spec.run.device),
        "versions": trained["versions"],
        **scores,
    }


def _hardware(device: str) -> str:
    """What it ran on: `cpu`, or the name of the GPU."""
    where = pick_device(device)
    return torch.cuda.get_device_name(where) if where.type == "cuda" else where.type


def _failed(where: dict[str, str], message: str) -> dict[str, Any]:
    """The entry of a run that has failed; the next call tries again."""
    say(f"failed: {message}")
    return {**where, "status": "failed", "message": message}


def _verbalizers_of(run: Path) -> Path | None:
    folder = run / "verbalizers"
    return folder if (folder / "verbalizers.json").is_file() else None


def _cut(ablation: Ablation, run: PlannedRun, cache: "Cache") -> "Cache":
    """The cache that this run reads; a smaller one is made when it is first needed.

    It has the parts of the one it is cut from: so every run sees the samples in the same order.
    """
    if not run.is_cut:
        return cache
    out = ablation.out / "caches" / run.name
    cuts = read_cuts(cache, layers=run.variant.layers, top_k=run.variant.top_k)
    return run_prune(plan_prune(cache, out, cuts, keep_parts=True))


def _overrides(run: PlannedRun, cache: "Cache", seed: int, verbalizers: Path | None) -> list[str]:
    """What turns the spec in the cache into that of the run."""
    stored = distill_spec(cache, student=run.spec.distill.student)
    changes = overrides_between(stored, run.spec, SECTIONS)
    # The cache may have recorded a number for `auto`; training does not read it.
    changes = [one for one in changes if not one.startswith("run.batch_tokens=")]
    if verbalizers is not None:
        changes.append(f"distill.verbalizers={json.dumps(str(verbalizers.resolve()), ensure_ascii=False)}")
    return [*changes, f"distill.seed={seed}"]


def _measure(ablation: Ablation, folder: Path, verbalizers: Path | None) -> dict[str, Any]:
    """The scores of a trained student."""
    trusts = ablation.spec.distill.trust_remote_code
    result = evaluate(
        folder, spec=ablation.spec, verbalizers=verbalizers, device=ablation.device, trust_remote_code=trusts
    )
    return {key: result[key] for key in SCORES}


def _is_done(ablation: Ablation, runs: dict[str, Any], name: str, seed: int) -> bool:
    entry = runs.get(name, {}).get(str(seed))
    return entry is not None and entry["status"] == "done" and (ablation.folder(name, seed) / "run.json").is_file()


def _preview(ablation: Ablation, plan: AblationPlan, runs: dict[str, Any]) -> dict[str, Any]:
    """What there is to do."""
    jobs, tables = [(name, seed) for seed in ablation.seeds for name in plan.runs], _as_json(plan.tables)
    return {
        "budget": _budget(plan, tables),
        "seeds": ablation.seeds,
        "tables": tables,
        "steps": {name: run.steps for name, run in plan.runs.items()},
        "num_runs": len(jobs),
        "num_remaining": sum(not _is_done(ablation, runs, name, seed) for name, seed in jobs),
    }


def _as_json(tables: dict[str, list[Row]]) -> dict[str, list[dict[str, Any]]]:
    return {axis: [{**asdict(row), "names": list(row.names)} for row in rows] for axis, rows in tables.items()}


def _row(stored: dict[str, Any]) -> Row:
    return Row(**{**stored, "names": tuple(stored["names"])})


def _budget(plan: AblationPlan, tables: dict[str, list[dict[str, Any]]]) -> str:
    default = plan.runs[DEFAULT.name]
    parts = ", ".join(f"{stage} {count}" for stage, count in default.steps.items())
    size = default.spec.distill.batch_size
    other = ", ".join(f"{name} {count}" for name, count in own_steps(tables, DEFAULT.name).items())
    told = f", but for {other}" if other else ""
    return f"{plan.num_steps} optimizer steps of {size} samples for every variant ({parts}){told}"


def _save(ablation: Ablation, record: dict[str, Any]) -> None:
    write_atomically(ablation.out / RECORD, json.dumps(record, indent=1))
