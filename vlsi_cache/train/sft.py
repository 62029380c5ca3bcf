"""Stages sft and gates: supervised training on the labels, the cached samples and nothing else.

Legend: T response tokens, D hidden size, V head rows.
"""

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from vlsi_cache.config.training import BatchReduction, Schedule, SftSpec
from vlsi_cache.interrupts import stopping_between_steps
from vlsi_cache.models.backbone import head_of
from vlsi_cache.models.lora import train_everything, train_head_and_embeddings
from vlsi_cache.models.verbalizer import Verbalizers
from vlsi_cache.progress import say
from vlsi_cache.runtime import autocast, memory_gib, seed_step
from vlsi_cache.sparse.cross_entropy import linear_cross_entropy
from vlsi_cache.sparse.head import Head

from .optim import all_done, clip_gradients, make_optimizer, optimizer_step
from .student import StudentState

Stage = Literal["gates", "sft"]


def response_loss(
    hidden_TD: torch.Tensor,
    head: Head,
    gold_T: torch.Tensor,
    share_T: torch.Tensor,
    *,
    with_liger: bool,
) -> torch.Tensor:
    """Cross-entropy in nats, the sum over the tokens by their shares, of which no logits [T, V] are kept.

    With Liger all shares must be the same.
    """
    if not with_liger:
        return linear_cross_entropy(hidden_TD, head, gold_T, share_T=share_T)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    # In fp32 it adds up what the chunks give the head; by default it would do so in the dtype of the weight.
    liger = LigerFusedLinearCrossEntropyLoss(softcap=head.cap, accum_dtype=torch.float32, reduction="sum")
    loss = liger(head.weight_VD, hidden_TD, gold_T, head.bias_V)
    return loss * share_T[0].to(loss.dtype)


def exit_losses(
    hidden: Mapping[int, Any], verbalizers: Verbalizers, head: Head, gold_T: torch.Tensor, share_T: torch.Tensor
) -> dict[int, torch.Tensor]:
    """As `response_loss` for what each verbalized layer says; the head learns from the last layer alone."""
    bias_V = None if head.bias_V is None else head.bias_V.detach()
    frozen = replace(head, weight_VD=head.weight_VD.detach(), bias_V=bias_V)
    states = {layer: verbalizers.apply(layer, hidden[layer]) for layer in verbalizers.layers}
    return {
        layer: linear_cross_entropy(state_TD, frozen, gold_T, share_T=share_T) for layer, state_TD in states.items()
    }


def pick_liger(device: torch.device, head: Head, reduction: BatchReduction) -> tuple[bool, str]:
    """Whether Liger's fused loss is used, and why: where it runs it takes three matrix products, ours takes four."""
    if device.type != "cuda":
        return False, f"ours (Liger's needs CUDA, this is {device.type})"
    if importlib.util.find_spec("liger_kernel") is None:
        return False, "ours (Liger's is not installed: pip install 'vlsi-cache[gpu]')"
    if head.scale != 1.0:
        return False, "ours (Liger's knows no scale of the logits)"
    if reduction != "token":
        return False, f"ours (Liger's knows no weights of tokens, which `batch_reduction: {reduction}` needs)"
    return True, "Liger's fused linear one (CUDA found)"


def what_trains(model: Any, settings: SftSpec) -> Any:
    """The model as this stage trains it: plain and with all its weights, or head and embeddings beside the adapter."""
    if settings.mode == "full":
        return train_everything(model)
    train_head_and_embeddings(model)
    return model


def sft(
    state: StudentState, model: Any, verbalizers: Verbalizers | None = None, *, num_steps: int, stop: int
) -> dict[str, Any]:
    """Run the stage from its newest checkpoint up to step `stop` of a schedule of `num_steps`.

    With `verbalizers` their layers learn the response too (recipe `any-depth`). Returns its entry for `run.json`.
    """
    distill, checkpoints = state.spec.distill, state.checkpoints
    newest = checkpoints.latest()
    # The adapter as the interaction has left it: what trains from here on is another set of weights.
    if newest and newest[0] == "interact":
        checkpoints.load(*newest, model, None)
    model = what_trains(model, distill.sft)
    return supervised(state, model, "sft", distill.sft.schedule, verbalizers, num_steps=num_steps, stop=stop)


