"""Work that a thread does ahead of whoever takes its results, in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], *, num_ahead: int = 2
) -> Generator[Result, None, None]:
    """`work(item)` of every item, made by one thread up to `num_ahead` items before it is taken.

    An error of the thread comes up where its result would have: everything before it is still good. Leaving early
    (close the generator) waits for the item at work and no further one.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="vlsi-cache-ahead")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
