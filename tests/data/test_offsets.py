"""Bytes of tokens and the alignment of two tokenizers. The oracles are the text itself in UTF-8, the tokenizer's own
decoder, and a search over all pairs of tokens.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
from helpers.spellings import OTHER_TEMPLATE, WORDS, byte_fallback, byte_level, metaspace
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.offsets import UNKNOWN, Side, align, lengths_or_unknown, response_lengths, response_texts
from vlsi_cache.data.records import Record
from vlsi_cache.data.token_bytes import ADDED, token_bytes, vocabulary_map
from vlsi_cache.errors import DataError

MAKERS: dict[str, Any] = {
    "byte level": byte_level,
    "byte level, other words": lambda: byte_level(["blue sees small dogs", "\u6587 cat"], size=290),
    "byte level, one byte a token": lambda: byte_level([""], size=256, template=OTHER_TEMPLATE),
    "byte fallback": byte_fallback,
    "byte fallback, other turns": lambda: byte_fallback(
        ["two red cats", "and green"], size=40, template=OTHER_TEMPLATE
    ),
    "metaspace": metaspace,
}
PARTS = [*WORDS, " ", "  ", "\n", "\u00e9", "\U0001f600", "\U0001f468\u200d\U0001f469", "e\u0301", "<think>", "<|obj|>"]
ANSWERS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6
)


@cache
def encoder(name: str) -> Encoder:
    return Encoder(MAKERS[name](), None, [], name=name)


def record(answer: str) -> Record:
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "say it"), ("assistant", answer))
    ]
    return Record(id="row", kind="", messages=messages, images=(), digest="")  # type: ignore[arg-type]


def side(of: Encoder, answer: str) -> Side:
    row = record(answer)
    ids_R, table = of.measure(row)[1], of.token_bytes
    assert table is not None
    found = Side.of(ids_R, response_lengths(of, row, ids_R.tolist(), response_texts(of, [row])[0]), table)
    text = response_texts(of, [row])[0]
    assert found.starts[-1] == len(text)
    if "<|obj|>" in answer:  # takes white space with it, of which the ids say nothing but how much
        assert found.text.split() == text.split()
    else:
        assert found.text == text
    return found


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "metaspace"])
@settings(max_examples=20, deadline=None)
@given(answer=ANSWERS)
@example(answer="\u4e2d")
@example(answer="<|obj|>  x")
@example(answer="<think>red")
@example(answer="<think> ")
def test_lengths_of_the_tokens_add_up_to_the_text(name: str, answer: str) -> None:
    of = encoder(name)
    normal = side(of, answer)
    lengths_R = np.diff(normal.starts)
    assert lengths_R.sum() == len(normal.text)
    # What the tokenizer itself makes of as many tokens as end at the end of a character.
    said = of.tokenizer.decode(normal.ids_R, clean_up_tokenization_spaces=False)
    if "<|obj|>" not in answer and not ("<think>" in answer and "fallback" in name):
        assert said.encode().lstrip() == normal.text.lstrip()


@pytest.mark.parametrize("pair", [(a, b) for a in MAKERS for b in MAKERS if "metaspace" not in (a, b)], ids=str)
@settings(max_examples=4, deadline=None)
@given(answer=ANSWERS)
@example(answer="r")
@example(answer=" two dogs and\n")
def test_every_byte_is_in_one_chunk_and_chunks_are_as_small_as_can_be(pair: tuple[str, str], answer: str) -> None:
    teacher, student = (side(encoder(name), answer) for name in pair)
    found = align(teacher, student, answer)
    body = found.chunks_C4[:-1] if found.ends_turn else found.chunks_C4
    pieces = []
    for number, one in enumerate((teacher, student)):
        spans = [(int(one.starts[first]), int(one.starts[behind])) for first, behind in body[:, 2 * number :][:, :2]]
        # Side by side: no byte twice, and none between two chunks.
        assert [high for _, high in spans[:-1]] == [low for low, _ in spans[1:]]
        assert all(low < high for low, high in spans)
        pieces.append([one.text[low:high] for low, high in spans])
    whole = [b"".join(one) for one in pieces]
    core = answer.strip()
    assert whole[0].strip() == whole[1].strip()
    assert core.encode() in whole[0] or "<|obj|>" in core
    assert found.num_bytes == min(map(len, whole)) or "<|obj|>" in core
    if teacher.body == student.body:
        assert pieces[0] == pieces[1]
        assert whole[0] == teacher.body
        assert found.ends_turn
    else:  # white space around the answer belongs to the first and to the last of them
        assert pieces[0][1:-1] == pieces[1][1:-1]
    # No border inside a chunk is one of both: all pairs of tokens, one by one.
    for first_t, behind_t, first_s, behind_s in body.tolist() if teacher.body == student.body else body[1:-1].tolist():
        ends = [
            {int(one.starts[i] - one.starts[low]) for i in range(low + 1, high)}
            for one, low, high in ((teacher, first_t, behind_t), (student, first_s, behind_s))
        ]
        assert ends[0] & ends[1] <= {0}


@settings(max_examples=10, deadline=None)
@given(answer=ANSWERS)
def test_one_tokenizer_is_aligned_token_by_token(answer: str) -> None:
    one = side(encoder("byte level"), answer)
    chunks_C4 = align(one, one, answer).chunks_C4
    np.testing.assert_array_equal(chunks_C4, np.arange(len(one.ids_R))[:, None] + [[0, 1, 0, 1]])


def test_responses_of_one_token_and_of_none() -> None:
    teacher, student = (side(encoder(name), "red") for name in ("byte level", "byte fallback, other turns"))
    assert len(teacher.ids_R) == 2
    found = align(teacher, student, "red")
    assert found.chunks_C4[0, :2].tolist() == [0, 1]
    assert found.num_bytes == 3
    nothing = [side(encoder(name), "") for name in ("byte level", "byte fallback")]
    assert align(nothing[0], nothing[1], "").chunks_C4.tolist() == [
        [0, 1, len(nothing[1].ids_R) - 1, len(nothing[1].ids_R)]
    ]


def test_another_text_is_refused_with_the_first_byte_that_differs() -> None:
    lower = Encoder(byte_level(lower=True), None, [], name="lower")
    row = record("the Cat sees")
    (text,) = response_texts(lower, [row])
    ids = lower.measure(row)[1].tolist()
    with pytest.raises(
        DataError,
        match=r"row `row`, tokenizer of `lower`.*at byte 4 .*the Cat.* has byte 0x43, token \d+ has byte 0x63",
    ):
        response_lengths(lower, row, ids, text)
    # A build goes on: whoever needs the offsets of this row is told.
    rows = [row, record("the cat")]
    found = lengths_or_unknown(lower, rows, [lower.measure(one)[1] for one in rows])
    assert found is not None
    assert set(found[0].tolist()) == {UNKNOWN}
    assert found[1].sum() == len("the cat<|im_end|>")
    one, other = side(encoder("byte level"), "the cat"), side(encoder("byte fallback"), "the dog")
    with pytest.raises(DataError, match=r"do not say the same: from byte 4 on .*the cat.*the dog"):
        align(one, other, "the cat")
    unknown = encoder("metaspace")
    row = record("q\u00fc")
    with pytest.raises(DataError, match="its tokens are not its text: at byte 0"):
        response_lengths(unknown, row, unknown.measure(row)[1].tolist(), response_texts(unknown, [row])[0])


def test_pieces_are_what_the_tokenizer_s_decoder_says_of_whole_characters() -> None:
    for name in MAKERS:
        of = encoder(name)
        table = of.token_bytes
        assert table is not None
        for index, text in enumerate(of.token_texts(range(of.vocab_size))):
            if "\ufffd" not in text and table.kinds_V[index] != 3:
                assert table.pieces[index].decode().removeprefix(" ") == text.removeprefix(" ")
    letters = Encoder(byte_level(), None, [], name="letters").token_bytes
    assert letters is not None
    assert {piece for piece in letters.pieces if len(piece) == 1} == {bytes([byte]) for byte in range(256)}


@pytest.mark.parametrize("pair", [(a, b) for a in MAKERS for b in MAKERS], ids=str)
def test_mapped_tokens_have_the_same_bytes_and_none_is_mapped_to_twice(pair: tuple[str, str]) -> None:
    teacher, student = (encoder(name) for name in pair)
    one, other = teacher.token_bytes, student.token_bytes
    assert one is not None
    assert other is not None
    map_V = vocabulary_map(one, other, (teacher.eot_id, student.eot_id))
    mapped = np.flatnonzero(map_V >= 0)
    assert len(set(map_V[mapped].tolist())) == len(mapped)
    for index in mapped.tolist():
        if index != teacher.eot_id:
            assert one.pieces[index] == other.pieces[map_V[index]]
            assert (one.kinds_V[index] == ADDED) == (other.kinds_V[map_V[index]] == ADDED)
    assert map_V[teacher.eot_id] == student.eot_id
    if pair[0] == pair[1]:
        known = np.array([key is not None for key in one.keys])
        np.testing.assert_array_equal(map_V, np.where(known, np.arange(len(one)), -1))


def test_a_vocabulary_without_bytes_has_none() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=core), 2) is None
