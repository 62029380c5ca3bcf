"""The sampler: every sample once over all ranks, the same order again, and a thread that ends when nobody listens."""

import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.caches import build, copy_cache, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from vlsi_cache.errors import CacheCorruptError, SpecError
from vlsi_cache.store import reader
from vlsi_cache.store.dataset import PartWindowReader, plan_windows, skip_samples
from vlsi_cache.store.reader import Cache

LENGTHS = [[2, 1, 3], [1], [2, 2], [], [4, 1, 1, 1]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    num = sum(map(len, LENGTHS))
    return build(tmp_path_factory.mktemp("built") / "cache", make_case(LENGTHS, [f"s{i}" for i in range(num)]))


@pytest.fixture
def cache(root: Path) -> Cache:
    return reader.open(root)


@settings(deadline=None)
@given(
    sizes_of_units=st.lists(st.lists(st.integers(1, 3), max_size=5), max_size=9),
    world=st.integers(1, 12),
    window_parts=st.integers(1, 5),
    epoch=st.integers(0, 3),
    start=st.integers(0, 20),
)
def test_ranks_cover_everything_once(
    sizes_of_units: list[list[int]], world: int, window_parts: int, epoch: int, start: int
) -> None:
    units = {
        part: [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        for part, sizes in enumerate(sizes_of_units)
    }
    everything = [(part, row) for part, sizes in enumerate(sizes_of_units) for row in range(sum(sizes))]
    found, sizes = [], []
    for rank in range(world):
        plan = plan_windows(units, seed=1, epoch=epoch, rank=rank, world=world, window_parts=window_parts)
        order = [sample for window in plan for sample in window.order]
        assert all(len(window.parts) <= window_parts for window in plan)
        assert [sample for window in skip_samples(plan, start) for sample in window.order] == order[start:]
        found += order
        sizes.append(len(order))
    assert sorted(found) == everything
    assert max(sizes) - min(sizes) <= 1
    # Turns of a conversation follow each other, but for those between two ranks.
    split = sum(
        found.index((p, row)) + 1 != found.index((p, row + 1)) for p in units for u in units[p] for row in u[:-1]
    )
    assert split < world


def test_rows_are_those_of_the_cache_and_start_resumes(cache: Cache) -> None:
    full = list(PartWindowReader(cache, layers=[1, "last"], seed=3, epoch=1, window_parts=2))
    assert sorted(row.sample_id for row in full) == sorted(cache)
    for row in full:
        np.testing.assert_array_equal(row.logprobs_LTK, cache[row.sample_id].logprobs_LTK[[0, -1]])
    for start in (0, 1, 5, len(full)):
        rest = PartWindowReader(cache, layers=[], seed=3, epoch=1, window_parts=2, start=start)
        assert len(rest) == len(full) - start
        assert [row.sample_id for row in rest] == [row.sample_id for row in full][start:]


def test_order_depends_on_seed_and_epoch(cache: Cache) -> None:
    orders = {
        tuple(row.sample_id for row in PartWindowReader(cache, layers=[], seed=seed, epoch=epoch))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    }
    assert len(orders) == 3


def test_no_layers_means_no_layered_file_is_read(root: Path, tmp_path: Path) -> None:
    copy = copy_cache(root, tmp_path / "c")
    for path in copy.glob("parts/*/levels/c/0/0/0"):
        path.write_bytes(bytes(path.stat().st_size))
    cache = reader.open(copy)
    rows = list(PartWindowReader(cache, layers=[], seed=0, epoch=0))
    assert len(rows) == len(cache)
    assert rows[0].ids_LTK.shape == (0, rows[0].num_tokens, cache.header.widest)
    assert rows[0].response_ids_R.size


def test_wait_is_measured_and_errors_reach_the_consumer(root: Path, tmp_path: Path) -> None:
    copy = copy_cache(root, tmp_path / "c")
    cache = reader.open(copy)
    rows = PartWindowReader(cache, seed=0, epoch=0)
    list(rows)
    assert rows.wait_s > 0
    for path in copy.glob("parts/*/levels/c/0/0/0"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CacheCorruptError, match="levels"):
        list(PartWindowReader(cache, seed=0, epoch=0))
    with pytest.raises(SpecError, match="layer `9`"):
        PartWindowReader(cache, layers=[9], seed=0, epoch=0)


def test_leaving_early_ends_the_threads(cache: Cache) -> None:
    for row in PartWindowReader(cache, seed=0, epoch=0, window_parts=1):
        assert row.num_tokens
        break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlsi-cache")]
