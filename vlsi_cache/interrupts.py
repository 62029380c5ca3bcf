"""Ctrl-C and SIGTERM: what is at work ends where it can go on later.

Whatever does not train is simply left, as Python does on Ctrl-C: what is written on disk is whole at every moment. A
training finishes the step in hand, saves it, and ends then; a second signal ends it at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .errors import InterruptedRunError
from .progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Whether a training is to end after the step in hand."""

    def __init__(self) -> None:
        self.came = False

    def end_here(self) -> None:
        """Raise InterruptedRunError if so: call it where a step is finished and saved."""
        if self.came:
            raise InterruptedRunError


@contextmanager
def stopping_between_steps() -> Iterator[Signals]:
    """Note the first signal in what this gives; another one raises KeyboardInterrupt at once.

    Only in the main thread, and only for signals that nobody else handles or has switched off; all is as before
    afterwards.
    """
    signals = Signals()

    def note(number: int, frame: FrameType | None) -> None:
        if signals.came:
            signal.default_int_handler(number, frame)
        signals.came = True
        say(f"{signal.Signals(number).name}: the step in hand is finished and saved first; once more ends it at once")

    with _handled(SIGNALS, note):
        yield signals
        signals.end_here()  # one that came after the last step


@contextmanager
def terminating_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does: for the command line."""
    with _handled((signal.SIGTERM,), signal.default_int_handler):
        yield


@contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Any) -> Iterator[None]:
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if (there := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = there
                signal.signal(number, handler)
    try:
        yield
    finally:
        for number, there in before.items():
            signal.signal(number, there)
