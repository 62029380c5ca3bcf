"""Stage exits: verbalizers of the finished student, which it leaves as it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import tiny_model
from helpers.launch import run_together
from helpers.runs import metrics_of
from helpers.tiny import write_spec
from safetensors.torch import load_file, save_file

import vlsi_cache as vc
from vlsi_cache.errors import CacheCorruptError, ModelError, SpecError
from vlsi_cache.models.backbone import Backbone, head_of
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.verbalizer import build_verbalizers, load_verbalizers
from vlsi_cache.models.verbalizer_files import of_run
from vlsi_cache.store.reader import Cache
from vlsi_cache.train import verbalize as verbalize_module
from vlsi_cache.train.sft import exit_losses

STEPS = ("distill.verbalize.steps=1", "distill.interact.schedule.steps=1", "distill.sft.schedule.steps=1")
EXITS = ("distill.exits.schedule.steps=4", "distill.exits.schedule.learning_rate=0.01", "distill.checkpoint_steps=1")
CHANGES = (*STEPS, *EXITS, "distill.batch_size=4", "distill.micro_batch_size=1", "run.workers=0")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Cache:
    folder = tmp_path_factory.mktemp("exits")
    return vc.build_teacher(vc.load_spec(write_spec(folder, teacher_folder)), out=folder / "cache")


def trained(cache: Cache, student: Path, out: Path, *more: str) -> Path:
    return vc.distill(cache, student=str(student), out=out, recipe="last", overrides=[*CHANGES, *more])


@pytest.fixture(scope="module")
def run(cache: Cache, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(cache, student_folder, tmp_path_factory.mktemp("runs") / "whole")


def test_they_are_of_the_finished_student(run: Path, cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    plain = vc.distill(cache, student=str(student_folder), out=tmp_path / "plain", recipe="last", overrides=CHANGES[:3])
    assert of_run(plain) is None
    assert of_run(run) == run / "exits"
    steps = [(line["stage"], line["step"]) for line in metrics_of(run)]
    assert steps[-4:] == [("exits", step) for step in (1, 2, 3, 4)]
    student = ModelRef(run / "student")
    backbone = Backbone(student.load("cpu"))
    exits = load_verbalizers(run / "exits", backbone, [1, 2], teacher_digest=student.digest)  # of this very head
    ids = torch.arange(3, 19)[None]
    hidden: Any = exits.capture({"input_ids": ids}, torch.zeros(16, dtype=torch.long), torch.arange(16))
    said_TV = [state @ backbone.head_weight.T for state in (hidden[3], *(exits.apply(k, hidden[k]) for k in (1, 2)))]
    lens_TV = [backbone.final_norm(hidden[k]) @ backbone.head_weight.T for k in (1, 2)]
    own_TV = said_TV[0].log_softmax(-1)
    for exit_TV, untrained_TV in zip(said_TV[1:], lens_TV, strict=True):
        kls = [(own_TV.exp() * (own_TV - one.log_softmax(-1))).sum(-1).mean() for one in (exit_TV, untrained_TV)]
        assert kls[0] < 0.9 * kls[1]


def test_a_stopped_one_goes_on_and_leaves_the_student_alone(
    run: Path, cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, step = tmp_path / "run", verbalize_module.optimizer_step

    def stop_at_step_3(optimizer: Any, schedule: Any, index: int, num_steps: int) -> float:
        if index == 2:
            raise KeyboardInterrupt
        return step(optimizer, schedule, index, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr(verbalize_module, "optimizer_step", stop_at_step_3)
        with pytest.raises(KeyboardInterrupt):
            trained(cache, student_folder, out)
    before = (out / "student" / "model.safetensors").stat().st_mtime_ns
    shutil.copytree(run / "exits", out / "exits")  # of another run
    record = json.loads((out / "exits" / "verbalizers.json").read_text())
    record["provenance"]["teacher_digest"] = "other"
    (out / "exits" / "verbalizers.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"exits holds verbalizers of a model whose weights are `other`.*delete the"):
        trained(cache, student_folder, out)
    shutil.move(out / "exits", tmp_path / "exits of another")
    (out / "student").rename(tmp_path / "aside")
    shutil.copytree(tmp_path / "aside", out / "student")  # another one, while they are trained
    weights = load_file(out / "student" / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, out / "student" / "model.safetensors", {"format": "pt"})
    card = json.loads((out / "student" / "vlsi_cache.json").read_text())
    card["weights"] = ModelRef(out / "student").digest
    (out / "student" / "vlsi_cache.json").write_text(json.dumps(card))
    with pytest.raises(
        ModelError, match=r"run/checkpoints holds verbalizers of a model .*put the student back that was"
    ):
        trained(cache, student_folder, out)
    shutil.rmtree(out / "student")
    with pytest.raises(CacheCorruptError, match=r"run/student is gone, and the exits are those of that student"):
        trained(cache, student_folder, out)
    (tmp_path / "aside").rename(out / "student")
    (out / "exits").mkdir()
    (out / "exits" / ".layer_0001.safetensors.tmp-0").write_text("half")
    trained(cache, student_folder, out)
    assert not [one for one in (out / "exits").iterdir() if one.name.startswith(".")]
    assert (out / "student" / "model.safetensors").stat().st_mtime_ns == before
    lines, wanted = metrics_of(out), metrics_of(run)
    assert [{**line, "elapsed_s": 0} for line in lines] == [{**line, "elapsed_s": 0} for line in wanted]
    for file in sorted((run / "exits").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert torch.equal(load_file(out / "exits" / file.name)[name], tensor)


def test_processes_with_shares_train_the_same(run: Path, cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    found = run_together(2, lambda _: trained(cache, student_folder, tmp_path / "run", "run.parallel=fsdp"))
    assert found == [tmp_path / "run"] * 2
    for line, other in zip(metrics_of(tmp_path / "run"), metrics_of(run), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_there_must_be_layers(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"`distill.layers` is empty, and `distill.exits` reads target layers"):
        trained(cache, student_folder, tmp_path / "run", "distill.layers=[]")


def test_any_depth_teaches_layers_to_the_end(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    """Their losses come on top of the last one's in the interaction and in sft, with the weight of `exits`."""
    more = ("distill.exits.weight=0.5", "distill.interact.schedule.steps=2", "distill.sft.schedule.steps=3")
    options: dict[str, Any] = {"student": str(student_folder), "recipe": "any-depth"}
    run = vc.distill(cache, out=tmp_path / "run", overrides=[*CHANGES, *more], **options)
    lines = [line for line in metrics_of(run) if line["stage"] in ("interact", "sft")]
    assert [line["stage"] for line in lines] == ["interact"] * 2 + ["sft"] * 3
    for line in lines:
        *exits, last = (line["layers"][layer] for layer in sorted(line["layers"]))
        if line["stage"] == "interact":
            exits, last = [*exits, last], line["kl_last"]
        else:
            assert line["ce_last"] == last
        assert line["loss"] == pytest.approx(last + 0.5 * sum(exits) / len(exits), rel=1e-4)
    plain = vc.distill(cache, out=tmp_path / "vlsi", overrides=[*CHANGES, *more], **options | {"recipe": "vlsi"})
    assert "layers" not in metrics_of(plain)[-5]
    assert not torch.equal(
        *(load_file(one / "student" / "model.safetensors")["lm_head.weight"] for one in (run, plain))
    )
    with pytest.raises(SpecError, match="`recipe: any-depth` trains exits, and there are none"):
        vc.distill(cache, out=tmp_path / "other", overrides=STEPS, **options)
    faded = ["distill.interact.layers_full_until=0.2", "distill.interact.layers_zero_from=0.3"]
    with pytest.raises(SpecError, match=r"`interact.layers_zero_from` do nothing in `recipe: any-depth`"):
        vc.distill(cache, out=tmp_path / "other", overrides=[*CHANGES, *faded], **options)


