"""Names, shapes and records of a cache on disk. FORMAT.md is the text this file implements.

Shape suffixes: L layers, T response tokens with a row, K kept entries, m tail samples, n temperatures.
"""

import hashlib
import importlib.metadata
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from vlsi_cache.errors import CacheCorruptError, SpecError

FORMAT_VERSION = 1
HEADER_NAME = "cache.json"
RECORD_NAME = "part.json"
TABLE_NAME = "samples.parquet"
ROW_ARRAYS = ("offsets", "response_offsets", "sample", "response_ids", "positions")
KL_ARRAYS = ("ids", "levels", "tail_ids", "lse", "entropy", "gold_logprob", "tail_mass")
SUMMARY_ARRAYS = ("entropy", "gold_logprob", "tail_mass")
# what must be equal for two builds to write into one cache, beside every field of the fingerprint
IDENTITY_FIELDS = (
    "format_version",
    "layers",
    "num_model_layers",
    "top_k",
    "tail_samples",
    "taus",
    "v_real",
    "profile",
    "num_parts",
    "num_samples",
    "num_tokens",
    "id_of_rank_xxh3",
)

Record = TypeVar("Record", bound="StrictRecord")


class StrictRecord(BaseModel):
    """Base of what is stored as JSON: nothing unknown, nothing converted, nothing changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def _created_by() -> str:
    try:
        return f"vlsi-cache {importlib.metadata.version('vlsi-cache')}"
    except importlib.metadata.PackageNotFoundError:
        return "vlsi-cache"


class CacheHeader(StrictRecord):
    """`cache.json`: everything a reader needs to know that is not in the parts; written once, before the first part."""

    format: Literal["vlsi-cache"] = "vlsi-cache"
    format_version: int = FORMAT_VERSION
    created_by: str = _created_by()
    spec: dict[str, Any] = {}
    fingerprint: dict[str, Any]
    layers: list[int]
    num_model_layers: int
    top_k: int
    tail_samples: int
    taus: list[float] = [1.0]
    v_real: int
    profile: Literal["default"] = "default"
    num_parts: int
    num_samples: int
    num_tokens: int
    id_of_rank_xxh3: str = ""
    skipped: list[dict[str, Any]] = []
    parents: list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _counts_make_sense(self) -> "CacheHeader":
        if not self.layers or self.layers != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"`layers` must be distinct and ascending, got {self.layers}")
        if self.layers[-1] != self.num_model_layers:
            raise ValueError(f"the last of `layers` must be the final layer {self.num_model_layers}, got {self.layers}")
        if not 1 <= self.top_k <= self.v_real <= 2**32 or self.tail_samples < 0 or not self.taus:
            raise ValueError(f"impossible: top_k {self.top_k}, v_real {self.v_real}, tail_samples {self.tail_samples}")
        if min(self.num_parts, self.num_samples, self.num_tokens) < 0:
            raise ValueError("counts cannot be negative")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 over the fingerprint and the identity fields; every part carries it, so a foreign part is noticed."""
        identity = {name: getattr(self, name) for name in IDENTITY_FIELDS}
        return hashlib.sha256(canonical_json({"fingerprint": self.fingerprint, **identity})).hexdigest()

    @property
    def id_dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.v_real <= 65536 else np.uint32)

    def layer_indices(self, layers: Iterable[int | str] | None) -> list[int]:
        """Rows of the layer axis for model layer numbers (or "last"); None is all of them."""
        if layers is None:
            return list(range(len(self.layers)))
        wanted: list[Any] = [self.layers[-1] if layer == "last" else layer for layer in layers]
        for layer in wanted:
            if layer not in self.layers:
                raise SpecError(f'layer `{layer}` is not in this cache; it has {self.layers} ("last" is the last)')
        return [self.layers.index(layer) for layer in wanted]


class FileRecord(StrictRecord):
    """Size and xxh3-64 of one file of a part."""

    size: int
    xxh3: str


