"""Names, records and limits of a cache on disk. FORMAT.md is the text this file implements.

What a header and a commit record may claim is input like any other: a checksum says nothing of who made it. The limits
are far above what any cache needs, and low enough that what a reader allocates or loops over for a claim is small;
`files.load_part_record` then holds the counts of a part against the sizes of its files.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from operator import gt
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import xxhash
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import to_json

from vlsi_cache.errors import CacheCorruptError, SpecError, validation_message

MAX_PARTS = 1_000_000  # six digits, as in their names
MAX_LAYERS = 4096
MAX_TAUS = 64
MAX_TAIL = 1 << 16
MAX_WIDTH = 1 << 31
MAX_VOCABULARY = 1 << 24
MAX_PLACES = 1 << 28  # layers times tokens: what the table of ids by their place takes
MAX_COUNT = 1 << 48  # samples, tokens, entries, bytes of a file
MAX_DEPTH = 100  # caches made of caches made of caches
# Blosc packs a constant block of 2 MiB into some 80 bytes; no honest array shrinks more.
MAX_SHRINK = 1 << 16
SECTIONS = ("teacher", "data", "rows", "store", "train_verbalizers", "distill", "evaluate", "run")
_PRUNED = re.compile(r"prune\.\d{1,9}\.\w+")


def shown(value: object) -> str:
    """A value from a file in a message, cut where it is long."""
    if isinstance(value, list | tuple | dict | set) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_numbers(header: "CacheHeader") -> None:
    """Raise ValueError for layers, widths or temperatures that no cache can have."""
    layers, top_k, taus, vocab_size = header.layers, header.top_k, header.taus, header.vocab_size
    widest = vocab_size if header.row_kind == "top-k" else MAX_WIDTH
    if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= MAX_COUNT:
        raise ValueError(f"`layers` must be distinct and ascending, got {shown(layers)}")
    if not 1 <= vocab_size <= MAX_VOCABULARY or vocab_size * len(layers) > MAX_PLACES:
        raise ValueError(
            f"impossible: v_real {vocab_size} with {len(layers)} layers; at most {MAX_VOCABULARY} tokens, and "
            f"{MAX_PLACES} places in the vocabulary order of all layers"
        )
    if len(top_k) != len(layers) or not all(1 <= k <= widest for k in top_k):
        raise ValueError(f"`top_k` must be 1 to {widest} for each of {len(layers)} layers, got {shown(top_k)}")
    if not taus or taus[0] != 1.0 or not all(math.isfinite(tau) and tau > 0 for tau in taus):
        raise ValueError(f"impossible: taus {shown(taus)}; they are above 0 and the first is 1.0")
    if layers[-1] != header.num_model_layers:
        raise ValueError(f"the last of `layers` must be the final layer {header.num_model_layers}, got {shown(layers)}")
    if header.row_kind == "sampled" and (header.tail_samples or not header.truncated):
        raise ValueError("sampled rows have no tail samples and differ in width: `truncated` must be true")
    if header.num_head_ranks > vocab_size:
        raise ValueError(f"impossible: num_head_ranks {header.num_head_ranks} of {vocab_size} tokens")


def _check_origin(header: "CacheHeader") -> None:
    """Raise ValueError where what a header tells of its origin is not of the kind that readers take it for."""
    for name in ("name", "description"):
        _want(header.spec, name, str, "spec")
    for name in SECTIONS:
        _want(header.spec, name, dict, "spec")
    _want(header.fingerprint, "rows.seed", int, "fingerprint")
    _want(header.fingerprint, "rows.select_tokens", dict, "fingerprint")
    for name in header.fingerprint:
        if name.startswith("prune.") and not _PRUNED.fullmatch(name):
            raise ValueError(f"`fingerprint`: `{shown(name)}` must be prune.NUMBER.NAME")
    for one in header.skipped:
        if not isinstance(one.get("id"), str) or not isinstance(one.get("reason"), str):
            raise ValueError(f"`skipped` holds rows as `id` and `reason`, both text, got {shown(one)}")
    for one in header.responses:
        _want(one, "model", str, "responses")
        _want(one, "weights", str, "responses")
        _want(one, "settings", dict, "responses")
        _want(one, "counts", dict, "responses")
        for name, count in (one.get("counts") or {}).items():
            if type(count) is not int or not 0 <= count <= MAX_COUNT:
                raise ValueError(f"`responses`: count `{name}` must be a whole number, got {shown(count)}")
    _check_parents(header.parents, 1)


def _check_parents(parents: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"`parents` is deeper than {MAX_DEPTH}")
    if not isinstance(parents, list) or not all(isinstance(one, dict) for one in parents):
        raise ValueError(f"`parents` must be a list of objects, got {shown(parents)}")
    for one in parents:
        for name in ("path", "digest", "operation"):
            _want(one, name, str, "parents")
        _want(one, "cuts", dict, "parents")
        sections = one.get("data", [])
        if not isinstance(sections, list) or not all(isinstance(section, dict) for section in sections):
            raise ValueError(f"`parents`: `data` must be a list of objects, got {shown(sections)}")
        _check_parents([] if one.get("parents") is None else one["parents"], depth + 1)


def _want(values: dict[str, Any], name: str, kind: type, where: str) -> None:
    value = values.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        names = {str: "text", dict: "an object", int: "a whole number"}
        raise ValueError(f"`{where}`: `{name}` must be {names[kind]}, got {shown(value)}")


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
    "vocab_size",
    "profile",
    "num_parts",
    "num_samples",
    "num_response_tokens",
    "id_of_rank_xxh3",
)
# What a cache that was imported from another tool's rows may not know; it is NaN in the array of that name.
Lacking = Literal["entropy", "gold_logprob", "lse"]
STORED_NAMES = {"vocab_size": "v_real"}  # fields of `cache.json` that go by another word here
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
    vocab_size: int = Field(validation_alias=AliasChoices("v_real", "vocab_size"))
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
    lacks: Annotated[list[Lacking], Field(max_length=3)] = []

    @model_validator(mode="after")
    def _makes_sense(self) -> "CacheHeader":
        _check_numbers(self)
        _check_origin(self)
        return self

    @model_serializer(mode="wrap")
    def _without_later_fields(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """These came after the first caches of this format: a header that does without is what it always was."""
        unused = {"responses"} if not self.responses else set()
        unused |= {"contract"} if self.contract == 1 else set()
        unused |= set() if self.lacks else {"lacks"}
        fields: dict[str, Any] = dump(self)
        return {STORED_NAMES.get(name, name): value for name, value in fields.items() if name not in unused}

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
        identity = {STORED_NAMES.get(name, name): getattr(self, name) for name in IDENTITY_FIELDS}
        if self.contract != 1:
            identity["contract"] = self.contract
        if self.lacks:
            identity["lacks"] = self.lacks
        return hashlib.sha256(canonical_json({"fingerprint": self.fingerprint, **identity})).hexdigest()

    @property
    def id_dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.vocab_size <= 65536 else np.uint32)

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
    chunk_bytes: dict[str, list[Count]] = {}

    @model_serializer(mode="wrap")
    def _without_later_fields(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`chunk_bytes` came later: a record that does without stays what it was."""
        fields: dict[str, Any] = dump(self)
        if not self.chunk_bytes:
            del fields["chunk_bytes"]
        return fields

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
        if min(rows, default=0) < 0 or any(map(gt, rows, tokens)):
            each = zip(self.sample_ids, rows, tokens, strict=True)
            name, some, every = next(one for one in each if not 0 <= one[1] <= one[2])
            raise ValueError(f"sample {shown(name)} has {some} rows for {every} response tokens")
        if len(set(self.sample_ids)) != len(self.sample_ids):
            twice = next(name for name, num in Counter(self.sample_ids).items() if num > 1)
            raise ValueError(f"sample id {shown(twice)} occurs twice; ids must be unique")
        return self


