"""Stage build: the frozen teacher runs once over the data, and every (layer, response token) becomes a sparse row.

The data alone decides parts and batches, so a build that was killed repeats the same batches and writes the same
bytes. Samples are encoded, and finished parts are written, by threads while the teacher works.

Legend: T response tokens, L layers (intermediate targets, then the final layer), V vocabulary.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from functools import cache as remember
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.config.sections import DEFAULT_BATCH_TOKENS, CacheSpec
from vlsi_cache.config.spec import change
from vlsi_cache.data.collate import plan_batches, plan_parts
from vlsi_cache.data.encoder import CONTRACT, Encoder
from vlsi_cache.data.offsets import lengths_or_unknown
from vlsi_cache.data.records import units
from vlsi_cache.data.stored import content_digest
from vlsi_cache.errors import BatchTooLargeError, SpecError, command_line
from vlsi_cache.models.load import share_digests
from vlsi_cache.models.parallel import teacher_processes
from vlsi_cache.processes import Processes, launched
from vlsi_cache.progress import Bar, say
from vlsi_cache.runs.run_dir import spec_changes_note, versions
from vlsi_cache.sparse.rows import SparseRows, select_at_random, select_by_entropy
from vlsi_cache.store import reader
from vlsi_cache.store.format import HEADER_NAME, CacheHeader
from vlsi_cache.store.header import check_root, header_at, is_synced
from vlsi_cache.store.location import place_of
from vlsi_cache.store.reader import Cache, surprise_warning
from vlsi_cache.store.vocab_order import VocabOrder, VocabTexts, has_pieces, one_order, order_by_count
from vlsi_cache.store.writer import CacheWriter, PartSamples

from .forward import NO_PART, PartBatch, Teacher, load_teacher
from .group_writer import GroupWriter
from .inputs import TeacherInputs, open_teacher_inputs

# Uncompressed bytes of one kept entry, id and value: what `store.part_mib` counts.
BYTES_PER_ENTRY = {"default": 5, "exact": 8, "fast": 6}
BYTES_PER_SCALAR = 4
COUNTED_TOKENS = 2048  # response tokens whose rows decide the order of the vocabulary
GAIN = 1.05  # tokens per second that a batch of twice the size must bring
MOST_TOKENS = 1 << 18  # of a batch whose size is looked for

MadeBatch = tuple[PartBatch, list[SparseRows]]


def build_teacher(
    spec: CacheSpec, *, out: Path | str, device: str | None = None, rank: int = 0, world: int = 1
) -> Cache:
    """Build the cache of `spec` at `out`, a folder or a URL, or go on with it after a kill; a finished one is opened.

    Any number of processes may work on one `out`: process `rank` of `world` takes its own parts first, then whatever
    is missing. Under `torchrun` they are numbered by it, and each takes the GPU of its number; with
    `teacher.parallel: tensor` they work as one instead, and `rank` of `world` numbers whole launches. With
    `run.batch_tokens: auto` the first of them finds the number and records it, and all take that one.
    Raises FingerprintMismatchError when `out` holds a cache of something else, BatchTooLargeError, DiskFullError,
    DataError, ModelError.
    """
    out = place_of(out, "out")
    if not 0 <= rank < world:
        raise SpecError(f"rank {rank} of {world}: ranks go from 0 to {world - 1}")
    with teacher_processes(spec.teacher.parallel) as group:
        if group.world > 1:
            device = group.own_device(device, spec.run.device)
        elif world == 1:
            rank, world = launched()
            device = Processes(rank, world).own_device(device, spec.run.device)
        check_root(out)
        spec = group.from_first(lambda: as_begun(spec, out))
        inputs = open_for_all(spec, group)
        if group.from_first(lambda: _is_synced(inputs, out)):
            return reader.open(out)
        return _build(inputs, out, device=device, rank=rank, world=world, group=group)


def _build(inputs: TeacherInputs, out: Path, *, device: str | None, rank: int, world: int, group: Processes) -> Cache:
    """Build what is missing. All of a group come to every line here; what lies at `out` is looked at by its first."""
    spec, parts = inputs.spec, parts_of(inputs)
    # Loaded when it is first asked for, and once: a finished cache is opened without it.
    teacher = remember(lambda: load_teacher(inputs, device=device))

    def find() -> int:
        if group.world > 1:  # a process that runs out of memory would leave the others waiting
            raise SpecError("`run.batch_tokens: auto` cannot be found with `teacher.parallel: tensor`; name a number")
        return find_batch_tokens(teacher(), parts)

    batch_tokens = group.from_first(lambda: settled_batch_tokens(inputs, out, find))
    first_rows: list[MadeBatch] = []
    make_order = remember(lambda: order_of_first_rows(teacher, parts, batch_tokens, first_rows))
    if group.from_first(lambda: header_at(out) is None):
        teacher()  # a teacher that cannot be used leaves no cache folder behind
        if group.world > 1:  # all have to run the first rows, and the header is written by one
            make_order()
    writer = GroupWriter(
        lambda: CacheWriter.create_or_resume(
            out,
            cache_header(inputs, parts, batch_tokens),
            make_order,
            token_texts=lambda: vocab_texts(inputs.encoder),
        ),
        group,
        rank=rank,
        world=world,
    )
    # From here on the header is on the disk, and it counts: every later attempt must cut the same batches.
    planned = batch_tokens
    if spec.run.batch_tokens == "auto":  # another process may have been the first to record a number
        batch_tokens = int(writer.header.spec["run"]["batch_tokens"])
    if note := spec_changes_note(writer.header.spec, spec):
        say(note)
    missing = writer.missing_parts()
    if inputs.skipped:
        say(f"{len(inputs.skipped)} rows left out, listed with reasons in {out / 'cache.json'}")
    if missing:
        # The rows that gave the vocabulary order are the first batches of part 0, if they were cut as the header says.
        made = first_rows if missing[0] == 0 and batch_tokens == planned else []
        build_parts(teacher(), parts, missing, writer, batch_tokens, made)
    else:
        say(f"{out} is finished: all {len(parts)} parts are there; nothing to do")
    # Does nothing while another process still has parts to write: the last one finishes.
    writer.finish(is_new=bool(missing))
    cache = reader.open(out)
    if warning := surprise_warning(cache):
        say(f"warning: {warning}")
    return cache


def vocab_texts(encoder: Encoder) -> VocabTexts:
    """What the tokens say, for people, and which bytes they are, for students with other tokens."""
    table = encoder.token_bytes
    known = (None, None) if table is None else (table.pieces, table.kinds_V)
    return VocabTexts(encoder.token_texts(range(encoder.vocab_size)), *known)


def open_for_all(spec: CacheSpec, group: Processes) -> TeacherInputs:
    """The inputs of a build in every process of a group, which must all see the same."""
    inputs = group.first_before_others(lambda: open_teacher_inputs(spec))
    if group.world > 1:
        share_digests(inputs.model, group)
        # With another number of workers, samples are prepared another number of batches ahead, and the processes of a
        # group would not look at the disk at the same place of their work.
        facts = {"cache": fingerprint(inputs), "spec": spec.model_dump(mode="json")}
        group.check_same({**facts, "run.workers": spec.run.num_workers})
    return inputs


def _is_synced(inputs: TeacherInputs, out: Path) -> bool:
    """Whether the cache has followed its data, and has other parts than a build would make; it must have all rows."""
    header = header_at(out)
    if header is None or not is_synced(header):
        return False
    cache = reader.open(out, allow_incomplete=True)
    if not cache.is_complete or header.fingerprint != cache_header(inputs, []).fingerprint:
        again = command_line("build-teacher", "SPEC", "-o", out, "--sync")
        raise SpecError(f"`{out}` has followed its data with --sync, and does not fit it now; run: {again}")
    say(f"{out} is finished: it has all rows of the data; nothing to do")
    return True


def as_begun(spec: CacheSpec, out: Path) -> CacheSpec:
    """A cache that an earlier release has begun, which kept turns of a row together and nothing else, goes on so."""
    header = header_at(out)
    if header is not None and "keep_together" not in (header.spec.get("data") or {}):
        return change(spec, data=change(spec.data, keep_together="row"))
    return spec


def settled_batch_tokens(inputs: TeacherInputs, out: Path, find: Callable[[], int]) -> int:
    """The number the spec names; for `auto` the one that the cache has recorded, or else one found now."""
    if inputs.spec.run.batch_tokens != "auto":
        return inputs.spec.run.batch_tokens
    if (header := header_at(out)) is None:
        return find()
    recorded = int(header.spec["run"]["batch_tokens"])
    say(f"batch tokens: {recorded} (recorded in {out / HEADER_NAME})")
    return recorded


def find_batch_tokens(teacher: Teacher, parts: list[list[int]]) -> int:
    """The number for these parts on this machine; says which and why. Raises BatchTooLargeError if no sample fits.

    Each try runs the heaviest batch that the build itself would run. A GPU says when its memory is full, but a
    process that fills the memory of the host is killed: there nothing above the default of every build is tried.
    """
    inputs, layout = teacher.inputs, teacher.layout

    def speed(batch: list[int]) -> float:
        prepared = teacher.prepare(PartBatch(NO_PART, batch))  # not timed: a thread does it while the teacher works
        seconds = []
        for _ in range(2):  # the first run at a new size pays for memory and compilation
            started = time.monotonic()
            teacher.collect(teacher.launch(prepared))
            seconds.append(time.monotonic() - started)
        return sum(inputs.lengths(batch, layout)) / min(seconds)

    longest = max(inputs.lengths([i for part in parts for i in part], layout), default=1)
    number, reason = grow(
        lambda tokens: heaviest_batch(teacher, parts, tokens),
        speed,
        start=1 << math.ceil(math.log2(longest)),
        most=DEFAULT_BATCH_TOKENS if teacher.device.type == "cpu" else MOST_TOKENS,
    )
    say(f"batch tokens: {number} ({reason})")
    return number


def grow(
    heaviest: Callable[[int], list[int]], speed: Callable[[list[int]], float], *, start: int, most: int
) -> tuple[int, str]:
    """Double the tokens while the memory does and it pays; the last number that was good, and why no larger one."""
    number, batch = start, heaviest(start)
    if not batch:
        return number, "there is no data"
    tokens_per_s = speed(batch)
    while True:
        at, more = f"{tokens_per_s:.0f} tokens/s", heaviest(2 * number)
        if more == batch:
            return number, f"{at}; a larger one would not put more samples together"
        if 2 * number > most:
            return number, f"{at}; larger ones are not tried"
        try:
            faster = speed(more)
        except BatchTooLargeError:
            return number, f"{at}; {2 * number} is out of memory"
        if faster < GAIN * tokens_per_s:
            return number, f"{at}; {2 * number} is no faster ({faster:.0f} tokens/s)"
        number, batch, tokens_per_s = 2 * number, more, faster


def heaviest_batch(teacher: Teacher, parts: list[list[int]], batch_tokens: int) -> list[int]:
    """Of all batches that the build would run, the one with the most padded and response tokens."""
    inputs, layout = teacher.inputs, teacher.layout

    def num_tokens(batch: list[int]) -> int:
        return inputs.padded_tokens(batch, layout) + sum(len(inputs.response_ids[i]) for i in batch)

    batches = (batch.indices for batch in _batches(teacher, parts, list(range(len(parts))), batch_tokens))
    return max(batches, key=num_tokens, default=[])


def cache_header(inputs: TeacherInputs, parts: list[list[int]], batch_tokens: int | None = None) -> CacheHeader:
    """What `cache.json` says; `fingerprint` holds, field by field, everything that decides the bytes.

    `batch_tokens` is the number that was found, where the spec leaves it open.
    """
    run = inputs.spec.run.with_batch_tokens(batch_tokens or inputs.spec.run.num_batch_tokens)
    spec = inputs.spec.model_copy(update={"run": run})
    provenance = inputs.provenance or {}  # of `generate`, without the list of those it left out
    origin = {name: value for name, value in provenance.items() if name != "left_out"}
    return CacheHeader(
        created_by=f"vlsi-cache {versions()['vlsi-cache']}",
        spec=spec.model_dump(mode="json"),
        contract=CONTRACT,
        fingerprint=fingerprint(inputs),
        layers=inputs.layers,
        num_model_layers=inputs.num_model_layers,
        row_kind=spec.rows.kind,
        top_k=spec.rows.widths(len(inputs.layers)),
        truncated=spec.rows.kind == "sampled" or spec.rows.top_p is not None,
        tail_samples=0 if spec.rows.kind == "sampled" else spec.rows.tail_samples,
        taus=list(spec.rows.taus),
        vocab_size=inputs.encoder.vocab_size,
        profile=spec.store.profile,
        num_parts=len(parts),
        num_samples=len(inputs.records),
        num_response_tokens=sum(inputs.num_response_tokens),
        skipped=inputs.skipped,
        responses=[] if inputs.provenance is None else [origin],
    )


def fingerprint(inputs: TeacherInputs) -> dict[str, Any]:
    """Teacher weights (which hold the head), verbalizers, tokenizer and processor, data in order, and settings."""
    encoder = inputs.encoder.fingerprint()
    del encoder["contract"]  # which the header has by itself
    quantization = inputs.model.quantization
    return {
        "teacher.weights": inputs.weights_digest,
        **({} if quantization is None else {"teacher.quantization": quantization}),
        **{f"verbalizer.{layer}": digest for layer, digest in inputs.verbalizer_digests().items()},
        **{f"encoder.{key}": value for key, value in encoder.items()},
        "data.content": content_digest(inputs.records.records),
        "data.num_samples": len(inputs.records),
        "layers": inputs.layers,
        "v_real": inputs.encoder.vocab_size,
        **inputs.spec.fingerprint_fields(),
    }


def order_of_first_rows(
    teacher: Callable[[], Teacher], parts: list[list[int]], batch_tokens: int, made: list[MadeBatch]
) -> VocabOrder:
    """Ids by how often the teacher keeps them in the first batches of the first part, in each layer.

    Ids it does not keep there follow by their count in the data set's responses, then by id. Small places are what
    makes ids compress; the `fast` profile stores ids as they are. The batches are left in `made`.
    """
    inputs = teacher().inputs
    vocab_size, num_layers = inputs.encoder.vocab_size, len(inputs.layers)
    if inputs.spec.store.profile == "fast":
        return one_order(np.arange(vocab_size), num_layers)
    kept_LV = np.zeros((num_layers, vocab_size), np.int64)
    with closing(teacher().stream(_first_batches(teacher(), parts, batch_tokens))) as stream:
        for batch, found in stream:
            made.append((batch, found))
            for rows in found:
                for kept_V, ids_TK, logprobs_TK in zip(kept_LV, rows.ids_LTK, rows.logprobs_LTK, strict=True):
                    kept_V += np.bincount(ids_TK[np.isfinite(logprobs_TK)], minlength=vocab_size)
    said_V = np.bincount(np.concatenate([np.zeros(0, np.uint32), *inputs.response_ids]), minlength=vocab_size)
    return order_by_count(kept_LV, said_V)


def _first_batches(teacher: Teacher, parts: list[list[int]], batch_tokens: int) -> Iterator[PartBatch]:
    """As many of the first part's batches as have COUNTED_TOKENS response tokens."""
    num_tokens = 0
    for batch in _batches(teacher, parts, [0] if parts else [], batch_tokens):
        if num_tokens >= COUNTED_TOKENS:
            return
        num_tokens += sum(len(teacher.inputs.response_ids[i]) for i in batch.indices)
        yield batch


