"""Rows as other tools write them: read as they are meant, told once, or refused by name."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlsi_cache.config.sections import DataSpec
from vlsi_cache.data.records import Record, read_records, row_of, with_answer
from vlsi_cache.data.writing import write_rows
from vlsi_cache.errors import DataError


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 7, 7)).save(buffer, format="PNG")
    return buffer.getvalue()


PNG, OTHER = picture(7), picture(200)
AS_BASE64 = base64.b64encode(PNG).decode()
ASK = {"role": "user", "content": "What is it?"}
TELL = {"role": "assistant", "content": "A cat."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "there", "how": None}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

SYSTEM = {"role": "system", "content": "s"}
HISTORY = [ASK, {"role": "assistant", "content": "Old."}, {"role": "user", "content": "And that?"}]


def text(words: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": words}]


def read(rows: list[Any], folder: Path, suffix: str = "jsonl", **options: Any) -> list[Record]:
    path = folder / f"rows.{suffix}"
    write_rows(rows, path)
    return list(read_records(DataSpec(path=str(path), **options)))


def read_one(row: Any, folder: Path) -> Record:
    (folder / "a.png").write_bytes(PNG)
    (folder / "b.png").write_bytes(OTHER)
    """The record of the row's last response."""
    return read([row], folder)[-1]


