"""Import: the distributions of another tool as a cache of one layer, the last, which every command reads as any other.

Nothing of a teacher is loaded. Sequences are read in their order and never held: first to see which samples of the data
they hold, then again for their rows, a part at a time. A part that is committed stays; the same command goes on.
Shape suffixes: T response tokens, K kept entries, V vocabulary.
"""

import hashlib
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vlsi_cache.config.sections import CacheSpec, DataSpec
from vlsi_cache.data.encoder import CONTRACT, READ_TOGETHER, Encoder
from vlsi_cache.data.measuring import fit_rows
from vlsi_cache.data.records import RecordSet, read_records
from vlsi_cache.data.stored import Names, names_of
from vlsi_cache.errors import DataError, SpecError
from vlsi_cache.io import refuse_url
from vlsi_cache.models.load import ModelRef, resolve_model
from vlsi_cache.progress import Bar, progress, say
from vlsi_cache.runs.run_dir import versions
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.store import reader
from vlsi_cache.store.format import CacheHeader, Lacking
from vlsi_cache.store.header import check_root
from vlsi_cache.store.location import place_of
from vlsi_cache.store.reader import Cache
from vlsi_cache.store.vocab_order import VocabOrder, one_order, order_by_count
from vlsi_cache.store.writer import CacheWriter, PartSamples

from .align import Found, Placed, Tokens, Unplaced, find_samples, place
from .axolotl import LOGPROBS, Axolotl
from .distillkit import DistillKit
from .sources import Format, Sequence, Source, digest_of_files
from .tables import name_of
from .targets import Evidence, as_rows
from .vllm import Vllm

BYTES_PER_ENTRY, BYTES_PER_TOKEN = 8, 16  # uncompressed, by which parts are cut
LAYER = 1  # the number of the one layer: how deep the teacher is, is not known
MOST_TOKENS = 1 << 24
NO_DATA = "none"  # a spec must name rows, and that of a cache without them leaves this out


@dataclass(frozen=True)
class Job:
    """An import, looked through: `parts` are the numbers of the sequences of each part, `lengths` the response tokens
    of every sample of the data (of every sequence, where there is no data)."""

    source: Source
    spec: CacheSpec
    encoder: Encoder
    records: RecordSet | None
    found: Found
    lengths: list[int]
    parts: list[list[int]]
    width: int
    parent: dict[str, Any]

    @property
    def is_ragged(self) -> bool:
        return self.found.least < self.width

    @property
    def lacks(self) -> list[Lacking]:
        return ["entropy", "lse"] if self.source.knows_gold else ["entropy", "gold_logprob", "lse"]

    def samples_of(self, number: int) -> list[int]:
        """Numbers of the samples of a sequence; without data it is one itself."""
        return self.found.of_sequence[number] if self.records is not None else [number]


def import_cache(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str,
    tokenizer: str | None = None,
    data: str | os.PathLike[str] | None = None,
    compression: str | os.PathLike[str] | None = None,
    logprobs_field: str = LOGPROBS,
    profile: str = "default",
) -> Cache:
    """Import the files at `path` into the cache `out`, a folder or a URL; run again after a crash, it goes on.

    `format` is `distillkit`, `axolotl` or `vllm`. `tokenizer` is a folder or hub id with the teacher's tokenizer and
    chat template. `data` are the chat rows that the teacher was given, by which students find their prompts; Axolotl's
    files are chat rows themselves. Without, every token but the first is a response token, and no student can learn
    from the cache. `compression` is a DistillKit capture's configuration, where it does not lie beside it;
    `logprobs_field` an Axolotl data set's column of log-probs. The rows lack what the files do not say: entropy and
    log-sum-exp, and, but for vLLM's, the log-prob of a token that a row does not keep. Raises SpecError, DataError.
    """
    refuse_url(path, "the source to import")
    target, folder = place_of(out, "out"), Path(path)
    check_root(target)
    if tokenizer is None:
        raise SpecError(
            "the size of the vocabulary is not known: these files do not say it. Name a folder or hub id with the "
            "teacher's tokenizer: --tokenizer ID"
        )
    source = open_foreign(folder, format, compression, logprobs_field)
    options = {"format": format, "tokenizer": tokenizer, "data": data, "compression": compression}
    options |= {"logprobs-field": logprobs_field if logprobs_field != LOGPROBS else None}
    options |= {"profile": profile if profile != "default" else None}
    cuts = {name: str(value) for name, value in options.items() if value is not None}
    parent = {"path": str(folder.resolve()), "operation": "import", "cuts": cuts}
    return run_import(
        look_through(source, target.name, tokenizer, data or _own_rows(source, folder), profile, parent), target
    )


