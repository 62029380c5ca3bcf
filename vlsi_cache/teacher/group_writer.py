"""The writing side of a cache for the processes of a group, which make the same rows: the first of them writes.

Alone, a process is a group of one. Whatever is on the disk decides what is done next, and others may write there too;
so the first process looks, and all of the group go by what it has seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vlsi_cache.processes import ALONE, Processes
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.store.writer import CacheWriter, PartQueue, PartSamples


class GroupWriter:
    """A `CacheWriter` of the first process; rank `rank` of `world` is that of the group among all that build."""

    def __init__(
        self, begin: Callable[[], CacheWriter], group: Processes = ALONE, *, rank: int = 0, world: int = 1
    ) -> None:
        """`begin` makes the writer, in the first process alone; its errors are raised in all."""
        self._group, self._rank, self._world = group, rank, world
        self._own: list[CacheWriter] = []

        def make() -> CacheHeader:
            self._own.append(begin())
            return self._own[0].header

        self.header = group.from_first(make)

    def missing_parts(self) -> list[int]:
        """Parts not yet committed, the own ones first."""
        return self._group.from_first(lambda: self._own[0].missing_parts(rank=self._rank, world=self._world))

    def still_missing(self, missing: list[int]) -> Iterator[int]:
        """The parts that nobody else has written by the time that their turn comes; the first one in any case.

        All of a group ask for the next part at the same place of their work.
        """
        yield missing[0]
        for part in missing[1:]:
            if not self._group.from_first(lambda part=part: self._own[0].has_part(part)):
                yield part

    def by_first(self, work: Callable[[CacheWriter], None]) -> None:
        """Let the first process do this with its writer; the others wait until it is done, and have its errors too."""
        self._group.from_first(lambda: work(self._own[0]))

    @contextmanager
    def in_background(self) -> Iterator["PartQueue | NoQueue"]:
        """Where finished parts go; leaving the context waits until all are written."""
        if not self._own:
            yield NoQueue()
            return
        with self._own[0].in_background() as queue:
            yield queue

    def finish(self, *, is_new: bool = True) -> None:
        """Write the table if all parts are there (anew, if `is_new`); the others of the group wait until it is done."""

        def end() -> None:
            if is_new or not self._own[0].has_table():
                self._own[0].finish()

        self._group.from_first(end)


class NoQueue:
    """Where the parts of the other processes go: nowhere."""

    is_full = False

    def put(self, index: int, samples: PartSamples) -> None:
        pass

    def check(self) -> None:
        pass
