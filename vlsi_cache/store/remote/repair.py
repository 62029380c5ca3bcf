"""Mending a cache on an object store: what is damaged moves to `quarantine/` there, and the next build makes it again.

A store knows no rename: an object is copied and the old one deleted. A part stops being one when its commit record is
replaced by a mark of ours, on the condition that it is still the record that was checked. The mark holds the name while
the part's files move; it goes last, and only then can a build commit the part anew.
"""

import os
import uuid
from concurrent.futures import ThreadPoolExecutor

from vlsi_cache.errors import SpecError
from vlsi_cache.store.check import RepairReport, check_remote
from vlsi_cache.store.files import tmp_path
from vlsi_cache.store.format import RECORD_NAME, TABLE_NAME, VOCAB_NAME, part_name
from vlsi_cache.store.location import UrlPath

from . import part_cache
from .mirror import Mirror, committed_parts
from .objects import BucketObjects, changed, open_objects
from .upload import NUM_UPLOADS, records_folder, unnamed_files, write_remote_table

QUARANTINE = "quarantine"


def bucket_of(url: UrlPath) -> BucketObjects:
    """The objects at a URL, which can be written and deleted; SpecError for a data set of the hub."""
    objects = open_objects(url)
    if not isinstance(objects, BucketObjects):
        hint = f"repair or build it in a folder, and push that: vlsi-cache push CACHE {url}"
        raise SpecError(f"`{url}` cannot be repaired: a data set of the hub is only read", hint=hint)
    return objects


def repair_remote(url: UrlPath, *, yes: bool = False) -> RepairReport:
    """`repair` of a cache on an object store; every byte of it is read."""
    objects = bucket_of(url)
    names = objects.sizes()
    if names and all(name.startswith(f"{VOCAB_NAME}/") for name in names):
        return RepairReport(url, interrupted_start=True)
    with tmp_path(part_cache.folder(), "repair") as folder:
        mirror = Mirror(url, within=folder)
        header = mirror.header  # raises where it is damaged: nothing can be judged without it
        found = check_remote(mirror)
        records = {index: mirror.record_etag(index) for index in found.bad_parts}
    there = committed_parts(objects)
    records |= {index: None for index in there if index >= header.num_parts}  # of no part of this cache
    if records and TABLE_NAME in names:  # which says that all parts are there; readers believe it
        objects.delete([TABLE_NAME])
    for index, etag in sorted(records.items()):
        _move_part(objects, index, etag)
    quarantined = [f"parts/{part_name(index)}" for index in sorted(records)]
    if any(problem.file.split("/")[0] == VOCAB_NAME for problem in found.problems):
        _move(objects, VOCAB_NAME)
        quarantined.append(VOCAB_NAME)
    missing = sorted(set(range(header.num_parts)) - (set(there) - set(records)))
    rebuild = not missing and (bool(records) or any(problem.file == TABLE_NAME for problem in found.problems))
    removed = [TABLE_NAME] if records and TABLE_NAME in names and not rebuild else []
    left: list[str] = []
    if not missing:  # before, somebody may be uploading what no record names yet
        with records_folder(objects) as folder:
            if rebuild:
                write_remote_table(objects, header, folder)
            left = unnamed_files(objects, header, folder)
    if yes:
        objects.delete(left)
        removed, left = [*removed, *_folders(left)], []
    return RepairReport(
        url, quarantined, removed=removed, left=_folders(left), missing_parts=missing, table_rebuilt=rebuild
    )


def sweep_remote(url: UrlPath) -> list[str]:
    """Delete files that no record names, of a cache whose parts are all there; their folders."""
    objects = bucket_of(url)
    with records_folder(objects) as folder:
        garbage = unnamed_files(objects, Mirror(url).header, folder)
    objects.delete(garbage)
    return _folders(garbage)


def _folders(names: list[str]) -> list[str]:
    return sorted({"/".join(name.split("/")[:3]) for name in names})


def _move_part(objects: BucketObjects, index: int, etag: str | None) -> None:
    """Move a part to `quarantine/`; CacheCorruptError where its record is not the one with this ETag any more."""
    key = f"parts/{part_name(index)}"
    record = f"{key}/{RECORD_NAME}"
    found = objects.get(record, etag=etag)
    home = _free_name(objects, part_name(index))
    objects.put(f"{home}/{RECORD_NAME}", found.data)
    mark = f"moved to {home} by vlsi-cache repair, {os.getpid()} {uuid.uuid4().hex}\n"
    if not objects.replace(record, mark.encode(), etag=found.etag):
        objects.delete([f"{home}/{RECORD_NAME}"])
        raise changed(objects.url / record)
    _move(objects, key, home, without=record)
    objects.delete([record])


def _move(objects: BucketObjects, key: str, home: str | None = None, *, without: str = "") -> None:
    """Copy all objects below `key` to `quarantine/`, and delete them when all have arrived."""
    home = home or _free_name(objects, key)
    names = [name for name in objects.sizes(key) if name != without]
    with ThreadPoolExecutor(NUM_UPLOADS, thread_name_prefix="vlsi-cache-repair") as pool:
        list(pool.map(lambda name: objects.copy(name, f"{home}{name.removeprefix(key)}"), names))
    objects.delete(names)


def _free_name(objects: BucketObjects, name: str) -> str:
    """A folder of `quarantine/` that is not taken."""
    taken = {one.split("/")[1] for one in objects.sizes(QUARANTINE)}
    number, wanted = 0, name
    while wanted in taken:
        number += 1
        wanted = f"{name}.{number}"
    return f"{QUARANTINE}/{wanted}"
