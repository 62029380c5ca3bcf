"""What is fetched of one part of a remote cache, and where it goes in the part's folder of the local copy.

Shape suffixes: L layers, T response tokens with a row.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from vlsi_cache import io
from vlsi_cache.errors import CacheCorruptError
from vlsi_cache.store.arrays import (
    ArraySpec,
    data_file_name,
    layered_names,
    part_specs,
    sample_names,
    shard_index_bytes,
)
from vlsi_cache.store.codec import BLOSC_HEADER, encode_index, read_index, read_layered
from vlsi_cache.store.files import DAMAGED_REMOTE
from vlsi_cache.store.format import FileRecord, PartRecord, files_digest, part_dir, part_name

from . import part_cache
from .objects import changed
from .part_cache import Held, Span

if TYPE_CHECKING:
    from .mirror import Mirror


@dataclass(frozen=True)
class Want:
    """What is needed of a part beside its record: arrays, and of layered ones these layer rows.

    `names` None is every array that rows are made of.
    """

    layers: Sequence[int] = ()
    names: Sequence[str] | None = None


NOTHING = Want(names=())


class Fetch:
    """Spans of the files of one part, on their way into its folder."""

    def __init__(self, mirror: "Mirror", index: int, record: PartRecord, held: Held) -> None:
        self._mirror, self._index, self._record, self._held = mirror, index, record, held
        self._folder, self._digest = part_dir(mirror.root, index), files_digest(record.files)
        self._wanted: dict[str, list[Span]] = {}
        _lay_out(self._folder, record)

    def bring(self, want: Want) -> None:
        """Fetch the arrays and layers that are wanted, in two or three rounds: each says where the next one lies."""
        header, record = self._mirror.header, self._record
        specs, every = part_specs(header, record), range(len(header.layers))
        names = [*sample_names(specs), *layered_names(header)] if want.names is None else list(want.names)
        names = [name for name in names if specs[name].size_bytes]
        sharded = [name for name in names if specs[name].sharded]
        if header.is_ragged and sharded and specs["kept"].size_bytes:
            sharded = ["kept", *(name for name in sharded if name != "kept")]  # says where the entries of a layer are
        for name in (name for name in names if not specs[name].sharded):
            self.whole(data_file_name(name, specs[name]))
        for name in sharded:
            self.index(name, specs[name])
        self.run()
        if "kept" in sharded:
            self.chunks("kept", specs["kept"], every)
            self.run()
        flat = [name for name in sharded if not specs[name].is_layered]
        for name in (name for name in sharded if name != "kept" and name not in flat):
            self.chunks(name, specs[name], want.layers)
        if flat and want.layers:
            kept_LT = read_layered(self._folder, specs, ["kept"], every)["kept"]
            for name in flat:
                self.stretch(name, specs[name], kept_LT, want.layers)
        self.run()

    def whole(self, file: str) -> None:
        self._want(file, (0, self._record.files[file].size))

    def index(self, name: str, spec: ArraySpec) -> None:
        """The index of a shard: made from `chunk_bytes` where the record has them, else fetched."""
        file = data_file_name(name, spec)
        size = self._record.files[file].size
        span = (size - shard_index_bytes(spec), size)
        if not self._held.missing(file, span):
            return
        if name not in self._record.chunk_bytes:
            self._want(file, span)
            return
        self._write(file, span, encode_index(self._record.chunk_bytes[name]))
        self._held.add(file, span, self._held.etags.get(file))

    def chunks(self, name: str, spec: ArraySpec, layers: Sequence[int]) -> None:
        """The chunks of these layer rows."""
        index = self._index_of(name, spec).reshape(*spec.grid[:2], -1, 2)
        for start, size in index[:, list(layers)].reshape(-1, 2).tolist():
            self._want(data_file_name(name, spec), (start, start + size))

    def stretch(self, name: str, spec: ArraySpec, kept_LT: np.ndarray, layers: Sequence[int]) -> None:
        """The chunks of a flat array that hold entries of these layer rows."""
        edges = np.concatenate([[0], np.cumsum(kept_LT.sum(1, dtype=np.int64))]).tolist()
        index, size, file = self._index_of(name, spec).reshape(-1, 2), spec.chunk[0], data_file_name(name, spec)
        # A reader looks at the head of the first chunk, whatever layers it wants.
        self._want(file, (0, min(BLOSC_HEADER, int(index[0, 1]))))
        for layer in layers:
            for block in range(edges[layer] // size, min(len(index), -(-edges[layer + 1] // size))):
                start, num_bytes = index[block].tolist()
                self._want(file, (start, start + num_bytes))

    def _index_of(self, name: str, spec: ArraySpec) -> np.ndarray:
        path = self._folder / data_file_name(name, spec)
        try:
            return read_index(path, spec)
        except ValueError as error:
            raise CacheCorruptError.at(path, f": {error}") from None

    def _want(self, file: str, span: Span) -> None:
        self._wanted[file] = part_cache.joined([*self._wanted.get(file, []), span])

    def run(self) -> None:
        """Fetch what is wanted and not there, several spans at a time, and note it."""
        spans = [
            (file, span)
            for file, wanted in self._wanted.items()
            for one in wanted
            for span in self._held.missing(file, one)
        ]
        self._wanted = {}
        if not spans:
            return
        folder = f"parts/{part_name(self._index)}"
        jobs = [(folder, self._digest, file, span, self._held.etags.get(file)) for file, span in spans]
        num_bytes = sum(span[1] - span[0] for _, span in spans)
        self._mirror.count(num_bytes)
        for (file, span), got in zip(spans, self._mirror.bring_all(jobs), strict=True):
            if self._held.etags.get(file) not in (None, got.etag):  # two spans of one round
                raise changed(self._mirror.url / folder / file)
            self._write(file, span, got.data)
            self._held.add(file, span, got.etag)
            expected = self._record.files[file]
            if span == (0, expected.size):
                check_content(self._folder / file, got.data, expected)
        part_cache.write_held(self._mirror.root, self._index, self._held)

    def _write(self, file: str, span: Span, data: bytes) -> None:
        """Put bytes in their place; where the disk is full, after others have made room."""
        for attempt in range(2):
            try:
                with part_cache.full_disk_is_told(len(data)), (self._folder / file).open("r+b", buffering=0) as opened:
                    written = 0
                    while written < len(data):
                        written += os.pwrite(opened.fileno(), data[written:], span[0] + written)
                return
            except OSError as error:
                if attempt or not io.is_disk_full(error) or not part_cache.make_room(0):
                    raise


def _lay_out(folder: Path, record: PartRecord) -> None:
    """Every file of the part at its size, with holes for what is not there."""
    for name, file in record.files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != file.size:  # a kill may have come in between
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as opened:
                opened.truncate(file.size)


def check_content(place: Path, data: bytes, expected: FileRecord | None) -> None:
    """CacheCorruptError unless these are the bytes that were written; None: nobody has noted them."""
    if expected is None:
        return
    if len(data) != expected.size:
        what = f": {len(data)} bytes, {expected.size} were written"
        raise CacheCorruptError.at(place, what, hint=DAMAGED_REMOTE)
    if (found := xxhash.xxh3_64_hexdigest(data)) != expected.xxh3:
        what = f": xxh3 is {found}, {expected.xxh3} was written"
        raise CacheCorruptError.at(place, what, hint=DAMAGED_REMOTE)
