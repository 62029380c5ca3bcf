"""DistillKit's captures: Parquet with one row a sequence, its log-probs compressed as `compression_config.yaml` says.

Columns: `input_ids` [S]; `compressed_logprobs` and `bytepacked_indices`, lists of bytes for each of the rows; or
`token_ids` and `top_values`, as they are. Row r is the distribution of token r + 1: vLLM says nothing of token 0.
The bytes of a row are `exact_k` log-probs, coefficients of a polynomial over the others by rank, and for each of
`residual_bins` a scale and integers of so many bits, most significant bit first; ids are packed alike.
Shape suffixes: T rows, K entries, B bytes.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlsi_cache.config.plain_yaml import parse_yaml
from vlsi_cache.errors import DataError, SpecError, validation_message

from .sources import Format, Sequence
from .tables import TABLES, TableRow, column_names, files_of, name_of, table_rows
from .targets import TopK, as_ids

CONFIG_NAME = "compression_config.yaml"
COLUMNS = ("input_ids", "attention_mask", "compressed_logprobs", "bytepacked_indices", "token_ids", "top_values")
LOSSY_ROUNDING = 1e-2  # of a mass whose small parts are a polynomial, or whose large ones are bf16
FLOAT_ROUNDING = 1e-5
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Count = Annotated[int, Field(ge=0, le=1 << 24)]


class Bin(BaseModel):
    """Integers of `element_bits` with one scale, for so many entries."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    scale_dtype: Dtype
    element_bits: Annotated[int, Field(ge=1, le=64)]
    num_elements: Annotated[int, Field(ge=1, le=1 << 24)]


