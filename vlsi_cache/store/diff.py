"""What differs between two caches: where they come from, which samples they hold, and what their rows say.

Shape suffixes: L layers, T response tokens with a row, K kept entries of one cache, E entries that both keep, U entries
that either keeps.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.errors import SpecError, first_of, list_problems
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.store.reader import CachePath

from .header import differences, identity_of, is_synced
from .part import Row
from .reader import Cache, open

LAYOUT = ("num_parts", "id_of_rank_xxh3")
SMALLEST_BUCKET = 1e-12  # a tail of exactly nothing against one of something is no infinite divergence


@dataclass
class LayerDiff:
    """One layer that both caches hold, over all tokens that were compared; means and largest values in nats."""

    layer: int
    num_tokens: int = 0
    same_top1: float = 0.0
    mean_dlogp: float = 0.0
    max_dlogp: float = 0.0
    mean_kl: float = 0.0
    mean_dtail: float = 0.0
    max_dtail: float = 0.0
    mean_dentropy: float = 0.0
    max_dentropy: float = 0.0
    num_common: int = 0
    only_a: int = 0
    only_b: int = 0

    @property
    def is_equal(self) -> bool:
        largest = self.max_dlogp, self.max_dtail, self.max_dentropy
        return not any(largest) and not self.only_a and not self.only_b and self.same_top1 == (self.num_tokens > 0)


@dataclass(frozen=True)
class Entries:
    """The U entries of one layer that either of two rows keeps: token of each, and its log-prob in both, float64.

    A row that does not keep an entry has -inf there.
    """

    token_U: np.ndarray
    logp_aU: np.ndarray
    logp_bU: np.ndarray


@dataclass
class CacheDiff:
    """What `diff` found. `header` and `fingerprint` hold [value in a, value in b] of every field that differs."""

    a: Path
    b: Path
    header: dict[str, list[Any]] = field(default_factory=dict)
    fingerprint: dict[str, list[Any]] = field(default_factory=dict)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    num_common: int = 0
    num_compared: int = 0
    other_responses: list[str] = field(default_factory=list)
    other_records: list[str] = field(default_factory=list)
    other_bytes: list[str] = field(default_factory=list)
    tokens_only_a: int = 0
    tokens_only_b: int = 0
    layers: list[LayerDiff] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        found = self.header, self.fingerprint, self.only_a, self.only_b, self.other_responses, self.other_records
        return not any((*found, self.other_bytes, self.tokens_only_a, self.tokens_only_b)) and all(
            x.is_equal for x in self.layers
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, but for the paths."""
        return {"equal": self.is_equal, **{name: value for name, value in asdict(self).items() if name != "lines"}}

    def __str__(self) -> str:
        if self.is_equal:
            return f"equal: {self.num_common} samples in both, the rows of {self.num_compared} compared"
        lines = [f"a: {self.a}", f"b: {self.b}", *([list_problems(self.lines, limit=100)] if self.lines else [])]
        for name, ids in (("a", self.only_a), ("b", self.only_b)):
            lines += [f"{len(ids)} samples only in {name}: {first_of(ids)}"] if ids else []
        lines.append(f"{self.num_common} samples in both, the rows of {self.num_compared} compared")
        if self.other_responses:
            ids = self.other_responses
            lines.append(f"error: {len(ids)} samples have other response ids: {first_of(ids)}; they are left out below")
        if self.other_records:
            lines.append(f"{len(self.other_records)} samples have another record: {first_of(self.other_records)}")
        if self.other_bytes:
            ids = self.other_bytes
            lines.append(
                f"error: the response tokens of {len(ids)} samples are other bytes of its text: {first_of(ids)}"
            )
        if self.tokens_only_a or self.tokens_only_b:
            lines.append(f"tokens with a row only in a: {self.tokens_only_a}, only in b: {self.tokens_only_b}")
        return "\n".join([*lines, *_layer_lines(self.layers)])


