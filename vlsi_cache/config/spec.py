"""Reading a spec: YAML and overrides into a `CacheSpec`, with every mistake listed at once.

Settings that would do nothing where they are named are told instead of passed over. A spec with all its defaults filled
in, as a cache or a run keeps it, names everything; so this is asked of what a person has written, in a file or with
`--set`, and not of what is read back.
"""

import glob
import importlib.resources
import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from vlsi_cache.errors import SpecError, did_you_mean, list_problems, validation_message
from vlsi_cache.io import refuse_url, url_problem

from .plain_yaml import parse_yaml, plain_problems, short
from .sections import CacheSpec
from .training import OF_OPERATIONS, DistillSpec, InteractSpec, Strict

OF_TOP_K = ("top_k", "top_p", "min_k", "tail_samples")
LENGTH = ("steps", "epochs")


def unused_keys(written: dict[str, Any], spec: CacheSpec, overrides: Iterable[str] = ()) -> list[str]:
    """Problems of a spec file (`written`, overrides included) that has become `spec`.

    What the file says of the other kind of rows goes when `--set rows.kind=...` changes the kind.
    """
    set_keys = [_key_of(override) for override in overrides]
    named, kind = set(written.get("rows") or {}), spec.rows.kind
    if "rows.kind" in set_keys:
        named = {key for key in named if any(f"{one}.".startswith(f"rows.{key}.") for one in set_keys)}
    foreign = OF_TOP_K if kind == "sampled" else ("num_draws",)
    problems = [f"`rows.{key}` does nothing with `rows.kind: {kind}`" for key in foreign if key in named]
    for section, data in (("data", spec.data), ("evaluate.data", spec.evaluate and spec.evaluate.data)):
        if data is not None and data.generator is not None and data.media_root is not None:
            problems.append(f"`{section}.media_root` does nothing with a `generator`, which brings its pictures")
    return problems


def unused_by_recipe(distill: DistillSpec, overrides: Iterable[str]) -> list[str]:
    """Those of `overrides` that change a stage which the recipe does not run. Lengths count for every recipe."""
    return [override for override in overrides if not _is_used(_key_of(override), distill)]


def _is_used(key: str, distill: DistillSpec) -> bool:
    recipe, interact = distill.recipe, distill.interact
    has_verbalizers = distill.trains_layers or distill.exits is not None
    section, _, rest = key.partition(".")
    if section == "verbalizer":  # stage exits has a loss of its own
        return distill.trains_layers if rest == "loss" else has_verbalizers
    name, _, inner = rest.partition(".")
    if section != "distill" or not name or inner.rpartition(".")[2] in LENGTH:
        return True
    if name in ("layers", "num_layers"):
        return has_verbalizers
    if (name, inner) == ("exits", "weight"):
        return distill.exit_weight is not None
    if name == "verbalize":
        return distill.trains_layers and distill.verbalizers is None
    if name == "lora":
        adapts = not distill.is_supervised and interact.mode == "lora"
        return adapts or (bool(distill.sft.fraction) and distill.sft.mode == "lora+embed_head")
    if name == "sft" and inner:
        return inner.startswith("fraction") or bool(distill.sft.fraction)
    if name != "interact" or not inner:
        return True
    if recipe != "last":
        return distill.trains_layers
    if inner in OF_OPERATIONS:
        return interact.last in OF_OPERATIONS[inner]
    of_last = {"schedule", "mode", "lambda_last", "last", "alpha_ce", "chunk_temperature"}
    assert of_last <= set(InteractSpec.model_fields)
    return inner.partition(".")[0] in of_last


def _key_of(override: str) -> str:
    return override.partition("=")[0].strip()


Section = TypeVar("Section", bound=Strict)
MAX_FILE_BYTES = 1 << 18
GIVE = "give a .yaml file"
PATH_KEYS = frozenset({"path", "media_root", "model", "verbalizers", "student"})


