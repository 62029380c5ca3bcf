"""The benchmarks still run, at tiny sizes, and their baselines compute what is measured against them."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import benchmark_scripts

FOLDER = Path(__file__).parent / "benchmarks"
SCRIPTS = (
    "across_tokenizers", "cases", "data", "drafting", "gpu", "kernels", "measuring", "online", "online_vs_cached",
    "ours", "peers", "processes", "scale", "stages", "students", "teacher", "traversal",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, Any]]:
    """The modules beside the scripts, imported as the scripts import each other."""
    with benchmark_scripts(SCRIPTS) as found:
        yield found


def test_every_part_of_the_cpu_benchmark_runs(
    scripts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = scripts["kernels"]
    tiny = kernels.Sizes(
        heads=((16, 300),), tokens=(8, 40), few_tokens=8, top_k=8, num_tail=2, num_candidates=3
    )  # fmt: skip
    monkeypatch.setattr(kernels, "QUICK", tiny)
    kernels.main(["--quick", "--out", str(tmp_path / "results.md")])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == 4
    assert "failed" not in text
    assert "bf16 T40 d16 V300 | ours, 3 |" in text


def test_every_part_of_the_gpu_benchmark_runs(scripts: dict[str, Any], tmp_path: Path) -> None:
    scripts["gpu"].main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "results.md")])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == 4
    assert "failed" not in text


def test_the_cost_of_traversing_is_measured(scripts: dict[str, Any], tmp_path: Path) -> None:
    scripts["traversal"].main(["--tiny", "--out", str(tmp_path / "results.md")])
    rows = [line.split(" | ") for line in (tmp_path / "results.md").read_text(encoding="utf-8").splitlines()]
    assert [row[1].split()[0] for row in rows if row[0] == "| plain"] == ["1.00"]
    assert len([row for row in rows if len(row) == 5]) == 6


def test_drafts_are_measured_against_greedy_decoding(scripts: dict[str, Any], tmp_path: Path) -> None:
    scripts["drafting"].main(["--tiny", "--rounds", "1", "--out", str(tmp_path / "results.md")])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 1 |")]
    assert [(row[1], row[2], row[3] == row[4]) for row in rows] == [
        ("4, 0", "2 of 2", True),
        ("8, 0.5", "2 of 2", True),
    ]


@pytest.mark.slow
def test_a_whole_build_is_measured_against_its_batches(scripts: dict[str, Any]) -> None:
    _, text = scripts["teacher"].build_costs("demo", ["data.options.num_samples=16"], 1)
    assert "16 samples" in text


def test_online_and_cached_steps_run_and_agree(scripts: dict[str, Any], tmp_path: Path) -> None:
    options = ["--tiny", "--samples", "32", "--steps", "1", "--threads", "1"]
    scripts["online_vs_cached"].main([*options, "--out", str(tmp_path / "results.md")])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == 5
    # Of the sums over the layers, in three steps: were the gradients others, the students would part after the first.
    found = re.search(r"cached / online (\S+) to (\S+)\.", text)
    assert found is not None
    assert 0.99 < float(found[1]) <= float(found[2]) < 1.01
    assert "100 % of the matches are the same" in text


@pytest.mark.slow
def test_every_part_of_the_stages_benchmark_runs(scripts: dict[str, Any], tmp_path: Path) -> None:
    options = ["--tiny", "--samples", "16", "--steps", "1", "--rounds", "1", "--threads", "1"]
    scripts["stages"].main([*options, "--out", str(tmp_path / "results.md")])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == 4
    assert text.count("\n| interact |") == 3  # the stage, its step, its memory


@pytest.mark.slow
def test_students_with_another_tokenizer_are_compared(scripts: dict[str, Any], tmp_path: Path) -> None:
    module = scripts["across_tokenizers"]
    module.main(["--tiny", "--threads", "1", "--out", str(tmp_path / "results.md")])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    found = re.search(r"vocabulary has (\d+) words; the student's has (\d+)", text)
    assert found is not None
    own, other = map(int, found.groups())
    assert own < 300 < other  # as many as the teacher's was trained to have at most, and the student's of its rows
    rows = re.findall(r"^\| (.+?) \| (\S+) \((\S+)\) \| (\S+) \(", text, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == list(module.VARIANTS)
    losses = {name: float(value) for name, value, *_ in rows}
    assert all(0 < loss < 2 * math.log(other) for loss in losses.values())
    assert len({losses[name] for name in (module.LABELS, module.ALM, module.OURS)}) == 3
    for name, value, gap, mean in rows:  # of one seed
        assert float(mean) == float(value)
        assert float(gap) == pytest.approx(losses[name] - losses[module.LABELS], abs=1.5e-3)


def test_the_papers_setting_is_worked_out_on_paper(scripts: dict[str, Any], tmp_path: Path) -> None:
    """From the configuration of the teacher alone; the number of its parameters is that of Qwen2-VL-72B."""
    scripts["scale"].main(["--case", "paper", "--out", str(tmp_path / "results.md")])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "2,900,000 rows of one picture" in text
    assert "21 layers of Qwen2-VL-72B (73.4 B parameters), k 64" in text
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, flags=re.MULTILINE))
    few, many = (float(value) for value in rows["teacher's pass, hours"].split(" | "))
    assert few == pytest.approx(8 * many, rel=0.05)  # of two digits
    assert len(set(rows["cache, TB (hidden states)"].split(" | "))) == 1  # whatever reads it


def test_workers_answer_one_by_one_and_say_when_they_fail(scripts: dict[str, Any], tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\nfrom processes import serve\n"
        "serve({'got': int(text)} for text in sys.argv[1:])\n"
    )
    answers = scripts["processes"].remote(str(worker), ["1", "2", "three"])
    assert [next(answers), next(answers)] == [{"got": 1}, {"got": 2}]
    with pytest.raises(RuntimeError, match="ended with code 1"):
        next(answers)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts it")
def test_resident_peak_starts_anew(scripts: dict[str, Any]) -> None:
    start_peak, peak = scripts["processes"].start_peak, scripts["processes"].peak
    size = 1 << 26
    before = start_peak(CPU)
    _ = torch.ones(size, dtype=torch.uint8)
    del _
    assert before + 0.9 * size < peak(CPU) < before + 1.5 * size
    assert start_peak(CPU) < before + 0.5 * size
    assert peak(CPU) < before + 0.5 * size


def student(scripts: dict[str, Any]) -> Any:
    shape = scripts["cases"].Shape(40, 16, 310, vocab_size=301, top_k=8, num_tail=2)
    return scripts["cases"].student_case(shape, CPU, 3).first(40, torch.float64)


@pytest.mark.parametrize("form", ["checkpointed_chunks", "compiled_materialised"])
def test_student_peers_agree_with_ours(scripts: dict[str, Any], form: str) -> None:
    peers, case = scripts["peers"], student(scripts)
    others = {
        "checkpointed_chunks": lambda: peers.checkpointed_chunks(case, 3, size=16),
        "compiled_materialised": lambda: peers.compiled_materialised("eager")(case, 3),
    }
    values_M, gradient_TD = scripts["ours"].student(case, 3)
    for got in (peers.materialised(case, 3), others[form]()):
        torch.testing.assert_close(got[0], values_M)
        torch.testing.assert_close(got[1], gradient_TD)


def test_dense_peer_sees_the_same_kept_entries(scripts: dict[str, Any]) -> None:
    """Its tail is spread evenly, so only the rows are compared: they sum to 1 and agree on the kept ids."""
    case = student(scripts)
    dense_TV = scripts["peers"]._dense(case, 1)
    torch.testing.assert_close(dense_TV.sum(1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(dense_TV.gather(1, case.ids_MTK[1]), case.logprobs_MTK[1].exp())


def test_teacher_peers_agree_with_ours(scripts: dict[str, Any]) -> None:
    shape = scripts["cases"].Shape(40, 16, 310, vocab_size=301, top_k=8, num_tail=2)
    case, peers = scripts["cases"].teacher_case(shape, CPU), scripts["peers"]
    want = scripts["ours"].teacher(case)
    names = ("ids_TK", "logprobs_TK", "tail_ids_Tm", "lse_Tn", "entropy_T", "gold_logprob_T", "tail_mass_T")
    for rows in (peers.whole_row_all(case), peers.token_chunks(case, 16)):
        for name, got in zip(names, rows, strict=True):
            if name != "tail_ids_Tm":  # another generator draws them
                torch.testing.assert_close(got, want[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(peers.whole_row(case)[0], want["ids_TK"])


def test_peak_counts_what_lives_at_once(scripts: dict[str, Any]) -> None:
    size = 1 << 20

    def run() -> torch.Tensor:
        first = torch.zeros(size, dtype=torch.uint8)
        second = first + 1  # two at once
        del first
        return second + 1  # two again

    _, peak = scripts["measuring"].timed_with_peak(run, CPU)
    assert 2 * size <= peak < 2 * size + 4096


def test_what_is_too_big_or_fails_is_said(scripts: dict[str, Any]) -> None:
    measuring = scripts["measuring"]

    def broken() -> None:
        raise RuntimeError("no such kernel\nand more")

    works = [
        measuring.Work("big", lambda: None, needs_bytes=7.5e9),
        measuring.Work("slow", lambda: None),
        measuring.Work("absent", lambda: None, skip="not available"),
        measuring.Work("broken", broken),
        measuring.Work("fine", lambda: torch.zeros(3)),
    ]
    some = torch.ones(100, 100)
    rows = measuring.measure(lambda: some @ some, works, CPU, measuring.Limits(), {"slow": 1e12})
    reasons = {row.name: row.skip for row in rows}
    assert reasons["big"] == "skipped: needs about 7.5 GB, the limit is 6"
    assert reasons["slow"].startswith("skipped: would take about")
    assert reasons["absent"] == "not available"
    assert reasons["broken"] == "failed: RuntimeError: no such kernel"
    assert reasons["fine"] == reasons["(plain products)"] == ""
    assert rows[-1].num_runs == 3
    assert rows[-1].ratio > 0
