"""What the interaction step looks like from inside: at some steps, each student layer beside its teacher layer.

No gradient, a few response tokens, and the hidden states that the step has captured anyway: the backbone does not run
again, and no random number is drawn.

Legend: T response tokens, K kept entries, m tail
samples, V vocabulary, D hidden size.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlsi_cache.models.backbone import LayerSequence
from vlsi_cache.models.verbalizer import Verbalizers
from vlsi_cache.runtime import autocast
from vlsi_cache.sparse.divergences import Bucketed
from vlsi_cache.sparse.head import Head, compute_dtype
from vlsi_cache.sparse.kl import FORWARD_KL
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.sparse.vocab_pass import full_precision

NUM_PROBES = 20  # over the stage, about: enough for a curve, few enough to cost next to nothing
MAX_TOKENS = 128
CHUNK_LOGITS = 2**22  # logits that exist at a time: 16 MiB
ARRAYS = ("ids_LTK", "logprobs_LTK", "tail_ids_LTm", "tail_mass_LT", "entropy_LT", "gold_logprob_LT")


class TeacherTokens(NamedTuple):
    """The `ARRAYS` of one teacher layer for each token."""

    ids_TK: Tensor
    logp_TK: Tensor
    tail_ids_Tm: Tensor
    tail_mass_T: Tensor
    entropy_T: Tensor
    gold_logp_T: Tensor


def is_due(step: int, num_steps: int) -> bool:
    """Whether step `step` (from 0) is probed; it depends on nothing else, so a resumed run probes the same steps."""
    return step % -(-num_steps // NUM_PROBES) == 0 or step + 1 == num_steps


@torch.no_grad()
def probe(
    hidden: Mapping[int, Tensor | LayerSequence],
    head: Head,
    verbalizers: Verbalizers | None,
    matches: Mapping[int, tuple[Tensor, Tensor | None]],
    cached: SparseRows,
    gold_T: Tensor,
    *,
    is_sampled: bool = False,
    tokens_P: np.ndarray | None = None,
) -> dict[str, dict[str, float]]:
    """Means over evenly spaced tokens of a micro-batch, by student layer; the last one against the teacher's last.

    A target layer is compared with the teacher layer that the step has matched it with (the first one where there are
    several): `matches` has that layer's place in the cache and the log-weights [M] of its draw, if there was one. A
    layer without a match is left out. All at temperature 1, over the whole real
    vocabulary: `kl`, `student_entropy`, `teacher_entropy`, `student_loss`, `teacher_loss` (of the response) in nats,
    and the shares `kept_mass` (the teacher's, on its kept words), `student_mass` (the student's, on the same words),
    `overlap` (those words among the student's own top-k) and `top1_agreement`. Rows of draws (`is_sampled`) have no
    top-k: they give no shares. `tokens_P`: of another tokenizer's rows, which tokens they are of; of their words those
    count that both have. `match_entropy` is that of the draw of the teacher layer, where one was drawn.
    """
    device, num_rows = gold_T.device, len(gold_T) if tokens_P is None else len(tokens_P)
    num = min(MAX_TOKENS, num_rows)
    rows_T = torch.arange(num, device=device) * num_rows // num
    index_T = rows_T if tokens_P is None else torch.from_numpy(tokens_P).to(device)[rows_T]
    picked = rows_T, gold_T[index_T]
    found = {}
    for layer, (target, logits_M) in matches.items():
        assert verbalizers is not None
        with autocast(device):
            state_TD = verbalizers.apply(layer, hidden[layer])
        found[str(layer)] = _measure(state_TD[index_T], head, cached, *picked, int(target), is_sampled)
        if logits_M is not None:
            found[str(layer)]["match_entropy"] = float(torch.special.entr(logits_M[:, None].softmax(0)).sum())
    last, final = max(hidden), cached.num_layers - 1
    state: Any = hidden[last]
    found[str(last)] = _measure(state[index_T], head, cached, *picked, final, is_sampled)
    return found


def _measure(
    state_TD: Tensor,
    head: Head,
    cached: SparseRows,
    rows_T: Tensor,
    gold_T: Tensor,
    target: int,
    is_sampled: bool,
) -> dict[str, float]:
    """Means over the rows `rows_T` against one teacher layer; states and gold ids are of their tokens alone."""
    device, dtype = state_TD.device, compute_dtype(state_TD)
    token_T = rows_T.cpu().numpy()
    picked = [_tensor(getattr(cached, name)[target, token_T], dtype).to(device) for name in ARRAYS]
    sums: dict[str, Tensor] = {}
    step = max(1, CHUNK_LOGITS // head.num_rows)
    for start in range(0, len(rows_T), step):
        chunk = slice(start, start + step)
        with full_precision(device):
            logits_TV = state_TD.new_empty((len(state_TD[chunk]), head.num_rows), dtype=dtype)
            head.logits_into(logits_TV, state_TD[chunk], 0)
            teacher = TeacherTokens(*(x[chunk] for x in picked))
            values = _compare(logits_TV, teacher, gold_T[chunk], is_sampled)
        sums = {name: sums.get(name, 0) + value_T.double().sum() for name, value_T in values.items()}
    return {name: float(total) / len(rows_T) for name, total in sums.items()}


def _tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Ids as torch indexes with them, numbers as they are computed with."""
    tensor = torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)
    return tensor if tensor.dtype == torch.int64 else tensor.to(dtype)


