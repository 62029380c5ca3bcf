"""A disk that is full, at any byte: says how much is missing, leaves nothing half-visible, and the build can go on."""

import builtins
import errno
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.caches import build, file_bytes, header_of, make_case, standard_case
from helpers.variants import build_variant, plain, variant_of

from vlsi_cache.errors import DiskFullError
from vlsi_cache.store import reader, writer
from vlsi_cache.store.check import verify
from vlsi_cache.store.writer import CacheWriter

MESSAGE = r"bytes .* are needed for the next write, \d+ are free, \d+ .* are missing; nothing committed is lost: free"


class FullDisk:
    """Files below `root` take `room` bytes more in all, then writing fails, part of the last write being done."""

    def __init__(self, root: Path, room: int) -> None:
        self.root, self.room, self.open, self.write = str(root), room, io.open, os.write

    def take(self, wanted: int) -> int:
        given = min(wanted, self.room)
        self.room -= given
        if not given and wanted:
            raise OSError(errno.ENOSPC, "No space left on device")
        return given

    def opened(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, int) or not str(file).startswith(self.root) or not set("wax+") & set(mode):
            return self.open(file, mode, *args, **kwargs)
        assert "b" in mode, mode  # the store writes bytes
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                return super().write(view[: disk.take(len(view))])

        return io.BufferedWriter(Raw(file, mode.replace("b", "")))


@contextmanager
def full_disk(root: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FullDisk]:
    disk = FullDisk(root, room)
    with monkeypatch.context() as patch:
        patch.setattr(io, "open", disk.opened)
        patch.setattr(builtins, "open", disk.opened)
        patch.setattr(os, "write", lambda fd, data: disk.write(fd, bytes(data)[: disk.take(len(data))]))
        yield disk


def written_bytes(root: Path, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    with full_disk(root, 10**9, monkeypatch) as disk:
        work()
    return 10**9 - disk.room


def nothing_half_visible(root: Path) -> None:
    if (root / "cache.json").exists():
        cache = reader.open(root, allow_incomplete=True)
        for index in cache.parts:
            cache.read_part(index)
    if (root / "tmp").exists():
        assert list((root / "tmp").iterdir()) == []


@pytest.mark.parametrize("name", ["chosen-default", "per-layer-fast", "sampled-exact"])
def test_full_at_any_byte(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, root = variant_of(name), tmp_path / "c"
    total = written_bytes(root, lambda: build_variant(root, variant), monkeypatch)
    on_disk = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    assert total >= on_disk > 30_000  # all that the store writes goes through the layer that fails
    want = file_bytes(root)
    shutil.rmtree(root)
    for room in [0, 1, 500, *np.linspace(1000, total - 1, 12).astype(int).tolist()]:
        with full_disk(root, room, monkeypatch), pytest.raises(DiskFullError, match=MESSAGE):
            build_variant(root, variant)
        nothing_half_visible(root)
        build_variant(root, variant)
        assert verify(root, deep=True).ok
        assert file_bytes(root) == want, room
        shutil.rmtree(root)


def test_a_full_disk_reaches_who_makes_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, root = standard_case(), tmp_path / "c"
    want = file_bytes(build(tmp_path / "whole", case) / "parts")
    cache = CacheWriter.create_or_resume(root, header_of(case), case.vocab_order)

    def make_rows() -> None:
        with cache.in_background() as queue:
            for index in range(3):
                queue.put(index, case.parts[index])
                for _ in range(200):
                    queue.check()
                    time.sleep(0.005)

    with full_disk(root, 20_000, monkeypatch), pytest.raises(DiskFullError, match=MESSAGE) as error:
        make_rows()
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.ENOSPC
    assert not [one for one in threading.enumerate() if one.name.startswith("vlsi-cache-write")]
    nothing_half_visible(root)
    assert len(reader.open(root, allow_incomplete=True).parts) == 1
    build(root, case)
    assert file_bytes(root / "parts") == want


def test_leaving_the_queue_raises_the_error_of_the_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = standard_case()
    cache = CacheWriter.create_or_resume(tmp_path / "c", header_of(case), case.vocab_order)
    with (
        full_disk(tmp_path / "c", 3000, monkeypatch),
        pytest.raises(DiskFullError, match=MESSAGE),
        cache.in_background() as queue,
    ):
        queue.put(2, case.parts[2])


def test_an_error_in_the_background_ends_the_process(tmp_path: Path) -> None:
    """No thread is left that keeps it alive, and the cause is what it prints."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from dataclasses import replace
from helpers.caches import header_of, standard_case
from vlsi_cache.store.writer import CacheWriter
case = standard_case()
writer = CacheWriter.create_or_resume({str(tmp_path / "c")!r}, header_of(case), case.vocab_order)
rows = case.parts[0].rows
with writer.in_background() as queue:
    queue.put(0, replace(case.parts[0], rows=replace(rows, entropy_LT=rows.entropy_LT * float("nan"))))
    queue.put(1, case.parts[1])
    queue.put(2, case.parts[2])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "DataError: part 0 cannot be written" in done.stderr
    assert "`entropy_LT` is not a number in sample 'sample-0'" in done.stderr


def test_an_error_of_the_caller_is_not_hidden_and_its_parts_are_kept(tmp_path: Path) -> None:
    case = standard_case()
    cache = CacheWriter.create_or_resume(tmp_path / "c", header_of(case), case.vocab_order)

    def stop() -> None:
        with cache.in_background() as queue:
            queue.put(0, case.parts[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert cache.missing_parts() == [1, 2]


def test_no_more_than_two_parts_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([[1]] * 12, [f"s{index}" for index in range(12)])
    cache = CacheWriter.create_or_resume(tmp_path / "c", header_of(case), case.vocab_order)
    written: list[int] = []
    handed = 0

    def slowly(_: CacheWriter, index: int, __: object) -> bool:
        time.sleep(0.02)
        written.append(index)
        return True

    monkeypatch.setattr(CacheWriter, "write_part", slowly)
    waiting, was_full = [], 0
    with cache.in_background() as queue:
        for index, part in enumerate(case.parts):
            queue.put(index, part)
            handed += 1
            waiting.append(handed - len(written))
            was_full += queue.is_full
    assert max(waiting) == writer.MAX_WAITING_PARTS == 2
    assert was_full > 5
    assert written == list(range(12))


@pytest.mark.slow
def test_a_real_file_system_that_is_full(tmp_path: Path) -> None:
    """A tmpfs of 3 MiB: two parts fit, the third does not; with more room the same build goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"`mount` is not permitted here: {mounted.stderr.strip()}")
    try:
        variant = plain("exact", [[400], [400], [400], [400], [400]])
        want = file_bytes(build_variant(tmp_path / "whole", variant))
        filler = disk / "filler"
        for free in (1 << 19, (1 << 20) + 60_000, (1 << 20) + 150_000):
            filler.write_bytes(bytes((3 << 20) - free))
            with pytest.raises(DiskFullError, match=MESSAGE):
                build_variant(disk / "c", variant)
            nothing_half_visible(disk / "c")
            filler.unlink()
        # the space that is checked beforehand is there, and is gone when it is used
        usage = shutil.disk_usage(disk)
        filler.write_bytes(bytes(usage.free - 20_000))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: usage)
            with pytest.raises(DiskFullError, match="nothing committed is lost"):
                build_variant(disk / "c", variant)
        nothing_half_visible(disk / "c")
        filler.unlink()
        build_variant(disk / "c", variant)
        assert file_bytes(disk / "c") == want
    finally:
        subprocess.run(["umount", str(disk)], check=True)
