"""`samples.parquet`: which sample lies where, derived from the part records and rebuilt at any time.

Its schema metadata lists the size of every file of every part, so that opening a cache of a million samples reads one
small file and no part record.
"""

import io
import json
import os
import stat
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Index:
    """The sample table and, for each part, the size of every file that exists."""

    samples: pa.Table
    file_sizes: dict[int, dict[str, int]]


def build_index(root: Path, header: CacheHeader) -> Index:
    """Read every part record, check it and the size of every file it names."""
    tables, file_sizes = [SCHEMA.empty_table()], {}
    for index in list_parts(root):
        record = load_part_record(root, header, index)
        check_part_files(root, index, record)
        sizes = {name: file.size for name, file in record.files.items()}
        file_sizes[index] = {**sizes, RECORD_NAME: (part_dir(root, index) / RECORD_NAME).stat().st_size}
        tables.append(_part_table(record))
    return Index(pa.concat_tables(tables).combine_chunks(), file_sizes)


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
    _refuse_twice(index.samples)
    names = sorted({name for sizes in index.file_sizes.values() for name in sizes})
    sizes = {str(part): [found.get(name) for name in names] for part, found in index.file_sizes.items()}
    manifest = sealed_json({"cache_digest": header.digest, "files": names, "sizes": sizes})
    sink = io.BytesIO()
    samples = index.samples.replace_schema_metadata({MANIFEST_KEY: json.dumps(json.loads(manifest)).encode()})
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
    index = _current_table(root, header)
    return index is not None and index == build_index(root, header)


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
    path = root / TABLE_NAME
    try:
        samples = pq.read_table(path, page_checksum_verification=True, memory_map=False)
        manifest = unseal_json((samples.schema.metadata or {})[MANIFEST_KEY], path)
        samples = samples.replace_schema_metadata(None)
        names = manifest["files"]
        sizes = {
            int(part): {name: size for name, size in zip(names, row, strict=True) if size is not None}
            for part, row in manifest["sizes"].items()
        }
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError):
        return None
    if manifest.get("cache_digest") != header.digest or samples.schema != SCHEMA:
        return None
    return Index(samples, sizes)
