"""Ctrl-C and SIGTERM: the step in hand is finished and saved, the run says so, and goes on to the same bits."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import write_spec

import vlsi_cache as vc
from vlsi_cache.errors import InterruptedRunError
from vlsi_cache.interrupts import stopping_between_steps, terminating_as_interrupt
from vlsi_cache.report.pages import run_page
from vlsi_cache.runs.metrics import read_run
from vlsi_cache.store.reader import Cache

HANDLED = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Cache:
    folder = tmp_path_factory.mktemp("interrupts")
    return vc.build_teacher(vc.load_spec(write_spec(folder, teacher_folder)), out=folder / "cache")


@pytest.fixture(scope="module")
def whole(cache: Cache, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vc.distill(cache, student=str(student_folder), out=tmp_path_factory.mktemp("whole") / "run")


def send_in_step(monkeypatch: pytest.MonkeyPatch, stage: str, step: int, *numbers: int) -> None:
    """Signals that come in the middle of a step, from 1."""
    module = importlib.import_module(f"vlsi_cache.train.{stage}")
    original = module.clip_gradients

    def clip(optimizer: Any, schedule: Any, name: str, number: int, num_steps: int) -> None:
        if number + 1 == step:
            for one in numbers:
                os.kill(os.getpid(), one)
                time.sleep(0.01)  # Python runs the handler between two of its instructions
        original(optimizer, schedule, name, number, num_steps)

    monkeypatch.setattr(module, "clip_gradients", clip)


def weights(run: Path) -> bytes:
    return (run / "student" / "model.safetensors").read_bytes()


def test_a_run_interrupted_in_every_stage_ends_in_the_same_bits(
    cache: Cache, whole: Path, student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlsi_cache_cli.look import find_artifacts, listing_table

    run, before = tmp_path / "run", [signal.getsignal(number) for number in HANDLED]
    for stage, step, number in (
        ("verbalize", 1, signal.SIGTERM),
        ("interact", 3, signal.SIGINT),
        ("sft", 4, signal.SIGTERM),  # the last step: all is trained, and nothing merged yet
    ):
        with pytest.MonkeyPatch.context() as patch:
            send_in_step(patch, stage, step, number)
            with pytest.raises(InterruptedRunError) as caught:
                vc.distill(cache, student=str(student_folder), out=run)
        record = json.loads((run / "run.json").read_text())
        assert record["status"] == "interrupted"
        assert str(caught.value) == record["command"]
        assert str(caught.value).startswith("vlsi_cache.distill(")
        assert (run / "checkpoints" / f"{stage}-{step:07d}" / "checkpoint.json").is_file()
        assert f"{number.name}: the step in hand is finished" in capsys.readouterr().err
        assert [signal.getsignal(one) for one in HANDLED] == before
        assert "interrupted" in listing_table(find_artifacts(run))
        assert "vlsi; interrupted" in run_page(read_run(run))
    vc.distill(cache, student=str(student_folder), out=run)
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert weights(run) == weights(whole)
    clock = ("elapsed_s", "tokens_per_s", "data_wait_pct", "memory_gib")
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in clock} for line in read_run(path).metrics] for path in (run, whole)
    )
    assert ours == theirs


def test_a_second_signal_ends_the_step_at_once(
    cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_in_step(monkeypatch, "sft", 2, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(InterruptedRunError):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "run", recipe="sft")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []  # step 2 is not finished


def test_the_teacher_s_verbalizers_are_interrupted_in_the_same_way(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = vc.load_spec(write_spec(tmp_path, teacher_folder))
    with monkeypatch.context() as patch:
        send_in_step(patch, "verbalize", 3, signal.SIGTERM)
        with pytest.raises(InterruptedRunError):
            vc.train_verbalizers(spec, out=tmp_path / "cut")
    vc.train_verbalizers(spec, out=tmp_path / "cut")
    vc.train_verbalizers(spec, out=tmp_path / "whole")
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / name / "verbalizers").iterdir()}
        for name in ("cut", "whole")
    ]
    assert files[0] == files[1]


def test_a_signal_that_somebody_else_handles_stays_theirs() -> None:
    came: list[int] = []
    for theirs in (signal.SIG_IGN, lambda number, _: came.append(number)):
        before = signal.signal(signal.SIGTERM, theirs)
        try:
            with stopping_between_steps() as signals, terminating_as_interrupt():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                assert not signals.came
            assert signal.getsignal(signal.SIGTERM) is theirs
        finally:
            signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def test_outside_of_the_main_thread_no_signal_is_touched() -> None:
    def work() -> None:
        with stopping_between_steps() as signals:
            found.extend([signal.getsignal(number) for number in HANDLED])
            assert not signals.came

    found: list[Any] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(number) for number in HANDLED]


def test_a_command_that_is_terminated_ends_as_by_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlsi_cache_cli.output import run_guarded

    def work() -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(sys, "argv", ["vlsi-cache", "prune", "a", "-o", "b c"])
    before = signal.getsignal(signal.SIGTERM)
    assert run_guarded(work, as_json=False, quiet=True, verbose=False) == 130
    assert "interrupted; this goes on from here:\n  vlsi-cache prune a -o 'b c'" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_process_that_is_terminated_goes_on_to_the_same_bits(
    cache: Cache, whole: Path, student_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vlsi_cache_cli.main", "distill", str(cache.path), "--student"]
    command += [str(student_folder), "-o", str(run)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list(run.glob("checkpoints/interact-*")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted; this goes on from here:\n  vlsi-cache distill " in err
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert subprocess.run(command).returncode == 0
    assert weights(run) == weights(whole)
