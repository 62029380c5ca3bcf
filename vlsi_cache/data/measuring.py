"""How many tokens every sample has, and the ids of its response: measured once, and kept as a table (`table`).

The table is found by the contents of all samples and by everything that decides their tokens, so it is never out of
date. `max_length` and the model's positions are no part of it: which samples fit is decided anew each time.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, overload

import numpy as np
import pyarrow as pa

from vlsi_cache.config.sections import BadRows
from vlsi_cache.errors import DataError, RowError, list_problems
from vlsi_cache.progress import Bar, say

from . import table
from .encoder import CONTRACT, Encoder, Measured
from .records import Record, RecordSet
from .sequence import Extent
from .stored import Numbered, StoredRecords, names_digest
from .workers import Workers

TOGETHER = 512  # samples that a worker measures at once; all turns of a row are among them
FIRST_S = 2.0  # after so long it is clear how long the rest takes
WORTH_S = 15.0  # a rest for which workers are started: they load tokenizer and processor first
NOT_MEASURED = -1
SAMPLES = pa.schema(
    [("num_prompt", pa.int32()), ("num_shared", pa.int32()), ("response_ids", pa.large_list(pa.uint32()))]
)


class Responses(Sequence[np.ndarray]):
    """Response ids of many samples, uint32 [R] each: views of one array, which may be a mapped file."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray, index_N: np.ndarray) -> None:
        self._ids, self._starts, self._index_N = ids, starts, index_N

    def __len__(self) -> int:
        return len(self._index_N)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(index, slice):
            return Responses(self._ids, self._starts, self._index_N[index])
        place = self._index_N[index]
        return self._ids[self._starts[place] : self._starts[place + 1]]

    @property
    def num_tokens_N(self) -> np.ndarray:
        """The length of each, int64 [N]."""
        return self._starts[self._index_N + 1] - self._starts[self._index_N]


class Extents(Numbered[Extent]):
    """Those of many samples, out of arrays int [N]."""

    def __init__(self, num_tokens_N: np.ndarray, num_shared_N: np.ndarray) -> None:
        self._num_tokens_N, self._num_shared_N = num_tokens_N, num_shared_N

    def __len__(self) -> int:
        return len(self._num_tokens_N)

    def _at(self, index: int) -> Extent:
        return Extent(int(self._num_tokens_N[index]), int(self._num_shared_N[index]))


@dataclass(frozen=True)
class MeasuredRows(Numbered[Measured]):
    """Samples that fit: their places among the records, int64 [N], and what was measured of each."""

    index_N: np.ndarray
    num_prompt_N: np.ndarray
    num_shared_N: np.ndarray
    response_ids: Responses

    def __len__(self) -> int:
        return len(self.index_N)

    @property
    def extents(self) -> Extents:
        return Extents(self.num_prompt_N + self.response_ids.num_tokens_N, self.num_shared_N)

    def _at(self, index: int) -> Measured:
        ids = self.response_ids[index].astype(np.int64)
        return Measured(int(self.index_N[index]), int(self.num_prompt_N[index]), ids, int(self.num_shared_N[index]))