def _own_rows(source: Source, path: Path) -> Path | None:
    return path if source.has_messages else None


def open_foreign(path: Path, format: str, compression: str | os.PathLike[str] | None, logprobs_field: str) -> Source:
    """The files of a format; SpecError for one that is not known, or an option that is not its own."""
    if format not in get_args(Format):
        raise SpecError(f"format `{format}`: what can be imported is {', '.join(get_args(Format))}")
    if compression is not None and format != "distillkit":
        raise SpecError(f"--compression is of DistillKit's captures, and does nothing with {format}")
    if logprobs_field != LOGPROBS and format != "axolotl":
        raise SpecError(f"--logprobs-field is of Axolotl's data sets, and does nothing with {format}")
    if format == "distillkit":
        return DistillKit(path, None if compression is None else Path(compression))
    return Axolotl(path, logprobs_field) if format == "axolotl" else Vllm(path)


def look_through(source: Source, name: str, tokenizer: str, data: Any, profile: str, parent: dict[str, Any]) -> Job:
    """Find the samples, and cut them into parts, in the order of the sequences."""
    encoder = ModelRef(resolve_model(tokenizer)).encoder()
    source.check_vocabulary(encoder.vocab_size)
    section = DataSpec(generator=NO_DATA) if data is None else DataSpec(path=os.path.abspath(data), bad_rows="list")
    if data is None:
        records, skipped = None, []
        found, lengths = all_sequences(source)
    else:
        rows = read_records(section, read_elsewhere=source.columns)
        kept, unfit = fit_rows(rows, encoder, MOST_TOKENS, bad_rows="list")
        records, lengths = rows.take(kept.index_N), kept.response_ids.num_tokens_N.tolist()
        found = find_samples(source, records, encoder)
        skipped = [*rows.skipped, *unfit, *found.left_out]
    # The token that stands there was the next likeliest one: vLLM adds it to as many as were asked for.
    width = found.least if source.knows_gold and found.width == found.least + 1 else found.width
    if not width:
        raise DataError(
            f"{name_of(source.files)} says no likeliest tokens: ask for some, as `prompt_logprobs: 64` does"
        )
    values = {
        "name": name,
        "teacher": {"model": str(Path(tokenizer).resolve()) if Path(tokenizer).is_dir() else tokenizer, "layers": []},
        "data": section,
        "rows": {"top_k": width, "tail_samples": 0},
        "store": {"profile": profile},
        "distill": {"recipe": "last"},
    }
    problem = "" if width <= encoder.vocab_size else f"rows of {width} entries, and {encoder.vocab_size} tokens"
    if problem:
        raise DataError(f"{name_of(source.files)} holds {problem}: name the teacher's own tokenizer")
    spec, parent = CacheSpec.model_validate(values), {**parent, "skipped": len(skipped)}
    job = Job(source, spec, encoder, records, replace(found, left_out=skipped), lengths, [], width, parent)
    return replace(job, parts=cut_into_parts(job))


def all_sequences(source: Source) -> tuple[Found, list[int]]:
    """Every sequence as a sample of its own, where there is no data to look for; and its response tokens."""
    lengths, width, least = list[int](), 1, MOST_TOKENS
    for sequence in progress(source.sequences(), "look for samples", unit="sequence", delay=2):
        if sequence.token_ids is None:
            raise SpecError(f"{sequence.where} does not say its tokens: name the rows that they are of with --data")
        lengths.append(_last_token(sequence) - 1)
        width, least = max(width, sequence.width), min(least, sequence.least)
    of_sequence: dict[int, list[int]] = {number: [] for number, length in enumerate(lengths) if length > 0}
    if not of_sequence:
        raise DataError(f"{name_of(source.files)} holds no sequence of more than one token")
    return Found(of_sequence, [], len(lengths), width, least), lengths


