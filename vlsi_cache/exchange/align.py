"""Which sample of the data is in which sequence of another tool, and where its rows begin there.

By tokens where the tool keeps them: a sequence holds a sample whose prompt and response, but for the last token, it
begins with. That token has a row like the others, and some tools leave it out. By the id of the row where it does not.
Shape suffixes: N samples, S tokens of a sequence.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlsi_cache.data.encoder import READ_TOGETHER, Encoder
from vlsi_cache.data.messages import text_of
from vlsi_cache.data.records import Record, RecordSet
from vlsi_cache.data.stored import names_of
from vlsi_cache.errors import DataError
from vlsi_cache.progress import progress

from . import sources
from .tables import name_of

Tokens = tuple[np.ndarray, int]  # all of a sample, int64 [S], and how many are its prompt
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: its powers have a period beyond any sequence


class Unplaced(NamedTuple):
    """A sample that cannot be used, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Placed:
    """A sample in a sequence: all its tokens, int64 [P + R], and the row that is about its first response token."""

    id: str
    kind: str
    digest: str
    token_ids: np.ndarray
    num_prompt: int
    first_row: int

    @property
    def response_ids(self) -> np.ndarray:
        return self.token_ids[self.num_prompt :]


@dataclass(frozen=True)
class Found:
    """The samples of every sequence that has some, by its number; and those that are in none: {id, reason}."""

    of_sequence: dict[int, list[int]]
    left_out: list[dict[str, str]]
    num_sequences: int
    width: int
    least: int


def prefix_hashes(token_ids: np.ndarray) -> np.ndarray:
    """uint64 [S]: one for each beginning of the sequence, the same for the same tokens."""
    with np.errstate(over="ignore"):
        powers_S = np.cumprod(np.full(len(token_ids), FACTOR, np.uint64))
        return np.cumsum(powers_S * (token_ids.astype(np.uint64) + np.uint64(1)), dtype=np.uint64)


def find_samples(source: sources.Source, records: RecordSet, encoder: Encoder) -> Found:
    """Look through all sequences; raises DataError where no sample, all of which can be encoded, is in any of them."""
    names = list(names_of(records.records))
    by_row: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        by_row[name.row].append(index)
    by_hash: dict[int, list[int]] | None = None
    of_sequence: dict[int, list[int]] = {}
    taken: set[int] = set()
    number, width, least, num_with_tokens = -1, 1, 1 << 31, 0
    for number, sequence in enumerate(progress(source.sequences(), "look for samples", unit="sequence", delay=2)):
        if sequence.token_ids is None:
            found = by_row.get(sequence.key or "", [])
        else:
            num_with_tokens += 1
            by_hash = _hashes_of(records, encoder) if by_hash is None else by_hash
            hashes = prefix_hashes(sequence.token_ids).tolist()
            found = [index for one in hashes for index in by_hash.get(one, ())]
        if found := [index for index in dict.fromkeys(found) if index not in taken]:
            taken.update(found)
            of_sequence[number] = found
            width, least = max(width, sequence.width), min(least, sequence.least)
    if number < 0:
        raise DataError(f"{name_of(source.files)} holds no rows")
    left_out = [
        {"id": name.id, "reason": f"no sequence of {name_of(source.files)} holds it"}
        for index, name in enumerate(names)
        if index not in taken
    ]
    if not of_sequence:
        advice = "name the data that the teacher was given, and its tokenizer"
        if not num_with_tokens:
            advice = "they do not say their tokens, and none has the id of a row; vLLM says both when it is asked with "
            advice += "`return_token_ids`, or for a batch with the row's id as `custom_id`"
        raise DataError(
            f"none of the {len(names)} samples of the data is among the {number + 1} sequences of "
            f"{name_of(source.files)}: {advice}"
        )
    return Found(of_sequence, left_out, number + 1, width, least)


def _hashes_of(records: RecordSet, encoder: Encoder) -> dict[int, list[int]]:
    """The samples by the hash of their tokens without the last."""
    found: dict[int, list[int]] = defaultdict(list)
    for start in progress(range(0, len(records), READ_TOGETHER), "tokens", unit="batch", delay=2):
        for index, (token_ids, _) in enumerate(encoder.token_ids(records[start : start + READ_TOGETHER]), start=start):
            found[int(prefix_hashes(token_ids[:-1])[-1])].append(index)
    return found


def place(
    sequence: sources.Sequence, records: Sequence[Record], encoded: Sequence[Tokens], encoder: Encoder
) -> Iterator[Placed | Unplaced]:
    """Where the samples of a sequence lie in it, or why one cannot be used; `encoded` are their tokens."""
    first = sequence.first
    if first is None:
        whole = np.asarray(conversation_ids(encoder, records[-1]), np.int64)
        first = len(whole) - sequence.num_rows
    else:
        whole = encoded[-1][0] if sequence.token_ids is None else sequence.token_ids
    for record, (token_ids, num_prompt) in zip(records, encoded, strict=True):
        row = num_prompt - first
        num_common = min(len(whole), len(token_ids))
        if not np.array_equal(whole[:num_common], token_ids[:num_common]) or num_common < len(token_ids) - 1:
            yield Unplaced(record.id, "its tokens are not what the chat template makes of the whole conversation")
        elif row < 0 or row + len(token_ids) - num_prompt > sequence.num_rows:
            rows = f"rows for tokens {first} to {first + sequence.num_rows - 1}"
            response = f"the response is tokens {num_prompt} to {len(token_ids) - 1}"
            yield Unplaced(record.id, f"{sequence.where} has {rows}, and {response}")
        else:
            yield Placed(record.id, record.kind, record.digest, token_ids, num_prompt, row)


def conversation_ids(encoder: Encoder, record: Record) -> list[int]:
    """What `tokenizer.apply_chat_template` makes of a text conversation, by which other tools count their rows."""
    messages = [{**message, "content": text_of(message)} for message in record.messages]
    options: dict[str, Any] = {"tools": record.tools, **encoder.chat.args, **record.template_args}
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
