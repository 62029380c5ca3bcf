"""Rows out of files of every kind, one after the other: no file and no large column is held in memory.

Where a row lies is told with it (`RawRow.place`): `Source.again` reads it once more.
"""

import codecs
import glob
import gzip
import inspect
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vlsi_cache.config.sections import DataSpec
from vlsi_cache.errors import DataError
from vlsi_cache.io import refuse_url
from vlsi_cache.progress import say

from .images import kind_of_file
from .messages import COLUMNS, UNSUPPORTED, refuse_columns
from .values import listed, parse_json, printable, shown

BATCH_BYTES = 8 << 20  # of rows that are unpacked at a time
BATCH_ROWS = 256
# A row of a larger row group is not read again: the group would have to be unpacked from its start for each.
_MAX_GROUP_BYTES = 128 << 20
_READ_BYTES = 1 << 20
# What the libraries raise for files that are damaged or cannot be read.
READ_ERRORS = (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError)
_SPOKEN = {".parquet": "Parquet", ".arrow": "Arrow", ".jsonl.gz": "gzip", ".jsonl.zst": "Zstandard", ".json": "JSON"}


class Place(NamedTuple):
    """Where a row lies: in a line of JSONL its first byte and its bytes, in Parquet and Arrow its chunk and its place
    in that."""

    file: int
    start: int
    length: int


class RawRow(NamedTuple):
    """A row, or the DataError that says why it cannot be read; its `place`, where it can be read again."""

    where: str
    row: Any
    place: Place | None = None


def file_rows(path: Path, kind: str, name: str, unread: set[str], *, number: int = 0) -> Iterator[RawRow]:
    """The rows of one file, called `name` in messages; names of columns that are not read are added to `unread`.

    `number` is that of the file among all of the source.
    """
    try:
        if kind in (".parquet", ".arrow"):
            yield from _table_rows(path, kind, name, unread, number)
        elif kind == ".json":
            yield from _json_rows(path, name, number)
        else:
            yield from _jsonl_rows(path, kind, name, number)
    except READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{path} cannot be read as {_SPOKEN.get(kind, kind)}: {shown(reason)}") from None


def _jsonl_rows(path: Path, kind: str, name: str, number: int) -> Iterator[RawRow]:
    start = 0
    with _open_lines(path, kind) as file:
        for line_number, line in enumerate(file, start=1):
            # Only a file that is not compressed can be read from its middle.
            place = Place(number, start, len(line)) if kind == ".jsonl" else None
            start += len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if line_number == 1 else line
            if line.strip():
                yield RawRow(f"{name}:{line_number}", _row_or_error(line), place)


def lines_between(path: Path, name: str, number: int, start: int, stop: int, *, first_line: int) -> Iterator[RawRow]:
    """The rows of a JSONL file from byte `start`, where line `first_line` begins, up to byte `stop`."""
    with path.open("rb") as file:
        file.seek(start)
        line_number = first_line
        while start < stop and (line := file.readline()):
            place = Place(number, start, len(line))
            start += len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if line_number == 1 else line
            if line.strip():
                yield RawRow(f"{name}:{line_number}", _row_or_error(line), place)
            line_number += 1


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


def _json_rows(path: Path, name: str, file_number: int) -> Iterator[RawRow]:
    """The rows of one JSON list, counted from 0; a file that begins with a mapping is JSONL by another name."""
    text = path.read_text(encoding="utf-8-sig").lstrip()
    if text.startswith("{"):
        yield from _jsonl_rows(path, ".jsonl", name, file_number)
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


def _table_rows(path: Path, kind: str, name: str, unread: set[str], file_number: int) -> Iterator[RawRow]:
    number = 0
    for chunk, (batches, is_small) in enumerate(_chunks(path, kind, unread)):
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for index, row in enumerate(rows):
            place = Place(file_number, chunk, index) if is_small else None
            yield RawRow(f"{name} row {number}", _without_nulls(row), place)
            number += 1


def _table_again(path: Path, kind: str, chunk: int, index: int) -> Any:
    """Row `index` of a chunk; the chunks before it are not unpacked."""
    for batches, _ in islice(_chunks(path, kind, set()), chunk, chunk + 1):
        for batch in batches:
            if index < batch.num_rows:
                return _without_nulls(batch.slice(index, 1).to_pylist()[0])
            index -= batch.num_rows
    raise DataError(f"{path} has fewer rows than when it was read before; start again")


def _chunks(path: Path, kind: str, unread: set[str]) -> Iterator[tuple[Iterator[pa.RecordBatch], bool]]:
    """Row groups of Parquet or record batches of Arrow: each a few rows at a time, and whether `again` may read it."""
    if kind == ".parquet":
        with pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
            columns = _columns(file.schema_arrow.names, path, unread)
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                size = _rows_at_a_time(group.num_rows, group.total_byte_size)
                batches = file.iter_batches(size, row_groups=[number], columns=columns)
                yield batches, group.total_byte_size <= _MAX_GROUP_BYTES
        return
    for batch in arrow_batches(path):
        chosen = batch.select(_columns(batch.schema.names, path, unread))
        size = _rows_at_a_time(chosen.num_rows, chosen.nbytes)
        yield map(partial(chosen.slice, length=size), range(0, chosen.num_rows, size)), True


