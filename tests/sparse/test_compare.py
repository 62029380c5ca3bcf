"""The KL of sparse rows against the KL of the dense distributions that they were cut from."""

import doctest

import numpy as np
import pytest

from vlsi_cache.errors import DataError
from vlsi_cache.sparse import row_kl as compare
from vlsi_cache.sparse.row_kl import kl_sums, sparse_kl_rows
from vlsi_cache.sparse.rows import SparseRows, top_p_widths, truncate

V, T = 400, 60


def dense(rng: np.random.Generator, base_TV: np.ndarray, share: float, scale: float) -> np.ndarray:
    """Log-probs [1, T, V] of noisy logits that have `share` of `base_TV` in them."""
    z_TV = (share * base_TV + (1 - share) * rng.normal(size=(T, V)) * 2) * scale
    return (z_TV - np.log(np.exp(z_TV).sum(-1, keepdims=True)))[None]


def cut(logp_LTV: np.ndarray, k: int) -> SparseRows:
    ids_LTK = np.argsort(-logp_LTV, axis=-1, kind="stable")[..., :k]
    kept_LTK = np.take_along_axis(logp_LTV, ids_LTK, axis=-1)
    tail_LT = np.maximum(1 - np.exp(kept_LTK).sum(-1), 0)
    return SparseRows(
        ids_LTK=ids_LTK,
        logprobs_LTK=kept_LTK.astype(np.float32),
        tail_ids_LTm=ids_LTK[..., :0],
        lse_LTn=tail_LT[..., None],
        entropy_LT=tail_LT,
        gold_logprob_LT=-tail_LT,
        tail_mass_LT=tail_LT.astype(np.float32),
    )


def dense_kl(p_LTV: np.ndarray, q_LTV: np.ndarray) -> np.ndarray:
    return (np.exp(p_LTV) * (p_LTV - q_LTV)).sum(-1)


PAIRS = [(1.0, 1.0, 0.9, 1.0), (1.0, 1.5, 0.2, 0.5), (0.2, 0.5, 1.0, 1.5), (0.0, 0.3, 1.0, 2.0), (1.0, 3.0, 0.0, 3.0)]


@pytest.mark.parametrize("k", [1, 4, 32, 399])
@pytest.mark.parametrize("pair", PAIRS)
def test_it_is_a_lower_bound_of_the_dense_kl(pair: tuple[float, ...], k: int) -> None:
    rng = np.random.default_rng(k)
    base_TV = rng.normal(size=(T, V)) * 2
    p_LTV, q_LTV = dense(rng, base_TV, *pair[:2]), dense(rng, base_TV, *pair[2:])
    for one, other in ((p_LTV, q_LTV), (q_LTV, p_LTV)):
        found_LT, true_LT = sparse_kl_rows(cut(one, k), cut(other, k)), dense_kl(one, other)
        assert found_LT.shape == (1, T)
        assert (found_LT >= 0).all()
        assert (found_LT <= true_LT * 1.0001 + 1e-5).all()
        narrow_LT = sparse_kl_rows(cut(one, k), cut(other, max(1, k // 2)))
        assert (narrow_LT <= true_LT * 1.0001 + 1e-5).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_it_is_close_when_little_is_outside_and_exact_when_nothing_is(pair: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    base_TV = rng.normal(size=(T, V)) * 2
    p_LTV, q_LTV = dense(rng, base_TV, *pair[:2]), dense(rng, base_TV, *pair[2:])
    true_LT = dense_kl(p_LTV, q_LTV)
    np.testing.assert_allclose(sparse_kl_rows(cut(p_LTV, V), cut(q_LTV, V)), true_LT, rtol=2e-3, atol=1e-4)
    wide, narrow = (sparse_kl_rows(cut(p_LTV, k), cut(q_LTV, k)).mean() for k in (200, 20))
    assert narrow <= wide <= true_LT.mean()
    assert wide > 0.6 * true_LT.mean()


def test_on_equal_ids_it_is_the_kl_with_one_bucket() -> None:
    rng = np.random.default_rng(1)
    p_LTV = dense(rng, rng.normal(size=(T, V)), 1.0, 2.0)
    rows = cut(p_LTV, 8)
    q_LTK = np.log(rng.dirichlet(np.ones(9), size=(1, T)))
    other = SparseRows(**{**vars(rows), "logprobs_LTK": q_LTK[..., :8], "tail_mass_LT": np.exp(q_LTK[..., 8])})
    p, tail = np.exp(rows.logprobs_LTK.astype(float)), rows.tail_mass_LT.astype(float)
    expected = (p * (np.log(p) - q_LTK[..., :8])).sum(-1) + tail * (np.log(tail) - q_LTK[..., 8])
    np.testing.assert_allclose(sparse_kl_rows(rows, other), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(sparse_kl_rows(rows, rows)).max() < 1e-6


def test_an_id_that_the_other_has_not_kept_counts_with_what_it_can_have_at_most() -> None:
    """p is sure of an id that q has not kept: q may give it no more than its smallest kept one."""
    one_LT = np.ones((1, 1))
    ids = np.array([[[7]]]), np.array([[[1, 2, 3]]])
    p = SparseRows(ids[0], np.log([[[0.99]]]), ids[0][..., :0], one_LT[..., None], one_LT, -one_LT, one_LT * 0.01)
    kept = np.log([[[0.5, 0.3, 0.001]]])
    q = SparseRows(ids[1], kept, ids[1][..., :0], one_LT[..., None], one_LT, -one_LT, one_LT * 0.199)
    assert sparse_kl_rows(p, q).item() > 0.99 * np.log(0.99 / 0.001) + 0.01 * np.log(0.01)
    assert sparse_kl_rows(q, p).item() > 0.5 * np.log(0.5 / 0.01)


def test_padding_is_no_entry_and_k_may_differ() -> None:
    rng = np.random.default_rng(2)
    base_TV = rng.normal(size=(T, V)) * 2
    p, q = cut(dense(rng, base_TV, 1.0, 1.5), 16), cut(dense(rng, base_TV, 0.8, 1.5), 12)
    found_LT = sparse_kl_rows(p, q)
    np.testing.assert_allclose(sparse_kl_rows(p.padded_to(20), q.padded_to(30)), found_LT, rtol=1e-12)
    uniforms_LTm = np.empty((1, T, 0))
    ragged = truncate(p, top_p_widths(p.logprobs_LTK, top_p=0.5, min_k=1), uniforms_LTm)
    assert (sparse_kl_rows(ragged, q) <= found_LT + 1e-5).all()
    assert (sparse_kl_rows(q, ragged) <= sparse_kl_rows(q, p) + 1e-5).all()


def test_sums_of_all_pairs() -> None:
    rng = np.random.default_rng(3)
    base_TV = rng.normal(size=(T, V)) * 2
    logp_LTV = np.concatenate([dense(rng, base_TV, share, 1.5) for share in (0.2, 0.6, 1.0)])
    rows = cut(logp_LTV, 16)
    sums_LL = kl_sums(rows)
    for i in range(3):
        for j in range(3):
            expected = sparse_kl_rows(rows.layer(i), rows.layer(j)).sum() if i != j else 0.0
            assert sums_LL[i, j] == pytest.approx(expected, abs=1e-9)
    empty = rows.tokens(slice(0))
    assert kl_sums(empty).tolist() == np.zeros((3, 3)).tolist()
    with pytest.raises(DataError, match="differ in layers and tokens"):
        sparse_kl_rows(rows, empty)


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(compare).failed == 0
