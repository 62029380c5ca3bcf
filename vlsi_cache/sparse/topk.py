"""Teacher rows: one pass over the vocabulary gives top-k, log-sum-exp, entropy, gold log-prob and tail samples.

Nothing of shape [T, V] exists. Each block keeps its own k best; whatever is not among them is summed up per group of
GROUP ids, so that the complement of the top-k is a sum of positive numbers (never 1 - sum) and a tail sample needs the
logits of one group only.

Shapes: T response tokens, D hidden size, V vocabulary, B ids of a block, C blocks, G groups of a block, K kept entries,
m tail samples, n temperatures (taus), L layers, N any leading axes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from vlsi_cache.errors import ModelError, SpecError

from .head import Head, fused
from .rows import SparseRows, keyed_uniforms

__all__ = ["sample_uniforms", "stack_layers", "teacher_rows"]

GROUP = 32  # ids per group: a tail sample costs this many head rows, the sums V / GROUP floats per token
NO_LOGIT = -1e30  # behind the last id of the last block: finite, so that 0 * (it) is 0, and its exp is 0
LAST_COLUMN = 2**32 - 1


def sample_uniforms(seed: int, sample_id: str, num_tokens: int, num_layers: int, num_tail: int) -> np.ndarray:
    """Uniforms in [0, 1) for the tail samples of one sample, float64 [L, T, m].

    They depend on the arguments only, not on batch, process or world size, so a resumed or re-sharded build draws
    the same ids. A longer response keeps the draws of its first tokens.
    """
    uniforms_TLm = keyed_uniforms(f"{seed}\n{sample_id}", (num_tokens, num_layers, num_tail))
    return np.ascontiguousarray(uniforms_TLm.transpose(1, 0, 2))


def teacher_rows(
    hidden_TD: Tensor,
    head: Head | Tensor,
    gold_ids_T: Tensor,
    *,
    top_k: int,
    uniforms_Tm: np.ndarray | Tensor,
    vocab_size: int,
    taus: Sequence[float] = (1.0,),
    block: int = 16384,
) -> dict[str, Tensor]:
    """The sparse rows of one layer, over the first `vocab_size` rows of the head (or of its weight).

    `hidden_TD` is what enters the head. Logits are fp32 for any dtype and ties go to the lowest id. A tail whose mass
    underflows to 0 has nothing to draw from: its samples are the lowest id outside the top-k, of weight 0.
    Peak memory is about T * block * 8 bytes and the outputs; `block` should be many times `top_k`.

    No value is read on the host, so that a GPU is never waited for: what is wrong in the values (logits that are not
    finite, gold ids outside the vocabulary) is found by `stack_layers`.

    Returns `ids_TK` int64, `logprobs_TK`, `tail_ids_Tm` int64, `lse_Tn` (log-sum-exp of logits / tau), `entropy_T`,
    `gold_logprob_T`, `tail_mass_T`, all float32 but the ids. Raises SpecError or ModelError.
    """
    uniforms_Tm = torch.as_tensor(uniforms_Tm, dtype=torch.float64, device=hidden_TD.device)
    head = Head.of(head).real(vocab_size)
    head.check(hidden_TD)
    _check_request(gold_ids_T, top_k, uniforms_Tm, vocab_size, taus, hidden_TD.shape[0])
    if hidden_TD.dtype == torch.float64:
        hidden_TD = hidden_TD.float()
    # Autocast would turn the fp32 products into bf16 behind our back.
    with torch.no_grad(), torch.autocast(hidden_TD.device.type, enabled=False):
        width = math.ceil(max(min(block, vocab_size), top_k + 1) / GROUP) * GROUP
        scan = _scan(hidden_TD, head, gold_ids_T.to(hidden_TD.device), top_k, tuple(taus), width)
        rows, inside_TCK, scale_TC = _finish(scan, top_k)
        rows["tail_ids_Tm"] = _draw(scan, hidden_TD, head, uniforms_Tm, inside_TCK, scale_TC, rows["ids_TK"])
    return rows


def stack_layers(
    layers: Sequence[Mapping[str, Tensor]], *, place: Callable[[int, int], str] = "layer index {}, token {}".format
) -> SparseRows:
    """Join what `teacher_rows` returned for each layer into numpy rows; layers of smaller k are padded.

    Raises ModelError where a value is no number; `place` names a layer index and a token for a person.
    """
    names = [name.rsplit("_", 1) for name in layers[0]]
    arrays: list[dict[str, Any]] = [
        {f"{stem}_L{axes}": layer[f"{stem}_{axes}"][None].cpu().numpy() for stem, axes in names} for layer in layers
    ]
    widest = max(one["ids_LTK"].shape[2] for one in arrays)
    rows = [vars(SparseRows(**one).padded_to(widest)) for one in arrays]
    whole: dict[str, Any] = {name: np.concatenate([one[name] for one in rows]) for name in arrays[0]}
    joined = SparseRows(**whole)
    _refuse_bad_values(joined, place)
    return joined


def _refuse_bad_values(rows: SparseRows, place: Callable[[int, int], str]) -> None:
    bad_LT = ~(np.isfinite(rows.lse_LTn).all(2) & np.isfinite(rows.entropy_LT))
    for layer, token in np.argwhere(bad_LT)[:1].tolist():
        raise ModelError(
            f"{place(layer, token)}: the logits are not finite (log-sum-exp {rows.lse_LTn[layer, token, 0]}): "
            "check the hidden states and the head"
        )
    for layer, token in np.argwhere(np.isnan(rows.gold_logprob_LT))[:1].tolist():
        raise ModelError(f"{place(layer, token)}: the gold id is outside the real vocabulary")


@dataclass
class _Scan:
    """What the pass leaves behind; sums of a block are relative to that block's largest logit."""

    values_TCK: Tensor  # the k best logits of each block, by ascending id
    ids_TCK: Tensor
    group_sums_TCG: Tensor  # sum of exp over the ids that are not among the block's k best
    max_TC: Tensor
    sums_TCn: Tensor  # float64: sum of exp at tau = 1 and at each of the taus
    shifted_TC: Tensor  # float64: sum of (z - max) * exp(z - max)
    gold_T: Tensor  # NaN where the gold id is outside the vocabulary
    taus: tuple[float, ...]

    @property
    def width(self) -> int:
        return self.group_sums_TCG.shape[2] * GROUP


