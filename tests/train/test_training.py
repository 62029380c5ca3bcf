"""Training: dtypes, the random state of a step, clipping, and what is refused before or while it runs."""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import save_model, write_spec
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import vlsi_cache as vc
from vlsi_cache.config.training import Schedule
from vlsi_cache.errors import DataError, ModelError, SpecError
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.lora import add_lora, train_everything
from vlsi_cache.run_files import read_metrics
from vlsi_cache.runtime import seed_step
from vlsi_cache.store.reader import Cache
from vlsi_cache.train.optim import clip_gradients, make_optimizer

SHORT = ["distill.verbalize.steps=1", "distill.interact.schedule.steps=3", "distill.sft.schedule.steps=4"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Cache:
    folder = tmp_path_factory.mktemp("training")
    spec = vc.load_spec(write_spec(folder, teacher_folder), overrides=SHORT)
    return vc.build_teacher(spec, out=folder / "cache")


def save_in(dtype: torch.dtype, source: Path, folder: Path) -> Path:
    """A copy of a model folder with its weights in another dtype."""
    import shutil

    shutil.copytree(source, folder)
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(folder)
    return folder


def run_with_dropout(cache: Cache, student: Path, out: Path, share: float) -> dict[str, torch.Tensor]:
    changes = [f"distill.lora.dropout={share}", "distill.micro_batch_size=2"]
    vc.distill(cache, student=str(student), out=out, recipe="last", overrides=changes)
    return load_file(out / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(cache: Cache, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of an undisturbed run."""
    return run_with_dropout(cache, student_folder, tmp_path_factory.mktemp("whole") / "run", 0.1)


@pytest.mark.parametrize("stage", ["interact", "sft"])
def test_a_killed_run_with_dropout_ends_in_the_same_weights(
    stage: str,
    cache: Cache,
    whole: dict[str, torch.Tensor],
    student_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module(f"vlsi_cache.train.{stage}")
    step = module.optimizer_step

    def stop_at_step_4(optimizer: Any, schedule: Any, index: int, num_steps: int) -> float:
        if index == 3:
            raise KeyboardInterrupt
        return step(optimizer, schedule, index, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr(module, "optimizer_step", stop_at_step_4)
        with pytest.raises(KeyboardInterrupt):
            run_with_dropout(cache, student_folder, tmp_path / "cut", 0.1)
    cut = run_with_dropout(cache, student_folder, tmp_path / "cut", 0.1)
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_dropout_does_something(
    cache: Cache, whole: dict[str, torch.Tensor], student_folder: Path, tmp_path: Path
) -> None:
    other = run_with_dropout(cache, student_folder, tmp_path / "other", 0.2)
    assert not all(torch.equal(other[name], whole[name]) for name in whole)


def test_steps_stages_and_seeds_draw_differently() -> None:
    draws = set()
    for key in [(0, "sft", 0), (0, "sft", 1), (1, "sft", 0), (0, "interact", 0), (2**32 - 1, "sft", 10**6)]:
        seed_step(*key)
        first = torch.rand(4)
        seed_step(*key)
        assert torch.equal(first, torch.rand(4))
        draws.add(tuple(first.tolist()))
    assert len(draws) == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
@pytest.mark.parametrize("mode", ["lora+embed_head", "full"])
def test_half_precision_students_train_on_the_cpu_and_are_saved_as_asked(
    dtype: str, mode: str, cache: Cache, student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    folder = save_in(torch.bfloat16, student_folder, tmp_path / "student")
    short = ["distill.interact.schedule.steps=1", "distill.sft.schedule.steps=1", "distill.checkpoint_steps=100"]
    changes = [f"distill.student_dtype={dtype}", f"distill.sft.mode={mode}", *short]
    run = vc.distill(cache, student=str(folder), out=tmp_path / "run", overrides=changes)
    name = str(wanted).removeprefix("torch.")
    said = capsys.readouterr().err
    assert f"student: trained in float32, since cpu has no autocast here, and saved in {name}" in said
    tensors = load_file(run / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {wanted}
    assert json.loads((run / "student" / "config.json").read_text())["dtype"] == name
    before = load_file(folder / "model.safetensors")
    assert not torch.equal(before["lm_head.weight"].to(wanted), tensors["lm_head.weight"])


def test_a_float32_student_stays_one(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    run = vc.distill(cache, student=str(student_folder), out=tmp_path / "run", recipe="sft")
    assert {t.dtype for t in load_file(run / "student" / "model.safetensors").values()} == {torch.float32}


def test_the_adapter_is_merged_in_fp32_before_all_weights_train(student_folder: Path) -> None:
    model = add_lora(ModelRef(student_folder, dtype="bfloat16").load(), rank=4, alpha=4.0, dropout=0.0)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    linear = model.get_submodule(name)
    torch.manual_seed(0)
    a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    b.data.normal_(std=1e-3)
    expected = linear.base_layer.weight.double() + b.double() @ a.double()
    plain = train_everything(model)
    merged = plain.get_submodule(name.removeprefix("base_model.model.")).weight
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-7)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in plain.parameters())


def test_a_verbalizer_trains_the_same_whatever_is_trained_beside_it(teacher_folder: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, teacher_folder)
    clip = "train_verbalizers.schedule.clip_norm=0.001"  # small enough to be reached at every step
    files = []
    for layers in ("[1]", "[1, 3]"):
        changed = vc.load_spec(spec, overrides=[clip, f"teacher.layers={layers}"])
        run = vc.train_verbalizers(changed, out=tmp_path / f"run{len(files)}")
        files.append(load_file(run / "verbalizers" / "layer_0001.safetensors"))
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_verbalizers_have_checkpoints_of_their_own(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlsi_cache.runs.checkpoints import Checkpoints

    steps: list[int] = []
    save = Checkpoints.save

    def spy(self: Checkpoints, stage: str, step: int, *rest: Any) -> None:
        steps.append(step)
        save(self, stage, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", spy)
    changes = ["train_verbalizers.checkpoint_steps=4", "distill.checkpoint_steps=1"]
    vc.train_verbalizers(vc.load_spec(write_spec(tmp_path, teacher_folder), overrides=changes), out=tmp_path / "run")
    assert steps == [4, 6]


def test_a_gradient_that_is_not_finite_is_named() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    schedule = Schedule(steps=10, learning_rate=0.5, warmup=0)
    optimizer = make_optimizer([parameter], schedule)
    parameter.grad = torch.tensor([3.0, 0.0, 4.0])
    clip_gradients(optimizer, schedule, "sft", 0, 10)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.0, 0.8]))
    parameter.grad = torch.tensor([0.0, float("inf"), 1.0])
    message = r"stage sft, step 1 of 10: the gradient norm is inf at learning rate 0\.5: .*lower `learning_rate`"
    with pytest.raises(ModelError, match=message):
        clip_gradients(optimizer, schedule, "sft", 0, 10)


@pytest.mark.parametrize("stage", ["verbalize", "interact", "sft"])
def test_a_run_that_diverges_says_where(
    stage: str, cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"vlsi_cache.train.{stage}")

    def poisoned(optimizer: Any, *rest: Any) -> None:
        optimizer.param_groups[-1]["params"][0].grad.fill_(float("nan"))
        clip_gradients(optimizer, *rest)

    monkeypatch.setattr(module, "clip_gradients", poisoned)
    of = " of layer 2" if stage == "verbalize" else ""
    with pytest.raises(ModelError, match=f"stage {stage}, step 1 of [134]: the gradient norm{of} is nan"):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "run")


def test_verbalizers_may_learn_what_the_model_says(teacher_folder: Path, tmp_path: Path) -> None:
    changes = ["verbalizer.loss=kl_to_final", "train_verbalizers.schedule.steps=12"]
    spec = vc.load_spec(write_spec(tmp_path, teacher_folder), overrides=changes)
    run = vc.train_verbalizers(spec, out=tmp_path / "run")
    lines = read_metrics(run / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    # What is logged by layer is the loss of the response, whatever was trained.
    labels = vc.load_spec(write_spec(tmp_path, teacher_folder), overrides=changes[1:])
    first = read_metrics(vc.train_verbalizers(labels, out=tmp_path / "labels") / "metrics.jsonl")[0]
    assert lines[0]["layers"] == pytest.approx(first["layers"], rel=1e-5)
    assert first["loss"] == pytest.approx(sum(first["layers"].values()))
    assert lines[0]["loss"] != pytest.approx(first["loss"])


def test_liger_s_loss_is_taken_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlsi_cache.sparse.head import Head
    from vlsi_cache.train.sft import pick_liger, response_loss

    head, cuda = Head(torch.randn(9, 4), cap=3.0), torch.device("cuda")
    hidden_TD, gold_T = torch.randn(5, 4), torch.tensor([0, 8, 2, 3, 3])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    missing = "ours (Liger's is not installed: pip install 'vlsi-cache[gpu]')"
    assert pick_liger(cuda, head, "token") == (False, missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "liger_kernel")
    assert pick_liger(cuda, head, "token")[0]
    assert not pick_liger(torch.device("cpu"), head, "token")[0]
    assert not pick_liger(cuda, Head(head.weight_VD, scale=2.0), "token")[0]
    assert not pick_liger(cuda, head, "sample")[0]  # its tokens have different weights

    class LigerFusedLinearCrossEntropyLoss:  # the arguments and their order are those of liger-kernel 0.8
        def __init__(self, *, softcap: float | None, accum_dtype: torch.dtype, reduction: str) -> None:
            self.cap, self.accum_dtype, self.reduction = softcap, accum_dtype, reduction

        def __call__(
            self, lin_weight: torch.Tensor, _input: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            assert self.cap is not None
            assert bias is None
            logits = self.cap * torch.tanh(_input @ lin_weight.T / self.cap)
            return torch.nn.functional.cross_entropy(logits, target, reduction=self.reduction)

    fake: Any = types.ModuleType("liger_kernel.transformers")
    fake.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    share_T = torch.full((5,), 1 / 12, dtype=torch.float64)  # five tokens out of twelve
    ours = response_loss(hidden_TD, head, gold_T, share_T, with_liger=False)
    torch.testing.assert_close(response_loss(hidden_TD, head, gold_T, share_T, with_liger=True), ours)


def test_no_layers_is_another_recipe(
    cache: Cache, student_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    none = ["distill.layers=[]"]
    with pytest.raises(SpecError, match=r"`distill.layers` is empty.*use `recipe: last`"):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=none)
    assert not (tmp_path / "run").exists()
    vc.distill(cache, student=str(student_folder), out=tmp_path / "run", recipe="last", overrides=none)
    said = "`--set distill.layers=[]` does nothing here: no stage that `recipe: last` runs looks at it"
    assert said in capfd.readouterr().err


def test_samples_longer_than_the_students_positions_are_listed(cache: Cache, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "short", num_layers=3, hidden=16, seed=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 30}))
    with pytest.raises(DataError) as caught:
        vc.distill(cache, student=str(folder), out=tmp_path / "run")
    first, *listed = str(caught.value).splitlines()
    num = int(first.split()[0])
    assert 10 < num < 40
    assert f"{num} of 40 cached samples are longer for student {folder} than its 30 positions" in first
    assert len(listed) == 11
    assert listed[0].startswith("  - sample `row-")
    assert listed[-1].endswith(f"and {num - 10} more")
    assert not (tmp_path / "run").exists()
