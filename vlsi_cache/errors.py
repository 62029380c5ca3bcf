"""Every error a user can meet. Each class is also the standard-library error it is, and knows its exit code.

Messages say what is wrong, where, which values, and what to do next.
"""

import errno
import shlex

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
    "RunBusyError",
    "SampleNotFoundError",
    "SpecError",
    "VlsiCacheError",
    "command_line",
    "list_problems",
]


class VlsiCacheError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 2


class SpecError(VlsiCacheError, ValueError):
    """The spec or a flag is wrong."""


class DataError(VlsiCacheError, ValueError):
    """Rows or images cannot be used as they are."""


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


class FingerprintMismatchError(VlsiCacheError, ValueError):
    """What is on disk was made from something else than what is asked for now."""

    exit_code = 3


class RunBusyError(VlsiCacheError, RuntimeError):
    """Another process is working on this run folder."""

    exit_code = 3


class SampleNotFoundError(VlsiCacheError, KeyError):
    """The cache has no such sample."""

    exit_code = 3

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class DiskFullError(VlsiCacheError, OSError):
    """The disk has no room for what is to be written."""

    exit_code = 3

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return str(self.args[1])


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
