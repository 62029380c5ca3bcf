"""Checking a whole cache, and moving what is broken out of the way.

Every problem is told with its file and what to do about it; corruption is reported, never raised.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlsi_cache import io
from vlsi_cache.errors import CacheCorruptError, DiskFullError, StoreError, VlsiCacheError
from vlsi_cache.progress import progress

from . import table
from .arrays import PIECE_ARRAYS
from .files import (
    FROM_A_COPY,
    hash_file,
    list_tmp,
    load_header,
    load_part_record,
    remove_dead_tmp,
    repair_hint,
    status_of,
    status_problem,
    tmp_path,
)
from .format import (
    HEADER_NAME,
    RECORD_NAME,
    TABLE_NAME,
    VOCAB_COPY_NAME,
    VOCAB_NAME,
    CacheHeader,
    PartRecord,
    list_parts,
    part_dir,
    part_name,
)
from .header import is_interrupted_start
from .location import UrlPath, place_of
from .part import load_part
from .remote import part_cache
from .remote.mirror import Mirror
from .vocab_order import (
    VOCAB_NAMES,
    complete_copies,
    has_pieces,
    load_pieces,
    load_texts,
    load_vocab,
    publish_files,
    vocab_problems,
    whole_files,
)

MAX_MISSING = 100  # missing parts that are listed one by one
CONTINUE = "run the command that builds the cache again, it continues"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: which file (relative to the cache), what, and what to do."""

    file: str
    what: str
    todo: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}; {self.todo}"


@dataclass
class VerifyReport:
    """What `verify` looked at and what it found; `ok` if that was nothing."""

    path: Path
    deep: bool
    num_parts: int = 0
    num_files: int = 0
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    bad_parts: list[int] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, file: str, what: str, todo: str | None = None) -> None:
        """Note a problem; the remedy is `repair` unless `todo` says another."""
        self.problems.append(Problem(file, what, todo or repair_hint(self.path)))

    def __str__(self) -> str:
        found = "no problems" if self.ok else f"{len(self.problems)} problems"
        how = "sizes, checksums and hashes" if self.deep else "sizes and checksums"
        head = f"{self.path}: {found} ({self.num_parts} parts, {self.num_files} files, {self.num_bytes} bytes; {how})"
        return "\n".join([head, *(f"  - {problem}" for problem in self.problems)])


def verify(path: str | os.PathLike[str], *, deep: bool = False) -> VerifyReport:
    """Check sizes and the checksum of every chunk (`deep`: also the hash of every file), and what is foreign.

    Of a cache on an object store every byte is read, and every file is compared with its hash.
    """
    root = place_of(path)
    if isinstance(root, UrlPath):
        return _verify_remote(root)
    report = VerifyReport(root, deep)
    if is_interrupted_start(root):
        what = "is missing: the start of this cache was interrupted, and nothing is lost"
        report.add(HEADER_NAME, what, CONTINUE)
        return report
    try:
        header = load_header(root)
    except (OSError, VlsiCacheError) as error:
        report.add(HEADER_NAME, _text(error), FROM_A_COPY)
        return report
    _check_vocab(root, header, report)
    there = [index for index in list_parts(root) if index < header.num_parts]
    _list_missing(header, there, report)
    records = table.Gathered()  # of the parts that are whole: each is read once, and not kept
    for index in progress(there, "verify", unit="part", delay=2):
        if record := _check_part(root, header, index, report):
            records.add(root, index, record)
    for name in _foreign_names(root, header):
        report.add(name, "is not a part of this cache")
    report.unfinished = [f"tmp/{name}" for names in list_tmp(root) for name in names]
    if not report.bad_parts:
        _check_table(root, header, report, lambda: records.index(root, header))
    return report


def _verify_remote(url: UrlPath) -> VerifyReport:
    """The same, part by part, in a folder of its own: what lies in the part cache proves nothing."""
    with tmp_path(part_cache.folder(), "verify") as folder:
        mirror = Mirror(url, within=folder)
        try:
            _ = mirror.header
        except VlsiCacheError as error:
            report = VerifyReport(url, deep=True)
            report.add(HEADER_NAME, _text(error), FROM_A_COPY)
            return report
        return check_remote(mirror)


