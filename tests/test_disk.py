"""What training writes is on the disk before anything relies on it, and a full disk is one error that says so."""

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

import vlsi_cache as vc
from vlsi_cache import io
from vlsi_cache.errors import DiskFullError
from vlsi_cache.models import verbalizer_files
from vlsi_cache.runs import checkpoints
from vlsi_cache.store import files

Work = Callable[[Path, int], object]


def write_checkpoint(folder: Path, step: int) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoints.Checkpoints(folder).save("sft", step, model, optimizer)


def write_verbalizer(folder: Path, step: int) -> None:
    verbalizer_files.write(folder, {step: {"weight": torch.ones(2)}}, {"structure": "mlp"}, {"teacher_digest": "a"})


@pytest.fixture
def write_model(teacher_folder: Path) -> Work:
    return lambda folder, step: vc.init_student(str(teacher_folder), layers=str(step), out=folder / "student")


@pytest.fixture(params=["checkpoint", "verbalizer", "model"])
def write(request: pytest.FixtureRequest, write_model: Work) -> Work:
    return {"checkpoint": write_checkpoint, "verbalizer": write_verbalizer, "model": write_model}[request.param]


def test_nothing_gets_its_name_or_replaces_another_before_it_is_on_the_disk(
    write: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[str] = set()
    renames: list[Path] = []
    fsync, replace, exchange, rmtree = os.fsync, Path.replace, io._exchange, shutil.rmtree

    def noted_fsync(handle: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def note(new: Path, target: Path) -> None:
        inside = [new, *new.rglob("*")]
        assert {str(path) for path in inside} <= flushed
        flushed.discard(str(target.parent))
        renames.append(target)

    def noted_replace(self: Path, target: Path) -> Path:
        note(self, target)
        return replace(self, target)

    def noted_exchange(new: Path, target: Path) -> bool:
        note(new, target)
        if exchange(new, target):
            return True
        renames.pop()
        return False

    def noted_rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.startswith("sft-"):  # an older checkpoint: the new one must have its name by now
            assert str(path.parent) in flushed
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    monkeypatch.setattr(io, "_exchange", noted_exchange)
    monkeypatch.setattr(shutil, "rmtree", noted_rmtree)
    for step in (1, 2):
        write(tmp_path, step)
    assert len(renames) >= 2
    assert {str(target.parent) for target in renames} <= flushed


def test_a_full_disk_is_one_error_and_leaves_what_was_there(
    write: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, file: Path, *_args: Any, **_more: Any) -> None:
        path = file / "model.safetensors" if file.is_dir() else file
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    write(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for module in (checkpoints, verbalizer_files):
        monkeypatch.setattr(module, "save_file", full)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(DiskFullError, match=f"`{tmp_path}/.*could not be written.* bytes .* same command again"):
        write(tmp_path, 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("write", [io.write_atomically, lambda file, data: files.replace_file(file.parent, file, data)])
def test_a_file_that_may_not_be_so_large_is_named(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    """A limit of the process (`ulimit -f`): the system's error for a write says no name."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}") as caught:
            write(tmp_path / "large.json", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not isinstance(caught.value, DiskFullError)
    assert list(tmp_path.glob("*large*")) == []