def build_parts(
    teacher: Teacher,
    parts: list[list[int]],
    missing: list[int],
    writer: GroupWriter,
    batch_tokens: int,
    made: list[MadeBatch],
) -> None:
    """Make and write the missing parts; the first batches of the first of them may have been `made` already."""
    inputs, says_bytes = teacher.inputs, has_pieces(writer.header)
    total = sum(inputs.num_response_tokens)
    left = sum(inputs.num_response_tokens[i] for part in missing for i in parts[part])
    found: dict[int, SparseRows] = {}  # of the part at work, by record
    with (
        Bar("build", unit="tok", total=total, done=total - left, scaled=True) as bar,
        writer.in_background() as queue,
        closing(
            teacher.stream(
                islice(_batches(teacher, parts, writer.still_missing(missing), batch_tokens), len(made), None)
            )
        ) as stream,
    ):
        for (part, indices), rows in chain(made, stream):
            # Batches are sorted by length, so records come in another order than their part has.
            found.update(zip(indices, rows, strict=True))
            bar.update(sum(one.num_tokens for one in rows))
            queue.check()  # a write that failed stops the build here and now, with its cause
            if len(found) == len(parts[part]):
                bar.note("waits for the disk" if queue.is_full else "")
                queue.put(part, part_samples(inputs, parts[part], found, says_bytes=says_bytes))
                found = {}


