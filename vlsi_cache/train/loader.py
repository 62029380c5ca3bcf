"""Endless micro-batches for training: records, encoded, in a shuffled order that can be taken up anywhere.

Legend: B rows, S positions, T response tokens, L layers, K kept entries.
"""

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlsi_cache.config.sections import Together
from vlsi_cache.config.training import BatchReduction
from vlsi_cache.data.collate import Batch, collate
from vlsi_cache.data.encoder import CONTRACT, Encoder
from vlsi_cache.data.pictures import Features
from vlsi_cache.data.preparing import EncodeAll, Preparer
from vlsi_cache.data.records import Record, RecordSet, units
from vlsi_cache.data.sequence import PADDED, Layout, sequences
from vlsi_cache.data.stored import names_of
from vlsi_cache.errors import CacheCorruptError, FingerprintMismatchError, command_line
from vlsi_cache.io import ahead
from vlsi_cache.processes import ALONE, Processes
from vlsi_cache.sparse.alm import Chunks
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.store.dataset import PartWindowReader, Pending, Units, units_per_part
from vlsi_cache.store.part import Row
from vlsi_cache.store.reader import Cache

from .aligned import AlignedRow

Pair = tuple[Record, Row | AlignedRow | None]
PREFETCHED_BATCHES = 4


class Sample(NamedTuple):
    """A record, its row if it comes from a cache, and the number of tokens at which its loss is taken."""

    record: Record
    row: Row | Pending | AlignedRow | None
    num_tokens: int

    @property
    def pair(self) -> Pair:
        """The record and its row, which is decoded here if it has not been."""
        return self.record, self.row.row() if isinstance(self.row, Pending) else self.row


@dataclass(frozen=True)
class MicroBatch:
    """Encoded records and, when they come from a cache, their sparse rows in the same token order.

    `share_T` is what each token counts for in the loss of the whole batch that this is a part of, float64: over the
    whole batch it sums to 1. `place` is that of the first sample in the whole batch. With `chunks` the student has
    another tokenizer than the teacher: the rows are those of the tokens that it names.
    """

    batch: Batch
    rows: SparseRows | None
    sample_ids: list[str]
    share_T: Tensor
    place: int = 0
    chunks: Chunks | None = None


def loss_shares(num_tokens: Sequence[int], in_batch: Sequence[int], reduction: BatchReduction) -> Tensor:
    """`MicroBatch.share_T` of samples with so many tokens, out of a whole batch of samples with `in_batch` tokens.

    They depend on the whole batch alone and not on how it is cut. Samples without tokens count for nothing.
    """
    if reduction == "token":
        total = sum(in_batch)
        shares = [1 / total if count else 0.0 for count in num_tokens]
    else:
        total = sum(count > 0 for count in in_batch)
        shares = [1 / (total * count) if count else 0.0 for count in num_tokens]
    return torch.repeat_interleave(torch.tensor(shares, dtype=torch.float64), torch.tensor(num_tokens))


def shuffled_records(
    records: Sequence[Record], num_tokens: Sequence[int], keep_together: Together, *, seed: int, num_skip: int = 0
) -> Iterator[Sample]:
    """All records, with their numbers of response tokens, in a new order every epoch, for ever, from the `num_skip`-th
    on; those that are kept together follow each other."""
    together = units(records, keep_together)
    # A resumed run begins in the middle of an epoch, at the sample where it stopped.
    epoch, start = divmod(num_skip, len(records))
    while True:
        shuffled = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(together))
        order = [index for number in shuffled for index in together[number]]
        for index in order[start:]:
            yield Sample(records[index], None, num_tokens[index])
        epoch, start = epoch + 1, 0


