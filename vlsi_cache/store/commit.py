"""How a file or folder becomes part of a cache: complete and on the disk first, then one rename.

Nothing here locks. Whoever renames first has won; the loser removes what it wrote and says nothing.
"""

import contextlib
import errno
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlsi_cache.errors import DiskFullError
from vlsi_cache.io import fsync_dir, is_disk_full, remove

RESERVE_BYTES = 1 << 20  # metadata, directories and the commit record of a part
STALE_S = 86400.0  # an unfinished file of another host counts as abandoned after this

_TMP_NAME = re.compile(r"^(?P<what>.+)\.(?P<host>[A-Za-z0-9_-]+)\.(?P<pid>\d+)\.(?P<uuid>[0-9a-f]{12})(\.[a-z]+)?$")
_live: set[str] = set()


@dataclass(frozen=True)
class TmpName:
    """Who left a name in `tmp/`, and whether that process is gone."""

    what: str
    host: str
    pid: int
    dead: bool


def host_name() -> str:
    """Host and PID namespace: containers may share the one and then must not judge each other's process ids."""
    try:
        namespace = "-" + re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        namespace = ""
    return (re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname()) or "host") + namespace


def parse_tmp(name: str) -> TmpName | None:
    """Read a name in `tmp/`; None if it is not ours. Only processes of this host can be known to be dead."""
    match = _TMP_NAME.match(name)
    if match is None:
        return None
    host, pid = match["host"], int(match["pid"])
    dead = host == host_name() and (name not in _live if pid == os.getpid() else not _is_alive(pid))
    return TmpName(match["what"], host, pid, dead)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextlib.contextmanager
def tmp_path(root: Path, what: str, suffix: str = "") -> Iterator[Path]:
    """A name of our own in `tmp/`; whatever is left there when the block ends is removed."""
    (root / "tmp").mkdir(parents=True, exist_ok=True)
    name = f"{what}.{host_name()}.{os.getpid()}.{uuid.uuid4().hex[:12]}{suffix}"
    _live.add(name)
    try:
        yield root / "tmp" / name
    finally:
        remove(root / "tmp" / name)
        _live.discard(name)


def list_tmp(root: Path) -> tuple[list[str], list[str]]:
    """(dead, perhaps alive) names in `tmp/`: dead are those of ended processes of this host, and any a day old."""
    names = sorted(os.listdir(root / "tmp")) if (root / "tmp").is_dir() else []
    dead = [name for name in names if (tmp := parse_tmp(name)) and (tmp.dead or _age_s(root / "tmp" / name) > STALE_S)]
    return dead, [name for name in names if name not in dead]


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


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
    """Turn ENOSPC and EDQUOT into DiskFullError."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error) and not isinstance(error, DiskFullError):
            raise disk_full(root, need_bytes + RESERVE_BYTES, shutil.disk_usage(root).free) from error
        raise
