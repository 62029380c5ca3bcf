"""What an ablation is asked for, checked before anything runs, and what its folder already holds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import change, spec_from_dict
from vlsi_cache.data.collate import plan_parts
from vlsi_cache.data.encoder import load_encoder
from vlsi_cache.data.records import read_records
from vlsi_cache.errors import FingerprintMismatchError, SpecError, list_problems
from vlsi_cache.io import check_folder
from vlsi_cache.models.load import resolve_model, weights_digest
from vlsi_cache.run_files import read_ablation
from vlsi_cache.runs.run_dir import LOCK_NAME, differences, whole_spec
from vlsi_cache.store import reader
from vlsi_cache.store.derive import check_target
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.teacher.build import cache_header, part_tokens
from vlsi_cache.teacher.inputs import open_teacher_inputs
from vlsi_cache.train.distill import FIXED_BY_THE_CACHE
from vlsi_cache.train.student import check_tokenizer

from .plan import AblationPlan, check_axes, plan_runs

if TYPE_CHECKING:
    from vlsi_cache.store.reader import Cache

RECORD = "ablation.json"
IDENTITY = ("spec", "cache", "cache_digest", "student", "student_digest")


@dataclass(frozen=True)
class Ablation:
    """What all runs share; `spec` names the student, `cache_path` is where the cache is or will be."""

    out: Path
    spec: CacheSpec
    cache_path: Path
    is_own_cache: bool
    student: str
    seeds: list[int]
    axes: list[str]
    names: list[str] | None
    device: str | None

    def plan(self, header: CacheHeader, cache: "Cache | None") -> AblationPlan:
        """The runs, as far as they can be known without the cache where that is None."""
        return plan_runs(
            self.spec,
            header,
            axes=self.axes,
            names=self.names,
            student=self.student,
            cache=cache,
            where=self.cache_path,
        )

    def folder(self, name: str, seed: int) -> Path:
        """Where a run is."""
        return self.out / "runs" / f"seed-{seed}" / name


def open_ablation(
    spec: CacheSpec,
    *,
    axes: Sequence[str],
    out: Path,
    seeds: int,
    cache: Path | str | None,
    student: str | None,
    variants: Iterable[str] | None,
    device: str | None,
) -> Ablation:
    """Check what can be checked without a cache; raises SpecError and ModelError."""
    check_axes(axes)
    name = student or spec.distill.student
    if name is None:
        raise SpecError("no student: give --student FOLDER-OR-ID, or `distill.student` in the spec")
    if spec.evaluate is None:
        raise SpecError("nothing to compare the variants on: the spec has no `evaluate:` section")
    _check_out(out)
    if seeds < 1:
        raise SpecError(f"`seeds` is {seeds}: at least one is needed")
    for key in ("recipe", "verbalizers"):
        value = getattr(spec.distill, key)
        if value != type(spec.distill).model_fields[key].default:
            raise SpecError(f"`distill.{key}` is `{value}`, and an ablation decides that itself; leave it out")
    path = resolve_model(name)
    return Ablation(
        out=out,
        spec=change(spec, distill=change(spec.distill, student=path).model_dump()),
        cache_path=out / "cache" if cache is None else Path(cache),
        is_own_cache=cache is None,
        student=path,
        seeds=[spec.distill.seed + number for number in range(seeds)],
        axes=list(axes),
        names=None if variants is None else list(variants),
        device=device,
    )


def identity_of(ablation: Ablation) -> dict[str, Any]:
    """What makes two ablations the same, whatever their tables and the number of their seeds."""
    own = ablation.is_own_cache
    return {
        "spec": ablation.spec.model_dump(mode="json"),
        "cache": "cache" if own else str(ablation.cache_path.resolve()),
        "cache_digest": None if own else reader.open(ablation.cache_path).header.digest,
        "student": ablation.student,
        "student_digest": weights_digest(ablation.student),
    }


def read_record(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What an earlier attempt has left, if any; FingerprintMismatchError when it was another ablation."""
    file = out / RECORD
    if not file.exists():
        return {}
    record = read_ablation(file)
    specs = (whole_spec(one["spec"], str(file)) for one in (record, identity))
    old, new = (
        {**one, "spec": {key: value for key, value in spec.items() if key != "run"}}
        for one, spec in zip((record, identity), specs, strict=True)
    )
    problems = [line for key in IDENTITY for line in differences(old.get(key), new[key], key)]
    if problems:
        raise FingerprintMismatchError(
            f"{out} is an ablation of other settings; choose a new folder with -o, or bring the settings back:\n"
            + list_problems(problems)
        )
    return record


def _check_out(out: Path) -> None:
    """Raise SpecError unless `out` is an ablation, or a folder that can become one."""
    check_folder(out)
    if out.is_dir() and not (out / RECORD).exists():
        strangers = [entry.name for entry in out.iterdir() if not _is_ours(entry.name)]
        if strangers:
            raise SpecError(f"{out} exists and is no ablation (it holds `{min(strangers)}`); choose another folder")


def _is_ours(name: str) -> bool:
    """What may lie in a folder whose ablation.json is not written yet: its own lock, and a cache built beforehand."""
    return name in (LOCK_NAME, "cache") or name.startswith(f".{RECORD}.")


def finished_cache(ablation: Ablation) -> "Cache | None":
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


def header_to_come(spec: CacheSpec) -> CacheHeader:
    """What the header of the cache of `spec` will say, without hours of building it."""
    inputs = open_teacher_inputs(spec)
    lengths = [len(ids) for ids in inputs.response_ids]
    return cache_header(inputs, plan_parts(lengths, seed=spec.rows.seed, tokens_per_part=part_tokens(inputs)))


def check_student(ablation: Ablation, header: CacheHeader) -> None:
    """Raise ModelError for a student of another vocabulary: no variant could be trained."""
    encoder = load_encoder(
        ablation.student,
        trust_remote_code=ablation.spec.distill.trust_remote_code,
        **ablation.spec.data.encoding(),
    )
    check_tokenizer(header, encoder, ablation.student, where=ablation.cache_path)


def check_held_out(ablation: Ablation) -> None:
    """Raise DataError for held-out rows that cannot be read: after hours of training nothing could be measured."""
    assert ablation.spec.evaluate is not None
    read_records(ablation.spec.evaluate.data)