def cached_records(
    cache: Cache,
    records: RecordSet,
    *,
    layers: list[int],
    seed: int,
    window_parts: int,
    num_skip: int = 0,
    decode: bool = True,
) -> Iterator[Sample]:
    """Samples of the cache with their records, in the order of the window reader, for ever.

    Without `decode` a row is decoded when its sample is encoded, by a process that needs a share of them only.
    """
    by_id = match_records(cache, records)
    together = units_of(cache, by_id)
    epoch, start = divmod(num_skip, len(cache))
    order: Any = {"seed": seed, "window_parts": window_parts, "units": together}
    while True:
        reader = PartWindowReader(cache, layers=layers, epoch=epoch, start=start, **order)
        for one in reader.pending(decode=decode):
            # Without layers the loss is that of the labels, which all response tokens have.
            yield Sample(by_id[one.sample_id], one, one.num_tokens if layers else one.num_response_tokens)
        epoch, start = epoch + 1, 0


def units_of(cache: Cache, by_id: "Matched") -> Units:
    """The rows of every part that stay together, as the build has kept them (`data.keep_together`)."""
    found = units_per_part(cache)
    if (cache.header.spec.get("data") or {}).get("keep_together") != "prompt":
        return found
    table = cache.sample_table()
    ids_by_part: dict[int, list[str]] = {part: [] for part in found}
    for part, name in zip(table["part"].to_pylist(), table["id"].to_pylist(), strict=True):
        ids_by_part[part].append(name)
    return {part: units(by_id.records_of(names), "prompt") for part, names in ids_by_part.items()}


class Matched(Mapping[str, Record]):
    """The record of every cached sample; each is read anew when it is asked for, and none is held."""

    def __init__(self, records: RecordSet, places: dict[str, int]) -> None:
        self._records, self._places = records, places

    def __getitem__(self, sample_id: str) -> Record:
        return self._records[self._places[sample_id]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def records_of(self, sample_ids: Sequence[str]) -> Sequence[Record]:
        """The records of some samples, in their order; none is read."""
        return self._records.take(np.array([self._places[name] for name in sample_ids], np.int64)).records

    def place_of(self, sample_id: str) -> int:
        """The number of its record among all."""
        return self._places[sample_id]


def match_records(cache: Cache, records: RecordSet) -> Matched:
    """The record of every cached sample; raises FingerprintMismatchError when one is gone or has changed."""
    # Two sources of a merged cache may use one id for different rows: the content decides.
    by_content = {(name.id, name.digest): place for place, name in enumerate(names_of(records.records))}
    table, found = cache.sample_table(), dict[str, int]()
    for sample_id, digest in zip(table["id"].to_pylist(), table["digest"].to_pylist(), strict=True):
        place = by_content.get((sample_id, digest))
        if place is None:
            others = [place for (name, _), place in by_content.items() if name == sample_id]
            raise FingerprintMismatchError(_changed(cache, sample_id, digest, records[others[-1]] if others else None))
        if found.setdefault(sample_id, place) != place:
            raise CacheCorruptError(
                f"sample `{sample_id}` is more than once in {cache.path}, and ids must be unique over the whole cache; "
                f"run: {command_line('verify', cache.path)}"
            )
    return Matched(records, found)


def _changed(cache: Cache, sample_id: str, digest: str, record: Record | None) -> str:
    state = "is no longer in the data"
    if record is not None:
        state = f"has changed ({digest[:12]} when cached, {record.digest[:12]} now)"
    return (
        f"sample `{sample_id}` {state}: the data has changed since {cache.path} was built. "
        "Bring the data back, or bring the cache up to it with `vlsi-cache build-teacher --sync`"
    )


def _old_contract(contract: int) -> str:
    if contract >= CONTRACT:
        return ""
    return (
        ". An earlier release has built this cache: it read answers apart from what the chat template writes around "
        "them. Build it again"
    )


def check_response_ids(
    record: Record, response_ids: Iterable[int], row: Row, encoder: Encoder, *, contract: int = CONTRACT
) -> None:
    """The contract between teacher and student: the same response tokens, one by one."""
    cached = [int(token) for token in row.response_ids_R]
    fresh = [int(token) for token in response_ids]
    if cached == fresh:
        return
    pairs = zip(cached, fresh, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(cached), len(fresh)))
    teacher, student = (_token_at(ids, position, encoder) for ids in (cached, fresh))
    if cached[:-1] == fresh[:-1]:
        raise FingerprintMismatchError(
            f"the chat template of student `{encoder.name}` ends a turn with {student}, the teacher's with {teacher} "
            f"(sample `{record.id}`); give the student the teacher's chat template: copy its chat_template.jinja and "
            "name the same `eos_token` in tokenizer_config.json"
        )
    raise FingerprintMismatchError(
        f"sample `{record.id}`: response token {position} is {teacher} in the cache and {student} for this student; "
        "the student must use the teacher's tokenizer and write answers as its template does, and the data must be "
        f"what the cache was built from{_old_contract(contract)}"
    )


