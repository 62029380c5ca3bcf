"""Import: rows against the teacher's dense log-probs, whatever the format; what is not known; and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.exchange import Said, say_all, write_axolotl, write_distillkit, write_vllm
from helpers.tiny import make_rows, save_model, write_jsonl

import vlsi_cache as vc
from vlsi_cache.errors import DataError, SpecError
from vlsi_cache.exchange import importing

K = 8


@pytest.fixture(scope="module")
def said(teacher_folder: Path) -> list[Said]:
    return say_all(teacher_folder, make_rows(14))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory, said: list[Said]) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", [one.row for one in said])


WRITERS: dict[str, tuple[str, Callable[[Path, list[Said]], Path]]] = {
    "distillkit": ("distillkit", lambda folder, said: write_distillkit(folder / "capture", said)),
    "axolotl": ("axolotl", lambda folder, said: write_axolotl(folder / "kd.parquet", said)),
    "axolotl-legacy": ("axolotl", lambda folder, said: write_axolotl(folder / "kd.jsonl", said, with_ids=False)),
    "vllm": ("vllm", lambda folder, said: write_vllm(folder / "out.jsonl", said)),
    "vllm-without-tokens": ("vllm", lambda folder, said: write_vllm(folder / "out.jsonl", said, with_tokens=False)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_what_the_teacher_says(
    name: str, said: list[Said], rows_file: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format, write = WRITERS[name]
    monkeypatch.setattr(importing, "BYTES_PER_ENTRY", 1 << 18)  # several parts
    files = write(tmp_path, said)
    data = None if format == "axolotl" else rows_file
    cache = vc.import_cache(
        files, tmp_path / "cache", format=format, tokenizer=str(teacher_folder), data=data, profile="exact"
    )
    assert len(cache) == len(said)
    assert len(cache.parts) > 1
    assert cache.verify(deep=True).ok
    knows_gold = format == "vllm"
    assert cache.header.lacks == (["entropy", "lse"] if knows_gold else ["entropy", "gold_logprob", "lse"])
    for one in said:
        row = cache[one.row["id"]]
        ids_TK, logprobs_TK = (array[one.response] for array in one.top(K))
        assert row.response_ids_R.tolist() == one.token_ids[one.response]
        assert row.ids_LTK[0].tolist() == ids_TK.tolist()
        np.testing.assert_allclose(row.logprobs_LTK[0], logprobs_TK, atol=2e-6)
        np.testing.assert_allclose(row.tail_mass_LT[0], 1 - np.exp(logprobs_TK).sum(1), atol=1e-5)
        gold_T = np.take_along_axis(one.logprobs_SV[one.response], row.response_ids_R[:, None].astype(int), 1)[:, 0]
        is_kept_T = (ids_TK == row.response_ids_R[:, None]).any(1) | knows_gold
        np.testing.assert_allclose(row.gold_logprob_LT[0][is_kept_T], gold_T[is_kept_T], atol=2e-6)
        assert np.isnan(row.gold_logprob_LT[0][~is_kept_T]).all()
        assert np.isnan(row.entropy_LT).all()


def test_commands_take_it_as_any_other(
    said: list[Said], teacher_folder: Path, student_folder: Path, tmp_path: Path, run: Any
) -> None:
    files = write_axolotl(tmp_path / "kd.parquet", said)
    line = ["import", files, "-o", tmp_path / "cache", "--format", "axolotl", "--tokenizer", teacher_folder]
    code, out, err = run(*line, "--json")
    assert code == 0, err
    assert json.loads(out)["num_samples"] == len(said)
    assert "not known of these rows: entropy, gold_logprob, lse" in err
    assert "not read" not in err
    assert run("verify", tmp_path / "cache", "--deep")[0] == 0
    assert "? " in run("sample", tmp_path / "cache", "row-1")[1]
    assert "entropy, gold_logprob, lse" in run("inspect", tmp_path / "cache")[1]
    assert run("stats", tmp_path / "cache")[0] == 0
    stats = json.loads(run("stats", tmp_path / "cache", "--json")[1])
    assert stats["layers"][0]["entropy"]["mean"] is None
    assert stats["layers"][0]["kept_mass"]["mean"] == pytest.approx(
        np.concatenate([np.exp(one.top(K)[1][one.response]).sum(1) for one in said]).mean(), abs=2e-3
    )
    steps = ["verbalize.steps=1", "interact.schedule.steps=1", "sft.schedule.steps=1", "batch_size=2"]
    sets = [word for one in [*steps, "micro_batch_size=2"] for word in ("--set", f"distill.{one}")]
    code, _, err = run("distill", tmp_path / "cache", "--student", student_folder, "-o", tmp_path / "run", *sets)
    assert code == 0, err
    assert "not read" not in err
    code, out, err = run("evaluate", tmp_path / "run", "--cache", tmp_path / "cache", "--json")
    assert code == 0, err
    assert json.loads(out)["cache"]["teacher_entropy"] is None
    assert json.loads(out)["cache"]["kl"] > 0
    # what is not known cannot be asked for
    for words, what in (
        (["distill", "--student", student_folder, "-o", tmp_path / "r", "--set", "distill.interact.tau=2"], "tau"),
        (
            ["distill", "--student", student_folder, "-o", tmp_path / "r", "--recipe", "vlsi"],
            "distill that one: `--recipe last`",
        ),
        (["prune", "-o", tmp_path / "p", "--tokens", "entropy>0.5"], "does not know `entropy`"),
        (["prune", "-o", tmp_path / "p", "--where", "gold_logprob < -1 "], "does not know `gold_logprob`"),
        (["verify", "--recompute", "1"], "whose weights"),
    ):
        code, _, err = run(words[0], tmp_path / "cache", *words[1:])
        assert code == 2, (words, err)
        assert what in err
    small = vc.prune(tmp_path / "cache", tmp_path / "small", top_k=4)
    assert small.header.lacks == ["entropy", "gold_logprob", "lse"]
    assert vc.diff(small, tmp_path / "cache") is not None


def test_it_goes_on_after_a_kill(
    said: list[Said], teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlsi_cache.store.writer import CacheWriter

    monkeypatch.setattr(importing, "BYTES_PER_ENTRY", 1 << 18)
    files = write_axolotl(tmp_path / "kd.jsonl", said)
    options: dict[str, Any] = {"format": "axolotl", "tokenizer": str(teacher_folder)}
    whole = vc.import_cache(files, tmp_path / "whole", **options)
    write_part, written = CacheWriter.write_part, list[int]()

    def write_two(self: CacheWriter, index: int, samples: Any) -> bool:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(index)
        return write_part(self, index, samples)

    monkeypatch.setattr(CacheWriter, "write_part", write_two)
    with pytest.raises(KeyboardInterrupt):
        vc.import_cache(files, tmp_path / "cache", **options)
    written.clear()
    monkeypatch.setattr(CacheWriter, "write_part", lambda *args: written.append(args[1]) or write_part(*args))
    again = vc.import_cache(files, tmp_path / "cache", **options)
    assert 0 not in written
    assert len(written) == len(whole.parts) - 2
    assert {one: again[one].logprobs_LTK.tolist() for one in again} == {
        one: whole[one].logprobs_LTK.tolist() for one in whole
    }
    with pytest.raises(Exception, match=r"(?s)^(?!.*--sync).*(import\.format|import\.files|data\.content)"):
        vc.import_cache(write_axolotl(tmp_path / "b.jsonl", said[:5]), tmp_path / "cache", **options)


def test_a_capture_without_rows_of_text(said: list[Said], teacher_folder: Path, tmp_path: Path) -> None:
    files = write_distillkit(tmp_path / "capture", said)
    cache = vc.import_cache(files, tmp_path / "cache", format="distillkit", tokenizer=str(teacher_folder))
    assert len(cache) == len(said)
    row = cache["data_0.parquet row 0"]
    assert row.response_ids_R.tolist() == said[-1].token_ids[1:]
    assert row.ids_LTK[0].tolist() == said[-1].top(K)[0][1:].tolist()
    with pytest.raises(SpecError, match="import it again with --data"):
        vc.distill(cache, student=str(teacher_folder), out=tmp_path / "run")


def test_samples_without_a_sequence_are_listed(
    said: list[Said], rows_file: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    files = write_vllm(tmp_path / "out.jsonl", said[3:])
    options: dict[str, Any] = {"format": "vllm", "tokenizer": str(teacher_folder)}
    cache = vc.import_cache(files, tmp_path / "cache", data=rows_file, **options)
    assert [one["id"] for one in cache.header.skipped] == ["row-0", "row-1", "row-2"]
    other = write_jsonl(tmp_path / "other.jsonl", make_rows(3, start=500))
    with pytest.raises(DataError, match="none of the 3 samples of the data is among the 11 sequences"):
        vc.import_cache(files, tmp_path / "b", data=other, **options)


@pytest.mark.parametrize(
    ("format", "name", "message"),
    [
        (
            "distillkit",
            "empty",
            r"to import is .*empty, a folder that holds nothing; a DistillKit capture is read from",
        ),
        ("vllm", "nothing.jsonl", r"nothing\.jsonl: no such file or folder; .*prompt_logprobs.* is read from \.jsonl"),
        ("axolotl", "rows.csv", r"rows\.csv, a `\.csv` file; an Axolotl data set is read from"),
        ("distillkit", "rows.jsonl", r"rows\.jsonl, of \.jsonl files; .* is read from \.parquet, \.arrow"),
        ("vllm", "empty.jsonl", r"empty\.jsonl holds no rows"),
        ("axolotl", "empty.jsonl", r"empty\.jsonl holds no rows"),
        ("axolotl", "empty.parquet", r"empty\.parquet cannot be read: .* 0 bytes"),
        ("axolotl", "none.parquet", r"none\.parquet holds no rows"),
        ("distillkit", "empty.arrow", r"empty\.arrow cannot be read"),
    ],
)
def test_where_there_is_nothing_it_says_what_was_given(
    format: str, name: str, message: str, rows_file: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for file in ("rows.csv", "rows.jsonl", "empty.jsonl", "empty.parquet", "empty.arrow"):
        (tmp_path / file).touch()
    columns = {"messages": pa.array([], pa.string()), "logprobs": pa.array([], pa.list_(pa.list_(pa.float32())))}
    pq.write_table(pa.table(columns), tmp_path / "none.parquet")
    data = None if format == "axolotl" else rows_file
    with pytest.raises(DataError, match=message) as found:
        vc.import_cache(tmp_path / name, tmp_path / "c", format=format, tokenizer=str(teacher_folder), data=data)
    assert "data.path" not in str(found.value)
    assert str(tmp_path / name) in str(found.value)


def changed(said: Said, change: Callable[[np.ndarray], np.ndarray]) -> Said:
    return Said(said.row, said.token_ids, said.num_prompt, said.num_response, change(said.logprobs_SV))


def likely(said: Said) -> Said:
    """The same with a teacher that knows the answers, so that a shift shows."""
    logprobs_SV = said.logprobs_SV.copy()
    logprobs_SV[np.arange(len(said.token_ids)), said.token_ids] = -0.01
    return Said(said.row, said.token_ids, said.num_prompt, said.num_response, logprobs_SV - np.log(3))


def scaled(said: Said) -> Said:
    """The log-probs scaled to a mass of 1 over the likeliest K."""
    return changed(said, lambda x_SV: x_SV - np.log(np.exp(np.sort(x_SV, 1)[:, -K:]).sum(1, keepdims=True)))


@pytest.mark.parametrize(
    ("make", "shift", "message"),
    [
        (lambda one: changed(one, lambda x: x + 3), 0, "a mass of .* more than"),
        (scaled, 0, "scaled to sum to 1 over what is kept"),
        (likely, 1, "the rows are shifted by one token"),
        (likely, -1, "the rows are shifted by one token"),
        (lambda one: changed(one, lambda x: x * np.nan), 0, "no number"),
    ],
)
def test_rows_that_cannot_be(
    make: Callable[[Said], Said], shift: int, message: str, said: list[Said], teacher_folder: Path, tmp_path: Path
) -> None:
    files = write_axolotl(tmp_path / "kd.jsonl", [make(one) for one in said], shift=shift)
    with pytest.raises(DataError, match=message):
        vc.import_cache(files, tmp_path / "cache", format="axolotl", tokenizer=str(teacher_folder))


def first_row(line: dict[str, Any], *, ids: list[Any] | None = None, logprobs: list[Any] | None = None) -> None:
    """Change the first entries of an Axolotl row's first list."""
    for name, values in (("target_token_ids", ids), ("logprobs", logprobs)):
        line[name][0][: len(values or [])] = values or []


