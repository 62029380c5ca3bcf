"""Making sparse rows narrower without biasing them: what leaves the kept entries joins the tail.

Shapes: L layers, T response tokens, K kept entries, m tail samples, N draws.
"""

from dataclasses import replace

import numpy as np

from .rows import SparseRows

__all__ = ["draw_rows", "redraw_tail", "top_p_widths", "truncate"]


def top_p_widths(logprobs_LTK: np.ndarray, *, top_p: float, min_k: int) -> np.ndarray:
    """[L, T]: the fewest entries whose mass reaches `top_p`, at least `min_k` and at most K."""
    mass_LTK = np.cumsum(np.exp(logprobs_LTK), axis=-1, dtype=np.float64)
    return np.clip((mass_LTK < top_p).sum(-1) + 1, min_k, logprobs_LTK.shape[-1])


def truncate(rows: SparseRows, kept_LT: np.ndarray, uniforms_LTm: np.ndarray) -> SparseRows:
    """Keep the first `kept_LT` entries of every row; the rest becomes padding (id 0, log-prob -inf).

    Their mass goes into `tail_mass_LT`, and the tail samples become independent draws from the new tail; for that each
    of them needs one uniform of its own.
    """
    out_LTK = np.arange(rows.top_k) >= kept_LT[..., None]
    dropped_p_LTK = np.where(out_LTK, np.exp(rows.logprobs_LTK), 0.0)
    tail_ids_LTm, tail_mass_LT = redraw_tail(
        rows.ids_LTK, dropped_p_LTK, rows.tail_ids_LTm, rows.tail_mass_LT, uniforms_LTm
    )
    return replace(
        rows,
        ids_LTK=np.where(out_LTK, 0, rows.ids_LTK),
        logprobs_LTK=np.where(out_LTK, -np.inf, rows.logprobs_LTK).astype(np.float32),
        tail_ids_LTm=tail_ids_LTm,
        tail_mass_LT=tail_mass_LT,
    )


def redraw_tail(
    ids_LTK: np.ndarray,
    dropped_p_LTK: np.ndarray,
    tail_ids_LTm: np.ndarray,
    tail_mass_LT: np.ndarray,
    uniforms_LTm: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Tail samples and mass after entries left the top-k; `dropped_p_LTK` is 0 for those that stayed.

    The new tail is a mixture: the dropped ids, and the old tail. So each draw becomes a dropped id, in proportion to
    its probability, or stays the stored draw, which is an independent draw from the old tail: again independent draws
    from the whole new tail, and the estimator over them stays unbiased.
    """
    edges_LTK = np.cumsum(dropped_p_LTK, axis=-1, dtype=np.float64)
    total_LT = tail_mass_LT + edges_LTK[..., -1]
    tail_ids_LTm = tail_ids_LTm.copy()
    for draw in range(tail_ids_LTm.shape[-1]):
        point_LT = uniforms_LTm[..., draw] * total_LT
        slot_LT = (edges_LTK <= point_LT[..., None]).sum(-1)
        is_dropped_LT = slot_LT < edges_LTK.shape[-1]
        slot_LT1 = np.minimum(slot_LT, edges_LTK.shape[-1] - 1)[..., None]
        chosen_LT = np.take_along_axis(ids_LTK, slot_LT1, axis=-1)[..., 0]
        tail_ids_LTm[..., draw] = np.where(is_dropped_LT, chosen_LT, tail_ids_LTm[..., draw])
    return tail_ids_LTm, np.minimum(total_LT, 1.0).astype(np.float32)


def draw_rows(rows: SparseRows, uniforms_LTN: np.ndarray) -> SparseRows:
    """Rows of N draws from the whole distribution (RS-KD): the distinct ids, most frequent first, and their shares.

    `rows` has N tail samples. The shares are an unbiased estimate of the distribution, so the rows have no tail: mass
    0, no samples. Source: Sparse Logit Sampling (arXiv 2503.16870), with the teacher itself as the proposal.
    """
    draws_LTN, _ = redraw_tail(
        rows.ids_LTK, np.exp(rows.logprobs_LTK), rows.tail_ids_LTm, rows.tail_mass_LT, uniforms_LTN
    )
    num_draws = draws_LTN.shape[-1]
    sorted_LTN = np.sort(draws_LTN.astype(np.int64), axis=-1)
    is_first_LTN = np.concatenate(
        [np.ones_like(sorted_LTN[..., :1], bool), sorted_LTN[..., 1:] != sorted_LTN[..., :-1]], axis=-1
    )
    starts_LTN = np.where(is_first_LTN, np.arange(num_draws), num_draws)
    next_LTN = np.minimum.accumulate(starts_LTN[..., ::-1], axis=-1)[..., ::-1]
    ends_LTN = np.concatenate([next_LTN[..., 1:], np.full_like(next_LTN[..., :1], num_draws)], axis=-1)
    counts_LTN = np.where(is_first_LTN, ends_LTN - np.arange(num_draws), 0)
    order_LTN = np.argsort(-counts_LTN, axis=-1, kind="stable")
    counts_LTN = np.take_along_axis(counts_LTN, order_LTN, -1)
    width = int((counts_LTN > 0).sum(-1).max(initial=1))
    counts_LTN, ids_LTN = counts_LTN[..., :width], np.take_along_axis(sorted_LTN, order_LTN, -1)[..., :width]
    return replace(
        rows,
        ids_LTK=np.where(counts_LTN > 0, ids_LTN, 0),
        logprobs_LTK=share_logprobs(counts_LTN, num_draws),
        tail_ids_LTm=draws_LTN[..., :0],
        tail_mass_LT=np.zeros_like(rows.tail_mass_LT),
    )


def share_logprobs(counts_LTK: np.ndarray, num_draws: int) -> np.ndarray:
    """log(count / N) in float32; -inf for a count of 0."""
    with np.errstate(divide="ignore"):
        return np.log(counts_LTK / np.float64(num_draws)).astype(np.float32)
