"""The demo: the whole path on a machine without GPU or network, and a fair comparison of four recipes.

The budget was fixed before any student was trained: every recipe starts from the same warm start and takes the same
number of optimizer steps over the same cached samples (see `cache_specs/demo.yaml`).
"""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import load_spec
from vlsi_cache.data.records import read_records
from vlsi_cache.errors import CacheCorruptError
from vlsi_cache.evaluation.exits import exits
from vlsi_cache.evaluation.scores import evaluate, evaluate_model, kept_result
from vlsi_cache.io import refuse_url, write_atomically
from vlsi_cache.models.load import ModelRef, resolve_model
from vlsi_cache.models.save import init_student
from vlsi_cache.progress import say
from vlsi_cache.report.example import example_of
from vlsi_cache.report.pages import write_demo_report
from vlsi_cache.run_files import of_this_student, read_exits, read_object, read_run
from vlsi_cache.store.reader import Cache
from vlsi_cache.teacher.build import build_teacher
from vlsi_cache.teacher.plan import plan
from vlsi_cache.train.distill import distill, distill_spec, stage_steps

RECIPES = ("sft", "last", "vlsi", "any-depth")
EXITS = (
    "distill.exits.schedule.steps=100",
    "distill.exits.schedule.learning_rate=0.002",
    "distill.exits.schedule.final_learning_rate=0.00001",
)  # of the recipes that learn from the teacher
STUDENT_LAYERS = "0-1,6-7"  # of the teacher's eight
WARM_START_STEPS = 80
WARM_START = (
    "distill.sft.mode=full",
    "distill.sft.schedule.learning_rate=0.001",
    "distill.verbalize.steps=1",
    "distill.interact.schedule.steps=1",
)
AGAIN = "delete it and run the demo again"
Result = TypeVar("Result")


def run_demo(
    *, out: Path | str = "demo-run", seeds: int = 1, device: str | None = None, overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Plan, build, verify, distil four ways, evaluate, report; a second run goes on or only shows the result.

    `overrides` change the shipped spec. Returns what `out/demo.json` holds. Raises what the stages raise.
    """
    refuse_url(out, "out")
    out = Path(out)
    spec = load_spec("demo", overrides=overrides)
    say(str(plan(spec)))
    is_begun = (out / "cache" / "cache.json").exists()
    cache, build_s = _timed(lambda: build_teacher(spec, out=out / "cache", device=device))
    report, verify_s = _timed(lambda: cache.verify(deep=True))
    if not report.ok:
        raise CacheCorruptError(f"the demo stops here, its cache has problems:\n{report}")
    say(f"cache: {cache}; verify: no problem found")
    summary = {
        "seeds": list(range(seeds)),
        "recipes": list(RECIPES),
        "budget": _budget(spec, len(cache)),
        "cache": "cache",
        "bytes_per_layer_token": cache.bytes_per_layer_token(),
        **_build_time(out, None if is_begun else build_s),
        "verify_s": verify_s,
        "teacher": _teacher_scores(spec, out, device),
        "runs": {recipe: [] for recipe in RECIPES},
    }
    for seed in range(seeds):
        student = _warm_start(spec, cache, out / "runs" / f"seed-{seed}", seed, device)
        for recipe in RECIPES:
            summary["runs"][recipe].append(_one_run(cache, student, out, seed, recipe, device))
    write_atomically(out / "demo.json", json.dumps(summary, indent=1))
    record = read_records(spec.data)[0]
    example = example_of(cache[record.id], record, cache.token_text, layers=cache.layers)
    report_file = write_demo_report(out, example=example)
    say(f"report: {report_file}")
    return summary


def _warm_start(spec: CacheSpec, cache: Cache, folder: Path, seed: int, device: str | None) -> Path:
    """The same short start for all recipes: half of the teacher's layers, then some supervised steps on all weights."""
    fresh = folder / "fresh-student"
    if not (folder / "warm-start").exists():
        init_student(spec.teacher.model, STUDENT_LAYERS, fresh)
    changes = [*WARM_START, f"distill.sft.schedule.steps={WARM_START_STEPS - 2}", f"distill.seed={seed}"]
    run = distill(cache, student=str(fresh), out=folder / "warm-start", recipe="sft", overrides=changes, device=device)
    return run / "student"


def _one_run(cache: Cache, student: Path, out: Path, seed: int, recipe: str, device: str | None) -> dict[str, Any]:
    folder = out / "runs" / f"seed-{seed}" / recipe
    has_exits = recipe != "sft"
    changes = [f"distill.seed={seed}", *(EXITS if has_exits else ())]
    if recipe == "any-depth":  # as many steps of the student as the others have that it is compared with
        steps = stage_steps(distill_spec(cache, student=str(student)), len(cache))
        changes.append(f"distill.verbalizers={folder.parent / 'vlsi' / 'verbalizers'}")
        changes.append(f"distill.interact.schedule.steps={steps['verbalize'] + steps['interact']}")
    run = distill(cache, student=str(student), out=folder, recipe=recipe, overrides=changes, device=device)
    scores = kept_result(run) or evaluate(run, device=device)
    seconds = sum(stage["seconds"] for stage in read_run(run)["stages"] if stage["name"] != "exits")
    measured = _exits_of(run, device) if has_exits else {}
    return {
        "seed": seed,
        "run": str(run.relative_to(out)),
        "exact_match": scores["exact_match"],
        "perplexity": scores["perplexity"],
        "seconds": seconds,
        "exits": measured.get("exits", []),
    }


def _exits_of(run: Path, device: str | None) -> dict[str, Any]:
    """What the run's exits say on its own held-out rows, now or from an earlier demo."""
    kept = read_exits(run)
    is_ours = kept is not None and kept["rows"] == "evaluate" and of_this_student(kept, run)
    return kept if kept is not None and is_ours else exits(run, device=device)


def _teacher_scores(spec: CacheSpec, out: Path, device: str | None) -> dict[str, Any]:
    assert spec.evaluate is not None
    file = out / "teacher-evaluation.json"
    if file.is_file():
        scores = read_object(file, AGAIN)
    else:
        teacher = ModelRef(resolve_model(spec.teacher.model), dtype=spec.teacher.dtype)
        options: dict[str, Any] = {"device": device or spec.run.device, "batch_tokens": spec.run.num_batch_tokens}
        scores = evaluate_model(teacher, spec.evaluate, **options)
    write_atomically(file, json.dumps(scores, indent=1))
    return scores


def _budget(spec: CacheSpec, num_samples: int) -> str:
    steps = stage_steps(spec, num_samples)
    parts = ", ".join(f"{stage} {count}" for stage, count in steps.items())
    of_student = steps["verbalize"] + steps["interact"]
    return (
        f"{sum(steps.values())} optimizer steps of {spec.distill.batch_size} samples for every recipe (vlsi: {parts}), "
        "over the same cached samples and from the same warm start; fixed before any of these students was trained. "
        f"any-depth takes the verbalizers of vlsi, and its interact has {of_student} steps: its "
        "student is trained for as many as that of last. The exits of last, vlsi and any-depth are "
        "trained alike on the finished students, and come on top"
    )


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    started = time.monotonic()
    return work(), time.monotonic() - started


def _build_time(out: Path, build_s: float | None) -> dict[str, float]:
    """`build_s`, now or from an earlier demo, if one attempt built all of the cache; otherwise nothing is known."""
    file = out / "demo.json"
    if build_s is None and file.is_file():
        build_s = read_object(file, AGAIN).get("build_s")
    return {} if build_s is None else {"build_s": build_s}
