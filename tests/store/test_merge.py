"""Merging: every row of every source comes out as it was, under one table of ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.caches import Case, build, copy_cache, file_bytes, header_of, make_case, standard_case
from helpers.profiles import PROFILES, build_with, narrowed, rank_table

from vlsi_cache.errors import (
    CacheIncompleteError,
    CacheNotFoundError,
    DataError,
    DiskFullError,
    FingerprintMismatchError,
    SpecError,
)
from vlsi_cache.sparse.rows import draw_rows
from vlsi_cache.store import files, reader
from vlsi_cache.store.dataset import PartWindowReader
from vlsi_cache.store.derive.merge import merge
from vlsi_cache.store.derive.prune import prune
from vlsi_cache.store.header import data_sections
from vlsi_cache.store.writer import CacheWriter

FIELDS = (
    *("ids_LTK", "logprobs_LTK", "tail_ids_LTm", "lse_LTn", "entropy_LT", "gold_logprob_LT", "tail_mass_LT"),
    *("response_ids_R", "positions_T"),
)


def named_case(prefix: str, seed: int, **options: Any) -> Case:
    lengths = [[5, 1], [3, 4, 2], [6]]
    return make_case(lengths, [f"{prefix}{i}" for i in range(6)], num_layers=3, seed=seed, **options)


def build_from(root: Path, case: Case, *, data: str, **changes: Any) -> reader.Cache:
    """A cache whose header says where its data came from."""
    header = header_of(case)
    prints = {**header.fingerprint, "data.content": data, "data.num_samples": header.num_samples}
    spec = {"name": "test", "data": {"path": f"{data}.jsonl"}}
    return build_with(root, case, header.model_copy(update={"fingerprint": prints, "spec": spec, **changes}))


def assert_holds(merged: reader.Cache, *sources: reader.Cache) -> None:
    assert list(merged) == [name for source in sources for name in source]
    assert merged.verify(deep=True).ok
    for source in sources:
        for name in source:
            got, want = merged[name], source[name]
            assert (got.kind, got.digest) == (want.kind, want.digest)
            for field in FIELDS:
                np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=field)


def two(tmp_path: Path) -> tuple[reader.Cache, reader.Cache]:
    """Two caches with different samples, and different rank tables."""
    return (
        build_from(tmp_path / "a", named_case("a", 0), data="one"),
        build_from(tmp_path / "b", named_case("\u00e9\u2028", 1), data="two"),
    )


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["one width", "per layer", "top-p", "sampled"])
def test_rows_are_those_of_the_sources(tmp_path: Path, profile: str, kind: str) -> None:
    caches = []
    for number, prefix in enumerate("ab"):
        case = rank_table(named_case(prefix, number, num_tail=20 if kind == "sampled" else 2), profile)
        changes: dict[str, Any] = {"profile": profile}
        rng = np.random.default_rng(number)
        if kind == "per layer":
            widths = [np.broadcast_to(np.array([2, 6, 4])[:, None], (3, n)) for n in (6, 9, 6)]
            case, changes = narrowed(case, widths), {**changes, "top_k": [2, 6, 4]}
        elif kind == "top-p":
            case = narrowed(case, [rng.integers(1, 7, (3, n)) for n in (6, 9, 6)])
            changes["truncated"] = True
        elif kind == "sampled":
            parts = [replace(p, rows=draw_rows(p.rows, rng.random(p.rows.tail_ids_LTm.shape))) for p in case.parts]  # type: ignore[union-attr]
            case = replace(case, parts=parts, num_tail=0)
            changes |= {"row_kind": "sampled", "truncated": True, "top_k": [20] * 3}
        caches.append(build_from(tmp_path / prefix, case, data=prefix, **changes))
    merged = merge(caches, tmp_path / "both")
    assert_holds(merged, *caches)
    assert merged.header.id_of_rank_xxh3 == caches[0].header.id_of_rank_xxh3
    assert (caches[0].vocab_order.digest != caches[1].vocab_order.digest) == (profile != "fast")
    assert merged.header.num_parts == 6
    if kind == "one width":  # of the first cache nothing changes, not even the bytes
        data = [
            {k: v for k, v in file_bytes(c.path / "parts" / "000001.zarr").items() if k != "part.json"}
            for c in (merged, caches[0])
        ]
        assert data[0] == data[1]


def test_header_lineage_and_data(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    before = [file_bytes(cache.path) for cache in (one, other)]
    plan = merge([one.path, str(other.path)], tmp_path / "both", dry_run=True)
    assert not (tmp_path / "both").exists()
    assert (plan.num_samples, plan.num_parts, plan.reordered) == (12, 6, [other.path])
    merged = merge([one.path, other.path], tmp_path / "both")
    prints = merged.header.fingerprint
    assert prints["teacher"] == "tiny"
    assert [source["data.content"] for source in prints["data.sources"]] == ["one", "two"]
    assert [source["digest"] for source in prints["data.sources"]] == [one.header.digest, other.header.digest]
    assert [(p["operation"], p["first_part"], p["num_samples"]) for p in merged.header.parents] == [
        ("merge", 0, 6),
        ("merge", 3, 6),
    ]
    assert merged.header.spec == one.header.spec
    assert data_sections(merged.header) == [{"path": "one.jsonl"}, {"path": "two.jsonl"}]
    third = build_from(tmp_path / "c", named_case("c", 2), data="three")
    all_three = merge([merged, third], tmp_path / "three")
    assert_holds(all_three, merged, third)
    small = prune(all_three, tmp_path / "small", where="part < 4", top_k=2)
    assert [one["path"] for one in data_sections(small.header)] == ["one.jsonl", "two.jsonl", "three.jsonl"]
    assert data_sections(one.header) == [{"path": "one.jsonl"}]
    assert data_sections(header_of(standard_case())) == []
    assert [file_bytes(cache.path) for cache in (one, other)] == before


def test_two_halves_of_a_cache_come_together_again(tmp_path: Path) -> None:
    source, _ = two(tmp_path)
    rows = prune(source, tmp_path / "rows", tokens="entropy>2")
    one = prune(rows, tmp_path / "one", where="part == 0")
    other = prune(rows, tmp_path / "other", where="part > 0")
    assert_holds(merge([one, other], tmp_path / "both"), one, other)
    fewer = prune(rows, tmp_path / "fewer", where="part > 0", top_k=2)
    with pytest.raises(FingerprintMismatchError, match=r"`prune.2.top_k`: .*one` has nothing, .*fewer` has 2"):
        merge([one, fewer], tmp_path / "no")


def test_samples_in_two_caches(tmp_path: Path) -> None:
    one, _ = two(tmp_path)
    again = build_from(tmp_path / "again", named_case("a", 3), data="again")
    with pytest.raises(DataError, match=r"6 samples are in both .*/a` and .*/again`: 'a0', 'a1', 'a2', ...; leave"):
        merge([one, again], tmp_path / "both")
    with pytest.raises(DataError, match="6 samples are in both"):
        merge([one, one], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_another_teacher_or_other_settings(tmp_path: Path) -> None:
    one, _ = two(tmp_path)
    header = header_of(named_case("z", 1))
    for number, (changes, message) in enumerate(
        [
            ({"fingerprint": {**header.fingerprint, "teacher": "huge"}}, r'`teacher`: .*a` has "tiny", .* has "huge"'),
            ({"top_k": [6, 6, 5]}, r"`top_k`: .* has \[6, 6, 6\], .* has \[6, 6, 5\]"),
            ({"profile": "exact"}, r'`profile`: .* has "default", .* has "exact"'),
            ({"taus": [1.0, 2.0]}, "`taus`"),
        ]
    ):
        case = make_case([[2]], ["z"], num_layers=3)
        if "top_k" in changes:
            case = narrowed(case, [np.array([[6, 6], [6, 6], [5, 5]])])
        if "taus" in changes:
            rows = case.parts[0].rows
            assert rows is not None
            case.parts[0] = replace(case.parts[0], rows=replace(rows, lse_LTn=np.repeat(rows.lse_LTn, 2, axis=-1)))
        other = build_with(tmp_path / str(number), case, header_of(case).model_copy(update=changes))
        with pytest.raises(FingerprintMismatchError, match=message):
            merge([one, other], tmp_path / "both")
    fewer = build_from(tmp_path / "layers", make_case([[2]], ["z"], num_layers=2), data="x")
    with pytest.raises(FingerprintMismatchError, match=r"`layers`: .* has \[1, 2, 3\], .* has \[1, 2\]"):
        merge([one, fewer], tmp_path / "both")


def test_sources_and_targets_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two(tmp_path)
    case = named_case("h", 4)
    CacheWriter.create_or_resume(tmp_path / "half", header_of(case), case.vocab_order).write_part(0, case.parts[0])
    (tmp_path / "thesis.tex").write_text("mine")
    for caches, out, error, message in (
        ([one], "both", SpecError, "at least two caches, got 1"),
        ([], "both", SpecError, "at least two caches, got 0"),
        ([one, other], "a", SpecError, "is or lies in the source"),
        ([one, other], "b/parts/x", SpecError, "is or lies in the source"),
        ([one, other], "thesis.tex", SpecError, "is a file"),
        ([one, other], ".", SpecError, "not empty and not a cache"),
        ([one, tmp_path / "half"], "both", CacheIncompleteError, "1 of 3 parts"),
        ([one, tmp_path / "nowhere"], "both", CacheNotFoundError, "does not exist"),
    ):
        with pytest.raises(error, match=message):
            merge(caches, tmp_path / out)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
        with pytest.raises(DiskFullError, match="1000 are free"):
            merge([one, other], tmp_path / "both")
    assert not (tmp_path / "both").exists()
    merge([one, other], tmp_path / "both")
    with pytest.raises(FingerprintMismatchError, match=r"`data.sources`: the cache has .*, this run has"):
        merge([other, one], tmp_path / "both")


def test_a_cache_without_samples(tmp_path: Path) -> None:
    one, _ = two(tmp_path)
    empty = build_from(tmp_path / "none", make_case([], [], num_layers=3), data="x")
    empty_part = build_from(tmp_path / "part", make_case([[]], [], num_layers=3), data="y")
    assert_holds(merge([empty, one, empty_part], tmp_path / "both"), one)


def test_unfinished_says_how_to_go_on_and_goes_on(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    merge([one, other], tmp_path / "both")
    whole = copy_cache(tmp_path / "both", tmp_path / "whole")
    (tmp_path / "both" / "parts" / "000004.zarr").rename(tmp_path / "away")
    with pytest.raises(CacheIncompleteError, match=r"5 of 6 parts .* run: vlsi-cache merge .*/a .*/b -o .*/both"):
        reader.open(tmp_path / "both")
    merge([one, other], tmp_path / "both")
    assert file_bytes(tmp_path / "both" / "parts") == file_bytes(whole / "parts")


def test_an_epoch_reads_every_sample(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    merged = merge([one, prune(other, tmp_path / "fewer", where="part > 0")], tmp_path / "both")
    small = prune(merged, tmp_path / "small", tokens="entropy>4")  # leaves samples without rows
    assert 0 in small.sample_table()["num_tokens"].to_pylist()
    for cache in (merged, small):
        rows = list(PartWindowReader(cache, layers=[1, "last"], seed=0, epoch=0))
        assert sorted(row.sample_id for row in rows) == sorted(cache)
        assert sum(row.num_tokens for row in rows) == cache.num_tokens


def test_token_texts_are_kept(tmp_path: Path) -> None:
    case = named_case("t", 0)
    writer = CacheWriter.create_or_resume(
        tmp_path / "t", header_of(case), case.vocab_order, token_texts=lambda: ["x"] * 100
    )
    for index in writer.missing_parts():
        writer.write_part(index, case.parts[index])
    writer.finish()
    other = build(tmp_path / "u", named_case("u", 1))
    assert merge([tmp_path / "t", other], tmp_path / "both").token_text(5) == "x"
