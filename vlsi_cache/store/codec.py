"""Zarr v3 arrays, chunks and shards as bytes: the codecs of the format, written and read without an array library.

Any Zarr v3 reader opens the same files (the tests do). What is our own is the way to them: the chunks of a shard lie in
C order without gaps, so that an uncompressed shard is one strided array that can be memory-mapped, and a layer is read
without touching the others.
"""

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import xxhash
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without types)

from vlsi_cache.errors import CacheCorruptError, DataError

from .arrays import ENTRY_ARRAYS, ArraySpec, data_file_name, shard_index_bytes
from .files import read_file
from .format import FileRecord

CRC_BYTES = 4
BLOSC_HEADER = 16
BLOSC_LEVEL = 5
Check = Callable[[np.ndarray], None] | None
Undo = Callable[[np.ndarray], None] | None
Known = dict[Path, np.ndarray]  # blocks of memory-mapped files that have been checked
SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def impossible_fill(dtype: np.dtype) -> int | float:
    """A value no array holds: what a lost chunk would read as must not look like data."""
    if dtype.kind == "f":
        return float("nan")
    return -1 if dtype.kind == "i" else int(np.iinfo(dtype).max)


def encode_chunk(values: np.ndarray, spec: ArraySpec) -> bytes:
    """One chunk as it lies on disk: little-endian, compressed, its crc32c behind it."""
    codec = spec.codec
    raw = np.ascontiguousarray(values.T if codec.by_entry else values, spec.dtype.newbyteorder("<"))
    if codec.shuffle is None:
        body = raw.tobytes()
    else:
        body = blosc.compress(raw, b"zstd", BLOSC_LEVEL, SHUFFLES[codec.shuffle], codec.block_bytes, raw.itemsize)
    return bytes(body) + _crc(body)


def decode_chunk(stored: np.ndarray, spec: ArraySpec, out: np.ndarray, undo: Undo = None) -> None:
    """Check the crc32c of `stored` (uint8) and unpack it into the contiguous `out`; ValueError if it is damaged.

    `undo` works in place on a chunk whose entries come first, before it is transposed.
    """
    body = checked(stored)
    _check_unpacked(body, len(body), spec)
    if spec.codec.shuffle is None:
        out.reshape(-1).view(np.uint8)[...] = body
    elif spec.codec.by_entry:
        turned = np.empty(out.shape[::-1], out.dtype)
        blosc.decompress(body, turned)
        if undo is not None:
            undo(turned)
        out[...] = turned.T
    else:
        blosc.decompress(body, out)


def _check_unpacked(head: np.ndarray, num_bytes: int, spec: ArraySpec) -> None:
    """ValueError unless a chunk unpacks to just the bytes of one; blosc's header (in `head`) says how many it holds.

    Fewer would leave memory as it was found, and be taken for data.
    """
    if spec.codec.shuffle is not None:
        num_bytes = int.from_bytes(head[4:8].tobytes(), "little") if len(head) >= BLOSC_HEADER else 0
    if num_bytes != spec.chunk_bytes:
        raise ValueError(f"a chunk holds {num_bytes} bytes, and must hold {spec.chunk_bytes}")


def checked(stored: np.ndarray) -> np.ndarray:
    """The bytes in front of the crc32c, which must be theirs."""
    body = stored[:-CRC_BYTES]
    if stored.size < CRC_BYTES or _crc(body) != stored[-CRC_BYTES:].tobytes():
        raise ValueError("the checksum (crc32c) of a chunk does not match its bytes")
    return body


def _crc(body: bytes | np.ndarray) -> bytes:
    return int(google_crc32c.value(body)).to_bytes(CRC_BYTES, "little")  # type: ignore[arg-type]


def encode_array(values: np.ndarray, spec: ArraySpec) -> Iterator[bytes]:
    """The data file of an array, piece by piece; `values` has the layer axis first if the array is layered."""
    if not spec.sharded:
        yield encode_chunk(values, spec)
        return
    sizes = []
    for where in np.ndindex(*spec.grid):
        piece = encode_chunk(_chunk_of(values, spec, where), spec)
        sizes.append(len(piece))
        yield piece
    yield encode_index(sizes)