def reason_of(row: Any, folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_one(row, folder)
    return str(caught.value).splitlines()[1]


# --- what a chat template is given ----------------------------------------------------------------------------------

AGENT = {
    "id": "agent",
    "tools": [TOOL],
    "chat_template_kwargs": {"enable_thinking": False},
    "messages": [
        {"role": "user", "content": "What is there?", "name": "ann"},
        {"role": "assistant", "content": None, "reasoning_content": "I must look.", "tool_calls": [CALL]},
        {"role": "tool", "content": "a cat", "tool_call_id": "1", "name": "look"},
        {"role": "assistant", "content": "A cat.", "reasoning_content": "It is one."},
    ],
}


def test_what_a_template_is_given(tmp_path: Path) -> None:
    record = read_one(AGENT, tmp_path)
    assert record.tools == [TOOL]
    assert record.template_args == {"enable_thinking": False}
    assert record.messages == [
        {"role": "user", "content": text("What is there?"), "name": "ann"},
        {"role": "assistant", "content": [], "reasoning_content": "I must look.", "tool_calls": [CALL]},
        {"role": "tool", "content": text("a cat"), "name": "look", "tool_call_id": "1"},
        {"role": "assistant", "content": text("A cat."), "reasoning_content": "It is one."},
    ]


def test_digest_holds_all_that_a_template_is_given(tmp_path: Path) -> None:
    def changed(index: int, **message: Any) -> dict[str, Any]:
        messages = list(AGENT["messages"])
        messages[index] = {**messages[index], **message}
        return {**AGENT, "messages": messages}

    rows = [
        AGENT,
        {**AGENT, "tools": json.dumps([TOOL]), "chat_template_kwargs": '{"enable_thinking": false}'},
        changed(1, tool_calls=json.dumps([CALL])),
        {**AGENT, "tools": None},
        {**AGENT, "chat_template_kwargs": {}},
        changed(0, name="bob"),
        changed(1, reasoning_content="I look."),
        changed(1, tool_calls=[{**CALL, "id": "1"}]),
        changed(2, tool_call_id="2"),
    ]
    digests = [
        record.digest for record in read([{**row, "id": str(i)} for i, row in enumerate(rows)], tmp_path, turns="last")
    ]
    assert len(set(digests[:3])) == 1
    assert len(set(digests)) == 7


# What an earlier release wrote into caches: `git show 27c8f44:vlsi_cache/data/records.py` over the same rows.
EARLIER = {
    "a": "998ee146a6c313d06a7a06969283e4913f427a56e1fb91a3f065517b1d823387",
    "b": "d1ff801c8923a69c3429d532067c8285c5cf193a4b0001f58a14a61084cd4837",
    "c": "fad034dd4bc350b80d95af386f10ccfc9a0c0c042124da587167fa8c446c1ae9",
}


def test_digests_of_earlier_caches(tmp_path: Path) -> None:
    header = bytes.fromhex("424d3a00000000000000360000002800000001000000010000000100180000000000040000000000000000")
    bitmap = header.ljust(54, b"\0") + b"\x07\x07\x07\0"
    seen = [{"type": "image"}, *text("What is it?")]
    told = [*text("A "), *text("cat.")]
    turns = [("user", "caf\u00e9 \U0001f408"), ("assistant", "One."), ("user", ""), ("assistant", "Two.")]
    rows = [
        {"id": "a", "messages": [ASK, TELL], "tools": None, "chat_template_kwargs": {}},
        {"id": "b", "system": "Be short.", "kind": "x", "messages": [{"role": r, "content": c} for r, c in turns]},
        {
            "id": "c",
            "messages": [{"role": "user", "content": seen}, {"role": "assistant", "content": told, "weight": 1}],
            "images": [{"bytes": bitmap}],
        },
    ]
    assert {record.id: record.digest for record in read(rows, tmp_path, turns="last")} == EARLIER


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_records_read_back(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    seen = {"id": "seen", "image": "a.png", "messages": [{"role": "user", "content": "<image>\nWhat?"}, TELL]}
    records = read([AGENT, seen, {**AGENT, "id": "plain", "messages": [ASK, TELL]}], tmp_path)
    again = read([row_of(record) for record in records], tmp_path, suffix)
    assert [record.digest for record in again] == [record.digest for record in records]
    assert [(r.messages, r.tools, r.template_args) for r in again] == [
        (r.messages, r.tools, r.template_args) for r in records
    ]
    assert [(r.id, r.row) for r in again] == [(r.id, r.id) for r in records]  # a row of its own for each response
    assert [r.id for r in records] == ["agent/1", "agent/2", "seen", "plain"]
    assert again[2].images[0].read() == PNG


def test_another_answer_has_no_old_reasoning(tmp_path: Path) -> None:
    record = read_one(AGENT, tmp_path)
    other = with_answer(record, "A dog.")
    assert other.messages[-1] == {"role": "assistant", "content": text("A dog.")}
    assert (other.prompt_messages, other.tools, other.template_args) == (
        record.prompt_messages,
        record.tools,
        record.template_args,
    )
    messages = [*AGENT["messages"][:-1], {"role": "assistant", "content": "A dog."}]
    assert other.digest == read_one({**AGENT, "messages": messages}, tmp_path).digest


def test_a_call_is_a_response(tmp_path: Path) -> None:
    for content in (None, "", []):
        turn = {"role": "assistant", "content": content, "tool_calls": [CALL]}
        assert read_one({"messages": [ASK, turn]}, tmp_path).messages[-1]["content"] == []


def test_arguments_given_as_text_stay_text(tmp_path: Path) -> None:
    call = {"function": {"name": "look", "arguments": '{"b": 1,  "a": NaN}'}}
    turn = {"role": "assistant", "tool_calls": [call]}
    assert read_one({"messages": [ASK, turn]}, tmp_path).messages[-1]["tool_calls"] == [call]


@pytest.mark.parametrize("key", ["reasoning", "thinking"])
def test_other_names_of_reasoning(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = read_one({"messages": [ASK, {**TELL, key: "Hm."}]}, tmp_path)
    assert record.messages[-1]["reasoning_content"] == "Hm."
    assert f"`{key}` of a message is read as `reasoning_content` (1 row)" in capsys.readouterr().err


def test_developer_is_the_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turn = {"role": "developer", "content": "Be short."}
    assert read_one({"messages": [turn, ASK, TELL]}, tmp_path).messages[0]["role"] == "system"
    assert "role `developer` is read as `system` (1 row)" in capsys.readouterr().err


# --- which turn is learned ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_turns_that_are_not_learned(mark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = {"role": "user", "content": [{"type": "image"}, *text("And this?")]}
    row = {"messages": [seen, {**TELL, "weight": 1}, seen, {**TELL, **mark}], "images": ["a.png", "b.png"]}
    record = read_one(row, tmp_path)
    assert [message["role"] for message in record.messages] == ["user", "assistant"]
    assert [image.read() for image in record.images] == [PNG]
    assert record.digest == read_one({"messages": [seen, TELL], "images": ["a.png"]}, tmp_path).digest
    assert "rows end before turns of `weight: 0` or `train: false`, which are not learned (1 row)" in (
        capsys.readouterr().err
    )


def test_earlier_turns_may_be_context_alone(tmp_path: Path) -> None:
    row = {"messages": [ASK, {**TELL, "weight": 0}, ASK, {**TELL, "content": "A dog."}]}
    assert read_one(row, tmp_path).answer == "A dog."
    assert len(read_one({"messages": [ASK, TELL, ASK, {**TELL, "weight": 0}, ASK]}, tmp_path).messages) == 2


# --- conversations --------------------------------------------------------------------------------------------------


def test_sharegpt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "What is there?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"where": "there"}}'},
        {"from": "observation", "value": "a cat"},
        {"from": "gpt", "value": "A cat.", "weight": None},
    ]
    call = {"type": "function", "function": {"name": "look", "arguments": {"where": "there"}}}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is there?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "a cat"},
        TELL,
    ]
    record = read([{"conversations": turns}], tmp_path)[-1]
    assert record.messages == read_one({"messages": messages}, tmp_path).messages
    assert "rows.jsonl: rows are read as ShareGPT `conversations` (1 row)" in capsys.readouterr().err
    assert read([{"conversations": json.dumps(turns)}], tmp_path)[-1].messages == record.messages
    assert read([{"conversations": messages}], tmp_path)[-1].messages == record.messages


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "What is it?", "completion": "A cat."}, [ASK, TELL]),
        ({"prompt": [ASK], "completion": [TELL]}, [ASK, TELL]),
        ({"prompt": json.dumps([ASK]), "completion": json.dumps([TELL])}, [ASK, TELL]),
        ({"prompt": "[1, 2]", "completion": "A cat.", "label": True}, [{**ASK, "content": "[1, 2]"}, TELL]),
        ({"prompt": "What is it?", "chosen": json.dumps([ASK, TELL])}, [ASK, TELL]),
        ({"prompt": [ASK, {**TELL, "weight": 1}, ASK], "completion": "A cat."}, [ASK, TELL, ASK, TELL]),
        (
            {"prompt": HISTORY, "completion": [TELL], "system": "s"},
            [{"role": "system", "content": "s"}, *HISTORY, TELL],
        ),
        ({"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}, [ASK, TELL]),
        ({"prompt": HISTORY, "chosen": [TELL], "rejected": [ASK]}, [*HISTORY, TELL]),
        ({"prompt": "And that?", "chosen": [*HISTORY, TELL], "rejected": [ASK]}, [*HISTORY, TELL]),
        ({"prompt": HISTORY, "chosen": [*HISTORY, TELL]}, [*HISTORY, TELL]),
        ({"chosen": [*HISTORY, TELL]}, [*HISTORY, TELL]),
    ],
)
def test_rows_of_trl(
    row: dict[str, Any], messages: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The completion is learned and nothing of the prompt, so each row is one sample."""
    (record,) = read([{"id": "x", **row}], tmp_path)
    assert record.messages == read_one({"messages": messages}, tmp_path).messages
    assert record.id == "x"
    told = capsys.readouterr().err
    assert "rows are read from `" in told
    assert ("not read: `rejected`" in told) == ("rejected" in row)


def test_all_turns_of_a_completion_are_learned(tmp_path: Path) -> None:
    records = read([{"id": "x", "prompt": [ASK], "completion": [TELL, ASK, TELL]}], tmp_path)
    assert [record.id for record in records] == ["x/1", "x/2"]


def test_messages_come_before_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = read([{"prompt": "else", "chosen": "x", "messages": [ASK, TELL]}], tmp_path)
    assert record.messages == read_one({"messages": [ASK, TELL]}, tmp_path).messages
    assert "`messages` is read, and `prompt`, `chosen` are not (1 row)" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [{"prompt": "What is it?", "completion": "A cat."}, {"chosen": [ASK, TELL]}])
def test_parquet_of_trl(columns: dict[str, Any], tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([columns]), tmp_path / "rows.parquet")
    (record,) = read_records(DataSpec(path=str(tmp_path / "rows.parquet")))
    assert (record.answer, len(record.messages)) == ("A cat.", 2)


def test_messages_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = read_one({"messages": json.dumps([ASK, TELL])}, tmp_path)
    assert record.digest == read_one({"messages": [ASK, TELL]}, tmp_path).digest
    assert "`messages` is read as JSON text (1 row)" in capsys.readouterr().err


# --- pictures -------------------------------------------------------------------------------------------------------

SEEN = [{"type": "image"}, *text("\nWhat is it?")]


def test_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LLaVA's `image` and LLaMA-Factory's `images`: the text is kept but for the marker."""
    row = {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}, TELL]}
    for key, value in (("image", "a.png"), ("image", ["a.png"]), ("images", ["a.png"])):
        record = read_one({**row, key: value}, tmp_path)
        assert record.messages[0]["content"] == SEEN
        assert [image.read() for image in record.images] == [PNG]
        assert "markers `<image>` in the text are read as the places of pictures (1 row)" in capsys.readouterr().err
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    assert read_one({"image": "a.png", "conversations": turns}, tmp_path).digest == record.digest


