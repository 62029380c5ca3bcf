"""Chat rows as checked records. Every bad row is named with its reason; nothing is dropped in silence.

`rows` says what a row is, `reading` how rows are read once and found again; how they were read, and the names of
columns that are not, are told each time.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from vlsi_cache.config.sections import DataSpec, Together
from vlsi_cache.config.spec import change
from vlsi_cache.errors import DataError, list_problems
from vlsi_cache.progress import say

from .images import Media
from .messages import as_parts, text_of
from .reading import Rows, read_source
from .rows import Record, as_json, content_text, digest_of
from .sources import media_root, open_source
from .stored import Chosen, names_of, neighbours
from .values import listed, printable
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


MOST_ALIKE = 16  # samples of different rows that stay together


def alike(record: Record, later: Record) -> bool:
    """Whether two neighbours stay together, since they begin alike: they are turns of one row, responses to one prompt,
    or questions on the same pictures."""
    return (record.row != "" and record.row == later.row) or record.opening == later.opening


def units(records: Sequence[Record], keep_together: Together) -> list[range]:
    """Places of neighbours that stay together, a range for each run of them: turns of one row, and with
    `data.keep_together: prompt` at most MOST_ALIKE that are `alike`."""
    held = records.records if isinstance(records, RecordSet) else records
    same_row_N, same_opening_N = neighbours(held, with_openings=keep_together == "prompt")
    borders_U = np.append(np.flatnonzero(~(same_row_N | same_opening_N)), len(held))
    found = list(map(range, borders_U[:-1].tolist(), borders_U[1:].tolist()))  # a loop over a million takes a second
    for number in np.flatnonzero(np.diff(borders_U) > MOST_ALIKE)[::-1].tolist():
        found[number : number + 1] = _cut(found[number], same_row_N)
    return found


def _cut(run: range, same_row_N: np.ndarray) -> Iterator[range]:
    """A long run of neighbours in pieces of MOST_ALIKE, and of more where that would part a row."""
    start = run.start
    for place in run[1:]:
        if place - start >= MOST_ALIKE and not same_row_N[place]:
            yield range(start, place)
            start = place
    yield range(start, run.stop)


@dataclass(frozen=True)
class RecordSet(Sequence[Record]):
    """Records in the order of their source, and the rows left out: {id, reason}.

    `provenance` is what `vlsi-cache generate` says about the responses it wrote; None when it did not write them.
    """

    records: Sequence[Record]
    skipped: list[dict[str, str]]
    provenance: dict[str, Any] | None = None

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def digest(self) -> str:
        """sha256 over the ids and content digests in order: two sets with one digest hold the same rows."""
        digest = hashlib.sha256()
        for name in names_of(self.records):
            digest.update(f"{json.dumps(name.id)} {name.digest}\n".encode())
        return digest.hexdigest()

    def take(self, index_N: np.ndarray) -> "RecordSet":
        """Some of the records, in this order; none is read."""
        return replace(self, records=Chosen(self.records, index_N))


def read_records(
    data: DataSpec, *, limit: int | None = None, num_workers: int = 0, read_elsewhere: Collection[str] = ()
) -> RecordSet:
    """Read and check all rows, or the first `limit` and none beyond them; or take what an earlier command has found.

    Of pictures the files' ends and headers are looked at; with `bad_rows: list` all are decoded once, since a row to be
    left out must be known beforehand. That columns are not read is said of all but those `read_elsewhere`. Raises
    DataError: no such source, no usable row, or (unless `bad_rows: list`) any bad row, all of them together.
    """
    if limit is not None:
        data = change(data, limit=limit if data.limit is None else min(limit, data.limit))
    rows = read_source(data, open_source(data), num_workers=num_workers)
    _tell(rows, read_elsewhere)
    if rows.problems and data.bad_rows == "refuse":
        raise DataError(_all_problems(rows))
    if not len(rows.records):
        raise DataError(_all_problems(rows) if rows.num_rows else f"{rows.name} holds no rows")
    skipped = [{"id": row_id, "reason": reason} for row_id, _, reason in rows.problems]
    return RecordSet(rows.records, skipped, rows.provenance)


def with_answer(record: Record, answer: str) -> Record:
    """The same sample with another text as its response, which then is all of it: no reasoning and no call."""
    messages = [*record.prompt_messages, {"role": "assistant", "content": as_parts(answer)}]
    content = content_text(as_json(messages), record.images, record.tools, record.template_args)
    return replace(record, messages=messages, digest=digest_of(content))


def row_of(record: Record, *, media_root: Path | None = None) -> dict[str, Any]:
    """The row for `write_rows` that reads back as this record.

    Images come as bytes, wherever the row will lie; with a `media_root`, those that were read from below it come as
    paths relative to it. Frames of videos have become images, which are known by another digest.
    """
    images: list[dict[str, Any]] = []
    for image in record.images:
        if image.path is None or media_root is None:
            data = image.read()
            images.append({"bytes": data, "sha256": hashlib.sha256(data).hexdigest()})
        else:
            images.append({"path": image.path.relative_to(media_root).as_posix(), "sha256": image.sha256})
    # Only the last message is this record's response: what the assistant has said before is history.
    history = [{**one, "train": False} if one["role"] == "assistant" else one for one in record.prompt_messages]
    row = {"id": record.id, "kind": record.kind, "messages": [*history, record.messages[-1]], "images": images}
    row |= {"tools": record.tools} if record.tools else {}
    return row | ({"chat_template_kwargs": record.template_args} if record.template_args else {})


def _tell(rows: Rows, read_elsewhere: Collection[str]) -> None:
    """Say once how the rows were read, where that is not plain."""
    for note, count in sorted(rows.notes.items()):
        say(f"{printable(rows.name)}: {note} ({count} {'row' if count == 1 else 'rows'})")
    if unread := [name for name in rows.unread if name not in read_elsewhere]:
        say(f"{printable(rows.name)}: not read: {listed(unread)}")


def _all_problems(rows: Rows) -> str:
    lines = [f"{printable(where)}: {reason}" for _, where, reason in rows.problems]
    advice = "mend them, or leave them out with data.bad_rows: list" if len(rows.records) else "no row is left"
    return f"{rows.name}: {len(lines)} of {rows.num_rows} rows cannot be used; {advice}\n{list_problems(lines)}"
