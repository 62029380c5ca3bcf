"""Pruning: what stays is what a build of the smaller cache would have stored, whatever is cut."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.caches import Case, build, copy_cache, file_bytes, header_of, make_case, standard_case
from helpers.profiles import PROFILES, build_with, narrowed, rank_table

from vlsi_cache.errors import (
    CacheIncompleteError,
    CacheNotFoundError,
    DiskFullError,
    FingerprintMismatchError,
    SpecError,
)
from vlsi_cache.sparse.rows import draw_rows, truncate
from vlsi_cache.store import files, reader
from vlsi_cache.store.derive.prune import group_parts, prune
from vlsi_cache.store.derive.slice import cut_part
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.store.vocab_order import one_order
from vlsi_cache.store.writer import CacheWriter

# of a probability mass that was summed over stored values instead of the teacher's own
ERROR_OF_MASS = {"default": 0.03, "exact": 1e-6, "fast": 2e-3}


def stored(root: Path, index: int) -> dict[str, np.ndarray]:
    """All arrays of a part as plain zarr reads them."""
    folder = root / "parts" / f"{index:06d}.zarr"
    group = zarr.open_group(folder, mode="r")
    return {path.name: np.asarray(group[path.name][...]) for path in folder.iterdir() if path.is_dir()}  # type: ignore[index]


def assert_same_arrays(one: Path, other: Path, *, tail_mass_error: float, aside: tuple[str, ...] = ()) -> None:
    """Every array of every part bit for bit; tail mass within an error, `aside` not at all."""
    parts = reader.open(one).parts
    assert parts == reader.open(other).parts
    for index in parts:
        got, want = stored(one, index), stored(other, index)
        assert got.keys() == want.keys()
        for name in got.keys() - {"tail_mass", *aside}:
            assert got[name].dtype == want[name].dtype, name
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        if "tail_mass" in got:
            np.testing.assert_allclose(got["tail_mass"], want["tail_mass"], atol=tail_mass_error)


def build_smaller(root: Path, case: Case, header: CacheHeader, top_k: int) -> reader.Cache:
    """A build of the same rows at a smaller k, its tail mass from the teacher's own rows."""
    widths = [min(k, top_k) for k in header.top_k]
    parts = []
    for part in case.parts:
        assert part.rows is not None
        kept_LT = np.minimum(part.rows.widths_LT, np.array(widths)[:, None])
        rows = truncate(part.rows, kept_LT, np.zeros(part.rows.tail_ids_LTm.shape))
        rows = replace(rows, ids_LTK=rows.ids_LTK[..., :top_k], logprobs_LTK=rows.logprobs_LTK[..., :top_k])
        parts.append(replace(part, rows=rows))
    return build_with(root, replace(case, parts=parts), header.model_copy(update={"top_k": widths}))


def ragged_case(profile: str, kind: str) -> tuple[Case, CacheHeader]:
    """Rows of one width, of one width per layer, or cut by their mass."""
    case = rank_table(make_case([[5, 1], [3, 4, 2], [6]], list("abcdef"), top_k=6, num_layers=3), profile)
    header = header_of(case).model_copy(update={"profile": profile})
    tokens = [part.rows.num_tokens for part in case.parts if part.rows is not None]
    if kind == "per layer":
        widths = [np.broadcast_to(np.array([2, 6, 4])[:, None], (3, n)) for n in tokens]
        return narrowed(case, widths), header.model_copy(update={"top_k": [2, 6, 4]})
    if kind == "top-p":
        rng = np.random.default_rng(1)
        widths = [rng.integers(1, 7, (3, n)) for n in tokens]
        return narrowed(case, widths), header.model_copy(update={"truncated": True})
    return case, header


BuiltAt = Callable[..., reader.Cache]


