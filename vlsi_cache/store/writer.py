"""Writing a cache: any number of processes, killed at any moment, and nothing half-written is ever readable.

A part is written under `tmp/`, flushed, and renamed into `parts/`: the rename is the commit (FORMAT.md, "Commit").
Shape suffixes: L layers, T response tokens with a row, K kept entries, m tail samples, n temperatures.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.errors import CacheCorruptError, DataError, FingerprintMismatchError, SpecError, list_problems
from vlsi_cache.sparse.levels import encode_levels
from vlsi_cache.sparse.rows import SparseRows

from . import arrays as zarr_side
from . import commit, table
from .arrays import Arrays
from .layout import (
    HEADER_NAME,
    IDENTITY_FIELDS,
    RECORD_NAME,
    SUMMARY_ARRAYS,
    CacheHeader,
    PartRecord,
    array_specs,
    hash_file,
    list_parts,
    load_header,
    part_dir,
    part_file_names,
    rank_table_digest,
    response_digest,
    sealed_json,
)

MAX_SHOWN = 120  # characters of a differing fingerprint value in a message


@dataclass(frozen=True)
class PartSamples:
    """What goes into one part: samples in order, and their rows concatenated along the token axis.

    `positions` says which response tokens have a row; None: all of them.
    """

    sample_ids: list[str]
    kinds: list[str]
    digests: list[str]
    response_ids: list[np.ndarray]
    rows: SparseRows
    skipped: list[dict[str, Any]] = field(default_factory=list)
    positions: list[np.ndarray] | None = None


class CacheWriter:
    """The writing side of one cache directory; make one with `create_or_resume`."""

    def __init__(self, root: Path, header: CacheHeader, id_of_rank: np.ndarray) -> None:
        self.path = root
        self.header = header
        self._rank_of_id = np.empty(header.v_real, header.id_dtype)
        self._rank_of_id[id_of_rank] = np.arange(header.v_real, dtype=header.id_dtype)

    @classmethod
    def create_or_resume(cls, path: str | Path, header: CacheHeader, id_of_rank: np.ndarray) -> "CacheWriter":
        """Create the cache at `path`, or continue the one that is there.

        `id_of_rank` [V] is the token id of every frequency rank, a permutation. Raises FingerprintMismatchError with
        every differing field when the cache there is another one, SpecError when the directory is something else.
        """
        root = Path(path)
        table_V = _checked_rank_table(id_of_rank, header.v_real)
        header = _as_stored(header.model_copy(update={"id_of_rank_xxh3": rank_table_digest(table_V)}))
        stored = _publish_header(root, header)
        (root / "parts").mkdir(exist_ok=True)
        commit.remove_dead_tmp(root)
        _publish_vocab(root, table_V)
        return cls(root, stored, table_V)

    def missing_parts(self, rank: int = 0, world: int = 1) -> list[int]:
        """Parts not yet committed: the own ones (p % world == rank) first, then those nobody has done so far."""
        done = set(list_parts(self.path))
        missing = [index for index in range(self.header.num_parts) if index not in done]
        own = [index for index in missing if index % world == rank]
        rest = [index for index in missing if index % world != rank]
        return own + [index for index in rest if index % world > rank] + [i for i in rest if i % world < rank]

    def write_part(self, index: int, samples: PartSamples) -> bool:
        """Commit part `index`; False when another process had committed it first.

        Raises DataError for rows that do not fit the header, DiskFullError when there is no room.
        """
        if not 0 <= index < self.header.num_parts:
            raise DataError(f"part {index} of `{self.path}`: the cache has parts 0 to {self.header.num_parts - 1}")
        if part_dir(self.path, index).exists():
            return False
        _check_samples(self.header, index, samples)
        return self.write_encoded(index, samples, encode(self.header, self._rank_of_id, samples))

    def write_encoded(self, index: int, samples: PartSamples, arrays: Arrays) -> bool:
        """Commit part `index` from arrays already in their disk form."""
        root = self.path
        num_rows, num_response = len(arrays["positions"]), len(arrays["response_ids"])
        specs = array_specs(self.header, len(samples.sample_ids), num_rows, num_response)
        need_bytes = sum(spec.size_bytes for spec in specs.values())
        commit.check_free_space(root, need_bytes)
        with commit.tmp_path(root, f"{index:06d}", ".zarr") as tmp, commit.disk_full_is_an_error(root, need_bytes):
            zarr_side.write_arrays(tmp, arrays, specs)
            files = {name: hash_file(tmp / name, fsync=True) for name in sorted(part_file_names(specs))}
            record = PartRecord(cache_digest=self.header.digest, index=index, files=files, **_describe(samples, arrays))
            commit.write_durable(tmp / RECORD_NAME, sealed_json(record.model_dump()))
            commit.fsync_tree_dirs(tmp)
            return commit.publish_dir(tmp, part_dir(root, index))

    def finish(self) -> bool:
        """When all parts are there, write `samples.parquet` and clean up; False while parts are missing."""
        if self.missing_parts():
            return False
        table.write_table(self.path, self.header)
        commit.remove_dead_tmp(self.path)
        return True


def encode(header: CacheHeader, rank_of_id: np.ndarray, samples: PartSamples) -> Arrays:
    """The arrays of a part in their disk dtype, layer axis first."""
    rows = samples.rows
    lengths = [len(ids) for ids in samples.response_ids]
    positions = samples.positions or [np.arange(length) for length in lengths]
    offsets = _offsets([len(part) for part in positions])
    arrays = {
        "offsets": offsets,
        "response_offsets": _offsets(lengths),
        "sample": np.repeat(np.arange(len(lengths), dtype=np.int64), np.diff(offsets)),
        "response_ids": _concat_u32(samples.response_ids),
        "positions": _concat_u32(positions),
        "ids": rank_of_id[rows.ids_LTK],
        "levels": encode_levels(rows.logprobs_LTK),
        "lse": np.asarray(rows.lse_LTn, np.float32),
        "entropy": np.asarray(rows.entropy_LT, np.float32),
        "gold_logprob": np.asarray(rows.gold_logprob_LT, np.float32),
        "tail_mass": np.asarray(rows.tail_mass_LT, np.float32),
    }
    if header.tail_samples:
        arrays["tail_ids"] = rank_of_id[rows.tail_ids_LTm]
    return arrays


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _concat_u32(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(piece, np.uint32) for piece in pieces] or [np.empty(0, np.uint32)])


def _describe(samples: PartSamples, arrays: Arrays) -> dict[str, Any]:
    """The fields of part.json that follow from the samples."""
    offsets = arrays["offsets"]
    last = {name: arrays[name][-1].astype(np.float64) for name in ("entropy", "gold_logprob")}
    spans = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    return {
        "num_tokens": len(arrays["positions"]),
        "num_response_tokens": len(arrays["response_ids"]),
        "sample_ids": list(samples.sample_ids),
        "kinds": list(samples.kinds),
        "digests": list(samples.digests),
        "sample_tokens": np.diff(offsets).tolist(),
        "sample_response_tokens": [len(ids) for ids in samples.response_ids],
        "response_xxh3": [response_digest(ids) for ids in samples.response_ids],
        "entropy_last": [_mean(last["entropy"][lo:hi]) for lo, hi in spans],
        "gold_logprob_last": [_mean(last["gold_logprob"][lo:hi]) for lo, hi in spans],
        "summary": {name: [_mean(row_T) for row_T in arrays[name].astype(np.float64)] for name in SUMMARY_ARRAYS},
        "skipped": list(samples.skipped),
    }


def _mean(values: np.ndarray) -> float | None:
    mean = float(values.mean()) if values.size else float("nan")
    return mean if np.isfinite(mean) else None


def _check_samples(header: CacheHeader, index: int, samples: PartSamples) -> None:
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
    problems = [f"{len(v)} `{name}` for {num} samples" for name, v in columns.items() if len(v) != num]
    num_rows = sum(len(part) for part in samples.positions or samples.response_ids)
    LT = (len(header.layers), num_rows)
    rows = samples.rows
    expected = {
        "ids_LTK": (*LT, header.top_k),
        "logprobs_LTK": (*LT, header.top_k),
        "tail_ids_LTm": (*LT, header.tail_samples),
        "lse_LTn": (*LT, len(header.taus)),
        "entropy_LT": LT,
        "gold_logprob_LT": LT,
        "tail_mass_LT": LT,
    }
    found = {name: np.shape(getattr(rows, name)) for name in expected}
    return problems + [f"`{n}` is {found[n]}, the cache needs {s}" for n, s in expected.items() if found[n] != s]


def _value_problems(header: CacheHeader, samples: PartSamples) -> list[str]:
    problems = []
    for name in ("ids_LTK", "tail_ids_LTm"):
        ids = getattr(samples.rows, name)
        if ids.size and (ids.min() < 0 or ids.max() >= header.v_real):
            problems.append(f"`{name}` holds {ids.min()} to {ids.max()}, the vocabulary is 0 to {header.v_real - 1}")
    for name in ("logprobs_LTK", "lse_LTn", "entropy_LT", "gold_logprob_LT", "tail_mass_LT"):
        values = getattr(samples.rows, name)
        bad = np.isnan(values) if "logprob" in name else ~np.isfinite(values)  # a log-prob may be -inf
        if bad.any():
            token = int(np.nonzero(bad)[1].min())
            problems.append(f"`{name}` is not a number in sample {_sample_at(samples, token)!r}")
    for name, ids, at in zip(
        samples.sample_ids, samples.response_ids, samples.positions or samples.response_ids, strict=True
    ):
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
    ends = np.cumsum([len(part) for part in samples.positions or samples.response_ids])
    return samples.sample_ids[int(np.searchsorted(ends, token, side="right"))]


def _checked_rank_table(id_of_rank: np.ndarray, v_real: int) -> np.ndarray:
    table_V = np.asarray(id_of_rank)
    if table_V.shape != (v_real,) or not np.array_equal(np.sort(table_V), np.arange(v_real)):
        raise SpecError(f"`id_of_rank` must be a permutation of 0 to {v_real - 1}, got shape {table_V.shape}")
    return table_V.astype(np.uint32)


def _as_stored(header: CacheHeader) -> CacheHeader:
    """The header after a trip through JSON, so that what is compared later is what a reader will see."""
    try:
        return CacheHeader.model_validate(json.loads(json.dumps(header.model_dump(), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise SpecError(f"the header of the cache cannot be written as JSON: {error}") from error


def _publish_header(root: Path, header: CacheHeader) -> CacheHeader:
    """Write `cache.json` unless there is one; the stored header, compared field by field."""
    path = root / HEADER_NAME
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        _refuse_foreign_directory(root)
        with commit.tmp_path(root, HEADER_NAME) as tmp, commit.disk_full_is_an_error(root, 0):
            commit.write_durable(tmp, sealed_json(header.model_dump()))
            commit.publish_new_file(tmp, path)
    stored = load_header(root)
    _compare(root, stored, header)
    return stored


def _refuse_foreign_directory(root: Path) -> None:
    """An existing folder may only hold what an interrupted start of a cache leaves: unfinished headers in `tmp/`."""
    found = set(os.listdir(root)) - {"tmp"}
    if (root / "tmp").is_dir():
        found |= {f"tmp/{name}" for name in os.listdir(root / "tmp") if not name.startswith(f"{HEADER_NAME}.")}
    if found and not (root / HEADER_NAME).exists():
        raise SpecError(
            f"`{root}` is not empty and not a cache: it holds {sorted(found)[:4]}; name a new folder for the cache"
        )


def _compare(root: Path, stored: CacheHeader, asked: CacheHeader) -> None:
    lines = _differences(stored.fingerprint, asked.fingerprint)
    lines += _differences(*({name: getattr(header, name) for name in IDENTITY_FIELDS} for header in (stored, asked)))
    if lines:
        raise FingerprintMismatchError(
            f"`{root}` was made from something else ({len(lines)} fields differ):\n"
            f"{list_problems(lines, limit=100)}\nname another folder, or go back to what the cache was made from"
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    lines = []
    for name in {**old, **new}:
        texts = [json.dumps(values[name], sort_keys=True) if name in values else "nothing" for values in (old, new)]
        if texts[0] != texts[1]:
            start = max(0, _first_difference(*texts) - MAX_SHOWN // 2)
            shown = [_excerpt(text, start) for text in texts]
            lines.append(f"`{name}`: the cache has {shown[0]}, this run has {shown[1]}")
    return lines


def _first_difference(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _excerpt(text: str, start: int) -> str:
    """At most MAX_SHOWN characters, chosen so that the place where two values part is among them."""
    end = start + MAX_SHOWN
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")


def _publish_vocab(root: Path, id_of_rank: np.ndarray) -> None:
    """Write `vocab/` unless it is there; its content follows from the header, so every process writes the same."""
    if not (root / "vocab").exists():
        commit.check_free_space(root, id_of_rank.nbytes)
        with commit.tmp_path(root, "vocab", ".zarr") as tmp, commit.disk_full_is_an_error(root, id_of_rank.nbytes):
            zarr_side.write_vocab(tmp, id_of_rank)
            for file in sorted(path for path in tmp.rglob("*") if path.is_file()):
                hash_file(file, fsync=True)
            commit.fsync_tree_dirs(tmp)
            commit.publish_dir(tmp, root / "vocab")
    found = rank_table_digest(zarr_side.read_vocab(root / "vocab", len(id_of_rank)))
    if found != rank_table_digest(id_of_rank):
        raise CacheCorruptError(
            f"`{root / 'vocab'}`: the table does not match cache.json; run: vlsi-cache repair {root}"
        )
