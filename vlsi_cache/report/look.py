"""What `inspect`, `sample` and `stats` look at, for Python and for the command line. A cache may be unfinished."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.errors import SpecError
from vlsi_cache.store.reader import Cache, CachePath, open

from .describe import describe_cache, description_text
from .example import grid_of
from .layers import MAX_PARTS, CacheStats, cache_stats


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found: JSON-ready `facts`; `str` is the text for people."""

    facts: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    def as_dict(self) -> dict[str, Any]:
        return self.facts

    def __str__(self) -> str:
        return description_text(self.facts)


@dataclass(frozen=True)
class SampleGrid:
    """What every layer says at the response tokens of one sample.

    `grid[l][t]` holds for layer `layers[l]` and token `tokens[t]` (id `token_ids[t]`, response token `positions[t]`):
    `ids`, `words` and `probs` of its top words, `entropy` in nats, `tail_mass`, `gold_logprob` and `gold_rank`, from 0.
    """

    id: str
    kind: str
    row_kind: str
    final_layer: int
    has_texts: bool
    num_response_tokens: int
    layers: list[int]
    top_k: int
    num_tokens: int
    positions: list[int]
    token_ids: list[int]
    tokens: list[str]
    grid: list[list[dict[str, Any]]]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def _opened(cache: CachePath) -> Cache:
    return cache if isinstance(cache, Cache) else open(cache, allow_incomplete=True)


def inspect(cache: CachePath) -> Inspection:
    """What a cache is: origin, progress, layers, bytes. Reads records and indices, no rows.

    Raises what opening a cache raises, but not for one that is unfinished.
    """
    return Inspection(describe_cache(cache.path if isinstance(cache, Cache) else Path(cache)))


def stats(cache: CachePath, *, parts: int = MAX_PARTS) -> CacheStats:
    """What the layers say, over `parts` evenly spaced parts (0: all): entropy, loss, ranks, KL, per layer.

    Raises CacheIncompleteError when there are no rows yet.
    """
    return cache_stats(_opened(cache), parts=parts)


def sample(
    cache: CachePath,
    sample_id: str,
    *,
    top: int = 1,
    layers: Sequence[int | str] | None = None,
    tokens: str | None = None,
) -> SampleGrid:
    """The `top` words of every layer at every response token of a sample; `tokens` are those to show, `A:B`.

    Raises SampleNotFoundError; SpecError for `layers` or `tokens` that are not there.
    """
    opened = _opened(cache)
    numbers = [opened.layers[index] for index in opened.header.layer_indices(layers)]
    row = opened.row(sample_id, layers)
    shown = slice(None) if tokens is None else _rows_at(row.positions_T, tokens, sample_id)
    return SampleGrid(
        id=row.sample_id,
        kind=row.kind,
        row_kind=opened.header.row_kind,
        final_layer=opened.layers[-1],
        has_texts=opened.header.text_xxh3 is not None,
        num_response_tokens=len(row.response_ids_R),
        **grid_of(row, layers=numbers, text=opened.token_text, top=top, tokens=shown),
    )


def _rows_at(positions_T: np.ndarray, tokens: str, sample_id: str) -> slice:
    """The rows of response tokens A to B - 1, from `A:B`, `A:`, `:B` or `A`."""
    first, colon, last = (part.strip() for part in tokens.partition(":"))
    if not all(part.isdecimal() or (colon and not part) for part in (first, last or first)):
        raise SpecError(f"--tokens {tokens}: write A:B with response token numbers from 0, for instance 0:20")
    start = int(first or 0)
    stop = int(last) if last else (None if colon else start + 1)
    low = int(positions_T.searchsorted(start))
    high = len(positions_T) if stop is None else int(positions_T.searchsorted(stop))
    if low >= high:
        known = f"{positions_T[0]} to {positions_T[-1]}" if len(positions_T) else "none"
        raise SpecError(f"--tokens {tokens}: sample {sample_id!r} has no rows there; its response tokens are {known}")
    return slice(low, high)
