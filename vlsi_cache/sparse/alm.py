"""The layer-wise loss between two tokenizers: chunks of equal bytes, beside the sparse KL over words that both have.

Where both tokenizers begin a token at one byte, what the teacher says of the next token is a row over its own words.
`mapped_rows` says it in the student's: kept words that the student does not have go into the bucket with the tail.

Where a chunk is not one token on both sides, its tokens' log-probs (natural, of the observed tokens) are added up,
    a = -sum log p(teacher's tokens),    b = -sum log q(student's tokens),
and the two outcomes "this chunk" and "anything else" are compared at a temperature tau,
    tau * D((e^(-a/tau), 1 - e^(-a/tau)) || (e^(-b/tau), 1 - e^(-b/tau)))    in nats,
D being the divergence that is trained. With forward_kl this is approximate likelihood matching (ALM, arXiv 2503.20083;
tokenkit's `compute_alm_loss` less the teacher's entropy, which has no gradient). At tau = 1 a chunk that the teacher
finds unlikely hardly counts; for a large tau it becomes b - a + a log(a / b), whose slope in b is 1 - a / b.

A token's share of the loss is that of its batch, a chunk has the share of its first token. With equal tokenizers every
chunk is one token with a row, and what is left is `sparse_kl` bit for bit.

Shapes: T tokens of the student, P of them with a row, A of them in chunks, C chunks, W tokens of the longest chunk,
L teacher layers, M candidates of them, K kept entries, V vocabulary of the teacher, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlsi_cache.errors import DataError

from .divergences import Bucketed, Divergence
from .head import Head, operand, shares, token_sum
from .kl import FORWARD_KL, CandidateKL, LayerRows, Loss, candidate_kl
from .rows import SparseRows
from .vocab_pass import OneId, VocabPass, default_block, to_device_async

__all__ = ["AlignedKL", "ChunkRows", "Chunks", "aligned_kl", "mapped_rows"]

LEAST = -1e4  # nats: a log-prob of minus infinity stands for this one


def mapped_rows(rows: SparseRows, map_V: np.ndarray, vocab_size: int) -> tuple[SparseRows, np.ndarray]:
    """The rows in another vocabulary of `vocab_size` words, by `map_V` (-1: it has no such word).

    The mass of entries that are not there joins the tail. Second, bool [T]: tokens of which some layer has lost an
    entry or a tail sample, so that their forward KL can no longer be estimated without bias. Rows that lose nothing
    keep all their bits.
    """
    is_entry_LTK = rows.logprobs_LTK != -np.inf
    ids_LTK, tails_LTm = (np.take(map_V, ids, mode="clip") for ids in (rows.ids_LTK, rows.tail_ids_LTm))
    lost_LTK = is_entry_LTK & (ids_LTK < 0)
    lost_T = lost_LTK.any((0, 2)) | (tails_LTm < 0).any((0, 2))
    found = replace(
        rows,
        ids_LTK=np.maximum(ids_LTK, 0) * is_entry_LTK,
        tail_ids_LTm=np.maximum(tails_LTm, 0),
        vocab_size=vocab_size,
    )
    if not lost_LTK.any():
        return found, lost_T
    mass_LT = np.where(lost_LTK, np.exp(rows.logprobs_LTK.astype(np.float64)), 0.0).sum(-1)
    order_LTK = np.argsort(lost_LTK | ~is_entry_LTK, axis=-1, kind="stable")  # what is left stays in its order
    logprobs_LTK = np.where(lost_LTK, -np.inf, rows.logprobs_LTK).astype(rows.logprobs_LTK.dtype)
    found = replace(
        found,
        ids_LTK=np.take_along_axis(np.where(lost_LTK, 0, found.ids_LTK), order_LTK, -1),
        logprobs_LTK=np.take_along_axis(logprobs_LTK, order_LTK, -1),
        tail_mass_LT=np.minimum(rows.tail_mass_LT + mass_LT, 1.0).astype(np.float32),
    )
    return found, lost_T


@dataclass(frozen=True)
class Chunks:
    """What the tokens of a student are compared with, on the host: `index_P` have a row, of which `lost_P` has lost
    something; `tokens_CW` are the tokens of every chunk, -1 behind its last, and `logprobs_LC` what the teacher gives
    it."""

    index_P: np.ndarray
    lost_P: np.ndarray
    tokens_CW: np.ndarray
    logprobs_LC: np.ndarray

    @staticmethod
    def concat(pieces: Sequence["Chunks"], num_tokens: Sequence[int]) -> "Chunks":
        """Those of several samples with so many tokens, one after another."""
        starts, widest = np.cumsum([0, *num_tokens[:-1]]), max(one.tokens_CW.shape[1] for one in pieces)
        tokens = []
        for start, one in zip(starts.tolist(), pieces, strict=True):
            moved_CW = np.where(one.tokens_CW >= 0, one.tokens_CW + start, -1)
            more = widest - moved_CW.shape[1]
            tokens.append(np.pad(moved_CW, [(0, 0), (0, more)], constant_values=-1))
        return Chunks(
            np.concatenate([start + one.index_P for start, one in zip(starts, pieces, strict=True)]),
            np.concatenate([one.lost_P for one in pieces]),
            np.concatenate(tokens),
            np.concatenate([one.logprobs_LC for one in pieces], axis=1),
        )


@dataclass(frozen=True)
class ChunkRows:
    """What L teacher layers say, on the student's device: the rows of P tokens (None: of no token), and C chunks.

    `index_P` is None where all tokens have a row. `places_CW` are the places in A of the tokens of a chunk, 0 where
    `is_token_CW` is not. `tau` is the temperature at which chunks are compared.
    """

    rows: LayerRows | None
    index_P: Tensor | None
    logprobs_LC: Tensor
    index_A: Tensor
    gold_A: Tensor
    places_CW: Tensor
    is_token_CW: Tensor
    first_C: Tensor
    num_tokens: int
    tau: float

    @classmethod
    def of(
        cls, rows: SparseRows, chunks: Chunks, gold_T: Tensor, *, tau: float, device: torch.device | str = "cpu"
    ) -> "ChunkRows":
        """`rows` are those of the P tokens in the student's vocabulary, `gold_T` its own tokens on the device."""
        device, num_tokens = torch.device(device), len(gold_T)

        def there(array: np.ndarray) -> Tensor:
            return to_device_async(torch.from_numpy(np.ascontiguousarray(array)), device)

        of_rows = None
        if rows.num_tokens:
            of_rows = LayerRows.of(rows, device=device)
            if chunks.lost_P.any():
                of_rows = replace(of_rows, ghost_T=there(chunks.lost_P))
        is_token_CW = chunks.tokens_CW >= 0
        places_CW = np.zeros(chunks.tokens_CW.shape, np.int64)
        places_CW[is_token_CW] = np.arange(is_token_CW.sum())
        index_A = there(chunks.tokens_CW[is_token_CW])
        whole = len(chunks.index_P) == num_tokens
        return cls(
            rows=of_rows,
            index_P=None if whole else there(chunks.index_P),
            logprobs_LC=there(np.clip(chunks.logprobs_LC, LEAST, 0.0)),
            index_A=index_A,
            gold_A=gold_T[index_A],
            places_CW=there(places_CW),
            is_token_CW=there(is_token_CW),
            first_C=there(chunks.tokens_CW[:, 0]),
            num_tokens=num_tokens,
            tau=tau,
        )

    @property
    def num_layers(self) -> int:
        return self.logprobs_LC.shape[0]

    @property
    def num_chunks(self) -> int:
        return self.logprobs_LC.shape[1]


