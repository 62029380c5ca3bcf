"""Reading the records of a cache, and checking that its files are the ones they speak of."""

import os
import stat
from pathlib import Path

from vlsi_cache.errors import CacheCorruptError, command_line
from vlsi_cache.io import checksum

from .format import (
    FORMAT_VERSION,
    HEADER_NAME,
    MAX_SHRINK,
    RECORD_NAME,
    SUMMARY_ARRAYS,
    ArraySpec,
    CacheHeader,
    FileRecord,
    PartRecord,
    as_record,
    data_file_name,
    part_dir,
    part_file_names,
    part_specs,
    shown,
    unseal_json,
    vocab_specs,
)

FROM_A_COPY = "restore this file from a copy of the cache"

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


def repair_hint(root: Path) -> str:
    """What to do about a damaged cache."""
    return f"run: {command_line('repair', root)}"


def what_it_is(mode: int) -> str:
    """`a named pipe`: what stands where a file was expected."""
    return KINDS.get(stat.S_IFMT(mode), "no file")


def refuse_special(path: Path) -> None:
    """CacheCorruptError unless `path` is a regular file or a link to one, or is missing (the opening says so).

    Opening a named pipe would wait for ever, and opening a device can do anything: so it is looked at before.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise CacheCorruptError(f"`{path}` is {what_it_is(mode)}, and must be a file", file=path)


def read_file(path: Path) -> bytes:
    """The content of a regular file."""
    refuse_special(path)
    return path.read_bytes()


def load_header(root: Path) -> CacheHeader:
    """Read and check `cache.json`; a newer format is refused before anything else is looked at."""
    path = root / HEADER_NAME
    try:
        value = unseal_json(read_file(path), path)
    except CacheCorruptError as error:
        error.hint = FROM_A_COPY
        raise
    version = value.get("format_version")
    if value.get("format") != "vlsi-cache":
        what = f"`{path}` is not the header of a vlsi-cache: `format` is {shown(value.get('format'))}"
        raise CacheCorruptError(what, file=path)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CacheCorruptError(
            f"`{path}`: format version {shown(version)}, this program reads 1 to {FORMAT_VERSION}; upgrade vlsi-cache",
            file=path,
        )
    header = as_record(CacheHeader, value, path)
    # Names from a file are only ever compared with the names a table has, so none of them can lead elsewhere.
    heads, num_text = (len(header.layers), header.num_head_ranks), None if header.text_xxh3 is None else 1
    specs = vocab_specs(header.vocab_size, heads, num_text)
    foreign = set(header.vocab_files) - part_file_names(specs)
    if foreign:
        what = f"`{path}`: `vocab_files` names what no table has: {shown(sorted(foreign)[:4])}"
        raise CacheCorruptError(what, file=path)
    return header


def load_part_record(root: Path, header: CacheHeader, index: int) -> PartRecord:
    """Read `part.json` of part `index` and check that it is this part, of this cache, with just the files of one.

    The counts it claims are held against each other and against the sizes of the files it lists, before anything is
    allocated for them.
    """
    path = part_dir(root, index) / RECORD_NAME
    refuse_elsewhere(root, path)
    try:
        content = read_file(path)
        record = as_record(PartRecord, unseal_json(content, path), path)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheCorruptError(f"`{path}` is missing", file=path, hint=repair_hint(root)) from None
    except CacheCorruptError as error:
        error.hint = error.hint or repair_hint(root)
        raise
    if problem := _record_problem(header, index, record):
        raise CacheCorruptError(f"`{path}`: {problem}", file=path, hint=repair_hint(root))
    return record


def _record_problem(header: CacheHeader, index: int, record: PartRecord) -> str:
    if record.cache_digest != header.digest:
        return (
            f"the part belongs to another cache (digest {record.cache_digest[:12]}, this cache is {header.digest[:12]})"
        )
    if record.format_version != header.format_version:
        return f"format version {shown(record.format_version)}, cache.json says {header.format_version}"
    if record.index != index:
        return f"this is part {shown(record.index)} under the name of part {index}"
    most = record.num_tokens * sum(header.top_k)
    if record.num_entries > most or (record.num_entries != most and not header.is_ragged):
        return f"`num_entries` is {record.num_entries}, {record.num_tokens} tokens have {most}"
    lengths = {name: len(means) for name, means in record.summary.items()}
    if lengths != dict.fromkeys(SUMMARY_ARRAYS, len(header.layers)):
        return f"`summary` has {shown(lengths)}, and must have a mean for each of {len(header.layers)} layers"
    # Names from a file are only ever compared with the names a part has, so none of them can lead elsewhere.
    specs = part_specs(header, record)
    wrong = part_file_names(specs) ^ set(record.files)
    if wrong:
        return f"files listed and files expected differ: {shown(sorted(wrong)[:4])}"
    return _size_problem(specs, record.files)


def _size_problem(specs: dict[str, ArraySpec], files: dict[str, FileRecord]) -> str:
    """Whether an array is said to be larger than its file can hold."""
    for name, spec in specs.items():
        num_bytes = spec.size_bytes
        if num_bytes and num_bytes > MAX_SHRINK * (size := files[data_file_name(name, spec)].size):
            return f"`{name}` would be {num_bytes} bytes, which its file of {size} bytes cannot hold"
    return ""


def check_part_files(root: Path, index: int, record: PartRecord) -> None:
    """Every file of the part is a plain file of the recorded size inside the cache; nothing is read."""
    folder = str(part_dir(root, index))
    known = set()
    for name, file in record.files.items():
        for parent in _parents(name):
            if parent not in known and not _is_plain_dir(path := f"{folder}/{parent}"):
                what = f"`{path}` is missing or a symbolic link; a cache holds plain files only"
                raise CacheCorruptError(what, file=path, hint=repair_hint(root))
            known.add(parent)
        path = f"{folder}/{name}"
        if problem := size_problem(path, file.size):
            hint = f"run: {command_line('verify', root)}, then {command_line('repair', root)}"
            raise CacheCorruptError(f"`{path}`{problem}", file=path, hint=hint)


def size_problem(path: str, expected: int) -> str:
    """What is wrong with a file of the cache by its kind and size, without reading it; empty when nothing is."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return " is missing"
    if not stat.S_ISREG(status.st_mode):
        return f" is {what_it_is(status.st_mode)}; a cache holds plain files only"
    return "" if status.st_size == expected else f": {status.st_size} bytes, part.json says {expected}"


