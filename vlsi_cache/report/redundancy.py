"""Which layers of a cache say what their neighbours say: a proposal which of them to drop.

Shape suffix: L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlsi_cache.errors import SpecError

from .layer_stats import kl_matrix
from .stats import MAX_SUMMARY_PARTS, spaced
from .text import percent, table

if TYPE_CHECKING:
    from vlsi_cache.store.reader import Cache

LITTLE_MASS = 0.5  # below this share of kept mass a bound from the kept words says little


@dataclass(frozen=True)
class Drop:
    """One layer in the order of removal: `kl` is its mean KL from `stand_in`, the nearest layer still there."""

    layer: int
    stand_in: int
    kl: float
    kept_mass: float  # mean over the parts that were read


@dataclass(frozen=True)
class LayerSuggestion:
    """`order` goes on until only the final layer is left; its first `num_dropped` layers are proposed to go."""

    layers: list[int]  # what is left
    order: list[Drop]
    num_dropped: int
    worst_kl: float  # the largest mean KL of a dropped layer from the nearest one in `layers`
    tokens: int  # compared
    keep: int | None
    max_kl: float | None

    @property
    def dropped(self) -> list[int]:
        """The layers proposed to go, in ascending order."""
        return sorted(one.layer for one in self.order[: self.num_dropped])

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "order": [vars(one) for one in self.order], "dropped": self.dropped}


def suggest_layers(
    cache: "Cache", *, keep: int | None = None, max_kl: float | None = None, parts: int = MAX_SUMMARY_PARTS
) -> LayerSuggestion:
    """Propose intermediate layers to drop, from the KL between the cached layers (see sparse.compare).

    Greedy: again and again the layer goes whose mean KL from the nearest layer still there is smallest, the nearer of
    both sides; of equals the deeper one. The final layer never goes. It ends when `keep` layers are left, the final one
    among them, or before the first drop that costs more than `max_kl` nats; without both nothing is dropped and only
    the order is told. Read are `parts` evenly spaced parts (0: all).

    Raises SpecError for rows of draws, which have no KL, and for impossible limits.
    """
    _check(cache, keep, max_kl)
    kl_LL, num_tokens = kl_matrix(cache, parts=parts)
    mass_L, order = _kept_mass(cache, parts), removal_order(kl_LL)
    if keep is not None:
        num_dropped = len(cache.layers) - keep
    else:
        num_dropped = len(order) if max_kl is not None else 0
    if max_kl is not None:
        too_much = (number for number, (_, _, kl) in enumerate(order) if kl > max_kl)
        num_dropped = min(num_dropped, next(too_much, len(order)))
    gone = {i for i, _, _ in order[:num_dropped]}
    left = [i for i in range(len(cache.layers)) if i not in gone]
    return LayerSuggestion(
        layers=[cache.layers[i] for i in left],
        order=[Drop(cache.layers[i], cache.layers[j], kl, float(mass_L[i])) for i, j, kl in order],
        num_dropped=num_dropped,
        worst_kl=max((_nearest(kl_LL, i, left)[1] for i in gone), default=0.0),
        tokens=num_tokens,
        keep=keep,
        max_kl=max_kl,
    )


def removal_order(kl_LL: np.ndarray) -> list[tuple[int, int, float]]:
    """(layer row, row of its stand-in, KL) of one removal after the other, until the last row alone is left."""
    left, order = list(range(len(kl_LL))), []
    while len(left) > 1:
        costs = [(*_nearest(kl_LL, i, left), i) for i in left[:-1]]
        stand_in, kl, i = min(costs, key=lambda cost: (cost[1], -cost[2]))
        order.append((i, stand_in, kl))
        left.remove(i)
    return order


def _nearest(kl_LL: np.ndarray, i: int, left: Sequence[int]) -> tuple[int, float]:
    """Of the nearest remaining rows above and below row i the one with the smaller KL, and that KL."""
    before, after = [j for j in left if j < i][-1:], [j for j in left if j > i][:1]
    return min(((j, float(kl_LL[i, j])) for j in (*after, *before)), key=lambda one: one[1])


def _kept_mass(cache: "Cache", parts: int) -> np.ndarray:
    """[L]: mean kept mass over the parts that are read, from their records."""
    records = [cache.part_record(part) for part in spaced(cache.parts, parts)]
    means = [(record.summary["tail_mass"], record.num_tokens) for record in records if record.num_tokens]
    tails_L = sum(np.array(tail_L, float) * num for tail_L, num in means) / sum(num for _, num in means)
    return 1.0 - np.asarray(tails_L)


def _check(cache: "Cache", keep: int | None, max_kl: float | None) -> None:
    if cache.header.row_kind == "sampled":
        raise SpecError(
            f"`{cache.path}` holds rows of draws, whose KL is not defined: no layer can be proposed; name the layers"
        )
    if keep is not None and not 1 <= keep <= len(cache.layers):
        raise SpecError(f"`keep` is {keep}: of {len(cache.layers)} cached layers 1 to {len(cache.layers)} can be kept")
    if max_kl is not None and not max_kl >= 0:
        raise SpecError(f"`max_kl` is {max_kl}: it is a KL in nats and cannot be below 0")


def suggestion_text(suggestion: LayerSuggestion) -> str:
    """The order of removal as a table, and what it comes to."""
    rows = [
        [
            str(one.layer),
            str(one.stand_in),
            f"{one.kl:.3f}",
            percent(one.kept_mass),
            "drop" if number < suggestion.num_dropped else "",
        ]
        for number, one in enumerate(suggestion.order)
    ]
    left = ",".join([*map(str, suggestion.layers[:-1]), "last"])
    lines = [table(["layer", "stand-in", "KL, nats", "kept mass", "proposed"], rows), ""]
    lines += [
        f"mean KL of each layer from its stand-in when its turn comes, on {suggestion.tokens:,} rows; lower bounds"
    ]
    little = [one.layer for one in suggestion.order if one.kept_mass < LITTLE_MASS]
    if little:
        lines += [
            f"layers {', '.join(map(str, sorted(little)))} keep less than half of their mass: their KL may be far more"
        ]
    if suggestion.num_dropped:
        lines += [f"dropped layers are at most {suggestion.worst_kl:.3f} nats from the nearest layer that is left"]
        lines += [f"what is left: --layers {left}"]
    else:
        lines += ["nothing is dropped: name how many layers to keep, or how many nats a drop may cost"]
    return "\n".join(lines)
