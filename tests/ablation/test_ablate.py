"""Ablations: every variant of every table, one budget, going on after a stop, how layers are read, refusals."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers.remote import copied, new_url
from helpers.tiny import write_spec
from safetensors.torch import load_file, save_file

import vlsi_cache as vc
from vlsi_cache.ablation import runner as ablate_module
from vlsi_cache.ablation import variants as variants_module
from vlsi_cache.ablation.variants import PlannedRun, Row, overrides_between, plan_runs, read_axes, shipped_axes
from vlsi_cache.config.spec import apply_overrides
from vlsi_cache.errors import DataError, FingerprintMismatchError, ModelError, SpecError
from vlsi_cache.evaluation.scores import evaluate_model
from vlsi_cache.models.load import ModelRef
from vlsi_cache.report import pages
from vlsi_cache.report.ablation import num_failed
from vlsi_cache.run_files import read_metrics
from vlsi_cache.store.dataset import PartWindowReader
from vlsi_cache.store.reader import Cache

SHORT = [
    "distill.verbalize.steps=2",
    "distill.interact.schedule.steps=2",
    "distill.sft.schedule.steps=1",
    "distill.micro_batch_size=2",  # four draws: those of two ways of matching differ
    "evaluate.max_new_tokens=3",
    "evaluate.batch_size=12",
]
CLOCK = {"seconds"}
Start = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def _no_figures() -> Iterator[None]:
    """Drawing takes longer than training these students; the pages have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for page in ("run_page", "ablation_page"):
            patch.setattr(pages, page, lambda _: "")
        yield


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> vc.CacheSpec:
    return vc.load_spec(write_spec(tmp_path_factory.mktemp("spec"), teacher_folder), overrides=SHORT)


