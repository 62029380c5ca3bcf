"""The build: rows against a hand-written logit lens, the same bytes after any crash, refusals, nothing too large."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def part_bytes(cache: Path) -> dict[str, bytes]:
    """Every file of every part, by its path in the cache."""
    return {str(f.relative_to(cache)): f.read_bytes() for f in sorted((cache / "parts").rglob("*")) if f.is_file()}


def dense_logprobs(folder: Path, row: dict[str, Any], layers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hand-written logit lens: log-probs [L, T, V] over the real vocabulary, and the response ids with end of turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    user, assistant = row["messages"]
    prompt = f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer(assistant["content"], add_special_tokens=False).input_ids
    answer_ids = [*answer_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    with torch.no_grad():
        output = model(torch.tensor([prompt_ids + answer_ids]), output_hidden_states=True)
        where = slice(len(prompt_ids) - 1, len(prompt_ids) - 1 + len(answer_ids))
        states = [model.model.norm(output.hidden_states[k])[0, where] for k in layers[:-1]]
        states.append(output.hidden_states[-1][0, where])
        logits = torch.stack([model.lm_head(state)[:, : len(tokenizer)] for state in states])
    return torch.log_softmax(logits.double(), -1).numpy(), np.array(answer_ids)
