"""Writing a cache: any number of processes, killed at any moment, and nothing half-written is ever readable.

A part is written under `tmp/`, flushed, and renamed into `parts/`: the rename is the commit (FORMAT.md, "Commit").
`check_samples` is the last place where a wrong row can be stopped.
Shape suffixes: L layers, T response tokens with a row, K kept entries, m tail samples, n temperatures.
"""

import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vlsi_cache import io
from vlsi_cache.errors import DataError, list_problems
from vlsi_cache.sparse.rows import SparseRows

from . import table
from .arrays import BYTES_ARRAY, SUMMARY_ARRAYS, array_specs, part_file_names
from .codec import Arrays, write_arrays
from .encoding import encode_rows
from .files import (
    check_free_space,
    disk_full_is_an_error,
    hash_file,
    publish_dir,
    remove_dead_tmp,
    tmp_path,
    write_durable,
)
from .format import RECORD_NAME, TABLE_NAME, CacheHeader, PartRecord, list_parts, part_dir, response_digest, sealed_json
from .header import OrderOrMaker, TokenTexts, publish_header
from .location import UrlPath, place_of
from .vocab_order import VocabOrder

MAX_WAITING_PARTS = 2  # finished parts that wait for the disk before whoever makes them has to


@dataclass(frozen=True)
class PartSamples:
    """What goes into one part: samples in order, and their rows concatenated along the token axis.

    `positions` says which response tokens have a row; None: all of them. `byte_lengths` says how many bytes of its text
    every response token is, UNKNOWN_BYTES for all of a sample that does not know; None: no sample does. `rows` may be
    None where the layered arrays are given in their disk form.
    """

    sample_ids: list[str]
    kinds: list[str]
    digests: list[str]
    response_ids: list[np.ndarray]
    rows: SparseRows | None
    skipped: list[dict[str, Any]] = field(default_factory=list)
    positions: list[np.ndarray] | None = None
    byte_lengths: list[np.ndarray] | None = None

    @property
    def positions_or_all(self) -> list[np.ndarray]:
        if self.positions is not None:
            return self.positions
        return [np.arange(len(ids), dtype=np.uint32) for ids in self.response_ids]