def aligned_kl(
    hidden_TD: Tensor,
    head: Head | Tensor,
    rows: ChunkRows,
    window: range | None = None,
    *,
    divergence: Divergence = FORWARD_KL,
    share_T: Tensor | None = None,
) -> "AlignedKL":
    """`candidate_kl` with a teacher of another tokenizer: one student layer against the teacher layers `window`.

    One pass over the vocabulary for the tokens with a row, and one for those in chunks; no logits [T, V] are kept.
    """
    if hidden_TD.shape[0] != rows.num_tokens:
        raise DataError(f"{hidden_TD.shape[0]} student hidden states, but {rows.num_tokens} aligned tokens")
    window = range(rows.num_layers) if window is None else window
    share_T, of_rows = shares(share_T, hidden_TD), None
    if rows.rows is not None:
        own_PD, share_P = (x if rows.index_P is None else x[rows.index_P] for x in (hidden_TD, share_T))
        of_rows = candidate_kl(own_PD, head, rows.rows, window, divergence=divergence, share_T=share_P)
    of_chunks = None
    if rows.num_chunks:
        own_AD = operand(hidden_TD[rows.index_A])
        picker = OneId(rows.gold_A, default_block(own_AD.device))
        of_chunks = VocabPass(own_AD, Head.of(head), picker)
    return AlignedKL(rows, window, of_rows, of_chunks, divergence, share_T)


