"""How far sparse rows of two layers are apart: a lower bound of the dense KL from what both rows have kept.

Shapes: L layers, T response tokens, K kept entries, N rows (layers and tokens in either order).
"""

from dataclasses import dataclass

import numpy as np

from vlsi_cache.errors import DataError

from .rows import SparseRows

__all__ = ["kl_sums", "sparse_kl_rows"]

FLOOR = 1e-6  # of tail masses and of what an id outside the kept ones may have: fp32 log-probs resolve no less
ROUNDS = 4  # every round gives a valid bound and a better multiplier for the next; after four it hardly moves


def sparse_kl_rows(rows_p: SparseRows, rows_q: SparseRows) -> np.ndarray:
    """KL(p || q) in nats of every pair of top-k rows, float64 [L, T]: a lower bound of the KL of the dense rows.

    Both rows are seen on one support: every id that either row has kept, and one bucket for all others. An id that only
    one row has kept has an unknown probability in the other: at most that row's smallest kept one, and all unknown ones
    together with the bucket have that row's tail mass. The result is a lower bound of the smallest KL that any values
    within these limits give (by Lagrange duality, in `ROUNDS` steps of its one multiplier), and by the data processing
    inequality no bucketed KL is above the dense one. It is the KL of the kept ids and one tail bucket when both rows
    have kept the same ids, the dense KL when they have kept everything, and never negative.

    Kept entries are scaled to sum to 1 - tail mass, which changes rows of full precision by rounding only. The bound is
    that of the rows as given: the levels of the `default` profile alone can add about 5e-5 nats. Where q has almost no
    tail it is taken as 1e-6, so the result is finite. Rows may be padded (log-prob -inf) and differ in K.
    Rows of draws (`row_kind` sampled) have no such limits: for them the result means nothing.

    >>> from vlsi_cache.sparse.rows import SparseRows
    >>> def row(*kept, tail):
    ...     p_LTK, one_LT = np.array(kept)[None, None], np.ones((1, 1))
    ...     ids = np.arange(len(kept))[None, None]
    ...     return SparseRows(ids, np.log(p_LTK), ids[..., :0], one_LT[..., None], one_LT, -one_LT, one_LT * tail)
    >>> same, other = row(0.5, 0.3, tail=0.2), row(0.3, 0.2, tail=0.5)
    >>> sparse_kl_rows(same, same).round(4).tolist(), sparse_kl_rows(same, other).round(4).tolist()
    ([[0.0]], [[0.1938]])
    """
    if rows_p.ids_LTK.shape[:2] != rows_q.ids_LTK.shape[:2]:
        raise DataError(
            f"rows to compare differ in layers and tokens: {rows_p.ids_LTK.shape[:2]} and {rows_q.ids_LTK.shape[:2]}"
        )
    return _both_ways(_side(rows_p), _side(rows_q), back=False)[0].reshape(rows_p.ids_LTK.shape[:2])


def kl_sums(rows: SparseRows) -> np.ndarray:
    """float64 [L, L]: entry (i, j) is the sum over the tokens of `sparse_kl_rows` of layer i from layer j."""
    sides = [_side(rows.layer(index)) for index in range(rows.num_layers)]
    sums_LL = np.zeros((len(sides), len(sides)))
    for i, side in enumerate(sides):
        for j in range(i):
            there_N, back_N = _both_ways(side, sides[j], back=True)
            sums_LL[i, j], sums_LL[j, i] = there_N.sum(), back_N.sum()
    return sums_LL


@dataclass(frozen=True)
class _Side:
    """Rows by ascending id. Padding has probability 0, log-prob 0 and an id that no entry has."""

    keys_NK: np.ndarray  # row number and id in one number, ascending over all of [N, K]
    p_NK: np.ndarray
    logp_NK: np.ndarray
    tail_N: np.ndarray
    most_N: np.ndarray  # the largest probability that an id can have that was not kept


def _side(rows: SparseRows) -> _Side:
    num_kept = rows.top_k
    logp_NK = np.asarray(rows.logprobs_LTK, np.float64).reshape(-1, num_kept)
    ids_NK = np.asarray(rows.ids_LTK, np.int64).reshape(-1, num_kept)
    tail_N = np.clip(np.asarray(rows.tail_mass_LT, np.float64).reshape(-1), 0.0, 1.0)
    is_kept_NK = np.isfinite(logp_NK)
    ids_NK = np.where(is_kept_NK, ids_NK, (1 << 32) - 1)
    order_NK = np.argsort(ids_NK, axis=1, kind="stable")
    ids_NK, logp_NK = (np.take_along_axis(x_NK, order_NK, axis=1) for x_NK in (ids_NK, logp_NK))
    p_NK = np.exp(logp_NK)
    scale_N1 = (1.0 - tail_N)[:, None] / np.maximum(p_NK.sum(1, keepdims=True), FLOOR)
    p_NK *= scale_N1
    is_kept_NK = p_NK > 0
    logp_NK = np.log(np.where(is_kept_NK, p_NK, 1.0))
    smallest_N = np.where(is_kept_NK, p_NK, 1.0).min(1, initial=1.0)
    keys_NK = ids_NK + (np.arange(len(ids_NK), dtype=np.int64) << 32)[:, None]
    return _Side(keys_NK, p_NK, logp_NK, tail_N, np.maximum(np.minimum(smallest_N, tail_N), FLOOR))


