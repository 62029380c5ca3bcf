"""Rows of a source, checked one after the other: their samples as columns, their pictures, and what is wrong with them.

Nothing is held but what was found: a picture is known by its file, or by the row that it stands in.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vlsi_cache.config.sections import Turns
from vlsi_cache.errors import DataError

from .images import Media, Shelf, load_media
from .messages import COLUMNS, UNSUPPORTED, image_parts
from .rows import as_json, content_of, content_text, digest_of, for_template, id_of_row, kept_text, opening_of
from .sources import Place, RawRow, Source
from .stored import NOWHERE, SAMPLES
from .values import printable, shown, text_value
from .video import Frame, FramesOf

JUST_NOW_NS = 2 * 10**9  # what is younger may change again without another time
NEVER = (-1, -1, -1, -1)  # a stat that no file has

Stat = tuple[int, int, int, int]


class Picture(NamedTuple):
    """A picture and how it is found again: the path that the row names, and what the file system said before it was
    read; or the row that it stands in, and its number there."""

    media: Media
    named: str | None
    stat: Stat
    place: Place
    number: int


@dataclass
class Stretch:
    """What reading some rows has found: columns of `samples`, and for each whether its row has an id of its own. Their
    places are those in the `contents` of the stretch.

    The pictures of samples are the `numbers` of those in `pictures`, whose keys are the same for the same picture.
    """

    samples: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in SAMPLES.names})
    pictures: dict[str, Picture] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[int, tuple[str, str, str]]] = field(default_factory=list)  # samples before; id, where, reason
    notes: Counter[str] = field(default_factory=Counter)
    unread: set[str] = field(default_factory=set)
    refused: dict[str, Stat | None] = field(default_factory=dict)  # files of pictures and videos that cannot be used
    is_given: list[bool] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    content_bytes: int = 0
    num_rows: int = 0


class Reader:
    """Checks raw rows one after the other. `decode`: all pixels of every picture, not its header alone."""

    def __init__(self, source: Source, root: Path | None, turns: Turns, frames_of: FramesOf, *, decode: bool) -> None:
        self._turns: Turns = turns
        self._source, self._root, self._frames_of, self._decode = source, root, frames_of, decode
        self._known: dict[Path | str, Media] = {}
        self._files: dict[str, Picture] = {}  # by the text that names them
        self._shelf = Shelf()

    @property
    def files(self) -> tuple[tuple[Path, str, str], ...]:
        return self._source.files

    def read(self, rows: Iterable[RawRow], unread: set[str] | None = None) -> Stretch:
        """Check these rows; `unread` are columns that the files have and nobody reads."""
        found = Stretch()
        for raw in rows:
            found.num_rows += 1
            notes = set[str]()
            try:
                self._add(found, raw, notes)
            except DataError as error:
                row_id = raw.row.get("id") if isinstance(raw.row, Mapping) else None
                name = row_id if isinstance(row_id, str) and row_id else raw.where if row_id is None else shown(row_id)
                problem = (name, raw.where, printable(str(error)))
                found.problems.append((len(found.is_given), problem))
            found.notes.update(notes)
            if isinstance(raw.row, Mapping):
                found.unread |= {str(key) for key in raw.row if key not in COLUMNS and key not in UNSUPPORTED}
        found.unread |= unread or set()
        return found

    def _add(self, found: Stretch, raw: RawRow, notes: set[str]) -> None:
        """The samples of a row, one for each response; raises DataError with the first thing that is wrong."""
        row = raw.row
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, Mapping):
            raise DataError(f"is a {type(row).__name__}, must be a mapping with `messages`")
        messages, given, ends = content_of(row, self._turns, notes, partial(self._frames, found))
        pictures = [self._picture(found, raw, entry, number) for number, entry in enumerate(given)]
        images = [picture.media for _, picture in pictures]
        tools, args = for_template(row, "tools"), for_template(row, "chat_template_kwargs") or {}
        texts = as_json(messages)
        whole = content_text(texts, images, tools, args)
        row_id = id_of_row(row, whole)
        kind = "" if row.get("kind") is None else text_value(row["kind"], "`kind`")
        if len(ends) > 1:
            notes.add("each of the assistant's turns is a sample, `ID/1`, `ID/2`, ...")
        kept = kept_text(messages, images, tools, args, whole)
        place = (found.content_bytes, len(kept))
        found.contents.append(kept)
        found.content_bytes += len(kept)
        numbers = [found.numbers.setdefault(key, len(found.numbers)) for key, _ in pictures]
        found.pictures.update(pictures)
        for count, end in enumerate(ends, start=1):
            suffix = f"/{count}" if len(ends) > 1 else ""
            seen = images[: sum(1 for _ in image_parts(messages[: end + 1]))]
            text = whole if len(ends) == 1 else content_text(texts[: end + 1], seen, tools, args)
            digests = digest_of(text), opening_of(texts[:end], seen, tools, args)
            values = (row_id + suffix, len(suffix), kind, *map(bytes.fromhex, digests), raw.where, *place, end)
            for column, value in zip(found.samples.values(), (*values, numbers[: len(seen)]), strict=True):
                column.append(value)
            found.is_given.append(row.get("id") is not None)

    def _frames(self, found: Stretch, entry: Any) -> Sequence[Any]:
        """Those of a video of the row; raises DataError."""
        text = entry.get("path") if isinstance(entry, Mapping) else entry
        named = self._named(text)
        try:
            frames = self._frames_of(entry)
            if self._decode and frames and isinstance(frames[0], Frame):
                frames[0].open()  # they are decoded together
        except DataError:
            found.refused |= refused(named)
            raise
        return frames

    def _named(self, text: Any) -> str | None:
        """The path that a text of the row may be, links not followed."""
        if not isinstance(text, str) or self._root is None or len(text) >= 4096:
            return None
        return os.path.join(self._root, text.removeprefix("file://"))

    def _picture(self, found: Stretch, raw: RawRow, entry: Any, number: int) -> tuple[str, Picture]:
        """A picture of the row with its key; raises DataError."""
        if isinstance(entry, Frame):
            name, stat = str(entry.clip.path), stat_of(str(entry.clip.path))
            stat = stat if stat[:2] == entry.clip.stamp else NEVER  # it is another file by now
            return f"{name} {entry.sha256}", Picture(entry, name, stat, Place(NOWHERE, 0, 0), number)
        text = entry.get("path") if isinstance(entry, Mapping) and entry.get("bytes") is None else entry
        is_bare = not (isinstance(entry, Mapping) and entry.get("sha256") is not None)
        if is_bare and isinstance(text, str) and text in self._files:
            return text, self._files[text]
        named = self._named(text)
        stat = NEVER if named is None else stat_of(named)
        again = None if raw.place is None else _not_kept
        try:
            media = load_media(
                entry, root=self._root, known=self._known, again=again, shelf=self._shelf, decode=self._decode
            )
        except DataError as error:
            found.refused |= refused(named)
            raise DataError(f"image {number} {error}") from None
        if media.path is None:
            return media.sha256, Picture(media, None, NEVER, raw.place or Place(NOWHERE, 0, 0), number)
        assert isinstance(text, str)
        picture = Picture(media, named, stat, Place(NOWHERE, 0, 0), number)
        if is_bare or text not in self._files:
            self._files[text] = picture
        return text, picture


def _not_kept() -> bytes:
    raise AssertionError("the record reads its pictures itself")


def stat_of(path: str) -> Stat:
    """Size, times of content and of the entry, and inode of a file, links followed; of none, one that no file has.

    A file that has changed just now has none either: it may change again without another time.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return NEVER
    if abs(time.time_ns() - found.st_ctime_ns) < JUST_NOW_NS:
        return NEVER
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def refused(named: str | None) -> dict[str, Stat | None]:
    """What the file system says of a file that cannot be used, by its name; None: there is none."""
    if named is None:
        return {}
    try:
        return {named: stat_of(named) if os.path.exists(named) else None}
    except ValueError:  # it is no path
        return {}
