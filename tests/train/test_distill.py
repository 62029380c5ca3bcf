"""Students: what trains in each stage, resuming to the same metrics, the recipes' equal budgets, refusals, scores."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import make_rows, save_model, write_jsonl, write_spec
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import vlsi_cache as vc
from vlsi_cache.errors import CacheIncompleteError, FingerprintMismatchError, ModelError, SpecError
from vlsi_cache.run_files import read_evaluation, read_metrics
from vlsi_cache.store.reader import Cache
from vlsi_cache.train import interact as interact_module
from vlsi_cache.train import optim as loop_module
from vlsi_cache.train import sft as sft_module
from vlsi_cache.train.distill import distill_spec, schedule_steps, stage_steps
from vlsi_cache.train.optim import learning_rate
from vlsi_cache.train.student import StudentState

ONE_STEP = ["distill.verbalize.steps=1", "distill.interact.schedule.steps=1", "distill.sft.schedule.steps=1"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Cache:
    """Its spec cuts every batch into two micro-batches."""
    folder = tmp_path_factory.mktemp("distill")
    spec = vc.load_spec(write_spec(folder, teacher_folder), overrides=["distill.micro_batch_size=2"])
    return vc.build_teacher(spec, out=folder / "cache")


@pytest.fixture(scope="module")
def vlsi_run(cache: Cache, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vc.distill(cache, student=str(student_folder), out=tmp_path_factory.mktemp("runs") / "vlsi")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    clock = {"elapsed_s", "tokens_per_s", "data_wait_pct", "memory_gib"}
    return [{k: v for k, v in line.items() if k not in clock} for line in read_metrics(run / "metrics.jsonl")]


def test_all_stages_ran_and_left_what_they_should(vlsi_run: Path, cache: Cache) -> None:
    lines = metrics(vlsi_run)
    assert [(stage, sum(line["stage"] == stage for line in lines)) for stage in ("verbalize", "interact", "sft")] == [
        ("verbalize", 4),
        ("interact", 5),
        ("sft", 4),
    ]
    for line in lines:
        if line["stage"] == "interact":
            assert line["kl_last"] >= 0
            assert all(kl >= 0 for kl in line["layers"].values())
            for matched in line["matched_layers"]:
                assert matched == sorted(set(matched))
                assert set(matched) <= set(cache.layers[:-1])
    record = json.loads((vlsi_run / "run.json").read_text())
    assert record["status"] == "done"
    assert [stage["name"] for stage in record["stages"]] == ["verbalize", "interact", "sft"]
    assert (vlsi_run / "report.html").is_file()
    assert AutoModelForCausalLM.from_pretrained(vlsi_run / "student").config.num_hidden_layers == 3


@pytest.mark.parametrize("stage", ["verbalize", "interact", "sft"])
def test_a_killed_run_resumes_to_the_same_metrics_and_weights(
    stage: str, cache: Cache, vlsi_run: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    module = importlib.import_module(f"vlsi_cache.train.{stage}")
    step = module.optimizer_step

    def stop_at_step_4(optimizer: Any, schedule: Any, index: int, num_steps: int) -> float:
        if index == 3:
            raise KeyboardInterrupt
        return step(optimizer, schedule, index, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr(module, "optimizer_step", stop_at_step_4)
        with pytest.raises(KeyboardInterrupt):
            vc.distill(cache, student=str(student_folder), out=tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists()
    run = vc.distill(cache, student=str(student_folder), out=tmp_path / "run")
    assert metrics(run) == metrics(vlsi_run)
    ours, whole = (load_file(r / "student" / "model.safetensors") for r in (run, vlsi_run))
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in ours)


def test_what_trains_in_each_stage(
    cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, set[str]] = {}
    models: list[Any] = []
    real_backbone = StudentState.shared_out

    def remember(state: StudentState, model: Any) -> Any:
        models.append(model)
        return real_backbone(state, model)

    monkeypatch.setattr(StudentState, "shared_out", remember)
    for name, module in (("interact", interact_module), ("sft", sft_module)):

        def spy(parameters: Any, schedule: Any, *, stage: str = name, real: Any = module.make_optimizer) -> Any:
            optimizer = real(parameters, schedule)
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            names[stage] = {n for n, p in models[-1].named_parameters() if id(p) in trained}
            return optimizer

        monkeypatch.setattr(module, "make_optimizer", spy)
    vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=ONE_STEP)
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("lora_" in n for n in names["interact"])
    assert len(names["interact"]) == 3 * 7 * 2
    assert {n.split(".lora_")[0].split(".")[-1] for n in names["interact"]} == linears
    extra = names["sft"] - names["interact"]
    assert {n.split(".")[-2] for n in extra} == {"embed_tokens", "lm_head"}


def test_interaction_leaves_head_embeddings_and_verbalizers_alone(vlsi_run: Path, student_folder: Path) -> None:
    checkpoint = max((vlsi_run / "checkpoints").glob("*"))
    assert {key.split("/")[0] for key in load_file(checkpoint / "state.safetensors")} == {
        "parameter",
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    before = load_file(student_folder / "model.safetensors")
    after = load_file(vlsi_run / "student" / "model.safetensors")
    norms = [name for name in before if "norm" in name]
    assert norms
    assert all(torch.equal(before[name], after[name]) for name in norms)  # neither stage trains norms in LoRA mode
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])  # sft does train the head


def test_full_sft_trains_everything(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    run = vc.distill(
        cache,
        student=str(student_folder),
        out=tmp_path / "run",
        recipe="last",
        overrides=[*ONE_STEP[:2], "distill.sft.mode=full", "distill.sft.schedule.learning_rate=0.01"],
    )
    before = load_file(student_folder / "model.safetensors")
    after = load_file(run / "student" / "model.safetensors")
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_recipes_have_the_same_budget(cache: Cache) -> None:
    def steps(recipe: str, *more: str) -> dict[str, int]:
        overrides = [f"distill.recipe={recipe}", *more]
        return stage_steps(vc.load_spec(cache.path.parent / "spec.yaml", overrides=overrides), 40)

    assert [sum(steps(recipe).values()) for recipe in ("vlsi", "last", "sft")] == [13, 13, 13]
    assert list(steps("last")) == ["interact", "sft"]
    assert steps("vlsi", "verbalizer.structure=logit-lens") == steps("last")


@pytest.mark.parametrize(("fraction", "left_out"), [(0.5, 2), (0.01, 3), (0.99, 0), (1.0, 0)])
def test_a_fraction_of_sft_leaves_the_same_steps_out_of_every_recipe(
    cache: Cache, fraction: float, left_out: int
) -> None:
    spec = vc.load_spec(cache.path.parent / "spec.yaml", overrides=[f"distill.sft.fraction={fraction}"])
    for recipe in ("vlsi", "last", "sft"):
        of_recipe = spec.model_copy(update={"distill": spec.distill.model_copy(update={"recipe": recipe})})
        assert sum(stage_steps(of_recipe, 40).values()) == 13 - left_out
        assert sum(schedule_steps(of_recipe, 40).values()) == 13


def test_half_of_sft_is_the_first_half_of_the_whole(
    cache: Cache, vlsi_run: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = vc.distill(cache, student=str(student_folder), out=tmp_path / "half", overrides=["distill.sft.fraction=0.5"])
    assert metrics(half) == metrics(vlsi_run)[:-2]
    entry = json.loads((half / "run.json").read_text())["stages"][-1]
    assert (entry["steps"], entry["schedule_steps"]) == (2, 4)
    assert "sft 2 of 4 steps" in (half / "report.html").read_text()
    step = sft_module.optimizer_step

    def stop_after_step_2(optimizer: Any, schedule: Any, index: int, num_steps: int) -> float:
        if index == 2:
            raise KeyboardInterrupt
        return step(optimizer, schedule, index, num_steps)

    monkeypatch.setattr(sft_module, "optimizer_step", stop_after_step_2)
    with pytest.raises(KeyboardInterrupt):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "stopped")
    name = "checkpoints/sft-0000002/state.safetensors"
    ours, stopped = load_file(half / name), load_file(tmp_path / "stopped" / name)
    assert ours.keys() == stopped.keys()
    assert all(torch.equal(ours[key], stopped[key]) for key in ours)
    student = load_file(half / "student" / "model.safetensors")
    assert torch.equal(student["lm_head.weight"], stopped["parameter/base_model.model.lm_head.weight"])


def test_without_sft_the_student_is_what_interaction_made_of_it(
    cache: Cache, vlsi_run: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = ["distill.sft.fraction=0"]
    with pytest.raises(SpecError, match="leaves it out"):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "run", recipe="sft", overrides=none)
    assert "interact 5, sft 0 of 4 steps" in str(vc.plan(vc.load_spec(cache.path.parent / "spec.yaml", overrides=none)))
    with monkeypatch.context() as patch:
        patch.setattr("vlsi_cache.train.distill.merge_lora", interrupted)  # killed when all steps were done
        with pytest.raises(KeyboardInterrupt):
            vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=none)
    run = vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=none)
    assert metrics(run) == [line for line in metrics(vlsi_run) if line["stage"] != "sft"]
    assert [stage["name"] for stage in json.loads((run / "run.json").read_text())["stages"]] == [
        "verbalize",
        "interact",
    ]
    before, after = (load_file(folder / "model.safetensors") for folder in (student_folder, run / "student"))
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def interrupted(*_args: Any) -> None:
    raise KeyboardInterrupt


def test_a_stage_that_destroys_its_weights_with_the_last_update_has_failed(
    cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No gradient follows the last update, at which training would have stopped.
    wild = ["distill.verbalize.steps=2", "distill.interact.schedule.steps=2", "distill.sft.schedule.steps=1"]
    monkeypatch.setattr(
        loop_module, "learning_rate", lambda _schedule, _step, num_steps: 1e30 if num_steps == 1 else 1e-4
    )
    with pytest.raises(ModelError, match=r"stage sft has destroyed .* of its weights with its last updates"):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=wild)
    assert not (tmp_path / "run" / "student").exists()


def test_activation_checkpointing_and_accumulation_change_nothing(
    cache: Cache, vlsi_run: Path, student_folder: Path, tmp_path: Path
) -> None:
    run = vc.distill(
        cache, student=str(student_folder), out=tmp_path / "run", overrides=["distill.gradient_checkpointing=true"]
    )
    assert metrics(run) == metrics(vlsi_run)
    # Recipe `last` matches no layers, so that nothing is drawn for each micro-batch.
    first = {}
    for size in (1, 2, 4):
        overrides = [*ONE_STEP, f"distill.micro_batch_size={size}", "distill.batch_size=4"]
        run = vc.distill(
            cache, student=str(student_folder), out=tmp_path / f"run-{size}", recipe="last", overrides=overrides
        )
        first[size] = metrics(run)[0]["loss"]
    assert first[1] == pytest.approx(first[4], rel=1e-6)
    assert first[2] == pytest.approx(first[4], rel=1e-6)


def test_kernels_are_chosen_for_this_machine_and_not_the_teacher_s(cache: Cache) -> None:
    compiled = cache.header.spec | {"run": {**cache.header.spec["run"], "kernels": "compiled"}}
    other: Any = SimpleNamespace(path=cache.path, header=cache.header.model_copy(update={"spec": compiled}))
    assert distill_spec(other, student="x").run.kernels == "auto"
    assert distill_spec(other, student="x", overrides=["run.kernels=eager"]).run.kernels == "eager"


def test_the_student_must_share_the_tokenizer(cache: Cache, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", num_layers=3, hidden=16, seed=1, extra="zebra yonder xylophone quilt")
    with pytest.raises(ModelError, match="another tokenizer"):
        vc.distill(cache, student=str(other), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changed_data_is_refused(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    rows = make_rows(40)
    rows[7]["messages"][1]["content"] = "another answer"  # type: ignore[index]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    changed = [f"data.path={tmp_path / 'rows.jsonl'}"]
    with pytest.raises(FingerprintMismatchError, match=r"row-7.*has changed"):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=changed)
    write_jsonl(tmp_path / "rows.jsonl", rows[:7] + rows[8:])
    with pytest.raises(FingerprintMismatchError, match=r"row-7.*no longer"):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "run2", overrides=changed)


def test_half_a_cache_is_refused(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(cache.path, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "parts" / "000001.zarr")
    with pytest.raises(CacheIncompleteError, match="build-teacher"):
        vc.distill(tmp_path / "half", student=str(student_folder), out=tmp_path / "run")


def test_settings_fixed_by_the_cache_and_other_runs_are_refused(
    cache: Cache, vlsi_run: Path, student_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="rows"):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=["rows.top_k=4"])
    with pytest.raises(SpecError, match="no student"):
        vc.distill(cache, out=tmp_path / "run")
    wide = save_model(tmp_path / "deep", num_layers=8, hidden=16, seed=4)
    with pytest.raises(SpecError, match="as many teacher layers"):
        vc.distill(cache, student=str(wide), out=tmp_path / "run", overrides=["distill.layers=[1,2,3,4,5]"])
    with pytest.raises(FingerprintMismatchError, match=r"distill\.seed"):
        vc.distill(cache, student=str(student_folder), out=vlsi_run, overrides=["distill.seed=1"])


def test_evaluate_against_hand_written_oracles(vlsi_run: Path) -> None:
    result = vc.evaluate(vlsi_run)
    model = AutoModelForCausalLM.from_pretrained(vlsi_run / "student")
    tokenizer = AutoTokenizer.from_pretrained(vlsi_run / "student")
    total, count, right = 0.0, 0, 0
    for row in make_rows(12, start=1000):
        user, assistant = row["messages"]  # type: ignore[misc]
        prompt = f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"  # type: ignore[index]
        prompt_ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        answer = tokenizer(assistant["content"] + "<|im_end|>", return_tensors="pt", add_special_tokens=False).input_ids  # type: ignore[index]
        with torch.no_grad():
            logits = model(torch.cat([prompt_ids, answer], 1)).logits[0, prompt_ids.shape[1] - 1 : -1, : len(tokenizer)]
            own = model.generate(prompt_ids, do_sample=False, max_new_tokens=8, pad_token_id=0)[
                0, prompt_ids.shape[1] :
            ]
        total += torch.nn.functional.cross_entropy(logits, answer[0], reduction="sum").item()
        count += answer.shape[1]
        right += tokenizer.decode(own, skip_special_tokens=True) == assistant["content"]  # type: ignore[index]
    np.testing.assert_allclose(result["nll"], total / count, rtol=1e-4)
    np.testing.assert_allclose(result["perplexity"], np.exp(total / count), rtol=1e-3)
    assert result["exact_match"]["all"] == right / 12
    assert result["num_by_kind"] == {"even": 6, "odd": 6}
    assert set(result["layers"]) == {"1", "2"}
    assert read_evaluation(vlsi_run) == result


def test_schedule_warms_up_and_falls_to_the_final_rate() -> None:
    from vlsi_cache.config.training import Schedule

    schedule = Schedule(steps=100, learning_rate=1.0, final_learning_rate=0.1, warmup=0.1)
    rates = [learning_rate(schedule, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert Schedule(epochs=1.5).num_steps(100, 32) == 5
