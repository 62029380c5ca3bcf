"""The local part cache: a bounded folder with the pieces of remote caches that were read last.

`VLSI_CACHE_DIR` names it, `VLSI_CACHE_BYTES` bounds it. Below it each remote cache has a folder, laid out as a cache,
whose data files have holes where nothing was fetched; `held/` says which bytes of a part are there. A part is worked on
under its lock, by one thread of one process at a time, and goes when others were used since and the room is needed.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlsi_cache import io
from vlsi_cache.errors import DiskFullError, SpecError
from vlsi_cache.store.format import part_name

DEFAULT_BYTES = 32 << 30
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
Span = tuple[int, int]


def folder() -> Path:
    """`VLSI_CACHE_DIR`, by default `vlsi-cache-parts` in the user's folder for such files."""
    named = os.environ.get("VLSI_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(named) if named else Path(base) / "vlsi-cache-parts"


def limit() -> int:
    """`VLSI_CACHE_BYTES`, such as 20GiB; SpecError when it is no size."""
    text = os.environ.get("VLSI_CACHE_BYTES") or str(DEFAULT_BYTES)
    found = _SIZE.fullmatch(text)
    if found is None or found[2].lower() not in UNITS:
        raise SpecError(f"VLSI_CACHE_BYTES `{text}` is no size; write bytes, or for instance 20GiB")
    return int(float(found[1]) * UNITS[found[2].lower()])


@dataclass
class Held:
    """What of a part is in its folder: bytes of part.json and of every data file, and their ETags.

    `record_etag` is of part.json. `spans` are ascending and apart.
    """

    record_etag: str | None = None
    etags: dict[str, str | None] = field(default_factory=dict)
    spans: dict[str, list[Span]] = field(default_factory=dict)
    num_bytes: int = 0

    def missing(self, file: str, span: Span) -> list[Span]:
        """What of `span` is not there."""
        left, (at, stop) = [], span
        for low, high in self.spans.get(file, []):
            if low > at and at < stop:
                left.append((at, min(low, stop)))
            at = max(at, high)
        return left + ([(at, stop)] if at < stop else [])

    def add(self, file: str, span: Span, etag: str | None) -> None:
        """Note bytes that are there from now on."""
        self.spans[file] = joined([*self.spans.get(file, []), span])
        self.etags[file] = etag
        self.num_bytes += span[1] - span[0]


def joined(spans: list[Span]) -> list[Span]:
    """The same bytes as ascending spans that do not touch."""
    found: list[Span] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found


def read_held(root: Path, index: int) -> Held:
    """What is there of part `index`; nothing, where the file cannot be read."""
    try:
        held = Held(**json.loads(_held_file(root, index).read_bytes()))
        held.spans = {name: [(int(low), int(high)) for low, high in spans] for name, spans in held.spans.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return Held()
    return held


def write_held(root: Path, index: int, held: Held) -> None:
    """Note what is there, after it is: whoever is killed before fetches it again."""
    file = _held_file(root, index)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(asdict(held)))
    temporary.replace(file)


def touch(root: Path, index: int) -> None:
    """Note that the part was used now."""
    with contextlib.suppress(OSError):
        os.utime(_held_file(root, index))


def drop(root: Path, index: int) -> None:
    """Forget a part; the caller has its lock. What is memory-mapped stays with whoever has mapped it."""
    _held_file(root, index).unlink(missing_ok=True)
    io.remove(root / "parts" / part_name(index))


def _held_file(root: Path, index: int) -> Path:
    return root / "held" / f"{index:06d}.json"


@contextlib.contextmanager
def locked(root: Path, name: str, *, wait: bool = True) -> Iterator[bool]:
    """Keep other threads and processes away from `name`; False at once where somebody has it and `wait` is not set."""
    path = root / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:  # the lock goes with the file, also when the process is killed
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def part_lock(index: int) -> str:
    return f"{index:06d}"


def make_room(most_bytes: int) -> int:
    """Drop parts of any cache, those used longest ago first, until `most_bytes` are left; the bytes that were freed.

    Parts that somebody works on stay.
    """
    found = []
    for file in folder().glob("*/held/*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append((file.stat().st_mtime_ns, int(json.loads(file.read_bytes())["num_bytes"]), file))
    total, freed = sum(size for _, size, _ in found), 0
    for _, size, file in sorted(found, key=lambda one: one[0]):
        if total - freed <= most_bytes:
            break
        root, index = file.parent.parent, int(file.stem)
        with locked(root, part_lock(index), wait=False) as is_ours:
            if is_ours:
                drop(root, index)
                freed += size
    return freed


@contextlib.contextmanager
def full_disk_is_told(need_bytes: int) -> Iterator[None]:
    """Turn a full disk under the part cache into an error that says how to go on."""
    try:
        yield
    except OSError as error:
        if not io.is_disk_full(error) or isinstance(error, DiskFullError):
            raise
        where = folder()
        there = next((one for one in (where, *where.absolute().parents) if one.exists()), Path("/"))
        free = shutil.disk_usage(there).free
        raise DiskFullError(
            f"the disk under the part cache `{where}` is full: {need_bytes} bytes of a remote cache do not fit, {free} "
            "are free; free some space, name another disk with VLSI_CACHE_DIR, or a smaller VLSI_CACHE_BYTES, and run "
            "the same command again"
        ) from error
