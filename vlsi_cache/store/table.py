"""`samples.parquet`: which sample lies where, derived from the part records and rebuilt at any time.

Its schema metadata lists the parts that it was made from with the size of each commit record, so that opening a cache
of a million samples reads no record and no sample; columns are read when they are asked for. The sizes of the files of
a part are compared with its record when the part is read.
"""

import io
import json
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlsi_cache.errors import CacheCorruptError, DataError

from .files import FROM_A_COPY, load_part_record, refuse_special, repair_hint, replace_file
from .format import (
    HEADER_NAME,
    RECORD_NAME,
    TABLE_NAME,
    CacheHeader,
    PartRecord,
    list_parts,
    part_dir,
    part_name,
    sealed_json,
    unseal_json,
)

if TYPE_CHECKING:
    from .remote.mirror import Mirror

MANIFEST_KEY = b"vlsi_cache.parts"
FILES_KEY = b"vlsi_cache.files"
MEANS = ("entropy_last", "gold_logprob_last", "kept_mass")
FileSizes = dict[int, dict[str, int]]
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("part", pa.int32()),
        pa.field("row", pa.int32()),
        pa.field("first_token", pa.int64()),
        pa.field("num_tokens", pa.int64()),
        pa.field("num_response_tokens", pa.int64()),
        pa.field("digest", pa.string()),
        pa.field("response_xxh3", pa.string()),
        pa.field("entropy_last", pa.float64()),
        pa.field("gold_logprob_last", pa.float64()),
        pa.field("kept_mass", pa.float64()),
    ]
)


class Index:
    """The sample table, read column by column, and the parts that it speaks of."""

    def __init__(
        self,
        root: Path,
        header: CacheHeader,
        parts: list[int],
        num_samples: int,
        samples: pa.Table | None,
        file_sizes: FileSizes | bytes,
        rebuild: "Callable[[], Index] | None" = None,
    ) -> None:
        """`rebuild` makes the index from the part records, where those are not in `root`."""
        self.parts = parts
        self.num_samples = num_samples
        self._root = root
        self._from_records = rebuild or (lambda: build_index(root, header))
        self._columns = {} if samples is None else {name: samples[name] for name in SCHEMA.names}
        self._file_sizes = file_sizes

    @property
    def file_sizes(self) -> FileSizes:
        """For each part the size of every file of it."""
        if isinstance(self._file_sizes, bytes):
            try:
                self._file_sizes = _parsed_sizes(self._file_sizes, self._root / TABLE_NAME, self.parts)
            except (CacheCorruptError, ValueError, KeyError, TypeError, AttributeError):
                self._rebuild()
        assert not isinstance(self._file_sizes, bytes)
        return self._file_sizes

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of the table, in memory from now on."""
        if name not in self._columns:
            try:
                read = pq.read_table(
                    self._root / TABLE_NAME, columns=[name], page_checksum_verification=True, memory_map=False
                )
                if len(read) != self.num_samples:
                    raise OSError("the table has changed")
                self._columns[name] = _plausible(name, read[name].combine_chunks(), self.parts)
            except (OSError, pa.ArrowException):  # damaged or replaced: the part records know
                self._rebuild()
        return self._columns[name]

    def table(self) -> pa.Table:
        """All columns."""
        return pa.table([self.column(name) for name in SCHEMA.names], schema=SCHEMA)

    def _rebuild(self) -> None:
        rebuilt = self._from_records()
        self._columns, self._file_sizes = rebuilt._columns, rebuilt._file_sizes
        self.num_samples, self.parts = rebuilt.num_samples, rebuilt.parts


def _plausible(name: str, column: pa.ChunkedArray, parts: list[int]) -> pa.ChunkedArray:
    """The column; OSError for values that no table holds."""
    if name in MEANS:
        return column
    if column.null_count:
        raise OSError(f"`{name}` has no value for {column.null_count} samples")
    if pa.types.is_integer(column.type) and len(column):
        values = column.to_numpy()
        high = parts[-1] if name == "part" and parts else None
        if values.min() < 0 or (high is not None and values.max() > high):
            raise OSError(f"`{name}` holds {values.min()} to {values.max()}")
    return column


class Gathered:
    """What the commit records of some parts say, record by record: the lines of the sample table, sizes of files."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._file_sizes: FileSizes = {}
        self._num_skipped = 0

    def add(self, root: Path, index: int, record: PartRecord) -> None:
        """The record of part `index`, which was read and checked; parts come in order."""
        record_bytes = os.stat(part_dir(root, index) / RECORD_NAME).st_size
        sizes = {name: file.size for name, file in record.files.items()}
        self._file_sizes[index] = {**sizes, RECORD_NAME: record_bytes}
        self._num_skipped += len(record.skipped)
        num, num_tokens_S = len(record.sample_ids), np.array(record.sample_tokens, np.int64)
        columns = {
            "id": record.sample_ids,
            "kind": record.kinds,
            "part": np.full(num, index, np.int32),
            "row": np.arange(num, dtype=np.int32),
            "first_token": np.cumsum(num_tokens_S) - num_tokens_S,
            "num_tokens": num_tokens_S,
            "num_response_tokens": record.sample_response_tokens,
            "digest": record.digests,
            "response_xxh3": record.response_xxh3,
            "entropy_last": record.entropy_last,
            "gold_logprob_last": record.gold_logprob_last,
            "kept_mass": record.kept_mass,
        }
        self._tables.append(pa.table(columns, schema=SCHEMA))

    def index(self, root: Path, header: CacheHeader) -> Index:
        """The index of these parts; CacheCorruptError when they are all and hold something else than was planned."""
        samples = pa.concat_tables([SCHEMA.empty_table(), *self._tables]).combine_chunks()
        parts = list(self._file_sizes)
        if len(parts) == header.num_parts and not self._num_skipped:
            _check_plan(root, header, samples)
        return Index(root, header, parts, len(samples), samples, self._file_sizes)


