"""What the kernels are measured against: the plain forms, torch's own and Liger's.

The forms of the student layer return the values of all candidates and the gradient of the first in the hidden states,
each in the cheapest way: one log-softmax serves all candidates wherever the form has one. Heads may have padding rows,
which no softmax counts.

Shapes: T response tokens, M candidates, K kept entries, m tail samples, V vocabulary, D hidden size.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import HeadCase, StudentCase, TeacherCase
from measuring import failure
from torch import Tensor
from torch.utils.checkpoint import checkpoint

StudentForm = Callable[[StudentCase, int], tuple[Tensor, Tensor]]


# Teacher rows


def whole_row(case: TeacherCase) -> tuple[Tensor, Tensor]:
    """Top-k ids and log-probs alone, from [T, V] logits (rounded to the model's dtype)."""
    z_TV = _logits(case.hidden_TD, case.weight_VD, case.vocab_size)
    values_TK, ids_TK = z_TV.topk(case.top_k)
    return ids_TK, values_TK - z_TV.logsumexp(1, keepdim=True)


def whole_row_all(case: TeacherCase) -> tuple[Tensor, ...]:
    """Everything that is stored of a row, from [T, V] logits (rounded to the model's dtype)."""
    z_TV = _logits(case.hidden_TD, case.weight_VD, case.vocab_size)
    values_TK, ids_TK = z_TV.topk(case.top_k)
    lse_T1 = z_TV.logsumexp(1, keepdim=True)
    gold_T = (z_TV.gather(1, case.gold_T[:, None]) - lse_T1)[:, 0]
    p_TV = (z_TV - lse_T1).exp_()
    entropy_T = lse_T1[:, 0] - z_TV.mul_(p_TV).sum(1)
    p_TV.scatter_(1, ids_TK, 0.0)
    tail_ids_Tm = torch.multinomial(p_TV, case.uniforms_Tm.shape[1], replacement=True)
    return ids_TK, values_TK - lse_T1, tail_ids_Tm, lse_T1, entropy_T, gold_T, p_TV.sum(1)


def token_chunks(case: TeacherCase, size: int = 32) -> tuple[Tensor, ...]:
    """`whole_row_all` of a few tokens at a time."""
    starts = range(0, len(case.hidden_TD), size)
    parts = [whole_row_all(_tokens_of(case, start, start + size)) for start in starts]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _tokens_of(case: TeacherCase, start: int, stop: int) -> TeacherCase:
    hidden_TD, gold_T, uniforms_Tm = (x[start:stop] for x in (case.hidden_TD, case.gold_T, case.uniforms_Tm))
    return TeacherCase(hidden_TD, case.weight_VD, gold_T, uniforms_Tm, case.top_k, case.vocab_size)


# Student layer


def materialised(case: StudentCase, num: int) -> tuple[Tensor, Tensor]:
    """One log-softmax [T, V] under autograd; logits in the model's dtype, the softmax in fp32."""
    hidden_TD = case.hidden_TD.detach().requires_grad_()
    values_M, loss = _values_and_loss(_picked_logprobs(hidden_TD, case, num), case, num)
    (gradient_TD,) = torch.autograd.grad(loss, hidden_TD)
    return values_M, gradient_TD


@functools.cache
def compiled_materialised(backend: str = "inductor") -> StudentForm:
    """`materialised` with everything up to the loss compiled."""

    def loss_of(hidden_TD: Tensor, case: StudentCase, num: int) -> tuple[Tensor, Tensor]:
        return _values_and_loss(_picked_logprobs(hidden_TD, case, num), case, num)

    compiled = torch.compile(loss_of, backend=backend)

    def form(case: StudentCase, num: int) -> tuple[Tensor, Tensor]:
        hidden_TD = case.hidden_TD.detach().requires_grad_()
        values_M, loss = compiled(hidden_TD, case, num)
        (gradient_TD,) = torch.autograd.grad(loss, hidden_TD)
        return values_M, gradient_TD

    return form


def checkpointed_chunks(case: StudentCase, num: int, size: int = 128) -> tuple[Tensor, Tensor]:
    """Chunks of tokens whose logits are computed once more in the backward pass (torch.utils.checkpoint)."""
    hidden_TD = case.hidden_TD.detach().requires_grad_()
    picked = [
        checkpoint(_picked_logprobs, hidden_TD, case, num, slice(start, start + size), use_reentrant=False)
        for start in range(0, len(hidden_TD), size)
    ]
    values_M, loss = _values_and_loss(torch.cat(picked, 1), case, num)
    (gradient_TD,) = torch.autograd.grad(loss, hidden_TD)
    return values_M, gradient_TD


def dense_kl_div(case: StudentCase, num: int) -> tuple[Tensor, Tensor]:
    """F.kl_div on rows made dense (kept entries, the tail spread evenly), one log-softmax for all candidates."""
    hidden_TD = case.hidden_TD.detach().requires_grad_()
    logq_TV = _logits(hidden_TD, case.weight_VD, case.vocab_size).log_softmax(1)
    with torch.no_grad():
        others = [F.kl_div(logq_TV, _dense(case, i), reduction="batchmean") for i in range(1, num)]
    loss = F.kl_div(logq_TV, _dense(case, 0), reduction="batchmean")
    (gradient_TD,) = torch.autograd.grad(loss, hidden_TD)
    return torch.stack([loss.detach(), *others]), gradient_TD


def liger_jsd(case: StudentCase, num: int, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Liger's chunked JSD at beta 0, the forward KL: it wants the teacher's hidden states and gives dW as well.

    The teacher is the small one, so its product costs next to nothing. Every value costs its gradients too.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    loss_of = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)
    hidden_TD = case.hidden_TD.detach().requires_grad_()
    teacher_VR, labels_T = case.teacher_weight_VR[: case.vocab_size], case.ids_MTK[0, :, 0]
    values, gradient_TD = [], hidden_TD
    for i in reversed(range(num)):
        loss = loss_of(
            hidden_TD, case.weight_VD[: case.vocab_size], case.teacher_hidden_TR.roll(i, 0), teacher_VR, labels_T
        )
        (gradient_TD,) = torch.autograd.grad(loss, hidden_TD)
        values.append(loss.detach())
    return torch.stack(values[::-1]), gradient_TD


def liger_kl_div(case: StudentCase, num: int) -> tuple[Tensor, Tensor]:
    """Liger's fused linear KL (Triton) on rows made dense; every value costs its gradient too."""
    from liger_kernel.transformers.fused_linear_kl_div import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearKLDivLoss,
    )

    hidden_TD = case.hidden_TD.detach().requires_grad_()
    values, gradient_TD = [], hidden_TD
    for i in reversed(range(num)):
        loss = LigerFusedLinearKLDivLoss()(hidden_TD, case.weight_VD[: case.vocab_size], _dense(case, i))
        (gradient_TD,) = torch.autograd.grad(loss, hidden_TD)
        values.append(loss.detach())
    return torch.stack(values[::-1]), gradient_TD


