"""Stage sft: supervised finetuning on the labels, the cached samples and nothing else."""

import time
from typing import Any

import torch

from vlsi_cache.models.adapter import train_everything, train_head_and_embeddings
from vlsi_cache.models.layers import Backbone
from vlsi_cache.sparse.kl import linear_cross_entropy

from .feed import feeding
from .loop import autocast, clip_gradients, head_of, make_optimizer, memory_gib, optimizer_step, seed_step
from .student import StudentState


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
            started, waited, tokens = time.monotonic(), feed.wait_s, 0
            losses: list[torch.Tensor] = []
            seed_step(distill.seed, "sft", step)
            for _ in range(num_micro):
                batch = feed.next().batch
                tokens += len(batch.gold_T)
                with autocast(state.device):
                    hidden = backbone.capture(batch.inputs, [], batch.rows_T, batch.positions_T)
                    loss = linear_cross_entropy(hidden[backbone.num_layers], head_of(backbone), batch.gold_T)
                (loss / num_micro).backward()
                losses.append(loss.detach())
            clip_gradients(optimizer, schedule, "sft", step, num_steps)
            rate = optimizer_step(optimizer, schedule, step, num_steps)

            seconds = time.monotonic() - started
            log.write(
                stage="sft",
                step=step + 1,
                num_steps=num_steps,
                loss=float(torch.stack(losses).mean()),
                learning_rate=rate,
                tokens_per_s=tokens / seconds,
                data_wait_pct=100 * (feed.wait_s - waited) / seconds,
                memory_gib=memory_gib(state.device),
            )
            if (step + 1) % distill.checkpoint_steps == 0 or step + 1 == num_steps:
                checkpoints.save("sft", step + 1, model, optimizer)
    return {"name": "sft", "steps": num_steps, "seconds": log.stage_seconds("sft")}
