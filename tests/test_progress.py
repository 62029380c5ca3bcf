"""Progress: a bar at a terminal and in a notebook, a line a minute elsewhere, and nothing once stderr is nowhere."""

import contextlib
import io
import re
import time
from pathlib import Path
from typing import Any

import pytest
import tqdm.auto

from vlsi_cache import progress as module
from vlsi_cache.progress import Bar, progress, say

ROOT = Path(__file__).parent.parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_where_there_is_no_terminal_a_line_comes_while_a_step_is_still_at_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_S", 0.05)
    with Bar("build", unit="tok", total=4000, done=1000, scaled=True) as bar:
        bar.update(500)
        bar.note("waits")
        deadline = time.monotonic() + 5
        err = ""
        while not err and time.monotonic() < deadline:  # nothing is updated meanwhile
            time.sleep(0.01)
            err += capsys.readouterr().err
        bar.update(2500)
    assert re.fullmatch(r"build: +38% 1\.50k/4\.00k \[.*tok/s, waits\]", err.splitlines()[0])
    assert re.match(r"build: 100% 4\.00k/4\.00k", capsys.readouterr().err.splitlines()[-1])


def test_work_that_takes_less_than_a_line_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress("abc", "read", unit="row")) == ["a", "b", "c"]
    assert module.LINE_S == 60
    assert capsys.readouterr().err == ""


def test_a_loop_that_is_left_early_leaves_no_thread_behind() -> None:
    import threading

    before = threading.active_count()
    for _ in progress(iter(range(9)), "read", unit="row"):
        break
    with contextlib.suppress(RuntimeError), Bar("build", unit="tok"):
        raise RuntimeError
    assert threading.active_count() == before


def test_a_terminal_has_a_bar() -> None:
    screen = Terminal()
    with contextlib.redirect_stderr(screen):
        for _ in progress(range(3), "perplexity", unit="batch", done=2):
            say("a line above it")
    shown = screen.getvalue()
    assert "a line above it\n" in shown
    assert "5/5" in shown
    assert "perplexity" in shown


def test_a_notebook_has_a_bar_though_it_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Fake(tqdm.auto.tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(options)
            super().__init__(*args, **options, file=io.StringIO())

    Fake.__module__ = "tqdm.notebook"
    monkeypatch.setattr(tqdm.auto, "tqdm", Fake)
    list(progress(range(3), "train", unit="step"))
    assert [(one["desc"], one["total"]) for one in made] == [("train", 3)]
    assert not made[0].get("disable")


def test_all_progress_goes_through_one_module() -> None:
    files = [*(ROOT / "vlsi_cache").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    assert [file.name for file in files if "tqdm" in file.read_text(encoding="utf-8")] == ["progress.py"]
