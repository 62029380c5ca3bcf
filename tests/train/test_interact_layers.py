"""`interact.mode: layers`: the decoder layers' own weights train, nothing beside them, and a kill loses nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stopping import stop_after
from helpers.tiny import write_spec
from safetensors.torch import load_file

import vlsi_cache as vc
from vlsi_cache.errors import SpecError
from vlsi_cache.store.reader import Cache

PLAIN = ["distill.lora.rank=64", "distill.lora.alpha=64"]  # the defaults, not those of the spec
LAYERS = ["distill.interact.mode=layers", "distill.sft.mode=full", *PLAIN]
SHORT = ["distill.verbalize.steps=1"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Cache:
    folder = tmp_path_factory.mktemp("layers")
    spec = vc.load_spec(write_spec(folder, teacher_folder), overrides=SHORT)
    return vc.build_teacher(spec, out=folder / "cache")


@pytest.fixture(scope="module")
def whole(cache: Cache, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return vc.distill(cache, student=str(student_folder), out=out, overrides=LAYERS)


def test_the_decoder_layers_train_and_nothing_else(
    cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, "interact", 4)  # two steps beyond a checkpoint
        with pytest.raises(KeyboardInterrupt):
            vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=LAYERS)
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("interact-*"))
    before = load_file(student_folder / "model.safetensors")
    saved = load_file(checkpoint / "state.safetensors")
    trained = {key.removeprefix("parameter/"): value for key, value in saved.items() if key.startswith("parameter/")}
    assert set(trained) == {name for name in before if name.startswith("model.layers.")}
    assert not [name for name, value in trained.items() if torch.equal(value, before[name])]


@pytest.mark.parametrize("stage", ["interact", "sft"])
def test_a_killed_run_ends_in_the_same_weights(
    stage: str, cache: Cache, whole: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, stage, 3)
        with pytest.raises(KeyboardInterrupt):
            vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=LAYERS)
    run = vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=LAYERS)
    ours, theirs = (load_file(one / "student" / "model.safetensors") for one in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_on_trained_layers_is_refused(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"student": str(student_folder), "out": tmp_path / "run"}
    with pytest.raises(SpecError, match=r"say `sft.mode: full`"):
        vc.distill(cache, **options, overrides=LAYERS[:1])
    with pytest.raises(SpecError, match=r"`lora.rank`, `lora.alpha` belong to an adapter, and `interact.mode: layers`"):
        vc.distill(cache, **options, overrides=LAYERS[:2])
    assert not (tmp_path / "run").exists()
    # Reads neither: one spec serves all recipes.
    vc.distill(cache, **options, overrides=["distill.recipe=sft", *LAYERS[:2]])


def test_without_finetuning_its_mode_does_not_matter(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    runs = [
        vc.distill(
            cache, student=str(student_folder), out=tmp_path / name, overrides=[*changes, "distill.sft.fraction=0"]
        )
        for name, changes in (("full", LAYERS), ("adapter", [LAYERS[0], *PLAIN]))
    ]
    ours, theirs = (load_file(one / "student" / "model.safetensors") for one in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    before = load_file(student_folder / "model.safetensors")
    same = {name for name in ours if torch.equal(ours[name], before[name])}
    assert same == {name for name in ours if not name.startswith("model.layers.")}
