"""Rows out of files of every kind, one after the other: no file and no large column is held in memory.

Pictures that stand in a file are not kept: `RawRow.again` reads the row once more.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vlsi_cache.errors import DataError

from .forms import COLUMNS, UNSUPPORTED, refuse_columns
from .values import parse_json, shown

BATCH_BYTES = 8 << 20  # of rows that are unpacked at a time
BATCH_ROWS = 256
# A row of a larger row group is not read again: the group would have to be unpacked from its start for each.
_MAX_GROUP_BYTES = 128 << 20
_READ_BYTES = 1 << 20
# What the libraries raise for files that are damaged or cannot be read.
READ_ERRORS = (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError)
_SPOKEN = {".parquet": "Parquet", ".arrow": "Arrow", ".jsonl.gz": "gzip", ".jsonl.zst": "Zstandard", ".json": "JSON"}


class RawRow(NamedTuple):
    """A row, or the DataError that says why it cannot be read; `again` reads it once more, where that is possible."""

    where: str
    row: Any
    again: Callable[[], Any] | None = None


def file_rows(path: Path, kind: str, name: str, unread: set[str]) -> Iterator[RawRow]:
    """The rows of one file, called `name` in messages; names of columns that are not read are added to `unread`."""
    readers = {".parquet": _parquet_rows, ".arrow": _arrow_rows}
    try:
        if kind in readers:
            yield from readers[kind](path, name, unread)
        elif kind == ".json":
            yield from _json_rows(path, name)
        else:
            yield from _jsonl_rows(path, kind, name)
    except READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{path} cannot be read as {_SPOKEN.get(kind, kind)}: {shown(reason)}") from None


# --- JSON -----------------------------------------------------------------------------------------------------------


def _jsonl_rows(path: Path, kind: str, name: str) -> Iterator[RawRow]:
    start = 0
    with _open_lines(path, kind) as file:
        for number, line in enumerate(file, start=1):
            # Only a file that is not compressed can be read from its middle.
            again = partial(_line_again, path, start, len(line)) if kind == ".jsonl" else None
            start += len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield RawRow(f"{name}:{number}", _row_or_error(line), again)


def _open_lines(path: Path, kind: str) -> Any:
    if kind == ".jsonl.gz":
        return gzip.open(path, "rb")
    if kind == ".jsonl.zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))  # type: ignore[arg-type]
    return path.open("rb")


def _row_or_error(text: str | bytes) -> Any:
    try:
        return parse_json(text)
    except DataError as error:
        return error


def _line_again(path: Path, start: int, length: int) -> Any:
    with path.open("rb") as file:
        file.seek(start)
        return parse_json(file.read(length).removeprefix(codecs.BOM_UTF8))


def _json_rows(path: Path, name: str) -> Iterator[RawRow]:
    """The rows of one JSON list, counted from 0; a file that begins with a mapping is JSONL by another name."""
    text = path.read_text(encoding="utf-8-sig").lstrip()
    if text.startswith("{"):
        yield from _jsonl_rows(path, ".jsonl", name)
        return
    if not text.startswith("["):
        raise DataError(f"{path} holds neither a JSON list of rows nor a row on each line")
    decoder, lenient = json.JSONDecoder(), json.JSONDecoder(parse_int=str)
    position, number = _next(text, 1), 0
    while text[position : position + 1] != "]":
        try:
            row, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}") from None
        except RecursionError:
            raise DataError(f"{path} row {number} is nested too deeply to be read") from None
        except ValueError:  # a number of thousands of digits
            _, end = lenient.raw_decode(text, position)
            row = _row_or_error(text[position:end])
        yield RawRow(f"{name} row {number}", row)
        number, position = number + 1, _next(text, end)
        if text[position : position + 1] == ",":
            position = _next(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{path} is not JSON: after row {number - 1} there is neither `,` nor `]`")
    if text[position + 1 :].strip():
        raise DataError(f"{path} is not JSON: something stands behind the list")


def _next(text: str, position: int) -> int:
    """Where the next character is that is no white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position


# --- Parquet and Arrow: rows count from 0, as their readers count them ----------------------------------------------


def _parquet_rows(path: Path, name: str, unread: set[str]) -> Iterator[RawRow]:
    number = 0
    with pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
        columns = _columns(file.schema_arrow.names, path, unread)
        for group in range(file.num_row_groups):
            in_group = 0
            about = file.metadata.row_group(group)
            can_be_found = about.total_byte_size <= _MAX_GROUP_BYTES
            for batch in file.iter_batches(_num_rows(about), row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    again = partial(_parquet_again, path, group, in_group, columns) if can_be_found else None
                    yield RawRow(f"{name} row {number}", _without_nulls(row), again)
                    number, in_group = number + 1, in_group + 1


def _num_rows(group: Any) -> int:
    """How many rows of this row group are unpacked at a time."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))


def _parquet_again(path: Path, group: int, index: int, columns: list[str]) -> Any:
    with pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
        size = _num_rows(file.metadata.row_group(group))
        for batch in file.iter_batches(size, row_groups=[group], columns=columns):
            if index < batch.num_rows:
                return _without_nulls(batch.slice(index, 1).to_pylist()[0])
            index -= batch.num_rows
    raise DataError(f"{path} has fewer rows than when it was read before; start again")


def _arrow_rows(path: Path, name: str, unread: set[str]) -> Iterator[RawRow]:
    number = 0
    for index, batch in enumerate(_arrow_batches(path)):
        columns = _columns(batch.schema.names, path, unread)
        batch = batch.select(columns)
        size = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
        for start in range(0, batch.num_rows, size):
            for offset, row in enumerate(batch.slice(start, size).to_pylist(), start=start):
                again = partial(_arrow_again, path, index, offset, columns)
                yield RawRow(f"{name} row {number}", _without_nulls(row), again)
                number += 1


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Of an IPC stream, as `datasets` writes it, or an IPC file; the file is mapped, not read."""
    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            yield from map(file.get_batch, range(file.num_record_batches))
        else:
            source.seek(0)
            yield from pa.ipc.open_stream(source)


def _arrow_again(path: Path, index: int, offset: int, columns: list[str]) -> Any:
    for number, batch in enumerate(_arrow_batches(path)):
        if number == index:
            return _without_nulls(batch.select(columns).slice(offset, 1).to_pylist()[0])
    raise DataError(f"{path} has fewer rows than when it was read before; start again")


def _columns(names: Iterable[str], path: Path, unread: set[str]) -> list[str]:
    """Those of a file's columns that are read."""
    names = list(names)
    refuse_columns(names, str(path))
    known = [name for name in names if name in (*COLUMNS, *UNSUPPORTED)]
    unread |= set(names) - set(known)
    return known


def _without_nulls(value: Any) -> Any:
    """Rows of one schema have all keys of each other, with nulls: a key that is null was not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value
