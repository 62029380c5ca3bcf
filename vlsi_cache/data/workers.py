"""Worker processes: the same work as in this process, on other cores.

A worker is a plain Python process that does what comes through its pipe, one thing after the other. It knows nothing
of the script that started it (which multiprocessing would run again in each child), and it ends when the other end of
the pipe does: however this process ends, no worker stays behind.
"""

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from vlsi_cache.errors import ModelError, VlsiCacheError, WorkerDiedError
from vlsi_cache.io import ahead

AHEAD = 2  # things that wait for each worker
# One thread each: there are as many workers as there should be threads. None of them needs a GPU.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
_CODE = "from vlsi_cache.data.workers import serve; serve({handle})"


class _Worker:
    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        env = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path}
        # -P: files of the working folder, `random.py` say, are modules only if they are so in this process.
        command = [sys.executable, "-P", "-c", _CODE.format(handle=theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=env)
        theirs.close()
        self.has_state = False


class Workers:
    """`number` processes that hold a copy of `state`; `what` they do is told when one dies. Close them at the end.

    Raises TypeError or alike for a state that cannot be given to another process.
    """

    def __init__(self, number: int, what: str, state: Any) -> None:
        self._what, self._state = what, bytes(ForkingPickler.dumps(state))
        self._all = [_Worker() for _ in range(number)]
        self._free: queue.Queue[_Worker | None] = queue.Queue()
        for worker in self._all:
            self._free.put(worker)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def number(self) -> int:
        return len(self._all)

    def call(self, function: Callable[[Any, Any], Any], item: Any) -> Any:
        """`function(state, item)` in a worker that is free; several threads may call at once.

        Raises what the function raises, and WorkerDiedError.
        """
        worker = self._free.get()
        if worker is None:
            self._free.put(None)
            raise WorkerDiedError(f"the workers that are {self._what} have ended")
        try:
            if not worker.has_state:
                worker.connection.send_bytes(self._state)
                worker.has_state = True
            worker.connection.send((function, item))
            is_good, result = worker.connection.recv()
        except (EOFError, OSError):
            self._free.put(None)  # what waits for a free one must not wait for ever
            raise WorkerDiedError(self._died(worker)) from None
        self._free.put(worker)
        if not is_good:
            raise result
        return result

    def map(self, function: Callable[[Any, Any], Any], items: Iterable[Any]) -> Generator[Any, None, None]:
        """The results for all items, in their order."""
        number = len(self._all)
        return ahead(partial(self.call, function), items, num_ahead=AHEAD * number, num_threads=number)

    def close(self) -> None:
        for worker in self._all:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._all:
            worker.process.wait()
        self._free.put(None)

    def _died(self, worker: _Worker) -> str:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=5)
        code = worker.process.returncode
        how = "has ended" if code is None or code >= 0 else f"was ended by {signal.Signals(-code).name}"
        return (
            f"a worker process ({worker.process.pid}) that was {self._what} {how}; if memory was short, run the same "
            "command again with fewer: `--set run.workers=1`, or none: `--set run.workers=0`"
        )


def serve(handle: int) -> None:
    """What a worker does: the state comes first, then functions and items until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the first one decides
    connection = Connection(handle)
    with suppress(EOFError, OSError, KeyboardInterrupt):
        state, failure = _received(connection)
        while True:
            asked, problem = _received(connection)
            connection.send_bytes(_answer(state, asked, failure or problem))


def _received(connection: Connection) -> tuple[Any, Exception | None]:
    """What came through the pipe, or why it cannot be loaded here; raises EOFError at the pipe's end."""
    try:
        return connection.recv(), None
    except EOFError:
        raise
    except Exception as error:
        return None, error


def _answer(state: Any, asked: Any, failure: Exception | None) -> Any:
    """What the function gives for its item, or its error, or that of what could not be loaded."""
    try:
        if failure is not None:
            raise failure
        function, item = asked
        return ForkingPickler.dumps((True, function(state, item)))
    except VlsiCacheError as error:
        return ForkingPickler.dumps((False, error))
    except Exception as error:  # of foreign code; not all of them can be sent
        return ForkingPickler.dumps((False, ModelError(f"{type(error).__name__}: {error}")))
