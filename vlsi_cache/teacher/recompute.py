"""Does the teacher still say what the cache holds? Random samples go through it again and are compared row by row.

No checksum sees a row that was wrong when it was written, or that was rewritten with a new checksum; this does.
Shape suffixes: L layers, T response tokens with a row, U entries that either row keeps.

A kept entry is compared in the unit its profile stores: a level (`default`), a nat (`exact`, `fast`), a draw (sampled
rows). It may be off by
    what storing it costs: 2 levels (its own rounding, and that of the row it is scaled with), 0 or 2^-6 nats, 1 draw;
    what running again costs, `NOISE` nats: another batch, another device, the dtype of the teacher.
So the first entry is the teacher's first, or as likely within that. An entry that only one row keeps must not be
likelier than the last that the other keeps. Entropy and tail mass may be off by the noise; where a pruned cache moved
quantised entries into the tail, the tail mass by `PRUNED_TAIL` more.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.config.sections import CacheSpec, TeacherParallel
from vlsi_cache.config.spec import change, spec_from_dict
from vlsi_cache.errors import DataError, FingerprintMismatchError, SpecError, list_problems
from vlsi_cache.models.load import share_digests
from vlsi_cache.models.parallel import teacher_processes
from vlsi_cache.processes import Processes
from vlsi_cache.progress import progress
from vlsi_cache.sparse.rows import SparseRows, truncate
from vlsi_cache.store.diff import Entries, LayerDiff, add_layer
from vlsi_cache.store.format import CacheHeader, response_digest
from vlsi_cache.store.header import data_specs, differences, is_synced
from vlsi_cache.store.part import Row
from vlsi_cache.store.reader import Cache

from .build import fingerprint
from .forward import Teacher, load_teacher
from .inputs import TeacherInputs, open_teacher_inputs

NOISE = {"torch.float32": 0.01}  # nats, by the dtype of the teacher's weights
NOISE_OF_HALF = 0.3
PRUNED_TAIL = 0.05
STORED = {"default": 2.0, "exact": 0.0, "fast": 2.0**-6, "sampled": 1.0}
MAX_SHOWN = 10


@dataclass
class LayerCheck(LayerDiff):
    """One layer over all samples; `worst` is the largest error in units of what is allowed, fine up to 1."""

    worst: float = 0.0

    @property
    def top1_agreement(self) -> float:
        return self.same_top1 / max(1, self.num_tokens)

    @property
    def ok(self) -> bool:
        return self.worst <= 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "num_tokens": self.num_tokens,
            "max_dlogp": self.max_dlogp,
            "num_same_top": int(self.same_top1),
            "max_dtail": self.max_dtail,
            "max_dentropy": self.max_dentropy,
            "worst": self.worst,
            "top1_agreement": self.top1_agreement,
            "ok": self.ok,
        }


@dataclass
class RecomputeReport:
    """What the teacher says now against what the cache holds; `changed` names the samples that are other ones now."""

    path: Path
    num_samples: int
    layers: list[LayerCheck]
    changed: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.changed and all(layer.ok for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with what is derived."""
        layers = [one.as_dict() for one in self.layers]
        return {"ok": self.ok, "num_samples": self.num_samples, "layers": layers, "changed": self.changed}

    def __str__(self) -> str:
        found = "the teacher says the same" if self.ok else "the teacher says something else"
        lines = [f"{self.num_samples} samples recomputed: {found}"]
        lines += [
            f"  layer {one.layer}: {one.num_tokens} tokens, log-probs off by {one.max_dlogp:.3g}, first entry equal in "
            f"{one.top1_agreement:.2%}, tail mass off by {one.max_dtail:.3g}, entropy by {one.max_dentropy:.3g}; "
            + (f"{one.worst:.0%} of what is allowed" if one.ok else f"WRONG: {one.worst:.3g} times what is allowed")
            for one in self.layers
        ]
        if self.changed:
            changed = [f"sample {name!r}: {what}" for name, what in self.changed.items()]
            lines += ["the data is not what the cache was made from:", list_problems(changed, limit=MAX_SHOWN)]
        if not self.ok:
            lines.append("do not train on this cache: find out what was changed, or build it again in another folder")
        return "\n".join(lines)


