"""Samples made ready for the model, by worker processes once there is enough to prepare.

At first they are prepared in this process. When that has taken as long as it takes to start workers, those are started
beside it, and take over as soon as they are ready: a short run never waits for workers, and a long one loses at most
START_S. Order and content of batches do not depend on who prepares them.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from vlsi_cache.progress import say

from .encoder import Encoder
from .pictures import Features
from .records import Record
from .sequence import PADDED, Encoded, Layout
from .workers import Workers

START_S = 10.0  # that workers take to import and to load tokenizer and processor, measured on two busy cores

EncodeAll = Callable[[Sequence[Record]], list[Encoded]]


class Preparer:
    """`Encoder.encode_all` here or in `num_workers` processes; several threads may ask at once. Close it at the end.

    With `features` of pictures, which are kept in this process, everything is prepared in this process.
    """

    def __init__(
        self, encoder: Encoder, num_workers: int, layout: Layout = PADDED, *, features: Features | None = None
    ) -> None:
        self._encoder, self._layout, self._features = encoder, layout, features
        self.num_workers = num_workers if encoder.can_be_sent and features is None else 0
        self._one_at_a_time = threading.Lock()
        self._spent_s = 0.0
        self._starting: Workers | None = None
        self._ready: Workers | None = None
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def num_threads(self) -> int:
        """Threads that may well ask at once."""
        return max(1, self.num_workers)

    def __enter__(self) -> "Preparer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode_all(self, records: Sequence[Record]) -> list[Encoded]:
        """As `Encoder.encode_all`; also raises WorkerDiedError."""
        if self._failure is not None:
            raise self._failure
        if self._ready is not None:
            return self._ready.call(encode_in_worker, list(records))
        with self._one_at_a_time:
            started = time.monotonic()
            found = self._encoder.encode_all(records, self._layout, features=self._features)
            self._spent_s += time.monotonic() - started
            if self.num_workers and self._spent_s >= START_S and self._starting is None:
                self._start()
        return found

    def _start(self) -> None:
        say(f"preparing samples has taken {self._spent_s:.0f} s: {self.num_workers} worker processes go on with it")
        self._starting = Workers(self.num_workers, "preparing samples", (self._encoder, self._layout))
        self._thread = threading.Thread(target=self._wait_for, args=(self._starting,), daemon=True)
        self._thread.start()

    def _wait_for(self, workers: Workers) -> None:
        """All workers have loaded what they need, or none can."""
        try:
            with ThreadPoolExecutor(workers.number) as pool:
                list(pool.map(lambda _: workers.call(encode_in_worker, []), range(workers.number)))
            self._ready = workers
        except BaseException as error:  # the next one who asks is told
            self._failure = error

    def close(self) -> None:
        if self._starting is not None:
            self._starting.close()
        if self._thread is not None:
            self._thread.join()


def encode_in_worker(state: tuple[Encoder, Layout], records: list[Record]) -> list[Encoded]:
    encoder, layout = state
    return encoder.encode_all(records, layout)
