"""Stage evaluate: what a model knows about held-out rows: exact match of its answers, perplexity, loss per layer.

Legend: T response tokens, D hidden size, V vocabulary.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlsi_cache.config.sections import AS_IT_IS, CacheSpec, Encoding, EvaluateSpec, Traversed
from vlsi_cache.config.spec import Overrides, apply_overrides, change, override_list, spec_from_dict
from vlsi_cache.config.training import Alignment, TraversalSpec
from vlsi_cache.data.collate import Batch, collate, plan_sample_batches
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.records import Record, read_records
from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.io import check_file, refuse_url, write_atomically
from vlsi_cache.models.backbone import Backbone, head_of, target_layers
from vlsi_cache.models.drafting import Drafter
from vlsi_cache.models.load import ModelRef, resolve_model
from vlsi_cache.models.probe import checked_backbone
from vlsi_cache.models.traversal import add_traversal, traversal_of
from vlsi_cache.models.verbalizer import Verbalizers, frozen_layout, load_exits, load_verbalizers, logit_lens
from vlsi_cache.models.verbalizer_files import EXITS_FOLDER, find_folder, read_record
from vlsi_cache.processes import ALONE, Processes, joined
from vlsi_cache.progress import progress, say
from vlsi_cache.run_files import EVALUATION as RESULT
from vlsi_cache.run_files import read_evaluation, read_run, sealed
from vlsi_cache.runs.run_dir import check_has_exits, check_has_student
from vlsi_cache.runtime import pick_device
from vlsi_cache.sparse.cross_entropy import linear_cross_entropy
from vlsi_cache.sparse.head import Head
from vlsi_cache.store import reader
from vlsi_cache.store.reader import Cache
from vlsi_cache.teacher.generate import Decoding, respond

from .held_out import HeldOut, held_out, prepared
from .teacher_agreement import against_cache, trained_on


def evaluate(
    model: Path | str,
    *,
    spec: CacheSpec | None = None,
    cache: Cache | Path | str | None = None,
    verbalizers: Path | str | None = None,
    num_beams: int | None = None,
    draft_exit: int | None = None,
    overrides: Overrides = (),
    device: str | None = None,
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure a run's student (or any model folder) on the held-out rows of its spec, and against a teacher's cache.

    `overrides` are changes to the spec, such as `["evaluate.max_new_tokens=64"]`. Device, dtype and attention are those
    of the spec (with none, of the cache); `device` wins over it. `verbalizers`
    read the layers in place of the run's own; `num_beams` answers by beam search. With `draft_exit` that layer, read by
    its exit (else its verbalizer, else norm and head), drafts the answers, which are the same. A model's own code
    runs only with `trust_remote_code`, whatever a spec or a run folder says: either may come from somebody else.

    Returns, and for a run also writes to RUN/evaluation.json unless this was measured with a `limit` or otherwise than
    the run's own spec says: `exact_match` (all and per kind, or None when the spec does not generate), `nll` in nats
    per response token, `perplexity`, `layers` (nll per verbalized student layer; head and final norm are the trained
    student's own), `verbalizers` (which ones, when not the run's own), `num_samples`, `num_by_kind`, `num_skipped`
    (rows left out), with drafts `drafts` (see `Drafter.counts`); with a `cache` also `cache`: see `against_cache` and
    `trained_on`; and `measured_with`, the options of this call. Raises SpecError when there is nothing to measure on,
    ModelError when a loss is not finite.

    Under `torchrun` or `accelerate launch` all processes call it alike and share the batches; the scores are the same.
    """
    refuse_url(model, "model")
    with joined() as processes:
        return _evaluate(
            Path(model),
            spec,
            cache,
            verbalizers,
            num_beams=num_beams,
            draft_exit=draft_exit,
            overrides=override_list(overrides),
            device=device,
            limit=limit,
            trust_remote_code=trust_remote_code,
            processes=processes,
        )