class PartRecord(StrictRecord):
    """`part.json`: the commit record of one part. Columns are per sample, the summary per layer over all tokens."""

    format_version: int = FORMAT_VERSION
    cache_digest: str
    index: int
    num_tokens: int
    num_response_tokens: int
    sample_ids: list[str]
    kinds: list[str]
    digests: list[str]
    sample_tokens: list[int]
    sample_response_tokens: list[int]
    response_xxh3: list[str]
    entropy_last: list[float | None]
    gold_logprob_last: list[float | None]
    summary: dict[str, list[float | None]]
    skipped: list[dict[str, Any]] = []
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _columns_have_one_length(self) -> "PartRecord":
        columns = (self.kinds, self.digests, self.sample_tokens, self.sample_response_tokens, self.response_xxh3)
        if {len(column) for column in (*columns, self.entropy_last, self.gold_logprob_last)} - {len(self.sample_ids)}:
            raise ValueError("the columns per sample differ in length")
        if sum(self.sample_tokens) != self.num_tokens or sum(self.sample_response_tokens) != self.num_response_tokens:
            raise ValueError("token counts per sample do not add up")
        return self


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype an array of a part must have."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def array_specs(header: CacheHeader, num_samples: int, num_rows: int, num_response: int) -> dict[str, ArraySpec]:
    """Every array of a part, by name. `num_rows` is T, `num_response` the number of response ids."""
    TL = (num_rows, len(header.layers))
    shapes = {
        "offsets": ((num_samples + 1,), "int64"),
        "response_offsets": ((num_samples + 1,), "int64"),
        "sample": ((num_rows,), "int64"),
        "response_ids": ((num_response,), "uint32"),
        "positions": ((num_rows,), "uint32"),
        "ids": ((*TL, header.top_k), header.id_dtype),
        "levels": ((*TL, header.top_k), "uint8"),
        "tail_ids": ((*TL, header.tail_samples), header.id_dtype),
        "lse": ((*TL, len(header.taus)), "float32"),
        "entropy": (TL, "float32"),
        "gold_logprob": (TL, "float32"),
        "tail_mass": (TL, "float32"),
    }
    if header.tail_samples == 0:
        del shapes["tail_ids"]
    return {name: ArraySpec(shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}


def part_specs(header: CacheHeader, record: PartRecord) -> dict[str, ArraySpec]:
    return array_specs(header, len(record.sample_ids), record.num_tokens, record.num_response_tokens)


def part_file_names(specs: dict[str, ArraySpec]) -> set[str]:
    """The files a part must have beside `part.json`: metadata of group and arrays, one data file per array."""
    data = {f"{name}/c/{'/'.join('0' * len(spec.shape))}" for name, spec in specs.items() if spec.size_bytes}
    return {"zarr.json"} | {f"{name}/zarr.json" for name in specs} | data


def part_name(index: int) -> str:
    return f"{index:06d}.zarr"


def part_dir(root: Path, index: int) -> Path:
    return root / "parts" / part_name(index)


def list_parts(root: Path) -> list[int]:
    """Indices of the committed parts: what is in `parts/` under a part's name is done."""
    names = os.listdir(root / "parts") if (root / "parts").is_dir() else []
    indices = (int(name[:-5]) for name in names if name.endswith(".zarr") and name[:-5].isdecimal())
    return sorted(index for index in indices if part_name(index) in names)


def response_digest(response_ids: np.ndarray) -> str:
    """xxh3-64 of the response ids as little-endian uint32: the contract between teacher and student."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(response_ids, dtype="<u4").tobytes())


def rank_table_digest(id_of_rank: np.ndarray) -> str:
    return response_digest(id_of_rank)


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sealed_json(value: dict[str, Any]) -> bytes:
    """JSON text of `value` with an `xxh3` key over the rest, so that the text can be checked against itself."""
    digest = xxhash.xxh3_64_hexdigest(canonical_json(value))
    return json.dumps({**value, "xxh3": digest}, indent=1, allow_nan=False).encode() + b"\n"


def unseal_json(text: bytes | str, path: Path) -> dict[str, Any]:
    """The value of a sealed JSON text; CacheCorruptError when it is not what was written."""
    try:
        value = json.loads(text)
        seal = value.pop("xxh3")
        found = xxhash.xxh3_64_hexdigest(canonical_json(value))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CacheCorruptError(f"`{path}` cannot be read as a sealed JSON file ({error})") from error
    if seal != found:
        raise CacheCorruptError(f"`{path}`: xxh3 of the content is {found}, the file says {seal}")
    return value


def as_record(model: type[Record], value: dict[str, Any], path: Path) -> Record:
    """`value` as a record; CacheCorruptError naming the file and the first wrong field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CacheCorruptError(f"`{path}`: field `{field}`: {first['msg']}") from error


def load_header(root: Path) -> CacheHeader:
    """Read and check `cache.json`; a newer format is refused before anything else is looked at."""
    path = root / HEADER_NAME
    value = unseal_json(path.read_bytes(), path)
    version = value.get("format_version")
    if value.get("format") != "vlsi-cache":
        raise CacheCorruptError(f"`{path}` is not the header of a vlsi-cache: `format` is {value.get('format')!r}")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CacheCorruptError(
            f"`{path}`: format version {version}, this program reads 1 to {FORMAT_VERSION}; upgrade vlsi-cache"
        )
    return as_record(CacheHeader, value, path)


def load_part_record(root: Path, header: CacheHeader, index: int) -> PartRecord:
    """Read `part.json` of part `index` and check that it is this part, of this cache, with no name leading outside."""
    folder = part_dir(root, index)
    path = contained_file(root, folder, RECORD_NAME)
    record = as_record(PartRecord, unseal_json(path.read_bytes(), path), path)
    if record.cache_digest != header.digest:
        raise CacheCorruptError(
            f"`{path}`: the part belongs to another cache (digest {record.cache_digest[:12]}, this cache is "
            f"{header.digest[:12]}); run: vlsi-cache repair {root}"
        )
    if record.index != index:
        raise CacheCorruptError(
            f"`{path}`: this is part {record.index} under the name of part {index}; run: vlsi-cache repair {root}"
        )
    for name in record.files:
        contained_file(root, folder, name)
    wrong = part_file_names(part_specs(header, record)) ^ set(record.files)
    if wrong:
        raise CacheCorruptError(f"`{path}`: files listed and files expected differ: {sorted(wrong)[:4]}")
    return record


def contained_file(root: Path, folder: Path, name: str) -> Path:
    """`folder / name` where `name` comes from a file: refused if it leads out of the cache, however it does."""
    pure = PurePosixPath(name)
    path = folder / name
    if not name or "\\" in name or "\0" in name or pure.is_absolute() or ".." in pure.parts or str(pure) != name:
        raise CacheCorruptError(f"`{folder / RECORD_NAME}`: file name {name!r} leads out of the part")
    base = os.path.realpath(root)
    if os.path.realpath(path) != os.path.join(base, path.relative_to(root)):
        raise CacheCorruptError(f"`{path}` is a symbolic link; a cache holds plain files only")
    if not path.exists():
        raise CacheCorruptError(f"`{path}` is missing; run: vlsi-cache repair {root}")
    return path


def check_size(root: Path, path: Path, expected: int) -> None:
    """Compare the size of `path` with its record, without reading it."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise CacheCorruptError(f"`{path}` is missing; run: vlsi-cache repair {root}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size != expected:
        raise CacheCorruptError(
            f"`{path}`: {status.st_size} bytes, part.json says {expected}; "
            f"run: vlsi-cache verify {root}, then vlsi-cache repair {root}"
        )


def hash_file(path: Path, *, fsync: bool = False) -> FileRecord:
    """Size and xxh3-64 of a file, flushed to the disk first if asked."""
    digest = xxhash.xxh3_64()
    size = 0
    with path.open("rb") as file:
        if fsync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return FileRecord(size=size, xxh3=digest.hexdigest())