def diff(a: CachePath, b: CachePath, *, samples: int = 200) -> CacheDiff:
    """Compare two caches: header, fingerprint, samples, and the rows of `samples` common ones, evenly spaced.

    The divergence is KL(a || b) over the entries that both keep, with everything else as one bucket.
    """
    if samples < 0:
        raise SpecError(f"samples {samples}: compare 0 or more")
    one, other = (cache if isinstance(cache, Cache) else open(cache) for cache in (a, b))
    found = CacheDiff(one.path, other.path)
    _compare_origin(found, one, other)
    comparable = _compare_samples(found, one, other)
    chosen = np.unique(np.linspace(0, len(comparable) - 1, min(samples, len(comparable))).round().astype(int))
    common: list[int | str] = [layer for layer in one.layers if layer in other.layers]
    if one.header.lacks or other.header.lacks:  # an imported one has a last layer, and does not know its number
        common = ["last"]
    found.layers, found.num_compared = (
        [LayerDiff(one.layers[-1] if layer == "last" else int(layer)) for layer in common],
        len(chosen),
    )
    for index in chosen:
        name = comparable[index]
        _compare_rows(found, one.row(name, layers=common), other.row(name, layers=common))
    for layer in found.layers:
        _divide(layer)
    return found


def _compare_origin(found: CacheDiff, one: Cache, other: Cache) -> None:
    prints = [one.header.fingerprint, other.header.fingerprint]
    # A cache that has followed its data is laid out otherwise than one that was built from it, and holds the same.
    layout = LAYOUT if is_synced(one.header) or is_synced(other.header) else ()
    headers = [identity_of(one.header, without=layout), identity_of(other.header, without=layout)]
    found.fingerprint, found.header = _pairs(*prints), _pairs(*headers)
    found.lines = differences(*headers, names=("a has", "b has")) + differences(*prints, names=("a has", "b has"))


