"""Tiny random models of vision-language families, with tokenizer, chat template and picture processor of the family.

The chat templates write what those of the published models write around a question and an answer.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from .tiny import write_jsonl
from .tokenizers import QWEN_TEMPLATE, tiny_tokenizer

# `IMAGE` stands for what the family writes for a picture, the other words for what it writes around a turn.
_TEMPLATE = (
    "START{% for m in messages %}{% if m['role'] == 'user' %}USER{% else %}ASSISTANTBEFORE{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'user' %}ASKED{% else %}END{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT{% endif %}"
)


def _template(image: str, user: str, asked: str, assistant: str, end: str, start: str = "", before: str = "") -> str:
    text = _TEMPLATE
    pieces = {"IMAGE": image, "USER": user, "ASKED": asked, "ASSISTANT": assistant, "BEFORE": before, "END": end}
    pieces |= {"START": start}
    for word, piece in pieces.items():
        text = text.replace(word, piece)
    return text


_CHATML = partial(_template, user="<|im_start|>user\n", asked="<|im_end|>\n", assistant="<|im_start|>assistant\n")
_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN = (*_IM, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True)
class Vlm:
    """What makes a tiny model of one family. `special` begins with padding, start of text and end of turn."""

    config: dict[str, Any]
    text: dict[str, Any]
    vision: dict[str, Any]
    template: str
    special: Sequence[str]
    tokens: dict[str, str]  # keys of the configuration that name a token
    image_processor: Callable[[], Any]
    processor: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)  # names under which the tokenizer knows tokens
    puts_bos: bool = False  # whether the tokenizer puts the start of text before what it is given


_CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
_SIGLIP = {**_CLIP, "model_type": "siglip_vision_model", "patch_size": 4, "vision_use_head": False}
_GRID = [[8, 8], [8, 16], [16, 8], [16, 16]]
_SMALL = {"height": 8, "width": 8}
_QWEN_PIXELS = {"shortest_edge": 16 * 16, "longest_edge": 40 * 40}
_QWEN_TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
_QWEN_TOKENS |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_SMOL = ("<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>")
_SMOL += tuple(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))
_SMOL_TEMPLATE = _template("<image>", "User:", "<end_of_utterance>\n", "Assistant:", "<end_of_utterance>\n")
_SMOL_SIZES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
_SMOL_VISION = {**_CLIP, "image_size": 16, "patch_size": 4}

VLMS = {
    "qwen2_vl": Vlm(
        config={},
        text={"rope_parameters": _ROPE},
        vision={"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 4},
        template=QWEN_TEMPLATE,
        special=_QWEN,
        tokens=_QWEN_TOKENS,
        image_processor=lambda: Qwen2VLImageProcessorPil(patch_size=4, size=_QWEN_PIXELS),
    ),
    "qwen2_5_vl": Vlm(
        config={},
        text={"rope_parameters": _ROPE},
        vision={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
        | {"window_size": 16, "fullatt_block_indexes": [1]},
        template=QWEN_TEMPLATE,
        special=_QWEN,
        tokens=_QWEN_TOKENS,
        image_processor=lambda: Qwen2VLImageProcessorPil(patch_size=4, size=_QWEN_PIXELS),
    ),
    "qwen3_vl": Vlm(
        config={},
        text={"head_dim": 8, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
        vision={"depth": 3, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
        | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        template=QWEN_TEMPLATE,
        special=_QWEN,
        tokens=_QWEN_TOKENS,
        image_processor=lambda: Qwen2VLImageProcessorPil(patch_size=4, size=_QWEN_PIXELS),
    ),
    "llava_onevision": Vlm(
        config={"image_grid_pinpoints": _GRID, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        text={"model_type": "qwen2"},
        vision={**_SIGLIP, "image_size": 8},
        template=_CHATML("<image>\n", end="<|im_end|>\n"),
        special=(*_IM, "<image>", "<video>"),
        tokens={"image_token_index": "<image>", "video_token_index": "<video>"},
        image_processor=lambda: LlavaOnevisionImageProcessorPil(size=_SMALL, image_grid_pinpoints=_GRID),
        processor={"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
        | {"vision_aspect_ratio": "anyres_max_9"},
    ),
    "llava_next": Vlm(
        config={"image_grid_pinpoints": _GRID, "vision_feature_layer": -2}
        | {"vision_feature_select_strategy": "default", "image_seq_length": 4},
        text={"model_type": "mistral", "sliding_window": None},
        vision={**_CLIP, "model_type": "clip_vision_model", "patch_size": 4, "image_size": 8},
        template=_template("<image>\n", "[INST] ", " [/INST]", "", "</s>", "<s>", " "),
        puts_bos=True,
        special=("<pad>", "<s>", "</s>", "<image>"),
        tokens={"image_token_index": "<image>"},
        image_processor=lambda: LlavaNextImageProcessorPil(
            size={"shortest_edge": 8}, crop_size=_SMALL, image_grid_pinpoints=_GRID
        ),
        processor={"patch_size": 4, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
    ),
    "llava": Vlm(
        config={"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_seq_length": 4},
        text={"model_type": "llama"},
        vision={**_CLIP, "model_type": "clip_vision_model", "patch_size": 4, "image_size": 8},
        template=_template("<image>\n", "USER: ", " ", "ASSISTANT:", "</s>", before=" "),
        puts_bos=True,
        special=("<pad>", "<s>", "</s>", "<image>"),
        tokens={"image_token_index": "<image>"},
        image_processor=lambda: CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=_SMALL),
        processor={"patch_size": 4, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
    ),
    "internvl": Vlm(
        config={"image_seq_length": 4, "downsample_ratio": 0.5, "vision_feature_layer": -1},
        text={"model_type": "qwen2"},
        vision={**_CLIP, "image_size": [16, 16], "patch_size": [4, 4]},
        template=_CHATML("<IMG_CONTEXT>\n", end="<|im_end|>\n"),
        special=(*_IM, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        tokens={"image_token_id": "<IMG_CONTEXT>"},
        named={"start_image_token": "<img>", "end_image_token": "</img>"}
        | {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        image_processor=lambda: GotOcr2ImageProcessorPil(
            size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=3
        ),
        processor={"image_seq_length": 4},
    ),
    "idefics3": Vlm(
        config={"scale_factor": 2},
        text={"model_type": "llama"},
        vision=_SMOL_VISION,
        template="<|im_start|>" + _SMOL_TEMPLATE,
        special=_SMOL,
        tokens={"image_token_id": "<image>"},
        image_processor=lambda: Idefics3ImageProcessorPil(**_SMOL_SIZES),
        processor={"image_seq_len": 4},
    ),
    "smolvlm": Vlm(
        config={"scale_factor": 2},
        text={"model_type": "llama"},
        vision=_SMOL_VISION,
        template="<|im_start|>" + _SMOL_TEMPLATE,
        special=_SMOL,
        tokens={"image_token_id": "<image>"},
        image_processor=lambda: SmolVLMImageProcessorPil(**_SMOL_SIZES),
        processor={"image_seq_len": 4},
    ),
    "gemma3": Vlm(
        config={"mm_tokens_per_image": 4},
        text={"head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
        vision={**_SIGLIP, "image_size": 16},
        template=_template(
            "<start_of_image>",
            "<start_of_turn>user\n",
            "<end_of_turn>\n",
            "<start_of_turn>model\n",
            "<end_of_turn>\n",
            "<bos>",
        ),
        puts_bos=True,
        special=(
            *("<pad>", "<bos>", "<end_of_turn>", "<start_of_turn>"),
            *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        ),
        tokens={"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"}
        | {"image_token_index": "<image_soft_token>"},
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        image_processor=lambda: Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        processor={"image_seq_length": 4},
    ),
    "mistral3": Vlm(
        config={"spatial_merge_size": 2, "vision_feature_layer": -1},
        text={"model_type": "mistral", "head_dim": 8, "sliding_window": None},
        vision={**_CLIP, "model_type": "pixtral", "image_size": 32, "patch_size": 4, "head_dim": 8},
        template=_template("[IMG]", "[INST]", "[/INST]", "", "</s>", "<s>"),
        puts_bos=True,
        special=("<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        tokens={"image_token_index": "[IMG]"},
        image_processor=lambda: PixtralImageProcessorPil(patch_size=4, size={"longest_edge": 32}),
        processor={"patch_size": 4, "spatial_merge_size": 2},
    ),
    "paligemma": Vlm(
        config={"projection_dim": 32},
        text={"model_type": "gemma", "head_dim": 8},
        vision={**_SIGLIP, "image_size": 8, "projection_dim": 32},
        template=_template("<image>", "", "", "", "<eos>"),
        puts_bos=True,
        special=("<pad>", "<bos>", "<eos>", "<image>"),
        tokens={"image_token_index": "<image>"},
        image_processor=lambda: _with_length(SiglipImageProcessorPil(size=_SMALL), 4),
    ),
}


def _with_length(processor: Any, length: int) -> Any:
    processor.image_seq_length = length
    return processor


def save_vlm(
    folder: Path,
    family: str,
    *,
    num_layers: int = 4,
    hidden: int = 32,
    seed: int = 1,
    special: Sequence[str] | None = None,
) -> Path:
    """A folder as `save_pretrained` leaves it: random weights, tokenizer, image processor, processor.

    `special` tokens are the family's unless they are given.
    """
    vlm = VLMS[family]
    tokenizer = tiny_tokenizer(
        vlm.template,
        special=tuple(special or vlm.special),
        pad_token=vlm.special[0],
        bos_token=vlm.special[1],
        **vlm.named,
    )
    if vlm.puts_bos:
        bos = tokenizer.bos_token
        own: Any = tokenizer.backend_tokenizer
        own.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(folder)
    vlm.image_processor().save_pretrained(folder)
    config = tiny_vlm_config(family, tokenizer, num_layers=num_layers, hidden=hidden)
    if vlm.processor:
        name = processor_class(config).__name__
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": name, **vlm.processor}))
    torch.manual_seed(seed)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def tiny_vlm_config(family: str, tokenizer: Any, *, num_layers: int, hidden: int) -> Any:
    vlm = VLMS[family]
    text = {
        "vocab_size": len(tokenizer) + 5,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden // 8,
        "num_key_value_heads": hidden // 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # layers differ visibly, so that a wrong index cannot pass
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
        **vlm.text,
    }
    width = {"qwen2_vl": "hidden_size", "qwen2_5_vl": "out_hidden_size", "qwen3_vl": "out_hidden_size"}.get(family)
    width = {width: hidden} if width else {}
    width |= {"projection_dim": hidden} if family == "paligemma" else {}
    tokens = {key: tokenizer.convert_tokens_to_ids(token) for key, token in vlm.tokens.items()}
    config = {**vlm.config, **tokens, "tie_word_embeddings": False}
    if family == "paligemma":
        config["projection_dim"] = hidden
    return transformers.AutoConfig.for_model(family, text_config=text, vision_config={**vlm.vision, **width}, **config)


def processor_class(config: Any) -> type[Any]:
    return cast(type[Any], PROCESSOR_MAPPING[type(config)])


def real_processor(folder: Path) -> Any:
    """The family's own processor, without the part for videos, which wants torchvision."""
    config = transformers.AutoConfig.from_pretrained(folder)
    family = processor_class(config)
    tokenizer, pictures = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    with without_videos(family):
        if "video_processor" in inspect.signature(family.__init__).parameters:
            return family(pictures, tokenizer, None, **VLMS[config.model_type].processor)
        return family(pictures, tokenizer, **VLMS[config.model_type].processor)


