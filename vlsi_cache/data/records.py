"""Chat rows as checked records. Every bad row is named with its reason; nothing is dropped in silence.

A row: `messages` [{role, content}], where content is a string or parts {"type": "text", "text": ...} and
{"type": "image"}; `images`, one per image part and in their order: a path, or {path | bytes, sha256}; optional `id`,
`system`, `kind`. The last message is the assistant's: its text is the response. Other columns are ignored.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from vlsi_cache.errors import DataError, list_problems
from vlsi_cache.progress import progress
from vlsi_cache.spec import DataSpec, change

from .media import Media, load_media
from .sources import as_parts, raw_rows, responses_of, write_rows

__all__ = ["Media", "Record", "RecordSet", "media_root", "read_records", "row_of", "with_answer", "write_rows"]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Record:
    """One checked row; content is always a list of parts, and `system` has become the first message.

    The last message is the assistant turn that is learned. Messages may also hold `reasoning_content`, `tool_calls`,
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

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """All messages before the response."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last assistant turn."""
        return text_of(self.messages[-1])


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
    records: list[Record] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)  # id, where, reason
    where_of: dict[str, str] = field(default_factory=dict)
    known: dict[Path | str, Media] = field(default_factory=dict)


def read_records(data: DataSpec, *, limit: int | None = None) -> RecordSet:
    """Read and check all rows, or the first `limit` and none beyond them; every image is decoded once.

    Raises DataError: no such source, no usable row, or (unless `bad_rows: list`) any bad row, all of them together.
    """
    if limit is not None:
        data = change(data, limit=limit if data.limit is None else min(limit, data.limit))
    source = data.path or f"generator {data.generator}"
    reading = _Reading(media_root(data))
    num_rows = 0
    for where, row in progress(raw_rows(data), "read rows", unit="row", delay=2):
        num_rows += 1
        _read_row(reading, where, row)
    if reading.problems and data.bad_rows == "refuse":
        raise DataError(_all_problems(source, reading, num_rows))
    if not reading.records:
        raise DataError(_all_problems(source, reading, num_rows) if num_rows else f"{source} holds no rows")
    skipped = [{"id": row_id, "reason": reason} for row_id, _, reason in reading.problems]
    return RecordSet(tuple(reading.records), skipped, responses_of(data))


def with_answer(record: Record, answer: str) -> Record:
    """The same row with another text of the last assistant turn."""
    messages = [*record.prompt_messages, {"role": "assistant", "content": as_parts(answer)}]
    return replace(record, messages=messages, digest=_digest(messages, record.images))


def row_of(record: Record, *, media_root: Path | None = None) -> dict[str, Any]:
    """The row for `write_rows` that reads back as this record.

    Images come as bytes, wherever the row will lie; with a `media_root`, those that were read from below it come as
    paths relative to it.
    """
    images = [_entry_of(image, media_root) for image in record.images]
    return {"id": record.id, "kind": record.kind, "messages": record.messages, "images": images}


def _entry_of(image: Media, root: Path | None) -> dict[str, Any]:
    if image.path is None or root is None:
        return {"bytes": image.read(), "sha256": image.sha256}
    return {"path": image.path.relative_to(root).as_posix(), "sha256": image.sha256}


def _read_row(reading: _Reading, where: str, row: Any) -> None:
    try:
        record = _to_record(row, root=reading.root, known=reading.known)
        first = reading.where_of.setdefault(record.id, where)
        if first != where:
            raise DataError(f"id `{record.id}` was used before, at {first}")
        reading.records.append(record)
    except DataError as error:
        row_id = row.get("id") if isinstance(row, Mapping) else None
        reading.problems.append((str(row_id or where), where, str(error)))


def _all_problems(source: str, reading: _Reading, num_rows: int) -> str:
    lines = [f"{where}: {reason}" for _, where, reason in reading.problems]
    advice = "mend them, or leave them out with data.bad_rows: list" if reading.records else "no row is left"
    return f"{source}: {len(lines)} of {num_rows} rows cannot be used; {advice}\n{list_problems(lines)}"


def media_root(data: DataSpec) -> Path | None:
    """The folder that image paths are relative to: `media_root`, else the folder of the file."""
    if data.media_root is not None:
        root = Path(data.media_root)
        if not root.is_dir():
            raise DataError(f"`data.media_root` is {root}: no such folder")
        return root.resolve()
    return Path(data.path).resolve().parent if data.path is not None else None