def collect(root: Path, header: CacheHeader) -> Index:
    """Read and check every part record."""
    found = Gathered()
    for index in list_parts(root):
        found.add(root, index, load_part_record(root, header, index))
    return found.index(root, header)


def _check_plan(root: Path, header: CacheHeader, samples: pa.Table) -> None:
    """A finished cache holds what was planned."""
    num_tokens = int(samples["num_response_tokens"].to_numpy().sum())
    for name, number in {"num_samples": len(samples), "num_response_tokens": num_tokens}.items():
        if number != getattr(header, name):
            what = f": `{name}` is {getattr(header, name)}, and the parts hold {number}"
            raise CacheCorruptError.at(root / HEADER_NAME, what, hint=FROM_A_COPY)


def build_index(root: Path, header: CacheHeader) -> Index:
    """The index from the part records; a sample id in two parts is an error."""
    index = collect(root, header)
    if found := repeated_id(index):
        name, parts = found
        path = part_dir(root, parts[-1]) / RECORD_NAME
        what = f": sample {name!r} is in parts {parts}, and ids must be unique over the whole cache"
        raise CacheCorruptError.at(path, what, hint=repair_hint(root))
    return index


def repeated_id(index: Index) -> tuple[str, list[int]] | None:
    """A sample id that occurs more than once, and the parts that hold it."""
    column = index.column("id")
    if len(column) == len(column.unique()):
        return None
    ids, seen = column.to_pylist(), set()
    twice = next(name for name in ids if name in seen or seen.add(name))
    return twice, [part for name, part in zip(ids, index.column("part").to_pylist(), strict=True) if name == twice]


def write_table(root: Path, header: CacheHeader) -> None:
    """Write `samples.parquet` atomically; a sample id in two parts is an error."""
    index = collect(root, header)
    if found := repeated_id(index):
        name, parts = found
        raise DataError(f"sample {name!r} is in parts {parts}: ids must be unique over the whole cache")
    _write(root, header, index)


def _write(root: Path, header: CacheHeader, index: Index) -> None:
    names = sorted({name for sizes in index.file_sizes.values() for name in sizes})
    sizes = {str(part): [found.get(name) for name in names] for part, found in index.file_sizes.items()}
    records = {str(part): found[RECORD_NAME] for part, found in index.file_sizes.items()}
    metadata = {
        MANIFEST_KEY: _compact({"cache_digest": header.digest, "records": records}),
        FILES_KEY: _compact({"files": names, "sizes": sizes}),
    }
    sink = io.BytesIO()
    samples = index.table().replace_schema_metadata(metadata)
    pq.write_table(samples, sink, compression="zstd", write_page_checksum=True)
    replace_file(root, root / TABLE_NAME, sink.getvalue())


def _compact(value: dict[str, object]) -> bytes:
    """Sealed JSON without white space."""
    return json.dumps(json.loads(sealed_json(value)), separators=(",", ":")).encode()


