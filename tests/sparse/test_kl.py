"""The sparse loss against dense distributions and autograd; bounds, edges, bf16 and memory."""

import doctest
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.memory import LargestTensor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from tests.helpers.rows import layer_rows
from vlsi_cache.errors import DataError
from vlsi_cache.sparse import kl, vocab_pass
from vlsi_cache.sparse.head import Head
from vlsi_cache.sparse.kl import CandidateKL, LayerRows, candidate_kl, sparse_kl


@dataclass
class Case:
    """A student layer, M dense teacher distributions and their rows."""

    hidden_TD: Tensor
    weight_VD: Tensor
    dense_MTV: Tensor
    ids_MTK: Tensor
    logprobs_MTK: Tensor
    tail_ids_MTm: Tensor
    tail_mass_MT: Tensor
    entropy_MT: Tensor

    def rows(self, *, block: int = 13) -> LayerRows:
        return layer_rows(
            self.ids_MTK, self.logprobs_MTK, self.tail_ids_MTm, self.tail_mass_MT, self.entropy_MT,
            vocab_size=self.dense_MTV.shape[2], block=block,
        )  # fmt: skip

    def candidates(self, *, block: int = 13, window: range | None = None, **options: Any) -> CandidateKL:
        return candidate_kl(self.hidden_TD, Head(self.weight_VD), self.rows(block=block), window, **options)

    def arrays(self) -> dict[str, Tensor]:
        """As a cache has them."""
        return {
            "ids_LTK": self.ids_MTK, "logprobs_LTK": self.logprobs_MTK.float(), "tail_ids_LTm": self.tail_ids_MTm,
            "tail_mass_LT": self.tail_mass_MT.float(), "entropy_LT": self.entropy_MT.float(),
            "lse_LTn": torch.zeros(*self.tail_mass_MT.shape, 1),
        }  # fmt: skip

    def dense_kl(self) -> Tensor:
        logits_TV = (self.hidden_TD @ self.weight_VD.T)[:, : self.dense_MTV.shape[2]]
        return torch.stack([kl_divergence(Categorical(p), Categorical(logits=logits_TV)) for p in self.dense_MTV])

    def dense_ghost(self, candidate: int) -> Tensor:
        """The ghost KL of each token written down plainly, for autograd."""
        logits_TV = (self.hidden_TD @ self.weight_VD.T)[:, : self.dense_MTV.shape[2]]
        kept_TV = torch.zeros_like(logits_TV).scatter(1, self.ids_MTK[candidate], 1.0)
        logq_TV = logits_TV.log_softmax(1)
        p_TK, tail_T = self.logprobs_MTK[candidate].exp(), self.tail_mass_MT[candidate]
        tail_q_T = (logq_TV.exp() * (1 - kept_TV)).sum(1).clamp(min=2.0**-43)
        kept_T = (p_TK * (self.logprobs_MTK[candidate] - logq_TV.gather(1, self.ids_MTK[candidate]))).sum(1)
        return kept_T + torch.xlogy(tail_T, tail_T) - tail_T * tail_q_T.log()


