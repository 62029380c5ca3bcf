"""Rows out of Parquet, Arrow and JSONL files of other tools: some columns, a few rows at a time, from any row on."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlsi_cache.data.sources import READ_ERRORS, Files, NoFilesError, arrow_batches, find_files
from vlsi_cache.errors import DataError

BATCH_ROWS = 64
TABLES, LINES = (".parquet", ".arrow"), (".jsonl", ".jsonl.gz", ".jsonl.zst")


class TableRow(NamedTuple):
    """A row of a table, of which only what is asked for is unpacked."""

    where: str
    batch: pa.RecordBatch
    place: int

    def value(self, name: str) -> Any:
        return self.batch.column(name)[self.place].as_py()

    def numbers(self, name: str) -> np.ndarray:
        """A list of numbers."""
        return np.asarray(self.batch.column(name)[self.place].values or [])

    def nested(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A list of lists of numbers: all of them one behind the other, and how many each list has; null has none.

        DataError for a column of another type.
        """
        column: Any = self.batch.column(name)
        inner = _type_in_list(_type_in_list(column.type))
        if not (pa.types.is_integer(inner) or pa.types.is_floating(inner)):
            raise DataError(f"{self.where}: `{name}` is of type {column.type}, and must be lists of lists of numbers")
        return _flat_lists(column, self.place)


def _type_in_list(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else pa.null()


def _flat_lists(column: Any, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Row `index` of a column of lists of lists, without Python objects for its numbers."""
    outer, inner = column.offsets.to_numpy(), column.values
    low, high = int(outer[index]), int(outer[index + 1])
    offsets = inner.offsets.to_numpy()[low : high + 1]
    values = inner.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    return values.to_numpy(zero_copy_only=False), np.diff(offsets).astype(np.int64)


def files_of(path: Path, kinds: Sequence[str], what: str) -> Files:
    """The files of a source, which `what` names; DataError that says what is there and what would be read."""
    expected = f"{what} is read from {', '.join(kinds)} files: one, a folder of such shards, or a pattern"
    try:
        found = find_files(str(path))
    except NoFilesError as error:
        raise DataError(f"the source to import is {error.problem}", hint=expected) from None
    if found.kind not in kinds:
        raise DataError(f"the source to import is {path}, of {found.kind} files", hint=expected)
    return found


def name_of(files: Files) -> str:
    """In messages: the one file, or where they all lie."""
    return str(files.paths[0] if len(files.paths) == 1 else files.root)


def column_names(files: Files) -> list[str]:
    """Those of the first file of a table."""
    path = files.paths[0]
    try:
        if files.kind == ".parquet":
            return pq.read_schema(path).names
        return next(arrow_batches(path)).schema.names
    except (*READ_ERRORS, StopIteration) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def table_rows(files: Files, columns: Sequence[str], start: int = 0) -> Iterator[TableRow]:
    """Rows of all files in order, from row `start` on; columns are those of these that the files have."""
    number = 0
    for path in files.paths:
        try:
            last = 0
            for first, batch in _batches(path, files.kind, columns, start - number):
                batch = _plain_lists(batch)
                for index in range(max(0, start - number - first), batch.num_rows):
                    yield TableRow(f"{files.name_of(path)} row {first + index}", batch, index)
                last = first + batch.num_rows
            number += last
        except READ_ERRORS as error:
            raise DataError(f"{path} cannot be read: {error}") from None


def _batches(path: Path, kind: str, columns: Sequence[str], skip: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of one file, each with the number of its first row; row groups before row `skip` are passed over."""
    first = 0
    if kind == ".arrow":
        for batch in arrow_batches(path):
            batch = batch.select([name for name in columns if name in batch.schema.names])
            for at in range(0, batch.num_rows, BATCH_ROWS):
                yield first + at, batch.slice(at, BATCH_ROWS)
            first += batch.num_rows
        yield first, pa.RecordBatch.from_pylist([])
        return
    with pq.ParquetFile(path, pre_buffer=False) as file:
        chosen = [name for name in columns if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if first + num_rows > skip:
                at = first
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=chosen):
                    yield at, batch
                    at += batch.num_rows
            first += num_rows
    yield first, pa.RecordBatch.from_pylist([])


def _plain_lists(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Lists that are all of one length, which some writers store by themselves, as lists of any length."""
    kinds = [_plain_type(field.type) for field in batch.schema]
    if kinds == batch.schema.types:
        return batch
    columns = [column.cast(kind) for column, kind in zip(batch.columns, kinds, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    return kind


def json_rows(files: Files, start: int = 0) -> Iterator[tuple[str, Any]]:
    """Rows of JSONL files in order, from row `start` on, each with where it stands; empty lines are none."""
    number = 0
    for path in files.paths:
        try:
            with io.BufferedReader(pa.input_stream(str(path), compression="detect")) as file:  # type: ignore[arg-type]
                for line_number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    number += 1
                    if number <= start:
                        continue
                    where = f"{files.name_of(path)}:{line_number}"
                    try:
                        yield where, json.loads(line)
                    except ValueError as error:
                        raise DataError(f"{where} is not JSON: {error}") from None
        except READ_ERRORS as error:
            raise DataError(f"{path} cannot be read: {error}") from None
