"""What a prune saves, estimated from the part records: bytes by reason, and how source parts make target parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .layout import CacheHeader, PartRecord
from .schema import VALUE_ARRAY, VALUE_DTYPE, layered_names, value_array

LEVEL_BYTES = 0.26  # of one entry in the `default` profile, compressed: measured on SmolLM2-135M at k = 64


@dataclass(frozen=True)
class Shares:
    """What stays of one part, from 0 to 1: first layers, then entries, then samples with their rows and responses, and
    of the rows that are left those of some tokens."""

    layers: float
    entries: float
    samples: float
    rows: float
    responses: float
    tokens: float


@dataclass(frozen=True)
class Spent:
    """Bytes of data files that are left of one part, and those saved by each reason (below 0: the profile takes more).

    Metadata is not among them: it is the same for a small part as for a large one.
    """

    left: int
    saved: dict[str, int]


def entry_share(header: CacheHeader, records: Sequence[PartRecord], rows: list[int], widths: list[int]) -> float:
    """Share of the entries of the layer rows `rows` that stay when each is cut to its width."""
    if not header.truncated:
        return sum(widths) / sum(header.top_k[row] for row in rows)
    cells = sum(record.num_tokens for record in records) * len(header.layers)
    mean_width = sum(record.num_entries for record in records) / max(1, cells)
    return float(np.clip(np.mean(widths) / max(1.0, mean_width), 0, 1)) if widths != header.top_k else 1.0


def spend(header: CacheHeader, record: PartRecord, shares: Shares, profile: str) -> Spent:
    """Price one part."""
    entries, layered, per_row, per_response, per_sample = _sizes(header, record)
    saved = {}
    saved["layers"] = (entries + layered) * (1 - shares.layers)
    entries, layered = entries * shares.layers, layered * shares.layers
    saved["entries"] = entries * (1 - shares.entries)
    entries *= shares.entries
    saved["samples"] = (entries + layered + per_row) * (1 - shares.rows) + per_response * (1 - shares.responses)
    saved["samples"] += per_sample * (1 - shares.samples)
    entries, layered, per_row = (size * shares.rows for size in (entries, layered, per_row))
    per_response, per_sample = per_response * shares.responses, per_sample * shares.samples
    saved["tokens"] = (entries + layered + per_row) * (1 - shares.tokens)
    entries, layered, per_row = (size * shares.tokens for size in (entries, layered, per_row))
    if profile != header.profile:
        share = shares.layers * shares.entries * shares.rows * shares.tokens
        after = _converted(header, record, entries, record.num_entries * share, profile)
        saved["profile"] = entries - after
        entries = after
    left = int(entries + layered + per_row + per_response + per_sample)
    return Spent(left, {reason: int(num_bytes) for reason, num_bytes in saved.items()})


def _sizes(header: CacheHeader, record: PartRecord) -> tuple[float, float, float, float, float]:
    """Bytes of: entries, other arrays with a layer axis, arrays by row, arrays by response token, arrays by sample."""
    by_array: dict[str, float] = {}
    for name, file in record.files.items():
        if "/c/" in name:
            by_array[name.split("/", 1)[0]] = file.size
    entries = sum(by_array.pop(name, 0.0) for name in ("ids", "kept", value_array(header)))
    layered = sum(by_array.pop(name, 0.0) for name in layered_names(header))
    per_row = by_array.pop("positions", 0.0)
    per_response = by_array.pop("response_ids", 0.0)
    return entries, layered, per_row, per_response, sum(by_array.values())


def _converted(header: CacheHeader, record: PartRecord, entry_bytes: float, num_entries: float, profile: str) -> float:
    """Bytes of the entries in another profile."""
    value = "counts" if header.row_kind == "sampled" else VALUE_ARRAY[profile]
    if profile == "fast":
        width = np.dtype(VALUE_DTYPE[value]).itemsize if value in VALUE_DTYPE else 1
        return num_entries * (header.id_dtype.itemsize + width)
    if value == "counts":
        return entry_bytes
    stored = sum(file.size for name, file in record.files.items() if name.startswith(f"{value_array(header)}/c/"))
    total = sum(file.size for name, file in record.files.items() if name.startswith(("ids/c/", "kept/c/"))) + stored
    return entry_bytes * (1 - stored / max(1, total)) + LEVEL_BYTES * num_entries


def group_parts(sizes: Sequence[int], target: int) -> list[list[int]]:
    """Runs of source parts whose bytes come to about `target` each: a part belongs where the middle of it falls."""
    total = max(1, sum(sizes))
    num_groups = max(1, round(total / max(1, target)))
    groups: list[list[int]] = []
    begin, last = 0, -1
    for index, size in enumerate(sizes):
        place = (2 * begin + size) * num_groups // (2 * total)
        if not groups or (size and last not in (-1, place)):
            groups.append([])
        groups[-1].append(index)
        begin, last = begin + size, place if size else last
    return groups
