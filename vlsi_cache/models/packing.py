"""Packed batches as a model takes them: positions of each sequence, and a mask that keeps the sequences of a row apart.

Which models keep them apart is what `probe.py` finds out; where sequences lie is `data/collate.py`'s matter.

Legend: B rows, S positions.
"""

from typing import Any

import torch
from torch import Tensor

from vlsi_cache.data.collate import SEGMENTS

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


def unpacked(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a packed batch for the body of `model`.

    The mask is additive and made here: positions that begin anew are not understood by every family.
    """
    inputs, text_config = dict(inputs), model.config.get_text_config()
    segments_BS, positions_BS = inputs.pop(SEGMENTS), inputs["position_ids"]
    if getattr(text_config, "_attn_implementation", None) not in FLASH:  # which finds sequences by their positions
        dtype = model.get_input_embeddings().weight.dtype
        windows = _windows(text_config)
        masks = {kind: _mask(segments_BS, positions_BS, window, dtype) for kind, window in windows.items()}
        # Families of one kind of layers take the mask itself.
        inputs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
    return _with_grid_positions(model, inputs, segments_BS)


def _windows(text_config: Any) -> dict[str, int | None]:
    """The kinds of attention layers, and how many tokens back each of them sees; None: all."""
    window = getattr(text_config, "sliding_window", None)
    kinds = list(dict.fromkeys(getattr(text_config, "layer_types", None) or []))
    if not kinds:
        return {"": window if getattr(text_config, "use_sliding_window", True) else None}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _mask(segments_BS: Tensor, positions_BS: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive, [B, 1, S, S]: a token sees those before it in its own sequence, itself included."""
    steps_S = torch.arange(segments_BS.shape[1], device=segments_BS.device)
    seen_BSS = (segments_BS[:, :, None] == segments_BS[:, None]) & (steps_S[:, None] >= steps_S[None])
    if window is not None:
        seen_BSS &= positions_BS[:, :, None] - positions_BS[:, None] < window
    seen_BSS |= steps_S[:, None] == steps_S[None]  # a token that sees nothing has no softmax
    mask_BSS = torch.zeros(seen_BSS.shape, dtype=dtype, device=seen_BSS.device)
    return mask_BSS.masked_fill_(~seen_BSS, torch.finfo(dtype).min)[:, None]


def _with_grid_positions(model: Any, inputs: dict[str, Any], segments_BS: Tensor) -> dict[str, Any]:
    """The Qwen VLs count time, height and width of pictures: three rows of positions behind the text's own."""
    rope_index = getattr(model.base_model, "get_rope_index", None)
    if rope_index is None:
        return inputs
    types_BS = inputs.get("mm_token_type_ids", torch.zeros_like(segments_BS))
    rows_4BS = inputs["position_ids"].expand(4, *segments_BS.shape).clone()
    grids, first = inputs.get("image_grid_thw"), 0
    for row, segments_S in enumerate(segments_BS):
        for number in range(1, int(segments_S.max()) + 1):
            at = (segments_S == number).nonzero()[:, 0]
            own = slice(int(at[0]), int(at[-1]) + 1)
            ids_1S, types_1S = inputs["input_ids"][row, own][None], types_BS[row, own][None]
            num_pictures = _num_runs(types_1S[0])
            shown = None if grids is None or not num_pictures else grids[first : first + num_pictures]
            first += num_pictures
            rows_4BS[1:, row, own] = rope_index(ids_1S, types_1S, image_grid_thw=shown)[0][:, 0]
    return {**inputs, "position_ids": rows_4BS}


def _num_runs(types_S: Tensor) -> int:
    """Stretches of picture tokens, one for each picture: text stands between two of them."""
    is_picture_S = types_S == 1
    return int((is_picture_S[1:] & ~is_picture_S[:-1]).sum() + is_picture_S[:1].sum())