def encode_index(sizes: Sequence[int]) -> bytes:
    """The end of a shard: where each of its chunks begins, and how many bytes it has."""
    starts = np.cumsum([0, *sizes])[:-1]
    table = np.stack([starts, np.asarray(sizes, np.int64)], 1).astype("<u8").tobytes()
    return table + _crc(table)


def _chunk_of(values: np.ndarray, spec: ArraySpec, where: tuple[int, ...]) -> np.ndarray:
    """The chunk at grid place `where`, filled up at the end of the array."""
    size = spec.chunk[0]
    tokens = slice(where[0] * size, (where[0] + 1) * size)
    found = values[where[1], tokens] if spec.is_layered else values[tokens]
    if len(found) == size:
        return found
    full = np.full((size, *found.shape[1:]), impossible_fill(spec.dtype), spec.dtype)
    full[: len(found)] = found
    return full


def read_whole(path: Path, spec: ArraySpec) -> np.ndarray:
    """An array of one chunk."""
    stored = np.frombuffer(read_file(path), np.uint8)
    _check_unpacked(stored, len(stored) - CRC_BYTES, spec)  # before anything is allocated for it
    out = np.empty(spec.shape, spec.dtype)
    decode_chunk(stored, spec, out)
    return out


def read_layers(path: Path, spec: ArraySpec, layers: Sequence[int], undo: Undo = None) -> np.ndarray:
    """Layer rows `layers` of a layered array: [len(layers), T, ...]. Only their chunks are read."""
    with path.open("rb", buffering=0) as file:
        index = _read_index(file.fileno(), spec)
        _check_first(file.fileno(), index[0, layers[0]].ravel(), spec)
        out = np.empty((len(layers), spec.shape[0], *spec.shape[2:]), spec.dtype)
        for row, layer in enumerate(layers):
            for block in range(spec.grid[0]):
                _read_into(file.fileno(), index[block, layer].ravel(), spec, out[row], block, undo)
    return out