def make_case(
    *, num_layers: int = 3, num_tokens: int = 5, vocab: int = 50, padded: int = 7, top_k: int = 6, num_tail: int = 4,
    spread: float = 2.0, dtype: torch.dtype = torch.float64, seed: int = 0,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden_TD, weight_VD = normal(num_tokens, 8), normal(vocab + padded, 8) / 8**0.5
    weight_VD[vocab:] *= 100  # padding rows that must never take part
    dense_MTV = (spread * normal(num_layers, num_tokens, vocab)).softmax(-1)
    probs_MTK, ids_MTK = dense_MTV.topk(top_k)
    tails_MTV = dense_MTV.scatter(-1, ids_MTK, 0.0)
    if num_tail:
        draws = torch.multinomial(tails_MTV.flatten(0, 1), num_tail, replacement=True, generator=generator)
    else:
        draws = torch.empty(num_layers * num_tokens, 0, dtype=torch.long)
    return Case(
        hidden_TD.to(dtype).requires_grad_(),
        weight_VD.to(dtype),
        dense_MTV,
        ids_MTK,
        probs_MTK.log(),
        draws.view(num_layers, num_tokens, num_tail),
        tails_MTV.sum(-1),
        Categorical(dense_MTV).entropy(),
    )


@pytest.mark.parametrize("block", [1, 13, 50, 1024])
def test_values_equal_dense_formulas(block: int):
    case = make_case()
    found = case.candidates(block=block)
    torch.testing.assert_close(found.ghost_MT, torch.stack([case.dense_ghost(i).detach() for i in range(3)]))
    logq_TV = (case.hidden_TD @ case.weight_VD[:50].T).log_softmax(1).detach()
    cross_MT = (case.logprobs_MTK.exp() * logq_TV.expand(3, -1, -1).gather(2, case.ids_MTK)).sum(-1)
    tail_MT = case.tail_mass_MT * logq_TV.expand(3, -1, -1).gather(2, case.tail_ids_MTm).mean(-1)
    torch.testing.assert_close(found.matching_M, (-case.entropy_MT - cross_MT - tail_MT).mean(1))
    assert not found.matching_M.requires_grad
    assert not found.ghost_MT.requires_grad


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 1}, {"spread": 9.0}, {"top_k": 50, "num_tail": 0}, {"num_tokens": 1}]
)
def test_loss_and_gradient_equal_autograd(options: dict, weighted: bool):
    case = make_case(**options)
    num_tokens = case.hidden_TD.shape[0]
    share_T = torch.arange(1.0, 1.0 + num_tokens, dtype=torch.float64) % 3 if weighted else None
    found = case.candidates(share_T=share_T)
    for candidate in range(3):
        dense_T = case.dense_ghost(candidate)
        expected = dense_T.mean() if share_T is None else (share_T * dense_T).sum()
        torch.testing.assert_close(found.loss(candidate), expected)
        (wanted_TD,) = torch.autograd.grad(3.5 * expected, case.hidden_TD)
        for choice in (candidate, torch.tensor(candidate)):
            (found_TD,) = torch.autograd.grad(3.5 * found.loss(choice), case.hidden_TD)
            torch.testing.assert_close(found_TD, wanted_TD)


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 50, "num_tail": 0}])
def test_gradcheck(options: dict):
    case = make_case(num_tokens=3, vocab=50, **options)
    share_T = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)

    def loss(hidden_TD: Tensor) -> Tensor:
        case.hidden_TD = hidden_TD
        return case.candidates(share_T=share_T).loss(1)

    assert torch.autograd.gradcheck(loss, case.hidden_TD, atol=1e-8)


def test_below_the_floor_value_and_gradient_are_those_of_the_floor():
    case = make_case(num_tokens=2, num_layers=1)
    case.ids_MTK[0, 1] = case.ids_MTK[0, 0]
    with torch.no_grad():
        # The first token's student puts e^40 times more on the kept ids than elsewhere, the second's does not.
        case.weight_VD[:, 0] = 0.0
        case.weight_VD[case.ids_MTK[0, 0], 0] = 1.0
        case.hidden_TD[:, 0] = torch.tensor([40.0, 0.0])
    q_TV = (case.hidden_TD @ case.weight_VD[:50].T).softmax(1)
    outside_T = q_TV.scatter(1, case.ids_MTK[0], 0.0).sum(1)
    assert outside_T[0] < 2.0**-43
    assert outside_T[1] > 0.1
    expected = case.dense_ghost(0).mean()
    (wanted_TD,) = torch.autograd.grad(expected, case.hidden_TD)
    loss = case.candidates().loss(0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, case.hidden_TD)[0], wanted_TD)


def test_padding_is_inert_wherever_its_ids_point():
    case = make_case()
    plain = case.candidates()
    (plain_TD,) = torch.autograd.grad(plain.loss(1), case.hidden_TD)
    pad_ids = case.ids_MTK[..., :2]  # repeats of kept ids, and id 0
    for ids in (pad_ids, torch.zeros_like(pad_ids)):
        padded = make_case()
        padded.hidden_TD = case.hidden_TD
        padded.ids_MTK = torch.cat([case.ids_MTK, ids], -1)
        padded.logprobs_MTK = torch.cat([case.logprobs_MTK, torch.full(ids.shape, -math.inf)], -1)
        found = padded.candidates()
        torch.testing.assert_close(found.ghost_MT, plain.ghost_MT)
        torch.testing.assert_close(found.matching_M, plain.matching_M)
        torch.testing.assert_close(torch.autograd.grad(found.loss(1), case.hidden_TD)[0], plain_TD)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6), st.integers(1, 30), st.floats(0.1, 20), st.floats(0.01, 60),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
