"""The Zarr side of a part: named arrays in their disk dtype, written whole, read whole or by layer.

In memory the layer axis comes first ([L, T, ...]), on disk the token axis ([T, L, ...]). One data file per array;
in the layered arrays one chunk holds one layer, so a subset of the layers costs what it holds.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import zarr
from zarr.buffer.cpu import NDBuffer
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from vlsi_cache.errors import CacheCorruptError

from .layout import KL_ARRAYS, ArraySpec

CHUNK_TOKENS = 65536  # keeps a chunk far below the 2 GiB that blosc can take

Arrays = dict[str, np.ndarray]


def impossible_fill(dtype: np.dtype) -> int | float:
    """A value no array holds: what a lost chunk would read as must not look like data."""
    if dtype.kind == "f":
        return float("nan")
    return -1 if dtype.kind == "i" else int(np.iinfo(dtype).max)


def chunk_shapes(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """(chunk, shard) of an array; a shard is the whole array, so that it is one file."""
    whole = tuple(max(1, size) for size in shape)
    if name not in KL_ARRAYS:
        return whole, None
    tokens = min(whole[0], CHUNK_TOKENS)
    return (tokens, 1, *whole[2:]), (-(-whole[0] // tokens) * tokens, *whole[1:])


def _compressors(dtype: np.dtype) -> list[BloscCodec | ZstdCodec | Crc32cCodec]:
    if dtype.itemsize == 1:
        return [ZstdCodec(level=3), Crc32cCodec()]
    return [BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=dtype.itemsize), Crc32cCodec()]


def write_arrays(folder: Path, arrays: Arrays, specs: dict[str, ArraySpec]) -> None:
    """Write a new Zarr group at `folder`, every array by one whole-shard assignment; equal input gives equal bytes."""
    group = zarr.create_group(LocalStore(folder), zarr_format=3)
    for name, spec in specs.items():
        chunks, shards = chunk_shapes(name, spec.shape)
        target = group.create_array(
            name,
            shape=spec.shape,
            dtype=spec.dtype,
            chunks=chunks,
            shards=shards,
            filters=[],
            compressors=_compressors(spec.dtype),
            serializer=BytesCodec(endian="little"),
            fill_value=impossible_fill(spec.dtype),
            config={"write_empty_chunks": True},
        )
        if spec.size_bytes:
            target[...] = np.moveaxis(arrays[name], 0, 1) if name in KL_ARRAYS else arrays[name]


def read_arrays(
    folder: Path, specs: dict[str, ArraySpec], names: Iterable[str], layer_indices: Sequence[int]
) -> Arrays:
    """Read `names`; of the layered arrays only `layer_indices`. Every chunk read is checked against its crc32c."""
    store = LocalStore(folder, read_only=True)
    arrays: Arrays = {}
    for name in names:
        try:
            arrays[name] = _read_array(store, name, specs[name], layer_indices)
        except Exception as error:  # damaged bytes raise whatever the codec they reach raises
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CacheCorruptError(f"`{folder / name}`: {what}") from error
    return arrays


def _read_array(store: LocalStore, name: str, spec: ArraySpec, layer_indices: Sequence[int]) -> np.ndarray:
    array = zarr.open_array(store, path=name, mode="r", zarr_format=3)
    if array.shape != spec.shape or array.dtype != spec.dtype:
        raise ValueError(f"is {array.shape} {array.dtype}, expected {spec.shape} {spec.dtype}")
    if name not in KL_ARRAYS:
        out = np.empty(spec.shape, spec.dtype)
        array.get_basic_selection(..., out=NDBuffer.from_numpy_array(out))
        return out
    out = np.empty((len(layer_indices), spec.shape[0], *spec.shape[2:]), spec.dtype)
    if list(layer_indices) == list(range(spec.shape[1])):
        # the target is a view with the token axis first, so zarr decodes each chunk into its final place
        array.get_basic_selection(..., out=NDBuffer.from_numpy_array(np.moveaxis(out, 0, 1)))
        return out
    for row, layer in enumerate(layer_indices):
        array.get_basic_selection((slice(None), layer), out=NDBuffer.from_numpy_array(out[row]))
    return out


def write_vocab(folder: Path, id_of_rank: np.ndarray) -> None:
    """Write the frequency-rank table as the group `folder` with the one array `id_of_rank`."""
    table = np.ascontiguousarray(id_of_rank, dtype=np.uint32)
    write_arrays(folder, {"id_of_rank": table}, {"id_of_rank": ArraySpec(table.shape, table.dtype)})


def read_vocab(folder: Path, v_real: int) -> np.ndarray:
    """The frequency-rank table, uint32 [V]."""
    specs = {"id_of_rank": ArraySpec((v_real,), np.dtype(np.uint32))}
    return read_arrays(folder, specs, specs, ())["id_of_rank"]
