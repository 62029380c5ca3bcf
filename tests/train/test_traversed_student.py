"""Students with traversed layers: what trains in each stage, saved and opened again, resumed, answered, refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launch import run_together
from helpers.tiny import write_spec
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import vlsi_cache as vc
from vlsi_cache.config.spec import apply_overrides
from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.traversal import traversal_of
from vlsi_cache.run_files import read_metrics
from vlsi_cache.store.reader import Cache
from vlsi_cache.train import interact as interact_module
from vlsi_cache.train import sft as sft_module
from vlsi_cache.train.distill import distill_spec, stage_steps
from vlsi_cache.train.student import StudentState

TRAVERSED = ["distill.traversal.schedule.steps=3", "distill.traversal.schedule.learning_rate=0.01"]
TROL = [*TRAVERSED, "distill.recipe=trol"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Cache:
    folder = tmp_path_factory.mktemp("traversal")
    return vc.build_teacher(vc.load_spec(write_spec(folder, teacher_folder)), out=folder / "cache")


@pytest.fixture(scope="module")
def trained(cache: Cache, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of all stages, and the names of what trained in each of them."""
    names: dict[str, set[str]] = {}
    models: list[Any] = []
    shared_out = StudentState.shared_out

    def remember(state: StudentState, model: Any) -> Any:
        models.append(model)
        return shared_out(state, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudentState, "shared_out", remember)
        for module in (interact_module, sft_module):

            def spy(parameters: Any, schedule: Any, *, real: Any = module.make_optimizer) -> Any:
                optimizer = real(parameters, schedule)
                found = {id(one) for group in optimizer.param_groups for one in group["params"]}
                stage = ("gates", "interact", "sft")[len(names)]
                names[stage] = {name for name, one in models[-1].named_parameters() if id(one) in found}
                return optimizer

            patch.setattr(module, "make_optimizer", spy)
        out = tmp_path_factory.mktemp("runs") / "vlsi"
        run = vc.distill(cache, student=str(student_folder), out=out, overrides=TRAVERSED)
    return {"run": run, "names": names}


def losses(run: Path) -> list[tuple[Any, ...]]:
    return [(one["stage"], one["step"], one["loss"]) for one in read_metrics(run / "metrics.jsonl")]


def test_gates_come_first_and_train_beside_the_rest(trained: dict[str, Any]) -> None:
    run, names = trained["run"], trained["names"]
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert [(one["name"], one["steps"]) for one in stages] == [
        ("gates", 3),
        ("verbalize", 4),
        ("interact", 5),
        ("sft", 4),
    ]
    gates = {f"model.traversal_gates.{layer}.weight" for layer in range(3)}
    assert names["gates"] == gates
    assert {name for name in names["interact"] if "lora" not in name} == {f"base_model.model.{name}" for name in gates}
    left = {name.split(".")[-2] for name in names["sft"] if "lora" not in name and "gates" not in name}
    assert left == {"embed_tokens", "lm_head"}
    after = load_file(run / "gates" / "trained.safetensors")
    final = load_file(run / "student" / "gates.safetensors")
    assert after.keys() == gates
    for layer in range(3):
        assert not torch.equal(final[f"{layer}.weight"], after[f"model.traversal_gates.{layer}.weight"])


@torch.no_grad()
def test_the_exported_student_opens_here_alone(trained: dict[str, Any], tmp_path: Path) -> None:
    student, ids_BS = trained["run"] / "student", torch.arange(3, 15)[None]
    for opened in (AutoModelForCausalLM.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=r"vlsi_cache\.load_student\(FOLDER\).*gates"):
            opened(student)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        LlamaForCausalLM.from_pretrained(student)
    assert "vc.load_student" in (student / "README.md").read_text()
    assert len(AutoTokenizer.from_pretrained(student)) > 200
    model = vc.load_student(trained["run"])
    state = traversal_of(model)
    assert state is not None
    assert (state.mode, len(state.gates)) == ("prompt", 3)
    again = vc.load_student(student)
    torch.testing.assert_close(again(ids_BS).logits, model(ids_BS).logits, rtol=0, atol=0)
    assert again.generate(ids_BS, max_new_tokens=3).shape[0] == 1  # type: ignore[operator]
    # A changed gate is another model; and one that is made of its layers would have none.
    digest = ModelRef(student).digest
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in student.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    assert ModelRef(copied).digest == digest
    bad = (copied / "gates.safetensors").read_bytes()
    (copied / "gates.safetensors").write_bytes(bad[:-1] + bytes([bad[-1] ^ 1]))
    assert ModelRef(copied).digest != digest
    with pytest.raises(ModelError, match="its layers are traversed"):
        vc.init_student(student, "0-1", tmp_path / "smaller")


def test_it_is_measured_as_it_was_trained(trained: dict[str, Any], cache: Cache) -> None:
    scores = vc.evaluate(trained["run"], cache=cache)
    assert math.isfinite(scores["nll"])
    assert set(scores["layers"]) == {"1", "2"}
    assert 0 <= scores["exact_match"]["all"] <= 1
    found = vc.trace(trained["run"], prompt="say 3 red", max_new_tokens=3)
    model, encoder = vc.load_student(trained["run"]), ModelRef(trained["run"] / "student").encoder()
    text = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "say 3 red"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**text, max_new_tokens=3, do_sample=False, eos_token_id=encoder.eot_id)  # type: ignore[operator]
    said = out[0, text["input_ids"].shape[1] :].tolist()
    assert [token.id for token in found.said[-1].tokens] == said[: len(found.said[-1].tokens)]


