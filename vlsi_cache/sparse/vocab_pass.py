"""One pass over the vocabulary: the student's log-probs at chosen ids, and the mean head row if a gradient is wanted.

Blocks of the vocabulary go through an online softmax; the mean head row G = sum_j q_j W_j is rescaled whenever a block
raises the running maximum, as flash attention does with K = V = W. Nothing of shape [T, V] exists.

Any loss on the log-probs at chosen ids, with s_k = dL / d log q_k, has dL/dz_j = s_j - q_j * sum_k s_k. So with
c = -sum_k s_k its gradient in the hidden states is c * G + sum_k s_k W[id_k], whatever the loss.

Shapes: T response tokens, L rows (layers) per token, M of them in a window, X ids per row, N all ids, V vocabulary,
B ids of a block, C blocks, D hidden size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vlsi_cache.errors import DataError

from .head import Head, compute_dtype, fused, product_into, project

__all__ = ["BlockIndex", "GivenGradient", "OneId", "VocabPass", "default_block", "full_precision", "to_device_async"]


def default_block(device: torch.device) -> int:
    """Ids of a block: a processor wants the logits in its cache, a GPU wants few launches."""
    return 4096 if device.type == "cuda" else 1024


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, and no autocast, which would turn the fp32 products into bf16 behind our back."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on this device; only from pinned memory can a copy to a GPU stand in line without a wait."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Picker(Protocol):
    """Collects the logits at its ids as the blocks go by."""

    @property
    def block(self) -> int: ...

    def empty(self, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor: ...

    def collect(self, values: Tensor, index: int, z_TB: Tensor) -> None: ...


@dataclass(frozen=True)
class BlockIndex:
    """Where the ids of L rows per token lie in the vocabulary, sorted by block once for all passes over them.

    Within a block the entries are sorted by row, so those of consecutive rows are one slice.
    """

    block: int
    shape_LTX: tuple[int, int, int]
    order_N: Tensor  # int32: position in ids_LTX
    slots_N: Tensor  # int32: position in the block's logits [T, B]
    ends: list[int]  # where the entries of each (block, row) end

    @classmethod
    def of(cls, ids_LTX: Tensor, on_device_LTX: Tensor, *, vocab_size: int, block: int) -> "BlockIndex":
        """From int32 ids, twice: those on the CPU cost a GPU no synchronisation. Raises DataError for unknown ids."""
        num_layers, num_tokens, per_token = ids_LTX.shape
        low, high = (int(x) for x in torch.aminmax(ids_LTX)) if ids_LTX.numel() else (0, 0)
        if low < 0 or high >= vocab_size:
            raise DataError(f"token ids go from {low} to {high}, outside the real vocabulary of {vocab_size} tokens")
        num_blocks = math.ceil(vocab_size / block)
        layers_L11 = torch.arange(num_layers, device=ids_LTX.device, dtype=torch.int32)[:, None, None]
        counts = torch.bincount(
            (ids_LTX // block * num_layers + layers_L11).flatten(), minlength=num_blocks * num_layers
        )
        ends = [0, *counts.cumsum(0).tolist()]
        # Few-valued small integers take the radix sort, over ten times faster than int64.
        blocks_N = (on_device_LTX // block).flatten().to(torch.int16 if num_blocks < 2**15 else torch.int32)
        order_N = blocks_N.sort(stable=True).indices.int()
        last = (num_blocks - 1) * block
        tokens_T1 = torch.arange(num_tokens, device=on_device_LTX.device, dtype=torch.int32)[:, None]
        slots_LTX = (on_device_LTX % block).add_(tokens_T1 * block)
        # The last block is narrower.
        slots_LTX.sub_((on_device_LTX >= last) * (tokens_T1 * (last + block - vocab_size)))
        return cls(block, (num_layers, num_tokens, per_token), order_N, slots_LTX.flatten()[order_N], ends)

    def window(self, rows: range) -> "IndexWindow":
        """The entries of consecutive rows."""
        return IndexWindow(self, rows.start, rows.stop)


@dataclass(frozen=True)
class IndexWindow:
    """A Picker of the rows `low` to `high` (exclusive) of an index; its values are [M, T, X]."""

    index: BlockIndex
    low: int
    high: int

    @property
    def block(self) -> int:
        return self.index.block

    def empty(self, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty((self.high - self.low, num_tokens, self.index.shape_LTX[2]), dtype=dtype, device=device)

    def collect(self, values: Tensor, index: int, z_TB: Tensor) -> None:
        num_layers, num_tokens, per_token = self.index.shape_LTX
        first = index * num_layers
        entries = slice(self.index.ends[first + self.low], self.index.ends[first + self.high])
        order_N = self.index.order_N[entries] - self.low * num_tokens * per_token
        values.view(-1)[order_N] = z_TB.view(-1)[self.index.slots_N[entries]]


@dataclass(frozen=True)
class OneId:
    """A Picker of one id per token; its values are [1, T, 1]."""

    ids_T: Tensor
    block: int

    def empty(self, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        # An id that no block has leaves a loss that is not a number instead of a plausible one.
        return torch.full((1, num_tokens, 1), math.nan, dtype=dtype, device=device)

    def collect(self, values: Tensor, index: int, z_TB: Tensor) -> None:
        offset_T = self.ids_T - index * self.block
        inside_T = (offset_T >= 0) & (offset_T < z_TB.shape[1])
        found_T1 = z_TB.gather(1, offset_T.clamp(0, z_TB.shape[1] - 1)[:, None])
        torch.where(inside_T[:, None], found_T1, values[0], out=values[0])


class VocabPass:
    """What one pass leaves behind: `logq` of the picker's ids, log-sum-exp, and G if hidden states alone need it.

    Log-probs are those of softmax(logits / tau) over all rows of the head. A head that requires a gradient gets it from
    a second pass, made when the gradient is asked for. Made outside of `no_grad`, in which it works.
    """

    def __init__(
        self,
        hidden_TD: Tensor,
        head: Head,
        picker: Picker,
        *,
        tau: float = 1.0,
    ) -> None:
        self.hidden_TD, self.head, self.tau = hidden_TD, head, tau
        self.grows_head = torch.is_grad_enabled() and head.requires_grad
        wants_mean = torch.is_grad_enabled() and hidden_TD.requires_grad and not self.grows_head
        with full_precision(hidden_TD.device):
            self._run(picker, wants_mean)

    def _run(self, picker: Picker, wants_mean: bool) -> None:
        hidden_TD, head = self.hidden_TD, self.head
        self.block = min(picker.block, head.num_rows)
        # On a GPU the probabilities enter the second product in bf16; what this loses on the chosen ids
        # is put back by `_rounding`.
        self.rounds = wants_mean and _rounds_probs(hidden_TD)
        probs_dtype = hidden_TD.dtype if self.rounds else compute_dtype(hidden_TD)
        online_softmax = fused(_online_softmax, compiled=head.compiled)
        num_tokens, dtype = hidden_TD.shape[0], compute_dtype(hidden_TD)
        max_T1 = hidden_TD.new_full((num_tokens, 1), -math.inf, dtype=dtype)
        sum_T1 = torch.zeros_like(max_T1)
        mean_TD = torch.zeros_like(hidden_TD, dtype=dtype) if wants_mean else None
        maxima: list[Tensor] = []
        values = picker.empty(num_tokens, dtype, hidden_TD.device)
        for index, start, z_TB in self._blocks():
            picker.collect(values, index, z_TB)
            max_T1, sum_T1, rescale_T1, weights_TB = online_softmax(z_TB, max_T1, sum_T1, self._slope, probs_dtype)
            if mean_TD is not None:
                project(mean_TD.mul_(rescale_T1), weights_TB, head.weight_VD[start : start + z_TB.shape[1]])
                if self.rounds:
                    maxima.append(max_T1)
        self.mean_TD = None if mean_TD is None else mean_TD.div_(sum_T1)
        # Maximum first, then log-sum: subtracting their fp32 sum would cost the likeliest tokens, and with them the
        # tail mass, one more digit.
        self._max_T1, self._log_sum_T1 = max_T1, sum_T1.log()
        self.logq = values.sub_(max_T1).sub_(self._log_sum_T1).clamp_(max=0)
        self._max_TC = torch.cat(maxima, 1) if maxima else None

    @property
    def _slope(self) -> float | None:
        """tau / cap: what a tempered logit is multiplied with for tanh; None without a cap."""
        return None if self.head.cap is None else self.tau / self.head.cap

    def _blocks(self) -> Any:
        """(index, first id, tempered logits) of each block; the buffer is used again for the next one."""
        num_tokens = self.hidden_TD.shape[0]
        buffer = self.hidden_TD.new_empty(num_tokens * self.block, dtype=compute_dtype(self.hidden_TD))
        for index, start in enumerate(range(0, self.head.num_rows, self.block)):
            width = min(self.block, self.head.num_rows - start)
            z_TB = buffer[: num_tokens * width].view(num_tokens, width)
            self.head.logits_into(z_TB, self.hidden_TD, start)
            yield index, start, z_TB if self.tau == 1.0 else z_TB.div_(self.tau)

    def logprobs_of(self, ids_T: Tensor) -> Tensor:
        """Log-prob of one id per token, [T], for ids that the picker did not have."""
        with full_precision(ids_T.device):
            dtype = self._max_T1.dtype
            products_T1 = (self.hidden_TD.to(dtype) * self.head.weight_VD[ids_T].to(dtype)).sum(1, keepdim=True)
            logits_T1 = self.head.shape_(products_T1, ids_T[:, None]) / self.tau
            return (logits_T1 - self._max_T1 - self._log_sum_T1).clamp_(max=0)[:, 0]

    @property
    def lse_T(self) -> Tensor:
        """Log-sum-exp of the logits / tau."""
        return (self._max_T1 + self._log_sum_T1)[:, 0]

    def attach(self, value: Tensor, ids_TX: Tensor, logq_TX: Tensor, s_TX: Tensor, is_entry_TX: Tensor) -> Tensor:
        """`value`, a loss of s = dL / d log q at these ids, as a function of the hidden states, and of the head if it
        requires a gradient. The ids of a token name none twice but as padding."""
        if self.grows_head:
            return _Recomputed.apply(self.hidden_TD, self.head.weight_VD, self.head.bias_V, value, self, ids_TX, s_TX)
        if self.mean_TD is None:
            return value
        with full_precision(value.device):
            gradient_TD = self._gradient(ids_TX, logq_TX, s_TX, is_entry_TX)
        return GivenGradient.apply(self.hidden_TD, value, gradient_TD)

    def _gradient(self, ids_TX: Tensor, logq_TX: Tensor, s_TX: Tensor, is_entry_TX: Tensor) -> Tensor:
        """dL/d(hidden), [T, D]."""
        assert self.mean_TD is not None
        c_T1 = -s_TX.sum(1, keepdim=True)
        s_TX = s_TX * self._slopes(logq_TX)
        if self.rounds:
            s_TX = s_TX + c_T1 * self._rounding(ids_TX, logq_TX) * is_entry_TX
        return _add_rows(c_T1 * self.mean_TD, s_TX, ids_TX, self.head.weight_VD).mul_(self.head.scale / self.tau)

    def _slopes(self, logq_TX: Tensor) -> Tensor | float:
        """d(capped logit) / d(logit) at chosen ids."""
        if self._slope is None:
            return 1.0
        return 1 - (self._slope * (logq_TX + self._log_sum_T1 + self._max_T1)).square()

    def _rounding(self, ids_TX: Tensor, logq_TX: Tensor) -> Tensor:
        """q - (q as it entered G) at these ids."""
        assert self._max_TC is not None
        log_unit_TX = self._max_TC.gather(1, ids_TX // self.block) - self._max_T1 - self._log_sum_T1
        p_TX = (logq_TX - log_unit_TX).exp() * self._slopes(logq_TX)
        return (p_TX - p_TX.to(self.hidden_TD.dtype)) * log_unit_TX.exp()

    def backward(self, ids_TX: Tensor, s_TX: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """dL/d(hidden), dL/d(head weight) and dL/d(head bias), block by block."""
        weight_VD, factor = self.head.weight_VD, self.head.scale / self.tau
        c_T1 = -s_TX.sum(1, keepdim=True)
        hidden_grad_TD = torch.zeros_like(self.hidden_TD, dtype=compute_dtype(self.hidden_TD))
        weight_grad_VD = torch.empty_like(weight_VD)
        bias_grad_V = None if self.head.bias_V is None else torch.empty_like(self.head.bias_V)
        for _, start, z_TB in self._blocks():
            rows = slice(start, start + z_TB.shape[1])
            slopes_TB = None if self._slope is None else 1 - (self._slope * z_TB).square()
            dz_TB = z_TB.sub_(self._max_T1).sub_(self._log_sum_T1).exp_().mul_(c_T1)
            inside_TX = (ids_TX >= start) & (ids_TX < rows.stop)
            offsets_TX = (ids_TX - start).clamp(0, z_TB.shape[1] - 1)
            dz_TB.scatter_add_(1, offsets_TX, s_TX * inside_TX).mul_(factor)
            if slopes_TB is not None:
                dz_TB.mul_(slopes_TB)
            if bias_grad_V is not None:
                bias_grad_V[rows] = dz_TB.sum(0)
            if _rounds_probs(self.hidden_TD):
                dz_TB = dz_TB.to(self.hidden_TD.dtype)
            project(hidden_grad_TD, dz_TB, weight_VD[rows])
            product_into(weight_grad_VD[rows], dz_TB.T, self.hidden_TD)
        return hidden_grad_TD, weight_grad_VD, bias_grad_V


class GivenGradient(torch.autograd.Function):
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


class _Recomputed(torch.autograd.Function):
    """A value whose gradients in hidden states and head are made when they are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        value: Tensor,
        vocab_pass: VocabPass,
        ids_TX: Tensor,
        s_TX: Tensor,
    ) -> Tensor:
        ctx.vocab_pass = vocab_pass
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, ids_TX, s_TX)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, _, ids_TX, s_TX = ctx.saved_tensors  # raises where one was changed in place since
        with full_precision(hidden_TD.device):
            hidden_grad_TD, weight_grad_VD, bias_grad_V = ctx.vocab_pass.backward(ids_TX, s_TX * grad_outputs[0])
        grads = hidden_grad_TD.to(hidden_TD.dtype), weight_grad_VD.to(weight_VD.dtype), bias_grad_V
        return *grads, None, None, None, None


