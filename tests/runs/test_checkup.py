"""Every finding fires on what it is about and on nothing else; the verbalizers' table; the probes' figure."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.fakes import write_run
from helpers.pages import checked

from vlsi_cache.report.pages import progress_note, progress_rows, write_report
from vlsi_cache.runs.diagnostics import findings_of, interact_findings, verbalizer_findings
from vlsi_cache.runs.metrics import read_run

GOOD = {"kl": 0.4, "student_entropy": 2.0, "teacher_entropy": 1.9, "student_loss": 2.2, "teacher_loss": 2.0}
GOOD |= {"kept_mass": 0.9, "student_mass": 0.8, "overlap": 0.6, "top1_agreement": 0.7, "match_entropy": 1.1}


def interact_lines(
    num: int = 40, *, losses: dict[str, tuple[float, float]] | None = None, **probed: dict[str, float]
) -> list[dict[str, Any]]:
    """Lines of a finished stage: losses go evenly from one value to another; `probed` changes a layer (`l1`)."""
    ends = {"1": (1.0, 0.5), "2": (0.8, 0.4), "last": (0.6, 0.2), **(losses or {})}
    lines = []
    for step in range(1, num + 1):
        at = {name: start + (end - start) * (step - 1) / (num - 1) for name, (start, end) in ends.items()}
        line = {
            "stage": "interact",
            "step": step,
            "num_steps": num,
            "loss": 1.0,
            "elapsed_s": 1.0,
            "kl_last": at.pop("last"),
            "layers": at,
        }
        line["matched_layers"] = [[1, 3]]
        if step % 8 == 1 or step == num:
            line["probe"] = {layer: {**GOOD, **probed.get(f"l{layer}", {})} for layer in ("1", "2", "4")}
            line["probe"]["4"].pop("match_entropy")
        lines.append(line)
    return lines


def verbalize_lines(*ends: float, num: int = 40, last: int | None = None) -> list[dict[str, Any]]:
    """Layers 1, 2, ... fall evenly from 3 nats above their ends."""
    return [
        {
            "stage": "verbalize", "step": step, "num_steps": num, "loss": 1.0, "elapsed_s": 1.0,
            "layers": {str(i): end + 3 * (1 - step / num) for i, end in enumerate(ends, 1)},
        }
        for step in range(1, (last or num) + 1)
    ]  # fmt: skip


def kinds(lines: list[dict[str, Any]]) -> list[str]:
    return [one.kind for one in interact_findings(lines)]


def test_a_healthy_run_has_no_findings() -> None:
    assert kinds(interact_lines()) == []
    assert interact_findings([]) == []


@pytest.mark.parametrize(
    ("layer", "changes", "says"),
    [
        ("l2", {"kept_mass": 0.49, "student_mass": 0.4}, "teacher layers matched with layer 2 hold 49 %"),
        ("l4", {"kept_mass": 0.3, "student_mass": 0.3}, "the teacher's last layer hold 30 %"),
    ],
)
def test_low_kept_mass(layer: str, changes: dict[str, float], says: str) -> None:
    (found,) = interact_findings(interact_lines(**{layer: changes}))
    assert found.kind == "low_kept_mass"
    assert says in found.text
    assert "rows.top_k" in found.text
    assert kinds(interact_lines(**{layer: {"kept_mass": 0.51}})) == []


def test_low_student_mass_at_the_end() -> None:
    (found,) = interact_findings(interact_lines(l1={"student_mass": 0.004}))
    assert found.kind == "low_student_mass"
    assert "student layer 1 gives 0.4 %" in found.text
    assert "distill.verbalize" in found.text
    (last,) = interact_findings(interact_lines(l4={"student_mass": 0.004}))
    assert "distill.verbalize" not in last.text  # the last layer has no verbalizer
    assert kinds(interact_lines(l1={"student_mass": 0.05})) == []
    lines = interact_lines()
    lines[0]["probe"]["1"]["student_mass"] = 0.001  # raw at the start, and learnt since
    assert kinds(lines) == []


@pytest.mark.parametrize(
    ("name", "ends", "says"),
    [
        ("2", (0.8, 1.2), "the loss of student layer 2 rose in the interaction, from 0.815 .* too high"),
        ("1", (1.0, 0.99), "the loss of student layer 1 hardly fell .* too low.*verbalizer is raw"),
        ("last", (0.6, 0.6), "the loss of the student's last layer hardly fell .*too short$"),
    ],
)
def test_a_loss_that_does_not_fall(name: str, ends: tuple[float, float], says: str) -> None:
    (found,) = interact_findings(interact_lines(losses={name: ends}))
    assert found.kind == "loss_not_falling"
    assert re.search(says, found.text)


def test_a_loss_that_falls_or_is_small_or_short_is_fine() -> None:
    assert kinds(interact_lines(losses={"1": (1.0, 0.9)})) == []
    assert kinds(interact_lines(losses={"last": (0.04, 0.06)})) == []
    assert kinds(interact_lines(19, losses={"1": (1.0, 2.0)})) == []
    assert kinds(interact_lines(losses={"1": (1.0, 2.0)})[:-1]) == []  # not finished: no trend yet


def test_verbalizers_worse_than_a_uniform_guess() -> None:
    edge = math.log(1000)
    (found,) = verbalizer_findings(verbalize_lines(edge + 0.5, edge - 1), vocab_size=1000)
    assert "uniform guess would (6.9 nats per token, ln V): layer 1 7.5." in found.text
    assert "distill.verbalize" in found.text
    assert verbalizer_findings(verbalize_lines(edge - 0.5, edge - 1), vocab_size=1000) == []
    assert verbalizer_findings(verbalize_lines(edge + 0.5, edge, last=30), vocab_size=1000) == []


def write_lines(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_report_shows_findings_and_probes(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "cache.json").write_text(json.dumps({"v_real": 1000, "layers": [1, 2, 3, 4]}))
    write_run(tmp_path / "run", cache=cache)
    run = tmp_path / "run"
    write_lines(run, [*verbalize_lines(9.0, 8.0), *interact_lines(l1={"kept_mass": 0.2})])
    assert [one.kind for one in findings_of(read_run(run))] == ["verbalizers_worse_than_uniform", "low_kept_mass"]
    html = checked(write_report(run), num_figures=4)
    assert html.count('<p class="warning">') == 2
    for text in ("KL of student from teacher", "same top word", "mass on the teacher", "100 %"):
        assert text in html
    for line in (lines := interact_lines()):  # rows of draws have no top-k; layers that fade out are gone
        for numbers in line.get("probe", {}).values():
            for name in ("kept_mass", "student_mass", "overlap", "top1_agreement"):
                del numbers[name]
        if line["step"] == 40:
            del line["probe"]["1"], line["probe"]["2"]
            line["layers"] = {}
    write_lines(run, lines)
    html = checked(write_report(run), num_figures=3)
    assert 'class="warning"' not in html
    assert "same top word" not in html


def test_the_table_of_the_verbalizers() -> None:
    lines = verbalize_lines(2.0, 1.0, 1.5)
    heads, rows = progress_rows(lines)
    assert heads == ["layer", "10 %", "30 %", "50 %", "70 %", "90 %", "100 %"]
    # Means around the points; at the end the window reaches back only: steps 38 to 40 are 0.15, 0.075 and 0 above it.
    assert rows[0] == ["1", *(f"{x:.3f}" for x in (4.7, 4.1, 3.5, 2.9, 2.3, 2.075))]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert "layer 3 (1.575) after 2 (1.075)" in progress_note(lines)
    assert "not fall with depth" not in progress_note(verbalize_lines(2.0, 1.5, 1.51))
    assert progress_rows(verbalize_lines(2.0, last=21))[0] == ["layer", "10 %", "30 %", "50 %"]
    heads, rows = progress_rows(verbalize_lines(2.0, num=3))
    assert (len(heads), len(rows[0])) == (7, 7)
