"""What people read: messages and progress bars on stderr, sizes and times, users' texts made safe for a terminal.

A sample's kind or a token may hold codes that colour, move or rename a terminal, or turn the direction of the text.
"""

import html
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

# C0 and C1 controls, marks that turn the direction, line and paragraph separators, halves of surrogate pairs.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, keep: str = "\n\t") -> str:
    """`text` with everything unsafe but `keep` written out: `\\x1b`, `\\u202e`."""
    return UNSAFE.sub(lambda found: found[0] if found[0] in keep else _written(found[0]), text)


def html_text(text: str) -> str:
    """`text` for a page; controls are no characters of HTML and are written out."""
    return html.escape(printable(text))


def _written(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}"


def human_bytes(num_bytes: float) -> str:
    """`1234567` -> `1.2 MB`; decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 999.5:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def human_seconds(seconds: float) -> str:
    """`754` -> `12 min 34 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


LINE_S = 60.0  # between two lines where there is no terminal
Item = TypeVar("Item")


_is_muted = False


@contextmanager
def muted() -> Iterator[None]:
    """Nothing is said and no bar is drawn in this process: another one of the same launch does."""
    global _is_muted
    before, _is_muted = _is_muted, True
    try:
        yield
    finally:
        _is_muted = before


def say(message: str) -> None:
    """One line for a person, on standard error and above any progress bar."""
    if _is_muted:
        return
    from tqdm import tqdm

    tqdm.write(printable(message), file=sys.stderr)


def progress(
    items: Iterable[Item], what: str, *, unit: str, total: int | None = None, done: int = 0, delay: float = 0
) -> Iterator[Item]:
    """The items, one after the other, while a `Bar` counts them; `total` is their number where they have no len()."""
    if total is None and hasattr(items, "__len__"):
        total = done + len(items)  # type: ignore[arg-type]
    with Bar(what, unit=unit, total=total, done=done, delay=delay) as bar:
        for item in items:
            yield item
            bar.update()


class Bar:
    """How many of `total` are done; `done` of them were so before, and `delay` seconds go by before a bar is drawn."""

    def __init__(
        self, what: str, *, unit: str, total: int | None = None, done: int = 0, scaled: bool = False, delay: float = 0
    ) -> None:
        self._style = {"unit": unit, "unit_scale": scaled}
        self._what, self._total, self._initial, self._count, self._note = what, total, done, done, ""
        self._started, self._num_lines = time.monotonic(), 0
        self._stream, self._closed = sys.stderr, threading.Event()
        self._bar: Any = None
        self._thread: threading.Thread | None = None
        if _is_muted:
            return
        from tqdm.auto import tqdm

        is_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
        if is_notebook or self._stream.isatty():
            self._bar = tqdm(desc=what, total=total, initial=done, delay=delay, **self._style)
        else:
            # A step may take longer than the time between two lines, so nobody can wait for its end.
            self._thread = threading.Thread(target=self._write_lines, name="vlsi-cache-progress", daemon=True)
            self._thread.start()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def update(self, num: int = 1) -> None:
        self._count += num
        if self._bar is not None:
            self._bar.update(num)

    def note(self, text: str) -> None:
        """What stands behind the numbers from now on."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._thread is not None and not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            if self._num_lines:  # what was begun to be told is told to its end
                self._write_line()

    def _write_lines(self) -> None:
        while not self._closed.wait(LINE_S):
            self._write_line()

    def _write_line(self) -> None:
        if self._stream.closed:
            return
        from tqdm import tqdm

        line = tqdm.format_meter(
            self._count,
            self._total,  # type: ignore[arg-type] - None is fine
            time.monotonic() - self._started,
            ncols=0,
            prefix=self._what,
            initial=self._initial,
            postfix=self._note or None,
            **self._style,
        )
        self._num_lines += 1
        print(line, file=self._stream, flush=True)
