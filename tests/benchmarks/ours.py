"""The project's functions as the benchmarks call them: the one place to change when they change."""

from types import SimpleNamespace

import torch
from cases import HeadCase, StudentCase, TeacherCase
from torch import Tensor

from vlsi_cache.sparse.cross_entropy import linear_cross_entropy
from vlsi_cache.sparse.head import Head
from vlsi_cache.sparse.kl import CandidateKL, LayerRows, candidate_kl
from vlsi_cache.sparse.topk import teacher_rows

Compiled = bool | None  # None: whatever the function does by itself


def teacher(case: TeacherCase, compiled: Compiled = None) -> dict[str, Tensor]:
    return teacher_rows(
        case.hidden_TD, Head(case.weight_VD, compiled=bool(compiled)), case.gold_T, top_k=case.top_k,
        uniforms_Tm=case.uniforms_Tm, vocab_size=case.vocab_size, block=16384,
    )  # fmt: skip


def compare(hidden_TD: Tensor, case: StudentCase, num: int, compiled: Compiled = None) -> CandidateKL:
    rows = LayerRows.of(SimpleNamespace(**case.candidates(num)), vocab_size=case.vocab_size, device=hidden_TD.device)
    return candidate_kl(hidden_TD, Head(case.weight_VD, compiled=bool(compiled)), rows)


def student(case: StudentCase, num: int, compiled: Compiled = None) -> tuple[Tensor, Tensor]:
    """Values of all candidates, gradient of the first in the hidden states."""
    hidden_TD = case.hidden_TD.detach().requires_grad_()
    result = compare(hidden_TD, case, num, compiled)
    (gradient_TD,) = torch.autograd.grad(result.loss(0), hidden_TD)
    return result.matching_M, gradient_TD


def gradient_before_rounding(case: StudentCase) -> Tensor | None:
    """The gradient before it is rounded to the dtype of the hidden states; None if it is not kept."""
    hidden_TD = case.hidden_TD.detach().requires_grad_()
    loss = compare(hidden_TD, case, 1).loss(0)
    kept = [x for x in getattr(loss.grad_fn, "saved_tensors", ()) if x.shape == hidden_TD.shape]
    (rounded_TD,) = torch.autograd.grad(loss, hidden_TD)
    return next(
        (x for x in kept if x.dtype != rounded_TD.dtype and torch.equal(x.to(rounded_TD.dtype), rounded_TD)), None
    )


def cross_entropy(case: HeadCase) -> tuple[Tensor, Tensor]:
    """Gradients of the cross-entropy in the hidden states and in the head."""
    hidden_TD, weight_VD = (x.detach().requires_grad_() for x in (case.hidden_TD, case.weight_VD))
    loss = linear_cross_entropy(hidden_TD, Head(weight_VD), case.gold_T)
    hidden_grad, weight_grad = torch.autograd.grad(loss, (hidden_TD, weight_VD))
    return hidden_grad, weight_grad
