"""Teacher rows: one walk over the vocabulary gives top-k, log-sum-exp, entropy, gold log-prob and tail samples.

Nothing of shape [T, V] exists. Each block keeps its own k best; whatever is not among them is summed up per group of
GROUP ids, so that the complement of the top-k is a sum of positive numbers (never 1 - sum) and a tail sample needs the
logits of one group only.

Shapes: T response tokens, D hidden size, V vocabulary, B ids of a block, C blocks, G groups of a block, K kept entries,
m tail samples, n temperatures (taus), L layers, N any leading axes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlsi_cache.errors import ModelError, SpecError

from .logits import Head, compute_dtype
from .rows import SparseRows
from .select import keyed_uniforms

__all__ = ["sample_uniforms", "stack_layers", "teacher_rows"]

GROUP = 32  # ids per group: a tail sample costs this many head rows, the sums V / GROUP floats per token
NO_LOGIT = -1e30  # behind the last id of the last block: finite, so that 0 * (it) is 0, and its exp is 0


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
    v_real: int,
    taus: Sequence[float] = (1.0,),
    block: int = 16384,
) -> dict[str, Tensor]:
    """The sparse rows of one layer, over the first `v_real` rows of the head (or of its weight).

    `hidden_TD` is what enters the head. Logits are fp32 for any dtype and ties go to the lowest id. A tail whose mass
    underflows to 0 has nothing to draw from: its samples are the lowest id outside the top-k, of weight 0.
    Peak memory is about T * block * 8 bytes and the outputs; `block` should be many times `top_k`.

    Returns `ids_TK` int64, `logprobs_TK`, `tail_ids_Tm` int64, `lse_Tn` (log-sum-exp of logits / tau), `entropy_T`,
    `gold_logprob_T`, `tail_mass_T`, all float32 but the ids. Raises SpecError or ModelError.
    """
    uniforms_Tm = torch.as_tensor(uniforms_Tm, dtype=torch.float64, device=hidden_TD.device)
    head = Head.of(head).real(v_real)
    head.check(hidden_TD)
    _check_request(gold_ids_T, top_k, uniforms_Tm, v_real, taus, hidden_TD.shape[0])
    # Autocast would turn the fp32 products into bf16 behind our back.
    with torch.no_grad(), torch.autocast(hidden_TD.device.type, enabled=False):
        width = math.ceil(max(min(block, v_real), top_k + 1) / GROUP) * GROUP
        scan = _scan(hidden_TD, head, gold_ids_T.to(hidden_TD.device), top_k, tuple(taus), width)
        rows, inside_TCK, scale_TC = _finish(scan, top_k)
        rows["tail_ids_Tm"] = _draw(scan, hidden_TD, head, uniforms_Tm, inside_TCK, scale_TC, rows["ids_TK"])
    return rows


def stack_layers(layers: Sequence[Mapping[str, Tensor]]) -> SparseRows:
    """Join what `teacher_rows` returned for each layer into numpy rows; layers of smaller k are padded."""
    names = [name.rsplit("_", 1) for name in layers[0]]
    arrays = [
        {f"{stem}_L{axes}": layer[f"{stem}_{axes}"][None].cpu().numpy() for stem, axes in names} for layer in layers
    ]
    widest = max(one["ids_LTK"].shape[2] for one in arrays)
    rows = [vars(SparseRows(**one).padded_to(widest)) for one in arrays]
    return SparseRows(**{name: np.concatenate([one[name] for one in rows]) for name in arrays[0]})


@dataclass
class _Scan:
    """What the walk leaves behind; sums of a block are relative to that block's largest logit."""

    values_TCK: Tensor  # the k best logits of each block, by ascending id
    ids_TCK: Tensor
    group_sums_TCG: Tensor  # sum of exp over the ids that are not among the block's k best
    max_TC: Tensor
    sums_TCn: Tensor  # float64: sum of exp at tau = 1 and at each of the taus
    shifted_TC: Tensor  # float64: sum of (z - max) * exp(z - max)
    gold_T: Tensor
    taus: tuple[float, ...]

    @property
    def width(self) -> int:
        return self.group_sums_TCG.shape[2] * GROUP


