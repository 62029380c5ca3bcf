"""A run in a notebook: facts of its files, nothing of theirs as markup."""

import json
from pathlib import Path

import pytest

import vlsi_cache as vc
from vlsi_cache.errors import CacheCorruptError, SpecError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spec = {"name": "t", "teacher": {"model": "m", "layers": [1]}, "data": {"path": "rows.jsonl"}}
    record = {"kind": "distill", "status": "failed", "spec": spec, "recipe": "vlsi", "student": "<b>\x1b[31m</b>"}
    (tmp_path / "run.json").write_text(json.dumps({**record, "message": "it has diverged"}))
    step = {"stage": "sft", "step": 3, "num_steps": 7, "loss": 1.25, "elapsed_s": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step) + "\n" + '{"stage": "sf')  # a kill cut the last line
    return tmp_path


def test_a_run_shows_itself(folder: Path) -> None:
    run = vc.open_run(folder)
    assert (run.status, run.scores, [step["step"] for step in run.metrics()]) == ("failed", None, [3])
    assert repr(run) == f"Run({str(folder)!r}, distill, failed)"
    shown = run._repr_html_()
    assert "<th>last step</th><td>sft 3 of 7, loss 1.25</td>" in shown
    assert "<th>message</th><td>it has diverged</td>" in shown
    assert "&lt;b&gt;\\x1b[31m&lt;/b&gt;" in shown


def test_what_is_no_run_or_damaged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(SpecError, match=r"holds no run: it has no run\.json"):
        vc.open_run(tmp_path_factory.mktemp("empty"))
    (folder / "run.json").write_text("{")
    with pytest.raises(CacheCorruptError, match=r"run\.json"):
        vc.open_run(folder)
