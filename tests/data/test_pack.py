"""Packed batches: every sequence once, little padding, and hidden states that are those of each sequence alone."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.families import seen_sample, tiny_model
from tests.helpers.probe_models import make_model
from vlsi_cache.data.collate import SEEN_UNTIL, collate, pack
from vlsi_cache.data.sequence import Encoded, Span
from vlsi_cache.models.backbone import Backbone

LENGTHS = (30, 7, 12, 19, 3, 25)


def sample(length: int, num_response: int, seed: int = 0, **more: Any) -> Encoded:
    ids = np.random.default_rng([length, seed]).integers(3, 200, length)
    return Encoded(ids, length - num_response, ids[length - num_response :], **more)


SAMPLES = [sample(length, min(4, length - 1)) for length in LENGTHS]


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.sampled_from([1, 300, 500, 4096]))
def test_every_sequence_has_a_place_of_its_own(lengths: list[int], row_width: int) -> None:
    places = pack(lengths, row_width)
    taken = sorted((row, start, start + length) for (row, start), length in zip(places, lengths, strict=True))
    for (row, _, stop), (next_row, start, _) in pairwise(taken):
        assert start >= stop if row == next_row else (next_row, start) == (row + 1, 0)
    assert max(stop for _, _, stop in taken) <= max(row_width, *lengths)
    area = (1 + taken[-1][0]) * max(stop for _, _, stop in taken)
    assert area <= len(lengths) * max(lengths)  # never more than padding them


def test_padding_is_a_few_percent() -> None:
    """Batches of 8 rows of docstrings' lengths, which padded to the longest are 28 % padding."""
    draw = np.random.default_rng(0)
    padded = packed = total = 0
    for _ in range(50):
        lengths = np.clip(draw.lognormal(5.0, 0.45, 8), 40, 500).astype(int).tolist()
        places = pack(lengths, 4096)
        width = max(start + length for (_, start), length in zip(places, lengths, strict=True))
        total += sum(lengths)
        padded += 8 * max(lengths)
        packed += (1 + max(row for row, _ in places)) * width
    assert 1 - total / padded > 0.3
    assert 1 - total / packed < 0.03


def test_a_packed_batch_holds_what_the_padded_one_does() -> None:
    first = SAMPLES[0]
    spans = (Span(4, 5, first.input_ids[5:9]), Span(25, 26, first.response_ids))
    shared = Encoded(first.input_ids, 26, first.response_ids, joined=spans)
    samples = [*SAMPLES[1:], shared]
    padded, packed = (collate(samples, pad_id=0, row_width=4096 * packed) for packed in (False, True))
    assert packed.num_tokens == padded.num_tokens == [4, 4, 4, 2, 4, 4, 4]
    torch.testing.assert_close(packed.gold_T, padded.gold_T)
    assert len(packed.inputs["input_ids"]) < len(samples)
    where = packed.rows_T, packed.positions_T + 1
    torch.testing.assert_close(packed.inputs["input_ids"][where], packed.gold_T)
    torch.testing.assert_close(packed.labels_BS[where], packed.gold_T)
    assert int((packed.labels_BS >= 0).sum()) == len(set(zip(*(x.tolist() for x in where), strict=True)))
    until_BS, positions_BS = packed.inputs[SEEN_UNTIL], packed.inputs["position_ids"]
    # Every token is seen until its sequence ends; padding by itself alone.
    seen_by_BS = until_BS - torch.arange(until_BS.shape[1])
    lengths = [len(one.input_ids) for one in samples]
    assert sorted(seen_by_BS[positions_BS == 0].tolist(), reverse=True)[: len(samples)] == sorted(lengths)[::-1]
    assert int((seen_by_BS + positions_BS == 1).sum()) == until_BS.numel() - sum(lengths)
    assert int((seen_by_BS > 0).sum()) == until_BS.numel()
    assert "attention_mask" not in packed.inputs
    # Where packing saves nothing, the batch is the padded one.
    same = [sample(9, 3, seed) for seed in range(4)]
    for one, other in zip(
        *(collate(same, pad_id=0, row_width=4096 * p).inputs.values() for p in (True, False)), strict=True
    ):
        torch.testing.assert_close(one, other)


def hidden_states(model: Any, samples: list[Encoded], *, packed: bool) -> dict[int, torch.Tensor]:
    backbone = Backbone(model)
    batch = collate(samples, pad_id=0, row_width=4096 * packed)
    assert (SEEN_UNTIL in batch.inputs) == packed
    layers = [1] if backbone.num_layers > 1 else []
    return backbone.capture(batch.inputs, layers, batch.rows_T, batch.positions_T)


WINDOWED = {
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6},
    "cohere2": {"sliding_window": 6},
    "gpt_oss": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
}
PACK = ("llama", "qwen2", "qwen3", "gemma", "olmo2", "phi3", "gpt_neox", "opt", *WINDOWED)


@pytest.mark.parametrize("family", sorted(set(PACK)))
def test_packed_states_are_those_of_each_sample_alone(family: str) -> None:
    """Windows shorter than the samples included; the oracle is a batch of one, without a mask of ours."""
    for changes in [{}, WINDOWED[family]] if family in WINDOWED else [{}]:
        model = make_model(family, **changes)
        found = hidden_states(model, SAMPLES, packed=True)
        for layer, states_TD in found.items():
            alone = [hidden_states(model, [one], packed=False)[layer] for one in SAMPLES]
            torch.testing.assert_close(states_TD, torch.cat(alone), rtol=1e-4, atol=2e-5)


def test_gradients_through_a_packed_batch_are_those_of_the_padded_one() -> None:
    gradients = []
    for packed in (True, False):
        model = make_model("qwen2").requires_grad_(True).train()
        model.gradient_checkpointing_enable()
        hidden = hidden_states(model, SAMPLES, packed=packed)
        sum(state.square().sum() for state in hidden.values()).backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_states_in_16_bits_are_as_near_as_padded_ones() -> None:
    model = make_model("llama").to(torch.bfloat16)
    packed, padded = (hidden_states(model, SAMPLES, packed=one)[1] for one in (True, False))
    torch.testing.assert_close(packed, padded, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_pictures_in_a_packed_batch(family: str) -> None:
    """Positions of time, height and width begin anew in each sample, and pictures go to their own tokens."""
    several = [(4, 4), (4, 8)] if family == "qwen2_vl" else [(4, 4)]
    shapes = [(5, [(4, 8)]), (30, several), (9, []), (20, [(8, 4)]), (14, [(4, 4)])]
    samples = [seen_sample(family, length, pictures, seed) for seed, (length, pictures) in enumerate(shapes)]
    model = tiny_model(family)
    found = hidden_states(model, samples, packed=True)
    for layer, states_TD in found.items():
        alone = torch.cat([hidden_states(model, [one], packed=False)[layer] for one in samples])
        torch.testing.assert_close(states_TD, alone, rtol=1e-4, atol=2e-5)
        text = hidden_states(model, [replace(samples[2], media={})], packed=False)[layer]
        torch.testing.assert_close(states_TD[6:9], text, rtol=1e-4, atol=2e-5)
