"""The tables of an ablation, read from YAML, and what has to be trained and measured for them: each run once.

A table is a file of `cache_specs/ablations`, or a file of the user's own. Variants whose settings come to the same
share a run, within a table and between tables. One that this cache or this release cannot give is in its table all the
same, with the reason.
"""

import difflib
import importlib.resources
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from vlsi_cache.config.plain_yaml import parse_yaml
from vlsi_cache.config.sections import CacheSpec, Traversed
from vlsi_cache.config.spec import apply_overrides
from vlsi_cache.config.training import Count, Layer, Recipe, Strict
from vlsi_cache.errors import SpecError, list_problems
from vlsi_cache.io import refuse_url
from vlsi_cache.models.load import ModelRef
from vlsi_cache.report.layers import suggest_layers
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.train.distill import stage_steps
from vlsi_cache.train.fitting import check_settings

if TYPE_CHECKING:
    from vlsi_cache.store.reader import Cache

# What of a spec does not decide how the student's verbalizers are trained.
NOT_OF_VERBALIZERS = {"interact", "sft", "lora", "recipe", "seed"}

# What of `distill` a variant cannot change: the ablation decides it, or the caller alone.
DECIDED = {f"distill.{key}" for key in ("recipe", "seed", "student", "verbalizers", "trust_remote_code")}


def _about_training(change: str) -> str:
    key, equals, _ = change.partition("=")
    if not equals or key in DECIDED or not key.startswith(("distill.", "verbalizer.")):
        raise ValueError(
            f"`{change}`: write KEY=VALUE with a key of `distill` or `verbalizer`, but not {', '.join(sorted(DECIDED))}"
        )
    return change


Change = Annotated[str, AfterValidator(_about_training)]
Row = dict[str, Any]  # as ablation.json holds it: names, what, run, reason, num_steps