def _token_at(ids: Sequence[int], position: int, encoder: Encoder) -> str:
    if position >= len(ids):
        return f"missing (the response has {len(ids)} tokens)"
    return f"{ids[position]} `{encoder.token_texts([ids[position]])[0]}`"


class Feed:
    """Micro-batches encoded by a thread ahead of the training loop; `wait_s` is how long the loop waited for data.

    The records and rows of a whole batch are taken at once, since a token's share of the loss depends on all of them;
    encoded, with their pictures, are a few micro-batches only.
    """

    def __init__(
        self,
        samples: Iterator[Sample],
        encoder: Encoder,
        *,
        batch_size: int,
        micro_batch_size: int,
        reduction: BatchReduction,
        device: torch.device,
        layout: Layout = PADDED,
        features: Features | None = None,
        num_workers: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        """`num_workers` processes prepare the samples once there is enough to do, see `Preparer`.

        Of several `processes` of one launch each takes its own micro-batches of every batch, in turns.
        """
        self._samples, self._encoder, self._device = samples, encoder, device
        self._preparer = Preparer(encoder, num_workers, layout, features=features)
        self._options: Any = {"layout": layout, "encode_all": self._preparer.encode_all}
        self._batch_size, self._micro_batch_size = batch_size, micro_batch_size
        self._reduction: BatchReduction = reduction
        self._processes = processes
        self._ready: queue.Queue[MicroBatch | BaseException] = queue.Queue(PREFETCHED_BATCHES)
        self._stop = threading.Event()
        self.wait_s = 0.0
        self._thread = threading.Thread(target=self._work, name="vlsi-cache-feed", daemon=True)
        self._thread.start()

    def next(self) -> MicroBatch:
        started = time.monotonic()
        item = self._ready.get()
        self.wait_s += time.monotonic() - started
        if isinstance(item, BaseException):
            raise item
        batch = item.batch.to(self._device, non_blocking=True)
        return replace(item, batch=batch, share_T=item.share_T.to(self._device, non_blocking=True))

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batch(self) -> Iterator[MicroBatch]:
        """The next whole batch, or what of it is this process's."""
        for _ in range(self._batch_size // self._micro_batch_size // self._processes.world):
            yield self.next()

    def close(self) -> None:
        self._stop.set()
        with suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._thread.join()

    def _work(self) -> None:
        try:
            num_threads = self._preparer.num_threads
            with closing(ahead(self._encode, self._places(), num_ahead=num_threads, num_threads=num_threads)) as ready:
                while not self._stop.is_set():
                    self._put(next(ready))
        except BaseException as error:  # handed over to the loop, which raises it
            self._put(error)
        finally:
            self._preparer.close()
            close = getattr(self._samples, "close", None)
            if close is not None:
                close()

    def _places(self) -> Iterator[tuple[list[Sample], int] | BaseException]:
        """Records and rows of a whole batch, and where in it each micro-batch begins, for ever, or until an error."""
        rank, world = self._processes.rank, self._processes.world
        while True:
            try:
                # Pictures are decoded a micro-batch at a time.
                samples = self._sorted([next(self._samples) for _ in range(self._batch_size)])
            except BaseException as error:  # raised in its place: what comes before it is still good
                yield error
                return
            for place in list(range(0, self._batch_size, self._micro_batch_size))[rank::world]:
                yield samples, place

    def _sorted(self, samples: list[Sample]) -> list[Sample]:
        """The whole batch; where it is padded and not packed, with samples of similar length beside each other."""
        if self._options["layout"].row_width or len(samples) == self._micro_batch_size:
            return samples
        measured = self._encoder.measured(sample.record for sample in samples)
        runs = sequences([one.extent for one in measured], range(len(samples)), self._options["layout"])
        runs.sort(key=lambda run: -measured[run[-1]].num_tokens)  # stable, so the order is that of the seed
        return [samples[index] for run in runs for index in run]

    def _put(self, item: MicroBatch | BaseException) -> None:
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return

    def _encode(self, work: tuple[list[Sample], int] | BaseException) -> MicroBatch:
        """The micro-batch that begins at this place of a whole batch."""
        if isinstance(work, BaseException):
            raise work
        samples, place = work
        chosen = samples[place : place + self._micro_batch_size]
        micro = encode_pairs([sample.pair for sample in chosen], self._encoder, **self._options)
        in_batch = [sample.num_tokens for sample in samples]
        assert micro.batch.num_tokens == in_batch[place : place + len(chosen)]
        share_T = loss_shares(micro.batch.num_tokens, in_batch, self._reduction)
        if self._device.type != "cuda":
            return replace(micro, share_T=share_T, place=place)
        # From page-locked memory a copy stands in line behind the work that is queued already.
        return replace(micro, batch=micro.batch.pinned(), share_T=share_T.pin_memory(), place=place)


def encode_pairs(
    pairs: Sequence[Pair], encoder: Encoder, layout: Layout = PADDED, *, encode_all: EncodeAll | None = None
) -> MicroBatch:
    """Records and their rows as one batch on the CPU, at the tokens that have rows; the response ids are compared.

    `layout` as `Encoder.encode_all` has it; `encode_all` takes that one's place.
    """
    here = partial(encoder.encode_all, layout=layout)
    encoded = (encode_all or here)([record for record, _ in pairs])
    rows: list[Row] = []
    aligned: list[AlignedRow] = []
    for (record, row), span in zip(pairs, chain.from_iterable(one.spans for one in encoded), strict=True):
        if isinstance(row, AlignedRow):
            aligned.append(row)
        elif row is not None:
            check_response_ids(record, span.response_ids, row, encoder)
            rows.append(row)
    batch = collate(encoded, pad_id=encoder.pad_id, row_width=layout.row_width, marks_responses=layout.marks_responses)
    if aligned:
        return _aligned_batch(batch, aligned)
    if rows and rows[0].num_layers:
        batch = _tokens_with_rows(batch, rows)
    share_T = loss_shares(batch.num_tokens, batch.num_tokens, "token")
    return MicroBatch(batch, SparseRows.concat(rows) if rows else None, [record.id for record, _ in pairs], share_T)


def _aligned_batch(batch: Batch, aligned: Sequence[AlignedRow]) -> MicroBatch:
    """The batch at the tokens that are compared with something, in the student's tokens."""
    num_tokens = [len(row.tokens_T) for row in aligned]
    if num_tokens != batch.num_tokens:
        starts = np.cumsum([0, *batch.num_tokens[:-1]])
        index_T = np.concatenate([start + row.tokens_T for start, row in zip(starts, aligned, strict=True)])
        batch = batch.at(torch.from_numpy(index_T.astype(np.int64)), num_tokens)
    rows = [row.rows for row in aligned if row.rows is not None]
    pieces = [row.chunks for row in aligned if row.chunks is not None]
    return MicroBatch(
        batch,
        SparseRows.concat(rows) if rows else None,
        [row.sample_id for row in aligned],
        loss_shares(num_tokens, num_tokens, "token"),
        chunks=Chunks.concat(pieces, num_tokens) if pieces else None,
    )


def _tokens_with_rows(batch: Batch, rows: Sequence[Row]) -> Batch:
    """The batch at the response tokens that have rows: where teacher and student are compared."""
    # Token selection (`rows.select_tokens`) may have kept rows of some response tokens only.
    starts = np.cumsum([0, *batch.num_tokens[:-1]])
    index_T = np.concatenate([start + row.positions_T for start, row in zip(starts, rows, strict=True)])
    return batch.at(torch.from_numpy(index_T.astype(np.int64)), [row.num_tokens for row in rows])
