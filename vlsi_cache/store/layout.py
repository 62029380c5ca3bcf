"""Names, shapes and records of a cache on disk. FORMAT.md is the text this file implements.

Shape suffixes: L layers, T response tokens with a row, K kept entries, m tail samples, n temperatures.
"""

import hashlib
import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import xxhash
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vlsi_cache.errors import CacheCorruptError, SpecError

from .limits import (
    MAX_COUNT,
    MAX_LAYERS,
    MAX_PARTS,
    MAX_TAIL,
    MAX_TAUS,
    MAX_WIDTH,
    check_numbers,
    check_origin,
    shown,
)

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
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
OfLayers = Field(max_length=MAX_LAYERS)


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

    size: Count
    xxh3: str


class CacheHeader(StrictRecord):
    """`cache.json`: everything a reader needs to know that is not in the parts; written once, before the first part."""

    format: Literal["vlsi-cache"] = "vlsi-cache"
    format_version: int = FORMAT_VERSION
    created_by: str = _created_by()
    spec: dict[str, Any] = {}
    fingerprint: dict[str, Any]
    contract: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    layers: Annotated[list[int], OfLayers]
    num_model_layers: int
    row_kind: Literal["top-k", "sampled"] = "top-k"
    top_k: Annotated[list[int], OfLayers]
    truncated: bool = False
    tail_samples: Annotated[int, Field(ge=0, le=MAX_TAIL)]
    taus: Annotated[list[float], Field(max_length=MAX_TAUS)] = [1.0]
    v_real: int
    profile: Literal["default", "exact", "fast"] = "default"
    num_parts: Annotated[int, Field(ge=0, le=MAX_PARTS)]
    num_samples: Count
    num_response_tokens: Count
    id_of_rank_xxh3: str = ""
    num_head_ranks: Count = 0
    text_xxh3: str | None = None
    vocab_files: dict[str, FileRecord] = {}
    skipped: list[dict[str, Any]] = []
    parents: list[dict[str, Any]] = []
    responses: list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _counts_make_sense(self) -> "CacheHeader":
        check_numbers(
            self.layers, self.top_k, self.taus, self.v_real, self.v_real if self.row_kind == "top-k" else MAX_WIDTH
        )
        if self.layers[-1] != self.num_model_layers:
            raise ValueError(
                f"the last of `layers` must be the final layer {self.num_model_layers}, got {shown(self.layers)}"
            )
        if self.row_kind == "sampled" and (self.tail_samples or not self.truncated):
            raise ValueError("sampled rows have no tail samples and differ in width: `truncated` must be true")
        if self.num_head_ranks > self.v_real:
            raise ValueError(f"impossible: num_head_ranks {self.num_head_ranks} of {self.v_real} tokens")
        check_origin(
            spec=self.spec,
            fingerprint=self.fingerprint,
            skipped=self.skipped,
            responses=self.responses,
            parents=self.parents,
        )
        return self

    @model_serializer(mode="wrap")
    def _without_later_fields(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """These came after the first caches of this format: a header that does without is what it always was."""
        unused = {"responses"} if not self.responses else set()
        unused |= {"contract"} if self.contract == 1 else set()
        return {name: value for name, value in dump(self).items() if name not in unused}

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
        if self.contract != 1:
            identity["contract"] = self.contract
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
    num_tokens: Count
    num_response_tokens: Count
    num_entries: Count
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
    def _columns_fit(self) -> "PartRecord":
        columns = (self.kinds, self.digests, self.sample_tokens, self.sample_response_tokens, self.response_xxh3)
        means = (self.entropy_last, self.gold_logprob_last, self.kept_mass)
        if {len(column) for column in (*columns, *means)} - {len(self.sample_ids)}:
            raise ValueError("the columns per sample differ in length")
        rows, tokens = self.sample_tokens, self.sample_response_tokens
        if sum(rows) != self.num_tokens or sum(tokens) != self.num_response_tokens:
            raise ValueError(
                f"token counts per sample do not add up: {sum(rows)} and {sum(tokens)}, `num_tokens` is "
                f"{self.num_tokens}, `num_response_tokens` {self.num_response_tokens}"
            )
        wrong = [at for at, (some, every) in enumerate(zip(rows, tokens, strict=True)) if not 0 <= some <= every]
        if wrong:
            name, some, every = self.sample_ids[wrong[0]], rows[wrong[0]], tokens[wrong[0]]
            raise ValueError(f"sample {shown(name)} has {some} rows for {every} response tokens")
        if len(set(self.sample_ids)) != len(self.sample_ids):
            twice = next(name for name, num in Counter(self.sample_ids).items() if num > 1)
            raise ValueError(f"sample id {shown(twice)} occurs twice; ids must be unique")
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
        content = canonical_json(value)
        if b"\\ud" in content:  # a surrogate: half a pair is no text, and neither a terminal nor a table takes it
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CacheCorruptError(f"`{path}` cannot be read as a sealed JSON file ({error})") from error
    found = xxhash.xxh3_64_hexdigest(content)
    if seal != found:
        raise CacheCorruptError(f"`{path}`: xxh3 of the content is {found}, the file says {shown(seal)}")
    return value


def as_record(model: type[Record], value: dict[str, Any], path: Path) -> Record:
    """`value` as a record; CacheCorruptError naming the file and the first wrong field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # the fields contradict each other, and the message names them
            raise CacheCorruptError(f"`{path}`: {message}") from error
        field = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] in ("missing", "extra_forbidden") else f", got {shown(first['input'])}"
        raise CacheCorruptError(f"`{path}`: field `{field}`: {message}{got}") from error