class Variant(Strict):
    """One row of a table. `set` are `key=value` changes of the spec.

    `layers` and `top_k` are what a smaller cache keeps of the one at hand. `evaluate` changes how the trained student
    answers, so that one training can be measured in several ways. `own_steps`: the variant is about the number of
    steps, and need not take as many as the others.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")]  # also that of its folder
    what: str
    set: tuple[Change, ...] = ()
    recipe: Recipe = "vlsi"
    layers: Literal["all", "every-second", "deepest-quarter", "suggested-half"] | tuple[Layer, ...] = "all"
    top_k: Count | None = None
    evaluate: dict[Literal["num_beams", "max_new_tokens", "traversal"], Count | Traversed] = Field(default_factory=dict)
    own_steps: bool = False


DEFAULT = Variant(name="vlsi", what="all layers, with the settings of the spec")
LAST = Variant(name="last", what="the last layer alone", recipe="last")
SFT = Variant(name="sft", what="the labels alone", recipe="sft")
IN_EVERY_TABLE = (DEFAULT, LAST, SFT)


class Axis(Strict):
    """One table; its `set` holds for all its variants, before their own."""

    title: str
    note: str = ""
    set: tuple[Change, ...] = ()
    variants: tuple[Variant, ...]

    @model_validator(mode="after")
    def _names_differ(self) -> "Axis":
        names = [one.name for one in (*IN_EVERY_TABLE, *self.variants)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two variants are named `{twice[0]}`; every table has `vlsi`, `last` and `sft` already")
        return self

    @property
    def names(self) -> list[str]:
        """The names of all rows."""
        return [one.name for one in (*IN_EVERY_TABLE, *self.variants)]


def shipped_axes() -> dict[str, Path]:
    """Names and files of the tables that come with the package."""
    folder = Path(str(importlib.resources.files("vlsi_cache.cache_specs"))) / "ablations"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def read_axes(names: Sequence[str]) -> dict[str, Axis]:
    """Tables by name: shipped ones, and YAML files under their own name without the ending.

    Raises SpecError for an unknown name, and for a file with all its mistakes.
    """
    shipped, axes = shipped_axes(), {}
    for name in names:
        refuse_url(name, "axis")
        file = shipped.get(name, Path(name))
        if file.suffix not in (".yaml", ".yml"):
            raise SpecError(f"no axis `{name}`{_guess(name, shipped)} Known: {', '.join(shipped)}; or a .yaml file")
        try:
            axis = Axis.model_validate(parse_yaml(file.read_text(encoding="utf-8")))
        except ValidationError as error:
            problems = [_describe(dict(problem)) for problem in error.errors()]
            raise SpecError(f"axis `{file}` has {len(problems)} mistake(s):\n{list_problems(problems)}") from None
        except OSError as error:
            raise SpecError(f"axis `{file}` cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise SpecError(f"axis `{file}`: {error}") from None
        variants = tuple(one.model_copy(update={"set": (*axis.set, *one.set)}) for one in axis.variants)
        axes[file.stem] = axis.model_copy(update={"variants": variants})
    if not axes or len(axes) < len(names):
        raise SpecError(f"name each axis once, and at least one: {', '.join(shipped)}; or a .yaml file")
    return axes


def _describe(problem: dict[str, Any]) -> str:
    key = ".".join(map(str, problem["loc"])) or "axis"
    if problem["type"] == "extra_forbidden":
        known = Axis.model_fields if len(problem["loc"]) == 1 else Variant.model_fields
        return f"`{key}`: no such key; known here: {', '.join(known)}"
    return f"`{key}`: {problem['msg'].removeprefix('Value error, ')}"


def _guess(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else "."


@dataclass(frozen=True)
class PlannedRun:
    """One training and one way to measure it, whatever the seed; `layers` and `top_k` are what its cache holds.

    `trained_as` is the folder of the training, which several ways to measure share. `settings` are all that it has
    otherwise than the spec and the cache of the ablation.
    """

    variant: Variant
    spec: CacheSpec
    measured_with: CacheSpec
    trained_as: str
    layers: list[int]
    top_k: int
    steps: dict[str, int]
    takes_verbalizers: bool
    settings: list[str]

    @property
    def name(self) -> str:
        """Under which the scores are kept."""
        return self.variant.name

    @property
    def num_student_steps(self) -> int:
        """Without those of stage exits, which leaves the student as it is: by these, variants are comparable."""
        return self.num_steps - self.steps.get("exits", 0)

    @property
    def num_steps(self) -> int:
        return sum(self.steps.values())


def plan_runs(
    spec: CacheSpec,
    axes: Mapping[str, Axis],
    header: CacheHeader,
    cache: "Cache | None",
    *,
    names: Iterable[str] | None,
    student: str,
    where: Path,
) -> tuple[dict[str, PlannedRun], dict[str, list[Row]]]:
    """The runs in the order of training, and the rows of every table, of the variants in `names` alone unless None.

    The default is always among them and trained first: the others take its verbalizers. `cache` is None where the
    cache of `header` at `where` is not built yet. Raises SpecError for an unknown variant, when the default cannot be
    trained, when a variant would take another number of steps, and for two that share a name alone.
    """
    wanted = _wanted(axes, names)
    config = ModelRef(student, trust_remote_code=spec.distill.trust_remote_code).config
    folders: dict[str, str] = {}  # all settings of a training -> its folder
    runs: dict[str, PlannedRun] = {}  # all settings of training and measuring -> the run
    tables: dict[str, list[Row]] = {}
    for axis, table in axes.items():
        rows = []
        for variant in (*IN_EVERY_TABLE, *table.variants):
            row: Row = {"names": [variant.name], "what": variant.what, "run": None, "reason": None, "num_steps": None}
            try:
                layers, top_k = _kept(variant, header, cache)
                resolved = apply_overrides(spec, [*variant.set, f"distill.recipe={variant.recipe}"])
                cut = header.model_copy(update={"layers": layers})
                check_settings(cut, resolved.distill, config, where=where)
                changes = [f"evaluate.{key}={value}" for key, value in variant.evaluate.items()]
                measured_with = apply_overrides(spec, changes)
            except SpecError as error:
                if variant is DEFAULT:
                    raise
                rows.append({**row, "reason": " ".join(str(error).split())})
                continue
            settings = f"{layers} {top_k} {resolved.model_dump_json()}"
            folder = folders.setdefault(settings, variant.name)
            has_verbalizers = resolved.distill.trains_layers and not resolved.verbalizer.is_lens
            uses_verbalizers = has_verbalizers and _same_verbalizers(resolved, spec)
            run = PlannedRun(
                variant=variant,
                spec=resolved,
                measured_with=measured_with,
                trained_as=folder,
                layers=layers,
                top_k=top_k,
                steps=stage_steps(resolved, header.num_samples),
                takes_verbalizers=uses_verbalizers and folder != DEFAULT.name,
                settings=[
                    *overrides_between(spec, resolved, ("distill", "verbalizer")),
                    *([] if layers == header.layers else [f"layers={layers}"]),
                    *([] if top_k == header.widest else [f"top_k={top_k}"]),
                    *overrides_between(spec, measured_with, ("evaluate",)),
                ],
            )
            run = runs.setdefault(f"{settings} {measured_with.model_dump_json()}", run)
            if variant.layers != "all":
                row["what"] += f": {', '.join(map(str, layers[:-1]))}"
            rows.append({**row, "run": run.name, "num_steps": run.num_student_steps})
        tables[axis] = in_order((row for row in rows if row["names"][0] in wanted), table.names)
    used = {row["run"] for rows in tables.values() for row in rows}
    planned = {run.name: run for run in runs.values() if run.name in used}
    _check(planned, runs.values())
    return planned, tables


def _wanted(axes: Mapping[str, Axis], names: Iterable[str] | None) -> set[str]:
    known = list(dict.fromkeys(name for axis in axes.values() for name in axis.names))
    if names is None:
        return set(known)
    chosen = list(names)
    for name in chosen:
        if name not in known:
            raise SpecError(f"no variant `{name}` of {', '.join(axes)}{_guess(name, known)} Known: {', '.join(known)}")
    return {DEFAULT.name, *chosen}


def _kept(variant: Variant, header: CacheHeader, cache: "Cache | None") -> tuple[list[int], int]:
    """The cached layers, the last one always among them, and the entries of each row that a variant reads.

    Raises SpecError where the cache does not have them.
    """
    targets, last = header.layers[:-1], header.layers[-1]
    match variant.layers:
        case "all":
            kept = targets
        case "every-second":
            kept = targets[::-2][::-1]
        case "deepest-quarter":
            kept = targets[-max(1, -(-len(targets) // 4)) :]
        case "suggested-half":  # as many as every second one, and the last
            if cache is None:
                raise SpecError("chosen from the rows of the finished cache")
            kept = suggest_layers(cache, keep=1 + len(header.layers) // 2).layers[:-1]
        case chosen:
            unknown = [layer for layer in chosen if layer not in targets]
            if unknown:
                raise SpecError(f"the cache has no intermediate layers {unknown}; it has {targets}")
            kept = [layer for layer in targets if layer in chosen]
    top_k = variant.top_k or header.widest
    if top_k > header.widest:
        raise SpecError(f"the cache keeps {header.widest} entries of each row")
    if top_k < header.widest and header.row_kind == "sampled":
        raise SpecError(
            "the rows are draws from the teacher, and fewer draws need another teacher pass (`rows.num_draws`)"
        )
    return [*kept, last], top_k


def _same_verbalizers(one: CacheSpec, other: CacheSpec) -> bool:
    """Whether the student's verbalizers come out the same; they read no teacher rows."""
    ours, theirs = (spec.distill.model_dump(exclude=NOT_OF_VERBALIZERS) for spec in (one, other))
    return one.verbalizer == other.verbalizer and ours == theirs


