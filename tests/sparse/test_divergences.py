"""Every divergence against torch.distributions and autograd: gradcheck, bounds, temperatures, capped heads, a head
that trains.

Shapes: T response tokens, K kept entries, V vocabulary, D hidden size.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from tests.helpers.rows import layer_rows
from vlsi_cache.errors import DataError, ModelError, SpecError
from vlsi_cache.sparse.cross_entropy import head_output, kl_to_output, linear_cross_entropy
from vlsi_cache.sparse.divergences import Bucketed, Divergence
from vlsi_cache.sparse.head import Head
from vlsi_cache.sparse.kl import candidate_kl, sparse_kl

NAMES = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "l2_topk")
BOUNDED = NAMES[:-1]  # data processing does not hold for the l2
DIVERGENCES = [*map(Divergence, NAMES), Divergence("jsd", beta=0.9), Divergence("skewed_kl", skew=0.7)]
HEADS: list[dict[str, Any]] = [{}, {"scale": 0.3}, {"cap": 2.5}, {"scale": 1.7, "cap": 4.0}, {"bias": True}]
HEADS += [{"scale": 1.7, "cap": 4.0, "bias": True}]


def mixture(share: float, p: Categorical, q: Categorical) -> Categorical:
    return Categorical(probs=share * p.probs + (1 - share) * q.probs)


def reference(divergence: Divergence, p: Categorical, q: Categorical) -> Tensor:
    """On any support, from probabilities alone."""
    if divergence.name == "forward_kl":
        return kl_divergence(p, q)
    if divergence.name == "reverse_kl":
        return kl_divergence(q, p)
    if divergence.name == "skewed_kl":
        return kl_divergence(p, mixture(divergence.skew, p, q))
    assert divergence.name == "jsd"
    middle = mixture(divergence.beta, p, q)
    return divergence.beta * kl_divergence(p, middle) + (1 - divergence.beta) * kl_divergence(q, middle)


def bucketed(logits_TV: Tensor, ids_TK: Tensor) -> Categorical:
    """The kept ids and one bucket for the rest."""
    kept_TV = torch.zeros_like(logits_TV, dtype=torch.bool).scatter(1, ids_TK, True)
    tail_T1 = logits_TV.masked_fill(kept_TV, -math.inf).logsumexp(1, keepdim=True)
    return Categorical(logits=torch.cat([logits_TV.gather(1, ids_TK), tail_T1], 1))


class Case:
    """A student over a head, and teacher logits of which k entries are kept at the temperatures 1 and 2."""

    def __init__(self, *, top_k: int = 6, num_tokens: int = 4, spread: float = 2.0, seed: int = 0, **head: Any) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden_TD, self.weight_VD = normal(num_tokens, 8), normal(40, 8)
        self.head_options = {**head, "bias_V": normal(40)} if head.pop("bias", False) else head
        self.teacher_TV = spread * normal(num_tokens, 40)
        log_TV = self.teacher_TV.log_softmax(1)
        logprobs_TK, self.ids_TK = log_TV.topk(top_k)
        self.rows = SimpleNamespace(
            ids_LTK=self.ids_TK[None],
            logprobs_LTK=logprobs_TK[None],
            tail_ids_LTm=self.ids_TK[None, :, :0],
            lse_LTn=torch.stack([(log_TV / tau).logsumexp(1) for tau in (1.0, 2.0)], -1)[None],
            entropy_LT=Categorical(logits=log_TV).entropy()[None],
            tail_mass_LT=log_TV.exp().scatter(1, self.ids_TK, 0.0).sum(1)[None],
        )
        self.hidden_TD.requires_grad_()

    def leaves(self, *, grows_head: bool) -> list[Tensor]:
        """What gets a gradient: the hidden states, and what the head is made of if it trains."""
        parts = [self.weight_VD, *([self.head_options["bias_V"]] if "bias_V" in self.head_options else [])]
        for part in parts:
            part.requires_grad_(grows_head)
        return [self.hidden_TD, *(parts if grows_head else [])]

    @property
    def head(self) -> Head:
        return Head(self.weight_VD, **self.head_options)

    def logits_TV(self, weight_VD: Tensor | None = None) -> Tensor:
        z_TV = self.hidden_TD @ (self.weight_VD if weight_VD is None else weight_VD).T
        z_TV = z_TV + self.head_options.get("bias_V", 0.0)
        scale, cap = self.head_options.get("scale", 1.0), self.head_options.get("cap")
        return z_TV * scale if cap is None else cap * torch.tanh(z_TV * scale / cap)

    def loss(self, divergence: Divergence, tau: float = 1.0, weights_T: Tensor | None = None) -> Tensor:
        rows, options = (
            SimpleNamespace(**{**vars(self.rows), "taus": (1.0, 2.0)}),
            {"tau": tau, "weights_T": weights_T, "vocab_size": 40},
        )
        return sparse_kl(self.hidden_TD, self.head, rows, divergence=divergence, **options)

    def expected(self, divergence: Divergence, tau: float = 1.0) -> Tensor:
        """tau^2 times the divergence of every token."""
        student_TV, teacher_TV = self.logits_TV() / tau, self.teacher_TV / tau
        if divergence.name == "l2_topk":
            gap_TV = teacher_TV.log_softmax(1) - student_TV.log_softmax(1)
            return tau**2 * gap_TV.gather(1, self.ids_TK).var(1, unbiased=False)
        p, q = bucketed(teacher_TV, self.ids_TK), bucketed(student_TV, self.ids_TK)
        return tau**2 * reference(divergence, p, q)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_value_and_gradients_equal_plain_autograd(divergence: Divergence, tau: float, head: dict[str, Any]) -> None:
    case = Case(**head)
    weights_T = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    for grows_head in (False, True):
        leaves = case.leaves(grows_head=grows_head)
        expected = (case.expected(divergence, tau) * weights_T).sum() / weights_T.sum()
        found = case.loss(divergence, tau, weights_T)
        torch.testing.assert_close(found, expected)
        wanted = torch.autograd.grad(2.5 * expected, leaves)
        torch.testing.assert_close(torch.autograd.grad(2.5 * found, leaves), wanted)


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"num_tokens": 1}, {"top_k": 40}], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradcheck(divergence: Divergence, options: dict[str, int]) -> None:
    case = Case(cap=3.0, **options)

    def loss(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        case.hidden_TD, case.weight_VD = hidden_TD, weight_VD
        return case.loss(divergence, tau=2.0)

    hidden_TD, weight_VD = case.hidden_TD, case.weight_VD
    assert torch.autograd.gradcheck(loss, (hidden_TD, weight_VD), atol=1e-7)  # a frozen head
    # One random direction in the 320 weights; every single one is compared with autograd above.
    assert torch.autograd.gradcheck(loss, (hidden_TD, weight_VD.requires_grad_()), atol=1e-7, fast_mode=True)


def test_the_gradient_carries_tau_squared_like_the_value() -> None:
    # At a high temperature tau^2 * KL tends to a limit: without the factor, value and gradient would vanish.
    case = Case(top_k=40)
    for tau in (1.0, 2.0):
        (gradient_TD,) = torch.autograd.grad(case.loss(Divergence(), tau), case.hidden_TD)
        p_TV, q_TV = ((x / tau).softmax(1) for x in (case.teacher_TV, case.logits_TV()))
        torch.testing.assert_close(gradient_TD, tau * (q_TV - p_TV) @ case.weight_VD / 4)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 10**6), st.integers(1, 39), st.floats(0.1, 15), st.floats(0.01, 20), st.sampled_from(BOUNDED),
    st.floats(0.05, 0.95),
)  # fmt: skip
def test_the_bucket_lies_between_zero_and_dense(
    seed: int, top_k: int, spread: float, scale: float, name: Any, share: float
) -> None:
    case = Case(seed=seed, top_k=top_k, spread=spread, scale=scale)
    divergence = Divergence(name, beta=share, skew=share)
    rows = layer_rows(
        case.rows.ids_LTK, case.rows.logprobs_LTK, case.rows.tail_ids_LTm, case.rows.tail_mass_LT,
        case.rows.entropy_LT, vocab_size=40,
    )  # fmt: skip
    found_T = candidate_kl(case.hidden_TD, Head(case.weight_VD, scale), rows, divergence=divergence).choose(0).tokens_T
    dense_T = reference(divergence, Categorical(logits=case.teacher_TV), Categorical(logits=case.logits_TV()))
    assert (found_T >= -1e-9).all()
    # Categorical clamps probabilities at its epsilon, so that a reverse KL of 30 nats is off by this much.
    assert (found_T <= dense_T.detach() * (1 + 1e-9) + 1e-9).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_nothing_to_learn_from_an_equal_teacher(divergence: Divergence) -> None:
    for top_k in (1, 6, 40):
        case = Case(top_k=top_k)
        teacher_TV = case.logits_TV().detach()
        log_TV = teacher_TV.log_softmax(1)
        logprobs_TK, ids_TK = log_TV.topk(top_k)
        case.rows.ids_LTK, case.rows.logprobs_LTK = ids_TK[None], logprobs_TK[None]
        case.rows.tail_mass_LT = log_TV.exp().scatter(1, ids_TK, 0.0).sum(1)[None]
        loss = case.loss(divergence)
        assert 0 <= loss.item() < 1e-10
        (gradient_TD,) = torch.autograd.grad(loss, case.hidden_TD)
        assert gradient_TD.abs().max() < 1e-8


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_padding_is_inert(divergence: Divergence) -> None:
    plain, padded = Case(), Case()
    for ids in (plain.rows.ids_LTK[..., :2], torch.zeros(1, 4, 2, dtype=torch.long)):
        padded.rows.ids_LTK = torch.cat([plain.rows.ids_LTK, ids], -1)
        padded.rows.logprobs_LTK = torch.cat([plain.rows.logprobs_LTK, torch.full(ids.shape, -math.inf)], -1)
        for grows_head in (False, True):
            for case in (plain, padded):
                case.weight_VD.requires_grad_(grows_head)
            leaves = [[c.hidden_TD, c.weight_VD] if grows_head else [c.hidden_TD] for c in (plain, padded)]
            torch.testing.assert_close(padded.loss(divergence, 2.0), plain.loss(divergence, 2.0))
            torch.testing.assert_close(
                torch.autograd.grad(padded.loss(divergence, 2.0), leaves[1]),
                torch.autograd.grad(plain.loss(divergence, 2.0), leaves[0]),
            )


def test_both_tails_at_their_floor_are_finite() -> None:
    # A teacher without a tail, and a student whose tail underflows.
    logp_TK, p_tail_T = torch.zeros(1, 1), torch.zeros(1)
    for name in NAMES:
        logq_TK = torch.zeros(1, 1, requires_grad=True)
        value_T = Divergence(name)(Bucketed.of(logp_TK, p_tail_T, logq_TK))
        value_T.sum().backward()
        assert abs(value_T.item()) < 1e-5
        assert logq_TK.grad is not None
        assert torch.isfinite(logq_TK.grad).all()


@pytest.mark.parametrize("grows_head", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("block", [7, 40, 1024])
def test_linear_cross_entropy_is_cross_entropy_of_the_logits(
    block: int, head: dict[str, Any], grows_head: bool
) -> None:
    case = Case(**head)
    gold_T, share_T = torch.tensor([0, 39, 7, 14]), torch.tensor([1.0, 3.0, 0.0, 2.0], dtype=torch.float64)
    leaves = case.leaves(grows_head=grows_head)
    found = linear_cross_entropy(case.hidden_TD, case.head, gold_T, share_T=share_T, block=block)
    expected = (F.cross_entropy(case.logits_TV(), gold_T, reduction="none") * share_T).sum()
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(0.5 * expected, leaves)
    torch.testing.assert_close(torch.autograd.grad(0.5 * found, leaves), wanted)
    with torch.no_grad():
        value = linear_cross_entropy(case.hidden_TD, case.head, gold_T)
    assert not value.requires_grad


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_divergence_from_another_output_needs_no_logits(has_bias: bool) -> None:
    case = Case(scale=0.7, bias=has_bias)
    target_TD, gold_T = torch.randn(4, 8, dtype=torch.float64), torch.tensor([0, 39, 7, 14])
    head = case.head
    teacher = Categorical(logits=0.7 * (target_TD @ case.weight_VD.T + case.head_options.get("bias_V", 0.0)))
    expected_T = kl_divergence(teacher, Categorical(logits=case.logits_TV()))
    nll_T = F.cross_entropy(case.logits_TV(), gold_T, reduction="none").detach()
    for share_T in (None, torch.tensor([0.1, 0.0, 2.0, 0.4], dtype=torch.float64)):
        found, cross_entropy = kl_to_output(case.hidden_TD, head, gold_T, head_output(target_TD, head), share_T=share_T)
        weights_T = torch.full((4,), 0.25, dtype=torch.float64) if share_T is None else share_T
        torch.testing.assert_close(found, (expected_T * weights_T).sum())
        (wanted_TD,) = torch.autograd.grad(3 * (expected_T * weights_T).sum(), case.hidden_TD, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(3 * found, case.hidden_TD)[0], wanted_TD)
        torch.testing.assert_close(cross_entropy, (nll_T * weights_T).sum())
    own = head_output(case.hidden_TD, head)
    assert 0 <= kl_to_output(case.hidden_TD, head, gold_T, own)[0].item() < 1e-12
    with pytest.raises(ModelError, match="without a soft cap"):
        kl_to_output(case.hidden_TD, Head(case.weight_VD, cap=2.0), gold_T, own)


def test_a_head_changed_between_value_and_gradient_is_noticed() -> None:
    case = Case()
    loss = linear_cross_entropy(case.hidden_TD, case.weight_VD.requires_grad_(), torch.arange(4))
    with torch.no_grad():
        case.weight_VD.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_token_may_choose_its_own_candidate() -> None:
    torch.manual_seed(0)
    hidden_TD, weight_VD = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8)
    log_MTV = torch.randn(3, 5, 30).log_softmax(-1)
    logprobs, ids = log_MTV.topk(4)
    rows = layer_rows(ids, logprobs, ids[..., :0], 1 - logprobs.exp().sum(-1), torch.ones(3, 5), vocab_size=30)
    candidates = candidate_kl(hidden_TD, weight_VD, rows)
    index_T = torch.tensor([2, 0, 1, 1, 2])
    expected = torch.stack([candidates.choose(int(index)).tokens_T[t] for t, index in enumerate(index_T)])
    torch.testing.assert_close(candidates.choose(index_T).tokens_T, expected)
    gradients = torch.stack([torch.autograd.grad(candidates.loss(i), hidden_TD)[0] for i in range(3)])
    (found_TD,) = torch.autograd.grad(candidates.loss(index_T), hidden_TD)
    torch.testing.assert_close(found_TD, gradients[index_T, torch.arange(5)])


def test_a_window_is_the_same_as_those_layers_alone() -> None:
    torch.manual_seed(0)
    hidden_TD, weight_VD = torch.randn(5, 8), torch.randn(30, 8)
    logprobs, ids = torch.randn(6, 5, 30).log_softmax(-1).topk(4)
    arrays = (ids, logprobs, torch.randint(30, (6, 5, 2)), 1 - logprobs.exp().sum(-1), torch.ones(6, 5))
    whole = layer_rows(*arrays, vocab_size=30, block=7)
    alone = layer_rows(*(array[2:5] for array in arrays), vocab_size=30, block=7)
    window = candidate_kl(hidden_TD, weight_VD, whole, range(2, 5))
    torch.testing.assert_close(window.matching_MT, candidate_kl(hidden_TD, weight_VD, alone).matching_MT)


def test_many_layers_and_blocks_are_indexed_without_overflow() -> None:
    torch.manual_seed(0)
    num_layers, vocab_size = 21, 40_000
    ids = torch.randint(vocab_size, (num_layers, 3, 5))
    ids[..., 0] = vocab_size - 1
    hidden_TD, weight_VD = torch.randn(3, 4), torch.randn(vocab_size, 4)
    zeros = torch.zeros(num_layers, 3)
    rows = layer_rows(ids, ids - ids - 1.0, ids[..., :0], zeros, zeros, vocab_size=vocab_size, block=16)
    assert rows.index.slots_N.dtype == rows.index.order_N.dtype == torch.int32
    found = candidate_kl(hidden_TD, weight_VD, rows).matching_MT
    logq_TV = (hidden_TD @ weight_VD.T).log_softmax(1)
    expected = -math.exp(-1) * logq_TV.expand(num_layers, -1, -1).gather(2, ids).sum(-1)
    torch.testing.assert_close(found, expected)


def test_a_gold_id_outside_the_head_is_no_number() -> None:
    case = Case()
    for outside in (-100, 40):
        loss = linear_cross_entropy(case.hidden_TD.detach(), case.weight_VD, torch.tensor([1, 2, outside, 3]))
        assert loss.isnan()


def test_compiled_equals_eager() -> None:
    case = Case(cap=3.0)
    gold_T = torch.arange(4)
    (eager_TD,) = torch.autograd.grad(linear_cross_entropy(case.hidden_TD, case.weight_VD, gold_T), case.hidden_TD)
    compiled = linear_cross_entropy(case.hidden_TD, Head(case.weight_VD, compiled=True), gold_T, block=16)
    torch.testing.assert_close(torch.autograd.grad(compiled, case.hidden_TD)[0], eager_TD)


def test_errors_name_the_values() -> None:
    case = Case()
    with pytest.raises(DataError, match=r"`tau` is 3\.0, and the rows hold \[1\.0, 2\.0\] only: .* `rows\.taus`"):
        case.loss(Divergence(), tau=3.0)
    case.rows.lse_LTn = case.rows.lse_LTn[..., :1]
    with pytest.raises(DataError, match=r"`lse_LTn` has shape \[1, 4, 1\], and there are 2 temperatures"):
        case.loss(Divergence(), tau=2.0)
    with pytest.raises(SpecError, match="`kl` is no divergence; known: forward_kl, reverse_kl"):
        Divergence("kl")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"`beta` of a divergence must lie between 0 and 1, found 1\.0"):
        Divergence("jsd", beta=1.0)
    with pytest.raises(DataError, match=r"4 hidden states, but gold ids of shape \[3\]"):
        linear_cross_entropy(case.hidden_TD, case.weight_VD, torch.arange(3))
    with pytest.raises(ModelError, match="logit scale and cap of a head must be positive"):
        linear_cross_entropy(case.hidden_TD, Head(case.weight_VD, cap=0.0), torch.arange(4))
