"""Packed batches as a model takes them: positions, and a mask that keeps sequences of a row, and branches, apart.

Which models keep them apart is what `probe.py` finds out; where sequences lie is `data/collate.py`'s matter.

Legend: B rows, S positions.
"""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from vlsi_cache.data.collate import SEEN_UNTIL
from vlsi_cache.data.sequence import Layout

MAX_WIDTH = 1 << 20  # tokens of a row
ATTENTION_KINDS = {"full_attention", "sliding_attention"}  # of layers, that a mask can be made for
FLASH = ("flash_attention_2", "flash_attention_3")


def widest_row(text_config: Any) -> int:
    """Tokens of a row, at most: some families (MPT, GPT-Neo) have a buffer that is as long as their positions."""
    limits = (getattr(text_config, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_positions"))
    return min([MAX_WIDTH, *(one for one in limits if isinstance(one, int) and one > 0)])


def unmaskable_kinds(text_config: Any) -> list[str]:
    """The kinds of layers, as the configuration says it, for which a mask does not keep sequences apart."""
    return sorted(set(getattr(text_config, "layer_types", None) or []) - ATTENTION_KINDS)


def likely_layout(text_config: Any) -> Layout:
    """How samples will lie for a model that nobody has looked at: most families pack, and keep branches apart."""
    if unmaskable_kinds(text_config):
        return Layout(0, branches=True)  # nearly all of these families have a cache that branches go on from
    return Layout(widest_row(text_config), keeps_branches_apart(text_config))


def keeps_branches_apart(text_config: Any) -> bool:
    """Whether the attention takes a mask; flash attention finds sequences of a row by their positions instead."""
    return getattr(text_config, "_attn_implementation", None) not in FLASH


def unpacked(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a packed batch for the body of `model`.

    The mask is additive and made here: positions that begin anew are not understood by every family.
    """
    inputs, text_config = dict(inputs), model.config.get_text_config()
    until_BS, positions_BS = inputs.pop(SEEN_UNTIL), inputs["position_ids"]
    if keeps_branches_apart(text_config):
        dtype = model.get_input_embeddings().weight.dtype
        windows = _windows(text_config)
        masks = {kind: _mask(until_BS, positions_BS, window, dtype) for kind, window in windows.items()}
        # Families of one kind of layers take the mask itself.
        inputs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
    return _with_grid_positions(model, inputs)


def _windows(text_config: Any) -> dict[str, int | None]:
    """The kinds of attention layers, and how many tokens back each of them sees; None: all."""
    window = getattr(text_config, "sliding_window", None)
    kinds = list(dict.fromkeys(getattr(text_config, "layer_types", None) or []))
    if not kinds:
        return {"": window if getattr(text_config, "use_sliding_window", True) else None}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _mask(until_BS: Tensor, positions_BS: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive, [B, 1, S, S]: a token sees itself, and those before it on its own path through its own sequence."""
    steps_S = torch.arange(until_BS.shape[1], device=until_BS.device)
    seen_BSS = (steps_S[:, None] >= steps_S[None]) & (steps_S[:, None] < until_BS[:, None])
    if window is not None:
        seen_BSS &= positions_BS[:, :, None] - positions_BS[:, None] < window
    mask_BSS = torch.zeros(seen_BSS.shape, dtype=dtype, device=seen_BSS.device)
    return mask_BSS.masked_fill_(~seen_BSS, torch.finfo(dtype).min)[:, None]


def _with_grid_positions(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The Qwen VLs count time, height and width of pictures: three rows of positions behind the text's own.

    Each branch gets those of its whole path: of the tokens at positions 0, 1, 2, ... up to its own.
    """
    if not hasattr(model.base_model, "get_rope_index"):
        return inputs
    ids_BS, depths_BS = inputs["input_ids"].cpu(), inputs["position_ids"].cpu()
    types_BS = inputs.get("mm_token_type_ids", torch.zeros_like(ids_BS)).cpu()
    rows_4BS = depths_BS.expand(4, *ids_BS.shape).clone()
    grids = inputs.get("image_grid_thw")
    shapes, num_shown = () if grids is None else tuple(map(tuple, grids.tolist())), 0
    for row, depths_S in enumerate(depths_BS):
        path, first = torch.zeros(0, dtype=torch.long), num_shown
        for branch in _branches(depths_S):
            depth = int(depths_S[branch[0]])
            if depth == 0:  # another sequence; its pictures come behind those of the last one
                first = num_shown
            path = torch.cat([path[:depth], branch])
            if len(path) == 1:  # padding
                continue
            types_S = types_BS[row, path]
            num_pictures = _num_runs(types_S)
            num_shown = max(num_shown, first + num_pictures)
            shown = shapes[first : first + num_pictures]
            rows_3S = _grid_rows(model.base_model, ids_BS[row, path], types_S, shown)
            rows_4BS[1:, row, branch] = rows_3S[:, depth:]
    return {**inputs, "position_ids": rows_4BS.to(inputs["position_ids"].device)}


# Positions by what they follow from: a sequence comes round again in every epoch, stage and run.
_known_rows: "WeakKeyDictionary[nn.Module, dict[Any, Tensor]]" = WeakKeyDictionary()
MOST_KNOWN_TOKENS = 1 << 20  # of the sequences that are kept, 40 bytes each


def _grid_rows(body: Any, ids_S: Tensor, types_S: Tensor, shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    """int64 [3, S], as the model itself has them for a sequence with these grids of pictures."""
    known = _known_rows.setdefault(body, {})
    key = (ids_S.numpy().tobytes(), types_S.numpy().astype(np.int8).tobytes(), shapes)
    if key not in known:
        shown = torch.tensor(shapes) if shapes else None
        rows_31S, _ = body.get_rope_index(ids_S[None], types_S[None], image_grid_thw=shown)
        if sum(one.shape[1] for one in known.values()) + len(types_S) > MOST_KNOWN_TOKENS:
            known.clear()
        known[key] = rows_31S[:, 0]
    return known[key]


def _branches(depths_S: Tensor) -> tuple[Tensor, ...]:
    """The places of a row, cut where positions do not rise by one."""
    begins = 1 + (depths_S[1:] - depths_S[:-1] != 1).nonzero()[:, 0]
    return torch.arange(len(depths_S), device=depths_S.device).tensor_split(begins.cpu())


def _num_runs(types_S: Tensor) -> int:
    """Stretches of picture tokens, one for each picture: text stands between two of them."""
    is_picture_S = types_S == 1
    return int((is_picture_S[1:] & ~is_picture_S[:-1]).sum() + is_picture_S[:1].sum())
