"""Reading a cache: open, look up a sample, read a part. A row comes back exactly as it was written, or not at all.

Shape suffixes: L layers, T response tokens with a row, R response tokens, K kept entries, m tail samples.
"""

import bisect
import difflib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlsi_cache.errors import CacheCorruptError, CacheIncompleteError, CacheNotFoundError, SampleNotFoundError
from vlsi_cache.sparse.rows import SparseRows

from .arrays import Arrays, read_flat, read_layered, read_samples
from .chunks import Known, MappedLayers
from .encoding import UNDO, by_layer, check_ranks, decode_values, padded, undone_values
from .files import advised, check_metadata, check_part_files, load_header, load_part_record
from .layout import (
    HEADER_NAME,
    CacheHeader,
    PartRecord,
    list_parts,
    part_dir,
    response_digest,
)
from .ranks import RankTable
from .schema import SAMPLE_ARRAYS, SCALAR_ARRAYS, ArraySpec, layered_names, part_specs, value_array
from .vocab import is_interrupted_start, load_texts, load_vocab

if TYPE_CHECKING:
    import pyarrow as pa

    from .table import Index
    from .verify import VerifyReport

RECENT_BYTES = 256 << 20  # decoded parts that stay in memory for the next look, at least one


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
    """One part in memory, in its compact disk dtypes (memory-mapped if not compressed); `row` decodes a sample.

    `arrays` holds the layered arrays [L, T, ...] of the layer rows that were asked for; where rows differ in width, one
    array per layer for the entries, and their offsets by token under `edges` [L, T + 1]. `id_of_rank_LV` is of the
    same layers; None when ranks are ids. `is_undone`: see encoding.UNDO; otherwise everything is as on the disk.
    """

    header: CacheHeader
    record: PartRecord
    folder: Path
    arrays: Arrays
    id_of_rank_LV: np.ndarray | None
    is_undone: bool = False
    is_decoded: bool = False

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
        try:
            return self._row(index)
        except CacheCorruptError as error:
            raise advised(error, self.folder.parent.parent) from error

    def _row(self, index: int) -> Row:
        arrays, record = self.arrays, self.record
        tokens = slice(*self._edges[0][index : index + 2])
        response = slice(*self._edges[1][index : index + 2])
        response_ids_R = arrays["response_ids"][response]
        if response_digest(response_ids_R) != record.response_xxh3[index]:
            raise CacheCorruptError(f"`{self.folder / 'response_ids'}`: response ids are not those of part.json")
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
        )

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

    def _ids(self, ranks: np.ndarray) -> np.ndarray:
        if self.id_of_rank_LV is not None:
            return by_layer(self.id_of_rank_LV, ranks)
        return ranks

    def check(self) -> None:
        """What reading does not look at, or not before it is needed: blocks of memory-mapped arrays, the metadata for
        other readers, and whether the response ids are those of part.json."""
        check_metadata(self.folder, self.record)
        for array in self.arrays.values():
            if isinstance(array, MappedLayers):
                array.check_all()
        spans = pairwise(self.arrays["response_offsets"].tolist())
        if [response_digest(self.arrays["response_ids"][lo:hi]) for lo, hi in spans] != self.record.response_xxh3:
            raise CacheCorruptError(f"`{self.folder / 'response_ids'}`: response ids are not those of part.json")

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
) -> Part:
    """Read part `index`, of the layered arrays only the layer rows `layers`, and check all that was read.

    Arrays come as they are on the disk, or `undone` for decoding rows faster. `known` are mapped blocks that have been
    checked before.
    """
    try:
        return _load_part(root, header, index, layers, id_of_rank_LV, undone=undone, known=known)
    except CacheCorruptError as error:
        raise advised(error, root) from error


def _load_part(
    root: Path,
    header: CacheHeader,
    index: int,
    layers: Sequence[int],
    id_of_rank_LV: np.ndarray | None,
    *,
    undone: bool,
    known: Known | None,
) -> Part:
    record = load_part_record(root, header, index)
    check_part_files(root, index, record)
    folder = part_dir(root, index)
    specs = part_specs(header, record)
    arrays = read_samples(folder, specs, SAMPLE_ARRAYS)
    if np.diff(arrays["offsets"]).tolist() != record.sample_tokens:
        raise CacheCorruptError(f"`{folder / 'offsets'}`: token counts are not those of part.json")
    whole = [name for name in layered_names(header) if specs[name].is_layered and name != "kept"]
    undo = UNDO if undone else {}
    arrays |= read_layered(folder, specs, whole, layers, undo=undo, limit=header.v_real, known=known)
    if header.is_ragged:
        arrays |= _read_ragged(folder, header, specs, layers)
    for name, shape in {"tail_ids": (0,), "tail_mass": ()}.items():
        dtype = header.id_dtype if name == "tail_ids" else np.float32
        arrays.setdefault(name, np.zeros((len(layers), record.num_tokens, *shape), dtype))
    _check_values(folder, header, arrays)
    return Part(header, record, folder, arrays, id_of_rank_LV, undone)