def _last_token(sequence: Sequence) -> int:
    """Behind the last token that has a row."""
    assert sequence.token_ids is not None
    return min(len(sequence.token_ids), (sequence.first or 0) + sequence.num_rows)


def cut_into_parts(job: Job) -> list[list[int]]:
    """Runs of sequences with about `store.part_mib` of rows each."""
    most = job.spec.store.part_mib * 2**20 / (job.width * BYTES_PER_ENTRY + BYTES_PER_TOKEN)
    parts: list[list[int]] = []
    num_tokens = 0
    for number in job.found.of_sequence:
        own = sum(job.lengths[index] for index in job.samples_of(number))
        if not parts or num_tokens + own > most:
            parts.append([])
            num_tokens = 0
        parts[-1].append(number)
        num_tokens += own
    return parts


def run_import(job: Job, out: Path) -> Cache:
    """Write the parts that are missing."""
    first: list[PartSamples] = []

    def make_order() -> VocabOrder:
        first.append(next(part_rows(job, [0])))
        return order_of(job, first[0])

    texts = job.encoder.token_texts
    writer = CacheWriter.create_or_resume(
        out, header_of(job), make_order, token_texts=lambda: texts(range(job.encoder.vocab_size))
    )
    missing = sorted(writer.missing_parts())
    made = first if missing[:1] == [0] else []
    rest = missing[len(made) :]
    left = sum(job.lengths[i] for part in missing for number in job.parts[part] for i in job.samples_of(number))
    total = sum(job.lengths[i] for part in job.parts for number in part for i in job.samples_of(number))
    with (
        Bar("import", unit="tok", total=total, done=total - left, scaled=True) as bar,
        closing(part_rows(job, rest)) as later,
        writer.in_background() as queue,
    ):
        for part, samples in zip(missing, chain(made, later), strict=True):
            queue.put(part, samples)
            bar.update(sum(map(len, samples.response_ids)))
    writer.finish()
    cache = reader.open(out)
    _tell(job, cache)
    return cache


def _tell(job: Job, cache: Cache) -> None:
    found, unused = job.found, job.found.num_sequences - len(job.found.of_sequence)
    skipped = len(found.left_out) + sum(len(cache.part_record(part).skipped) for part in cache.parts)
    if skipped:
        say(f"{skipped} rows left out, listed with reasons in {cache.path}")
    if skipped > len(cache):
        say(
            "warning: more rows are left out than are in the cache: is the tokenizer that of the teacher, with its "
            "chat template? Rows that fit by chance would be of other words"
        )
    if unused:
        say(f"{unused} of {found.num_sequences} sequences hold no sample of the data, or one that another one holds")
    say(f"not known of these rows: {', '.join(job.lacks)}; no tail samples, one layer: students learn with recipe last")


def header_of(job: Job) -> CacheHeader:
    """What `cache.json` says: what the source lacks, and from which files the rows are."""
    chosen = [index for part in job.parts for number in part for index in job.samples_of(number)]
    spec = job.spec.model_dump(mode="json")
    names: Iterable[Names] = []
    if job.records is None:
        del spec["data"]
    else:
        names = names_of(job.records.take(np.array(chosen)).records)
    files = digest_of_files(job.source.files.paths)
    encoder = job.encoder.fingerprint()
    del encoder["contract"]  # which the header has by itself
    fingerprint = {
        "import.format": job.source.format,
        "import.files": hashlib.sha256("\n".join(files).encode()).hexdigest(),
        **{f"import.{name}": value for name, value in job.source.facts.items()},
        **{f"encoder.{key}": value for key, value in encoder.items()},
        "data.content": hashlib.sha256("\n".join(f"{name.id} {name.digest}" for name in names).encode()).hexdigest(),
        "data.num_samples": len(chosen),
        "v_real": job.encoder.vocab_size,
        **{key: value for key, value in job.spec.fingerprint_fields().items() if key.startswith(("rows.", "store."))},
    }
    return CacheHeader(
        created_by=f"vlsi-cache {versions()['vlsi-cache']}",
        spec=spec,
        contract=CONTRACT,
        fingerprint=fingerprint,
        layers=[LAYER],
        num_model_layers=LAYER,
        top_k=[job.width],
        truncated=job.is_ragged,
        tail_samples=0,
        vocab_size=job.encoder.vocab_size,
        profile=job.spec.store.profile,
        num_parts=len(job.parts),
        num_samples=len(chosen),
        num_response_tokens=sum(job.lengths[index] for index in chosen),
        skipped=job.found.left_out,
        parents=[job.parent],
        lacks=job.lacks,
    )