def supervised(
    state: StudentState,
    model: Any,
    stage: Stage,
    schedule: Schedule,
    verbalizers: Verbalizers | None = None,
    *,
    num_steps: int,
    stop: int,
) -> dict[str, Any]:
    """The loop of a stage that learns from labels, of whatever of the model trains."""
    distill, checkpoints, log = state.spec.distill, state.checkpoints, state.log
    first = checkpoints.step_of(stage)
    backbone = state.shared_out(model)
    optimizer = make_optimizer(model.parameters(), schedule)
    if first:
        checkpoints.load(stage, first, model, optimizer)
    capture = partial(backbone.capture, layers=[]) if verbalizers is None else verbalizers.capture
    with_liger, reason = pick_liger(state.device, head_of(backbone), distill.batch_reduction)
    say(f"{stage}: cross-entropy is {reason}")
    exit_layers, exit_weight = [] if verbalizers is None else verbalizers.layers, distill.exit_weight or 0.0
    weights = {backbone.num_layers: 1.0, **{layer: exit_weight / len(exit_layers) for layer in exit_layers}}
    log.start_stage(stage, step=first, num_steps=stop)
    with state.feed(stage, first * distill.batch_size) as feed, stopping_between_steps() as signals:
        for step in range(first, stop):
            started, waited, tokens = time.monotonic(), feed.wait_s, 0
            losses: list[torch.Tensor] = []
            for micro in feed.batch():
                seed_step(distill.seed, stage, step, micro.place)  # dropout is that of the step, resumed or not
                batch = micro.batch
                tokens += len(batch.gold_T)
                with autocast(state.device):
                    hidden = capture(batch.inputs, rows_T=batch.rows_T, positions_T=batch.positions_T)
                    state_TD: Any = hidden[backbone.num_layers]
                    loss = response_loss(
                        state_TD,
                        head_of(backbone, compiled=state.compiled),
                        batch.gold_T,
                        micro.share_T,
                        with_liger=with_liger,
                    )
                    found = {backbone.num_layers: loss}
                    if verbalizers is not None:
                        found |= exit_losses(hidden, verbalizers, head_of(backbone), batch.gold_T, micro.share_T)
                torch.stack([weights[layer] * one for layer, one in found.items()]).sum().backward()
                losses.append(torch.stack([one.detach() for one in found.values()]))
            # Gradients of all micro-batches have been added up: their shares make the loss that of the whole batch.
            state.processes.sum_gradients(optimizer)
            clip_gradients(optimizer, schedule, stage, step, num_steps)
            rate = optimizer_step(optimizer, schedule, step, num_steps)

            own = torch.stack(losses).sum(0).tolist()  # waits for the device, once a step
            done = all_done(state.processes, own, tokens, memory_gib(state.device), is_ending=signals.came)
            by_layer = dict(zip(weights, np.sum(done.found, axis=0).tolist(), strict=True))
            shown = {"ce_last": by_layer[backbone.num_layers], "layers": {str(k): by_layer[k] for k in weights}}
            seconds = time.monotonic() - started
            log.write(
                stage=stage,
                step=step + 1,
                num_steps=num_steps,
                loss=sum(weights[layer] * loss for layer, loss in by_layer.items()),
                **(shown if exit_layers else {}),
                learning_rate=rate,
                tokens_per_s=done.num_tokens / seconds,
                data_wait_pct=100 * (feed.wait_s - waited) / seconds,
                memory_gib=done.memory_gib,
            )
            if (step + 1) % distill.checkpoint_steps == 0 or step + 1 == stop or done.is_ending:
                checkpoints.save(stage, step + 1, model, optimizer)
                done.end_here()
    return {
        "name": stage,
        "steps": stop,
        "schedule_steps": num_steps,
        "seconds": log.stage_seconds(stage),
        "cross_entropy": reason,
    }
