"""Reading a source once: every row is checked, named if it is bad, and its place is noted; no row is held in memory.

What was found is kept as tables (`stored`, `table`) under the digest of the files' contents, and the next command reads
none of the rows. Files up to CHECKED_BYTES are hashed whole each time. Of larger ones size, times and inode must be the
same, and a sample of their bytes; whatever a table says of a row, the row is compared with its digest when it is read.
"""

import hashlib
import json
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from vlsi_cache.config.sections import DataSpec
from vlsi_cache.errors import DiskFullError
from vlsi_cache.io import is_disk_full, remove
from vlsi_cache.progress import Bar

from . import table
from .checking import NEVER, Picture, Reader, Stat, Stretch, refused, stat_of
from .images import Media
from .sources import Source, installed_generator, lines_between, media_root, raw_rows, responses_of
from .stored import NOWHERE, PICTURES, SAMPLES, Contents, StoredRecords, Texts
from .values import shown
from .video import Frame, FramesOf, frames_of
from .workers import Workers

CHECKED_BYTES = 1 << 30
SAMPLE_BYTES = 1 << 20  # of a larger file, at its start, its middle and its end
WORTH_BYTES = 16 << 20  # that take several seconds to check: longer than workers to start
CONTENTS = "contents.bin"
STRETCH_ROWS, STRETCH_BYTES = 4096, 2 << 20
MOST_REMEMBERED, REMEMBERED_BYTES = 3, 64 << 20  # sets of a generator's rows, and bytes of each


@dataclass(frozen=True)
class Rows:
    """All rows of a source, checked; `key` is that of the tables that say so, "" where none are kept."""

    name: str
    records: StoredRecords
    problems: list[tuple[str, str, str]]
    notes: dict[str, int]
    unread: list[str]
    num_rows: int
    provenance: dict[str, Any] | None


def read_source(data: DataSpec, source: Source, *, num_workers: int = 0) -> Rows:
    """Read and check all rows, or take what an earlier command has found; raises DataError for no source."""
    # A row that is to be left out must be known before anything is begun with the others.
    decode = data.bad_rows == "list"
    root = media_root(data)
    key = _key(data, source, root, decode=decode)
    kept = table.find("rows", key) if key else None
    if kept is not None and not (_pictures_are_there(kept.tables["pictures"]) and _are_refused(kept.about["refused"])):
        table.discard(kept.folder)
        kept = None
    started = time.monotonic()
    found = _of_table(kept) or _made_before(data, decode=decode)
    if found is None:
        found = _read_all(data, source, root, decode=decode, num_workers=num_workers)
        _remember(data, found, decode=decode)
    # A file that changed while it was read is not what the key says.
    is_worth_it = time.monotonic() - started >= table.WORTH_S
    if is_worth_it and kept is None and key and not found.loose and key == _key(data, source, root, decode=decode):
        kept = table.keep("rows", key, found.tables, found.about, [found.contents.path])
        found = _of_table(kept) or found
    about = found.about
    records = StoredRecords(
        source,
        data.turns,
        found.tables["samples"],
        found.tables["pictures"],
        found.contents,
        found.loose,
        _frames_of(data, root),
    )
    return Rows(
        source.name,
        records,
        [(row_id, where, reason) for row_id, where, reason in about["problems"]],
        about["notes"],
        about["unread"],
        about["num_rows"],
        responses_of(source),
    )


def _frames_of(data: DataSpec, root: Path | None) -> FramesOf:
    return partial(frames_of, rule=data.video, root=root, known={})


class _Found(NamedTuple):
    """The tables of a source, what is said about them, all checked rows, and the pictures that lie in none of its
    files."""

    tables: Mapping[str, pa.RecordBatch]
    about: dict[str, Any]
    contents: Contents
    loose: dict[int, Media]


def _of_table(kept: table.Kept | None) -> _Found | None:
    return None if kept is None else _Found(kept.tables, kept.about, Contents(kept.folder / CONTENTS), {})


