"""A Qwen2-VL of a few million weights: tokenizer, image processor, chat template, teacher and student folders.

Everything is the real family's, only small: the transformers classes, the special tokens, 2 x 2 merged patches,
M-RoPE, and a head with more rows than the tokenizer has tokens.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlsi_cache.demo.data import pictures

TEACHER_DIR = Path(__file__).parents[2] / "vlsi_cache" / "demo" / "teacher"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PATCH = 8
HEAD_MULTIPLE = 64
# Qwen2's own split: a word takes its leading space, every digit stands alone.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def build_tokenizer(*, vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from the demo's own sentences; any UTF-8 text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = ["user\nassistant\nsystem\n"] * 100
    for _, questions in islice(pictures(split="teacher", num_questions=4), 3000):
        lines += [text for question in questions for text in (question.text, question.answer)]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Id of one special token."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Patches of 8 x 8, merged 2 x 2: a demo picture of 64 x 64 stays as it is and becomes 16 image tokens."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """8 layers, hidden 192; the head has more rows than there are tokens, as in the family.

    M-RoPE's base is 1e4, the family's 1e6 scaled down with the contexts. It must not be so low that every frequency is
    fast: words could then not be matched to pictures over a varying distance.
    """
    ids = {token: token_id(tokenizer, token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": (len(tokenizer) // HEAD_MULTIPLE + 1) * HEAD_MULTIPLE,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "initializer_range": 0.06,
    }
    vision = {
        "depth": 3,
        "embed_dim": 96,
        "num_heads": 3,
        "mlp_ratio": 4,
        "hidden_size": 192,
        "patch_size": PATCH,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        "initializer_range": 0.04,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def save_folder(model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a folder that `from_pretrained` loads: weights, configs, tokenizer, chat template, image processor."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    build_image_processor().save_pretrained(out)