def recompute(
    cache: Cache,
    *,
    num_samples: int,
    device: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    parallel: TeacherParallel | None = None,
) -> RecomputeReport:
    """Run the teacher of the cache's own spec on random samples that the cache holds, and compare.

    Code that comes with the model is not run unless asked for here, whatever the spec in the cache says. `parallel`
    takes the place of the spec's `teacher.parallel`; with `tensor` all processes of a launch call this alike. Raises
    FingerprintMismatchError with both values when the teacher is not the one the cache was made with.
    """
    if num_samples < 1:
        raise DataError(f"`num_samples` is {num_samples}: at least one sample must be recomputed")
    if "import.format" in cache.header.fingerprint:
        raise SpecError(f"{cache.path} was imported from another tool's files, which do not say whose weights spoke")
    spec = spec_from_dict(cache.header.spec, where=str(cache.path))
    parallel = parallel or spec.teacher.parallel
    spec = change(spec, teacher=change(spec.teacher, trust_remote_code=trust_remote_code, parallel=parallel))
    with teacher_processes(parallel) as group:
        own_device = group.own_device(device, spec.run.device)
        return _recompute(cache, spec, num_samples=num_samples, device=own_device, seed=seed, group=group)


def _recompute(
    cache: Cache, spec: CacheSpec, *, num_samples: int, device: str | None, seed: int, group: Processes
) -> RecomputeReport:
    run = change(spec.run, kernels="auto")  # what is there now need not be the machine of the build
    data = data_specs(cache.header, cache.path)  # several after a merge
    specs = [spec.model_copy(update={"data": one, "run": run}) for one in data]
    sources = [group.first_before_others(lambda one=one: open_teacher_inputs(one)) for one in specs]
    share_digests(sources[0].model, group)
    _refuse_another_teacher(cache, sources[0])
    names = list(cache)
    names = sorted(random.Random(seed).sample(names, min(num_samples, len(names))))
    report = RecomputeReport(cache.path, len(names), [LayerCheck(layer) for layer in cache.layers])
    # The weights are loaded once, whatever number of sources the rows come from.
    teachers = [load_teacher(sources[0], device=device)]
    teachers += [replace(teachers[0], inputs=inputs) for inputs in sources[1:]]
    # Two sources of a merged cache may use one id for different rows: the content decides.
    places = [(record, (i, at)) for i, found in enumerate(sources) for at, record in enumerate(found.records)]
    by_id = {record.id: place for record, place in places}
    by_content = {(record.id, record.digest): place for record, place in places}
    for name in progress(names, "recompute", unit="sample", delay=2):
        row = cache[name]
        source, index = by_content.get((name, row.digest)) or by_id.get(name, (0, None))
        what = _changed(row, sources[source], index)
        if what:
            report.changed[name] = what
        else:
            assert index is not None
            now = _rows_now(teachers[source], index, row, cache.header)
            _compare(report.layers, row, now, cache.header, teachers[source])
    return report


def _refuse_another_teacher(cache: Cache, inputs: TeacherInputs) -> None:
    """Data and cuts are compared sample by sample; everything else that decides a row must be what it was."""
    stored, found = (
        {name: value for name, value in fields.items() if not name.startswith(("data.", "prune."))}
        for fields in (cache.header.fingerprint, fingerprint(inputs))
    )
    # What an earlier release did not write; whether its rows are the same is seen by comparing them.
    stored = {"encoder.template_args": {}, "encoder.prompt": "generation", **stored}
    if "teacher.quantization" not in stored:
        found.pop("teacher.quantization", None)
    lines = differences(stored, found)
    if lines:
        raise FingerprintMismatchError(
            f"`{cache.path}` was made by something else than the teacher that is there now ({len(lines)} fields "
            f"differ):\n{list_problems(lines, limit=100)}\nput back what it was made from, then compare again"
        )


