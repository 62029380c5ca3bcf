"""Every kind of row through the real tiny teacher: against the full build, the dense distribution, and a kill."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.builds import dense_logprobs, part_bytes
from helpers.tiny import make_rows, write_spec

import vlsi_cache as vc
from vlsi_cache.sparse.rows import select_at_random
from vlsi_cache.store.reader import Cache
from vlsi_cache.store.writer import CacheWriter
from vlsi_cache.teacher.build import build_teacher

NUM_ROWS = 16
EXACT = "store.profile=exact"
# fp32 log-probs of the same token in another batch, from another way to compute the layers
SAME = 2e-5


@pytest.fixture(scope="module")
def spec_file(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    return write_spec(tmp_path_factory.mktemp("spec"), teacher_folder, num_rows=NUM_ROWS)


@pytest.fixture(scope="module")
def full(spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Every token, 12 entries, every bit of the log-probs."""
    return built(spec_file, tmp_path_factory.mktemp("full"), "rows.top_k=12")


def built(spec_file: Path, folder: Path, *overrides: str, profile: str = EXACT) -> Cache:
    return build_teacher(vc.load_spec(spec_file, overrides=[profile, *overrides]), out=folder / "cache")


def assert_prefix(row: Any, want: Any, kept_LT: np.ndarray) -> None:
    """`row` holds the first `kept_LT` entries of `want`, and what it does not hold is in its tail."""
    width = row.top_k
    inside_LTK = np.arange(width) < kept_LT[..., None]
    np.testing.assert_array_equal(row.widths_LT, kept_LT)
    np.testing.assert_array_equal(row.ids_LTK, np.where(inside_LTK, want.ids_LTK[..., :width], 0))
    np.testing.assert_allclose(row.logprobs_LTK[inside_LTK], want.logprobs_LTK[..., :width][inside_LTK], atol=SAME)
    dropped_LT = np.where(np.arange(want.top_k) < kept_LT[..., None], 0, np.exp(want.logprobs_LTK)).sum(-1)
    np.testing.assert_allclose(row.tail_mass_LT, want.tail_mass_LT + dropped_LT, atol=SAME)
    np.testing.assert_allclose(row.entropy_LT, want.entropy_LT, atol=SAME)
    outside = (row.tail_ids_LTm[..., None] != row.ids_LTK[..., None, :]) | ~inside_LTK[..., None, :]
    assert outside.all()


def test_a_width_for_each_layer(spec_file: Path, full: Cache, tmp_path: Path) -> None:
    widths = [1, 2, 3, 4, 12]
    cache = built(spec_file, tmp_path, f"rows.top_k={widths}")
    assert cache.header.top_k == widths
    for name in full:
        row, want = cache[name], full[name]
        assert_prefix(row, want, np.broadcast_to(np.array(widths)[:, None], row.entropy_LT.shape))


def test_as_many_entries_as_reach_a_mass(spec_file: Path, full: Cache, tmp_path: Path) -> None:
    cache = built(spec_file, tmp_path, "rows.top_k=12", "rows.top_p=0.12", "rows.min_k=2")
    found = []
    for name in full:
        row, want = cache[name], full[name]
        mass_LTK = np.cumsum(np.exp(want.logprobs_LTK.astype(np.float64)), -1)
        kept_LT = np.clip((mass_LTK < 0.12).sum(-1) + 1, 2, 12)
        assert_prefix(row, want, kept_LT)
        found.append(kept_LT.ravel())
    assert len(set(np.concatenate(found).tolist())) > 5  # rows of many widths, not all of one


def test_sampled_rows_are_the_distribution_on_average(spec_file: Path, teacher_folder: Path, tmp_path: Path) -> None:
    num_draws = 400
    cache = built(spec_file, tmp_path, "rows.kind=sampled", f"rows.num_draws={num_draws}")
    counts, mean, variance = 0.0, 0.0, 0.0
    for source in make_rows(NUM_ROWS)[::2]:
        row = cache[str(source["id"])]
        p_LTV = np.exp(dense_logprobs(teacher_folder, source, cache.layers)[0])
        shares_LTK = np.exp(row.logprobs_LTK.astype(np.float64))
        drawn_LTV = np.zeros(p_LTV.shape)
        np.put_along_axis(drawn_LTV, row.ids_LTK.astype(np.int64), 0, -1)
        for k in range(row.top_k):
            at = row.ids_LTK[..., k, None].astype(np.int64)
            added = np.take_along_axis(drawn_LTV, at, -1) + shares_LTK[..., k, None] * num_draws
            np.put_along_axis(drawn_LTV, at, added, -1)
        assert np.allclose(drawn_LTV.sum(-1), num_draws)
        assert np.abs(drawn_LTV - np.rint(drawn_LTV)).max() < 1e-3
        counts = counts + drawn_LTV.sum(1)
        mean = mean + num_draws * p_LTV.sum(1)
        variance = variance + num_draws * (p_LTV * (1 - p_LTV)).sum(1)
    often = np.asarray(mean) > 25
    z = ((counts - mean) / np.sqrt(variance))[often]
    assert len(z) > 200
    assert np.abs(z).max() < 5
    assert 0.9 < z.std() < 1.1  # as far off as chance, and no nearer


