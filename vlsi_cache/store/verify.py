"""Checking a whole cache: every problem with its file and what to do about it; corruption is reported, never raised."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from vlsi_cache.errors import CacheCorruptError, VlsiCacheError, command_line
from vlsi_cache.progress import progress

from .commit import list_tmp
from .files import hash_file, load_header, load_part_record
from .layout import (
    HEADER_NAME,
    RECORD_NAME,
    TABLE_NAME,
    VOCAB_COPY_NAME,
    VOCAB_NAME,
    CacheHeader,
    PartRecord,
    part_dir,
    part_name,
)
from .part import load_part
from .vocab import is_interrupted_start, load_texts, load_vocab, vocab_problems

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

    def __str__(self) -> str:
        found = "no problems" if self.ok else f"{len(self.problems)} problems"
        how = "sizes, checksums and hashes" if self.deep else "sizes and checksums"
        head = f"{self.path}: {found} ({self.num_parts} parts, {self.num_files} files, {self.num_bytes} bytes; {how})"
        return "\n".join([head, *(f"  - {problem}" for problem in self.problems)])


def verify(path: str | os.PathLike[str], *, deep: bool = False) -> VerifyReport:
    """Check sizes and the checksum of every chunk (`deep`: also the hash of every file), and what is foreign."""
    root = Path(path)
    report = VerifyReport(root, deep)
    if is_interrupted_start(root):
        what = "is missing: the start of this cache was interrupted, and nothing is lost"
        report.problems.append(Problem(HEADER_NAME, what, CONTINUE))
        return report
    repair = f"run: {command_line('repair', root)}"
    try:
        header = load_header(root)
    except (OSError, VlsiCacheError) as error:
        report.problems.append(Problem(HEADER_NAME, _text(error), "restore this file from a copy of the cache"))
        return report
    _check_vocab(root, header, report, repair)
    for index in progress(range(header.num_parts), "verify", unit="part", delay=2):
        _check_part(root, header, index, report, repair)
    _check_foreign(root, header, report, repair)
    if not report.bad_parts and report.num_parts == header.num_parts:
        _check_table(root, header, report, repair)
    return report


def _check_vocab(root: Path, header: CacheHeader, report: VerifyReport, repair: str) -> None:
    """Both copies, every file by its hash; a cache may do without the second one."""
    for name in (VOCAB_NAME, VOCAB_COPY_NAME):
        if os.path.lexists(root / name):
            report.problems += [Problem(file, what, repair) for file, what in vocab_problems(root, header, name)]
    if not os.path.lexists(root / VOCAB_NAME):
        has_copy = (root / VOCAB_COPY_NAME).is_dir()
        report.problems.append(Problem(VOCAB_NAME, "is missing", repair if has_copy else CONTINUE))
    elif not any(problem.file.startswith(VOCAB_NAME) for problem in report.problems):
        try:
            load_vocab(root, header)
            if header.text_xxh3 is not None:
                load_texts(root, header)
        except CacheCorruptError as error:
            report.problems.append(Problem(VOCAB_NAME, _text(error), repair))


def _check_part(root: Path, header: CacheHeader, index: int, report: VerifyReport, repair: str) -> None:
    name = f"parts/{part_name(index)}"
    if not os.path.lexists(part_dir(root, index)):
        report.problems.append(Problem(name, "is missing", CONTINUE))
        return
    report.num_parts += 1
    before = len(report.problems)
    try:
        record = load_part_record(root, header, index)
        _check_files(root, index, record, report, repair)
        if len(report.problems) == before:
            load_part(root, header, index, range(len(header.layers)), None).check()
    except (OSError, VlsiCacheError) as error:
        report.problems.append(Problem(_named_file(root, name, error), _text(error), repair))
    if len(report.problems) > before:
        report.bad_parts.append(index)


def _check_files(root: Path, index: int, record: PartRecord, report: VerifyReport, repair: str) -> None:
    folder = part_dir(root, index)
    for name, expected in sorted(record.files.items()):
        path, label = folder / name, f"parts/{part_name(index)}/{name}"
        if not os.path.lexists(path):
            report.problems.append(Problem(label, "is missing", repair))
            continue
        size = path.lstat().st_size
        report.num_files += 1
        report.num_bytes += size
        if size != expected.size:
            report.problems.append(Problem(label, f"{size} bytes, part.json says {expected.size}", repair))
        elif report.deep and (found := hash_file(path)) != expected:
            what = f"xxh3 is {found.xxh3}, part.json says {expected.xxh3}"
            report.problems.append(Problem(label, what, repair))
    for parent, _, files in os.walk(folder):
        for file in files:
            name = (Path(parent) / file).relative_to(folder).as_posix()
            if name not in record.files and name != RECORD_NAME:
                label = f"parts/{part_name(index)}/{name}"
                report.problems.append(Problem(label, "does not belong to the part", repair))


def _check_foreign(root: Path, header: CacheHeader, report: VerifyReport, repair: str) -> None:
    expected = {part_name(index) for index in range(header.num_parts)}
    found = set(os.listdir(root / "parts")) if (root / "parts").is_dir() else set()
    for name in sorted(found - expected):
        report.problems.append(Problem(f"parts/{name}", "is not a part of this cache", repair))
    dead, alive = list_tmp(root)
    report.unfinished = [f"tmp/{name}" for name in (*dead, *alive)]


def _check_table(root: Path, header: CacheHeader, report: VerifyReport, repair: str) -> None:
    from .table import is_current

    if not is_current(root, header):
        report.problems.append(Problem(TABLE_NAME, "is missing, damaged or older than the parts", repair))


def _text(error: Exception) -> str:
    """What is wrong, without what to do."""
    return str(error).split("; run: ", 1)[0].split("; restore ", 1)[0]


def _named_file(root: Path, part: str, error: Exception) -> str:
    """The file an error speaks of, relative to the cache; the part if it names none."""
    pieces = str(error).split("`")
    named = pieces[1] if len(pieces) > 1 else ""
    return Path(named).relative_to(root).as_posix() if named.startswith(f"{root}{os.sep}") else part