def _evaluate(
    folder: Path,
    spec: CacheSpec | None,
    cache: Cache | Path | str | None,
    verbalizers: Path | str | None,
    *,
    num_beams: int | None,
    draft_exit: int | None,
    overrides: list[str],
    device: str | None,
    limit: int | None,
    trust_remote_code: bool,
    processes: Processes,
) -> dict[str, Any]:
    run = read_run(folder) if (folder / "run.json").exists() else None
    if run is not None:
        check_has_student(folder, run)
        check_file(folder / RESULT)
    opened = cache if isinstance(cache, Cache) or cache is None else reader.open(cache)
    spec = spec or (spec_from_dict(run["spec"], where=str(folder / "run.json")) if run else None)
    if spec is None and opened is not None:
        spec = spec_from_dict(opened.header.spec, where=str(opened.path))
    if spec is not None:
        spec = apply_overrides(spec, overrides)
    if spec is None or (spec.evaluate is None and opened is None):
        raise SpecError(_nothing_to_measure(folder))
    if num_beams is not None:
        if spec.evaluate is None:
            raise SpecError(
                "beams are for answers to held-out rows, and the spec has none: name some in `evaluate.data`"
            )
        if not spec.evaluate.generate:
            raise SpecError("beams are for answers, and the spec generates none: set `evaluate.generate: true`")
        spec = change(spec, evaluate={**spec.evaluate.model_dump(), "num_beams": num_beams})
    if draft_exit is not None:
        _check_drafts(spec)
        if run is not None and verbalizers is None:
            check_has_exits(folder, run)
    own = folder / "verbalizers"
    given = None if verbalizers is None else find_folder(verbalizers)
    if given is not None:
        read_record(given, [])
    named = ModelRef(
        str(folder / "student") if run else resolve_model(str(folder)),
        dtype=spec.distill.student_dtype,
        attn_implementation=spec.distill.attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    processes.check_same(
        {
            "model": named.digest,
            "spec": spec.model_dump(mode="json"),
            "cache": None if opened is None else opened.header.digest,
            "limit": limit,
            "draft_exit": draft_exit,
        }
    )
    result = evaluate_model(
        named,
        spec.evaluate,
        cache=opened,
        encoding=spec.data.encoding(),
        verbalizers=str(given or own) if given or own.is_dir() else None,
        lens_layers=_lens_layers(folder, run, named) if given is None else [],
        exits=str(folder / EXITS_FOLDER) if given is None and (folder / EXITS_FOLDER).is_dir() else None,
        device=processes.own_device(device, spec.run.device) or spec.run.device,
        alignment=spec.distill.alignment,
        batch_tokens=spec.run.num_batch_tokens,
        draft_exit=draft_exit,
        limit=limit,
        num_workers=spec.run.num_workers,
        processes=processes,
    )
    if given is not None:
        result["verbalizers"] = _origin_of(given, folder, run)
    if opened is not None:
        result["cache"] |= trained_on(opened, run, num_samples=result["cache"]["num_samples"])
    result["measured_with"] = {
        **_own_settings(spec),
        "limit": limit,
        "draft_exit": draft_exit,
        "verbalizers": None if given is None else str(given.resolve()),
        "cache": None if opened is None else str(opened.path.resolve()),
    }
    if run is not None:
        processes.from_first(lambda: _keep(folder, run, result))
    return result


def _lens_layers(folder: Path, run: dict[str, Any] | None, student: ModelRef) -> list[int]:
    """The layers that a run has trained through the student's norm and head; none of another run."""
    spec = None if run is None else spec_from_dict(run["spec"], where=str(folder / "run.json"))
    if spec is None or not (spec.verbalizer.is_lens and spec.distill.trains_layers):
        return []
    return target_layers(spec.distill.layers, spec.distill.num_layers, student.config, where="distill.layers")


def _check_drafts(spec: CacheSpec) -> None:
    if spec.evaluate is None:
        raise SpecError("a layer drafts answers to held-out rows, and the spec has none: name some in `evaluate.data`")
    if not spec.evaluate.generate:
        raise SpecError("a layer drafts answers, and the spec generates none: set `evaluate.generate: true`")
    if spec.evaluate.num_beams > 1:
        raise SpecError(f"drafts are for one answer at a time, not for {spec.evaluate.num_beams} beams: leave one out")


def _nothing_to_measure(folder: Path) -> str:
    advice = "give --spec with an `evaluate:` section, or a --cache"
    if (folder / "run.json").exists() or (folder / "config.json").is_file():
        return f"no held-out rows for {folder}: {advice}"
    if folder.is_dir():
        return f"{folder} is neither a run nor a model: it holds no run.json and no config.json"
    return f"there is no folder {folder}; for a model of the hub {advice}"


def _keep(folder: Path, run: dict[str, Any], result: dict[str, Any]) -> None:
    """Write RUN/evaluation.json: all that shows a run shows what is in it as the run's own scores."""
    used, own = result["measured_with"], _own_settings(spec_from_dict(run["spec"], where=str(folder / "run.json")))
    if used["limit"] is not None:
        say(f"measured with a limit: not kept in {folder / RESULT}")
    elif own["evaluate"] is not None and any(used[key] != value for key, value in own.items()):
        say(f"measured otherwise than the run's own spec says: not kept in {folder / RESULT}")
    else:
        write_atomically(folder / RESULT, sealed(result))


def _own_settings(spec: CacheSpec) -> dict[str, Any]:
    """What of a spec decides the scores on the held-out rows, as JSON has it."""
    settings = None if spec.evaluate is None else spec.evaluate.model_dump(mode="json")
    distill = spec.distill
    return {"evaluate": settings, "dtype": distill.student_dtype, "attn_implementation": distill.attn_implementation}


def kept_result(folder: Path) -> dict[str, Any] | None:
    """The content of RUN/evaluation.json; None if there is none or it was not measured as the run's own spec says."""
    result, run = read_evaluation(folder), read_run(folder)
    if result is None:
        return None
    own = {**_own_settings(spec_from_dict(run["spec"], where=str(folder / "run.json"))), "verbalizers": None}
    there = result.get("measured_with") or {}  # an earlier release did not say
    return result if all(key in there and there[key] == value for key, value in own.items()) else None


def _origin_of(given: Path, folder: Path, run: dict[str, Any] | None) -> dict[str, Any]:
    """Where borrowed verbalizers come from, and whether they were trained on what the run started from (`same_start`)
    or on the student it has made (`same_student`)."""
    trained_with = read_record(given, [])["provenance"].get("teacher_digest")
    start = None if run is None else run.get("student_digest") == trained_with
    student = None if run is None else not start and ModelRef(folder / "student").digest == trained_with
    known = {"same_start": start, "same_student": student}
    return {"path": str(given.resolve()), "trained_with": trained_with, **known}


def evaluate_model(
    model: ModelRef,
    settings: EvaluateSpec | None,
    *,
    cache: Cache | None = None,
    encoding: Encoding = AS_IT_IS,
    verbalizers: str | None = None,
    exits: str | None = None,
    lens_layers: Sequence[int] = (),
    device: str | None = None,
    batch_tokens: int = 8192,
    draft_exit: int | None = None,
    limit: int | None = None,
    num_workers: int = 0,
    alignment: Alignment = "tokens",
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """`evaluate` for any model; `limit` takes the first rows only, `batch_tokens` bounds a perplexity batch.

    `verbalizers` read the layers, or norm and head the `lens_layers`; and `exits`, if they are given,
    the one that drafts.
    With `alignment: byte` the model may have another tokenizer than the teacher of the cache.
    `encoding` (see `DataSpec.encoding`) holds for the rows of the cache; held-out rows have their own.
    """
    where = pick_device(device)
    rows = None
    if settings is not None:
        found = read_records(settings.data, limit=limit, num_workers=num_workers)
        rows = held_out(model, found, settings.data, num_workers=num_workers, processes=processes)
    loaded = model.load(str(where))
    if settings is not None and settings.traversal is not None:
        _traverse(loaded, settings.traversal)
    of_cache = model.encoder(encoding) if rows is None or cache is not None else rows.encoder
    backbone = checked_backbone(loaded, of_cache)
    spoken = logit_lens(backbone, lens_layers) if lens_layers else None
    if verbalizers is not None:
        layers = sorted(int(name) for name in read_record(Path(verbalizers), [])["layers"])
        # The head may have been trained since: a layer is read through the head of the model that is measured.
        spoken = load_verbalizers(verbalizers, backbone, layers, check_head=False).to(where)
    result = {}
    if settings is not None and rows is not None:
        drafter = None
        if draft_exit is not None:
            read = spoken if exits is None else load_exits(Path(exits), backbone, student=model.digest)
            drafter = Drafter.of(backbone, draft_exit, verbalizers=read)
        batches = plan_sample_batches(rows.kept, batch_tokens, frozen_layout(backbone, spoken))
        options = {"num_workers": num_workers, "processes": processes}
        scores = _on_held_out(backbone, spoken, settings, rows, batches, drafter=drafter, **options)
        result = {"num_samples": len(rows.records), "num_skipped": rows.num_skipped, **scores}
    if cache is not None:
        options: Any = {"batch_tokens": batch_tokens, "limit": limit, "alignment": alignment, "processes": processes}
        result["cache"] = against_cache(backbone, spoken, of_cache, cache, **options)
    return result


def _traverse(model: Any, mode: Traversed) -> None:
    """Measure a traversed student with these tokens traversed; a plain one with gates as they are drawn."""
    state = traversal_of(model)
    if state is None and mode != "none":
        state = add_traversal(model, TraversalSpec(mode=mode))
    if state is not None:
        state.mode = mode


def _on_held_out(
    backbone: Backbone,
    verbalizers: Verbalizers | None,
    settings: EvaluateSpec,
    rows: HeldOut,
    batches: list[list[int]],
    *,
    drafter: Drafter | None,
    num_workers: int,
    processes: Processes,
) -> dict[str, Any]:
    records, encoder = rows.records, rows.encoder
    options = {"num_workers": num_workers, "processes": processes}
    nll = mean_nll(backbone, verbalizers, records, batches, encoder, **options)
    # A layer may be read through verbalizers of another model; the model's own loss has a perplexity.
    with np.errstate(over="ignore"):
        scores = {**nll, backbone.num_layers: np.exp(nll[backbone.num_layers])}
    impossible = [f"{nll[layer]} at layer {layer}" for layer, score in scores.items() if not np.isfinite(score)]
    if impossible:
        raise ModelError(
            f"the model's loss on the held-out rows is {', '.join(impossible)}: its last updates have destroyed it. "
            "Train it again in a new folder, with a lower `learning_rate` or a longer `warmup`"
        )
    last = nll.pop(backbone.num_layers)
    right = exact_match(backbone.model, records, encoder, settings, drafter, processes) if settings.generate else None
    drafts = {} if drafter is None else {"drafts": drafter.summed(processes).counts}
    return {
        "num_by_kind": dict(Counter(record.kind for record in records)),
        "exact_match": right,
        **drafts,
        "num_beams": settings.num_beams if settings.generate else None,
        "nll": last,
        "perplexity": float(np.exp(last)),
        "layers": {str(layer): value for layer, value in nll.items()},
    }


@torch.inference_mode()
def mean_nll(
    backbone: Backbone,
    verbalizers: Verbalizers | None,
    records: Sequence[Record],
    batches: list[list[int]],
    encoder: Encoder,
    *,
    num_workers: int = 0,
    processes: Processes = ALONE,
) -> dict[int, float]:
    """Negative log-likelihood in nats per response token over the real vocabulary, by layer; the final one last."""
    head, own = head_of(backbone).real(encoder.vocab_size), processes.share(batches)
    layout = frozen_layout(backbone, verbalizers)
    batches_of = prepared(records, encoder, own, layout, num_workers=num_workers)
    options: dict[str, Any] = {"row_width": backbone.row_width, "marks_responses": layout.marks_responses}
    sums = []  # one of every batch, so that they are added in the order of the batches whoever has made them
    for sequences in progress(batches_of, "perplexity", unit="batch", total=len(own)):
        batch = collate(sequences, pad_id=encoder.pad_id, device=backbone.device, **options)
        sums.append((len(batch.gold_T), _nll_by_layer(backbone, verbalizers, batch, head)))
    totals: dict[int, float] = defaultdict(float)
    num_tokens = 0
    for count, nll in processes.gather_shares(sums):
        num_tokens += count
        for layer, mean in nll.items():
            totals[layer] += mean * count
    return {layer: total / num_tokens for layer, total in totals.items()}


def _nll_by_layer(backbone: Backbone, verbalizers: Verbalizers | None, batch: Batch, head: Head) -> dict[int, float]:
    """Means over the response tokens of a batch."""
    layers = verbalizers.layers if verbalizers is not None else []
    capture = verbalizers.capture if verbalizers is not None else partial(backbone.capture, layers=[])
    hidden: dict[int, Any] = dict(capture(batch.inputs, rows_T=batch.rows_T, positions_T=batch.positions_T))
    nll = {}
    for layer in [*layers, backbone.num_layers]:
        state_TD = hidden.pop(layer)
        if verbalizers is not None and layer != backbone.num_layers:
            state_TD = verbalizers.apply(layer, state_TD)
        nll[layer] = float(linear_cross_entropy(state_TD, head, batch.gold_T))
    return nll


def exact_match(
    model: Any,
    records: Sequence[Record],
    encoder: Encoder,
    settings: EvaluateSpec,
    drafter: Drafter | None = None,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Share of rows whose answer is the reference, white space at the ends aside: `all`, and per kind.

    Answers are not sampled, and run in batches of similar length.
    """
    order = sorted(range(len(records)), key=lambda i: encoder.measure(records[i])[0])
    size, decoding = settings.batch_size, Decoding(settings.max_new_tokens, num_beams=settings.num_beams)
    right: Counter[str] = Counter()
    own = processes.share(range(0, len(order), size))
    for start in progress(own, "generate", unit="batch"):
        chosen = [records[i] for i in order[start : start + size]]
        for record, response in zip(chosen, respond(model, encoder, chosen, decoding, drafter), strict=True):
            right[record.kind] += encoder.answer(response.ids).strip() == record.answer.strip()
    right = sum(processes.gather(right), Counter())
    counts = Counter(record.kind for record in records)
    per_kind = {kind: right[kind] / count for kind, count in sorted(counts.items()) if kind}
    return {"all": sum(right.values()) / len(records), **per_kind}
