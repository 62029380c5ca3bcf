"""The arrays of a part: written whole, read whole, by layer or memory-mapped.

In memory the layer axis comes first ([L, T, ...]), on disk the token axis ([T, L, ...]). One data file per array.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from vlsi_cache.errors import CacheCorruptError, DataError

from .chunks import (
    BLOSC_LEVEL,
    Known,
    MappedLayers,
    Undo,
    encode_array,
    impossible_fill,
    read_layers,
    read_spans,
    read_whole,
)
from .layout import FileRecord
from .ranks import RankTable
from .schema import ENTRY_ARRAYS, ArraySpec, data_file_name, vocab_specs

NOTHING: Mapping[str, Undo] = {}

Arrays = dict[str, Any]  # numpy arrays, or MappedLayers that are sliced like them


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray], specs: dict[str, ArraySpec]) -> dict[str, FileRecord]:
    """Write a new Zarr group at `folder`; equal input gives equal bytes. Returns what was written, data files hashed.

    Nothing is flushed to the disk here.
    """
    for name, spec in specs.items():
        shape = (spec.shape[1], spec.shape[0], *spec.shape[2:]) if spec.is_layered else spec.shape
        if spec.size_bytes and arrays[name].shape != shape:  # else the rest of a chunk would be filled up in silence
            raise DataError(f"`{name}` is {arrays[name].shape}, this part needs {shape}")
    _write_metadata(folder, specs)
    written = {}
    for name, spec in specs.items():
        if spec.size_bytes:
            file = data_file_name(name, spec)
            written[file] = _write_file(folder / file, encode_array(arrays[name], spec))
    return written


def _write_metadata(folder: Path, specs: dict[str, ArraySpec]) -> None:
    import zarr
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec
    from zarr.storage import LocalStore

    group = zarr.create_group(LocalStore(folder), zarr_format=3)
    for name, spec in specs.items():
        codec, options = spec.codec, {"typesize": spec.dtype.itemsize, "blocksize": spec.codec.block_bytes}
        blosc = (
            [BloscCodec(cname="zstd", clevel=BLOSC_LEVEL, shuffle=codec.shuffle, **options)] if codec.shuffle else []
        )
        shard = tuple(num * size for num, size in zip(spec.grid, spec.chunk, strict=True))
        group.create_array(
            name,
            shape=spec.shape,
            dtype=spec.dtype,
            chunks=spec.chunk,
            shards=tuple(max(a, b) for a, b in zip(shard, spec.chunk, strict=True)) if spec.sharded else None,
            filters=[TransposeCodec(order=(1, 2, 0))] if codec.by_entry else [],
            compressors=[*blosc, Crc32cCodec()],
            serializer=BytesCodec(endian="little"),
            fill_value=impossible_fill(spec.dtype),
        )


def _write_file(path: Path, pieces: Iterable[bytes]) -> FileRecord:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = xxhash.xxh3_64(), 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    return FileRecord(size=size, xxh3=digest.hexdigest())


def read_samples(folder: Path, specs: dict[str, ArraySpec], names: Iterable[str]) -> Arrays:
    """Arrays without a layer axis."""
    return {
        name: _guarded(folder, name, lambda name=name: _whole_or_empty(folder, name, specs[name])) for name in names
    }


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
    return {
        name: _guarded(
            folder, name, lambda name=name: _layers_of(folder, name, specs[name], layers, undo.get(name), check, known)
        )
        for name in names
    }


def read_flat(
    folder: Path, specs: dict[str, ArraySpec], names: Iterable[str], layers: Sequence[int], kept_LT: np.ndarray
) -> dict[str, list[np.ndarray]]:
    """Entries of layer rows `layers` of flat arrays, one array per layer; `kept_LT` is of ALL layers of the part."""
    edges = np.concatenate([[0], np.cumsum(kept_LT.sum(1, dtype=np.int64))]).tolist()
    spans = [list(pairwise(edges))[layer] for layer in layers]
    return {
        name: _guarded(folder, name, lambda name=name: _spans_of(folder, name, specs[name], spans)) for name in names
    }


def _whole_or_empty(folder: Path, name: str, spec: ArraySpec) -> np.ndarray:
    return (
        read_whole(folder / data_file_name(name, spec), spec) if spec.size_bytes else np.empty(spec.shape, spec.dtype)
    )


def _layers_of(
    folder: Path,
    name: str,
    spec: ArraySpec,
    layers: Sequence[int],
    undo: Undo,
    check: Callable[[str, np.ndarray], None] | None,
    known: Known | None,
) -> Any:
    if not spec.size_bytes or not layers:
        return np.empty((len(layers), spec.shape[0], *spec.shape[2:]), spec.dtype)
    path = folder / data_file_name(name, spec)
    if spec.codec.shuffle is None and name in ENTRY_ARRAYS:
        return MappedLayers(path, spec, layers, check=None if check is None else partial(check, name), known=known)
    return read_layers(path, spec, layers, undo)


def _spans_of(folder: Path, name: str, spec: ArraySpec, spans: list[tuple[int, int]]) -> list[np.ndarray]:
    if not spec.size_bytes:
        return [np.empty(0, spec.dtype) for _ in spans]
    if spans and max(stop for _, stop in spans) > spec.shape[0]:
        raise ValueError(f"holds {spec.shape[0]} entries, `kept` counts at least {max(stop for _, stop in spans)}")
    return read_spans(folder / data_file_name(name, spec), spec, spans)


def _guarded(folder: Path, name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except CacheCorruptError:
        raise
    except Exception as error:  # damaged bytes raise whatever the codec they reach raises
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CacheCorruptError(f"`{folder / name}`: {what}") from error


def write_vocab(folder: Path, ranks: RankTable, text: bytes | None, text_offsets: np.ndarray | None) -> None:
    """Write `vocab/`: the frequency ranks, and the text of every token if there is one."""
    arrays = {"id_of_rank": ranks.id_of_rank_V, "heads": ranks.heads_LH}
    if text is not None and text_offsets is not None:
        arrays |= {"text": np.frombuffer(text, np.uint8), "text_offsets": np.asarray(text_offsets, np.int64)}
    num_bytes = None if text is None else len(text)
    write_arrays(folder, arrays, vocab_specs(len(ranks.id_of_rank_V), ranks.heads_LH.shape, num_bytes))


def read_vocab(folder: Path, v_real: int, heads: tuple[int, int]) -> RankTable:
    """The frequency ranks, as they were written."""
    found = read_samples(folder, vocab_specs(v_real, heads, None), ["id_of_rank", "heads"])
    return RankTable(found["id_of_rank"], found["heads"])


def read_vocab_text(folder: Path, v_real: int) -> tuple[bytes, np.ndarray]:
    """UTF-8 bytes of all tokens one after the other, and int64 [V + 1] offsets; the caller knows that they exist."""
    specs = vocab_specs(v_real, (0, 0), 0)
    offsets = read_samples(folder, specs, ["text_offsets"])["text_offsets"]
    if offsets[0] or (np.diff(offsets) < 0).any():
        raise CacheCorruptError(
            f"`{folder / 'text_offsets'}`: offsets must rise from 0, found {offsets[0]} to {offsets.min()}"
        )
    specs = vocab_specs(v_real, (0, 0), int(offsets[-1]))
    return read_samples(folder, specs, ["text"])["text"].tobytes(), offsets
