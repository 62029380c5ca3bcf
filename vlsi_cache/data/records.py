"""Chat rows as checked records. Every bad row is named with its reason; nothing is dropped in silence.

A row: `messages` [{role, content}], where content is a string or parts {"type": "text", "text": ...} and
{"type": "image"}; `images`, one per image part and in their order: a path, or {path | bytes, sha256}; optional `id`,
`system`, `kind`, and what a chat template is given: `tools`, `chat_template_kwargs`, and in messages
`reasoning_content`, `tool_calls`, `name`, `tool_call_id`. Each message of the assistant is a response that is learned
(with `data.turns: last` the last one alone), but for those of `weight: 0` or `train: false`: a row of n responses
becomes n records, `ID/1` to `ID/n`, each of the messages up to its response. What other tools write is read too, see
`sources`, `messages` and `images`; how rows were read, and the names of columns that are not, are told once.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, overload

from vlsi_cache.config.sections import DataSpec, Together, Turns
from vlsi_cache.config.spec import change
from vlsi_cache.errors import DataError, list_problems
from vlsi_cache.progress import progress, say

from .images import Media, Shelf, bytes_of, load_media, place_pictures
from .messages import (
    COLUMNS,
    UNSUPPORTED,
    Message,
    as_parts,
    check_messages,
    image_parts,
    learned_turns,
    text_of,
    turns_of,
)
from .sources import READ_ERRORS, RawRow, media_root, raw_rows, responses_of
from .values import given_json, is_empty, listed, printable, shown, text_value
from .writing import write_rows

__all__ = [
    "Media",
    "Record",
    "RecordSet",
    "media_root",
    "read_records",
    "row_of",
    "text_of",
    "with_answer",
    "write_rows",
]

_MAX_ID_BITS = 256  # of an id that is a number


@dataclass(frozen=True)
class Record:
    """One response that is learned, and what comes before it; content is always a list of parts.

    The last message is that response; `system` has become the first one. `row` is the id of the row: `id` itself, where
    the row has one response. Messages may also hold `reasoning_content`, `tool_calls`,
    `name` and `tool_call_id`, as the chat template is given them; `tools` and `template_args` (the row's
    `chat_template_kwargs`) are what else it is given.
    """

    id: str
    messages: list[dict[str, Any]]
    images: tuple[Media, ...]
    digest: str
    kind: str = ""
    tools: list[dict[str, Any]] | None = None
    template_args: dict[str, Any] = field(default_factory=dict)
    row: str = ""

    @cached_property
    def opening(self) -> str:
        """A digest of the pictures, or of all that is said before the response where there are none: samples of one
        opening begin alike."""
        if self.images:
            return hashlib.sha256("".join(image.sha256 for image in self.images).encode()).hexdigest()
        return _digest(self.prompt_messages, (), self.tools, self.template_args)

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """All messages before the response."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the response."""
        return text_of(self.messages[-1])


MOST_ALIKE = 16  # samples of different rows that stay together


def alike(record: Record, later: Record) -> bool:
    """Whether two neighbours stay together, since they begin alike: they are turns of one row, responses to one prompt,
    or questions on the same pictures."""
    return (record.row != "" and record.row == later.row) or record.opening == later.opening


def units(records: Iterable[Record], keep_together: Together) -> list[range]:
    """Places of neighbours that stay together, a range for each run of them: turns of one row, and with
    `data.keep_together: prompt` at most MOST_ALIKE that are `alike`."""
    with_openings = keep_together == "prompt"
    begins = ((record.row, record.opening if with_openings else "") for record in records)
    return units_of(begins)


def units_of(begins: Iterable[tuple[str, Any]]) -> list[range]:
    """`units` of samples of which each is known by its row and its opening; "": it has none."""
    found: list[range] = []
    row_before, opening_before = "", ""
    for place, (row, opening) in enumerate(begins):
        is_alike = opening == opening_before != "" and place > 0 and len(found[-1]) < MOST_ALIKE
        if is_alike or row == row_before != "":
            found[-1] = range(found[-1].start, place + 1)
        else:
            found.append(range(place, place + 1))
        row_before, opening_before = row, opening
    return found


