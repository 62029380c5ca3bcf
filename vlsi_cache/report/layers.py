"""What the layers of a cache say, in numbers: entropy, loss, ranks, KL; and which layers could go.

Shape suffixes: L layers, T response tokens with a row, K kept entries, P bins of positions, B bins of entropies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlsi_cache.errors import CacheIncompleteError, SpecError
from vlsi_cache.io import with_null
from vlsi_cache.progress import progress
from vlsi_cache.sparse.row_kl import kl_sums
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.store.part import Row
from vlsi_cache.store.reader import Cache, CachePath, open

from .text import Table, layer_names, lines_of, percent, render, table

MAX_PARTS = 8  # parts that are read: enough for stable means, cheap for a cache of any size
FINE, COARSE = 4096, 64  # bins of the quantiles: 0.003 nats for 150,000 words; and of what is drawn
KL_TOKENS = 512  # tokens of a part that are compared, evenly spaced: all pairs of 20 layers in a second
MAX_KL_TOKENS = 16384
ENTROPY_QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
MASS_QUANTILES = {"p1": 0.01, "p50": 0.5}
LITTLE_MASS = 0.5  # below this share of kept mass a bound from the kept words says little
Sums = dict[str, np.ndarray]


def gold_ids(row: Row) -> np.ndarray:
    """[T]: the response token that each row of the cache is about."""
    return np.asarray(row.response_ids_R)[np.asarray(row.positions_T)].astype(np.int64)


def gold_ranks(row: Row) -> np.ndarray:
    """[L, T]: rank of the response token among the kept entries, from 0; -1 when it is not among them."""
    return ranks_of(row, gold_ids(row))


def ranks_of(rows: SparseRows, ids_T: np.ndarray) -> np.ndarray:
    """[L, T]: rank of a token id among the kept entries, from 0; -1 when it is not among them."""
    hits_LTK = np.asarray(rows.ids_LTK).astype(np.int64) == ids_T[None, :, None]
    hits_LTK &= np.isfinite(rows.logprobs_LTK)  # padding has an id too
    return np.where(hits_LTK.any(axis=2), hits_LTK.argmax(axis=2), -1)


def spaced(items: Sequence[int], num: int) -> list[int]:
    """`num` evenly spaced ones of the items, the first and the last among them; all of them for 0."""
    if not num or num >= len(items):
        return list(items)
    return [items[index] for index in sorted(set(np.linspace(0, len(items) - 1, num).round().astype(int).tolist()))]


@dataclass(frozen=True)
class LayerStats:
    """One layer over the tokens that were read; nats, shares between 0 and 1. None: not defined for these rows."""

    layer: int
    top_k: int
    entropy: dict[str, float]  # mean and quantiles
    kept_mass: dict[str, float] | None  # mean and quantiles of 1 - tail mass
    gold_nll: float
    perplexity: float
    gold_in_top_k: float  # share of tokens whose response word was kept
    gold_is_top: float  # share of tokens whose response word is the top word
    gold_rank: float | None  # mean rank of the response word among the kept ones, from 1, where it was kept
    top1_agreement: float  # share of tokens whose top word is also that of the final layer
    kl_to_next: float | None  # KL(this || next cached layer)
    kl_from_next: float | None  # KL(next cached layer || this)
    kl_to_last: float | None  # KL(this || final layer)


@dataclass(frozen=True)
class CacheStats:
    """Means over the response tokens of `parts`, weighted by tokens; `kl_LL[i, j]` is the mean KL(i || j)."""

    path: str
    name: str
    row_kind: str
    parts: list[int]
    num_parts: int
    num_tokens: int
    kl_tokens: int
    layers: list[LayerStats]
    kl_LL: np.ndarray | None
    position_edges_P: np.ndarray  # first position of every bin
    tokens_P: np.ndarray
    entropy_LP: np.ndarray  # mean entropy by position in the response; NaN where no token is
    entropy_edges: np.ndarray
    entropy_share_LB: np.ndarray  # share of a layer's tokens with this entropy

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; what is not a number is None."""
        matrix = None if self.kl_LL is None else {"tokens": self.kl_tokens, "kl": self.kl_LL.tolist()}
        return with_null(
            {
                "path": self.path,
                "row_kind": self.row_kind,
                "parts": self.parts,
                "num_parts": self.num_parts,
                "num_tokens": self.num_tokens,
                "layers": [vars(one) for one in self.layers],
                "kl_between_layers": matrix,
                "entropy_by_position": {
                    "first_position": self.position_edges_P.tolist(),
                    "tokens": self.tokens_P.tolist(),
                    "entropy": self.entropy_LP.tolist(),
                },
                "entropy_distribution": {
                    "edges": self.entropy_edges.tolist(),
                    "share": self.entropy_share_LB.tolist(),
                },
            }
        )


