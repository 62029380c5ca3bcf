"""The demo end to end at a small size, and the shipped teacher against what its card claims."""

import json
from pathlib import Path

import pytest

import vlsi_cache as vc
from vlsi_cache.demo import run as demo
from vlsi_cache.errors import CacheCorruptError
from vlsi_cache.evaluation import scores as evaluate_module
from vlsi_cache.evaluation.scores import evaluate_model
from vlsi_cache.models.load import ModelRef, resolve_model

SMALL = [
    "data.options.num_samples=30",
    "evaluate.data.options.num_samples=9",
    "evaluate.max_new_tokens=4",
    "distill.batch_size=4",
    "distill.micro_batch_size=4",
    "distill.verbalize.steps=2",
    "distill.interact.schedule.steps=3",
    "distill.sft.schedule.steps=2",
]  # 30 samples are what seven steps of four take


def test_the_whole_demo_and_a_second_run_that_only_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "WARM_START_STEPS", 4)
    monkeypatch.setattr(demo, "EXITS", ("distill.exits.schedule.steps=1",))
    summary = demo.run_demo(out=tmp_path / "demo", seeds=1, overrides=SMALL)
    assert summary["build_s"] > 0
    assert set(summary["runs"]) == {"sft", "last", "vlsi", "any-depth"}
    for recipe, (run,) in summary["runs"].items():
        record = json.loads((tmp_path / "demo" / run["run"] / "run.json").read_text())
        assert record["recipe"] == recipe
        steps = {stage["name"]: stage["steps"] for stage in record["stages"]}
        assert steps.pop("exits", None) == (None if recipe == "sft" else 1)
        assert sum(steps.values()) == (9 if recipe == "any-depth" else 7)  # which takes the verbalizers of vlsi
        assert [one["layer"] for one in run["exits"]] == ([] if recipe == "sft" else [1, 2, 3, 4])
        assert 0 <= run["exact_match"]["all"] <= 1
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "<svg" in page or "data:image/png" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    shown = tmp_path / "demo" / summary["runs"]["vlsi"][0]["run"]
    vc.evaluate(shown, num_beams=2)  # a look in passing is not what the demo shows
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "demo" / "runs").rglob("*.safetensors")}
    capsys.readouterr()
    again = demo.run_demo(out=tmp_path / "demo", seeds=1, overrides=SMALL)
    assert (again["runs"], again["build_s"]) == (summary["runs"], summary["build_s"])
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "demo" / "runs").rglob("*.safetensors")} == files
    assert evaluate_module.kept_result(shown) is not None
    assert "nothing to do" in capsys.readouterr().err


def test_only_a_build_measured_whole_has_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlsi_cache.report.pages import write_report
    from vlsi_cache.store.writer import CacheWriter

    monkeypatch.setattr(demo, "WARM_START_STEPS", 4)
    monkeypatch.setattr(demo, "RECIPES", ("sft",))
    write_part = CacheWriter.write_part

    def killed(writer: CacheWriter, part: int, *rest: object) -> None:
        if part > 0:
            raise KeyboardInterrupt
        write_part(writer, part, *rest)  # type: ignore[arg-type]

    small = [*SMALL, "store.part_mib=0.05", "data.options.num_samples=16"]
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_part", killed)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(out=tmp_path / "demo", overrides=small)
    assert (tmp_path / "demo" / "cache" / "cache.json").is_file()
    assert "build_s" not in demo.run_demo(out=tmp_path / "demo", overrides=small)
    assert "build_s" not in json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert "teacher pass" not in write_report(tmp_path / "demo").read_text()


def test_a_demo_with_a_damaged_cache_stops(tmp_path: Path) -> None:
    spec = vc.load_spec("demo", overrides=SMALL)
    cache = vc.build_teacher(spec, out=tmp_path / "demo" / "cache")
    chunk = max((cache.path / "parts").rglob("c/*"), key=lambda file: file.stat().st_size * file.is_file())
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CacheCorruptError, match=r"its cache has problems:[\s\S]*vlsi-cache repair"):
        demo.run_demo(out=tmp_path / "demo", overrides=SMALL)
    assert not (tmp_path / "demo" / "runs").exists()


def test_the_shipped_teacher_is_as_strong_as_its_card_says() -> None:
    spec = vc.load_spec("demo", overrides=["evaluate.data.options.num_samples=450"])
    assert spec.evaluate is not None
    assert spec.teacher.verbalizers is not None
    scores = evaluate_model(
        ModelRef(resolve_model(spec.teacher.model), dtype="auto"),
        spec.evaluate,
        verbalizers=resolve_model(spec.teacher.verbalizers),
    )
    exact = scores["exact_match"]
    assert exact.pop("all") >= 0.90
    assert min(exact.values()) >= 0.75, exact
    # What the layers say gets better with depth, up to the last one, on rows the verbalizers have never seen.
    losses = [*scores["layers"].values(), scores["nll"]]
    assert losses == sorted(losses, reverse=True)


def test_the_teacher_is_small_enough_to_ship() -> None:
    folder = Path(resolve_model("package:vlsi_cache/demo/teacher"))
    assert sum(f.stat().st_size for f in folder.rglob("*.safetensors")) <= 20 * 10**6
    assert (folder / "README.md").is_file()