@dataclass(frozen=True)
class RecordSet(Sequence[Record]):
    """Records in the order of their source, and the rows left out: {id, reason}.

    `provenance` is what `vlsi-cache generate` says about the responses it wrote; None when it did not write them.
    """

    records: tuple[Record, ...]
    skipped: list[dict[str, str]]
    provenance: dict[str, Any] | None = None

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...
    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def digest(self) -> str:
        """sha256 over the ids and content digests in order: two sets with one digest hold the same rows."""
        lines = "".join(f"{json.dumps(record.id)} {record.digest}\n" for record in self.records)
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass
class _Reading:
    """What reading one source has met so far."""

    root: Path | None
    turns: Turns
    records: list[Record] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)  # id, where, reason
    first_of: dict[str, tuple[str, bool]] = field(default_factory=dict)  # of an id: where, and whether it was given
    known: dict[Path | str, Media] = field(default_factory=dict)
    shelf: Shelf = field(default_factory=Shelf)
    notes: Counter[str] = field(default_factory=Counter)  # how rows were read, and how many
    unread: set[str] = field(default_factory=set)  # names of columns


def read_records(data: DataSpec, *, limit: int | None = None) -> RecordSet:
    """Read and check all rows, or the first `limit` and none beyond them; every image is decoded once.

    Raises DataError: no such source, no usable row, or (unless `bad_rows: list`) any bad row, all of them together.
    """
    if limit is not None:
        data = change(data, limit=limit if data.limit is None else min(limit, data.limit))
    source = data.path or f"generator {data.generator}"
    reading = _Reading(media_root(data), data.turns)
    num_rows = 0
    for raw in progress(raw_rows(data, reading.unread), "read rows", unit="row", delay=2):
        num_rows += 1
        _read_row(reading, raw)
    _tell(source, reading)
    if reading.problems and data.bad_rows == "refuse":
        raise DataError(_all_problems(source, reading, num_rows))
    if not reading.records:
        raise DataError(_all_problems(source, reading, num_rows) if num_rows else f"{source} holds no rows")
    skipped = [{"id": row_id, "reason": reason} for row_id, _, reason in reading.problems]
    return RecordSet(tuple(reading.records), skipped, responses_of(data))


def with_answer(record: Record, answer: str) -> Record:
    """The same sample with another text as its response, which then is all of it: no reasoning and no call."""
    messages = [*record.prompt_messages, {"role": "assistant", "content": as_parts(answer)}]
    return replace(
        record, messages=messages, digest=_digest(messages, record.images, record.tools, record.template_args)
    )


def row_of(record: Record, *, media_root: Path | None = None) -> dict[str, Any]:
    """The row for `write_rows` that reads back as this record.

    Images come as bytes, wherever the row will lie; with a `media_root`, those that were read from below it come as
    paths relative to it.
    """
    images = []
    for image in record.images:
        if image.path is None or media_root is None:
            held: dict[str, Any] = {"bytes": image.read()}
        else:
            held = {"path": image.path.relative_to(media_root).as_posix()}
        images.append({**held, "sha256": image.sha256})
    # Only the last message is this record's response: what the assistant has said before is history.
    history = [{**one, "train": False} if one["role"] == "assistant" else one for one in record.prompt_messages]
    row = {"id": record.id, "kind": record.kind, "messages": [*history, record.messages[-1]], "images": images}
    row |= {"tools": record.tools} if record.tools else {}
    return row | ({"chat_template_kwargs": record.template_args} if record.template_args else {})


def _read_row(reading: _Reading, raw: RawRow) -> None:
    row, notes = raw.row, set[str]()
    try:
        records = _to_records(raw, reading, notes)
        for name in dict.fromkeys([records[0].row, *(record.id for record in records)]):
            _check_id(reading, raw.where, name, is_given=row.get("id") is not None)
        reading.records += records
    except DataError as error:
        row_id = row.get("id") if isinstance(row, Mapping) else None
        name = row_id if isinstance(row_id, str) and row_id else raw.where if row_id is None else shown(row_id)
        reading.problems.append((name, raw.where, printable(str(error))))
    reading.notes.update(notes)
    if isinstance(row, Mapping):
        reading.unread |= {str(key) for key in row if key not in COLUMNS and key not in UNSUPPORTED}


def _check_id(reading: _Reading, where: str, name: str, *, is_given: bool) -> None:
    first, was_given = reading.first_of.setdefault(name, (where, is_given))
    if first == where:
        return
    if is_given or was_given:
        raise DataError(f"id `{shown(name)}` was used before, at {first}")
    raise DataError(f"is the same row as {first} and has no `id`; drop one of them, or give each an `id`")


def _tell(source: str, reading: _Reading) -> None:
    """Say once how the rows were read, where that is not plain."""
    for note, count in sorted(reading.notes.items()):
        say(f"{printable(source)}: {note} ({count} {'row' if count == 1 else 'rows'})")
    if reading.unread:
        say(f"{printable(source)}: not read: {listed(sorted(reading.unread))}")


def _all_problems(source: str, reading: _Reading, num_rows: int) -> str:
    lines = [f"{printable(where)}: {reason}" for _, where, reason in reading.problems]
    advice = "mend them, or leave them out with data.bad_rows: list" if reading.records else "no row is left"
    return f"{source}: {len(lines)} of {num_rows} rows cannot be used; {advice}\n{list_problems(lines)}"