class Compression(BaseModel):
    """DistillKit's `DistributionQuantizationConfig`: the names and defaults are its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    d: Annotated[int, Field(ge=1, le=1 << 24)]
    k: Annotated[int, Field(ge=1, le=1 << 24)]
    exact_k: Count
    exact_dtype: Dtype = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: list[Bin]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @property
    def index_bits(self) -> int:
        """Bits of an id: DistillKit takes the logarithm in float32."""
        return math.ceil(np.log2(np.float32(self.d)))

    @property
    def is_exact(self) -> bool:
        return self.exact_k == self.k and self.exact_dtype in ("float32", "float64")


def exact_compression(vocab_size: int, k: int) -> Compression:
    """Log-probs as they are, in float32, and ids in as many bits as the vocabulary needs."""
    d = vocab_size
    while 2 ** Compression(d=d, k=k, exact_k=k, residual_bins=[]).index_bits < vocab_size:
        d += 1  # where its logarithm is rounded down, ids would wrap
    return Compression(d=d, k=k, exact_k=k, residual_bins=[], delta_encoding=False)


def read_compression(file: Path) -> Compression:
    """SpecError names every mistake of the file."""
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError:
        raise SpecError(
            f"there is no `{file}`: without it the bytes of a DistillKit capture cannot be read. Put the capture's "
            f"{CONFIG_NAME} there, or name it with --compression FILE"
        ) from None
    except ValueError as error:
        raise SpecError(f"`{file}` is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise SpecError(f"`{file}` holds no settings of DistillKit's compression, which are `d`, `k`, `exact_k`, ...")
    try:
        return Compression.model_validate(values)
    except ValidationError as error:
        problems = [f"`{'.'.join(map(str, one['loc']))}`: {validation_message(dict(one))}" for one in error.errors()]
        raise SpecError(f"`{file}`: {'; '.join(problems)}") from None


def as_yaml(compression: Compression) -> str:
    return yaml.safe_dump(compression.model_dump(mode="json"))


def unpack_ids(bytes_TB: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int64 [T, count] out of a stream of bits, the most significant one first."""
    stream = np.unpackbits(bytes_TB, axis=1, count=bits * count).reshape(len(bytes_TB), count, bits)
    return stream.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def pack_ids(ids_TK: np.ndarray, bits: int) -> np.ndarray:
    """The reverse; DataError for an id that needs more bits, which DistillKit itself would wrap."""
    if ids_TK.size and (ids_TK.min() < 0 or int(ids_TK.max()) >= 1 << bits):
        raise DataError(f"id {ids_TK.max()} does not fit {bits} bits")
    stream = (ids_TK.astype(np.int64)[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(stream.astype(np.uint8).reshape(len(ids_TK), -1), axis=1)


def unpack_logprobs(bytes_TB: np.ndarray, config: Compression) -> np.ndarray:
    """float64 [T, K], in the order of their ranks."""
    reader = _Bytes(bytes_TB)
    exact_TK = reader.floats(config.exact_k, config.exact_dtype)
    num_others, terms = config.k - config.exact_k, config.polynomial_terms or []
    coefficients_TC = reader.floats(len(terms), config.term_dtype)
    others_TK = coefficients_TC @ _terms(terms, num_others, config)
    at = 0
    for one in config.residual_bins:
        scale_T1 = reader.floats(1, one.scale_dtype)
        count = one.num_elements
        packed_TB = reader.take((one.element_bits * count + 7) // 8)
        levels_TK = unpack_ids(packed_TB, one.element_bits, count).astype(np.float64)
        levels_TK = 2 * levels_TK - 1 if one.element_bits == 1 else levels_TK - 2.0 ** (one.element_bits - 1)
        others_TK[:, at : at + count] += levels_TK * scale_T1
        at += count
    reader.check_end()
    logprobs_TK = np.concatenate([exact_TK, others_TK], axis=1)
    return np.cumsum(logprobs_TK, axis=1) if config.delta_encoding else logprobs_TK


def _terms(terms: list[Any], num: int, config: Compression) -> np.ndarray:
    """float64 [C, num]: every term of the polynomial over the ranks, in the precision of its coefficients."""
    rank_K = np.linspace(0, 1, num) if config.normalize_t else np.arange(num, dtype=np.float64)
    rows = [rank_K**term if isinstance(term, int) else getattr(np, term)(rank_K) for term in terms]
    return rounded(np.stack(rows) if rows else np.zeros((0, num)), config.term_dtype)


def rounded(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """float64 numbers that `dtype` has, too: numpy has no bfloat16, the upper half of a float32."""
    if dtype != "bfloat16":
        return values.astype(dtype).astype(np.float64)
    bits = values.astype(np.float32).view(np.uint32)
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)
    return (nearest & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


class _Bytes:
    """The bytes of all rows, read from left to right."""

    def __init__(self, bytes_TB: np.ndarray) -> None:
        self._bytes_TB, self._at = bytes_TB, 0

    def take(self, num: int) -> np.ndarray:
        found = self._bytes_TB[:, self._at : self._at + num]
        self._at += num
        if found.shape[1] != num:
            raise DataError(f"a row has {self._bytes_TB.shape[1]} bytes, fewer than its compression says")
        return np.ascontiguousarray(found)

    def floats(self, num: int, dtype: Dtype) -> np.ndarray:
        """float64 [T, num]."""
        if dtype == "bfloat16":
            halves = self.take(2 * num).view("<u2").astype(np.uint32)
            return (halves << 16).view(np.float32).astype(np.float64)
        kind = np.dtype(dtype).newbyteorder("<")
        return self.take(kind.itemsize * num).view(kind).astype(np.float64)

    def check_end(self) -> None:
        if self._at != self._bytes_TB.shape[1]:
            raise DataError(f"a row has {self._bytes_TB.shape[1]} bytes, and its compression says {self._at}")


class DistillKit:
    """A folder of captures, or one of its files."""

    format: Format = "distillkit"
    knows_gold = has_messages = False
    columns = ()

    def __init__(self, path: Path, config_file: Path | None = None) -> None:
        self.files = files_of(path, TABLES, "a DistillKit capture")
        names = column_names(self.files)
        self._is_packed = "compressed_logprobs" in names
        if "packed_indices" in names:
            raise DataError(
                f"{path} is a capture in DistillKit's legacy format, whose numbers are centred logits, no log-probs: "
                "the mass of their tail is not known. Capture again with `logprob_compressor`"
            )
        needed = COLUMNS[2:4] if self._is_packed else COLUMNS[4:]
        if missing := [name for name in ("input_ids", *needed) if name not in names]:
            raise DataError(f"{path} is no DistillKit capture: its columns {names} lack {missing}")
        folder = path if path.is_dir() else path.parent
        self._config = read_compression(config_file or folder / CONFIG_NAME) if self._is_packed else None
        config = self._config
        self.rounding = FLOAT_ROUNDING if config is None or config.is_exact else LOSSY_ROUNDING
        self.facts: dict[str, Any] = {} if config is None else {"compression": config.model_dump(mode="json")}

    def check_vocabulary(self, vocab_size: int) -> None:
        config = self._config
        if config is not None and 1 << config.index_bits < vocab_size:
            raise DataError(
                f"{name_of(self.files)}: ids were packed into {config.index_bits} bits (`d` {config.d}), and the "
                f"tokenizer has {vocab_size} tokens: those from {1 << config.index_bits} on were wrapped to other "
                "ones. Capture again with a larger `d`"
            )

    def sequences(self, start: int = 0) -> Iterator[Sequence]:
        for row in table_rows(self.files, COLUMNS, start):
            token_ids = row.numbers("input_ids").astype(np.int64)
            if "attention_mask" in row.batch.schema.names and row.numbers("attention_mask").max(initial=0) > 1:
                raise DataError(
                    f"{row.where} holds several sequences, packed into one; import the capture as it was before packing"
                )
            lists = row.batch.column(COLUMNS[2] if self._is_packed else COLUMNS[4])[row.place]
            num_rows = len(lists) if lists.is_valid else 0
            width = self._config.k if self._config else int(row.nested("token_ids")[1].max(initial=0))
            yield Sequence(
                where=row.where,
                num_rows=num_rows,
                width=width,
                least=width,
                rows=partial(self._rows, row),
                first=1,
                token_ids=token_ids,
            )

    def _rows(self, row: TableRow, _: np.ndarray) -> TopK:
        try:
            if self._config is None:
                ids_TK, logprobs_TK = (_block(*row.nested(name)) for name in COLUMNS[4:])
                ids_TK, logprobs_TK = as_ids(ids_TK, COLUMNS[4]), logprobs_TK.astype(np.float64)
            else:
                values_TB, packed_TB = (_block(*row.nested(name)).astype(np.uint8) for name in COLUMNS[2:4])
                ids_TK = unpack_ids(packed_TB, self._config.index_bits, self._config.k)
                logprobs_TK = unpack_logprobs(values_TB, self._config)
            if ids_TK.shape != logprobs_TK.shape:
                raise DataError(f"it has {ids_TK.shape} ids and {logprobs_TK.shape} log-probs, [tokens, entries]")
            return TopK(ids_TK, logprobs_TK)
        except (DataError, ValueError) as error:
            raise DataError(f"{row.where}: {error}; is the {CONFIG_NAME} the one of this capture?") from None


def _block(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Lists of one length as an array."""
    if len(set(lengths.tolist())) > 1:
        raise DataError(f"its lists have {lengths.min()} to {lengths.max()} numbers, and must be of one length")
    return values.reshape(len(lengths), -1)
