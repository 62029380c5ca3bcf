"""Token ids as places in an order of the vocabulary: small numbers compress, and every layer says other words.

All layers share one order of the vocabulary; each has a head of its own in front of it. `vocab/` keeps both, and the
texts of the tokens for people.
Shape suffixes: L layers, V vocabulary, H ids in a head.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from vlsi_cache.errors import CacheCorruptError, SpecError

from .codec import read_samples, write_arrays
from .format import vocab_specs

NUM_HEAD = 2048  # a longer head saves less than a thousandth of the ids


@dataclass(frozen=True)
class VocabOrder:
    """`id_of_rank_V`: all ids, the most frequent first. `heads_LH`: ids that come before all others in that layer."""

    id_of_rank_V: np.ndarray
    heads_LH: np.ndarray

    @property
    def digest(self) -> str:
        """xxh3-64 over the bytes of both arrays as little-endian uint32."""
        pieces = (np.ascontiguousarray(array, "<u4").tobytes() for array in (self.id_of_rank_V, self.heads_LH))
        return xxhash.xxh3_64_hexdigest(b"".join(pieces))

    @property
    def is_identity(self) -> bool:
        """Whether every place is its own id, as in the `fast` profile."""
        vocab_size = len(self.id_of_rank_V)
        return not self.heads_LH.size and np.array_equal(self.id_of_rank_V, np.arange(vocab_size))

    def ids_LV(self) -> np.ndarray:
        """uint32 [L, V]: the id at every place, layer by layer."""
        order_V = self.id_of_rank_V
        rows = [np.concatenate([head_H, order_V[~np.isin(order_V, head_H)]]) for head_H in self.heads_LH]
        return np.stack(rows).astype(np.uint32)

    def places_LV(self, dtype: np.dtype) -> np.ndarray:
        """[L, V]: the place of every id, layer by layer."""
        ids_LV = self.ids_LV()
        places_LV = np.empty(ids_LV.shape, dtype)
        np.put_along_axis(places_LV, ids_LV.astype(np.int64), np.arange(ids_LV.shape[1], dtype=dtype)[None], axis=1)
        return places_LV

    def select(self, layer_rows: list[int]) -> "VocabOrder":
        """The table of some of the layers."""
        return VocabOrder(self.id_of_rank_V, self.heads_LH[layer_rows])

    def checked(self, num_layers: int, vocab_size: int) -> "VocabOrder":
        """The table as uint32; SpecError unless the order is a permutation and every head holds distinct ids."""
        order_V, heads_LH = np.asarray(self.id_of_rank_V), np.asarray(self.heads_LH)
        if order_V.shape != (vocab_size,) or not _is_permutation(order_V):
            found = f"shape {order_V.shape}, values {order_V.min(initial=0)} to {order_V.max(initial=0)}"
            raise SpecError(f"`id_of_rank` must be a permutation of 0 to {vocab_size - 1}, got {found}")
        sorted_LH = np.sort(heads_LH, axis=1)
        repeats = heads_LH.size and (np.diff(sorted_LH.astype(np.int64), axis=1) == 0).any()
        if heads_LH.ndim != 2 or len(heads_LH) != num_layers or repeats or heads_LH.max(initial=0) >= vocab_size:
            raise SpecError(f"`heads` must be distinct ids for each of {num_layers} layers, got {heads_LH.shape}")
        return VocabOrder(order_V.astype(np.uint32), heads_LH.astype(np.uint32))


def _is_permutation(order_V: np.ndarray) -> bool:
    if order_V.min() < 0 or order_V.max() >= len(order_V):
        return False
    seen_V = np.zeros(len(order_V), bool)
    seen_V[order_V] = True
    return bool(seen_V.all())


def one_order(id_of_rank_V: np.ndarray, num_layers: int) -> VocabOrder:
    """One order for all layers."""
    return VocabOrder(np.asarray(id_of_rank_V), np.empty((num_layers, 0), np.uint32))


def order_by_count(kept_LV: np.ndarray, said_V: np.ndarray) -> VocabOrder:
    """Ids by how often they were kept: over all layers, and at the head of each layer; then by `said_V`, then by id."""
    ids_V = np.arange(len(said_V))
    order_V = np.lexsort((ids_V, -said_V, -kept_LV.sum(0)))
    place_V = np.empty_like(order_V)
    place_V[order_V] = ids_V
    heads = [np.lexsort((place_V, -kept_V))[: min(NUM_HEAD, len(ids_V))] for kept_V in kept_LV]
    return VocabOrder(order_V.astype(np.uint32), np.stack(heads).astype(np.uint32))


def write_vocab(folder: Path, vocab_order: VocabOrder, text: bytes | None, text_offsets: np.ndarray | None) -> None:
    """Write `vocab/`: the order of the vocabulary, and the text of every token if there is one."""
    arrays = {"id_of_rank": vocab_order.id_of_rank_V, "heads": vocab_order.heads_LH}
    if text is not None and text_offsets is not None:
        arrays |= {"text": np.frombuffer(text, np.uint8), "text_offsets": np.asarray(text_offsets, np.int64)}
    num_bytes = None if text is None else len(text)
    write_arrays(folder, arrays, vocab_specs(len(vocab_order.id_of_rank_V), vocab_order.heads_LH.shape, num_bytes))


def read_vocab(folder: Path, vocab_size: int, heads: tuple[int, int]) -> VocabOrder:
    """The order of the vocabulary, as it was written."""
    found = read_samples(folder, vocab_specs(vocab_size, heads, None), ["id_of_rank", "heads"])
    return VocabOrder(found["id_of_rank"], found["heads"])


def read_vocab_text(folder: Path, vocab_size: int) -> tuple[bytes, np.ndarray]:
    """UTF-8 bytes of all tokens one after the other, and int64 [V + 1] offsets; the caller knows that they exist."""
    specs = vocab_specs(vocab_size, (0, 0), 0)
    offsets = read_samples(folder, specs, ["text_offsets"])["text_offsets"]
    if offsets[0] or (np.diff(offsets) < 0).any():
        path = folder / "text_offsets"
        what = f"`{path}`: offsets must rise from 0, found {offsets[0]} to {offsets.min()}"
        raise CacheCorruptError(what, file=path)
    specs = vocab_specs(vocab_size, (0, 0), int(offsets[-1]))
    return read_samples(folder, specs, ["text"])["text"].tobytes(), offsets
