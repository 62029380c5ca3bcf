"""Tiny models, rows and specs that the tests share; everything is made here, nothing is fetched."""

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "sees", "has", "the", "a", "big", "small", "and"]


def make_rows(num_rows: int, *, start: int = 0) -> list[dict[str, object]]:
    """Text rows with answers of one to seven words, some of them not ASCII."""
    rows = []
    for index in range(start, start + num_rows):
        words = [WORDS[(index * 7 + j * j) % len(WORDS)] for j in range(1 + index % 7)]
        answer = " ".join(words) + (" \u00e9\U0001f600" if index % 5 == 0 else "")
        rows.append(
            {
                "id": f"row-{index}",
                "kind": "even" if index % 2 == 0 else "odd",
                "messages": [
                    {"role": "user", "content": f"say {index} {WORDS[index % len(WORDS)]}"},
                    {"role": "assistant", "content": answer},
                ],
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_tokenizer(folder: Path, *, extra: str = "") -> int:
    """A byte-level tokenizer with chat control tokens; returns its size. `extra` makes a different vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([" ".join(WORDS), extra] * 5, trainer)
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=template,
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_model(folder: Path, *, num_layers: int, hidden: int, seed: int, extra: str = "", padding: int = 9) -> Path:
    """A random Llama with its tokenizer; the head has `padding` rows more than there are tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = save_tokenizer(folder, extra=extra)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size + padding,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_spec(folder: Path, teacher: Path, *, num_rows: int = 40) -> Path:
    """A small spec with a few parts, next to its rows. No batch is cut unless a test does so."""
    write_jsonl(folder / "rows.jsonl", make_rows(num_rows))
    write_jsonl(folder / "heldout.jsonl", make_rows(12, start=1000))
    spec = {
        "name": "tiny",
        "teacher": {"model": str(teacher), "dtype": "float32", "layers": [1, 2, 3, 4]},
        "data": {"path": "rows.jsonl", "max_length": 64},
        "rows": {"top_k": 8, "tail_samples": 3, "taus": [1.0, 2.0]},
        "store": {"part_mib": 0.02},
        "train_verbalizers": {
            "schedule": {"steps": 6, "learning_rate": 0.01},
            "batch_size": 4,
            "micro_batch_size": 4,
            "checkpoint_steps": 2,
        },
        "distill": {
            "layers": [1, 2],
            "batch_size": 4,
            "micro_batch_size": 4,
            "verbalize": {"steps": 4, "learning_rate": 0.01},
            "interact": {"schedule": {"steps": 5, "learning_rate": 0.01}},
            "sft": {"schedule": {"steps": 4, "learning_rate": 0.01}},
            "lora": {"rank": 4, "alpha": 4},
            "checkpoint_steps": 2,
            "window_parts": 2,
        },
        "evaluate": {"data": {"path": "heldout.jsonl", "max_length": 64}, "max_new_tokens": 8, "batch_size": 4},
        "run": {"device": "cpu", "batch_tokens": 200},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@contextmanager
def benchmark_scripts(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Modules of tests/benchmarks, imported as the scripts import each other; torch's threads are put back."""
    import torch

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            sys.modules.pop(name, None)
    torch.set_num_threads(threads)