# Rows of generators, the latest last: they have no files by which another process could know them again, and commands
# of one process (a build, its students, their scores) ask for the same ones.
_made: dict[tuple[Any, str], _Found] = {}


def _made_before(data: DataSpec, *, decode: bool) -> _Found | None:
    return None if data.generator is None else _made.get(_name_of_rows(data, data.generator, decode=decode))


def _remember(data: DataSpec, found: _Found, *, decode: bool) -> None:
    num_bytes = sum(len(media.data or b"") for media in found.loose.values()) + found.contents.path.stat().st_size
    if data.generator is None or num_bytes > REMEMBERED_BYTES:
        return
    _made[_name_of_rows(data, data.generator, decode=decode)] = found
    while len(_made) > MOST_REMEMBERED:
        del _made[next(iter(_made))]


def _name_of_rows(data: DataSpec, generator: str, *, decode: bool) -> tuple[Any, str]:
    facts = {"limit": data.limit, "turns": data.turns, "decode": decode, "video": data.video.model_dump()}
    named = json.dumps([data.options, facts, str(media_root(data))], sort_keys=True, default=repr)
    return installed_generator(generator), named


def _key(data: DataSpec, source: Source, root: Path | None, *, decode: bool) -> str:
    """What the tables of a source follow from; "" where that is not known before its rows are made, or in flux."""
    try:
        files = [[str(path.resolve()), kind, name, content_id(path)] for path, kind, name in source.files]
    except OSError:  # reading it says so with its name
        return ""
    if not files or not all(one[-1] for one in files):
        return ""
    facts = {"files": files, "root": str(root), "limit": data.limit, "turns": data.turns, "decode": decode}
    facts["video"] = data.video.model_dump()
    facts["libraries"] = [_version(name) for name in ("pillow", "av")]  # which files can be read
    return table.key_of(facts)


def content_id(path: Path) -> str:
    """What tells this content of a file from another one; "" for a large file that has changed just now."""
    size = path.stat().st_size
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        if size <= CHECKED_BYTES:
            while block := file.read(1 << 22):
                digest.update(block)
            return f"{size} {digest.hexdigest()}"
        stat = stat_of(str(path))
        for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return "" if stat == NEVER else f"{stat} {digest.hexdigest()}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _pictures_are_there(pictures: pa.RecordBatch) -> bool:
    """Whether all pictures and videos that are files are what they were."""
    columns = (pictures.column(name).to_pylist() for name in ("named", "stat", "sha256", "video"))
    of_files = {named: (tuple(stat), video or sha256) for named, stat, sha256, video in zip(*columns, strict=True)}
    of_files.pop(None, None)  # those that stand in rows
    for named, (stat, sha256) in of_files.items():
        if stat != NEVER and stat_of(named) == stat:
            continue
        try:
            with open(named, "rb") as file:
                if hashlib.file_digest(file, "sha256").digest() != sha256:
                    return False
        except OSError:
            return False
    return True


def _are_refused(files: Mapping[str, Sequence[int] | None]) -> bool:
    """Whether the files that could not be used are as they were."""
    for named, stat in files.items():
        found = refused(named)[named]
        if found == NEVER or found != (None if stat is None else tuple(stat)):
            return False
    return True


def _read_all(data: DataSpec, source: Source, root: Path | None, *, decode: bool, num_workers: int) -> _Found:
    gathered = _Gathered()
    reader = Reader(source, root, data.turns, _frames_of(data, root), decode=decode)
    with Bar("read rows", unit="row", delay=2) as bar:
        for found in _stretches(data, source, reader, num_workers):
            gathered.add(found)
            bar.update(found.num_rows)
    return gathered.finish()


