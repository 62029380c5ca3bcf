"""Ropes whose frequencies depend on the longest row of a batch: rows on both sides of the limit, each as if alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from vlsi_cache.errors import ModelError
from vlsi_cache.models.backbone import Backbone

LIMIT, LENGTHS = 12, [9, 30, 12, 13, 17, 5]
PLAIN = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.5, 2, 3, 4.0]}
CONFIGS = {
    "dynamic": LlamaConfig(**PLAIN, max_position_embeddings=LIMIT, rope_parameters=DYNAMIC),
    "longrope": Phi3Config(
        **PLAIN, max_position_embeddings=64, original_max_position_embeddings=LIMIT, rope_parameters=LONG
    ),
}


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    ids_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {
        "input_ids": ids_BS,
        "attention_mask": torch.stack([(torch.arange(ids_BS.shape[1]) < len(r)).long() for r in rows]),
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_on_both_sides_of_the_limit_are_as_if_alone(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[kind])
    backbone, rows = Backbone(model.eval()), [torch.randint(1, 50, (length,)) for length in LENGTHS]
    rows_T = torch.tensor([row for row in range(len(rows)) for _ in range(3)])
    positions_T = torch.tensor([length - 3 + j for length in LENGTHS for j in range(3)])
    found = backbone.capture(padded(rows), [2], rows_T, positions_T)
    expected: dict[int, list[Tensor]] = {2: [], 3: []}
    for ids_S in rows:
        backbone.forget()  # or transformers' own frequencies would be those of the longest row so far
        states = model(ids_S[None], output_hidden_states=True, use_cache=False).hidden_states
        for layer, state_TD in expected.items():
            state_TD.append(states[layer][0, -3:])
    for layer, states in expected.items():
        torch.testing.assert_close(found[layer], torch.cat(states), rtol=0, atol=1e-4)
    generator = torch.Generator().manual_seed(1)
    weights_TD = torch.randn(found[3].shape, generator=generator)
    weight = model.model.layers[0].mlp.down_proj.weight
    (wanted,) = torch.autograd.grad((torch.cat(expected[3]) * weights_TD).sum(), weight)
    (gradient,) = torch.autograd.grad((found[3] * weights_TD).sum(), weight)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    together = model(**padded(rows), output_hidden_states=True, use_cache=False).hidden_states[3][rows_T, positions_T]
    assert (together - found[3]).abs().max() > 0.05  # what one padded batch gives


def test_what_cannot_be_cut_apart_is_refused() -> None:
    backbone = Backbone(AutoModelForCausalLM.from_config(CONFIGS["longrope"]).eval())
    inputs, zero_T = padded([torch.ones(length, dtype=torch.long) for length in (5, 20)]), torch.zeros(1).long()
    with pytest.raises(ModelError, match=r"changes at 12 tokens.*`micro_batch_size: 1`"):
        backbone.capture_sequences(inputs, [1], zero_T, zero_T)
    with pytest.raises(ModelError, match="cannot run in one batch with pictures"):
        backbone.capture({**inputs, "pixel_values": torch.zeros(4, 3)}, [1], zero_T, zero_T)
    short = padded([torch.ones(length, dtype=torch.long) for length in (5, 12)])
    assert set(backbone.capture_sequences(short, [1], zero_T, zero_T)) == {1, 3}