def _read_ragged(folder: Path, header: CacheHeader, specs: dict[str, ArraySpec], layers: Sequence[int]) -> Arrays:
    """Widths and offsets of the rows of `layers`, and their entries."""
    every = range(len(header.layers))
    kept_LT = read_layered(folder, specs, ["kept"], every)["kept"]
    if (kept_LT.max(1, initial=0) > header.top_k).any() or int(kept_LT.sum(dtype=np.int64)) != specs["ids"].shape[0]:
        raise CacheCorruptError(f"`{folder / 'kept'}`: the widths are not those of the entries")
    flat = read_flat(folder, specs, ["ids", value_array(header)], layers, kept_LT)
    chosen_LT = kept_LT[list(layers)]
    edges_LT = np.zeros((len(layers), chosen_LT.shape[1] + 1), np.int64)
    np.cumsum(chosen_LT, axis=1, dtype=np.int64, out=edges_LT[:, 1:])
    return {**flat, "kept": chosen_LT, "edges": edges_LT}


def _check_values(folder: Path, header: CacheHeader, arrays: Arrays) -> None:
    """Values that no writer produces."""
    try:
        check_ranks(header, arrays)
    except ValueError as error:
        raise CacheCorruptError(f"`{folder}`: {error}") from None
    for name in SCALAR_ARRAYS:
        if np.isnan(arrays[name]).any():
            raise CacheCorruptError(f"`{folder / name}`: holds a NaN, which is never written")


