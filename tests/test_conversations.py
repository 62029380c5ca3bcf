"""Conversations of several turns: rows and losses are those of each turn alone, at the cost of the longest."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import vlsi_cache as vc
from tests.helpers.runs import assert_row_is_the_models_own, count_sequences, metrics_of
from tests.helpers.tiny import WORDS, write_jsonl, write_spec
from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.data import encoder as encoder_module
from vlsi_cache.store.format import sealed_json
from vlsi_cache.store.reader import Cache

NUM_TURNS = (1, 3, 2, 4, 1, 2, 3, 1, 2, 4)


def conversation(number: int, num_turns: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in range(num_turns):
        words = [WORDS[(number + 3 * turn + j) % len(WORDS)] for j in range(1 + (number + turn) % 3)]
        messages += [
            {"role": "user", "content": f"{number} {words[0]}?"},
            {"role": "assistant", "content": " ".join(words)},
        ]
    return messages


ROWS = [{"id": f"r{n}", "messages": conversation(n, turns)} for n, turns in enumerate(NUM_TURNS)]


@pytest.fixture(scope="module")
def spec_file(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    spec = write_spec(folder, teacher_folder)
    write_jsonl(folder / "rows.jsonl", ROWS)
    write_jsonl(folder / "heldout.jsonl", [{**row, "id": f"h{row['id']}"} for row in ROWS[:6]])
    spec.write_text(spec.read_text().replace("max_length: 64", "max_length: 200"))
    return spec


@pytest.fixture
def num_sequences(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_sequences(monkeypatch)


@pytest.fixture(scope="module")
def cache(spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return vc.build_teacher(vc.load_spec(spec_file), out=tmp_path_factory.mktemp("cache") / "c")


def test_rows_are_those_of_the_model_over_each_turn_alone(
    spec_file: Path, tmp_path: Path, teacher_folder: Path, num_sequences: list[int]
) -> None:
    cache = vc.build_teacher(vc.load_spec(spec_file, overrides=["store.profile=exact"]), out=tmp_path / "c")
    assert sum(num_sequences) == len(ROWS)  # one sequence for each conversation
    names = [f"r{n}" if turns == 1 else f"r{n}/{k + 1}" for n, turns in enumerate(NUM_TURNS) for k in range(turns)]
    assert sorted(cache) == sorted(names)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    for name in names:
        row_id, _, turn = name.partition("/")
        messages = ROWS[int(row_id[1:])]["messages"][: 2 * int(turn or 1)]
        assert_row_is_the_models_own(cache[name], messages, model, tokenizer)


def test_turns_of_a_row_lie_side_by_side(cache: Cache) -> None:
    table = cache.sample_table()
    order = [name.partition("/") for name in table["id"].to_pylist()]
    parts = table["part"].to_pylist()
    for n, turns in enumerate(NUM_TURNS):
        places = [index for index, (row_id, _, _) in enumerate(order) if row_id == f"r{n}"]
        assert places == list(range(places[0], places[0] + turns))
        assert len({parts[index] for index in places}) == 1
        assert [order[index][2] for index in places] == ([""] if turns == 1 else [str(k + 1) for k in range(turns)])
    assert len(set(parts)) > 1


def test_the_order_of_training_keeps_turns_together(cache: Cache) -> None:
    names = [row.sample_id for row in vc.PartWindowReader(cache, layers=[], seed=1, epoch=0, window_parts=9)]
    assert sorted(names) == sorted(cache)
    assert names != list(cache)
    dataset = vc.CacheDataset(cache)
    assert [dataset[i].sample_id for i in vc.PartWindowSampler(dataset, seed=1, window_parts=9)] == names
    for name, later in pairwise(names):
        row_id, _, turn = name.partition("/")
        if turn and int(turn) < NUM_TURNS[int(row_id[1:])]:
            assert later == f"{row_id}/{int(turn) + 1}"


def test_losses_are_those_of_turns_that_run_apart(
    spec_file: Path,
    cache: Cache,
    student_folder: Path,
    tmp_path: Path,
    num_sequences: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = vc.load_spec(spec_file)
    options = {"student": str(student_folder), "overrides": ["distill.micro_batch_size=4"]}

    def run(name: str) -> tuple[list[dict[str, Any]], int]:
        num_sequences.clear()
        vc.distill(cache, out=tmp_path / name, **options)
        vc.train_verbalizers(spec, out=tmp_path / f"verbalizers-{name}")
        return metrics_of(tmp_path / name) + metrics_of(tmp_path / f"verbalizers-{name}"), sum(num_sequences)

    together, few = run("together")
    monkeypatch.setattr(encoder_module.Encoder, "_shared", lambda *_: encoder_module.NOTHING)
    apart, many = run("apart")
    assert few < 0.75 * many
    losses = 0
    for one, other in zip(together, apart, strict=True):
        assert one.keys() == other.keys()
        assert one.get("matched_layers") == other.get("matched_layers")
        if "loss" in one:
            losses += 1
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert one.get("layers", {}) == pytest.approx(other.get("layers", {}), rel=1e-4)
    assert losses == 4 + 5 + 4 + 6


def test_evaluation_is_that_of_turns_that_run_apart(
    cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vc.distill(cache, student=str(student_folder), out=tmp_path / "run", recipe="sft")
    together = vc.evaluate(tmp_path / "run", cache=cache.path)
    monkeypatch.setattr(encoder_module.Encoder, "_shared", lambda *_: encoder_module.NOTHING)
    apart = vc.evaluate(tmp_path / "run", cache=cache.path)
    assert together["num_samples"] == sum(NUM_TURNS[:6])
    for key in ("nll", "exact_match"):
        assert together[key] == pytest.approx(apart[key], rel=1e-5)
    assert together["cache"]["kl"] == pytest.approx(apart["cache"]["kl"], rel=1e-4)


def test_a_stored_spec_without_turns_means_the_last_ones(cache: Cache) -> None:
    stored = cache.header.spec
    assert stored["data"]["turns"] == "all"
    assert spec_from_dict(stored, where="a cache").data.turns == "all"
    old = {**stored, "data": {key: value for key, value in stored["data"].items() if key != "turns"}}
    assert spec_from_dict(old, where="a cache").data.turns == "last"
    assert "turns" not in old["data"]  # what is stored is not changed


def test_a_cache_of_an_earlier_release_serves_students_of_its_last_turns(
    spec_file: Path, student_folder: Path, tmp_path: Path
) -> None:
    built = vc.build_teacher(vc.load_spec(spec_file, overrides=["data.turns=last"]), out=tmp_path / "c")
    assert sorted(built) == sorted(row["id"] for row in ROWS)
    stored = json.loads((tmp_path / "c" / "cache.json").read_text())
    del stored["xxh3"], stored["spec"]["data"]["turns"]
    (tmp_path / "c" / "cache.json").write_bytes(sealed_json(stored))
    run = vc.distill(tmp_path / "c", student=str(student_folder), out=tmp_path / "run", recipe="last")
    assert vc.open_run(run).record["status"] == "done"