def check_metadata(folder: Path, record: PartRecord) -> None:
    """The `zarr.json` files are those that were written. Our reader does not depend on them, others do."""
    for name, file in record.files.items():
        if name.endswith("zarr.json") and (found := hash_file(folder / name)) != file:
            what = f"`{folder / name}`: xxh3 is {found.xxh3}, part.json says {file.xxh3}"
            raise CacheCorruptError(what, file=folder / name)


def _parents(name: str) -> list[str]:
    """`ids/c/0/0/0` -> `ids`, `ids/c`, ..."""
    pieces = name.split("/")[:-1]
    return ["/".join(pieces[: i + 1]) for i in range(len(pieces))]


def _is_plain_dir(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def refuse_elsewhere(root: Path, path: Path) -> None:
    """Raise CacheCorruptError when `path` is reached through a symbolic link."""
    piece, top = os.fspath(path), os.fspath(root)
    while len(piece) > len(top):
        if os.path.islink(piece):
            what = f"`{path}` is or lies behind a symbolic link; a cache holds plain files only"
            raise CacheCorruptError(what, file=path)
        piece = os.path.dirname(piece)


def hash_file(path: Path) -> FileRecord:
    """Size and xxh3-64 of a file."""
    refuse_special(path)
    return FileRecord(**checksum(path))
