"""`ls` beside processes that write: nothing of theirs is ever called unreadable."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.fakes import write_run
from vlsi_cache_cli import look
from vlsi_cache_cli.look import find_artifacts

from vlsi_cache.io import write_atomically
from vlsi_cache.runs.checkpoints import Checkpoints

NUM_LISTINGS = 150


@contextmanager
def at_work(step: Callable[[int], None]) -> Iterator[None]:
    """A thread that does one step after the other, without rest."""

    def work() -> None:
        number = 0
        while not stop.is_set():
            step(number)
            number += 1

    stop = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_live_run_is_never_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "NUM_LOOKS", 1)  # not even for a moment
    monkeypatch.setattr("os.fsync", lambda _: None)
    write_run(tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    model, checkpoints = torch.nn.Linear(2, 2), Checkpoints(tmp_path / "run")

    def step(number: int) -> None:
        write_atomically(tmp_path / "run" / "run.json", json.dumps({**record, "status": "running"}))
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "sft", "ste')
        checkpoints.save("sft", number, model, None)

    with at_work(step):
        states = {find_artifacts(tmp_path)[0]["state"] for _ in range(NUM_LISTINGS)}
    assert states <= {"running", "done"}


def test_a_run_that_comes_and_goes_is_there_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "NUM_LOOKS", 1)
    write_run(tmp_path / "one")
    text = (tmp_path / "one" / "run.json").read_text()

    def step(number: int) -> None:
        folder = tmp_path / f"run-{number % 3}"
        folder.mkdir()
        write_atomically(folder / "run.json", text)
        shutil.rmtree(folder)

    monkeypatch.setattr("os.fsync", lambda _: None)
    with at_work(step):
        found = [one for _ in range(NUM_LISTINGS) for one in find_artifacts(tmp_path)]
    assert {one["state"] for one in found} == {"done"}