def check_remote(mirror: Mirror) -> VerifyReport:
    """Check every byte of a cache on a store, through a mirror in a folder of its own.

    Raises StoreError and DiskFullError: what cannot be read now may be whole.
    """
    report, url, header = VerifyReport(mirror.url, deep=True), mirror.url, mirror.header
    _check_remote_vocab(mirror, header, report)
    there = mirror.part_sizes()
    _list_missing(header, [index for index in there if index < header.num_parts], report)
    for index in progress([index for index in there if index < header.num_parts], "verify", unit="part", delay=2):
        try:
            mirror.whole(index)
        except (StoreError, DiskFullError):
            raise
        except VlsiCacheError as error:
            report.num_parts += 1
            report.bad_parts.append(index)
            report.add(_label(error, url, f"parts/{part_name(index)}"), _text(error))
        else:
            before = len(report.problems)
            _check_part(mirror.root, header, index, report)
            report.problems[before:] = [about_store(one, mirror) for one in report.problems[before:]]
        part_cache.drop(mirror.root, index)
    for index in (index for index in there if index >= header.num_parts):
        report.add(f"parts/{part_name(index)}", "is not a part of this cache")
    if not report.bad_parts:
        mirror.table()
        mirror.with_records(
            lambda folder: _check_table(
                folder, header, report, lambda: table.collect(folder, header), table_in=mirror.root
            )
        )
    return report


def about_store(problem: Problem, mirror: Mirror) -> Problem:
    """A problem of the local copy as one of what it was copied from."""
    return replace(problem, what=problem.what.replace(str(mirror.root), str(mirror.url)))


def _check_remote_vocab(mirror: Mirror, header: CacheHeader, report: VerifyReport) -> None:
    from .remote.upload import download_files  # which writes caches, as `verify` does not

    try:
        download_files(mirror.objects, VOCAB_NAME, mirror.root / VOCAB_NAME, header.vocab_files)
        mirror.with_vocab(("id_of_rank", "heads"), lambda root: load_vocab(root, header))
        if header.text_xxh3 is not None:
            mirror.with_vocab(("text", "text_offsets"), lambda root: load_texts(root, header))
        if has_pieces(header):
            mirror.with_vocab(PIECE_ARRAYS, lambda root: load_pieces(root, header))
    except CacheCorruptError as error:
        report.add(_label(error, mirror.url, VOCAB_NAME), _text(error))


def _label(error: VlsiCacheError, root: Path, otherwise: str) -> str:
    """The file that an error is about, relative to the cache."""
    file = error.file
    return otherwise if file is None or not file.is_relative_to(root) else file.relative_to(root).as_posix()


def _list_missing(header: CacheHeader, there: list[int], report: VerifyReport) -> None:
    """The parts that are not there: the first of them one by one."""
    missing = sorted(set(range(header.num_parts)) - set(there))
    for index in missing[:MAX_MISSING]:
        report.add(f"parts/{part_name(index)}", "is missing", CONTINUE)
    if len(missing) > MAX_MISSING:
        what = f"{len(missing) - MAX_MISSING} more of {header.num_parts} parts are missing"
        report.add("parts", what, CONTINUE)


def _check_vocab(root: Path, header: CacheHeader, report: VerifyReport) -> None:
    """Both copies, every file by its hash; a cache may do without the second one."""
    for name in (VOCAB_NAME, VOCAB_COPY_NAME):
        if os.path.lexists(root / name):
            for file, what in vocab_problems(root, header, name):
                report.add(file, what)
    if not os.path.lexists(root / VOCAB_NAME):
        has_copy = (root / VOCAB_COPY_NAME).is_dir()
        report.add(VOCAB_NAME, "is missing", None if has_copy else CONTINUE)
    elif not any(problem.file.startswith(VOCAB_NAME) for problem in report.problems):
        try:
            load_vocab(root, header)
            if header.text_xxh3 is not None:
                load_texts(root, header)
        except CacheCorruptError as error:
            report.add(VOCAB_NAME, _text(error))


def _check_part(root: Path, header: CacheHeader, index: int, report: VerifyReport) -> PartRecord | None:
    """Note what is wrong with a part; its record if nothing is."""
    name = f"parts/{part_name(index)}"
    report.num_parts += 1
    before = len(report.problems)
    try:
        record = load_part_record(root, header, index)
        _check_files(root, index, record, report)
        if len(report.problems) == before:
            part = load_part(root, header, index, range(len(header.layers)), None, record=record)
            part.check()
            part.check_distinct()
            return record
    except (OSError, VlsiCacheError) as error:
        report.add(_label(error, root, name) if isinstance(error, VlsiCacheError) else name, _text(error))
    report.bad_parts.append(index)
    return None