def order_of(job: Job, samples: PartSamples) -> VocabOrder:
    """Ids by how often the rows of the first part keep them; the `fast` profile stores ids as they are."""
    vocab_size, rows = job.encoder.vocab_size, samples.rows
    assert rows is not None
    if job.spec.store.profile == "fast":
        return one_order(np.arange(vocab_size), 1)
    kept_V = np.bincount(rows.ids_LTK[np.isfinite(rows.logprobs_LTK)], minlength=vocab_size)
    said_V = np.bincount(np.concatenate(samples.response_ids), minlength=vocab_size)
    return order_by_count(kept_V[None], said_V)


def part_rows(job: Job, parts: list[int]) -> Generator[PartSamples, None, None]:
    """The rows of these parts, in one pass over the sequences from the first of them on."""
    if not parts:
        return
    start = job.parts[parts[0]][0]
    sequences = enumerate(job.source.sequences(start), start=start)
    for part in parts:
        wanted = set(job.parts[part])
        found = (next(one for number, one in sequences if number in wanted) for _ in range(len(wanted)))
        yield _part(job, job.parts[part], found)


def _part(job: Job, numbers: list[int], sequences: Iterator[Sequence]) -> PartSamples:
    evidence, places, rows = Evidence(job.source.rounding), list[str](), list[SparseRows]()
    part = PartSamples([], [], [], [], None)
    tokens = _tokens_of(job, numbers)
    for number, sequence in zip(numbers, sequences, strict=True):
        places.append(sequence.where)
        placed = list(_placed(job, number, sequence, tokens))
        part.skipped.extend(one._asdict() for one in placed if isinstance(one, Unplaced))
        good = [one for one in placed if isinstance(one, Placed)]
        top = sequence.rows(good[-1].token_ids) if good else None
        for one in good:
            assert top is not None
            mine = top.part(slice(one.first_row, one.first_row + len(one.response_ids)))
            rows.append(
                as_rows(
                    mine,
                    one.response_ids,
                    vocab_size=job.encoder.vocab_size,
                    width=job.width,
                    rounding=job.source.rounding,
                    where=f"{sequence.where}, sample `{one.id}`",
                )
            )
            evidence.add(rows[-1], one.response_ids)
            for column, value in zip(_columns(part), (one.id, one.kind, one.digest, one.response_ids), strict=True):
                column.append(value)
    if not rows:
        raise DataError(f"{places[0]} to {places[-1]}: no sample can be used; the first: {part.skipped[0]}")
    evidence.check(f"{places[0]} to {places[-1]}")
    return replace(part, rows=SparseRows.concat(rows))


def _columns(part: PartSamples) -> tuple[list[Any], ...]:
    return part.sample_ids, part.kinds, part.digests, part.response_ids


def _tokens_of(job: Job, numbers: list[int]) -> dict[int, Tokens]:
    """Of all samples of the data in these sequences, by their numbers."""
    if job.records is None:
        return {}
    chosen = [index for number in numbers for index in job.samples_of(number)]
    found: list[Tokens] = []
    for start in range(0, len(chosen), READ_TOGETHER):
        found += job.encoder.token_ids([job.records[index] for index in chosen[start : start + READ_TOGETHER]])
    return dict(zip(chosen, found, strict=True))


def _placed(job: Job, number: int, sequence: Sequence, tokens: dict[int, Tokens]) -> Iterator[Placed | Unplaced]:
    """The samples of a sequence; without data it is one itself, of all its tokens but the first."""
    if job.records is not None:
        chosen = job.samples_of(number)
        records, encoded = [job.records[index] for index in chosen], [tokens[index] for index in chosen]
        yield from place(sequence, records, encoded, job.encoder)
        return
    assert sequence.token_ids is not None
    token_ids = sequence.token_ids[: _last_token(sequence)]
    digest = hashlib.sha256(token_ids.tobytes()).hexdigest()
    yield Placed(sequence.where, "", digest, token_ids, 1, 1 - (sequence.first or 0))
