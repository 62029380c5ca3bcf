"""A folder that takes the place of another: killed at any line, the old or the new one is whole under its name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlsi_cache import io
from vlsi_cache.io import put_all_back, replacing

# A child for every line of io.py and shutil.py that runs: it dies on that line, as by `kill -9`.
KILLS = """
import json, os, shutil, sys
from pathlib import Path
from vlsi_cache import io

os.fsync = lambda handle: None  # waits, and changes nothing that a kill could show
root, exchanges = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not exchanges:
    io._exchange = lambda one, other: False
watched, found = (io.__file__, shutil.__file__), []

def content(folder):
    return {file.name: file.read_text() for file in sorted(folder.iterdir())} if folder.is_dir() else None

for number in range(1, 100_000):
    here = root / str(number)
    target = here / "student"
    target.mkdir(parents=True)
    for name in "ab":
        (target / name).write_text("old")
    child = os.fork()
    if not child:
        left = number
        def trace(frame, event, _):
            global left
            if frame.f_code.co_filename not in watched:
                return trace if "contextlib" in frame.f_code.co_filename else None
            left -= event == "line"
            if not left:
                os._exit(9)
            return trace
        sys.settrace(trace)
        with io.replacing(target) as new:
            new.mkdir()
            for name in "ab":
                (new / name).write_text("new")
        sys.settrace(None)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    before = content(target)
    io.put_all_back(here)
    found.append([code, before, content(target), sorted(e.name.split("-")[0] for e in here.iterdir())])
    if code == 0:
        break
print(json.dumps(found))
"""
OLD, NEW = ({"a": age, "b": age} for age in ("old", "new"))


def killed_everywhere(folder: Path, how: str) -> list[list]:
    done = subprocess.run([sys.executable, "-c", KILLS, str(folder), how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [code for code, *_ in found] == [9] * (len(found) - 1) + [0]
    return found


def can_exchange(folder: Path) -> bool:
    for name in "ab":
        (folder / name).mkdir()
    return io._exchange(folder / "a", folder / "b")


def test_with_an_exchange_the_name_is_never_gone(tmp_path: Path) -> None:
    if not can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange two names")
    found = killed_everywhere(tmp_path / "kills", "exchange")
    assert len(found) > 30
    assert all(before in (OLD, NEW) for _, before, _, _ in found)
    kinds = [before for _, before, _, _ in found]
    assert kinds == sorted(kinds, key=lambda kind: kind == NEW)  # first the old one, from one moment on the new one
    assert found[-1][1:] == [NEW, NEW, ["student"]]


def test_without_one_the_old_folder_is_put_back_by_the_next_start(tmp_path: Path) -> None:
    found = killed_everywhere(tmp_path, "rename")
    assert len(found) > 30
    assert None in [before for _, before, _, _ in found]  # killed between the two renames
    assert all(after in (OLD, NEW) for _, _, after, _ in found)
    assert not any(".student.old" in left for _, _, _, left in found)
    assert found[-1][1:] == [NEW, NEW, ["student"]]


def test_what_is_set_aside_comes_back_under_its_own_name_alone(tmp_path: Path) -> None:
    first, second = (f"old-{digit * 32}" for digit in "1e")
    for name in (f".a.b.{first}", f".c.{second}", "c", ".hidden", f"d.{first}", ".e.old-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    put_all_back(tmp_path)
    assert {entry.name: (entry / "is").read_text() for entry in tmp_path.iterdir()} == {
        "a.b": f".a.b.{first}",
        "c": "c",
        **{name: name for name in (".hidden", f"d.{first}", ".e.old-mine")},
    }


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "mine").write_text("mine")
    (tmp_path / "student").symlink_to("real")
    with replacing(tmp_path / "student") as new:
        new.mkdir()
    assert (tmp_path / "real" / "mine").read_text() == "mine"
    assert not (tmp_path / "student").is_symlink()
    assert {entry.name for entry in tmp_path.iterdir()} == {"real", "student"}
