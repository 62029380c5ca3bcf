"""The sparse row: what is kept of one teacher distribution per target layer and response token; and making it smaller.

Shapes: L layers, T response tokens, K kept entries, m tail samples, n temperatures (taus).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlsi_cache.errors import DataError

__all__ = [
    "SparseRows",
    "draw_rows",
    "keyed_uniforms",
    "redraw_tail",
    "select_at_random",
    "select_by_entropy",
    "top_p_widths",
    "truncate",
]

SHAPES = {
    "ids_LTK": "LTK",
    "logprobs_LTK": "LTK",
    "tail_ids_LTm": "LTm",
    "lse_LTn": "LTn",
    "entropy_LT": "LT",
    "gold_logprob_LT": "LT",
    "tail_mass_LT": "LT",
}


@dataclass(frozen=True)
class SparseRows:
    """Top-k rows of L target layers and T response tokens; log-probs in nats, over the whole real vocabulary.

    Kept entries come in descending probability, ties by the lowest id. `logprobs_LTK` is never renormalised;
    -inf marks padding. Tail samples are draws with replacement from the distribution outside the top-k.
    `vocab_size` is the size of the real vocabulary and `taus` the temperatures of `lse_LTn`, where they are known: rows
    that come from a cache carry them.
    """

    ids_LTK: np.ndarray
    logprobs_LTK: np.ndarray
    tail_ids_LTm: np.ndarray
    lse_LTn: np.ndarray
    entropy_LT: np.ndarray
    gold_logprob_LT: np.ndarray
    tail_mass_LT: np.ndarray
    vocab_size: int | None = field(default=None, kw_only=True)
    taus: tuple[float, ...] | None = field(default=None, kw_only=True)

    @property
    def num_layers(self) -> int:
        return self.ids_LTK.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.ids_LTK.shape[1]

    @property
    def top_k(self) -> int:
        return self.ids_LTK.shape[2]

    @property
    def widths_LT(self) -> np.ndarray:
        """Entries of every row that are no padding."""
        return np.isfinite(self.logprobs_LTK).sum(-1)

    @property
    def num_tail(self) -> int:
        return self.tail_ids_LTm.shape[2]

    def layer(self, index: int) -> "SparseRows":
        """The rows of one layer, L = 1; -1 is the last layer."""
        return self.select_layers([index])

    def select_layers(self, indices: Sequence[int]) -> "SparseRows":
        """The rows of these layer indices, in this order."""
        wrong = [index for index in indices if not -self.num_layers <= index < self.num_layers]
        if wrong:
            raise DataError(f"layer indices {wrong} are outside these rows, which have {self.num_layers} layers")
        return self._with({name: getattr(self, name)[list(indices)] for name in SHAPES})

    def tokens(self, part: slice) -> "SparseRows":
        """The rows of a slice of the response tokens, as views."""
        return self._with({name: getattr(self, name)[:, part] for name in SHAPES})

    def select_tokens(self, index_T: np.ndarray) -> "SparseRows":
        """The rows of these response tokens, in this order."""
        # Sums over the tokens depend on how they lie in memory: as they would if all had been taken.
        return self._with({name: np.ascontiguousarray(getattr(self, name)[:, index_T]) for name in SHAPES})

    def _with(self, arrays: dict[str, np.ndarray]) -> "SparseRows":
        return SparseRows(**arrays, vocab_size=self.vocab_size, taus=self.taus)

    def padded_to(self, width: int) -> "SparseRows":
        """The same rows with `width` entries: padding is id 0 with log-prob -inf."""
        more = [(0, 0), (0, 0), (0, width - self.top_k)]
        if width == self.top_k:
            return self
        ids_LTK = np.pad(self.ids_LTK, more)
        return replace(self, ids_LTK=ids_LTK, logprobs_LTK=np.pad(self.logprobs_LTK, more, constant_values=-np.inf))

    @staticmethod
    def concat(rows: Sequence["SparseRows"]) -> "SparseRows":
        """Join rows of equal L, m, n, `vocab_size` and `taus` along the tokens; rows of smaller K are padded."""
        if not rows:
            raise DataError("no rows to concatenate")
        widest = max(row.top_k for row in rows)
        rows = [row.padded_to(widest) for row in rows]
        for name in SHAPES:
            found = {(getattr(row, name).shape[0], *getattr(row, name).shape[2:]) for row in rows}
            if len(found) > 1:
                raise DataError(f"`{name}` of the rows to concatenate differ in shape outside the tokens: {found}")
        if len(origins := {(row.vocab_size, row.taus) for row in rows}) > 1:
            raise DataError(f"the rows to concatenate differ in (vocab_size, taus): {sorted(map(str, origins))}")
        joined = {name: np.concatenate([getattr(row, name) for row in rows], axis=1) for name in SHAPES}
        return rows[0]._with(joined)

    def validate(self, vocab_size: int) -> None:
        """Raise DataError naming the first layer index and token that is wrong; `vocab_size` is the real vocabulary."""
        self._check_shapes()
        for name in ("lse_LTn", "entropy_LT", "tail_mass_LT"):
            _refuse(~np.isfinite(getattr(self, name)), self, name, "is not finite")
        for name in ("ids_LTK", "tail_ids_LTm"):
            ids = getattr(self, name)
            _refuse(
                (ids < 0) | (ids >= vocab_size), self, name, f"is outside the real vocabulary of {vocab_size} tokens"
            )
        for name in ("logprobs_LTK", "gold_logprob_LT"):
            _refuse(np.isnan(getattr(self, name)), self, name, "is not a number")
            _refuse(getattr(self, name) > 0, self, name, "is above 0, so it is no log-prob")
        mass_LT = self.tail_mass_LT
        _refuse((mass_LT < 0) | (mass_LT > 1), self, "tail_mass_LT", "is outside [0, 1]")
        self._check_entries()

    def _check_shapes(self) -> None:
        sizes: dict[str, int] = {}
        for name, letters in SHAPES.items():
            array = getattr(self, name)
            if array.ndim != len(letters):
                raise DataError(f"`{name}` must have the axes {' '.join(letters)}, found shape {array.shape}")
            for letter, size in zip(letters, array.shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    raise DataError(f"`{name}` has {size} along {letter}, the other arrays have {sizes[letter]}")
            if ("ids" in name) != (array.dtype.kind in "iu"):
                raise DataError(f"`{name}` has the wrong dtype {array.dtype}")
        if not sizes["K"]:
            raise DataError("rows keep no entries: top_k is 0")

    def _check_entries(self) -> None:
        rising = self.logprobs_LTK[..., 1:] > self.logprobs_LTK[..., :-1]
        _refuse(rising, self, "logprobs_LTK", "is above the entry before it; entries must be descending", shift=1)
        # Padded entries may repeat an id, so each gets a negative one of its own before looking for repeats.
        own_K = -1 - np.arange(self.top_k)
        ids_LTK = np.where(np.isneginf(self.logprobs_LTK), own_K, self.ids_LTK.astype(np.int64))
        sorted_LTK = np.sort(ids_LTK, axis=-1)
        repeats_LT = (sorted_LTK[..., 1:] == sorted_LTK[..., :-1]).any(-1)
        _refuse(
            np.broadcast_to(repeats_LT[..., None], ids_LTK.shape), self, "ids_LTK", "is in a row that repeats an id"
        )
        for draw in range(self.num_tail):
            kept_LT = (ids_LTK == self.tail_ids_LTm[..., draw, None].astype(np.int64)).any(-1)
            if kept_LT.any():
                layer, token = np.argwhere(kept_LT)[0]
                found = self.tail_ids_LTm[layer, token, draw]
                raise DataError(f"`tail_ids_LTm` at layer index {layer}, token {token} is {found}, a kept id")


def _refuse(bad: np.ndarray, rows: SparseRows, name: str, problem: str, *, shift: int = 0) -> None:
    if not bad.any():
        return
    where = np.argwhere(bad)[0]
    where[-1] += shift
    layer, token, *entry = where.tolist()
    value = getattr(rows, name)[tuple(where)]
    place = f"layer index {layer}, token {token}" + (f", entry {entry[0]}" if entry else "")
    raise DataError(f"`{name}` at {place} is {value}: it {problem} ({int(bad.sum())} such values)")


def select_by_entropy(entropy_T: np.ndarray, *, above: float | None = None, top: float | None = None) -> np.ndarray:
    """bool [T]: tokens with more than `above` nats, or the share `top` with the most (at least one, ties by order)."""
    if above is not None:
        return entropy_T > above
    assert top is not None
    num_kept = math.ceil(top * len(entropy_T))
    chosen_T = np.zeros(len(entropy_T), bool)
    chosen_T[np.argsort(-entropy_T, kind="stable")[:num_kept]] = True
    return chosen_T


def select_at_random(sample_ids: Sequence[str], lengths: Sequence[int], *, share: float, seed: int) -> np.ndarray:
    """bool [T]: each token with probability `share`; depends on the seed, the sample and the place in it alone."""
    drawn = [keyed_uniforms(f"{seed}\0tokens\0{name}", (n,)) for name, n in zip(sample_ids, lengths, strict=True)]
    return np.concatenate([np.zeros(0), *drawn]) < share


def keyed_uniforms(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 uniforms in [0, 1) that depend on the key alone, not on process, order or batch."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(shape)


def top_p_widths(logprobs_LTK: np.ndarray, *, top_p: float, min_k: int) -> np.ndarray:
    """[L, T]: the fewest entries whose mass reaches `top_p`, at least `min_k` and at most K."""
    mass_LTK = np.cumsum(np.exp(logprobs_LTK), axis=-1, dtype=np.float64)
    return np.clip((mass_LTK < top_p).sum(-1) + 1, min_k, logprobs_LTK.shape[-1])


def truncate(rows: SparseRows, kept_LT: np.ndarray, uniforms_LTm: np.ndarray) -> SparseRows:
    """Keep the first `kept_LT` entries of every row; the rest becomes padding (id 0, log-prob -inf).

    Their mass goes into `tail_mass_LT`, and the tail samples become independent draws from the new tail; for that each
    of them needs one uniform of its own.
    """
    out_LTK = np.arange(rows.top_k) >= kept_LT[..., None]
    dropped_p_LTK = np.where(out_LTK, np.exp(rows.logprobs_LTK), 0.0)
    tail_ids_LTm, tail_mass_LT = redraw_tail(
        rows.ids_LTK, dropped_p_LTK, rows.tail_ids_LTm, rows.tail_mass_LT, uniforms_LTm
    )
    return replace(
        rows,
        ids_LTK=np.where(out_LTK, 0, rows.ids_LTK),
        logprobs_LTK=np.where(out_LTK, -np.inf, rows.logprobs_LTK).astype(np.float32),
        tail_ids_LTm=tail_ids_LTm,
        tail_mass_LT=tail_mass_LT,
    )


def redraw_tail(
    ids_LTK: np.ndarray,
    dropped_p_LTK: np.ndarray,
    tail_ids_LTm: np.ndarray,
    tail_mass_LT: np.ndarray,
    uniforms_LTm: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Tail samples and mass after entries left the top-k; `dropped_p_LTK` is 0 for those that stayed.

    The new tail is a mixture: the dropped ids, and the old tail. So each draw becomes a dropped id, in proportion to
    its probability, or stays the stored draw, which is an independent draw from the old tail: again independent draws
    from the whole new tail, and the estimator over them stays unbiased.
    """
    edges_LTK = np.cumsum(dropped_p_LTK, axis=-1, dtype=np.float64)
    total_LT = tail_mass_LT + edges_LTK[..., -1]
    tail_ids_LTm = tail_ids_LTm.copy()
    for draw in range(tail_ids_LTm.shape[-1]):
        point_LT = uniforms_LTm[..., draw] * total_LT
        slot_LT = (edges_LTK <= point_LT[..., None]).sum(-1)
        is_dropped_LT = slot_LT < edges_LTK.shape[-1]
        slot_LT1 = np.minimum(slot_LT, edges_LTK.shape[-1] - 1)[..., None]
        chosen_LT = np.take_along_axis(ids_LTK, slot_LT1, axis=-1)[..., 0]
        tail_ids_LTm[..., draw] = np.where(is_dropped_LT, chosen_LT, tail_ids_LTm[..., draw])
    return tail_ids_LTm, np.minimum(total_LT, 1.0).astype(np.float32)


