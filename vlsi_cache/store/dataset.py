"""A cache as a map-style dataset for anybody's own trainer, and the sampler that reads it at the speed of whole parts.

Both fit torch.utils.data.DataLoader, neither imports torch. Workers must be spawned or none at all; each opens the
cache for itself.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vlsi_cache.errors import DataError

from .part import Row
from .reader import RECENT_BYTES, Cache, open
from .sampler import check_place, plan_windows, samples_per_part, skip_samples


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
