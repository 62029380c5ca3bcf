"""A cache on an object store, read through a local copy of the pieces that are asked for.

`Mirror.root` is a folder that looks like the cache, so that all readers of a folder read it too, with all their checks.
`Mirror.read` brings what a reader needs of one part into it first: of layered arrays the chunks of the layers asked
for, one ranged request for each stretch of bytes. Holes are never taken for data: a chunk of zeros has a wrong crc32c.
"""

import contextlib
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from vlsi_cache import io
from vlsi_cache.errors import CacheCorruptError, CacheNotFoundError, VlsiCacheError

from . import part_cache
from .arrays import SAMPLE_ARRAYS, ArraySpec, data_file_name, layered_names, part_specs, shard_index_bytes
from .codec import BLOSC_HEADER, encode_index, read_index, read_layered
from .files import DAMAGED_REMOTE, load_header, load_part_record, repair_hint
from .format import (
    HEADER_NAME,
    RECORD_NAME,
    TABLE_NAME,
    VOCAB_NAME,
    CacheHeader,
    FileRecord,
    PartRecord,
    files_digest,
    part_dir,
    part_indices,
    part_name,
)
from .location import UrlPath
from .objects import Got, Objects, changed, open_objects
from .part_cache import Held, Span

Result = TypeVar("Result")
NUM_CONNECTIONS = 16
SHARE_BETWEEN_LOOKS = 32  # of the limit: bytes that are fetched before the part cache is measured again


@dataclass(frozen=True)
class Want:
    """What is needed of a part beside its record: arrays, and of layered ones these layer rows.

    `names` None is every array that rows are made of.
    """

    layers: Sequence[int] = ()
    names: Sequence[str] | None = None


NOTHING = Want(names=())


