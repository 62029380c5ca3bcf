"""What an ablation has to train: the tables that are asked for, and the runs behind their rows, each of them once.

Two rows whose settings come to the same share a run, within a table and between tables.
"""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import apply_overrides
from vlsi_cache.errors import SpecError, did_you_mean
from vlsi_cache.models.load import ModelRef
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.train.distill import stage_steps
from vlsi_cache.train.student import check_settings

from .variants import AXES, BASELINES, DEFAULT, Variant

if TYPE_CHECKING:
    from vlsi_cache.store.reader import Cache

# What of a spec does not decide how the student's verbalizers are trained.
NOT_OF_VERBALIZERS = frozenset({"interact", "sft", "lora", "recipe", "seed"})


@dataclass(frozen=True)
class PlannedRun:
    """One training, whatever the seed. `settings` are all of them as text; `is_cut`: it reads a smaller cache."""

    variant: Variant
    spec: CacheSpec
    settings: str
    is_cut: bool
    steps: dict[str, int]
    takes_verbalizers: bool

    @property
    def name(self) -> str:
        """Its folder below that of the seed, and that of its smaller cache."""
        return self.variant.name


@dataclass(frozen=True)
class Row:
    """A row of a table: all names of the settings, the run and its optimizer steps, or the reason why there is none."""

    names: tuple[str, ...]
    what: str
    run: str | None
    reason: str | None = None
    num_steps: int | None = None


@dataclass(frozen=True)
class AblationPlan:
    """`runs` in the order of training, the default first: the others take its verbalizers.

    `names` are all variants of a table, also those that were not asked for.
    """

    runs: dict[str, PlannedRun]
    tables: dict[str, list[Row]]
    names: dict[str, list[str]]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the default, which every variant takes that is not about their number."""
        return sum(self.runs[DEFAULT.name].steps.values())


def plan_runs(
    spec: CacheSpec,
    header: CacheHeader,
    *,
    axes: Sequence[str],
    names: Iterable[str] | None,
    student: str,
    cache: "Cache | None",
    where: Path,
) -> AblationPlan:
    """The runs of these tables, or of the variants in `names` alone; the default is always among them.

    `cache` is None where the cache of `header` at `where` is not built yet. Raises SpecError for an unknown axis or
    variant, when the default cannot be trained, and when a variant would take another number of steps.
    """
    check_axes(axes)
    config = ModelRef(student, trust_remote_code=spec.distill.trust_remote_code).config
    resolve = partial(_resolve, spec=spec, header=header, config=config, where=where)
    tables = {axis: [DEFAULT, *BASELINES, *AXES[axis](header, cache)] for axis in axes}
    wanted = _chosen(tables, names)
    runs: dict[str, PlannedRun] = {}  # by all their settings
    rows: dict[str, list[Row]] = {}
    for axis, variants in tables.items():
        found = [_row(variant, resolve, runs) for variant in variants]
        rows[axis] = _in_order((row for row in found if row.names[0] in wanted), [one.name for one in variants])
    used = {row.run for table in rows.values() for row in table}
    names_of = {axis: [variant.name for variant in variants] for axis, variants in tables.items()}
    plan = AblationPlan({run.name: run for run in runs.values() if run.name in used}, rows, names_of)
    _check_budget(plan)
    return plan


def check_axes(axes: Sequence[str]) -> None:
    """Raise SpecError unless every axis is known and named once."""
    for axis in axes:
        if axis not in AXES:
            raise SpecError(f"no axis `{axis}`{did_you_mean(axis, AXES) or '.'} Known: {', '.join(AXES)}")
    if not axes or len(set(axes)) < len(axes):
        raise SpecError(f"name each axis once, and at least one: {', '.join(AXES)}")


def _chosen(tables: dict[str, list[Variant]], names: Iterable[str] | None) -> set[str]:
    known = list(dict.fromkeys(variant.name for variants in tables.values() for variant in variants))
    if names is None:
        return set(known)
    chosen = list(names)
    for name in chosen:
        if name not in known:
            guess = did_you_mean(name, known) or "."
            raise SpecError(f"no variant `{name}` of {', '.join(tables)}{guess} Known: {', '.join(known)}")
    return {DEFAULT.name, *chosen}


def _row(variant: Variant, resolve: Callable[[Variant], PlannedRun], runs: dict[str, PlannedRun]) -> Row:
    """The row of a variant; a run with settings that are new is added to `runs`."""
    try:
        run = resolve(variant)
    except SpecError as error:
        if variant is DEFAULT:
            raise
        return Row((variant.name,), variant.what, None, " ".join(str(error).split()))
    name = runs.setdefault(run.settings, run).name
    return Row((variant.name,), variant.what, name, num_steps=sum(run.steps.values()))


def _resolve(variant: Variant, *, spec: CacheSpec, header: CacheHeader, config: Any, where: Path) -> PlannedRun:
    if variant.reason is not None:
        raise SpecError(variant.reason)
    resolved = apply_overrides(spec, [*variant.changes, f"distill.recipe={variant.recipe}"])
    kept, top_k = list(variant.layers or header.layers), variant.top_k or header.widest
    check_settings(header.model_copy(update={"layers": kept}), resolved.distill, config, where=where)
    return PlannedRun(
        variant=variant,
        spec=resolved,
        settings=f"{kept} {top_k} {resolved.model_dump_json()}",
        is_cut=kept != header.layers or top_k < header.widest,
        steps=stage_steps(resolved.distill, header.num_samples),
        takes_verbalizers=variant is not DEFAULT and variant.recipe == "vlsi" and _same_verbalizers(resolved, spec),
    )


def _same_verbalizers(one: CacheSpec, other: CacheSpec) -> bool:
    """Whether the student's verbalizers come out the same; they read no teacher rows."""
    ours, theirs = (spec.distill.model_dump(exclude=set(NOT_OF_VERBALIZERS)) for spec in (one, other))
    return one.verbalizer == other.verbalizer and ours == theirs


