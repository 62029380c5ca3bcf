"""A cache on an object store, read through a local copy of the pieces that are asked for.

`Mirror.root` is a folder that looks like the cache, so that all readers of a folder read it too, with all their checks.
`Mirror.read` brings what a reader needs of one part into it first: of layered arrays the chunks of the layers asked
for, one ranged request for each stretch of bytes. Holes are never taken for data: a chunk of zeros has a wrong crc32c.
"""

import contextlib
import math
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import xxhash

from vlsi_cache import io
from vlsi_cache.errors import CacheCorruptError, CacheNotFoundError, VlsiCacheError
from vlsi_cache.store.files import DAMAGED_REMOTE, load_header, load_part_record, repair_hint
from vlsi_cache.store.format import (
    HEADER_NAME,
    RECORD_NAME,
    TABLE_NAME,
    VOCAB_NAME,
    CacheHeader,
    PartRecord,
    files_digest,
    part_dir,
    part_indices,
    part_name,
)
from vlsi_cache.store.location import UrlPath

from . import part_cache
from .fetch import Fetch, Want, check_content
from .objects import Got, Objects, changed, open_objects
from .part_cache import Held, Span

Result = TypeVar("Result")
NUM_CONNECTIONS = 16
SHARE_BETWEEN_LOOKS = 32  # of the limit: bytes that are fetched before the part cache is measured again


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
        """Fetch what is missing; whether some of the part was there before."""
        record, held = self._record(index)
        was_there = bool(held.spans)
        Fetch(self, index, record, held).bring(want)
        part_cache.touch(self.root, index)
        return was_there

    def record_etag(self, index: int) -> str | None:
        """The ETag of a part's commit record, as this process has read it; None if it has not."""
        return self._records.get(index)

    def whole(self, index: int) -> None:
        """Bring every file of a part, all of it, and compare each with its hash."""
        with part_cache.locked(self.root, part_cache.part_lock(index)), self.told():
            record, held = self._record(index)
            fetch = Fetch(self, index, record, held)
            for name in record.files:
                fetch.whole(name)
            fetch.run()

    def _record(self, index: int) -> tuple[PartRecord, Held]:
        """The commit record of a part, and what is held of its files."""
        held = self._current(index)
        try:
            return load_part_record(self.root, self.header, index), held
        except CacheCorruptError:
            part_cache.drop(self.root, index)  # the local disk may be to blame
            held = self._current(index)
            return load_part_record(self.root, self.header, index), held

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
        homes = [f"{folder}/{digest}", folder]
        homes = homes[::-1] if self._is_plain else homes  # a copied folder may have been gone on with
        try:
            found = self.objects.get(f"{homes[0]}/{file}", span=span, etag=etag)
            self._is_plain = homes[0] == folder
        except FileNotFoundError:
            found = self.objects.get(f"{homes[1]}/{file}", span=span, etag=etag)
            self._is_plain = homes[1] == folder
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