class CacheWriter:
    """The writing side of one cache directory; make one with `create_or_resume`."""

    def __init__(self, root: Path, header: CacheHeader, vocab_order: VocabOrder) -> None:
        self.path = root
        self.header = header
        self.vocab_order = vocab_order
        self._place_of_id_LV = vocab_order.places_LV(header.id_dtype)

    @classmethod
    def create_or_resume(
        cls,
        path: str | Path,
        header: CacheHeader,
        vocab_order: OrderOrMaker,
        *,
        token_texts: TokenTexts = None,
    ) -> "CacheWriter":
        """Create the cache at `path`, a folder or a URL, or continue the one that is there.

        `vocab_order`, or a function that makes it when it is needed, turns token ids into small numbers; a cache that
        has one keeps it. `token_texts` makes the texts of the V tokens, for people. Raises
        FingerprintMismatchError with every differing field when the cache there is another one, SpecError when the
        directory is something else.
        """
        root = place_of(path)
        if isinstance(root, UrlPath):
            from .remote.upload import RemoteWriter

            return RemoteWriter.begin(root, header, vocab_order, token_texts)
        with disk_full_is_an_error(root, 0):
            stored, order = publish_header(root, header, vocab_order, token_texts)
            (root / "parts").mkdir(exist_ok=True)
        remove_dead_tmp(root)
        return cls(root, stored, order)

    def missing_parts(self, rank: int = 0, world: int = 1) -> list[int]:
        """Parts not yet committed: the own ones (p % world == rank) first, then those nobody has done so far."""
        done = self.done_parts()
        missing = [index for index in range(self.header.num_parts) if index not in done]
        own = [index for index in missing if index % world == rank]
        rest = [index for index in missing if index % world != rank]
        return own + [index for index in rest if index % world > rank] + [i for i in rest if i % world < rank]

    def done_parts(self) -> set[int]:
        """The parts that are committed, by whomever."""
        return set(list_parts(self.path))

    def has_part(self, index: int) -> bool:
        return part_dir(self.path, index).exists()

    def has_table(self) -> bool:
        """Whether the cache is finished."""
        return (self.path / TABLE_NAME).is_file()

    def write_part(self, index: int, samples: PartSamples) -> bool:
        """Commit part `index`; False when another process had committed it first.

        Raises DataError for rows that do not fit the header, DiskFullError when there is no room.
        """
        if not 0 <= index < self.header.num_parts:
            raise DataError(f"part {index} of `{self.path}`: the cache has parts 0 to {self.header.num_parts - 1}")
        if self.has_part(index):
            return False
        check_samples(self.header, index, samples)
        assert samples.rows is not None
        return self.write_encoded(index, samples, encode_rows(self.header, self._place_of_id_LV, samples.rows))

    def write_encoded(self, index: int, samples: PartSamples, layered: Arrays) -> bool:
        """Commit part `index` from layered arrays that are already in their disk form, layer axis first."""
        root, arrays = self.path, {**sample_arrays(samples), **layered}
        sizes = {"num_tokens": len(arrays["positions"]), "num_entries": int(arrays["ids"].size)}
        num_response = len(arrays["response_ids"])
        specs = array_specs(
            self.header,
            num_samples=len(samples.sample_ids),
            num_response=num_response,
            with_bytes=BYTES_ARRAY in arrays,
            **sizes,
        )
        need_bytes = sum(spec.size_bytes for spec in specs.values())
        check_free_space(root, need_bytes)
        with tmp_path(root, f"{index:06d}", ".zarr") as tmp, disk_full_is_an_error(root, need_bytes):
            files, chunk_bytes = write_arrays(tmp, arrays, specs)
            for name in part_file_names(specs) - set(files):
                files[name] = hash_file(tmp / name)
            record = PartRecord(
                cache_digest=self.header.digest,
                index=index,
                num_response_tokens=num_response,
                files=dict(sorted(files.items())),
                chunk_bytes=chunk_bytes,
                **sizes,
                **_describe(samples, arrays),
            )
            write_durable(tmp / RECORD_NAME, sealed_json(record.model_dump()))
            io.fsync_tree(tmp)
            return self._publish(tmp, index)

    def adopt_part(self, index: int, folder: Path, record: PartRecord) -> bool:
        """Commit part `index` with the files of another cache's part in `folder`, whose rows are stored alike.

        The files are linked where the disk can do that, else copied; only the commit record is new.
        """
        adopted = record.model_copy(update={"cache_digest": self.header.digest, "index": index})
        with tmp_path(self.path, f"{index:06d}", ".zarr") as tmp, disk_full_is_an_error(self.path, 0):
            # The record must not be a link: writing it would change that of the other cache.
            shutil.copytree(folder, tmp, copy_function=_link, ignore=shutil.ignore_patterns(RECORD_NAME))
            write_durable(tmp / RECORD_NAME, sealed_json(adopted.model_dump()))
            io.fsync_tree(tmp)
            return self._publish(tmp, index)

    def _publish(self, tmp: Path, index: int) -> bool:
        """Give the finished folder `tmp` its place; False when the place is taken."""
        return publish_dir(tmp, part_dir(self.path, index))

    def in_background(self) -> "PartQueue":
        """A queue that encodes and writes parts while the caller makes the next ones; use it as a context."""
        return PartQueue(self)

    def finish(self) -> bool:
        """When all parts are there, write `samples.parquet` and clean up; False while parts are missing."""
        if self.missing_parts():
            return False
        with disk_full_is_an_error(self.path, 0):
            table.write_table(self.path, self.header)
        remove_dead_tmp(self.path)
        return True