def test_tokens_of_high_entropy(spec_file: Path, full: Cache, tmp_path: Path) -> None:
    above = float(np.median(np.concatenate([full[name].entropy_LT[-1] for name in full])))
    cache = built(spec_file, tmp_path, "rows.top_k=12", f"rows.select_tokens.entropy_above={above}")
    assert_chosen(cache, full, {name: np.flatnonzero(full[name].entropy_LT[-1] > above) for name in full})


def test_a_share_of_each_part_by_entropy(spec_file: Path, full: Cache, tmp_path: Path) -> None:
    cache = built(spec_file, tmp_path, "rows.top_k=12", "rows.select_tokens.entropy_top=0.3")
    wanted: dict[str, np.ndarray] = {}
    for index in cache.parts:
        names = cache.part_record(index).sample_ids
        ranked = sorted(
            (
                (-entropy, number, at)
                for number, name in enumerate(names)
                for at, entropy in enumerate(full[name].entropy_LT[-1])
            )
        )
        best = ranked[: math.ceil(0.3 * len(ranked))]
        wanted |= {
            name: np.array(sorted(at for _, i, at in best if i == number), int) for number, name in enumerate(names)
        }
    assert_chosen(cache, full, wanted)


def test_a_random_share(spec_file: Path, full: Cache, tmp_path: Path) -> None:
    cache = built(spec_file, tmp_path, "rows.top_k=12", "rows.select_tokens.random=0.4", "rows.seed=3")
    lengths = {name: full[name].num_tokens for name in full}
    chosen = {name: np.flatnonzero(select_at_random([name], [lengths[name]], share=0.4, seed=3)) for name in full}
    assert 0.2 < sum(map(len, chosen.values())) / sum(lengths.values()) < 0.6
    assert_chosen(cache, full, chosen, tail=False)


def assert_chosen(cache: Cache, full: Cache, wanted: dict[str, np.ndarray], *, tail: bool = True) -> None:
    """The wanted positions, all response ids, and at these positions the rows of the full build."""
    assert set(cache) == set(full)
    assert 0 < cache.num_tokens < full.num_tokens
    for name, at in wanted.items():
        row, want = cache[name], full[name].select_tokens(at)
        np.testing.assert_array_equal(row.positions_T, at)
        np.testing.assert_array_equal(row.response_ids_R, full[name].response_ids_R)
        np.testing.assert_array_equal(row.ids_LTK, want.ids_LTK)
        np.testing.assert_allclose(row.logprobs_LTK, want.logprobs_LTK, atol=SAME)
        np.testing.assert_allclose(row.gold_logprob_LT, want.gold_logprob_LT, atol=SAME)
        if tail:  # the draws are keyed by seed and sample, not by what else is kept
            np.testing.assert_array_equal(row.tail_ids_LTm, want.tail_ids_LTm)


@pytest.mark.parametrize(("profile", "error"), [("default", 0.02), ("fast", 2e-3)])
def test_profiles_differ_by_their_rounding_alone(
    spec_file: Path, full: Cache, tmp_path: Path, profile: str, error: float
) -> None:
    cache = built(spec_file, tmp_path, "rows.top_k=12", profile=f"store.profile={profile}")
    for name in full:
        row, want = cache[name], full[name]
        np.testing.assert_array_equal(row.ids_LTK, want.ids_LTK)
        np.testing.assert_array_equal(row.tail_ids_LTm, want.tail_ids_LTm)
        got, exact = (np.exp(one.logprobs_LTK.astype(np.float64)) for one in (row, want))
        np.testing.assert_allclose(got, exact, rtol=0, atol=error)
        assert np.abs(got - exact).max() > 0


KINDS = {
    "top-p": ["rows.top_p=0.12"],
    "sampled": ["rows.kind=sampled", "rows.num_draws=20"],
    "chosen": ["rows.select_tokens.random=0.5"],
    "fast": ["store.profile=fast"],
    "exact": ["store.profile=exact"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_after_a_kill_the_bytes_are_the_same(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    spec = vc.load_spec(spec_file, overrides=["store.part_mib=0.008", *KINDS[kind]])
    whole = build_teacher(spec, out=tmp_path / "whole")
    assert len(whole.parts) >= 3
    write, written = CacheWriter.write_part, []

    def stop_after_one(self: CacheWriter, index: int, samples: Any) -> bool:
        if written:
            raise OSError("power cut")
        written.append(index)
        return write(self, index, samples)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_part", stop_after_one)
        with pytest.raises(OSError, match="power cut"):
            build_teacher(spec, out=tmp_path / "cut")
    assert 1 <= len(vc.open(tmp_path / "cut", allow_incomplete=True).parts) < len(whole.parts)
    build_teacher(spec, out=tmp_path / "cut")
    assert part_bytes(tmp_path / "cut") == part_bytes(tmp_path / "whole")