def _to_records(raw: RawRow, reading: _Reading, notes: set[str]) -> list[Record]:
    """The records of a row, one for each response; raises DataError with the first thing that is wrong."""
    row = raw.row
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"is a {type(row).__name__}, must be a mapping with `messages`")
    messages, pictures, ends = _content(row, reading.turns, notes)
    images = tuple(_image(raw, entry, number, reading) for number, entry in enumerate(pictures))
    tools, template_args = _for_template(row, "tools"), _for_template(row, "chat_template_kwargs") or {}
    row_id = _row_id(row, _digest(messages, images, tools, template_args))
    kind = "" if row.get("kind") is None else text_value(row["kind"], "`kind`")
    if len(ends) > 1:
        notes.add("each of the assistant's turns is a sample, `ID/1`, `ID/2`, ...")
    records = []
    for number, end in enumerate(ends, start=1):
        name = f"{row_id}/{number}" if len(ends) > 1 else row_id
        said = messages[: end + 1]
        seen = images[: sum(1 for _ in image_parts(said))]
        digest = _digest(said, seen, tools, template_args)
        records.append(Record(name, said, seen, digest, kind, tools, template_args, row_id))
    return records


def _content(row: Mapping[str, Any], turns: Turns, notes: set[str]) -> tuple[list[Message], list[Any], list[int]]:
    """The messages up to the last response, the pictures in them, one for each image part, and where responses are."""
    for key in UNSUPPORTED:
        if not is_empty(row.get(key)):
            raise DataError(f"has `{key}`, which {'are' if key.endswith('s') else 'is'} not supported yet")
    messages, may_learn = check_messages(turns_of(row, notes.add), notes.add)
    if row.get("system") is not None:
        if messages[0]["role"] == "system":
            raise DataError("has both `system` and a system message")
        messages.insert(0, {"role": "system", "content": as_parts(text_value(row["system"], "`system`"))})
        may_learn.insert(0, False)
    pictures = place_pictures(messages, row, notes.add)
    learned = learned_turns(messages, may_learn, turns, notes.add)
    messages = messages[: learned[-1] + 1]
    return messages, pictures[: sum(1 for _ in image_parts(messages))], learned


def _image(raw: RawRow, entry: Any, number: int, reading: _Reading) -> Media:
    again = None if raw.again is None else partial(_read_again, raw.again, raw.where, number, reading.turns)
    try:
        return load_media(entry, root=reading.root, known=reading.known, again=again, shelf=reading.shelf)
    except DataError as error:
        raise DataError(f"image {number} {error}") from None


def _read_again(row_again: Callable[[], Any], where: str, number: int, turns: Turns) -> bytes:
    """The bytes of picture `number` of the row at `where`, out of the file that it was read from."""
    try:
        return bytes_of(_content(row_again(), turns, set())[1][number])
    except (*READ_ERRORS, DataError, LookupError, AttributeError, TypeError) as error:  # it is another file now
        raise DataError(f"image {number} of {where} cannot be read again: {shown(str(error))}; start again") from None


def _row_id(row: Mapping[str, Any], digest: str) -> str:
    row_id = row.get("id")
    if row_id is None:
        return digest[:16]
    if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
        raise DataError(f"`id` is {shown(row_id) or repr(row_id)}, must be a text or a whole number")
    if isinstance(row_id, int) and row_id.bit_length() > _MAX_ID_BITS:
        raise DataError(f"`id` is a whole number of more than {_MAX_ID_BITS} bits; write it as text")
    return text_value(str(row_id), "`id`")


def _for_template(row: Mapping[str, Any], key: str) -> Any:
    """What `tools` or `chat_template_kwargs` of a row hold, also as JSON text; None for nothing."""
    found = None if is_empty(row.get(key)) else given_json(row[key], f"`{key}`")
    if is_empty(found):
        return None
    if key == "tools" and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise DataError("`tools` must be a list of mappings, one for each tool")
    if key != "tools" and not isinstance(found, dict):
        raise DataError(f"`{key}` is a {type(found).__name__}, must be a mapping of names and values")
    return found


def _digest(
    messages: list[Message],
    images: Sequence[Media],
    tools: list[dict[str, Any]] | None,
    template_args: dict[str, Any],
) -> str:
    """Content digest: the same for every way to write the same row, whatever its id and kind."""
    content: dict[str, Any] = {"messages": messages, "images": [image.sha256 for image in images]}
    # Rows without these keep the digest that they had before there were any.
    content |= {"tools": tools} if tools else {}
    content |= {"template_args": template_args} if template_args else {}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
