"""Generate: let the spec's teacher, a run's student or any other model answer the rows of a spec.

`respond` is the one place that calls `model.generate`, for `evaluate` too. The model's own distribution over the real
vocabulary is what is followed: the habits that a model folder brings along in its generation_config.json (top-k,
repetition penalty, ...) are left out, as a cache has none of them either.
"""

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.data.collate import collate_prompts
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.measuring import fit_rows, too_long
from vlsi_cache.data.records import Record, read_records, row_of, with_answer
from vlsi_cache.data.sources import media_root, read_responses
from vlsi_cache.data.writing import write_rows
from vlsi_cache.errors import DataError, FingerprintMismatchError, RowError, SpecError, list_problems
from vlsi_cache.io import check_file, check_folder, refuse_url, write_atomically
from vlsi_cache.models.backbone import target_layers
from vlsi_cache.models.drafting import Drafter, decode
from vlsi_cache.models.load import ModelRef, max_positions, resolve_model, share_digests
from vlsi_cache.models.parallel import teacher_processes
from vlsi_cache.models.probe import checked_backbone
from vlsi_cache.models.verbalizer import load_exits, load_verbalizers
from vlsi_cache.models.verbalizer_files import EXITS_FOLDER, find_folder, of_run, read_record
from vlsi_cache.processes import Processes
from vlsi_cache.progress import progress, say
from vlsi_cache.run_files import read_batch, read_object, read_run, sealed
from vlsi_cache.runs.run_dir import LOCK_NAME, check_has_exits, check_has_student, differences, locked, versions
from vlsi_cache.runtime import check_device, pick_device, seed_step
from vlsi_cache.store.files import publish_new_file

from .inputs import teacher_ref


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: the likeliest at temperature 0, else a draw; or the best of `num_beams` beams."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SpecError(f"`max_new_tokens` is {self.max_new_tokens}, must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise SpecError(f"`temperature` is {self.temperature}, must be 0 (the likeliest token) or above")
        if not 0 < self.top_p <= 1:
            raise SpecError(f"`top_p` is {self.top_p}, must be above 0 and at most 1")
        if self.top_p < 1 and not self.temperature:
            raise SpecError(f"`top_p` {self.top_p} belongs to sampling: give a `temperature` above 0 as well")


@dataclass(frozen=True)
class Response:
    """Generated ids, without the end of turn; and whether the model came to it."""

    ids: list[int]
    ended: bool


@torch.inference_mode()
def respond(
    model: Any, encoder: Encoder, records: Sequence[Record], decoding: Decoding, drafter: Drafter | None = None
) -> list[Response]:
    """One response to the prompt of each record, all in one batch; draws are keyed by torch's random state.

    With a `drafter` of the model the text is the same, and comes sooner where its drafts are good.
    """
    encoded = [encoder.encode(record, with_response=False) for record in records]
    inputs = collate_prompts(encoded, pad_id=encoder.pad_id, device=model.device)
    if drafter is not None:
        how: Any = {"temperature": decoding.temperature, "top_p": decoding.top_p}
        ids = {"eot_id": encoder.eot_id, "vocab_size": encoder.vocab_size}
        said = decode(drafter, inputs, max_new_tokens=decoding.max_new_tokens, **ids, **how)
        return [_response(one, encoder.eot_id) for one in said]
    own, model.generation_config = model.generation_config, _config(model, encoder, decoding)
    try:
        output = model.generate(**inputs)
    finally:
        model.generation_config = own
    return [_response(ids, encoder.eot_id) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]


def _config(model: Any, encoder: Encoder, decoding: Decoding) -> GenerationConfig:
    drawn = {"temperature": decoding.temperature, "top_k": 0, "top_p": decoding.top_p} if decoding.temperature else {}
    padding = list(range(encoder.vocab_size, model.get_output_embeddings().weight.shape[0]))
    return GenerationConfig(
        do_sample=bool(drawn),
        **drawn,
        num_beams=decoding.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=encoder.eot_id,
        pad_token_id=encoder.pad_id,
        suppress_tokens=padding or None,
    )


def _response(ids: list[int], eot_id: int) -> Response:
    ended = eot_id in ids
    return Response(ids[: ids.index(eot_id)] if ended else ids, ended)


def model_named(spec: CacheSpec, model: str) -> ModelRef:
    """`teacher`, a distill run's folder (its student), or a model's folder or hub id; raises SpecError, ModelError.

    Only the spec's own teacher may run code of its own, if the spec allows it.
    """
    if model == "teacher":
        return teacher_ref(spec.teacher)
    folder, distill = Path(model), spec.distill
    if (folder / "run.json").exists():
        run = read_run(folder)
        check_has_student(folder, run)
        distill = spec_from_dict(run["spec"], where=str(folder / "run.json")).distill
        folder = folder / "student"
    path = str(folder.resolve()) if folder.is_dir() else resolve_model(model)
    return ModelRef(path, dtype=distill.student_dtype, attn_implementation=distill.attn_implementation)


