"""The loss between two tokenizers against a literal dense one: whole distributions, one chunk after the other.

Shapes: T tokens of the student, P of them with a row, C chunks, L teacher layers, V words of the teacher, W of the
student, D hidden size.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.nn import functional as F

from vlsi_cache.errors import DataError
from vlsi_cache.sparse.alm import ChunkRows, Chunks, aligned_kl, mapped_rows
from vlsi_cache.sparse.divergences import Divergence
from vlsi_cache.sparse.kl import LayerRows, candidate_kl
from vlsi_cache.sparse.rows import SparseRows

T, L, V, W, D, K = 9, 3, 20, 16, 6, 5
INDEX_P = [0, 1, 4, 7]
CHUNKS = [[1, 2, 3], [4, -1, -1], [5, 6, -1]]


@dataclass
class Case:
    hidden_TD: Tensor
    head_WD: Tensor
    gold_T: Tensor
    share_T: Tensor
    teacher_LPV: np.ndarray
    map_V: np.ndarray
    rows: SparseRows
    chunks: Chunks

    def chunk_rows(self, tau: float = 100.0) -> ChunkRows:
        return ChunkRows.of(self.rows, self.chunks, self.gold_T, tau=tau)


def rows_of(logp_LPV: np.ndarray, *, kept: int = K, tails: int = 2) -> SparseRows:
    ids = np.argsort(-logp_LPV, axis=-1, kind="stable")
    logprobs = np.take_along_axis(logp_LPV, ids[..., :kept], -1)
    entropy = -(np.exp(logp_LPV) * logp_LPV).sum(-1)
    mass = np.maximum(1 - np.exp(logprobs).sum(-1), 0.0)
    nothing = np.zeros(logp_LPV.shape[:2])
    return SparseRows(
        ids[..., :kept], logprobs, ids[..., kept : kept + tails], nothing[..., None], entropy, nothing, mass
    )


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    logits_LPV = rng.normal(size=(L, len(INDEX_P), V)) * 2
    teacher_LPV = logits_LPV - np.log(np.exp(logits_LPV).sum(-1, keepdims=True))
    map_V = np.full(V, -1)
    map_V[rng.permutation(V)[:12]] = rng.permutation(W)[:12]
    rows, lost_P = mapped_rows(rows_of(teacher_LPV), map_V, W)
    assert lost_P.any()
    rows = replace(rows, tail_mass_LT=_tails(teacher_LPV, map_V))  # without the rounding to fp32
    share_T = torch.rand(T, dtype=torch.float64)
    return Case(
        torch.randn(T, D, dtype=torch.float64, requires_grad=True),
        torch.randn(W, D, dtype=torch.float64),
        torch.randint(W, (T,)),
        share_T / share_T.sum(),
        teacher_LPV,
        map_V,
        rows,
        Chunks(np.array(INDEX_P), lost_P, np.array(CHUNKS), -rng.gamma(2.0, 1.0, (L, len(CHUNKS)))),
    )


def _tails(teacher_LPV: np.ndarray, map_V: np.ndarray) -> np.ndarray:
    kept = np.argsort(-teacher_LPV, axis=-1, kind="stable")[..., :K]
    p = np.take_along_axis(np.exp(teacher_LPV), kept, -1)
    return 1 - (p * (map_V[kept] >= 0)).sum(-1)


def literal(case: Case, layer: int, tau: float) -> tuple[Tensor, list[Tensor]]:
    """The whole loss, and every term without its share, with all logits."""
    logq_TW = F.log_softmax(case.hidden_TD @ case.head_WD.T, -1)
    loss, terms = torch.zeros((), dtype=torch.float64), []
    for place, token in enumerate(INDEX_P):
        p_V = np.exp(case.teacher_LPV[layer, place])
        both = [v for v in np.argsort(-p_V, kind="stable")[:K] if case.map_V[v] >= 0]
        p = torch.tensor([*p_V[both], 1 - p_V[both].sum()])
        q = logq_TW[token, case.map_V[both]].exp()
        terms.append(kl_divergence(Categorical(p), Categorical(torch.cat([q, 1 - q.sum()[None]]))))
        loss = loss + case.share_T[token] * terms[-1]
    for number, chunk in enumerate(CHUNKS):
        tokens = [token for token in chunk if token >= 0]
        logq = sum(logq_TW[token, case.gold_T[token]] for token in tokens)
        p = torch.tensor(case.chunks.logprobs_LC[layer, number] / tau).exp()
        assert isinstance(logq, Tensor)
        terms.append(tau * kl_divergence(Bernoulli(p), Bernoulli((logq / tau).exp())))
        loss = loss + case.share_T[tokens[0]] * terms[-1]
    return loss, terms


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_value_and_gradient_are_those_of_the_literal_dense_loss(case: Case, tau: float) -> None:
    found = aligned_kl(case.hidden_TD, case.head_WD, case.chunk_rows(tau), share_T=case.share_T)
    for layer in range(L):
        wanted, terms = literal(case, layer, tau)
        loss = found.choose(layer)
        torch.testing.assert_close(loss.value, wanted)
        torch.testing.assert_close(loss.tokens_T.sum(), torch.stack(terms).sum())
        (own,) = torch.autograd.grad(loss.value, case.hidden_TD, retain_graph=True)
        torch.testing.assert_close(own, torch.autograd.grad(wanted, case.hidden_TD)[0])
        torch.testing.assert_close(found.choose(torch.tensor(layer)).value, loss.value)
    # Where words are lost, layers are matched by what is trained.
    lost = replace(case.chunks, lost_P=np.ones(len(INDEX_P), bool))
    rows = ChunkRows.of(case.rows, lost, case.gold_T, tau=tau)
    matching_M = aligned_kl(case.hidden_TD, case.head_WD, rows, range(1, L)).matching_M
    terms_M = [torch.stack(literal(case, layer, tau)[1]).sum() / T for layer in range(1, L)]
    torch.testing.assert_close(matching_M, torch.stack(terms_M).detach())


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skewed_kl"])
def test_gradients_are_right_to_the_last_digit(case: Case, name: str) -> None:
    rows = case.chunk_rows(3.0)

    def loss(hidden_TD: Tensor) -> Tensor:
        divergence = Divergence(name)  # type: ignore[arg-type]
        return aligned_kl(hidden_TD, case.head_WD, rows, divergence=divergence, share_T=case.share_T).choose(1).value

    assert torch.autograd.gradcheck(loss, case.hidden_TD)


def test_equal_tokenizers_give_the_token_loss_bit_for_bit() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(L, T, W)).astype(np.float32)
    plain = rows_of(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    mapped, lost_T = mapped_rows(plain, np.arange(W), W)
    assert not lost_T.any()
    for name in ("ids_LTK", "logprobs_LTK", "tail_ids_LTm", "tail_mass_LT", "entropy_LT"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(plain, name))
    none = np.zeros((0, 1), np.int64), np.zeros((L, 0))
    rows = ChunkRows.of(mapped, Chunks(np.arange(T), lost_T, *none), torch.randint(W, (T,)), tau=100.0)
    hidden_TD, head_WD = torch.randn(T, D, requires_grad=True), torch.randn(W, D)
    found = aligned_kl(hidden_TD, head_WD, rows)
    wanted = candidate_kl(hidden_TD, head_WD, LayerRows.of(plain, vocab_size=W))
    assert torch.equal(found.matching_M, wanted.matching_M)
    for layer in range(L):
        own, theirs = found.choose(layer), wanted.choose(layer)
        assert torch.equal(own.value, theirs.value)
        assert torch.equal(own.tokens_T, theirs.tokens_T)
        gradients = [torch.autograd.grad(one.value, hidden_TD, retain_graph=True)[0] for one in (own, theirs)]
        assert torch.equal(*gradients)


def test_a_chunk_s_term_is_that_of_tokenkit_less_the_teacher_s_entropy(case: Case) -> None:
    """Its binary cross-entropy (`compute_alm_loss`, without the epsilon that keeps its logs finite)."""
    a_C, b_C = torch.tensor([0.5, 2.0, 30.0]).double(), torch.tensor([4.0, 1.0, 31.0]).double()
    found = aligned_kl(case.hidden_TD, case.head_WD, case.chunk_rows(100.0))
    log_true, log_pred = -a_C / 100, -b_C / 100
    ce_C = -(log_true.exp() * log_pred + -torch.expm1(log_true) * torch.log1p(-log_pred.exp()))
    own_C = -(log_true.exp() * log_true + -torch.expm1(log_true) * torch.log1p(-log_true.exp()))
    terms_C = found._chunk_terms(Divergence(), -a_C, -b_C)
    torch.testing.assert_close(terms_C, 100 * (ce_C - own_C))
    found = aligned_kl(case.hidden_TD, case.head_WD, case.chunk_rows(1e5))
    torch.testing.assert_close(
        found._chunk_terms(Divergence(), -a_C, -b_C), b_C - a_C + a_C * (a_C / b_C).log(), rtol=1e-3, atol=1e-3
    )


def test_nothing_in_common_leaves_the_chunks_and_no_chunk_the_rows(case: Case) -> None:
    rows, lost_P = mapped_rows(rows_of(case.teacher_LPV), np.full(V, -1), W)
    assert lost_P.all()
    np.testing.assert_allclose(rows.tail_mass_LT, 1, rtol=1e-6)
    foreign = replace(case, rows=rows, chunks=replace(case.chunks, lost_P=lost_P))
    found = aligned_kl(case.hidden_TD, case.head_WD, foreign.chunk_rows(), share_T=case.share_T).choose(0)
    no_rows = rows.select_tokens(np.zeros(0, np.int64))
    empty = Chunks(np.zeros(0, np.int64), np.zeros(0, bool), case.chunks.tokens_CW, case.chunks.logprobs_LC)
    alone = ChunkRows.of(no_rows, empty, case.gold_T, tau=100.0)
    wanted = aligned_kl(case.hidden_TD, case.head_WD, alone, share_T=case.share_T).choose(0)
    torch.testing.assert_close(found.value, wanted.value)
    (gradient_TD,) = torch.autograd.grad(found.value, case.hidden_TD)
    torch.testing.assert_close(gradient_TD, torch.autograd.grad(wanted.value, case.hidden_TD)[0])
    none = Chunks(np.array(INDEX_P), lost_P, np.zeros((0, 1), np.int64), np.zeros((L, 0)))
    only = ChunkRows.of(case.rows, none, case.gold_T, tau=100.0)
    tokens_T = aligned_kl(case.hidden_TD, case.head_WD, only).choose(0).tokens_T
    assert tokens_T[[2, 3, 5, 6, 8]].count_nonzero() == 0
    with pytest.raises(DataError, match=r"9 student hidden states, but 4 aligned tokens"):
        aligned_kl(case.hidden_TD, case.head_WD, replace(only, num_tokens=4))


def test_samples_are_joined_with_their_tokens_one_after_another() -> None:
    none = np.zeros(1, bool)
    one = Chunks(np.array([1]), none, np.array([[0, 1]]), np.array([[-1.0]]))
    other = Chunks(np.array([0]), ~none, np.array([[0, 1, 2], [3, -1, -1]]), np.array([[-2.0, -3.0]]))
    joined = Chunks.concat([one, other], [4, 5])
    assert joined.index_P.tolist() == [1, 4]
    assert joined.lost_P.tolist() == [False, True]
    assert joined.tokens_CW.tolist() == [[0, 1, -1], [4, 5, 6], [7, -1, -1]]
    assert joined.logprobs_LC.tolist() == [[-1.0, -2.0, -3.0]]
