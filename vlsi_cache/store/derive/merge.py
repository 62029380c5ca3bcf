"""One cache out of several that hold different samples of one teacher. The sources are only read.

Shape suffixes: L layers, T response tokens with a row, V vocabulary.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from vlsi_cache.errors import DataError, FingerprintMismatchError, SpecError, first_of, list_problems
from vlsi_cache.progress import progress
from vlsi_cache.store.arrays import layered_names, value_array
from vlsi_cache.store.codec import Arrays
from vlsi_cache.store.encoding import by_layer
from vlsi_cache.store.format import CacheHeader, list_parts
from vlsi_cache.store.header import check_root, differences, identity_of, lineage, merged_responses
from vlsi_cache.store.location import UrlPath, place_of
from vlsi_cache.store.part import Part
from vlsi_cache.store.reader import Cache, open
from vlsi_cache.store.vocab_order import has_pieces
from vlsi_cache.store.writer import CacheWriter

from . import CachePath, check_room, check_target, open_source, token_texts
from .slice import in_memory, stored_samples

# fields of the fingerprint that only say which samples a cache holds, and from where
CHOICES = ("source", "samples", "min_kept_mass", "where")
OF_THE_SOURCE = ("num_parts", "num_samples", "num_response_tokens", "id_of_rank_xxh3")


@dataclass(frozen=True)
class MergePlan:
    """What `merge` would do."""

    sources: list[Path]
    out: Path
    layers: list[int]
    num_samples: int
    num_tokens: int
    num_parts: int
    reordered: list[Path]
    estimated_bytes: int


@overload
def merge(caches: Sequence[CachePath], out: str | os.PathLike[str], *, dry_run: Literal[False] = False) -> Cache: ...
@overload
def merge(caches: Sequence[CachePath], out: str | os.PathLike[str], *, dry_run: Literal[True]) -> MergePlan: ...
def merge(caches: Sequence[CachePath], out: str | os.PathLike[str], *, dry_run: bool = False) -> Cache | MergePlan:
    """Write a new cache at `out` with the samples of all `caches`, in this order; run again, it continues.

    They must hold different samples and come from the same teacher with the same settings; only their data may differ.
    Rows are stored as they are, their ids in the vocabulary order of the first cache. With `dry_run` only the plan is
    made. Raises FingerprintMismatchError with every field that differs, DataError for samples in two of the caches.
    """
    target = place_of(out, "out")
    check_root(target)
    sources = [open_source(cache) for cache in caches]
    if len(sources) < 2:
        raise SpecError(f"merge needs at least two caches, got {len(sources)}")
    check_target(target, sources)
    for source in sources[1:]:
        _check_alike(sources[0], source)
    _check_disjoint(sources)
    plan = _plan(sources, target)
    return plan if dry_run else _run(sources, plan)


def _run(sources: list[Cache], plan: MergePlan) -> Cache:
    homes = [(source, index) for source in sources for index in source.parts]
    if not isinstance(plan.out, UrlPath):
        done = set(list_parts(plan.out))
        check_room(plan.out, sum(_part_bytes(*home) for number, home in enumerate(homes) if number not in done))
    first = sources[0]
    # They have one vocabulary; a cache of an earlier release does not say which bytes its words are.
    knowing = next((source for source in sources if has_pieces(source.header)), first)
    writer = CacheWriter.create_or_resume(
        plan.out, _merged_header(sources), first.vocab_order, token_texts=token_texts(knowing)
    )
    maps = {source.path: _rank_map(source, writer) for source in sources}
    for number in progress(writer.missing_parts(), "merge", unit="part", delay=2):
        if writer.has_part(number):  # another process was faster
            continue
        source, index = homes[number]
        part = in_memory(source.part(index, keep=False))
        writer.write_encoded(number, stored_samples(part), _as_stored(part, maps[source.path]))
    writer.finish()
    return open(plan.out)


def _plan(sources: list[Cache], out: Path) -> MergePlan:
    order = sources[0].header.id_of_rank_xxh3
    return MergePlan(
        sources=[source.path for source in sources],
        out=out,
        layers=sources[0].layers,
        num_samples=sum(source.num_samples for source in sources),
        num_tokens=sum(source.num_tokens for source in sources),
        num_parts=sum(len(source.parts) for source in sources),
        reordered=[source.path for source in sources if source.header.id_of_rank_xxh3 != order],
        estimated_bytes=sum(sum(source.bytes_by_array().values()) for source in sources),
    )


def _part_bytes(source: Cache, index: int) -> int:
    return sum(file.size for file in source.part_record(index).files.values())


def _says_which_samples(field: str) -> bool:
    return field.startswith("data.") or (field.startswith("prune.") and field.rsplit(".", 1)[-1] in CHOICES)


def _check_alike(first: Cache, other: Cache) -> None:
    """Everything that decides a row must be equal."""
    pairs = [{k: v for k, v in one.header.fingerprint.items() if not _says_which_samples(k)} for one in (first, other)]
    names = (f"`{first.path}` has", f"`{other.path}` has")
    lines = differences(*pairs, names=names)
    lines += differences(*(identity_of(one.header, without=OF_THE_SOURCE) for one in (first, other)), names=names)
    if lines:
        raise FingerprintMismatchError(
            f"`{other.path}` cannot be merged into `{first.path}`: {len(lines)} fields differ beside the data:\n"
            f"{list_problems(lines, limit=100)}"
        )


def _check_disjoint(sources: list[Cache]) -> None:
    home: dict[str, Cache] = {}
    for source in sources:
        twice = [name for name in source if name in home]
        if twice:
            raise DataError(
                f"{len(twice)} samples are in both `{home[twice[0]].path}` and `{source.path}`: {first_of(twice)}; "
                "leave them out of one, with: vlsi-cache prune --where or --samples"
            )
        home |= dict.fromkeys(source, source)


def _merged_header(sources: list[Cache]) -> CacheHeader:
    """The first header; the fingerprint lists what each source says of its data under `data.sources`."""
    headers = [source.header for source in sources]
    first = headers[0]
    common = {name: value for name, value in first.fingerprint.items() if not _says_which_samples(name)}
    of_data = [
        {"digest": h.digest, **{name: value for name, value in h.fingerprint.items() if _says_which_samples(name)}}
        for h in headers
    ]
    num_samples = sum(source.num_samples for source in sources)
    changed: dict[str, Any] = {
        "fingerprint": {**common, "data.num_samples": num_samples, "data.sources": of_data},
        "num_parts": sum(header.num_parts for header in headers),
        "num_samples": num_samples,
        "num_response_tokens": sum(header.num_response_tokens for header in headers),
        "skipped": [row for header in headers for row in header.skipped],
        "responses": merged_responses(headers),
        "parents": [
            lineage(
                source.path,
                source.header,
                "merge",
                num_samples=source.num_samples,
                num_parts=len(source.parts),
                first_part=start,
            )
            for source, start in zip(sources, accumulate((len(s.parts) for s in sources), initial=0), strict=False)
        ],
    }
    return CacheHeader(**{**first.model_dump(exclude={"created_by"}), **changed})


def _rank_map(source: Cache, writer: CacheWriter) -> np.ndarray | None:
    """[L, V]: the new rank of every rank of `source`; None when it stays."""
    if source.vocab_order.digest == writer.vocab_order.digest:
        return None
    return by_layer(writer.vocab_order.places_LV(writer.header.id_dtype), source.vocab_order.ids_LV())


def _as_stored(part: Part, map_LV: np.ndarray | None) -> Arrays:
    """The layered arrays of a whole part as a writer takes them, ids by their place in the new order."""
    arrays = {name: part.arrays[name] for name in layered_names(part.header)}
    if map_LV is not None:
        for name in {"ids", "tail_ids"} & arrays.keys():
            rows = [map_V[ranks] for map_V, ranks in zip(map_LV, arrays[name], strict=True)]
            arrays[name] = rows if isinstance(arrays[name], list) else np.stack(rows)
    if part.header.is_ragged:
        for name in ("ids", value_array(part.header)):
            arrays[name] = np.concatenate(arrays[name])
    return arrays
