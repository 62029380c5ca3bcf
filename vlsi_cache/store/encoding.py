"""Between the rows of a teacher and the arrays of a part: profiles, widths, ranks.

Shape suffixes: L layers, T response tokens with a row, K kept entries, m tail samples, E entries of one layer.
"""

from collections.abc import Sequence

import numpy as np

from vlsi_cache.sparse.gaps import decode_gaps, encode_gaps, undo_gaps
from vlsi_cache.sparse.levels import decode_levels, encode_levels, logprobs_of_levels, undo_descents
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.sparse.truncate import share_logprobs

from .arrays import Arrays
from .layout import CacheHeader
from .schema import value_array


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
        np.take(table_V, index_Tx, out=out_Tx, mode="clip")  # ids and ranks are checked where they enter
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
    """(ranks [L, T, K], stored values [L, T, K], mask of what is an entry) of entries `spans[l]` of each layer.

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


def check_ranks(header: CacheHeader, arrays: Arrays) -> None:
    """ValueError when a rank is outside the vocabulary. Memory-mapped arrays are checked where they are sliced."""
    for name in ("ids", "tail_ids"):
        for piece in arrays[name] if isinstance(arrays.get(name), list) else [arrays.get(name)]:
            if isinstance(piece, np.ndarray) and piece.size and int(piece.max()) >= header.v_real:
                raise ValueError(f"`{name}`: rank {piece.max()}, the vocabulary is {header.v_real}")
