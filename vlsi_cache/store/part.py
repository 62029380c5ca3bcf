"""One part in memory: read, checked, and decoded row by row. A row comes back exactly as it was written, or not at all.

Shape suffixes: L layers, T response tokens with a row, R response tokens, K kept entries, m tail samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from vlsi_cache.errors import CacheCorruptError
from vlsi_cache.sparse.rows import SparseRows

from .arrays import BYTES_ARRAY, UNKNOWN_BYTES, ArraySpec, layered_names, part_specs, sample_names, value_array
from .codec import Arrays, Known, MappedLayers, read_flat, read_layered, read_samples
from .encoding import (
    UNDO,
    by_layer,
    check_block,
    check_entries,
    check_places,
    check_sample_arrays,
    check_scalars,
    decode_values,
    padded,
    repeated_entry,
    undone_values,
)
from .files import check_metadata, check_part_files, hints_at_repair, load_part_record
from .format import CacheHeader, PartRecord, part_dir, response_digest, response_digests


@dataclass(frozen=True)
class Row(SparseRows):
    """One sample: its sparse rows, and what ties them to the training record; `vocab_size`, `taus` are the cache's.

    `response_bytes_R`: how many bytes of the response text each of its tokens is; None where the cache does not say.
    """

    sample_id: str
    kind: str
    digest: str
    response_ids_R: np.ndarray
    positions_T: np.ndarray
    response_bytes_R: np.ndarray | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Part:
    """One part in memory, in its compact disk dtypes (memory-mapped if not compressed); `row` decodes a sample.

    `arrays` holds the layered arrays [L, T, ...] of the layer rows that were asked for; where rows differ in width, one
    array per layer for the entries, and their offsets by token under `edges` [L, T + 1]. `id_of_rank_LV` is of the
    same layers; None when ids are stored. `is_undone`: see encoding.UNDO; otherwise everything is as on the disk.
    `is_copy`: read from a local copy of a part on an object store, without what only other readers need.
    """

    header: CacheHeader
    record: PartRecord
    folder: Path
    arrays: Arrays
    id_of_rank_LV: np.ndarray | None
    is_undone: bool = False
    is_decoded: bool = False
    is_copy: bool = False

    def decoded(self) -> "Part":
        """The part with ids and log-probs of all its rows decoded at once, at 8 bytes an entry; rows are views then.

        Rows of different widths, and memory-mapped ones, stay as they are.
        """
        value = value_array(self.header)
        if self.header.is_ragged or isinstance(self.arrays[value], MappedLayers):
            return self
        decode = undone_values if self.is_undone else decode_values
        logprobs_LTK = decode(self.header, self.arrays[value], self.arrays["tail_mass"])
        arrays = {**self.arrays, "ids": self._ids(self.arrays["ids"]), value: logprobs_LTK}
        return replace(self, arrays=arrays, is_decoded=True)

    def row(self, index: int) -> Row:
        """Decode sample `index` of the part; the first touch of a memory-mapped block may raise CacheCorruptError."""
        arrays, record = self.arrays, self.record
        with hints_at_repair(self.folder.parent.parent):
            if not 0 <= index < len(self):
                raise CacheCorruptError.at(self.folder, f" has no row {index}: it holds {len(self)} samples")
            tokens = slice(*self._edges[0][index : index + 2])
            response = slice(*self._edges[1][index : index + 2])
            response_ids_R = arrays["response_ids"][response]
            if response_digest(response_ids_R) != record.response_xxh3[index]:
                raise self._other_responses()
            tail_mass_LT = arrays["tail_mass"][:, tokens]
            ids_LTK, logprobs_LTK = self._entries(tokens, tail_mass_LT)
        return Row(
            ids_LTK=ids_LTK,
            logprobs_LTK=logprobs_LTK,
            tail_ids_LTm=self._ids(arrays["tail_ids"][:, tokens]),
            lse_LTn=arrays["lse"][:, tokens],
            entropy_LT=arrays["entropy"][:, tokens],
            gold_logprob_LT=arrays["gold_logprob"][:, tokens],
            tail_mass_LT=tail_mass_LT,
            sample_id=record.sample_ids[index],
            kind=record.kinds[index],
            digest=record.digests[index],
            response_ids_R=response_ids_R,
            positions_T=arrays["positions"][tokens],
            response_bytes_R=self._bytes_of(response),
            vocab_size=self.header.vocab_size,
            taus=tuple(self.header.taus),
        )

    def _bytes_of(self, response: slice) -> np.ndarray | None:
        lengths_R = self.arrays[BYTES_ARRAY][response] if BYTES_ARRAY in self.arrays else None
        return None if lengths_R is None or UNKNOWN_BYTES in lengths_R else lengths_R

    @cached_property
    def _edges(self) -> tuple[list[int], list[int]]:
        return self.arrays["offsets"].tolist(), self.arrays["response_offsets"].tolist()

    def _entries(self, tokens: slice, tail_mass_LT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probs [L, T, K] of the kept entries."""
        value = value_array(self.header)
        if self.is_decoded:
            return self.arrays["ids"][:, tokens], self.arrays[value][:, tokens]
        if not self.header.is_ragged:
            decode = undone_values if self.is_undone else decode_values
            logprobs_LTK = decode(self.header, self.arrays[value][:, tokens], tail_mass_LT)
            return self._ids(self.arrays["ids"][:, tokens]), logprobs_LTK
        edges_LT = self.arrays["edges"]
        spans = list(zip(edges_LT[:, tokens.start].tolist(), edges_LT[:, tokens.stop].tolist(), strict=True))
        ranks_LTK, stored_LTK, mask_LTK = padded(self.header, self.arrays, self.arrays["kept"][:, tokens], spans)
        logprobs_LTK = decode_values(self.header, stored_LTK, tail_mass_LT, mask_LTK)
        return np.where(mask_LTK, self._ids(ranks_LTK), 0), logprobs_LTK

    def _ids(self, places: np.ndarray) -> np.ndarray:
        if self.id_of_rank_LV is not None:
            return by_layer(self.id_of_rank_LV, places)
        return places

    def check(self) -> None:
        """What reading does not look at, or not before it is needed: blocks of memory-mapped arrays, the metadata for
        other readers, and whether the response ids are those of part.json."""
        if not self.is_copy:
            check_metadata(self.folder, self.record)
        self.check_blocks()
        digests = response_digests(self.arrays["response_ids"], self.arrays["response_offsets"].tolist())
        if digests != self.record.response_xxh3:
            raise self._other_responses()

    def check_blocks(self) -> None:
        """Look at every block of memory-mapped arrays now."""
        for array in self.arrays.values():
            if isinstance(array, MappedLayers):
                array.check_all()

    def _other_responses(self) -> CacheCorruptError:
        return CacheCorruptError.at(self.folder / "response_ids", ": response ids are not those of part.json")

    def check_distinct(self) -> None:
        """No row keeps an id twice: too slow to be looked at whenever a part is read."""
        ids = self.arrays["ids"]
        for layer, ids_E in enumerate(ids[:, :] if isinstance(ids, MappedLayers) else ids):
            token = repeated_entry(ids_E, self.arrays["kept"][layer] if self.header.is_ragged else self.header.widest)
            if token is not None:
                what = f": the row of layer row {layer}, token {token} keeps an id twice"
                raise CacheCorruptError.at(self.folder / "ids", what)

    def __len__(self) -> int:
        return len(self.record.sample_ids)

    @property
    def num_bytes(self) -> int:
        """Memory it takes; what is memory-mapped takes none."""
        pieces = [one for found in self.arrays.values() for one in (found if isinstance(found, list) else [found])]
        return sum(piece.nbytes for piece in pieces if isinstance(piece, np.ndarray))