def load_index(root: Path, header: CacheHeader) -> Index:
    """The index from `samples.parquet` if that is there, whole and current, otherwise from the part records.

    The table of a finished cache is then written, so that only one process pays for it: atomically, and where that
    cannot be done the index is as good without.
    """
    refuse_special(root / TABLE_NAME)
    index = _current_table(root, header)
    if index is not None:
        return index
    index = build_index(root, header)
    if len(index.parts) == header.num_parts:
        try:
            _write(root, header, index)
        except OSError as error:  # a folder of somebody else, a full disk, a file system that is read only
            why = error.strerror or str(error)
            warnings.warn(
                f"`{root / TABLE_NAME}` cannot be written ({why}): every opening reads the records of all parts",
                stacklevel=2,
            )
    return index


def is_current(root: Path, header: CacheHeader, fresh: Index, *, parts: Path | None = None) -> bool:
    """Whether `samples.parquet` in `root` is there, whole, and says what the part records, read into `fresh`, say.

    The records lie in `parts`, by default in `root` too.
    """
    try:
        refuse_special(root / TABLE_NAME)
        index = _current_table(root, header, parts=parts)
        if index is None:
            return False
        sizes = _parsed_sizes(index._file_sizes, root / TABLE_NAME, index.parts)  # type: ignore[arg-type]
        stored = pq.read_table(root / TABLE_NAME, page_checksum_verification=True, memory_map=False)
        return sizes == fresh.file_sizes and stored.replace_schema_metadata(None) == fresh.table()
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError):
        return False


def load_remote_index(mirror: "Mirror") -> Index:
    """The index of a cache on an object store: from its table if that lists all parts, else from all part records.

    Parts are never replaced, and the table is written when all are there: none of them is asked for. The size of a
    part's record is compared when the part is first read.
    """
    header = mirror.header

    def from_records() -> Index:
        return mirror.with_records(lambda folder: build_index(folder, header))

    if mirror.table() is None or (footer := _footer(mirror.root, header)) is None:
        return from_records()
    records, num_samples, files = footer
    if sorted(records) != list(range(header.num_parts)) or num_samples > header.num_samples:
        return from_records()
    return Index(mirror.root, header, sorted(records), num_samples, None, files, from_records)


def _footer(root: Path, header: CacheHeader) -> tuple[dict[int, int], int, bytes] | None:
    """What the table's footer says: size of each part's record, number of samples, files; None if it cannot be used."""
    path = root / TABLE_NAME
    try:
        with pq.ParquetFile(path) as file:
            schema, num_samples = file.schema_arrow, file.metadata.num_rows
        metadata = schema.metadata or {}
        manifest, files = unseal_json(metadata[MANIFEST_KEY], path), metadata[FILES_KEY]
        records = {int(part): size for part, size in manifest["records"].items()}
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError):
        return None
    if manifest.get("cache_digest") != header.digest or schema.remove_metadata() != SCHEMA:
        return None
    return records, num_samples, files


def _current_table(root: Path, header: CacheHeader, *, parts: Path | None = None) -> Index | None:
    """The index from the table's footer, if it was made from the parts that are there; no column is read."""
    of_parts = parts or root
    if (footer := _footer(root, header)) is None:
        return None
    records, num_samples, files = footer
    there = list_parts(of_parts)
    if sorted(records) != there or not _records_are_there(of_parts, records):
        return None
    if len(there) == header.num_parts and num_samples > header.num_samples:
        return None
    return Index(root, header, there, num_samples, None, files)


def _records_are_there(root: Path, records: dict[int, int]) -> bool:
    """Whether every commit record is as long as the table says; if not, the records decide who is wrong."""
    try:
        for part, size in records.items():
            status = os.lstat(f"{root}/parts/{part_name(part)}/{RECORD_NAME}")
            if status.st_size != size or not stat.S_ISREG(status.st_mode):
                return False
    except OSError:
        return False
    return True


def _parsed_sizes(text: bytes, path: Path, parts: list[int]) -> FileSizes:
    value = unseal_json(text, path)
    names = value["files"]
    sizes = {
        int(part): {name: int(size) for name, size in zip(names, row, strict=True) if size is not None}
        for part, row in value["sizes"].items()
    }
    if sorted(sizes) != parts:
        raise ValueError("the table lists other parts")
    return sizes
