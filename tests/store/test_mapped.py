"""Memory-mapped parts (`fast`): damage is noticed when its block is first touched, and never kills the process."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers.damage import data_file, flip
from helpers.variants import build_variant, plain

from vlsi_cache.errors import CacheCorruptError
from vlsi_cache.store import reader
from vlsi_cache.store.check import verify


def test_a_mapped_block_is_checked_when_it_is_first_touched(tmp_path: Path) -> None:
    """Blocks of 1024 tokens: the damage lies in the last one, which the first sample does not reach."""
    root = build_variant(tmp_path / "c", plain("fast", [[1], [1000, 1200]]))
    for array in ("ids", "logprobs"):
        path = data_file(root, array)
        good = path.read_bytes()
        index_bytes = 16 * 3 * 3 + 4
        flip(path, 8 * (len(good) - index_bytes - 3000))
        cache = reader.open(root)
        assert cache["b"].num_tokens == 1000
        message = rf"000001\.zarr/{array}/c/0/0/0`: block 2, layer row 2: the checksum .*; run: vlsi-cache repair"
        with pytest.raises(CacheCorruptError, match=message):
            cache.row("c")
        with pytest.raises(CacheCorruptError, match=message):
            cache.row("c")  # not only the first time
        assert [problem.file for problem in verify(root).problems] == [f"parts/000001.zarr/{array}/c/0/0/0"]
        path.write_bytes(good)
    assert verify(root, deep=True).ok


def test_a_mapped_file_that_shrinks_does_not_kill_the_process(tmp_path: Path) -> None:
    """Shorter than recorded when it is first read, and cut while it is open: an error, no SIGBUS."""
    root = build_variant(tmp_path / "c", plain("fast", [[1], [1000, 1200]]))
    code = f"""
        import os
        from pathlib import Path
        from vlsi_cache.errors import CacheCorruptError
        from vlsi_cache.store import reader
        root, path = Path({str(root)!r}), Path({str(data_file(root, "ids"))!r})
        content = path.read_bytes()
        for cut in (0, 1, 5000, len(content) - 1):
            cache = reader.open(root)
            cache.part(1, undone=True)
            os.truncate(path, cut)
            try:
                cache.row("c")
                raise SystemExit("unnoticed while open")
            except CacheCorruptError as error:
                assert "has changed its size" in str(error) and "repair" in str(error), error
            try:
                reader.open(root).row("c")
                raise SystemExit("unnoticed when read")
            except CacheCorruptError as error:
                assert f"{{cut}} bytes, part.json says {{len(content)}}" in str(error), error
            path.write_bytes(content)
        assert reader.open(root).row("c").num_tokens == 1200
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
