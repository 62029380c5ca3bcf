"""Writing a cache to an object store: parts are made in a local folder and uploaded, `part.json` last: the commit.

A record names the folder that its files were uploaded to (FORMAT.md, "Commit"), so that writers of one part, or a
writer that was killed and comes again, never mix their files, and what is there already is not uploaded again.
"""

import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from vlsi_cache.errors import CacheCorruptError, SpecError, VlsiCacheError
from vlsi_cache.store import table
from vlsi_cache.store.files import hash_file, load_header, load_part_record, new_tmp, remove_dead_tmp, tmp_path
from vlsi_cache.store.format import (
    HEADER_NAME,
    RECORD_NAME,
    TABLE_NAME,
    VOCAB_NAME,
    CacheHeader,
    FileRecord,
    files_digest,
    list_parts,
    part_dir,
    part_name,
)
from vlsi_cache.store.header import OrderOrMaker, TokenTexts, publish_header
from vlsi_cache.store.location import UrlPath
from vlsi_cache.store.vocab_order import VocabOrder, vocab_files
from vlsi_cache.store.writer import CacheWriter

from . import part_cache
from .fetch import check_content
from .mirror import about_the_store, committed_parts
from .objects import Objects, open_objects

NUM_UPLOADS = 8
Moved = Callable[[int], object]  # is told of bytes that have been moved


def upload_files(
    objects: Objects, key: str, folder: Path, files: dict[str, FileRecord], moved: Moved = lambda _: None
) -> None:
    """Upload the files of a record, several at a time, each compared with its hash; those that are there stay.

    An object appears whole, and under this name only one content can be: its size says that it is there.
    """
    home = f"{key}/{files_digest(files)}"
    there = objects.sizes(home)

    def upload(name: str) -> None:
        if there.get(f"{home}/{name}") != files[name].size:
            found = hash_file(folder / name)
            if found != files[name]:
                what = f": {found.size} bytes, xxh3 {found.xxh3}; listed are {files[name].size}, {files[name].xxh3}"
                raise CacheCorruptError.at(folder / name, what)
            objects.put(f"{home}/{name}", folder / name)
        moved(files[name].size)

    with ThreadPoolExecutor(NUM_UPLOADS, thread_name_prefix="vlsi-cache-upload") as pool:
        list(pool.map(upload, files))


def download_files(
    objects: Objects, key: str, target: Path, files: dict[str, FileRecord], moved: Moved = lambda _: None
) -> None:
    """Write the files of a record to `target`, several at a time, each compared with its hash."""
    home = f"{key}/{files_digest(files)}"
    if not objects.sizes(home):
        home = key  # a folder copied as it is

    def download(name: str) -> None:
        try:
            data = objects.get(f"{home}/{name}").data
        except FileNotFoundError:
            raise CacheCorruptError.at(objects.url / home / name, " is missing") from None
        check_content(objects.url / home / name, data, files[name])
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
        moved(len(data))

    with ThreadPoolExecutor(NUM_UPLOADS, thread_name_prefix="vlsi-cache-download") as pool:
        list(pool.map(download, files))


def upload_part(objects: Objects, root: Path, header: CacheHeader, index: int, moved: Moved = lambda _: None) -> bool:
    """Upload part `index` of the folder `root`; False when another writer's part has been committed first."""
    record, key = load_part_record(root, header, index), f"parts/{part_name(index)}"
    upload_files(objects, key, part_dir(root, index), record.files, moved)
    return objects.put_new(f"{key}/{RECORD_NAME}", (part_dir(root, index) / RECORD_NAME).read_bytes())


def upload_start(objects: Objects, root: Path) -> bool:
    """Upload `vocab/` and then `cache.json`; False when another cache.json is there."""
    files = load_header(root).vocab_files or vocab_files(root)
    upload_files(objects, VOCAB_NAME, root / VOCAB_NAME, files)
    return objects.put_new(HEADER_NAME, (root / HEADER_NAME).read_bytes())


def download_start(objects: Objects, root: Path) -> bool:
    """Write `vocab/` and `cache.json` of the store to the folder `root`; False when there is no cache."""
    try:
        text = objects.get(HEADER_NAME).data
    except FileNotFoundError:
        return False
    (root / HEADER_NAME).write_bytes(text)
    files = load_header(root).vocab_files
    if not files:  # of a cache by an earlier writer, copied as it is
        for name in objects.sizes(VOCAB_NAME):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(objects.get(name).data)
    download_files(objects, VOCAB_NAME, root / VOCAB_NAME, files)
    return True


def _has_lost_vocab(objects: Objects) -> bool:
    """Whether there is a `cache.json` without the table that it names."""
    if objects.sizes(VOCAB_NAME):
        return False
    try:
        objects.get(HEADER_NAME)
    except FileNotFoundError:
        return False
    return True


def stored_header(url: UrlPath) -> CacheHeader | None:
    """The header of the cache at a URL; None when none is there."""
    try:
        text = open_objects(url).get(HEADER_NAME).data
    except FileNotFoundError:
        return None
    with scratch_folder(url) as folder:
        (folder / HEADER_NAME).write_bytes(text)
        return load_header(folder)