def entries_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    return line["response"]["body"]["choices"][0]["prompt_logprobs"]


def gold_of(line: dict[str, Any]) -> dict[str, Any]:
    """Of the last response token, before the line feed of the template."""
    return entries_of(line)[-2][str(line["response"]["body"]["choices"][0]["prompt_token_ids"][-2])]


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("axolotl", lambda row: first_row(row, ids=[3.7]), r":2: a token id is 3\.7, and must be a whole number"),
        ("axolotl", lambda row: first_row(row, ids=[1 << 70]), "a token id is 1.18059e"),
        ("axolotl", lambda row: first_row(row, ids=[None]), "a token id is nan"),
        ("axolotl", lambda row: first_row(row, ids=[-3]), r":2, sample `row-1`: .* token 0 holds id -3, and the tok"),
        ("axolotl", lambda row: first_row(row, ids=[5, 5]), r":2, sample `row-1`: .* token 0 holds id 5 twice"),
        ("axolotl", lambda row: first_row(row, logprobs=[0.5]), "a mass of 1.*, more than"),
        (
            "axolotl",
            lambda row: row["target_token_ids"].append([1]),
            "^kd.jsonl:2: `logprobs` and .* differ in their leng",
        ),
        ("vllm", lambda line: gold_of(line).update(logprob=float("nan")), "a log-prob of nan of its own token"),
        ("vllm", lambda line: gold_of(line).update(logprob=0.5), ":2, sample `row-1`: .* a log-prob of 0.5 of its own"),
        ("vllm", lambda line: gold_of(line).update(rank=[1]), ":2: an entry of `prompt_logprobs` is no mapping"),
        (
            "vllm",
            lambda line: entries_of(line)[-2].update({" 7": gold_of(line), "7": gold_of(line)}),
            "holds an id twice",
        ),
        ("vllm", lambda line: line["response"]["body"].update(choices=["x"]), ":2 has no `prompt_logprobs`"),
        (
            "vllm",
            lambda line: line.update(response=None, error={}),
            ":2 is no answer of an OpenAI server but perhaps a fa",
        ),
        (
            "vllm",
            lambda line: line["response"]["body"]["choices"][0].update(prompt_token_ids=["x"]),
            ":2: `prompt_token_ids` must be a list of whole numbers",
        ),
    ],
)
def test_a_line_that_says_what_cannot_be(
    format: str,
    change: Callable[[dict[str, Any]], Any],
    message: str,
    said: list[Said],
    rows_file: Path,
    teacher_folder: Path,
    tmp_path: Path,
) -> None:
    write = write_axolotl if format == "axolotl" else write_vllm
    file = write(tmp_path / "kd.jsonl", said[:3])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines[1])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = None if format == "axolotl" else rows_file
    with pytest.raises(DataError, match=message):
        vc.import_cache(file, tmp_path / "cache", format=format, tokenizer=str(teacher_folder), data=data)