def _online_softmax(
    z_TB: Tensor, max_T1: Tensor, sum_T1: Tensor, slope: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New maximum and sum, the factor for what was summed before, and exp(z - max) in `dtype`, which may reuse z."""
    new_T1 = torch.maximum(max_T1, z_TB.amax(1, keepdim=True))
    rescale_T1 = (max_T1 - new_T1).exp()
    slopes_TB = None if slope is None else 1 - (slope * z_TB).square()
    # In place it would be written out twice when compiled: once for the sums, once in `dtype`.
    in_place = dtype == z_TB.dtype or not torch.compiler.is_compiling()
    exp_TB = z_TB.sub_(new_T1).exp_() if in_place else (z_TB - new_T1).exp()
    sum_T1 = sum_T1 * rescale_T1 + exp_TB.sum(1, keepdim=True)
    weights_TB = exp_TB if slopes_TB is None else exp_TB * slopes_TB
    return new_T1, sum_T1, rescale_T1, weights_TB.to(dtype)


def _rounds_probs(hidden_TD: Tensor) -> bool:
    return hidden_TD.is_cuda and hidden_TD.dtype.itemsize == 2


def _add_rows(out_TD: Tensor, s_TX: Tensor, ids_TX: Tensor, weight_VD: Tensor) -> Tensor:
    """out += sum_k s_k W[id_k] in the dtype of `out`, a few tokens at a time: [T, X, D] never exists."""
    # A processor wants the gathered rows in its cache, a GPU wants few launches.
    budget = 1 << 24 if out_TD.is_cuda else 1 << 20
    step = max(1, budget // (ids_TX.shape[1] * weight_VD.shape[1]))
    for start in range(0, len(out_TD), step):
        t = slice(start, start + step)
        out_TD[t].unsqueeze(1).baddbmm_(s_TX[t].unsqueeze(1), weight_VD[ids_TX[t]].to(out_TD.dtype))
    return out_TD
