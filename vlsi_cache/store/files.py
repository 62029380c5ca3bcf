"""Reading the records of a cache, and checking that its files are the ones they speak of."""

import os
import stat
from pathlib import Path

import xxhash

from vlsi_cache.errors import CacheCorruptError, command_line

from .layout import (
    FORMAT_VERSION,
    HEADER_NAME,
    RECORD_NAME,
    CacheHeader,
    FileRecord,
    PartRecord,
    as_record,
    part_dir,
    unseal_json,
)
from .schema import part_file_names, part_specs, vocab_specs


def load_header(root: Path) -> CacheHeader:
    """Read and check `cache.json`; a newer format is refused before anything else is looked at."""
    path = root / HEADER_NAME
    try:
        value = unseal_json(path.read_bytes(), path)
    except CacheCorruptError as error:
        raise CacheCorruptError(f"{error}; restore this file from a copy of the cache") from error
    version = value.get("format_version")
    if value.get("format") != "vlsi-cache":
        raise CacheCorruptError(f"`{path}` is not the header of a vlsi-cache: `format` is {value.get('format')!r}")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CacheCorruptError(
            f"`{path}`: format version {version}, this program reads 1 to {FORMAT_VERSION}; upgrade vlsi-cache"
        )
    header = as_record(CacheHeader, value, path)
    # Names from a file are only ever compared with the names a table has, so none of them can lead elsewhere.
    heads, num_text = (len(header.layers), header.num_head_ranks), None if header.text_xxh3 is None else 1
    foreign = set(header.vocab_files) - part_file_names(vocab_specs(header.v_real, heads, num_text))
    if foreign:
        raise CacheCorruptError(f"`{path}`: `vocab_files` names what no table has: {sorted(foreign)[:4]}")
    return header


def load_part_record(root: Path, header: CacheHeader, index: int) -> PartRecord:
    """Read `part.json` of part `index` and check that it is this part, of this cache, with just the files of one."""
    path = part_dir(root, index) / RECORD_NAME
    refuse_elsewhere(root, path)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CacheCorruptError(f"`{path}` is missing; run: {command_line('repair', root)}") from None
    try:
        record = as_record(PartRecord, unseal_json(content, path), path)
    except CacheCorruptError as error:
        raise advised(error, root) from error
    if record.cache_digest != header.digest:
        raise CacheCorruptError(
            f"`{path}`: the part belongs to another cache (digest {record.cache_digest[:12]}, this cache is "
            f"{header.digest[:12]}); run: {command_line('repair', root)}"
        )
    if record.index != index:
        raise CacheCorruptError(
            f"`{path}`: this is part {record.index} under the name of part {index}; run: {command_line('repair', root)}"
        )
    # Names from a file are only ever compared with the names a part has, so none of them can lead elsewhere.
    wrong = part_file_names(part_specs(header, record)) ^ set(record.files)
    if wrong:
        raise CacheCorruptError(
            f"`{path}`: files listed and files expected differ: {sorted(wrong)[:4]}; "
            f"run: {command_line('repair', root)}"
        )
    return record


def check_part_files(root: Path, index: int, record: PartRecord) -> None:
    """Every file of the part is a plain file of the recorded size inside the cache; nothing is read."""
    folder = str(part_dir(root, index))
    known = set()
    for name, file in record.files.items():
        for parent in _parents(name):
            if parent not in known and not _is_plain_dir(f"{folder}/{parent}"):
                raise CacheCorruptError(
                    f"`{folder}/{parent}` is missing or a symbolic link; a cache holds plain files only; "
                    f"run: {command_line('repair', root)}"
                )
            known.add(parent)
        check_size(root, f"{folder}/{name}", file.size)


def check_metadata(folder: Path, record: PartRecord) -> None:
    """The `zarr.json` files are those that were written. Our reader does not depend on them, others do."""
    for name, file in record.files.items():
        if name.endswith("zarr.json") and (found := hash_file(folder / name)) != file:
            raise CacheCorruptError(f"`{folder / name}`: xxh3 is {found.xxh3}, part.json says {file.xxh3}")


def _parents(name: str) -> list[str]:
    """`ids/c/0/0/0` -> `ids`, `ids/c`, ..."""
    pieces = name.split("/")[:-1]
    return ["/".join(pieces[: i + 1]) for i in range(len(pieces))]


def _is_plain_dir(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def check_size(root: Path, path: str, expected: int) -> None:
    """Compare the size of `path` with its record, without reading it."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise CacheCorruptError(f"`{path}` is missing; run: {command_line('repair', root)}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size != expected:
        raise CacheCorruptError(
            f"`{path}`: {status.st_size} bytes, part.json says {expected}; "
            f"run: {command_line('verify', root)}, then {command_line('repair', root)}"
        )


def refuse_elsewhere(root: Path, path: Path) -> None:
    """Raise CacheCorruptError when `path` is reached through a symbolic link."""
    if os.path.realpath(path) != os.path.join(os.path.realpath(root), path.relative_to(root)):
        raise CacheCorruptError(f"`{path}` is or lies behind a symbolic link; a cache holds plain files only")


def advised(error: CacheCorruptError, root: Path) -> CacheCorruptError:
    """The same error with what to do about it, unless it says so already."""
    return error if "; run: " in str(error) else CacheCorruptError(f"{error}; run: {command_line('repair', root)}")


def hash_file(path: Path) -> FileRecord:
    """Size and xxh3-64 of a file."""
    digest = xxhash.xxh3_64()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return FileRecord(size=size, xxh3=digest.hexdigest())
