"""Names, shapes and records of a cache on disk. FORMAT.md is the text this file implements.

Shape suffixes: L layers, T response tokens with a row, K kept entries, m tail samples, n temperatures.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import xxhash
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vlsi_cache.errors import CacheCorruptError, SpecError

FORMAT_VERSION = 1
HEADER_NAME = "cache.json"
RECORD_NAME = "part.json"
TABLE_NAME = "samples.parquet"
VOCAB_NAME = "vocab"
VOCAB_COPY_NAME = "vocab-copy"
# what must be equal for two builds to write into one cache, beside every field of the fingerprint
IDENTITY_FIELDS = (
    "format_version",
    "layers",
    "num_model_layers",
    "row_kind",
    "top_k",
    "truncated",
    "tail_samples",
    "taus",
    "v_real",
    "profile",
    "num_parts",
    "num_samples",
    "num_response_tokens",
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


class FileRecord(StrictRecord):
    """Size and xxh3-64 of one file of a part, or of `vocab/`."""

    size: int
    xxh3: str


class CacheHeader(StrictRecord):
    """`cache.json`: everything a reader needs to know that is not in the parts; written once, before the first part."""

    format: Literal["vlsi-cache"] = "vlsi-cache"
    format_version: int = FORMAT_VERSION
    created_by: str = _created_by()
    spec: dict[str, Any] = {}
    fingerprint: dict[str, Any]
    layers: list[int]
    num_model_layers: int
    row_kind: Literal["top-k", "sampled"] = "top-k"
    top_k: list[int]
    truncated: bool = False
    tail_samples: int
    taus: list[float] = [1.0]
    v_real: int
    profile: Literal["default", "exact", "fast"] = "default"
    num_parts: int
    num_samples: int
    num_response_tokens: int
    id_of_rank_xxh3: str = ""
    num_head_ranks: int = 0
    text_xxh3: str | None = None
    vocab_files: dict[str, FileRecord] = {}
    skipped: list[dict[str, Any]] = []
    parents: list[dict[str, Any]] = []
    responses: list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _counts_make_sense(self) -> "CacheHeader":
        if not self.layers or self.layers != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"`layers` must be distinct and ascending, got {self.layers}")
        if self.layers[-1] != self.num_model_layers:
            raise ValueError(f"the last of `layers` must be the final layer {self.num_model_layers}, got {self.layers}")
        if not 1 <= self.v_real <= 2**31 or self.tail_samples < 0 or not self.taus:
            raise ValueError(f"impossible: v_real {self.v_real}, tail_samples {self.tail_samples}, taus {self.taus}")
        limit = self.v_real if self.row_kind == "top-k" else 2**31
        if len(self.top_k) != len(self.layers) or not all(1 <= k <= limit for k in self.top_k):
            raise ValueError(f"`top_k` must be 1 to {limit} for each of {len(self.layers)} layers, got {self.top_k}")
        if self.row_kind == "sampled" and (self.tail_samples or not self.truncated):
            raise ValueError("sampled rows have no tail samples and differ in width: `truncated` must be true")
        if min(self.num_parts, self.num_samples, self.num_response_tokens) < 0:
            raise ValueError("counts cannot be negative")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_responses(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`responses` came after the first caches of this format: a header without any is what it always was."""
        fields = dump(self)
        return fields if self.responses else {name: value for name, value in fields.items() if name != "responses"}

    @property
    def widest(self) -> int:
        """The largest `top_k` of any layer."""
        return max(self.top_k)

    @property
    def is_ragged(self) -> bool:
        """Whether rows may differ in width: then parts count the entries of every row."""
        return self.truncated or len(set(self.top_k)) > 1

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


class PartRecord(StrictRecord):
    """`part.json`: the commit record of one part. Columns are per sample, the summary per layer over all tokens."""

    format_version: int = FORMAT_VERSION
    cache_digest: str
    index: int
    num_tokens: int
    num_response_tokens: int
    num_entries: int
    sample_ids: list[str]
    kinds: list[str]
    digests: list[str]
    sample_tokens: list[int]
    sample_response_tokens: list[int]
    response_xxh3: list[str]
    entropy_last: list[float | None]
    gold_logprob_last: list[float | None]
    kept_mass: list[float | None]
    summary: dict[str, list[float | None]]
    skipped: list[dict[str, Any]] = []
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _columns_have_one_length(self) -> "PartRecord":
        columns = (self.kinds, self.digests, self.sample_tokens, self.sample_response_tokens, self.response_xxh3)
        means = (self.entropy_last, self.gold_logprob_last, self.kept_mass)
        if {len(column) for column in (*columns, *means)} - {len(self.sample_ids)}:
            raise ValueError("the columns per sample differ in length")
        if sum(self.sample_tokens) != self.num_tokens or sum(self.sample_response_tokens) != self.num_response_tokens:
            raise ValueError("token counts per sample do not add up")
        return self


def part_name(index: int) -> str:
    return f"{index:06d}.zarr"


def part_dir(root: Path, index: int) -> Path:
    return root / "parts" / part_name(index)


def list_parts(root: Path) -> list[int]:
    """Indices of the committed parts: what is in `parts/` under a part's name is done."""
    names = set(os.listdir(root / "parts")) if (root / "parts").is_dir() else set()
    indices = (int(name[:-5]) for name in names if name.endswith(".zarr") and name[:-5].isdecimal())
    return sorted(index for index in indices if part_name(index) in names)


def response_digest(response_ids: np.ndarray) -> str:
    """xxh3-64 of the response ids as little-endian uint32: the contract between teacher and student."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(response_ids, dtype="<u4").data)


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
