"""Stage ablate: all variants of a table from one cache, with the same budget and the same seeds.

DIR/cache                      the cache, unless another one is named: a folder or a URL
DIR/caches/NAME                smaller caches cut from it
DIR/runs/seed-S/NAME           one training for each seed and each variant with settings of its own
DIR/ablation.json              settings, tables and scores; written again after every run
DIR/ablation.csv, report.html  the tables, when all has run

The first run of a seed is the default; the others take its verbalizers. The layers of a student are measured through
the verbalizers that it was trained with, those of a student without any (`last`, `sft`) through the default's.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import change, spec_from_dict
from vlsi_cache.data.records import read_records
from vlsi_cache.errors import FingerprintMismatchError, ModelError, SpecError, list_problems
from vlsi_cache.evaluation.scores import evaluate
from vlsi_cache.io import check_folder, refuse_url, write_atomically
from vlsi_cache.models.load import ModelRef, resolve_model
from vlsi_cache.progress import say
from vlsi_cache.report.ablation import ablation_csv, own_steps
from vlsi_cache.report.pages import write_report
from vlsi_cache.run_files import read_ablation, read_run
from vlsi_cache.runs.run_dir import LOCK_NAME, differences, locked, versions, whole_spec
from vlsi_cache.runtime import pick_device
from vlsi_cache.store import reader
from vlsi_cache.store.derive import check_target
from vlsi_cache.store.derive.prune import plan_prune, read_cuts, run_prune
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.store.location import place_of
from vlsi_cache.teacher.build import build_teacher, cache_header, parts_of
from vlsi_cache.teacher.inputs import open_teacher_inputs
from vlsi_cache.train.distill import FIXED_BY_THE_CACHE, distill, distill_spec
from vlsi_cache.train.fitting import check_tokenizer

from .variants import DEFAULT, Axis, PlannedRun, Row, add_up, overrides_between, plan_runs, read_axes

if TYPE_CHECKING:
    from vlsi_cache.store.reader import Cache

RECORD, TABLE = "ablation.json", "ablation.csv"
IDENTITY = ("spec", "cache", "cache_digest", "student", "student_digest")
SECTIONS = ("data", "verbalizer", "distill", "evaluate", "run")  # of the spec, and not of the one in the cache
SCORES = ("exact_match", "nll", "perplexity", "layers", "num_samples")
Runs = dict[str, PlannedRun]  # in the order of training
Tables = dict[str, list[Row]]


@dataclass(frozen=True)
class Ablation:
    """What all runs share; `spec` names the student, `cache_path` is where the cache is or will be."""

    out: Path
    spec: CacheSpec
    axes: dict[str, Axis]
    seeds: list[int]
    cache_path: Path
    is_own_cache: bool
    student: str
    device: str | None

    def folder(self, name: str, seed: int) -> Path:
        return self.out / "runs" / f"seed-{seed}" / name

    def is_done(self, record: dict[str, Any], run: PlannedRun, seed: int) -> bool:
        """Whether a run is trained and measured, and its folder still there."""
        entry = record.get("runs", {}).get(run.name, {}).get(str(seed), {})
        return entry.get("status") == "done" and (self.folder(run.trained_as, seed) / "run.json").is_file()


class Given(TypedDict, total=False):
    """What `ablate` takes in place of what the spec says: a cache that is built, the student, the device."""

    cache: Path | str | None
    student: str | None
    device: str | None


def ablate(
    spec: CacheSpec,
    *,
    axes: Sequence[str],
    out: Path | str,
    seeds: int = 1,
    variants: Iterable[str] | None = None,
    dry_run: bool = False,
    **given: Unpack[Given],
) -> dict[str, Any]:
    """Train and measure every variant of the tables `axes` with `seeds` seeds into the folder `out`, or go on with it.

    An axis is the name of a shipped table, or a YAML file of the same form. `cache` is a built one, its folder or URL;
    by default it is `out/cache`, built when it is missing. `student` and `device` win over the spec. Seeds count from
    `distill.seed`. `variants` leaves out others than these and the default. A run that diverges is recorded as failed,
    and tried again the next time. Other axes, variants and more seeds may be asked of the same folder: what is finished
    is taken, and the tables add up.

    Returns what `out/ablation.json` holds, or with `dry_run` what there is to do. Raises SpecError,
    FingerprintMismatchError (`out` or the cache is of other settings), RunBusyError, and what build and distill raise.
    """
    refuse_url(out, "out")
    out, tables, cache, device = Path(out), read_axes(axes), given.get("cache"), given.get("device")
    path = _checked_student(spec, out, seeds, given.get("student"))
    spec = change(spec, distill=change(spec.distill, student=path).model_dump())
    ablation = Ablation(
        out=out,
        spec=spec,
        axes=tables,
        seeds=[spec.distill.seed + number for number in range(seeds)],
        cache_path=out / "cache" if cache is None else place_of(cache),
        is_own_cache=cache is None,
        student=path,
        device=device,
    )
    identity = _identity(ablation)
    record = _read_record(out, identity)
    found = _finished_cache(ablation)
    header = found.header if found else _header_to_come(spec)
    encoder = ModelRef(path, trust_remote_code=spec.distill.trust_remote_code).encoder(spec.data.encoding())
    alignment = spec.distill.alignment
    check_tokenizer(
        header, encoder, path, where=ablation.cache_path, alignment=alignment
    )  # no variant could be trained
    assert spec.evaluate is not None
    read_records(spec.evaluate.data)  # after hours of training nothing could be measured
    names = None if variants is None else list(variants)
    plan = partial(plan_runs, spec, tables, names=names, student=path, where=ablation.cache_path)
    runs, rows = plan(header, found)
    _check_settings(out, runs, record)
    if dry_run:
        return _preview(ablation, runs, rows, record)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        for leftover in out.glob(".ablation.*"):
            leftover.unlink()
        record = {"runs": {}, **_read_record(out, identity), **identity}  # now that no other process writes it
        _save(out, record)
        if found is None:
            found = build_teacher(spec, out=ablation.cache_path, device=device)
            runs, rows = plan(found.header, found)
        record |= _described(ablation, runs, rows, record)
        say(f"budget: {record['budget']}")
        jobs = [(seed, run) for seed in ablation.seeds for run in runs.values()]
        for number, (seed, run) in enumerate(jobs, start=1):
            _save(out, record)
            if ablation.is_done(record, run, seed):
                continue
            say(f"run {number} of {len(jobs)}: seed {seed}, {run.name} ({run.variant.what})")
            record["runs"].setdefault(run.name, {})[str(seed)] = _one_run(ablation, run, found, seed)
        _save(out, record)
        write_atomically(out / TABLE, ablation_csv(record))
        write_report(out)
    return record


def _checked_student(spec: CacheSpec, out: Path, seeds: int, student: str | None) -> str:
    """Where the student is, after all that can be checked without a cache; raises SpecError and ModelError."""
    name = student or spec.distill.student
    if name is None:
        raise SpecError("no student: give --student FOLDER-OR-ID, or `distill.student` in the spec")
    if spec.evaluate is None:
        raise SpecError("nothing to compare the variants on: the spec has no `evaluate:` section")
    check_folder(out)
    if out.is_dir() and not (out / RECORD).exists():
        # An ablation that was killed at its very beginning leaves its lock; a cache may have been built beforehand.
        ours = (LOCK_NAME, "cache")
        names = [one.name for one in out.iterdir()]
        strangers = [one for one in names if one not in ours and not one.startswith(f".{RECORD}.")]
        if strangers:
            raise SpecError(f"{out} exists and is no ablation (it holds `{min(strangers)}`); choose another folder")
    if seeds < 1:
        raise SpecError(f"`seeds` is {seeds}: at least one is needed")
    for key in ("recipe", "verbalizers"):
        value = getattr(spec.distill, key)
        if value != type(spec.distill).model_fields[key].default:
            raise SpecError(f"`distill.{key}` is `{value}`, and an ablation decides that itself; leave it out")
    return resolve_model(name)


def _identity(ablation: Ablation) -> dict[str, Any]:
    """What makes two ablations the same, whatever their tables and the number of their seeds."""
    own = ablation.is_own_cache
    return {
        "spec": ablation.spec.model_dump(mode="json"),
        "cache": "cache" if own else str(ablation.cache_path.resolve()),
        "cache_digest": None if own else reader.open(ablation.cache_path).header.digest,
        "student": ablation.student,
        "student_digest": ModelRef(ablation.student).digest,
    }


def _read_record(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What an earlier attempt has left, if any; FingerprintMismatchError when it was another ablation."""
    file = out / RECORD
    if not file.exists():
        return {}
    record = read_ablation(file)
    specs = [whole_spec(one["spec"], str(file)) for one in (record, identity)]
    for spec in specs:
        del spec["run"]
    problems = differences(*specs, key="spec")
    problems += [line for key in IDENTITY[1:] for line in differences(record.get(key), identity[key], key)]
    if problems:
        raise FingerprintMismatchError(
            f"{out} is an ablation of other settings; choose a new folder with -o, or bring the settings back:\n"
            + list_problems(problems)
        )
    return record


