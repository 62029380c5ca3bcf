"""The distributions that another tool has kept, checked, as sparse rows of one layer.

Such rows are never repaired in silence. What is refused: ids outside the vocabulary, an id twice in a row, a mass above
1, rows that were scaled to a mass of 1 over what is kept of them, and rows that stand one token beside theirs.
Shape suffixes: T response tokens, K kept entries.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlsi_cache.errors import DataError
from vlsi_cache.sparse.rows import SparseRows

NO_ENTRY = -75.0  # of no weight in any sum: what tools write where there is no entry, -9999, -1e9 or -inf
FILL = -80.0  # what is written there: float32 has its exponential, so that no product of theirs is 0 times -inf
LEAST_TOKENS = 16  # fewer are no evidence
FLAT = 1e-3  # the probability of a last kept entry behind which there must be more


@dataclass(frozen=True)
class TopK:
    """What another tool holds of T distributions: log-probs of the full softmax at temperature 1, in any order.

    An entry of NO_ENTRY or below is none. `gold_T` are log-probs of the tokens that followed, where the tool says them
    whatever their rank.
    """

    ids_TK: np.ndarray
    logprobs_TK: np.ndarray
    gold_T: np.ndarray | None = None

    def part(self, rows: slice) -> "TopK":
        gold_T = None if self.gold_T is None else self.gold_T[rows]
        return TopK(self.ids_TK[rows], self.logprobs_TK[rows], gold_T)


def ragged(ids_E: np.ndarray, logprobs_E: np.ndarray, widths_T: np.ndarray) -> TopK:
    """Entries of rows that lie one behind the other, each so wide."""
    mask_TK = np.arange(int(widths_T.max(initial=1))) < widths_T[:, None]
    ids_TK, logprobs_TK = np.zeros(mask_TK.shape, np.int64), np.full(mask_TK.shape, -np.inf)
    ids_TK[mask_TK], logprobs_TK[mask_TK] = ids_E, logprobs_E
    return TopK(ids_TK, logprobs_TK)


def as_ids(values: np.ndarray, where: str) -> np.ndarray:
    """int64, whatever kind of number the tool has written; DataError for one that is not whole, or none."""
    if np.issubdtype(values.dtype, np.integer):
        return values.astype(np.int64)
    numbers = values.astype(np.float64)
    if (bad := ~np.isfinite(numbers) | (numbers != np.round(numbers)) | (np.abs(numbers) > 2**53)).any():
        raise DataError(f"{where}: a token id is {numbers[bad][0]:g}, and must be a whole number")
    return numbers.astype(np.int64)


def as_rows(
    top: TopK, gold_ids_T: np.ndarray, *, vocab_size: int, width: int, rounding: float, where: str
) -> SparseRows:
    """The rows, `width` wide, most probable first, ties by the lowest id; what they do not say is NaN.

    The tail is what their mass leaves of 1. `rounding` is how far the tool's own rounding may lift a mass. Raises
    DataError, which names `where` and the token.
    """
    ids_TK, logprobs_TK = _in_order(top, width)
    is_entry_TK = logprobs_TK > NO_ENTRY
    _check_entries(ids_TK, logprobs_TK, is_entry_TK, vocab_size, where)
    logprobs_TK = np.where(is_entry_TK, logprobs_TK, -np.inf)
    mass_T = np.exp(logprobs_TK).sum(1)
    most = 1 + max(1e-3, 5 * rounding)
    _refuse(
        mass_T > most, mass_T, where, f"holds a mass of {{}}, more than {most:g}: these are no log-probs of a softmax"
    )
    if top.gold_T is not None:
        _check_gold(top.gold_T, most, where)
    logprobs_TK = np.minimum(logprobs_TK - np.log(np.maximum(mass_T, 1))[:, None], 0)
    tail_T = np.where(is_entry_TK.sum(1) < vocab_size, 1 - np.minimum(mass_T, 1), 0)
    gold_T = _gold_logprobs(ids_TK, logprobs_TK, gold_ids_T) if top.gold_T is None else np.minimum(top.gold_T, 0)
    unknown_T = np.full(len(ids_TK), np.nan, np.float32)
    return SparseRows(
        ids_LTK=_distinct(ids_TK, is_entry_TK, vocab_size)[None],
        logprobs_LTK=logprobs_TK.astype(np.float32)[None],
        tail_ids_LTm=np.zeros((1, len(ids_TK), 0), np.int64),
        lse_LTn=unknown_T[None, :, None],
        entropy_LT=unknown_T[None],
        gold_logprob_LT=gold_T.astype(np.float32)[None],
        tail_mass_LT=tail_T.astype(np.float32)[None],
    )


def _in_order(top: TopK, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs [T, width], descending."""
    ids_TK, logprobs_TK = top.ids_TK.astype(np.int64), top.logprobs_TK.astype(np.float64)
    missing = width - ids_TK.shape[1]
    if missing > 0:
        ids_TK = np.pad(ids_TK, [(0, 0), (0, missing)])
        logprobs_TK = np.pad(logprobs_TK, [(0, 0), (0, missing)], constant_values=-np.inf)
    order_TK = np.lexsort((ids_TK, -logprobs_TK))[:, :width]
    return np.take_along_axis(ids_TK, order_TK, 1), np.take_along_axis(logprobs_TK, order_TK, 1)