def _merge(rows: Iterable[Row]) -> list[Row]:
    """Rows of one run become one row with all their names."""
    merged: dict[str, Row] = {}
    for row in rows:
        key = row.names[0] if row.run is None else f"run {row.run}"
        first = merged.get(key)
        merged[key] = row if first is None else replace(first, names=(*first.names, *row.names))
    return list(merged.values())


def _in_order(rows: Iterable[Row], names: list[str]) -> list[Row]:
    """As the variants are listed, rows of one run as one. The baselines are resolved first, so that they give a shared
    run its name, and are shown last."""
    place = {name: number for number, name in enumerate(names)}
    merged = _merge(sorted(rows, key=lambda row: place.get(row.names[0], len(place))))
    return sorted(merged, key=lambda row: any(one.name in row.names for one in BASELINES))


def add_up(rows: list[Row], earlier: Iterable[Row], names: list[str], runs: Collection[str]) -> list[Row]:
    """The rows of a table together with those of earlier calls that have one of the `runs`, or the reason for none.

    `names` are all variants of the table, in its order.
    """
    taken = {name for row in rows for name in row.names}
    there = [row for row in earlier if row.run is None or row.run in runs]
    left = [replace(row, names=tuple(name for name in row.names if name not in taken)) for row in there]
    return _in_order([*rows, *(row for row in left if row.names)], names)


def _check_budget(plan: AblationPlan) -> None:
    """The same optimizer steps for all, those aside that are about their number."""
    for run in plan.runs.values():
        total = sum(run.steps.values())
        if total != plan.num_steps and not run.variant.own_steps:
            raise SpecError(
                f"variant `{run.name}` would take {total} optimizer steps ({run.steps}) and `{DEFAULT.name}` "
                f"{plan.num_steps}: they could not be compared"
            )


def overrides_between(stored: CacheSpec, wanted: CacheSpec, sections: Iterable[str]) -> list[str]:
    """`key=value` changes that make these sections of `stored` those of `wanted`."""
    old, new = stored.model_dump(mode="json"), wanted.model_dump(mode="json")
    leaves = [leaf for name in sections for leaf in _leaves(old[name], new[name], name)]
    # YAML would read an escaped pair of surrogates as two letters.
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in leaves]


def _leaves(old: Any, new: Any, key: str) -> Iterable[tuple[str, Any]]:
    """Every leaf of `new` that `old` has otherwise; the options of a generator are one leaf."""
    if isinstance(old, dict) and isinstance(new, dict) and not key.endswith(".options"):
        for name in new:
            yield from _leaves(old.get(name), new[name], f"{key}.{name}")
    elif old != new:
        yield key, new
