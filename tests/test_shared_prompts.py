"""Several responses to one prompt: rows and losses are those of each sample alone, and the prompt runs once."""

import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import vlsi_cache as vc
from tests.helpers.runs import assert_row_is_the_models_own, count_sequences, metrics_of
from tests.helpers.tiny import WORDS, write_jsonl, write_spec
from vlsi_cache.data import encoder as encoder_module
from vlsi_cache.data.records import RecordSet
from vlsi_cache.errors import FingerprintMismatchError, SpecError
from vlsi_cache.store.format import sealed_json
from vlsi_cache.store.reader import Cache
from vlsi_cache.train import loader
from vlsi_cache.train.student import cached_sources

NUM_ANSWERS = (4, 1, 3, 2, 4, 1, 4)


def asked(number: int, sample: int) -> list[dict[str, str]]:
    words = [WORDS[(number + 3 * sample + j) % len(WORDS)] for j in range(1 + (number + sample) % 3)]
    question = " ".join(WORDS[(number + j) % len(WORDS)] for j in range(4 + number))
    return [{"role": "user", "content": f"{number} {question}?"}, {"role": "assistant", "content": " ".join(words)}]


ROWS = [{"id": f"r{n}#{k}", "messages": asked(n, k)} for n, num in enumerate(NUM_ANSWERS) for k in range(num)]


@pytest.fixture(scope="module")
def spec_file(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    spec = write_spec(folder, teacher_folder)
    write_jsonl(folder / "rows.jsonl", ROWS)
    write_jsonl(folder / "heldout.jsonl", [{**row, "id": f"h{row['id']}"} for row in ROWS[:9]])
    spec.write_text(spec.read_text().replace("max_length: 64", "max_length: 200"))
    return spec


@pytest.fixture
def num_sequences(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_sequences(monkeypatch)


@pytest.fixture(scope="module")
def cache(spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return vc.build_teacher(vc.load_spec(spec_file), out=tmp_path_factory.mktemp("cache") / "c")


def test_rows_are_those_of_the_model_over_each_sample_alone(
    spec_file: Path, tmp_path: Path, teacher_folder: Path, num_sequences: list[int]
) -> None:
    cache = vc.build_teacher(vc.load_spec(spec_file, overrides=["store.profile=exact"]), out=tmp_path / "c")
    assert sum(num_sequences) == len(NUM_ANSWERS)  # one sequence for each prompt
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    for row in ROWS:
        assert_row_is_the_models_own(cache[row["id"]], row["messages"], model, tokenizer)


def test_they_lie_side_by_side_and_are_trained_together(cache: Cache) -> None:
    samples = loader.cached_records(cache, cached_sources(cache), layers=[], seed=1, window_parts=9)
    order = [one.record.id for one in islice(samples, len(ROWS))]
    assert sorted(order) == sorted(cache)
    for names in (list(cache), order):
        runs = [name.split("#")[0] for name in names]
        assert sum(one != other for one, other in pairwise(runs)) == len(NUM_ANSWERS) - 1
    assert order != list(cache)


def test_losses_and_scores_are_those_of_samples_that_run_apart(
    spec_file: Path,
    cache: Cache,
    student_folder: Path,
    tmp_path: Path,
    num_sequences: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"student": str(student_folder), "overrides": ["distill.micro_batch_size=4"]}

    def run(name: str) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
        num_sequences.clear()
        vc.distill(cache, out=tmp_path / name, **options)
        vc.train_verbalizers(vc.load_spec(spec_file), out=tmp_path / f"verbalizers-{name}")
        scores = vc.evaluate(tmp_path / name, cache=cache.path)
        return metrics_of(tmp_path / name) + metrics_of(tmp_path / f"verbalizers-{name}"), scores, sum(num_sequences)

    together, scores, few = run("together")
    monkeypatch.setattr(encoder_module.Encoder, "_shared", lambda *_: encoder_module.NOTHING)
    apart, scores_apart, many = run("apart")
    assert few < 0.7 * many
    num_losses = 0
    for one, other in zip(together, apart, strict=True):
        assert one.get("matched_layers") == other.get("matched_layers")
        if "loss" in one:
            num_losses += 1
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert one.get("layers", {}) == pytest.approx(other.get("layers", {}), rel=1e-4)
    assert num_losses > 10
    assert scores["nll"] == pytest.approx(scores_apart["nll"], rel=1e-5)
    assert scores["cache"]["kl"] == pytest.approx(scores_apart["cache"]["kl"], rel=1e-4)


def without_setting(root: Path) -> None:
    """The cache as an earlier release has begun it."""
    content = json.loads((root / "cache.json").read_text())
    del content["xxh3"], content["spec"]["data"]["keep_together"]
    assert "data.keep_together" not in content["fingerprint"]
    (root / "cache.json").write_bytes(sealed_json(content))


def test_what_stays_together_is_a_setting_of_the_cache(spec_file: Path, student_folder: Path, tmp_path: Path) -> None:
    spec = vc.load_spec(spec_file, overrides=["data.keep_together=row"])
    apart = vc.build_teacher(spec, out=tmp_path / "c")
    runs = [name.split("#")[0] for name in apart]
    assert sum(one != other for one, other in pairwise(runs)) > len(NUM_ANSWERS)
    with pytest.raises(FingerprintMismatchError, match=r"data\.keep_together"):
        vc.build_teacher(vc.load_spec(spec_file), out=tmp_path / "c")
    with pytest.raises(SpecError, match=r"`data\.keep_together` were decided when"):
        vc.distill(apart, student=str(student_folder), out=tmp_path / "r", overrides=["data.keep_together=prompt"])
    # A cache that has no such setting goes on, and is shuffled, as it was begun: sample by sample.
    without_setting(tmp_path / "c")
    again = vc.build_teacher(vc.load_spec(spec_file), out=tmp_path / "c")
    assert list(again) == list(apart)
    nothing = loader.Matched(RecordSet([], []), {})
    assert loader.units_of(again, nothing) == {part: [range(i, i + 1) for i in range(n)] for part, n in counts(again)}


def counts(cache: Cache) -> list[tuple[int, int]]:
    parts = cache.sample_table()["part"].to_pylist()
    return [(part, parts.count(part)) for part in cache.parts]
