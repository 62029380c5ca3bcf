"""Sync: a finished cache follows its data. Rows that are new or have changed go through the teacher; the rest stays.

The new cache is made in `.NAME.sync` beside the old one, with the files of parts that stay as hard links, and takes the
old one's name in one step: whoever opens the name finds the old cache or the new one, and a kill loses nothing.

Shape suffixes: S samples of a part.
"""

from dataclasses import dataclass, replace
from functools import cache as remember
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.errors import (
    CacheIncompleteError,
    FingerprintMismatchError,
    SpecError,
    VlsiCacheError,
    command_line,
    list_problems,
)
from vlsi_cache.io import remove, replace_durably
from vlsi_cache.models.parallel import teacher_processes
from vlsi_cache.processes import Processes, launched
from vlsi_cache.progress import progress, say
from vlsi_cache.runs.run_dir import waiting_for
from vlsi_cache.store import reader
from vlsi_cache.store.derive import check_room, token_texts
from vlsi_cache.store.derive.slice import cut_part, join
from vlsi_cache.store.format import TABLE_NAME, CacheHeader, part_dir, response_digest
from vlsi_cache.store.header import OF_THE_DATA, differences, header_at, identity_of, is_synced
from vlsi_cache.store.location import UrlPath, place_of
from vlsi_cache.store.reader import Cache
from vlsi_cache.store.writer import CacheWriter

from .build import as_begun, build_parts, build_teacher, cache_header, open_for_all, parts_of
from .forward import load_teacher
from .group_writer import GroupWriter
from .inputs import TeacherInputs


@dataclass(frozen=True)
class Changes:
    """What of the data the cache does not have yet, and what it has too much.

    `kept`: of every part of the cache from which samples stay, which ones [S]. `new`: records without rows. `gone`:
    how many samples of the cache leave, those included that have changed and come back as new ones. `kinds`: of samples
    that stay and are of another kind now.
    """

    kept: dict[int, np.ndarray]
    new: list[int]
    gone: int
    kinds: dict[str, str]

    def kinds_of(self, names: list[str], kinds: list[str]) -> list[str]:
        """The kinds of these samples as the data has them now."""
        return [self.kinds.get(name, kind) for name, kind in zip(names, kinds, strict=True)]

    def __str__(self) -> str:
        whole = sum(chosen_S.all() for chosen_S in self.kept.values())
        return (
            f"{len(self.new)} rows go through the teacher, {self.gone} leave the cache; {whole} parts stay as they "
            f"are, {len(self.kept) - whole} lose some of their rows. Runs that were begun on the cache as it was "
            "cannot go on with it"
        )


@dataclass(frozen=True)
class Plan:
    """What a sync makes: the header of the new cache, the records of every part (none of those that stay), and why."""

    header: CacheHeader
    parts: list[list[int]]
    changes: Changes


def sync_cache(spec: CacheSpec, *, out: Path | str, device: str | None = None, rank: int = 0, world: int = 1) -> Cache:
    """Let the cache of `spec` at `out` follow its data, which has grown or changed since; run again, it goes on.

    A row is the same as before if its id, its content and its response tokens are; `rows.select_tokens` by a share of
    the part takes it of the new parts. Everything else of `spec` that decides a row must be what it was. Where there is
    no cache yet it is built; one that has all rows is opened. Several processes may work on one `out`, numbered as for
    `build_teacher`; with `teacher.parallel: tensor` those of a launch work as one.
    Raises FingerprintMismatchError for another teacher or other settings, CacheIncompleteError for a cache whose build
    has not ended, SpecError, and what a build raises.
    """
    out = place_of(out, "out")
    if not isinstance(out, UrlPath) and (out.is_symlink() or not out.name):
        out = out.resolve()  # a link stays, and what it names is replaced
    if isinstance(out, UrlPath):
        raise SpecError(f"`{out}` cannot be synced where it lies: pull it, sync the copy, and push that")
    with teacher_processes(spec.teacher.parallel) as group:
        if group.from_first(lambda: header_at(out) is None):
            return build_teacher(spec, out=out, device=device, rank=rank, world=world)
        if group.world > 1:
            device = group.own_device(device, spec.run.device)
        elif world == 1:
            rank, world = launched()
            device = Processes(rank, world).own_device(device, spec.run.device)
        inputs = open_for_all(group.from_first(lambda: as_begun(spec, out)), group)
        return _sync(inputs, out, device=device, rank=rank, world=world, group=group)