def _to_record(row: Any, *, root: Path | None, known: dict[Path | str, Media]) -> Record:
    """The record of a row; raises DataError with the first thing that is wrong."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"is a {type(row).__name__}, must be a mapping with `messages`")
    if row.get("videos"):
        raise DataError("has `videos`, which are not supported yet")
    messages = _messages(row)
    images = _images(row, _num_image_parts(messages), root=root, known=known)
    digest = _digest(messages, images)
    return Record(_row_id(row, digest), messages, images, digest, _kind(row))


def _row_id(row: Mapping[str, Any], digest: str) -> str:
    row_id = row.get("id")
    if row_id is None:
        return digest[:16]
    if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
        raise DataError(f"`id` is {row_id!r}, must be a text or a whole number")
    return _text(str(row_id), "`id`")


def _kind(row: Mapping[str, Any]) -> str:
    kind = row.get("kind")
    return "" if kind is None else _text(kind, "`kind`")


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = row.get("messages")
    if not isinstance(turns, list | tuple) or not turns:
        raise DataError("`messages` is missing or empty")
    messages = [_message(turn, number) for number, turn in enumerate(turns)]
    if row.get("system") is not None:
        if messages[0]["role"] == "system":
            raise DataError("has both `system` and a system message")
        messages.insert(0, {"role": "system", "content": as_parts(_text(row["system"], "`system`"))})
    _check_response(messages)
    return messages


def _check_response(messages: list[dict[str, Any]]) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError("has no assistant message, so no response")
    if roles[-1] != "assistant":
        raise DataError(f"the last message is of role `{roles[-1]}`, must be the assistant's")
    if len(roles) == 1:
        raise DataError("has no message before the response")
    if _num_image_parts(messages[-1:]):
        raise DataError("the response holds an image")
    if not text_of(messages[-1]).strip():
        raise DataError("the response is empty")


def _message(turn: Any, number: int) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is a {type(turn).__name__}, must be a mapping with `role` and `content`")
    if turn.get("role") not in ROLES:
        raise DataError(f"{where} has the unknown role `{turn.get('role')}` (known: {', '.join(ROLES)})")
    parts = as_parts(turn.get("content"))
    if not isinstance(parts, list | tuple):
        raise DataError(f"{where} has content of type {type(parts).__name__}, must be a text or a list of parts")
    return {"role": turn["role"], "content": [_part(part, where) for part in parts]}


def _part(part: Any, where: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"), f"a text part of {where}")}
    if kind == "image":
        return {"type": "image"}
    if kind == "video":
        raise DataError(f"{where} holds a video; videos are not supported yet")
    raise DataError(f"{where} has a part of the unknown type `{kind}` (known: text, image)")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is a {type(value).__name__}, must be a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half a surrogate pair at character {error.start}, which is no text") from None
    return value


def _num_image_parts(messages: list[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for part in _parts(messages))


def _parts(messages: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for message in messages:
        yield from message["content"]


def text_of(message: dict[str, Any]) -> str:
    """The text parts of one message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _images(
    row: Mapping[str, Any], num_parts: int, *, root: Path | None, known: dict[Path | str, Media]
) -> tuple[Media, ...]:
    entries = row.get("images")
    entries = [] if entries is None else entries
    if not isinstance(entries, list | tuple):
        raise DataError(f"`images` is a {type(entries).__name__}, must be a list")
    if len(entries) != num_parts:
        raise DataError(f'has {num_parts} parts {{"type": "image"}} for {len(entries)} `images`; one part for each')
    return tuple(_image(entry, number, root=root, known=known) for number, entry in enumerate(entries))


def _image(entry: Any, number: int, *, root: Path | None, known: dict[Path | str, Media]) -> Media:
    try:
        return load_media(entry, root=root, known=known)
    except DataError as error:
        raise DataError(f"image {number} {error}") from None


def _digest(messages: list[dict[str, Any]], images: Sequence[Media]) -> str:
    """Content digest: the same for every way to write the same row, whatever its id and kind."""
    content = {"messages": messages, "images": [image.sha256 for image in images]}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