def read_spans(path: Path, spec: ArraySpec, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Stretches (start, stop) of a flat array. Only the chunks that hold them are read, each once."""
    size = spec.chunk[0]
    numbers = [range(start // size, -(-stop // size)) for start, stop in spans]
    blocks = {}
    with path.open("rb", buffering=0) as file:
        index = _read_index(file.fileno(), spec)
        _check_first(file.fileno(), index[0], spec)
        for block in sorted({block for span in numbers for block in span}):
            blocks[block] = np.empty(min(size, spec.shape[0] - block * size), spec.dtype)
            _read_into(file.fileno(), index[block], spec, blocks[block], 0)
    joined = [np.concatenate([blocks[b] for b in span] or [np.empty(0, spec.dtype)]) for span in numbers]
    return [
        values[start - span.start * size :][: stop - start]
        for (start, stop), span, values in zip(spans, numbers, joined, strict=True)
    ]


def read_index(path: Path, spec: ArraySpec) -> np.ndarray:
    """Offset and size of every chunk of a shard, uint64 [*grid, 2]; ValueError unless they lie in order."""
    with path.open("rb", buffering=0) as file:
        return _read_index(file.fileno(), spec)


def layer_bytes(path: Path, spec: ArraySpec, entries_L: np.ndarray) -> np.ndarray:
    """Stored bytes of every layer of a sharded array, float64 [L]: only the index of the shard is read.

    `entries_L` are the entries of every layer. A chunk of a flat array may hold more than one layer: they share it by
    their entries.
    """
    with path.open("rb", buffering=0) as file:
        sizes = _read_index(file.fileno(), spec)[..., 1].astype(np.float64)
    if spec.is_layered:
        return sizes.reshape(*spec.grid[:2], -1).sum((0, 2))
    num_entries, size = spec.shape[0], spec.chunk[0]
    ends = np.minimum((np.arange(len(sizes)) + 1) * size, num_entries)
    bytes_up_to = np.interp(np.cumsum(entries_L), np.concatenate([[0], ends]), np.concatenate([[0], np.cumsum(sizes)]))
    return np.diff(bytes_up_to, prepend=0.0)


def _read_index(handle: int, spec: ArraySpec) -> np.ndarray:
    """Offset and size of every chunk of a shard, uint64 [*grid, 2]; they must lie in C order without gaps."""
    num_bytes, size = shard_index_bytes(spec), os.fstat(handle).st_size
    if num_bytes > size:
        raise ValueError(f"{size} bytes cannot hold the index of {math.prod(spec.grid)} chunks")
    stored = _read_at(handle, size - num_bytes, num_bytes)
    index = checked(stored).view("<u8").reshape(-1, 2)
    if index[:, 1].max() > size:  # else their sum might wrap around
        raise ValueError(f"a chunk of {index[:, 1].max()} bytes in a file of {size}")
    ends = np.cumsum(index[:, 1])
    if index[0, 0] or (index[1:, 0] != ends[:-1]).any() or ends[-1] != size - len(stored):
        raise ValueError("the chunks of the shard do not lie in order without gaps")
    return index.reshape(*spec.grid, 2)


def _check_first(handle: int, place: np.ndarray, spec: ArraySpec) -> None:
    """ValueError unless the chunk at `place` is as large as `spec` says, before anything is allocated for them all."""
    start, num_bytes = place.tolist()
    _check_unpacked(_read_at(handle, start, min(BLOSC_HEADER, num_bytes)), num_bytes - CRC_BYTES, spec)


def _read_into(handle: int, place: np.ndarray, spec: ArraySpec, out: np.ndarray, block: int, undo: Undo = None) -> None:
    """Unpack the chunk at `place` into tokens `block` of `out`; at the end of the array it is cut."""
    stored = _read_at(handle, int(place[0]), int(place[1]))
    size = spec.chunk[0]
    target = out[block * size : (block + 1) * size]
    if len(target) == size:
        decode_chunk(stored, spec, target, undo)
        return
    full = np.empty((size, *target.shape[1:]), spec.dtype)
    decode_chunk(stored, spec, full, undo)
    target[...] = full[: len(target)]


def _read_at(handle: int, start: int, num_bytes: int) -> np.ndarray:
    found = os.pread(handle, num_bytes, start) if start >= 0 else b""
    if len(found) != num_bytes:
        raise ValueError(f"the file ends too early: {len(found)} of {num_bytes} bytes at {start}")
    return np.frombuffer(found, np.uint8)


class MappedLayers:
    """Layer rows of an uncompressed layered array, memory-mapped: `mapped[:, low:high]` is [L, high - low, ...].

    A block of one layer is checked against its crc32c when it is first touched, and never again; `check` looks at its
    values then (ValueError). `known` [blocks, layers] remembers it, also for other objects over the same file.
    """

    def __init__(
        self, path: Path, spec: ArraySpec, layers: Sequence[int], *, check: Check, known: Known | None
    ) -> None:
        with path.open("rb", buffering=0) as file:
            index = _read_index(file.fileno(), spec)
            self._file_bytes = os.fstat(file.fileno()).st_size
        chunk_bytes = spec.chunk_bytes
        if (index[..., 1] != chunk_bytes + CRC_BYTES).any():
            raise ValueError(f"a chunk of the shard is not {chunk_bytes} bytes and a checksum long")
        self.shape = (len(layers), spec.shape[0], *spec.shape[2:])
        self.dtype, self.path, self._check_values = spec.dtype, path, check
        self._layers, self._tokens = list(layers), spec.chunk[0]
        # plain arrays over the map: slicing a memmap object costs several times as much
        stored = np.asarray(np.memmap(path, np.uint8, mode="r"))
        grid = spec.grid[:2]
        self._stored_BLc = stored[: math.prod(grid) * (chunk_bytes + CRC_BYTES)].reshape(*grid, -1)
        values = self._stored_BLc[..., :chunk_bytes].view(spec.dtype)
        self._values_BLt = values.reshape(*grid, spec.chunk[0], *spec.chunk[2:])  # still no copy
        self._every_layer = self._layers == list(range(grid[1]))
        self._known_BL = np.zeros(grid, bool) if known is None else known.setdefault(path, np.zeros(grid, bool))
        self._is_known = [bool(known_L[self._layers].all()) for known_L in self._known_BL]
        self._lock = threading.Lock()

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        low, high, _ = key[1].indices(self.shape[1])
        size = self._tokens
        if high <= (low // size + 1) * size:
            return self._piece(low // size, low % size, high - low // size * size)
        pieces = [
            self._piece(block, max(0, low - block * size), min(size, high - block * size))
            for block in range(low // size, -(-high // size))
        ]
        return np.concatenate(pieces, axis=1)

    def _piece(self, block: int, low: int, high: int) -> np.ndarray:
        if not self._is_known[block]:
            self._check(block)
        piece = self._values_BLt[block][:, low:high]
        return piece if self._every_layer else piece[self._layers]

    def check_all(self) -> None:
        """Check every block now."""
        for block in range(len(self._is_known)):
            self._check(block)

    def _check(self, block: int) -> None:
        with self._lock:
            if self._is_known[block]:
                return
            if (
                _size_of(self.path, self._file_bytes) != self._file_bytes
            ):  # a page behind the end would kill the process
                raise CacheCorruptError.at(self.path, ": the file has changed its size since it was opened")
            for layer in (layer for layer in self._layers if not self._known_BL[block, layer]):
                try:
                    checked(self._stored_BLc[block, layer])
                    if self._check_values is not None:
                        self._check_values(self._values_BLt[block, layer, : self.shape[1] - block * self._tokens])
                except ValueError as error:
                    raise CacheCorruptError.at(self.path, f": block {block}, layer row {layer}: {error}") from None
                self._known_BL[block, layer] = True
            self._is_known[block] = True


def _size_of(path: Path, otherwise: int) -> int:
    """Size of a file; `otherwise` when it has no name any more, which leaves what is mapped as it was."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return otherwise


NOTHING: Mapping[str, Undo] = {}
Arrays = dict[str, Any]  # numpy arrays, or MappedLayers that are sliced like them


def write_arrays(
    folder: Path, arrays: Mapping[str, np.ndarray], specs: dict[str, ArraySpec]
) -> tuple[dict[str, FileRecord], dict[str, list[int]]]:
    """Write a new Zarr group at `folder`; equal input gives equal bytes. Nothing is flushed to the disk here.

    Returns size and hash of every data file, and of every shard, by the name of its array, the sizes of its chunks.
    """
    for name, spec in specs.items():
        shape = (spec.shape[1], spec.shape[0], *spec.shape[2:]) if spec.is_layered else spec.shape
        if spec.size_bytes and arrays[name].shape != shape:  # else the rest of a chunk would be filled up in silence
            raise DataError(f"`{name}` is {arrays[name].shape}, this part needs {shape}")
    _write_metadata(folder, specs)
    written, chunk_bytes = {}, {}
    for name, spec in specs.items():
        if spec.size_bytes:
            file = data_file_name(name, spec)
            written[file], sizes = _write_file(folder / file, encode_array(arrays[name], spec))
            if spec.sharded:
                chunk_bytes[name] = sizes[:-1]  # what comes last is the index
    return written, chunk_bytes


def _write_metadata(folder: Path, specs: dict[str, ArraySpec]) -> None:
    """The `zarr.json` of the group and of each array."""
    for name, spec in ((".", None), *specs.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "zarr.json").write_bytes(_metadata_of(spec))


@lru_cache(maxsize=256)
def _metadata_of(spec: ArraySpec | None) -> bytes:
    """What zarr writes for such an array, or for a group (None). Zarr takes 5 ms, and parts of a cache are alike."""
    import zarr
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), zarr_format=3)
    if spec is None:
        return files["zarr.json"].to_bytes()
    codec, options = spec.codec, {"typesize": spec.dtype.itemsize, "blocksize": spec.codec.block_bytes}
    blosc = [BloscCodec(cname="zstd", clevel=BLOSC_LEVEL, shuffle=codec.shuffle, **options)] if codec.shuffle else []
    shard = tuple(num * size for num, size in zip(spec.grid, spec.chunk, strict=True))
    group.create_array(
        "array",
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.chunk,
        shards=tuple(max(a, b) for a, b in zip(shard, spec.chunk, strict=True)) if spec.sharded else None,
        filters=[TransposeCodec(order=(1, 2, 0))] if codec.by_entry else [],
        compressors=[*blosc, Crc32cCodec()],
        serializer=BytesCodec(endian="little"),
        fill_value=impossible_fill(spec.dtype),
    )
    return files["array/zarr.json"].to_bytes()