def liger_missing() -> str:
    try:
        import liger_kernel.chunked_loss  # noqa: F401  # pyright: ignore[reportMissingImports]
    except Exception as error:  # without its compiler it fails in more ways than one
        return failure(error).replace("failed", "not available")
    return ""


def _picked_logprobs(hidden_TD: Tensor, case: StudentCase, num: int, tokens: slice = slice(None)) -> Tensor:
    """Log-probs at all ids, kept and drawn, [M, T, K + m]."""
    logq_TV = _logits(hidden_TD[tokens], case.weight_VD, case.vocab_size).log_softmax(1)
    ids_MTX = torch.cat([case.ids_MTK, case.tail_ids_MTm], 2)[:num, tokens]
    picked_TX = logq_TV.gather(1, ids_MTX.transpose(0, 1).flatten(1))
    return picked_TX.view(-1, *ids_MTX.shape[::2]).transpose(0, 1)


def _values_and_loss(logq_MTX: Tensor, case: StudentCase, num: int) -> tuple[Tensor, Tensor]:
    """The unbiased value of every candidate and the ghost KL of the first, mean over the tokens."""
    rows = case.candidates(num)
    logp_MTK, tail_MT, entropy_MT = rows["logprobs_LTK"], rows["tail_mass_LT"], rows["entropy_LT"]
    top_k = logp_MTK.shape[2]
    with torch.no_grad():
        kept_MTK, drawn_MTm = logq_MTX[..., :top_k], logq_MTX[..., top_k:]
        cross_MT = (logp_MTK.exp() * kept_MTK).sum(-1) + tail_MT * drawn_MTm.mean(-1)
        values_M = (-entropy_MT - cross_MT).mean(1)
    logq_TK, logp_TK, tail_T = logq_MTX[0, :, :top_k], logp_MTK[0], tail_MT[0]
    log_tail_T = torch.log1p(-logq_TK.exp().sum(-1).clamp(max=1 - 1e-6))
    ghost_T = (logp_TK.exp() * (logp_TK - logq_TK)).sum(-1) + torch.xlogy(tail_T, tail_T) - tail_T * log_tail_T
    return values_M, ghost_T.mean()


def _dense(case: StudentCase, candidate: int) -> Tensor:
    """The row as probabilities of all tokens, fp32 (fp64 for an oracle)."""
    ids_TK, tail_T = case.ids_MTK[candidate], case.tail_mass_MT[candidate]
    spread_T1 = tail_T[:, None] / (case.vocab_size - ids_TK.shape[1])
    return spread_T1.repeat(1, case.vocab_size).scatter_(1, ids_TK, case.logprobs_MTK[candidate].exp())


# Head with gradient


def plain_cross_entropy(case: HeadCase) -> tuple[Tensor, ...]:
    return _head_gradients(case, lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight), case.gold_T))


def torch_cross_entropy(case: HeadCase, options: Any) -> tuple[Tensor, ...]:
    """torch's own function with chunking options; without, it is the plain one."""
    fused = F.linear_cross_entropy  # torch >= 2.13
    return _head_gradients(case, lambda hidden, weight: fused(hidden, weight, case.gold_T, options=options))


def torch_options() -> dict[str, Any]:
    """Its ways of chunking, by name; none where this torch has no such function."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None or not hasattr(F, "linear_cross_entropy"):
        return {}
    return {
        "chunking options auto": options(),
        "128 tokens a chunk, accurate": options(batch_chunk_size=128, chunking_method=None, acc_policy="accurate"),
    }


def _head_gradients(case: HeadCase, loss_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
    hidden_TD, weight_VD = (x.detach().requires_grad_() for x in (case.hidden_TD, case.weight_VD))
    return torch.autograd.grad(loss_of(hidden_TD, weight_VD), (hidden_TD, weight_VD))


def _logits(hidden_TD: Tensor, weight_VD: Tensor, vocab_size: int) -> Tensor:
    """Logits of the real vocabulary as plain code has them: rounded to the model's dtype, then turned to fp32."""
    z_TV = (hidden_TD @ weight_VD.T)[:, :vocab_size]  # an odd number of rows would slow the product down
    return z_TV if z_TV.dtype == torch.float64 else z_TV.float()