def _check_files(root: Path, index: int, record: PartRecord, report: VerifyReport) -> None:
    folder = str(part_dir(root, index))  # texts, not paths: there are dozens of files in each of thousands of parts
    for name, expected in sorted(record.files.items()):
        path, label = f"{folder}/{name}", f"parts/{part_name(index)}/{name}"
        if status := status_of(path):
            report.num_files += 1
            report.num_bytes += status.st_size
        if what := status_problem(status, expected.size):
            report.add(label, what.removeprefix(":").strip())
        elif report.deep and (found := hash_file(Path(path))) != expected:
            what = f"xxh3 is {found.xxh3}, part.json says {expected.xxh3}"
            report.add(label, what)
    for parent, _, files in os.walk(folder):
        inside = parent[len(folder) + 1 :]
        for file in files:
            name = f"{inside}/{file}" if inside else file
            if name not in record.files and name != RECORD_NAME:
                label = f"parts/{part_name(index)}/{name}"
                report.add(label, "does not belong to the part")


def _foreign_names(root: Path, header: CacheHeader) -> list[str]:
    """What lies in `parts/` and is none of the planned parts."""
    expected = {part_name(index) for index in list_parts(root) if index < header.num_parts}
    found = set(os.listdir(root / "parts")) if (root / "parts").is_dir() else set()
    return [f"parts/{name}" for name in sorted(found - expected)]


def _check_table(
    root: Path,
    header: CacheHeader,
    report: VerifyReport,
    collect: Callable[[], table.Index],
    *,
    table_in: Path | None = None,
) -> None:
    """What only shows over all parts, of which `collect` makes a fresh index: ids that repeat, counts that are not
    those of the plan, a stale table."""
    try:
        fresh = collect()
    except CacheCorruptError as error:
        report.add(HEADER_NAME, _text(error), FROM_A_COPY)
        return
    if found := table.repeated_id(fresh):
        name, parts = found
        what = f"sample {name!r} is in parts {parts}; ids must be unique"
        report.add(f"parts/{part_name(parts[-1])}/{RECORD_NAME}", what)
        report.bad_parts.append(parts[-1])
    elif report.num_parts == header.num_parts and not table.is_current(table_in or root, header, fresh, parts=root):
        report.add(TABLE_NAME, "is missing, damaged or older than the parts")


def _text(error: Exception) -> str:
    """What is wrong, without what to do."""
    return error.what if isinstance(error, VlsiCacheError) else str(error)


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
    copy, and rebuild the sample table. Of a cache on an object store every byte is read.

    Nothing is deleted without `yes`; with it, what dead processes left in `tmp/` is (on a store: files that no record
    names, once all parts are there). Raises CacheCorruptError when `cache.json` itself is broken, and SpecError for a
    data set of the hub.
    """
    root = place_of(path)
    if isinstance(root, UrlPath):
        from .remote.repair import repair_remote

        return repair_remote(root, yes=yes)
    if is_interrupted_start(root):
        removed, left = _sweep(root, yes)
        return RepairReport(root, removed=removed, left=left, interrupted_start=True)
    header = load_header(root)
    found = verify(root, deep=deep)
    bad = {f"parts/{part_name(index)}" for index in found.bad_parts} | set(_foreign_names(root, header))
    quarantined, restored = _repair_vocab(root, header, found)
    for name in sorted(bad):
        _quarantine(root, name)
    removed, left = _sweep(root, yes)
    missing = sorted(set(range(header.num_parts)) - set(list_parts(root)))
    rebuild = not missing and not table.is_current(root, header, table.collect(root, header))
    if rebuild:
        table.write_table(root, header)
    quarantined = [*sorted(bad), *quarantined]
    return RepairReport(root, quarantined, restored, removed, left, missing, rebuild)


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


def sweep(path: str | os.PathLike[str]) -> list[str]:
    """Delete what `repair` has listed as left there; the names that are gone."""
    root = place_of(path)
    if isinstance(root, UrlPath):
        from .remote.repair import sweep_remote

        return sweep_remote(root)
    return _sweep(root, yes=True)[0]


def _sweep(root: Path, yes: bool) -> tuple[list[str], list[str]]:
    """What dead processes left in `tmp/`: what is removed now, and what is left there."""
    removed = remove_dead_tmp(root) if yes else []
    left = [name for name in list_tmp(root)[0] if name not in removed]
    return [f"tmp/{name}" for name in removed], [f"tmp/{name}" for name in left]


def _quarantine(root: Path, name: str) -> None:
    """Move a piece of the cache out of the way under a name that is still free."""
    (root / "quarantine").mkdir(exist_ok=True)
    target, number = root / "quarantine" / Path(name).name, 0
    while os.path.lexists(target):
        number += 1
        target = root / "quarantine" / f"{Path(name).name}.{number}"
    os.rename(root / name, target)
    io.fsync_dir(root / "quarantine")
    io.fsync_dir((root / name).parent)
