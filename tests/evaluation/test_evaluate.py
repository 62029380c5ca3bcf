"""Evaluation: whose settings hold, what may run code, and which folders it is for."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import evaluation_page
from helpers.tiny import write_spec

import vlsi_cache as vc
from vlsi_cache.config.sections import Encoding
from vlsi_cache.data.sequence import Layout
from vlsi_cache.errors import DataError, ModelError, SpecError
from vlsi_cache.evaluation import scores as evaluate_module
from vlsi_cache.models.load import ModelRef
from vlsi_cache.run_files import read_evaluation

SHORT = ["distill.sft.schedule.steps=1", "distill.verbalize.steps=1", "distill.interact.schedule.steps=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Path:
    """A run whose stored spec names a device, a dtype, an attention, a batch size, and remote code."""
    folder = tmp_path_factory.mktemp("evaluate")
    spec = vc.load_spec(write_spec(folder, teacher_folder), overrides=["run.batch_tokens=130"])
    cache = vc.build_teacher(spec, out=folder / "cache")
    changes = [*SHORT, "distill.student_dtype=bfloat16", "distill.attn_implementation=eager"]
    changes += ["distill.trust_remote_code=true", "evaluate.generate=false"]
    return vc.distill(cache, student=str(student_folder), out=folder / "run", recipe="sft", overrides=changes)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the model and the encoder are loaded with, and the sizes of the batches."""
    seen: dict[str, Any] = {}
    load, encoder, plan_sample_batches = ModelRef.load, ModelRef.encoder, evaluate_module.plan_sample_batches

    def spy_model(self: ModelRef, device: str) -> Any:
        seen["model"] = {**dataclasses.asdict(self), "device": device}
        return load(self, device)

    def spy_encoder(self: ModelRef, encoding: Encoding) -> Any:
        seen["encoder"] = {**dataclasses.asdict(self), **dataclasses.asdict(encoding)}
        return encoder(self, encoding)

    def spy_batches(measured: Any, batch_tokens: int, layout: Layout) -> Any:
        seen["batch_tokens"] = batch_tokens
        return plan_sample_batches(measured, batch_tokens, layout)

    monkeypatch.setattr(ModelRef, "load", spy_model)
    monkeypatch.setattr(ModelRef, "encoder", spy_encoder)
    monkeypatch.setattr(evaluate_module, "plan_sample_batches", spy_batches)
    return seen


def test_only_the_caller_lets_a_model_run_code(run: Path, loaded: dict[str, Any]) -> None:
    assert json.loads((run / "run.json").read_text())["spec"]["distill"]["trust_remote_code"] is True
    vc.evaluate(run)
    assert loaded["model"]["trust_remote_code"] is False
    assert loaded["encoder"]["trust_remote_code"] is False
    vc.evaluate(run, trust_remote_code=True)
    assert loaded["model"]["trust_remote_code"] is True
    assert loaded["encoder"]["trust_remote_code"] is True


def test_the_settings_of_the_run_are_the_defaults(
    run: Path, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str | None] = []
    pick = evaluate_module.pick_device

    def spy(device: str | None) -> Any:
        devices.append(device)
        return pick("cpu")

    monkeypatch.setattr(evaluate_module, "pick_device", spy)
    vc.evaluate(run)
    vc.evaluate(run, device="cuda:3")
    assert devices == ["cpu", "cuda:3"]
    assert (loaded["model"]["dtype"], loaded["model"]["attn_implementation"]) == ("bfloat16", "eager")
    assert loaded["batch_tokens"] == 130


def test_rows_beyond_the_limit_are_not_read(run: Path) -> None:
    file = run.parent / "heldout.jsonl"
    kept = file.read_text()
    try:
        file.write_text(kept + '{"id": "bad"}\n')
        assert vc.evaluate(run, limit=12)["num_samples"] == 12
        with pytest.raises(DataError, match="1 of 13 rows cannot be used"):
            vc.evaluate(run)
    finally:
        file.write_text(kept)


def test_rows_left_out_are_counted_and_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlsi_cache.config.spec import spec_from_dict
    from vlsi_cache.report.text import evaluation_table

    stored = json.loads((run / "run.json").read_text())["spec"]
    lines = Path(stored["evaluate"]["data"]["path"]).read_text().splitlines()
    long = json.loads(lines[1])
    long["id"], long["messages"][-1]["content"] = "long", "blue " * 200
    rows = run.parent / "some.jsonl"
    rows.write_text("\n".join([*lines[:3], '{"id": "unreadable"}', json.dumps(long)]))
    stored["evaluate"]["data"] |= {"path": str(rows), "bad_rows": "list"}
    result = vc.evaluate(run, spec=spec_from_dict(stored, where="here"))
    assert (result["num_samples"], result["num_skipped"]) == (3, 2)
    told = capsys.readouterr().err
    assert "2 held-out rows were left out\n  - row `unreadable`: " in told
    assert re.search(r"row `long`: \d+ tokens, data.max_length is", told)
    assert "held-out samples: 3 (2 left out)" in evaluation_table(result)
    assert "held-out samples (2 left out)" in evaluation_page(result)