def test_a_run_that_is_killed_twice_goes_on_to_the_same_gates(
    cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [*TROL, "distill.verbalize.steps=1", "distill.interact.schedule.steps=1", "distill.sft.schedule.steps=2"]
    whole = vc.distill(cache, student=str(student_folder), out=tmp_path / "whole", overrides=changes)
    step, calls = sft_module.optimizer_step, []

    def stop(*args: Any) -> float:
        calls.append(args)
        if len(calls) in (3, 7):  # in stage gates, whose checkpoint is of step 2; then in sft, behind its own
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sft_module, "optimizer_step", stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=changes)
    assert len(calls) == 7
    run = vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=changes)
    assert losses(run) == losses(whole)
    assert [stage for stage, *_ in losses(run)] == ["gates"] * 3 + ["sft"] * 4
    assert ModelRef(run / "student").digest == ModelRef(whole / "student").digest
    assert not (run / "verbalizers").exists()


def test_steps_and_what_contradicts(cache: Cache, student_folder: Path, trained: dict[str, Any]) -> None:
    def steps(*overrides: str) -> dict[str, int]:
        spec = distill_spec(cache, student=str(student_folder), overrides=overrides)
        return stage_steps(spec, len(cache))

    assert steps(*TROL) == {"gates": 3, "sft": 13}
    assert steps(*TRAVERSED, "distill.recipe=last") == {"gates": 3, "interact": 9, "sft": 4}
    assert steps(*TRAVERSED, "distill.traversal.mixing=uniform") == {"verbalize": 4, "interact": 8, "sft": 4}
    for overrides, message in (
        ([*TRAVERSED, "distill.recipe=sft"], "is `recipe: trol`"),
        (["distill.recipe=trol"], "say how in `traversal`"),
        ([*TRAVERSED, "distill.verbalizers=/x/y"], "stage gates trains it before them"),
    ):
        with pytest.raises(SpecError, match=message):
            steps(*overrides)
    student = str(trained["run"] / "student")
    with pytest.raises(SpecError, match=r"traversed as .*\"mode\": \"prompt\".* says nothing; say the same"):
        vc.distill(cache, student=student, out=student + "-again")


def test_a_spec_without_it_is_stored_as_before(cache: Cache) -> None:
    spec = distill_spec(cache, student="x/y")
    assert "traversal" not in spec.model_dump(mode="json")["distill"]
    assert "traversal" not in spec.distill.model_dump_json()
    changed = apply_overrides(spec, ["distill.traversal.mode=all"])
    assert changed.model_dump(mode="json")["distill"]["traversal"]["mode"] == "all"
    assert type(changed).model_validate(changed.model_dump(mode="json")) == changed


def test_what_its_gates_do_is_shown(trained: dict[str, Any]) -> None:
    run = trained["run"]
    kept = json.loads((run / "mixing.json").read_text())
    found = vc.trace(run, prompt="say 0 red", max_new_tokens=1)
    assert found.mixing is not None
    assert found.mixing.ratios == kept["ratios"]  # the first sample of the cache
    assert "".join(kept["tokens"]) == "<|im_start|>user\nsay 0 red<|im_end|>\n<|im_start|>assistant\n"
    inner: Any = vc.load_student(run).model
    ids = ModelRef(run / "student").encoder().tokenizer("".join(kept["tokens"]), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = type(inner.layers[0]).plain.forward  # the first pass of the first layer, by hand
        rope = inner.rotary_emb(inner.embed_tokens(ids), torch.arange(ids.shape[1])[None])
        mask = torch.full((ids.shape[1],) * 2, -1e9).triu(1)[None, None]
        h = first(inner.layers[0], inner.embed_tokens(ids), attention_mask=mask, position_embeddings=rope)
        w = torch.sigmoid(2 * inner.traversal_gates[0](h))[0, :, 0]
    assert kept["ratios"][0] == pytest.approx(w.tolist(), abs=2e-4)
    assert "layer   text  lowest  highest" in str(found)
    page = (run / "report.html").read_text()
    assert "Layers that run again" in page
    assert "mixing" in found.as_dict()


def test_other_tokens_may_be_traversed_when_it_is_measured(trained: dict[str, Any], cache: Cache) -> None:
    run = trained["run"]
    spec = distill_spec(cache, student="x/y")

    def nll(student: Path | str, mode: str) -> float:
        changed = apply_overrides(spec, [f"evaluate.traversal={mode}", "evaluate.generate=false"])
        return vc.evaluate(student, spec=changed, limit=4)["nll"]

    own = vc.evaluate(run, spec=apply_overrides(spec, ["evaluate.generate=false"]), limit=4)["nll"]
    values = {mode: nll(run / "student", mode) for mode in ("none", "prompt", "all")}
    assert values["prompt"] == own
    assert len(set(values.values())) == 3


def test_two_processes_train_it_as_one_does(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    changes = [*TRAVERSED, "distill.micro_batch_size=2", "run.workers=0"]

    def work(*more: str) -> Path:
        out = tmp_path / f"run{len(more)}"
        return vc.distill(cache.path, student=str(student_folder), out=out, overrides=[*changes, *more])

    run_together(2, lambda _: work())
    whole = vc.distill(cache, student=str(student_folder), out=tmp_path / "one", overrides=changes)
    assert losses(tmp_path / "run0") == [(*where, pytest.approx(loss, abs=1e-4)) for *where, loss in losses(whole)]
    assert (tmp_path / "run0" / "student" / "gates.safetensors").exists()

    def refused(_: int) -> str:
        with pytest.raises(SpecError) as caught:
            work("run.parallel=fsdp")
        return str(caught.value)

    assert all("`run.parallel: fsdp` shares out layers that run once" in text for text in run_together(2, refused))