def _compare(logits_TV: Tensor, teacher: TeacherTokens, gold_T: Tensor, is_sampled: bool) -> dict[str, Tensor]:
    ids_TK, logp_TK, tail_ids_Tm, tail_mass_T, entropy_T, gold_logp_T = teacher
    logq_TV = logits_TV.log_softmax(-1)
    is_kept_TK, p_TK = logp_TK.isfinite(), logp_TK.exp()
    logq_TK = logq_TV.gather(1, ids_TK)
    # What layers are matched by at temperature 1 (`CandidateKL.matching_MT`); without tail samples the tail is one
    # bucket, whose divergence is never negative.
    kl_T = -entropy_T - (p_TK * logq_TK).sum(1)
    if tail_ids_Tm.shape[1]:
        kl_T = kl_T - tail_mass_T * logq_TV.gather(1, tail_ids_Tm).mean(1)
    else:
        ghost_T = FORWARD_KL(Bucketed.of(logp_TK, tail_mass_T, logq_TK)).clamp(min=0)
        kl_T = torch.where((tail_mass_T > 0) | entropy_T.isnan(), ghost_T, kl_T)
    values = {
        "kl": kl_T,
        "student_entropy": torch.special.entr(logq_TV.exp()).sum(1),
        "teacher_entropy": entropy_T,
        "student_loss": -logq_TV.gather(1, gold_T[:, None])[:, 0],
        "teacher_loss": -gold_logp_T,
    }
    if is_sampled:
        return values
    width_T1 = is_kept_TK.sum(1, keepdim=True).clamp(min=1)  # of another tokenizer's row nothing may be left
    least_T1 = logq_TV.topk(ids_TK.shape[1]).values.gather(1, width_T1 - 1)  # what the student's own top-k begins at
    agrees_T, mass_T = agreement(logits_TV, ids_TK, logp_TK)
    return values | {
        "kept_mass": 1 - tail_mass_T,
        "student_mass": mass_T,
        "overlap": ((logq_TK >= least_T1) & is_kept_TK).sum(1) / width_T1[:, 0],
        "top1_agreement": agrees_T.to(logq_TV.dtype),
    }


def agreement(logits_TV: Tensor, ids_TK: Tensor, logp_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token, whether its likeliest word is the teacher's, and its mass on the teacher's kept words, [T]."""
    logq_TK = logits_TV.gather(1, ids_TK) - logits_TV.logsumexp(1, keepdim=True)
    return logits_TV.argmax(1) == ids_TK[:, 0], logq_TK.exp().masked_fill(logp_TK == -torch.inf, 0.0).sum(1)
