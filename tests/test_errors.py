"""Errors tell programs what they tell people: class, file, what is wrong, what to do; also from another process."""

import errno
import pickle
from pathlib import Path

import pytest
from helpers.caches import build, standard_case

import vlsi_cache as vc
from vlsi_cache import errors
from vlsi_cache.errors import CacheCorruptError, DiskFullError, RowError, VlsiCacheError, did_you_mean
from vlsi_cache.io import is_disk_full

CLASSES = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("kind", CLASSES)
def test_attributes_survive_a_trip_to_another_process(kind: type[VlsiCacheError]) -> None:
    place = {} if kind is RowError else {"file": "a/b.json", "hint": "run: vlsi-cache repair a"}
    error = kind("`a/b.json` is missing", **place)
    for one in (error, pickle.loads(pickle.dumps(error))):  # noqa: S301 - our own bytes
        assert one.what == "`a/b.json` is missing"
        assert (one.file, one.hint) == ((None, None) if kind is RowError else (Path("a/b.json"), place["hint"]))
        assert str(one) == "`a/b.json` is missing" + ("" if kind is RowError else "; run: vlsi-cache repair a")
    assert str(kind()) == ""


def test_a_full_disk_is_told_by_its_number() -> None:
    error = pickle.loads(pickle.dumps(DiskFullError("full")))  # noqa: S301 - our own bytes
    assert (error.errno, is_disk_full(error), str(error)) == (errno.ENOSPC, True, "full")


def test_a_damaged_cache_names_file_and_remedy(tmp_path: Path) -> None:
    root = build(tmp_path / "cache", standard_case())
    file = root / "parts" / "000000.zarr" / "ids" / "c" / "0" / "0" / "0"
    file.unlink()
    with pytest.raises(CacheCorruptError, match="is missing; run: ") as caught:
        vc.open_cache(root)["sample-0"]
    assert caught.value.file == file
    assert caught.value.what == f"`{file}` is missing"
    assert caught.value.hint == f"run: vlsi-cache verify {root}, then vlsi-cache repair {root}"
    (root / "cache.json").write_text("{}")
    with pytest.raises(CacheCorruptError) as caught:
        vc.open_cache(root)
    assert (caught.value.file, caught.value.hint) == (root / "cache.json", "restore this file from a copy of the cache")


def test_guesses() -> None:
    assert did_you_mean("topk", ["top_k", "tail"]) == "; did you mean `top_k`?"
    assert did_you_mean("s-11", ["s-1", "s-12"], most=3, show=repr).startswith("; did you mean 's-1")
    assert did_you_mean("x", ["top_k"]) == ""