def _pairs(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    absent = object()
    differs = [name for name in {**old, **new} if old.get(name, absent) != new.get(name, absent)]
    return {name: [old.get(name), new.get(name)] for name in differs}


def _compare_samples(found: CacheDiff, one: Cache, other: Cache) -> list[str]:
    """Fill in what the sample tables say; the ids of samples whose rows can be compared."""
    names = ("id", "response_xxh3", "digest")
    lines = [zip(*(c.sample_table()[name].to_pylist() for name in names), strict=True) for c in (one, other)]
    mine, theirs = ({sample_id: facts for sample_id, *facts in table} for table in lines)
    found.only_a = [name for name in mine if name not in theirs]
    found.only_b = [name for name in theirs if name not in mine]
    common = [name for name in mine if name in theirs]
    found.num_common = len(common)
    found.other_responses = [name for name in common if mine[name][0] != theirs[name][0]]
    found.other_records = [name for name in common if mine[name][1] != theirs[name][1]]
    return [name for name in common if mine[name][0] == theirs[name][0]]


def _compare_rows(found: CacheDiff, one: Row, other: Row) -> None:
    """Add the rows of one sample to the sums."""
    bytes_aR, bytes_bR = one.response_bytes_R, other.response_bytes_R
    if bytes_aR is not None and bytes_bR is not None and not np.array_equal(bytes_aR, bytes_bR):  # a cache may not know
        found.other_bytes.append(one.sample_id)
    positions, mine, theirs = np.intersect1d(one.positions_T, other.positions_T, return_indices=True)
    found.tokens_only_a += one.num_tokens - len(positions)
    found.tokens_only_b += other.num_tokens - len(positions)
    a, b = one.select_tokens(mine), other.select_tokens(theirs)
    for row, layer in enumerate(found.layers):
        if len(positions):
            add_layer(layer, a.layer(row), b.layer(row))


def add_layer(sums: LayerDiff, a: SparseRows, b: SparseRows) -> Entries:
    """Add the rows of one layer over the same tokens, at least one, to `sums`; all entries that either row keeps."""
    entries = joined_entries(a, b)
    in_aU, in_bU = np.isfinite(entries.logp_aU), np.isfinite(entries.logp_bU)
    common_U = in_aU & in_bU
    token_E, logp_aE, logp_bE = (array[common_U] for array in (entries.token_U, entries.logp_aU, entries.logp_bU))
    dlogp_E = np.abs(logp_aE - logp_bE)
    p_aE = np.exp(logp_aE)
    bucket_aT, bucket_bT = (_bucket(rows, token_E, np.exp(logp_E)) for rows, logp_E in ((a, logp_aE), (b, logp_bE)))
    kl = (p_aE * (logp_aE - logp_bE)).sum() + (bucket_aT * np.log(bucket_aT / bucket_bT)).sum()
    dtail_T, dentropy_T = (np.abs(getattr(a, n)[0] - getattr(b, n)[0]) for n in ("tail_mass_LT", "entropy_LT"))
    dentropy_T = np.nan_to_num(dentropy_T)  # what is not known differs from nothing
    sums.num_tokens += a.num_tokens
    sums.num_common += len(dlogp_E)
    sums.only_a += int((in_aU & ~in_bU).sum())
    sums.only_b += int((in_bU & ~in_aU).sum())
    sums.same_top1 += float((a.ids_LTK[0, :, 0] == b.ids_LTK[0, :, 0]).sum())
    sums.mean_dlogp += float(dlogp_E.sum())
    sums.mean_kl += float(kl)
    sums.mean_dtail += float(dtail_T.sum())
    sums.mean_dentropy += float(dentropy_T.sum())
    sums.max_dlogp = max(sums.max_dlogp, float(dlogp_E.max(initial=0)))
    sums.max_dtail = max(sums.max_dtail, float(dtail_T.max()))
    sums.max_dentropy = max(sums.max_dentropy, float(dentropy_T.max()))
    return entries


def joined_entries(a: SparseRows, b: SparseRows) -> Entries:
    """The entries of one layer that `a` or `b` keeps, by token and then by id."""
    found = []
    for rows in (a, b):
        logp_TK = rows.logprobs_LTK[0].astype(np.float64)
        kept_TK = np.isfinite(logp_TK)
        token_T1 = np.arange(rows.num_tokens, dtype=np.int64)[:, None]
        found.append((((token_T1 << 32) | rows.ids_LTK[0].astype(np.int64))[kept_TK], logp_TK[kept_TK]))
    key_U = np.union1d(found[0][0], found[1][0])
    logp_2U = np.full((2, len(key_U)), -np.inf)
    for logp_U, (key_E, logp_E) in zip(logp_2U, found, strict=True):
        logp_U[np.searchsorted(key_U, key_E)] = logp_E
    return Entries(key_U >> 32, logp_2U[0], logp_2U[1])


def _bucket(rows: SparseRows, token_E: np.ndarray, p_E: np.ndarray) -> np.ndarray:
    """[T]: the mass outside the entries that both keep."""
    kept_T = np.exp(rows.logprobs_LTK[0].astype(np.float64)).sum(-1)
    common_T = np.bincount(token_E, weights=p_E, minlength=rows.num_tokens)
    return np.maximum(rows.tail_mass_LT[0] + kept_T - common_T, SMALLEST_BUCKET)


def _divide(sums: LayerDiff) -> None:
    """Turn sums into means; a divergence below 0 is rounding."""
    tokens, entries = max(1, sums.num_tokens), max(1, sums.num_common)
    sums.same_top1 /= tokens
    sums.mean_dlogp /= entries
    sums.mean_kl = max(0.0, sums.mean_kl / tokens)
    sums.mean_dtail /= tokens
    sums.mean_dentropy /= tokens


def _layer_lines(layers: list[LayerDiff]) -> list[str]:
    """One line per layer, as wide as it must be."""
    heads = ["layer", "tokens", "same top-1", "mean |dlogp|", "max |dlogp|", "KL(a||b)", "|dtail|", "|dentropy|"]
    rows = [
        [
            str(one.layer),
            str(one.num_tokens),
            f"{100 * one.same_top1:.2f} %",
            *(f"{x:.3g}" for x in (one.mean_dlogp, one.max_dlogp, one.mean_kl, one.mean_dtail, one.mean_dentropy)),
        ]
        for one in layers
    ]
    if not any(one.num_tokens for one in layers):
        return ["no rows to compare"]
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (heads, *rows)]
