"""Stage generate: the last assistant answer of every row becomes what a model says, and a cache is built over that.

With the teacher's own answers the teacher is never asked about what it would not say; with a student's, distillation
is on-policy without a teacher beside the student. Batches are planned from the data alone, their draws are keyed by
(seed, batch), and a finished batch is a file in `.NAME.work/` beside the output: a run that was killed goes on there
and ends in the same rows.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlsi_cache.data.records import Record, media_root, read_records, row_of, with_answer, write_rows
from vlsi_cache.data.sources import read_responses
from vlsi_cache.data.tokenize import Encoder, fit_rows
from vlsi_cache.errors import DataError, FingerprintMismatchError, SpecError, list_problems
from vlsi_cache.spec import CacheSpec
from vlsi_cache.store.commit import fsync_dir, fsync_tree, publish_new_file

from .loop import read_json, say, seed_step, write_atomically
from .responses import Decoding, Response, respond
from .runs import differences, locked, versions
from .speaker import Speaker, speaker_of

IDENTITY = ("weights", "settings", "encoder", "source_rows")  # what must be equal to go on with a work folder


@dataclass(frozen=True)
class _Job:
    """What is to be said by whom. An item is (record, number of the sample); a batch is some items."""

    out: Path
    speaker: Speaker
    encoder: Encoder
    records: list[Record]
    left_out: list[dict[str, str]]
    batches: list[list[tuple[int, int]]]
    decoding: Decoding
    num_samples: int
    max_length: int
    media_root: Path | None
    facts: dict[str, Any]

    @property
    def work(self) -> Path:
        return self.out.with_name(f".{self.out.name}.work")

    def batch_file(self, number: int) -> Path:
        return self.work / f"batch-{number:06d}.json"


def generate(
    spec: CacheSpec,
    *,
    out: Path | str,
    model: str = "teacher",
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    limit: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Write the rows of the spec's `data` with the responses of `model` to the Parquet file `out`, or go on with it.

    `model` is `teacher`, a distill run's folder (its student), or a model's folder or hub id. Temperature 0 takes the
    likeliest token. With several `num_samples` the rows' ids become `ID#0`, `ID#1`, ... Responses that do not end
    within `max_new_tokens`, are empty, or cannot be rows are left out and listed. Pictures that the rows name by path
    stay where they are.

    Returns what the file's metadata says: `model`, `weights`, `settings`, `source_rows` (their digest), `counts`,
    `left_out` ({id, reason}), `versions`, with such pictures `media_root`; and `path`. Raises SpecError, DataError
    (nothing is left), FingerprintMismatchError (`out` or its work folder is of something else), RunBusyError,
    ModelError.
    """
    decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    _check(Path(out), decoding, num_samples=num_samples, batch_size=batch_size)
    job = _plan(spec, Path(out), model, decoding, num_samples, batch_size=batch_size, seed=seed, limit=limit)
    if not _is_finished(job):
        job.work.mkdir(parents=True, exist_ok=True)
        with locked(job.work):
            if not _is_finished(job):  # by a process that was there before
                facts = _begin(job)
                _speak(job, seed=seed, device=device or spec.run.device)
                _write(job, facts)
    shutil.rmtree(job.work, ignore_errors=True)
    return {"path": str(job.out), **(read_responses(job.out) or {})}


def _check(out: Path, decoding: Decoding, *, num_samples: int, batch_size: int) -> None:
    if out.suffix != ".parquet":
        raise SpecError(f"cannot write {out}: the name must end in .parquet")
    if num_samples < 1 or batch_size < 1:
        raise SpecError(f"`num_samples` is {num_samples} and `batch_size` {batch_size}: both must be at least 1")
    if num_samples > 1 and not decoding.temperature:
        raise SpecError(
            f"`num_samples` is {num_samples}: without a `temperature` above 0 all of them would be the same"
        )


def _plan(
    spec: CacheSpec,
    out: Path,
    model: str,
    decoding: Decoding,
    num_samples: int,
    *,
    batch_size: int,
    seed: int,
    limit: int | None,
) -> _Job:
    """Read everything but the weights: prompts of similar length come together, all samples of one side by side."""
    speaker = speaker_of(spec, model)
    encoder, source = speaker.encoder(spec), read_records(spec.data, limit=limit)
    # Whether a row fits is decided by its prompt: the answer that it has goes.
    prompts = [with_answer(record, "?") for record in source]
    kept, too_long = fit_rows(prompts, encoder, spec.data.max_length, bad_rows=spec.data.bad_rows)
    order = sorted(kept, key=lambda row: (row[1], row[0]))
    items = [(index, number) for index, _, _ in order for number in range(num_samples)]
    settings = {
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "num_samples": num_samples,
        "max_new_tokens": decoding.max_new_tokens,
        "max_length": spec.data.max_length,
        "batch_size": batch_size,
        "seed": seed,
        "dtype": speaker.dtype,
    }
    return _Job(
        out=out,
        speaker=speaker,
        encoder=encoder,
        records=list(source),
        left_out=[*source.skipped, *too_long],
        batches=[items[start : start + batch_size] for start in range(0, len(items), batch_size)],
        decoding=decoding,
        num_samples=num_samples,
        max_length=spec.data.max_length,
        media_root=media_root(spec.data),
        facts={
            "model": speaker.path,
            "weights": speaker.digest(),
            "settings": settings,
            "encoder": encoder.fingerprint(),
            "source_rows": source.digest,
            "versions": versions(),
        },
    )


