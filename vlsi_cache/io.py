"""What is written appears whole, and only on local paths; where results go is checked before any work.

A new file or folder is written beside its place, flushed, and renamed. A folder takes the place of another in one step
where the kernel can exchange two names. Elsewhere the old one is first renamed to `.NAME.old-*`: after a kill between
the two renames `put_back` gives it its name again.
"""

import ctypes
import errno
import glob
import math
import os
import re
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from .errors import DiskFullError, SpecError

Item = TypeVar("Item")
Result = TypeVar("Result")
READ_BYTES = 1 << 22
FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
ASIDE = ".old-"  # in the name of a folder that another one is taking the place of
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux, as in renameat2(2)
# Libraries that write outside of Python raise errors of their own, with the number in the text.
_NUMBER_IN_TEXT = re.compile(r"\(os error (\d+)\)")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def url_problem(path: object, what: str) -> str:
    """Why `path` is refused if it is a URL such as s3://bucket/cache, which would become a local folder; else empty.

    `what` names the setting. Nothing is said of what is no path at all.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
    found = _URL.match(text) if isinstance(text, str) else None  # pathlib makes s3:/bucket of s3://bucket
    if found is None:
        return ""
    text = text if "://" in text else text.replace(":/", "://", 1)
    return (
        f"{what} `{text}` is a URL ({found[1]}), and only local paths are supported here: copy it to a local folder, "
        "or mount it there, and name that. A cache may also lie at s3://, gs://, az:// or hf://"
    )


def refuse_url(path: object, what: str) -> None:
    """Raise SpecError when `path` is a URL."""
    if problem := url_problem(path, what):
        raise SpecError(problem)


def fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_dir(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file and directory below and including `folder`."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync_file(Path(parent) / name)
        fsync_dir(Path(parent))


def hash_of(path: Path, algorithm: Callable[[], Any]) -> tuple[str, int]:
    """The hash of what is in a file, in hex, and its bytes; `algorithm` is xxhash.xxh3_64, hashlib.sha256 or alike."""
    digest, size = algorithm(), 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def checksum(path: Path) -> dict[str, Any]:
    """`size` and `xxh3` (64 bits, in hex) of what is in a file."""
    xxh3, size = hash_of(path, xxhash.xxh3_64)
    return {"size": size, "xxh3": xxh3}


def difference_from(recorded: Mapping[str, Any], path: Path) -> str:
    """What a file is, and what its record says it was when it was written; empty when that is the same."""
    try:
        size = path.stat().st_size
        found = checksum(path) if size == recorded["size"] else {"size": size}
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    key = "size" if size != recorded["size"] else "xxh3"
    unit = " bytes" if key == "size" else ""
    return "" if found[key] == recorded[key] else f"{key} is {found[key]}{unit}, and was {recorded[key]}{unit}"


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk or a quota was full, whichever library says so."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL_ERRORS
    found = _NUMBER_IN_TEXT.search(str(error))
    return found is not None and int(found[1]) in FULL_ERRORS


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A name beside `target` for a new file or folder, which takes the place of an old one once it is on the disk.

    At every moment the name is that of the old or of the new one (see `put_back`). What has been written goes if that
    fails; a kill leaves it as `.NAME.tmp-*`. Raises DiskFullError.
    """
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    put_back(target)
    try:
        yield temporary
        replace_durably(temporary, target)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, DiskFullError) or not is_disk_full(error):
            name_file(error, target)
            raise
        free = shutil.disk_usage(target.parent).free
        raise DiskFullError(
            f"the disk is full: `{target}` could not be written, {free} bytes ({free / 2**20:.1f} MiB) are free; what "
            "was finished before is kept: free some space and run the same command again, it continues"
        ) from error


def name_file(error: BaseException, path: Path) -> None:
    """Let what the system says of a write name the file: Python knows it where it opens one, not where it writes."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a small file so that a reader sees the old or the new content, never half of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def put_back(target: Path) -> None:
    """Give an old folder its name again that a kill has left set aside, before the new one took its place."""
    for aside in sorted(target.parent.glob(f".{glob.escape(target.name)}{ASIDE}{'[0-9a-f]' * 32}")):
        if os.path.lexists(target):
            remove(aside)
        else:
            aside.rename(target)
            fsync_dir(target.parent)


def put_all_back(folder: Path) -> None:
    """The same for everything that lies directly in `folder`."""
    for name in {entry.name[1:].rpartition(ASIDE)[0] for entry in folder.glob(f".?*{ASIDE}*")}:
        put_back(folder / name)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, as far as that is possible; what is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def replace_durably(temporary: Path, target: Path) -> None:
    """Give what is at `temporary` the name `target`, in one step where the kernel can; an old one goes."""
    if not temporary.is_dir():
        fsync_file(temporary)
        temporary.replace(target)
        fsync_dir(target.parent)
        return
    fsync_tree(temporary)
    if not os.path.lexists(target):
        temporary.replace(target)
        fsync_dir(target.parent)
        return
    old = temporary  # what has this name after an exchange
    if not _exchange(temporary, target):
        old = target.with_name(f".{target.name}{ASIDE}{uuid.uuid4().hex}")
        target.rename(old)
        fsync_dir(target.parent)
        temporary.replace(target)
    fsync_dir(target.parent)
    remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where kernel, file system or C library cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def check_folder(out: Path) -> None:
    """Raise SpecError unless `out` is a folder to write into, or can become one."""
    if out.is_dir():
        _check_writable(out, out)
    elif os.path.lexists(out):
        what = "a link to nothing" if out.is_symlink() and not out.exists() else "a file"
        raise SpecError(f"{out} is {what}; name a folder with -o")
    else:
        _check_parents(out)


def check_file(out: Path) -> None:
    """Raise SpecError unless `out` is a file that can be written over, or can become one."""
    if out.is_dir():
        raise SpecError(f"{out} is a folder; name a file")
    _check_parents(out)


def check_apart(out: Path, source: Path) -> None:
    """Raise SpecError when `out` is, holds, or lies in the folder `source` that it is made from."""
    one, other = out.resolve(), source.resolve()
    if one == other or one in other.parents or other in one.parents:
        how = "is" if one == other else "holds" if one in other.parents else "lies in"
        raise SpecError(f"{out} {how} {source}, which it is made from and which stays as it is; name another folder")


def _check_parents(out: Path) -> None:
    """What is missing of the path is made when it is needed."""
    for parent in out.absolute().parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise SpecError(f"{out} cannot be written: {parent} is no folder; name another place")
            _check_writable(out, parent)
            return


def _check_writable(out: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SpecError(f"{out} cannot be written: no permission to write in {folder}; name another place")


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], *, num_ahead: int = 2, num_threads: int = 1
) -> Generator[Result, None, None]:
    """`work(item)` of every item, in order, made by threads up to `num_ahead` items before it is taken.

    An error of a thread comes up where its result would have: everything before it is still good. Leaving early
    (close the generator) waits for the items at work and for no further one.
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="vlsi-cache-ahead")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def with_null(value: Any) -> Any:
    """A JSON value with null for numbers that are not finite: JSON has none, and other readers would refuse them."""
    if isinstance(value, dict):
        return {key: with_null(one) for key, one in value.items()}
    if isinstance(value, list):
        return [with_null(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
