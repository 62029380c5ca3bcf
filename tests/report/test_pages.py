"""Reports: numbers against small oracles, figures and pages that need nothing outside themselves."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fakes import LAYERS, SPEC, K, fake_example, write_cache, write_demo, write_run
from helpers.pages import checked
from helpers.remote import copied, new_url, objects_of

from vlsi_cache.errors import CacheNotFoundError
from vlsi_cache.progress import human_bytes, human_seconds
from vlsi_cache.report import figures, pages, text
from vlsi_cache.report.example import example_of, grid_of
from vlsi_cache.report.pages import write_demo_report, write_report
from vlsi_cache.report.text import visible
from vlsi_cache.runs import metrics
from vlsi_cache.store.reader import open as open_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("caches") / "fake", skipped=2)


@pytest.mark.parametrize("seeds", [1, 3])
def test_demo_report_stands_alone(tmp_path: Path, seeds: int) -> None:
    demo = write_demo(tmp_path / "demo", seeds=seeds)
    file = write_demo_report(demo, example=fake_example(demo / "cache"))
    html = checked(file, num_figures=7)
    assert "How tall is the &lt;red&gt; bar?" in html
    assert "<red>" not in html
    assert "data:image/png;base64," in html
    assert ("worst to the best seed" in html) == (seeds == 3)
    assert "before &amp; &lt;not&gt; after" in html
    again = write_report(demo).read_text()  # from example.json
    assert again == html


def test_demo_report_without_cache_example_and_runs(tmp_path: Path) -> None:
    demo = write_demo(tmp_path / "demo")
    (demo / "cache").rename(tmp_path / "gone")
    (demo / "runs").rename(tmp_path / "gone too")
    assert "n/a" not in checked(write_report(demo), num_figures=3)


def test_cache_report(cache: Path) -> None:
    html = checked(write_report(cache), num_figures=2)
    assert "made-up &lt;rows&gt;" in html
    assert "prompt &lt;too&gt; long" in html
    assert "the&lt;b&gt;" not in html
    assert '<th class="word">&lt;b&gt;</th>' in html  # words come from the cache: its teacher is nowhere


@pytest.mark.usefixtures("part_cache_dir")
def test_report_of_a_cache_on_a_store(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """It is the page of the folder, but for the place it names, and goes to a local file."""
    monkeypatch.chdir(tmp_path)
    (cache / "report.html").unlink(missing_ok=True)  # of another test
    url = copied(cache)
    code, out, err = run("report", url, "--json")
    file = tmp_path / f"report-{url.rpartition('/')[2]}.html"
    assert (code, json.loads(out)["report"]) == (0, file.name), err
    assert file.read_text().replace(url, str(cache)) == write_report(cache).read_text()
    assert "report.html" not in objects_of(url).sizes()
    monkeypatch.setattr(pages, "cache_page", lambda one: f"<p>{one.path}")  # drawn above
    for where, name in ((url, "a/page.html"), (cache, "b.html")):
        assert run("report", where, "-o", tmp_path / name)[0] == 0
        assert (tmp_path / name).read_text() == f"<p>{where}"
    file.write_text("mine")
    code, _, err = run("report", url)
    assert (code, file.read_text(), "is no page of vlsi-cache" in err) == (2, "mine", True)
    code, _, err = run("report", missing := new_url())
    assert (code, f"there is no cache at `{missing}`" in err) == (3, True)


def test_cache_report_of_draws_without_texts(tmp_path: Path) -> None:
    html = checked(write_report(write_cache(tmp_path / "c", rows="sampled", texts=False)), num_figures=2)
    assert "The cache carries no token texts" in html
    assert ">n/a<" in html  # draws have no kept mass


def test_unfinished_cache_report(tmp_path: Path) -> None:
    html = write_report(write_cache(tmp_path / "c", num_written=1)).read_text()
    assert "1 of 2 parts" in html


@pytest.mark.parametrize(("recipe", "num_figures"), [("vlsi", 3), ("last", 1), ("sft", 1)])
def test_run_report(tmp_path: Path, recipe: str, num_figures: int) -> None:
    write_run(tmp_path / "run", recipe=recipe)
    checked(write_report(tmp_path / "run"), num_figures=num_figures)


def test_texts_of_users_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script> {{ title }} & \x1b[31m\u202e"
    evaluation = write_run(tmp_path / "run")
    run, scores = tmp_path / "run" / "run.json", tmp_path / "run" / "evaluation.json"
    changes = {"status": "failed", "message": nasty, "student": nasty, "command": nasty, "versions": {nasty: nasty}}
    changes |= {"spec": {**SPEC, "name": nasty}, "stages": [{"name": nasty, "steps": 1, "seconds": 1.0}]}
    run.write_text(json.dumps({**json.loads(run.read_text()), **changes}))
    match = {"all": 0.5, nasty: 0.5}
    borrowed = {"path": nasty, "same_start": False}
    scores.write_text(json.dumps({**evaluation, "exact_match": match, "verbalizers": borrowed}))
    html = checked(write_report(tmp_path / "run"), num_figures=3)
    shown = "&lt;script&gt;alert(1)&lt;/script&gt; {{ title }} &amp; \\x1b[31m\\u202e"
    assert html.count(shown) == 9  # the lead, the kind, its note, the failure, two facts, the stage, twice the versions
    assert "\\e[31m" in html  # in the YAML of the spec


def test_report_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"kind": "train-verbalizers", "status": "running", "spec": SPEC}))
    assert "No step has been logged yet" in checked(write_report(tmp_path), num_figures=0)


def test_report_of_nothing_names_the_next_command(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError, match="vlsi-cache ls"):
        write_report(tmp_path)


def test_grid_of_a_row(cache: Path) -> None:
    opened = open_cache(cache)
    row = opened["sample-1"]
    grid = grid_of(row, layers=opened.layers, top=2)
    assert grid["tokens"] == [f"#{token}" for token in row.response_ids_R]
    for index in range(len(LAYERS)):
        for t, gold in enumerate(row.response_ids_R.tolist()):
            cell = grid["grid"][index][t]
            kept = row.ids_LTK[index, t].tolist()
            assert cell["gold_rank"] == (kept.index(gold) if gold in kept else None)
            assert cell["probs"] == pytest.approx(np.exp(row.logprobs_LTK[index, t, :2]).tolist(), abs=1e-6)
    assert json.loads(json.dumps(grid)) == grid
    assert grid["top_k"] == K


def test_example_of_a_record(cache: Path) -> None:
    from vlsi_cache.data.records import Record

    question = [{"type": "image"}, {"type": "text", "text": "what?"}]
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    record = Record(id="sample-0", messages=turns, images=(), digest="00")
    example = example_of(open_cache(cache)["sample-0"], record, layers=LAYERS)
    assert (example["question"], example["answer"], example["png"]) == ("what?", "red", [])


def test_match_shares_count_micro_batches() -> None:
    lines = [
        {"stage": "interact", "step": 1, "matched_layers": [[2, 6], [2, 4]], "layers": {"1": 0.0, "3": 0.0}},
        {"stage": "interact", "step": 2, "matched_layers": [[4, 6], [2, 4]], "layers": {"1": 0.0, "3": 0.0}},
    ]
    found = metrics.match_shares(lines, [2, 4, 6])
    assert found is not None
    shares, student = found
    assert student == [1, 3]
    assert shares.tolist() == [[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]]


def test_smooth_keeps_length_and_constants() -> None:
    assert metrics.smooth([2.0] * 7, 3) == pytest.approx([2.0] * 7)
    assert metrics.smooth([1.0, 2.0, 6.0], 3) == pytest.approx([1.5, 3.0, 4.0])


def test_text_helpers() -> None:
    assert human_bytes(1_234_567) == "1.2 MB"
    assert human_bytes(999_960) == "1.0 MB"
    assert human_seconds(754) == "12 min 34 s"
    assert text.mean_and_spread([0.9, 0.92]) == "91.0 (90.0 to 92.0)"
    assert text.table(["a", "n"], [["x", "10"], ["yy", "5"]]).splitlines()[-1] == "yy   5"
    assert visible(" ") == "\u2423"
    assert visible("\n") == "\u21b5"


def test_figures_bring_their_own_ids_and_page_colours() -> None:
    svg = figures.bytes_bars({"ids": 80.0, "levels": 30.5})
    assert svg.startswith("<svg")
    assert "var(--ink)" in svg
    assert "xmlns" not in svg
    assert all(found.startswith("bytes-") for found in re.findall(r'id="([^"]+)"', svg))


def test_report_imports_no_torch() -> None:
    slow = "{'torch', 'matplotlib', 'zarr', 'jinja2'}"
    code = f"import sys, vlsi_cache.report.pages; assert not {slow} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