def _check_request(
    gold_T: Tensor, top_k: int, uniforms_Tm: Tensor, vocab_size: int, taus: Sequence[float], num_tokens: int
) -> None:
    if not 1 <= top_k <= vocab_size:
        raise SpecError(f"`top_k` is {top_k}, it must be from 1 to the {vocab_size} tokens of the real vocabulary")
    if uniforms_Tm.ndim != 2 or uniforms_Tm.shape[0] != num_tokens or gold_T.shape != (num_tokens,):
        raise ModelError(
            f"{num_tokens} hidden states, but gold ids of shape {list(gold_T.shape)} "
            f"and uniforms of shape {list(uniforms_Tm.shape)}"
        )
    if top_k == vocab_size and uniforms_Tm.shape[1]:
        raise SpecError(f"`top_k` {top_k} keeps the whole vocabulary: no tail is left for tail samples, ask for 0")
    if not taus or min(taus) <= 0:
        raise SpecError(f"`taus` must be positive temperatures, found {list(taus)}")


def _scan(hidden_TD: Tensor, head: Head, gold_T: Tensor, top_k: int, taus: tuple[float, ...], width: int) -> _Scan:
    num_tokens, vocab_size = hidden_TD.shape[0], head.num_rows
    num_blocks = math.ceil(vocab_size / width)
    buffer = hidden_TD.new_empty(num_tokens * width, dtype=torch.float32)
    scan = _Scan(
        values_TCK=buffer.new_empty((num_tokens, num_blocks, top_k)),
        ids_TCK=gold_T.new_empty((num_tokens, num_blocks, top_k), dtype=torch.int64),
        group_sums_TCG=buffer.new_zeros((num_tokens, num_blocks, width // GROUP)),
        max_TC=buffer.new_empty((num_tokens, num_blocks)),
        sums_TCn=buffer.new_empty((num_tokens, num_blocks, 1 + len(taus)), dtype=torch.float64),
        shifted_TC=buffer.new_empty((num_tokens, num_blocks), dtype=torch.float64),
        gold_T=buffer.new_full((num_tokens,), math.nan),
        taus=taus,
    )
    for index, start in enumerate(range(0, vocab_size, width)):
        real = min(width, vocab_size - start)
        # Contiguous also where the block is narrow: CUDA writes a mixed product into nothing else.
        z_TB = head.logits_into(buffer[: num_tokens * real].view(num_tokens, real), hidden_TD, start)
        offset_T = gold_T - start
        gold_T1 = z_TB.gather(1, offset_T.clamp(0, real - 1)[:, None])
        scan.gold_T = torch.where((offset_T >= 0) & (offset_T < real), gold_T1[:, 0], scan.gold_T)
        # A block takes at least k ids from itself, so a narrow last one is filled up to that.
        missing = max(-real % GROUP, math.ceil(top_k / GROUP) * GROUP - real)
        z_TB = pad(z_TB, (0, missing), value=NO_LOGIT) if missing else z_TB
        step = _tokens_at_a_time(z_TB)
        for t in (slice(first, first + step) for first in range(0, num_tokens, step)):
            _scan_block(scan, t, index, z_TB[t], head.compiled)
    return scan


def _scan_block(scan: _Scan, t: slice, index: int, z_tB: Tensor, compiled: bool) -> None:
    """Reduce one block of the tokens `t`; behind the vocabulary its columns are NO_LOGIT."""
    slots_tK = _top_slots(z_tB, scan.ids_TCK.shape[2])
    values_tK = z_tB.gather(1, slots_tK)
    max_t1 = values_tK.amax(1, keepdim=True)
    z_tB.scatter_(1, slots_tK, NO_LOGIT)  # the sums of a group are those of the ids that were not kept
    groups_tG, sums_tn, shifted_t = fused(_block_sums, compiled=compiled)(z_tB, max_t1, scan.taus)
    kept_tK = values_tK - max_t1
    kept_tn = torch.stack([(kept_tK / tau).exp().sum(1, dtype=torch.float64) for tau in (1.0, *scan.taus)], 1)
    scan.values_TCK[t, index], scan.ids_TCK[t, index] = values_tK, slots_tK + index * scan.width
    scan.max_TC[t, index] = max_t1[:, 0]
    scan.group_sums_TCG[t, index, : groups_tG.shape[1]] = groups_tG
    scan.sums_TCn[t, index] = sums_tn + kept_tn
    scan.shifted_TC[t, index] = shifted_t + (kept_tK * kept_tK.exp()).sum(1, dtype=torch.float64)


def _block_sums(z_TB: Tensor, max_T1: Tensor, taus: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of exp(z - max): of each group, at tau = 1 and at each of the taus (float64), and weighted by z - max."""
    shifted_TGg = (z_TB - max_T1).unflatten(1, (-1, GROUP))
    exp_TGg = shifted_TGg.exp()
    groups_TG = exp_TGg.sum(2)
    sum_T = groups_TG.sum(1, dtype=torch.float64)
    others = [sum_T if tau == 1.0 else (shifted_TGg / tau).exp().sum(2).sum(1, dtype=torch.float64) for tau in taus]
    weighted_T = (shifted_TGg * exp_TGg).sum(2).sum(1, dtype=torch.float64)
    return groups_TG, torch.stack([sum_T, *others], 1), weighted_T


def _tokens_at_a_time(z_TB: Tensor) -> int:
    """A processor wants what it sums in its cache, a GPU wants few launches."""
    budget = torch.get_num_threads() << 19 if z_TB.device.type == "cpu" else 1 << 24
    return max(1, budget // z_TB.shape[1])


def _top_slots(z_TB: Tensor, top_k: int) -> Tensor:
    """Columns of the k largest values of each row, ties by the lowest column, in ascending column order."""
    num_groups = z_TB.shape[1] // GROUP
    column_B = torch.arange(z_TB.shape[1], device=z_TB.device)
    if num_groups < 2 * top_k:
        return _largest(z_TB, column_B, top_k).sort(dim=1).values
    # Only k groups need to be looked at: those with the largest maxima, the lowest first on ties. An id of another
    # group stands behind the first maximum of each of them: it is smaller, or as large and of a higher column.
    groups_TK = _largest(z_TB.unflatten(1, (-1, GROUP)).amax(2), column_B[:num_groups], top_k)
    columns_TP = (groups_TK[..., None] * GROUP + column_B[:GROUP]).flatten(1)
    return _largest(z_TB.gather(1, columns_TP), columns_TP, top_k).sort(dim=1).values


def _largest(values_TX: Tensor, columns_TX: Tensor, top_k: int) -> Tensor:
    """The columns of the k largest fp32 values, ties by the lowest column; nothing waits for the device.

    The bits of a float, as an integer, rise with it from 0 up and fall with it below; the column, counted from the
    end, stands behind them. Adding 0.0 makes -0.0 and 0.0 one value.
    """
    bits_TX = (values_TX + 0.0).view(torch.int32)
    rising_TX = bits_TX ^ ((bits_TX >> 31) & 0x7FFFFFFF)
    keys_TX = (rising_TX.long() << 32) + (LAST_COLUMN - columns_TX)
    return LAST_COLUMN - (keys_TX.topk(top_k, dim=1, sorted=False).values & LAST_COLUMN)


def _finish(scan: _Scan, top_k: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """All rows but the tail samples; which block candidates are in the top-k; the factor to each block's sums."""
    values, order = scan.values_TCK.flatten(1).sort(dim=1, descending=True, stable=True)
    order_TK = order[:, :top_k]
    inside = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order_TK, True)
    shift_TC = scan.max_TC.double() - scan.max_TC.amax(1, keepdim=True).double()
    max_T = scan.max_TC.amax(1).double()
    scale_TC = shift_TC.exp()
    sum_T = (scan.sums_TCn[..., 0] * scale_TC).sum(1)
    mean_T = (scale_TC * (scan.shifted_TC + shift_TC * scan.sums_TCn[..., 0])).sum(1) / sum_T
    lse_T = max_T + sum_T.log()
    lse_Tn = torch.stack(
        [
            max_T / tau + (scan.sums_TCn[..., column] * (shift_TC / tau).exp()).sum(1).log()
            for column, tau in enumerate(scan.taus, start=1)
        ],
        dim=1,
    )
    inside_TCK = inside.view_as(scan.ids_TCK)
    rows = {
        "ids_TK": scan.ids_TCK.flatten(1).gather(1, order_TK),
        "logprobs_TK": (values[:, :top_k].double() - lse_T[:, None]).clamp(max=0).float(),
        "lse_Tn": lse_Tn.float(),
        "entropy_T": (sum_T.log() - mean_T).clamp(min=0).float(),
        "gold_logprob_T": (scan.gold_T.double() - lse_T).clamp(max=0).float(),
        "tail_mass_T": ((_block_tails(scan, inside_TCK) * scale_TC).sum(1) / sum_T).clamp(max=1).float(),
    }
    return rows, inside_TCK, scale_TC


def _runners_up(scan: _Scan, inside_TCK: Tensor) -> Tensor:
    """exp of the block candidates that did not make the top-k, 0 for those that did."""
    return (scan.values_TCK - scan.max_TC[..., None]).exp().masked_fill(inside_TCK, 0.0)


def _block_tails(scan: _Scan, inside_TCK: Tensor) -> Tensor:
    """Sum of exp outside the top-k for every block, float64 [T, C]."""
    runners_TC = _runners_up(scan, inside_TCK).sum(2, dtype=torch.float64)
    return scan.group_sums_TCG.sum(2, dtype=torch.float64) + runners_TC


def _draw(
    scan: _Scan,
    hidden_TD: Tensor,
    head: Head,
    uniforms_Tm: Tensor,
    inside_TCK: Tensor,
    scale_TC: Tensor,
    ids_TK: Tensor,
) -> Tensor:
    """Tail samples by inverse CDF: the block, then the group or a runner-up of that block, then the id in the group."""
    if not uniforms_Tm.numel():
        return torch.zeros(uniforms_Tm.shape, dtype=torch.int64, device=ids_TK.device)
    tails_TC = _block_tails(scan, inside_TCK) * scale_TC
    block_Tm, rest_Tm = _pick(tails_TC, uniforms_Tm)
    # Each sample is looked up in all blocks: that costs less than a copy of its block's sums for each sample.
    sums_TCX = torch.cat([scan.group_sums_TCG, _runners_up(scan, inside_TCK)], -1).double()
    slot_TCm, rest_TCm = _pick(sums_TCX, rest_Tm[:, None].expand(-1, sums_TCX.shape[1], -1))
    slot_Tm, rest_Tm = (x_TCm.gather(1, block_Tm[:, None])[:, 0] for x_TCm in (slot_TCm, rest_TCm))
    t_1 = torch.arange(len(ids_TK), device=ids_TK.device)[:, None]
    num_groups = scan.group_sums_TCG.shape[2]
    runner_Tm = scan.ids_TCK[t_1, block_Tm, (slot_Tm - num_groups).clamp(min=0)]
    group_Tm = slot_Tm.clamp(max=num_groups - 1)
    first_Tm = block_Tm * scan.width + group_Tm * GROUP
    z_Tmg = _group_logits(hidden_TD, head, first_Tm, scan.width)
    barred_Tmg = (_kept_bits(scan)[t_1, block_Tm, group_Tm][..., None] >> torch.arange(GROUP, device=t_1.device)) & 1
    in_group_Tm = first_Tm + _pick_by_logit(z_Tmg.masked_fill(barred_Tmg.bool(), -math.inf), rest_Tm)
    tail_ids_Tm = torch.where(slot_Tm < num_groups, in_group_Tm, runner_Tm)
    return torch.where(tails_TC.sum(1, keepdim=True) > 0, tail_ids_Tm, _lowest_free(ids_TK)[:, None])


def _kept_bits(scan: _Scan) -> Tensor:
    """Which ids of each group are among their block's k best, one bit each: int64 [T, C, G]."""
    slots_TCK = scan.ids_TCK % scan.width
    bits_TCG = scan.ids_TCK.new_zeros(scan.group_sums_TCG.shape)
    return bits_TCG.scatter_add_(2, slots_TCK // GROUP, torch.ones_like(slots_TCK) << slots_TCK % GROUP)


def _group_logits(hidden_TD: Tensor, head: Head, first_Tm: Tensor, width: int) -> Tensor:
    """Logits of the GROUP ids from `first` on, -inf behind the vocabulary: float32 [T, m, GROUP]."""
    ids_Tmg = first_Tm[..., None] + torch.arange(GROUP, device=first_Tm.device)
    there_Tmg = ids_Tmg.clamp(max=head.num_rows - 1)
    if _is_on_host(hidden_TD):
        products_Tmg = _products_by_group(hidden_TD.float(), head, first_Tm)
    else:
        products_Tmg = _products_of_copies(hidden_TD.float(), head, there_Tmg, width)
    return head.shape_(products_Tmg, there_Tmg).masked_fill(ids_Tmg >= head.num_rows, -math.inf)


def _is_on_host(tensor: Tensor) -> bool:
    """Whether to read a value of it waits for nothing."""
    return tensor.device.type == "cpu"


def _products_by_group(hidden_TD: Tensor, head: Head, first_Tm: Tensor) -> Tensor:
    """Products of hidden states with the GROUP rows from `first` on; 0 behind the vocabulary.

    Samples of one group are multiplied together, so that each row of the head is read once and none is copied.
    """
    first_N, order_N = first_Tm.flatten().sort(stable=True)
    firsts, counts = first_N.unique_consecutive(return_counts=True)
    hidden_ND = hidden_TD[order_N // first_Tm.shape[1]]
    sorted_Ng = hidden_TD.new_zeros((len(order_N), GROUP))
    for first, hidden_nD, products_ng in zip(
        firsts.tolist(), hidden_ND.split(counts.tolist()), sorted_Ng.split(counts.tolist()), strict=True
    ):
        rows_gD = head.weight_VD[first : min(first + GROUP, head.num_rows)].float()
        torch.mm(hidden_nD, rows_gD.T, out=products_ng[:, : len(rows_gD)])
    return torch.empty_like(sorted_Ng).index_copy_(0, order_N, sorted_Ng).view(*first_Tm.shape, GROUP)


def _products_of_copies(hidden_TD: Tensor, head: Head, ids_Tmg: Tensor, width: int) -> Tensor:
    """Products of hidden states with the rows `ids`, copied for as many tokens at a time as fill a block of logits."""
    num_tokens, num_tail, _ = ids_Tmg.shape
    products_Tmg = hidden_TD.new_empty(ids_Tmg.shape)
    step = max(1, num_tokens * width // (num_tail * GROUP * hidden_TD.shape[1]))
    for t in (slice(start, start + step) for start in range(0, num_tokens, step)):
        rows_RD = head.weight_VD.index_select(0, ids_Tmg[t].flatten()).float()
        rows_tRD = rows_RD.view(len(ids_Tmg[t]), num_tail * GROUP, -1)
        products_Tmg[t] = torch.bmm(hidden_TD[t, None], rows_tRD.transpose(1, 2)).view_as(ids_Tmg[t])
    return products_Tmg


def _pick_by_logit(z_Tmg: Tensor, uniforms_Tm: Tensor) -> Tensor:
    """A place of each group, drawn from the softmax of its logits."""
    top_Tm1 = z_Tmg.amax(-1, keepdim=True)
    # A draw that went to a runner-up looks at a group too, maybe a fully barred one: any finite number will do there.
    weights_Tmg = (z_Tmg - top_Tm1.masked_fill(top_Tm1 == -math.inf, 0.0)).exp()
    return _pick(weights_Tmg.double(), uniforms_Tm[..., None])[0][..., 0]


def _pick(weights_NX: Tensor, uniforms_Nm: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF over the last axis (float64), m times: an index of positive weight, the uniform left inside it."""
    cdf_NX = weights_NX.cumsum(-1)
    total_N1 = cdf_NX[..., -1:].contiguous()
    target_Nm = uniforms_Nm * total_N1
    # Rounding may lift the target to the total: stay at the last index that has weight, and inside where it is NaN.
    last_N1 = torch.searchsorted(cdf_NX, total_N1).clamp(max=cdf_NX.shape[-1] - 1)
    index_Nm = torch.minimum(torch.searchsorted(cdf_NX, target_Nm, right=True), last_N1)
    weight_Nm = weights_NX.gather(-1, index_Nm)
    rest_Nm = (target_Nm - cdf_NX.gather(-1, index_Nm) + weight_Nm) / weight_Nm
    return index_Nm, rest_Nm.nan_to_num(0.0).clamp(0.0, 1.0 - 2.0**-52)


def _lowest_free(ids_TK: Tensor) -> Tensor:
    """The lowest id that is not kept: among the K + 1 lowest ids at least one is free."""
    num_tokens, top_k = ids_TK.shape
    taken = torch.zeros((num_tokens, top_k + 2), dtype=torch.bool, device=ids_TK.device)
    taken.scatter_(1, ids_TK.clamp(max=top_k + 1), True)
    return (~taken[:, : top_k + 1]).int().argmax(1)
