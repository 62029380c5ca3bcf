"""Features of pictures: computed once, the same bits ever after, and those that the model makes by itself."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.helpers.families import (
    DECODER,
    HIDDEN_SIZE,
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    seen_sample,
    tiny_model,
)
from vlsi_cache.data.collate import PICTURES, collate
from vlsi_cache.data.sequence import Encoded
from vlsi_cache.data.vision import Pictures
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.features import PictureFeatures, features_of, keep_features

SHAPES = ((5, [(4, 8)]), (30, [(4, 4), (4, 8)]), (9, []), (20, [(8, 4)]), (14, [(4, 4)]))
MIB = 1 << 20


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen2_vl").requires_grad_(False)


@pytest.fixture
def samples() -> list[Encoded]:
    """The first picture is seen twice, in the first sample and in the last."""
    found = [seen_sample("qwen2_vl", length, pictures, seed) for seed, (length, pictures) in enumerate(SHAPES)]
    first, last = found[0], seen_sample("qwen2_vl", 12, [(4, 8)], 9)
    return [*found[:-1], replace(last, media=first.media)]


def with_held(samples: list[Encoded], features: PictureFeatures | None) -> list[Encoded]:
    """As the encoder gives them: pixels of those pictures alone that are not held."""
    named = []
    for sample in samples:
        if "pixel_values" not in sample.media:
            named.append(sample)
            continue
        grids, pixels = sample.media["image_grid_thw"], sample.media["pixel_values"]
        ends = np.cumsum(grids.prod(1))
        pieces = np.split(pixels, ends[:-1])
        digests = [piece.tobytes().hex()[:64] for piece in pieces]
        held = [None if features is None else features.get(digest) for digest in digests]
        fresh = [piece for piece, one in zip(pieces, held, strict=True) if one is None]
        media = {"image_grid_thw": grids, **({"pixel_values": np.concatenate(fresh)} if fresh else {})}
        named.append(replace(sample, media=media, pictures=Pictures(tuple(digests), tuple(held))))
    return named


def states(model: Any, samples: list[Encoded], *, packed: bool = False) -> dict[int, Tensor]:
    batch = collate(samples, pad_id=0, row_width=4096 * packed)
    return Backbone(model).capture(batch.inputs, [2], batch.rows_T, batch.positions_T)


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pictures of every run of the tower."""
    counts: list[int] = []
    tower = model.base_model.visual
    forward = tower.forward
    monkeypatch.setattr(
        tower, "forward", lambda *a, grid_thw, **k: counts.append(len(grid_thw)) or forward(*a, grid_thw=grid_thw, **k)
    )
    return counts


@pytest.mark.parametrize("packed", [False, True])
def test_states_are_the_model_s_own_and_the_tower_runs_once_a_picture(
    model: Any, samples: list[Encoded], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = states(model, samples, packed=packed)
    keep_features(model, MIB)
    features = features_of(model)
    assert features is not None
    counts = counted(model, monkeypatch)
    first = states(model, with_held(samples, features), packed=packed)
    assert counts == [1] * 4  # of five pictures two are the same
    assert len(features) == 4
    again = with_held(samples, features)
    assert not any("pixel_values" in sample.media for sample in again)
    for chosen in (again, list(reversed(again)), again[:1]):
        found = states(model, chosen, packed=packed)
        assert len(counts) == 4
        if chosen is again:
            for layer in wanted:
                torch.testing.assert_close(first[layer], wanted[layer], rtol=1e-4, atol=2e-5)
                assert torch.equal(found[layer], first[layer])


def test_a_batch_without_pictures_is_as_before(model: Any, samples: list[Encoded]) -> None:
    keep_features(model, MIB)
    batch = collate(with_held([samples[2]], features_of(model)), pad_id=0)
    assert PICTURES not in batch.inputs
    torch.testing.assert_close(states(model, [samples[2]]), states(model, with_held([samples[2]], features_of(model))))


def test_nothing_is_added_when_it_is_full(model: Any, samples: list[Encoded]) -> None:
    keep_features(model, 1100)  # the first picture's 8 tokens of 32 numbers, and no other
    features = features_of(model)
    assert features is not None
    for _ in range(2):
        found = states(model, with_held(samples, features))
        torch.testing.assert_close(found[2], states(model, samples)[2], rtol=1e-4, atol=2e-5)
    assert len(features) == 1


def test_features_made_without_a_gradient_can_be_trained_through(model: Any, samples: list[Encoded]) -> None:
    keep_features(model, MIB)
    with torch.inference_mode():
        states(model, with_held(samples, features_of(model)))
    model.get_output_embeddings().requires_grad_(True)
    model.base_model.language_model.layers.requires_grad_(True)
    found = states(model, with_held(samples, features_of(model)))
    found[2].square().sum().backward()
    assert all(p.grad is not None for p in model.base_model.language_model.layers[0].parameters())


def test_a_tower_that_trains_keeps_nothing(model: Any) -> None:
    keep_features(model, MIB)
    assert features_of(model) is not None
    model.base_model.visual.merger.requires_grad_(True)
    assert features_of(model) is None


def test_models_without_such_a_tower(capsys: pytest.CaptureFixture[str]) -> None:
    for family, why in (
        ("llama", "sees no pictures"),
        ("llava_onevision", "prepares the pictures of a sample together"),
    ):
        other = tiny_model(family)
        keep_features(other, 0)
        assert capsys.readouterr().err == ""
        keep_features(other, MIB)
        assert why in capsys.readouterr().err
        assert features_of(other) is None
    none = tiny_model("qwen2_vl").requires_grad_(False)
    keep_features(none, 0)
    assert features_of(none) is None


def test_features_of_pictures_of_qwen3_vl() -> None:
    """Its tower also makes features for deeper layers."""
    text = {**DECODER, "head_dim": 8}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    text["rope_parameters"]["rope_theta"] = 10000.0
    vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": HIDDEN_SIZE}
    vision |= {"patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    ids = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN}
    ids |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision, **ids)
    model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    shapes = ((5, [(4, 8)]), (30, [(4, 4), (4, 8)]), (9, []))
    samples = [seen_sample("qwen2_vl", length, pictures, seed) for seed, (length, pictures) in enumerate(shapes)]
    wanted = states(model, samples)
    keep_features(model, 1 << 20)
    features = features_of(model)
    assert features is not None
    for _ in range(2):
        found = states(model, with_held(samples, features))
        torch.testing.assert_close(found[2], wanted[2], rtol=1e-4, atol=2e-5)
