"""The model's head: logits of a slice of the vocabulary, in full precision whatever the model's dtype.

Shapes: T response tokens, B rows of the head in this block, V vocabulary, D hidden size.
"""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from vlsi_cache.config.sections import Kernels, RunSpec
from vlsi_cache.errors import DataError, ModelError
from vlsi_cache.progress import say

__all__ = [
    "Head",
    "compute_dtype",
    "fused",
    "normalized",
    "operand",
    "pick_kernels",
    "product_into",
    "project",
    "shares",
    "token_sum",
]

CONVERT_ROWS = 1024  # head rows turned into fp32 at a time where the device has no mixed product


def compute_dtype(hidden_TD: Tensor) -> torch.dtype:
    """float64 stays (gradient checks); everything else is computed in float32."""
    return torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Head:
    """A language head: `logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap)`, without tanh if no cap.

    `scale` is Cohere's `logit_scale` or the inverse of Granite's `logits_scaling`, `cap` Gemma's
    `final_logit_softcapping`, `bias` what Phi, GPT-J and CodeGen add. `compiled`: the sums over a block of logits
    run as one fused kernel of torch.compile.
    """

    weight_VD: Tensor
    scale: float = 1.0
    cap: float | None = None
    bias_V: Tensor | None = None
    compiled: bool = False

    @classmethod
    def of(cls, head: "Head | Tensor") -> "Head":
        """A head, or the weight [V, D] of one that changes its logits in no way."""
        return head if isinstance(head, Head) else cls(head)

    def real(self, vocab_size: int) -> "Head":
        """The rows of the real vocabulary; heads may have padding rows behind it."""
        if not 0 < vocab_size <= self.num_rows:
            raise ModelError(f"`vocab_size` is {vocab_size}, the head has {self.num_rows} rows")
        if vocab_size == self.num_rows:
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:vocab_size]
        return replace(self, weight_VD=self.weight_VD[:vocab_size], bias_V=bias_V)

    @property
    def num_rows(self) -> int:
        return self.weight_VD.shape[0]

    @property
    def requires_grad(self) -> bool:
        return self.weight_VD.requires_grad or (self.bias_V is not None and self.bias_V.requires_grad)

    def check(self, hidden_TD: Tensor) -> None:
        """Raise ModelError where hidden states and head do not fit together."""
        weight_VD = self.weight_VD
        if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
            raise ModelError(
                f"hidden states [T, D] have shape {list(hidden_TD.shape)}, the head [V, D] {list(weight_VD.shape)}"
            )
        if self.bias_V is not None and self.bias_V.shape != weight_VD.shape[:1]:
            raise ModelError(
                f"the bias [V] of a head has shape {list(self.bias_V.shape)}, its weight [V, D] {list(weight_VD.shape)}"
            )
        if self.scale <= 0 or (self.cap is not None and self.cap <= 0):
            raise ModelError(f"logit scale and cap of a head must be positive, found {self.scale} and {self.cap}")

    def logits_into(self, out_TB: Tensor, hidden_TD: Tensor, start: int) -> Tensor:
        """The logits of the rows from `start` on, as many as `out` has columns: fp32 (fp64 for fp64 hidden states)."""
        rows = slice(start, start + out_TB.shape[1])
        product_into(out_TB, hidden_TD, self.weight_VD[rows].T)
        return self.shape_(out_TB, rows)

    def shape_(self, products: Tensor, rows: slice | Tensor) -> Tensor:
        """Turn `hidden @ weight.T` into logits, in place; `rows` says which row of the head each product is of."""
        if self.bias_V is not None:
            products.add_(self.bias_V[rows])
        if self.cap is not None:
            return products.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return products if self.scale == 1.0 else products.mul_(self.scale)


def operand(hidden_TD: Tensor) -> Tensor:
    """Hidden states in the dtype that enters the matrix products: a GPU's autocast is honoured there and only there."""
    if hidden_TD.is_cuda and torch.is_autocast_enabled("cuda") and hidden_TD.dtype == torch.float32:
        return hidden_TD.to(torch.get_autocast_dtype("cuda"))
    return hidden_TD


def project(acc_TD: Tensor, probs_TB: Tensor, weight_BD: Tensor) -> Tensor:
    """acc += probs @ weight, accumulated in the dtype of `acc`; probs may be rounded to 16 bits before."""
    if _is_half_on_gpu(probs_TB):
        return acc_TD.add_(torch.mm(probs_TB, weight_BD.to(probs_TB.dtype), out_dtype=torch.float32))
    for start in range(0, weight_BD.shape[0], CONVERT_ROWS):
        rows = slice(start, start + CONVERT_ROWS)
        acc_TD.addmm_(probs_TB[:, rows].to(acc_TD.dtype), weight_BD[rows].to(acc_TD.dtype))
    return acc_TD


