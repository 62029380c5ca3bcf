"""Every profile, row width and kind of row: what is read is what was written, by our reader and by plain zarr."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from helpers.caches import Case

from vlsi_cache.sparse.rows import truncate
from vlsi_cache.store import reader
from vlsi_cache.store.check import verify
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.store.writer import CacheWriter

PROFILES = ("default", "exact", "fast")


def build_with(root: Path, case: Case, header: CacheHeader) -> reader.Cache:
    writer = CacheWriter.create_or_resume(root, header, case.vocab_order)
    for index in writer.missing_parts():
        writer.write_part(index, case.parts[index])
    assert writer.finish()
    assert verify(root, deep=True).ok
    return reader.open(root)


def rank_table(case: Case, profile: str) -> Case:
    plain = replace(case, id_of_rank=np.arange(len(case.id_of_rank)), num_head=0)
    return plain if profile == "fast" else case


def narrowed(case: Case, widths_LT: list[np.ndarray]) -> Case:
    rng = np.random.default_rng(5)
    parts = []
    for part, kept_LT in zip(case.parts, widths_LT, strict=True):
        rows = truncate(part.rows, kept_LT, rng.random((*kept_LT.shape, case.num_tail)))  # type: ignore[arg-type]
        parts.append(replace(part, rows=rows))
    return replace(case, parts=parts)
