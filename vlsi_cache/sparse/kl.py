"""The layer-wise loss on sparse rows: one pass over the vocabulary serves every candidate teacher layer.

The trained value is a divergence on the bucketed support (k kept ids and one bucket for the tail); the default is the
ghost-bucket forward KL, 0 <= ghost <= dense KL. The value for matching is the unbiased estimate of the forward KL,
-H - sum p log q - tail/m * sum log q(tail samples), whatever is trained.

The price of one pass: where the student's tail mass is far below the teacher's, c * G and the kept rows nearly cancel,
and the gradient of that token has a relative error of a few fp32 units divided by the student's tail mass (7e-4 at
2e-4).

Shapes: T response tokens, L teacher layers, M candidates of them, K kept entries, m tail samples, X = K + m,
V vocabulary, D hidden size, n temperatures (taus).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from vlsi_cache.errors import DataError

from .divergences import Bucketed, Divergence
from .head import Head, normalized, operand, shares, token_sum
from .vocab_pass import BlockIndex, VocabPass, default_block, to_device_async

__all__ = ["CandidateKL", "LayerRows", "Loss", "candidate_kl", "sparse_kl"]

FORWARD_KL = Divergence()


def sparse_kl(
    hidden_TD: Tensor,
    head: Tensor | Head,
    row: Any,
    *,
    layer: int = -1,
    divergence: Divergence = FORWARD_KL,
    tau: float = 1.0,
    weights_T: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Divergence of a student from one cached teacher layer, in nats, for any trainer: a scalar, mean over the tokens.

    `hidden_TD` is what enters the student's head at the response tokens and gets the gradient; so does the head if it
    requires one (its logits are then made a second time in the backward pass). Backward takes one scalar. `head` is its
    weight [V, D], or a `vlsi_cache.Head` for a model that scales or caps its logits (Cohere, Granite, Gemma 2) or whose
    head has a bias (Phi, GPT-J).

    `row` is a row of a cache, which knows its vocabulary and its temperatures; rows behind that vocabulary in the head
    are padding and take no part. Any other object with the attributes of `SparseRows` (numpy or torch) will do; one
    without `vocab_size` needs the argument. `layer` indexes its layers, `weights_T` weighs tokens. `tau` softens both
    sides and must be one of the row's `taus`; value and gradient are those of tau^2 times the divergence. Rows of draws
    (`rows.kind: sampled`) estimate forward_kl alone. Raises DataError, ModelError, SpecError.

    >>> import torch
    >>> from vlsi_cache.sparse.topk import sample_uniforms, stack_layers, teacher_rows
    >>> head_VD, gold_T = torch.eye(8), torch.tensor([1, 2])
    >>> uniforms_LTm = sample_uniforms(0, "sample-id", 2, 1, 4)
    >>> teacher = teacher_rows(3 * head_VD[gold_T], head_VD, gold_T, top_k=4, uniforms_Tm=uniforms_LTm[0], vocab_size=8)
    >>> row = stack_layers([teacher])
    >>> hidden_TD = torch.zeros(2, 8, requires_grad=True)
    >>> loss = sparse_kl(hidden_TD, head_VD, row, vocab_size=8)
    >>> loss.backward()
    >>> round(loss.item(), 3), hidden_TD.grad.argmin(1).tolist()
    (1.005, [1, 2])
    """
    num_layers = len(row.ids_LTK)
    if not -num_layers <= layer < num_layers:
        raise DataError(f"`layer` is {layer}, and the rows have {num_layers} layers")
    # No divergence on the bucketed support needs the tail samples.
    only = slice(layer % num_layers, layer % num_layers + 1)
    rows = LayerRows.of(
        row, layers=only, vocab_size=vocab_size, tau=tau, with_tail_samples=False, device=hidden_TD.device
    )
    share_T = None if weights_T is None else normalized(weights_T, hidden_TD)
    return candidate_kl(hidden_TD, head, rows, divergence=divergence, share_T=share_T).loss(0)


