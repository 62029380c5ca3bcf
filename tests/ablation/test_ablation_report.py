"""Tables of an ablation against numbers worked out by hand, its CSV, its page, its command and its line in `ls`."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import vlsi_cache as vc
from vlsi_cache.ablation.variants import shipped_axes
from vlsi_cache.report.ablation import (
    METRICS,
    ablation_csv,
    ablation_text,
    difference_cell,
    num_failed,
    own_steps,
    remarks,
    table_rows,
)
from vlsi_cache.report.pages import write_report

MATCH = {"vlsi": [0.70, 0.80, 0.60], "order": [0.75, 0.79, 0.70], "sft": [0.50, 0.50]}
NLL = {"vlsi": [1.0, 2.0, 3.0], "order": [1.5, 2.5, 2.0], "sft": [1.0, 2.0]}


def entry(name: str, seed: int) -> dict[str, Any]:
    nll = NLL[name][seed]
    return {
        "status": "done",
        "run": f"runs/seed-{seed}/{name}",
        "exact_match": {"all": MATCH[name][seed], "even": 1.0},
        "nll": nll,
        "perplexity": 2.0**nll,
        "layers": {"1": nll + 1, "2": nll + 2},
        "steps": 5,
        "seconds": 10.0 + seed,
    }


def row(*names: str, run: str | None, reason: str | None = None) -> dict[str, Any]:
    return {"names": names, "what": f"<what> {names[0]} is", "run": run, "reason": reason}


@pytest.fixture
def record() -> dict[str, Any]:
    runs = {name: {str(seed): entry(name, seed) for seed in range(len(NLL[name]))} for name in NLL}
    runs["sft"]["2"] = {"status": "failed", "run": "runs/seed-2/sft", "message": "the gradient norm is <nan>"}
    return {
        "spec": {"name": "tiny"},
        "cache": "cache",
        "student": "/models/small",
        "device": "cpu",
        "versions": {"torch": "2"},
        "budget": "5 optimizer steps",
        "default": "vlsi",
        "seeds": [0, 1, 2],
        "titles": {"matching": "choice of teacher layers", "operations": "<losses>"},
        "notes": {"operations": "x: nothing is trained there", "matching": ""},
        "tables": {
            "matching": [row("vlsi", "adaptive", run="vlsi"), row("order", run="order"), row("sft", run="sft")],
            "loss": [row("vlsi", run="vlsi"), row("tau-2", run=None, reason="no rows, at tau 2")],
            "operations": [row("vlsi", run="vlsi"), row("ce+x", run="ce+x")],
        },
        "runs": runs,
    }


def test_the_numbers_of_a_table(record: dict[str, Any]) -> None:
    heads, rows = table_rows(record, "matching")
    assert heads == [
        "variant",
        *("exact match, %", "minus vlsi", "nll, nats", "minus vlsi", "layer nll, nats", "minus vlsi"),
        *("steps", "training, s"),
    ]
    assert rows[0] == [
        *("vlsi = adaptive", "70.0 (60.0 to 80.0, sd 10.0)", "", "2.000 (1.000 to 3.000, sd 1.000)", ""),
        *("3.500 (2.500 to 4.500, sd 1.000)", "", "5", "11.0"),
    ]
    # exact match: +5, -1, +10 points; nll: +0.5, +0.5, -1, which is 0 on the whole
    assert rows[1][2] == "+4.7 (2/3 better)"
    assert rows[1][4] == "+0.000 (1/3 better)"
    assert rows[2] == [
        *("sft", "50.0 (50.0 to 50.0)", "-25.0 (2/2 worse)", "1.500 (1.000 to 2.000)", "+0.000 (the same)"),
        *("3.000 (2.500 to 3.500)", "+0.000 (the same)", "5", "10.5"),
    ]
    record["runs"]["order"]["2"]["nll"] = 2.5
    assert difference_cell(record, "order", METRICS[1]) == "+0.167 (2/3 worse)"


def test_what_is_not_in_the_numbers_is_told(record: dict[str, Any]) -> None:
    assert remarks(record, "matching") == ["failed: sft, seed 2: the gradient norm is <nan>"]
    assert remarks(record, "loss") == ["not possible: tau-2: no rows, at tau 2"]
    assert remarks(record, "operations") == ["x: nothing is trained there", "not run yet: ce+x, seed 0, 1, 2"]
    assert num_failed(record) == 1
    text = ablation_text(record)
    assert text.count("vlsi") > 3
    assert "not possible: tau-2" in text
    assert "\n\nmatching: choice of teacher layers\n" in text
    assert "\n\nloss\n" in text  # a release before did not record the titles
    del record["titles"], record["notes"]
    assert "\n\nmatching\n" in ablation_text(record)


def test_rows_with_fewer_steps_say_so(record: dict[str, Any], tmp_path: Path) -> None:
    for one in record["runs"]["order"].values():
        one["steps"] = 4
    for row, count in zip(record["tables"]["matching"], (5, 4, 5), strict=True):
        row["num_steps"] = count
    assert own_steps(record["tables"], "vlsi") == {"order": 4}
    assert [cells[-2] for cells in table_rows(record, "matching")[1]] == ["5", "4 of 5", "5"]
    (tmp_path / "ablation.json").write_text(json.dumps(record))
    assert "the same number of steps, but for order.</p>" in write_report(tmp_path).read_text()


def test_runs_that_were_not_made_alike_are_told(record: dict[str, Any]) -> None:
    for entries in record["runs"].values():
        for one in entries.values():
            one |= {"device": "cpu", "versions": {"python": "3.12", "torch": "2.5"}}
    del record["runs"]["sft"]["0"]["device"]  # an earlier release did not write it
    before = remarks(record, "matching")
    record["runs"]["order"]["1"] |= {"device": "NVIDIA H100", "versions": {"python": "3.12", "torch": "2.6"}}
    assert len(before) == 1
    assert remarks(record, "matching")[1:] == [
        "not made alike: device cpu in 7 run(s), NVIDIA H100 in 1 (order, seed 1)",
        "not made alike: torch 2.5 in 8 run(s), 2.6 in 1 (order, seed 1)",
    ]
    assert remarks(record, "loss") == ["not possible: tau-2: no rows, at tau 2"]


def test_csv_has_a_line_for_each_variant_and_seed(record: dict[str, Any]) -> None:
    lines = list(csv.DictReader(ablation_csv(record).splitlines()))
    assert len(lines) == 3 * 3 + (3 + 1) + 3 * 2
    assert list(lines[3].values()) == [
        *("matching", "order", "0", "done", "0.75", "1.5", str(2.0**1.5), "3.0", "5", "10.0", "runs/seed-0/order", ""),
    ]
    assert lines[8]["message"] == "the gradient norm is <nan>"
    assert (lines[12]["variant"], lines[12]["status"], lines[12]["message"]) == (
        "tau-2",
        "not possible",
        "no rows, at tau 2",
    )


def test_the_page_and_the_listing(record: dict[str, Any], tmp_path: Path, run: Any) -> None:
    file = tmp_path / "ablation.json"
    file.write_text(json.dumps(record))
    html = write_report(tmp_path).read_text()
    assert html.count("<svg") == 3
    assert "+4.7 (2/3 better)" in html
    assert "&lt;what&gt; order is" in html
    assert "&lt;nan&gt;" in html
    assert "operations: &lt;losses&gt;" in html
    code, out, _ = run("ls", tmp_path, "--json")
    assert (code, [(one["kind"], one["state"], one["name"]) for one in json.loads(out)]) == (
        0,
        [("ablation", "8/12 runs", "matching, loss, operations")],
    )
    file.write_text(json.dumps({"spec": {}, "runs": {}}))
    assert "Nothing has run yet" in write_report(tmp_path).read_text()
    file.write_text("{")
    code, _, err = run("report", tmp_path)
    assert (code, "ablation.json: is not JSON" in err) == (3, True)


def test_the_command(record: dict[str, Any], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def answer(_spec: Any, **options: Any) -> dict[str, Any]:
        asked.append(options)
        return record

    monkeypatch.setitem(vars(vc), "ablate", answer)
    words = ["demo", "--axis", "matching", "--axis", "k", "--variants", "order, sft", "--seeds", 3, "-o", tmp_path]
    code, out, _ = run("ablate", *words, "--student", "models/small", "--cache", "caches/demo")
    assert code == 1  # one run has failed
    assert "failed: sft, seed 2" in out
    assert asked[0] == {
        "axes": ["matching", "k"],
        "variants": ["order", "sft"],
        "out": tmp_path,
        "seeds": 3,
        "cache": "caches/demo",
        "student": "models/small",
        "device": None,
        "dry_run": False,
    }
    del record["runs"]["sft"]["2"]
    assert run("ablate", *words)[0] == 0
    monkeypatch.undo()
    assert run("ablate", "demo", "--axis", "mtching", "-o", tmp_path)[0] == 2


def test_the_help_names_every_axis() -> None:
    from vlsi_cache_cli.stages import AXES as NAMED

    assert sorted(NAMED) == list(shipped_axes())
