"""Changing a cache means writing a new one (prune), or taking what is broken out of the way (repair).

Shape suffixes: L layers, T response tokens, K kept entries, D dropped entries, m tail samples.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from vlsi_cache.errors import CacheIncompleteError, SpecError
from vlsi_cache.sparse.levels import decode_levels
from vlsi_cache.sparse.truncate import redraw_tail

from .arrays import Arrays
from .layout import CacheHeader
from .reader import Cache, Part, open
from .samples import PartSamples
from .schema import layered_names
from .writer import CacheWriter


@dataclass(frozen=True)
class PrunePlan:
    """What `prune` would do: the layers and entries that stay, and about how many bytes that saves."""

    source: Path
    out: Path
    layers: list[int]
    dropped_layers: list[int]
    top_k: int
    source_top_k: int
    source_bytes: int
    estimated_bytes: int


def plan_prune(
    cache: Cache | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layers: Sequence[int | str] | None = None,
    top_k: int | None = None,
) -> PrunePlan:
    """Check what is asked of `prune` and price it. Raises SpecError when there is nothing to prune."""
    source = cache if isinstance(cache, Cache) else open(cache)
    header, path = source.header, Path(out)
    if not source.is_complete:
        raise CacheIncompleteError(f"`{source.path}` is not finished; only a complete cache can be pruned")
    kept = sorted({header.layers[i] for i in header.layer_indices(layers)})
    top_k = header.widest if top_k is None else top_k
    if header.is_ragged:
        raise SpecError("not yet")
    if path.resolve() == source.path.resolve():
        raise SpecError(f"`{path}` is the cache to prune itself; prune writes a new one, name another folder")
    if header.layers[-1] not in kept:
        raise SpecError(f'the final layer {header.layers[-1]} always stays: add "last" to `layers`')
    if not 1 <= top_k <= header.widest:
        raise SpecError(f"top_k {top_k}: this cache keeps {header.widest}, so 1 to {header.widest} is possible")
    if kept == header.layers and top_k == header.widest:
        raise SpecError(f"nothing to prune: all {len(kept)} layers and all {top_k} entries would stay")
    sizes = source.bytes_by_array()
    by_layer, by_entry = len(kept) / len(header.layers), top_k / header.widest
    entry_bytes = sum(sizes.get(name, 0) for name in ("ids", "levels"))
    other_bytes = sum(sizes.get(name, 0) for name in layered_names(header)) - entry_bytes
    rest_bytes = sum(sizes.values()) - entry_bytes - other_bytes
    estimate = int(entry_bytes * by_layer * by_entry + other_bytes * by_layer + rest_bytes)
    dropped = [layer for layer in header.layers if layer not in kept]
    return PrunePlan(source.path, path, kept, dropped, top_k, header.widest, sum(sizes.values()), estimate)


@overload
def prune(
    cache: Cache | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layers: Sequence[int | str] | None = None,
    top_k: int | None = None,
    dry_run: Literal[False] = False,
) -> Cache: ...
@overload
def prune(
    cache: Cache | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layers: Sequence[int | str] | None = None,
    top_k: int | None = None,
    dry_run: Literal[True],
) -> PrunePlan: ...
def prune(
    cache: Cache | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layers: Sequence[int | str] | None = None,
    top_k: int | None = None,
    dry_run: bool = False,
) -> Cache | PrunePlan:
    """Write a new cache at `out` with fewer `layers` and/or a smaller `top_k`; run again, it continues.

    The ids and levels that stay are slices of the old ones; the mass of the dropped entries goes into `tail_mass`, so
    that log-probs decode to the same values (up to float32 rounding of that mass). Tail samples are redrawn so that
    they are again independent draws from everything outside the new top-k.
    """
    source = cache if isinstance(cache, Cache) else open(cache)
    plan = plan_prune(source, out, layers=layers, top_k=top_k)
    if dry_run:
        return plan
    writer = CacheWriter.create_or_resume(
        plan.out, _pruned_header(source.header, plan), source.ranks.select(source.header.layer_indices(plan.layers))
    )
    for index in writer.missing_parts():
        part = source.part(index, plan.layers, keep=False)
        arrays = cut_top_k(part, plan.layers, plan.top_k)
        arrays = {name: arrays[name] for name in layered_names(writer.header)}
        writer.write_encoded(index, _samples_of(part), arrays)
    writer.finish()
    return open(plan.out)


def _pruned_header(header: CacheHeader, plan: PrunePlan) -> CacheHeader:
    parent: dict[str, Any] = {
        "path": str(plan.source.resolve()),
        "digest": header.digest,
        "operation": "prune",
        "dropped_layers": plan.dropped_layers,
        "top_k": [plan.source_top_k, plan.top_k],
        "parents": header.parents,
    }
    # `created_by` is left out so that it becomes the program that prunes
    values = header.model_dump(exclude={"created_by", "layers", "top_k", "parents"})
    return CacheHeader(**values, layers=plan.layers, top_k=[plan.top_k] * len(plan.layers), parents=[parent])


def cut_top_k(part: Part, layers: Sequence[int], top_k: int) -> Arrays:
    """The arrays of `part` (of model layers `layers`) with the first `top_k` entries, an exact re-draw of the tail."""
    arrays = dict(part.arrays)
    if top_k == arrays["ids"].shape[-1]:
        return arrays
    dropped_p_LTD = np.exp(decode_levels(arrays["levels"], arrays["tail_mass"])[..., top_k:])
    uniforms_LTm = _uniforms(part, layers, arrays["tail_ids"].shape[-1])
    tail_ids_LTm, tail_mass_LT = redraw_tail(
        arrays["ids"][..., top_k:], dropped_p_LTD, arrays["tail_ids"], arrays["tail_mass"], uniforms_LTm
    )
    cut = {"ids": arrays["ids"][..., :top_k], "levels": arrays["levels"][..., :top_k]}
    return {**arrays, **cut, "tail_ids": tail_ids_LTm, "tail_mass": tail_mass_LT}


def _uniforms(part: Part, layers: Sequence[int], num_tail: int) -> np.ndarray:
    """Uniforms [L, T, m], keyed by sample id and model layer: independent of parts, of order and of what else stays."""
    record = part.record
    uniforms_LTm = np.empty((len(layers), record.num_tokens, num_tail))
    offsets = part.arrays["offsets"].tolist()
    for sample_id, low, high in zip(record.sample_ids, offsets[:-1], offsets[1:], strict=True):
        for row, layer in enumerate(layers):
            key = hashlib.sha256(f"vlsi-cache prune\0{layer}\0{sample_id}".encode()).digest()
            rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
            uniforms_LTm[row, low:high] = rng.random((high - low, num_tail))
    return uniforms_LTm


def _samples_of(part: Part) -> PartSamples:
    """What the commit record of a part says about its samples; the rows stay in their disk form."""
    record, response = part.record, part.arrays["response_offsets"].tolist()
    ids = [part.arrays["response_ids"][lo:hi] for lo, hi in pairwise(response)]
    return PartSamples(record.sample_ids, record.kinds, record.digests, ids, None, record.skipped)
