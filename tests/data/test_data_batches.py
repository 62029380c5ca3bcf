"""Plans of parts and batches: every sample once, limits kept, the same plan from the same numbers."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlsi_cache.data.collate import padding_share, plan_batches, plan_parts

LENGTHS = st.lists(st.integers(min_value=1, max_value=50), max_size=40)
LIMIT = st.integers(min_value=1, max_value=120)


@given(LENGTHS, LIMIT, st.integers(min_value=0, max_value=2**32))
def test_parts(lengths: list[int], limit: int, seed: int) -> None:
    parts = plan_parts(lengths, seed=seed, tokens_per_part=limit)
    sizes = [sum(lengths[index] for index in part) for part in parts]
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert all(size <= limit or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    assert all(size + lengths[after[0]] > limit for size, after in zip(sizes, parts[1:], strict=False))
    assert parts == plan_parts(lengths, seed=seed, tokens_per_part=limit)


@given(st.lists(st.integers(min_value=0, max_value=50), max_size=40), LIMIT, st.data())
def test_parts_of_units(lengths: list[int], limit: int, data: st.DataObject) -> None:
    """Dealt one after the other, a new part where there is no room; some samples may be in no unit."""
    borders = sorted({0, *data.draw(st.lists(st.integers(min_value=0, max_value=len(lengths)), max_size=20))})
    units = [range(lo, hi) for lo, hi in pairwise(borders)]
    expected: list[list[int]] = []
    room = -1
    for number in np.argsort(np.random.Philox(3).random_raw(len(units)) if units else [], kind="stable"):
        num_tokens = sum(lengths[index] for index in units[number])
        if not expected or num_tokens > room:
            expected.append([])
            room = limit
        expected[-1] += units[number]
        room -= num_tokens
    assert plan_parts(lengths, seed=3, tokens_per_part=limit, units=units) == expected


def test_parts_never_change() -> None:
    assert plan_parts([1] * 10, seed=7, tokens_per_part=4) == PARTS_OF_SEED_7
    assert plan_parts([1] * 10, seed=8, tokens_per_part=4) != PARTS_OF_SEED_7


PARTS_OF_SEED_7 = [[8, 4, 3, 6], [2, 1, 0, 5], [9, 7]]


@given(LENGTHS, LIMIT)
def test_batches(lengths: list[int], limit: int) -> None:
    batches = plan_batches(lengths, limit)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= limit
        assert sum(longest - lengths[index] for index in batch) <= limit / 8
    ordered = [lengths[index] for batch in batches for index in batch]
    assert ordered == sorted(lengths, reverse=True)
    assert batches == plan_batches(lengths, limit)


def test_batches_by_hand() -> None:
    assert plan_batches([3, 9, 3, 4, 20], 16) == [[4], [1], [3, 0, 2]]
    assert plan_batches([3, 9, 3, 4, 20], 12) == [[4], [1], [3, 0], [2]]  # a third 3 would make it 2 of padding


@pytest.mark.parametrize(
    ("num_samples", "batch_tokens", "most_padding", "most_batches"),
    [(20_000, 8192, 0.01, 1.1), (200, 8192, 0.12, 1.5), (200, 32768, 0.25, 2.2)],
)
def test_skewed_lengths_in_large_and_small_parts(
    num_samples: int, batch_tokens: int, most_padding: float, most_batches: float
) -> None:
    """Log-normal lengths: a median of 245 tokens, the longest 4096. `most_batches` is in units of full batches."""
    draws = np.random.Generator(np.random.Philox(0)).standard_normal(num_samples)
    lengths = np.clip(245 * np.exp(draws), 8, 4096).astype(int).tolist()
    batches = plan_batches(lengths, batch_tokens)
    assert padding_share(lengths, batches) < most_padding
    assert len(batches) < most_batches * sum(lengths) / batch_tokens + 1


@pytest.mark.parametrize("plan", [lambda: plan_batches([], 8), lambda: plan_parts([], seed=0, tokens_per_part=8)])
def test_nothing_to_plan(plan: object) -> None:
    assert callable(plan)
    assert plan() == []