def fit_rows(
    records: Sequence[Record],
    encoder: Encoder,
    max_length: int,
    *,
    max_positions: int | None = None,
    bad_rows: BadRows = "refuse",
    with_response: bool = True,
    num_workers: int = 0,
) -> tuple[MeasuredRows, list[dict[str, str]]]:
    """Measure all samples: those that fit, and the {id, reason} of those that do not.

    A row, or its prompt alone, fits in `max_length` tokens and in the model's `max_positions` (None: no end). No row is
    ever cut. What the chat template does with rows that a user may not expect is said once, with counts. Raises
    DataError if none fits, or (unless `bad_rows` is "list") if one cannot be encoded.
    """
    samples, about = measure_rows(records, encoder, with_response=with_response, num_workers=num_workers)
    for line in [*encoder.chat.remarks, *_counts(about["notes"], len(records))]:
        say(line)
    problems = {int(index): (text, reason) for index, text, reason in about["problems"]}
    num_prompt_N = samples.column("num_prompt").to_numpy()
    lists: Any = samples.column("response_ids")
    starts = lists.offsets.to_numpy()
    num_tokens_N = num_prompt_N + np.diff(starts)
    limit = min(max_length, max_length if max_positions is None else max_positions)
    fits_N = (num_prompt_N != NOT_MEASURED) & (num_tokens_N <= limit)
    skipped = []
    for index in np.flatnonzero(~fits_N).tolist():
        reason = too_long(int(num_tokens_N[index]), max_length, max_positions)
        reason = problems[index][1] if index in problems else reason
        skipped.append({"id": records[index].id, "reason": reason})
    if problems and bad_rows == "refuse":
        advice = "mend them, or leave them out with data.bad_rows: list"
        texts = [text for text, _ in problems.values()]
        raise DataError(f"{len(texts)} rows cannot be encoded for `{encoder.name}`; {advice}\n{list_problems(texts)}")
    index_N = np.flatnonzero(fits_N)
    if not len(index_N):
        lines = [f"row `{row['id']}`: {row['reason']}" for row in skipped]
        raise DataError(f"no row is left for `{encoder.name}` out of {len(skipped)}\n{list_problems(lines)}")
    # What a sample shares with one that is left out is nothing to those that stay.
    follows_N = np.diff(index_N, prepend=-1) == 1
    num_shared_N = np.where(follows_N, samples.column("num_shared").to_numpy()[index_N], 0)
    responses = Responses(lists.values.to_numpy(), starts, index_N)
    return MeasuredRows(index_N, num_prompt_N[index_N], num_shared_N, responses), skipped


def too_long(num_tokens: int, max_length: int, max_positions: int | None) -> str:
    """Why a row of so many tokens does not fit; "" if it does."""
    if num_tokens > max_length:
        return f"{num_tokens} tokens, data.max_length is {max_length}"
    if max_positions is not None and num_tokens > max_positions:
        return f"{num_tokens} tokens, the model has {max_positions} positions (`max_position_embeddings`)"
    return ""


def _counts(notes: dict[str, int], num_rows: int) -> list[str]:
    return [f"{count} of {num_rows} rows: {note}" for note, count in Counter(notes).most_common()]


def measure_rows(
    records: Sequence[Record], encoder: Encoder, *, with_response: bool = True, num_workers: int = 0
) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """The table of all samples (`num_prompt` is NOT_MEASURED for those that cannot be encoded), and about it: their
    `problems` as (index, message, reason), and `notes` with counts."""
    several = records.records if isinstance(records, RecordSet) else records
    key = _key(several, encoder, with_response=with_response)
    kept = table.find("tokens", key) if key else None
    if kept is None:
        started = time.monotonic()
        samples, about = _measure(several, encoder, with_response=with_response, num_workers=num_workers)
        if key and time.monotonic() - started >= table.WORTH_S:
            kept = table.keep("tokens", key, {"samples": samples}, about)
        if kept is None:
            return samples, about
    return kept.tables["samples"], kept.about


def _key(records: Sequence[Record], encoder: Encoder, *, with_response: bool) -> str:
    """What the tokens follow from; "" where that cannot be told, or nothing is kept."""
    deciding = encoder.deciding()
    if deciding is None or table.folder() is None:
        return ""
    libraries = {name: version(name) for name in ("transformers", "tokenizers", "jinja2")}
    facts = [names_digest(records), CONTRACT, libraries, deciding, with_response]
    return table.key_of(facts)


