"""Cutting the arrays of one part: layers, entries, samples, tokens, profile. What stays is a slice of what is stored.

Shape suffixes: L layers, T response tokens with a row, K kept entries, m tail samples, S samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from vlsi_cache.sparse.rows import keyed_uniforms, redraw_tail
from vlsi_cache.store.arrays import SCALAR_ARRAYS, layered_names, value_array
from vlsi_cache.store.codec import Arrays, MappedLayers
from vlsi_cache.store.encoding import decode_values, encode_values, padded, stored_scalar
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.store.part import Part
from vlsi_cache.store.writer import PartSamples


@dataclass(frozen=True)
class Piece:
    """What is left of one part: its samples, and their layered arrays as lists of one array per layer."""

    samples: PartSamples
    layers: dict[str, list[np.ndarray]]


def cut_part(part: Part, target: CacheHeader, rows_T: np.ndarray, chosen_S: np.ndarray, *, generation: int) -> Piece:
    """The rows `rows_T` of the samples `chosen_S`, as the cache of `target` holds them.

    `part` was read with the layers of `target`. `generation` says how often entries were cut before: each time needs
    uniforms of its own.
    """
    part = in_memory(part)
    index_T = np.flatnonzero(rows_T)
    layers: dict[str, list[np.ndarray]] = {name: [] for name in layered_names(target)}
    for row in range(len(target.layers)):
        for name, array in _cut_layer(part, row, target, index_T, chosen_S, generation).items():
            if name in layers:
                layers[name].append(array)
    return Piece(stored_samples(part, rows_T, chosen_S), layers)


def in_memory(part: Part) -> Part:
    """The part with every block of its memory-mapped arrays checked, and as plain arrays."""
    part.check()
    mapped = {name: array[:, :] for name, array in part.arrays.items() if isinstance(array, MappedLayers)}
    return replace(part, arrays={**part.arrays, **mapped})


def join(pieces: Sequence[Piece], target: CacheHeader) -> tuple[PartSamples, Arrays]:
    """One part out of several pieces, in order, ready to be written."""
    samples = [piece.samples for piece in pieces]
    joined = PartSamples(
        sample_ids=[name for one in samples for name in one.sample_ids],
        kinds=[kind for one in samples for kind in one.kinds],
        digests=[digest for one in samples for digest in one.digests],
        response_ids=[ids for one in samples for ids in one.response_ids],
        rows=None,
        skipped=[row for one in samples for row in one.skipped],
        positions=[at for one in samples for at in one.positions_or_all],
    )
    flat = ("ids", value_array(target)) if target.is_ragged else ()
    arrays: Arrays = {}
    for name in layered_names(target):
        rows = [np.concatenate(layer) for layer in zip(*(piece.layers[name] for piece in pieces), strict=True)]
        arrays[name] = np.concatenate(rows) if name in flat else np.stack(rows)
    return joined, arrays


def _cut_layer(
    part: Part, row: int, target: CacheHeader, index_T: np.ndarray, chosen_S: np.ndarray, generation: int
) -> dict[str, np.ndarray]:
    """The arrays of one layer, [T, ...]; entries are flat where rows of the target differ in width."""
    source, top_k = part.header, target.top_k[row]
    arrays = {name: part.arrays[name][row][index_T] for name in (*SCALAR_ARRAYS, "tail_ids")}
    ids_TK, stored_TK, kept_T = (array[index_T] for array in _entries(part, row))
    mask_TK = np.arange(ids_TK.shape[1]) < kept_T[:, None]
    values_TK = stored_TK[:, :top_k]
    drops, converts = top_k < ids_TK.shape[1], target.profile != source.profile
    if source.row_kind == "top-k" and (drops or converts):
        logprobs_TK = _decode(source, stored_TK, arrays["tail_mass"], mask_TK)
        if converts:
            values_TK = encode_values(target, logprobs_TK[None, :, :top_k])[0]
        if drops:
            num_tail = arrays["tail_ids"].shape[1]
            uniforms_Tm = _uniforms(part, target.layers[row], num_tail, chosen_S, generation)[index_T]
            tail_ids_Tm, tail_mass_T = redraw_tail(
                ids_TK[:, top_k:],
                np.exp(logprobs_TK[:, top_k:]),
                arrays["tail_ids"],
                arrays["tail_mass"],
                uniforms_Tm,
            )
            arrays |= {"tail_ids": tail_ids_Tm, "tail_mass": tail_mass_T}
    for name in SCALAR_ARRAYS:
        arrays[name] = stored_scalar(target, arrays[name])
    entries = {"ids": ids_TK[:, :top_k], value_array(target): values_TK}
    if target.profile == "fast" and part.id_of_rank_LV is not None:
        entries["ids"] = part.id_of_rank_LV[row][entries["ids"]]
        arrays["tail_ids"] = part.id_of_rank_LV[row][arrays["tail_ids"]]
    if not target.is_ragged:
        return {**arrays, **{name: _at_width(array, top_k) for name, array in entries.items()}}
    kept_T = np.minimum(kept_T, top_k).astype(np.min_scalar_type(target.widest))
    return {**arrays, "kept": kept_T, **{name: array[mask_TK[:, :top_k]] for name, array in entries.items()}}


def _entries(part: Part, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """OrderOrMaker [T, K] and stored values [T, K] of one layer, and the width of every row."""
    names = ("ids", value_array(part.header))
    if not part.header.is_ragged:
        ids_TK, stored_TK = (part.arrays[name][row] for name in names)
        return ids_TK, stored_TK, np.full(len(ids_TK), ids_TK.shape[1])
    kept_T = part.arrays["kept"][row]
    flat = {name: [part.arrays[name][row]] for name in names}
    ids_LTK, stored_LTK, _ = padded(part.header, flat, kept_T[None], [(0, len(flat["ids"][0]))])
    return ids_LTK[0], stored_LTK[0], kept_T


def _decode(header: CacheHeader, stored_TK: np.ndarray, tail_mass_T: np.ndarray, mask_TK: np.ndarray) -> np.ndarray:
    mask_LTK = mask_TK[None] if header.is_ragged else None
    return decode_values(header, stored_TK[None].copy(), tail_mass_T[None], mask_LTK)[0].astype(np.float32)


def _at_width(array_TK: np.ndarray, width: int) -> np.ndarray:
    """A part without rows knows no width of its own."""
    return array_TK if len(array_TK) else np.empty((0, width), array_TK.dtype)


def _uniforms(part: Part, layer: int, num_tail: int, chosen_S: np.ndarray, generation: int) -> np.ndarray:
    """Uniforms [T, m], keyed by sample id, model layer and place in the response; 0 for samples that go.

    So they depend neither on parts nor on order, nor on what else stays.
    """
    record, again = part.record, f"\0{generation}" if generation else ""
    uniforms_Tm = np.zeros((record.num_tokens, num_tail))
    for index in np.flatnonzero(chosen_S):
        low, high = part.arrays["offsets"][index : index + 2]
        key = f"vlsi-cache prune{again}\0{layer}\0{record.sample_ids[index]}"
        drawn = keyed_uniforms(key, (record.sample_response_tokens[index], num_tail))
        uniforms_Tm[low:high] = drawn[part.arrays["positions"][low:high]]
    return uniforms_Tm


def stored_samples(part: Part, rows_T: np.ndarray | None = None, chosen_S: np.ndarray | None = None) -> PartSamples:
    """The samples `chosen_S` with all their response ids and the places of the rows `rows_T`; all by default."""
    record, positions_T = part.record, part.arrays["positions"]
    response = list(pairwise(part.arrays["response_offsets"].tolist()))
    tokens = list(pairwise(part.arrays["offsets"].tolist()))
    rows_T = np.ones(len(positions_T), bool) if rows_T is None else rows_T
    chosen = range(len(part)) if chosen_S is None else np.flatnonzero(chosen_S).tolist()
    return PartSamples(
        sample_ids=[record.sample_ids[i] for i in chosen],
        kinds=[record.kinds[i] for i in chosen],
        digests=[record.digests[i] for i in chosen],
        response_ids=[part.arrays["response_ids"][slice(*response[i])] for i in chosen],
        rows=None,
        skipped=record.skipped,
        positions=[positions_T[slice(*tokens[i])][rows_T[slice(*tokens[i])]] for i in chosen],
    )