def _write_file(path: Path, pieces: Iterable[bytes]) -> tuple[FileRecord, list[int]]:
    """Size and hash of the new file, and the sizes of its pieces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, sizes = xxhash.xxh3_64(), []
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            sizes.append(len(piece))
    return FileRecord(size=sum(sizes), xxh3=digest.hexdigest()), sizes


def read_samples(folder: Path, specs: dict[str, ArraySpec], names: Iterable[str]) -> Arrays:
    """Arrays without a layer axis."""
    found: Arrays = {}
    for name in names:
        spec = specs[name]
        with _damage_is_an_error(folder / name):
            path = folder / data_file_name(name, spec)
            found[name] = read_whole(path, spec) if spec.size_bytes else np.empty(spec.shape, spec.dtype)
    return found


def read_layered(
    folder: Path,
    specs: dict[str, ArraySpec],
    names: Iterable[str],
    layers: Sequence[int],
    *,
    undo: Mapping[str, Undo] = NOTHING,
    check: Callable[[str, np.ndarray], None] | None = None,
    known: Known | None = None,
) -> Arrays:
    """Layer rows `layers` of layered arrays, [len(layers), T, ...]; uncompressed ones stay on disk.

    `undo` works in place on chunks of the arrays it names; `check(name, values)` looks at blocks of mapped ones when
    they are touched, `known` are those that need no check any more.
    """
    found: Arrays = {}
    for name in names:
        spec, path = specs[name], folder / data_file_name(name, specs[name])
        with _damage_is_an_error(folder / name):
            if not spec.size_bytes or not layers:
                found[name] = np.empty((len(layers), spec.shape[0], *spec.shape[2:]), spec.dtype)
            elif spec.codec.shuffle is None and name in ENTRY_ARRAYS:
                check_values = None if check is None else partial(check, name)
                found[name] = MappedLayers(path, spec, layers, check=check_values, known=known)
            else:
                found[name] = read_layers(path, spec, layers, undo.get(name))
    return found


def read_flat(
    folder: Path, specs: dict[str, ArraySpec], names: Iterable[str], layers: Sequence[int], kept_LT: np.ndarray
) -> dict[str, list[np.ndarray]]:
    """Entries of layer rows `layers` of flat arrays, one array per layer; `kept_LT` is of ALL layers of the part."""
    edges = np.concatenate([[0], np.cumsum(kept_LT.sum(1, dtype=np.int64))]).tolist()
    spans = [(edges[layer], edges[layer + 1]) for layer in layers]
    last = max((stop for _, stop in spans), default=0)
    found: dict[str, list[np.ndarray]] = {}
    for name in names:
        spec = specs[name]
        with _damage_is_an_error(folder / name):
            if not spec.size_bytes:
                found[name] = [np.empty(0, spec.dtype) for _ in spans]
                continue
            if last > spec.shape[0]:
                raise ValueError(f"holds {spec.shape[0]} entries, `kept` counts at least {last}")
            found[name] = read_spans(folder / data_file_name(name, spec), spec, spans)
    return found


@contextmanager
def _damage_is_an_error(path: Path) -> Iterator[None]:
    """Turn whatever damaged bytes raise in the codec that they reach into CacheCorruptError."""
    try:
        yield
    except CacheCorruptError:
        raise
    except Exception as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CacheCorruptError.at(path, f": {what}") from error
