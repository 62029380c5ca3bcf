"""Narrower rows stay unbiased: widths by mass, redrawn tails, rows of draws; and which tokens are chosen."""

import numpy as np
import pytest
import torch

from tests.helpers.rows import layer_rows
from vlsi_cache.sparse.kl import candidate_kl
from vlsi_cache.sparse.rows import (
    SparseRows,
    draw_rows,
    keyed_uniforms,
    select_at_random,
    select_by_entropy,
    top_p_widths,
    truncate,
)

P = np.array([0.4, 0.2, 0.15, 0.1, 0.1, 0.05])  # of ids 0 to 5


def rows_of(num_rows: int, top_k: int, num_tail: int, seed: int = 0) -> SparseRows:
    """`num_rows` tokens with the distribution P, the first `top_k` ids kept and tail samples from the rest."""
    LT = (1, num_rows)
    rng = np.random.default_rng(seed)
    tail = P[top_k:] / P[top_k:].sum()
    return SparseRows(
        ids_LTK=np.broadcast_to(np.arange(top_k), (*LT, top_k)),
        logprobs_LTK=np.broadcast_to(np.log(P[:top_k]).astype(np.float32), (*LT, top_k)),
        tail_ids_LTm=top_k + rng.choice(len(tail), size=(*LT, num_tail), p=tail),
        lse_LTn=np.zeros((*LT, 1), np.float32),
        entropy_LT=np.full(LT, -(P * np.log(P)).sum(), np.float32),
        gold_logprob_LT=np.full(LT, -1.0, np.float32),
        tail_mass_LT=np.full(LT, P[top_k:].sum(), np.float32),
    )


def test_widths_reach_the_mass() -> None:
    logprobs = np.log(P)[None, None]
    for top_p, width in ((0.1, 1), (0.4, 1), (0.41, 2), (0.6, 2), (0.95, 5), (0.999, 6)):
        assert top_p_widths(logprobs, top_p=top_p, min_k=1).item() == width
    assert top_p_widths(logprobs, top_p=0.1, min_k=3).item() == 3
    assert top_p_widths(logprobs[..., :2], top_p=0.9, min_k=1).item() == 2  # never more than are kept


def test_truncated_rows_keep_the_whole_distribution_in_expectation() -> None:
    num = 100_000
    rows = rows_of(num, 4, 1)
    kept_LT = np.where(np.arange(num) % 2 == 0, 1, 3)[None]
    cut = truncate(rows, kept_LT, keyed_uniforms("k", (1, num, 1)))
    np.testing.assert_array_equal(cut.widths_LT, kept_LT)
    for kept, tokens in ((1, slice(0, None, 2)), (3, slice(1, None, 2))):
        np.testing.assert_allclose(cut.tail_mass_LT[0, tokens], P[kept:].sum(), atol=1e-6)
        found = np.bincount(cut.tail_ids_LTm[0, tokens, 0], minlength=6) / (num / 2)
        np.testing.assert_allclose(found[kept:], P[kept:] / P[kept:].sum(), atol=5 * np.sqrt(0.25 / (num / 2)))
        assert not found[:kept].any()


def test_rows_of_draws_count_what_was_drawn() -> None:
    num, num_draws = 20_000, 8
    drawn = draw_rows(rows_of(num, 3, num_draws), keyed_uniforms("d", (1, num, num_draws)))
    shares = np.exp(drawn.logprobs_LTK.astype(np.float64))
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(shares * num_draws, np.rint(shares * num_draws), atol=1e-5)
    assert (np.diff(shares, axis=-1) <= 0).all()
    mean = np.bincount(drawn.ids_LTK.ravel(), shares.ravel(), minlength=6) / num
    np.testing.assert_allclose(mean, P, atol=5 * np.sqrt(0.25 / (num * num_draws)))
    drawn.validate(6)


def test_the_loss_on_draws_is_unbiased_in_value_and_gradient() -> None:
    num = 40_000
    rows = draw_rows(rows_of(num, 3, 8), keyed_uniforms("u", (1, num, 8)))
    logits = torch.tensor([0.3, -0.5, 1.0, 0.0, 0.2, -1.0], dtype=torch.float64)
    hidden_TD = logits.repeat(num, 1).requires_grad_()
    given = layer_rows(
        rows.ids_LTK, rows.logprobs_LTK, rows.tail_ids_LTm, rows.tail_mass_LT, rows.entropy_LT, vocab_size=6
    )
    candidates = candidate_kl(hidden_TD, torch.eye(6, dtype=torch.float64), given)
    q = logits.softmax(0).numpy()
    dense = float((P * np.log(P / q)).sum())
    assert candidates.matching_M.item() == pytest.approx(dense, abs=0.01)
    candidates.loss(0).backward()
    assert hidden_TD.grad is not None
    np.testing.assert_allclose(hidden_TD.grad.sum(0).numpy(), q - P, atol=0.01)


def test_chosen_tokens() -> None:
    entropy = np.array([0.1, 3.0, 2.0, 2.0, 0.5])
    assert select_by_entropy(entropy, above=0.5).tolist() == [False, True, True, True, False]
    assert select_by_entropy(entropy, top=0.4).tolist() == [False, True, True, False, False]
    assert select_by_entropy(entropy, top=0.01).sum() == 1
    assert select_by_entropy(entropy[:0], top=0.5).shape == (0,)
    names, lengths = [f"s{i}" for i in range(50)], [100] * 50
    chosen = select_at_random(names, lengths, share=0.3, seed=1)
    assert abs(chosen.mean() - 0.3) < 5 * np.sqrt(0.21 / 5000)
    later = select_at_random(names[7:8], [40], share=0.3, seed=1)
    np.testing.assert_array_equal(later, chosen[700:740])  # of the sample and the place alone
    assert select_at_random([], [], share=0.3, seed=1).shape == (0,)
