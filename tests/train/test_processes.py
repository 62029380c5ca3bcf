"""Students and verbalizers trained by several processes of one launch: as by one, whatever their number."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launch import run_together
from helpers.runs import metrics_of
from helpers.tiny import write_spec
from transformers import AutoModelForCausalLM

import vlsi_cache as vc
from vlsi_cache.store.reader import Cache

CHANGES = ("distill.batch_size=6", "distill.micro_batch_size=1", "distill.lora.dropout=0.2", "run.workers=0")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Cache:
    folder = tmp_path_factory.mktemp("processes")
    return vc.build_teacher(vc.load_spec(write_spec(folder, teacher_folder)), out=folder / "cache")


@pytest.fixture(scope="module")
def alone(cache: Cache, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    return vc.distill(cache.path, student=str(student_folder), out=out, overrides=CHANGES)


def distilled(cache: Cache, student: Path, out: Path, world: int, *more: str) -> list[Any]:
    def work(_: int) -> Path:
        return vc.distill(cache.path, student=str(student), out=out, overrides=[*CHANGES, *more])

    return run_together(world, work)


def assert_same(run: Path, alone: Path) -> None:
    lines, wanted = metrics_of(run), metrics_of(alone)
    assert [(line["stage"], line["step"]) for line in lines] == [(line["stage"], line["step"]) for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert line.get("matched_layers") == other.get("matched_layers")
        for layer, loss in other.get("layers", {}).items():
            assert line["layers"][layer] == pytest.approx(loss, abs=1e-4)
    ids = torch.arange(3, 35)[None]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(one / "student")(ids).logits for one in (run, alone))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_trains_the_same_student(
    world: int, cache: Cache, alone: Path, student_folder: Path, tmp_path: Path
) -> None:
    assert distilled(cache, student_folder, tmp_path / "run", world) == [tmp_path / "run"] * world
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"
    assert (tmp_path / "run" / "report.html").is_file()
    assert_same(tmp_path / "run", alone)
