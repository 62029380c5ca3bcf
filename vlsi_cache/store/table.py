"""`samples.parquet`: which sample lies where, derived from the part records and rebuilt at any time.

Its schema metadata lists the size of every file of every part, so that opening a cache of a million samples reads no
part record and no sample; columns are read when they are asked for.
"""

import io
import json
import os
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlsi_cache.errors import DataError

from . import commit
from .files import check_part_files, load_part_record
from .layout import (
    RECORD_NAME,
    TABLE_NAME,
    CacheHeader,
    PartRecord,
    list_parts,
    part_dir,
    sealed_json,
    unseal_json,
)

MANIFEST_KEY = b"vlsi_cache.parts"
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
    """The sample table, read column by column, and for each part the size of every file that exists."""

    def __init__(
        self,
        root: Path,
        header: CacheHeader,
        file_sizes: dict[int, dict[str, int]],
        num_samples: int,
        samples: pa.Table | None,
    ) -> None:
        self.file_sizes = file_sizes
        self.num_samples = num_samples
        self._root, self._header = root, header
        self._columns = {} if samples is None else {name: samples[name] for name in SCHEMA.names}

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of the table, in memory from now on."""
        if name not in self._columns:
            try:
                read = pq.read_table(
                    self._root / TABLE_NAME, columns=[name], page_checksum_verification=True, memory_map=False
                )
                if len(read) != self.num_samples:
                    raise OSError("the table has changed")
                self._columns[name] = read[name].combine_chunks()
            except (OSError, pa.ArrowException):  # damaged or replaced: the part records know
                rebuilt = build_index(self._root, self._header)
                self._columns = rebuilt._columns
                self.num_samples, self.file_sizes = rebuilt.num_samples, rebuilt.file_sizes
        return self._columns[name]

    def table(self) -> pa.Table:
        """All columns."""
        return pa.table([self.column(name) for name in SCHEMA.names], schema=SCHEMA)


def build_index(root: Path, header: CacheHeader) -> Index:
    """Read every part record, check it and the size of every file it names."""
    tables, file_sizes = [SCHEMA.empty_table()], {}
    for index in list_parts(root):
        record = load_part_record(root, header, index)
        check_part_files(root, index, record)
        sizes = {name: file.size for name, file in record.files.items()}
        file_sizes[index] = {**sizes, RECORD_NAME: (part_dir(root, index) / RECORD_NAME).stat().st_size}
        tables.append(_part_table(record))
    samples = pa.concat_tables(tables).combine_chunks()
    return Index(root, header, file_sizes, len(samples), samples)


def _part_table(record: PartRecord) -> pa.Table:
    num = len(record.sample_ids)
    starts = [0]
    for length in record.sample_tokens:
        starts.append(starts[-1] + length)
    columns = {
        "id": record.sample_ids,
        "kind": record.kinds,
        "part": [record.index] * num,
        "row": range(num),
        "first_token": starts[:-1],
        "num_tokens": record.sample_tokens,
        "num_response_tokens": record.sample_response_tokens,
        "digest": record.digests,
        "response_xxh3": record.response_xxh3,
        "entropy_last": record.entropy_last,
        "gold_logprob_last": record.gold_logprob_last,
        "kept_mass": record.kept_mass,
    }
    return pa.table(columns, schema=SCHEMA)


def write_table(root: Path, header: CacheHeader) -> None:
    """Write `samples.parquet` atomically; a sample id in two parts is an error."""
    index = build_index(root, header)
    samples = index.table()
    _refuse_twice(samples)
    names = sorted({name for sizes in index.file_sizes.values() for name in sizes})
    sizes = {str(part): [found.get(name) for name in names] for part, found in index.file_sizes.items()}
    manifest = sealed_json({"cache_digest": header.digest, "files": names, "sizes": sizes})
    sink = io.BytesIO()
    samples = samples.replace_schema_metadata({MANIFEST_KEY: json.dumps(json.loads(manifest)).encode()})
    pq.write_table(samples, sink, compression="zstd", write_page_checksum=True)
    commit.replace_file(root, root / TABLE_NAME, sink.getvalue())


def _refuse_twice(samples: pa.Table) -> None:
    if len(samples) == len(samples["id"].unique()):
        return
    ids = samples["id"].to_pylist()
    seen: set[str] = set()
    twice = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    parts = [part for name, part in zip(ids, samples["part"].to_pylist(), strict=True) if name == twice]
    raise DataError(f"sample {twice!r} is in parts {parts}: ids must be unique over the whole cache")


def load_index(root: Path, header: CacheHeader) -> Index:
    """The index from `samples.parquet` if that is there, whole and current, otherwise from the part records."""
    return _current_table(root, header) or build_index(root, header)


def is_current(root: Path, header: CacheHeader) -> bool:
    """Whether `samples.parquet` is there, whole, and says what the part records say."""
    index, fresh = _current_table(root, header), build_index(root, header)
    if index is None or index.file_sizes != fresh.file_sizes:
        return False
    try:
        return _read_all(root).replace_schema_metadata(None) == fresh.table()
    except (OSError, pa.ArrowException):
        return False


def _read_all(root: Path) -> pa.Table:
    return pq.read_table(root / TABLE_NAME, page_checksum_verification=True, memory_map=False)


def _current_table(root: Path, header: CacheHeader) -> Index | None:
    index = _read_table(root, header)
    if index is None or sorted(index.file_sizes) != list_parts(root) or not _sizes_agree(root, index):
        return None
    return index


def _sizes_agree(root: Path, index: Index) -> bool:
    """Whether every file is as long as the table says; if not, the part records decide who is wrong."""
    try:
        for part, sizes in index.file_sizes.items():
            folder = f"{part_dir(root, part)}{os.sep}"
            for name, size in sizes.items():
                status = os.lstat(folder + name)
                if status.st_size != size or not stat.S_ISREG(status.st_mode):
                    return False
    except OSError:
        return False
    return True


def _read_table(root: Path, header: CacheHeader) -> Index | None:
    """What the table's footer says; no column is read."""
    path = root / TABLE_NAME
    try:
        with pq.ParquetFile(path) as file:
            schema, num_samples = file.schema_arrow, file.metadata.num_rows
        manifest = unseal_json((schema.metadata or {})[MANIFEST_KEY], path)
        names = manifest["files"]
        sizes = {
            int(part): {name: size for name, size in zip(names, row, strict=True) if size is not None}
            for part, row in manifest["sizes"].items()
        }
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError):
        return None
    if manifest.get("cache_digest") != header.digest or schema.remove_metadata() != SCHEMA:
        return None
    return Index(root, header, sizes, num_samples, None)
