"""Losses over the whole vocabulary that keep no logits: cross-entropy, and the divergence from another head output.

Shapes: T response tokens, V vocabulary, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vlsi_cache.errors import DataError, ModelError

from .head import Head, operand, shares, token_sum
from .vocab_pass import GivenGradient, OneId, VocabPass, default_block, full_precision

__all__ = ["HeadOutput", "head_output", "kl_to_output", "linear_cross_entropy"]


def linear_cross_entropy(
    hidden_TD: Tensor,
    head: Head | Tensor,
    gold_T: Tensor,
    *,
    share_T: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """Cross-entropy in nats of `softmax(head(hidden))` with the ids `gold_T`; no logits [T, V] are kept.

    The sum over the tokens, each by its `share_T`; without, their mean. With a frozen head two matrix products make
    value and gradient; a head that requires a gradient takes four, two of them in the backward pass. Raises ModelError
    or DataError.
    """
    head, hidden_TD = Head.of(head), operand(hidden_TD)
    head.check(hidden_TD)
    if gold_T.shape != hidden_TD.shape[:1] or not len(gold_T):
        raise DataError(f"{hidden_TD.shape[0]} hidden states, but gold ids of shape {list(gold_T.shape)}")
    picker = OneId(gold_T, block or default_block(hidden_TD.device))
    vocab_pass, share_T = VocabPass(hidden_TD, head, picker), shares(share_T, hidden_TD)
    ids_T1, is_entry_T1 = gold_T[:, None], torch.ones_like(gold_T, dtype=torch.bool)[:, None]
    return vocab_pass.attach(
        -token_sum(vocab_pass.logq[0, :, 0], share_T), ids_T1, vocab_pass.logq[0], -share_T[:, None], is_entry_T1
    )


class HeadOutput(NamedTuple):
    """What a head says of some hidden states, as far as a divergence from it needs it."""

    hidden_TD: Tensor
    lse_T: Tensor
    mean_TD: Tensor  # sum_j p_j W_j


def head_output(hidden_TD: Tensor, head: Head) -> HeadOutput:
    """One pass over the vocabulary for `kl_to_output`; nothing of it requires a gradient.

    Raises ModelError for a head that does, or with a soft cap.
    """
    _check_plain(head)
    with torch.enable_grad():
        leaf_TD = operand(hidden_TD).detach().requires_grad_()
    picker = OneId(torch.zeros(len(leaf_TD), dtype=torch.long, device=leaf_TD.device), default_block(leaf_TD.device))
    with torch.enable_grad():
        vocab_pass = VocabPass(leaf_TD, head, picker)
    assert vocab_pass.mean_TD is not None
    return HeadOutput(leaf_TD.detach(), vocab_pass.lse_T, vocab_pass.mean_TD)


def kl_to_output(
    hidden_TD: Tensor,
    head: Head,
    gold_T: Tensor,
    target: HeadOutput,
    *,
    share_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(target || head(hidden)) over the whole vocabulary in nats, differentiable in the hidden states.

    The sum over the tokens, each by its `share_T`; without, their mean. It is exact and needs no logits of the target:
    with logits linear in the hidden state, KL is the Bregman divergence of the log-sum-exp,
    lse(h) - lse(t) - (h - t) @ mean(t), and its gradient is mean(h) - mean(t). The second result is the cross-entropy
    with the ids `gold_T`, detached. On a GPU in bf16 both means are rounded, so that the gradient has a relative error
    of 1e-3 at 1 nat, 4e-3 at 0.07 and 2e-2 at 0.001 (emulated). Raises ModelError for a head that requires a gradient
    or has a soft cap.
    """
    _check_plain(head)
    hidden_TD = operand(hidden_TD)
    head.check(hidden_TD)
    vocab_pass = VocabPass(hidden_TD, head, OneId(gold_T, default_block(hidden_TD.device)))
    with full_precision(hidden_TD.device):
        share_T, dtype = shares(share_T, hidden_TD), vocab_pass.lse_T.dtype
        moved_TD = (hidden_TD.to(dtype) - target.hidden_TD.to(dtype)) * head.scale
        value = token_sum(vocab_pass.lse_T - target.lse_T - (moved_TD * target.mean_TD).sum(1), share_T).clamp(min=0)
        cross_entropy = -token_sum(vocab_pass.logq[0, :, 0], share_T)
        if vocab_pass.mean_TD is None:
            return value, cross_entropy
        gradient_TD = (vocab_pass.mean_TD - target.mean_TD) * (head.scale * share_T[:, None])
    return GivenGradient.apply(hidden_TD, value, gradient_TD), cross_entropy


def _check_plain(head: Head) -> None:
    if head.cap is not None:
        raise ModelError("the divergence from the model's own output needs logits without a soft cap; use loss `ce`")
    if head.requires_grad:
        raise ModelError("the divergence from the model's own output needs a frozen head, and this one trains")