@contextmanager
def without_videos(family: type[Any]) -> Iterator[None]:
    """Its `__init__` does not ask for a video processor here."""
    parts = [name for name in family.get_attributes() if name != "video_processor"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "get_attributes", classmethod(lambda _: parts))
        yield


def importable_processors(patch: pytest.MonkeyPatch) -> None:
    """Processors that this machine refuses for what they need for something else than pictures.

    Pixtral's is marked as torchvision's for a function that stands in the same file as torchvision's resizing;
    SmolVLM's needs num2words for the lengths of videos.
    """
    from transformers.models.smolvlm import processing_smolvlm

    patch.setattr(processing_smolvlm, "num2words", processing_smolvlm.num2words or str)
    if find_spec("torchvision") is None:
        names = [".".join(["torchvision", "transforms", "v2", "functional"][:n]) for n in range(1, 5)]
        modules = {name: ModuleType(name) for name in names}
        modules[names[2]].functional = modules[names[3]]  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as while_imported:
            for name, module in modules.items():
                while_imported.setitem(sys.modules, name, module)
            from transformers.models.pixtral.processing_pixtral import PixtralProcessor
        patch.setitem(PROCESSOR_MAPPING._extra_content, transformers.Mistral3Config, PixtralProcessor)


def picture_rows(folder: Path, pictures: Sequence[Sequence[tuple[int, int]]]) -> Path:
    """Rows with pictures of these widths and heights."""
    rng, rows = np.random.default_rng(0), []
    for index, sizes in enumerate(pictures):
        names = []
        for number, (width, height) in enumerate(sizes):
            names.append(f"{index}-{number}.png")
            Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / names[-1])
        parts: list[dict[str, str]] = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": f"what {index}?"}]
        answer = "a cat" + " cat" * (index % 3)
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"row-{index}", "images": names, "messages": messages})
    return write_jsonl(folder / "rows.jsonl", rows)
