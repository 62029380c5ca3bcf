"""Stage sft: supervised finetuning on the labels, the cached samples and nothing else.

Legend: T response tokens, D hidden size, V head rows.
"""

import time
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlsi_cache.models.adapter import train_everything, train_head_and_embeddings
from vlsi_cache.models.layers import Backbone

from .feed import feeding
from .loop import autocast, clip_gradients, make_optimizer, memory_gib, optimizer_step, seed_step
from .student import StudentState

LOGIT_ELEMENTS = 2**26  # at most 256 MiB of fp32 logits at a time


def response_loss(hidden_TD: torch.Tensor, head_weight_VD: torch.Tensor, gold_T: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per response token; logits are made chunk by chunk and made again for the gradient."""

    def chunk_loss(state_TD: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((state_TD @ head_weight_VD.T).float(), ids_T, reduction="sum")

    size = max(1, LOGIT_ELEMENTS // head_weight_VD.shape[0])
    losses = [
        checkpoint(chunk_loss, hidden_TD[i : i + size], gold_T[i : i + size], use_reentrant=False)
        for i in range(0, len(gold_T), size)
    ]
    return torch.stack(losses).sum() / len(gold_T)


def sft(state: StudentState, model: Any, *, num_steps: int) -> dict[str, Any]:
    """Run the stage from its newest checkpoint; returns its entry for `run.json`."""
    distill, checkpoints, log = state.spec.distill, state.checkpoints, state.log
    schedule = distill.sft.schedule
    first, newest = checkpoints.step_of("sft"), checkpoints.latest()
    if newest and newest[0] == "interact":
        checkpoints.load(*newest, model, None)
    if distill.sft.mode == "full":
        model = train_everything(model)
    else:
        train_head_and_embeddings(model)
    backbone = Backbone(model)
    optimizer = make_optimizer(model.parameters(), schedule)
    if first:
        checkpoints.load("sft", first, model, optimizer)
    log.start_stage("sft", step=first, num_steps=num_steps)
    num_micro = distill.batch_size // distill.micro_batch_size
    with feeding(state.feed("sft", first * distill.batch_size)) as feed:
        for step in range(first, num_steps):
            started, waited, tokens, total = time.monotonic(), feed.wait_s, 0, 0.0
            seed_step(distill.seed, "sft", step)
            for _ in range(num_micro):
                batch = feed.next().batch
                tokens += len(batch.gold_T)
                with autocast(state.device):
                    hidden = backbone.capture(batch.inputs, [], batch.rows_T, batch.positions_T)
                    loss = response_loss(hidden[backbone.num_layers], backbone.head_weight, batch.gold_T)
                (loss / num_micro).backward()
                total += loss.item() / num_micro
            clip_gradients(optimizer, schedule, "sft", step, num_steps)
            rate = optimizer_step(optimizer, schedule, step, num_steps)

            seconds = time.monotonic() - started
            log.write(
                stage="sft",
                step=step + 1,
                num_steps=num_steps,
                loss=total,
                learning_rate=rate,
                tokens_per_s=tokens / seconds,
                data_wait_pct=100 * (feed.wait_s - waited) / seconds,
                memory_gib=memory_gib(state.device),
            )
            if (step + 1) % distill.checkpoint_steps == 0 or step + 1 == num_steps:
                checkpoints.save("sft", step + 1, model, optimizer)
    return {"name": "sft", "steps": num_steps, "seconds": log.stage_seconds("sft")}