def _is_finished(job: _Job) -> bool:
    """Whether the output is there; raises when what is there is something else."""
    if not job.out.exists():
        return False
    there = read_responses(job.out) if job.out.is_file() else None
    if there is None:
        raise SpecError(f"{job.out} exists and was not written by `generate`; choose another name with -o")
    _refuse_other(job.out, there, job.facts, "choose another name with -o, or bring them back")
    say(f"{job.out} is finished; nothing to do")
    return True


def _begin(job: _Job) -> dict[str, Any]:
    """The facts of this job, those of the process that began it if there are some."""
    file = job.work / "plan.json"
    if not file.is_file():
        write_atomically(file, json.dumps(job.facts, indent=1))
    facts = read_json(file)
    advice = f"bring them back, choose another name with -o, or delete {job.work} to begin anew"
    _refuse_other(job.work, facts, job.facts, advice)
    return facts


def _refuse_other(path: Path, there: dict[str, Any], wanted: dict[str, Any], advice: str) -> None:
    problems = [line for key in IDENTITY for line in differences(there.get(key), wanted[key], key)]
    if problems:
        raise FingerprintMismatchError(f"{path} was made from something else; {advice}:\n{list_problems(problems)}")


def _speak(job: _Job, *, seed: int, device: str) -> None:
    """Generate what no earlier attempt has: one file a batch."""
    missing = [number for number in range(len(job.batches)) if not job.batch_file(number).is_file()]
    if not missing:
        return
    loaded, done = job.speaker.load(device), len(job.batches) - len(missing)
    for number in tqdm(missing, desc="generate", unit="batch", initial=done, total=len(job.batches), disable=None):
        seed_step(seed, "generate", number)
        records = [job.records[index] for index, _ in job.batches[number]]
        responses = respond(loaded, job.encoder, records, job.decoding)
        lines = [{"ids": one.ids, "ended": one.ended} for one in responses]
        write_atomically(job.batch_file(number), json.dumps(lines))


def _write(job: _Job, facts: dict[str, Any]) -> None:
    """Judge all responses and write those that can be rows, in the order of the source."""
    said = dict(_said(job))
    rows: list[Record] = []
    left_out = list(job.left_out)
    num_changed = 0
    for index, number in sorted(said):
        record = job.records[index]
        named = replace(record, id=f"{record.id}#{number}") if job.num_samples > 1 else record
        row, ids, reason = _judge(job, named, said[index, number])
        if row is None:
            left_out.append({"id": named.id, "reason": reason})
        else:
            rows.append(row)
            num_changed += ids != said[index, number].ids
    if not rows:
        shutil.rmtree(job.work)  # nothing in it is of use to another attempt
        problems = [f"row `{one['id']}`: {one['reason']}" for one in left_out]
        raise DataError(
            f"none of {len(said)} responses can be used, so nothing was written:\n{list_problems(problems)}"
        )
    counts = {"source_rows": len(job.records), "generated": len(said), "written": len(rows)}
    counts |= {"left_out": len(left_out), "retokenised": num_changed}
    temporary = job.work / job.out.name
    about = {**facts, **_pictures(job), "counts": counts, "left_out": left_out}
    write_rows((row_of(row, media_root=job.media_root) for row in rows), temporary, responses=about)
    fsync_tree(job.work)
    if not publish_new_file(temporary, job.out):
        raise SpecError(f"{job.out} has come into being meanwhile; choose another name with -o")
    fsync_dir(job.out.parent)


def _pictures(job: _Job) -> dict[str, str]:
    """The folder that the rows' pictures lie below, where they name some by path."""
    has_paths = any(image.path is not None for record in job.records for image in record.images)
    return {"media_root": str(job.media_root)} if has_paths else {}


def _said(job: _Job) -> Iterator[tuple[tuple[int, int], Response]]:
    for number, items in enumerate(job.batches):
        for item, line in zip(items, json.loads(job.batch_file(number).read_bytes()), strict=True):
            yield item, Response(**line)


def _judge(job: _Job, record: Record, response: Response) -> tuple[Record | None, list[int], str]:
    """The row with this response and the ids that it is read as; or why it cannot be one."""
    if not response.ended:
        return None, [], f"no end of turn within {job.decoding.max_new_tokens} tokens"
    text = job.encoder.decode(response.ids)
    if not text.strip():
        return None, [], "the response is empty"
    row = with_answer(record, text)
    try:
        num_prompt, ids = job.encoder.measure(row)
    except DataError as error:
        return None, [], str(error).removeprefix(f"row `{record.id}`: ")
    num_tokens = num_prompt + len(ids)
    if num_tokens > job.max_length:
        return None, [], f"{num_tokens} tokens, data.max_length is {job.max_length}"
    return row, ids[:-1].tolist(), ""