def part_samples(
    inputs: TeacherInputs, indices: list[int], found: dict[int, SparseRows], *, says_bytes: bool
) -> PartSamples:
    """What part of the records `indices` holds: the rows found for them, of the tokens that the spec selects.

    `says_bytes`: also how many bytes each response token is, which is of use where the vocabulary says its bytes too;
    one that an earlier release has begun does not.
    """
    rows = SparseRows.concat([found[index] for index in indices])
    positions = selected_positions(inputs, indices, rows)
    if positions is not None:
        starts = np.cumsum([0, *(len(inputs.response_ids[i]) for i in indices[:-1])])
        rows = rows.select_tokens(np.concatenate([start + at for start, at in zip(starts, positions, strict=True)]))
    return PartSamples(
        sample_ids=[inputs.records[i].id for i in indices],
        kinds=[inputs.records[i].kind for i in indices],
        digests=[inputs.records[i].digest for i in indices],
        response_ids=[inputs.response_ids[i] for i in indices],
        rows=rows,
        positions=positions,
        byte_lengths=lengths_or_unknown(
            inputs.encoder, [inputs.records[i] for i in indices], [inputs.response_ids[i] for i in indices]
        )
        if says_bytes
        else None,
    )


def selected_positions(inputs: TeacherInputs, indices: list[int], rows: SparseRows) -> list[np.ndarray] | None:
    """Response tokens of each record that keep their rows; None when all do."""
    rule = inputs.spec.rows.select_tokens
    lengths = [len(inputs.response_ids[i]) for i in indices]
    if rule.random is not None:
        names = [inputs.records[i].id for i in indices]
        chosen_T = select_at_random(names, lengths, share=rule.random, seed=inputs.spec.rows.seed)
    elif rule.entropy_above is not None or rule.entropy_top is not None:
        chosen_T = select_by_entropy(rows.entropy_LT[-1], above=rule.entropy_above, top=rule.entropy_top)
    else:
        return None
    return [np.flatnonzero(piece) for piece in np.split(chosen_T, np.cumsum(lengths)[:-1])]


