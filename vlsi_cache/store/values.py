"""Values that no writer produces. A checksum only says that bytes are those that were sealed, whoever sealed them.

Shape suffixes: L layers, T response tokens with a row, K kept entries, m tail samples, E entries of one layer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.errors import CacheCorruptError
from vlsi_cache.sparse.gaps import decode_gaps

from .layout import CacheHeader, PartRecord
from .schema import value_array

ROUNDING = 1e-3  # what float32 sums over a vocabulary may lift a log-prob above 0, or a mass out of [0, 1]


def check_sample_arrays(folder: Path, header: CacheHeader, record: PartRecord, arrays: Mapping[str, Any]) -> None:
    """Offsets are those of part.json, response ids are tokens, and positions rise inside the response."""
    for name, lengths in (
        ("offsets", record.sample_tokens),
        ("response_offsets", record.sample_response_tokens),
    ):
        want = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])
        wrong = np.flatnonzero(arrays[name] != want)
        if wrong.size:
            at = int(wrong[0])
            raise CacheCorruptError(
                f"`{folder / name}`: token counts are not those of part.json: entry {at} is {arrays[name][at]}, and "
                f"must be {want[at]}"
            )
    ids = arrays["response_ids"]
    if ids.size and int(ids.max()) >= header.v_real:
        raise CacheCorruptError(f"`{folder / 'response_ids'}`: id {ids.max()}, the vocabulary is {header.v_real}")
    positions_T = arrays["positions"].astype(np.int64)
    rows_S = np.array(record.sample_tokens, np.int64)
    sample_T = np.repeat(np.arange(len(rows_S)), rows_S)
    outside_T = positions_T >= np.array(record.sample_response_tokens, np.int64)[sample_T]
    falls_T = np.zeros(len(positions_T), bool)
    falls_T[1:] = (np.diff(positions_T) <= 0) & (np.diff(sample_T) == 0)
    wrong = np.flatnonzero(outside_T | falls_T)
    if wrong.size:
        row, sample = int(wrong[0]), int(sample_T[wrong[0]])
        raise CacheCorruptError(
            f"`{folder / 'positions'}`: row {row} is at response token {positions_T[row]} of sample "
            f"{record.sample_ids[sample]!r}, which has {record.sample_response_tokens[sample]}; positions must rise "
            "inside the response"
        )


def check_scalars(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Numbers are numbers, log-probs at most 0 and masses within [0, 1]."""
    _refuse(folder, "lse", arrays["lse"], ~np.isfinite(arrays["lse"]), "is not finite")
    _refuse(folder, "entropy", arrays["entropy"], ~np.isfinite(arrays["entropy"]), "is not finite")
    gold_LT, mass_LT = arrays["gold_logprob"], arrays["tail_mass"]
    _refuse(folder, "gold_logprob", gold_LT, ~(gold_LT <= ROUNDING), "is no log-prob")
    _refuse(folder, "tail_mass", mass_LT, ~((mass_LT >= -ROUNDING) & (mass_LT <= 1 + ROUNDING)), "is outside [0, 1]")


def _refuse(folder: Path, name: str, values: np.ndarray, bad: np.ndarray, what: str) -> None:
    if bad.any():
        layer, token, *_ = where = tuple(np.argwhere(bad)[0].tolist())
        raise CacheCorruptError(
            f"`{folder / name}`: {values[where]} at layer row {layer}, token {token} {what}, and is never written"
        )


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
            raise CacheCorruptError(f"`{folder / name}`: the entries of layer row {row}, token {token} {what}")


def check_block(header: CacheHeader, name: str, values_TK: np.ndarray) -> None:
    """ValueError for ids outside the vocabulary, or log-probs that are none, in a block of a memory-mapped array."""
    if name == "ids" and values_TK.size and int(values_TK.max()) >= header.v_real:
        raise ValueError(f"id {values_TK.max()}, the vocabulary is {header.v_real}")
    if name == "logprobs" and values_TK.size:
        token = _first_bad(header, values_TK.reshape(-1), values_TK.shape[1], undone=False)
        if token is not None:
            raise ValueError(f"the entries of token {token} do not descend from at most 0")


def repeated_entry(ids_E: np.ndarray, kept: int | np.ndarray) -> int | None:
    """The first row of a layer that keeps an id twice; `ids_E` are its entries, `kept` the width of every row."""
    widths_T = np.full(ids_E.size // max(1, kept), kept) if isinstance(kept, int) else kept.astype(np.int64)
    keys_E = np.sort((np.repeat(np.arange(len(widths_T)), widths_T) << 32) | ids_E.reshape(-1))
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