def _both_ways(one: _Side, other: _Side, *, back: bool) -> tuple[np.ndarray, np.ndarray]:
    """[N] KL(one || other), and KL(other || one) if it is wanted: the ids are matched once."""
    found = np.searchsorted(other.keys_NK.ravel(), one.keys_NK.ravel())
    found = np.minimum(found, max(0, other.keys_NK.size - 1))
    shared = other.keys_NK.ravel()[found] == one.keys_NK.ravel()
    alone_NK = ~shared.reshape(one.keys_NK.shape)
    taken = np.zeros(other.keys_NK.size, bool)
    taken[found[shared]] = True
    other_alone_NK = ~taken.reshape(other.keys_NK.shape)
    gap_NK = np.where(alone_NK, 0.0, one.logp_NK - other.logp_NK.ravel()[found].reshape(one.keys_NK.shape))
    there_N = _bound((one.p_NK * gap_NK).sum(1), one, alone_NK, other, other_alone_NK)
    if not back:
        return there_N, there_N
    q_NK = np.where(alone_NK, 0.0, other.p_NK.ravel()[found].reshape(one.keys_NK.shape))
    return there_N, _bound(-(q_NK * gap_NK).sum(1), other, other_alone_NK, one, alone_NK)


def _bound(shared_N: np.ndarray, p: _Side, p_alone_NK: np.ndarray, q: _Side, q_alone_NK: np.ndarray) -> np.ndarray:
    """[N] the largest dual value found; `shared_N` is what the ids that both have kept give.

    With the multiplier x of q's tail mass, the best value of q at an id that only p has kept is min(most q, p / x), the
    best value of p at an id that only q has kept is min(most p, x q), and what is left costs -x tail q +
    (1 + log x) tail p. The start is the ratio of the masses outside the shared ids.
    """
    p_NK, q_NK = np.where(p_alone_NK, p.p_NK, 0.0), np.where(q_alone_NK, q.p_NK, 0.0)
    plogp_NK, logq_NK = p_NK * p.logp_NK, q.logp_NK
    p_tail_N, q_tail_N = p.tail_N, np.maximum(q.tail_N, FLOOR)
    p_sum_N, q_sum_N = p_NK.sum(1), q_NK.sum(1)
    x_N = np.maximum(p_tail_N + p_sum_N, FLOOR) / (q_tail_N + q_sum_N)
    best_N = np.zeros_like(shared_N)
    for _ in range(ROUNDS):
        p_full_NK = p_NK >= (x_N * q.most_N)[:, None]
        q_full_NK = q_NK * x_N[:, None] >= p.most_N[:, None]
        num_p_N, num_q_N = p_full_NK.sum(1), q_full_NK.sum(1)
        p_left_N = p_sum_N - np.einsum("nk,nk->n", p_NK, p_full_NK)
        q_left_N = q_sum_N - np.einsum("nk,nk->n", q_NK, q_full_NK)
        log_x_N = np.log(x_N)
        value_N = (
            shared_N
            + np.einsum("nk,nk->n", plogp_NK, p_full_NK)
            - (p_sum_N - p_left_N) * np.log(q.most_N)
            + x_N * q.most_N * num_p_N
            + p_left_N * (log_x_N + 1.0)
            + p.most_N * (num_q_N * (np.log(p.most_N) - log_x_N - 1.0) - np.einsum("nk,nk->n", logq_NK, q_full_NK))
            - x_N * (q_left_N + q_tail_N)
            + (1.0 + log_x_N) * p_tail_N
        )
        best_N = np.maximum(best_N, value_N)
        upper_N = p_tail_N - p.most_N * num_q_N + p_left_N
        lower_N = q_tail_N - q.most_N * num_p_N + q_left_N
        x_N = np.clip(np.maximum(upper_N, FLOOR) / np.maximum(lower_N, FLOOR), x_N / 50.0, x_N * 50.0)
    return best_N
