"""Generated responses: resuming, what is left out, what survives the file, and where a cache says they come from."""

import json
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.caches import header_of, standard_case
from helpers.tiny import write_jsonl, write_spec
from vlsi_cache_cli.stages import _generated_text

import vlsi_cache as vc
from vlsi_cache.config.sections import CacheSpec, DataSpec
from vlsi_cache.data.encoder import load_encoder
from vlsi_cache.data.records import read_records, row_of
from vlsi_cache.data.sources import raw_rows
from vlsi_cache.data.writing import write_rows
from vlsi_cache.errors import DataError, FingerprintMismatchError, RunBusyError, SpecError
from vlsi_cache.report.describe import describe_cache, description_text
from vlsi_cache.runs.run_dir import locked
from vlsi_cache.store import reader as surprise
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.teacher import generate as generate_module
from vlsi_cache.teacher.generate import Response, generate

SAMPLED: dict[str, Any] = {"temperature": 1.5, "num_samples": 2, "max_new_tokens": 60, "batch_size": 8, "limit": 12}


@pytest.fixture
def spec(spec_file: Path) -> CacheSpec:
    return vc.load_spec(spec_file, overrides=["data.max_length=200"])


def records_of(path: Path) -> Any:
    return read_records(DataSpec(path=str(path)))


def say_instead(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Response]) -> None:
    """Let the model say these, by row id."""

    def respond(_model: Any, _encoder: Any, records: Any, *_: Any) -> list[Response]:
        return [answers[record.id] for record in records]

    monkeypatch.setattr(generate_module, "respond", respond)


def test_a_killed_run_ends_in_the_same_bytes(spec: CacheSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(spec, out=tmp_path / "whole.parquet", seed=7, **SAMPLED)
    counts = whole["counts"]
    assert (counts["source_rows"], counts["generated"]) == (12, 24)
    assert 0 < counts["written"] == 24 - counts["left_out"] < 24  # both kinds, or this test says little
    assert any("no end of turn within 60 tokens" in one["reason"] for one in whole["left_out"])

    respond, calls = generate_module.respond, []

    def dies(*arguments: Any) -> list[Response]:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return respond(*arguments)

    monkeypatch.setattr(generate_module, "respond", dies)
    halves = tmp_path / "halves.parquet"
    with pytest.raises(KeyboardInterrupt):
        generate(spec, out=halves, seed=7, **SAMPLED)
    assert not halves.exists()
    generate(spec, out=halves, seed=7, **SAMPLED)
    assert len(calls) == 4  # three batches: the two that were done are not done again
    assert halves.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.glob(".*")) == []

    records = records_of(halves)
    assert {record.id.split("#")[1] for record in records} <= {"0", "1"}
    order = [(int(record.id.split("-")[1].split("#")[0]), record.id) for record in records]
    assert order == sorted(order)
    other = generate(spec, out=tmp_path / "other.parquet", seed=8, **SAMPLED)
    assert [r.answer for r in records_of(Path(other["path"]))] != [r.answer for r in records]


