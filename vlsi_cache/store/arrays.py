"""The arrays of a part and of `vocab/`: names, shapes, and how they lie in chunks and shards.

Shape suffixes: L layers, T response tokens with a row, V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .format import CacheHeader, PartRecord

SAMPLE_ARRAYS = ("offsets", "response_offsets", "response_ids", "positions")
BYTES_ARRAY = "response_bytes"  # also without a layer axis; parts of earlier writers have none
UNKNOWN_BYTES = 0xFFFF  # of every token of a response whose tokens are not just its text
PIECE_ARRAYS = ("bytes", "bytes_offsets", "bytes_kinds")  # of `vocab/`, all or none
ENTRY_ARRAYS = ("ids", "levels", "logprob_gaps", "logprobs", "counts")
SCALAR_ARRAYS = ("lse", "entropy", "gold_logprob", "tail_mass")
SUMMARY_ARRAYS = ("entropy", "gold_logprob", "tail_mass")
KIB, MIB = 1 << 10, 1 << 20
CHUNK_TOKENS = 65536  # keeps a chunk far below the 2 GiB that blosc can take
CHUNK_ENTRIES = MIB
MAPPED_TOKENS = 1024  # of the `fast` profile: one checksum a block, so the first look at a token reads little more
VALUE_ARRAY = {"default": "levels", "exact": "logprob_gaps", "fast": "logprobs"}
VALUE_DTYPE = {"levels": "uint8", "logprob_gaps": "uint32", "logprobs": "float16"}


@dataclass(frozen=True)
class Codec:
    """What makes a chunk small: blosc (zstd, level 5) after a shuffle of bytes or bits in blocks, or nothing.

    `by_entry`: the chunk is transposed first, so that entry k of all its tokens lie together.
    """

    shuffle: Literal["shuffle", "bitshuffle"] | None
    block_bytes: int = 0  # 0: blosc chooses
    by_entry: bool = False


BYTES, STORED = Codec("shuffle"), Codec(None)
# Measured on real rows (tests/benchmarks/results): ids and levels are a fifth smaller than with plain byte shuffle.
CODECS = {
    "ids": Codec("bitshuffle", MIB),
    "levels": Codec("bitshuffle", 128 * KIB, by_entry=True),
    "logprob_gaps": Codec("bitshuffle", 2 * MIB, by_entry=True),
    "counts": Codec("bitshuffle", 128 * KIB),
}


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of an array, the shape of its chunks, and whether they lie in one shard, one layer a chunk."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    sharded: bool
    codec: Codec

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk before it is packed."""
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along every axis."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunk, strict=True))

    @property
    def is_layered(self) -> bool:
        """Whether the axes are (token, layer, ...)."""
        return self.sharded and len(self.shape) > 1


def shard_index_bytes(spec: ArraySpec) -> int:
    """Size of the index at the end of a shard: offset and size of every chunk, and a crc32c."""
    return 16 * math.prod(spec.grid) + 4


def value_array(header: CacheHeader) -> str:
    """Name of the array that holds what the entries of `ids` weigh."""
    return "counts" if header.row_kind == "sampled" else VALUE_ARRAY[header.profile]


def layered_names(header: CacheHeader) -> list[str]:
    """The arrays with a layer axis that parts of this cache have, with those that are flat."""
    kept = ["kept"] if header.is_ragged else []
    if header.row_kind == "sampled":
        return [*kept, "ids", "counts", "lse", "entropy", "gold_logprob"]
    tail = ["tail_ids"] if header.tail_samples else []
    return [*kept, "ids", value_array(header), *tail, *SCALAR_ARRAYS]