def _check_settings(out: Path, runs: Runs, record: dict[str, Any]) -> None:
    """Raise FingerprintMismatchError for a finished run whose variant has changed since; an earlier release did not
    record the settings."""
    for name, run in runs.items():
        for entry in record.get("runs", {}).get(name, {}).values():
            if entry.get("settings", run.settings) != run.settings:
                raise FingerprintMismatchError(
                    f"{out} has a run `{name}` with other settings ({', '.join(entry['settings']) or 'none'} there, "
                    f"{', '.join(run.settings) or 'none'} now); give the variant another name"
                )


def _finished_cache(ablation: Ablation) -> "Cache | None":
    """The cache, which must be of this spec; None where the ablation is to build it or to go on with that."""
    if ablation.is_own_cache and not (ablation.cache_path / "cache.json").is_file():
        return None
    cache = reader.open(ablation.cache_path, allow_incomplete=ablation.is_own_cache)
    check_target(ablation.out, [cache])
    stored = spec_from_dict(cache.header.spec, where=str(cache.path)).model_dump(mode="json")
    wanted = ablation.spec.model_dump(mode="json")
    other = [line for key in FIXED_BY_THE_CACHE for line in differences(stored[key], wanted[key], key)]
    if other:
        raise FingerprintMismatchError(
            f"the cache {cache.path} was not built from this spec; bring these settings to what it has, or name "
            f"another cache:\n{list_problems(other)}"
        )
    return cache if cache.is_complete else None


