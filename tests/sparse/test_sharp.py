"""Sharp teachers: every divergence in fp32 against the dense float64 one, value and gradient, down to no tail at all.

The teacher's tail is in proportion to the student's, so that the bucket of all tail ids loses nothing and the value on
the bucketed support is the dense one.

Shapes: T response tokens, K kept entries, V vocabulary, D hidden size.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.helpers.rows import layer_rows
from vlsi_cache.config.training import DivergenceName
from vlsi_cache.sparse.divergences import Divergence
from vlsi_cache.sparse.kl import sparse_kl

NUM_IDS, NUM_KEPT, NUM_TOKENS = 2000, 8, 32
NAMES: tuple[DivergenceName, ...] = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "l2_topk")
TAILS = (1e-3, 1e-6, 1e-9, 1e-12, 0.0)
TINY = torch.finfo(torch.float32).tiny


def dense(name: str, p_TV: Tensor, logp_TV: Tensor, logq_TV: Tensor) -> Tensor:
    """Written down from the definitions; the log of a probability of 0 counts as that of the smallest fp32 number."""
    q_TV = logq_TV.exp()
    if name == "forward_kl":
        return (p_TV * (logp_TV - logq_TV)).sum(1)
    if name == "reverse_kl":
        return (q_TV * (logq_TV - logp_TV)).sum(1)
    if name == "skewed_kl":
        return (p_TV * (logp_TV - (0.1 * p_TV + 0.9 * q_TV).log())).sum(1)
    if name == "jsd":
        mixture_TV = ((p_TV + q_TV) / 2).log()
        return (p_TV * (logp_TV - mixture_TV) + q_TV * (logq_TV - mixture_TV)).sum(1) / 2
    return (logp_TV - logq_TV)[:, :NUM_KEPT].var(1, unbiased=False)


def errors(name: DivergenceName, teacher_tail: float, student_tail: float) -> tuple[float, float]:
    """Relative errors of value and gradient in fp32."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(NUM_IDS, 32, generator=generator) / 32**0.5
    hidden_TD = torch.randn(NUM_TOKENS, 32, generator=generator)
    weight_VD[:, 0], hidden_TD[:, 0] = 0.0, 0.0
    weight_VD[:NUM_KEPT, 0] = 1.0  # this coordinate alone decides how much the kept ids have together
    q_TV = (hidden_TD.double() @ weight_VD.double().T).softmax(1)
    odds_T = q_TV[:, NUM_KEPT:].sum(1) / q_TV[:, :NUM_KEPT].sum(1)
    hidden_TD[:, 0] = (odds_T * (1 - student_tail) / student_tail).log().float()

    exact_TD = hidden_TD.double().requires_grad_()
    logq_TV = (exact_TD @ weight_VD.double().T).log_softmax(1)
    noise_TK = 0.5 * torch.randn(NUM_TOKENS, NUM_KEPT, generator=generator).double()
    kept_TK = (logq_TV.detach()[:, :NUM_KEPT] + noise_TK).log_softmax(1) + math.log1p(-teacher_tail)
    tail_TV = logq_TV.detach()[:, NUM_KEPT:].log_softmax(1)
    logp_TV = torch.cat([kept_TK, tail_TV + math.log(max(teacher_tail, TINY))], 1)
    p_TV = logp_TV.exp() if teacher_tail else torch.cat([kept_TK.exp(), torch.zeros_like(tail_TV)], 1)
    wanted = dense(name, p_TV, logp_TV, logq_TV).mean()
    (wanted_TD,) = torch.autograd.grad(wanted, exact_TD)

    sorted_TK, order_TK = kept_TK.sort(1, descending=True)
    row = SimpleNamespace(
        ids_LTK=order_TK[None],
        logprobs_LTK=sorted_TK.float()[None],
        tail_ids_LTm=order_TK[None, :, :0],
        tail_mass_LT=torch.full((1, NUM_TOKENS), teacher_tail),
        entropy_LT=torch.ones(1, NUM_TOKENS),
        lse_LTn=torch.zeros(1, NUM_TOKENS, 1),
    )
    hidden_TD.requires_grad_()
    found = sparse_kl(hidden_TD, weight_VD, row, divergence=Divergence(name), vocab_size=NUM_IDS)
    (found_TD,) = torch.autograd.grad(found, hidden_TD)
    of_value = abs(found.item() - wanted.item()) / wanted.item()
    return of_value, ((found_TD.double() - wanted_TD).norm() / wanted_TD.norm()).item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("teacher_tail", TAILS)
def test_a_sharp_teacher_is_compared_as_it_is(name: DivergenceName, teacher_tail: float) -> None:
    # A log of -87 multiplies the rounding of the student's tail.
    limit = (5e-5, 5e-4) if name == "reverse_kl" and not teacher_tail else (1e-5, 1e-4)
    for student_tail in (0.9, 1e-2, 1e-4):
        of_value, of_gradient = errors(name, teacher_tail, student_tail)
        assert of_value < limit[0], student_tail
        assert of_gradient < limit[1], student_tail


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("teacher_tail", TAILS)
def test_a_student_as_sharp_is_known_as_far_as_fp32_goes(name: DivergenceName, teacher_tail: float) -> None:
    # The figures of the docstrings in divergences.py.
    at_most = {
        "forward_kl": (5e-2, 1e-2) if teacher_tail == 1e-3 else (2e-4, 2e-5),
        "reverse_kl": (2e-4, 5e-4) if not teacher_tail else (5e-5, 5e-5),
    }
    for student_tail in (1e-6, 1e-9):
        of_value, of_gradient = errors(name, teacher_tail, student_tail)
        limit = at_most.get(name, (5e-5, 2e-5))
        assert of_value < limit[0], student_tail
        assert of_gradient < limit[1], student_tail


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_a_tempered_tail_is_right_though_the_kept_log_probs_are_rounded(tau: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TV = 3 * torch.randn(64, NUM_IDS, generator=generator).double()
    logits_TV[:, :NUM_KEPT] += torch.linspace(10, 60, 64)[:, None].double()  # tails from nearly all to 1e-22
    log_TV, tempered_TV = logits_TV.log_softmax(1), (logits_TV / tau).log_softmax(1)
    logprobs_TK, ids_TK = log_TV.topk(NUM_KEPT)
    tail_T = log_TV.exp().scatter(1, ids_TK, 0.0).sum(1)
    wanted_T = tempered_TV.exp().scatter(1, ids_TK, 0.0).sum(1)
    lse_Tn = torch.stack([(logits_TV / t).logsumexp(1) for t in (1.0, tau)], 1)
    for noise in (0.0, 3e-3):  # of a quantised log-prob
        rounded_TK = (logprobs_TK + noise * torch.randn(64, NUM_KEPT, generator=generator)).clamp(max=0)
        rows = layer_rows(
            ids_TK[None], rounded_TK.sort(1, descending=True).values.float()[None], ids_TK[None, :, :0],
            tail_T.float()[None], torch.ones(1, 64), lse_Tn[None], vocab_size=NUM_IDS, tau=tau, taus=(1.0, tau),
        )  # fmt: skip
        found_T = rows.tail_mass_LT[0].double()
        assert (found_T > 0).all() == (wanted_T > TINY).all()
        # The stored mass bounds it from both sides; what lies far below the rounding is known to a few e-folds only.
        assert ((found_T - wanted_T).abs() < 2 * noise + 1e-6).all()
        known_T = wanted_T > TINY
        assert ((found_T / wanted_T).log()[known_T].abs() < math.log(NUM_IDS)).all()
