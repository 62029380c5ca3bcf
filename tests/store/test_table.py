"""`samples.parquet`: written back when it is missing, never depended on, and opening looks at little else."""

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers.caches import copy_cache, file_bytes

from vlsi_cache.errors import CacheCorruptError
from vlsi_cache.store import check, files, part, reader, table
from vlsi_cache.store.check import verify
from vlsi_cache.store.format import CacheHeader, PartRecord


def test_a_missing_table_is_written_back(root: Path) -> None:
    want = file_bytes(root)
    (root / "samples.parquet").unlink()
    samples = reader.open(root).sample_table()
    assert file_bytes(root) == want  # nothing is left in tmp/ either
    assert pq.read_table(root / "samples.parquet").replace_schema_metadata(None) == samples


def test_damaged_pages_are_noticed_when_they_are_read(root: Path) -> None:
    path, want = root / "samples.parquet", reader.open(root).sample_table()
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 4]) + content[201:])
    assert reader.open(root).sample_table() == want


def test_a_folder_that_cannot_be_written_is_said_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "samples.parquet").unlink()

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(table, "replace_file", refuse)
    with pytest.warns(UserWarning, match=r"samples\.parquet` cannot be written \(Read-only file system\)") as said:
        assert len(reader.open(root)) == 7
    assert len(said) == 1
    assert not (root / "samples.parquet").exists()


def test_an_unfinished_cache_gets_no_table(root: Path, tmp_path: Path) -> None:
    half = copy_cache(root, tmp_path / "half")
    (half / "samples.parquet").unlink()
    for name in (half / "parts" / "000002.zarr").rglob("*"):
        if name.is_file():
            name.unlink()
    os.rename(half / "parts" / "000002.zarr", tmp_path / "away")
    assert len(reader.open(half, allow_incomplete=True)) == 5
    assert not (half / "samples.parquet").exists()


def test_opening_with_the_table_reads_no_record_and_looks_at_one_file_a_part(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    lstat = os.lstat

    def count(path: Any, **options: Any) -> os.stat_result:
        looked.append(str(path))
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", count)
    monkeypatch.setattr(files, "load_part_record", None)
    monkeypatch.setattr(table, "load_part_record", None)
    reader.open(root)
    in_parts = [Path(name).name for name in looked if "/parts/" in name]
    assert in_parts == ["part.json"] * 3


def test_verify_reads_each_record_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    load = check.load_part_record

    def count(root: Path, header: CacheHeader, index: int) -> PartRecord:
        read.append(index)
        return load(root, header, index)

    monkeypatch.setattr(check, "load_part_record", count)
    monkeypatch.setattr(part, "load_part_record", None)
    monkeypatch.setattr(table, "load_part_record", None)
    assert verify(root).ok
    assert read == [0, 1, 2]


@pytest.mark.parametrize("has_table", [True, False])
def test_a_lost_file_is_noticed_when_its_part_is_read(root: Path, has_table: bool) -> None:
    (root / "parts/000001.zarr/ids/c/0/0/0").unlink()
    if not has_table:
        (root / "samples.parquet").unlink()
    cache = reader.open(root)
    cache.read_part(0)
    with pytest.raises(CacheCorruptError, match=r"000001\.zarr/ids/c/0/0/0` is missing"):
        cache.read_part(1)
    assert [problem.file for problem in verify(root).problems] == ["parts/000001.zarr/ids/c/0/0/0"]


def test_the_old_kind_of_table_is_replaced(root: Path) -> None:
    """Tables of earlier releases list every file under one key."""
    path = root / "samples.parquet"
    old = pq.read_table(path).replace_schema_metadata({b"vlsi_cache.parts": b'{"files": [], "sizes": {}, "xxh3": "0"}'})
    pq.write_table(old, path)
    assert len(reader.open(root)) == 7
    assert verify(root).ok
