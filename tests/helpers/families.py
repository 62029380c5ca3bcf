"""Capture against transformers' own `output_hidden_states`, for tiny random models of every family in use.

Legend: B rows, S positions, T response tokens, V vocabulary, D hidden size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaOnevisionConfig,
    Qwen2Config,
    Qwen2VLConfig,
    SiglipVisionConfig,
)

from vlsi_cache.data.sequence import Encoded

NUM_LAYERS, HIDDEN_SIZE, VOCAB_SIZE = 5, 32, 61
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 57, 58, 59, 60
DECODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 40,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large enough that layers differ visibly, so that a wrong index cannot pass.
    "initializer_range": 0.2,
}


def tiny_config(family: str, **changes: Any) -> Any:
    decoder = {**DECODER, **changes}
    if family == "llama":
        return LlamaConfig(**decoder)
    if family == "qwen2":
        return Qwen2Config(**decoder)
    if family == "qwen2_vl":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": HIDDEN_SIZE, "patch_size": 4}
        ids = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN}
        ids |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
        return Qwen2VLConfig(
            text_config={**decoder, "rope_parameters": rope},
            vision_config=vision,
            tie_word_embeddings=decoder.get("tie_word_embeddings", False),
            **ids,
        )
    vision_tower = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaOnevisionConfig(
        text_config=Qwen2Config(**decoder),
        vision_config=vision_tower,
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=[[8, 8]],
        vision_feature_layer=-1,
    )


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return auto.from_config(config).eval()


def tiny_inputs(family: str) -> dict[str, Tensor]:
    """Two right-padded rows; the vision families see one image in each."""
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(3, 50, (2, 16), generator=generator)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[1, 13:] = 0
    ids_BS[1, 13:] = 0
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS}
    if family == "qwen2_vl":
        ids_BS[:, 1], ids_BS[:, 2:6], ids_BS[:, 6] = VISION_START, IMAGE_TOKEN, VISION_END
        inputs["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4]])
        inputs["mm_token_type_ids"] = (ids_BS == IMAGE_TOKEN).int()
    if family == "llava_onevision":
        # 2x2 patches of the base view, 2x2 of the one crop, and a newline after each row of the crop.
        ids_BS[:, 1:11] = IMAGE_TOKEN
        inputs["pixel_values"] = torch.randn(2, 2, 3, 8, 8, generator=generator)
        inputs["image_sizes"] = torch.tensor([[8, 8], [8, 8]])
    return inputs


def seen_sample(family: str, length: int, pictures: list[tuple[int, int]], seed: int) -> Encoded:
    """A sample with pictures of (height, width) in patches behind its first tokens."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(3, 50, 2).tolist()
    for height, width in pictures:
        if family == "qwen2_vl":
            ids += [VISION_START, *[IMAGE_TOKEN] * (height * width // 4), VISION_END]
        else:  # 2x2 patches of the base view, 2x2 of the one crop, and a newline after each row of the crop
            ids += [IMAGE_TOKEN] * 10
    ids = np.array([*ids, *draw.integers(3, 50, length)])
    media = {}
    if pictures and family == "qwen2_vl":
        patches = [draw.standard_normal((height * width, 3 * 2 * 4 * 4)) for height, width in pictures]
        media["pixel_values"] = np.concatenate(patches).astype(np.float32)
        media["image_grid_thw"] = np.array([[1, height, width] for height, width in pictures])
    elif pictures:
        media["pixel_values"] = draw.standard_normal((len(pictures), 2, 3, 8, 8)).astype(np.float32)
        media["image_sizes"] = np.array([[8, 8]] * len(pictures))
    types = (ids == IMAGE_TOKEN).astype(np.int64) if family == "qwen2_vl" else None
    return Encoded(ids, len(ids) - 3, ids[-3:], types, media)


ROWS_T = torch.tensor([0, 0, 0, 1, 1])
POSITIONS_T = torch.tensor([11, 12, 13, 11, 12])