@dataclass(frozen=True)
class LayerRows:
    """The sparse rows of L teacher layers for T response tokens, made ready once for any number of passes.

    Log-probs and tail mass are those at `tau`; entropy and tail samples are the teacher's at tau = 1. Tokens of
    `ghost_T` are matched by the ghost value: their entropy or their tail samples are not those of the rows.
    """

    ids_LTX: Tensor  # int32: kept ids, then tail samples
    logprobs_LTK: Tensor
    tail_mass_LT: Tensor
    entropy_LT: Tensor
    index: BlockIndex
    vocab_size: int
    tau: float
    ghost_T: Tensor | None = None

    @classmethod
    def of(
        cls,
        rows: Any,
        *,
        layers: slice = slice(None),
        vocab_size: int | None = None,
        tau: float = 1.0,
        with_tail_samples: bool = True,
        device: torch.device | str = "cpu",
        block: int | None = None,
    ) -> "LayerRows":
        """`SparseRows`, or any object with their attributes (numpy or torch), on the student's device.

        `vocab_size` is needed where the rows do not carry it. Raises DataError for shapes that do not fit together, ids
        outside the vocabulary, and a `tau` that is none of the rows' `taus`.
        """
        device, vocab_size = torch.device(device), _vocab_size(rows, vocab_size)
        ids_LTK, tails_LTm = _tensor(rows.ids_LTK[layers]).int(), _tensor(rows.tail_ids_LTm[layers]).int()
        tails_LTm = tails_LTm if with_tail_samples else tails_LTm[..., :0]
        logprobs_LTK, mass_LT, entropy_LT = (
            to_device_async(_tensor(array[layers]), device)
            for array in (rows.logprobs_LTK, rows.tail_mass_LT, rows.entropy_LT)
        )
        _check_shapes(ids_LTK, logprobs_LTK, tails_LTm, mass_LT, entropy_LT)
        if tau != 1.0:
            lse_LTn, taus = rows.lse_LTn[layers], getattr(rows, "taus", None) or (1.0,)
            logprobs_LTK, mass_LT = _tempered(logprobs_LTK, mass_LT, lse_LTn, tau, taus, vocab_size)
        ids_LTX = torch.cat([ids_LTK, tails_LTm], -1)
        on_device_LTX = to_device_async(ids_LTX, device)
        index = BlockIndex.of(ids_LTX, on_device_LTX, vocab_size=vocab_size, block=block or default_block(device))
        return cls(on_device_LTX, logprobs_LTK, mass_LT, entropy_LT, index, vocab_size, tau)

    @property
    def num_layers(self) -> int:
        return self.ids_LTX.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.ids_LTX.shape[1]


class Loss(NamedTuple):
    """A loss, differentiable, and the divergence of every token: [T], detached, whole and not clamped at 0."""

    value: Tensor
    tokens_T: Tensor


def candidate_kl(
    hidden_TD: Tensor,
    head: Head | Tensor,
    rows: LayerRows,
    window: range | None = None,
    *,
    divergence: Divergence = FORWARD_KL,
    share_T: Tensor | None = None,
) -> "CandidateKL":
    """Compare one student layer with the teacher layers `window` of `rows` (all by default) in one pass.

    A loss is the sum over the tokens, each by its `share_T`; without, their mean. Logits and sums are fp32 for bf16
    inputs (float64 for float64 ones). Peak memory is about T * block * 6 + 4 * T * D + T * M * (K + m) * 16 bytes.
    Nothing is read back from the device. With a head that requires a gradient, one loss can be taken and its logits are
    made again in the backward pass. Raises DataError or ModelError.
    """
    head, hidden_TD = Head.of(head).real(rows.vocab_size), operand(hidden_TD)
    head.check(hidden_TD)
    if rows.num_tokens != hidden_TD.shape[0]:
        raise DataError(f"{hidden_TD.shape[0]} student hidden states, but rows of {rows.num_tokens} response tokens")
    window = range(rows.num_layers) if window is None else window
    vocab_pass = VocabPass(hidden_TD, head, rows.index.window(window), tau=rows.tau)
    return CandidateKL(vocab_pass, rows, window, shares(share_T, hidden_TD), divergence)