class PartQueue:
    """Parts on their way to the disk, at most `MAX_WAITING_PARTS` of them; leaving the context waits for all."""

    def __init__(self, writer: CacheWriter) -> None:
        self._writer = writer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vlsi-cache-write")
        self._waiting: deque[Future[bool]] = deque()

    def put(self, index: int, samples: PartSamples) -> None:
        """Hand over a part; waits while the queue is full. Raises what made an earlier write fail."""
        self.check()
        while len(self._waiting) >= MAX_WAITING_PARTS:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._writer.write_part, index, samples))

    def check(self) -> None:
        """Raise the error of a write that has failed; call it often, so that nobody works for a cache that is dead."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    @property
    def is_full(self) -> bool:
        """Whether `put` would have to wait for the disk."""
        return sum(not one.done() for one in self._waiting) >= MAX_WAITING_PARTS

    def __enter__(self) -> "PartQueue":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what was handed over even after an error of the caller: it is whole, and a resume need not redo it."""
        self._pool.shutdown(wait=True)
        if error is None:
            self.check()


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def sample_arrays(samples: PartSamples) -> Arrays:
    """The arrays without a layer axis."""
    positions = samples.positions_or_all
    lengths = samples.byte_lengths
    return {
        "offsets": _offsets([len(part) for part in positions]),
        "response_offsets": _offsets([len(ids) for ids in samples.response_ids]),
        "response_ids": _concat_u32(samples.response_ids),
        "positions": _concat_u32(positions),
        **({} if lengths is None else {BYTES_ARRAY: _concat_u32(lengths).astype(np.uint16)}),
    }


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _concat_u32(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(piece, np.uint32) for piece in pieces] or [np.empty(0, np.uint32)])


def _describe(samples: PartSamples, arrays: Arrays) -> dict[str, Any]:
    """The fields of part.json that follow from the samples."""
    offsets = arrays["offsets"]
    last = {name: arrays[name][-1].astype(np.float64) for name in ("entropy", "gold_logprob")}
    tail_LT = arrays.get("tail_mass", np.zeros_like(arrays["entropy"]))
    kept_T = 1.0 - tail_LT.astype(np.float64).mean(0)
    spans = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    summary = {"entropy": arrays["entropy"], "gold_logprob": arrays["gold_logprob"], "tail_mass": tail_LT}
    return {
        "sample_ids": list(samples.sample_ids),
        "kinds": list(samples.kinds),
        "digests": list(samples.digests),
        "sample_tokens": np.diff(offsets).tolist(),
        "sample_response_tokens": [len(ids) for ids in samples.response_ids],
        "response_xxh3": [response_digest(ids) for ids in samples.response_ids],
        "entropy_last": [_mean(last["entropy"][lo:hi]) for lo, hi in spans],
        "gold_logprob_last": [_mean(last["gold_logprob"][lo:hi]) for lo, hi in spans],
        "kept_mass": [_mean(kept_T[lo:hi]) for lo, hi in spans],
        "summary": {name: [_mean(row_T) for row_T in summary[name].astype(np.float64)] for name in SUMMARY_ARRAYS},
        "skipped": list(samples.skipped),
    }


def _mean(values: np.ndarray) -> float | None:
    mean = float(values.mean()) if values.size else float("nan")
    return mean if np.isfinite(mean) else None


def check_samples(header: CacheHeader, index: int, samples: PartSamples) -> None:
    """Everything that could put a wrong row on the disk, checked where the data enters."""
    problems = [*_id_problems(samples), *_shape_problems(header, samples)]
    if not problems:
        problems = _value_problems(header, samples)
    if problems:
        raise DataError(f"part {index} cannot be written:\n{list_problems(problems)}")


def _id_problems(samples: PartSamples) -> list[str]:
    ids, problems = samples.sample_ids, []
    if len(set(ids)) != len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})
        problems.append(f"sample ids occur twice: {twice[:3]}")
    for name in ids:
        try:
            name.encode()
        except UnicodeEncodeError:
            problems.append(f"sample id {name!r} is not valid unicode")
    return problems


