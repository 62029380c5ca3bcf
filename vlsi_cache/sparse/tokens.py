"""What each response token counts for in a loss, and sums over them.

Shapes: T response tokens, M any leading axis.
"""

import math

import torch
from torch import Tensor

from vlsi_cache.errors import DataError

from .logits import compute_dtype

__all__ = ["normalized", "shares", "token_sum"]


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