def test_only_the_model_itself_is_destroyed_by_a_loss_without_a_perplexity(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layer, last, fails in ((800.0, 2.0, False), (2.0, 800.0, True), (math.nan, 2.0, True)):
        found = {1: layer, 3: last}
        monkeypatch.setattr(evaluate_module, "mean_nll", lambda *_, found=found, **__: found)
        if fails:
            with pytest.raises(ModelError, match="its last updates have destroyed it"):
                vc.evaluate(run)
        else:
            assert vc.evaluate(run)["layers"] == {"1": 800.0}


def test_what_is_neither_a_run_nor_a_model_is_called_so(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"is neither a run nor a model: it holds no run.json"):
        vc.evaluate(tmp_path)
    with pytest.raises(SpecError, match=r"there is no folder .*nosuch; for a model of the hub give --spec"):
        vc.evaluate(tmp_path / "nosuch")
    with pytest.raises(SpecError, match=r"no held-out rows for .*student: give --spec"):
        vc.evaluate(run / "student")


def test_small_batches_measure_the_same(run: Path) -> None:
    from vlsi_cache.config.spec import spec_from_dict

    stored = json.loads((run / "run.json").read_text())["spec"]
    stored["distill"]["student_dtype"] = "float32"
    results = []
    for batch_tokens in (130, 10_000):
        stored["run"]["batch_tokens"] = batch_tokens
        results.append(vc.evaluate(run, spec=spec_from_dict(stored, where="here")))
    assert results[0]["nll"] == pytest.approx(results[1]["nll"], rel=1e-5)


def test_the_result_of_a_run_is_what_its_own_spec_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlsi_cache.config.spec import change, spec_from_dict

    own = vc.evaluate(run)
    assert evaluate_module.kept_result(run) == own
    kept = (run / "evaluation.json").read_text()
    capsys.readouterr()
    few = vc.evaluate(run, limit=3)
    assert (few["num_samples"], few["measured_with"]["limit"]) == (3, 3)
    assert (run / "evaluation.json").read_text() == kept
    assert f"not kept in {run / 'evaluation.json'}" in capsys.readouterr().err

    spec = spec_from_dict(json.loads((run / "run.json").read_text())["spec"], where="here")
    assert spec.evaluate is not None
    fewer_rows = change(
        spec, evaluate={**spec.evaluate.model_dump(), "data": {**spec.evaluate.data.model_dump(), "limit": 5}}
    )
    in_float32 = change(spec, distill={**spec.distill.model_dump(), "student_dtype": "float32"})
    for other in (fewer_rows, in_float32):
        result = vc.evaluate(run, spec=other)
        assert result["measured_with"] != own["measured_with"]
        assert (run / "evaluation.json").read_text() == kept
        assert "measured otherwise than the run's own spec says: not kept" in capsys.readouterr().err
    result = vc.evaluate(run, overrides=["evaluate.data.limit=5"])
    assert result["num_samples"] == 5
    assert (run / "evaluation.json").read_text() == kept
    with pytest.raises(SpecError, match=r"evaluate\.data\.limits"):
        vc.evaluate(run, overrides=["evaluate.data.limits=5"])
    with_cache = vc.evaluate(run, cache=run.parent / "cache")
    assert evaluate_module.kept_result(run) == with_cache  # adds numbers, changes none
    record = read_evaluation(run)
    assert record is not None
    assert record["measured_with"]["cache"] == str(run.parent / "cache")
    for lacking in ({}, {"measured_with": {**record["measured_with"], "verbalizers": "elsewhere"}}):
        (run / "evaluation.json").write_text(json.dumps({**own, "measured_with": None, **lacking}))
        assert evaluate_module.kept_result(run) is None


def test_a_folder_of_verbalizers_is_called_by_its_name(teacher_folder: Path, tmp_path: Path, run: Path) -> None:
    spec = vc.load_spec(write_spec(tmp_path, teacher_folder), overrides=["train_verbalizers.schedule.steps=1"])
    folder = vc.train_verbalizers(spec, out=tmp_path / "verbalizers")
    with pytest.raises(SpecError, match="is a `train-verbalizers` run: it holds a teacher's verbalizers"):
        vc.evaluate(folder)
    record = json.loads((run / "run.json").read_text())
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text(json.dumps(record))
    with pytest.raises(SpecError, match=r"half/student is gone, or a part of it is, and the run is finished"):
        vc.evaluate(tmp_path / "half")
    (tmp_path / "half" / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    with pytest.raises(SpecError, match=r"no trained student yet; go on with: vlsi_cache\.distill\("):
        vc.evaluate(tmp_path / "half")
