"""The log-prob quantiser: round trips, the mass it keeps, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlsi_cache.errors import DataError
from vlsi_cache.sparse.quantize import decode_levels, encode_levels


def realistic_rows(num_rows: int, top_k: int = 64, vocab: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of the top-k and tail masses, from flat to peaked, with heavy tails."""
    rng = np.random.default_rng(1)
    heat_R1 = np.exp(rng.uniform(-0.5, 1.2, (num_rows, 1)))
    z_RV = heat_R1 * rng.standard_normal((num_rows, vocab)) - 1.5 * np.log(1 + np.arange(vocab))
    z_RV = np.sort(z_RV, axis=1)[:, ::-1]
    p_RV = np.exp(z_RV - z_RV.max(1, keepdims=True))
    p_RV /= p_RV.sum(1, keepdims=True)
    return np.log(p_RV[:, :top_k]).astype(np.float32), p_RV[:, top_k:].sum(1).astype(np.float32)


def test_round_trip_loses_less_than_1e_4_nats():
    logprobs_RK, tail_R = realistic_rows(400)
    decoded_RK = decode_levels(encode_levels(logprobs_RK), tail_R).astype(np.float64)
    kept_RK = np.isfinite(decoded_RK)
    p_RK, q_RK = np.exp(logprobs_RK.astype(np.float64)), np.exp(decoded_RK)
    # Entries of level 0 fall into the tail bucket of the decoded row.
    kl_R = (p_RK * np.where(kept_RK, logprobs_RK - np.where(kept_RK, decoded_RK, 0), 0)).sum(1)
    p_tail_R = 1 - np.where(kept_RK, p_RK, 0).sum(1)
    q_tail_R = np.maximum(1 - q_RK.sum(1), 1e-12)
    kl_R += p_tail_R * np.log(np.maximum(p_tail_R, 1e-12) / q_tail_R)
    assert np.abs(kl_R).mean() <= 1e-4
    assert np.abs(kl_R).max() <= 4e-4


def test_kept_mass_is_one_minus_the_stored_tail_mass():
    logprobs_RK, tail_R = realistic_rows(100)
    stored_tail_R = tail_R.astype(np.float16).astype(np.float32)
    decoded_RK = decode_levels(encode_levels(logprobs_RK), stored_tail_R)
    assert decoded_RK.dtype == np.float32
    assert (decoded_RK <= 0).all()
    assert (np.diff(decoded_RK, axis=1) <= 0).all()
    np.testing.assert_allclose(np.exp(decoded_RK.astype(np.float64)).sum(1), 1 - stored_tail_R, atol=2e-6)


def test_levels_are_stored_as_first_value_and_descents():
    roots = np.array([[200, 200, 130, 2, 0]]) / 255
    with np.errstate(divide="ignore"):
        stored = encode_levels((4 * np.log(roots)).astype(np.float32))
    assert stored.dtype == np.uint8
    assert stored.tolist() == [[200, 0, 70, 128, 2]]


def test_padding_comes_back_and_leading_axes_are_free():
    logprobs = np.log(np.array([0.5, 0.25, 0.125, 0.0625], np.float32)) * np.ones((3, 2, 1), np.float32)
    logprobs[1, :, 2:] = -np.inf
    logprobs[2] = -np.inf
    decoded = decode_levels(encode_levels(logprobs), np.zeros((3, 2), np.float32))
    np.testing.assert_array_equal(np.isneginf(decoded), np.isneginf(logprobs))
    np.testing.assert_allclose(np.exp(decoded[:2]).sum(-1), 1, rtol=1e-6)
    assert np.isneginf(decode_levels(encode_levels(logprobs), np.ones((3, 2), np.float32))).all()


@pytest.mark.parametrize("row", [[-2.0, -1.0], [0.5, -1.0], [np.nan, -1.0], [-1.0, np.nan]])
def test_encode_refuses_rows_that_are_not_descending(row: list[float]):
    with pytest.raises(DataError, match="not descending"):
        encode_levels(np.array([row], np.float32))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-60, 0, width=32), min_size=1, max_size=70), st.floats(0, 0.99))
def test_any_descending_row_keeps_its_levels(values: list[float], tail_mass: float):
    logprobs_K = np.sort(np.array(values, np.float32))[::-1]
    stored_K = encode_levels(logprobs_K)
    levels_K = 2 * int(stored_K[0]) - np.cumsum(stored_K.astype(int))
    np.testing.assert_allclose(levels_K, 255 * np.exp(logprobs_K.astype(np.float64) / 4), atol=0.51)
    decoded_K = decode_levels(stored_K, np.float32(tail_mass))
    np.testing.assert_array_equal(np.isneginf(decoded_K), levels_K == 0)
