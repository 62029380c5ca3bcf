"""Matched layers at both ends of a run beside uniform sampling, and what is refused.

Legend: S student layers, M teacher layers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fakes import write_run
from helpers.pages import checked
from oracles import literal_algorithm_1

import vlsi_cache as vc
from vlsi_cache.errors import CacheNotFoundError, DataError, SpecError
from vlsi_cache.report.matches import null_distribution
from vlsi_cache.report.pages import write_match_page, write_match_png, write_report
from vlsi_cache.store.format import CacheHeader, sealed_json

TEACHER, STUDENT = [2, 6, 10, 14], [1, 3]


def write_matches(
    folder: Path, matches: list[Any], *, num_steps: int | None = None, knows_teacher: bool = True, **changes: Any
) -> Path:
    """A run whose step n has matched `matches[n]`; `changes` go into the record or into its interact settings."""
    folder.mkdir(parents=True)
    settings = {key: changes.pop(key) for key in ("matching", "intermediate") if key in changes}
    record = {"kind": "distill", "recipe": "vlsi", "command": "vlsi-cache distill c -o r"}
    record |= {"status": "running", "spec": {"distill": {"interact": settings}}, **changes}
    (folder / "run.json").write_text(json.dumps(record))
    common = {"stage": "interact", "num_steps": num_steps or len(matches), "loss": 1.0, "elapsed_s": 1.0}
    common |= {"layers": {str(layer): 0.5 for layer in STUDENT}}
    lines = [{**common, "step": step, "matched_layers": found} for step, found in enumerate(matches, 1)]
    if lines and knows_teacher:
        lines[0]["teacher_layers"] = TEACHER
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_both_ends_and_their_distance_from_the_null(tmp_path: Path) -> None:
    middle = [[[6, 14]]] * 16
    run = write_matches(tmp_path / "run", [[[2, 6], [2, 14]], [[10, 14], [6, 14]], *middle, [[6, 10]], [[2, 10]]])
    found = vc.match(run)
    assert (found.start_steps, found.end_steps, found.num_matches, found.is_finished) == ((1, 2), (19, 20), 2, True)
    np.testing.assert_allclose(found.start_SM, [[0.5, 0.25, 0.25, 0], [0, 0.25, 0, 0.75]])
    np.testing.assert_allclose(found.end_SM, [[0.5, 0.5, 0, 0], [0, 0, 1, 0]])
    assert found.null_SM is not None
    np.testing.assert_allclose(found.null_SM, null_distribution(2, 4))
    np.testing.assert_allclose(found.means(found.start_SM), [0.5 * 2 + 0.25 * 6 + 0.25 * 10, 0.25 * 6 + 0.75 * 14])
    # By hand: the null is 1/3 three times, then 1/9, 5/18, 11/18.
    np.testing.assert_allclose(found.distance(found.end_SM), [1 / 3, 13 / 18])
    assert vc.match(run, share=1.0).num_matches == 22
    facts = json.loads(json.dumps(found.as_dict()))
    assert facts["distance_from_null"]["end"] == pytest.approx([1 / 3, 13 / 18])
    assert facts["mean_layer"]["null"] == pytest.approx([6.0, (6 + 2.5 * 10 + 5.5 * 14) / 9])
    assert "not finished" not in str(found)


def test_chance_is_the_distance_of_so_many_uniform_matches(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    null_SM = null_distribution(2, 4)
    assert null_SM is not None
    distances = []
    for _ in range(400):
        counts_SM = np.zeros((2, 4))
        for _ in range(12):
            counts_SM[[0, 1], literal_algorithm_1(np.zeros((2, 4)), rng.random(2).tolist())] += 1
        distances.append(0.5 * np.abs(counts_SM / 12 - null_SM).sum(1))
    found = vc.match(write_matches(tmp_path / "run", [[[2, 6]] * 12] * 10))
    chance_S = found.chance()
    assert chance_S is not None
    np.testing.assert_allclose(chance_S, np.mean(distances, axis=0), rtol=0.1)


def test_units_and_layers_that_fade_out(tmp_path: Path) -> None:
    run = write_matches(tmp_path / "run", [[[2, 6], [2, 10], []], [[6, 10]], [[]], [[]]], num_steps=9)
    found = vc.match(run, share=0.5)
    assert (found.start_steps, found.end_steps, found.num_matches) == ((1, 1), (2, 2), 1)
    assert not found.is_finished
    assert "the stage is not finished" in str(found)


def test_sampling_entropies_come_from_the_probes(tmp_path: Path) -> None:
    run = write_matches(tmp_path / "run", [[[2, 6]]] * 30)
    assert vc.match(run).entropy_start == {}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, entropy in ((0, 1.2), (2, 1.0), (20, 0.5)):
        lines[step]["probe"] = {"1": {"match_entropy": entropy}, "3": {"match_entropy": 0.0}, "20": {"kl": 1.0}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = vc.match(run)
    assert found.entropy_start == pytest.approx({1: 1.1, 3: 0.0})
    assert found.entropy_end == {1: 0.5, 3: 0.0}  # the last probe: there is none in the last three steps
    assert "entropy end" in str(found)
    for step in (0, 2):
        del lines[step]["probe"]
    for step, entropy in ((5, 1.1), (29, 0.4)):
        lines[step]["probe"] = {"1": {"match_entropy": entropy}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert vc.match(run).entropy_start == {1: 1.1}  # the nearest to the first three steps, not the last one


@pytest.mark.parametrize(
    ("mode", "keeps_order", "has_chance"), [("order", True, True), ("range", False, True), ("bottom_k", False, False)]
)
def test_what_is_said_of_a_mode(tmp_path: Path, mode: str, keeps_order: bool, has_chance: bool) -> None:
    found = vc.match(write_matches(tmp_path / "run", [[[2, 6], [6, 10]]] * 4, matching=mode))
    assert ("pushes matches deep" in str(found)) == keeps_order
    assert ("TV end" in str(found), "chance" in str(found)) == (True, has_chance)
    assert ("chance" in found.as_dict()["distance_from_null"]) == has_chance


def test_modes_that_draw_nothing_have_no_null(tmp_path: Path) -> None:
    run = write_matches(tmp_path / "run", [[[2, 14]]] * 4, matching="uniform_stretch")
    found = vc.match(run)
    assert (found.null_SM, found.as_dict()["distance_from_null"]) == (None, None)
    assert "draws nothing" in str(found)
    checked(write_match_page(found, tmp_path / "m.html"), num_figures=1)


def test_without_the_teacher_layers_there_is_no_null(tmp_path: Path) -> None:
    """A run of an earlier release, which only its cache can tell what could be matched."""
    layers = [*TEACHER, 20]
    counts = {"num_parts": 1, "num_samples": 1, "num_response_tokens": 1, "vocab_size": 50, "tail_samples": 0}
    header = CacheHeader(fingerprint={}, layers=layers, num_model_layers=20, top_k=[4] * 5, **counts)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "cache.json").write_bytes(sealed_json(header.model_dump()))
    options: dict[str, Any] = {"knows_teacher": False, "cache": str(cache)}
    same = write_matches(tmp_path / "same", [[[2, 14]]] * 4, cache_digest=header.digest, **options)
    found = vc.match(same)
    assert found.teacher_layers == TEACHER
    assert found.null_SM is not None
    rebuilt = write_matches(tmp_path / "rebuilt", [[[2, 3], [3, 14]], [[]]], cache_digest="another", **options)
    (cache / "cache.json").unlink()
    for run, met in ((same, [2, 14]), (rebuilt, [2, 3, 14])):
        found = vc.match(run)
        assert (found.teacher_layers, found.null_SM, found.as_dict()["distance_from_null"]) == (met, None, None)
        assert "no null: the run does not say" in str(found)
        assert "draws nothing" not in str(found)
        checked(write_match_page(found, tmp_path / "m.html"), num_figures=1)
        (cache / "cache.json").write_bytes(sealed_json(header.model_dump()))  # now that of another run


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": "last"}, "recipe `last`"),
        ({"recipe": "sft"}, "recipe `sft`"),
        ({"kind": "train-verbalizers"}, "`train-verbalizers` run"),
        ({"intermediate": "ce"}, "intermediate: ce"),
        ({"intermediate": "none"}, "intermediate: none"),
    ],
)
def test_runs_without_matches_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        vc.match(write_matches(tmp_path / "run", [[[]]], **changes))


def test_a_run_that_has_not_begun_to_match_says_how_to_go_on(tmp_path: Path) -> None:
    run = write_matches(tmp_path / "run", [])
    with pytest.raises(DataError, match="go on with: vlsi-cache distill c -o r"):
        vc.match(run)
    with pytest.raises(CacheNotFoundError, match="has no readable run"):
        vc.match(tmp_path)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(SpecError, match="above 0 and at most 1"):
            vc.match(run, share=share)


def test_a_finished_run_whose_layers_had_no_weight_says_so(tmp_path: Path) -> None:
    run = write_matches(tmp_path / "run", [[[]], [[]]], status="done")
    with pytest.raises(DataError, match="their weight was 0 throughout the stage interact") as error:
        vc.match(run)
    assert "go on with" not in str(error.value)


def test_page_picture_and_report_show_the_same(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    found = vc.match(tmp_path / "run")
    html = checked(write_match_page(found, tmp_path / "new" / "m.html"), num_figures=1)
    assert write_match_png(found, tmp_path / "new" / "m.png").read_bytes().startswith(b"\x89PNG")
    report = checked(write_report(tmp_path / "run"), num_figures=3)
    figure = html[html.index("<figure>") : html.index("</section>")]
    assert figure in report
    with pytest.raises(SpecError, match="is a folder"):
        write_match_png(found, tmp_path / "new")
    for title in ("start of the interaction", "end of the interaction", "no information (null)"):
        assert title in figure