def test_a_layer_drafts_the_same_answers(
    spec: CacheSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    respond, said = generate_module.respond, []

    def heard(*arguments: Any) -> list[Response]:
        said.append(respond(*arguments))
        return [Response([5], True)] * len(said[-1])  # the teacher of the tests would not end by itself

    monkeypatch.setattr(generate_module, "respond", heard)
    options: Any = {"max_new_tokens": 24, "limit": 6}
    generate(spec, out=tmp_path / "plain.parquet", **options)
    generate(spec, out=tmp_path / "drafted.parquet", draft_exit=2, **options)
    assert said[0] == said[1]
    assert "layer 2 (logit-lens) drafted the answers" in capsys.readouterr().err
    with pytest.raises(FingerprintMismatchError, match="draft_exit"):
        generate(spec, out=tmp_path / "drafted.parquet", **options)
    with pytest.raises(SpecError, match=r"`draft_exit`: \[9\] out of range; this model has 5 layers"):
        generate(spec, out=tmp_path / "other.parquet", draft_exit=9, **options)
    assert not list(tmp_path.glob(".other*"))  # nothing that the right layer would have to be begun anew for


def test_what_cannot_be_a_row_is_listed(
    spec: CacheSpec, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(teacher_folder)
    ids = encoder.tokenizer("the big \u00e9\U0001f600 cat")["input_ids"]
    shortest = encoder.tokenizer("red")["input_ids"]
    letters = [encoder.id_of[letter] for letter in "red"]  # the same text in other tokens
    assert len(shortest) < len(letters)
    said = {
        "row-0": Response(ids, True),
        "row-1": Response(ids, False),
        "row-2": Response([], True),
        "row-3": Response(encoder.tokenizer("  \n")["input_ids"], True),
        "row-4": Response([*ids, encoder.id_of["<|im_start|>"]], True),
        "row-5": Response(letters, True),
        "row-6": Response(ids * 40, True),
    }
    say_instead(monkeypatch, said)
    result = generate(spec, out=tmp_path / "rows.parquet", limit=7, max_new_tokens=9)
    records = records_of(tmp_path / "rows.parquet")
    assert [(record.id, record.answer) for record in records] == [
        ("row-0", "the big \u00e9\U0001f600 cat"),
        ("row-5", "red"),
    ]
    assert [record.kind for record in records] == ["even", "odd"]
    reasons = {one["id"]: one["reason"] for one in result["left_out"]}
    assert reasons.keys() == said.keys() - {"row-0", "row-5"}
    assert reasons["row-1"] == "no end of turn within 9 tokens"
    assert reasons["row-2"] == reasons["row-3"] == "the response is empty"
    assert "control token `<|im_start|>`" in reasons["row-4"]
    assert "data.max_length is 200" in reasons["row-6"]
    assert result["counts"] == {"source_rows": 7, "generated": 7, "written": 2, "left_out": 5, "retokenised": 1}
    stored = json.loads(pq.read_schema(tmp_path / "rows.parquet").metadata[b"vlsi_cache.responses"])
    assert {"path": str(tmp_path / "rows.parquet"), **stored} == result
    assert records.provenance == stored

    say_instead(monkeypatch, dict.fromkeys(said, Response(ids, False)))
    with pytest.raises(DataError, match="none of 7 responses can be used"):
        generate(spec, out=tmp_path / "none.parquet", limit=7, max_new_tokens=9)
    assert sorted(path.name for path in tmp_path.glob("*none*")) == []


def test_prompts_that_are_too_long_are_listed(spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"id": "long", "messages": [turn("user", "cat " * 80), turn("assistant", "no")]},
        {"id": "short", "messages": [turn("user", "cat"), turn("assistant", "dog " * 80)]},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    say_instead(monkeypatch, {"short": Response([70, 71], True)})
    result = generate(vc.load_spec(spec_file), out=tmp_path / "out.parquet")
    assert [one["id"] for one in result["left_out"]] == ["long"]
    assert "data.max_length is 64" in result["left_out"][0]["reason"]
    assert [record.id for record in records_of(tmp_path / "out.parquet")] == ["short"]  # its old answer does not count


def test_rows_beyond_the_limit_are_not_read(spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": f"row-{i}", "messages": [turn("user", "cat"), turn("assistant", "dog")]} for i in range(3)]
    write_jsonl(tmp_path / "rows.jsonl", [rows[0], {"id": "bad"}, rows[1], {"id": "worse"}, rows[2]])
    say_instead(monkeypatch, {row["id"]: Response([70, 71], True) for row in rows})
    first = generate(vc.load_spec(spec_file), out=tmp_path / "one.parquet", limit=1)
    assert (first["counts"]["written"], first["left_out"]) == (1, [])
    spec = vc.load_spec(spec_file, overrides=["data.bad_rows=list"])
    listed = generate(spec, out=tmp_path / "three.parquet", limit=3)
    assert (listed["counts"]["written"], [one["id"] for one in listed["left_out"]]) == (2, ["bad"])
    spec = vc.load_spec(spec_file, overrides=["data.bad_rows=list", "data.limit=2"])
    assert generate(spec, out=tmp_path / "two.parquet", limit=3)["counts"]["source_rows"] == 1


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_everything_before_the_last_answer_stays(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [turn("user", "one"), turn("assistant", "two"), turn("user", "three"), turn("assistant", "four")]
    write_jsonl(tmp_path / "rows.jsonl", [{"id": "a", "system": "be \u00e9", "kind": "k", "messages": messages}])
    say_instead(monkeypatch, {"a/1": Response([70, 72], True), "a/2": Response([70, 71], True)})
    spec = vc.load_spec(spec_file)
    generate(spec, out=tmp_path / "out.parquet")
    old, new = read_records(spec.data), records_of(tmp_path / "out.parquet")
    # Each answer in a row of its own, in which what was said before is history and not learned again.
    assert [(one.id, one.row, one.kind) for one in new] == [("a/1", "a/1", "k"), ("a/2", "a/2", "k")]
    assert [one.prompt_messages for one in new] == [one.prompt_messages for one in old]
    assert [message["role"] for message in new[1].messages] == ["system", "user", "assistant", "user", "assistant"]
    assert all(one.answer != other.answer for one, other in zip(new, old, strict=True))


def test_pictures_go_along(tmp_path: Path) -> None:
    """Of the demo's rows with pictures, one names its file, which stays, and the others hold their bytes."""
    demo = DataSpec(generator="demo", options={"split": "train", "num_samples": 4})
    source = [raw.row for raw in raw_rows(demo)]
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "first.png").write_bytes(source[0]["images"][0]["bytes"])
    rows = [{**source[0], "images": ["first.png"]}, *source[1:]]
    write_rows(rows, tmp_path / "from" / "rows.parquet")
    changes = ["data.generator=null", "data.options={}", f"data.path={tmp_path / 'from' / 'rows.parquet'}"]
    spec = vc.load_spec("demo", overrides=changes)
    (tmp_path / "to").mkdir()
    out = tmp_path / "to" / "out.parquet"
    result = generate(spec, out=out, max_new_tokens=24)
    images = pq.read_table(out)["images"].to_pylist()
    assert [[image["path"] for image in row] for row in images] == [["first.png"], [None], [None], [None]]
    assert [row[0]["bytes"] is None for row in images] == [True, False, False, False]
    shown = _generated_text(result, spec.data).rpartition("use them with: ")[2]
    assert shown == f"--set data.path={out} --set data.media_root={tmp_path / 'from'}"
    beside = generate(spec, out=tmp_path / "from" / "out.parquet", max_new_tokens=24)
    assert "media_root" not in _generated_text(beside, spec.data).rpartition("use them with: ")[2]
    overrides = [one for one in shown.split() if one != "--set"]
    old, new = read_records(spec.data), read_records(vc.load_spec("demo", overrides=[*changes, *overrides]).data)
    assert len(new) == 4
    with pytest.raises(DataError, match=r"`first\.png` does not exist"):
        records_of(out)
    for before, after in zip(old, new, strict=True):
        assert (after.id, after.kind, after.prompt_messages) == (before.id, before.kind, before.prompt_messages)
        assert [image.read() for image in after.images] == [image.read() for image in before.images]
    assert [record.answer for record in new] == [record.answer for record in old]  # it was trained on these


def test_responses_take_four_bytes_a_token_and_rows_are_made_while_they_are_written(
    spec: CacheSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    num_bytes: list[float] = []
    with_answer, write, read = generate_module.with_answer, generate_module.write_rows, generate_module._read_said

    def remembered(record: Any, answer: str) -> Any:
        row = with_answer(record, answer)
        made.append(weakref.ref(row))
        return row

    def watched(rows: Any, *args: Any, **options: Any) -> int:
        def each() -> Iterator[Any]:
            for row in rows:
                alive.append(sum(ref() is not None for ref in made))
                yield row

        return write(each(), *args, **options)

    def weighed(job: Any) -> Any:
        tracemalloc.start()
        said = read(job)
        num_bytes.append(tracemalloc.get_traced_memory()[0] / sum(len(ids) for _, ids, _ in said))
        tracemalloc.stop()
        return said

    for name, spy in (("with_answer", remembered), ("write_rows", watched), ("_read_said", weighed)):
        monkeypatch.setattr(generate_module, name, spy)
    encoder = load_encoder(spec.teacher.model)
    ids = [i for i in encoder.tokenizer("the big cat sees one small dog " * 20)["input_ids"] if i > 256]
    say_instead(monkeypatch, {f"row-{i}": Response(ids, True) for i in range(40)})
    result = generate(spec, out=tmp_path / "rows.parquet")
    assert result["counts"]["written"] == len(alive) == 40
    assert max(alive) <= 2
    assert num_bytes[0] < 8


def test_something_else_is_refused(spec: CacheSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.parquet"
    say_instead(monkeypatch, {f"row-{i}": Response([70, 71], True) for i in range(6)})
    generate(spec, out=out, limit=6)
    before = out.read_bytes()
    generate(spec, out=out, limit=6)
    assert out.read_bytes() == before
    with pytest.raises(FingerprintMismatchError, match=r"`settings.batch_size`: 16 there, 8 now"):
        generate(spec, out=out, limit=6, batch_size=8)
    with pytest.raises(SpecError, match="`seed` 1 belongs to sampling"):
        generate(spec, out=out, limit=6, seed=1)
    with pytest.raises(FingerprintMismatchError, match=r"(?s)6 source rows there, 5 now .*`source_rows`"):
        generate(spec, out=out, limit=5)
    out.unlink()
    monkeypatch.setattr(generate_module, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        generate(spec, out=out, limit=6)
    with pytest.raises(FingerprintMismatchError, match=r"max_new_tokens`: 256 there, 10 now"):
        generate(spec, out=out, limit=6, max_new_tokens=10)
    with locked(tmp_path / ".rows.parquet.work"), pytest.raises(RunBusyError, match="is being worked on by process"):
        generate(spec, out=out, limit=6)
    write_rows([{"messages": [turn("user", "a"), turn("assistant", "b")]}], tmp_path / "mine.parquet")
    with pytest.raises(SpecError, match="was not written by `generate`"):
        generate(spec, out=tmp_path / "mine.parquet")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_samples": 2}, "without a `temperature` above 0"),
        ({"top_p": 0.9}, "belongs to sampling"),
        ({"top_p": 0.0, "temperature": 1.0}, "must be above 0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"out": "rows.jsonl"}, r"must end in \.parquet"),
        ({"model": "train-verbalizers"}, "holds a teacher's verbalizers and no student"),
    ],
)
def test_options_that_make_no_sense(spec: CacheSpec, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    if "model" in options:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text(json.dumps({"kind": options["model"], "status": "done", "spec": {}}))
        options = {"model": str(tmp_path / "run")}
    with pytest.raises(SpecError, match=says):
        generate(spec, **{"out": tmp_path / "rows.parquet", **options})
    assert list(tmp_path.glob(".*")) == []


def test_caches_say_where_their_responses_come_from(
    spec: CacheSpec, tmp_path: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_instead(monkeypatch, {f"row-{i}": Response([70 + i, 71], i != 3) for i in range(40)})
    made: dict[str, Any] = {}
    for name, model, limit in (("own", "teacher", 8), ("student", str(student_folder), 40)):
        found = generate(spec, out=tmp_path / f"{name}.parquet", model=model, limit=limit)
        made[name] = {key: value for key, value in found.items() if key not in ("path", "left_out")}
    # The student's responses to other rows: a merge wants other samples.
    rest = DataSpec(path=str(tmp_path / "student.parquet"))
    records = read_records(rest)
    write_rows(map(row_of, records[10:20]), tmp_path / "student.parquet", responses=records.provenance)
    caches = {}
    for name in ("own", "student"):
        data = spec.data.model_copy(update={"path": str(tmp_path / f"{name}.parquet")})
        caches[name] = vc.build_teacher(spec.model_copy(update={"data": data}), out=tmp_path / name)
        assert caches[name].header.responses == [made[name]]
    assert made["own"]["weights"] == caches["own"].header.fingerprint["teacher.weights"] != made["student"]["weights"]
    data = spec.data.model_copy(update={"limit": 10})
    plain_rows = [{**row, "id": f"plain-{i}"} for i, row in enumerate(map(row_of, read_records(data)))]
    write_rows(plain_rows, tmp_path / "plain.parquet")
    data = spec.data.model_copy(update={"path": str(tmp_path / "plain.parquet")})
    plain = vc.build_teacher(spec.model_copy(update={"data": data}), out=tmp_path / "plain")
    assert "responses" not in json.loads((tmp_path / "plain" / "cache.json").read_text())

    both = vc.merge([caches["own"], caches["student"]], out=tmp_path / "both")
    assert both.header.responses == [made["own"], made["student"]]
    every = vc.merge([both, plain], out=tmp_path / "every")
    small = vc.prune(every, out=tmp_path / "small", top_k=4)
    assert small.header.responses == [made["own"], made["student"], {}]
    assert vc.open(tmp_path / "small").header == small.header
    shown = description_text(describe_cache(tmp_path / "small"))
    assert f"responses   generated by {student_folder}" in shown
    assert "7 of 8 kept" in shown
    assert "responses   of unknown origin" in shown


def test_a_header_without_origin_is_what_it_was() -> None:
    """The digest does not know the field, and JSON without it reads back to the same header."""
    header = header_of(standard_case())
    told = header.model_copy(update={"responses": [{"model": "m"}]})
    assert "responses" not in header.model_dump()
    assert CacheHeader.model_validate(header.model_dump()) == header
    assert CacheHeader.model_validate(told.model_dump()).responses == [{"model": "m"}]
    assert told.digest == header.digest


def test_the_warning_comes_for_foreign_responses_alone(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = vc.load_spec(write_spec(tmp_path, teacher_folder))
    cache = vc.build_teacher(spec, out=tmp_path / "cache")
    rows = [cache[name] for name in cache]
    nll = -np.concatenate([row.gold_logprob_LT[-1] for row in rows]).mean(dtype=np.float64)
    entropy = np.concatenate([row.entropy_LT[-1] for row in rows]).mean(dtype=np.float64)
    found = surprise.surprise_of(cache)
    assert found is not None
    assert (found.gold_nll, found.entropy) == (pytest.approx(nll, rel=1e-5), pytest.approx(entropy, rel=1e-5))
    monkeypatch.setattr(surprise, "SURPRISE_NATS", nll - entropy + 0.01)
    assert surprise.surprise_warning(cache) == ""
    monkeypatch.setattr(surprise, "SURPRISE_NATS", nll - entropy - 0.01)
    capsys.readouterr()
    vc.build_teacher(spec, out=tmp_path / "cache")
    heard = capsys.readouterr().err
    assert (
        f"warning: the teacher is poor on these responses, which are not known to be its own: its last layer says "
        f"them at {nll:.2f} nats" in heard
    )
    assert "vlsi-cache generate SPEC" in describe_cache(tmp_path / "cache")["warning"]

    header = cache.header
    own = header.fingerprint["teacher.weights"]
    another, unknown = "were generated by another model", "are not known to be its own"
    for weights, says in (
        ([own], ""),
        (["xxh3:other"], another),
        (["commit:0123abc"], unknown),  # the teacher's digest is a folder's: this may be the same model
        ([own, None], unknown),
        (["commit:0123abc", "xxh3:other"], another),
    ):
        cache.header = header.model_copy(update={"responses": [{"weights": one} if one else {} for one in weights]})
        warning = surprise.surprise_warning(cache)
        assert says in warning
        assert bool(warning) is bool(says)


def test_the_demo_teacher_knows_its_rows(tmp_path: Path) -> None:
    spec = vc.load_spec("demo", overrides=["data.options.num_samples=32"])
    cache = vc.build_teacher(spec, out=tmp_path / "cache")
    found = surprise.surprise_of(cache)
    assert found is not None
    assert abs(found.nats) < 0.05
    assert surprise.surprise_warning(cache) == ""
