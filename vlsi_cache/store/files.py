"""How a file becomes part of a cache, and how it is read and checked again.

What is written is complete and on the disk first, then one rename gives it its place. Nothing here locks. Whoever
renames first has won; the loser removes what it wrote and says nothing.
"""

import contextlib
import errno
import math
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from vlsi_cache.errors import CacheCorruptError, DiskFullError, command_line
from vlsi_cache.io import checksum, fsync_dir, is_disk_full, name_file, remove

from .arrays import (
    SUMMARY_ARRAYS,
    ArraySpec,
    data_file_name,
    part_file_names,
    part_specs,
    shard_index_bytes,
    vocab_specs,
)
from .format import (
    FORMAT_VERSION,
    HEADER_NAME,
    MAX_SHRINK,
    RECORD_NAME,
    CacheHeader,
    FileRecord,
    PartRecord,
    as_record,
    part_dir,
    shown,
    unseal_json,
)
from .location import UrlPath

RESERVE_BYTES = 1 << 20  # metadata, directories and the commit record of a part
STALE_S = 86400.0  # an unfinished file of another host counts as abandoned after this

_TMP_NAME = re.compile(r"^(?P<what>.+)\.(?P<host>[A-Za-z0-9_-]+)\.(?P<pid>\d+)\.(?P<uuid>[0-9a-f]{12})(\.[a-z]+)?$")
_live: set[str] = set()
FROM_A_COPY = "restore this file from a copy of the cache"
DAMAGED_REMOTE = (
    "what lies on the store is damaged: `vlsi-cache repair URL` moves it away (on the hub delete it there); then build "
    "or push the cache again, it continues"
)

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


def host_name() -> str:
    """Host and PID namespace: containers may share the one and then must not judge each other's process ids."""
    try:
        namespace = "-" + re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        namespace = ""
    return (re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname()) or "host") + namespace


def _is_dead(path: Path) -> bool:
    """Whether what lies in `tmp/` is of an ended process of this host, or a day old; names that are not ours stay."""
    match = _TMP_NAME.match(path.name)
    if match is None:
        return False
    host, pid = match["host"], int(match["pid"])
    if host == host_name() and pid == os.getpid():
        dead = path.name not in _live
    else:
        dead = host == host_name() and not _is_alive(pid)
    try:
        return dead or time.time() - path.stat().st_mtime > STALE_S
    except OSError:
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextlib.contextmanager
def tmp_path(root: Path, what: str, suffix: str = "") -> Iterator[Path]:
    """A name of our own in `tmp/`; whatever is left there when the block ends is removed."""
    path = new_tmp(root, what, suffix)
    try:
        yield path
    finally:
        remove(path)
        _live.discard(path.name)


def new_tmp(root: Path, what: str, suffix: str = "") -> Path:
    """A name of our own in `tmp/`, for as long as this process lives; what is there then is garbage."""
    (root / "tmp").mkdir(parents=True, exist_ok=True)
    name = f"{what}.{host_name()}.{os.getpid()}.{uuid.uuid4().hex[:12]}{suffix}"
    _live.add(name)
    return root / "tmp" / name


def list_tmp(root: Path) -> tuple[list[str], list[str]]:
    """(dead, perhaps alive) names in `tmp/`: dead are those of ended processes of this host, and any a day old."""
    names = sorted(os.listdir(root / "tmp")) if (root / "tmp").is_dir() else []
    dead = [name for name in names if _is_dead(root / "tmp" / name)]
    return dead, [name for name in names if name not in dead]


def remove_dead_tmp(root: Path) -> list[str]:
    """Remove what dead processes left in `tmp/`; the names removed."""
    dead, _ = list_tmp(root)
    for name in dead:
        remove(root / "tmp" / name)
    return dead


