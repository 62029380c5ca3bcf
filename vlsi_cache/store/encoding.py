"""Sparse rows as the arrays of a part and back; values that no writer produces are refused.

A checksum only says that bytes are those that were sealed, whoever sealed them.

Shape suffixes: L layers, T response tokens with a row, K kept entries, m tail samples, E entries of one layer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.errors import CacheCorruptError
from vlsi_cache.sparse.quantize import (
    decode_gaps,
    decode_levels,
    encode_gaps,
    encode_levels,
    logprobs_of_levels,
    undo_descents,
    undo_gaps,
)
from vlsi_cache.sparse.rows import SparseRows, share_logprobs

from .arrays import BYTES_ARRAY, UNKNOWN_BYTES, value_array
from .codec import Arrays
from .format import CacheHeader, PartRecord

ROUNDING = 1e-3  # what float32 sums over a vocabulary may lift a log-prob above 0, or a mass out of [0, 1]


def check_sample_arrays(folder: Path, header: CacheHeader, record: PartRecord, arrays: Mapping[str, Any]) -> None:
    """Offsets are those of part.json, response ids are tokens, and positions rise inside the response."""
    for name, lengths in (("offsets", record.sample_tokens), ("response_offsets", record.sample_response_tokens)):
        want = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])
        wrong = np.flatnonzero(arrays[name] != want)
        if wrong.size:
            at = int(wrong[0])
            what = f"entry {at} is {arrays[name][at]}, and must be {want[at]}"
            raise CacheCorruptError.at(folder / name, f": token counts are not those of part.json: {what}")
    ids = arrays["response_ids"]
    if ids.size and int(ids.max()) >= header.vocab_size:
        what = f": id {ids.max()}, the vocabulary is {header.vocab_size}"
        raise CacheCorruptError.at(folder / "response_ids", what)
    positions_T = arrays["positions"].astype(np.int64)
    rows_S = np.array(record.sample_tokens, np.int64)
    sample_T = np.repeat(np.arange(len(rows_S)), rows_S)
    outside_T = positions_T >= np.array(record.sample_response_tokens, np.int64)[sample_T]
    falls_T = np.zeros(len(positions_T), bool)
    falls_T[1:] = (np.diff(positions_T) <= 0) & (np.diff(sample_T) == 0)
    wrong = np.flatnonzero(outside_T | falls_T)
    if wrong.size:
        row, sample = int(wrong[0]), int(sample_T[wrong[0]])
        what = (
            f": row {row} is at response token {positions_T[row]} of sample {record.sample_ids[sample]!r}, which has "
            f"{record.sample_response_tokens[sample]}; positions must rise inside the response"
        )
        raise CacheCorruptError.at(folder / "positions", what)
    if BYTES_ARRAY in arrays:
        _check_bytes(folder, record, arrays[BYTES_ARRAY])


def _check_bytes(folder: Path, record: PartRecord, lengths_R: np.ndarray) -> None:
    """The lengths of a response are known of all its tokens or of none."""
    sample_R = np.repeat(np.arange(len(record.sample_ids)), record.sample_response_tokens)
    unknown_S = np.bincount(sample_R, weights=lengths_R == UNKNOWN_BYTES, minlength=len(record.sample_ids))
    wrong = np.flatnonzero((unknown_S > 0) & (unknown_S < np.array(record.sample_response_tokens)))
    if wrong.size:
        at = int(wrong[0])
        what = (
            f": of the {record.sample_response_tokens[at]} tokens of sample {record.sample_ids[at]!r} the bytes of "
            f"{int(unknown_S[at])} are unknown; they are of all or of none"
        )
        raise CacheCorruptError.at(folder / BYTES_ARRAY, what)


def check_scalars(folder: Path, header: CacheHeader, arrays: Mapping[str, Any]) -> None:
    """Numbers are numbers, log-probs at most 0 and masses within [0, 1]; what the cache lacks may be NaN."""
    unknown = {name: np.isnan(arrays[name]) for name in header.lacks}
    for name in ("lse", "entropy"):
        bad = ~np.isfinite(arrays[name]) & ~unknown.get(name, np.False_)
        _refuse(folder, name, arrays[name], bad, "is not finite")
    gold_LT, mass_LT = arrays["gold_logprob"], arrays["tail_mass"]
    bad = ~(gold_LT <= ROUNDING) & ~unknown.get("gold_logprob", np.False_)
    _refuse(folder, "gold_logprob", gold_LT, bad, "is no log-prob")
    _refuse(folder, "tail_mass", mass_LT, ~((mass_LT >= -ROUNDING) & (mass_LT <= 1 + ROUNDING)), "is outside [0, 1]")


def _refuse(folder: Path, name: str, values: np.ndarray, bad: np.ndarray, what: str) -> None:
    if bad.any():
        layer, token, *_ = where = tuple(np.argwhere(bad)[0].tolist())
        what = f": {values[where]} at layer row {layer}, token {token} {what}, and is never written"
        raise CacheCorruptError.at(folder / name, what)


def check_entries(folder: Path, header: CacheHeader, arrays: Mapping[str, Any], *, undone: bool) -> None:
    """Every row descends from at most 0, and counts are draws. Memory-mapped blocks are checked when they are touched.

    `undone` says that differences within rows of one width have been summed up (encoding.UNDO).
    """
    name = value_array(header)
    if header.is_ragged:
        layers = [(values_E, kept_T) for values_E, kept_T in zip(arrays[name], arrays["kept"], strict=True)]
    elif isinstance(arrays[name], np.ndarray):
        layers = [(values_TK.reshape(-1), values_TK.shape[1]) for values_TK in arrays[name]]
    else:
        return
    for row, (values_E, kept) in enumerate(layers):
        token = _first_bad(header, values_E, kept, undone=undone and not header.is_ragged) if values_E.size else None
        if token is not None:
            what = "do not descend from at most 0" if name != "counts" else f"are not counts of {header.widest} draws"
            raise CacheCorruptError.at(folder / name, f": the entries of layer row {row}, token {token} {what}")


def check_block(header: CacheHeader, name: str, values_TK: np.ndarray) -> None:
    """ValueError for ids outside the vocabulary, or log-probs that are none, in a block of a memory-mapped array."""
    if name == "ids" and values_TK.size and int(values_TK.max()) >= header.vocab_size:
        raise ValueError(f"id {values_TK.max()}, the vocabulary is {header.vocab_size}")
    if name == "logprobs" and values_TK.size:
        token = _first_bad(header, values_TK.reshape(-1), values_TK.shape[1], undone=False)
        if token is not None:
            raise ValueError(f"the entries of token {token} do not descend from at most 0")


def repeated_entry(ids_E: np.ndarray, kept: int | np.ndarray) -> int | None:
    """The first row of a layer that keeps an id twice; `ids_E` are its entries, `kept` the width of every row."""
    if isinstance(kept, int):
        sorted_TK = np.sort(ids_E.reshape(-1, max(1, kept)), axis=1)
        found_T = np.flatnonzero((sorted_TK[:, 1:] == sorted_TK[:, :-1]).any(axis=1))
        return int(found_T[0]) if found_T.size else None
    keys_E = np.sort((np.repeat(np.arange(len(kept)), kept.astype(np.int64)) << 32) | ids_E.reshape(-1))
    twice = np.flatnonzero(keys_E[1:] == keys_E[:-1])
    return int(keys_E[twice[0]] >> 32) if twice.size else None


def _first_bad(header: CacheHeader, values_E: np.ndarray, kept: int | np.ndarray, *, undone: bool) -> int | None:
    """The first row of a layer that no writer produces. `kept` is the width of every row, or of each."""
    if isinstance(kept, int):
        widths_T, starts_T = None, np.arange(0, len(values_E), kept)
    else:
        widths_T = kept[kept > 0].astype(np.int64)
        starts_T = np.cumsum(widths_T) - widths_T
    if header.row_kind == "sampled":
        bad_T = _counts_wrong(values_E, starts_T, header.widest)
    elif header.profile == "default" and not undone:
        # q[k] = s[0] - s[1] - ... - s[k] stays at 0 or above: what it falls by is at most where it began
        bad_T = np.add.reduceat(values_E, starts_T, dtype=np.int64) > 2 * values_E[starts_T].astype(np.int64)
    else:
        bad_T = _rises(_plain(header, values_E, kept, widths_T, starts_T, undone=undone), starts_T)
    if not bad_T.any():
        return None
    bad = int(np.flatnonzero(bad_T)[0])
    return bad if widths_T is None else int(np.flatnonzero(np.asarray(kept) > 0)[bad])


def _plain(
    header: CacheHeader,
    values_E: np.ndarray,
    kept: int | np.ndarray,
    widths_T: np.ndarray | None,
    starts_T: np.ndarray,
    *,
    undone: bool,
) -> np.ndarray:
    """Levels or log-probs of the entries, which must descend."""
    if header.profile != "exact":
        return values_E
    if undone:
        return values_E.view(np.float32)
    if widths_T is None:
        return decode_gaps(values_E.reshape(-1, int(kept))).reshape(-1)
    sums_E = np.cumsum(values_E, dtype=np.uint32)
    before_T = sums_E[starts_T] - values_E[starts_T]  # modulo 2^32, as the sums are
    return (sums_E - np.repeat(before_T, widths_T)).view(np.float32)


def _rises(values_E: np.ndarray, starts_T: np.ndarray) -> np.ndarray:
    """bool [T]: rows that do not descend, begin above 0, or hold a NaN."""
    falls_E = np.ones(len(values_E), bool)
    np.less_equal(values_E[1:], values_E[:-1], out=falls_E[1:])
    falls_E[starts_T] = True if values_E.dtype.kind == "u" else values_E[starts_T] <= ROUNDING
    return np.zeros(len(starts_T), bool) if falls_E.all() else ~np.logical_and.reduceat(falls_E, starts_T)


def _counts_wrong(counts_E: np.ndarray, starts_T: np.ndarray, num_draws: int) -> np.ndarray:
    wrong_T = np.add.reduceat(counts_E, starts_T, dtype=np.int64) != num_draws
    wrong_T |= np.minimum.reduceat(counts_E, starts_T) < 1
    return wrong_T | _rises(counts_E, starts_T)


def encode_rows(header: CacheHeader, rank_of_id_LV: np.ndarray, rows: SparseRows) -> Arrays:
    """The layered arrays in their disk dtype, layer axis first; `rows` are padded with -inf where they are narrower."""
    value = value_array(header)
    entries = {"ids": by_layer(rank_of_id_LV, rows.ids_LTK), value: encode_values(header, rows.logprobs_LTK)}
    arrays: Arrays = {
        "lse": stored_scalar(header, rows.lse_LTn),
        "entropy": stored_scalar(header, rows.entropy_LT),
        "gold_logprob": stored_scalar(header, rows.gold_logprob_LT),
    }
    if header.row_kind == "top-k":
        arrays["tail_mass"] = stored_scalar(header, rows.tail_mass_LT)
    if header.tail_samples:
        arrays["tail_ids"] = by_layer(rank_of_id_LV, rows.tail_ids_LTm)
    if not header.is_ragged:
        return arrays | entries
    kept_LT = row_widths(header, rows.logprobs_LTK)
    mask_LTK = np.arange(rows.top_k) < kept_LT[..., None]
    kept_dtype = np.min_scalar_type(header.widest)
    return arrays | {"kept": kept_LT.astype(kept_dtype)} | {name: a[mask_LTK] for name, a in entries.items()}


def by_layer(table_LV: np.ndarray, index_LTx: np.ndarray) -> np.ndarray:
    """`table_LV[l, index_LTx[l]]` for every layer."""
    out_LTx = np.empty(index_LTx.shape, table_LV.dtype)
    for table_V, index_Tx, out_Tx in zip(table_LV, index_LTx, out_LTx, strict=True):
        np.take(table_V, index_Tx, out=out_Tx, mode="clip")  # ids and places are checked where they enter
    return out_LTx


def stored_scalar(header: CacheHeader, values: np.ndarray) -> np.ndarray:
    """float32; in the `default` profile rounded to 16 bits of significance (an error below 1 in 130,000)."""
    exact = np.array(values, np.float32)
    if header.profile == "default":
        bits = exact.view(np.uint32)
        bits += np.where(np.isfinite(exact), np.uint32(0x80), np.uint32(0))
        bits &= np.uint32(0xFFFFFF00)
    return exact


def row_widths(header: CacheHeader, logprobs_LTK: np.ndarray) -> np.ndarray:
    """[L, T]: entries of every row. Only top-p and sampled rows end at their padding; others are as wide as allowed."""
    if header.truncated:
        return np.isfinite(logprobs_LTK).sum(-1)
    return np.broadcast_to(np.array(header.top_k)[:, None], logprobs_LTK.shape[:2])


def encode_values(header: CacheHeader, logprobs_LTK: np.ndarray) -> np.ndarray:
    if header.row_kind == "sampled":
        counts_LTK = np.rint(np.exp(logprobs_LTK.astype(np.float64)) * header.widest)
        return counts_LTK.astype(np.min_scalar_type(header.widest))
    if header.profile == "exact":
        return encode_gaps(logprobs_LTK)
    if header.profile == "fast":
        return logprobs_LTK.astype(np.float16)
    return encode_levels(logprobs_LTK)


def decode_values(
    header: CacheHeader, stored_LTK: np.ndarray, tail_mass_LT: np.ndarray, mask_LTK: np.ndarray | None = None
) -> np.ndarray:
    """Log-probs of stored entries, -inf outside the mask: float32; float16, often a view, in the `fast` profile.

    The entries are as they lie on the disk; `undone_values` is for those that have been through UNDO.
    """
    if header.row_kind == "sampled":
        return share_logprobs(stored_LTK, header.widest)
    if header.profile == "default":
        return decode_levels(stored_LTK, tail_mass_LT, mask_LTK)
    logprobs_LTK = decode_gaps(stored_LTK) if header.profile == "exact" else stored_LTK
    if mask_LTK is not None:
        logprobs_LTK[~mask_LTK] = -np.inf
    return logprobs_LTK


# What undoes the differences between the entries of a row in whole chunks, several times as fast as row by row.
UNDO = {"levels": undo_descents, "logprob_gaps": undo_gaps}


def undone_values(header: CacheHeader, values_LTK: np.ndarray, tail_mass_LT: np.ndarray) -> np.ndarray:
    """Log-probs of entries that were read with UNDO: float32, or a float16 view."""
    if header.row_kind == "sampled":
        return share_logprobs(values_LTK, header.widest)
    if header.profile == "default":
        return logprobs_of_levels(values_LTK, tail_mass_LT)
    return values_LTK.view(np.float32) if header.profile == "exact" else values_LTK


def padded(
    header: CacheHeader, flat: dict[str, list[np.ndarray]], kept_LT: np.ndarray, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places [L, T, K], stored values [L, T, K], mask of what is an entry) of entries `spans[l]` of each layer.

    K is the width of the widest of these rows, `kept_LT` their widths.
    """
    mask_LTK = np.arange(int(kept_LT.max(initial=1))) < kept_LT[..., None]
    both = []
    for name in ("ids", value_array(header)):
        pieces = [flat[name][layer][low:high] for layer, (low, high) in enumerate(spans)]
        full_LTK = np.zeros(mask_LTK.shape, pieces[0].dtype if pieces else np.uint8)
        full_LTK[mask_LTK] = np.concatenate(pieces) if pieces else []
        both.append(full_LTK)
    return both[0], both[1], mask_LTK


def check_places(folder: Path, header: CacheHeader, arrays: Arrays) -> None:
    """Every place is inside the vocabulary. Memory-mapped blocks are checked when they are touched."""
    for name in ("ids", "tail_ids"):
        for piece in arrays[name] if isinstance(arrays.get(name), list) else [arrays.get(name)]:
            if isinstance(piece, np.ndarray) and piece.size and int(piece.max()) >= header.vocab_size:
                what = f": `{name}`: place {piece.max()}, the vocabulary is {header.vocab_size}"
                raise CacheCorruptError.at(folder, what)
