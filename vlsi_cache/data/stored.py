"""Records that are not held in memory: what was measured of each, and reading it when it is asked for.

The checked rows lie one behind the other in a file of contents, each as the JSON that its digest is of: rows of
compressed files, and of Parquet's large groups, cannot be read one by one where they lie, and a row that is checked
already is read four times faster than one that is not. Of N samples and P pictures two tables are held, or mapped from
the folder of kept tables (`table`):
samples: `id`; `suffix`, how many characters at the end of the id are not its row's; `kind`; `digest`; `opening`, the
digest of what it begins with; `where` its row stands, for messages; `start` and `length` of its row in the file of
contents; `end`, the place of its response among the messages; the numbers of its `pictures` in the other table.
pictures: `sha256`, `width`, `height`; of a file its `path`, the path `named` by the row, and its `stat`; of one that
stands in a row the `file`, `start` and `length` of the row, and its `number` among the row's; of a frame the sha256 of
its `video`, the `times` of all frames that are shown of it, and which of them the `frame` is.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlsi_cache.config.sections import Turns
from vlsi_cache.errors import DataError

from .images import Media, bytes_of
from .rows import Record, as_json, content_of, content_text, digest_of
from .sources import READ_ERRORS, Place, Source
from .values import shown
from .video import Clip, Frame, FramesOf

SAMPLES = pa.schema(
    [
        ("id", pa.large_string()),
        ("suffix", pa.int16()),
        ("kind", pa.large_string()),
        ("digest", pa.binary(32)),
        ("opening", pa.binary(8)),
        ("where", pa.large_string()),
        ("start", pa.int64()),
        ("length", pa.int64()),
        ("end", pa.int32()),
        ("pictures", pa.large_list(pa.int32())),
    ]
)
PICTURES = pa.schema(
    [
        ("sha256", pa.binary(32)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("path", pa.string()),
        ("named", pa.string()),
        ("stat", pa.list_(pa.int64(), 4)),
        ("file", pa.int32()),
        ("start", pa.int64()),
        ("length", pa.int64()),
        ("number", pa.int32()),
        ("video", pa.binary(32)),
        ("times", pa.list_(pa.float64())),
        ("frame", pa.int32()),
    ]
)
T = TypeVar("T")
AT_ONCE = 1 << 16  # samples whose names are made together
NOWHERE = -1  # the file of a picture that is a file itself, or that is kept in memory
_MISREAD = (*READ_ERRORS, DataError, LookupError, AttributeError, TypeError, ValueError)  # of a file that is another


class Numbered(Sequence[T]):
    """A sequence whose items are made when they are asked for; subclasses say how many there are, and give one."""

    def _at(self, index: int) -> T:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        numbers = range(len(self))[index]  # IndexError beyond the ends; also of a numpy integer
        return self._at(numbers) if isinstance(numbers, int) else [self._at(number) for number in numbers]


class Texts(Numbered[str]):
    """A column of texts: each is decoded when it is asked for."""

    def __init__(self, column: Any) -> None:
        _, offsets, data = column.buffers()
        self._starts = np.frombuffer(offsets, dtype=np.int64)[column.offset :]
        self._data = memoryview(data or b"")
        self._num = len(column)

    def __len__(self) -> int:
        return self._num

    def _at(self, index: int) -> str:
        return str(self._data[self._starts[index] : self._starts[index + 1]], "utf-8")


class Contents:
    """The file of all checked rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self._handle, length, start)  # threads read at the same time

    def __reduce__(self) -> Any:
        return Contents, (self.path,)


