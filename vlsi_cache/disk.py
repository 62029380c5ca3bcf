"""What all that writes shares: local paths, flushing before anything relies on it, and one error for a full disk."""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlsi_cache.errors import DiskFullError, SpecError

FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
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
        f"{what} `{text}` is a URL ({found[1]}), and only local paths are supported: copy it to a local folder, or "
        "mount it there, and name that"
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


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk or a quota was full, whichever library says so."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL_ERRORS
    found = _NUMBER_IN_TEXT.search(str(error))
    return found is not None and int(found[1]) in FULL_ERRORS


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A name beside `target` for a new file or folder, which takes the place of an old one once it is on the disk.

    What has been written goes if that fails; a kill leaves it as `.NAME.tmp-*`. Raises DiskFullError.
    """
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    try:
        yield temporary
        _replace_durably(temporary, target)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if isinstance(error, DiskFullError) or not is_disk_full(error):
            raise
        free = shutil.disk_usage(target.parent).free
        raise DiskFullError(
            f"the disk is full: `{target}` could not be written, {free} bytes ({free / 2**20:.1f} MiB) are free; what "
            "was finished before is kept: free some space and run the same command again, it continues"
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a small file so that a reader sees the old or the new content, never half of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def _replace_durably(temporary: Path, target: Path) -> None:
    if temporary.is_dir():
        fsync_tree(temporary)
        if target.exists():
            shutil.rmtree(target)
    else:
        fsync_file(temporary)
    temporary.replace(target)
    fsync_dir(target.parent)
