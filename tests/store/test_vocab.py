"""The rank table and its second copy: each is judged by itself, what is broken in one is taken from the other."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.caches import Case, build, file_bytes
from helpers.damage import flip

from vlsi_cache.errors import CacheCorruptError
from vlsi_cache.store import header, reader
from vlsi_cache.store.check import repair, verify
from vlsi_cache.store.format import sealed_json


@pytest.mark.parametrize("name", ["vocab", "vocab-copy"])
def test_each_copy_of_the_rank_table_is_restored_from_the_other(root: Path, built: Path, name: str) -> None:
    want = file_bytes(built / "vocab")
    flip(root / name / "heads" / "c" / "0" / "0", 77)
    assert {problem.file for problem in verify(root).problems} == {f"{name}/heads/c/0/0"}
    report = repair(root)
    assert (report.quarantined, report.restored) == ([name], [name])
    assert f"{name}: restored from the other copy" in str(report)
    shutil.rmtree(root / name)
    assert verify(root).ok is (name == "vocab-copy")  # a cache may do without the second copy
    assert repair(root).restored == [name]
    assert file_bytes(root / "vocab") == file_bytes(root / "vocab-copy") == want
    assert verify(root, deep=True).ok


def test_a_rank_table_damaged_in_both_copies_is_put_together(root: Path, built: Path) -> None:
    (root / "vocab" / "id_of_rank" / "c" / "0").write_bytes(b"")
    (root / "vocab-copy" / "zarr.json").unlink()
    assert repair(root).restored == ["vocab", "vocab-copy"]
    assert file_bytes(root / "vocab") == file_bytes(root / "vocab-copy") == file_bytes(built / "vocab")


def test_a_lost_rank_table_is_only_made_again_if_it_is_the_same(root: Path, case: Case) -> None:
    for name in ("vocab", "vocab-copy"):
        flip(root / name / "id_of_rank" / "c" / "0", 200)
    assert repair(root).quarantined == ["vocab", "vocab-copy"]
    other = Case(case.parts, case.id_of_rank[::-1], case.num_layers, case.top_k, case.num_tail)
    with pytest.raises(CacheCorruptError, match=r"the table made anew is another .*cache.json says"):
        build(root, other)
    assert not (root / "vocab").exists()
    build(root, case)
    assert verify(root, deep=True).ok


def test_a_continued_build_takes_a_lost_table_from_the_copy(root: Path, case: Case, built: Path) -> None:
    shutil.rmtree(root / "vocab")
    build(root, Case(case.parts, case.id_of_rank[::-1], case.num_layers, case.top_k, case.num_tail))
    assert file_bytes(root / "vocab") == file_bytes(built / "vocab")
    assert verify(root, deep=True).ok


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "heads/../../x", "text/c/0"])
def test_names_in_the_header_cannot_leave_the_cache(root: Path, name: str) -> None:
    value = json.loads((root / "cache.json").read_text())
    del value["xxh3"]
    value["vocab_files"][name] = {"size": 1, "xxh3": "0" * 16}
    (root / "cache.json").write_bytes(sealed_json(value))
    shutil.rmtree(root / "vocab")
    with pytest.raises(CacheCorruptError, match="names what no table has"):
        repair(root)
    assert [problem.file for problem in verify(root).problems] == ["cache.json"]
    with pytest.raises(CacheCorruptError, match="names what no table has"):
        reader.open(root)


@pytest.mark.parametrize("file", ["heads/zarr.json", "heads/c/0/0", "id_of_rank/c/0"])
def test_a_table_damaged_before_there_is_a_header_costs_nothing(
    tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    root = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(header, "_create_header", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(root, case)
    (root / "vocab" / file).write_bytes(b"{}")
    with pytest.raises(CacheCorruptError, match=r"vocab` is damaged .*no part depends on it yet: delete this folder"):
        build(root, case)
    shutil.rmtree(root / "vocab")
    build(root, case)
    assert verify(root, deep=True).ok