def _rows_at_a_time(num_rows: int, num_bytes: int) -> int:
    return max(1, min(BATCH_ROWS, BATCH_BYTES * num_rows // max(1, num_bytes)))


def arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Of an IPC stream, as `datasets` writes it, or an IPC file; the file is mapped, not read."""
    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            yield from map(file.get_batch, range(file.num_record_batches))
        else:
            source.seek(0)
            yield from pa.ipc.open_stream(source)


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


DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "metadata.json", "config.json")  # beside data, and none
# What the names of files end in that are read, see `file_rows`.
KINDS = (".jsonl.gz", ".jsonl.zst", ".jsonl", ".json", ".parquet", ".arrow")
READ = (
    "read are .parquet, .jsonl, .jsonl.gz, .jsonl.zst, .json and .arrow files, folders of such shards, globs such as "
    "data/train-*.parquet, and folders of datasets.save_to_disk"
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.")


@dataclass(frozen=True)
class Files:
    """Files of one kind in the order in which they are read, and the folder that their rows' pictures lie below."""

    paths: tuple[Path, ...]
    kind: str
    root: Path

    def name_of(self, path: Path) -> str:
        """The file in a message about a row."""
        real = path.resolve()
        return real.relative_to(self.root).as_posix() if real.is_relative_to(self.root) else path.name


class NoFilesError(DataError):
    """There is nothing that can be read; `problem` is the message without the name of the setting and what to do."""

    def __init__(self, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"`data.path` is {problem}", hint=hint)
        self.problem = problem


def find_files(path: str) -> Files:
    """What `data.path` names; raises NoFilesError that says what is there and what would be read."""
    what = _kind_of_path(path)
    if what == "file":
        kind = _suffix(Path(path))
        if kind is None:
            raise NoFilesError(f"{printable(path)}, a `{Path(path).suffix}` file", hint=READ)
        return Files((Path(path),), kind, root_of(path))
    if what == "folder":
        return _in_folder(Path(path))
    if what is not None:
        raise NoFilesError(f"{printable(path)}, a {what}", hint=READ)
    if not is_glob(path):
        raise NoFilesError(f"{printable(path)}: no such file or folder", hint=READ)
    found = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
    files = [file for file in found if file.is_file() and _suffix(file)]
    if not files:
        there = f"none of the {len(found)} names that it matches can be read" if found else "it matches no file"
        raise NoFilesError(f"{printable(path)}: {there}", hint=READ)
    return _shards(files, path, root_of(path))


def is_glob(path: str) -> bool:
    """Whether the text is a pattern: a file that is really called so goes first."""
    return glob.has_magic(path) and not _kind_of_path(path)


def root_of(path: str) -> Path:
    """The folder that relative paths in the rows start from: of a file its own, of a pattern the part without one."""
    if is_glob(path):
        parts = Path(path).parts
        fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        return Path(*parts[:fixed]).resolve()
    return Path(path).resolve() if _kind_of_path(path) == "folder" else Path(path).resolve().parent


def _kind_of_path(path: str) -> str | None:
    try:
        return kind_of_file(Path(path).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise NoFilesError(f"{printable(path)[:300]}: {reason}") from None


def _suffix(path: Path) -> str | None:
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def _in_folder(folder: Path) -> Files:
    if (folder / "dataset_dict.json").is_file():
        names = sorted(file.parent.name for file in folder.glob("*/state.json"))
        raise NoFilesError(
            f"{folder}, a DatasetDict with the splits {listed(names)}; name one of them: "
            f"{folder / (names[0] if names else 'train')}"
        )
    if (folder / "state.json").is_file():
        return Files(_saved_to_disk(folder), ".arrow", folder.resolve())
    try:
        there = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise NoFilesError(f"{folder}, a folder that cannot be read: {error.strerror}") from None
    files = [file for file in there if file.is_file() and _suffix(file) in KINDS and file.name not in DESCRIPTIONS]
    if not files:
        found = f"only {listed(file.name for file in there)}" if there else "nothing"
        raise NoFilesError(f"{folder}, a folder that holds {found}", hint=READ)
    return _shards(files, str(folder), folder.resolve())


def _saved_to_disk(folder: Path) -> tuple[Path, ...]:
    """The Arrow files of `datasets.save_to_disk`, in the order of its `state.json`."""
    state_file = folder / "state.json"
    try:
        names = [entry["filename"] for entry in json.loads(state_file.read_text(encoding="utf-8"))["_data_files"]]
        files = tuple(folder / Path(name).name for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{state_file} is not the state of a folder of datasets.save_to_disk; {READ}") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"{state_file} names {listed(missing) if missing else 'no files'}, which are not in its folder")
    return files


def _shards(files: list[Path], path: str, root: Path) -> Files:
    """Shards must be of one kind and of one split."""
    kinds = Counter(str(_suffix(file)) for file in files)
    if len(kinds) > 1:
        there = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise NoFilesError(f"{printable(path)}: {there} files; name those of one kind, such as *{files[0].suffix}")
    shards = [found for file in files if (found := _SHARD.match(file.name))]
    splits = sorted({shard[1] for shard in shards})
    if len(splits) > 1:
        raise NoFilesError(
            f"{printable(path)}: shards of {len(splits)} splits ({listed(splits)}); name one with a "
            f"pattern such as {splits[0]}-*{files[0].suffix}"
        )
    num_wanted = int(shards[0][3]) if shards else 0
    if len(shards) < num_wanted:
        say(
            f"{printable(path)}: {len(shards)} of the {num_wanted} shards of `{splits[0]}` are read; the others are "
            "not there"
        )
    return Files(tuple(files), next(iter(kinds)), root)


GENERATORS = "vlsi_cache.generators"
RESPONSES_KEY = b"vlsi_cache.responses"  # of the Parquet schema's metadata


@dataclass(frozen=True)
class Source:
    """The files that rows come from, each with its kind and its name in messages; none for a generator."""

    name: str
    files: tuple[tuple[Path, str, str], ...] = ()

    def again(self, place: Place) -> Any:
        """The row at this place, read once more; raises what the libraries raise, or DataError."""
        path, kind, _ = self.files[place.file]
        if kind in (".parquet", ".arrow"):
            return _table_again(path, kind, place.start, place.length)
        return _line_again(path, place.start, place.length)


def open_source(data: DataSpec) -> Source:
    """Find the files of `data`; raises DataError if there is no such source."""
    if data.path is None:
        return Source(f"generator {data.generator}")
    files: list[tuple[Path, str, str]] = []
    for path in paths_of(data):
        refuse_url(path, "`data.path`")
        found = find_files(path)
        files += [(file, found.kind, found.name_of(file)) for file in found.paths]
    twice = [path for path, count in Counter(file.resolve() for file, _, _ in files).items() if count > 1]
    if twice:
        raise DataError(f"`data.path` names {twice[0]} more than once; name each file once")
    names = Counter(name for _, _, name in files)
    # Files of one name in several folders are told apart by their whole path.
    files = [(file, kind, name if names[name] == 1 else str(file)) for file, kind, name in files]
    paths = paths_of(data)
    return Source(paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more", tuple(files))


def paths_of(data: DataSpec) -> list[str]:
    """What `data.path` names, one or several."""
    return [data.path] if isinstance(data.path, str) else list(data.path or ())


def raw_rows(data: DataSpec, unread: set[str] | None = None, *, source: Source | None = None) -> Iterator[RawRow]:
    """The first `data.limit` rows of the source; raises DataError if there is no such source.

    Names of columns that are not read are added to `unread`.
    """
    if data.generator is not None:
        rows = _generated(data.generator, data.options)
    else:
        files, names = (source or open_source(data)).files, set() if unread is None else unread
        rows = chain.from_iterable(file_rows(*file, names, number=number) for number, file in enumerate(files))
    return islice(rows, data.limit)


def media_root(data: DataSpec) -> Path | None:
    """The folder that image paths are relative to: `media_root`, else the folder of the rows.

    None for a generator, and for files in several folders: nothing then says which of them is meant.
    """
    if data.media_root is not None:
        root = Path(data.media_root)
        if not root.is_dir():
            raise DataError(f"`data.media_root` is {root}: no such folder")
        return root.resolve()
    roots = {root_of(path) for path in paths_of(data)}
    return roots.pop() if len(roots) == 1 else None


def responses_of(source: Source) -> dict[str, Any] | None:
    """What `vlsi-cache generate` wrote about the responses of a Parquet file; None for every other source."""
    files = source.files
    found = [read_responses(path) if kind == ".parquet" else None for path, kind, _ in files] or [None]
    if any(one != found[0] for one in found):
        raise DataError(
            f"{source.name}: {len(found)} files, some of them written by `generate`, do not agree where "
            "their responses come from; build a cache of each and join them with: vlsi-cache merge"
        )
    return found[0]


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


def installed_generator(name: str) -> Callable[..., Iterable[Any]]:
    """What the entry point of this name gives; raises DataError."""
    installed = {point.name: point for point in entry_points(group=GENERATORS)}
    if name not in installed:
        names = ", ".join(sorted(installed)) or "none"
        raise DataError(f"no generator `{name}`; installed: {names} (entry points of the group `{GENERATORS}`)")
    try:
        return installed[name].load()
    except (ImportError, AttributeError) as error:
        raise DataError(f"generator `{name}` ({installed[name].value}) cannot be loaded: {error}") from error


def _generated(name: str, options: dict[str, Any]) -> Iterator[RawRow]:
    make_rows = installed_generator(name)
    signature = inspect.signature(make_rows)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise DataError(f"`data.options` do not fit generator `{name}`: {error}; it takes {signature}") from None
    number = 0
    try:
        for row in make_rows(**options):
            yield RawRow(f"{name} row {number}", row)
            number += 1
    except Exception as error:  # the generator is foreign code
        reason = f"{type(error).__name__}: {shown(str(error))}"
        raise DataError(f"generator `{name}` failed after {number} rows: {reason}") from error
