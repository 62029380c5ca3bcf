"""Taking what is broken out of the way, so that the command that builds the cache makes it again."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from vlsi_cache import disk

from . import commit, table
from .files import load_header
from .layout import CacheHeader, list_parts, part_name
from .verify import VerifyReport, verify
from .vocab import VOCAB_NAMES, complete_copies, is_interrupted_start, publish_files, whole_files


@dataclass(frozen=True)
class RepairReport:
    """What `repair` did: moved to `quarantine/`, restored, removed, left alone (and why it may be removed)."""

    path: Path
    quarantined: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    missing_parts: list[int] = field(default_factory=list)
    table_rebuilt: bool = False
    interrupted_start: bool = False

    def __str__(self) -> str:
        lines = [f"{name}: moved to quarantine/" for name in self.quarantined]
        lines += [f"{name}: restored from the other copy" for name in self.restored]
        lines += [f"{name}: removed" for name in self.removed]
        lines += [f"{name}: abandoned; `--yes` removes it" for name in self.left]
        lines += ["samples.parquet: rebuilt"] if self.table_rebuilt else []
        if self.missing_parts:
            lines.append(f"{len(self.missing_parts)} parts are missing: run the command that builds the cache again")
        if self.interrupted_start:
            lines.append("no part was written yet: run the command that builds the cache again")
        return "\n".join(lines) or "nothing to repair"


def repair(path: str | os.PathLike[str], *, yes: bool = False, deep: bool = True) -> RepairReport:
    """Move corrupt and foreign parts to `quarantine/` so that the build makes them again, restore `vocab/` from its
    copy, and rebuild the sample table.

    Nothing is deleted without `yes`; with it, what dead processes left in `tmp/` is. Raises CacheCorruptError when
    `cache.json` itself is broken.
    """
    disk.refuse_url(path, "cache")
    root = Path(path)
    if is_interrupted_start(root):
        return RepairReport(
            root, removed=(removed := _sweep(root, yes)), left=_left(root, removed), interrupted_start=True
        )
    header = load_header(root)
    found = verify(root, deep=deep)
    bad = {f"parts/{part_name(index)}" for index in found.bad_parts}
    bad |= {p.file for p in found.problems if p.file.count("/") == 1 and "not a part of this" in p.what}
    quarantined, restored = _repair_vocab(root, header, found)
    for name in sorted(bad):
        _quarantine(root, name)
    removed = _sweep(root, yes)
    missing = sorted(set(range(header.num_parts)) - set(list_parts(root)))
    rebuild = not missing and not table.is_current(root, header, table.collect(root, header))
    if rebuild:
        table.write_table(root, header)
    quarantined = [*sorted(bad), *quarantined]
    return RepairReport(root, quarantined, restored, removed, _left(root, removed), missing, rebuild)


def _repair_vocab(root: Path, header: CacheHeader, found: VerifyReport) -> tuple[list[str], list[str]]:
    """Move broken copies of the table away and put whole ones in their place; what was moved, what was restored.

    `vocab/` comes first: while it is away, the other copy still has what is whole.
    """
    moved, restored = [], []
    content = whole_files(root, header)
    for name in VOCAB_NAMES:
        broken = any(problem.file.split("/")[0] == name for problem in found.problems)
        if broken and os.path.lexists(root / name):
            _quarantine(root, name)
            moved.append(name)
        if broken and content is not None and publish_files(root, name, content):
            restored.append(name)
    return moved, [*restored, *complete_copies(root, header)]


def _sweep(root: Path, yes: bool) -> list[str]:
    return [f"tmp/{name}" for name in (commit.remove_dead_tmp(root) if yes else [])]


def _left(root: Path, removed: list[str]) -> list[str]:
    return [f"tmp/{name}" for name in commit.list_tmp(root)[0] if f"tmp/{name}" not in removed]


def _quarantine(root: Path, name: str) -> None:
    """Move a piece of the cache out of the way under a name that is still free."""
    (root / "quarantine").mkdir(exist_ok=True)
    target, number = root / "quarantine" / Path(name).name, 0
    while os.path.lexists(target):
        number += 1
        target = root / "quarantine" / f"{Path(name).name}.{number}"
    os.rename(root / name, target)
    disk.fsync_dir(root / "quarantine")
    disk.fsync_dir((root / name).parent)
