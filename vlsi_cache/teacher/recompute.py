"""Does the teacher still say what the cache holds? Random samples go through it again and are compared row by row.

No checksum sees a row that was wrong when it was written, or that was rewritten with a new checksum; this does.
Shape suffixes: L layers, T response tokens with a row, K kept entries, W ids that either row keeps.

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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.config.spec import change, spec_from_dict
from vlsi_cache.errors import DataError, FingerprintMismatchError, list_problems
from vlsi_cache.progress import progress
from vlsi_cache.sparse.rows import SparseRows, truncate
from vlsi_cache.store.format import CacheHeader, response_digest
from vlsi_cache.store.header import differences
from vlsi_cache.store.lineage import data_specs
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
class LayerCheck:
    """One layer over all samples; `worst` is the largest error in units of what is allowed, fine up to 1."""

    layer: int
    num_tokens: int = 0
    max_dlogp: float = 0.0
    num_same_top: int = 0
    max_dtail: float = 0.0
    max_dentropy: float = 0.0
    worst: float = 0.0

    @property
    def top1_agreement(self) -> float:
        return self.num_same_top / max(1, self.num_tokens)

    @property
    def ok(self) -> bool:
        return self.worst <= 1


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
        derived = [{"top1_agreement": one.top1_agreement, "ok": one.ok} for one in self.layers]
        layers = [asdict(one) | more for one, more in zip(self.layers, derived, strict=True)]
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
    cache: Cache, *, num_samples: int, device: str | None = None, seed: int = 0, trust_remote_code: bool = False
) -> RecomputeReport:
    """Run the teacher of the cache's own spec on random samples that the cache holds, and compare.

    Code that comes with the model is not run unless asked for here, whatever the spec in the cache says. Raises
    FingerprintMismatchError with both values when the teacher is not the one the cache was made with.
    """
    if num_samples < 1:
        raise DataError(f"`num_samples` is {num_samples}: at least one sample must be recomputed")
    spec = spec_from_dict(cache.header.spec, where=str(cache.path))
    teacher = change(spec.teacher, trust_remote_code=trust_remote_code)
    run = change(spec.run, kernels="auto")  # what is there now need not be the machine of the build
    data = data_specs(cache.header, cache.path)  # several after a merge
    sources = [
        open_teacher_inputs(spec.model_copy(update={"teacher": teacher, "data": one, "run": run})) for one in data
    ]
    _refuse_another_teacher(cache, sources[0])
    names = list(cache)
    names = sorted(random.Random(seed).sample(names, min(num_samples, len(names))))
    report = RecomputeReport(cache.path, len(names), [LayerCheck(layer) for layer in cache.layers])
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
    was_pruned = header.profile == "default" and bool(header.parents)
    tail_limit = noise + (PRUNED_TAIL if was_pruned else 0.0)
    for number, check in enumerate(checks):
        stored, again = row.layer(number), now.layer(number)
        dtail = float(np.abs(stored.tail_mass_LT - again.tail_mass_LT).max(initial=0))
        dentropy = float(np.abs(stored.entropy_LT - again.entropy_LT).max(initial=0))
        check.num_tokens += row.num_tokens
        check.num_same_top += int((stored.ids_LTK[0, :, 0] == again.ids_LTK[0, :, 0]).sum())
        check.max_dtail = max(check.max_dtail, dtail)
        check.max_dentropy = max(check.max_dentropy, dentropy)
        check.worst = max(check.worst, dtail / tail_limit, dentropy / noise)
        for token in range(row.num_tokens):
            logp_W, again_W = _joined(stored, again, token)
            common_W = np.isfinite(logp_W) & np.isfinite(again_W)
            dlogp = float(np.abs(logp_W[common_W] - again_W[common_W]).max(initial=0))
            check.max_dlogp = max(check.max_dlogp, dlogp)
            check.worst = max(check.worst, _entry_error(logp_W, again_W, header, noise))


def _joined(stored: SparseRows, again: SparseRows, token: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs float64 [W] of all ids that one of two rows keeps; -inf in the row that does not keep it."""
    kept = []
    for rows in (stored, again):
        logp_K = rows.logprobs_LTK[0, token].astype(np.float64)
        is_entry_K = np.isfinite(logp_K)
        kept.append((rows.ids_LTK[0, token][is_entry_K], logp_K[is_entry_K]))
    ids_W = np.union1d(kept[0][0], kept[1][0])
    out = np.full((2, len(ids_W)), -np.inf)
    for out_W, (ids_K, logp_K) in zip(out, kept, strict=True):
        out_W[np.searchsorted(ids_W, ids_K)] = logp_K
    return out[0], out[1]


def _entry_error(logp_W: np.ndarray, again_W: np.ndarray, header: CacheHeader, noise: float) -> float:
    """The largest error of an entry in units of what is allowed."""
    one_W, other_W = _in_units(logp_W, header), _in_units(again_W, header)
    one_W, other_W = _filled(one_W, other_W), _filled(other_W, one_W)
    allowed_W = _allowed(np.maximum(one_W, other_W), header, noise)
    return float((np.abs(one_W - other_W) / allowed_W).max(initial=0))


def _filled(own_W: np.ndarray, other_W: np.ndarray) -> np.ndarray:
    """What a row does not keep is at most as likely as the last entry it keeps."""
    known_W = np.isfinite(own_W)
    return np.where(known_W, own_W, np.minimum(other_W, own_W[known_W].min(initial=np.inf)))


def _in_units(logp_W: np.ndarray, header: CacheHeader) -> np.ndarray:
    """Levels or nats, with -inf where there is no entry; draws, with 0."""
    if header.row_kind == "sampled":
        return np.exp(logp_W) * header.widest
    if header.profile == "default":
        return np.where(np.isfinite(logp_W), 255 * np.exp(logp_W / 4), -np.inf)
    return logp_W


def _allowed(values_W: np.ndarray, header: CacheHeader, noise: float) -> np.ndarray:
    """A level of v is p = (v / 255)^4, so a nat is v / 4 levels; a draw moves with the edges of all others."""
    if header.row_kind == "sampled":
        return np.full(values_W.shape, STORED["sampled"] + noise * header.widest / 2)
    if header.profile == "default":
        return STORED["default"] + noise * values_W / 4
    return np.full(values_W.shape, STORED[header.profile] + noise)