def _header_to_come(spec: CacheSpec) -> CacheHeader:
    """What the header of the cache of `spec` will say, without hours of building it."""
    inputs = open_teacher_inputs(spec)
    return cache_header(inputs, parts_of(inputs))


def _budget(runs: Runs, tables: Tables) -> str:
    """The optimizer steps of every variant in `tables`, in words."""
    default = runs[DEFAULT.name]
    parts = ", ".join(f"{stage} {count}" for stage, count in default.steps.items() if stage != "exits")
    other = ", ".join(f"{name} {count}" for name, count in own_steps(tables, DEFAULT.name).items())
    told = f", but for {other}" if other else ""
    size = default.spec.distill.batch_size
    return f"{default.num_student_steps} optimizer steps of {size} samples for every variant ({parts}){told}"


def _preview(ablation: Ablation, runs: Runs, tables: Tables, record: dict[str, Any]) -> dict[str, Any]:
    """What there is to do."""
    jobs = [(run, seed) for seed in ablation.seeds for run in runs.values()]
    return {
        "budget": _budget(runs, tables),
        "seeds": ablation.seeds,
        "titles": {name: axis.title for name, axis in ablation.axes.items()},
        "tables": tables,
        "steps": {name: run.steps for name, run in runs.items()},
        "num_runs": len(jobs),
        "num_remaining": sum(not ablation.is_done(record, run, seed) for run, seed in jobs),
    }