def _sync(inputs: TeacherInputs, out: Path, *, device: str | None, rank: int, world: int, group: Processes) -> Cache:
    """All of a group come to every line here; its first one looks at what lies at `out`, decides and writes."""
    opened: list[Cache] = []  # by the first process
    work = out.with_name(f".{out.name}.sync")

    def decide() -> Plan | None:
        opened.append(_opened(out))
        return _planned(opened[0], inputs, work)

    plan = group.from_first(decide)
    if plan is None:
        return reader.open(out)
    old = opened[0] if opened else None
    try:
        _make(plan, old, work / "cache", inputs, device=device, rank=rank, world=world, group=group)
        group.from_first(lambda: _take_place(work, opened[0]))
    except (OSError, VlsiCacheError):
        # Where another process has ended the sync, what this one was working on is gone.
        if not _is_there(out, plan.header):
            raise
    return reader.open(out)


def _planned(old: Cache, inputs: TeacherInputs, work: Path) -> Plan | None:
    """What there is to do; None where the cache has all rows of the data."""
    asked = cache_header(inputs, [])
    _check_same_rows(old, asked)
    changes = find_changes(old, inputs)
    # The same rows in another order are another fingerprint: then all parts stay, below a new header.
    if old.is_complete and old.header.fingerprint == asked.fingerprint and not changes.kinds:
        say(f"{old.path} has all rows of the data; nothing to do")
        remove(work)  # what a kill has left after the cache had taken its place
        return None
    say(f"sync of {old.path}: {changes}")
    parts = [[] for _ in changes.kept] + parts_of(inputs, changes.new)
    return Plan(_synced_header(old, inputs, parts, changes), parts, changes)


def find_changes(cache: Cache, inputs: TeacherInputs) -> Changes:
    """Compare the samples that the cache has with the records of the data, by id, content and response tokens."""
    wanted = {
        record.id: (record.digest, response_digest(ids))
        for record, ids in zip(inputs.records, inputs.response_ids, strict=True)
    }
    kinds = {record.id: record.kind for record in inputs.records}
    table = cache.sample_table()
    names, part_S = table["id"].to_pylist(), table["part"].to_numpy()
    facts = zip(table["digest"].to_pylist(), table["response_xxh3"].to_pylist(), strict=True)
    stays_S = np.array([wanted.get(name) == found for name, found in zip(names, facts, strict=True)], dtype=bool)
    there = {name for name, stays in zip(names, stays_S.tolist(), strict=True) if stays}
    kept = {part: stays_S[part_S == part] for part in cache.parts}
    return Changes(
        kept={part: chosen_S for part, chosen_S in kept.items() if chosen_S.any()},
        new=[index for index, name in enumerate(wanted) if name not in there],
        gone=int((~stays_S).sum()),
        kinds={
            name: kinds[name]
            for name, kind in zip(names, table["kind"].to_pylist(), strict=True)
            if name in there and kinds[name] != kind
        },
    )


def _opened(out: Path) -> Cache:
    """The cache as it is; parts that a synced one has lost are made again with what is new."""
    header = header_at(out)
    assert header is not None
    if is_synced(header):
        return reader.open(out, allow_incomplete=True)
    try:
        return reader.open(out)
    except CacheIncompleteError as error:
        command = command_line("build-teacher", "SPEC", "-o", out)
        hint = f"end its build first, with the data that it was begun with: {command}"
        raise CacheIncompleteError(f"`{out}` is not finished and cannot be synced", file=out, hint=hint) from error


def _check_same_rows(old: Cache, asked: CacheHeader) -> None:
    """Raise FingerprintMismatchError unless a row of the data would be what it is in the cache."""
    sides = [
        {
            name: value
            for name, value in {**header.fingerprint, **identity_of(header)}.items()
            if name not in OF_THE_DATA
        }
        for header in (old.header, asked)
    ]
    lines = differences(*sides)
    if lines:
        raise FingerprintMismatchError(
            f"`{old.path}` cannot be synced: its rows were made otherwise ({len(lines)} fields differ beside the "
            f"data):\n{list_problems(lines, limit=100)}\nname another folder for a new cache, or go back to what it "
            "was made from"
        )