def part_name(index: int) -> str:
    return f"{index:06d}.zarr"


def part_dir(root: Path, index: int) -> Path:
    return root / "parts" / part_name(index)


def files_digest(files: dict[str, FileRecord]) -> str:
    """xxh3-64 over names, sizes and hashes: on an object store, the name of the folder in which these files lie."""
    return xxhash.xxh3_64_hexdigest(canonical_json({name: file.model_dump() for name, file in files.items()}))


def list_parts(root: Path) -> list[int]:
    """Indices of the committed parts: what is in `parts/` under a part's name is done."""
    return part_indices(os.listdir(root / "parts")) if (root / "parts").is_dir() else []


def part_indices(names: Iterable[str]) -> list[int]:
    """The parts that these folders of `parts/` are, ascending."""
    names = set(names)
    indices = (int(name[:-5]) for name in names if name.endswith(".zarr") and name[:-5].isdecimal())
    return sorted(index for index in indices if part_name(index) in names)


def response_digest(response_ids: np.ndarray) -> str:
    """xxh3-64 of the response ids as little-endian uint32: the contract between teacher and student."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(response_ids, dtype="<u4").data)


def response_digests(response_ids: np.ndarray, edges: Iterable[int]) -> list[str]:
    """`response_digest` of many responses, which lie one behind the other from edge to edge."""
    data = np.ascontiguousarray(response_ids, dtype="<u4").tobytes()
    return [xxhash.xxh3_64_hexdigest(data[4 * start : 4 * stop]) for start, stop in pairwise(edges)]


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


_SPELLED_OTHERWISE = (b"e", b"0.0000", b"N", b"I")  # 1e-05 and 0.00001; NaN and Infinity are errors


def _read_json(value: dict[str, Any]) -> bytes:
    """`canonical_json` of what was read, several times as fast where it has long lists of numbers.

    The library that writes those promises no spelling, so that only a reader may use it: what differs from a seal is
    looked at again by `canonical_json` itself.
    """
    fields = (canonical_json(key) + b":" + _numbers_json(value[key]) for key in sorted(value))
    return b"{" + b",".join(fields) + b"}"


def _numbers_json(value: Any) -> bytes:
    """`canonical_json`; a list of floats and nothing else by pydantic, but for numbers that it spells otherwise."""
    if type(value) is not list or not set(map(type, value)) <= {float, type(None)}:
        return canonical_json(value)
    text = to_json(value, inf_nan_mode="constants")
    if not any(mark in text for mark in _SPELLED_OTHERWISE):
        return text
    numbers = text[1:-1].split(b",")
    for place, number in enumerate(numbers):
        if any(mark in number for mark in _SPELLED_OTHERWISE):
            numbers[place] = canonical_json(value[place])
    return b"[" + b",".join(numbers) + b"]"


def sealed_json(value: dict[str, Any]) -> bytes:
    """JSON text of `value` with an `xxh3` key over the rest, so that the text can be checked against itself."""
    digest = xxhash.xxh3_64_hexdigest(canonical_json(value))
    return json.dumps({**value, "xxh3": digest}, indent=1, allow_nan=False).encode() + b"\n"


def unseal_json(text: bytes | str, path: Path) -> dict[str, Any]:
    """The value of a sealed JSON text; CacheCorruptError when it is not what was written."""
    try:
        value = json.loads(text)
        seal = value.pop("xxh3")
        content = _read_json(value)
        if b"\\ud" in content:  # a surrogate: half a pair is no text, and neither a terminal nor a table takes it
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CacheCorruptError.at(path, f" cannot be read as a sealed JSON file ({error})") from error
    if seal != (found := xxhash.xxh3_64_hexdigest(content)):
        found = xxhash.xxh3_64_hexdigest(canonical_json(value))
    if seal != found:
        raise CacheCorruptError.at(path, f": xxh3 of the content is {found}, the file says {shown(seal)}")
    return value


def as_record(model: type[Record], value: dict[str, Any], path: Path) -> Record:
    """`value` as a record; CacheCorruptError naming the file and the first wrong field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = validation_message(first)
        if not first["loc"]:  # the fields contradict each other, and the message names them
            raise CacheCorruptError.at(path, f": {message}") from error
        field = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] in ("missing", "extra_forbidden") else f", got {shown(first['input'])}"
        raise CacheCorruptError.at(path, f": field `{field}`: {message}{got}") from error
