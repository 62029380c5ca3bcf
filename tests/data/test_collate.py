"""Batches: the positions of the response against a brute-force search, and a batch against one sample at a time."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vlsi_cache.data.collate import IGNORE_INDEX, Batch, collate, collate_prompts
from vlsi_cache.data.sequence import Encoded

PAD, START, IMAGE, END = 0, 60, 61, 62


def sample(num_prompt: int, num_response: int, *, grids: Sequence[tuple[int, int]] = (), seed: int = 0) -> Encoded:
    """Random text, then images of the given grids of patches (merged 2 x 2), then the response."""
    rng = np.random.default_rng([seed, num_prompt, num_response])
    vision = [[START, *[IMAGE] * (h * w // 4), END] for h, w in grids]
    prompt = [*rng.integers(1, 50, num_prompt), *(token for ids in vision for token in ids)]
    response = rng.integers(1, 50, num_response).astype(np.int64)
    ids = np.concatenate([np.asarray(prompt, dtype=np.int64), response])
    media = {}
    if grids:
        num_patches = sum(h * w for h, w in grids)
        media["pixel_values"] = rng.standard_normal((num_patches, 3 * 2 * 4 * 4)).astype(np.float32)
        media["image_grid_thw"] = np.asarray([(1, h, w) for h, w in grids], dtype=np.int64)
    return Encoded(ids, len(prompt), response, (ids == IMAGE).astype(np.int64), media)


SAMPLES = [sample(5, 3), sample(2, 7, grids=[(4, 6)]), sample(9, 1), sample(3, 2, grids=[(2, 2), (4, 2)])]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
@settings(deadline=None)
def test_positions_by_brute_force(shapes: list[tuple[int, int]]) -> None:
    samples = [sample(p, r, seed=index) for index, (p, r) in enumerate(shapes)]
    batch = collate(samples, pad_id=PAD)
    expected = []
    for row, one in enumerate(samples):
        for position in range(len(one.input_ids) - 1):
            if position + 1 >= one.num_prompt:  # the token after this position is one of the response
                expected.append((row, position, int(one.input_ids[position + 1])))
    found = zip(batch.rows_T.tolist(), batch.positions_T.tolist(), batch.gold_T.tolist(), strict=True)
    assert list(found) == expected
    assert batch.num_tokens == [r for _, r in shapes]


def test_labels_and_padding() -> None:
    batch = collate(SAMPLES, pad_id=PAD)
    length = max(len(one.input_ids) for one in SAMPLES)
    for row, one in enumerate(SAMPLES):
        size = len(one.input_ids)
        assert batch.inputs["input_ids"][row].tolist() == [*one.input_ids, *[PAD] * (length - size)]
        assert batch.inputs["attention_mask"][row].tolist() == [1] * size + [0] * (length - size)
        assert one.token_types is not None
        assert batch.inputs["mm_token_type_ids"][row].tolist() == [*one.token_types, *[0] * (length - size)]
        labels = [IGNORE_INDEX] * one.num_prompt + one.response_ids.tolist()
        assert batch.labels_BS[row].tolist() == labels + [IGNORE_INDEX] * (length - size)
    assert batch.inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 2, 2], [1, 4, 2]]
    assert len(batch.inputs["pixel_values"]) == 24 + 4 + 8
    assert all(tensor.dtype == torch.int64 for key, tensor in batch.inputs.items() if key != "pixel_values")


def test_text_only_batch() -> None:
    text = [Encoded(one.input_ids, one.num_prompt, one.response_ids) for one in (SAMPLES[0], SAMPLES[2])]
    assert set(collate(text, pad_id=PAD).inputs) == {"input_ids", "attention_mask"}
    assert set(collate([SAMPLES[0]], pad_id=PAD).inputs) == {"input_ids", "attention_mask", "mm_token_type_ids"}


def test_prompts_are_padded_on_the_left() -> None:
    inputs = collate_prompts(SAMPLES, pad_id=PAD)
    length = max(one.num_prompt for one in SAMPLES)
    for row, one in enumerate(SAMPLES):
        missing = length - one.num_prompt
        assert inputs["input_ids"][row].tolist() == [PAD] * missing + one.input_ids[: one.num_prompt].tolist()
        assert inputs["attention_mask"][row].tolist() == [0] * missing + [1] * one.num_prompt
        assert one.token_types is not None
        assert inputs["mm_token_type_ids"][row].tolist() == [0] * missing + one.token_types[: one.num_prompt].tolist()
    assert len(inputs["pixel_values"]) == 36


def test_uneven_patch_axis_is_padded() -> None:
    def with_patches(number: int) -> Encoded:
        media = {"pixel_values": np.ones((1, number, 3, 2, 2), dtype=np.float32), "batch_num_images": np.array([1])}
        return Encoded(np.array([1, 2]), 1, np.array([2]), None, media)

    inputs = collate([with_patches(2), with_patches(3)], pad_id=PAD).inputs
    assert inputs["pixel_values"].shape == (2, 3, 3, 2, 2)
    assert inputs["pixel_values"].sum(dim=(1, 2, 3, 4)).tolist() == [24, 36]
    assert inputs["batch_num_images"].tolist() == [1, 1]


def test_to_device() -> None:
    batch = collate(SAMPLES, pad_id=PAD).to("meta")
    assert isinstance(batch, Batch)
    tensors = [*batch.inputs.values(), batch.rows_T, batch.positions_T, batch.gold_T, batch.labels_BS]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.fixture(scope="module")
def model() -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": 63,
        "rope_parameters": {"rope_type": "default", "rope_theta": 16.0, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32, "patch_size": 4}
    ids = {"image_token_id": IMAGE, "video_token_id": 59, "vision_start_token_id": START, "vision_end_token_id": END}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **ids, tie_word_embeddings=False)
    return Qwen2VLForConditionalGeneration(config).eval()


@torch.no_grad()
def test_batch_equals_one_at_a_time(model: Qwen2VLForConditionalGeneration) -> None:
    batch = collate(SAMPLES, pad_id=PAD)
    together = model(**batch.inputs).logits[batch.rows_T, batch.positions_T]
    alone = []
    for one in SAMPLES:
        single = collate([one], pad_id=PAD)
        alone.append(model(**single.inputs).logits[0, one.num_prompt - 1 : len(one.input_ids) - 1])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_labels_are_what_the_model_expects(model: Qwen2VLForConditionalGeneration) -> None:
    batch = collate(SAMPLES, pad_id=PAD)
    output = model(**batch.inputs, labels=batch.labels_BS)
    own = torch.nn.functional.cross_entropy(output.logits[batch.rows_T, batch.positions_T], batch.gold_T)
    torch.testing.assert_close(output.loss, own)


@torch.no_grad()
def test_generation_from_left_padded_prompts(model: Qwen2VLForConditionalGeneration) -> None:
    def generate(samples: list[Encoded]) -> list[list[int]]:
        inputs = collate_prompts(samples, pad_id=PAD)
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=PAD)
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    assert generate(SAMPLES) == [generate([one])[0] for one in SAMPLES]
