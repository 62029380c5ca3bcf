"""A cache as a torch data set, and whole epochs in shuffled order at the speed of whole parts.

There is one order, `plan_windows`. `PartWindowReader` gives the rows in it, read ahead in threads: `distill` trains on
it, and it is the fastest for a loop of your own. `PartWindowSampler` gives the same order as indices, for a torch
DataLoader over a `CacheDataset`.

The shuffled parts of an epoch form one sequence of samples, and every rank takes an equal stretch of it: ranks are
disjoint, complete and equal to within one sample, and each part is read by one rank (at a boundary by two). Inside a
rank, samples are shuffled over windows of `window_parts` parts.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlsi_cache.errors import DataError
from vlsi_cache.io import ahead

from .part import Part, Row
from .reader import RECENT_BYTES, Cache, open

READING_THREADS = 2


@dataclass(frozen=True)
class Window:
    """Samples read together: (part, row) in the order they come out."""

    order: list[tuple[int, int]]

    @property
    def parts(self) -> list[int]:
        return sorted({part for part, _ in self.order})


class PartWindowReader:
    """Iterable of the rows of one rank in one epoch, in an order that depends on the arguments alone.

    `layers` are model layers ("last" is the last); [] gives rows without any layer, at no decoding cost. `start` is the
    number of samples of this epoch already consumed: what follows is exactly what an uninterrupted epoch would give.
    `wait_s` is the time the consumer has waited for rows. Up to two windows of decoded parts are in memory, 8 bytes an
    entry (4 where a view of the file does).
    """

    def __init__(
        self,
        cache: Cache,
        *,
        layers: Sequence[int | str] | None = None,
        seed: int,
        epoch: int,
        rank: int = 0,
        world: int = 1,
        window_parts: int = 4,
        start: int = 0,
    ) -> None:
        check_place(rank=rank, world=world, window_parts=window_parts, start=start)
        self.wait_s = 0.0
        self._cache = cache
        self._layers = layers
        self._window_parts = window_parts
        cache.header.layer_indices(layers)  # an unknown layer is an error now, not in a thread
        windows = plan_windows(
            samples_per_part(cache), seed=seed, epoch=epoch, rank=rank, world=world, window_parts=window_parts
        )
        self._windows = skip_samples(windows, start)

    def __len__(self) -> int:
        """Samples still to come."""
        return sum(len(window.order) for window in self._windows)

    def __iter__(self) -> Iterator[Row]:
        parts = (part for window in self._windows for part in window.parts)
        # Mapping a file costs nothing: there a second thread would only take the interpreter from the consumer.
        num_threads = 1 if self._cache.header.profile == "fast" else READING_THREADS
        # While the rows of one window go out, as many parts as the next one has are read and decoded.
        with closing(ahead(self._load, parts, num_ahead=self._window_parts, num_threads=num_threads)) as loaded:
            found: dict[int, Part] = {}
            for window in self._windows:
                began = time.perf_counter()
                found.clear()  # before the next window's parts come in: two windows are in memory, not three
                found.update((part, next(loaded)) for part in window.parts)
                self.wait_s += time.perf_counter() - began
                for part, row in window.order:
                    yield found[part].row(row)

    def _load(self, part: int) -> Part:
        # Decoded whole: many small steps in several threads would wait for each other, not work at the same time.
        return self._cache.part(part, self._layers, keep=False, undone=True).decoded()


def check_place(*, rank: int, world: int, window_parts: int, start: int) -> None:
    """Raise DataError for a rank outside the world and the like."""
    if world < 1 or not 0 <= rank < world or window_parts < 1 or start < 0:
        raise DataError(f"impossible: rank {rank} of {world}, window_parts {window_parts}, start {start}")


def samples_per_part(cache: Cache) -> dict[int, int]:
    """Number of samples of every committed part."""
    counts = np.bincount(cache.sample_table()["part"].to_numpy(), minlength=1)
    return {part: int(counts[part]) if part < len(counts) else 0 for part in cache.parts}


def plan_windows(
    num_samples: dict[int, int], *, seed: int, epoch: int, rank: int, world: int, window_parts: int
) -> list[Window]:
    """The windows of one rank: a function of the arguments alone, no file is read."""
    parts = np.random.default_rng([seed, epoch]).permutation(sorted(num_samples)).tolist()
    total = sum(num_samples.values())
    low, high = rank * total // world, (rank + 1) * total // world
    spans, first = [], 0
    for part in parts:
        begin, end = max(low, first), min(high, first + num_samples[part])
        if begin < end:
            spans.append([(part, row - first) for row in range(begin, end)])
        first += num_samples[part]
    rng = np.random.default_rng([seed, epoch, rank, world])
    windows = []
    for at in range(0, len(spans), window_parts):
        samples = [sample for span in spans[at : at + window_parts] for sample in span]
        windows.append(Window([samples[i] for i in rng.permutation(len(samples))]))
    return windows


def skip_samples(windows: list[Window], start: int) -> list[Window]:
    """The windows without their first `start` samples."""
    left = []
    for window in windows:
        if start < len(window.order):
            left.append(Window(window.order[start:]))
        start = max(0, start - len(window.order))
    return left


class CacheDataset:
    """`dataset[i]` is the Row of sample i, in the order of the sample table (by part, then as stored).

    `layers` are model layers ("last" is the last), all by default. Parts read last stay in memory, up to
    `recent_bytes`, so that neighbours in the order of a PartWindowSampler cost one read. Can be pickled: what goes to
    a worker is the path.
    """

    def __init__(
        self,
        cache: Cache | str | os.PathLike[str],
        *,
        layers: Sequence[int | str] | None = None,
        recent_bytes: int = RECENT_BYTES,
    ) -> None:
        opened = cache if isinstance(cache, Cache) else open(cache)
        opened.header.layer_indices(layers)  # an unknown layer is an error now, not in a worker
        self.path = Path(opened.path)
        self.layers = None if layers is None else list(layers)
        self.recent_bytes = recent_bytes
        self._use(opened)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Row:
        """The rows of sample `index`; IndexError outside 0 to len - 1, negative numbers count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a cache with {len(self)} samples")
        return self._cache.part(int(self._parts[index]), self.layers, undone=True).row(int(self._rows[index]))

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """A whole batch, part by part, in the order of `indices`."""
        found: dict[int, Row] = {}
        for index in sorted(indices, key=lambda i: int(self._parts[i])):
            found[index] = self[index]
        return [found[index] for index in indices]

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "layers": self.layers, "recent_bytes": self.recent_bytes}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._use(open(self.path))

    def _use(self, cache: Cache) -> None:
        self._cache = cache
        self._cache.recent_bytes = self.recent_bytes
        table = cache.sample_table()
        self._parts, self._rows = table["part"].to_numpy(), table["row"].to_numpy()