def test_markers_in_several_turns(tmp_path: Path) -> None:
    turns = [
        ("user", "Is <image> like <image>?"),
        ("assistant", "No <image>."),
        ("user", " <image>"),
        ("assistant", "Yes."),
    ]
    row = {"messages": [{"role": r, "content": c} for r, c in turns], "images": ["a.png", "b.png", "a.png"]}
    record = read_one(row, tmp_path)
    assert record.messages[0]["content"] == [
        *text("Is "),
        {"type": "image"},
        *text(" like "),
        {"type": "image"},
        *text("?"),
    ]
    assert record.messages[1]["content"] == text("No <image>.")
    assert record.messages[2]["content"] == [*text(" "), {"type": "image"}]
    assert [image.read() for image in record.images] == [PNG, OTHER, PNG]


def test_image_without_a_marker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system = {"role": "system", "content": "Be short."}
    record = read_one({"image": "a.png", "messages": [system, ASK, TELL]}, tmp_path)
    assert record.messages[1]["content"] == [{"type": "image"}, *text("What is it?")]
    assert "is put before the first text of the user (1 row)" in capsys.readouterr().err


def test_letters_of_a_marker_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": "What does <image> mean?"}, TELL]} for i in range(3)
    ]
    assert read(rows, tmp_path)[0].messages[0]["content"] == text("What does <image> mean?")
    told = capsys.readouterr().err
    assert "the letters `<image>` stand in texts and stay text" in told
    assert told.count("(3 rows)") == 1