def check_url(url: UrlPath) -> None:
    """Raise SpecError unless a cache lies at `url`, or can: nothing lies there, or what an interrupted start leaves."""
    names = open_objects(url).sizes()
    if HEADER_NAME in names:
        return
    foreign = sorted(name for name in names if not name.startswith(f"{VOCAB_NAME}/"))
    if foreign:
        raise SpecError(f"`{url}` is not empty and not a cache: it holds {foreign[:4]}; name another place")


def finish_upload(objects: Objects, header: CacheHeader) -> bool:
    """When all parts are there, write `samples.parquet` and delete files that no record names; False before."""
    if set(range(header.num_parts)) - set(committed_parts(objects)):
        return False
    with records_folder(objects) as folder:
        write_remote_table(objects, header, folder)
        garbage = unnamed_files(objects, header, folder)
    objects.delete(garbage)
    return True


@contextmanager
def records_folder(objects: Objects) -> Iterator[Path]:
    """A folder with the commit records of all parts that are on the store, in their places."""
    with scratch_folder(objects.url) as folder:

        def fetch(index: int) -> None:
            part_dir(folder, index).mkdir(parents=True)
            data = objects.get(f"parts/{part_name(index)}/{RECORD_NAME}").data
            (part_dir(folder, index) / RECORD_NAME).write_bytes(data)

        with ThreadPoolExecutor(NUM_UPLOADS, thread_name_prefix="vlsi-cache-download") as pool:
            list(pool.map(fetch, committed_parts(objects)))
        yield folder


def write_remote_table(objects: Objects, header: CacheHeader, folder: Path) -> None:
    """Make `samples.parquet` out of the records in `folder`, and upload it."""
    table.write_table(folder, header)
    objects.put(TABLE_NAME, folder / TABLE_NAME)


def unnamed_files(objects: Objects, header: CacheHeader, folder: Path) -> list[str]:
    """What writers that came second, or were killed and never came again, have left in the folders of digests.

    The records of all parts are in `folder`.
    """
    homes = set()
    for index in list_parts(folder):
        homes.add(f"parts/{part_name(index)}/{files_digest(load_part_record(folder, header, index).files)}")
    found = []
    for name in objects.sizes("parts"):
        pieces = name.split("/")
        is_digest = len(pieces) > 3 and len(pieces[2]) == 16 and set(pieces[2]) <= set("0123456789abcdef")
        if is_digest and "/".join(pieces[:3]) not in homes:
            found.append(name)
    return found


@contextmanager
def scratch_folder(url: UrlPath) -> Iterator[Path]:
    """A folder beside the part cache for the time of the block; errors about it name the URL."""
    with tmp_path(part_cache.folder(), "scratch") as folder:
        try:
            folder.mkdir()
            yield folder
        except VlsiCacheError as error:
            about_the_store(error, folder, url)
            raise


class RemoteWriter(CacheWriter):
    """The writing side of a cache on an object store: each part is made in a local folder, uploaded, and removed."""

    def __init__(self, objects: Objects, folder: Path, header: CacheHeader, vocab_order: VocabOrder) -> None:
        super().__init__(folder, header, vocab_order)
        self.url, self._objects = objects.url, objects
        self._clean = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @classmethod
    def begin(
        cls, url: UrlPath, header: CacheHeader, vocab_order: OrderOrMaker, token_texts: TokenTexts
    ) -> "RemoteWriter":
        """Create the cache at `url`, or continue the one that is there; raises what a writer of a folder raises."""
        objects, folder = open_objects(url), new_tmp(part_cache.folder(), "write")
        remove_dead_tmp(part_cache.folder())  # of writers that were killed
        try:
            folder.mkdir()
            is_lost = _has_lost_vocab(objects)
            if is_lost:  # `repair` has moved it away; made again below, if it comes out the same
                (folder / HEADER_NAME).write_bytes(objects.get(HEADER_NAME).data)
            elif not download_start(objects, folder):
                check_url(url)
                publish_header(folder, header, vocab_order, token_texts)
                if not upload_start(objects, folder):  # another process was faster, and its table counts
                    shutil.rmtree(folder)
                    folder.mkdir()
                    download_start(objects, folder)
            stored, order = publish_header(folder, header, vocab_order, token_texts)
            if is_lost:
                upload_start(objects, folder)
            (folder / "parts").mkdir(exist_ok=True)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, VlsiCacheError):
                about_the_store(error, folder, url)
            raise
        return cls(objects, folder, stored, order)

    def done_parts(self) -> set[int]:
        return set(committed_parts(self._objects))

    def has_part(self, index: int) -> bool:
        try:
            self._objects.get(f"parts/{part_name(index)}/{RECORD_NAME}")
        except FileNotFoundError:
            return False
        return True

    def has_table(self) -> bool:
        return TABLE_NAME in self._objects.sizes()

    def _publish(self, tmp: Path, index: int) -> bool:
        """Upload the finished folder `tmp`; its last object is the commit."""
        os.utime(self.path)  # a folder that nobody has touched for a day counts as abandoned
        target = part_dir(self.path, index)
        tmp.rename(target)
        try:
            return upload_part(self._objects, self.path, self.header, index)
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def finish(self) -> bool:
        is_done = finish_upload(self._objects, self.header)
        if is_done:
            self._clean()
        return is_done
