"""Raw rows out of JSONL, Parquet and installed generators, and back into files. Nothing is checked here but the file.

Every source yields `(where, row)`; a row that cannot be read at all comes as the DataError that says why.
"""

import base64
import codecs
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlsi_cache.disk import refuse_url, replacing
from vlsi_cache.errors import DataError
from vlsi_cache.spec import DataSpec

GENERATORS = "vlsi_cache.generators"
COLUMNS = ("id", "kind", "system", "messages", "images", "videos")

RESPONSES_KEY = b"vlsi_cache.responses"  # of the Parquet schema's metadata

RawRow = tuple[str, Any]

_PART = pa.struct([("type", pa.string()), ("text", pa.string())])
_IMAGE = pa.struct([("path", pa.string()), ("bytes", pa.binary()), ("sha256", pa.string())])
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("system", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(_PART))]))),
        ("images", pa.list_(_IMAGE)),
    ]
)


def raw_rows(data: DataSpec) -> Iterator[RawRow]:
    """The first `data.limit` rows of the source; raises DataError if there is no such source."""
    if data.generator is not None:
        rows = _generated(data.generator, data.options)
    else:
        assert data.path is not None
        refuse_url(data.path, "`data.path`")
        rows = _file_rows(Path(data.path))
    return islice(rows, data.limit)


def _file_rows(path: Path) -> Iterator[RawRow]:
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"`data.path` is {path}, must be a .jsonl or .parquet file")
    if not path.is_file():
        raise DataError(f"`data.path` is {path}: no such file")
    return reader(path)


def _jsonl_rows(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield f"{path.name}:{number}", _json_row(line)


def _json_row(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"is not UTF-8 (byte {error.start} of the line)")
    except (json.JSONDecodeError, RecursionError) as error:
        return DataError(f"is not JSON: {error}")


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    """Rows count from 0, as Parquet readers count them."""
    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            if "messages" not in columns:
                raise DataError(f"{path} has no column `messages`, only {', '.join(file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    yield f"{path.name} row {number}", row
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def responses_of(data: DataSpec) -> dict[str, Any] | None:
    """What `vlsi-cache generate` wrote about the responses of a Parquet file; None for every other source."""
    if data.path is None or Path(data.path).suffix.lower() != ".parquet":
        return None
    return read_responses(Path(data.path))


def read_responses(path: Path) -> dict[str, Any] | None:
    """The same of one Parquet file; raises DataError where it cannot be read."""
    try:
        text = (pq.read_schema(path).metadata or {}).get(RESPONSES_KEY)
        found = None if text is None else json.loads(text)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet with the origin of its responses: {error}") from None
    if not isinstance(found, dict | None):
        raise DataError(f"{path}: the metadata `{RESPONSES_KEY.decode()}` is a {type(found).__name__}, not a mapping")
    return found


def _generated(name: str, options: dict[str, Any]) -> Iterator[RawRow]:
    make_rows = _find_generator(name)
    signature = inspect.signature(make_rows)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise DataError(f"`data.options` do not fit generator `{name}`: {error}; it takes {signature}") from None
    number = 0
    try:
        for row in make_rows(**options):
            yield f"{name} row {number}", row
            number += 1
    except Exception as error:  # the generator is foreign code
        raise DataError(f"generator `{name}` failed after {number} rows: {type(error).__name__}: {error}") from error


def _find_generator(name: str) -> Callable[..., Iterable[Any]]:
    installed = {point.name: point for point in entry_points(group=GENERATORS)}
    if name not in installed:
        names = ", ".join(sorted(installed)) or "none"
        raise DataError(f"no generator `{name}`; installed: {names} (entry points of the group `{GENERATORS}`)")
    try:
        return installed[name].load()
    except (ImportError, AttributeError) as error:
        raise DataError(f"generator `{name}` ({installed[name].value}) cannot be loaded: {error}") from error


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
            file.write(json.dumps(row, ensure_ascii=False, default=_as_base64) + "\n")
            num_rows += 1
    return num_rows


def _write_parquet(rows: Iterable[Mapping[str, Any]], path: Path, *, responses: Mapping[str, Any] | None) -> int:
    num_rows, source = 0, iter(rows)
    about = None if responses is None else {RESPONSES_KEY: json.dumps(responses).encode()}
    with pq.ParquetWriter(path, _SCHEMA.with_metadata(about), compression="zstd") as writer:
        while chunk := [_parquet_row(row) for row in islice(source, 1024)]:
            writer.write_table(pa.Table.from_pylist(chunk, schema=_SCHEMA))
            num_rows += len(chunk)
    return num_rows


def _parquet_row(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = [{**message, "content": as_parts(message["content"])} for message in row["messages"]]
    images = [_parquet_image(image) for image in row.get("images") or ()]
    return {**row, "messages": messages, "images": images}


def _parquet_image(image: str | Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": image} if isinstance(image, str) else dict(image)
    if isinstance(entry.get("bytes"), str):
        entry["bytes"] = base64.b64decode(entry["bytes"], validate=True)
    return entry


def as_parts(content: Any) -> Any:
    """Content as a list of parts: a plain string is one text part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_base64(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    raise TypeError(f"a row holds a {type(value).__name__}, which JSON cannot keep")
