"""Stage interact: each verbalized student layer learns the teacher layer that Algorithm 1 matches it with.

The adapter on the language model trains; verbalizers, head, embeddings and vision tower are frozen, with gradients
flowing through verbalizers and head into the backbone. Training value: ghost bucket; matching value: unbiased.

Legend: T response tokens, L teacher layers, M candidates, K kept entries, m tail samples, D hidden size.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from vlsi_cache.models.layers import Backbone
from vlsi_cache.models.verbalizer import Verbalizers
from vlsi_cache.sparse.kl import candidate_kl
from vlsi_cache.sparse.matching import choose, match_rng, search_window
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.spec import InteractSpec

from .feed import feeding
from .loop import autocast, clip_gradients, make_optimizer, memory_gib, optimizer_step, seed_step
from .student import StudentState


@dataclass(frozen=True)
class LayerRows:
    """The rows of one micro-batch on the device, layers first."""

    ids_LTK: torch.Tensor
    logprobs_LTK: torch.Tensor
    tail_ids_LTm: torch.Tensor
    tail_mass_LT: torch.Tensor
    entropy_LT: torch.Tensor
    v_real: int

    @classmethod
    def on(cls, device: torch.device, rows: SparseRows, *, v_real: int) -> "LayerRows":
        def move(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)

        return cls(
            move(rows.ids_LTK.astype(np.int64), torch.int64),
            move(rows.logprobs_LTK, torch.float32),
            move(rows.tail_ids_LTm.astype(np.int64), torch.int64),
            move(rows.tail_mass_LT, torch.float32),
            move(rows.entropy_LT, torch.float32),
            v_real,
        )

    def against(self, hidden_TD: torch.Tensor, head_weight_VD: torch.Tensor, window: slice) -> Any:
        """The divergences of one student layer from the teacher layers in `window` (VLsI Algorithm 1, lines 4-7)."""
        return candidate_kl(
            hidden_TD,
            head_weight_VD,
            self.ids_LTK[window],
            self.logprobs_LTK[window],
            self.tail_ids_LTm[window],
            self.tail_mass_LT[window],
            self.entropy_LT[window],
            v_real=self.v_real,
        )


@dataclass(frozen=True)
class Interaction:
    """One micro-batch's loss in nats per response token, and what there is to log about it."""

    loss: torch.Tensor
    kl_layers: list[float]
    kl_last: float
    matched: list[int]


def interaction_loss(
    hidden: Mapping[int, Any],
    backbone: Backbone,
    verbalizers: Verbalizers | None,
    rows: LayerRows,
    *,
    settings: InteractSpec,
    rng: np.random.Generator,
) -> Interaction:
    """Algorithm 1 over the student's target layers, plus the last-layer divergence; `hidden` is by layer, [T, D].

    `rows` holds the teacher's intermediate layers, then the final one. With no verbalizers only the last term is left.
    """
    layers = verbalizers.layers if verbalizers is not None else []
    num_teacher, start = rows.ids_LTK.shape[0] - 1, 0
    last = rows.against(hidden[backbone.num_layers], backbone.head_weight, slice(num_teacher, num_teacher + 1))
    kl_last = last.loss(0)
    loss, kl_layers, matched = settings.lambda_last * kl_last, [], []
    for index, layer in enumerate(layers):
        assert verbalizers is not None
        low, high = search_window(index, start, len(layers), num_teacher)
        verbal_TD = verbalizers.apply(layer, hidden[layer])
        candidates = rows.against(verbal_TD, backbone.head_weight, slice(low, high + 1))
        values = candidates.matching_M.double().cpu().numpy()
        choice = choose(
            values,
            rng=rng,
            scale=settings.scale,
            eps=1e-6,
            temperature=settings.temperature,
            student=index,
            start=low,
        )
        kl = candidates.loss(choice)
        loss = loss + kl
        kl_layers.append(kl.item())
        matched.append(low + choice)
        start = low + choice + 1
    return Interaction(loss, kl_layers, kl_last.item(), matched)


def interact(state: StudentState, model: Any, verbalizers: Verbalizers | None, *, num_steps: int) -> dict[str, Any]:
    """Run the stage from its newest checkpoint; returns its entry for `run.json`."""
    distill, checkpoints, log = state.spec.distill, state.checkpoints, state.log
    settings, layers = distill.interact, state.layers
    backbone = Backbone(model)
    optimizer = make_optimizer(model.parameters(), settings.schedule)
    newest = checkpoints.latest()
    if newest and newest[0] == "sft":
        return {"name": "interact", "steps": num_steps, "seconds": log.stage_seconds("interact")}
    first = checkpoints.step_of("interact")
    if first:
        checkpoints.load("interact", first, model, optimizer)
    log.start_stage("interact", step=first, num_steps=num_steps)
    num_micro = distill.batch_size // distill.micro_batch_size
    capture = verbalizers.capture if verbalizers is not None else partial(backbone.capture, layers=[])
    with feeding(state.feed("interact", first * distill.batch_size)) as feed:
        for step in range(first, num_steps):
            started, waited, tokens = time.monotonic(), feed.wait_s, 0
            results = []
            seed_step(distill.seed, "interact", step)
            for micro_step in range(num_micro):
                micro = feed.next()
                assert micro.rows is not None
                if not micro.rows.num_tokens:  # token selection may leave a sample without rows
                    results.append(Interaction(torch.zeros(()), [0.0] * len(layers), 0.0, []))
                    continue
                tokens += len(micro.batch.gold_T)
                with autocast(state.device):
                    batch = micro.batch
                    hidden = capture(batch.inputs, rows_T=batch.rows_T, positions_T=batch.positions_T)
                    result = interaction_loss(
                        hidden,
                        backbone,
                        verbalizers,
                        LayerRows.on(state.device, micro.rows, v_real=state.cache.header.v_real),
                        settings=settings,
                        rng=match_rng(distill.seed, step * num_micro + micro_step, 0),
                    )
                (result.loss / num_micro).backward()
                results.append(result)
            clip_gradients(optimizer, settings.schedule, "interact", step, num_steps)
            rate = optimizer_step(optimizer, settings.schedule, step, num_steps)

            seconds = time.monotonic() - started
            kl_layers = np.mean([result.kl_layers for result in results], axis=0)
            log.write(
                stage="interact",
                step=step + 1,
                num_steps=num_steps,
                loss=float(np.mean([result.loss.item() for result in results])),
                kl_last=float(np.mean([result.kl_last for result in results])),
                layers={str(layer): float(kl) for layer, kl in zip(layers, kl_layers, strict=True)},
                matched_layers=[[state.cache.layers[j] for j in result.matched] for result in results],
                learning_rate=rate,
                tokens_per_s=tokens / seconds,
                data_wait_pct=100 * (feed.wait_s - waited) / seconds,
                memory_gib=memory_gib(state.device),
            )
            if (step + 1) % distill.checkpoint_steps == 0 or step + 1 == num_steps:
                checkpoints.save("interact", step + 1, model, optimizer)
    return {"name": "interact", "steps": num_steps, "seconds": log.stage_seconds("interact")}