@pytest.fixture(scope="module")
def built_at(tmp_path_factory: pytest.TempPathFactory) -> BuiltAt:
    """The cache of a `ragged_case`, whole or built at a smaller k; made once, and nobody writes to it."""

    @functools.cache
    def make(profile: str, kind: str, top_k: int | None = None) -> reader.Cache:
        case, header = ragged_case(profile, kind)
        root = tmp_path_factory.mktemp("cache") / "c"
        return build_with(root, case, header) if top_k is None else build_smaller(root, case, header, top_k)

    return make


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["one width", "per layer", "top-p"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_smaller_k_is_what_a_build_would_store(
    tmp_path: Path, built_at: BuiltAt, profile: str, kind: str, top_k: int
) -> None:
    source, want = built_at(profile, kind), built_at(profile, kind, top_k)
    small = prune(source, tmp_path / "small", top_k=top_k)
    assert small.header.top_k == want.header.top_k
    assert small.header.is_ragged == want.header.is_ragged
    assert small.verify(deep=True).ok
    # these cuts leave the parts as they are only when little goes, so compare sample by sample when they were joined
    if len(small.parts) == len(want.parts):
        assert_same_arrays(small.path, want.path, tail_mass_error=ERROR_OF_MASS[profile], aside=("tail_ids",))
    for name in source:
        got, other, full = small[name], want[name], source[name]
        np.testing.assert_array_equal(got.ids_LTK, other.ids_LTK)
        np.testing.assert_allclose(got.tail_mass_LT, other.tail_mass_LT, atol=ERROR_OF_MASS[profile])
        if profile != "default":
            np.testing.assert_array_equal(got.logprobs_LTK, other.logprobs_LTK)
        width = full.top_k
        outside = np.where(np.arange(width) < got.widths_LT[..., None], -1, full.ids_LTK.astype(np.int64))
        allowed = np.concatenate([outside, full.tail_ids_LTm], axis=-1)
        assert (got.tail_ids_LTm[..., None] == allowed[..., None, :]).any(-1).all()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["one width", "per layer", "top-p"])
def test_stored_values_are_prefixes_bit_for_bit(built_at: BuiltAt, profile: str, kind: str) -> None:
    source, want = built_at(profile, kind), built_at(profile, kind, 3)
    target = want.header.model_copy(update={"top_k": [min(k, 3) for k in source.header.top_k]})
    for index in source.parts:
        part = source.part(index)
        every_S, every_T = np.ones(len(part), bool), np.ones(part.record.num_tokens, bool)
        piece = cut_part(part, target, every_T, every_S, generation=0)
        on_disk = stored(want.path, index)
        for name in ("ids", "levels", "logprob_gaps", "logprobs", "kept"):
            if name not in on_disk:
                assert name not in piece.layers
                continue
            flat = target.is_ragged and name != "kept"
            got = np.concatenate(piece.layers[name]) if flat else np.stack(piece.layers[name], axis=1)
            np.testing.assert_array_equal(got, on_disk[name], err_msg=name)


@pytest.mark.parametrize(("layers", "top_k"), [([2, "last"], None), (None, 3), (["last"], 2)])
def test_layers_and_k(root: Path, tmp_path: Path, layers: list[int | str] | None, top_k: int | None) -> None:
    source = reader.open(root)
    plan = prune(source, tmp_path / "new", layers=layers, top_k=top_k, dry_run=True)
    assert not (tmp_path / "new").exists()
    small = prune(source, tmp_path / "new", layers=layers, top_k=top_k)
    k = top_k or source.header.widest
    assert small.layers == plan.layers
    assert small.header.parents[0]["digest"] == source.header.digest
    for name in source:
        want, got = source.row(name, layers=layers), small[name]
        np.testing.assert_array_equal(got.ids_LTK, want.ids_LTK[..., :k])
        np.testing.assert_allclose(got.logprobs_LTK, want.logprobs_LTK[..., :k], atol=5e-5)
        dropped = np.exp(want.logprobs_LTK[..., k:]).sum(-1)
        np.testing.assert_allclose(got.tail_mass_LT, want.tail_mass_LT + dropped, rtol=2e-5)
        outside = np.concatenate([want.ids_LTK[..., k:], want.tail_ids_LTm], axis=-1)
        assert (got.tail_ids_LTm[..., None] == outside[..., None, :]).any(-1).all()
    assert small.verify(deep=True).ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to prune"),
        ({"where": "tokens > 0"}, "nothing to prune.*where tokens > 0"),
        ({"where": "tokens > 99"}, "nothing would be left of the 7 samples"),
        ({"tokens": "entropy>99"}, "no row would be left"),
        ({"layers": [1]}, "the final layer 4 always stays"),
        ({"layers": "last"}, r'`layers` is the text "last": give a list'),
        ({"layers": [9, "last"]}, "layer `9` is not in this cache"),
        ({"top_k": 99}, "this cache keeps 6"),
        ({"top_k": 0}, "1 to 6 is possible"),
        ({"samples": []}, "nothing would be left"),
        ({"samples": [3]}, "ids are text, got 3"),
        ({"min_kept_mass": 1.5}, "between 0 and 1"),
        ({"min_kept_mass": float("nan")}, "between 0 and 1"),
        ({"profile": "exact"}, r"`default`, and can only become \['fast'\]; `exact` needs bits"),
        ({"profile": "zip"}, "can only become"),
        *(({"tokens": rule}, "entropy>0.5") for rule in ("top:0", "top:2", "random:x", "entropy>nan", "all", "")),
    ],
)
def test_prune_says_no(root: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        prune(root, tmp_path / "new", **options)  # type: ignore[call-overload]
    assert not (tmp_path / "new").exists()


def test_targets_that_are_refused(root: Path, tmp_path: Path) -> None:
    before = file_bytes(root)
    for out in (root, root / "parts" / "new", root / ".." / root.name):
        with pytest.raises(SpecError, match="is or lies in the source"):
            prune(root, out, top_k=2)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SpecError, match="is a file"):
        prune(root, tmp_path / "thesis.tex", top_k=2)
    with pytest.raises(SpecError, match="not empty and not a cache"):
        prune(root, tmp_path, top_k=2)
    other = copy_cache(root, tmp_path / "other")
    with pytest.raises(FingerprintMismatchError, match=r"`prune.1.top_k`: the cache has nothing, this run has 2"):
        prune(root, other, top_k=2)
    assert file_bytes(root) == before == file_bytes(other)


