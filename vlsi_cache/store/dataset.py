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
from functools import partial

import numpy as np

from vlsi_cache.errors import DataError
from vlsi_cache.io import ahead

from .part import Part, Row
from .reader import RECENT_BYTES, Cache, open

READING_THREADS = 2


Units = dict[int, list[range]]  # by part


@dataclass(frozen=True)
class Window:
    """Samples read together: (part, row) in the order they come out."""

    order: list[tuple[int, int]]

    @property
    def parts(self) -> list[int]:
        return sorted({part for part, _ in self.order})


@dataclass(frozen=True)
class Pending:
    """A sample of a part that has been read; `row` decodes it."""

    part: Part
    index: int

    @property
    def sample_id(self) -> str:
        return self.part.record.sample_ids[self.index]

    @property
    def num_tokens(self) -> int:
        """Response tokens with a row."""
        return self.part.record.sample_tokens[self.index]

    @property
    def num_response_tokens(self) -> int:
        return self.part.record.sample_response_tokens[self.index]

    def row(self) -> Row:
        """The rows of the sample. Raises CacheCorruptError."""
        return self.part.row(self.index)


class PartWindowReader:
    """Iterable of the rows of one rank in one epoch, in an order that depends on the arguments alone.

    `layers` are model layers ("last" is the last); [] gives rows without any layer, at no decoding cost. `start` is the
    number of samples of this epoch already consumed: what follows is exactly what an uninterrupted epoch would give.
    `units` are the rows of each part that stay together (None: turns of a row, by their ids).
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
        units: Units | None = None,
    ) -> None:
        check_place(rank=rank, world=world, window_parts=window_parts, start=start)
        self.wait_s = 0.0
        self._cache = cache
        self._layers = layers
        self._window_parts = window_parts
        cache.header.layer_indices(layers)  # an unknown layer is an error now, not in a thread
        windows = plan_windows(
            units_per_part(cache) if units is None else units,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world=world,
            window_parts=window_parts,
        )
        self._windows = skip_samples(windows, start)

    def __len__(self) -> int:
        """Samples still to come."""
        return sum(len(window.order) for window in self._windows)

    def __iter__(self) -> Iterator[Row]:
        return (one.row() for one in self.pending())

    def pending(self, *, decode: bool = True) -> Iterator[Pending]:
        """The samples in their order, read and checked.

        With `decode` all rows of a part are decoded at once, in the reading threads: fastest for who wants them all.
        """
        parts = (part for window in self._windows for part in window.parts)
        # Mapping a file costs nothing: there a second thread would only take the interpreter from the consumer.
        num_threads = 1 if self._cache.header.profile == "fast" else READING_THREADS
        # While the rows of one window go out, as many parts as the next one has are read and decoded.
        load = partial(self._load, decode=decode)
        with closing(ahead(load, parts, num_ahead=self._window_parts, num_threads=num_threads)) as loaded:
            found: dict[int, Part] = {}
            for window in self._windows:
                began = time.perf_counter()
                found.clear()  # before the next window's parts come in: two windows are in memory, not three
                found.update((part, next(loaded)) for part in window.parts)
                self.wait_s += time.perf_counter() - began
                for part, row in window.order:
                    yield Pending(found[part], row)

    def _load(self, part: int, *, decode: bool) -> Part:
        read = self._cache.part(part, self._layers, keep=False, undone=True)
        # Decoded whole: many small steps in several threads would wait for each other, not work at the same time.
        return read.decoded() if decode else read


def check_place(*, rank: int, world: int, window_parts: int, start: int) -> None:
    """Raise DataError for a rank outside the world and the like."""
    if world < 1 or not 0 <= rank < world or window_parts < 1 or start < 0:
        raise DataError(f"impossible: rank {rank} of {world}, window_parts {window_parts}, start {start}")


def units_per_part(cache: Cache) -> Units:
    """The rows of every committed part that stay together when samples are shuffled: turns of one conversation.

    They lie side by side and are called `ID/1`, `ID/2`, ... in caches over all turns (`data.turns: all`).
    """
    table = cache.sample_table()
    counts = np.bincount(table["part"].to_numpy(), minlength=1)
    num_samples = {part: int(counts[part]) if part < len(counts) else 0 for part in cache.parts}
    if (cache.header.spec.get("data") or {}).get("turns") != "all":
        return {part: [range(row, row + 1) for row in range(num)] for part, num in num_samples.items()}
    units: Units = {part: [] for part in cache.parts}
    before: tuple[int, str, int] | None = None  # part, row's id and number of the turn
    for part, row, name in zip(*(table[key].to_pylist() for key in ("part", "row", "id")), strict=True):
        own, _, number = name.rpartition("/")
        turn = (part, own, int(number)) if own and number.isascii() and number.isdigit() else None
        if turn is not None and before is not None and turn[:2] == before[:2] and turn[2] > before[2]:
            units[part][-1] = range(units[part][-1].start, row + 1)
        else:
            units[part].append(range(row, row + 1))
        before = turn
    return units


def plan_windows(units: Units, *, seed: int, epoch: int, rank: int, world: int, window_parts: int) -> list[Window]:
    """The windows of one rank: a function of the arguments alone, no file is read."""
    parts = np.random.default_rng([seed, epoch]).permutation(sorted(units)).tolist()
    num_samples = {part: sum(map(len, units[part])) for part in parts}
    total = sum(num_samples.values())
    low, high = rank * total // world, (rank + 1) * total // world
    spans, first = [], 0
    for part in parts:
        own = range(max(low - first, 0), min(high - first, num_samples[part]))
        if own:
            # A rank may end in the middle of a unit, whose other samples are the next rank's.
            cut = (range(max(unit.start, own.start), min(unit.stop, own.stop)) for unit in units[part])
            spans.append([(part, unit) for unit in cut if unit])
        first += num_samples[part]
    rng = np.random.default_rng([seed, epoch, rank, world])
    windows = []
    for at in range(0, len(spans), window_parts):
        found = [unit for span in spans[at : at + window_parts] for unit in span]
        windows.append(
            Window([(part, row) for part, unit in (found[i] for i in rng.permutation(len(found))) for row in unit])
        )
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
        self.path = opened.path
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
        self._units = units_per_part(opened)
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
        num_samples = [sum(map(len, units)) for units in self._units.values()]
        first = dict(zip(self._units, np.cumsum([0, *num_samples]).tolist(), strict=False))
        windows = skip_samples(plan_windows(self._units, epoch=self._epoch, **self._place), self._start)
        return [first[part] + row for window in windows for part, row in window.order]
