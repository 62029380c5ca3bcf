"""Divergences on a sparse row: the kept ids and one bucket for everything else, teacher p against student q.

All are values in nats per token (l2_topk: nats squared) and differentiable in the student's log-probs. Both sides keep
their full-softmax mass, nothing is renormalised; by data processing, forward_kl, reverse_kl, jsd and skewed_kl on the
bucketed support lie between 0 and their dense value.

The errors named below are those of fp32 against float64, relative, of the value and of the gradient in the hidden
states, at teacher tails of 1e-3 to 1e-12 and 0, for k = 8 of 2,000 ids and a divergence of 0.02 to 0.3 nats. They grow
as the student's tail nears fp32's rounding; "small" is one of 1e-6 to 1e-9.

Shapes: T response tokens, K kept entries; any leading axes may stand for T.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from vlsi_cache.config.training import DivergenceName
from vlsi_cache.errors import SpecError

__all__ = ["Bucketed", "Divergence"]

# Of a student's tail mass, which is 1 minus the kept mass: below lies nothing but rounding.
FLOORS = {torch.float32: 2.0**-23, torch.float64: 2.0**-43}
# Of a teacher's tail mass, which is stored by itself: below lies what fp32 cannot hold.
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Bucketed:
    """Teacher and student on K kept ids and a tail bucket; padded entries have p = 0 and log-probs of 0 on both sides.

    The teacher's tail is exact down to where fp32 underflows. The student's is 1 minus its kept mass, floored in value
    and gradient alike at 1.2e-7 in fp32, where rounding begins.
    """

    is_entry_TK: Tensor
    p_TK: Tensor
    logp_TK: Tensor
    logq_TK: Tensor
    p_tail_T: Tensor
    logq_tail_T: Tensor

    @classmethod
    def of(cls, logp_TK: Tensor, p_tail_T: Tensor, logq_TK: Tensor) -> "Bucketed":
        """`logp_TK` is -inf at padded entries, where `logq_TK` may be anything."""
        is_entry_TK = logp_TK != -math.inf
        kept_T = logq_TK.masked_fill(~is_entry_TK, -math.inf).logsumexp(-1)
        kept_T = kept_T.clamp(max=math.log1p(-FLOORS[kept_T.dtype]))
        # log(1 - e^x) loses no digits in the form that fits x.
        near_T, far_T = (-torch.expm1(kept_T)).log(), torch.log1p(-kept_T.exp())
        return cls(
            is_entry_TK,
            logp_TK.exp(),
            logp_TK.masked_fill(~is_entry_TK, 0.0),
            logq_TK.masked_fill(~is_entry_TK, 0.0),
            p_tail_T,
            torch.where(kept_T > -math.log(2), near_T, far_T),
        )

    @property
    def logp_tail_T(self) -> Tensor:
        return self.p_tail_T.clamp(min=TINY).log()

    @property
    def q_TK(self) -> Tensor:
        return self.logq_TK.exp() * self.is_entry_TK


@dataclass(frozen=True)
class Divergence:
    """A divergence by name. `beta`: the teacher's share of the jsd's mixture. `skew`: of the skewed KL's.

    forward_kl: KL(p || q). reverse_kl: KL(q || p). jsd: beta KL(p || m) + (1 - beta) KL(q || m) with
    m = beta p + (1 - beta) q (GKD). skewed_kl: KL(p || skew p + (1 - skew) q) (DistiLLM). l2_topk: the variance of
    log p - log q over the kept entries, so that a common factor costs nothing.
    """

    name: DivergenceName = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in FORMULAS:
            raise SpecError(f"`{self.name}` is no divergence; known: {', '.join(get_args(DivergenceName))}")
        for key, value in (("beta", self.beta), ("skew", self.skew)):
            if not 0 < value < 1:
                raise SpecError(f"`{key}` of a divergence must lie between 0 and 1, found {value}")

    def __call__(self, rows: Bucketed) -> Tensor:
        """The divergence of every token, [T]; rounding may leave one of nearly 0 slightly below it."""
        return FORMULAS[self.name](self, rows)


def forward_kl(_: Divergence, rows: Bucketed) -> Tensor:
    """Error 1e-6, gradient 1e-5; where the teacher's tail is 1e-3 and the student's small, 5e-2 and 1e-2: the log of
    the student's tail is all that is known of it."""
    kept_T = (rows.p_TK * (rows.logp_TK - rows.logq_TK)).sum(-1)
    return kept_T + torch.xlogy(rows.p_tail_T, rows.p_tail_T) - rows.p_tail_T * rows.logq_tail_T


def reverse_kl(_: Divergence, rows: Bucketed) -> Tensor:
    """Error 1e-5, gradient 5e-5; for a teacher's tail of exactly 0, whose log stands at -87, 2e-4 and 5e-4. The dense
    value is then infinite or underflows, and this one is below it."""
    kept_T = (rows.q_TK * (rows.logq_TK - rows.logp_TK)).sum(-1)
    return kept_T + rows.logq_tail_T.exp() * (rows.logq_tail_T - rows.logp_tail_T)


def jsd(divergence: Divergence, rows: Bucketed) -> Tensor:
    """Error 5e-5, gradient 2e-5."""
    beta, q_tail_T = divergence.beta, rows.logq_tail_T.exp()
    mixture_TK, mixture_tail_T = _mixture(beta, rows)
    of_teacher_T = _kl_to(mixture_TK, mixture_tail_T, rows)
    of_student_T = (rows.q_TK * (rows.logq_TK - mixture_TK)).sum(-1) + q_tail_T * (rows.logq_tail_T - mixture_tail_T)
    return beta * of_teacher_T + (1 - beta) * of_student_T


def skewed_kl(divergence: Divergence, rows: Bucketed) -> Tensor:
    """Error 5e-5, gradient 2e-5."""
    return _kl_to(*_mixture(divergence.skew, rows), rows)


def l2_topk(_: Divergence, rows: Bucketed) -> Tensor:
    """Error 1e-6, gradient 1e-5: no tail takes part."""
    num_entries_T1 = rows.is_entry_TK.sum(-1, keepdim=True)
    gap_TK = rows.logp_TK - rows.logq_TK
    mean_T1 = gap_TK.sum(-1, keepdim=True) / num_entries_T1
    return ((gap_TK - mean_T1) * rows.is_entry_TK).square().sum(-1) / num_entries_T1[..., 0]


def _mixture(share: float, rows: Bucketed) -> tuple[Tensor, Tensor]:
    """log(share * p + (1 - share) * q) of the kept ids and of the tail."""
    mixture_TK = torch.logaddexp(rows.logp_TK + math.log(share), rows.logq_TK + math.log1p(-share))
    return mixture_TK, (share * rows.p_tail_T + (1 - share) * rows.logq_tail_T.exp()).log()


def _kl_to(mixture_TK: Tensor, mixture_tail_T: Tensor, rows: Bucketed) -> Tensor:
    kept_T = (rows.p_TK * (rows.logp_TK - mixture_TK)).sum(-1)
    return kept_T + torch.xlogy(rows.p_tail_T, rows.p_tail_T) - rows.p_tail_T * mixture_tail_T


FORMULAS: dict[str, Callable[[Divergence, Bucketed], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_kl": skewed_kl,
    "l2_topk": l2_topk,
}
