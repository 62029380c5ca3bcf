"""Every response of a row is learned, with the prompt that the chat template gives it at inference."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

import vlsi_cache as vc
from tests.helpers.tiny import save_tokenizer, write_jsonl
from vlsi_cache.config.sections import DataSpec
from vlsi_cache.config.spec import stored_data
from vlsi_cache.data.encoder import Encoder, Measured, load_encoder
from vlsi_cache.data.records import Record, read_records
from vlsi_cache.data.sequence import PADDED, Encoded, sequences
from vlsi_cache.errors import DataError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    folder = tmp_path_factory.mktemp("images")
    for colour in ("red", "blue"):
        Image.new("RGB", (16, 16), colour).save(folder / f"{colour}.png")
    return (folder / "red.png").read_bytes(), (folder / "blue.png").read_bytes()


def turns(*said: str, **last: Any) -> list[dict[str, Any]]:
    """Messages of user and assistant in turns; `last` goes into the last one."""
    messages: list[dict[str, Any]] = [
        {"role": "assistant" if number % 2 else "user", "content": words} for number, words in enumerate(said)
    ]
    return [*messages[:-1], {**messages[-1], **last}]


def read(folder: Path, *rows: dict[str, Any], **options: Any) -> list[Record]:
    write_jsonl(folder / "rows.jsonl", list(rows))
    return list(read_records(DataSpec(path=str(folder / "rows.jsonl"), **options)))


def test_each_response_is_the_row_cut_behind_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["a?", "a.", "b?", "b.", "c?", "c."]
    records = read(tmp_path, {"id": "x", "kind": "k", "system": "s", "messages": turns(*said)})
    assert [(one.id, one.row, one.kind, one.answer) for one in records] == [
        ("x/1", "x", "k", "a."),
        ("x/2", "x", "k", "b."),
        ("x/3", "x", "k", "c."),
    ]
    for number, record in enumerate(records, start=1):
        (cut,) = read(tmp_path, {"id": "x", "system": "s", "messages": turns(*said[: 2 * number])}, turns="last")
        assert (record.messages, record.digest) == (cut.messages, cut.digest)
    assert "each of the assistant's turns is a sample, `ID/1`, `ID/2`, ... (1 row)" in capsys.readouterr().err


def test_a_row_of_one_response_keeps_its_id(tmp_path: Path) -> None:
    messages = turns("a?", "a.", "b?", "b.")
    messages[1]["train"] = False
    plain = {"id": "one", "messages": turns("a?", "a.")}
    records = read(tmp_path, plain, {"id": "two", "messages": messages}, {"messages": turns("c?", "c.", "d?", "d.")})
    assert [one.id for one in records[:2]] == ["one", "two"]
    # Without an id the name is the digest of the whole row.
    assert [one.id for one in records[2:]] == [f"{records[3].digest[:16]}/1", f"{records[3].digest[:16]}/2"]
    assert [one.id for one in read(tmp_path, plain, turns="last")] == ["one"]


def test_the_last_turn_alone_is_as_before(tmp_path: Path) -> None:
    row = {"id": "x", "messages": turns("a?", "a.", "b?", "b.")}
    every, last = read(tmp_path, row), read(tmp_path, row, turns="last")
    assert [one.id for one in last] == ["x"]
    assert (last[0].messages, last[0].digest) == (every[1].messages, every[1].digest)
    # Caches of an earlier release do not say `turns`, and hold last turns.
    old = {"turns": "last", "keep_together": "row"}
    assert stored_data({"path": "rows.jsonl"}) == {"path": "rows.jsonl", **old}
    new = {"path": "rows.jsonl", "turns": "all", "keep_together": "prompt"}
    assert stored_data(new) == new


def test_turns_that_are_not_learned(tmp_path: Path) -> None:
    messages = turns("a?", "a.", "b?", "b.", "c?", "c.", weight=0)
    records = read(tmp_path, {"id": "x", "messages": messages})
    assert [(one.id, one.answer) for one in records] == [("x/1", "a."), ("x/2", "b.")]


def test_pictures_are_those_seen_so_far(tmp_path: Path, images: tuple[bytes, bytes]) -> None:
    for name, data in zip("ab", images, strict=True):
        (tmp_path / f"{name}.png").write_bytes(data)
    messages = turns("<image>a?", "a.", "<image>b?", "b.")
    first, second = read(tmp_path, {"id": "x", "images": ["a.png", "b.png"], "messages": messages})
    assert [one.read() for one in first.images] == [images[0]]
    assert [one.read() for one in second.images] == list(images)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (turns("a?", "", "b?", "b."), "response 1 of 2 is empty; mend it, give it `train: false`, or"),
        (turns("a?", "a.", "b?", " "), "response 2 of 2 is empty; mend it"),
        (turns("x", "a.", "b?", "b.")[1:], "has no message before response 1 of 2; mend it, give it `train: false`"),
        (turns("a?", "a.", "b?", [{"type": "image"}]), "response 2 of 2 holds an image"),  # type: ignore[arg-type]
        (turns("a?", "a.", "b?"), "the last message is of role `user`"),
    ],
)
def test_a_response_that_cannot_be_learned_is_named(
    tmp_path: Path, messages: list[dict[str, Any]], message: str, images: tuple[bytes, bytes]
) -> None:
    (tmp_path / "a.png").write_bytes(images[0])
    row = {"id": "x", "messages": messages}
    if "image" in message:
        row["images"] = ["a.png"]
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)


def test_a_name_that_a_turn_would_get_is_taken(tmp_path: Path) -> None:
    row = {"id": "x", "messages": turns("a?", "a.", "b?", "b.")}
    with pytest.raises(DataError, match=r"id `x/2` was used before, at rows.jsonl:1"):
        read(tmp_path, row, {"id": "x/2", "messages": turns("c?", "c.")})
    with pytest.raises(DataError, match=r"id `x` was used before, at rows.jsonl:1"):
        read(tmp_path, row, {"id": "x", "messages": turns("c?", "c.")})


def encoded(encoder: Encoder, records: list[Record]) -> list[Encoded]:
    """The sequences of records, checked against each record alone and against what is measured."""
    found = encoder.encode_all(records)
    alone = [encoder.encode(record) for record in records]
    spans = [(one.input_ids[: span.first + len(span.response_ids)], span) for one in found for span in one.spans]
    for (ids, span), single in zip(spans, alone, strict=True):
        np.testing.assert_array_equal(ids, single.input_ids)
        np.testing.assert_array_equal(span.response_ids, single.response_ids)
        assert span.first == span.last_prompt + 1 == single.num_prompt
    measured = [one for one in encoder.measure_all(records) if isinstance(one, Measured)]
    assert len(sequences([one.extent for one in measured], range(len(records)), PADDED)) == len(found)
    return found


@pytest.fixture
def three(tmp_path: Path) -> list[Record]:
    return read(tmp_path, {"id": "x", "messages": turns("a?", "one", "b?", "two", "c?", "three")})


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


def encoder_of(folder: Path, template: str | None = None, **options: Any) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template or tokenizer.chat_template
    return Encoder(tokenizer, None, (), name="m", **options)


def test_turns_that_begin_with_one_another_are_one_sequence(three: list[Record], tokenizer_folder: Path) -> None:
    encoder = encoder_of(tokenizer_folder)
    (one,) = encoded(encoder, three)
    assert len(one.spans) == 3
    # Neighbours of another row, and turns in another order, stay by themselves.
    other = [replace(record, row="y", id=record.id.replace("x", "y")) for record in three]
    assert len(encoded(encoder, [*three, *other])) == 2
    assert len(encoder.encode_all([three[2], three[0], three[1]])) == 2
    assert len(encoder.encode_all([three[0], three[2]])) == 1


def test_a_template_that_changes_earlier_turns_gives_each_its_own_sequence(
    three: list[Record], tokenizer_folder: Path
) -> None:
    plain = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    counts = "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} questions\n"
    strips = plain.replace(
        "{{ m['content'] }}", "{{ m['content'] ~ (' (old)' if m['role'] == 'assistant' and not loop.last else '') }}"
    )
    for template in (counts + plain, strips):
        assert [len(one.spans) for one in encoded(encoder_of(tokenizer_folder, template), three)] == [1, 1, 1]


def test_turns_behind_the_limit_of_a_rope_run_apart(three: list[Record], tokenizer_folder: Path) -> None:
    lengths = [len(encoder_of(tokenizer_folder).encode(record).input_ids) for record in three]
    for limit, wanted in ((lengths[2], 1), (lengths[1], 2), (lengths[0], 3), (1, 3)):
        assert len(encoded(encoder_of(tokenizer_folder, rope_limit=limit), three)) == wanted


def test_rows_of_one_id_with_other_pictures_do_not_go_on_from_each_other(tmp_path: Path) -> None:
    """As in a cache merged from two sources: the first sample would be shown the picture of the second."""
    pictures = []
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (56, 56), colour).save(tmp_path / f"{number}.png")
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which?"}]},
            {"role": "assistant", "content": "this"},
            {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": "yes"},
        ]
        write_jsonl(tmp_path / f"{number}.jsonl", [{"id": "r", "messages": turns, "images": [f"{number}.png"]}])
        pictures.append(read_records(DataSpec(path=str(tmp_path / f"{number}.jsonl"))))
    encoder = load_encoder(Path(vc.__file__).parent / "demo" / "teacher")
    assert len(encoder.encode_all([pictures[0][0], pictures[0][1]])) == 1
    assert len(encoder.encode_all([pictures[0][0], pictures[1][1]])) == 2