def load_part(
    root: Path,
    header: CacheHeader,
    index: int,
    layers: Sequence[int],
    id_of_rank_LV: np.ndarray | None,
    *,
    undone: bool = False,
    known: Known | None = None,
    record: PartRecord | None = None,
) -> Part:
    """Read part `index`, of the layered arrays only the layer rows `layers`, and check all that was read.

    Arrays come as they are on the disk, or `undone` for decoding rows faster. `known` are mapped blocks that have been
    checked before, `record` is the part's own, if it has been read already.
    """
    folder = part_dir(root, index)
    with hints_at_repair(root):
        record = load_part_record(root, header, index) if record is None else record
        check_part_files(root, index, record)
        specs = part_specs(header, record)
        arrays = read_samples(folder, specs, sample_names(specs))
        check_sample_arrays(folder, header, record, arrays)
        whole = [name for name in layered_names(header) if specs[name].is_layered and name != "kept"]
        undo = UNDO if undone else {}
        check = partial(check_block, header)
        arrays |= read_layered(folder, specs, whole, layers, undo=undo, check=check, known=known)
        if header.is_ragged:
            arrays |= _read_ragged(folder, header, specs, layers)
        LT = (len(layers), record.num_tokens)
        arrays.setdefault("tail_ids", np.zeros((*LT, 0), header.id_dtype))
        arrays.setdefault("tail_mass", np.zeros(LT, np.float32))
        # values that no writer produces
        check_places(folder, header, arrays)
        check_scalars(folder, header, arrays)
        check_entries(folder, header, arrays, undone=undone)
    return Part(header, record, folder, arrays, id_of_rank_LV, undone)


def _read_ragged(folder: Path, header: CacheHeader, specs: dict[str, ArraySpec], layers: Sequence[int]) -> Arrays:
    """Widths and offsets of the rows of `layers`, and their entries."""
    every = range(len(header.layers))
    kept_LT = read_layered(folder, specs, ["kept"], every)["kept"]
    if (kept_LT.max(1, initial=0) > header.top_k).any() or int(kept_LT.sum(dtype=np.int64)) != specs["ids"].shape[0]:
        raise CacheCorruptError.at(folder / "kept", ": the widths are not those of the entries")
    flat = read_flat(folder, specs, ["ids", value_array(header)], layers, kept_LT)
    chosen_LT = kept_LT[list(layers)]
    edges_LT = np.zeros((len(layers), chosen_LT.shape[1] + 1), np.int64)
    np.cumsum(chosen_LT, axis=1, dtype=np.int64, out=edges_LT[:, 1:])
    return {**flat, "kept": chosen_LT, "edges": edges_LT}
