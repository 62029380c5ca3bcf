"""The interaction step as VLsI runs it: the teacher in the process, layer-wise, over the whole vocabulary.

Legend: T response tokens, L teacher layers (the last one last), V real vocabulary, M candidates of a window.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from students import Trained, read_spec
from torch import Tensor

from vlsi_cache.data.collate import Batch
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.verbalizer import Verbalizers
from vlsi_cache.runtime import autocast
from vlsi_cache.sparse.matching import Matching, SearchRange, match_rng
from vlsi_cache.teacher.inputs import open_teacher_inputs


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Teacher:
    """The teacher in the student's process."""

    def __init__(self, folder: Path, device: str) -> None:
        inputs = open_teacher_inputs(read_spec(folder))
        self.backbone = inputs.load_backbone(device)
        self.verbalizers = inputs.load_verbalizers(self.backbone)
        self.vocab_size = inputs.encoder.vocab_size

    @torch.no_grad()
    def probs(self, batch: Batch, marks: list[float]) -> tuple[Tensor, Tensor]:
        """Probabilities [L, T, V] of all target layers, fp32, and their entropies [L, T]; one forward pass."""
        layers, last = self.verbalizers.layers, self.backbone.num_layers
        hidden: dict[int, Any] = dict(self.verbalizers.capture(batch.inputs, batch.rows_T, batch.positions_T))
        marks.append(now(self.backbone.device))
        num_tokens, weight_VD = len(batch.gold_T), self.backbone.head_weight[: self.vocab_size]
        p_LTV = torch.empty(len(layers) + 1, num_tokens, self.vocab_size, device=self.backbone.device)
        entropy_LT = torch.empty(p_LTV.shape[:2], device=self.backbone.device)
        for index, layer in enumerate([*layers, last]):
            state_TD = hidden[layer] if layer == last else self.verbalizers.apply(layer, hidden[layer])
            logp_TV = (state_TD @ weight_VD.T).float().log_softmax(-1)
            torch.exp(logp_TV, out=p_LTV[index])
            entropy_LT[index] = -torch.einsum("tv,tv->t", p_LTV[index], logp_TV)
        marks.append(now(self.backbone.device))
        return p_LTV, entropy_LT


def online_step(teacher: Teacher, student: Trained, batch: Batch, step: int, marks: list[float]) -> np.ndarray:
    """The terms of a whole step, the last layer's first, as `cached_step` gives them.

    Each layer's logits are made once and stepped back through before the next layer's: one [T, V] graph at a time.
    """
    state, layers, last = student.state, student.verbalizers.layers, student.backbone.num_layers
    settings = state.spec.distill.interact
    p_LTV, entropy_LT = teacher.probs(batch, marks)
    num_teacher = len(p_LTV) - 1
    matching = Matching(scale=settings.scale, temperature=settings.temperature)
    rng = match_rng(state.spec.distill.seed, step, 0)
    search = SearchRange(len(layers), num_teacher, rng=rng, matching=matching)
    with autocast(state.device):
        hidden: dict[int, Any] = dict(student.verbalizers.capture(batch.inputs, batch.rows_T, batch.positions_T))
    terms, gradients = [], []
    for layer in [last, *layers]:
        leaf_TD = hidden[layer].detach().requires_grad_()
        logq_TV = student_logq(student.verbalizers, student.backbone, layer, leaf_TD, teacher.vocab_size)
        match = num_teacher
        if layer != last:
            match = int(search.draw(window_kl(p_LTV, entropy_LT, search.range, logq_TV.detach()))[0])
        loss = -(entropy_LT[match] + torch.einsum("tv,tv->t", p_LTV[match], logq_TV)).mean()
        (loss * (settings.lambda_last if layer == last else 1.0)).backward()
        terms.append([float(loss.detach()), match])
        gradients.append(leaf_TD.grad)
        del logq_TV, loss
    torch.autograd.backward([hidden[layer] for layer in [last, *layers]], gradients)
    student.update()
    marks.append(now(state.device))
    return np.array(terms)


def student_logq(
    verbalizers: Verbalizers, backbone: Backbone, layer: int, hidden_TD: Tensor, vocab_size: int
) -> Tensor:
    with autocast(hidden_TD.device):
        state_TD = hidden_TD if layer == backbone.num_layers else verbalizers.apply(layer, hidden_TD)
        return (state_TD @ backbone.head_weight[:vocab_size].T).float().log_softmax(-1)


def window_kl(p_LTV: Tensor, entropy_LT: Tensor, window: range, logq_TV: Tensor) -> Tensor:
    """Forward KL of every candidate, mean over the tokens: [M]."""
    chosen = slice(window.start, window.stop)
    products_MT = torch.stack([torch.einsum("tv,tv->t", p_TV, logq_TV) for p_TV in p_LTV[chosen]])  # copies nothing
    return -(entropy_LT[chosen] + products_MT).mean(1)


def dense_values(teacher: Teacher, student: Trained, batch: Batch) -> dict[str, Any]:
    """KL of every student layer from every teacher layer, and of the last from the last."""
    p_LTV, entropy_LT = teacher.probs(batch, [])
    with autocast(student.state.device):
        hidden: dict[int, Any] = dict(student.verbalizers.capture(batch.inputs, batch.rows_T, batch.positions_T))
    rows = []
    for layer in [*student.verbalizers.layers, student.backbone.num_layers]:
        logq_TV = student_logq(student.verbalizers, student.backbone, layer, hidden[layer], teacher.vocab_size)
        rows.append(window_kl(p_LTV, entropy_LT, range(len(p_LTV)), logq_TV).tolist())
    return {"matching": rows, "trained": rows}