def test_lists_as_parquet_has_them(said: list[Said], teacher_folder: Path, tmp_path: Path) -> None:
    """`datasets` stores lists that are all of one length as such; other types are refused by name."""
    table = pq.read_table(write_axolotl(tmp_path / "kd.parquet", said[:3]))
    options: Any = {"format": "axolotl", "tokenizer": str(teacher_folder), "profile": "exact"}
    plain = vc.import_cache(tmp_path / "kd.parquet", tmp_path / "plain", **options)
    place = table.schema.get_field_index("logprobs")
    for number, kind in enumerate((pa.list_(pa.list_(pa.float64(), K)), pa.large_list(pa.large_list(pa.float64())))):
        changed = table.set_column(place, "logprobs", table["logprobs"].cast(kind))
        pq.write_table(changed, tmp_path / "other.parquet")
        other = vc.import_cache(tmp_path / "other.parquet", tmp_path / f"other-{number}", **options)
        assert {name: other[name].logprobs_LTK.tolist() for name in other} == {
            name: plain[name].logprobs_LTK.tolist() for name in plain
        }
    pq.write_table(table.set_column(place, "logprobs", pa.array([[1.0]] * 3)), tmp_path / "flat.parquet")
    with pytest.raises(
        DataError, match=r"row 0: `logprobs` is of type list<.*double>, and must be lists of lists of num"
    ):
        vc.import_cache(tmp_path / "flat.parquet", tmp_path / "flat", **options)