def write_durable(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def publish_dir(tmp: Path, target: Path) -> bool:
    """Rename a finished folder to its place; False if somebody else was first."""
    try:
        os.rename(tmp, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    fsync_dir(target.parent)
    return True


def publish_new_file(tmp: Path, target: Path) -> bool:
    """Give a finished file its name unless the name is taken; False if somebody else was first."""
    try:
        os.link(tmp, target)
    except FileExistsError:
        return False
    except OSError:  # no hard links on this file system: the next best thing, and the caller compares afterwards
        if target.exists():
            return False
        os.rename(tmp, target)
    fsync_dir(target.parent)
    return True


def replace_file(root: Path, target: Path, content: bytes) -> None:
    """Write a derived file atomically, over an old one if there is one."""
    with tmp_path(root, target.name) as tmp, disk_full_is_an_error(root, len(content)):
        write_durable(tmp, content)
        os.replace(tmp, target)
        fsync_dir(target.parent)


def check_free_space(root: Path, need_bytes: int) -> None:
    """Refuse to start writing what cannot fit."""
    need_bytes += RESERVE_BYTES
    if (free := shutil.disk_usage(root).free) < need_bytes:
        raise disk_full(root, need_bytes, free)


def disk_full(root: Path, need_bytes: int, free_bytes: int) -> DiskFullError:
    missing = max(need_bytes - free_bytes, 1)
    return DiskFullError(
        f"the disk of `{root}` is full: {need_bytes} bytes ({need_bytes / 2**20:.1f} MiB) are needed for the next "
        f"write, {free_bytes} are free, {missing} ({missing / 2**20:.1f} MiB) are missing; nothing committed is lost: "
        "free some space and run the same command again, it continues"
    )


@contextlib.contextmanager
def disk_full_is_an_error(root: Path, need_bytes: int) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into DiskFullError; another error of a write names at least `root`."""
    try:
        yield
    except OSError as error:
        name_file(error, root)
        if is_disk_full(error) and not isinstance(error, DiskFullError):
            raise disk_full(root, need_bytes + RESERVE_BYTES, shutil.disk_usage(root).free) from error
        raise


def repair_hint(root: Path) -> str:
    """What to do about a damaged cache."""
    if isinstance(root, UrlPath):
        return DAMAGED_REMOTE
    return f"run: {command_line('repair', root)}"


@contextlib.contextmanager
def hints_at_repair(root: Path) -> Iterator[None]:
    """Let errors about damage that comes up say how it is repaired, unless they know better."""
    try:
        yield
    except CacheCorruptError as error:
        error.hint = error.hint or repair_hint(root)
        raise


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
        raise CacheCorruptError.at(path, f" is {what_it_is(mode)}, and must be a file")


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
        what = f" is not the header of a vlsi-cache: `format` is {shown(value.get('format'))}"
        raise CacheCorruptError.at(path, what)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        what = f": format version {shown(version)}, this program reads 1 to {FORMAT_VERSION}; upgrade vlsi-cache"
        raise CacheCorruptError.at(path, what)
    header = as_record(CacheHeader, value, path)
    # Names from a file are only ever compared with the names a table has, so none of them can lead elsewhere.
    heads, num_text = (len(header.layers), header.num_head_ranks), None if header.text_xxh3 is None else 1
    specs = vocab_specs(header.vocab_size, heads, num_text, 1)
    foreign = set(header.vocab_files) - part_file_names(specs)
    if foreign:
        raise CacheCorruptError.at(path, f": `vocab_files` names what no table has: {shown(sorted(foreign)[:4])}")
    return header


def load_part_record(root: Path, header: CacheHeader, index: int) -> PartRecord:
    """Read `part.json` of part `index` and check that it is this part, of this cache, with just the files of one.

    The counts it claims are held against each other and against the sizes of the files it lists, before anything is
    allocated for them.
    """
    path = part_dir(root, index) / RECORD_NAME
    refuse_elsewhere(root, path)
    with hints_at_repair(root):
        try:
            record = as_record(PartRecord, unseal_json(read_file(path), path), path)
        except (FileNotFoundError, NotADirectoryError):
            raise CacheCorruptError.at(path, " is missing") from None
        if problem := _record_problem(header, index, record):
            raise CacheCorruptError.at(path, f": {problem}")
    return record


def _record_problem(header: CacheHeader, index: int, record: PartRecord) -> str:
    """What contradicts the header, the other counts, or the sizes of the files; empty when nothing does."""
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
    for name, spec in specs.items():
        num_bytes = spec.size_bytes
        if num_bytes and num_bytes > MAX_SHRINK * (size := record.files[data_file_name(name, spec)].size):
            return f"`{name}` would be {num_bytes} bytes, which its file of {size} bytes cannot hold"
    return _chunks_problem(record, specs)


def _chunks_problem(record: PartRecord, specs: dict[str, ArraySpec]) -> str:
    """What contradicts the files in `chunk_bytes`, which may be missing."""
    sharded = {name: spec for name, spec in specs.items() if spec.sharded and spec.size_bytes}
    if record.chunk_bytes and record.chunk_bytes.keys() != sharded.keys():
        return f"`chunk_bytes` must name {shown(sorted(sharded))}, got {shown(sorted(record.chunk_bytes))}"
    for name, sizes in record.chunk_bytes.items():
        num_chunks, size = math.prod(sharded[name].grid), record.files[data_file_name(name, sharded[name])].size
        if len(sizes) != num_chunks or sum(sizes) + shard_index_bytes(sharded[name]) != size:
            return f"`chunk_bytes`: {len(sizes)} chunks of `{name}` with {sum(sizes)} bytes are not its file of {size}"
    return ""


def check_part_files(root: Path, index: int, record: PartRecord) -> None:
    """Every file of the part is a plain file of the recorded size inside the cache; nothing is read."""
    folder = str(part_dir(root, index))
    known = set()
    for name, file in record.files.items():
        for parent in accumulate(name.split("/")[:-1], "{}/{}".format):  # of `ids/c/0/0/0`: `ids`, `ids/c`, ...
            if parent not in known and not _is_plain_dir(path := f"{folder}/{parent}"):
                what = " is missing or a symbolic link; a cache holds plain files only"
                raise CacheCorruptError.at(path, what, hint=repair_hint(root))
            known.add(parent)
        path = f"{folder}/{name}"
        if problem := size_problem(path, file.size):
            hint = f"run: {command_line('verify', root)}, then {command_line('repair', root)}"
            raise CacheCorruptError.at(path, problem, hint=hint)


def size_problem(path: str, expected: int) -> str:
    """What is wrong with a file of the cache by its kind and size, without reading it; empty when nothing is."""
    return status_problem(status_of(path), expected)


def status_of(path: str) -> os.stat_result | None:
    """That of the file or the link itself; None when it is missing."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def status_problem(status: os.stat_result | None, expected: int) -> str:
    """What is wrong with a file of this status that must have `expected` bytes."""
    if status is None:
        return " is missing"
    if not stat.S_ISREG(status.st_mode):
        return f" is {what_it_is(status.st_mode)}; a cache holds plain files only"
    return "" if status.st_size == expected else f": {status.st_size} bytes, part.json says {expected}"


def check_metadata(folder: Path, record: PartRecord) -> None:
    """The `zarr.json` files are those that were written. Our reader does not depend on them, others do."""
    for name, file in record.files.items():
        if name.endswith("zarr.json") and (found := hash_file(folder / name)) != file:
            raise CacheCorruptError.at(folder / name, f": xxh3 is {found.xxh3}, part.json says {file.xxh3}")


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
            raise CacheCorruptError.at(path, " is or lies behind a symbolic link; a cache holds plain files only")
        piece = os.path.dirname(piece)


def hash_file(path: Path) -> FileRecord:
    """Size and xxh3-64 of a file."""
    refuse_special(path)
    return FileRecord(**checksum(path))