URI = f"data:image/png;base64,{AS_BASE64}"
OWN = {
    "url": {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
    "text": {"type": "image_url", "image_url": "a.png"},
    "path": {"type": "image", "image": "a.png"},
    "data": {"type": "image", "image": URI, "text": None, "index": None},
    "base64": {"type": "image", "base64": AS_BASE64},
    "struct": {"type": "image", "image": {"bytes": AS_BASE64, "path": "elsewhere.png"}},
    "file": {"type": "image", "url": "file://a.png"},
}


@pytest.mark.parametrize("name", OWN)
def test_parts_with_their_own_picture(name: str, tmp_path: Path) -> None:
    """Among parts whose picture the row holds: each keeps its place."""
    content = [{"type": "image", "index": 0}, OWN[name], {"type": "image", "index": 1}, *text("Which?")]
    record = read_one({"messages": [{"role": "user", "content": content}, TELL], "images": ["b.png"] * 2}, tmp_path)
    assert record.messages[0]["content"] == [{"type": "image"}] * 3 + text("Which?")
    assert [image.read() for image in record.images] == [OTHER, PNG, OTHER]
    write_rows([row_of(record)], tmp_path / "again.parquet")
    assert read_records(DataSpec(path=str(tmp_path / "again.parquet")))[0].digest == record.digest


@pytest.mark.parametrize("value", ["a.png", AS_BASE64, URI, {"bytes": AS_BASE64}, {"path": "a.png", "bytes": None}])
def test_forms_of_a_picture(value: Any, tmp_path: Path) -> None:
    record = read_one({"messages": [{"role": "user", "content": SEEN}, TELL], "images": [value]}, tmp_path)
    assert record.images[0].read() == PNG
    assert record.images[0].open().getpixel((0, 0)) == (7, 7, 7)


# --- refused by name ------------------------------------------------------------------------------------------------

SEE = {"role": "user", "content": SEEN}


def turn(**more: Any) -> dict[str, Any]:
    return {"messages": [ASK, {**TELL, **more}]}


def part(**values: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [values]}, TELL]}


