"""Logits of a slice of the vocabulary, in full precision whatever the model's dtype.

Shapes: T response tokens, B rows of the head in this block, V vocabulary, D hidden size.
"""

import torch
from torch import Tensor

from vlsi_cache.errors import ModelError

__all__ = ["check_head", "compute_dtype", "logits_into", "project"]

CONVERT_ROWS = 1024  # head rows turned into fp32 at a time where the device has no mixed product


def compute_dtype(hidden_TD: Tensor) -> torch.dtype:
    """float64 stays (gradient checks); everything else is computed in float32."""
    return torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32


def check_head(hidden_TD: Tensor, head_weight_VD: Tensor, v_real: int) -> None:
    """Raise ModelError where hidden states and head do not fit together."""
    if hidden_TD.ndim != 2 or head_weight_VD.ndim != 2 or hidden_TD.shape[1] != head_weight_VD.shape[1]:
        raise ModelError(
            f"hidden states [T, D] have shape {list(hidden_TD.shape)}, the head [V, D] {list(head_weight_VD.shape)}"
        )
    if not 0 < v_real <= head_weight_VD.shape[0]:
        raise ModelError(f"`v_real` is {v_real}, the head has {head_weight_VD.shape[0]} rows")


def logits_into(out_TB: Tensor, hidden_TD: Tensor, weight_BD: Tensor) -> Tensor:
    """out = hidden @ weight.T, written as fp32 (fp64 for fp64 hidden states)."""
    if hidden_TD.dtype == weight_BD.dtype == out_TB.dtype:
        return torch.mm(hidden_TD, weight_BD.T, out=out_TB)
    if hidden_TD.is_cuda and hidden_TD.dtype == weight_BD.dtype and out_TB.is_contiguous():
        return torch.mm(hidden_TD, weight_BD.T, out_dtype=torch.float32, out=out_TB)
    hidden_TD = hidden_TD.to(out_TB.dtype)
    for start in range(0, weight_BD.shape[0], CONVERT_ROWS):
        rows = slice(start, start + CONVERT_ROWS)
        torch.mm(hidden_TD, weight_BD[rows].to(out_TB.dtype).T, out=out_TB[:, rows])
    return out_TB


def project(acc_TD: Tensor, probs_TB: Tensor, weight_BD: Tensor) -> Tensor:
    """acc += probs @ weight, accumulated in the dtype of `acc`; probs may already be rounded to the head's dtype."""
    if probs_TB.is_cuda and probs_TB.dtype == weight_BD.dtype != acc_TD.dtype:
        return acc_TD.add_(torch.mm(probs_TB, weight_BD, out_dtype=torch.float32))
    for start in range(0, weight_BD.shape[0], CONVERT_ROWS):
        rows = slice(start, start + CONVERT_ROWS)
        acc_TD.addmm_(probs_TB[:, rows].to(acc_TD.dtype), weight_BD[rows].to(acc_TD.dtype))
    return acc_TD