def _check_request(
    gold_T: Tensor, top_k: int, uniforms_Tm: Tensor, v_real: int, taus: Sequence[float], num_tokens: int
) -> None:
    if not 1 <= top_k <= v_real:
        raise SpecError(f"`top_k` is {top_k}, it must be from 1 to the {v_real} tokens of the real vocabulary")
    if uniforms_Tm.ndim != 2 or uniforms_Tm.shape[0] != num_tokens or gold_T.shape != (num_tokens,):
        raise ModelError(
            f"{num_tokens} hidden states, but gold ids of shape {list(gold_T.shape)} "
            f"and uniforms of shape {list(uniforms_Tm.shape)}"
        )
    if top_k == v_real and uniforms_Tm.shape[1]:
        raise SpecError(f"`top_k` {top_k} keeps the whole vocabulary: no tail is left for tail samples, ask for 0")
    if not taus or min(taus) <= 0:
        raise SpecError(f"`taus` must be positive temperatures, found {list(taus)}")
    if num_tokens and (int(gold_T.min()) < 0 or int(gold_T.max()) >= v_real):
        raise ModelError(f"gold ids go from {int(gold_T.min())} to {int(gold_T.max())}, outside 0 to {v_real - 1}")


def _scan(hidden_TD: Tensor, head: Head, gold_T: Tensor, top_k: int, taus: tuple[float, ...], width: int) -> _Scan:
    num_tokens, v_real = hidden_TD.shape[0], head.num_rows
    num_blocks = math.ceil(v_real / width)
    dtype = compute_dtype(hidden_TD)
    z_TB = hidden_TD.new_empty((num_tokens, width), dtype=dtype)
    exp_TB = torch.empty_like(z_TB)
    scan = _Scan(
        values_TCK=z_TB.new_empty((num_tokens, num_blocks, top_k)),
        ids_TCK=gold_T.new_empty((num_tokens, num_blocks, top_k), dtype=torch.int64),
        group_sums_TCG=z_TB.new_empty((num_tokens, num_blocks, width // GROUP)),
        max_TC=z_TB.new_empty((num_tokens, num_blocks)),
        sums_TCn=z_TB.new_empty((num_tokens, num_blocks, 1 + len(taus)), dtype=torch.float64),
        shifted_TC=z_TB.new_empty((num_tokens, num_blocks), dtype=torch.float64),
        gold_T=z_TB.new_zeros(num_tokens),
        taus=taus,
    )
    for index, start in enumerate(range(0, v_real, width)):
        stop = min(start + width, v_real)
        z_TB[:, stop - start :] = NO_LOGIT
        head.logits_into(z_TB[:, : stop - start], hidden_TD, start)
        offset_T = gold_T - start
        gold_T1 = z_TB.gather(1, offset_T.clamp(0, width - 1)[:, None])
        scan.gold_T = torch.where((offset_T >= 0) & (offset_T < width), gold_T1[:, 0], scan.gold_T)
        exp_TB[:, stop - start :] = 0.0
        _scan_block(scan, index, z_TB, exp_TB, stop - start)
    return scan


def _scan_block(scan: _Scan, index: int, z_TB: Tensor, exp_TB: Tensor, real: int) -> None:
    """Reduce one block, of which the first `real` columns are ids and the rest is NO_LOGIT with an exp of 0."""
    top_k = scan.ids_TCK.shape[2]
    slots_TK = _top_slots(z_TB, top_k)
    scan.values_TCK[:, index] = z_TB.gather(1, slots_TK)
    scan.ids_TCK[:, index] = slots_TK + index * scan.width
    max_T1 = scan.values_TCK[:, index].amax(1, keepdim=True)
    scan.max_TC[:, index] = max_T1[:, 0]
    z_TB.sub_(max_T1)
    for column, tau in enumerate(scan.taus, start=1):
        if tau != 1.0:
            torch.div(z_TB[:, :real], tau, out=exp_TB[:, :real]).exp_()
            scan.sums_TCn[:, index, column] = exp_TB.sum(1, dtype=torch.float64)
    # The exp of the padding would underflow, which is 35 times slower on a CPU.
    torch.exp(z_TB[:, :real], out=exp_TB[:, :real])
    kept_T = exp_TB.gather(1, slots_TK).sum(1, dtype=torch.float64)
    scan.shifted_TC[:, index] = z_TB.mul_(exp_TB).sum(1)
    exp_TB.scatter_(1, slots_TK, 0.0)
    groups_TG = exp_TB.view(len(exp_TB), scan.width // GROUP, GROUP).sum(2)
    scan.group_sums_TCG[:, index] = groups_TG
    scan.sums_TCn[:, index, 0] = groups_TG.sum(1, dtype=torch.float64) + kept_T
    for column, tau in enumerate(scan.taus, start=1):
        if tau == 1.0:
            scan.sums_TCn[:, index, column] = scan.sums_TCn[:, index, 0]


def _top_slots(z_TB: Tensor, top_k: int) -> Tensor:
    """Columns of the k largest values of each row, ties by the lowest column, in ascending column order."""
    num_tokens = z_TB.shape[0]
    grouped_TGg = z_TB.view(num_tokens, z_TB.shape[1] // GROUP, GROUP)
    groups = None
    pool, left_out_T = z_TB, z_TB.new_full((num_tokens,), -math.inf)
    if grouped_TGg.shape[1] >= 2 * top_k:
        # The k largest values lie in the k groups with the largest maxima: far fewer columns to select from.
        best, groups = grouped_TGg.amax(2).topk(top_k + 1, dim=1)
        rows_T1 = torch.arange(num_tokens, device=z_TB.device)[:, None] * grouped_TGg.shape[1]
        chosen = (rows_T1 + groups[:, :top_k]).flatten()
        pool, left_out_T = z_TB.view(-1, GROUP).index_select(0, chosen).view(num_tokens, top_k * GROUP), best[:, top_k]
    values, slots = pool.topk(top_k + 1, dim=1)
    slots_TK = slots[:, :top_k]
    if groups is not None:
        slots_TK = groups.gather(1, slots_TK // GROUP) * GROUP + slots_TK % GROUP
    # topk breaks ties as it likes: where one crosses the edge of the selection, the row is selected again in order.
    crossing_T = values[:, top_k - 1] <= torch.maximum(values[:, top_k], left_out_T)
    for rows in crossing_T.nonzero()[:, 0].split(max(1, num_tokens // 4)):
        order = z_TB[rows].sort(dim=1, descending=True, stable=True).indices
        slots_TK = slots_TK.index_copy(0, rows, order[:, :top_k])
    return slots_TK.sort(dim=1).values


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
    if not torch.isfinite(lse_T).all():
        token = int((~torch.isfinite(lse_T)).nonzero()[0])
        raise ModelError(f"the logits of response token {token} are not finite: check the hidden states and the head")
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
    block_Tm, rest_Tm = _pick(tails_TC[:, None].expand(-1, uniforms_Tm.shape[1], -1), uniforms_Tm)
    t_1 = torch.arange(len(ids_TK), device=ids_TK.device)[:, None]
    groups_TmG = scan.group_sums_TCG[t_1, block_Tm]
    runners_TmK = _runners_up(scan, inside_TCK)[t_1, block_Tm]
    slot_Tm, rest_Tm = _pick(torch.cat([groups_TmG, runners_TmK], -1).double(), rest_Tm)
    num_groups = groups_TmG.shape[2]
    candidates_TmK = scan.ids_TCK[t_1, block_Tm]
    runner_Tm = candidates_TmK.gather(2, (slot_Tm - num_groups).clamp(min=0)[..., None])[..., 0]
    first_Tm = block_Tm * scan.width + slot_Tm.clamp(max=num_groups - 1) * GROUP
    in_group_Tm = torch.empty_like(runner_Tm)
    # A processor wants the gathered head rows in its cache, a GPU wants few launches.
    budget = 1 << 20 if hidden_TD.device.type == "cpu" else len(ids_TK) * scan.width
    step = max(1, budget // (first_Tm.shape[1] * GROUP * hidden_TD.shape[1]))
    for start in range(0, len(ids_TK), step):
        t = slice(start, start + step)
        in_group_Tm[t] = _draw_in_group(hidden_TD[t], head, first_Tm[t], candidates_TmK[t], rest_Tm[t])
    tail_ids_Tm = torch.where(slot_Tm < num_groups, in_group_Tm, runner_Tm)
    return torch.where(tails_TC.sum(1, keepdim=True) > 0, tail_ids_Tm, _lowest_free(ids_TK)[:, None])


def _draw_in_group(
    hidden_TD: Tensor, head: Head, first_Tm: Tensor, candidates_TmK: Tensor, uniforms_Tm: Tensor
) -> Tensor:
    """Draw among the GROUP ids from `first`, leaving out the block's candidates and what lies behind the vocabulary."""
    num_tokens, num_tail = first_Tm.shape
    ids_Tmg = first_Tm[..., None] + torch.arange(GROUP, device=first_Tm.device)
    dtype = compute_dtype(hidden_TD)
    rows_RD = head.weight_VD.index_select(0, ids_Tmg.clamp(max=head.num_rows - 1).flatten()).to(dtype)
    rows_TDr = rows_RD.view(num_tokens, num_tail * GROUP, -1).transpose(1, 2)
    z_Tmg = head.shape_(torch.bmm(hidden_TD.to(dtype)[:, None], rows_TDr)).view(num_tokens, num_tail, GROUP)
    barred_Tmg = (ids_Tmg[..., None] == candidates_TmK[:, :, None]).any(-1) | (ids_Tmg >= head.num_rows)
    z_Tmg = z_Tmg.masked_fill(barred_Tmg, -math.inf)
    top_Tm1 = z_Tmg.amax(-1, keepdim=True)
    # A draw that went to a runner-up looks at a group too, maybe a fully barred one: any finite number will do there.
    weights_Tmg = (z_Tmg - top_Tm1.masked_fill(top_Tm1 == -math.inf, 0.0)).exp()
    slot_Tm, _ = _pick(weights_Tmg.double(), uniforms_Tm)
    return ids_Tmg.gather(2, slot_Tm[..., None])[..., 0]


def _pick(weights_NX: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF over the last axis (float64): an index of positive weight, and the uniform left inside it."""
    cdf_NX = weights_NX.cumsum(-1)
    total_N1 = cdf_NX[..., -1:]
    target_N1 = uniforms_N[..., None] * total_N1
    # Rounding may lift the target to the total: stay at the last index that has weight.
    last_N1 = (cdf_NX < total_N1).sum(-1, keepdim=True)
    index_N1 = torch.minimum((cdf_NX <= target_N1).sum(-1, keepdim=True), last_N1)
    weight_N1 = weights_NX.gather(-1, index_N1)
    rest_N1 = (target_N1 - cdf_NX.gather(-1, index_N1) + weight_N1) / weight_N1
    return index_N1[..., 0], rest_N1.nan_to_num(0.0).clamp(0.0, 1.0 - 2.0**-52)[..., 0]


def _lowest_free(ids_TK: Tensor) -> Tensor:
    """The lowest id that is not kept: among the K + 1 lowest ids at least one is free."""
    num_tokens, top_k = ids_TK.shape
    taken = torch.zeros((num_tokens, top_k + 2), dtype=torch.bool, device=ids_TK.device)
    taken.scatter_(1, ids_TK.clamp(max=top_k + 1), True)
    return (~taken[:, : top_k + 1]).int().argmax(1)