class Mirror:
    """The local side of one remote cache. Safe to use from several threads, and beside other processes."""

    def __init__(self, url: UrlPath, *, within: Path | None = None) -> None:
        """`within`: a folder of its own, where nothing was fetched before, in place of the part cache."""
        self.url = url
        self.objects = open_objects(url)
        content = self._header_text()
        # Another cache.json at this URL is another cache: nothing of the old one may be taken for it.
        name = xxhash.xxh3_128_hexdigest(f"{url}\n".encode() + content)
        self.root = (within or part_cache.folder()) / name
        with self.told(len(content)):
            self.root.mkdir(parents=True, exist_ok=True)
            if not (self.root / HEADER_NAME).exists():
                io.write_atomically(self.root / HEADER_NAME, content)
                io.write_atomically(self.root / "url", f"{url}\n")
        self._pool = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="vlsi-cache-fetch")
        self._lock = threading.Lock()
        self._records: dict[int, str | None] = {}  # ETags of the commit records that this process goes by
        self._is_plain: bool | None = None  # whether files lie beside part.json, as in a copy of a folder
        self._fetched = math.inf  # bytes since the part cache was measured
        part_cache.limit()  # a size that is none is an error now

    @cached_property
    def header(self) -> CacheHeader:
        with self.told():
            return load_header(self.root)

    def _header_text(self) -> bytes:
        try:
            return self.objects.get(HEADER_NAME).data
        except FileNotFoundError:
            raise CacheNotFoundError(self._not_a_cache(), file=self.url) from None

    def _not_a_cache(self) -> str:
        """What is there instead: a missing bucket looks like a missing object, and only a listing tells."""
        names = sorted(self.objects.sizes())
        if not names:
            return f"there is no cache at `{self.url}`: nothing lies below it"
        below = sorted({name.rsplit("/", 1)[0] for name in names if name.endswith(f"/{HEADER_NAME}")})
        if below:
            shown = ", ".join(f"`{self.url / name}`" for name in below[:4])
            return f"`{self.url}` is not a cache, but holds {len(below)}: {shown}"
        return f"`{self.url}` is not a cache: it has no `{HEADER_NAME}`, but {len(names)} other objects"

    def part_sizes(self) -> dict[int, int]:
        """Committed parts, and the size of the commit record of each."""
        return committed_parts(self.objects)

    def table(self) -> Path | None:
        """`samples.parquet` in the local copy, as it is on the store now; None where there is none."""
        target, mark = self.root / TABLE_NAME, self.root / f"{TABLE_NAME}.etag"
        with part_cache.locked(self.root, TABLE_NAME):
            known = mark.read_text() if mark.exists() and target.exists() else None
            try:
                found = self.objects.get_unless(TABLE_NAME, known)
            except FileNotFoundError:
                return None
            if found is not None:
                with self.told(len(found.data)):
                    mark.unlink(missing_ok=True)
                    io.write_atomically(target, found.data)
                    io.write_atomically(mark, found.etag or "")
        return target

    def with_records(self, work: Callable[[Path], Result]) -> Result:
        """`work(folder)`, with the commit records of all committed parts in `folder`, as in a cache."""
        with tempfile.TemporaryDirectory(prefix="vlsi-cache-") as name, self.told(local=Path(name)):
            folder = Path(name)
            (folder / "parts").mkdir()
            self.records(self.part_sizes(), folder)
            return work(folder)

    def records(self, parts: Iterable[int], folder: Path) -> None:
        """Write the commit records of these parts to their places in `folder`."""

        def fetch(index: int) -> None:
            target = part_dir(folder, index) / RECORD_NAME
            target.parent.mkdir(parents=True)
            target.write_bytes(self.objects.get(f"parts/{part_name(index)}/{RECORD_NAME}").data)

        list(self._pool.map(fetch, parts))

    def with_vocab(self, names: Iterable[str], work: Callable[[Path], Result]) -> Result:
        """`work(root)`, with these arrays of `vocab/`; what is damaged on the local disk is fetched once more."""
        with part_cache.locked(self.root, VOCAB_NAME), self.told():
            if not self._bring_vocab(names):
                return work(self.root)
            try:
                return work(self.root)
            except CacheCorruptError:
                io.remove(self.root / VOCAB_NAME)
                self._bring_vocab(names)
                return work(self.root)

    def _bring_vocab(self, names: Iterable[str]) -> bool:
        """Fetch what is missing of these arrays; whether some of them were there."""
        was_there, records = False, self.header.vocab_files
        for name in names:
            file = f"{name}/c/0/0" if name == "heads" else f"{name}/c/0"
            target = self.root / VOCAB_NAME / file
            was_there |= target.exists()
            if target.exists() or (records and file not in records):  # an array without elements has no file
                continue
            try:
                data = self._get(VOCAB_NAME, files_digest(records), file).data
            except FileNotFoundError:
                raise CacheCorruptError.at(self.url / VOCAB_NAME / file, " is missing", hint=DAMAGED_REMOTE) from None
            check_content(target, data, records.get(file))
            target.parent.mkdir(parents=True, exist_ok=True)
            io.write_atomically(target, data)
        return was_there

    def read(self, index: int, want: Want, work: Callable[[Path], Result]) -> Result:
        """`work(root)`, with what it wants of part `index` in `root`.

        Bytes that turn out to be damaged are fetched once more: the local disk may be to blame.
        """
        with part_cache.locked(self.root, part_cache.part_lock(index)), self.told():
            for attempt in range(2):
                is_fresh = not self._bring(index, want)
                try:
                    return work(self.root)
                except CacheCorruptError:
                    part_cache.drop(self.root, index)
                    if is_fresh or attempt:
                        raise
            raise AssertionError

    def _bring(self, index: int, want: Want) -> bool:
        """Fetch what is missing; whether some of what is wanted was there before."""
        held = self._current(index)
        was_there = bool(held.spans)
        record = load_part_record(self.root, self.header, index)
        specs = part_specs(self.header, record)
        folder = part_dir(self.root, index)
        _lay_out(folder, record)
        names = [*SAMPLE_ARRAYS, *layered_names(self.header)] if want.names is None else list(want.names)
        names = [name for name in names if specs[name].size_bytes]
        fetch = _Fetch(self, index, record, held)
        sharded = [name for name in names if specs[name].sharded]
        if self.header.is_ragged and sharded and specs["kept"].size_bytes:
            sharded = ["kept", *(name for name in sharded if name != "kept")]  # says where the entries of a layer are
        for name in (name for name in names if not specs[name].sharded):
            fetch.whole(data_file_name(name, specs[name]))
        for name in sharded:
            fetch.index(name, specs[name])
        fetch.run()
        if "kept" in sharded:
            fetch.chunks("kept", specs["kept"], range(len(self.header.layers)))
            fetch.run()
        for name in sharded:
            if name != "kept" and want.layers and specs[name].is_layered:
                fetch.chunks(name, specs[name], want.layers)
        flat = [name for name in sharded if not specs[name].is_layered]
        if flat and want.layers:
            kept_LT = read_layered(folder, specs, ["kept"], range(len(self.header.layers)))["kept"]
            for name in flat:
                fetch.stretch(name, specs[name], kept_LT, want.layers)
        fetch.run()
        part_cache.touch(self.root, index)
        return was_there

    def whole(self, index: int) -> None:
        """Bring every file of a part, all of it, and compare each with its hash."""
        with part_cache.locked(self.root, part_cache.part_lock(index)), self.told():
            held = self._current(index)
            record = load_part_record(self.root, self.header, index)
            _lay_out(part_dir(self.root, index), record)
            fetch = _Fetch(self, index, record, held)
            for name in record.files:
                fetch.whole(name)
            fetch.run()

    def _current(self, index: int) -> Held:
        """What is held of a part, if its commit record is still the one on the store; else the new record alone.

        It is asked once for each part in the life of this object: parts never change.
        """
        held, target = part_cache.read_held(self.root, index), part_dir(self.root, index) / RECORD_NAME
        with self._lock:
            is_known, etag = index in self._records, self._records.get(index)
        if is_known and target.exists() and held.record_etag == etag:
            return held
        key = f"parts/{part_name(index)}/{RECORD_NAME}"
        try:
            found = self.objects.get_unless(key, held.record_etag if target.exists() else None)
        except FileNotFoundError:
            raise CacheCorruptError.at(self.url / key, " is missing", hint=DAMAGED_REMOTE) from None
        if found is not None:
            if is_known and found.etag != etag:
                raise changed(self.url / key)
            part_cache.drop(self.root, index)
            held = Held(record_etag=found.etag, num_bytes=len(found.data))
            with part_cache.full_disk_is_told(len(found.data)):
                target.parent.mkdir(parents=True, exist_ok=True)
                io.write_atomically(target, found.data)
                part_cache.write_held(self.root, index, held)
        with self._lock:
            self._records[index] = held.record_etag
        return held

    def _get(self, folder: str, digest: str, file: str, *, span: Span | None = None, etag: str | None = None) -> Got:
        """A file that a sealed record lists: under the digest of its list, or beside the record in a copied folder."""
        if self._is_plain:
            return self.objects.get(f"{folder}/{file}", span=span, etag=etag)
        try:
            found = self.objects.get(f"{folder}/{digest}/{file}", span=span, etag=etag)
        except FileNotFoundError:
            if self._is_plain is False:
                raise
            found = self.objects.get(f"{folder}/{file}", span=span, etag=etag)
            self._is_plain = True
        else:
            self._is_plain = False
        return found

    def bring_all(self, jobs: Sequence[tuple[str, str, str, Span, str | None]]) -> list[Got]:
        """Several spans at the same time; the first one alone while the layout is not known."""
        first = [] if self._is_plain is not None or not jobs else [self._job(jobs[0])]
        return [*first, *self._pool.map(self._job, jobs[len(first) :])]

    def _job(self, job: tuple[str, str, str, Span, str | None]) -> Got:
        folder, digest, file, span, etag = job
        try:
            return self._get(folder, digest, file, span=span, etag=etag)
        except FileNotFoundError:
            raise CacheCorruptError.at(self.url / folder / file, " is missing", hint=DAMAGED_REMOTE) from None

    def count(self, num_bytes: int) -> None:
        """Keep the part cache below its limit. The part that is worked on is locked, and stays."""
        with self._lock:
            self._fetched += num_bytes
            is_due = self._fetched > part_cache.limit() / SHARE_BETWEEN_LOOKS
            if is_due:
                self._fetched = 0
        if is_due:
            part_cache.make_room(part_cache.limit())

    @contextlib.contextmanager
    def told(self, need_bytes: int = 0, *, local: Path | None = None) -> Iterator[None]:
        """Errors about the copy in `local` (by default `root`) name the place on the store; a full disk is told."""
        try:
            with part_cache.full_disk_is_told(need_bytes):
                yield
        except VlsiCacheError as error:
            about_the_store(error, local or self.root, self.url)
            raise


