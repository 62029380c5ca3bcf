"""Command exits: what each target layer of a student answers in its place, what that costs, and when to trust it.

Every layer reads the same responses, the student's own context before each token, as in a loss. With a confidence rule
each token is said by the first exit that is sure enough (the keys and values of the layers above are taken as given).

Legend: T response tokens, C those of a chunk, E exits, D hidden size, V vocabulary.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlsi_cache.config.sections import CacheSpec, RunSpec
from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.data.collate import collate, plan_sample_batches
from vlsi_cache.data.records import read_records
from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.io import check_file, refuse_url, write_atomically
from vlsi_cache.models.backbone import Backbone, head_of, target_layers
from vlsi_cache.models.draft_costs import CONFIDENCE, Answer
from vlsi_cache.models.drafting import step_seconds
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.probe import checked_backbone
from vlsi_cache.models.verbalizer import Verbalizers, frozen_layout, load_exits, logit_lens
from vlsi_cache.models.verbalizer_files import find_folder, of_run
from vlsi_cache.progress import progress, say
from vlsi_cache.run_files import EXITS, read_run, sealed
from vlsi_cache.runs.run_dir import check_has_exits, check_has_student
from vlsi_cache.runtime import pick_device
from vlsi_cache.sparse.head import Head, compute_dtype
from vlsi_cache.store import reader
from vlsi_cache.store.reader import Cache
from vlsi_cache.teacher.draft_plan import costs_of, exit_plan
from vlsi_cache.train.loader import match_records
from vlsi_cache.train.student import cached_sources

from .held_out import HeldOut, held_out, prepared
from .teacher_agreement import LOGIT_BYTES, trained_on

RULES = ("margin", "entropy")
NUM_THRESHOLDS = 24  # of each confidence rule


class Said(NamedTuple):
    """Of each token: the likeliest word and its probability, the loss of the response's in nats, by how much the
    likeliest leads the next in probability, and the entropy in nats. [T] each."""

    first: np.ndarray
    best: np.ndarray
    nll: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray


def exits(
    run: Path | str,
    *,
    cache: Cache | Path | str | None = None,
    verbalizers: Path | str | None = None,
    limit: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure every exit of a run's student on the held-out rows of its spec, or on the rows of a `cache`.

    An exit is a target layer read by `RUN/exits`, without these by `RUN/verbalizers`, without either by the student's
    own norm and head; `verbalizers` read in their place. Returns, and unless there is a `limit`, other verbalizers, or
    rows that the run was trained on, also writes to RUN/exits.json: `exits`, for each and for the last layer `accuracy`
    (its first word is the response's), `nll` in nats per token, `agreement` (its first word is the last layer's),
    `weights` that a token reads, `flops` of a token without attention, `seconds` of the next token (None where it
    cannot be measured), and of one that can draft what its drafts would come to (see `teacher.draft_plan.ExitPlan`);
    and `rules`, for `margin` and `entropy` the points of the curve: `threshold`, mean `depth` in layers, `agreement`,
    `accuracy`, `nll`; of a `cache` also `trained_on` and `num_trained_on`, see `trained_on`. Raises SpecError,
    ModelError (exits of another student, a loss that is not finite), DataError.
    """
    refuse_url(run, "run")
    folder = Path(run)
    if not (folder / "run.json").exists():
        raise SpecError(f"{folder} holds no run, and exits are those of a run's student: name a folder of distill")
    record = read_run(folder)
    check_has_student(folder, record)
    if verbalizers is None:
        check_has_exits(folder, record)
    check_file(folder / EXITS)
    spec = spec_from_dict(record["spec"], where=str(folder / "run.json"))
    distill, opened = spec.distill, cache if isinstance(cache, Cache) or cache is None else reader.open(cache)
    student = ModelRef(
        str(folder / "student"),
        dtype=distill.student_dtype,
        attn_implementation=distill.attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    rows = _rows(student, spec, opened, limit)
    where = pick_device(device or spec.run.device)
    backbone = checked_backbone(student.load(str(where)), rows.encoder)
    named = of_run(folder) if verbalizers is None else find_folder(verbalizers)
    if named is None:
        layers = target_layers(distill.layers, distill.num_layers, student.config, where="distill.layers")
        if not layers:
            raise SpecError(
                f"{folder} has no exits: its `distill.layers` is empty, and exits are target layers; name verbalizers "
                "of this student with --verbalizers, or train a run that has layers"
            )
        read = logit_lens(backbone, layers)
    else:
        read = load_exits(named, backbone, student=student.digest, start=record.get("student_digest"))
    result = {
        "student": student.digest,
        "rows": "evaluate" if opened is None else str(opened.path),
        "verbalizers": None if named is None else str(named.resolve()),
        "structure": read.architecture.structure,
        "device": str(where),
        "num_samples": len(rows.records),
        "num_skipped": rows.num_skipped,
        **measure_exits(backbone, read, rows, spec.run),
        **({} if opened is None else trained_on(opened, record, num_samples=len(opened))),
    }
    if result.get("trained_on"):
        say(f"the run was trained on {result['num_trained_on']:,} of these rows: not kept in {folder / EXITS}")
    elif limit is None and verbalizers is None:
        write_atomically(folder / EXITS, sealed(result))
    return result


def _rows(student: ModelRef, spec: CacheSpec, cache: Cache | None, limit: int | None) -> HeldOut:
    num_workers = spec.run.num_workers
    if cache is None:
        if spec.evaluate is None:
            raise SpecError("the run's spec has no held-out rows (`evaluate.data`): name a cache of some with --cache")
        found = read_records(spec.evaluate.data, limit=limit, num_workers=num_workers)
        return held_out(student, found, spec.evaluate.data, num_workers=num_workers)
    of_cache = spec_from_dict(cache.header.spec, where=str(cache.path))
    found = cached_sources(cache)
    by_id = match_records(cache, found)  # a cache may hold a selection of the rows that it was built from
    place_N = np.sort([by_id.place_of(sample_id) for sample_id in cache.sample_table()["id"].to_pylist()])
    return held_out(student, found.take(place_N[:limit]), of_cache.data, num_workers=num_workers)


def measure_exits(backbone: Backbone, verbalizers: Verbalizers, rows: HeldOut, run: RunSpec) -> dict[str, Any]:
    """What `exits` returns of a model and the verbalizers of its exits, on these rows."""
    layers = [*verbalizers.layers, backbone.num_layers]
    said, gold_T, lengths = _said_by_layer(backbone, verbalizers, rows, run)
    if not all(np.isfinite(one.nll).all() for one in said.values()):
        raise ModelError("the loss of an exit is not finite on these rows: the student or its exits are destroyed")
    sizes = {int(layer): sum(p.numel() for p in one.parameters()) for layer, one in verbalizers.by_layer.items()}
    costs, seconds = costs_of(backbone.plain, sizes), _seconds(backbone, verbalizers, rows.encoder.vocab_size)
    found, last = [], said[layers[-1]]
    for layer in layers:
        one, agrees_T, drafts = said[layer], said[layer].first == last.first, {}
        if layer != layers[-1] and seconds:  # what takes no single token cannot draft either
            parts = (np.split(one_T, np.cumsum(lengths)[:-1]) for one_T in (agrees_T, one.best >= CONFIDENCE))
            drafts = asdict(exit_plan(layer, [Answer(*pair) for pair in zip(*parts, strict=True)], costs))
        weights = costs.of_all if layer == layers[-1] else costs.of_exit(layer)
        scores = {"accuracy": (one.first == gold_T).mean(), "nll": one.nll.mean(), "agreement": agrees_T.mean()}
        of_token = {"weights": weights, "flops": 2 * weights, "seconds": seconds.get(layer)}
        found.append({**drafts, "layer": layer, **{name: float(value) for name, value in scores.items()}, **of_token})
    rules = {rule: _curve([said[layer] for layer in layers], layers, gold_T, rule) for rule in RULES}
    return {"num_tokens": len(gold_T), "exits": found, "rules": rules}


def _curve(said: list[Said], layers: list[int], gold_T: np.ndarray, rule: str) -> list[dict[str, float]]:
    """Quality against mean depth where a token is said by the first exit whose confidence reaches a threshold."""
    sure_ET = np.stack([one.margin if rule == "margin" else -one.entropy for one in said[:-1]])
    first_ET, nll_ET = (np.stack([getattr(one, name) for one in said]) for name in ("first", "nll"))
    always_1T, token_T = np.ones((1, len(gold_T)), dtype=bool), np.arange(len(gold_T))
    points: list[dict[str, float]] = []
    for threshold in np.unique(np.quantile(sure_ET, np.linspace(0, 1, NUM_THRESHOLDS))):
        exit_T = np.concatenate([sure_ET >= threshold, always_1T]).argmax(0)
        first_T = first_ET[exit_T, token_T]
        points.append(
            {
                "threshold": float(threshold if rule == "margin" else -threshold),
                "depth": float(np.array(layers)[exit_T].mean()),
                "agreement": float((first_T == said[-1].first).mean()),
                "accuracy": float((first_T == gold_T).mean()),
                "nll": float(nll_ET[exit_T, token_T].mean()),
            }
        )
    return points


@torch.inference_mode()
def _said_by_layer(
    backbone: Backbone, verbalizers: Verbalizers, rows: HeldOut, run: RunSpec
) -> tuple[dict[int, Said], np.ndarray, list[int]]:
    """What every exit and the last layer say of all tokens, the response's own ids, and the number of each sample's."""
    layout, head = frozen_layout(backbone, verbalizers), head_of(backbone).real(rows.encoder.vocab_size)
    batches = plan_sample_batches(rows.kept, run.num_batch_tokens, layout)
    ready = prepared(rows.records, rows.encoder, batches, layout, num_workers=run.num_workers)
    options: dict[str, Any] = {"row_width": backbone.row_width, "marks_responses": layout.marks_responses}
    found: dict[int, list[Said]] = {layer: [] for layer in [*verbalizers.layers, backbone.num_layers]}
    gold: list[np.ndarray] = []
    lengths: list[int] = []
    for sequences in progress(ready, "exits", unit="batch", total=len(batches)):
        batch = collate(sequences, pad_id=rows.encoder.pad_id, device=backbone.device, **options)
        lengths += batch.num_tokens
        gold.append(batch.gold_T.cpu().numpy())
        hidden: dict[int, Any] = dict(verbalizers.capture(batch.inputs, batch.rows_T, batch.positions_T))
        for layer, parts in found.items():
            state = hidden.pop(layer)
            state_TD = state if layer == backbone.num_layers else verbalizers.apply(layer, state)
            parts.append(_said(state_TD, head, batch.gold_T))
    return {layer: _joined(parts) for layer, parts in found.items()}, np.concatenate(gold), lengths


def _said(state_TD: Tensor, head: Head, gold_T: Tensor) -> Said:
    size, parts = max(1, LOGIT_BYTES // (4 * head.num_rows)), []
    for state_CD, gold_C in zip(state_TD.split(size), gold_T.split(size), strict=True):
        logits_CV = state_CD.new_empty(len(state_CD), head.num_rows, dtype=compute_dtype(state_CD))
        head.logits_into(logits_CV, state_CD, 0)
        logp_CV = logits_CV.log_softmax(-1)
        best_C, next_C = logp_CV.topk(2).values.exp().T
        nll_C = -logp_CV.gather(1, gold_C[:, None])[:, 0]
        entropy_C = torch.special.entr(logp_CV.exp()).sum(-1)
        found = (logits_CV.argmax(-1), best_C, nll_C, best_C - next_C, entropy_C)
        parts.append(Said(*(one.cpu().numpy() for one in found)))
    return _joined(parts)


def _joined(parts: list[Said]) -> Said:
    return Said(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _seconds(backbone: Backbone, verbalizers: Verbalizers, vocab_size: int) -> dict[int, float]:
    """Of the next token at each exit and at the end; nothing for models and verbalizers that decode otherwise."""
    if verbalizers.needs_sequence:
        return {}
    try:
        return step_seconds(backbone, verbalizers, vocab_size)
    except ModelError as error:
        say(f"times of exits are not measured: {error}")
        return {}
