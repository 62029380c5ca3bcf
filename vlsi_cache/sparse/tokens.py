"""Means over response tokens.

Shapes: T response tokens, M any leading axis.
"""

import math

import torch
from torch import Tensor

from vlsi_cache.errors import DataError

from .logits import compute_dtype

__all__ = ["token_mean", "token_shares"]


def token_shares(weights_T: Tensor | None, hidden_TD: Tensor) -> Tensor:
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


def token_mean(x_MT: Tensor, share_T: Tensor) -> Tensor:
    """The weighted mean over the tokens; no matrix product, which autocast would make bf16."""
    return (x_MT * share_T).sum(-1)