def cache_stats(cache: CachePath, *, parts: int = MAX_PARTS, with_kl: bool = True) -> CacheStats:
    """What the layers say, over `parts` evenly spaced parts (0: all): entropy, loss, ranks, and KL if it is wanted.

    The cache may be unfinished. Raises CacheIncompleteError when there are no rows yet.
    """
    cache = cache if isinstance(cache, Cache) else open(cache, allow_incomplete=True)
    chosen, edges_P = spaced(cache.parts, parts), position_edges(cache)
    has_kl = with_kl and cache.header.row_kind != "sampled"  # draws have no KL
    num_compared = kl_tokens_of_part(len(chosen)) if has_kl else 0
    sums: Sums = {}
    for part in progress(chosen, "stats", unit="part", delay=2):
        if rows := cache.read_part(part):
            more = _part_sums(cache, rows, edges_P, num_compared)
            sums = {name: array + sums.get(name, 0) for name, array in more.items()}
    if not sums or not sums["tokens"]:
        raise CacheIncompleteError(f"`{cache.path}` has no rows in parts {chosen[:4]}: there is nothing to measure yet")
    return _stats_of(cache, chosen, edges_P, sums)


def kl_tokens_of_part(num_parts: int) -> int:
    """How many tokens of each part are compared when so many parts are read."""
    return max(1, min(KL_TOKENS, MAX_KL_TOKENS // max(1, num_parts)))


def position_edges(cache: Cache) -> np.ndarray:
    """First positions of the bins: one by one, then two for every doubling."""
    longest = int(cache.sample_table()["num_response_tokens"].to_numpy().max(initial=1))
    edges, at = [0, 1], 2
    while at < longest:
        edges += [at, at + at // 2]
        at *= 2
    return np.array([edge for edge in edges if edge < max(1, longest)])


def _part_sums(cache: Cache, samples: list[Row], edges_P: np.ndarray, num_compared: int) -> Sums:
    rows = SparseRows.concat(samples)
    gold_T = np.concatenate([gold_ids(row) for row in samples])
    positions_T = np.concatenate([np.asarray(row.positions_T, np.int64) for row in samples])
    bins_T = np.searchsorted(edges_P, positions_T, side="right") - 1
    ranks_LT = ranks_of(rows, gold_T)
    top_LT = np.asarray(rows.ids_LTK)[:, :, 0]
    entropy_LT = np.asarray(rows.entropy_LT, np.float64)
    mass_LT = 1.0 - np.asarray(rows.tail_mass_LT, np.float64)
    sums: Sums = {
        "tokens": np.array(rows.num_tokens),
        "entropy": entropy_LT.sum(1),
        "mass": mass_LT.sum(1),
        "nll": -np.asarray(rows.gold_logprob_LT, np.float64).sum(1),
        "gold_kept": (ranks_LT >= 0).sum(1),
        "gold_top": (ranks_LT == 0).sum(1),
        "gold_rank": np.where(ranks_LT >= 0, ranks_LT + 1, 0).sum(1),
        "agree": (top_LT == top_LT[-1:]).sum(1),
        "tokens_P": np.bincount(bins_T, minlength=len(edges_P)),
        "entropy_LP": np.stack([np.bincount(bins_T, e_T, minlength=len(edges_P)) for e_T in entropy_LT]),
        "entropy_LB": _histograms(entropy_LT, _max_entropy(cache)),
        "mass_LB": _histograms(mass_LT, 1.0),
    }
    if num_compared:  # some tokens, in the weight of all tokens of the part
        chosen_T = np.array(spaced(range(rows.num_tokens), num_compared), np.int64)
        weight = rows.num_tokens / max(1, len(chosen_T))
        sums |= {"kl": weight * kl_sums(rows.select_tokens(chosen_T)), "kl_tokens": np.array(len(chosen_T))}
    return sums


def _max_entropy(cache: Cache) -> float:
    return max(1e-6, math.log(cache.header.vocab_size))


def _histograms(values_LT: np.ndarray, top: float) -> np.ndarray:
    """int64 [L, B]; values that are not known are in no bin."""
    known_LT = ~np.isnan(values_LT)
    bins_LT = np.clip(np.nan_to_num(values_LT) / top * FINE, 0, FINE - 1).astype(np.int64)
    return np.stack([np.bincount(b_T[known_T], minlength=FINE) for b_T, known_T in zip(bins_LT, known_LT, strict=True)])


def _quantiles(counts_LB: np.ndarray, top: float, wanted: dict[str, float]) -> list[dict[str, float]]:
    """Quantiles of every layer: where the running sums reach a share of their end, linear inside a bin; NaN where
    nothing is known."""
    found = []
    for counts_B in counts_LB:
        if not counts_B.any():
            found.append(dict.fromkeys(wanted, math.nan))
            continue
        sums_B = np.concatenate([[0.0], np.cumsum(counts_B)])
        quantiles = {}
        for name, share in wanted.items():
            target = share * sums_B[-1]
            right = int(np.searchsorted(sums_B, target))
            missing = float((sums_B[right] - target) / (sums_B[right] - sums_B[right - 1]))
            quantiles[name] = (right - missing) * top / FINE
        found.append(quantiles)
    return found


def _stats_of(cache: Cache, chosen: list[int], edges_P: np.ndarray, sums: Sums) -> CacheStats:
    top, num_tokens = _max_entropy(cache), int(sums["tokens"])
    kl_LL = sums["kl"] / num_tokens if "kl" in sums else None
    coarse_LB = sums["entropy_LB"].reshape(len(cache.layers), COARSE, -1).sum(2)
    with np.errstate(invalid="ignore", divide="ignore"):
        entropy_LP = sums["entropy_LP"] / sums["tokens_P"]
    return CacheStats(
        path=str(cache.path),
        name=str(cache.header.spec.get("name") or cache.path.name),
        row_kind=cache.header.row_kind,
        parts=chosen,
        num_parts=len(cache.parts),
        num_tokens=num_tokens,
        kl_tokens=int(sums.get("kl_tokens", 0)),
        layers=_layers_of(cache, sums, num_tokens, kl_LL),
        kl_LL=kl_LL,
        position_edges_P=edges_P,
        tokens_P=sums["tokens_P"],
        entropy_LP=entropy_LP,
        entropy_edges=np.linspace(0, top, COARSE + 1),
        entropy_share_LB=coarse_LB / num_tokens,
    )


def _layers_of(cache: Cache, sums: Sums, num_tokens: int, kl_LL: np.ndarray | None) -> list[LayerStats]:
    entropy = _quantiles(sums["entropy_LB"], _max_entropy(cache), ENTROPY_QUANTILES)
    mass = _quantiles(sums["mass_LB"], 1.0, MASS_QUANTILES)
    last, is_drawn = len(cache.layers) - 1, cache.header.row_kind == "sampled"
    names = ("entropy", "mass", "nll", "gold_kept", "gold_top", "agree")
    mean = {name: (sums[name] / num_tokens).tolist() for name in names}
    found = []
    for i, layer in enumerate(cache.layers):
        nll, num_kept = mean["nll"][i], int(sums["gold_kept"][i])
        next_kl = None if kl_LL is None or i == last else (float(kl_LL[i, i + 1]), float(kl_LL[i + 1, i]))
        found.append(
            LayerStats(
                layer=layer,
                top_k=cache.header.top_k[i],
                entropy={"mean": mean["entropy"][i], **entropy[i]},
                kept_mass=None if is_drawn else {"mean": mean["mass"][i], **mass[i]},
                gold_nll=nll,
                perplexity=math.inf if nll >= 700 else math.exp(nll),
                gold_in_top_k=mean["gold_kept"][i],
                gold_is_top=mean["gold_top"][i],
                gold_rank=float(sums["gold_rank"][i]) / num_kept if num_kept else None,
                top1_agreement=mean["agree"][i],
                kl_to_next=next_kl and next_kl[0],
                kl_from_next=next_kl and next_kl[1],
                kl_to_last=None if kl_LL is None else float(kl_LL[i, last]),
            )
        )
    return found


def stats_rows(stats: CacheStats) -> list[Table]:
    """Two tables: what each layer says, and how far it is from others (not for rows of draws)."""
    names = layer_names([one.layer for one in stats.layers])
    heads = ["layer", "k", "entropy", "p5", "p50", "p95", "loss", "perplexity", "word kept", "rank", "as last"]
    lines = []
    for name, one in zip(names, stats.layers, strict=True):
        spread = [_number(one.entropy[key]) for key in ("mean", "p5", "p50", "p95")]
        gold = [_number(one.gold_nll), big_number(one.perplexity), percent(one.gold_in_top_k), _number(one.gold_rank)]
        lines.append([name, str(one.top_k), *spread, *gold, percent(one.top1_agreement)])
    if stats.kl_LL is None:
        return [(heads, lines)]
    far = ["layer", "kept mass", "p1", "p50", "KL to next", "KL from next", "KL to last"]
    rows = []
    for name, one in zip(names, stats.layers, strict=True):
        mass = [percent(one.kept_mass[key]) for key in ("mean", "p1", "p50")] if one.kept_mass else ["", "", ""]
        rows.append([name, *mass, *(_number(kl) for kl in (one.kl_to_next, one.kl_from_next, one.kl_to_last))])
    return [(heads, lines), (far, rows)]


def stats_notes(stats: CacheStats) -> list[str]:
    """What was read, and what the columns are."""
    return lines_of("stats_notes.txt", stats=stats)


def stats_text(stats: CacheStats) -> str:
    """The tables for the terminal."""
    return "\n\n".join([*(table(heads, rows) for heads, rows in stats_rows(stats)), "\n".join(stats_notes(stats))])


def big_number(value: float) -> str:
    """`3.142`, `12,345`, `1.2e+09`: four digits at least, no more than anybody reads."""
    if not math.isfinite(value) or value >= 1e8:
        return f"{value:.1e}" if math.isfinite(value) else "" if math.isnan(value) else "inf"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.3f}"


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
    cache: Cache, *, keep: int | None = None, max_kl: float | None = None, parts: int = MAX_PARTS
) -> LayerSuggestion:
    """Propose intermediate layers to drop, from the KL between the cached layers (see sparse.compare).

    Greedy: again and again the layer goes whose mean KL from the nearest layer still there is smallest, the nearer of
    both sides; of equals the deeper one. The final layer never goes. It ends when `keep` layers are left, the final one
    among them, or before the first drop that costs more than `max_kl` nats; without both nothing is dropped and only
    the order is told. Read are `parts` evenly spaced parts (0: all).

    Raises SpecError for rows of draws, which have no KL, and for impossible limits.
    """
    if cache.header.row_kind == "sampled":
        raise SpecError(
            f"`{cache.path}` holds rows of draws, whose KL is not defined: no layer can be proposed; name the layers"
        )
    if keep is not None and not 1 <= keep <= len(cache.layers):
        raise SpecError(f"`keep` is {keep}: of {len(cache.layers)} cached layers 1 to {len(cache.layers)} can be kept")
    if max_kl is not None and not max_kl >= 0:
        raise SpecError(f"`max_kl` is {max_kl}: it is a KL in nats and cannot be below 0")
    stats = cache_stats(cache, parts=parts)
    assert stats.kl_LL is not None  # the rows are no draws
    kl_LL, mass_L, order = stats.kl_LL, _kept_mass(cache, parts), removal_order(stats.kl_LL)
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
        tokens=stats.kl_tokens,
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


def _kept_mass(cache: Cache, parts: int) -> np.ndarray:
    """[L]: mean kept mass over the parts that are read, from their records."""
    records = [cache.part_record(part) for part in spaced(cache.parts, parts)]
    means = [(record.summary["tail_mass"], record.num_tokens) for record in records if record.num_tokens]
    tails_L = sum(np.array(tail_L, float) * num for tail_L, num in means) / sum(num for _, num in means)
    return 1.0 - np.asarray(tails_L)


def suggestion_text(suggestion: LayerSuggestion) -> str:
    """The order of removal as a table, and what it comes to."""
    rows = []
    for number, one in enumerate(suggestion.order):
        proposed = "drop" if number < suggestion.num_dropped else ""
        rows.append([str(one.layer), str(one.stand_in), f"{one.kl:.3f}", percent(one.kept_mass), proposed])
    return render(
        "suggestion.txt",
        found=suggestion,
        order=table(["layer", "stand-in", "KL, nats", "kept mass", "proposed"], rows),
        little=sorted(one.layer for one in suggestion.order if one.kept_mass < LITTLE_MASS),
        left=layer_names(suggestion.layers),
    )
