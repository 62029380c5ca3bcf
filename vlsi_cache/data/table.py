"""What was measured once, kept for the next command: Arrow files in the user's cache folder, each set under a key.

A key is a digest of all that the figures follow from, so that a set is never out of date: it is found or it is not.
What is found is compared with its checksums; what is damaged is removed and measured again. A set appears in one step,
by a rename, so that processes that work at once do not meet; the sets that were not used for longest go when all
together are larger than `MAX_BYTES`. Nothing in here is needed: the folder may be deleted at any time.
"""

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlsi_cache.io import checksum, difference_from, remove
from vlsi_cache.progress import say

VARIABLE = "VLSI_CACHE_ROWS"  # the folder; `off`: nothing is kept
# How rows are read and measured, beside `encoder.CONTRACT`; counts up when the figures of some row change.
READING = 4
MAX_BYTES = 8 << 30
WORTH_S = 0.5  # what is measured faster is measured again
_ABOUT = "about.json"
_NAME = re.compile(r"(rows|tokens)-[0-9a-f]{40}")  # of a set; what else lies in the folder is not ours
_STALE_S = 24 * 3600.0  # of what a killed process has left half written


@dataclass(frozen=True)
class Kept:
    """A set of tables, mapped and not read, with what is said `about` them, and the `folder` they lie in."""

    tables: Mapping[str, pa.RecordBatch]
    about: dict[str, Any]
    folder: Path


def key_of(facts: Any) -> str:
    """The digest of what figures follow from; this release is part of it."""
    release = {"reading": READING, "vlsi-cache": version("vlsi-cache")}
    return hashlib.sha256(json.dumps([release, facts], sort_keys=True).encode()).hexdigest()


def folder() -> Path | None:
    """Where tables are kept: `$VLSI_CACHE_ROWS`, else `vlsi-cache` in the user's cache folder; None for nowhere."""
    named = os.environ.get(VARIABLE, "")
    if named.lower() in ("off", "0", "none"):
        return None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(named).expanduser() if named else Path(home).expanduser() / "vlsi-cache"
    except RuntimeError:  # a user without a home, as in some containers
        return None


def find(kind: str, key: str) -> Kept | None:
    """The set of this kind and key; None where there is none, or it is damaged."""
    root = folder()
    if root is None:
        return None
    found = root / f"{kind}-{key[:40]}"
    try:
        if not found.is_dir():
            return None
        kept = _opened(found, key)
        with suppress(OSError):  # a folder that others keep may not be ours to write
            os.utime(found / _ABOUT)  # used just now
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        say(f"the table {found} is damaged ({type(error).__name__}), and measured again")
        discard(found)
        return None
    return kept


def keep(
    kind: str,
    key: str,
    tables: Mapping[str, pa.RecordBatch],
    about: Mapping[str, Any],
    files: Iterable[Path] = (),
) -> Kept | None:
    """Write a set, with copies of `files`; None, with the reason told, where that is not possible."""
    root = folder()
    if root is None:
        return None
    target = root / f"{kind}-{key[:40]}"
    temporary = root / f".{target.name}.tmp-{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        for name, batch in tables.items():
            with pa.ipc.new_file(str(temporary / f"{name}.arrow"), batch.schema) as writer:
                writer.write_batch(batch)
        for file in files:
            shutil.copyfile(file, temporary / file.name)
        sums = {file.name: checksum(file) for file in sorted(temporary.iterdir())}
        text = json.dumps({"key": key, "files": sums, "about": about})
        (temporary / _ABOUT).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        is_ours = _put(temporary, target)
        _make_room(root, target)
        # Another process may have been faster: its set is taken if it says the same.
        return _opened(target, key) if is_ours or _sums_of(target) == sums else None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        say(f"what was measured of the rows cannot be kept in {root} ({error}); {VARIABLE} names another folder")
        return None
    finally:
        if temporary.is_dir():
            remove(temporary)


def _opened(found: Path, key: str) -> Kept:
    """Raises anything for a set that is not what was written."""
    digest, _, text = (found / _ABOUT).read_text().partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError(f"{_ABOUT} is another one than was written")
    record = json.loads(text)
    if record["key"] != key:
        raise ValueError("it has another key")
    tables = {}
    for name, written in record["files"].items():
        if problem := difference_from(written, found / name):
            raise ValueError(f"{name}: {problem}")
        if name.endswith(".arrow"):
            with pa.memory_map(str(found / name)) as source:
                tables[name.removesuffix(".arrow")] = pa.ipc.open_file(source).get_batch(0)
    return Kept(tables, record["about"], found)


def _put(temporary: Path, target: Path) -> bool:
    """Give a set its name; False where there is one of that name."""
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        return False
    return True


def _sums_of(found: Path) -> Any:
    return json.loads((found / _ABOUT).read_text().partition("\n")[2])["files"]


def discard(found: Path) -> None:
    """Remove a set in one step: nobody opens a half of it."""
    aside = found.with_name(f".{found.name}.tmp-{uuid.uuid4().hex}")
    try:
        found.rename(aside)
    except OSError:  # another process removes it as well
        return
    remove(aside)


def _make_room(root: Path, but: Path) -> None:
    """Remove what a killed process has left, and the sets that were not used for longest, all but one."""
    sets: list[tuple[float, int, Path]] = []
    for entry in root.iterdir():
        try:
            if _NAME.match(entry.name[1:]) and entry.name.startswith(".") and ".tmp-" in entry.name:
                if time.time() - entry.stat().st_mtime > _STALE_S:
                    remove(entry)
            elif _NAME.fullmatch(entry.name) and (entry / _ABOUT).is_file() and entry != but:
                size = sum(file.stat().st_size for file in entry.iterdir())
                sets.append(((entry / _ABOUT).stat().st_mtime, size, entry))
        except OSError:  # it went meanwhile
            continue
    room = MAX_BYTES - sum(file.stat().st_size for file in but.iterdir())
    for _, size, entry in sorted(sets, reverse=True):
        room -= size
        if room < 0:
            discard(entry)
