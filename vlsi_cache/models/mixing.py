"""How much of each layer's further passes a traversed student takes over, token by token (TroL, Figure 6)."""

from typing import Any

import torch

from vlsi_cache.data.collate import collate
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.sequence import Encoded

from .backbone import Backbone
from .traversal import mixing_ratios, traversal_of


def mixing_of(backbone: Backbone, encoder: Encoder, prompt: Encoded) -> dict[str, Any] | None:
    """Of a prompt without its response: `tokens` as text, `is_picture` of each of them, and `ratios`, the mixing ratio
    of the first further pass for each layer and token, from 0 to 1. None for a plain model. JSON-ready.
    """
    if traversal_of(backbone.plain) is None:
        return None
    inputs = collate([prompt], pad_id=encoder.pad_id, device=backbone.device).inputs
    at = torch.tensor([prompt.num_prompt - 1])
    w_L1S = mixing_ratios(backbone.plain, lambda: backbone.capture(inputs, [], torch.zeros_like(at), at))
    ids = prompt.input_ids[: prompt.num_prompt].tolist()
    return {
        "tokens": encoder.token_texts(ids),
        "is_picture": [index in encoder.placeholder_ids for index in ids],
        "ratios": [[round(w, 4) for w in row] for row in w_L1S[:, 0, : len(ids)].tolist()],
    }
