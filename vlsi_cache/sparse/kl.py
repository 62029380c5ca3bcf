"""The layer-wise loss on sparse rows: one walk over the vocabulary serves every candidate teacher layer.

Forward KL of candidate i has dL/dz = c * softmax(z) + (something on its kept ids only), and softmax(z) is common to
all candidates. So the walk computes G = softmax(h W^T) W and the log-probs at all candidates' ids; the gradient of
whichever candidate is chosen later is c * G + sum_k s_k W[id_k]. Nothing of shape [T, V] exists.

The price: where the student's tail mass is far below the teacher's, the two terms nearly cancel, and the gradient of
that token has a relative error of a few fp32 units divided by the student's tail mass (7e-4 at 2e-4).

The trained value is the ghost-bucket KL (k kept ids and one bucket for the tail): 0 <= ghost <= dense KL. The value
for matching is the unbiased estimate -H - sum p log q - tail/m * sum log q(tail samples).

Shapes: T response tokens, M candidates, K kept entries, m tail samples, V vocabulary, B ids of a block, D hidden size.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlsi_cache.errors import DataError, ModelError

from .logits import Head, compute_dtype, project

__all__ = ["CandidateKL", "candidate_kl", "sparse_kl"]

FLOOR = 1e-6  # of the student's tail mass, in value and gradient alike: fp32 log-probs resolve no less
LOG_FLOOR = math.log(FLOOR)


def sparse_kl(
    hidden_TD: Tensor,
    head_weight_VD: Tensor,
    row: Any,
    *,
    layer: int = -1,
    weights_T: Tensor | None = None,
    v_real: int | None = None,
) -> Tensor:
    """Forward KL(teacher || student) of one cached layer, in nats, for any trainer: a scalar, mean over the tokens.

    `hidden_TD` is what enters the student's head at the response tokens and gets the gradient; the head is frozen.
    `row` has the attributes of `SparseRows` (numpy or torch), `layer` indexes its layers. `weights_T` weighs tokens.
    Pass the cache's `v_real` if the student's head has padding rows. Raises DataError or ModelError.

    >>> import torch
    >>> from vlsi_cache.sparse.topk import sample_uniforms, stack_layers, teacher_rows
    >>> head_VD, gold_T = torch.eye(8), torch.tensor([1, 2])
    >>> uniforms_LTm = sample_uniforms(0, "sample-id", 2, 1, 4)
    >>> teacher = teacher_rows(3 * head_VD[gold_T], head_VD, gold_T, top_k=4, uniforms_Tm=uniforms_LTm[0], v_real=8)
    >>> row = stack_layers([teacher])
    >>> hidden_TD = torch.zeros(2, 8, requires_grad=True)
    >>> loss = sparse_kl(hidden_TD, head_VD, row)
    >>> loss.backward()
    >>> round(loss.item(), 3), hidden_TD.grad.argmin(1).tolist()
    (1.005, [1, 2])
    """

    def at_layer(name: str) -> Tensor:
        array_LTx = getattr(row, name)
        if isinstance(array_LTx, np.ndarray):
            array_LTx = array_LTx.astype(np.int64 if array_LTx.dtype.kind in "iu" else np.float32, copy=False)
        return torch.as_tensor(array_LTx[layer], device=hidden_TD.device)[None]

    candidates = candidate_kl(
        hidden_TD,
        head_weight_VD,
        at_layer("ids_LTK"),
        at_layer("logprobs_LTK"),
        # The loss is the ghost bucket's, which needs no tail samples.
        at_layer("tail_ids_LTm")[..., :0],
        at_layer("tail_mass_LT"),
        at_layer("entropy_LT"),
        v_real=head_weight_VD.shape[0] if v_real is None else v_real,
        weights_T=weights_T,
    )
    return candidates.loss(0)


def candidate_kl(
    hidden_TD: Tensor,
    head_weight_VD: Tensor,
    ids_MTK: Tensor,
    logprobs_MTK: Tensor,
    tail_ids_MTm: Tensor,
    tail_mass_MT: Tensor,
    entropy_MT: Tensor,
    *,
    v_real: int,
    block: int = 1024,
    weights_T: Tensor | None = None,
) -> "CandidateKL":
    """Compare one student layer with M candidate teacher layers in one pass; see CandidateKL for what comes out.

    Logits and sums are fp32 for bf16 inputs (float64 for float64 ones). Peak memory is about
    T * block * 6 + 4 * T * D + T * M * (K + m) * 16 bytes. Raises DataError or ModelError.
    """
    head = Head(head_weight_VD).real(v_real)
    head.check(hidden_TD)
    wants_gradient = torch.is_grad_enabled() and hidden_TD.requires_grad
    if torch.is_grad_enabled() and head_weight_VD.requires_grad:
        raise ModelError(
            "the head is frozen here, but `head_weight_VD` requires a gradient, which it would silently not get: "
            "pass head_weight_VD.detach() or call requires_grad_(False) on it (also where LoRA is on `lm_head`)"
        )
    _check_shapes(hidden_TD.shape[0], ids_MTK, logprobs_MTK, tail_ids_MTm, tail_mass_MT, entropy_MT)
    # Autocast would turn the fp32 products into bf16 behind our back.
    with torch.no_grad(), torch.autocast(hidden_TD.device.type, enabled=False):
        dtype = compute_dtype(hidden_TD)
        return CandidateKL(
            _Walk(hidden_TD, head_weight_VD[:v_real], (ids_MTK, tail_ids_MTm), block, wants_gradient),
            ids_MTK,
            logprobs_MTK.to(dtype),
            tail_mass_MT.to(dtype),
            entropy_MT.to(dtype),
            _share_of_tokens(weights_T, hidden_TD),
        )


class CandidateKL:
    """The state of one student layer against M candidate teacher layers.

    `matching_M`: the unbiased value for layer matching, teacher entropy included, detached; where there is a tail but
    no sample of it (m = 0), the ghost value.
    `ghost_MT`: ghost-bucket KL of every token, detached. Means over tokens are weighted if weights were given.
    """

    def __init__(
        self,
        walk: "_Walk",
        ids_MTK: Tensor,
        logprobs_MTK: Tensor,
        tail_mass_MT: Tensor,
        entropy_MT: Tensor,
        share_T: Tensor,
    ) -> None:
        self._walk, self._share_T = walk, share_T
        self._ids_MTK, self._logprobs_MTK, self._tail_mass_MT = ids_MTK, logprobs_MTK, tail_mass_MT
        self._logq_MTK, logq_MTm = walk.logprobs
        cross_MT = _masked(logprobs_MTK, logprobs_MTK.exp().mul_(self._logq_MTK)).sum(-1)
        self.ghost_MT = _ghost_value(logprobs_MTK, tail_mass_MT, cross_MT, _log_tail(logprobs_MTK, self._logq_MTK))
        # Without a tail (sampled rows, or every token kept) the kept entries are all there is to estimate from.
        unbiased_MT = -entropy_MT - cross_MT
        if logq_MTm.shape[-1]:
            values_MT = unbiased_MT - tail_mass_MT * logq_MTm.mean(-1)
        else:
            values_MT = torch.where(tail_mass_MT > 0, self.ghost_MT, unbiased_MT)
        self.matching_M = values_MT @ share_T

    def loss(self, candidate: int | Tensor) -> Tensor:
        """Ghost KL of this candidate, differentiable in the hidden states; an int or a 0-dim tensor (no host sync)."""
        index = torch.as_tensor(candidate, device=self.ghost_MT.device).reshape(1)
        with torch.no_grad(), torch.autocast(self.ghost_MT.device.type, enabled=False):
            value = self.ghost_MT.index_select(0, index)[0] @ self._share_T
            if self._walk.mean_TD is None:
                return value
            gradient_TD = self._gradient(*(x.index_select(0, index)[0] for x in self._parts()))
        return _GivenGradient.apply(self._walk.hidden_TD, value, gradient_TD)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._ids_MTK, self._logprobs_MTK, self._logq_MTK, self._tail_mass_MT

    def _gradient(self, ids_TK: Tensor, logprobs_TK: Tensor, logq_TK: Tensor, tail_T: Tensor) -> Tensor:
        """d(weighted mean)/d(hidden) = share * (c * G + sum_k s_k W[id_k])."""
        log_tail_T = _log_tail(logprobs_TK, logq_TK)
        p_TK = logprobs_TK.exp()
        q_TK = _masked(logprobs_TK, logq_TK.exp())
        # Below the floor the bucket's value is constant, so it gives no gradient.
        tail_T = torch.where(log_tail_T > LOG_FLOOR, tail_T, 0.0)
        ratio_T = tail_T / log_tail_T.exp()
        c_T = (p_TK.sum(-1) + tail_T - ratio_T) * self._share_T
        s_TK = (ratio_T[:, None] * q_TK - p_TK) * self._share_T[:, None]
        assert self._walk.mean_TD is not None
        if self._walk.rounds:
            s_TK += c_T[:, None] * _masked(logprobs_TK, self._walk.rounding(ids_TK, logq_TK))
        return _add_rows(c_T[:, None] * self._walk.mean_TD, s_TK, ids_TK, self._walk.weight_VD)


class _GivenGradient(torch.autograd.Function):
    """A value whose gradient in the hidden states is already known."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, value: Tensor, gradient_TD: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_TD)
        ctx.dtype = hidden_TD.dtype
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the names)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None, None]:
        (gradient_TD,) = ctx.saved_tensors
        return (grad_outputs[0] * gradient_TD).to(ctx.dtype), None, None


