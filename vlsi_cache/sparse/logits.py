"""Logits of a slice of the vocabulary, in full precision whatever the model's dtype.

Shapes: T response tokens, B rows of the head in this block, V vocabulary, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlsi_cache.errors import ModelError

__all__ = ["Head", "compute_dtype", "operand", "product_into", "project"]

CONVERT_ROWS = 1024  # head rows turned into fp32 at a time where the device has no mixed product


def compute_dtype(hidden_TD: Tensor) -> torch.dtype:
    """float64 stays (gradient checks); everything else is computed in float32."""
    return torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Head:
    """A language head: `logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap)`, without tanh if no cap.

    `scale` is Cohere's `logit_scale` or the inverse of Granite's `logits_scaling`, `cap` Gemma's
    `final_logit_softcapping`, `bias` what Phi, GPT-J and CodeGen add.
    """

    weight_VD: Tensor
    scale: float = 1.0
    cap: float | None = None
    bias_V: Tensor | None = None

    @classmethod
    def of(cls, head: "Head | Tensor") -> "Head":
        """A head, or the weight [V, D] of one that changes its logits in no way."""
        return head if isinstance(head, Head) else cls(head)

    def real(self, v_real: int) -> "Head":
        """The rows of the real vocabulary; heads may have padding rows behind it."""
        if not 0 < v_real <= self.num_rows:
            raise ModelError(f"`v_real` is {v_real}, the head has {self.num_rows} rows")
        if v_real == self.num_rows:
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:v_real]
        return Head(self.weight_VD[:v_real], self.scale, self.cap, bias_V)

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
