"""Verbalizers that are given to a run: the same student as if it had trained them, and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import save_model, write_spec
from safetensors.torch import load_file

import vlsi_cache as vc
from vlsi_cache.errors import FingerprintMismatchError, ModelError, SpecError
from vlsi_cache.models.verbalizer_files import find_folder, read_record
from vlsi_cache.run_files import read_metrics
from vlsi_cache.store.reader import Cache
from vlsi_cache.train import interact as interact_module

SHORT = ["distill.verbalize.steps=3", "distill.interact.schedule.steps=3", "distill.sft.schedule.steps=2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Cache:
    folder = tmp_path_factory.mktemp("reuse")
    return vc.build_teacher(vc.load_spec(write_spec(folder, teacher_folder), overrides=SHORT), out=folder / "cache")


@pytest.fixture(scope="module")
def trained(cache: Cache, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vc.distill(cache, student=str(student_folder), out=tmp_path_factory.mktemp("runs") / "trained")


def given(run: Path, *more: str) -> list[str]:
    return [f"distill.verbalizers={run / 'verbalizers'}", *more]


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(run / "student" / "model.safetensors") for run in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def metrics(run: Path) -> list[tuple[str, int, float]]:
    return [(line["stage"], line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")]


def test_given_verbalizers_make_the_student_of_the_run_that_trained_them(
    cache: Cache, trained: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = interact_module.optimizer_step

    def stop_at_step_3(optimizer: Any, schedule: Any, index: int, num_steps: int) -> float:
        if index == 2:
            raise KeyboardInterrupt
        return step(optimizer, schedule, index, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr(interact_module, "optimizer_step", stop_at_step_3)
        with pytest.raises(KeyboardInterrupt):
            vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=given(trained))
    run = vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=given(trained))
    assert same_weights(run, trained)
    assert metrics(run) == [line for line in metrics(trained) if line[0] != "verbalize"]
    stages = [json.loads((folder / "run.json").read_text())["stages"] for folder in (run, trained)]
    assert [(s["name"], s["steps"]) for s in stages[0]] == [(s["name"], s["steps"]) for s in stages[1]]
    assert stages[0][0]["seconds"] == 0
    for file in (trained / "verbalizers").iterdir():
        assert (run / "verbalizers" / file.name).read_bytes() == file.read_bytes(), file.name
    fresh = vc.distill(cache, student=str(student_folder), out=tmp_path / "other", overrides=["distill.seed=1"])
    assert not same_weights(fresh, trained)


def test_a_folder_that_has_changed_is_refused(
    cache: Cache, trained: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained / "verbalizers", tmp_path / "a" / "verbalizers")
    changes = given(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(interact_module, "optimizer_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=changes)
    one, two = (tmp_path / "a" / "verbalizers" / f"layer_000{layer}.safetensors" for layer in (1, 2))
    shutil.copy(two, one)
    record = tmp_path / "a" / "verbalizers" / "verbalizers.json"
    facts = json.loads(record.read_text())
    facts["files"][one.name] = facts["files"][two.name]  # others, and not damaged
    record.write_text(json.dumps(facts))
    with pytest.raises(FingerprintMismatchError, match=r"`verbalizers_digest\.1`"):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=changes)


def test_those_that_train_verbalizers_has_made_say_their_loss_too(
    cache: Cache, student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, changes = tmp_path / "teacher", ["verbalizer.loss=kl_to_final", "train_verbalizers.schedule.steps=1"]
    folder.mkdir()
    changes += ["teacher.layers=[1,2]", *SHORT]
    spec = vc.load_spec(write_spec(folder, student_folder), overrides=changes)
    made = vc.train_verbalizers(spec, out=tmp_path / "made", layers="1")
    record = made / "verbalizers" / "verbalizers.json"
    facts = json.loads(record.read_text())
    assert facts["provenance"].pop("loss") == "kl_to_final"
    record.write_text(json.dumps(facts))  # an earlier release did not write it; layers are added all the same
    vc.train_verbalizers(spec, out=made, layers="2")
    with pytest.raises(ModelError, match="loss `kl_to_final`, not `ce`"):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=given(made))
    record.write_text(json.dumps({**facts, "layers": [1, 2]}))
    capsys.readouterr()
    vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=given(made))
    assert capsys.readouterr().err.count("it is taken to be `verbalizer.loss: ce`") == 1


def test_what_does_not_fit_is_refused_before_there_is_a_run(
    cache: Cache, trained: Path, student_folder: Path, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", num_layers=3, hidden=16, seed=9, padding=3)
    for student, changes, says in (
        (other, given(trained), "trained for a model whose weights are"),
        (student_folder, given(trained, "verbalizer.structure=mlp"), "structure `verb-ffn`, not `mlp`"),
        (student_folder, given(trained, "verbalizer.loss=kl_to_final"), "loss `ce`, not `kl_to_final`"),
        (student_folder, given(tmp_path / "nowhere"), "no such folder"),
        (student_folder, [f"distill.verbalizers={tmp_path}"], "no verbalizers in"),
    ):
        with pytest.raises(ModelError, match=says):
            vc.distill(cache, student=str(student), out=tmp_path / "run", overrides=changes)
    with pytest.raises(SpecError, match="`verbalizers` belong to `recipe: vlsi` and `any-depth`"):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "run", recipe="sft", overrides=given(trained))
    assert not (tmp_path / "run").exists()


def test_all_who_take_verbalizers_find_them_in_a_run_and_in_a_package(
    cache: Cache, trained: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "some_package"
    shutil.copytree(trained / "verbalizers", package / "verbalizers")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    for path in (trained, trained / "verbalizers", "package:some_package", "package:some_package/verbalizers"):
        wanted = trained if isinstance(path, Path) else package
        assert find_folder(path) == (wanted / "verbalizers").resolve()
    student, name = str(student_folder), "package:some_package"
    run = vc.distill(cache, student=student, out=tmp_path / "run", overrides=[f"distill.verbalizers={trained}"])
    assert same_weights(run, trained)
    of_package = vc.evaluate(run, verbalizers=name, limit=2, device="cpu")
    assert of_package["layers"] == vc.evaluate(run, verbalizers=trained, limit=2, device="cpu")["layers"]
    assert vc.trace(student, prompt="say", verbalizers=name, max_new_tokens=1, device="cpu").said
    changes = ["teacher.layers=[1,2]", f"teacher.verbalizers={trained}"]
    built = vc.build_teacher(
        vc.load_spec(write_spec(tmp_path, student_folder), overrides=changes), out=tmp_path / "cache"
    )
    assert built.layers == [1, 2, 3]


def test_a_student_is_not_sent_to_the_training_of_a_teacher(trained: Path) -> None:
    with pytest.raises(ModelError, match=r"none for layers \[7\], there are \[1, 2\]") as error:
        read_record(trained / "verbalizers", [7])
    assert "train-verbalizers" not in str(error.value)
