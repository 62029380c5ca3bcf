"""Every error a user can meet. Each class is also the standard-library error it is, and knows its exit code.

Messages say what is wrong, where, which values, and what to do next. They are for people: code that wants to know what
has happened looks at the class and at `file`, `what` and `hint`.
"""

import difflib
import errno
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "BatchTooLargeError",
    "CacheCorruptError",
    "CacheIncompleteError",
    "CacheNotFoundError",
    "DataError",
    "DiskFullError",
    "FingerprintMismatchError",
    "InterruptedRunError",
    "ModelError",
    "ProcessLostError",
    "RowError",
    "RunBusyError",
    "SampleNotFoundError",
    "SpecError",
    "StoreError",
    "VlsiCacheError",
    "WorkerDiedError",
    "command_line",
    "did_you_mean",
    "first_of",
    "list_problems",
    "validation_message",
]


class VlsiCacheError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns for it.

    `what` is wrong, in words that name the place; `file` is the file or folder it is about, if it is about one; `hint`
    says what to do. The message is `what; hint`.
    """

    exit_code = 2

    def __init__(self, what: str = "", *, file: str | os.PathLike[str] | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.file = file if file is None or isinstance(file, Path) else Path(file)
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}; {self.hint}" if self.hint else self.what


class SpecError(VlsiCacheError, ValueError):
    """The spec or a flag is wrong."""


class DataError(VlsiCacheError, ValueError):
    """Rows or images cannot be used as they are."""


class RowError(DataError):
    """One row cannot be encoded; `reason` is the message without the name of the row."""

    def __init__(self, what: str = "", *, reason: str = "") -> None:
        super().__init__(what)
        self.reason = reason


class ModelError(VlsiCacheError, ValueError):
    """A model, tokenizer or verbalizer cannot be used here."""


class BatchTooLargeError(ModelError, MemoryError):
    """The memory of the device does not do for a batch."""


class CacheNotFoundError(VlsiCacheError, FileNotFoundError):
    """There is no cache at this path."""

    exit_code = 3


class CacheIncompleteError(VlsiCacheError, RuntimeError):
    """The build of this cache has not finished."""

    exit_code = 3


class CacheCorruptError(VlsiCacheError, OSError):
    """A file of a cache or of a run is not what was written."""

    exit_code = 3

    @classmethod
    def at(cls, path: str | os.PathLike[str], what: str, *, hint: str | None = None) -> "CacheCorruptError":
        """The error about `path` with which the message begins; `what` follows it: ` is missing`, `: id 7 of 5`."""
        return cls(f"`{path}`{what}", file=path, hint=hint)


class StoreError(VlsiCacheError, OSError):
    """An object store cannot be reached, or does not let us in."""

    exit_code = 3


class FingerprintMismatchError(VlsiCacheError, ValueError):
    """What is on disk was made from something else than what is asked for now."""

    exit_code = 3


class RunBusyError(VlsiCacheError, RuntimeError):
    """Another process is working on this run folder."""

    exit_code = 3


class SampleNotFoundError(VlsiCacheError, KeyError):
    """The cache has no such sample."""

    exit_code = 3


class DiskFullError(VlsiCacheError, OSError):
    """The disk has no room for what is to be written."""

    exit_code = 3

    def __init__(self, what: str = "", *, file: str | os.PathLike[str] | None = None, hint: str | None = None) -> None:
        super().__init__(what, file=file, hint=hint)
        self.errno = errno.ENOSPC


class WorkerDiedError(VlsiCacheError, RuntimeError):
    """A process that prepares rows for this one has ended."""


class ProcessLostError(VlsiCacheError, RuntimeError):
    """Another process of the same launch has ended; what was saved is good, and the same launch goes on from there."""


class InterruptedRunError(VlsiCacheError, KeyboardInterrupt):
    """Ctrl-C or SIGTERM came; the message is the command that goes on from here."""

    exit_code = 130


def command_line(*words: object) -> str:
    """A command of ours, ready to be pasted into a shell."""
    return shlex.join(["vlsi-cache", *map(str, words)])


def list_problems(problems: list[str], *, limit: int = 10) -> str:
    """Join `problems` into one message: the first `limit` on a line each, and how many more there are."""
    shown = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        shown.append(f"  ... and {len(problems) - limit} more")
    return "\n".join(shown)


def first_of(names: Sequence[str], *, limit: int = 3) -> str:
    """The first `limit` names in quotes, and whether there are more."""
    return ", ".join(map(repr, names[:limit])) + (", ..." if len(names) > limit else "")


def did_you_mean(
    word: object, known: Iterable[str], *, most: int = 1, show: Callable[[str], str] = "`{}`".format
) -> str:
    """`; did you mean `this`?` with the names of `known` that are most like `word`; empty when none is."""
    close = difflib.get_close_matches(str(word), list(known), n=most)
    return f"; did you mean {' or '.join(map(show, close))}?" if close else ""


def validation_message(problem: Mapping[str, Any]) -> str:
    """What one of pydantic's `errors()` says: of an error that our own code raised, its message alone."""
    return str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