def _stretches(data: DataSpec, source: Source, reader: Reader, num_workers: int) -> Iterator[Stretch]:
    """All rows, some thousand at a time: in this process, or in workers where there is enough to do."""
    lines = None
    can_be_cut = data.limit is None and bool(source.files) and all(kind == ".jsonl" for _, kind, _ in source.files)
    if num_workers > 1 and can_be_cut and sum(path.stat().st_size for path, _, _ in source.files) >= WORTH_BYTES:
        lines = list(_line_stretches(source))
    if lines is None:
        unread = set[str]()
        rows = raw_rows(data, unread, source=source)
        # One row after the other: the pictures of a stretch would fill the memory.
        while (found := reader.read(islice(rows, STRETCH_ROWS), unread)).num_rows:
            yield found
        yield found
        return
    with Workers(num_workers, "reading rows", reader) as workers:
        yield from workers.map(read_lines, lines)


def read_lines(reader: Reader, place: tuple[int, int, int, int]) -> Stretch:
    """The rows of a stretch of lines: file, first byte, the byte behind it, and the number of the first line."""
    number, start, stop, first_line = place
    path, _, name = reader.files[number]
    return reader.read(lines_between(path, name, number, start, stop, first_line=first_line))


def _line_stretches(source: Source) -> Iterator[tuple[int, int, int, int]]:
    """Stretches of whole lines, of about STRETCH_BYTES."""
    for number, (path, _, _) in enumerate(source.files):
        start, line_number = 0, 1
        with path.open("rb") as file:
            while block := file.read(STRETCH_BYTES):
                block += file.readline()
                yield number, start, start + len(block), line_number
                start += len(block)
                line_number += block.count(b"\n")


class _Gathered:
    """Stretches put together; rows whose names were used before are taken out at the end."""

    def __init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._numbers: dict[str, int] = {}  # of pictures, by their key
        self._pictures: list[Picture] = []
        self._is_given: list[bool] = []
        self._problems: list[tuple[tuple[int, int], tuple[str, str, str]]] = []  # with its place among the samples
        self._notes: Counter[str] = Counter()
        self._unread: set[str] = set()
        self._refused: dict[str, Stat | None] = {}
        self._num_rows = self._num_samples = 0
        self._folder = Path(tempfile.mkdtemp(prefix="vlsi-cache-rows-"))
        self._contents = Contents(_touched(self._folder / CONTENTS))
        weakref.finalize(self._contents, remove, self._folder)
        self._content_bytes = 0

    def add(self, found: Stretch) -> None:
        for key, picture in found.pictures.items():
            if self._numbers.setdefault(key, len(self._numbers)) == len(self._pictures):
                self._pictures.append(picture)
        numbers = [self._numbers[key] for key in found.numbers]
        samples = {**found.samples, "pictures": [[numbers[one] for one in row] for row in found.samples["pictures"]]}
        samples["start"] = [self._content_bytes + start for start in samples["start"]]
        self._batches.append(pa.RecordBatch.from_pydict(samples, schema=SAMPLES))
        self._is_given += found.is_given
        self._problems += [((self._num_samples + at, 0), problem) for at, problem in found.problems]
        self._notes.update(found.notes)
        self._unread |= found.unread
        self._refused |= found.refused
        self._num_rows += found.num_rows
        self._num_samples += len(found.is_given)
        _append(self._contents.path, b"".join(found.contents))
        self._content_bytes += found.content_bytes

    def finish(self) -> _Found:
        samples = _one_batch(self._batches, SAMPLES)
        self._batches = []
        is_good, again = _without_repeats(samples, self._is_given)
        if again:
            self._problems = sorted([*self._problems, *again], key=lambda one: one[0])
            samples = samples.filter(pa.array(is_good))
        about = {
            "problems": [problem for _, problem in self._problems],
            "notes": dict(self._notes),
            "unread": sorted(self._unread),
            "refused": self._refused,
            "num_rows": self._num_rows,
        }
        loose = {
            number: one.media
            for number, one in enumerate(self._pictures)
            if one.named is None and one.place.file == NOWHERE
        }
        tables = {"samples": samples, "pictures": _picture_table(self._pictures)}
        return _Found(tables, about, self._contents, loose)


