"""A student beside its teacher's cache, loaded as the stages load it, and one training step of every kind.

Every step works on one micro-batch and ends with the optimizer's update, so that steps can be compared one by one.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import apply_overrides, load_spec, spec_from_dict
from vlsi_cache.config.training import Schedule
from vlsi_cache.models.backbone import Backbone, head_of
from vlsi_cache.models.lora import add_lora, checkpoint_activations, train_head_and_embeddings
from vlsi_cache.models.save import init_student
from vlsi_cache.models.verbalizer import Verbalizers, build_verbalizers
from vlsi_cache.runs.run_dir import Run
from vlsi_cache.runtime import autocast
from vlsi_cache.sparse.kl import LayerRows
from vlsi_cache.sparse.matching import match_rng
from vlsi_cache.store import reader
from vlsi_cache.teacher.inputs import open_teacher_inputs
from vlsi_cache.train.interact import Targets, losses_of, micro_batch
from vlsi_cache.train.loader import Feed, MicroBatch, cached_records
from vlsi_cache.train.optim import clip_gradients, make_grouped_optimizer, make_optimizer, optimizer_step
from vlsi_cache.train.sft import pick_liger, response_loss
from vlsi_cache.train.student import StudentState, open_student
from vlsi_cache.train.verbalize import layer_losses

assert peft is not None  # imported here, so that memory counted from later on leaves it out
PACKAGES = ("torch", "transformers", "peft", "numpy", "zarr")
KEPT_LAYERS = {"smollm2": "0-5,24-29", "demo": "0-1,6-7"}  # of the teacher, in the student
TARGETS = {"smollm2": [2, 5, 8, 11], "demo": [1, 2, 3]}  # of the student
TINY = ("store.part_mib=0.1", "distill.batch_size=2", "distill.micro_batch_size=2")  # of the demo, for a look at it
NUM_STEPS = 1000  # what the schedules of the steps below believe

Step = Callable[[MicroBatch], Any]


def prepare(
    name: str,
    folder: Path,
    *,
    num_samples: int,
    device: str,
    verbalizers: str | None = None,
    overrides: Sequence[str] = (),
) -> CacheSpec:
    """Write the student, the teacher's verbalizers unless there are some, and the spec; the cache is not built yet.

    Parts shrink with the number of samples, so that a cache has as many of them as that of the whole spec.
    """
    spec = load_spec(name)
    part_mib = spec.store.part_mib * num_samples / spec.data.options["num_samples"]
    size = [f"data.options.num_samples={num_samples}", f"store.part_mib={part_mib}"]
    spec = apply_overrides(spec, [*size, f"distill.layers={TARGETS[name]}", *overrides])
    teacher = spec.teacher
    init_student(teacher.model, KEPT_LAYERS[name], folder / "student", gguf_file=teacher.gguf_file)
    if verbalizers is None and teacher.verbalizers is None:
        inputs = open_teacher_inputs(spec)
        fresh = build_verbalizers(
            inputs.load_backbone(device), inputs.target_layers, **spec.verbalizer.model_dump(exclude={"loss"})
        )
        verbalizers = str(fresh.save(folder / "verbalizers", provenance={"teacher_digest": inputs.weights_digest}))
    if verbalizers is not None:
        spec = apply_overrides(spec, [f"teacher.verbalizers={verbalizers}"])
    (folder / "spec.json").write_text(spec.model_dump_json(indent=1), encoding="utf-8")
    return spec


def read_spec(folder: Path) -> CacheSpec:
    return spec_from_dict(json.loads((folder / "spec.json").read_text(encoding="utf-8")), where=str(folder))


def load_student(folder: Path, device: str, *, checkpointing: bool = False) -> StudentState:
    """The student of `folder` with the cache in it; with gradient checkpointing if the spec or the caller wants it."""
    spec = read_spec(folder)
    if checkpointing:
        spec = apply_overrides(spec, ["distill.gradient_checkpointing=true"])
    student = open_student(reader.open(folder / "cache"), spec, str(folder / "student"))
    run = Run(folder / f"run-{os.getpid()}", {})
    run.path.mkdir(exist_ok=True)
    state = student.load(run, device=device)
    state.log.close()  # nothing is logged here
    return state


def touch(model: torch.nn.Module) -> None:
    """Read every weight once: those mapped from a file become resident only then."""
    for parameter in model.parameters():
        parameter.sum()


def feed(state: StudentState, *, with_rows: bool = True) -> Feed:
    """Micro-batches, the same with teacher rows and without."""
    distill, layers = state.spec.distill, state.teacher_layers if with_rows else []
    samples = cached_records(
        state.cache, state.records, layers=layers, seed=distill.seed, window_parts=distill.window_parts
    )
    size = distill.micro_batch_size  # each is a whole batch, with an update of its own
    return Feed(
        samples,
        state.encoder,
        batch_size=size,
        micro_batch_size=size,
        reduction=distill.batch_reduction,
        device=state.device,
    )


def first_batches(state: StudentState, num: int) -> list[MicroBatch]:
    with feed(state) as batches:
        return list(islice(iter(batches.next, None), num))


@dataclass(frozen=True)
class Trained:
    """A student with an adapter in stage interact's state, and what updates it."""

    state: StudentState
    model: Any
    backbone: Backbone
    verbalizers: Verbalizers
    update: Callable[[], None]