@example(896774, 28, 0.25, 19.0, torch.float32)  # logits of 3,787
def test_ghost_lies_between_zero_and_dense(seed: int, top_k: int, spread: float, scale: float, dtype: torch.dtype):
    case = make_case(seed=seed, top_k=top_k, vocab=30, num_tail=0, spread=spread, dtype=torch.float64)
    with torch.no_grad():
        case.hidden_TD *= scale
    case.hidden_TD, case.weight_VD = case.hidden_TD.detach().to(dtype), case.weight_VD.to(dtype)
    ghost_MT = case.candidates().ghost_MT.double()
    # The dense value is of the same rounded inputs, so that only the arithmetic in between can differ.
    case.hidden_TD, case.weight_VD = case.hidden_TD.double(), case.weight_VD.double()
    dense_MT = case.dense_kl().detach()
    # A product of D terms in fp32 is off by up to D units of rounding of the sum of their magnitudes (Higham, 3.5).
    size_T = (case.hidden_TD.abs() @ case.weight_VD.abs().T).amax(1)
    num_terms = case.hidden_TD.shape[1]
    slack = 1e-9 if dtype == torch.float64 else num_terms * torch.finfo(dtype).eps * (1 + size_T)
    assert (ghost_MT >= 0).all()
    assert (ghost_MT <= dense_MT + slack).all()
    if top_k == 30:
        torch.testing.assert_close(ghost_MT, dense_MT, rtol=1e-4, atol=1e-5)


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient():
    case = make_case(num_layers=1)
    dense_TV = (case.hidden_TD @ case.weight_VD[:50].T).softmax(1).detach()
    for top_k in (4, 50):
        probs_TK, ids_TK = dense_TV.topk(top_k)
        case.ids_MTK, case.logprobs_MTK = ids_TK[None], probs_TK.log()[None]
        case.tail_mass_MT = (1 - probs_TK.sum(1)).clamp(min=0)[None]
        loss = case.candidates().loss(0)
        assert 0 <= loss.item() < 1e-12
        assert torch.autograd.grad(loss, case.hidden_TD)[0].abs().max() < 1e-12


def test_matching_value_is_unbiased():
    case = make_case(num_layers=4, num_tokens=8, num_tail=400, seed=3)
    dense_M = case.dense_kl().mean(1).detach()
    torch.testing.assert_close(case.candidates().matching_M, dense_M, rtol=0, atol=0.02)
    case.tail_ids_MTm = case.tail_ids_MTm[..., :0]
    ghost = case.candidates()
    torch.testing.assert_close(ghost.matching_M, ghost.ghost_MT.mean(1))
    assert (dense_M - ghost.matching_M).min() > 0.02


