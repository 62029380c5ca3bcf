"""Stage verbalize: train one verbalizer per target layer to say the response, or what the model says; the rest is
frozen.

The same loop serves the teacher (`train_verbalizers`) and the student (called by `distill`). Since backbone and head
are frozen, the layers' gradients are independent: each layer is stepped through the head and back before the next
one, so one layer's logits are alive at a time.

Legend: T response tokens, D hidden size.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from vlsi_cache.config.training import VerbalizerSpec
from vlsi_cache.data.collate import Batch
from vlsi_cache.interrupts import stopping_between_steps
from vlsi_cache.models.backbone import Backbone, head_of
from vlsi_cache.models.verbalizer import Verbalizers, build_verbalizers
from vlsi_cache.run_files import read_metrics
from vlsi_cache.runs.diagnostics import verbalizer_findings, warn_of
from vlsi_cache.runtime import autocast, memory_gib, seed_step
from vlsi_cache.sparse.cross_entropy import head_output, kl_to_output, linear_cross_entropy
from vlsi_cache.sparse.head import Head

from .loader import Feed
from .optim import Stage, all_done, clip_gradients, make_grouped_optimizer, optimizer_step, refuse_destroyed


def verbalize(
    backbone: Backbone,
    layers: list[int],
    make_feed: Callable[[int], Feed],
    stage: Stage,
    *,
    architecture: VerbalizerSpec,
    vocab_size: int,
    name: str = "verbalize",
) -> tuple[Verbalizers, dict[str, Any]]:
    """Train verbalizers of `layers` as the stage `name`; `make_feed(num_skip)` gives the data from any sample on.

    Returns them and the stage's entry for `run.json`. Goes on from this stage's newest checkpoint.
    """
    settings, num_steps, checkpoints, log = stage.settings, stage.num_steps, stage.checkpoints, stage.log
    verbalizers = build_verbalizers(backbone, layers, **architecture.model_dump(exclude={"loss"}), seed=settings.seed)
    # One group a layer, so that the large gradient of one layer does not clip those of the others.
    groups = {f"layer {layer}": verbalizers.by_layer[str(layer)].parameters() for layer in layers}
    optimizer = make_grouped_optimizer(groups, stage.schedule)
    first = checkpoints.step_of(name)
    if first:
        checkpoints.load(name, first, verbalizers, optimizer)
    log.start_stage(name, step=first, num_steps=num_steps)
    head = head_of(backbone, compiled=stage.compiled).real(vocab_size)
    with make_feed(first * settings.batch_size) as feed, stopping_between_steps() as signals:
        for step in range(first, num_steps):
            started, waited, tokens = time.monotonic(), feed.wait_s, 0
            losses: list[LayerLoss] = []
            for micro in feed.batch():
                seed_step(settings.seed, name, step, micro.place)  # dropout is that of the step, resumed or not
                tokens += len(micro.batch.gold_T)
                losses += layer_losses(verbalizers, head, micro.batch, micro.share_T, loss=architecture.loss)
            stage.processes.sum_gradients(optimizer)
            clip_gradients(optimizer, stage.schedule, name, step, num_steps)
            rate = optimizer_step(optimizer, stage.schedule, step, num_steps)

            # [micro-batches x layers] on the device, read once a step.
            own = [torch.stack(column).view(-1, len(layers)).sum(0).tolist() for column in zip(*losses, strict=True)]
            done = all_done(stage.processes, own, tokens, memory_gib(backbone.device), is_ending=signals.came)
            trained, nll = np.sum(done.found, axis=0).tolist()
            seconds = time.monotonic() - started
            log.write(
                stage=name,
                step=step + 1,
                num_steps=num_steps,
                loss=sum(trained),
                layers={str(layer): value for layer, value in zip(layers, nll, strict=True)},
                learning_rate=rate,
                tokens_per_s=done.num_tokens / seconds,
                data_wait_pct=100 * (feed.wait_s - waited) / seconds,
                memory_gib=done.memory_gib,
            )
            if (step + 1) % settings.checkpoint_steps == 0 or step + 1 == num_steps or done.is_ending:
                checkpoints.save(name, step + 1, verbalizers, optimizer)
                done.end_here()
    refuse_destroyed(verbalizers.named_parameters(), name)
    warn_of(verbalizer_findings(read_metrics(log.path), vocab_size=vocab_size, stage=name))
    entry = {"name": name, "steps": num_steps, "seconds": log.stage_seconds(name), "v_real": vocab_size}
    return verbalizers, entry


class LayerLoss(NamedTuple):
    """One layer and micro-batch, detached: what was trained, and the cross-entropy, in nats by the tokens' shares."""

    trained: torch.Tensor
    nll: torch.Tensor


def layer_losses(
    verbalizers: Verbalizers, head: Head, batch: Batch, share_T: torch.Tensor, *, loss: str
) -> Iterator[LayerLoss]:
    """The loss of each layer, the sum over the tokens by their shares; its gradient is left in the verbalizer."""
    device = share_T.device
    with torch.no_grad(), autocast(device):
        wants_final = loss == "kl_to_final"
        # Nothing below the verbalizers trains, so the backbone runs without a graph.
        hidden = dict(verbalizers.capture(batch.inputs, batch.rows_T, batch.positions_T, with_final=wants_final))
        final_TD: Any = hidden.pop(max(hidden)) if wants_final else None
        own = head_output(final_TD, head) if wants_final else None
    for layer in verbalizers.layers:
        with autocast(device):
            state_TD = verbalizers.apply(layer, hidden.pop(layer))
            if own is None:
                trained = nll = linear_cross_entropy(state_TD, head, batch.gold_T, share_T=share_T)
            else:
                trained, nll = kl_to_output(state_TD, head, batch.gold_T, own, share_T=share_T)
        trained.backward()  # at once: the logits of this layer are gone before the next layer's exist
        yield LayerLoss(trained.detach(), nll.detach())
