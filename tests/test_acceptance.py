"""The acceptance benchmark: its source's closed form against Bayes' rule by hand, and all of it at a tiny size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import benchmark_scripts

SCRIPTS = ("acceptance", "acceptance_report", "layer_kl", "markov", "measuring", "students", "tiny_models")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, Any]]:
    with benchmark_scripts(SCRIPTS) as found:
        yield found


@pytest.mark.parametrize("kind", ["easy", "hard"])
def test_the_truth_is_what_bayes_rule_says(scripts: dict[str, Any], kind: str) -> None:
    markov = scripts["markov"]
    source = markov.make_source(kind, seed=3)
    prompt_BP, response_BR = source.rows(5, seed=4)
    truth_BRV = source.truth(prompt_BP, response_BR)
    for b in range(5):
        for r in (0, 1, 7):
            said = [*prompt_BP[b], *response_BR[b, :r]]
            weights = []
            for topic in range(markov.NUM_TOPICS):
                weight = np.prod([source.words_CV[topic, word] for word in prompt_BP[b]])
                for at in range(len(prompt_BP[b]), len(said)):
                    weight *= source.chain_CSV[topic, source.state_VV[said[at - 2], said[at - 1]], said[at]]
                weights.append(weight)
            state = source.state_VV[said[-2], said[-1]]
            mixed_V = sum(w * source.chain_CSV[c, state] for c, w in enumerate(weights)) / sum(weights)
            np.testing.assert_allclose(truth_BRV[b, r], mixed_V, rtol=1e-9)


def test_rows_are_drawn_from_the_truth(scripts: dict[str, Any]) -> None:
    markov = scripts["markov"]
    source = markov.make_source("easy", seed=5)
    prompt_BP, response_BR = source.rows(4000, seed=6)
    truth_BRV = source.truth(prompt_BP, response_BR)
    nll = -np.log(np.take_along_axis(truth_BRV, response_BR[..., None], -1)).mean()
    entropy = -(truth_BRV * np.log(truth_BRV)).sum(-1).mean()
    assert nll == pytest.approx(entropy, abs=0.02)  # 64,000 words, each with a deviation of about 1 nat: 0.004


@pytest.mark.slow
def test_the_benchmark_runs(scripts: dict[str, Any], tmp_path: Path) -> None:
    options = ["--tiny", "--seeds", "1", "--cells", "cold, 52 steps", "--work", str(tmp_path / "work")]
    code = scripts["acceptance"].main([*options, "--out", str(tmp_path / "results.md")])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert code == int("**no**" in text)  # next to no training: what must hold need not
    assert text.count("\n## ") == 3
    assert "cold, 52 steps: matches that break the order, of all | 0 of 2 | yes" in text
    scored = {file.parent.name for file in (tmp_path / "work").rglob("score.json")}
    assert scored == {"adaptive", "last", "sft", "16 entries", "dense rows"}


@pytest.mark.slow
def test_students_that_answer_at_any_depth_are_compared_seed_by_seed(scripts: dict[str, Any], tmp_path: Path) -> None:
    options = ["--tiny", "--tables", "depth", "--seeds", "1", "--cells", "pretrained, 65 steps"]
    scripts["acceptance"].main([*options, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "results.md")])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    table = text.split("exits trained afterwards\n")[1].split("\n## ")[0]
    found = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in table.splitlines()) if len(row) == 5}
    lens = ("any-depth, logit lens, even map, jsd", "any-depth, logit lens, labels")
    assert list(found) == ["variant", "---", "adaptive", "mean, fade 0-0.3", "any-depth", *lens]
    assert all(abs(float(cell)) < 1 for name in ("any-depth", *lens) for cell in found[name])
