"""Teacher and students over a source with exact conditionals: made, pretrained and measured against the truth.

Legend: B rows, S positions, R response words, V words of the source.
"""

import math
from pathlib import Path

import markov
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

FIRST = markov.PROMPT_WORDS + 2  # position of the first response word, after the two marks of the chat
WARM_UP = 20  # steps
HELD_OUT_SEED = 999_999


def new_model(folder: Path, *, num_layers: int, hidden: int, seed: int) -> LlamaForCausalLM:
    """A random model whose tokenizer lies in `folder`.

    Weights are drawn with deviation hidden**-0.5, the head's too: with the usual 0.02 a frozen random head of so few
    dimensions could not say anything with certainty.
    """
    size = markov.save_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=hidden**-0.5,
        eos_token_id=markov.NUM_WORDS + 2,
        pad_token_id=markov.NUM_WORDS + 3,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def token_ids(prompt_BP: np.ndarray, response_BR: np.ndarray) -> torch.Tensor:
    """What the chat template makes of rows, [B, S]."""
    user, assistant, end = (np.full((len(prompt_BP), 1), markov.NUM_WORDS + mark) for mark in range(3))
    return torch.from_numpy(np.concatenate([user, prompt_BP, assistant, response_BR, end], 1))


def pretrain(
    model: PreTrainedModel, source: markov.Source, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> None:
    """Cross-entropy on the responses of rows that are fresh in every step; warm-up, then a cosine to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / WARM_UP) * cosine
        ids_BS = token_ids(*source.rows(batch_size, seed=seed * 1_000_000 + step))
        labels_BS = ids_BS.clone()
        labels_BS[:, :FIRST] = -100
        model(input_ids=ids_BS, labels=labels_BS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.inference_mode()
def kl_to_truth(model: PreTrainedModel, source: markov.Source, *, num_rows: int) -> float:
    """KL(truth || model) in nats per response word, on held-out rows."""
    prompt_BP, response_BR = source.rows(num_rows, seed=HELD_OUT_SEED)
    truth_BRV = torch.from_numpy(source.truth(prompt_BP, response_BR))
    logits = model(input_ids=token_ids(prompt_BP, response_BR)).logits.double()
    said_BRV = torch.log_softmax(logits, -1)[:, FIRST - 1 : FIRST - 1 + markov.RESPONSE_WORDS, : markov.NUM_WORDS]
    return float((truth_BRV * (truth_BRV.log() - said_BRV)).sum(-1).mean())