def test_sources_that_are_refused(tmp_path: Path) -> None:
    case = standard_case()
    writer = CacheWriter.create_or_resume(tmp_path / "half", header_of(case), case.vocab_order)
    writer.write_part(1, case.parts[1])
    with pytest.raises(CacheNotFoundError):
        prune(tmp_path / "nowhere", tmp_path / "new", top_k=2)
    with pytest.raises(CacheIncompleteError, match="1 of 3 parts"):
        prune(tmp_path / "half", tmp_path / "new", top_k=2)
    with pytest.raises(CacheIncompleteError, match="1 of 3 parts"):
        prune(reader.open(tmp_path / "half", allow_incomplete=True), tmp_path / "new", top_k=2)


def test_a_cache_without_samples_has_nothing_to_prune(tmp_path: Path) -> None:
    empty = build(tmp_path / "empty", make_case([], []))
    empty_part = build(tmp_path / "empty part", make_case([[]], []))
    for source in (empty, empty_part):
        with pytest.raises(SpecError, match="nothing would be left of the 0 samples"):
            prune(source, tmp_path / "new", top_k=2)


def test_redrawn_tails_depend_on_nothing_else(root: Path, tmp_path: Path) -> None:
    source = reader.open(root)
    whole = prune(source, tmp_path / "whole", top_k=2)
    some = prune(source, tmp_path / "some", top_k=2, tokens="entropy>2.5", where="part > 0", layers=[2, "last"])
    after = prune(prune(source, tmp_path / "rows", tokens="entropy>2.5"), tmp_path / "after", top_k=2)
    for name in some:
        index = some[name].positions_T
        np.testing.assert_array_equal(some[name].tail_ids_LTm, whole[name].tail_ids_LTm[[1, 3]][:, index])
        np.testing.assert_array_equal(after[name].tail_ids_LTm, whole[name].tail_ids_LTm[:, index])


def test_tails_stay_unbiased_after_two_prunes(tmp_path: Path) -> None:
    """The second cut must not use the uniforms of the first: its draws would depend on them."""
    case = make_case([[20_000]], ["a"], vocab_size=6, num_layers=1, top_k=3, num_tail=2)
    p = np.array([0.4, 0.2, 0.1, 0.15, 0.1, 0.05])
    rng, rows = np.random.default_rng(0), case.parts[0].rows
    assert rows is not None
    shape = rows.tail_ids_LTm.shape
    rows = replace(
        rows,
        ids_LTK=np.broadcast_to(np.arange(3), rows.ids_LTK.shape),
        logprobs_LTK=np.broadcast_to(np.log(p[:3]).astype(np.float32), rows.ids_LTK.shape),
        tail_mass_LT=np.full(shape[:2], 0.3, np.float32),
        tail_ids_LTm=3 + rng.choice(3, size=shape, p=p[3:] / 0.3),
    )
    case = replace(case, parts=[replace(case.parts[0], rows=rows)])
    source = build_with(tmp_path / "c", case, header_of(case).model_copy(update={"profile": "exact"}))
    once = prune(source, tmp_path / "once", top_k=2)
    twice = prune(once, tmp_path / "twice", top_k=1)
    for cache, kept in ((once, 2), (twice, 1)):
        found = np.bincount(cache["a"].tail_ids_LTm.ravel(), minlength=6) / np.prod(shape)
        want = np.where(np.arange(6) < kept, 0, p) / p[kept:].sum()
        np.testing.assert_allclose(found, want, atol=5 * np.sqrt(0.25 / np.prod(shape)))