def _batches(teacher: Teacher, parts: list[list[int]], chosen: Iterable[int], batch_tokens: int) -> Iterator[PartBatch]:
    """Records of some parts that go through the teacher together: planned from the data and the kind of the model
    alone, never across parts."""
    inputs, layout = teacher.inputs, teacher.layout
    for part in chosen:
        together = inputs.sequences(parts[part], layout)
        for batch in plan_batches(inputs.lengths(parts[part], layout), batch_tokens):
            yield PartBatch(part, [index for j in batch for index in together[j]])


def parts_of(inputs: TeacherInputs, chosen: Collection[int] | None = None) -> list[list[int]]:
    """The records of every part, all or the `chosen` ones; those that begin alike are in one."""
    together: Sequence[Sequence[int]] = units(inputs.records, inputs.spec.data.keep_together)
    if chosen is not None:
        wanted = set(chosen)
        together = [own for unit in together if (own := [index for index in unit if index in wanted])]
    return plan_parts(
        inputs.num_response_tokens,
        seed=inputs.spec.rows.seed,
        tokens_per_part=part_tokens(inputs),
        units=together,
    )


def part_tokens(inputs: TeacherInputs) -> int:
    """Response tokens of one part, so that its rows take about `store.part_mib` uncompressed."""
    rows, num_layers = inputs.spec.rows, len(inputs.layers)
    entries = sum(rows.widths(num_layers)) * BYTES_PER_ENTRY[inputs.spec.store.profile]
    scalars = num_layers * (rows.tail_samples + 3 + len(rows.taus)) * BYTES_PER_SCALAR
    per_token = (entries + scalars) * rows.select_tokens.expected_share
    return max(1, int(inputs.spec.store.part_mib * 2**20 / per_token))
