"""Layer matching against a literal Algorithm 1, its invariants, and the null distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import choose, match_layers, match_probabilities

from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.report.matches import null_distribution
from vlsi_cache.sparse.matching import Matcher, Matching, match_rng
from vlsi_cache.sparse.matching import search_window as window


def literal_algorithm_1(kld: np.ndarray, draws: list[float], printed: bool) -> list[int]:
    (ts, tl), start, matches = kld.shape, 0, []
    for s in range(ts):
        cand = kld[s, start : tl - ts + s + 1]
        spread = cand.max() - cand.min() + 1e-6
        logits = -(cand - cand.min()) / (2.0 / spread) if printed else -(cand - cand.min()) * (2.0 / spread)
        p = np.exp(logits) / np.exp(logits).sum()
        j = start + int((np.cumsum(p) < draws[s]).sum())
        matches.append(j)
        start = j + 1
    return matches


@pytest.mark.parametrize("temperature", ["normalized", "printed"])
def test_matches_a_literal_algorithm_1_with_the_same_draws(temperature):
    for seed in range(50):
        kld_SL = np.random.default_rng(seed).gamma(2.0, 1.0, (7, 20))
        draws = match_rng(seed, 3, 1).random(7).tolist()
        found = match_layers(kld_SL, rng=match_rng(seed, 3, 1), temperature=temperature)
        assert found == literal_algorithm_1(kld_SL, draws, temperature == "printed")


def test_row_by_row_is_the_full_table():
    kld_SL = np.random.default_rng(0).random((4, 9))
    rng, start, found = match_rng(0, 0, 0), 0, []
    for student in range(4):
        first, last = window(student, start, 4, 9)
        found.append(first + choose(kld_SL[student, first : last + 1], rng))
        start = found[-1] + 1
    assert found == match_layers(kld_SL, rng=match_rng(0, 0, 0))


@given(st.integers(1, 8), st.integers(0, 12), st.integers(0, 10**6))
def test_matches_increase_and_stay_inside_their_windows(num_student: int, extra: int, seed: int):
    num_teacher = num_student + extra
    kld_SL = np.random.default_rng(seed).random((num_student, num_teacher))
    matches = match_layers(kld_SL, rng=match_rng(seed, 0, 0))
    assert len(matches) == num_student
    for student, match in enumerate(matches):
        start = matches[student - 1] + 1 if student else 0
        assert start <= match <= num_teacher - num_student + student


def test_probabilities_prefer_small_divergences_at_any_magnitude():
    kld = np.array([1.0, 2.0, 3.0])
    for factor in (1e-3, 1.0, 1e3):
        probs = match_probabilities(factor * kld, eps=1e-12)
        assert probs[0] / probs[2] == pytest.approx(np.exp(2), rel=1e-6)
    assert match_probabilities([5.0]).tolist() == [1.0]
    assert match_probabilities([1e30, 1e30]).tolist() == [0.5, 0.5]
    # The printed form: greedy for large ranges, uniform for small ones.
    assert match_probabilities(10 * kld, temperature="printed")[0] > 0.999
    np.testing.assert_allclose(match_probabilities(1e-3 * kld, temperature="printed"), 1 / 3, atol=1e-5)


def test_errors_say_which_layer():
    kld_SL = np.ones((2, 5))
    kld_SL[1, 4] = np.nan
    with pytest.raises(ModelError, match="student target index 1 to teacher target index 4 is nan"):
        match_layers(kld_SL, rng=match_rng(0, 0, 0))
    with pytest.raises(SpecError, match="5 student target layers cannot be matched in order with 2"):
        match_layers(kld_SL.T, rng=match_rng(0, 0, 0))
    with pytest.raises(SpecError, match="`temperature` is 'cold'"):
        choose([1.0, 2.0], match_rng(0, 0, 0), temperature="cold")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot start its window at 5"):
        window(0, 5, 2, 5)


def test_rng_depends_on_seed_step_and_rank_alone():
    first = match_rng(1, 2, 3).random(4).tolist()
    assert match_rng(1, 2, 3).random(4).tolist() == first
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3)):
        assert match_rng(*other).random(4).tolist() != first


def test_null_distribution_is_what_uniform_matching_does():
    null_SL = null_distribution(3, 6)
    counts_SL, rng = np.zeros((3, 6)), np.random.default_rng(0)
    for _ in range(2500):
        # Equal divergences are uniform probabilities.
        for student, match in enumerate(match_layers(np.ones((3, 6)), rng=rng)):
            counts_SL[student, match] += 1
    np.testing.assert_allclose(null_SL.sum(1), 1)
    np.testing.assert_allclose(counts_SL / 2500, null_SL, atol=0.04)


@pytest.mark.parametrize("sampler", ["greedy", "joint"])
@pytest.mark.parametrize("mode", ["vlsi", "order", "range", "random", "multinomial"])
def test_null_distributions_are_what_equal_divergences_give(mode, sampler):
    if sampler == "joint" and mode not in ("vlsi", "order"):
        return
    num = 30_000
    matcher = Matcher(3, 7, rngs=[np.random.default_rng(0)] * num, matching=Matching(mode, sampler=sampler))
    values = [torch.zeros(len(matcher.window(s)), num) for s in range(3)]
    if sampler == "joint":
        matcher.draw_all(values)
    for value_MU in values:
        matcher.choose(value_MU)
    null_SL = null_distribution(3, 7, mode=mode, sampler=sampler)
    for null_L, match_nU in zip(null_SL, matcher.matched, strict=True):
        found_L = np.bincount(match_nU[0].numpy(), minlength=7) / num
        np.testing.assert_allclose(found_L, null_L, atol=5 * np.sqrt(0.25 / num))
    assert null_distribution(3, 7, mode="uniform") is None


def test_null_distribution_at_the_paper_s_sizes():
    mean_S = null_distribution(7, 20) @ np.arange(20)
    np.testing.assert_allclose(mean_S, [6.5, 10.9, 13.5, 15.3, 16.6, 17.8, 18.9], atol=0.15)
    np.testing.assert_array_equal(null_distribution(4, 4), np.eye(4))