def for_interaction(state: StudentState) -> Trained:
    """Fresh frozen verbalizers, a fresh adapter, its optimizer."""
    spec = state.spec
    verbalizers = build_verbalizers(Backbone(state.model), state.layers, **spec.verbalizer.model_dump(exclude={"loss"}))
    model = with_adapter(state)
    update = updating(
        make_optimizer(model.parameters(), spec.distill.interact.schedule), spec.distill.interact.schedule
    )
    return Trained(state, model, Backbone(model), verbalizers.requires_grad_(False).eval(), update)


def with_adapter(state: StudentState) -> Any:
    distill = state.spec.distill
    torch.manual_seed(distill.seed)
    model = add_lora(state.model, **distill.lora.model_dump())
    if distill.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train()


def updating(optimizer: torch.optim.Optimizer, schedule: Schedule) -> Callable[[], None]:
    """Clip, step, clear, as every stage does."""

    def update() -> None:
        clip_gradients(optimizer, schedule, "benchmark", 0, NUM_STEPS)
        optimizer_step(optimizer, schedule, 0, NUM_STEPS)

    return update


def cached_step(trained: Trained, micro: MicroBatch, step: int) -> Any:
    """One micro-batch of stage interact; the loss and the teacher target of each term, the last layer's first."""
    state, settings, batch = trained.state, trained.state.spec.distill.interact, micro.batch
    with autocast(state.device):
        hidden = trained.verbalizers.capture(batch.inputs, rows_T=batch.rows_T, positions_T=batch.positions_T)
    targets = Targets(LayerRows.of(micro.rows, tau=settings.tau, device=state.device), batch.gold_T, micro.share_T)
    head = head_of(trained.backbone).real(state.cache.header.vocab_size)
    rng = match_rng(state.spec.distill.seed, step, 0)
    terms = micro_batch(hidden, targets, head, trained.verbalizers, settings, rng)
    losses_of([(micro, terms)], settings, state.teacher_layers)
    trained.update()
    return np.array([[float(term.loss), int(term.target_n)] for term in terms if term.target_n is not None])


def interact_step(state: StudentState) -> Step:
    trained = for_interaction(state)
    return lambda micro: cached_step(trained, micro, 0)


def sft_step(state: StudentState) -> Step:
    """Stage sft: adapter, head and embeddings train."""
    schedule, model = state.spec.distill.sft.schedule, with_adapter(state)
    train_head_and_embeddings(model)
    backbone, update = Backbone(model), updating(make_optimizer(model.parameters(), schedule), schedule)
    head = head_of(backbone)
    with_liger, _ = pick_liger(state.device, head, state.spec.distill.batch_reduction)

    def step(micro: MicroBatch) -> float:
        batch = micro.batch
        with autocast(state.device):
            hidden = backbone.capture(batch.inputs, [], batch.rows_T, batch.positions_T)
            state_TD = hidden[backbone.num_layers]
            loss = response_loss(state_TD, head, batch.gold_T, micro.share_T, with_liger=with_liger)
        loss.backward()
        update()
        return float(loss.detach())

    return step


def plain_step(state: StudentState, *, with_head: bool) -> Step:
    """The loss that transformers computes itself, from the logits at all positions."""
    schedule, model = state.spec.distill.sft.schedule, with_adapter(state)
    if with_head:
        train_head_and_embeddings(model)
    update = updating(make_optimizer(model.parameters(), schedule), schedule)

    def step(micro: MicroBatch) -> float:
        with autocast(state.device):
            loss = model(**micro.batch.inputs, labels=micro.batch.labels_BS, use_cache=False).loss
        loss.backward()
        update()
        return float(loss.detach())

    return step


def verbalize_step(state: StudentState) -> Step:
    spec, backbone = state.spec, Backbone(state.model)
    verbalizers = build_verbalizers(backbone, state.layers, **spec.verbalizer.model_dump(exclude={"loss"}))
    groups = {f"layer {layer}": verbalizers.by_layer[str(layer)].parameters() for layer in state.layers}
    update = updating(make_grouped_optimizer(groups, spec.distill.verbalize), spec.distill.verbalize)

    head = head_of(backbone).real(state.encoder.vocab_size)

    def step(micro: MicroBatch) -> list[float]:
        losses = list(layer_losses(verbalizers, head, micro.batch, micro.share_T, loss="ce"))
        update()
        return torch.stack([loss.nll for loss in losses]).tolist()

    return step


def forward_step(state: StudentState, *, layers: Sequence[int] = ()) -> Step:
    """The backbone alone: no head, no gradient."""
    backbone = Backbone(state.model)

    def step(micro: MicroBatch) -> None:
        batch = micro.batch
        with torch.no_grad(), autocast(state.device):
            backbone.capture(batch.inputs, layers, batch.rows_T, batch.positions_T)

    return step