def _changed(row: Row, inputs: TeacherInputs, index: int | None) -> str:
    if index is None:
        return "is not in the data any more"
    if inputs.records[index].digest != row.digest:
        return f"the record's digest is {inputs.records[index].digest}, the cache has {row.digest}"
    digests = response_digest(inputs.response_ids[index]), response_digest(row.response_ids_R)
    return "" if digests[0] == digests[1] else f"xxh3 of the response ids is {digests[0]}, the cache has {digests[1]}"


def _rows_now(teacher: Teacher, index: int, row: Row, header: CacheHeader) -> SparseRows:
    """The teacher's rows of one sample, of the layers, positions and widths that the cache has."""
    inputs = teacher.inputs
    layers = [*inputs.target_layers, inputs.num_model_layers]
    rows = teacher.rows([index])[0].select_layers([layers.index(layer) for layer in header.layers])
    rows = rows.select_tokens(row.positions_T)
    if header.row_kind == "sampled":
        return rows
    kept_LT = np.minimum(rows.widths_LT, np.array(header.top_k)[:, None])
    return truncate(rows, kept_LT, np.zeros(rows.tail_ids_LTm.shape))


def _compare(checks: Sequence[LayerCheck], row: Row, now: SparseRows, header: CacheHeader, teacher: Teacher) -> None:
    noise = NOISE.get(str(teacher.backbone.head_weight.dtype), NOISE_OF_HALF)
    was_pruned = header.profile == "default" and bool(header.parents) and not is_synced(header)
    tail_limit = noise + (PRUNED_TAIL if was_pruned else 0.0)
    for number, check in enumerate(checks if row.num_tokens else ()):
        entries = add_layer(check, row.layer(number), now.layer(number))
        worst = check.max_dtail / tail_limit, check.max_dentropy / noise, _entry_error(entries, header, noise)
        check.worst = max(check.worst, *worst)


def _entry_error(entries: Entries, header: CacheHeader, noise: float) -> float:
    """The largest error of an entry in units of what is allowed."""
    one_U, other_U = (_in_units(logp_U, header) for logp_U in (entries.logp_aU, entries.logp_bU))
    one_U, other_U = (
        _filled(own_U, against_U, entries.token_U) for own_U, against_U in ((one_U, other_U), (other_U, one_U))
    )
    allowed_U = _allowed(np.maximum(one_U, other_U), header, noise)
    return float((np.abs(one_U - other_U) / allowed_U).max(initial=0))


def _filled(own_U: np.ndarray, other_U: np.ndarray, token_U: np.ndarray) -> np.ndarray:
    """What a row does not keep is at most as likely as the last entry it keeps."""
    known_U = np.isfinite(own_U)
    last_T = np.full(token_U.max(initial=-1) + 1, np.inf)
    np.minimum.at(last_T, token_U[known_U], own_U[known_U])
    return np.where(known_U, own_U, np.minimum(other_U, last_T[token_U]))


def _in_units(logp_U: np.ndarray, header: CacheHeader) -> np.ndarray:
    """Levels or nats, with -inf where there is no entry; draws, with 0."""
    if header.row_kind == "sampled":
        return np.exp(logp_U) * header.widest
    if header.profile == "default":
        return np.where(np.isfinite(logp_U), 255 * np.exp(logp_U / 4), -np.inf)
    return logp_U


def _allowed(values_U: np.ndarray, header: CacheHeader, noise: float) -> np.ndarray:
    """A level of v is p = (v / 255)^4, so a nat is v / 4 levels; a draw moves with the edges of all others."""
    if header.row_kind == "sampled":
        return np.full(values_U.shape, STORED["sampled"] + noise * header.widest / 2)
    if header.profile == "default":
        return STORED["default"] + noise * values_U / 4
    return np.full(values_U.shape, STORED[header.profile] + noise)
