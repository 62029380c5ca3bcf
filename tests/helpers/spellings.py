"""Small tokenizers that spell bytes in different ways, trained on a few words, with a chat template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["red", "green", "blue", "the cat sees", "two dogs and", "three small", "\u00e9t\u00e9", "\u4e2d\u6587"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ends a turn otherwise, and writes a space and a line around an answer.
OTHER_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKS = {TEMPLATE: ("<|endoftext|>", "<|im_end|>", "<|im_start|>"), OTHER_TEMPLATE: ("<pad>", "</s>", "<s>")}


def byte_level(
    texts: Sequence[str] = WORDS, *, size: int = 300, template: str = TEMPLATE, lower: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2 and Qwen."""
    core = Tokenizer(models.BPE())
    if lower:
        core.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(list(texts) * 3, trainer)
    return _fast(core, template)


def byte_fallback(texts: Sequence[str] = WORDS, *, size: int = 60, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """As of Llama 2: a space before every text, U+2581 for spaces, `<0xNN>` for bytes without a piece."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False)
    core.train_from_iterator([text for text in texts if text.isascii()] * 3, trainer)
    state = json.loads(core.to_str())
    state["model"]["byte_fallback"] = True
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    core = Tokenizer.from_str(json.dumps(state))
    space = decoders.Replace("\u2581", " ")
    core.decoder = decoders.Sequence(  # type: ignore[assignment]
        [space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(core, template)


def metaspace(texts: Sequence[str] = WORDS, *, size: int = 90, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """As of T5 and XLM-R, without a byte for what has no piece: other letters are unknown."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")  # type: ignore[assignment]
    core.decoder = decoders.Metaspace()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False)
    core.train_from_iterator(list(texts) * 3, trainer)
    return _fast(core, template)


def _fast(core: Any, template: str) -> PreTrainedTokenizerFast:
    pad, end, start = MARKS.get(template, MARKS[OTHER_TEMPLATE])
    core.add_special_tokens([pad, start, end])
    core.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<|obj|>", rstrip=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, pad_token=pad, extra_special_tokens=[start], chat_template=template
    )


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, *, num_layers: int, hidden: int, seed: int) -> Path:
    """A random Llama that speaks with this tokenizer; its head has rows more than there are tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
