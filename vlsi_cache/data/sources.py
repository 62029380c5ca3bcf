"""Raw rows out of files and installed generators. Nothing is checked here but the file."""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlsi_cache.disk import refuse_url
from vlsi_cache.errors import DataError
from vlsi_cache.spec import DataSpec

from .files import find_files, root_of
from .readers import RawRow, file_rows
from .values import shown

GENERATORS = "vlsi_cache.generators"
RESPONSES_KEY = b"vlsi_cache.responses"  # of the Parquet schema's metadata


def raw_rows(data: DataSpec, unread: set[str] | None = None) -> Iterator[RawRow]:
    """The first `data.limit` rows of the source; raises DataError if there is no such source.

    Names of columns that are not read are added to `unread`.
    """
    if data.generator is not None:
        rows = _generated(data.generator, data.options)
    else:
        assert data.path is not None
        refuse_url(data.path, "`data.path`")
        found, names = find_files(data.path), set() if unread is None else unread
        of_files = (file_rows(path, found.kind, found.name_of(path), names) for path in found.paths)
        rows = chain.from_iterable(of_files)
    return islice(rows, data.limit)


def media_root(data: DataSpec) -> Path | None:
    """The folder that image paths are relative to: `media_root`, else the folder of the rows."""
    if data.media_root is not None:
        root = Path(data.media_root)
        if not root.is_dir():
            raise DataError(f"`data.media_root` is {root}: no such folder")
        return root.resolve()
    return root_of(data.path) if data.path is not None else None


def responses_of(data: DataSpec) -> dict[str, Any] | None:
    """What `vlsi-cache generate` wrote about the responses of a Parquet file; None for every other source."""
    files = find_files(data.path) if data.path is not None else None
    if files is None or files.kind != ".parquet":
        return None
    found = [read_responses(path) for path in files.paths]
    if any(one != found[0] for one in found):
        raise DataError(
            f"{data.path}: {len(found)} files, some of them written by `generate`, do not agree where their responses "
            "come from; build a cache of each and join them with: vlsi-cache merge"
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
            yield RawRow(f"{name} row {number}", row)
            number += 1
    except Exception as error:  # the generator is foreign code
        reason = f"{type(error).__name__}: {shown(str(error))}"
        raise DataError(f"generator `{name}` failed after {number} rows: {reason}") from error


def _find_generator(name: str) -> Callable[..., Iterable[Any]]:
    installed = {point.name: point for point in entry_points(group=GENERATORS)}
    if name not in installed:
        names = ", ".join(sorted(installed)) or "none"
        raise DataError(f"no generator `{name}`; installed: {names} (entry points of the group `{GENERATORS}`)")
    try:
        return installed[name].load()
    except (ImportError, AttributeError) as error:
        raise DataError(f"generator `{name}` ({installed[name].value}) cannot be loaded: {error}") from error
