"""Rows into JSONL and Parquet files, in the form in which they are read."""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlsi_cache.errors import DataError
from vlsi_cache.io import replacing

from .messages import as_parts
from .sources import RESPONSES_KEY
from .values import listed

# Rows of a Parquet row group: these, or as many as hold this much of pictures.
_GROUP_ROWS, _GROUP_BYTES = 1024, 32 << 20

_PART = pa.struct([("type", pa.string()), ("text", pa.string())])
_IMAGE = pa.struct([("path", pa.string()), ("bytes", pa.binary()), ("sha256", pa.string())])
_MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.list_(_PART)),
        ("reasoning_content", pa.string()),
        ("tool_calls", pa.string()),  # JSON: their arguments are of no one schema
        ("name", pa.string()),
        ("tool_call_id", pa.string()),
        ("train", pa.bool_()),
    ]
)
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("system", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("images", pa.list_(_IMAGE)),
        ("tools", pa.string()),  # JSON
        ("chat_template_kwargs", pa.string()),  # JSON
    ]
)


def write_rows(
    rows: Iterable[Mapping[str, Any]], path: str | Path, *, responses: Mapping[str, Any] | None = None
) -> int:
    """Write rows to a .jsonl file (image bytes as base64) or a .parquet file (binary); returns how many.

    The file appears whole or not at all. Rows are not checked; Parquet keeps the known columns only, and in its
    metadata `responses`: where they come from.
    """
    path = Path(path)
    writers = {".jsonl": _write_jsonl, ".parquet": partial(_write_parquet, responses=responses)}
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise DataError(f"cannot write {path}: the name must end in .jsonl or .parquet")
    with replacing(path) as temporary:
        return writer(rows, temporary)


def _write_jsonl(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    num_rows = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=as_base64) + "\n")
            num_rows += 1
    return num_rows


def _write_parquet(rows: Iterable[Mapping[str, Any]], path: Path, *, responses: Mapping[str, Any] | None) -> int:
    num_rows = 0
    about = None if responses is None else {RESPONSES_KEY: json.dumps(responses).encode()}
    with pq.ParquetWriter(path, _SCHEMA.with_metadata(about), compression="zstd") as writer:
        for group in _groups(map(_parquet_row, rows)):
            writer.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
            num_rows += len(group)
    return num_rows


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    num_bytes = 0
    for row in rows:
        group.append(row)
        num_bytes += sum(len(image.get("bytes") or b"") for image in row["images"])
        if len(group) == _GROUP_ROWS or num_bytes >= _GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _parquet_row(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = [_parquet_message(message) for message in row["messages"]]
    images = [_parquet_image(image) for image in row.get("images") or ()]
    return {**row, **_as_json(row, "tools", "chat_template_kwargs"), "messages": messages, "images": images}


def _parquet_message(message: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [key for key in message if _MESSAGE.get_field_index(key) < 0]
    if unknown:
        raise DataError(f"a message has {listed(unknown)}, which the Parquet files written here do not keep")
    return {**message, **_as_json(message, "tool_calls"), "content": as_parts(message["content"])}


def _parquet_image(image: str | Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": image} if isinstance(image, str) else dict(image)
    if isinstance(entry.get("bytes"), str):
        entry["bytes"] = base64.b64decode(entry["bytes"], validate=True)
    return entry


def _as_json(values: Mapping[str, Any], *keys: str) -> dict[str, str | None]:
    given = {key: values[key] for key in keys if values.get(key) is not None}
    return {key: one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for key, one in given.items()}


def as_base64(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    raise TypeError(f"a row holds a {type(value).__name__}, which JSON cannot keep")
