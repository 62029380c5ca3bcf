"""Every profile, row width and kind of row: what is read is what was written, by our reader and by plain zarr."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.caches import Case, header_of, make_case
from helpers.profiles import PROFILES, build_with, narrowed, rank_table

from vlsi_cache.errors import DataError
from vlsi_cache.sparse.rows import SparseRows, draw_rows
from vlsi_cache.store import reader
from vlsi_cache.store.encoding import encode_rows
from vlsi_cache.store.writer import CacheWriter

SCALARS = ("lse_LTn", "entropy_LT", "gold_logprob_LT", "tail_mass_LT")
# absolute error of a probability p: one level is 1/255 of p^(1/4); half a unit of float16 at the log-prob
ERROR_OF_P = {"default": 0.02, "exact": 0.0, "fast": 2e-3}


def written_rows(case: Case) -> dict[str, SparseRows]:
    found = {}
    for part in case.parts:
        at = 0
        for name, ids in zip(part.sample_ids, part.response_ids, strict=True):
            assert part.rows is not None
            found[name] = part.rows.tokens(slice(at, at + len(ids)))
            at += len(ids)
    return found


def assert_same(cache: reader.Cache, case: Case, *, error: float) -> None:
    """Ids, tail samples and scalars bit for bit, probabilities within `error`; 0 means every bit of the log-probs."""
    for name, written in written_rows(case).items():
        width = max(written.top_k, cache[name].top_k)
        want, got = written.padded_to(width), cache[name].padded_to(width)
        np.testing.assert_array_equal(got.widths_LT, want.widths_LT)
        for field in ("ids_LTK", "tail_ids_LTm", *SCALARS):
            rounding = 2.0**-16 if field in SCALARS and cache.header.profile == "default" else 0
            np.testing.assert_allclose(getattr(got, field), getattr(want, field), rtol=rounding, atol=0)
        p_got, p_want = (np.exp(rows.logprobs_LTK.astype(np.float64)) for rows in (got, want))
        np.testing.assert_allclose(p_got, p_want, rtol=0, atol=error)
        if error == 0:
            assert got.logprobs_LTK.dtype == np.float32
            assert got.logprobs_LTK.tobytes() == want.logprobs_LTK.tobytes()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("vocab_size", "top_k", "num_tail"), [(100, 6, 2), (70_000, 300, 0), (70_000, 1, 3), (9, 8, 1)]
)
def test_rows_come_back(tmp_path: Path, profile: str, vocab_size: int, top_k: int, num_tail: int) -> None:
    lengths = [[5, 1], [3, 4, 2], [1100]]
    case = make_case(lengths, list("abcdef"), vocab_size=vocab_size, top_k=top_k, num_tail=num_tail, num_layers=3)
    case = rank_table(case, profile)
    cache = build_with(tmp_path / "c", case, header_of(case).model_copy(update={"profile": profile}))
    assert_same(cache, case, error=ERROR_OF_P[profile])
    some = cache.row("f", layers=[2, "last"])
    np.testing.assert_array_equal(some.ids_LTK, cache["f"].ids_LTK[1:])
    np.testing.assert_array_equal(some.logprobs_LTK, cache["f"].logprobs_LTK[1:])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["per layer", "top-p"])
def test_rows_of_different_widths(tmp_path: Path, profile: str, kind: str) -> None:
    case = rank_table(make_case([[5, 1], [3, 4, 2]], list("abcde"), top_k=6, num_layers=3), profile)
    tokens = [6, 9]
    rng = np.random.default_rng(1)
    if kind == "per layer":
        widths = [np.broadcast_to(np.array([2, 6, 1])[:, None], (3, n)) for n in tokens]
        changes = {"top_k": [2, 6, 1]}
    else:
        widths = [rng.integers(1, 7, (3, n)) for n in tokens]
        changes = {"truncated": True}
    case = narrowed(case, widths)
    header = header_of(case).model_copy(update={**changes, "profile": profile})
    cache = build_with(tmp_path / "c", case, header)
    assert_same(cache, case, error=ERROR_OF_P[profile])
    group = zarr.open_group(tmp_path / "c" / "parts" / "000001.zarr", mode="r")
    assert group["ids"].shape == (int(widths[1].sum()),)  # not one padded entry on the disk
    np.testing.assert_array_equal(group["kept"][:].T, widths[1])
    two = cache.row("e", layers=[1, "last"])
    np.testing.assert_array_equal(two.padded_to(6).ids_LTK, cache["e"].padded_to(6).ids_LTK[[0, 2]])


@pytest.mark.parametrize("profile", PROFILES)
def test_sampled_rows(tmp_path: Path, profile: str) -> None:
    num_draws = 20
    case = rank_table(make_case([[5, 1], [3, 4, 2]], list("abcde"), top_k=6, num_layers=3, num_tail=num_draws), profile)
    rng = np.random.default_rng(2)
    parts = [
        replace(part, rows=draw_rows(part.rows, rng.random(part.rows.tail_ids_LTm.shape)))  # type: ignore[union-attr]
        for part in case.parts
    ]
    case = replace(case, parts=parts, num_tail=0)
    header = header_of(case).model_copy(
        update={"row_kind": "sampled", "truncated": True, "top_k": [num_draws] * 3, "profile": profile}
    )
    cache = build_with(tmp_path / "c", case, header)
    assert_same(cache, case, error=0)
    assert not cache["a"].tail_mass_LT.any()
    np.testing.assert_allclose(np.exp(cache["a"].logprobs_LTK.astype(np.float64)).sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("profile", PROFILES)
def test_plain_zarr_reads_the_same_arrays(tmp_path: Path, profile: str) -> None:
    case = rank_table(make_case([[1500, 700]], ["a", "b"], top_k=4, num_layers=3), profile)
    cache = build_with(tmp_path / "c", case, header_of(case).model_copy(update={"profile": profile}))
    part = cache.part(0)
    group = zarr.open_group(tmp_path / "c" / "parts" / "000000.zarr", mode="r")
    names = [path.name for path in (tmp_path / "c" / "parts" / "000000.zarr").iterdir() if path.is_dir()]
    assert len(names) == 11
    for name in names:
        array = group[name]
        mine = part.arrays[name][:, :] if array.ndim > 1 else part.arrays[name]
        np.testing.assert_array_equal(array[:], np.moveaxis(mine, 0, 1) if array.ndim > 1 else mine)


def test_arrays_that_are_too_short_are_refused_and_not_filled_up(tmp_path: Path) -> None:
    case = make_case([[5, 3]], ["a", "b"])
    writer = CacheWriter.create_or_resume(tmp_path / "c", header_of(case), case.vocab_order)
    rows = case.parts[0].rows
    assert rows is not None
    arrays = encode_rows(writer.header, case.vocab_order.places_LV(writer.header.id_dtype), rows.tokens(slice(0, 6)))
    with pytest.raises(DataError, match=r"`ids` is \(4, 6, 6\), this part needs \(4, 8, 6\)"):
        writer.write_encoded(0, case.parts[0], arrays)
    assert writer.missing_parts() == [0]
