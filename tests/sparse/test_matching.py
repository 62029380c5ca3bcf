"""Layer matching against a literal Algorithm 1, its invariants, and the null distribution."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.draws import even_generators
from hypothesis import given
from hypothesis import strategies as st
from oracles import literal_algorithm_1

from vlsi_cache.errors import SpecError
from vlsi_cache.report.matches import null_distribution
from vlsi_cache.sparse.matching import Matching, SearchRange, match_rng

VLSI = Matching()


def drawn(kld_SL: np.ndarray, rng: np.random.Generator, matching: Matching = VLSI) -> list[int]:
    """The matches that are drawn row by row."""
    search = SearchRange(*kld_SL.shape, rng=rng, matching=matching)
    rows = (torch.from_numpy(row) for row in kld_SL)
    return [int(search.draw(row_L[search.range.start : search.range.stop])[0]) for row_L in rows]


@pytest.mark.parametrize("temperature", ["normalized", "printed"])
def test_matches_are_those_of_a_literal_algorithm_1_with_the_same_draws(temperature: Any) -> None:
    sizes = np.random.default_rng(0)
    for trial in range(200):
        num_student = int(sizes.integers(1, 8))
        kld_SL = sizes.gamma(1.0, 2.0, (num_student, num_student + int(sizes.integers(0, 13))))
        if trial % 3 == 0:
            kld_SL[:] = kld_SL[0, 0]  # all equal
        draws_S = match_rng(trial, 3, 1).random(num_student).tolist()
        found = drawn(kld_SL, match_rng(trial, 3, 1), Matching(temperature=temperature))
        assert found == literal_algorithm_1(kld_SL, draws_S, printed=temperature == "printed")


@given(st.integers(1, 8), st.integers(0, 12), st.integers(0, 10**6))
def test_matches_increase_and_stay_inside_their_ranges(num_student: int, extra: int, seed: int) -> None:
    num_teacher = num_student + extra
    kld_SL = np.random.default_rng(seed).random((num_student, num_teacher))
    matches = drawn(kld_SL, match_rng(seed, 0, 0))
    for student, match in enumerate(matches):
        start = matches[student - 1] + 1 if student else 0
        assert start <= match <= num_teacher - num_student + student


def probabilities(kl: Any, matching: Matching = VLSI) -> np.ndarray:
    kl_M = torch.tensor(kl, dtype=torch.float64)
    return matching.logits(kl_M, torch.ones_like(kl_M, dtype=torch.bool)).softmax(0).numpy()


def test_probabilities_prefer_small_divergences_at_any_magnitude() -> None:
    kl = np.array([1.0, 2.0, 3.0])
    for factor in (1e-3, 1.0, 1e3):
        probs = probabilities(factor * kl, Matching(eps=1e-12))
        assert probs[0] / probs[2] == pytest.approx(np.exp(2), rel=1e-6)
    assert probabilities([5.0]).tolist() == [1.0]
    assert probabilities([1e30, 1e30]).tolist() == [0.5, 0.5]
    # The printed form: greedy for large ranges, uniform for small ones.
    assert probabilities(10 * kl, Matching(temperature="printed"))[0] > 0.999
    np.testing.assert_allclose(probabilities(1e-3 * kl, Matching(temperature="printed")), 1 / 3, atol=1e-5)
    fixed = probabilities(kl, Matching(temperature="fixed", fixed_temperature=0.5))
    assert fixed[0] / fixed[2] == pytest.approx(np.exp(4), rel=1e-6)


def test_too_few_teacher_layers_are_refused() -> None:
    with pytest.raises(SpecError, match="5 student target layers cannot be matched in order with 2"):
        SearchRange(5, 2, rng=match_rng(0, 0, 0))
    with pytest.raises(SpecError, match="`bottom_k` is 4, and the cache has 3 intermediate layers"):
        SearchRange(2, 3, rng=match_rng(0, 0, 0), matching=Matching("bottom_k", bottom_k=4))


def test_rng_depends_on_seed_step_and_place_alone() -> None:
    first = match_rng(1, 2, 3).random(4).tolist()
    assert match_rng(1, 2, 3).random(4).tolist() == first
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3)):
        assert match_rng(*other).random(4).tolist() != first


@pytest.mark.parametrize("mode", ["vlsi", "order", "range", "random", "multinomial"])
def test_null_distributions_are_what_equal_divergences_give(mode: Any) -> None:
    num, counts_SL = 512, np.zeros((3, 7))
    for rng in even_generators(num, 3):
        for student, match in enumerate(drawn(np.ones((3, 7)), rng, Matching(mode))):
            counts_SL[student, match] += 1
    null_SL = null_distribution(3, 7, mode=mode)
    assert null_SL is not None
    np.testing.assert_allclose(counts_SL / num, null_SL, atol=0.02)
    np.testing.assert_allclose(null_SL.sum(1), 1)
    assert null_distribution(3, 7, mode="uniform") is None


def test_null_distribution_at_the_paper_s_sizes() -> None:
    mean_S = null_distribution(7, 20) @ np.arange(20)
    np.testing.assert_allclose(mean_S, [6.5, 10.9, 13.5, 15.3, 16.6, 17.8, 18.9], atol=0.15)
    np.testing.assert_array_equal(null_distribution(4, 4), np.eye(4))