class StoredRecords(Numbered[Record]):
    """The records of a source by number: each is read from where it lies when its messages are asked for."""

    def __init__(
        self,
        source: Source,
        turns: Turns,
        samples: pa.RecordBatch,
        pictures: pa.RecordBatch,
        contents: Contents,
        loose: Mapping[int, Media],
        frames_of: FramesOf,
    ) -> None:
        """`loose` are pictures by their number that cannot be read again from where they come."""
        self._state = (source, turns, samples, pictures, contents, loose, frames_of)
        self._turns: Turns = turns
        self._frames_of = frames_of
        self._source, self._contents, self._loose = source, contents, loose
        self._ids, self._kinds, self._wheres = (Texts(samples.column(name)) for name in ("id", "kind", "where"))
        self._samples, self._pictures = samples, pictures
        self._media: weakref.WeakValueDictionary[int, Media] = weakref.WeakValueDictionary()

    def __reduce__(self) -> Any:
        source, turns, samples, pictures, contents, loose, frames_of = self._state
        # Another process measures them, and reads no bytes.
        bare = {number: Media(media.sha256, media.size) for number, media in loose.items()}
        return StoredRecords, (source, turns, samples, pictures, contents, bare, frames_of)

    @property
    def can_be_sent(self) -> bool:
        """Whether another process would find the file of contents."""
        return self._contents.path.exists()

    def __len__(self) -> int:
        return len(self._ids)

    def _at(self, index: int) -> Record:
        name, digest, row = self.names(index)
        known = {"id": name, "digest": digest, "row": row, "kind": self._kinds[index]}
        return Record.later(partial(self._load, index), **known, opening=_hex_at(self._openings, index, 8))

    def names(self, index: int) -> tuple[str, str, str]:
        """Id, digest and row of a sample."""
        name, suffix = self._ids[index], int(self._column["suffix"][index])
        return name, _hex_at(self._digests, index, 32), name[: len(name) - suffix]

    def names_at(self, index_N: np.ndarray) -> "Iterator[Names]":
        """What some samples are called, many at a time: of a million, one by one takes most of a command's start."""
        for chosen in self._columns_at(index_N, ["id", "suffix", "digest"]):
            digests = _bytes_of_column(chosen.column("digest"), 32).hex()
            named = zip(chosen.column("id").to_pylist(), chosen.column("suffix").to_pylist(), strict=True)
            for place, (name, suffix) in enumerate(named):
                yield Names(name, digests[64 * place : 64 * (place + 1)], name[: len(name) - suffix])

    def lines_at(self, index_N: np.ndarray) -> Iterator[pa.Buffer]:
        """A line of id and digest for each of some samples, many lines at a time; no line break after the last."""
        for chosen in self._columns_at(index_N, ["id", "digest"]):
            num = len(chosen)
            hexes = _bytes_of_column(chosen.column("digest"), 32)[: 32 * num].hex().encode()
            places = np.arange(0, 64 * num + 1, 64)
            digests = pa.LargeStringArray.from_buffers(num, pa.py_buffer(places), pa.py_buffer(hexes))
            space, end = (pa.scalar(text, pa.large_string()) for text in " \n")
            lines = pc.call_function("binary_join_element_wise", [chosen.column("id"), digests, space])
            yield pc.call_function("binary_join", [pa.LargeListArray.from_arrays([0, num], lines), end])[0].as_buffer()

    def begin(self, index: int) -> tuple[str, str]:
        """Row and opening of a sample."""
        return self.names(index)[2], _hex_at(self._openings, index, 8)

    def neighbours_at(self, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`neighbours` among some samples, without a loop; the first of them has no one before it."""
        openings_N = np.frombuffer(self._openings, np.uint64)[: len(self)][index_N]
        starts_N = self._column["start"][index_N]  # of their rows in the file: no two rows have one in common
        same = (np.concatenate([[False], found[1:] == found[:-1]]) for found in (starts_N, openings_N))
        same_row_N, same_opening_N = same
        return same_row_N, same_opening_N

    def _columns_at(self, index_N: np.ndarray, names: list[str]) -> Iterator[pa.RecordBatch]:
        columns = self._samples.select(names)
        for start in range(0, len(index_N), AT_ONCE):
            yield columns.take(pa.array(index_N[start : start + AT_ONCE]))

    def starts_row(self) -> np.ndarray:
        """Whether each sample is of another row than the one before it: bool [N]."""
        return np.diff(self._column["start"], prepend=-1) != 0

    def names_digest(self) -> str:
        return _digest_of_columns([self._samples.column(name) for name in ("id", "suffix", "digest")])

    @cached_property
    def _column(self) -> dict[str, np.ndarray]:
        names = ("suffix", "start", "length", "end")
        return {name: self._samples.column(name).to_numpy(zero_copy_only=True) for name in names}

    @cached_property
    def _digests(self) -> memoryview:
        return _bytes_of_column(self._samples.column("digest"), 32)

    @cached_property
    def _openings(self) -> memoryview:
        return _bytes_of_column(self._samples.column("opening"), 8)

    @cached_property
    def _picture_lists(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the pictures of a sample begin in the second, and the numbers of all: int64 [N + 1], int32."""
        lists: Any = self._samples.column("pictures")
        return lists.offsets.to_numpy(), lists.values.to_numpy()

    def _load(self, index: int, name: str) -> dict[str, Any]:
        starts, numbers = self._picture_lists
        images = tuple(self._picture(int(number)) for number in numbers[starts[index] : starts[index + 1]])
        if name == "images":
            return {"images": images}
        column = self._column
        content = self._contents.read(int(column["start"][index]), int(column["length"][index]))
        try:
            row = json.loads(content)
            messages = row["messages"][: int(column["end"][index]) + 1]
            tools, args = row.get("tools"), row.get("template_args", {})
            digest, is_whole = self.names(index)[1], len(messages) == len(row["messages"])
            is_known = is_whole and digest_of(content) == digest  # of most rows, which hold no mappings of their own
            if is_known or digest_of(content_text(as_json(messages), images, tools, args)) == digest:
                return {"messages": messages, "images": images, "tools": tools, "template_args": args}
        except (ValueError, LookupError, AttributeError, TypeError):
            pass
        where = self._contents.path
        raise DataError(f"{where}, where checked rows lie, has changed since they were read; start again")

    def _picture(self, number: int) -> Media:
        """One object for each picture, as long as somebody holds it."""
        if number in self._loose:
            return self._loose[number]
        media = self._media.get(number)
        if media is None:
            media = self._made(number)
            self._media[number] = media
        return media

    def _made(self, number: int) -> Media:
        """The picture that a row of their table says."""

        def said(name: str) -> Any:
            return self._pictures.column(name)[number].as_py()

        sha256, size, path = said("sha256").hex(), (said("width"), said("height")), said("path")
        if (video := said("video")) is not None:
            clip = Clip(Path(path), video.hex(), tuple(said("times")), tuple(said("stat")[:2]))
            return Frame(sha256, size, clip=clip, number=said("frame"))
        if path is not None:
            return Media(sha256, size, Path(path))
        place = Place(said("file"), said("start"), said("length"))
        return Media(sha256, size, again=partial(self._bytes_again, place, said("number")))

    def _bytes_again(self, place: Place, number: int) -> bytes:
        """The bytes of picture `number` of the row at `place`, out of the file that it was read from."""
        try:
            return bytes_of(content_of(self._source.again(place), self._turns, set(), self._frames_of)[1][number])
        except _MISREAD as error:  # it is another file now
            name = self._source.files[place.file][2]
            raise DataError(
                f"image {number} of {name} (at {place.start}) cannot be read again: {shown(str(error))}; start again"
            ) from None


def _bytes_of_column(column: Any, width: int) -> memoryview:
    return memoryview(column.buffers()[1] or b"")[width * column.offset :]


def _hex_at(column: memoryview, index: int, width: int) -> str:
    return bytes(column[width * index : width * (index + 1)]).hex()


class Chosen(Numbered[Record]):
    """Some of many records, in an order of their own."""

    def __init__(self, records: Sequence[Record], index_N: np.ndarray) -> None:
        self.records, self.index_N = records, index_N

    def __len__(self) -> int:
        return len(self.index_N)

    def _at(self, index: int) -> Record:
        return self.records[int(self.index_N[index])]


class Joined(Numbered[Record]):
    """Records of several sources, one source after the other."""

    def __init__(self, parts: Sequence[Sequence[Record]]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _at(self, index: int) -> Record:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part][index - int(self.starts[part])]


class Names(NamedTuple):
    """What a record is called and what it is."""

    id: str
    digest: str
    row: str


def names_of(records: Sequence[Record]) -> Iterator[Names]:
    """Of all records, in order; none is read."""
    for some, index_N in _pieces(records, np.arange(len(records))):
        if isinstance(some, StoredRecords):
            yield from some.names_at(index_N)
        else:
            them = (some[index] for index in index_N.tolist())
            yield from (Names(record.id, record.digest, record.row) for record in them)


def content_digest(records: Sequence[Record]) -> str:
    """sha256 over a line of id and digest for each record, in order; those that lie in tables are not read."""
    digest, between = hashlib.sha256(), b""
    blocks: Iterable[bytes | pa.Buffer]
    for some, index_N in _pieces(records, np.arange(len(records))):
        if isinstance(some, StoredRecords):
            blocks = some.lines_at(index_N)
        else:
            them = (some[index] for index in index_N.tolist())
            blocks = (f"{record.id} {record.digest}".encode() for record in them)
        for block in blocks:
            digest.update(between)
            digest.update(block)
            between = b"\n"
    return digest.hexdigest()


def neighbours(records: Sequence[Record], *, with_openings: bool) -> tuple[np.ndarray, np.ndarray]:
    """Whether each record is of the row of the one before it, and whether it begins like that one: bool [N], twice.

    Records that lie in tables are not read. The second is False for all unless `with_openings`.
    """
    same_row_N, same_opening_N = np.zeros((2, len(records)), bool)
    done, before = 0, ("", "")
    for some, index_N in _pieces(records, np.arange(len(records))):
        if not len(index_N):
            continue
        piece = slice(done, done + len(index_N))
        if isinstance(some, StoredRecords):
            first, last = (some.begin(int(index_N[end])) for end in (0, -1))
            same_row_N[piece], same_opening_N[piece] = some.neighbours_at(index_N)
        else:
            them = (some[index] for index in index_N.tolist())
            begins = [(record.row, record.opening if with_openings else "") for record in them]
            first, last = begins[0], begins[-1]
            for place, (one, other) in enumerate(pairwise(begins), start=done + 1):
                same_row_N[place], same_opening_N[place] = _are_same(one, other)
        same_row_N[done], same_opening_N[done] = _are_same(before, first)
        done, before = piece.stop, last
    return same_row_N, same_opening_N & with_openings


def _are_same(one: tuple[str, str], other: tuple[str, str]) -> tuple[bool, bool]:
    """Whether two records have a row in common, and an opening; "" is none."""
    return one[0] == other[0] != "", one[1] == other[1] != ""


def _pieces(records: Sequence[Record], index_N: np.ndarray) -> Iterator[tuple[Sequence[Record], np.ndarray]]:
    """The records `index_N` as stretches that lie in one sequence, with their places there."""
    if isinstance(records, Chosen):
        yield from _pieces(records.records, records.index_N[index_N])
    elif isinstance(records, Joined):
        part_N = np.searchsorted(records.starts, index_N, side="right") - 1
        borders = np.flatnonzero(np.diff(part_N)) + 1
        for stretch in np.split(index_N, borders) if len(index_N) else ():
            part = int(np.searchsorted(records.starts, stretch[0], side="right")) - 1
            yield from _pieces(records.parts[part], stretch - records.starts[part])
    else:
        yield records, index_N


def names_digest(records: Sequence[Record]) -> str:
    """sha256 over ids, rows and contents of all records, in order; of those that lie in tables without a loop."""
    if isinstance(records, StoredRecords):
        return records.names_digest()
    names = list(names_of(records))
    suffixes = [len(name.id) - len(name.row) if name.id.startswith(name.row) else -1 for name in names]
    columns = [
        pa.array([name.id for name in names], pa.large_string()),
        pa.array(suffixes, pa.int16()),
        pa.array([bytes.fromhex(name.digest) for name in names], pa.binary(32)),
    ]
    return _digest_of_columns(columns)


def _digest_of_columns(columns: Sequence[Any]) -> str:
    """Of columns without nulls, wherever in a buffer they begin."""
    digest = hashlib.sha256()
    for column in columns:
        whole = pa.concat_arrays([column.slice(0, 0), column])  # its buffers then begin with it
        for buffer in whole.buffers()[1:]:
            digest.update(b"\0" if buffer is None else buffer)
    return digest.hexdigest()
