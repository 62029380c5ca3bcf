"""The rows that a model is measured on: what fits it, and batches of them, prepared while it works."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from vlsi_cache.config.sections import DataSpec
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.measuring import MeasuredRows, fit_rows
from vlsi_cache.data.preparing import Preparer
from vlsi_cache.data.records import Record, RecordSet
from vlsi_cache.data.sequence import Encoded, Layout
from vlsi_cache.errors import list_problems
from vlsi_cache.io import ahead
from vlsi_cache.models.load import ModelRef, max_positions
from vlsi_cache.processes import ALONE, Processes
from vlsi_cache.progress import say


@dataclass(frozen=True)
class HeldOut:
    """Rows that fit a model, as its encoder has them; `num_skipped` others were told and left out."""

    encoder: Encoder
    kept: MeasuredRows
    records: RecordSet
    num_skipped: int


def held_out(
    model: ModelRef, found: RecordSet, data: DataSpec, *, num_workers: int = 0, processes: Processes = ALONE
) -> HeldOut:
    """Measure the rows `found` for a model, without its weights: rows that cannot be read are told at once."""
    encoder = model.encoder(data.encoding())
    limits = {"max_length": data.max_length, "max_positions": max_positions(model.config)}
    # The others find the table of rows that the first one has made.
    kept, do_not_fit = processes.first_before_others(
        partial(fit_rows, found, encoder, **limits, bad_rows=data.bad_rows, num_workers=num_workers)
    )
    skipped = [*found.skipped, *do_not_fit]
    if skipped:
        reasons = [f"row `{row['id']}`: {row['reason']}" for row in skipped]
        say(f"{len(skipped)} held-out rows were left out\n{list_problems(reasons)}")
    return HeldOut(encoder, kept, found.take(kept.index_N), len(skipped))


def prepared(
    records: Sequence[Record], encoder: Encoder, batches: Sequence[list[int]], layout: Layout, *, num_workers: int = 0
) -> Iterator[list[Encoded]]:
    """The batches in order, prepared while the model works."""
    with Preparer(encoder, num_workers, layout) as preparer:
        chosen = ([records[i] for i in indices] for indices in batches)
        threads = preparer.num_threads
        with closing(ahead(preparer.encode_all, chosen, num_ahead=1 + threads, num_threads=threads)) as ready:
            yield from ready