def test_a_capture_whose_lists_do_not_fit(
    said: list[Said], rows_file: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    capture = write_distillkit(tmp_path / "capture", said[:4])
    options: Any = {"format": "distillkit", "tokenizer": str(teacher_folder), "data": rows_file}
    file = capture / "data_0.parquet"
    schema, rows = pq.read_schema(file), pq.read_table(file).to_pylist()
    rows[0]["bytepacked_indices"], rows[1]["compressed_logprobs"] = rows[0]["bytepacked_indices"][1:], None
    pq.write_table(pa.Table.from_pylist(rows[:1], schema=schema), file)
    with pytest.raises(DataError, match=r"data_0\.parquet row 0: it has \(\d+, 8\) ids and \(\d+, 8\) log-probs"):
        vc.import_cache(capture, tmp_path / "cache", **options)
    pq.write_table(pa.Table.from_pylist(rows[1:], schema=schema), file)
    cache = vc.import_cache(capture, tmp_path / "some", **options)
    reasons = [one for part in cache.parts for one in cache.part_record(part).skipped]
    assert [one["reason"].split(" has ")[0] for one in reasons] == ["data_0.parquet row 0"]  # without a list
    assert set(cache) == {one.row["id"] for one in said[:2]}
    (capture / "compression_config.yaml").write_text("")
    with pytest.raises(SpecError, match="holds no settings of DistillKit's compression"):
        vc.import_cache(capture, tmp_path / "b", **options)


def test_answers_of_vllm_without_what_is_needed(
    said: list[Said], rows_file: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    options: Any = {"format": "vllm", "tokenizer": str(teacher_folder), "data": rows_file}
    bodies = [
        json.loads(line)["response"]["body"] for line in write_vllm(tmp_path / "v", said[:3]).read_text().splitlines()
    ]

    def write(name: str, lines: list[Any]) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    choices = [body["choices"][0] for body in bodies]
    # Of a chat completion both stand at the top.
    chats = [{"id": "chatcmpl-1", "choices": [{"index": 0}], **choice} for choice in choices]
    assert len(vc.import_cache(write("chat.jsonl", chats), tmp_path / "chat", **options)) == 3
    for one in chats:
        one.pop("prompt_token_ids")
    with pytest.raises(DataError, match=r"they do not say their tokens, .* `return_token_ids`, or .* `custom_id`"):
        vc.import_cache(write("nameless.jsonl", chats), tmp_path / "nameless", **options)
    for one in choices:  # as with `prompt_logprobs: 0`
        tokens = zip(one["prompt_logprobs"][1:], one["prompt_token_ids"][1:], strict=True)
        one["prompt_logprobs"][1:] = [{str(token): entry[str(token)]} for entry, token in tokens]
    with pytest.raises(DataError, match=r"none\.jsonl says no likeliest tokens: ask for some"):
        vc.import_cache(write("none.jsonl", bodies), tmp_path / "none", **options)


def test_what_does_not_fit_the_tokenizer(
    said: list[Said], rows_file: Path, teacher_folder: Path, tmp_path: Path, run: Any
) -> None:
    capture = write_distillkit(tmp_path / "capture", said)
    with pytest.raises(SpecError, match=r"the size of the vocabulary is not known.*--tokenizer"):
        vc.import_cache(capture, tmp_path / "cache", format="distillkit", data=rows_file)
    assert run("import", capture, "-o", tmp_path / "c", "--format", "distillkit")[0] == 2
    options: dict[str, Any] = {"format": "distillkit", "tokenizer": str(teacher_folder), "data": rows_file}
    short = write_distillkit(tmp_path / "short", [], d=200)
    with pytest.raises(DataError, match=r"packed into 8 bits .* were wrapped to other ones"):
        vc.import_cache(short, tmp_path / "cache", **options)
    (capture / "compression_config.yaml").unlink()
    with pytest.raises(SpecError, match="name it with --compression"):
        vc.import_cache(capture, tmp_path / "cache", **options)
    other = save_model(tmp_path / "other", num_layers=1, hidden=8, seed=0, extra="other words altogether")
    lines = write_vllm(tmp_path / "out.jsonl", said, with_tokens=False)
    with pytest.raises(DataError, match=r"does not hold token|tokenizer has \d+ tokens"):
        vc.import_cache(lines, tmp_path / "cache", format="vllm", tokenizer=str(other), data=rows_file)
    with pytest.raises(SpecError, match="the source to import `s3://bucket/kd` is a URL"):
        vc.import_cache("s3://bucket/kd", tmp_path / "cache", format="axolotl", tokenizer=str(other))
    with pytest.raises(SpecError, match="what can be imported"):
        vc.import_cache(lines, tmp_path / "cache", format="hf", tokenizer=str(other))
