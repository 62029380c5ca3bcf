"""Reading a cache: open, look up a sample, read a part. A row comes back exactly as it was written, or not at all.

Shape suffixes: L layers, T response tokens with a row, R response tokens, K kept entries, m tail samples.
"""

import difflib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlsi_cache.errors import CacheCorruptError, CacheIncompleteError, CacheNotFoundError, SampleNotFoundError
from vlsi_cache.sparse.levels import decode_levels
from vlsi_cache.sparse.rows import SparseRows

from .layout import (
    HEADER_NAME,
    KL_ARRAYS,
    ROW_ARRAYS,
    SUMMARY_ARRAYS,
    CacheHeader,
    PartRecord,
    check_size,
    hash_file,
    list_parts,
    load_header,
    load_part_record,
    part_dir,
    part_specs,
    rank_table_digest,
    response_digest,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from .table import Index
    from .verify import VerifyReport

LRU_PARTS = 4


@dataclass(frozen=True)
class Row(SparseRows):
    """One sample: its sparse rows, and what ties them to the training record."""

    sample_id: str
    kind: str
    digest: str
    response_ids_R: np.ndarray
    positions_T: np.ndarray


@dataclass(frozen=True)
class Part:
    """One part in memory, decompressed but still in its compact disk dtypes; `row` decodes one sample."""

    record: PartRecord
    arrays: dict[str, np.ndarray]
    id_of_rank: np.ndarray

    def row(self, index: int) -> Row:
        """Decode sample `index` of the part."""
        arrays, record = self.arrays, self.record
        tokens = slice(*arrays["offsets"][index : index + 2].tolist())
        response = slice(*arrays["response_offsets"][index : index + 2].tolist())
        tail_mass_LT = arrays["tail_mass"][:, tokens]
        return Row(
            ids_LTK=self.id_of_rank[arrays["ids"][:, tokens]],
            logprobs_LTK=decode_levels(arrays["levels"][:, tokens], tail_mass_LT),
            tail_ids_LTm=self.id_of_rank[arrays["tail_ids"][:, tokens]],
            lse_LTn=arrays["lse"][:, tokens],
            entropy_LT=arrays["entropy"][:, tokens],
            gold_logprob_LT=arrays["gold_logprob"][:, tokens],
            tail_mass_LT=tail_mass_LT,
            sample_id=record.sample_ids[index],
            kind=record.kinds[index],
            digest=record.digests[index],
            response_ids_R=arrays["response_ids"][response],
            positions_T=arrays["positions"][tokens],
        )

    def __len__(self) -> int:
        return len(self.record.sample_ids)


def load_part(root: Path, header: CacheHeader, index: int, layers: Sequence[int], id_of_rank: np.ndarray) -> Part:
    """Read part `index`, of the layered arrays only the layer rows `layers`, and check all that was read."""
    from .arrays import read_arrays

    record = load_part_record(root, header, index)
    folder = part_dir(root, index)
    specs = part_specs(header, record)
    names = [name for name in specs if name in ROW_ARRAYS or layers]
    for name, file in record.files.items():
        check_size(root, folder / name, file.size)
        if name.endswith("zarr.json") and (found := hash_file(folder / name)) != file:
            raise CacheCorruptError(f"`{folder / name}`: xxh3 is {found.xxh3}, part.json says {file.xxh3}")
    arrays = read_arrays(folder, specs, names, layers)
    for name in KL_ARRAYS:
        if name not in arrays:
            shape = specs[name].shape if name in specs else (*specs["entropy"].shape, 0)
            dtype = specs[name].dtype if name in specs else header.id_dtype
            arrays[name] = np.empty((len(layers), shape[0], *shape[2:]), dtype)
    _check_content(folder, header, record, arrays)
    return Part(record, arrays, id_of_rank)


def _check_content(folder: Path, header: CacheHeader, record: PartRecord, arrays: dict[str, np.ndarray]) -> None:
    """What no checksum can see: token spans that disagree with the record, and values no writer produces."""
    pieces = [arrays["response_ids"][lo:hi] for lo, hi in pairwise(arrays["response_offsets"].tolist())]
    if np.diff(arrays["offsets"]).tolist() != record.sample_tokens:
        raise CacheCorruptError(f"`{folder / 'offsets'}`: token counts are not those of part.json")
    if [response_digest(piece) for piece in pieces] != record.response_xxh3:
        raise CacheCorruptError(f"`{folder / 'response_ids'}`: response ids are not those of part.json")
    for name in ("ids", "tail_ids"):
        if arrays[name].size and int(arrays[name].max()) >= header.v_real:
            raise CacheCorruptError(f"`{folder / name}`: rank {arrays[name].max()}, the vocabulary is {header.v_real}")
    for name in ("lse", *SUMMARY_ARRAYS):
        if np.isnan(arrays[name]).any():
            raise CacheCorruptError(f"`{folder / name}`: holds a NaN, which is never written")


class Cache:
    """A cache opened for reading; made by `open`. Safe to use from several threads."""

    def __init__(self, root: Path, header: CacheHeader, index: "Index") -> None:
        self.path = root
        self.header = header
        self._index = index
        self._where: dict[str, int] | None = None
        self._parts: OrderedDict[tuple[int, tuple[int, ...]], Part] = OrderedDict()
        self._id_of_rank: np.ndarray | None = None
        self._lock = threading.RLock()

    @property
    def layers(self) -> list[int]:
        return self.header.layers

    @property
    def num_samples(self) -> int:
        return len(self._index.samples)

    @property
    def num_tokens(self) -> int:
        return int(self._index.samples["num_tokens"].to_numpy().sum())

    @property
    def parts(self) -> list[int]:
        """Indices of the committed parts."""
        return sorted(self._index.file_sizes)

    @property
    def is_complete(self) -> bool:
        return len(self.parts) == self.header.num_parts

    @property
    def id_of_rank(self) -> np.ndarray:
        """Token id of every frequency rank, uint32 [V], checked against cache.json."""
        with self._lock:
            if self._id_of_rank is None:
                self._id_of_rank = load_vocab(self.path, self.header)
            return self._id_of_rank

    def __len__(self) -> int:
        return self.num_samples

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._positions()

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.samples["id"].to_pylist())

    def __getitem__(self, sample_id: str) -> Row:
        return self.row(sample_id)

    def __repr__(self) -> str:
        parts = f"{len(self.parts)} parts" if self.is_complete else f"{len(self.parts)}/{self.header.num_parts} parts"
        return f"Cache({str(self.path)!r}, {self.num_samples} samples, layers {self.layers}, {parts})"

    def row(self, sample_id: str, layers: Sequence[int | str] | None = None) -> Row:
        """The sample's rows, of the model layers `layers` ("last" is the last one); all layers by default."""
        where = self._positions().get(sample_id)
        if where is None:
            raise SampleNotFoundError(self._not_found(sample_id))
        part_index = self._index.samples["part"][where].as_py()
        row = self.part(part_index, layers).row(self._index.samples["row"][where].as_py())
        if row.sample_id != sample_id:
            raise CacheCorruptError(
                f"`{part_dir(self.path, part_index)}` holds {row.sample_id!r}, samples.parquet says {sample_id!r}; "
                f"run: vlsi-cache repair {self.path}"
            )
        return row

    def read_part(self, index: int, layers: Sequence[int | str] | None = None) -> list[Row]:
        """All samples of one part, in stored order."""
        part = self.part(index, layers)
        return [part.row(i) for i in range(len(part))]

    def part(self, index: int, layers: Sequence[int | str] | None = None, *, keep: bool = True) -> Part:
        """One part in its compact form; the last few (`keep`) stay in memory."""
        key = (index, tuple(self.header.layer_indices(layers)))
        with self._lock:
            if key in self._parts:
                self._parts.move_to_end(key)
                return self._parts[key]
        part = load_part(self.path, self.header, index, key[1], self.id_of_rank)
        if keep:
            with self._lock:
                self._parts[key] = part
                while len(self._parts) > LRU_PARTS:
                    self._parts.popitem(last=False)
        return part

    def sample_table(self) -> "pa.Table":
        """One line per sample: id, kind, part, row, first_token, token counts, digests, means of the last layer."""
        return self._index.samples

    def part_record(self, index: int) -> PartRecord:
        """The commit record of a part: per-layer summary, skipped samples, files."""
        return load_part_record(self.path, self.header, index)

    def verify(self, *, deep: bool = False) -> "VerifyReport":
        """Check every file and every chunk (`deep`: also the hash of every file)."""
        from .verify import verify

        return verify(self.path, deep=deep)

    def bytes_by_array(self) -> dict[str, int]:
        """Bytes on disk of every array over all parts; "metadata" is the rest of the parts."""
        total: dict[str, int] = {}
        for sizes in self._index.file_sizes.values():
            for name, size in sizes.items():
                array = name.split("/", 1)[0] if "/c/" in name else "metadata"
                total[array] = total.get(array, 0) + size
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def bytes_per_layer_token(self) -> dict[str, float]:
        """Bytes per (layer, token) of every array, and their "total"."""
        cells = max(1, self.num_tokens * len(self.layers))
        sizes = self.bytes_by_array()
        return {**{name: size / cells for name, size in sizes.items()}, "total": sum(sizes.values()) / cells}

    def _positions(self) -> dict[str, int]:
        with self._lock:
            if self._where is None:
                self._where = {name: i for i, name in enumerate(self._index.samples["id"].to_pylist())}
            return self._where

    def _not_found(self, sample_id: object) -> str:
        close = difflib.get_close_matches(str(sample_id), list(self)[:20000], n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        missing = "" if self.is_complete else f" ({len(self.parts)} of {self.header.num_parts} parts are there)"
        return f"no sample {sample_id!r} in `{self.path}`{missing}{hint}"


def open(path: str | os.PathLike[str], *, allow_incomplete: bool = False) -> Cache:
    """Open a cache for reading; every file is checked for its size, nothing is decoded yet.

    Raises CacheNotFoundError, CacheIncompleteError (not with `allow_incomplete`), CacheCorruptError.
    """
    from .table import load_index

    root = Path(path)
    if not (root / HEADER_NAME).is_file():
        raise CacheNotFoundError(_not_a_cache(root))
    header = load_header(root)
    done = len([index for index in list_parts(root) if index < header.num_parts])
    if done < header.num_parts and not allow_incomplete:
        raise CacheIncompleteError(_incomplete(root, header, done))
    _refuse_extra_parts(root, header)
    return Cache(root, header, load_index(root, header))


def _refuse_extra_parts(root: Path, header: CacheHeader) -> None:
    extra = [index for index in list_parts(root) if index >= header.num_parts]
    if extra:
        raise CacheCorruptError(
            f"`{part_dir(root, extra[0])}` is not part of this cache of {header.num_parts} parts; "
            f"run: vlsi-cache repair {root}"
        )


def load_vocab(root: Path, header: CacheHeader) -> np.ndarray:
    from .arrays import read_vocab

    id_of_rank = read_vocab(root / "vocab", header.v_real)
    if (found := rank_table_digest(id_of_rank)) != header.id_of_rank_xxh3:
        raise CacheCorruptError(
            f"`{root / 'vocab'}`: xxh3 of the table is {found}, cache.json says {header.id_of_rank_xxh3}; "
            f"run: vlsi-cache repair {root}"
        )
    return id_of_rank


def _incomplete(root: Path, header: CacheHeader, done: int) -> str:
    if header.parents:
        command = f"vlsi-cache prune {header.parents[-1].get('path', 'CACHE')} -o {root} (with the same cuts)"
    else:
        command = f"vlsi-cache build-teacher SPEC -o {root}"
    return f"`{root}` is not finished: {done} of {header.num_parts} parts are there; to continue run: {command}"


def _not_a_cache(root: Path) -> str:
    if not root.exists():
        return f"there is no cache at `{root}`: the path does not exist"
    above = next((parent for parent in root.absolute().parents if (parent / HEADER_NAME).is_file()), None)
    if above is not None:
        return f"`{root}` is a piece of a cache; open the cache itself: `{above}`"
    if root.is_dir():
        below = sorted(child.name for child in root.iterdir() if (child / HEADER_NAME).is_file())
        if below:
            return f"`{root}` is not a cache, but holds {len(below)}: {', '.join(f'`{root / n}`' for n in below[:4])}"
        if (root / "parts").is_dir():
            return f"`{root}` looks like a cache that lost its `{HEADER_NAME}`; without it the parts cannot be read"
    return f"`{root}` is not a cache: it has no `{HEADER_NAME}`"