def _check(planned: Mapping[str, PlannedRun], runs: Iterable[PlannedRun]) -> None:
    """One name is one run, and all take the same optimizer steps, those aside that are about their number."""
    num_steps = planned[DEFAULT.name].num_student_steps
    for run in runs:
        if planned.get(run.name, run) is not run:
            raise SpecError(f"two variants of different settings are named `{run.name}`; give one another name")
    for run in planned.values():
        if run.num_student_steps != num_steps and not run.variant.own_steps:
            raise SpecError(
                f"variant `{run.name}` would take {run.num_student_steps} optimizer steps ({run.steps}) and "
                f"`{DEFAULT.name}` {num_steps}: they could not be compared"
            )


def in_order(rows: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """Rows in the order of the table's `names`, those of one run as one row with all their names, the baselines last.

    A baseline comes before other variants of its settings, so that it gives their row its name.
    """
    place = {name: number for number, name in enumerate(names)}
    merged: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: place.get(row["names"][0], len(place))):
        key = f"reason {row['names'][0]}" if row["run"] is None else f"run {row['run']}"
        if key in merged:
            merged[key]["names"].extend(row["names"])
        else:
            merged[key] = {**row, "names": list(row["names"])}
    baselines = {LAST.name, SFT.name}
    return sorted(merged.values(), key=lambda row: not baselines.isdisjoint(row["names"]))


def add_up(rows: list[Row], earlier: Iterable[Row], names: Sequence[str], runs: Collection[str]) -> list[Row]:
    """The rows of a table together with those of earlier calls that have one of the `runs`, or the reason for none."""
    taken = {name for row in rows for name in row["names"]}
    left = [
        {**row, "names": [name for name in row["names"] if name not in taken]}
        for row in earlier
        if row["run"] is None or row["run"] in runs
    ]
    return in_order([*rows, *(row for row in left if row["names"])], names)


def overrides_between(stored: CacheSpec, wanted: CacheSpec, sections: Iterable[str]) -> list[str]:
    """`key=value` changes that make these sections of `stored` those of `wanted`."""
    changes: list[str] = []

    def compare(old: Any, new: Any, key: str) -> None:
        if isinstance(old, dict) and isinstance(new, dict) and not key.endswith(".options"):  # one leaf, as a whole
            for name in new:
                compare(old.get(name), new[name], f"{key}.{name}")
        elif old != new:
            # YAML would read an escaped pair of surrogates as two letters.
            changes.append(f"{key}={json.dumps(new, ensure_ascii=False)}")

    for name in sections:
        compare(stored.model_dump(mode="json")[name], wanted.model_dump(mode="json")[name], name)
    return changes