class CandidateKL:
    """The state of one student layer against M candidate teacher layers.

    `matching_MT`: the unbiased forward KL of every token for layer matching, teacher entropy included, detached; where
    there is a tail but no sample of it, or tau is not 1, the ghost value.
    """

    def __init__(
        self, vocab_pass: VocabPass, rows: LayerRows, window: range, share_T: Tensor, divergence: Divergence
    ) -> None:
        chosen, num_kept, dtype = slice(window.start, window.stop), rows.logprobs_LTK.shape[2], share_T.dtype
        self._vocab_pass, self._share_T, self._divergence, self._tau = vocab_pass, share_T, divergence, rows.tau
        self._ids_MTK, self._logq_MTK = rows.ids_LTX[chosen, :, :num_kept], vocab_pass.logq[..., :num_kept]
        self._logprobs_MTK = rows.logprobs_LTK[chosen].to(dtype)
        self._tail_mass_MT = rows.tail_mass_LT[chosen].to(dtype)
        self.matching_MT = self._matching(rows.entropy_LT[chosen].to(dtype), vocab_pass.logq[..., num_kept:])
        if rows.ghost_T is not None:
            self.matching_MT = torch.where(rows.ghost_T, self.ghost_MT, self.matching_MT)

    @property
    def matching_M(self) -> Tensor:
        """`matching_MT` averaged over the tokens, whatever their shares."""
        return self.matching_MT.mean(1)

    @property
    def ghost_MT(self) -> Tensor:
        """Ghost-bucket forward KL of every candidate and token, detached."""
        rows = Bucketed.of(self._logprobs_MTK, self._tail_mass_MT, self._logq_MTK)
        return FORWARD_KL(rows).clamp_(min=0)

    def _matching(self, entropy_MT: Tensor, logq_MTm: Tensor) -> Tensor:
        if self._tau != 1.0:
            return self.ghost_MT
        unbiased_MT = -entropy_MT - self._logprobs_MTK.exp().mul_(self._logq_MTK).sum(-1)
        if logq_MTm.shape[-1]:
            return unbiased_MT - self._tail_mass_MT * logq_MTm.mean(-1)
        # Without a tail (sampled rows, or every token kept) the kept entries are all there is to estimate from. Of rows
        # that another tool has made the entropy may not be known.
        return torch.where((self._tail_mass_MT > 0) | entropy_MT.isnan(), self.ghost_MT, unbiased_MT)

    def loss(self, candidate: int | Tensor = 0) -> Tensor:
        """The divergence from this candidate, differentiable: a scalar, the sum over the tokens by their shares.

        An int, or a tensor on the device: 0-dim, or [T] to choose for every token. Carries tau^2.
        """
        return self.choose(candidate).value

    def gold_logprobs(self, gold_T: Tensor) -> Tensor:
        """The student's own log-prob (at tau) of an id per token, [T], detached."""
        return self._vocab_pass.logprobs_of(gold_T)

    def choose(self, candidate: int | Tensor = 0, *, keep_T: Tensor | None = None) -> Loss:
        """`loss`, together with the values of the tokens; tokens that are not kept count for nothing."""
        if isinstance(candidate, int):  # made on the device: a copy to it would wait
            candidate = torch.full((), candidate, dtype=torch.long, device=self._share_T.device)
        index_T = candidate.expand(len(self._share_T))
        ids_TK, logp_TK, logq_TK, tail_T = (
            _at(x, index_T) for x in (self._ids_MTK, self._logprobs_MTK, self._logq_MTK, self._tail_mass_MT)
        )
        share_T = self._share_T if keep_T is None else self._share_T * keep_T
        tokens_T, s_TK = self._value_and_slopes(logp_TK, tail_T, logq_TK, share_T)
        value = token_sum(tokens_T.clamp(min=0), share_T)
        return Loss(self._vocab_pass.attach(value, ids_TK.long(), logq_TK, s_TK, logp_TK != -math.inf), tokens_T)

    def _value_and_slopes(
        self, logp_TK: Tensor, tail_T: Tensor, logq_TK: Tensor, share_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """tau^2 * divergence of every token, and d(loss) / d log q."""
        with torch.enable_grad():
            leaf_TK = logq_TK.detach().requires_grad_()
            tokens_T = self._divergence(Bucketed.of(logp_TK, tail_T, leaf_TK)) * self._tau**2
            (s_TK,) = torch.autograd.grad(tokens_T, leaf_TK, share_T)
        return tokens_T.detach(), s_TK


def _vocab_size(rows: Any, said: int | None) -> int:
    """The vocabulary of the rows, which what the caller says must not contradict."""
    carried = getattr(rows, "vocab_size", None)
    if said is not None and carried is not None and said != carried:
        raise DataError(f"`vocab_size` is {said}, and these rows carry {carried}; leave `vocab_size` out")
    if said is None and carried is None:
        raise DataError(
            "these rows do not carry the size of their vocabulary, and the rows of a head may have padding among them: "
            "say `vocab_size` (`cache.header.vocab_size`)"
        )
    return cast(int, said or carried)


def _at(x_MTx: Tensor, index_T: Tensor) -> Tensor:
    """x[index_T[t], t] for every token."""
    index_1Tx = index_T.view(1, -1, *[1] * (x_MTx.ndim - 2)).expand(1, *x_MTx.shape[1:])
    return x_MTx.gather(0, index_1Tx)[0]


def _tensor(array: Tensor | np.ndarray) -> Tensor:
    """fp32 or fp64 of floats, int32 of whole numbers; a mapped array, which cannot be written to, is copied."""
    if isinstance(array, np.ndarray):
        dtype = np.int32 if array.dtype.kind in "iu" else np.promote_types(array.dtype, np.float32)
        return torch.from_numpy(np.require(array, dtype, "W"))
    return array.to(torch.promote_types(array.dtype, torch.float32)) if array.is_floating_point() else array


def _tempered(
    logprobs_LTK: Tensor,
    tail_mass_LT: Tensor,
    lse_LTn: Tensor | np.ndarray,
    tau: float,
    taus: Sequence[float],
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Log-probs and tail mass at another temperature of the grid, from the log-sum-exp that is stored for it."""
    if tau not in taus or 1.0 not in taus:
        raise DataError(
            f"`tau` is {tau}, and the rows hold {list(taus)} only: the tail at another temperature cannot be known "
            f"from the top-k; build a cache with `rows.taus` [1.0, {tau}]"
        )
    if lse_LTn.shape[-1] != len(taus):
        raise DataError(
            f"`lse_LTn` has shape {list(lse_LTn.shape)}, and there are {len(taus)} temperatures {list(taus)}"
        )
    lse = to_device_async(_tensor(lse_LTn), logprobs_LTK.device).double()
    shift_LT = lse[..., list(taus).index(1.0)] / tau - lse[..., list(taus).index(tau)]
    tempered_LTK = (logprobs_LTK.double() / tau + shift_LT[..., None]).clamp(max=0)
    tail_LT = _tempered_tail(logprobs_LTK.double(), tail_mass_LT.double(), tempered_LTK, shift_LT, tau, vocab_size)
    return tempered_LTK.to(logprobs_LTK.dtype), tail_LT.to(logprobs_LTK.dtype)


def _tempered_tail(
    logprobs_LTK: Tensor, tail_mass_LT: Tensor, tempered_LTK: Tensor, shift_LT: Tensor, tau: float, vocab_size: int
) -> Tensor:
    """What the kept log-probs leave of 1; but they are rounded, so it stays within what the stored tail mass allows.

    A tail of this mass at tau = 1, with no id likelier than the last kept one, has its extremes where it lies on as few
    ids as it can, and where it lies evenly on all of them.
    """
    is_entry_LTK = logprobs_LTK != -math.inf
    last_LT = logprobs_LTK.masked_fill(~is_entry_LTK, 0.0).amin(-1)
    log_others_LT = (vocab_size - is_entry_LTK.sum(-1)).clamp(min=1).double().log()
    log_tail_LT = tail_mass_LT.log()
    each_LT = torch.minimum(torch.maximum(last_LT, log_tail_LT - log_others_LT), log_tail_LT)
    few_LT = torch.where(log_tail_LT > -math.inf, log_tail_LT + (1 / tau - 1) * each_LT + shift_LT, -math.inf)
    all_LT = log_others_LT + (log_tail_LT - log_others_LT) / tau + shift_LT
    low_LT, high_LT = torch.minimum(few_LT, all_LT).exp(), torch.maximum(few_LT, all_LT).exp()
    return torch.minimum(torch.maximum(1 - tempered_LTK.exp().sum(-1), low_LT), high_LT.clamp(max=1))


def _check_shapes(ids: Tensor, logprobs: Tensor, tails: Tensor, mass: Tensor, entropy: Tensor) -> None:
    if ids.ndim != 3 or tails.ndim != 3 or ids.shape != logprobs.shape or not ids.shape[2]:
        fits = False
    else:
        fits = all(x.shape[:2] == ids.shape[:2] for x in (tails, mass, entropy))
    if not fits:
        shapes = [list(x.shape) for x in (ids, logprobs, tails, mass, entropy)]
        raise DataError(f"the candidates' arrays do not fit together: ids, logprobs, tail, mass, entropy are {shapes}")
    if not ids.shape[1]:
        raise DataError("there are no response tokens: a mean over 0 tokens is not defined")
