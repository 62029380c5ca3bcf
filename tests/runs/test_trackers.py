"""`run.track`: what trackers are given, read back by TensorBoard and by Weights & Biases themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import metrics_of
from helpers.tiny import write_spec

import vlsi_cache as vc
from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.errors import SpecError
from vlsi_cache.runs import trackers
from vlsi_cache.runs.metrics import MetricsLog
from vlsi_cache.runs.trackers import Trackers, numbers

LINE = {"loss": 2.0, "tokens_per_s": 10.0, "data_wait_pct": 0.0, "num_steps": 3}


def test_the_numbers_of_a_line() -> None:
    line = {
        "stage": "interact",
        "step": 3,
        "loss": 1.5,
        "memory_gib": None,
        "teacher_layers": [1, 2, 3],
        "layers": {"1": 0.5, "2": None},
        "matched_layers": [[1, 3], [], [2, 3]],
        "probe": {"last": {"kl": 0.25}},
    }
    assert numbers(line) == {
        "interact/loss": 1.5,
        "interact/layers/1": 0.5,
        "interact/matched_layers/1": 1.5,
        "interact/matched_layers/2": 3.0,
        "interact/probe/last/kl": 0.25,
    }


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, teacher_folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    spec = vc.load_spec(write_spec(tmp_path, teacher_folder), overrides=["run.track=[wandb]"])
    with pytest.raises(SpecError, match=r"names wandb, which is not installed.*vlsi-cache\[track\]"):
        vc.train_verbalizers(spec, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, spec: CacheSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def log(self, *_: Any, **__: Any) -> None:
            raise OSError("no space")

    monkeypatch.setattr(Trackers, "_start", lambda self, name, _: self._running.update({name: Broken()}))
    log = MetricsLog(tmp_path, trackers=Trackers(tmp_path, spec, "distill"))
    log.start_stage("sft", step=0, num_steps=3)
    for step in (1, 2, 3):
        log.write(stage="sft", step=step, **LINE)
    log.close()
    assert len(metrics_of(tmp_path)) == 3
    assert capsys.readouterr().err.count("tensorboard is left out from here on (OSError: no space)") == 1


@pytest.fixture
def spec(teacher_folder: Path, tmp_path: Path) -> CacheSpec:
    return vc.load_spec(write_spec(tmp_path, teacher_folder), overrides=["run.track=[tensorboard]"])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_steps_count_on_and_those_of_a_lost_attempt_are_dropped(spec: CacheSpec, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for first, loss in ((0, 2.0), (2, 1.0)):
        log = MetricsLog(tmp_path, trackers=Trackers(tmp_path, spec, "distill"))
        if not first:
            log.start_stage("interact", step=0, num_steps=1)
            log.write(stage="interact", step=1, **LINE)
        log.start_stage("sft", step=first, num_steps=3)
        for step in range(first + 1, 4):
            log.write(stage="sft", step=step, **{**LINE, "loss": loss})
        log.close()
    found = scalars(tmp_path)
    assert found["interact/loss"] == [(1, 2.0)]
    assert found["sft/loss"] == [(2, 2.0), (3, 2.0), (4, 1.0)]


def wandb_history(content: bytes) -> list[dict[str, Any]]:
    """The rows in a file of an offline run that is smaller than one block (32 KiB): after 7 bytes, records of a
    checksum (4), a length (2), a kind (1) and a message."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    rows, place = [], 7
    while place < len(content):
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        assert content[place + 6] == 1  # whole
        record = messages.Record.FromString(content[place + 7 : place + 7 + length])
        if record.HasField("history"):
            named = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
            rows.append({key: json.loads(value) for key, value in named})
        place += 7 + length
    return rows


def test_a_distilled_student_is_tracked_by_both(
    teacher_folder: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    cache = vc.build_teacher(vc.load_spec(write_spec(tmp_path, teacher_folder)), out=tmp_path / "cache")
    short = [f"distill.{stage}.steps=2" for stage in ("verbalize", "interact.schedule", "sft.schedule")]
    changes = ["run.track=[wandb, tensorboard]", *short]
    run = vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=changes)
    lines, found = metrics_of(run), scalars(run)
    assert len(lines) == 6
    for number, line in enumerate(lines):
        for name, value in numbers(line).items():
            assert (number + 1, pytest.approx(value, rel=1e-6)) in found[name], name
    (file,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    rows = wandb_history(file.read_bytes())
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, line in zip(rows, lines, strict=True):
        assert numbers(line).items() <= row.items()