class Cache:
    """A cache opened for reading; made by `open`. Safe to use from several threads."""

    def __init__(self, root: Path, header: CacheHeader, index: "Index") -> None:
        self.path = root
        self.header = header
        self.recent_bytes = RECENT_BYTES
        self._index = index
        self._order: np.ndarray | None = None
        self._parts: OrderedDict[tuple[int, tuple[int, ...], bool], Part] = OrderedDict()
        self._known: Known = {}
        self._ranks: RankTable | None = None
        self._ids_LV: np.ndarray | None = None
        self._texts: tuple[bytes, np.ndarray] | None = None
        self._lock = threading.RLock()

    @property
    def layers(self) -> list[int]:
        return self.header.layers

    @property
    def num_samples(self) -> int:
        return self._index.num_samples

    @property
    def num_tokens(self) -> int:
        return int(self._index.column("num_tokens").to_numpy().sum())

    @property
    def parts(self) -> list[int]:
        """Indices of the committed parts."""
        return sorted(self._index.file_sizes)

    @property
    def is_complete(self) -> bool:
        return len(self.parts) == self.header.num_parts

    @property
    def ranks(self) -> RankTable:
        """What turns frequency ranks into token ids, checked against cache.json."""
        with self._lock:
            if self._ranks is None:
                self._ranks = load_vocab(self.path, self.header)
            return self._ranks

    def token_text(self, token: int) -> str | None:
        """The text of a token, from the cache itself; None when the cache carries no texts."""
        if self.header.text_xxh3 is None:
            return None
        with self._lock:
            if self._texts is None:
                self._texts = load_texts(self.path, self.header)
        text, offsets = self._texts
        return text[offsets[token] : offsets[token + 1]].decode("utf-8", "replace")

    def __len__(self) -> int:
        return self.num_samples

    def __contains__(self, sample_id: object) -> bool:
        return self._position(sample_id) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.column("id").to_pylist())

    def __getitem__(self, sample_id: str) -> Row:
        return self.row(sample_id)

    def __repr__(self) -> str:
        parts = f"{len(self.parts)} parts" if self.is_complete else f"{len(self.parts)}/{self.header.num_parts} parts"
        return f"Cache({str(self.path)!r}, {self.num_samples} samples, layers {self.layers}, {parts})"

    def row(self, sample_id: str, layers: Sequence[int | str] | None = None) -> Row:
        """The sample's rows, of the model layers `layers` ("last" is the last one); all layers by default."""
        where = self._position(sample_id)
        if where is None:
            raise SampleNotFoundError(self._not_found(sample_id))
        part_index = self._index.column("part")[where].as_py()
        row = self.part(part_index, layers, undone=True).row(self._index.column("row")[where].as_py())
        if row.sample_id != sample_id:
            raise CacheCorruptError(
                f"`{part_dir(self.path, part_index)}` holds {row.sample_id!r}, samples.parquet says {sample_id!r}; "
                f"run: vlsi-cache repair {self.path}"
            )
        return row

    def read_part(self, index: int, layers: Sequence[int | str] | None = None) -> list[Row]:
        """All samples of one part, in stored order."""
        part = self.part(index, layers, undone=True)
        return [part.row(i) for i in range(len(part))]

    def part(
        self, index: int, layers: Sequence[int | str] | None = None, *, keep: bool = True, undone: bool = False
    ) -> Part:
        """One part in its compact form; with `keep`, those read last stay in memory, up to `recent_bytes`.

        Its arrays are as on the disk; with `undone` its rows decode faster.
        """
        key = (index, tuple(self.header.layer_indices(layers)), undone)
        with self._lock:
            if key in self._parts:
                self._parts.move_to_end(key)
                return self._parts[key]
        ids_LV = self._ids_of_ranks()
        chosen_LV = None if ids_LV is None else ids_LV[list(key[1])]
        part = load_part(self.path, self.header, index, key[1], chosen_LV, undone=undone, known=self._known)
        if keep:
            with self._lock:
                self._parts[key] = part
                while len(self._parts) > 1 and sum(one.num_bytes for one in self._parts.values()) > self.recent_bytes:
                    self._parts.popitem(last=False)
        return part

    def _ids_of_ranks(self) -> np.ndarray | None:
        """uint32 [L, V]; None when every rank is its own id, as in the `fast` profile."""
        with self._lock:
            if self._ids_LV is None and not self.ranks.is_identity:
                self._ids_LV = self.ranks.ids_LV()
            return self._ids_LV

    def sample_table(self) -> "pa.Table":
        """One line per sample: id, kind, part, row, first_token, token counts, digests, means of the last layer."""
        return self._index.table()

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

    def _position(self, sample_id: object) -> int | None:
        """The line of a sample in the table: by binary search, since a dict of a million ids takes 150 MB."""
        import pyarrow.compute as pc

        if not isinstance(sample_id, str):
            return None
        with self._lock:
            ids, order = self._index.column("id"), self._order
            if order is None:
                order = self._order = pc.call_function("sort_indices", [ids]).to_numpy()
        found = bisect.bisect_left(order, sample_id.encode(), key=lambda line: ids[int(line)].as_py().encode())
        if found == len(order) or ids[int(order[found])].as_py() != sample_id:
            return None
        return int(order[found])

    def _not_found(self, sample_id: object) -> str:
        close = difflib.get_close_matches(str(sample_id), self._index.column("id")[:20000].to_pylist(), n=3)
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


def _incomplete(root: Path, header: CacheHeader, done: int) -> str:
    from .derive import resume_command

    done_of = f"{done} of {header.num_parts} parts are there"
    return f"`{root}` is not finished: {done_of}; to continue run: {resume_command(header, root)}"


def _not_a_cache(root: Path) -> str:
    if not root.exists():
        return f"there is no cache at `{root}`: the path does not exist"
    above = next((parent for parent in root.absolute().parents if (parent / HEADER_NAME).is_file()), None)
    if above is not None:
        return f"`{root}` is a piece of a cache; open the cache itself: `{above}`"
    if is_interrupted_start(root):
        return (
            f"`{root}` is the start of a cache, interrupted before its first part: run the command that builds it again"
        )
    if root.is_dir():
        below = sorted(child.name for child in root.iterdir() if (child / HEADER_NAME).is_file())
        if below:
            return f"`{root}` is not a cache, but holds {len(below)}: {', '.join(f'`{root / n}`' for n in below[:4])}"
        if (root / "parts").is_dir():
            return f"`{root}` looks like a cache that lost its `{HEADER_NAME}`; without it the parts cannot be read"
    return f"`{root}` is not a cache: it has no `{HEADER_NAME}`"