@pytest.mark.parametrize("rounds", [False, True])
def test_bf16_gradient_is_within_1e_3_of_float64(rounds: bool, monkeypatch: pytest.MonkeyPatch):
    # `rounds` is what a GPU does: probabilities enter the second product in bf16.
    monkeypatch.setattr(vocab_pass, "_rounds_probs", lambda *_: rounds)
    case = make_case(num_tokens=40, vocab=3000, top_k=32, spread=3.0, num_tail=0)
    exact = make_case(num_tokens=40, vocab=3000, top_k=32, spread=3.0, num_tail=0)
    case.hidden_TD = (3 * case.hidden_TD).detach().bfloat16().requires_grad_()
    case.weight_VD = case.weight_VD.bfloat16()
    exact.hidden_TD = case.hidden_TD.detach().double().requires_grad_()
    exact.weight_VD = case.weight_VD.double()
    # Kept are the student's likeliest ids, where rounding alone would already cost more than 1e-3.
    ids_TK = (exact.hidden_TD @ exact.weight_VD[:3000].T).topk(32).indices
    case.ids_MTK = exact.ids_MTK = ids_TK.expand(3, -1, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.candidates(block=256)
        loss = found.loss(1)
        assert loss.grad_fn is not None
        gradient_TD = loss.grad_fn.saved_tensors[0].double()  # before it is rounded to the hidden states' bf16
    wanted = exact.dense_ghost(1).mean()
    (wanted_TD,) = torch.autograd.grad(wanted, exact.hidden_TD)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (gradient_TD - wanted_TD).norm() / wanted_TD.norm() < 1e-3
    loss.backward()
    assert case.hidden_TD.grad is not None
    assert case.hidden_TD.grad.dtype == torch.bfloat16
    torch.testing.assert_close(case.hidden_TD.grad.double(), wanted_TD, rtol=1e-2, atol=1e-5)


def test_fp32_gradient_holds_where_the_student_s_tail_is_small():
    # c * G and the kept rows nearly cancel, so the error grows as fp32 round-off / tail mass: it must stay below the
    # 1e-3 asked of bf16 down to a tail of 2e-4.
    case = make_case(num_tokens=40, vocab=2000, top_k=32, num_tail=0, num_layers=1)
    case.weight_VD = case.weight_VD.float().double()  # the same inputs in both precisions
    case.hidden_TD = (4 * case.hidden_TD).detach().float().double().requires_grad_()
    q_TV = (case.hidden_TD @ case.weight_VD[:2000].T).softmax(1).detach()
    case.ids_MTK = q_TV.topk(32).indices[None]
    outside_T = q_TV.scatter(1, case.ids_MTK[0], 0.0).sum(1)
    assert outside_T.min() < 3e-4
    (wanted_TD,) = torch.autograd.grad(case.candidates(block=256).loss(0), case.hidden_TD)
    case.hidden_TD = case.hidden_TD.detach().float().requires_grad_()
    case.weight_VD = case.weight_VD.float()
    (found_TD,) = torch.autograd.grad(case.candidates(block=256).loss(0), case.hidden_TD)
    assert (found_TD - wanted_TD).norm() / wanted_TD.norm() < 1e-3


def test_nothing_of_the_vocabulary_s_size_is_allocated():
    hidden_TD, weight_VD = torch.randn(64, 8, requires_grad=True), torch.randn(8000, 8)
    ids_MTx = torch.randint(8000, (2, 64, 10))
    rows = layer_rows(
        ids_MTx[..., :6], torch.full((2, 64, 6), -2.0), ids_MTx[..., 6:], torch.full((2, 64), 0.2), torch.ones(2, 64),
        vocab_size=8000, block=512,
    )  # fmt: skip
    with LargestTensor() as sizes:
        candidate_kl(hidden_TD, weight_VD, rows).loss(1).backward()
    # The head itself is the largest tensor seen, as a view.
    assert 64 * 512 <= sizes.largest <= weight_VD.numel() < 64 * 8000 / 4


def test_sparse_kl_takes_numpy_and_torch_rows_of_any_layer():
    case = make_case(dtype=torch.float32)
    arrays = case.arrays()
    numpy_row = SimpleNamespace(**{name: value.numpy() for name, value in arrays.items()})
    numpy_row.ids_LTK = numpy_row.ids_LTK.astype(np.uint32)
    for array in vars(numpy_row).values():
        array.flags.writeable = False  # as the memory-mapped profile gives them
    weights_T = torch.arange(5.0)
    for row in (SimpleNamespace(**arrays), numpy_row):
        for layer in (-1, 0, 1):
            wanted = case.candidates(share_T=weights_T / 10).loss(layer % 3)
            found = sparse_kl(case.hidden_TD, case.weight_VD, row, layer=layer, weights_T=weights_T, vocab_size=50)
            torch.testing.assert_close(found, wanted)


def test_the_example_in_the_documentation_runs():
    result = doctest.testmod(kl)
    assert result.attempted
    assert not result.failed


def test_without_a_gradient_only_the_value_is_computed():
    case = make_case()
    wanted = case.candidates().loss(2).detach()
    case.weight_VD.requires_grad_()
    with torch.no_grad():
        found = case.candidates().loss(2)
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted)


def test_errors_name_the_values():
    case = make_case()
    for weights_T, message in (
        (torch.zeros(5), r"`weights_T` .* not all zero, found minimum 0\.0 and sum 0\.0"),
        (torch.tensor([-1.0, 2, 2, 2, 2]), r"minimum -1\.0"),
        (torch.ones(4), r"`weights_T` has shape \[4\], there are 5"),
    ):
        with pytest.raises(DataError, match=message):
            sparse_kl(
                case.hidden_TD, case.weight_VD, SimpleNamespace(**case.arrays()), weights_T=weights_T, vocab_size=50
            )
    with pytest.raises(DataError, match=r"`share_T` has shape \[4\], there are 5"):
        case.candidates(share_T=torch.ones(4))
    case.ids_MTK[0, 0, 0] = 50
    with pytest.raises(DataError, match="to 50, outside the real vocabulary of 50"):
        case.candidates()
    case = make_case()
    case.hidden_TD = case.hidden_TD[:4]
    with pytest.raises(DataError, match="4 student hidden states, but rows of 5 response tokens"):
        case.candidates()
    case = make_case(num_tokens=0)
    with pytest.raises(DataError, match="no response tokens"):
        case.candidates()
    case = make_case()
    case.tail_mass_MT = case.tail_mass_MT[:2]
    with pytest.raises(DataError, match="do not fit together"):
        case.candidates()