def draw_rows(rows: SparseRows, uniforms_LTN: np.ndarray) -> SparseRows:
    """Rows of N draws from the whole distribution (RS-KD): the distinct ids, most frequent first, and their shares.

    `rows` has N tail samples. The shares are an unbiased estimate of the distribution, so the rows have no tail: mass
    0, no samples. Source: Sparse Logit Sampling (arXiv 2503.16870), with the teacher itself as the proposal.
    """
    draws_LTN, _ = redraw_tail(
        rows.ids_LTK, np.exp(rows.logprobs_LTK), rows.tail_ids_LTm, rows.tail_mass_LT, uniforms_LTN
    )
    num_draws = draws_LTN.shape[-1]
    sorted_LTN = np.sort(draws_LTN.astype(np.int64), axis=-1)
    is_first_LTN = np.concatenate(
        [np.ones_like(sorted_LTN[..., :1], bool), sorted_LTN[..., 1:] != sorted_LTN[..., :-1]], axis=-1
    )
    starts_LTN = np.where(is_first_LTN, np.arange(num_draws), num_draws)
    next_LTN = np.minimum.accumulate(starts_LTN[..., ::-1], axis=-1)[..., ::-1]
    ends_LTN = np.concatenate([next_LTN[..., 1:], np.full_like(next_LTN[..., :1], num_draws)], axis=-1)
    counts_LTN = np.where(is_first_LTN, ends_LTN - np.arange(num_draws), 0)
    order_LTN = np.argsort(-counts_LTN, axis=-1, kind="stable")
    counts_LTN = np.take_along_axis(counts_LTN, order_LTN, -1)
    width = int((counts_LTN > 0).sum(-1).max(initial=1))
    counts_LTN, ids_LTN = counts_LTN[..., :width], np.take_along_axis(sorted_LTN, order_LTN, -1)[..., :width]
    return replace(
        rows,
        ids_LTK=np.where(counts_LTN > 0, ids_LTN, 0),
        logprobs_LTK=share_logprobs(counts_LTN, num_draws),
        tail_ids_LTm=draws_LTN[..., :0],
        tail_mass_LT=np.zeros_like(rows.tail_mass_LT),
    )


def share_logprobs(counts_LTK: np.ndarray, num_draws: int) -> np.ndarray:
    """log(count / N) in float32; -inf for a count of 0."""
    with np.errstate(divide="ignore"):
        return np.log(counts_LTK / np.float64(num_draws)).astype(np.float32)