def _described(ablation: Ablation, runs: Runs, new: Tables, earlier: dict[str, Any]) -> dict[str, Any]:
    """What the record says beside the scores; tables, rows and seeds of earlier calls stay in it."""
    titles, notes, tables = ({**earlier.get(key, {})} for key in ("titles", "notes", "tables"))
    for name, axis in ablation.axes.items():
        titles[name], notes[name] = axis.title, axis.note
        tables[name] = add_up(new[name], tables.get(name, []), axis.names, earlier["runs"])
    return {
        "device": ablation.device or ablation.spec.run.device,
        "versions": versions(),
        "budget": _budget(runs, tables),
        "default": DEFAULT.name,
        "seeds": sorted({*ablation.seeds, *earlier.get("seeds", [])}),
        "titles": titles,
        "notes": notes,
        "tables": tables,
    }


def _one_run(ablation: Ablation, run: PlannedRun, cache: "Cache", seed: int) -> dict[str, Any]:
    """Train one variant with one seed, unless it is trained, and measure it; one that fails is an entry with its
    message."""
    folder, default = ablation.folder(run.trained_as, seed), ablation.folder(DEFAULT.name, seed)
    where = {"run": str(folder.relative_to(ablation.out))}
    defaults_verbalizers = _verbalizers_of(default)
    try:
        is_lens, readers = run.spec.verbalizer.is_lens, None  # of a student that was trained through norm and head
        if run.name != DEFAULT.name and defaults_verbalizers is None and not is_lens:
            raise ModelError(f"{default} has left no verbalizers, which the other runs of its seed take or are read by")
        _train(ablation, run, cache, seed, defaults_verbalizers if run.takes_verbalizers else None)
        if not (is_lens and run.spec.distill.trains_layers):
            readers = _verbalizers_of(folder) or defaults_verbalizers
        measured = evaluate(
            folder,
            spec=run.measured_with,
            verbalizers=readers,
            device=ablation.device,
            trust_remote_code=ablation.spec.distill.trust_remote_code,
        )
    except ModelError as error:
        say(f"failed: {error}")
        return {**where, "status": "failed", "message": str(error)}
    trained = read_run(folder)
    stages = trained["stages"]
    steps = sum(stage["steps"] for stage in stages)
    assert steps == run.num_steps, f"{folder} took {steps} steps, {run.steps} were planned"
    if run.takes_verbalizers:  # the time of training them belongs to every run that has them
        stages += [one for one in read_run(default)["stages"] if one["name"] == "verbalize"]
    device = pick_device(ablation.device or ablation.spec.run.device)
    return {
        **where,
        "status": "done",
        "steps": run.num_student_steps,
        "seconds": sum(stage["seconds"] for stage in stages),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": trained["versions"],
        "settings": run.settings,
        **{key: measured[key] for key in SCORES},
    }


def _train(ablation: Ablation, run: PlannedRun, cache: "Cache", seed: int, verbalizers: Path | None) -> None:
    """Train one variant into its folder; a smaller cache that it reads is cut when it is first needed."""
    if run.layers != cache.header.layers or run.top_k < cache.header.widest:
        cuts = read_cuts(cache, layers=run.layers, top_k=run.top_k)
        # It has the parts of the one it is cut from: so every run sees the samples in the same order.
        cache = run_prune(plan_prune(cache, ablation.out / "caches" / run.trained_as, cuts, keep_parts=True))
    stored = distill_spec(cache, student=run.spec.distill.student)
    changes = overrides_between(stored, run.spec, SECTIONS)
    # The cache may have recorded a number for `auto`; training does not read it.
    changes = [one for one in changes if not one.startswith("run.batch_tokens=")]
    if verbalizers is not None:
        changes.append(f"distill.verbalizers={json.dumps(str(verbalizers.resolve()), ensure_ascii=False)}")
    folder = ablation.folder(run.trained_as, seed)
    distill(
        cache,
        student=ablation.student,
        out=folder,
        overrides=[*changes, f"distill.seed={seed}"],
        device=ablation.device,
    )


def _verbalizers_of(run: Path) -> Path | None:
    folder = run / "verbalizers"
    return folder if (folder / "verbalizers.json").is_file() else None


def _save(out: Path, record: dict[str, Any]) -> None:
    write_atomically(out / RECORD, json.dumps(record, indent=1))