def product_into(out_TB: Tensor, left_TD: Tensor, right_DB: Tensor) -> None:
    """out = left @ right, summed and written in the dtype of `out`."""
    if left_TD.dtype == right_DB.dtype == out_TB.dtype:
        torch.mm(left_TD, right_DB, out=out_TB)
    elif _is_half_on_gpu(left_TD) and out_TB.dtype == torch.float32 and out_TB.is_contiguous():
        torch.mm(left_TD, right_DB.to(left_TD.dtype), out_dtype=torch.float32, out=out_TB)
    elif _is_half_on_gpu(left_TD):
        out_TB.copy_(left_TD @ right_DB.to(left_TD.dtype))
    else:
        left_TD = left_TD.to(compute_dtype(out_TB))
        for start in range(0, right_DB.shape[1], CONVERT_ROWS):
            columns = slice(start, start + CONVERT_ROWS)
            out_TB[:, columns] = left_TD @ right_DB[:, columns].to(left_TD.dtype)


def _is_half_on_gpu(factor: Tensor) -> bool:
    # There the product of 16-bit numbers is summed and written in fp32; no such product exists on a CPU.
    return factor.is_cuda and factor.dtype.itemsize == 2


Function = TypeVar("Function", bound=Callable)


def pick_kernels(wanted: Kernels, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and why; raises ModelError where `compiled` is asked for and the device's compiler fails."""
    if wanted == "eager":
        return False, "asked for"
    if wanted == "auto" and device.type != "cuda":
        return False, f"no fused kernels needed on {device.type}"
    problem = _compiler_problem(device.type)
    if not problem:
        return True, "asked for" if wanted == "compiled" else "CUDA found"
    if wanted == "compiled":
        raise ModelError(f"kernels `compiled` were asked for, and torch.compile does not work here: {problem}")
    return False, f"torch.compile does not work here: {problem}"


def fused(function: Function, *, compiled: bool) -> Function:
    """`function`, or its compiled form."""
    return cast(Function, _compiled(function)) if compiled else function


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


@functools.cache
def _compiler_problem(device: str) -> str:
    """What goes wrong when a small function is compiled; empty if nothing does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(lambda x: x.exp().sum(1), dynamic=True)(torch.ones(2, 3, device=device))
    except Exception as error:  # a missing compiler shows in many ways, and auto must not fail for it
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return ""


def shares(share_T: Tensor | None, hidden_TD: Tensor) -> Tensor:
    """The shares as they are computed with; None is the mean over the tokens. Nothing is read back from the device."""
    num_tokens, dtype = hidden_TD.shape[0], compute_dtype(hidden_TD)
    if share_T is None:
        return hidden_TD.new_full((num_tokens,), 1.0 / num_tokens, dtype=dtype)
    _check_shape("share_T", share_T, num_tokens)
    return share_T.to(hidden_TD.device, dtype)


def normalized(weights_T: Tensor, hidden_TD: Tensor) -> Tensor:
    """Shares of a weighted mean: they sum to 1. Raises DataError for weights that have no mean."""
    _check_shape("weights_T", weights_T, hidden_TD.shape[0])
    weights_T = weights_T.to(hidden_TD.device, compute_dtype(hidden_TD))
    low, total = torch.stack([weights_T.min(), weights_T.sum()]).tolist()
    if not (low >= 0 and 0 < total < math.inf):
        raise DataError(f"`weights_T` must be >= 0 and not all zero, found minimum {low} and sum {total}")
    return weights_T / total


def token_sum(x_MT: Tensor, share_T: Tensor) -> Tensor:
    """The sum over the tokens, each by its share; no matrix product, which autocast would make bf16."""
    return (x_MT * share_T).sum(-1)


def _check_shape(name: str, given_T: Tensor, num_tokens: int) -> None:
    if given_T.shape != (num_tokens,):
        raise DataError(f"`{name}` has shape {list(given_T.shape)}, there are {num_tokens} response tokens")


def choose_kernels(run: RunSpec, device: torch.device) -> bool:
    """Whether sums over the vocabulary are compiled; printed with the reason."""
    compiled, reason = pick_kernels(run.kernels, device)
    say(f"kernels: {'compiled' if compiled else 'eager'} ({reason})")
    return compiled