def _shape_problems(header: CacheHeader, samples: PartSamples) -> list[str]:
    num = len(samples.sample_ids)
    columns = {"kinds": samples.kinds, "digests": samples.digests, "response_ids": samples.response_ids}
    if samples.positions is not None:
        columns["positions"] = samples.positions
    if samples.byte_lengths is not None:
        columns["byte_lengths"] = samples.byte_lengths
    problems = [f"{len(v)} `{name}` for {num} samples" for name, v in columns.items() if len(v) != num]
    num_rows = sum(len(part) for part in samples.positions_or_all)
    LT = (len(header.layers), num_rows)
    rows = samples.rows
    assert rows is not None
    width = min(rows.ids_LTK.shape[-1], header.widest) if header.truncated else header.widest
    expected = {
        "ids_LTK": (*LT, width),
        "logprobs_LTK": (*LT, width),
        "tail_ids_LTm": (*LT, header.tail_samples),
        "lse_LTn": (*LT, len(header.taus)),
        "entropy_LT": LT,
        "gold_logprob_LT": LT,
        "tail_mass_LT": LT,
    }
    found = {name: np.shape(getattr(rows, name)) for name in expected}
    return problems + [f"`{n}` is {found[n]}, the cache needs {s}" for n, s in expected.items() if found[n] != s]


def _value_problems(header: CacheHeader, samples: PartSamples) -> list[str]:
    assert samples.rows is not None
    problems = _width_problems(header, samples.rows)
    for name in ("ids_LTK", "tail_ids_LTm"):
        ids = getattr(samples.rows, name)
        if ids.size and (ids.min() < 0 or ids.max() >= header.vocab_size):
            problems.append(
                f"`{name}` holds {ids.min()} to {ids.max()}, the vocabulary is 0 to {header.vocab_size - 1}"
            )
    for name in ("logprobs_LTK", "lse_LTn", "entropy_LT", "gold_logprob_LT", "tail_mass_LT"):
        values = getattr(samples.rows, name)
        bad = np.isnan(values) if "logprob" in name else ~np.isfinite(values)  # a log-prob may be -inf
        if name.rpartition("_")[0] in header.lacks:
            bad &= ~np.isnan(values)
        if bad.any():
            token = int(np.nonzero(bad)[1].min())
            problems.append(f"`{name}` is not a number in sample {_sample_at(samples, token)!r}")
    for name, ids, lengths in zip(samples.sample_ids, samples.response_ids, samples.byte_lengths or (), strict=False):
        if len(lengths) != len(ids):
            problems.append(f"`byte_lengths` of sample {name!r} are {len(lengths)}, it has {len(ids)} response tokens")
    for name, ids, at in zip(samples.sample_ids, samples.response_ids, samples.positions_or_all, strict=True):
        if ids.size and (ids.min() < 0 or int(ids.max()) >= 2**32):
            problems.append(f"response ids of sample {name!r} do not fit uint32")
        if (
            samples.positions is not None
            and at.size
            and (np.any(np.diff(at) <= 0) or not 0 <= at[0] <= at[-1] < len(ids))
        ):
            problems.append(f"positions of sample {name!r} must ascend within its {len(ids)} response tokens")
    return problems


def _sample_at(samples: PartSamples, token: int) -> str:
    ends = np.cumsum([len(part) for part in samples.positions_or_all])
    return samples.sample_ids[int(np.searchsorted(ends, token, side="right"))]


def _width_problems(header: CacheHeader, rows: SparseRows) -> list[str]:
    logprobs_LTK = rows.logprobs_LTK
    problems = ["`logprobs_LTK` must be descending"] if (logprobs_LTK[..., 1:] > logprobs_LTK[..., :-1]).any() else []
    if header.row_kind == "sampled":
        shares_LT = np.exp(logprobs_LTK.astype(np.float64)).sum(-1)
        wrong_LT = np.abs(shares_LT - 1) > 1e-5
        return problems + [f"the shares of sampled rows must sum to 1, found {x}" for x in shares_LT[wrong_LT][:1]]
    wide = [row for row, k in enumerate(header.top_k) if np.isfinite(logprobs_LTK[row, :, k:]).any()]
    return problems + [f"layer {header.layers[row]} keeps more than its {header.top_k[row]} entries" for row in wide]
