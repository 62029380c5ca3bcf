"""Tiny models, rows and specs that the tests share; everything is made here, nothing is fetched."""

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import yaml

gc.disable()  # until everything is imported

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "sees", "has", "the", "a", "big", "small", "and"]


# The files that take longest, first: the last ones are then short, and no process waits long for the other.
LONGEST = (
    "test_distill", "test_ablate", "test_demo_run", "test_training", "test_benchmarks", "test_recompute",
    "test_student_verbalizers", "test_verbalizer_subsets", "test_acceptance", "test_heldout", "test_interact_layers",
    "test_generate", "test_demo_data", "test_build", "test_build_batches", "test_report_pages", "test_runs",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What torch and transformers are made of lives until the end: the collector need not go through it again."""
    gc.freeze()
    gc.enable()


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


@pytest.fixture(scope="module", autouse=True)
def _nothing_waits_for_the_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test cuts the power: what was flushed and what was not look alike. Children of their own still flush."""
    from vlsi_cache import disk

    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_disk":  # what is flushed, and when
            for name in ("fsync_file", "fsync_dir", "fsync_tree"):
                patch.setattr(disk, name, lambda path: None if os.path.lexists(path) else os.stat(path))
            patch.setattr(os, "fsync", os.fstat)
        yield


# Where figures are looked at. Elsewhere a page gets the first figure of its kind again: drawing one takes longer than
# training a tiny student.
DRAW_ALL = ("test_ablation_report", "test_checkup", "test_match", "test_report_pages", "test_report_stats")
_drawn: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def _each_kind_of_figure_is_drawn_once(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.module.__name__ in DRAW_ALL:
        yield
        return
    from vlsi_cache.report import ablation_figure, figures, heat_maps

    with pytest.MonkeyPatch.context() as patch:
        for module in (ablation_figure, figures, heat_maps):
            for name, function in list(vars(module).items()):
                own = getattr(function, "__module__", "") == module.__name__
                if own and name != "svg_of" and getattr(function, "__annotations__", {}).get("return") is str:
                    patch.setattr(module, name, _drawn_once(function))
        assert figures.loss_curves.__name__ == "drawn"
        yield


def _drawn_once(draw: Callable[..., str]) -> Callable[..., str]:
    def drawn(*args: Any, **options: Any) -> str:
        if draw.__name__ not in _drawn:
            _drawn[draw.__name__] = draw(*args, **options)
        return _drawn[draw.__name__]

    return drawn


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("teacher"), num_layers=5, hidden=32, seed=1)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("student"), num_layers=3, hidden=16, seed=2, padding=3)


def write_spec(folder: Path, teacher: Path, *, num_rows: int = 40) -> Path:
    """A small spec with a few parts, next to its rows."""
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
            "micro_batch_size": 2,
            "checkpoint_steps": 2,
        },
        "distill": {
            "layers": [1, 2],
            "batch_size": 4,
            "micro_batch_size": 2,
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
        patch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            sys.modules.pop(name, None)
    torch.set_num_threads(threads)


@pytest.fixture
def spec_file(tmp_path: Path, teacher_folder: Path) -> Path:
    return write_spec(tmp_path, teacher_folder)
