"""Cutting the arrays of one part: layers, entries, samples, tokens, profile. What stays is a slice of what is stored.

`spend` says beforehand about how many bytes stay.

Shape suffixes: L layers, T response tokens with a row, K kept entries, m tail samples, S samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from vlsi_cache.sparse.rows import keyed_uniforms, redraw_tail
from vlsi_cache.store.arrays import (
    BYTES_ARRAY,
    SCALAR_ARRAYS,
    UNKNOWN_BYTES,
    VALUE_ARRAY,
    VALUE_DTYPE,
    layered_names,
    value_array,
)
from vlsi_cache.store.codec import Arrays, MappedLayers
from vlsi_cache.store.encoding import decode_values, encode_values, padded, stored_scalar
from vlsi_cache.store.format import CacheHeader, PartRecord
from vlsi_cache.store.part import Part
from vlsi_cache.store.writer import PartSamples

LEVEL_BYTES = 0.26  # of one entry in the `default` profile, compressed: measured on SmolLM2-135M at k = 64


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
        byte_lengths=_joined_lengths(samples),
    )
    flat = ("ids", value_array(target)) if target.is_ragged else ()
    arrays: Arrays = {}
    for name in layered_names(target):
        rows = [np.concatenate(layer) for layer in zip(*(piece.layers[name] for piece in pieces), strict=True)]
        arrays[name] = np.concatenate(rows) if name in flat else np.stack(rows)
    return joined, arrays


def _joined_lengths(samples: Sequence[PartSamples]) -> list[np.ndarray] | None:
    """Unknown for the samples of parts that do not say them, where others do."""
    if all(one.byte_lengths is None for one in samples):
        return None
    unknown = [[np.full(len(ids), UNKNOWN_BYTES, np.uint16) for ids in one.response_ids] for one in samples]
    return [lengths for one, none in zip(samples, unknown, strict=True) for lengths in one.byte_lengths or none]


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
    """Places [T, K] and stored values [T, K] of one layer, and the width of every row."""
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
    lengths = part.arrays.get(BYTES_ARRAY)
    return PartSamples(
        sample_ids=[record.sample_ids[i] for i in chosen],
        kinds=[record.kinds[i] for i in chosen],
        digests=[record.digests[i] for i in chosen],
        response_ids=[part.arrays["response_ids"][slice(*response[i])] for i in chosen],
        rows=None,
        skipped=record.skipped,
        positions=[positions_T[slice(*tokens[i])][rows_T[slice(*tokens[i])]] for i in chosen],
        byte_lengths=None if lengths is None else [lengths[slice(*response[i])] for i in chosen],
    )


@dataclass(frozen=True)
class Shares:
    """What stays of one part, from 0 to 1: first layers, then entries, then samples with their rows and responses, and
    of the rows that are left those of some tokens."""

    layers: float
    entries: float
    samples: float
    rows: float
    responses: float
    tokens: float


@dataclass(frozen=True)
class Spent:
    """Bytes of data files that are left of one part, and those saved by each reason (below 0: the profile takes more).

    Metadata is not among them: it is the same for a small part as for a large one.
    """

    left: int
    saved: dict[str, int]


def entry_share(header: CacheHeader, records: Sequence[PartRecord], rows: list[int], widths: list[int]) -> float:
    """Share of the entries of the layer rows `rows` that stay when each is cut to its width."""
    if not header.truncated:
        return sum(widths) / sum(header.top_k[row] for row in rows)
    cells = sum(record.num_tokens for record in records) * len(header.layers)
    mean_width = sum(record.num_entries for record in records) / max(1, cells)
    return float(np.clip(np.mean(widths) / max(1.0, mean_width), 0, 1)) if widths != header.top_k else 1.0


def spend(header: CacheHeader, record: PartRecord, shares: Shares, profile: str) -> Spent:
    """Price one part."""
    entries, layered, per_row, per_response, per_sample = _sizes(header, record)
    saved = {}
    saved["layers"] = (entries + layered) * (1 - shares.layers)
    entries, layered = entries * shares.layers, layered * shares.layers
    saved["entries"] = entries * (1 - shares.entries)
    entries *= shares.entries
    saved["samples"] = (entries + layered + per_row) * (1 - shares.rows) + per_response * (1 - shares.responses)
    saved["samples"] += per_sample * (1 - shares.samples)
    entries, layered, per_row = (size * shares.rows for size in (entries, layered, per_row))
    per_response, per_sample = per_response * shares.responses, per_sample * shares.samples
    saved["tokens"] = (entries + layered + per_row) * (1 - shares.tokens)
    entries, layered, per_row = (size * shares.tokens for size in (entries, layered, per_row))
    if profile != header.profile:
        share = shares.layers * shares.entries * shares.rows * shares.tokens
        after = _converted(header, record, entries, record.num_entries * share, profile)
        saved["profile"] = entries - after
        entries = after
    left = int(entries + layered + per_row + per_response + per_sample)
    return Spent(left, {reason: int(num_bytes) for reason, num_bytes in saved.items()})


def _sizes(header: CacheHeader, record: PartRecord) -> tuple[float, float, float, float, float]:
    """Bytes of: entries, other arrays with a layer axis, arrays by row, arrays by response token, arrays by sample."""
    by_array: dict[str, float] = {}
    for name, file in record.files.items():
        if "/c/" in name:
            by_array[name.split("/", 1)[0]] = file.size
    entries = sum(by_array.pop(name, 0.0) for name in ("ids", "kept", value_array(header)))
    layered = sum(by_array.pop(name, 0.0) for name in layered_names(header))
    per_row = by_array.pop("positions", 0.0)
    per_response = by_array.pop("response_ids", 0.0) + by_array.pop(BYTES_ARRAY, 0.0)
    return entries, layered, per_row, per_response, sum(by_array.values())


def _converted(header: CacheHeader, record: PartRecord, entry_bytes: float, num_entries: float, profile: str) -> float:
    """Bytes of the entries in another profile."""
    value = "counts" if header.row_kind == "sampled" else VALUE_ARRAY[profile]
    if profile == "fast":
        width = np.dtype(VALUE_DTYPE[value]).itemsize if value in VALUE_DTYPE else 1
        return num_entries * (header.id_dtype.itemsize + width)
    if value == "counts":
        return entry_bytes
    stored = sum(file.size for name, file in record.files.items() if name.startswith(f"{value_array(header)}/c/"))
    total = sum(file.size for name, file in record.files.items() if name.startswith(("ids/c/", "kept/c/"))) + stored
    return entry_bytes * (1 - stored / max(1, total)) + LEVEL_BYTES * num_entries