def _synced_header(old: Cache, inputs: TeacherInputs, parts: list[list[int]], changes: Changes) -> CacheHeader:
    """That of a build over the data as it is now, which also says what the cache was before."""
    run, before = inputs.spec.run, old.header.spec.get("run") or {}
    recorded = int(before["batch_tokens"]) if run.batch_tokens == "auto" and "batch_tokens" in before else None
    state: dict[str, Any] = {
        "path": str(old.path.resolve()),
        "digest": old.header.digest,
        "operation": "sync",
        "content": old.header.fingerprint["data.content"],
        "num_samples": old.num_samples,
        "num_kept": sum(int(chosen_S.sum()) for chosen_S in changes.kept.values()),
        "num_added": len(changes.new),
    }
    return cache_header(inputs, parts, recorded).model_copy(update={"parents": [*old.header.parents, state]})


def _make(
    plan: Plan,
    old: Cache | None,
    root: Path,
    inputs: TeacherInputs,
    *,
    device: str | None,
    rank: int,
    world: int,
    group: Processes,
) -> None:
    """Write the new cache at `root`: first the parts that stay, whole or cut, then those of the new records.

    `old` is opened in the first process of the group alone, which writes.
    """

    def check() -> None:
        assert old is not None
        _discard_another(root, plan.header)
        check_room(root, _bytes_of_cut_parts(old, plan.changes))

    def begin() -> CacheWriter:
        assert old is not None
        return CacheWriter.create_or_resume(root, plan.header, old.vocab_order, token_texts=token_texts(old))

    def keep(writer: CacheWriter) -> None:
        assert old is not None
        _keep_parts(plan.changes, old, writer, missing)

    group.from_first(check)
    # Loaded before anything is written: a teacher that cannot be used leaves nothing behind.
    teacher = remember(lambda: load_teacher(inputs, device=device))
    if plan.changes.new:
        teacher()
    writer = GroupWriter(begin, group, rank=rank, world=world)
    missing = writer.missing_parts()
    writer.by_first(keep)
    if new := [index for index in missing if index >= len(plan.changes.kept)]:
        build_parts(teacher(), plan.parts, new, writer, int(plan.header.spec["run"]["batch_tokens"]), [])
    writer.finish()


def _keep_parts(changes: Changes, old: Cache, writer: CacheWriter, missing: list[int]) -> None:
    """Write those of the missing parts that stay: whole ones as hard links, others without the rows that leave."""
    sources = list(changes.kept.items())
    for index in progress([i for i in missing if i < len(sources)], "sync", unit="part", delay=2):
        number, chosen_S = sources[index]
        if writer.has_part(index):  # another process was faster
            continue
        if chosen_S.all():
            record = old.part_record(number)
            kinds = changes.kinds_of(record.sample_ids, record.kinds)
            writer.adopt_part(index, part_dir(old.path, number), record.model_copy(update={"kinds": kinds}))
            continue
        part = old.part(number, writer.header.layers, keep=False)
        rows_T = np.repeat(chosen_S, np.diff(part.arrays["offsets"]))
        samples, arrays = join([cut_part(part, writer.header, rows_T, chosen_S, generation=0)], writer.header)
        kinds = changes.kinds_of(samples.sample_ids, samples.kinds)
        writer.write_encoded(index, replace(samples, kinds=kinds), arrays)


def _discard_another(root: Path, header: CacheHeader) -> None:
    """What an interrupted sync has left for other data than this is of no use."""
    if (left := header_at(root)) is None or left.fingerprint == header.fingerprint:
        return
    say(f"an earlier sync was interrupted, and the data has changed since: what it had made in {root} is dropped")
    remove(root)


def _bytes_of_cut_parts(old: Cache, changes: Changes) -> int:
    cut = [part for part, chosen_S in changes.kept.items() if not chosen_S.all()]
    return sum(file.size for part in cut for file in old.part_record(part).files.values())


def _take_place(work: Path, old: Cache) -> None:
    """Give the new cache the name of the old one, where it is finished: the last of several processes does."""
    with waiting_for(work):
        made, now = header_at(work / "cache"), header_at(old.path)
        if made is None or not (work / "cache" / TABLE_NAME).is_file():
            return  # another process still has parts to write
        if now is None or now.digest != old.header.digest:
            raise SpecError(f"`{old.path}` has become another cache while it was synced; run the same command again")
        replace_durably(work / "cache", old.path)
        remove(work)


def _is_there(out: Path, header: CacheHeader) -> bool:
    now = header_at(out)
    return now is not None and now.fingerprint == header.fingerprint