def test_the_head_learns_from_the_last_layer_alone() -> None:
    model = tiny_model("llama")
    backbone = Backbone(model)
    verbalizers = build_verbalizers(backbone, [1, 3], style="plain")
    for parameter in backbone.model.parameters():
        parameter.requires_grad_(True)
    ids = torch.arange(3, 15)[None]
    rows_T, gold_T, share_T = torch.zeros(11, dtype=torch.long), ids[0, 1:], torch.full((11,), 1 / 11)
    hidden: Any = verbalizers.capture({"input_ids": ids}, rows_T, torch.arange(11))
    found = exit_losses(hidden, verbalizers, head_of(backbone), gold_T, share_T)
    for layer, loss in found.items():
        logits_TV = verbalizers.apply(layer, hidden[layer]) @ backbone.head_weight.T
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits_TV, gold_T), rtol=1e-5, atol=0)
    sum(found.values(), torch.zeros(())).backward()
    assert backbone.head_weight.grad is None
    assert model.model.layers[2].mlp.down_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[3].mlp.down_proj.weight.grad is None


def test_through_the_logit_lens_nothing_is_trained_but_the_student(
    cache: Cache, student_folder: Path, tmp_path: Path
) -> None:
    """The student learns as it does through verbalizers that have just begun, which are the lens exactly."""
    lens = ("verbalizer.structure=logit-lens", "distill.exits.weight=0.5")
    options: dict[str, Any] = {"student": str(student_folder), "recipe": "any-depth"}
    run = vc.distill(cache, out=tmp_path / "run", overrides=[*STEPS, *CHANGES[6:], *lens], **options)
    still = ("distill.verbalize.learning_rate=1e-30", "distill.verbalize.final_learning_rate=0")
    more = ("distill.interact.schedule.steps=2", *still, *EXITS[:1], lens[1])
    other = vc.distill(cache, out=tmp_path / "other", overrides=[*STEPS, *CHANGES[6:], *more], **options)
    found, wanted = ([line for line in metrics_of(one) if line["stage"] in ("interact", "sft")] for one in (run, other))
    assert [(line["stage"], line["step"]) for line in metrics_of(run)] == [("interact", 1), ("interact", 2), ("sft", 1)]
    assert [(line["loss"], line["layers"]) for line in found] == [(line["loss"], line["layers"]) for line in wanted]
    assert not (run / "exits").exists()
    assert not (run / "verbalizers").exists()
    measured = vc.exits(run, limit=3)
    assert (measured["structure"], measured["verbalizers"]) == ("logit-lens", None)
    assert vc.trace(run, prompt="Which?").said
    with pytest.raises(SpecError, match=r"`distill.exits` trains verbalizers of the finished student, and `verbalizer"):
        vc.distill(cache, out=tmp_path / "no", overrides=[*CHANGES, lens[0]], **options)
    with pytest.raises(SpecError, match=r"`style`, `loss` belong to verbalizers that are trained"):
        vc.load_spec("demo", overrides=[lens[0], "verbalizer.style=plain", "verbalizer.loss=kl_to_final"])
    spec = vc.load_spec(cache.path.parent / "spec.yaml", overrides=[lens[0]])
    with pytest.raises(SpecError, match=r"has no weights to train: build-teacher without `teacher.verbalizers`"):
        vc.train_verbalizers(spec, out=tmp_path / "no")