class _Walk:
    """Online softmax over vocabulary blocks: log-probs at chosen ids, and the mean head row G if a gradient is wanted.

    G is rescaled whenever a block raises the running maximum, as flash attention does with K = V = W.
    """

    def __init__(
        self, hidden_TD: Tensor, weight_VD: Tensor, ids: tuple[Tensor, ...], block: int, wants_gradient: bool
    ) -> None:
        self.hidden_TD, self.weight_VD, self.block = hidden_TD, weight_VD, min(block, len(weight_VD))
        dtype = compute_dtype(hidden_TD)
        # On a GPU the probabilities enter the second product in the head's bf16; what this loses on the kept ids is
        # put back by `rounding`.
        self.rounds = wants_gradient and _rounds_probs(hidden_TD, weight_VD)
        picks = [_Picks(x, self.block, len(weight_VD), dtype) for x in ids]
        num_tokens = hidden_TD.shape[0]
        max_T1 = hidden_TD.new_full((num_tokens, 1), -math.inf, dtype=dtype)
        sum_T1 = torch.zeros_like(max_T1)
        mean_TD = torch.zeros_like(hidden_TD, dtype=dtype) if wants_gradient else None
        maxima: list[Tensor] = []
        buffer = hidden_TD.new_empty(num_tokens * self.block, dtype=dtype)
        for index, start in enumerate(range(0, len(weight_VD), self.block)):
            weight_BD = weight_VD[start : start + self.block]
            z_TB = buffer[: num_tokens * len(weight_BD)].view(num_tokens, len(weight_BD))
            Head(weight_VD).logits_into(z_TB, hidden_TD, start)
            for pick in picks:
                pick.collect(index, z_TB)
            new_T1 = torch.maximum(max_T1, z_TB.amax(1, keepdim=True))
            rescale_T1 = (max_T1 - new_T1).exp_()
            max_T1 = new_T1
            z_TB.sub_(max_T1).exp_()
            sum_T1.mul_(rescale_T1).add_(z_TB.sum(1, keepdim=True))
            if mean_TD is not None:
                project(mean_TD.mul_(rescale_T1), z_TB.to(weight_VD.dtype) if self.rounds else z_TB, weight_BD)
                if self.rounds:
                    maxima.append(max_T1)
        self.mean_TD = None if mean_TD is None else mean_TD.div_(sum_T1)
        # Maximum first, then log-sum: subtracting their fp32 sum would cost the likeliest tokens, and with them the
        # tail mass, one more digit.
        self._max_T1, self._log_sum_T1 = max_T1, sum_T1.log()
        self.logprobs = [pick.values.sub_(max_T1).sub_(self._log_sum_T1).clamp_(max=0) for pick in picks]
        self._max_TC = torch.cat(maxima, 1) if maxima else None

    def rounding(self, ids_TK: Tensor, logq_TK: Tensor) -> Tensor:
        """q - (q as it entered G) at these ids."""
        assert self._max_TC is not None
        log_unit_TK = self._max_TC.gather(1, ids_TK // self.block) - self._max_T1 - self._log_sum_T1
        p_TK = (logq_TK - log_unit_TK).exp()
        return (p_TK - p_TK.to(self.weight_VD.dtype)) * log_unit_TK.exp()


class _Picks:
    """Logits at chosen ids: the entries are sorted by vocabulary block once, so that a block touches only its own."""

    def __init__(self, ids_MTX: Tensor, block: int, v_real: int, dtype: torch.dtype) -> None:
        self.block, self.ids = block, ids_MTX.reshape(-1)
        self.num_tokens, self.per_token = ids_MTX.shape[1], max(1, ids_MTX.shape[2])
        self.values = torch.empty(ids_MTX.shape, dtype=dtype, device=ids_MTX.device)
        low, high = (int(x) for x in torch.aminmax(self.ids)) if self.ids.numel() else (0, 0)
        if low < 0 or high >= v_real:
            raise DataError(f"token ids go from {low} to {high}, outside the real vocabulary of {v_real} tokens")
        num_blocks = math.ceil(v_real / block)
        # Few-valued small integers take the radix sort, over ten times faster than int64.
        blocks = (self.ids // block).to(torch.int16 if num_blocks < 2**15 else torch.int32)
        self.order = blocks.sort(stable=True).indices
        self.ends = [0, *torch.bincount(blocks, minlength=num_blocks).cumsum(0).tolist()]

    def collect(self, index: int, z_TB: Tensor) -> None:
        entries = self.order[self.ends[index] : self.ends[index + 1]]
        tokens = entries // self.per_token % self.num_tokens
        slots = tokens * z_TB.shape[1] + self.ids[entries] - index * self.block
        self.values.view(-1)[entries] = z_TB.view(-1)[slots]


def _rounds_probs(hidden_TD: Tensor, weight_VD: Tensor) -> bool:
    return hidden_TD.is_cuda and hidden_TD.dtype == weight_VD.dtype and weight_VD.dtype.itemsize == 2


def _masked(logprobs: Tensor, values: Tensor) -> Tensor:
    """`values`, but 0 at padded entries, whatever their ids point at."""
    return values.masked_fill_(logprobs == -math.inf, 0.0)


def _log_tail(logprobs: Tensor, logq: Tensor) -> Tensor:
    """log of the student's mass outside the kept ids, by log1mexp of their log-sum, floored."""
    kept = logq.masked_fill(logprobs == -math.inf, -math.inf).logsumexp(-1).clamp_(max=0)
    tail = torch.where(kept > -math.log(2), (-torch.expm1(kept)).log(), torch.log1p(-kept.exp()))
    return tail.clamp(min=LOG_FLOOR)


def _ghost_value(logprobs: Tensor, tail_mass: Tensor, cross: Tensor, log_tail: Tensor) -> Tensor:
    entropy = _masked(logprobs, logprobs.exp().mul_(logprobs)).sum(-1)
    # Clamped: rounding and the floor can leave a KL of nearly 0 slightly below it.
    return (entropy - cross + torch.xlogy(tail_mass, tail_mass) - tail_mass * log_tail).clamp_(min=0)


def _add_rows(out_TD: Tensor, s_TK: Tensor, ids_TK: Tensor, weight_VD: Tensor) -> Tensor:
    """out += sum_k s_k W[id_k] in the dtype of `out`, a few tokens at a time: [T, K, D] never exists."""
    step = max(1, (1 << 20) // (ids_TK.shape[1] * weight_VD.shape[1]))
    for start in range(0, len(out_TD), step):
        t = slice(start, start + step)
        out_TD[t].unsqueeze(1).baddbmm_(s_TK[t].unsqueeze(1), weight_VD[ids_TK[t]].to(out_TD.dtype))
    return out_TD


def _share_of_tokens(weights_T: Tensor | None, hidden_TD: Tensor) -> Tensor:
    """Each token's share of the mean, summing to 1."""
    num_tokens, dtype = hidden_TD.shape[0], compute_dtype(hidden_TD)
    if weights_T is None:
        return hidden_TD.new_full((num_tokens,), 1.0 / num_tokens, dtype=dtype)
    if weights_T.shape != (num_tokens,):
        raise DataError(f"`weights_T` has shape {list(weights_T.shape)}, there are {num_tokens} response tokens")
    weights_T = weights_T.to(hidden_TD.device, dtype)
    low, total = torch.stack([weights_T.min(), weights_T.sum()]).tolist()
    if not (low >= 0 and 0 < total < math.inf):
        raise DataError(f"`weights_T` must be >= 0 and not all zero, found minimum {low} and sum {total}")
    return weights_T / total


def _check_shapes(num_tokens: int, ids: Tensor, logprobs: Tensor, tails: Tensor, mass: Tensor, entropy: Tensor) -> None:
    same_MT = all(x.shape[:2] == ids.shape[:2] for x in (tails, mass, entropy))
    if not num_tokens:
        raise DataError("there are no response tokens: a mean over 0 tokens is not defined")
    if ids.ndim != 3 or tails.ndim != 3 or ids.shape != logprobs.shape or not same_MT:
        shapes = [list(x.shape) for x in (ids, logprobs, tails, mass, entropy)]
        raise DataError(f"the candidates' arrays do not fit together: ids, logprobs, tail, mass, entropy are {shapes}")
    if ids.shape[1] != num_tokens:
        raise DataError(f"{num_tokens} student hidden states, but rows of {ids.shape[1]} response tokens")
