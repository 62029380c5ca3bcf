"""Batches whose sequences branch, for models that no mask keeps from seeing one branch in another.

A hybrid's layers carry a state from token to token. The trunks of a batch run once, padded on the left, where such
layers pass over padding; the cache that they leave is given to each of their branches, and these run as one more batch.
In inference alone: whether a gradient finds its way back through such caches has not been looked at.

Shapes: B trunks, P positions of the longest, R branches, S positions of the longest of them, T response tokens.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlsi_cache.data.branches import BRANCHES, Branches

if TYPE_CHECKING:
    from .backbone import Backbone


def capture_branches(
    backbone: "Backbone",
    inputs: dict[str, Any],
    layers: Sequence[int],
    rows_T: Tensor,
    positions_T: Tensor,
    *,
    with_final: bool,
) -> dict[int, Tensor]:
    """`Backbone.capture` of a batch with BRANCHES; rows of branches count on from those of the trunks."""
    assert not torch.is_grad_enabled(), "branches run from a cache, which no gradient goes through"
    backbone.forget()
    order: list[Tensor] = []
    parts: dict[int, list[Tensor]] = {}
    first = 0
    for given in _passes(backbone, inputs):
        num_rows = len(given["input_ids"])
        at = ((rows_T >= first) & (rows_T < first + num_rows)).nonzero()[:, 0]
        found = backbone.capture(given, layers, rows_T[at] - first, positions_T[at], with_final=with_final)
        for layer, state_TD in found.items():
            parts.setdefault(layer, []).append(state_TD)
        order.append(at)
        first += num_rows
    return in_order(parts, order)


def in_order(parts: dict[int, list[Tensor]], order: Sequence[Tensor]) -> dict[int, Tensor]:
    """States [T, D] of every layer from those of several passes, where `order` says which tokens each pass had."""
    back_T = torch.cat(list(order)).argsort()
    return {layer: torch.cat(states)[back_T.to(states[0].device)] for layer, states in parts.items()}


def _passes(backbone: "Backbone", inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs of each pass: of the trunks, then of the branches. Each is to be run before the next is taken."""
    trunks = dict(inputs)
    branches: Branches = trunks.pop(BRANCHES)
    taken = inspect.signature(backbone.body.forward).parameters
    cache = DynamicCache(config=backbone.text_config)
    # Models that are all Mamba have another name for it, and no positions.
    name = "cache_params" if "cache_params" in taken else "past_key_values"
    positions_BP = trunk_positions(backbone.plain, trunks)
    placed = {"position_ids": positions_BP} if "position_ids" in taken else {}
    yield {**trunks, **placed, name: cache, "use_cache": True}
    mask_BP = trunks["attention_mask"]
    next_B = mask_BP.sum(1)
    if positions_BP.ndim == 3:  # behind pictures, all of which are in the trunk, text counts on from the largest
        next_3B = positions_BP[1:].amax((0, 2)).expand(3, -1) + 1
        next_B = torch.cat([next_B[None], next_3B])
    for number, (ids_RS, mask_RS, trunk_R) in enumerate(branches.passes, start=1):
        own = copy.deepcopy(cache) if number < len(branches.passes) else cache
        own.reorder_cache(trunk_R)  # type: ignore[arg-type]
        if placed:
            steps_S = torch.arange(ids_RS.shape[1], device=ids_RS.device)
            placed = {"position_ids": next_B[..., trunk_R, None] + steps_S}
        seen = torch.cat([mask_BP[trunk_R], mask_RS], 1)
        yield {"input_ids": ids_RS, "attention_mask": seen, **placed, name: own, "use_cache": True}


def trunk_positions(model: Any, trunks: dict[str, Any]) -> Tensor:
    """int64 [B, P]; in the Qwen VLs, which count time, height and width of pictures too, [4, B, P]."""
    ids_BP, mask_BP = trunks["input_ids"], trunks["attention_mask"]
    depths_BP = (mask_BP.cumsum(1) - 1).clamp(min=0)
    rope_index = getattr(model.base_model, "get_rope_index", None)
    if rope_index is None:
        return depths_BP
    types_BP = trunks.get("mm_token_type_ids", torch.zeros_like(ids_BP))
    rows_3BP, _ = rope_index(ids_BP, types_BP, image_grid_thw=trunks.get("image_grid_thw"), attention_mask=mask_BP)
    return torch.cat([depths_BP[None], rows_3BP.masked_fill(mask_BP == 0, 0)])