class PartWindowSampler:
    """Indices of a CacheDataset for one rank and epoch, shuffled inside windows of `window_parts` parts.

    The order depends on the arguments alone, ranks are disjoint and complete and equal to within one sample.
    `set_epoch` begins another epoch; `start` samples of the first one are left out, which resumes it.
    """

    def __init__(
        self,
        cache: Cache | CacheDataset,
        *,
        seed: int,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        window_parts: int = 4,
        start: int = 0,
    ) -> None:
        check_place(rank=rank, world=world, window_parts=window_parts, start=start)
        opened = cache._cache if isinstance(cache, CacheDataset) else cache
        self._num_samples = samples_per_part(opened)
        self._place = {"seed": seed, "rank": rank, "world": world, "window_parts": window_parts}
        self._epoch, self._start = epoch, start

    def set_epoch(self, epoch: int) -> None:
        """From the beginning of `epoch`."""
        if epoch < 0:
            raise DataError(f"epoch {epoch} is negative")
        self._epoch, self._start = epoch, 0

    def __len__(self) -> int:
        return len(self._order())

    def __iter__(self) -> Iterator[int]:
        return iter(self._order())

    def _order(self) -> list[int]:
        first = dict(zip(self._num_samples, np.cumsum([0, *self._num_samples.values()]).tolist(), strict=False))
        windows = skip_samples(plan_windows(self._num_samples, epoch=self._epoch, **self._place), self._start)
        return [first[part] + row for window in windows for part, row in window.order]
