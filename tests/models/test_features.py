"""Features of pictures: computed once, the same bits ever after, and those that the model makes by itself."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
from vlsi_cache.config.sections import RunSpec
from vlsi_cache.data.collate import PICTURES, collate
from vlsi_cache.data.pictures import PictureGroup, Pictures
from vlsi_cache.data.sequence import Encoded
from vlsi_cache.models import features as features_module
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.feature_files import FeatureFiles
from vlsi_cache.models.features import Held, PictureFeatures, features_of, keep_features

SHAPES = ((5, [(4, 8)]), (30, [(4, 4), (4, 8)]), (9, []), (20, [(8, 4)]), (14, [(4, 4)]))
PIXEL_VALUES, GRID = "pixel_values", "image_grid_thw"
PIXELS = {"image_processor": "0", "pixel_path": "pil", "min_pixels": 16, "max_pixels": 4096}


@pytest.fixture(autouse=True)
def nothing_is_held_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_latest", {})


def keep(model: Any, mib: int = 1, disk_mib: int = 0, **pixels: Any) -> PictureFeatures | None:
    encoder: Any = SimpleNamespace(fingerprint=lambda: {**PIXELS, **pixels})
    keep_features(model, RunSpec(vision_cache_mib=mib, vision_disk_mib=disk_mib), encoder)
    return features_of(model)


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
        if PIXEL_VALUES not in sample.media:
            named.append(sample)
            continue
        grids, pixels = sample.media[GRID], sample.media[PIXEL_VALUES]
        ends = np.cumsum(grids.prod(1))
        pieces = np.split(pixels, ends[:-1])
        digests = [piece.tobytes().hex()[:64] for piece in pieces]
        groups = [
            PictureGroup(digest, len(piece) // 4, {PIXEL_VALUES: len(piece), GRID: 1}, json.dumps(grid.tolist()))
            for digest, piece, grid in zip(digests, pieces, grids, strict=True)
        ]
        if features is not None:
            held = [features.get(digest) for digest in digests]
            groups = [replace(one, held=found) for one, found in zip(groups, held, strict=True)]
            groups = [replace(one, num_rows={**one.num_rows, PIXEL_VALUES: 0}) if one.held else one for one in groups]
        fresh = [piece for piece, one in zip(pieces, groups, strict=True) if one.held is None]
        media = {GRID: grids, **({PIXEL_VALUES: np.concatenate(fresh)} if fresh else {})}
        named.append(replace(sample, media=media, pictures=Pictures(tuple(groups), features is not None)))
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
    features = keep(model)
    assert features is not None
    counts = counted(model, monkeypatch)
    first = states(model, with_held(samples, features), packed=packed)
    assert counts == [1] * 4  # of five pictures two are the same
    assert len(features) == 4
    again = with_held(samples, features)
    assert not any(PIXEL_VALUES in sample.media for sample in again)
    for chosen in (again, list(reversed(again)), again[:1]):
        found = states(model, chosen, packed=packed)
        assert len(counts) == 4
        if chosen is again:
            for layer in wanted:
                torch.testing.assert_close(first[layer], wanted[layer], rtol=1e-4, atol=2e-5)
                assert torch.equal(found[layer], first[layer])


def test_a_batch_without_pictures_is_as_before(model: Any, samples: list[Encoded]) -> None:
    keep(model)
    batch = collate(with_held([samples[2]], features_of(model)), pad_id=0)
    assert PICTURES not in batch.inputs
    torch.testing.assert_close(states(model, [samples[2]]), states(model, with_held([samples[2]], features_of(model))))


def test_nothing_is_added_when_it_is_full(model: Any, samples: list[Encoded]) -> None:
    features = keep(model)
    assert features is not None
    features.limit(1100, None)  # the first picture's 8 tokens of 32 numbers, and no other
    for _ in range(2):
        found = states(model, with_held(samples, features))
        torch.testing.assert_close(found[2], states(model, samples)[2], rtol=1e-4, atol=2e-5)
    assert len(features) == 1


def test_features_made_without_a_gradient_can_be_trained_through(model: Any, samples: list[Encoded]) -> None:
    keep(model)
    with torch.inference_mode():
        states(model, with_held(samples, features_of(model)))
    model.get_output_embeddings().requires_grad_(True)
    model.base_model.language_model.layers.requires_grad_(True)
    found = states(model, with_held(samples, features_of(model)))
    found[2].square().sum().backward()
    assert all(p.grad is not None for p in model.base_model.language_model.layers[0].parameters())


def test_a_tower_that_trains_keeps_nothing(model: Any) -> None:
    assert keep(model) is not None
    model.base_model.visual.merger.requires_grad_(True)
    assert features_of(model) is None


def test_models_without_such_a_tower(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def older(self: Any, input_ids: Tensor, pixel_values: Tensor) -> None:
        pass

    monkeypatch.setattr(type(model.base_model), "forward", older)
    for other, why in ((tiny_model("llama"), "it sees no pictures"), (model, "takes no `mm_encoder_outputs`")):
        keep(other, 0)
        assert capsys.readouterr().err == ""
        keep(other)
        assert why in capsys.readouterr().err
        assert features_of(other) is None


def test_a_picture_that_is_in_a_batch_twice_runs_once_where_nothing_is_kept(
    model: Any, samples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, counts = states(model, samples), counted(model, monkeypatch)
    for packed in (False, True):
        found = states(model, with_held(samples, None), packed=packed)
        torch.testing.assert_close(found[2], wanted[2], rtol=1e-4, atol=2e-5)
    assert counts == [4, 4]  # of five pictures two are the same, and all go through the tower together
    states(model, with_held(samples[:2], None))
    assert counts == [4, 4, 3]
    # A model that takes no features is given all pixels.
    monkeypatch.setattr(features_module, "_takes_features", lambda _: False)
    assert torch.equal(states(model, with_held(samples, None))[2], wanted[2])
    assert counts == [4, 4, 3, 5]


def test_features_that_come_of_the_text_stack_are_not_kept(
    model: Any, samples: list[Encoded], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body, features = model.base_model, keep(model)
    own = body.get_image_features

    def through_embedding(pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any) -> Any:
        body.get_input_embeddings()(torch.zeros(1, dtype=torch.long))
        return own(pixel_values, image_grid_thw, **kwargs)

    wanted = states(model, samples)
    monkeypatch.setattr(body, "get_image_features", through_embedding)
    torch.testing.assert_close(states(model, with_held(samples, features))[2], wanted[2], rtol=1e-4, atol=2e-5)
    assert "nothing is kept for `qwen2_vl`: they use `embed_tokens` of its text stack" in capsys.readouterr().err
    assert features_of(model) is None
    assert features is not None
    assert len(features) == 0


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
    features = keep(model)
    assert features is not None
    for _ in range(2):
        found = states(model, with_held(samples, features))
        torch.testing.assert_close(found[2], wanted[2], rtol=1e-4, atol=2e-5)


def again(model: Any) -> Any:
    """The same weights in another object, as another command loads them."""
    other = tiny_model("qwen2_vl").requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return other


def test_models_of_one_tower_share_them(model: Any, samples: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    features = keep(model)
    wanted = states(model, with_held(samples, features))
    student = again(model)
    with torch.no_grad():
        student.base_model.language_model.layers[0].mlp.up_proj.weight.mul_(2)
    counts = counted(student, monkeypatch)
    assert keep(student) is features
    assert not torch.equal(states(student, with_held(samples, features))[2], wanted[2])
    assert counts == []


@pytest.mark.parametrize("change", ["weights", "pixels"])
def test_another_tower_or_other_pixels_share_nothing(model: Any, samples: list[Encoded], change: str) -> None:
    features = keep(model)
    states(model, with_held(samples, features))
    other, pixels = again(model), {}
    if change == "weights":
        with torch.no_grad():
            other.base_model.visual.blocks[0].mlp.fc1.bias[0] += 1
    else:
        pixels = {"max_pixels": 1024}
    found = keep(other, **pixels)
    assert found is not features
    assert found is not None
    assert len(found) == 0
    assert features_of(model) is features


def test_files_serve_a_later_command(
    model: Any, samples: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLSI_CACHE_ROWS", str(tmp_path))
    wanted = states(model, with_held(samples, keep(model, 0, disk_mib=1)))
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 4
    # One is cut short and one has another bit: both are made again.
    files[0].write_bytes(files[0].read_bytes()[:-3])
    files[1].write_bytes(files[1].read_bytes()[:-3] + b"\x7f\x00\x01")
    monkeypatch.setattr(features_module, "_latest", {})
    later = again(model)
    counts = counted(later, monkeypatch)
    features = keep(later, 0, disk_mib=1)
    assert features is not None
    found = states(later, with_held(samples, features))
    assert torch.equal(found[2], wanted[2])
    assert 1 <= len(counts) <= 3  # the two, of which one may be the picture that is seen twice
    assert len(features) == 0  # the memory keeps none of them
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def held(numbers: int) -> Held:
    return Held(torch.arange(float(numbers)))


def test_files_stay_below_their_limit_and_old_towers_go_first(tmp_path: Path) -> None:
    def stored(key: str, mib: float, names: str) -> set[str]:
        features = PictureFeatures(0, FeatureFiles(tmp_path, key, int(mib * 2**20)))
        for name in names:
            features.put(name * 64, held(1 << 16))  # 256 KiB
        return {path.name[0] for path in tmp_path.rglob(f"features-{key}/*/*.safetensors")}

    assert stored("one", 1, "abcdef") == set("abc")  # with what a file says of itself, no four go into a MiB
    assert stored("one", 1, "fg") == set("abc")
    assert stored("two", 2, "hi") == set("hi")
    os.utime(tmp_path / "features-one", (0, 0))
    assert stored("three", 2, "klmno") == set("klmno")
    assert not (tmp_path / "features-one").exists()
    assert (tmp_path / "features-two").exists()


def test_what_a_killed_process_has_left_goes_after_a_day(tmp_path: Path) -> None:
    old, young = (tmp_path / "features-one" / "ab" / f".{name}.safetensors.tmp-1" for name in ("old", "young"))
    for file in (old, young):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
    os.utime(old, (0, 0))
    FeatureFiles(tmp_path, "one", 1 << 20)
    assert not old.exists()
    assert young.exists()


def test_a_full_disk_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    files = FeatureFiles(tmp_path, "one", 1 << 20)
    monkeypatch.setattr("vlsi_cache.models.feature_files.save_file", full)
    features = PictureFeatures(1 << 20, files)
    features.put("a" * 64, held(8))
    features.put("b" * 64, held(8))
    assert capsys.readouterr().err.count("the disk is full") == 1
    assert len(features) == 2


def test_where_nothing_can_be_kept_it_is_said(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLSI_CACHE_ROWS", "off")
    assert keep(model, 0, disk_mib=1) is not None
    assert "VLSI_CACHE_ROWS is off" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLSI_CACHE_ROWS", str(tmp_path / "file"))
    assert keep(again(model), 0, disk_mib=1) is not None
    assert "nothing can be kept in" in capsys.readouterr().err


def test_a_file_under_another_name_is_of_no_picture(tmp_path: Path) -> None:
    files = FeatureFiles(tmp_path, "key", 1 << 20)
    for name, value in (("aa11", 1.0), ("aa22", 2.0)):
        files.put(name, {"features-00": torch.full((2, 3), value)})
    one, other = (tmp_path / "features-key" / "aa" / f"{name}.safetensors" for name in ("aa11", "aa22"))
    other.write_bytes(one.read_bytes())
    assert files.get("aa22") is None
    assert not other.exists()
    found = files.get("aa11")
    assert found is not None
    assert found["features-00"].tolist() == [[1.0] * 3] * 2
