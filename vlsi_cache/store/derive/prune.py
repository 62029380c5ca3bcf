"""Prune: a smaller cache with fewer layers, samples, tokens or entries, and what that saves, known beforehand.

Shape suffixes: S samples, T response tokens with a row, V vocabulary.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args, overload

import numpy as np

from vlsi_cache.errors import SpecError
from vlsi_cache.progress import progress
from vlsi_cache.store.format import CacheHeader, list_parts
from vlsi_cache.store.header import check_root, lineage
from vlsi_cache.store.location import UrlPath, place_of
from vlsi_cache.store.part import Part
from vlsi_cache.store.reader import Cache, open
from vlsi_cache.store.vocab_order import VocabOrder, one_order
from vlsi_cache.store.writer import CacheWriter

from . import CachePath, check_room, check_target, open_source, token_texts
from .select import (
    PartTokens,
    SampleIds,
    TokenRule,
    choose_rows,
    choose_samples,
    earlier_cuts,
    ids_digest,
    parse_token_rule,
    read_part_tokens,
    read_sample_ids,
    refuse_unknown,
)
from .slice import Shares, Spent, cut_part, entry_share, join, spend


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


Profile = Literal["default", "exact", "fast"]
# the others would have to invent bits (default -> exact) or an order of the vocabulary (from fast)
CONVERSIONS = {("default", "fast"), ("exact", "default"), ("exact", "fast")}


@dataclass(frozen=True)
class PrunePlan:
    """What `prune` would do: what stays of how much, and about how many bytes that saves, by reason."""

    source: Path
    out: Path
    layers: list[int]
    dropped_layers: list[int]
    top_k: list[int]
    source_top_k: list[int]
    profile: str
    source_profile: str
    num_samples: int
    source_samples: int
    num_tokens: int
    source_tokens: int
    num_parts: int
    source_parts: int
    source_bytes: int
    estimated_bytes: int
    saved_bytes: dict[str, int]


@dataclass(frozen=True)
class Cuts:
    """What was asked for, checked against the source: layer rows and their widths, profile, samples, token rule.

    `named` is the same for people and for the fingerprint, without what changes nothing.
    """

    rows: list[int]
    widths: list[int]
    profile: Profile
    rule: TokenRule | None
    chosen_S: np.ndarray
    named: dict[str, Any]
    samples_file: str | None


@dataclass(frozen=True)
class Job:
    """A prune ready to run: the header and ranks of the target, and which source parts make up each of its parts."""

    plan: PrunePlan
    source: Cache
    header: CacheHeader
    vocab_order: VocabOrder
    rule: TokenRule | None
    chosen: dict[int, np.ndarray]
    groups: list[list[int]]
    group_bytes: list[int]


class Options(TypedDict, total=False):
    """What can be cut; see `prune`."""

    layers: Sequence[int | str] | None
    top_k: int | None
    samples: SampleIds | None
    min_kept_mass: float | None
    where: str | None
    tokens: str | None
    profile: Profile | None


@overload
def prune(
    cache: CachePath, out: str | os.PathLike[str], *, dry_run: Literal[False] = False, **options: Unpack[Options]
) -> Cache: ...


@overload
def prune(
    cache: CachePath, out: str | os.PathLike[str], *, dry_run: Literal[True], **options: Unpack[Options]
) -> PrunePlan: ...


def prune(
    cache: CachePath,
    out: str | os.PathLike[str],
    *,
    layers: Sequence[int | str] | None = None,
    top_k: int | None = None,
    samples: SampleIds | None = None,
    min_kept_mass: float | None = None,
    where: str | None = None,
    tokens: str | None = None,
    profile: Profile | None = None,
    dry_run: bool = False,
) -> Cache | PrunePlan:
    """Write a new cache at `out` that keeps less; run again with the same arguments, it continues.

    `layers` and `top_k` keep fewer rows and entries; `samples` (ids, or a file with one a line), `min_kept_mass` and
    `where` (`kind == "chart" and entropy > 0.5`) fewer samples; `tokens` (`entropy>0.5`, `top:0.3`, `random:0.2`) rows
    of fewer tokens; `profile` changes how values are stored. Ids and values that stay are slices of the stored ones
    (another profile aside); the mass of dropped entries joins `tail_mass`, and tail samples are redrawn so that they
    are again independent draws from everything outside the new top-k. With `dry_run` only the plan is made.
    """
    target = place_of(out, "out")
    check_root(target)
    source = open_source(cache)
    check_target(target, [source])
    cuts = read_cuts(
        source,
        layers=layers,
        top_k=top_k,
        samples=samples,
        min_kept_mass=min_kept_mass,
        where=where,
        tokens=tokens,
        profile=profile,
    )
    job = plan_prune(source, target, cuts)
    return job.plan if dry_run else run_prune(job)


def run_prune(job: Job) -> Cache:
    """Do what was planned; parts that are there are left alone."""
    source, out = job.source, job.plan.out
    if not isinstance(out, UrlPath):
        done = set(list_parts(out))
        check_room(out, sum(size for index, size in enumerate(job.group_bytes) if index not in done))
    writer = CacheWriter.create_or_resume(out, job.header, job.vocab_order, token_texts=token_texts(source))
    generation = len(earlier_cuts(source.header, "top_k"))
    for index in progress(writer.missing_parts(), "prune", unit="part", delay=2):
        if writer.has_part(index):  # another process was faster
            continue
        pieces = []
        for number in job.groups[index]:
            part, chosen_S = source.part(number, job.header.layers, keep=False), job.chosen[number]
            rows_T = choose_rows(source.header, job.rule, _tokens_of(part), chosen_S)
            pieces.append(cut_part(part, writer.header, rows_T, chosen_S, generation=generation))
        writer.write_encoded(index, *join(pieces, writer.header))
    writer.finish()
    return open(out)


def read_cuts(source: Cache, **options: Unpack[Options]) -> Cuts:
    """Check every option, and choose layers and samples. Raises SpecError for what cannot be done."""
    header, samples, tokens = source.header, options.get("samples"), options.get("tokens")
    rows = _kept_rows(header, options.get("layers"))
    widths = _widths(header, rows, options.get("top_k"))
    profile = _checked_profile(header, options.get("profile"))
    rule = None if tokens is None else parse_token_rule(tokens)
    refuse_unknown(source, ["entropy"] if rule is not None and rule.kind != "random" else [])
    ids = None if samples is None else read_sample_ids(samples)
    choice = {"min_kept_mass": options.get("min_kept_mass"), "where": options.get("where")}
    named = {
        "layers": [header.layers[row] for row in rows] if len(rows) < len(header.layers) else None,
        "top_k": options.get("top_k") if widths != [header.top_k[row] for row in rows] else None,
        "samples": None if ids is None else ids_digest(ids),
        **choice,
        "tokens": None if rule is None else rule.text,
        "profile": profile if profile != header.profile else None,
    }
    return Cuts(
        rows=rows,
        widths=widths,
        profile=profile,
        rule=rule,
        chosen_S=choose_samples(source, ids=ids, **choice),
        named={name: value for name, value in named.items() if value is not None},
        samples_file=os.path.abspath(samples) if isinstance(samples, str | os.PathLike) else None,
    )


def plan_prune(source: Cache, out: Path, cuts: Cuts, *, keep_parts: bool = False) -> Job:
    """Count and price what stays, and lay it out in parts. SpecError when nothing would change, or nothing be left.

    With `keep_parts` parts stay as they are, however small: shuffled readers then give samples in the source's order.
    """
    header, parts = source.header, source.parts
    part_S = source.sample_table()["part"].to_numpy()
    chosen = {index: cuts.chosen_S[part_S == index] for index in parts}
    num_tokens, spent = _price(source, cuts, chosen)
    _refuse_nothing(source, cuts, num_tokens)
    source_bytes = sum(source.bytes_by_array().values())
    metadata = (source_bytes - sum(one.left + sum(one.saved.values()) for one in spent)) // len(parts)  # of one part
    groups = group_parts([one.left for one in spent], source_bytes // len(parts) - metadata)
    groups = [[i] for i in range(len(parts))] if keep_parts else groups
    saved = {reason: sum(one.saved[reason] for one in spent) for reason in spent[0].saved}
    new = _pruned_header(source, cuts, num_parts=len(groups), num_tokens=num_tokens)
    plan = PrunePlan(
        source=source.path,
        out=out,
        layers=new.layers,
        dropped_layers=[layer for layer in header.layers if layer not in new.layers],
        top_k=new.top_k,
        source_top_k=header.top_k,
        profile=new.profile,
        source_profile=header.profile,
        num_samples=new.num_samples,
        source_samples=source.num_samples,
        num_tokens=num_tokens,
        source_tokens=source.num_tokens,
        num_parts=len(groups),
        source_parts=len(parts),
        source_bytes=source_bytes,
        estimated_bytes=sum(one.left for one in spent) + metadata * len(groups),
        saved_bytes={**saved, "parts": metadata * (len(parts) - len(groups))},
    )
    identity = one_order(np.arange(header.vocab_size), len(new.layers))
    return Job(
        plan=plan,
        source=source,
        header=new,
        vocab_order=identity if new.profile == "fast" else source.vocab_order.select(cuts.rows),
        rule=cuts.rule,
        chosen=chosen,
        groups=[[parts[i] for i in group] for group in groups],
        group_bytes=[sum(spent[i].left for i in group) + metadata for group in groups],
    )


def _kept_rows(header: CacheHeader, layers: Sequence[int | str] | None) -> list[int]:
    if isinstance(layers, str):
        raise SpecError(f'`layers` is the text "{layers}": give a list, such as [2, 4, "last"]')
    rows = sorted(set(header.layer_indices(layers)))
    if len(header.layers) - 1 not in rows:
        raise SpecError(f'the final layer {header.layers[-1]} always stays: add "last" to `layers`')
    return rows


def _widths(header: CacheHeader, rows: list[int], top_k: int | None) -> list[int]:
    """The new `top_k` of every layer that stays."""
    if top_k is not None and header.row_kind == "sampled":
        raise SpecError(
            f"top_k {top_k}: this cache keeps {header.widest} draws of every distribution, not its likeliest tokens; "
            "fewer of them would be biased, so build it again with a smaller `rows.num_draws`"
        )
    if top_k is not None and not 1 <= top_k <= header.widest:
        raise SpecError(f"top_k {top_k}: this cache keeps {header.widest}, so 1 to {header.widest} is possible")
    return [header.top_k[row] if top_k is None else min(top_k, header.top_k[row]) for row in rows]


def _checked_profile(header: CacheHeader, profile: str | None) -> Profile:
    if profile is None or profile == header.profile:
        return header.profile
    for name in get_args(Profile):
        if (header.profile, profile) in CONVERSIONS and name == profile:
            return name
    allowed = [new for old, new in sorted(CONVERSIONS) if old == header.profile]
    why = "`exact` needs bits that are not stored" if profile == "exact" else "it has no order of the vocabulary"
    raise SpecError(
        f"profile `{profile}`: this cache is `{header.profile}`, and "
        f"{f'can only become {allowed}' if allowed else 'cannot become another'}"
        f"{f'; {why}' if profile in get_args(Profile) else ''}"
    )


def _price(source: Cache, cuts: Cuts, chosen: dict[int, np.ndarray]) -> tuple[int, list[Spent]]:
    """How many rows stay, and the bytes of every part."""
    header, records = source.header, {index: source.part_record(index) for index in source.parts}
    entries = entry_share(header, list(records.values()), cuts.rows, cuts.widths)
    total, spent = 0, []
    for index, record in records.items():
        tokens_S, response_S = np.array(record.sample_tokens), np.array(record.sample_response_tokens)
        of_samples = int(tokens_S[chosen[index]].sum())
        left = of_samples
        if cuts.rule is not None:
            left = int(choose_rows(header, cuts.rule, read_part_tokens(source, index), chosen[index]).sum())
        shares = Shares(
            layers=len(cuts.rows) / len(header.layers),
            entries=entries,
            samples=float(chosen[index].sum()) / max(1, len(record.sample_ids)),
            rows=of_samples / max(1, record.num_tokens),
            responses=float(response_S[chosen[index]].sum()) / max(1, record.num_response_tokens),
            tokens=left / max(1, of_samples),
        )
        total += left
        spent.append(spend(header, record, shares, cuts.profile))
    return total, spent


def _refuse_nothing(source: Cache, cuts: Cuts, num_tokens: int) -> None:
    """A prune must leave something out, and something in."""
    asked = ", ".join(f"{name} {value}" for name, value in cuts.named.items())
    if not cuts.chosen_S.any():
        raise SpecError(f"nothing would be left of the {source.num_samples} samples of `{source.path}` ({asked})")
    if source.num_tokens and not num_tokens:
        raise SpecError(f"no row would be left of the {source.num_tokens} of `{source.path}` ({asked})")
    by_choice = cuts.named.keys() & {"layers", "top_k", "profile"}
    if not by_choice and cuts.chosen_S.all() and num_tokens == source.num_tokens:
        rows = f"all {len(source.layers)} layers, all {source.header.widest} entries and all {num_tokens} rows"
        raise SpecError(f"nothing to prune: {rows} would stay{f' ({asked})' if asked else ''}")


def _pruned_header(source: Cache, cuts: Cuts, *, num_parts: int, num_tokens: int) -> CacheHeader:
    """The source's header; its fingerprint says what was cut, by `prune.<number>.<what>`."""
    header, response_S = source.header, source.sample_table()["num_response_tokens"].to_numpy()
    number = 1 + max([int(name.split(".")[1]) for name in header.fingerprint if name.startswith("prune.")], default=0)
    fields = {"source": header.digest, **cuts.named}
    named = dict(cuts.named)
    if cuts.samples_file:
        named["samples"] = {**named["samples"], "file": cuts.samples_file}
    num_samples = int(cuts.chosen_S.sum())
    parent = lineage(
        source.path,
        header,
        "prune",
        cuts=named,
        num_samples=[source.num_samples, num_samples],
        num_tokens=[source.num_tokens, num_tokens],
    )
    changed = {
        "fingerprint": {**header.fingerprint, **{f"prune.{number}.{name}": value for name, value in fields.items()}},
        "layers": [header.layers[row] for row in cuts.rows],
        "top_k": cuts.widths,
        "profile": cuts.profile,
        "num_parts": num_parts,
        "num_samples": num_samples,
        "num_response_tokens": int(response_S[cuts.chosen_S].sum()),
        "parents": [parent],
    }
    # `created_by` is left out so that it becomes the program that prunes
    return CacheHeader(**{**header.model_dump(exclude={"created_by"}), **changed})


def _tokens_of(part: Part) -> PartTokens:
    """What a token rule looks at, of a part in memory."""
    arrays, record = part.arrays, part.record
    entropy_T = arrays["entropy"][-1]
    return PartTokens(
        record.sample_ids, record.sample_response_tokens, arrays["offsets"], arrays["positions"], entropy_T
    )