def _touched(path: Path) -> Path:
    path.touch()
    return path


def _append(path: Path, data: bytes) -> None:
    """Raises DiskFullError."""
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            f"the disk of {path.parent} is full, where checked rows lie; name a folder with room in TMPDIR"
        ) from error


def _one_batch(batches: list[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    table = pa.Table.from_batches(batches, schema=schema).combine_chunks()
    return table.to_batches()[0] if table.num_rows else pa.RecordBatch.from_pylist([], schema=schema)


def _without_repeats(
    samples: pa.RecordBatch, is_given: list[bool]
) -> tuple[np.ndarray, list[tuple[tuple[int, int], tuple[str, str, str]]]]:
    """Which samples stay: bool [N]; and the problems of rows whose id, or that of a sample, was used before."""
    ids, wheres = Texts(samples.column("id")), Texts(samples.column("where"))
    suffixes = samples.column("suffix").to_numpy()
    is_good = np.ones(len(ids), dtype=bool)
    # Rising numbers of rows.
    row_N = np.cumsum([index == 0 or wheres[index] != wheres[index - 1] for index in range(len(ids))])
    # Names that have one hash in several rows are few; only their rows are looked at one by one.
    hashes_N = _hashes(ids)
    of_rows = np.flatnonzero(suffixes)
    more = _hashes([ids[int(i)][: -int(suffixes[i])] for i in of_rows])
    pairs = np.unique(np.stack([np.concatenate([hashes_N, more]), np.concatenate([row_N, row_N[of_rows]])]), axis=1)
    shared = pairs[0][1:][pairs[0][1:] == pairs[0][:-1]]
    suspects = np.unique(pairs[1][np.isin(pairs[0], shared)])
    first_of: dict[str, tuple[str, bool]] = {}  # of a name: where, and whether it was given
    problems = []
    for row in suspects:
        chosen = np.arange(*np.searchsorted(row_N, [row, row + 1]))
        name = ids[int(chosen[0])]
        row_id = name[: len(name) - int(suffixes[chosen[0]])]
        where, given = wheres[int(chosen[0])], is_given[int(chosen[0])]
        if reason := _repeats([row_id, *(ids[int(i)] for i in chosen)], where, given, first_of):
            is_good[chosen] = False
            problems.append(((int(chosen[0]), 1), (row_id if given else where, where, reason)))
    return is_good, problems


def _hashes(names: Sequence[str]) -> np.ndarray:
    return np.fromiter((xxhash.xxh3_64_intdigest(name.encode()) for name in names), np.uint64, len(names))


def _repeats(names: list[str], where: str, given: bool, first_of: dict[str, tuple[str, bool]]) -> str:
    """Why a row with these names cannot stay; "" if it can."""
    for name in dict.fromkeys(names):
        first, was_given = first_of.setdefault(name, (where, given))
        if first != where and (given or was_given):
            return f"id `{shown(name)}` was used before, at {first}"
        if first != where:
            return f"is the same row as {first} and has no `id`; drop one of them, or give each an `id`"
    return ""


def _picture_table(pictures: list[Picture]) -> pa.RecordBatch:
    rows = [
        {
            **_of_video(one.media),
            "sha256": bytes.fromhex(one.media.sha256),
            "width": one.media.size[0],
            "height": one.media.size[1],
            "path": one.named if isinstance(one.media, Frame) else one.media.path and str(one.media.path),
            "named": one.named,
            "stat": one.stat,
            "file": one.place.file,
            "start": one.place.start,
            "length": one.place.length,
            "number": one.number,
        }
        for one in pictures
    ]
    return pa.RecordBatch.from_pylist(rows, schema=PICTURES)


def _of_video(media: Media) -> dict[str, Any]:
    """What is said of a frame alone."""
    if not isinstance(media, Frame):
        return {}
    return {"video": bytes.fromhex(media.clip.sha256), "times": list(media.clip.times), "frame": media.number}