def committed_parts(objects: Objects) -> dict[int, int]:
    """The parts on a store, and the size of the commit record of each; one request for a thousand objects."""
    found = {}
    for name, size in objects.sizes("parts").items():
        folder, _, file = name.removeprefix("parts/").partition("/")
        if file == RECORD_NAME and (indices := part_indices([folder])):
            found[indices[0]] = size
    return dict(sorted(found.items()))


def about_the_store(error: VlsiCacheError, local: Path, url: UrlPath) -> None:
    """Let an error about a file of a local copy speak of the place that the file came from."""
    if str(local) not in error.what and str(local) not in (error.hint or ""):
        return
    error.what = error.what.replace(str(local), str(url))
    error.args = (error.what,)
    if error.hint and str(local) in error.hint:
        error.hint = (
            repair_hint(url) if isinstance(error, CacheCorruptError) else error.hint.replace(str(local), str(url))
        )
    if error.file is not None and error.file.is_relative_to(local):
        error.file = url / error.file.relative_to(local)


class _Fetch:
    """Spans of the files of one part, on their way into its folder."""

    def __init__(self, mirror: Mirror, index: int, record: PartRecord, held: Held) -> None:
        self._mirror, self._index, self._record, self._held = mirror, index, record, held
        self._folder, self._digest = part_dir(mirror.root, index), files_digest(record.files)
        self._wanted: dict[str, list[Span]] = {}

    def whole(self, file: str) -> None:
        self._want(file, (0, self._record.files[file].size))

    def index(self, name: str, spec: ArraySpec) -> None:
        """The index of a shard: made from `chunk_bytes` where the record has them, else fetched."""
        file = data_file_name(name, spec)
        size = self._record.files[file].size
        span = (size - shard_index_bytes(spec), size)
        if not self._held.missing(file, span):
            return
        if name not in self._record.chunk_bytes:
            self._want(file, span)
            return
        self._write(file, span, encode_index(self._record.chunk_bytes[name]))
        self._held.add(file, span, self._held.etags.get(file))

    def chunks(self, name: str, spec: ArraySpec, layers: Sequence[int]) -> None:
        """The chunks of these layer rows."""
        index = self._index_of(name, spec).reshape(*spec.grid[:2], -1, 2)
        for start, size in index[:, list(layers)].reshape(-1, 2).tolist():
            self._want(data_file_name(name, spec), (start, start + size))

    def stretch(self, name: str, spec: ArraySpec, kept_LT: np.ndarray, layers: Sequence[int]) -> None:
        """The chunks of a flat array that hold entries of these layer rows."""
        edges = np.concatenate([[0], np.cumsum(kept_LT.sum(1, dtype=np.int64))]).tolist()
        index, size, file = self._index_of(name, spec).reshape(-1, 2), spec.chunk[0], data_file_name(name, spec)
        # A reader looks at the head of the first chunk, whatever layers it wants.
        self._want(file, (0, min(BLOSC_HEADER, int(index[0, 1]))))
        for layer in layers:
            for block in range(edges[layer] // size, min(len(index), -(-edges[layer + 1] // size))):
                start, num_bytes = index[block].tolist()
                self._want(file, (start, start + num_bytes))

    def _index_of(self, name: str, spec: ArraySpec) -> np.ndarray:
        path = self._folder / data_file_name(name, spec)
        try:
            return read_index(path, spec)
        except ValueError as error:
            raise CacheCorruptError.at(path, f": {error}") from None

    def _want(self, file: str, span: Span) -> None:
        self._wanted[file] = part_cache.joined([*self._wanted.get(file, []), span])

    def run(self) -> None:
        """Fetch what is wanted and not there, several spans at a time, and note it."""
        spans = [
            (file, span)
            for file, wanted in self._wanted.items()
            for one in wanted
            for span in self._held.missing(file, one)
        ]
        self._wanted = {}
        if not spans:
            return
        folder = f"parts/{part_name(self._index)}"
        jobs = [(folder, self._digest, file, span, self._held.etags.get(file)) for file, span in spans]
        num_bytes = sum(span[1] - span[0] for _, span in spans)
        self._mirror.count(num_bytes)
        for (file, span), got in zip(spans, self._mirror.bring_all(jobs), strict=True):
            if self._held.etags.get(file) not in (None, got.etag):  # two spans of one round
                raise changed(self._mirror.url / folder / file)
            self._write(file, span, got.data)
            self._held.add(file, span, got.etag)
            expected = self._record.files[file]
            if span == (0, expected.size):
                check_content(self._folder / file, got.data, expected)
        part_cache.write_held(self._mirror.root, self._index, self._held)

    def _write(self, file: str, span: Span, data: bytes) -> None:
        """Put bytes in their place; where the disk is full, after others have made room."""
        for attempt in range(2):
            try:
                with part_cache.full_disk_is_told(len(data)), (self._folder / file).open("r+b", buffering=0) as opened:
                    written = 0
                    while written < len(data):
                        written += os.pwrite(opened.fileno(), data[written:], span[0] + written)
                return
            except OSError as error:
                if attempt or not io.is_disk_full(error) or not part_cache.make_room(0):
                    raise


def _lay_out(folder: Path, record: PartRecord) -> None:
    """Every file of the part at its size, with holes for what is not there."""
    for name, file in record.files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != file.size:  # a kill may have come in between
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as opened:
                opened.truncate(file.size)


def check_content(place: Path, data: bytes, expected: FileRecord | None) -> None:
    """CacheCorruptError unless these are the bytes that were written; None: nobody has noted them."""
    if expected is None:
        return
    if len(data) != expected.size:
        what = f": {len(data)} bytes, {expected.size} were written"
        raise CacheCorruptError.at(place, what, hint=DAMAGED_REMOTE)
    if (found := xxhash.xxh3_64_hexdigest(data)) != expected.xxh3:
        what = f": xxh3 is {found}, {expected.xxh3} was written"
        raise CacheCorruptError.at(place, what, hint=DAMAGED_REMOTE)