class AlignedKL:
    """The state of one student layer against M candidate teacher layers of another tokenizer; as `CandidateKL`."""

    def __init__(
        self,
        rows: ChunkRows,
        window: range,
        of_rows: CandidateKL | None,
        of_chunks: VocabPass | None,
        divergence: Divergence,
        share_T: Tensor,
    ) -> None:
        self._rows, self._of_rows, self._of_chunks = rows, of_rows, of_chunks
        self._divergence, self._share_T = divergence, share_T
        self._logprobs_MC = rows.logprobs_LC[window.start : window.stop].to(share_T.dtype)

    @property
    def matching_M(self) -> Tensor:
        """What layers are matched by: the forward KL of rows and chunks in nats, over the number of tokens."""
        if self._of_chunks is None and self._of_rows is not None and self._rows.index_P is None:
            return self._of_rows.matching_M
        return self.sums_M() / self._rows.num_tokens

    def sums_M(self) -> Tensor:
        """The same, summed over the tokens, detached."""
        total_M = self._share_T.new_zeros(len(self._logprobs_MC))
        if self._of_rows is not None:
            total_M = total_M + self._of_rows.matching_MT.sum(1)
        if self._of_chunks is not None:
            logq_C = self._chunk_logprobs(self._of_chunks.logq[0, :, 0])
            total_M = total_M + self._chunk_terms(
                FORWARD_KL, self._logprobs_MC, logq_C.expand_as(self._logprobs_MC)
            ).sum(1)
        return total_M

    def choose(self, candidate: int | Tensor = 0, *, keep_T: Tensor | None = None) -> Loss:
        """The loss from this candidate (an int, or a 0-dim tensor on the device), and what each token adds to it, [T];
        that of a chunk stands at its first token. Tokens, and chunks that begin at tokens, that are not kept count for
        nothing."""
        if isinstance(candidate, int):
            candidate = torch.full((), candidate, dtype=torch.long, device=self._share_T.device)
        rows, found = self._rows, []
        if self._of_rows is not None:
            keep_P = keep_T if keep_T is None or rows.index_P is None else keep_T[rows.index_P]
            found.append(self._of_rows.choose(candidate, keep_T=keep_P))
        if self._of_chunks is None and rows.index_P is None and found:
            return found[0]
        tokens_T = self._share_T.new_zeros(rows.num_tokens)
        if found:
            index_P = torch.arange(rows.num_tokens, device=tokens_T.device) if rows.index_P is None else rows.index_P
            tokens_T = tokens_T.index_copy(0, index_P, found[0].tokens_T)
        if self._of_chunks is not None:
            found.append(self._choose_chunks(self._of_chunks, candidate, keep_T))
            tokens_T = tokens_T.index_add(0, rows.first_C, found[-1].tokens_T)
        return Loss(torch.stack([one.value for one in found]).sum(), tokens_T)

    def _choose_chunks(self, of_chunks: VocabPass, candidate: Tensor, keep_T: Tensor | None) -> Loss:
        """The chunks' part of the loss, and what each chunk adds."""
        share_C = (self._share_T if keep_T is None else self._share_T * keep_T)[self._rows.first_C]
        logp_C = self._logprobs_MC.index_select(0, candidate.reshape(1))[0]
        with torch.enable_grad():
            leaf_A = of_chunks.logq[0, :, 0].detach().requires_grad_()
            chunks_C = self._chunk_terms(self._divergence, logp_C, self._chunk_logprobs(leaf_A))
            (s_A,) = torch.autograd.grad(chunks_C, leaf_A, share_C)
        value, is_entry_A1 = token_sum(chunks_C.detach().clamp(min=0), share_C), torch.ones_like(s_A, dtype=torch.bool)
        ids_A1 = self._rows.gold_A[:, None]
        value = of_chunks.attach(value, ids_A1, of_chunks.logq[0], s_A[:, None], is_entry_A1[:, None])
        return Loss(value, chunks_C.detach())

    def _chunk_logprobs(self, logq_A: Tensor) -> Tensor:
        """log q of every chunk, [C]."""
        return (logq_A[self._rows.places_CW] * self._rows.is_token_CW).sum(1)

    def _chunk_terms(self, divergence: Divergence, logp_xC: Tensor, logq_xC: Tensor) -> Tensor:
        """tau * D of the two outcomes of every chunk."""
        logp_xC, logq_xC = logp_xC / self._rows.tau, logq_xC.clamp(min=LEAST) / self._rows.tau
        return divergence(Bucketed.of(logp_xC[..., None], -torch.expm1(logp_xC), logq_xC[..., None])) * self._rows.tau
