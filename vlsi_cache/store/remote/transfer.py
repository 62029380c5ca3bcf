"""Copying a whole cache to an object store, or from one: what is there already is not moved again, all is checked."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlsi_cache import io
from vlsi_cache.errors import CacheIncompleteError, SpecError
from vlsi_cache.progress import Bar
from vlsi_cache.store import table
from vlsi_cache.store.files import (
    check_free_space,
    disk_full_is_an_error,
    load_header,
    load_part_record,
    publish_dir,
    publish_new_file,
    tmp_path,
    write_durable,
)
from vlsi_cache.store.format import (
    HEADER_NAME,
    RECORD_NAME,
    TABLE_NAME,
    VOCAB_NAME,
    CacheHeader,
    list_parts,
    part_dir,
    part_name,
)
from vlsi_cache.store.header import check_root, compare_headers
from vlsi_cache.store.location import UrlPath, place_of
from vlsi_cache.store.reader import Cache, open
from vlsi_cache.store.vocab_order import complete_copies

from .hub import HubObjects
from .mirror import committed_parts
from .objects import Objects, open_objects
from .upload import check_url, download_files, download_start, finish_upload, scratch_folder, upload_part, upload_start


@dataclass(frozen=True)
class Transfer:
    """What `push` or `pull` did: parts and bytes that were moved, and parts that were there before."""

    source: Path
    target: Path
    num_parts: int
    parts_before: int
    moved_bytes: int


def push(cache: str | os.PathLike[str], url: str | os.PathLike[str]) -> Transfer:
    """Copy a complete local cache to an object store, or into a data set of the Hugging Face hub (with a card; a new
    one is private); run again after a crash, it continues.

    Every file is compared with its hash on the way. Raises FingerprintMismatchError when another cache is there.
    """
    target, source = place_of(url, "url"), open(place_of(cache))
    if isinstance(source.path, UrlPath) or not isinstance(target, UrlPath):
        raise SpecError("push copies a local cache to an object store: vlsi-cache push CACHE s3://BUCKET/NAME")
    objects, root, header = open_objects(target), source.path, source.header
    if isinstance(objects, HubObjects):
        return _push_to_hub(source, objects)
    check_url(target)
    if not upload_start(objects, root):
        _refuse_other(objects, header)
    there, sizes = committed_parts(objects), source.bytes_by_array()
    before = [index for index in source.parts if index in there]
    moved = 0
    with Bar("push", unit="B", total=sum(sizes.values()), scaled=True, delay=2) as bar:
        for index in source.parts:
            record_bytes = (part_dir(root, index) / RECORD_NAME).stat().st_size
            if index in there:
                files = load_part_record(root, header, index).files.values()
                bar.update(record_bytes + sum(file.size for file in files))
                continue
            upload_part(objects, root, header, index, bar.update)
            bar.update(record_bytes)
            moved += record_bytes + sum(file.size for file in load_part_record(root, header, index).files.values())
    if len(before) < len(source.parts) or TABLE_NAME not in objects.sizes():
        finish_upload(objects, header)
    return Transfer(root, target, len(source.parts), len(before), moved)


def _push_to_hub(source: Cache, hub: HubObjects) -> Transfer:
    from .hub_push import make_dataset, push_parts

    make_dataset(hub)
    if HEADER_NAME in hub.sizes():
        _refuse_other(hub, source.header)
    there = set(committed_parts(hub)) & set(source.parts)
    moved: list[int] = []
    with Bar("push", unit="B", total=sum(source.bytes_by_array().values()), scaled=True, delay=2) as bar:

        def tell(num_bytes: int) -> None:
            moved.append(num_bytes)
            bar.update(num_bytes)

        push_parts(source, hub, there, tell)
    return Transfer(source.path, hub.url, len(source.parts), len(there), sum(moved))


def _refuse_other(objects: Objects, ours: CacheHeader) -> None:
    """Raise FingerprintMismatchError when the cache on the store is another one, its vocabulary order included."""
    with scratch_folder(objects.url) as folder:
        (folder / HEADER_NAME).write_bytes(objects.get(HEADER_NAME).data)
        compare_headers(objects.url, load_header(folder), ours, without=())


def pull(
    url: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layers: Sequence[int | str] | None = None,
    samples: Sequence[str] | str | os.PathLike[str] | None = None,
) -> Transfer:
    """Copy a complete cache from an object store to the folder `out`; run again after a crash, it continues.

    Every file is compared with its hash. With `layers` or `samples` (ids, or a file with one a line) only what is asked
    for is fetched, and `out` is a cache that was pruned to it. Raises FingerprintMismatchError when another cache is
    there.
    """
    source, target = place_of(url, "url"), place_of(out, "out")
    if not isinstance(source, UrlPath) or isinstance(target, UrlPath):
        raise SpecError("pull copies a cache from an object store to a folder: vlsi-cache pull s3://BUCKET/NAME CACHE")
    if layers is not None or samples is not None:
        return _pull_some(open(source), target, layers, samples)
    check_root(target)
    objects = open_objects(source)
    header = _begin(objects, target)
    there = committed_parts(objects)
    if missing := sorted(set(range(header.num_parts)) - set(there)):
        what = f"`{source}` is not finished: {len(missing)} of {header.num_parts} parts are missing"
        raise CacheIncompleteError(what, file=source)
    before = [index for index in list_parts(target) if index in there]
    sizes = objects.sizes("parts")
    moved = 0
    with Bar("pull", unit="B", total=sum(sizes.values()), scaled=True, delay=2) as bar:
        for index in there:
            if index in before:
                bar.update(sum(size for name, size in sizes.items() if name.split("/")[1] == part_name(index)))
            else:
                moved += _pull_part(objects, header, target, index, bar)
    if len(before) < len(there) or not (target / TABLE_NAME).is_file():
        table.write_table(target, header)
    return Transfer(source, target, len(there), len(before), moved)


def _pull_some(
    cache: Cache,
    out: Path,
    layers: Sequence[int | str] | None,
    samples: "Sequence[str] | str | os.PathLike[str] | None",
) -> Transfer:
    from vlsi_cache.store.derive.prune import prune

    small = prune(cache, out, layers=layers, samples=samples)
    return Transfer(cache.path, out, len(small.parts), 0, sum(small.bytes_by_array().values()))


def _begin(objects: Objects, target: Path) -> CacheHeader:
    """`vocab/` and `cache.json` in their places; the header of the cache there."""
    with scratch_folder(objects.url) as folder:
        if not download_start(objects, folder):
            open(objects.url)  # says what is there instead
        wanted = load_header(folder)
        if (target / HEADER_NAME).exists():
            compare_headers(target, load_header(target), wanted, without=())
        else:
            target.mkdir(parents=True, exist_ok=True)
            with disk_full_is_an_error(target, 0):
                with tmp_path(target, VOCAB_NAME) as tmp:
                    shutil.copytree(folder / VOCAB_NAME, tmp)
                    io.fsync_tree(tmp)
                    publish_dir(tmp, target / VOCAB_NAME)
                with tmp_path(target, HEADER_NAME) as tmp:
                    write_durable(tmp, (folder / HEADER_NAME).read_bytes())
                    publish_new_file(tmp, target / HEADER_NAME)
    complete_copies(target, wanted)
    (target / "parts").mkdir(exist_ok=True)
    return wanted


def _pull_part(objects: Objects, header: CacheHeader, root: Path, index: int, bar: Bar) -> int:
    """Commit part `index` in the folder `root` as it is on the store; its bytes."""
    key = f"parts/{part_name(index)}"
    text = objects.get(f"{key}/{RECORD_NAME}").data
    with scratch_folder(objects.url) as folder:  # the record is checked where errors name the store
        part_dir(folder, index).mkdir(parents=True)
        (part_dir(folder, index) / RECORD_NAME).write_bytes(text)
        record = load_part_record(folder, header, index)
    num_bytes = len(text) + sum(file.size for file in record.files.values())
    check_free_space(root, num_bytes)
    with tmp_path(root, f"{index:06d}", ".zarr") as tmp, disk_full_is_an_error(root, num_bytes):
        download_files(objects, key, tmp, record.files, bar.update)
        write_durable(tmp / RECORD_NAME, text)
        bar.update(len(text))
        io.fsync_tree(tmp)
        publish_dir(tmp, part_dir(root, index))
    return num_bytes