def array_specs(
    header: CacheHeader,
    *,
    num_samples: int,
    num_tokens: int,
    num_response: int,
    num_entries: int,
    with_bytes: bool = False,
) -> dict[str, ArraySpec]:
    """Every array of a part, by name; T, R and E are `num_tokens`, `num_response` and `num_entries`.

    `with_bytes`: the part says how many bytes every response token is.
    """
    TL = (num_tokens, len(header.layers))
    entries = (num_entries,) if header.is_ragged else (*TL, header.widest)
    value = value_array(header)
    count_dtype = np.dtype(np.min_scalar_type(header.widest))
    shapes: dict[str, tuple[tuple[int, ...], object]] = {
        "kept": (TL, count_dtype),
        "ids": (entries, header.id_dtype),
        value: (entries, VALUE_DTYPE.get(value, count_dtype)),
        "tail_ids": ((*TL, header.tail_samples), header.id_dtype),
        "lse": ((*TL, len(header.taus)), "float32"),
        **dict.fromkeys(SUMMARY_ARRAYS, (TL, "float32")),
    }
    specs = {
        "offsets": _whole((num_samples + 1,), "int64"),
        "response_offsets": _whole((num_samples + 1,), "int64"),
        "response_ids": _whole((num_response,), "uint32"),
        "positions": _whole((num_tokens,), "uint32"),
    }
    if with_bytes:
        specs[BYTES_ARRAY] = _whole((num_response,), "uint16")
    for name in layered_names(header):
        specs[name] = _chunked(name, *shapes[name], mapped=header.profile == "fast")
    return specs


def part_specs(header: CacheHeader, record: PartRecord) -> dict[str, ArraySpec]:
    return array_specs(
        header,
        num_samples=len(record.sample_ids),
        num_tokens=record.num_tokens,
        num_response=record.num_response_tokens,
        num_entries=record.num_entries,
        with_bytes=f"{BYTES_ARRAY}/zarr.json" in record.files,
    )


def sample_names(specs: dict[str, ArraySpec]) -> list[str]:
    """The arrays without a layer axis that a part of these arrays has."""
    return [name for name in (*SAMPLE_ARRAYS, BYTES_ARRAY) if name in specs]


def vocab_specs(
    vocab_size: int, heads: tuple[int, int], num_text_bytes: int | None, num_piece_bytes: int | None = None
) -> dict[str, ArraySpec]:
    """The arrays of `vocab/`; the texts of the tokens may be missing, and so may their bytes."""
    specs = {"id_of_rank": _whole((vocab_size,), "uint32"), "heads": _whole(heads, "uint32")}
    if num_text_bytes is not None:
        specs |= {"text": _whole((num_text_bytes,), "uint8"), "text_offsets": _whole((vocab_size + 1,), "int64")}
    if num_piece_bytes is not None:
        specs |= {"bytes": _whole((num_piece_bytes,), "uint8"), "bytes_offsets": _whole((vocab_size + 1,), "int64")}
        specs["bytes_kinds"] = _whole((vocab_size,), "uint8")
    return specs


def _whole(shape: tuple[int, ...], dtype: object) -> ArraySpec:
    """One chunk, one file."""
    kind = np.dtype(dtype)  # type: ignore[call-overload]
    return ArraySpec(shape, kind, _at_least_one(shape), False, BYTES)


def _chunked(name: str, shape: tuple[int, ...], dtype: object, *, mapped: bool) -> ArraySpec:
    """One shard, one file: a chunk is one layer, or a stretch of flat entries."""
    kind, whole = np.dtype(dtype), _at_least_one(shape)  # type: ignore[call-overload]
    codec = STORED if mapped else CODECS.get(name, BYTES)
    if len(shape) == 1:
        return ArraySpec(shape, kind, (min(whole[0], CHUNK_ENTRIES),), True, replace(codec, by_entry=False))
    tokens = min(whole[0], MAPPED_TOKENS if mapped and name in ENTRY_ARRAYS else CHUNK_TOKENS)
    return ArraySpec(shape, kind, (tokens, 1, *whole[2:]), True, codec)


def _at_least_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, size) for size in shape)


def part_file_names(specs: dict[str, ArraySpec]) -> set[str]:
    """The files a part must have beside `part.json`: metadata of group and arrays, one data file per array."""
    data = {data_file_name(name, spec) for name, spec in specs.items() if spec.size_bytes}
    return {"zarr.json"} | {f"{name}/zarr.json" for name in specs} | data


def data_file_name(name: str, spec: ArraySpec) -> str:
    """The one data file of an array, relative to the part."""
    return f"{name}/c/{'/'.join('0' * len(spec.shape))}"