def _check_entries(
    ids_TK: np.ndarray, logprobs_TK: np.ndarray, is_entry_TK: np.ndarray, vocab_size: int, where: str
) -> None:
    bad_TK = np.isnan(logprobs_TK) | (logprobs_TK == np.inf)
    _refuse(np.any(bad_TK, axis=1), logprobs_TK[:, 0], where, "holds a log-prob that is no number")
    _refuse(~is_entry_TK.any(1), logprobs_TK[:, 0], where, "holds no entry")
    outside_TK = is_entry_TK & ((ids_TK < 0) | (ids_TK >= vocab_size))
    worst_T = np.take_along_axis(ids_TK, outside_TK.argmax(1)[:, None], 1)[:, 0]
    _refuse(
        np.any(outside_TK, axis=1),
        worst_T,
        where,
        f"holds id {{}}, and the tokenizer has {vocab_size} tokens: name the teacher's own tokenizer; where it "
        "gave mass to padding rows of its head, ask it for the log-probs of its tokens alone",
    )
    own_TK = np.sort(np.where(is_entry_TK, ids_TK, -1 - np.arange(ids_TK.shape[1])), axis=1)
    twice_TK = own_TK[:, 1:] == own_TK[:, :-1]
    of_T = np.take_along_axis(own_TK, twice_TK.argmax(1)[:, None], 1)[:, 0] if ids_TK.shape[1] > 1 else own_TK[:, 0]
    _refuse(
        twice_TK.any(1),
        of_T,
        where,
        "holds id {} twice: ids were cut to fewer bits than the vocabulary needs, or the file is damaged",
    )


def _check_gold(gold_T: np.ndarray, most: float, where: str) -> None:
    problem = "says a log-prob of {} of its own token, which is none"
    _refuse(np.isnan(gold_T) | (gold_T > np.log(most)), gold_T, where, problem)


def _refuse(bad_T: Any, values_T: np.ndarray, where: str, problem: str) -> None:
    if bad_T.any():
        token = int(np.flatnonzero(bad_T)[0])
        raise DataError(f"{where}: the row of response token {token} {problem.format(f'{values_T[token]:.6g}')}")


def _gold_logprobs(ids_TK: np.ndarray, logprobs_TK: np.ndarray, gold_ids_T: np.ndarray) -> np.ndarray:
    """Of the tokens that followed; NaN where a row does not keep them."""
    is_gold_TK = (ids_TK == gold_ids_T[:, None]) & np.isfinite(logprobs_TK)
    found_T = np.where(is_gold_TK, logprobs_TK, -np.inf).max(1)
    return np.where(is_gold_TK.any(1), found_T, np.nan)


def _distinct(ids_TK: np.ndarray, is_entry_TK: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids, where there is no entry the lowest ids that their row does not keep: no row keeps an id twice."""
    if is_entry_TK.all():
        return ids_TK
    ids_TK, width = ids_TK.copy(), ids_TK.shape[1]
    for token in np.flatnonzero(~is_entry_TK.all(1)):
        kept = ids_TK[token, is_entry_TK[token]]
        free = np.setdiff1d(np.arange(min(vocab_size, 2 * width)), kept)
        ids_TK[token, ~is_entry_TK[token]] = free[: width - len(kept)]
    return ids_TK


class Evidence:
    """What only many rows together show: that they were scaled to a mass of 1, or stand beside their tokens."""

    def __init__(self, rounding: float) -> None:
        self._rounding = rounding
        self.num_tokens = self._num_whole = self._num_flat = self._num_compared = 0
        self._hits = np.zeros(3, np.int64)  # the token is kept by the row before, its own, the row after

    def add(self, rows: SparseRows, gold_ids_T: np.ndarray) -> None:
        """The rows of one response."""
        logprobs_TK, ids_TK = rows.logprobs_LTK[0], np.where(np.isfinite(rows.logprobs_LTK[0]), rows.ids_LTK[0], -1)
        self.num_tokens += len(ids_TK)
        is_whole_T = rows.tail_mass_LT[0] <= self._rounding
        self._num_whole += int(is_whole_T.sum())
        last_T = np.where(np.isfinite(logprobs_TK), logprobs_TK, np.inf).min(1)
        self._num_flat += int((is_whole_T & (last_T > math.log(FLAT))).sum())
        if len(ids_TK) > 2:
            gold_T1 = gold_ids_T[1:-1, None]
            self._hits += [(ids == gold_T1).any(1).sum() for ids in (ids_TK[:-2], ids_TK[1:-1], ids_TK[2:])]
            self._num_compared += len(gold_T1)

    def check(self, where: str) -> None:
        """Raise DataError for rows that no teacher says of these tokens."""
        if self.num_tokens >= LEAST_TOKENS and self._num_whole == self.num_tokens and self._num_flat:
            raise DataError(
                f"{where}: all {self.num_tokens} rows have a mass of 1, {self._num_flat} of them with a last entry of "
                f"more than {FLAT:g}: they were scaled to sum to 1 over what is kept, and what the tail had is lost. "
                "Import log-probs of the full softmax, as the teacher's server gave them"
            )
        before, own, after = self._hits.tolist()
        if max(before, after) > own + 3 * math.sqrt(max(LEAST_TOKENS, self._num_compared)):
            side = "before" if before > after else "after"
            raise DataError(
                f"{where}: {own} of {self._num_compared} response tokens are among what their own row keeps, and "
                f"{max(before, after)} among what the row {side} it keeps: the rows are shifted by one token"
            )
