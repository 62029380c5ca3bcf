"""Taking what is broken out of the way, so that the command that builds the cache makes it again."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from . import commit, table
from .files import load_header
from .layout import list_parts, part_name
from .verify import verify


@dataclass(frozen=True)
class RepairReport:
    """What `repair` did: moved to `quarantine/`, removed, left alone (and why it may be removed)."""

    path: Path
    quarantined: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    missing_parts: list[int] = field(default_factory=list)
    table_rebuilt: bool = False

    def __str__(self) -> str:
        lines = [f"{name}: moved to quarantine/" for name in self.quarantined]
        lines += [f"{name}: removed" for name in self.removed]
        lines += [f"{name}: abandoned; `--yes` removes it" for name in self.left]
        lines += ["samples.parquet: rebuilt"] if self.table_rebuilt else []
        if self.missing_parts:
            lines.append(f"{len(self.missing_parts)} parts are missing: run the command that builds the cache again")
        return "\n".join(lines) or "nothing to repair"


def repair(path: str | os.PathLike[str], *, yes: bool = False, deep: bool = True) -> RepairReport:
    """Move corrupt and foreign parts to `quarantine/` so that the build makes them again, and rebuild the sample table.

    Nothing is deleted without `yes`; with it, what dead processes left in `tmp/` is. Raises CacheCorruptError when
    `cache.json` itself is broken.
    """
    root = Path(path)
    header = load_header(root)
    found = verify(root, deep=deep)
    bad = {f"parts/{part_name(index)}" for index in found.bad_parts}
    bad |= {p.file for p in found.problems if p.file.count("/") == 1 and "not a part of this" in p.what}
    bad |= {"vocab"} if any(p.file == "vocab" and p.what != "is missing" for p in found.problems) else set()
    quarantined = sorted(bad)
    for name in quarantined:
        _quarantine(root, name)
    dead, _ = commit.list_tmp(root)
    removed = [f"tmp/{name}" for name in (commit.remove_dead_tmp(root) if yes else [])]
    missing = sorted(set(range(header.num_parts)) - set(list_parts(root)))
    rebuild = not missing and not table.is_current(root, header)
    if rebuild:
        table.write_table(root, header)
    left = [f"tmp/{name}" for name in dead if f"tmp/{name}" not in removed]
    return RepairReport(root, quarantined, removed, left, missing, rebuild)


def _quarantine(root: Path, name: str) -> None:
    """Move a piece of the cache out of the way under a name that is still free."""
    (root / "quarantine").mkdir(exist_ok=True)
    target, number = root / "quarantine" / Path(name).name, 0
    while os.path.lexists(target):
        number += 1
        target = root / "quarantine" / f"{Path(name).name}.{number}"
    os.rename(root / name, target)
    commit.fsync_dir(root / "quarantine")
    commit.fsync_dir((root / name).parent)
