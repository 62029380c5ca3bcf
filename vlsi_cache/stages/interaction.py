"""One micro-batch of the interaction step: Algorithm 1 over the student's target layers, and the last layer.

Each term goes through verbalizer, head and back before the next one, so one layer's state is alive at a time beside
the gradients in the hidden states; the backbone is stepped back through once, at the end. What is logged stays on the
device until the optimizer step is done.

Legend: T response tokens, S student target layers, N terms: the last layer, then the S target layers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlsi_cache.errors import ModelError
from vlsi_cache.models.layers import Backbone, LayerSequence
from vlsi_cache.models.verbalizer import Verbalizers
from vlsi_cache.sparse.divergences import Divergence
from vlsi_cache.sparse.drawing import Matcher
from vlsi_cache.sparse.kl import LayerRows, candidate_kl
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.spec import InteractSpec
from vlsi_cache.store.layout import CacheHeader

from .loop import autocast, head_of

# A divergence is never negative; rounded log-probs can take one of nearly 0 a little below it.
LOWEST_NATS = -0.05
VALUE, LOWEST, LOWEST_TOKEN, MATCH = range(4)  # columns of what is logged of a term


@dataclass(frozen=True)
class Interaction:
    """What is left of a micro-batch: `terms_N4` on the device (float64), and whose tokens it had.

    Columns: mean in nats per response token, the lowest value of a token (NaN if one is), that token, the index of the
    teacher target. None if the micro-batch has no rows.
    """

    terms_N4: Tensor | None
    sample_ids: Sequence[str]
    num_tokens: Sequence[int]

    def sample_of(self, token: int) -> str:
        """The id of the sample that a response token belongs to."""
        return self.sample_ids[int(np.searchsorted(np.cumsum(self.num_tokens), token, side="right"))]


def device_rows(rows: SparseRows, header: CacheHeader, settings: InteractSpec, device: torch.device) -> LayerRows:
    """The rows of a micro-batch, ready on the device: the teacher's intermediate layers, then the final one."""
    return LayerRows.of(
        rows.ids_LTK,
        rows.logprobs_LTK,
        rows.tail_ids_LTm,
        rows.tail_mass_LT,
        rows.entropy_LT,
        rows.lse_LTn,
        v_real=header.v_real,
        tau=settings.tau,
        taus=header.taus,
        device=device,
    )


def interaction(
    hidden: Mapping[int, Tensor | LayerSequence],
    backbone: Backbone,
    verbalizers: Verbalizers | None,
    rows: LayerRows,
    *,
    settings: InteractSpec,
    rng: np.random.Generator,
    scale: float = 1.0,
    compiled: bool = False,
) -> Tensor:
    """Step back through what `hidden` came from, with `scale` times (sum of layers + lambda_last * last).

    `hidden` is by layer; `rows` holds the teacher's intermediate layers, then the final one. With no verbalizers only
    the last term is left. Returns the terms as `Interaction` holds them.
    """
    if backbone.head_weight.requires_grad:
        raise ModelError("the head trains: while layers are compared through it, in stage interact, it must be frozen")
    layers, last = verbalizers.layers if verbalizers is not None else [], backbone.num_layers
    num_teacher = rows.num_layers - 1
    matcher = Matcher(len(layers), num_teacher, rng=rng, scale=settings.scale, temperature=settings.temperature)
    divergence = Divergence(settings.divergence, settings.beta, settings.skew)
    gradients: dict[int, Tensor] = {}

    def term(layer: int) -> Tensor:
        own, leaf = _cut(hidden[layer])
        with autocast(leaf.device):
            verbal_TD = leaf if verbalizers is None or layer == last else verbalizers.apply(layer, own)
            window = range(num_teacher, num_teacher + 1) if layer == last else matcher.window()
            candidates = candidate_kl(
                verbal_TD, head_of(backbone), rows, window, divergence=divergence, compiled=compiled
            )
        choice = 0 if layer == last else matcher.choose(candidates.matching_M)
        loss, tokens_T = candidates.choose(choice)
        if leaf.requires_grad:
            (loss * scale * (settings.lambda_last if layer == last else 1.0)).backward()
            assert leaf.grad is not None
            gradients[layer] = leaf.grad
        lowest, token = tokens_T.min(0)
        match = torch.as_tensor(window.start + choice, device=leaf.device)
        return torch.stack([x.detach().double() for x in (loss, lowest, token, match)])

    terms_N4 = torch.stack([term(layer) for layer in [last, *layers]])
    if gradients:
        torch.autograd.backward([_cut_at(hidden[layer]) for layer in gradients], list(gradients.values()))
    return terms_N4


def read_terms(results: Sequence[Interaction], settings: InteractSpec, teacher_layers: Sequence[int]) -> np.ndarray:
    """The terms of all micro-batches that have rows, [., N, 4]: the one place of a step that waits for the device.

    Raises ModelError for a token whose divergence is negative or not finite, naming sample and layers.
    """
    results = [result for result in results if result.terms_N4 is not None]
    if not results:
        return np.zeros((0, 1, 4))
    values = torch.stack([result.terms_N4 for result in results if result.terms_N4 is not None]).cpu().numpy()
    wrong = ~(np.isfinite(values[..., VALUE]) & (values[..., LOWEST] >= LOWEST_NATS * settings.tau**2))
    for number, index in np.argwhere(wrong)[:1]:
        _, lowest, token, match = values[number, index]
        student = "last layer" if index == 0 else f"target layer {index} of {values.shape[1] - 1}"
        raise ModelError(
            f"sample `{results[number].sample_of(int(token))}`: the divergence of the student's {student} from teacher "
            f"layer {teacher_layers[int(match)]} is {lowest:.4g} nats at one of its tokens. Not finite: training has "
            "diverged, start a new run with a lower `learning_rate` or a longer `warmup` for stage interact. Negative: "
            "the cached rows are damaged, run vlsi-cache verify CACHE"
        )
    return values


def _cut(hidden: Tensor | LayerSequence) -> tuple[Tensor | LayerSequence, Tensor]:
    """The same hidden states with a gradient of their own, and the tensor that will hold it."""
    whole = _cut_at(hidden)
    leaf = whole.detach().requires_grad_(whole.requires_grad)
    return (dataclasses.replace(hidden, hidden_BSD=leaf) if isinstance(hidden, LayerSequence) else leaf), leaf


def _cut_at(hidden: Tensor | LayerSequence) -> Tensor:
    return hidden.hidden_BSD if isinstance(hidden, LayerSequence) else hidden