def shipped_specs() -> dict[str, Path]:
    """Names and files of the specs that come with the package."""
    folder = Path(str(importlib.resources.files("vlsi_cache.cache_specs")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


Overrides = Iterable[str] | Mapping[str, Any]  # ["distill.seed=1"], {"distill.seed": 1} or {"distill": {"seed": 1}}


def override_list(overrides: Overrides) -> list[str]:
    """Overrides as `key.sub=value`, from such texts or from a dict, whose keys may be nested, dotted, or both."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    found: list[str] = []
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            found += [f"{key}.{rest}" for rest in override_list(value)]
        elif isinstance(value, str | Path):
            found.append(as_override(key, str(value)))
        else:
            found.append(f"{key}={json.dumps(list(value) if isinstance(value, tuple) else value)}")
    return found


def load_spec(name: str | Path, *, overrides: Overrides = ()) -> CacheSpec:
    """Read a spec by its shipped name or its path, apply overrides, fill in every default.

    `overrides` are `key.sub=value` texts, or a dict: `{"distill": {"seed": 1}}`, `{"distill.seed": 1}`. Relative paths
    in the file are relative to the file and stay below its folder; in an override they are relative to the current
    folder. Raises SpecError that lists all mistakes.
    """
    refuse_url(name, "spec")
    file = shipped_specs().get(str(name)) or Path(name)
    values = _read_yaml(file)
    problems, overrides = list(_resolve_paths(values, file.resolve().parent)), override_list(overrides)
    problems += _apply_overrides(values, overrides)
    spec, found = _parsed(values)
    problems += found if spec is None else unused_keys(values, spec, overrides)
    if spec is None or problems:
        raise _mistakes(problems, before=f"spec `{name}` has ")
    return spec


def spec_from_dict(values: dict[str, Any], *, where: str) -> CacheSpec:
    """The spec stored in a cache or run; raises SpecError that names `where`."""
    if not isinstance(values, dict):
        raise SpecError(f"the spec in {where} is a {type(values).__name__}, not a section of keys")
    if "data" in values:
        values = {**values, "data": stored_data(values["data"])}
    if isinstance(values.get("evaluate"), dict) and "data" in values["evaluate"]:
        values["evaluate"] = {**values["evaluate"], "data": stored_data(values["evaluate"]["data"])}
    spec, problems = _parsed(values)
    if spec is None:
        raise _mistakes(problems, before=f"the spec in {where} has ")
    return spec


def stored_data(section: Any) -> Any:
    """A `data` section that a cache or run has stored, with what an earlier release did that had no such setting: it
    learned last turns only, and kept nothing but turns together."""
    return {"turns": "last", "keep_together": "row", **section} if isinstance(section, dict) else section


def apply_overrides(spec: CacheSpec, overrides: Iterable[str]) -> CacheSpec:
    """A copy of `spec` with `key.sub=value` changes; raises SpecError that lists all mistakes."""
    values = spec.model_dump(mode="json")
    problems = _apply_overrides(values, overrides)
    changed, found = _parsed(values)
    if changed is None or problems:
        raise _mistakes([*problems, *found], after=" in --set")
    return changed


def as_override(key: str, value: str) -> str:
    """`key=value` that `apply_overrides` reads as just this text; in quotes where YAML would read something else."""
    try:
        is_read_as_it_is = parse_yaml(value) == value
    except ValueError:
        is_read_as_it_is = False
    return f"{key}={value if is_read_as_it_is else json.dumps(value, ensure_ascii=False)}"


def change(section: Section, **changes: Any) -> Section:
    """A copy of `section` with some fields changed, validated again; raises SpecError."""
    try:
        return type(section).model_validate({**section.model_dump(), **changes})
    except ValidationError as error:
        name = "spec" if isinstance(section, CacheSpec) else type(section).__name__.removesuffix("Spec").lower()
        raise _mistakes(_problems_of(error, name), after=f" in `{name}`") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise SpecError(
                f"spec `{file}` is a {'folder' if stat.S_ISDIR(found.st_mode) else 'pipe or device'}; {GIVE}"
            )
        if found.st_size > MAX_FILE_BYTES:
            raise SpecError(f"spec `{file}` has {found.st_size:,} bytes, more than any spec needs; {GIVE}")
        values = parse_yaml(file.read_bytes().decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        guess = did_you_mean(file, shipped_specs()) or "."
        raise SpecError(
            f"no spec `{short(file, 200)}`{guess} Shipped specs: {', '.join(shipped_specs())}; or {GIVE}"
        ) from None
    except UnicodeDecodeError as error:
        raise SpecError(f"spec `{file}` is not YAML: it is no text ({error.reason} at byte {error.start})") from None
    except SpecError:
        raise
    except ValueError as error:  # also of a path that holds a zero byte
        raise SpecError(f"spec `{short(file, 200)}`: {error}") from None
    except OSError as error:
        raise SpecError(f"spec `{short(file, 200)}` cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise SpecError(f"spec `{file}` holds {type(values).__name__}, not `key: value` lines")
    return values


def _apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Change `values`, the later of two that name one key last; the problems found on the way."""
    return [problem for override in overrides for problem in _apply_override(values, override)]


def _apply_override(values: dict[str, Any], override: str) -> Iterator[str]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        yield f"`--set {short(override)}`: write key=value, for instance rows.top_k=32"
        return
    *parents, last = key.strip().split(".")
    for name in parents:
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            yield f"`--set {short(override)}`: `{name}` is not a section"
            return
    try:
        value = parse_yaml(text)
    except ValueError as error:
        yield f"`--set {short(override)}`: {error}"
        return
    if last in PATH_KEYS and (problem := url_problem(value, f"`--set {override}`:")):
        yield problem
        return
    if last in PATH_KEYS:
        value = [_absolute(one) for one in value] if isinstance(value, list) else _absolute(value)
    values[last] = value
    other = {"steps": "epochs", "epochs": "steps"}.get(last)
    if other in values and value is not None:
        values[other] = None  # a length in steps replaces one in epochs, and the other way round


def _absolute(value: Any) -> Any:
    """A path or pattern that is there, from the root on; anything else as it is."""
    is_there = isinstance(value, str) and (Path(value).exists() or _names_files(value))
    return str(Path(value).resolve()) if is_there else value


def _names_files(pattern: str) -> bool:
    return glob.has_magic(pattern) and next(glob.iglob(pattern), None) is not None


def _resolve_paths(values: dict[str, Any], folder: Path, prefix: str = "") -> Iterator[str]:
    """Make relative paths of the spec absolute; yields a problem for each that leaves the spec's folder."""
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("options", "template"):
            yield from _resolve_paths(value, folder, f"{prefix}{key}.")
        elif key in PATH_KEYS and (problem := url_problem(value, f"`{prefix}{key}`:")):
            yield problem
        elif key in PATH_KEYS and isinstance(value, str) and not value.startswith(("package:", "/")):
            target = (folder / value).resolve()
            if not target.is_relative_to(folder):
                yield f"`{prefix}{key}`: `{value}` leaves the spec's folder {folder}; write an absolute path instead"
            elif target.exists() or key in ("path", "media_root"):
                values[key] = str(target)
        elif key == "path" and isinstance(value, list):
            named = [{"path": one} for one in value]
            for one in named:
                yield from _resolve_paths(one, folder, prefix)
            values[key] = [one["path"] for one in named]


def _parsed(values: dict[str, Any]) -> tuple[CacheSpec | None, list[str]]:
    """The spec that `values` say, or None and the mistakes in them."""
    if problems := plain_problems(values):
        return None, problems
    try:
        return CacheSpec.model_validate(values), []
    except ValidationError as error:
        return None, _problems_of(error, "spec")


def _mistakes(problems: list[str], *, before: str = "", after: str = "") -> SpecError:
    return SpecError(f"{before}{len(problems)} mistake(s){after}:\n{list_problems(problems, limit=30)}")


def _problems_of(error: ValidationError, whole: str) -> list[str]:
    """Every mistake in words; `whole` is the name of what has been validated."""
    problems = [dict(problem) for problem in error.errors()]
    return [_describe(problem, whole) for problem in problems if not _is_other_branch(problem, problems)]


def _is_other_branch(problem: dict[str, Any], problems: list[dict[str, Any]]) -> bool:
    """`auto` was not written, and what was written instead has a problem of its own."""
    loc = problem["loc"]
    return loc[-1:] == ("literal['auto']",) and any(
        one is not problem and one["loc"][: len(loc) - 1] == loc[:-1] for one in problems
    )


def _describe(problem: dict[str, Any], whole: str) -> str:
    loc = [str(part) for part in problem["loc"] if part not in ("tuple", "literal['auto']")]
    key = ".".join(part for part in loc if not part.startswith(("tuple[", "literal[", "constrained-")))
    if problem["type"] == "extra_forbidden":
        return f"`{key}`: no such key{_did_you_mean(loc)}"
    if problem["type"] == "missing":
        return f"`{key}`: is missing"
    shown = "" if isinstance(problem["input"], dict | BaseModel) else f", got `{short(problem['input'])}`"
    return f"`{key or whole}`: {validation_message(problem)}{shown}"


def _did_you_mean(loc: list[str]) -> str:
    section: Any = CacheSpec
    for name in loc[:-1]:
        annotation = section.model_fields[name].annotation
        section = next(one for one in (annotation, *get_args(annotation)) if hasattr(one, "model_fields"))
    return did_you_mean(loc[-1], section.model_fields) or f"; known here: {', '.join(section.model_fields)}"