IDENTITY = ("weights", "settings", "encoder", "source_rows")  # what must be equal to go on with a work folder
# What may lie in a work folder: its lock, the plan, the batches, the rows, and what a kill leaves of these.
WORK_NAMES = re.compile(rf"{re.escape(LOCK_NAME)}|\.?(plan\.json|batch-\d+\.json|.+\.parquet)(\.tmp-[0-9a-f]+)?")


@dataclass(frozen=True)
class _Job:
    """What is to be said by whom. An item is (record, number of the sample); a batch is some items."""

    out: Path
    model: ModelRef
    encoder: Encoder
    records: Sequence[Record]
    left_out: list[dict[str, str]]
    batches: list[list[tuple[int, int]]]
    decoding: Decoding
    num_samples: int
    limits: dict[str, Any]  # as `fit_rows` takes them
    media_root: Path | None
    facts: dict[str, Any]
    draft_exit: int | None
    verbalizers: Path | None  # that read the layer which drafts; None: norm and head do

    @property
    def work(self) -> Path:
        return _work_of(self.out)

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
    draft_exit: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Write the rows of the spec's `data` with the responses of `model` to the Parquet file `out`, or go on with it.

    `model` is `teacher`, a distill run's folder (its student), or a model's folder or hub id. Temperature 0 takes
    the likeliest token. With several `num_samples` the rows' ids become `ID#0`, `ID#1`, ... Responses that do not
    end within `max_new_tokens`, are empty, or cannot be rows are left out and listed. Pictures that the rows name
    by path stay where they are. With `draft_exit` that layer drafts the answers (see `models.drafting`), read by
    the exit or verbalizer that the run or the spec's teacher has of it, else by norm and head. A teacher with
    `teacher.parallel: tensor` is answered for by all processes of a launch, which call this alike; the first one
    writes.

    Returns what the file's metadata says: `model`, `weights`, `settings`, `source_rows` (their digest), `counts`,
    `left_out` ({id, reason}), `versions`, with such pictures `media_root`; and `path`. Raises SpecError, DataError
    (nothing is left), FingerprintMismatchError (`out` or its work folder is of something else), RunBusyError,
    ModelError.
    """
    decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    _check(Path(out), decoding, num_samples=num_samples, batch_size=batch_size)
    if draft_exit is not None and model == "teacher" and spec.teacher.parallel == "tensor":
        raise SpecError("a teacher that is cut into pieces (`teacher.parallel: tensor`) answers without drafts")
    if seed and not temperature:
        raise SpecError(f"`seed` {seed} belongs to sampling, and nothing is drawn without a `temperature` above 0")
    numbers: Any = {"batch_size": batch_size, "seed": seed, "limit": limit, "draft_exit": draft_exit}
    with teacher_processes(spec.teacher.parallel if model == "teacher" else "none") as group:
        job = group.first_before_others(lambda: _plan(spec, Path(out), model, decoding, num_samples, **numbers))
        share_digests(job.model, group)
        group.check_same(job.facts)
        device = group.own_device(device, spec.run.device) or spec.run.device
        # Looked at once without the lock, to answer at once, and again with it: another process may have been faster.
        if not group.from_first(lambda: _is_finished(job)):
            check_device(device)
            _answer(job, seed=seed, device=device, group=group)
        group.from_first(lambda: shutil.rmtree(job.work, ignore_errors=True))
        return {"path": str(job.out), **(read_responses(job.out) or {})}


def _answer(job: _Job, *, seed: int, device: str, group: Processes) -> None:
    """Make the output, or what is missing of it; the first of a group holds the work folder for all and writes."""
    with ExitStack() as stack:

        def begin() -> dict[str, Any] | None:
            job.work.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(job.work))
            return None if _is_finished(job) else _begin(job)

        facts = group.from_first(begin)
        if facts is not None:
            _speak(job, seed=seed, device=device, group=group)
            group.from_first(lambda: _write(job, facts))


def _check(out: Path, decoding: Decoding, *, num_samples: int, batch_size: int) -> None:
    refuse_url(out, "out")
    if out.suffix != ".parquet":
        raise SpecError(f"cannot write {out}: the name must end in .parquet")
    check_file(out)
    if out.exists():
        _read_ours(out)
    work = _work_of(out)
    check_folder(work)
    strangers = (
        [entry.name for entry in work.iterdir() if not WORK_NAMES.fullmatch(entry.name)] if work.exists() else []
    )
    if strangers:
        raise SpecError(f"{work}, where unfinished work goes, holds something else (`{min(strangers)}`); move it away")
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
    draft_exit: int | None,
) -> _Job:
    """Read everything but the weights: prompts of similar length come together, all samples of one side by side."""
    named = model_named(spec, model)
    verbalizers = _verbalizers_of(spec, model)
    if draft_exit is not None:  # before anything is begun
        target_layers((draft_exit,), 1, named.config, where="draft_exit")
        if (Path(model) / "run.json").exists():
            check_has_exits(Path(model), read_run(Path(model)))
        if verbalizers is not None:
            read_record(verbalizers, [draft_exit])
    encoder, num_workers = named.encoder(spec.data.encoding()), spec.run.num_workers
    source = read_records(spec.data, limit=limit, num_workers=num_workers)
    limits: dict[str, Any] = {"max_length": spec.data.max_length, "max_positions": max_positions(named.config)}
    # Batches are cut from the whole list before any is done: an attempt that goes on cuts the same ones, and with the
    # random state keyed by the batch's number it draws the same tokens.
    # Whether a row fits is decided by its prompt: the answer that it has goes.
    limits_and_ways: Any = {**limits, "bad_rows": spec.data.bad_rows, "num_workers": num_workers}
    kept, do_not_fit = fit_rows(source, encoder, **limits_and_ways, with_response=False)
    order = sorted(kept, key=lambda one: (one.num_prompt, one.index))
    items = [(one.index, number) for one in order for number in range(num_samples)]
    settings = {
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "num_samples": num_samples,
        "max_new_tokens": decoding.max_new_tokens,
        "max_length": spec.data.max_length,
        "batch_size": batch_size,
        "seed": seed,
        "dtype": named.dtype,
        **({} if draft_exit is None else {"draft_exit": draft_exit}),
    }
    return _Job(
        out=out,
        model=named,
        encoder=encoder,
        records=source,
        left_out=[*source.skipped, *do_not_fit],
        batches=[items[start : start + batch_size] for start in range(0, len(items), batch_size)],
        decoding=decoding,
        num_samples=num_samples,
        limits=limits,
        media_root=media_root(spec.data),
        facts={
            "model": named.path,
            "weights": named.digest,
            "settings": settings,
            "encoder": encoder.fingerprint(),
            "num_source_rows": len(source),
            "source_rows": source.digest,
            "versions": versions(),
        },
        draft_exit=draft_exit,
        verbalizers=verbalizers,
    )


def _verbalizers_of(spec: CacheSpec, model: str) -> Path | None:
    """The folder of those that belong to `model`, as `model_named` takes it; None where it has none."""
    if model == "teacher":
        return None if spec.teacher.verbalizers is None else Path(find_folder(spec.teacher.verbalizers))
    return of_run(Path(model))


def _is_finished(job: _Job) -> bool:
    """Whether the output is there; raises when what is there is something else."""
    if not job.out.exists():
        return False
    there = _read_ours(job.out)
    _refuse_other(job.out, there, job.facts, "choose another name with -o, or bring them back")
    say(f"{job.out} is finished; nothing to do")
    return True


def _read_ours(out: Path) -> dict[str, Any]:
    """What an output that is there says of itself; raises SpecError when it was not written by `generate`."""
    try:
        there = read_responses(out)
    except DataError:
        there = None
    if there is None:
        raise SpecError(f"{out} exists and was not written by `generate`; choose another name with -o")
    return there


def _work_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.work")


def _begin(job: _Job) -> dict[str, Any]:
    """The facts of this job, those of the process that began it if there are some."""
    file = job.work / "plan.json"
    if not file.is_file():
        write_atomically(file, json.dumps(job.facts, indent=1))
    facts = read_object(file, f"delete {job.work} to begin anew")
    advice = f"bring them back, choose another name with -o, or delete {job.work} to begin anew"
    _refuse_other(job.work, facts, job.facts, advice)
    return facts


def _refuse_other(path: Path, there: dict[str, Any], wanted: dict[str, Any], advice: str) -> None:
    problems = [line for key in IDENTITY for line in differences(there.get(key), wanted[key], key)]
    num_there = there.get("num_source_rows") or there.get("counts", {}).get("source_rows")  # of an earlier release
    if num_there not in (None, wanted["num_source_rows"]):
        problems.insert(0, f"{num_there} source rows there, {wanted['num_source_rows']} now (`--limit`, `data.limit`)")
    if problems:
        raise FingerprintMismatchError(f"{path} was made from something else; {advice}:\n{list_problems(problems)}")


def _speak(job: _Job, *, seed: int, device: str, group: Processes) -> None:
    """Generate what no earlier attempt has: one file a batch."""
    everything = range(len(job.batches))
    missing = group.from_first(lambda: [number for number in everything if not job.batch_file(number).is_file()])
    if not missing:
        return
    loaded = job.model.load(device if device == "auto" else str(pick_device(device)))  # auto: over all GPUs
    say(f"model: {job.model.path} on {loaded.device}")
    drafter = None if job.draft_exit is None else _drafter(job, loaded, job.draft_exit)
    done = len(job.batches) - len(missing)
    for number in progress(missing, "generate", unit="batch", done=done):
        seed_step(seed, "generate", number)
        records = [job.records[index] for index, _ in job.batches[number]]
        responses = respond(loaded, job.encoder, records, job.decoding, drafter)
        lines = [{"ids": one.ids, "ended": one.ended} for one in responses]
        if group.is_first:
            write_atomically(job.batch_file(number), sealed({"responses": lines}))
    if drafter is not None:
        say(str(drafter))


def _drafter(job: _Job, loaded: Any, layer: int) -> Drafter:
    backbone, verbalizers = checked_backbone(loaded, job.encoder), None
    if job.verbalizers is not None and job.verbalizers.name == EXITS_FOLDER:
        verbalizers = load_exits(job.verbalizers, backbone, student=job.model.digest)
    elif job.verbalizers is not None:  # a run's are older than its student's head
        verbalizers = load_verbalizers(job.verbalizers, backbone, [layer], check_head=False)
    return Drafter.of(backbone, layer, verbalizers=verbalizers)


def _write(job: _Job, facts: dict[str, Any]) -> None:
    """Judge all responses, then write those that can be rows, in the order of the source."""
    said = _read_said(job)
    is_row: list[bool] = []
    left_out = list(job.left_out)
    num_changed = 0
    for item, said_ids, ended in said:
        record, response = _named(job, item), Response(said_ids.tolist(), ended)
        ids, reason = _judge(job, record, response)
        is_row.append(not reason)
        if reason:
            left_out.append({"id": record.id, "reason": reason})
        else:
            num_changed += ids != response.ids
    if not any(is_row):
        shutil.rmtree(job.work)  # nothing in it is of use to another attempt
        problems = [f"row `{one['id']}`: {one['reason']}" for one in left_out]
        raise DataError(
            f"none of {len(is_row)} responses can be used, so nothing was written:\n{list_problems(problems)}"
        )
    counts = {"source_rows": len(job.records), "generated": len(is_row), "written": sum(is_row)}
    counts |= {"left_out": len(left_out), "retokenised": num_changed}
    temporary = job.work / job.out.name
    has_paths = any(image.path is not None for record in job.records for image in record.images)
    pictures = {"media_root": str(job.media_root)} if has_paths else {}
    about = {**facts, **pictures, "counts": counts, "left_out": left_out}
    good = (one for one, is_good in zip(said, is_row, strict=True) if is_good)
    rows = (with_answer(_named(job, item), job.encoder.answer(ids.tolist())) for item, ids, _ in good)
    write_rows((row_of(row, media_root=job.media_root) for row in rows), temporary, responses=about)
    # A link to a new name, never over one: two processes cannot both have written `out`.
    if not publish_new_file(temporary, job.out):
        raise SpecError(f"{job.out} has come into being meanwhile; choose another name with -o")


def _read_said(job: _Job) -> list[tuple[tuple[int, int], np.ndarray, bool]]:
    """The items of all finished batches in the order of the source, each with its ids, uint32 [T], and whether the
    model ended it."""
    said = []
    for number, batch in enumerate(job.batches):
        lines = read_batch(job.batch_file(number), len(batch))
        ids = (np.array(line["ids"], dtype=np.uint32) for line in lines)
        said += zip(batch, ids, (line["ended"] for line in lines), strict=True)
    return sorted(said, key=lambda one: one[0])


def _named(job: _Job, item: tuple[int, int]) -> Record:
    """The record of the source, under the name that this response to it has."""
    record = job.records[item[0]]
    return replace(record, id=f"{record.id}#{item[1]}") if job.num_samples > 1 else record


def _judge(job: _Job, record: Record, response: Response) -> tuple[list[int], str]:
    """The ids that this response is read as in a row; or why it cannot be in one."""
    if not response.ended:
        return [], f"no end of turn within {job.decoding.max_new_tokens} tokens"
    text = job.encoder.answer(response.ids)
    if not text.strip():
        return [], "the response is empty"
    try:
        num_prompt, ids = job.encoder.measure(with_answer(record, text))
    except RowError as error:
        return [], error.reason
    reason = too_long(num_prompt + len(ids), **job.limits)
    return ([], reason) if reason else (ids[:-1].tolist(), "")