BAD = {
    "unknown key": (turn(function_call={"name": "f"}), "message 1 has `function_call`, not read here (read are: role"),
    "weight of 2": (turn(weight=2), "message 1 has `weight` `2`, must be 0 or 1"),
    "half a weight": (turn(weight=0.5), "message 1 has `weight` `0.5`, must be 0 or 1"),
    "no weight": (turn(weight="1"), "message 1 has `weight` `1`, must be 0 or 1"),
    "train is a number": (turn(train=1), "message 1 has `train` `1`, must be true or false"),
    "weight against train": (turn(weight=1, train=False), "has `weight: 1` and `train: false`; keep one"),
    "user to be learned": ({"messages": [{**ASK, "weight": 1}, TELL]}, "message 0 is of role `user` and to be learned"),
    "nothing to learn": (turn(weight=0), "none of its assistant messages may be learned: they have `weight: 0`"),
    "goes on after": ({"messages": [ASK, {**TELL, "weight": 0}, ASK, TELL, ASK]}, "the last message is of role `user`"),
    "tool without content": ({"messages": [ASK, {"role": "tool"}, TELL]}, "message 1 has content of type NoneType"),
    "calls of a user": ({"messages": [{**ASK, "tool_calls": [CALL]}, TELL]}, "only the assistant calls tools"),
    "reasoning of a user": ({"messages": [{**ASK, "reasoning": "Hm."}, TELL]}, "only the assistant reasons"),
    "two reasonings": (turn(reasoning="a", thinking="b"), "`reasoning`, `thinking` with different texts"),
    "calls as a mapping": (turn(tool_calls=CALL), "`tool_calls` of message 1 must be a list of mappings"),
    "calls as bad text": (turn(tool_calls="[{]"), "`tool_calls` of message 1 is given as text and is not JSON"),
    "name is a number": (turn(name=3), "`name` of message 1 is a int, must be a text"),
    "only reasoning": (turn(content="", reasoning="a"), "the response is empty"),
    "tools as names": ({**turn(), "tools": ["look"]}, "`tools` must be a list of mappings"),
    "tools with NaN": ({**turn(), "tools": [{"a": float("nan")}]}, "`tools` holds nan, which is no JSON"),
    "arguments as a list": ({**turn(), "chat_template_kwargs": [1]}, "`chat_template_kwargs` is a list, must be a map"),
    "two of messages": ({**turn(), "conversations": [ASK, TELL]}, "has both `messages` and `conversations`"),
    "unknown from": ({"conversations": [{"from": "bing", "value": "x"}]}, "message 0 is `from` `bing`, which is"),
    "no call": ({"conversations": [{"from": "function_call", "value": "x"}]}, "is a `function_call` and is not JSON"),
    "both pairs": ({"conversations": [{"from": "gpt", "value": "x", "role": "user"}]}, "keep one pair"),
    "instruction": ({"instruction": "x", "output": "y"}, '"content": ...}] from `instruction` and `output`'),
    "completion alone": ({"completion": "y"}, "`messages` is missing or empty, only `completion`"),
    "chosen alone": ({"chosen": "y"}, "`chosen` begins with the assistant, and there is no `prompt`"),
    "two answers": ({"prompt": "x", "completion": "y", "chosen": "z"}, "has both `completion` and `chosen`"),
    "another prompt": (
        {"prompt": "else", "chosen": [ASK, TELL]},
        "`chosen` is a conversation that does not begin with",
    ),
    "other history": (
        {"prompt": HISTORY, "chosen": [ASK, TELL]},
        "`chosen` is a conversation that does not begin with",
    ),
    "bad answer": ({"prompt": "x", "completion": "y", "label": False}, "has `label: false`: its answer is a bad one"),
    "completion of a user": ({"prompt": "x", "completion": [ASK]}, "has no assistant message"),
    "video": ({**turn(), "video": "a.mp4"}, "video 0 `a.mp4` does not exist in"),
    "image and images": ({"messages": [SEE, TELL], "image": "a.png", "images": ["a.png"]}, "both `image` and `images`"),
    "too few markers": (
        {"messages": [{"role": "user", "content": "<image>"}, TELL], "images": ["a.png", "b.png"]},
        "has 1 markers `<image>` for 2 `images`",
    ),
    "images without a place": ({**turn(), "images": ["a.png"]}, 'has 0 parts {"type": "image"} for 1 `images`'),
    "own and another": (
        {**part(type="image_url", image_url="a.png"), "images": ["a.png"]},
        "for 1 `images`; one part for each; 1 parts (`image_url` and the like) hold their own",
    ),
    "out of order": ({**part(type="image", index=1), "images": ["a.png"]}, "image part 0 has `index` `1`"),
    "web address": (part(type="image_url", image_url="https://example.org/a.png"), "is a web address, and nothing is"),
    "part with options": (part(type="image", image="a.png", max_pixels=9), "a part with `max_pixels`, not read here"),
    "two pictures": (part(type="image", image="a.png", url="b.png"), "a part with `image`, `url`; keep one"),
    "part without": (part(type="image_url"), "a part of type `image_url` without an `image_url`"),
    "part of sound": (
        part(type="input_audio"),
        "unknown type `input_audio` (known: text, image, image_url, video",
    ),
    "broken data URI": (part(type="image", image="data:image/png,abc"), "is no data URI of base64"),
    "control characters": ({"messages": [{**ASK, "role": "\x1b[31mred"}, TELL]}, "unknown role `\\x1b[31mred`"),
    "deep": ({**turn(), "tools": json.loads("[" * 200 + "]" * 200)}, "`tools` is nested more than 64 levels deep"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tmp_path: Path) -> None:
    row, reason = BAD[name]
    assert reason in reason_of(row, tmp_path)


LONG = "x" * 100_000
LONG_ROWS = {
    "base64": {"messages": [SEE, TELL], "images": [AS_BASE64 * 500]},
    "no base64": {"messages": [SEE, TELL], "images": [{"bytes": LONG[:-1]}]},
    "path": {"messages": [SEE, TELL], "images": [LONG]},
    "address": {"messages": [SEE, TELL], "images": ["https://" + LONG]},
    "role": {"messages": [{**ASK, "role": LONG}, TELL]},
    "key": turn(**{LONG: 1}),
    "id": {**turn(), "id": [LONG]},
    "part": part(type=LONG),
    "part key": part(type="image", **{LONG: 1}),
    "from": {"conversations": [{"from": LONG, "value": "x"}]},
    "call": {"conversations": [{"from": "function_call", "value": json.dumps([LONG])}]},
    "columns": {f"{LONG[:1000]}{number}": 1 for number in range(100)},
    "sha256": {"messages": [SEE, TELL], "images": [{"bytes": AS_BASE64, "sha256": LONG}]},
    "weight": turn(weight=LONG),
    "index": {**part(type="image", index=LONG), "images": ["a.png"]},
}


@pytest.mark.parametrize("name", LONG_ROWS)
def test_long_values_are_not_printed(name: str, tmp_path: Path) -> None:
    line = reason_of(LONG_ROWS[name], tmp_path)
    assert len(line) < (4000 if name == "columns" else 600)
    assert "x" * 300 not in line


def test_other_columns_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read([{**turn(), "id": str(i), "score": i, "source\x1b": None} for i in range(3)], tmp_path)
    assert capsys.readouterr().err.count("rows.jsonl: not read: `score`, `source\\x1b`") == 1


def test_equal_rows_without_ids(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:3: is the same row as rows\.jsonl:1 and has no `id`; drop one"):
        read([turn(), {**turn(), "id": "b"}, turn()], tmp_path)