@dataclass
class _Gathered:
    """What was measured, in the order of the samples."""

    num_prompt: list[np.ndarray] = field(default_factory=list)
    num_shared: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    problems: list[tuple[int, str, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    num: int = 0

    def add(self, found: Iterable[Measured | RowError], notes: Counter[str]) -> None:
        """Samples that follow those before."""
        num_prompt, num_shared, ids = [], [], []
        for number, one in enumerate(found, start=self.num):
            is_bad = isinstance(one, RowError)
            if is_bad:
                self.problems.append((number, str(one), one.reason))
            num_prompt.append(NOT_MEASURED if is_bad else one.num_prompt)
            num_shared.append(0 if is_bad else one.num_shared)
            ids.append(np.zeros(0, np.uint32) if is_bad else one.response_ids.astype(np.uint32))
        self.num += len(ids)
        self.num_prompt.append(np.array(num_prompt, dtype=np.int32))
        self.num_shared.append(np.array(num_shared, dtype=np.int32))
        self.lengths.append(np.array([len(one) for one in ids], dtype=np.int64))
        self.ids.append(np.concatenate([np.zeros(0, np.uint32), *ids]))
        self.notes.update(notes)

    def join(self, other: "_Gathered") -> None:
        self.problems += [(self.num + number, text, reason) for number, text, reason in other.problems]
        for name in ("num_prompt", "num_shared", "lengths", "ids"):
            getattr(self, name).extend(getattr(other, name))
        self.notes.update(other.notes)
        self.num += other.num

    def tables(self) -> tuple[pa.RecordBatch, dict[str, Any]]:
        starts = np.concatenate([[0], *map(np.cumsum, [np.concatenate([np.zeros(0, np.int64), *self.lengths])])])
        ids = np.concatenate([np.zeros(0, np.uint32), *self.ids])
        columns = [
            pa.array(np.concatenate([np.zeros(0, np.int32), *self.num_prompt])),
            pa.array(np.concatenate([np.zeros(0, np.int32), *self.num_shared])),
            pa.LargeListArray.from_arrays(pa.array(starts.astype(np.int64)), pa.array(ids)),
        ]
        about = {"problems": self.problems, "notes": dict(self.notes)}
        return pa.RecordBatch.from_arrays(columns, schema=SAMPLES), about


def _measure(
    records: Sequence[Record], encoder: Encoder, *, with_response: bool, num_workers: int
) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """In this process, and in workers once it is clear that there is enough to do."""
    found, started = _Gathered(), time.monotonic()
    stretches = list(_stretches(records))
    state = (encoder, records, with_response)
    with Bar("measure rows", unit="row", total=len(records), delay=2) as bar:
        for number, (start, stop) in enumerate(stretches):
            elapsed = time.monotonic() - started
            left_s = elapsed * (len(records) - start) / max(1, start)
            is_worth_it = num_workers > 1 and elapsed > FIRST_S and left_s * (1 - 1 / num_workers) > WORTH_S
            if is_worth_it and encoder.can_be_sent and isinstance(records, StoredRecords) and records.can_be_sent:
                with Workers(num_workers, "measuring rows", state) as workers:
                    for one in workers.map(measure_stretch, stretches[number:]):
                        found.join(one)
                        bar.update(one.num)
                break
            found.join(measure_stretch(state, (start, stop)))
            bar.update(stop - start)
    return found.tables()


def measure_stretch(state: tuple[Encoder, Sequence[Record], bool], stretch: tuple[int, int]) -> _Gathered:
    """What is measured of the samples from one number up to another."""
    encoder, records, with_response = state
    encoder.notes.clear()
    found = _Gathered()
    chosen = map(records.__getitem__, range(*stretch))
    found.add(list(encoder.measure_all(chosen, with_response=with_response)), encoder.notes)
    encoder.notes.clear()
    return found


def _stretches(records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """Numbers of samples that are measured together: whole rows, since the turns of a row go on from each other."""
    begins = np.flatnonzero(records.starts_row()) if isinstance(records, StoredRecords) else None
    start, num = 0, len(records)
    while start < num:
        stop = num
        if begins is not None:
            later = begins[np.searchsorted(begins, start + TOGETHER) :]
            stop = int(later[0]) if len(later) else num
        yield start, stop
        start = stop