@pytest.mark.parametrize("kind", ["one width", "per layer", "top-p"])
@pytest.mark.parametrize(("old", "new"), [("default", "fast"), ("exact", "default"), ("exact", "fast")])
def test_another_profile(tmp_path: Path, built_at: BuiltAt, kind: str, old: str, new: str) -> None:
    case, header = ragged_case(old, kind)
    source = built_at(old, kind)
    other = prune(source, tmp_path / "other", profile=new)  # type: ignore[call-overload]
    assert other.header.profile == new
    assert other.verify(deep=True).ok
    for name in source:
        got, want = other[name], source[name]
        for field in ("ids_LTK", "tail_ids_LTm", "positions_T", "response_ids_R"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
        for field in ("lse_LTn", "entropy_LT", "tail_mass_LT"):
            np.testing.assert_allclose(
                getattr(got, field), getattr(want, field), rtol=2.0**-16 if new == "default" else 0
            )
        if new == "fast":
            np.testing.assert_array_equal(got.logprobs_LTK, want.logprobs_LTK.astype(np.float16))
    if old == "exact":  # nothing is lost on the way: the same as a build
        target = header.model_copy(update={"profile": new})
        vocab_order = one_order(np.arange(len(case.id_of_rank)), 3) if new == "fast" else case.vocab_order
        writer = CacheWriter.create_or_resume(tmp_path / "want", target, vocab_order)
        for index in writer.missing_parts():
            writer.write_part(index, case.parts[index])
        writer.finish()
        if len(other.parts) == len(source.parts):
            assert_same_arrays(other.path, tmp_path / "want", tail_mass_error=0)
    for wrong in {"default", "exact"} - {new} if new == "fast" else {"exact"}:
        with pytest.raises(SpecError, match=f"profile `{wrong}`: this cache is `{new}`"):
            prune(other, tmp_path / "back", profile=wrong)  # type: ignore[call-overload]


@pytest.mark.parametrize("profile", PROFILES)
def test_sampled_rows(tmp_path: Path, profile: str) -> None:
    case = rank_table(make_case([[5, 1], [3, 4, 2]], list("abcde"), top_k=6, num_layers=3, num_tail=20), profile)
    rng = np.random.default_rng(2)
    parts = [replace(part, rows=draw_rows(part.rows, rng.random(part.rows.tail_ids_LTm.shape))) for part in case.parts]  # type: ignore[union-attr]
    case = replace(case, parts=parts, num_tail=0)
    changes = {"row_kind": "sampled", "truncated": True, "top_k": [20] * 3, "profile": profile}
    source = build_with(tmp_path / "c", case, header_of(case).model_copy(update=changes))
    with pytest.raises(SpecError, match="this cache keeps 20 draws"):
        prune(source, tmp_path / "new", top_k=3)
    to_fast = {} if profile == "fast" else {"profile": "fast"}
    small = prune(source, tmp_path / "new", layers=[1, "last"], tokens="entropy>1", where="id != 'c'", **to_fast)  # type: ignore[call-overload]
    assert small.verify(deep=True).ok
    assert small.num_tokens > 0
    for name in small:
        got, want = small[name], source.row(name, layers=[1, "last"]).select_tokens(small[name].positions_T)
        width = max(got.top_k, want.top_k)
        np.testing.assert_array_equal(got.padded_to(width).ids_LTK, want.padded_to(width).ids_LTK)
        np.testing.assert_array_equal(got.padded_to(width).logprobs_LTK, want.padded_to(width).logprobs_LTK)


def test_parts_keep_their_size(tmp_path: Path) -> None:
    names = [f"s{i}" for i in range(40)]
    source = reader.open(build(tmp_path / "c", make_case([[60, 50]] * 20, names, num_layers=3, top_k=20)))
    small = prune(source, tmp_path / "small", where=f"id in {names[::4]}", top_k=5)
    assert 1 < len(small.parts) < 10
    assert list(small) == names[::4]
    assert small.sample_table()["part"].to_pylist() == sorted(small.sample_table()["part"].to_pylist())
    assert group_parts([10, 10, 10], 10) == [[0], [1], [2]]
    assert group_parts([5, 5, 0, 5, 25, 5], 10) == [[0, 1, 2], [3], [4], [5]]
    assert group_parts([999] * 60, 1000) == [[i] for i in range(60)]
    assert group_parts([0, 300, 0, 0], 100) == [[0, 1, 2, 3]]
    assert group_parts([102, 3], 100) == [[0, 1]]
    assert group_parts([0, 0], 0) == [[0, 1]]


def test_the_plan_says_what_saves_what(root: Path, tmp_path: Path) -> None:
    plan = prune(root, tmp_path / "n", layers=[2, 4], top_k=3, tokens="top:0.5", where="part < 2", dry_run=True)
    assert (plan.source_samples, plan.num_samples, plan.source_tokens) == (7, 5, 28)
    assert all(plan.saved_bytes[reason] > 0 for reason in ("layers", "entries", "samples", "tokens"))
    assert abs(plan.source_bytes - sum(plan.saved_bytes.values()) - plan.estimated_bytes) < 20
    faster = prune(root, tmp_path / "n", profile="fast", dry_run=True)
    assert "profile" in faster.saved_bytes
    json.dumps({**vars(plan), "source": "", "out": ""})


def test_no_room_is_known_before_anything_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
    with pytest.raises(DiskFullError, match="1000 are free"):
        prune(root, tmp_path / "new", top_k=2)
    assert not (tmp_path / "new").exists()


def test_other_cuts_are_refused_with_both_values(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    first = prune(root, out, top_k=3, where="part < 2")
    before = file_bytes(out / "parts")
    with pytest.raises(FingerprintMismatchError) as error:
        prune(root, out, top_k=2, where="part < 2")
    assert "`prune.1.top_k`: the cache has 3, this run has 2" in str(error.value)
    with pytest.raises(
        FingerprintMismatchError, match=r'`prune.1.where`: the cache has "part < 2", this run has "part'
    ):
        prune(root, out, top_k=3, where="part < 1")
    case = standard_case(seed=1)
    changed = build_with(tmp_path / "other", case, header_of(case))  # another order, so other stored ids
    with pytest.raises(FingerprintMismatchError, match=r"prune.1.source"):
        prune(changed, out, top_k=3, where="part < 2")
    assert file_bytes(out / "parts") == before
    assert list(prune(root, out, top_k=3, where="part < 2")) == list(first)


def test_lineage_and_token_texts(tmp_path: Path) -> None:
    case = standard_case()
    writer = CacheWriter.create_or_resume(
        tmp_path / "c", header_of(case), case.vocab_order, token_texts=lambda: [f"\u00e9{i}" for i in range(100)]
    )
    for index in writer.missing_parts():
        writer.write_part(index, case.parts[index])
    writer.finish()
    once = prune(tmp_path / "c", tmp_path / "once", where="part < 2", min_kept_mass=0.01)
    twice = prune(once, tmp_path / "twice", layers=[1, "last"], tokens="top:0.9")
    parent = twice.header.parents[0]
    assert parent["operation"] == "prune"
    assert parent["cuts"] == {"layers": [1, 4], "tokens": "top:0.9"}
    assert parent["digest"] == once.header.digest
    assert parent["parents"][0]["cuts"] == {"min_kept_mass": 0.01, "where": "part < 2"}
    assert parent["parents"][0]["num_samples"] == [7, 5]
    assert twice.token_text(7) == "\u00e97"
    (tmp_path / "twice" / "parts" / "000000.zarr").rename(tmp_path / "away")
    with pytest.raises(CacheIncompleteError, match=r"vlsi-cache prune .*once -o .*twice --layers 1,4 --tokens top:0.9"):
        reader.open(tmp_path / "twice")
