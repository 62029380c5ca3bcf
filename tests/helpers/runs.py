"""What a run or a cache says, to be compared with another one or with the model itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlsi_cache.data.collate import Batch, collate
from vlsi_cache.run_files import read_metrics
from vlsi_cache.store.part import Row
from vlsi_cache.teacher import forward
from vlsi_cache.train import loader

TIMES = ("tokens_per_s", "data_wait_pct", "memory_gib", "seconds", "time")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without what differs from one run to the next."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def count_sequences(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences of every batch that is put together from now on."""
    counts: list[int] = []

    def counted(sequences: Any, **options: Any) -> Batch:
        counts.append(len(sequences))
        return collate(sequences, **options)

    for module in (forward, loader):
        monkeypatch.setattr(module, "collate", counted)
    return counts


def assert_row_is_the_models_own(row: Row, messages: list[dict[str, Any]], model: Any, tokenizer: Any) -> None:
    """The cached last layer against transformers' own log-probs over this conversation alone."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    said = tokenizer(messages[-1]["content"] + "<|im_end|>", add_special_tokens=False).input_ids
    assert row.response_ids_R.tolist() == said
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + said])).logits[0, len(prompt_ids) - 1 : -1, : len(tokenizer)]
    wanted_TV = logits.double().log_softmax(-1).numpy()
    kept_TK = np.take_along_axis(wanted_TV, row.ids_LTK[-1].astype(np.int64), -1)
    np.testing.assert_allclose(row.logprobs_LTK[-1], kept_TK, rtol=0, atol=1e-4)
    np.testing.assert_allclose(-np.sort(-wanted_TV)[:, : row.top_k], kept_TK, rtol=0, atol=1e-5)
    np.testing.assert_allclose(row.gold_logprob_LT[-1], wanted_TV[range(len(said)), said], rtol=0, atol=1e-4)