@pytest.fixture(scope="module")
def cache(spec: vc.CacheSpec, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return vc.build_teacher(spec, out=tmp_path_factory.mktemp("ablate") / "cache")


@pytest.fixture(scope="module")
def start(spec: vc.CacheSpec, cache: Cache, student_folder: Path) -> Start:
    """`vc.ablate` of two variants and the shared cache, unless told otherwise."""

    def ablate(out: Path, **options: Any) -> dict[str, Any]:
        wanted = {"axes": ["matching"], "variants": ["order"], "cache": cache.path, "student": str(student_folder)}
        return vc.ablate(options.pop("spec", spec), out=out, **{**wanted, **options})

    return ablate


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants with two seeds, never stopped."""
    out = tmp_path_factory.mktemp("whole") / "ablation"
    start(out, seeds=2)
    return out


def scores(out: Path) -> dict[str, Any]:
    """What was measured, without the clock."""
    runs = json.loads((out / "ablation.json").read_text())["runs"]
    return {
        (name, seed): {key: value for key, value in entry.items() if key not in CLOCK}
        for name, entries in runs.items()
        for seed, entry in entries.items()
    }


def plan(
    spec: vc.CacheSpec, cache: Cache, student: Path, *axes: str, read_rows: bool = True, names: list[str] | None = None
) -> tuple[dict[str, PlannedRun], dict[str, list[Row]]]:
    tables, found = read_axes(axes), cache if read_rows else None
    return plan_runs(spec, tables, cache.header, found, names=names, student=str(student), where=cache.path)


def test_exits_leave_students_comparable(
    spec: vc.CacheSpec, cache: Cache, student_folder: Path, tmp_path: Path
) -> None:
    file, steps = tmp_path / "depth.yaml", ["distill.exits.schedule.steps=3"]
    depth = {"name": "depth", "what": "all layers may answer", "recipe": "any-depth", "set": steps}
    file.write_text(yaml.safe_dump({"title": "depth", "variants": [depth]}))
    runs, _ = plan(spec, cache, student_folder, str(file))
    assert (runs["depth"].num_steps, runs["vlsi"].num_steps) == (8, 5)
    longer = [*steps, "distill.sft.schedule.steps=9"]
    file.write_text(yaml.safe_dump({"title": "depth", "variants": [{**depth, "set": longer}]}))
    with pytest.raises(SpecError, match=r"variant `depth` would take .* and `vlsi` 5: they could not be compared"):
        plan(spec, cache, student_folder, str(file))


def test_every_variant_of_every_table_is_valid(spec: vc.CacheSpec, cache: Cache, student_folder: Path) -> None:
    runs, tables = plan(spec, cache, student_folder, *shipped_axes())
    rows = [row for table in tables.values() for row in table]
    too_wide = {"k-16", "k-32", "k-64"}
    assert {row["names"][0] for row in rows if row["reason"] is not None} == {"deepest-quarter", *too_wide}
    assert {tuple(row["names"]) for row in rows if len(row["names"]) > 1} == {
        ("vlsi", "adaptive"),
        ("vlsi", "kld+kld"),
        ("last", "x+kld"),
        ("vlsi", "verb-ffn"),
        ("vlsi", "whole-sft"),
        ("vlsi", "forward_kl"),
        ("vlsi", "k-8"),
        ("vlsi", "all-layers"),
    }
    assert all(table[0]["names"][0] == "vlsi" and table[-1]["names"][0] == "sft" for table in tables.values())
    traversed = {name for name, run in runs.items() if run.spec.distill.traversal is not None}
    assert len(traversed) == 13
    changed = {name: run.spec.distill.interact for name, run in runs.items()}
    assert {name for name, run in runs.items() if changed[name] == spec.distill.interact} == {
        *("vlsi", "last", "sft", "whole-sft-full", "k-1", "k-4", "every-second", "suggested-half"),
        *("mlp", "mlp-x2", "verb-ffn-x2", "ffn", "ffn-x2", "decoder", "decoder-x2", "plain", "kl_to_final"),
        *("no-sft", "half-sft", "half-sft-full", "beams", "no-sft-beams"),
        *("untrained", *traversed),
    }
    assert {run.num_steps for run in runs.values() if not run.variant.own_steps} == {5}
    assert {name for name, run in runs.items() if not run.takes_verbalizers} == {
        *("vlsi", "last", "sft", "mlp", "mlp-x2", "verb-ffn-x2", "ffn", "ffn-x2", "decoder", "decoder-x2"),
        *("plain", "kl_to_final", "beams"),
        *("untrained", *traversed),
    }
    assert {name: run.trained_as for name, run in runs.items() if run.trained_as != name} == {
        "beams": "vlsi",
        "no-sft-beams": "no-sft",
        "untrained": "vlsi",
        "question": "nothing",
        "question-answer": "nothing",
    }


def test_the_budget_names_those_that_take_fewer_steps(start: Start, tmp_path: Path) -> None:
    budget = start(tmp_path / "ablation", axes=["sft", "matching"], variants=None, dry_run=True)["budget"]
    assert budget.startswith("5 optimizer steps of 4 samples for every variant")
    assert budget.endswith(", but for no-sft 4")  # half of one step is one


def test_variants_that_come_to_the_same_share_a_run(
    spec: vc.CacheSpec, cache: Cache, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants_module, "suggest_layers", lambda _, keep: SimpleNamespace(layers=[2, 4, 5][-keep:]))
    structure = apply_overrides(spec, ["verbalizer.structure=ffn"])
    _, tables = plan(structure, cache, student_folder, "layers", "verbalizer")
    names = [row["names"] for table in tables.values() for row in table]
    assert ["every-second", "suggested-half"] in names
    assert ["vlsi", "ffn"] in names
    (row,) = (row for row in tables["layers"] if row["names"][0] == "every-second")
    assert (row["run"], row["what"]) == ("every-second", "every second layer, the deepest among them: 2, 4")


def test_what_is_not_possible_says_why(spec: vc.CacheSpec, cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    def reasons(found: Cache, *axes: str) -> dict[str, str]:
        _, tables = plan(spec, found, student_folder, *axes, read_rows=False)
        return {row["names"][0]: row["reason"] for rows in tables.values() for row in rows if row["reason"]}

    mine = axis_file(tmp_path / "mine.yaml", [{"name": "seventh", "what": "it has five", "layers": [2, 7]}])
    found = reasons(cache, "layers", "k", str(mine))
    assert "at least as many teacher layers" in found["deepest-quarter"]
    assert "finished cache" in found["suggested-half"]
    assert found["k-64"] == "the cache keeps 8 entries of each row"
    assert found["seventh"] == "the cache has no intermediate layers [7]; it has [1, 2, 3, 4]"
    draws: Any = SimpleNamespace(
        header=cache.header.model_copy(update={"taus": [1.0], "row_kind": "sampled"}), path=cache.path
    )
    found = reasons(draws, "loss", "k")
    assert "rows.taus=[1.0,2.0]" in found["tau-2"]
    assert "holds draws" in found["jsd"]
    assert "another teacher pass" in found["k-4"]


def axis_file(file: Path, variants: list[dict[str, Any]], **keys: Any) -> Path:
    file.write_text(yaml.safe_dump({"title": "my own", "variants": variants, **keys}))
    return file


def test_a_table_of_the_user(spec: vc.CacheSpec, cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    variants = [
        {"name": "hot", "what": "fast", "set": ["distill.interact.scale=4"], "recipe": "vlsi"},
        {"name": "two", "what": "two layers", "layers": [4, 2], "top_k": 4},
        {"name": "short", "what": "two words", "evaluate": {"max_new_tokens": 2}},
    ]
    shared = ["distill.interact.layer_reduction=mean", "distill.interact.scale=3"]
    mine = axis_file(tmp_path / "mine.yaml", variants, set=shared, note="a note")
    runs, tables = plan(spec, cache, student_folder, str(mine), "matching", names=["hot", "two", "short", "order"])
    assert {axis: [row["names"] for row in rows] for axis, rows in tables.items()} == {
        "mine": [["vlsi"], ["hot"], ["two"], ["short"]],
        "matching": [["vlsi"], ["order"]],
    }
    hot = runs["hot"].spec.distill.interact
    assert (hot.layer_reduction, hot.scale, runs["two"].spec.distill.interact.scale) == ("mean", 4, 3)
    assert (runs["two"].layers, runs["two"].top_k) == ([2, 4, 5], 4)
    measured = runs["short"].measured_with.evaluate
    assert measured is not None
    assert measured.max_new_tokens == 2
    other = axis_file(tmp_path / "other.yaml", [{"name": "order", "what": "", "set": ["distill.interact.scale=4"]}])
    with pytest.raises(SpecError, match="two variants of different settings are named `order`"):
        plan(spec, cache, student_folder, "matching", str(other))


def test_a_finished_run_is_not_taken_for_another_one_of_its_name(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate_module, "distill", lambda *_, **__: None)
    monkeypatch.setattr(ablate_module, "_verbalizers_of", lambda _: tmp_path)
    monkeypatch.setattr(ablate_module, "evaluate", lambda *_, **__: dict.fromkeys(ablate_module.SCORES))
    stages = [{"name": "interact", "steps": 5, "seconds": 1.0}]
    monkeypatch.setattr(ablate_module, "read_run", lambda _: {"stages": stages, "versions": {}})
    mine, out = tmp_path / "mine.yaml", tmp_path / "ablation"
    variant = {"name": "hot", "what": "", "set": ["distill.interact.scale=4"], "evaluate": {"num_beams": 2}}
    axis_file(mine, [variant])
    record = start(out, axes=[str(mine)], variants=["hot"])
    assert record["runs"]["hot"]["0"]["settings"] == ["distill.interact.scale=4.0", "evaluate.num_beams=2"]
    assert record["runs"]["vlsi"]["0"]["settings"] == []
    axis_file(mine, [{**variant, "set": ["distill.interact.scale=5"]}])
    with pytest.raises(FingerprintMismatchError, match=r"run `hot` .*scale=4\.0, .* there, .*scale=5\.0, .* now"):
        start(out, axes=[str(mine)], variants=["hot"], dry_run=True)
    axis_file(mine, [{**variant, "set": ["distill.interact.layer_reduction=sum", "distill.interact.scale=4.0"]}])
    start(out, axes=[str(mine)], variants=["hot"], dry_run=True)


def test_the_table_that_the_readme_shows_is_valid(tmp_path: Path) -> None:
    text = (shipped_axes()["k"].parents[1] / "README.md").read_text(encoding="utf-8")
    file = tmp_path / "shown.yaml"
    file.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    assert [one.name for one in read_axes([str(file)])["shown"].variants] == ["hot", "few", "half"]


def test_mistakes_in_a_table_are_listed(tmp_path: Path) -> None:
    def says(*parts: str, **keys: Any) -> None:
        values = {"title": "t", "variants": [{"name": "a", "what": "b"}], **keys}
        (tmp_path / "t.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(SpecError) as caught:
            read_axes([str(tmp_path / "t.yaml")])
        assert all(part in str(caught.value) for part in (f"axis `{tmp_path}/t.yaml` has", *parts)), caught.value

    one = {"name": "a", "what": "b"}
    says("2 mistake(s)", "`tittle`: no such key; known here: title, note", "`variants.0.recpe`: no such key; known",
         tittle="x", variants=[{**one, "recpe": "sft"}])  # fmt: skip
    says("two variants are named `a`", variants=[one, one])
    says("every table has `vlsi`", variants=[{**one, "name": "sft"}])
    says("variants.0.name", variants=[{**one, "name": "../up"}])
    says("variants.0.evaluate", variants=[{**one, "evaluate": {"data": 1}}])
    says("variants.0.layers", variants=[{**one, "layers": "every-third"}])
    says("`variants`", variants=5)
    for change in ("rows.top_k=4", "distill.seed=1", "evaluate.num_beams=2", "distill.trust_remote_code=true", "scale"):
        says(f"`variants.0.set.0`: `{change}`: write KEY=VALUE with a key of", variants=[{**one, "set": [change]}])
    (tmp_path / "t.yaml").write_text("title: a\ntitle: b\n")
    with pytest.raises(SpecError, match=r"`title` is named twice, in line 1 and line 2"):
        read_axes([str(tmp_path / "t.yaml")])
    with pytest.raises(SpecError, match=r"nosuch\.yaml` cannot be read: No such file"):
        read_axes(["nosuch.yaml"])
    with pytest.raises(SpecError, match="is a URL"):
        read_axes(["https://somewhere/t.yaml"])


def test_one_training_is_measured_in_several_ways(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, beams = ablate_module.evaluate, []

    def look(run: Path, **options: Any) -> Any:
        beams.append((run.name, options["spec"].evaluate.num_beams))
        return measure(run, **options)

    monkeypatch.setattr(ablate_module, "evaluate", look)
    out = tmp_path / "ablation"
    record = start(out, axes=["decoding"], variants=["no-sft-beams"])
    assert beams == [("vlsi", 1), ("no-sft", 5)]
    assert record["runs"]["no-sft-beams"]["0"]["run"] == "runs/seed-0/no-sft"
    record = start(out, axes=["sft"], variants=["no-sft"])
    assert beams[2:] == [("no-sft", 1)]
    one, five = (record["runs"][name]["0"] for name in ("no-sft", "no-sft-beams"))
    assert (one["nll"], one["steps"], one["seconds"]) == (five["nll"], five["steps"], five["seconds"])
    assert sorted(folder.name for folder in (out / "runs" / "seed-0").iterdir()) == ["no-sft", "vlsi"]
    assert start(out, axes=["decoding", "sft"], variants=["no-sft-beams", "no-sft"], dry_run=True)["num_remaining"] == 0


def test_two_variants_with_two_seeds(whole: Path) -> None:
    record = json.loads((whole / "ablation.json").read_text())
    assert record["runs"].keys() == {"vlsi", "order"}
    assert all(entry["status"] == "done" for entries in record["runs"].values() for entry in entries.values())
    for seed in (0, 1):
        default, order = (whole / "runs" / f"seed-{seed}" / name for name in ("vlsi", "order"))
        settings = [json.loads((run / "run.json").read_text()) for run in (default, order)]
        assert [one["spec"]["distill"]["interact"]["matching"] for one in settings] == ["vlsi", "order"]
        assert [one["spec"]["distill"]["seed"] for one in settings] == [seed, seed]
        assert settings[1]["verbalizers_digest"].keys() == {"1", "2"}
        assert {line["stage"] for line in read_metrics(order / "metrics.jsonl")} == {"interact", "sft"}
        assert [sum(stage["steps"] for stage in one["stages"]) for one in settings] == [5, 5]
        entries = [record["runs"][name][str(seed)] for name in ("vlsi", "order")]
        assert (entries[1]["device"], entries[1]["versions"]) == ("cpu", settings[1]["versions"])
        assert entries[1]["seconds"] > settings[0]["stages"][0]["seconds"] > 0  # those of the verbalizers count too
        held_out = vc.load_spec(Path(record["spec"]["data"]["path"]).with_name("spec.yaml")).evaluate
        assert held_out is not None
        measured = evaluate_model(
            ModelRef(order / "student", dtype="auto"),
            held_out,
            verbalizers=str(default / "verbalizers"),
            device="cpu",
            batch_tokens=200,
        )
        assert entries[1]["layers"] == measured["layers"]
        assert entries[1]["nll"] == measured["nll"]
        assert entries[1]["layers"] != entries[0]["layers"]
    lines = (whole / "ablation.csv").read_text().splitlines()
    runs = [[name, str(seed), "done"] for name in ("vlsi", "order") for seed in (0, 1)]
    assert [line.split(",")[1:4] for line in lines[1:]] == runs
    assert (whole / "report.html").is_file()


def test_a_stopped_ablation_goes_on_and_repeats_nothing(
    start: Start, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "ablation", []
    distill, measure = ablate_module.distill, ablate_module.evaluate

    def count(*arguments: Any, **options: Any) -> Any:
        calls.append(("train", options["out"].relative_to(out).as_posix()))
        return distill(*arguments, **options)

    def stop(run: Path, **options: Any) -> Any:
        calls.append(("measure", run.relative_to(out).as_posix()))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(run, **options)

    monkeypatch.setattr(ablate_module, "distill", count)
    monkeypatch.setattr(ablate_module, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        start(out, seeds=2)
    assert len(calls) == 4
    preview = start(out, seeds=2, dry_run=True)
    assert (preview["num_runs"], preview["num_remaining"]) == (4, 3)
    start(out, seeds=2)
    both = [
        (what, f"runs/seed-{seed}/{name}")
        for seed in (0, 1)
        for name in ("vlsi", "order")
        for what in ("train", "measure")
    ]
    assert calls[4:] == both[2:]
    assert scores(out) == scores(whole)
    calls.clear()
    record = start(out, axes=["operations"], variants=["kld+kld"])
    assert calls == []
    assert {axis: [row["names"] for row in rows] for axis, rows in record["tables"].items()} == {
        "matching": [["vlsi"], ["order"]],
        "operations": [["vlsi", "kld+kld"]],
    }


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill = ablate_module.distill

    def diverge(*arguments: Any, **options: Any) -> Any:
        if options["out"].name == "order":
            raise ModelError("training has diverged")
        return distill(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ablate_module, "distill", diverge)
        record = start(tmp_path / "ablation", variants=["order", "sft"])
    assert num_failed(record) == 1
    assert record["runs"]["order"]["0"]["message"] == "training has diverged"
    assert record["runs"]["sft"]["0"]["layers"].keys() == {"1", "2"}  # read through the default's verbalizers
    assert num_failed(start(tmp_path / "ablation", variants=["order", "sft"])) == 0


def test_no_student_is_read_through_other_verbalizers_than_those_of_the_default(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> Any:
        raise ModelError("training has diverged")

    with monkeypatch.context() as patch:
        patch.setattr(ablate_module, "distill", diverge)
        record = start(tmp_path / "ablation", variants=["order", "sft"])
    assert num_failed(record) == 3
    for name in ("order", "sft"):
        assert "seed-0/vlsi has left no verbalizers" in record["runs"][name]["0"]["message"]
    assert num_failed(start(tmp_path / "ablation", variants=["order", "sft"])) == 0


def test_a_student_that_its_last_update_destroyed_has_failed(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill, out = ablate_module.distill, tmp_path / "ablation"

    def destroy(*arguments: Any, **options: Any) -> Any:
        run = distill(*arguments, **options)
        if options["out"].name == "sft":
            file = run / "student" / "model.safetensors"
            tensors = load_file(file)
            tensors["model.layers.2.mlp.down_proj.weight"].fill_(torch.nan)  # above the verbalized layers
            save_file(tensors, file, metadata={"format": "pt"})
        return run

    def no_constant(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    monkeypatch.setattr(ablate_module, "distill", destroy)
    for _ in range(2):
        record = start(out, variants=["sft"])
        assert num_failed(record) == 1
        assert record["runs"]["sft"]["0"]["message"].endswith("with a lower `learning_rate` or a longer `warmup`")
        json.loads((out / "ablation.json").read_text(), parse_constant=no_constant)
    monkeypatch.undo()
    shutil.rmtree(out / "runs" / "seed-0" / "sft")
    assert num_failed(start(out, variants=["sft"])) == 0


def test_held_out_rows_are_read_before_anything_is_built(start: Start, spec: vc.CacheSpec, tmp_path: Path) -> None:
    missing = apply_overrides(spec, [f"evaluate.data.path={tmp_path / 'nosuch.jsonl'}"])
    with pytest.raises(DataError, match=r"nosuch\.jsonl"):
        start(tmp_path / "ablation", spec=missing, cache=None)
    assert not (tmp_path / "ablation").exists()


def test_a_student_is_read_through_the_verbalizers_it_was_trained_with(
    start: Start, spec: vc.CacheSpec, tmp_path: Path
) -> None:
    """Or its norm and head; steps are those of the student."""
    out, file = tmp_path / "ablation", tmp_path / "lens.yaml"
    lens = {"name": "lens", "what": "norm and head", "recipe": "any-depth"}
    lens["set"] = ["verbalizer.structure=logit-lens", "distill.exits.weight=0.2"]
    file.write_text(yaml.safe_dump({"title": "lens", "variants": [lens]}))
    changed = apply_overrides(spec, ["distill.exits.schedule.steps=1"])
    record = start(out, spec=spec, axes=["verbalizer", str(file)], variants=["ffn", "last", "lens"])
    runs = out / "runs" / "seed-0"
    own = json.loads((runs / "lens" / "evaluation.json").read_text())
    exits = {str(one["layer"]): one["nll"] for one in vc.exits(runs / "lens")["exits"]}
    assert (own["measured_with"]["verbalizers"], own["layers"]) == (
        None,
        pytest.approx({k: exits[k] for k in own["layers"]}),
    )
    assert len(own["layers"]) == 2
    assert {one["0"]["steps"] for one in record["runs"].values()} == {5}
    assert ", exits" not in start(tmp_path / "other", spec=changed, dry_run=True)["budget"]
    for name, ruler in (("ffn", "ffn"), ("last", "vlsi")):
        found = json.loads((runs / name / "evaluation.json").read_text())["verbalizers"]
        assert found["path"] == str(runs / ruler / "verbalizers")


def test_rows_of_one_table_add_up(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_nothing(ablation: Any, run: Any, *_: Any) -> dict[str, Any]:
        return {"status": "done", "run": ablation.folder(run.trained_as, 0).name, "steps": 5, "nll": 1.0}

    monkeypatch.setattr(ablate_module, "_one_run", train_nothing)
    out = tmp_path / "ablation"
    for variants in (["range", "sft", "adaptive"], ["printed", "last"], ["random"]):
        record = start(out, variants=variants)
    names = [["vlsi", "adaptive"], ["random"], ["range"], ["printed"], ["last"], ["sft"]]
    assert [row["names"] for row in record["tables"]["matching"]] == names
    assert [line.split(",")[1] for line in (out / "ablation.csv").read_text().splitlines()[1:]] == [
        " = ".join(one) for one in names
    ]
    del record["runs"]["range"]  # a run that was asked for and never made is not kept
    (out / "ablation.json").write_text(json.dumps(record))
    start(out, axes=["layers"], variants=["deepest-quarter"])
    record = start(out, variants=["order"])
    names[2] = ["order"]
    assert [row["names"] for row in record["tables"]["matching"]] == names
    record = start(out, axes=["layers"], variants=["all-layers"])  # what was not possible stays told
    assert [row["names"] for row in record["tables"]["layers"]] == [["vlsi", "all-layers"], ["deepest-quarter"]]


@pytest.mark.usefixtures("part_cache_dir")
def test_smaller_caches_are_cut_from_the_one_at_hand(start: Start, cache: Cache, whole: Path, tmp_path: Path) -> None:
    """Which lies on an object store here: the runs are those of a folder."""
    url = copied(cache.path)
    record = start(tmp_path / "ablation", axes=["k", "layers"], variants=["k-4", "every-second"], cache=url)
    assert record["cache"] == url
    assert scores(tmp_path / "ablation")["vlsi", "0"] == scores(whole)["vlsi", "0"]
    caches = {folder.name: vc.open(folder).header for folder in (tmp_path / "ablation" / "caches").iterdir()}
    assert {name: (header.layers, header.top_k) for name, header in caches.items()} == {
        "k-4": ([1, 2, 3, 4, 5], [4] * 5),
        "every-second": ([2, 4, 5], [8] * 3),
    }
    order = [row.sample_id for row in PartWindowReader(cache, seed=3, epoch=1, window_parts=2)]
    for name in caches:
        smaller = vc.open(tmp_path / "ablation" / "caches" / name)
        assert [row.sample_id for row in PartWindowReader(smaller, seed=3, epoch=1, window_parts=2)] == order
        run = json.loads((tmp_path / "ablation" / "runs" / "seed-0" / name / "run.json").read_text())
        assert run["cache"] == str(tmp_path / "ablation" / "caches" / name)


@pytest.mark.usefixtures("part_cache_dir")
def test_a_cache_by_its_url_from_the_command_line(
    spec: vc.CacheSpec, cache: Cache, student_folder: Path, tmp_path: Path, run: Any
) -> None:
    assert isinstance(spec.data.path, str)
    sets = [word for one in SHORT for word in ("--set", one)]
    words = ["ablate", Path(spec.data.path).parent / "spec.yaml", "--axis", "matching", "--student", student_folder]
    words += ["-o", tmp_path / "ablation", "--variants", "order", "--dry-run", *sets]
    code, out, err = run(*words, "--cache", copied(cache.path))
    assert (code, "order" in out) == (0, True), err
    code, _, err = run(*words, "--cache", url := new_url())
    assert (code, f"there is no cache at `{url}`" in err) == (3, True), err


def test_settings_of_the_spec_win_over_those_in_the_cache(start: Start, spec: vc.CacheSpec, tmp_path: Path) -> None:
    other = apply_overrides(spec, ["distill.sft.schedule.epochs=0.1", "distill.seed=7", "evaluate.generate=false"])
    record = start(tmp_path / "ablation", spec=other, variants=[])
    run = json.loads((tmp_path / "ablation" / "runs" / "seed-7" / "vlsi" / "run.json").read_text())
    assert run["spec"]["distill"]["sft"]["schedule"]["epochs"] == 0.1
    assert [stage["steps"] for stage in run["stages"]] == [2, 2, 1]
    assert record["runs"]["vlsi"]["7"]["exact_match"] is None


def test_changes_between_two_specs_make_one_of_the_other(spec: vc.CacheSpec) -> None:
    changes = ["distill.sft.schedule.epochs=0.5", "distill.interact.schedule.final_learning_rate=0.00001"]
    changes += ["distill.student='models/\u00e9\U0001f600: #1'", "evaluate=null", "distill.layers=[2]", "data.limit=3"]
    other = apply_overrides(spec, changes)
    for one, wanted in ((spec, other), (other, spec)):
        between = overrides_between(one, wanted, ("distill", "evaluate", "data"))
        assert apply_overrides(one, between) == wanted
    assert overrides_between(spec, spec, ("distill", "evaluate", "data")) == []


def test_a_setting_that_an_earlier_release_did_not_have_is_no_difference(whole: Path, start: Start) -> None:
    file = whole / "ablation.json"
    record = json.loads(file.read_text())
    del record["spec"]["distill"]["sft"]["fraction"]
    file.write_text(json.dumps(record))
    assert start(whole, seeds=2, dry_run=True)["num_remaining"] == 0


def test_the_cache_is_built_when_there_is_none(start: Start, cache: Cache, tmp_path: Path) -> None:
    preview = start(tmp_path / "ablation", cache=None, dry_run=True)
    assert not (tmp_path / "ablation").exists()
    assert preview["num_remaining"] == 2
    record = start(tmp_path / "ablation", cache=None, variants=[])
    assert vc.open(tmp_path / "ablation" / "cache").header.digest == cache.header.digest
    assert record["cache"] == "cache"


def test_hostile_requests(
    start: Start, spec: vc.CacheSpec, cache: Cache, whole: Path, tmp_path: Path, teacher_folder: Path
) -> None:
    out = tmp_path / "ablation"
    for options, says in (
        ({"variants": ["ordre"]}, "did you mean `order`"),
        ({"axes": ["mtching"]}, "did you mean `matching`"),
        ({"axes": ["k", "k"]}, "once"),
        ({"axes": []}, "at least one"),
        ({"seeds": 0}, "at least one"),
        ({"student": None}, "no student"),
        ({"spec": apply_overrides(spec, ["distill.recipe=sft"])}, "decides that itself"),
        ({"spec": apply_overrides(spec, ["evaluate=null"])}, "nothing to compare"),
        ({"spec": apply_overrides(spec, ["distill.layers=[1,2,3,4,5]"])}, "out of range"),
    ):
        with pytest.raises(SpecError, match=says):
            start(out, **options)
    with pytest.raises(SpecError, match="lies in the source"):
        start(cache.path / "ablation")
    with pytest.raises(FingerprintMismatchError, match=r"rows\.tail_samples`: 3 there, 2 now"):
        start(out, spec=apply_overrides(spec, ["rows.tail_samples=2"]))
    assert not out.exists()
    with pytest.raises(FingerprintMismatchError, match=r"spec\.distill\.batch_size`: 4 there, 8 now"):
        start(whole, spec=apply_overrides(spec, ["distill.batch_size=8"]))
    with pytest.raises(FingerprintMismatchError, match="student_digest"):
        start(whole, student=str(teacher_folder))
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match=f"{tmp_path}/file is a file; name a folder"):
        start(tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(SpecError, match=r"holds `cat\.png`"):
        start(tmp_path / "photos")
