"""Features of pictures in families whose processor prepares the pictures of a sample together.

The oracle is transformers' own forward pass with all pixels.

Legend: T response tokens, D hidden size.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.runs import metrics_of
from helpers.vlms import importable_processors, picture_rows, save_vlm
from torch import Tensor

import vlsi_cache as vc
from vlsi_cache.config.sections import DataSpec, RunSpec
from vlsi_cache.data.collate import PICTURES, Batch, collate
from vlsi_cache.data.encoder import Encoder, load_encoder
from vlsi_cache.data.images import Media
from vlsi_cache.data.pictures import Recorder, StandIn
from vlsi_cache.data.records import Record, read_records
from vlsi_cache.models import features as features_module
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.features import PictureFeatures, features_of, keep_features
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.lora import add_lora

# `test_vlms.py` has all others too: its builds and runs keep features.
FAMILIES = ("llava_onevision", "llava_next", "internvl", "idefics3", "gemma3", "mistral3", "paligemma")
LAYER = 2
# The picture of the first sample is that of the third, and in the second one beside another.
SIZES = [[(16, 40)], [(16, 40), (12, 20)], [(16, 40)], [(30, 9)]]
NUM_GROUPS = 3


@pytest.fixture(autouse=True)
def nothing_is_held_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_latest", {})
    importable_processors(monkeypatch)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    file = picture_rows(folder, SIZES)
    for name in ("1-0.png", "2-0.png"):
        shutil.copy(folder / "0-0.png", folder / name)
    return file


@pytest.fixture(scope="module")
def records(rows: Path) -> list[Record]:
    return list(read_records(DataSpec(path=str(rows))))


def loaded(folder: Path, family: str) -> tuple[Any, Encoder]:
    path = save_vlm(folder / family, family)
    return ModelRef(path).load().requires_grad_(False), load_encoder(path)


def keep(model: Any, encoder: Encoder, mib: int = 8, disk_mib: int = 0) -> PictureFeatures:
    keep_features(model, RunSpec(vision_cache_mib=mib, vision_disk_mib=disk_mib), encoder)
    found = features_of(model)
    assert found is not None
    return found


def batch_of(encoder: Encoder, records: list[Record], features: PictureFeatures | None, row_width: int = 0) -> Batch:
    samples = encoder.encode_all(records, features=features)
    return collate(samples, pad_id=encoder.pad_id, row_width=row_width)


def states(model: Any, batch: Batch) -> dict[int, Tensor]:
    return Backbone(model).capture(batch.inputs, [LAYER], batch.rows_T, batch.positions_T)


@torch.no_grad()
def own_states(model: Any, encoder: Encoder, record: Record) -> dict[int, Tensor]:
    """By transformers' own forward pass over all pixels."""
    batch = collate([encoder.encode(record)], pad_id=encoder.pad_id)
    assert PICTURES not in batch.inputs
    hidden = model(**batch.inputs, output_hidden_states=True, use_cache=False).hidden_states
    num_layers = model.config.get_text_config().num_hidden_layers
    return {layer: hidden[layer][0, batch.positions_T] for layer in (LAYER, num_layers)}


@contextmanager
def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[int], list[str]]]:
    """The runs of the vision tower, and the pictures that are decoded."""
    body = Backbone(model).plain.base_model
    tower = getattr(body, "vision_tower", None) or body.vision_model
    runs: list[int] = []
    opened: list[str] = []
    read = Media.open
    handle = tower.register_forward_hook(lambda *_: runs.append(1))
    with monkeypatch.context() as patch:
        patch.setattr(Media, "open", lambda own: opened.append(own.sha256) or read(own))
        yield runs, opened
    handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_the_model_s_own_and_pictures_are_prepared_once(
    family: str, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = loaded(tmp_path, family)
    wanted = [own_states(model, encoder, record) for record in records]
    joined = {layer: torch.cat([one[layer] for one in wanted]) for layer in wanted[0]}

    def assert_right(found: dict[int, Tensor]) -> None:
        for layer, wanted_TD in joined.items():
            torch.testing.assert_close(found[layer], wanted_TD, rtol=1e-5, atol=1e-5)

    width = 4096 * (family not in ("gemma3", "paligemma"))
    with counted(model, monkeypatch) as (runs, opened):
        for row_width in (0, width):  # nothing is kept: the picture that is there twice runs once, with the others
            assert_right(states(model, batch_of(encoder, records, None, row_width)))
        assert len(runs) == 2
        runs.clear()
        features = keep(model, encoder)
        first = states(model, batch_of(encoder, records, features))
        assert len(runs) == len(features) == NUM_GROUPS
        assert_right(first)
        opened.clear()
        batch = batch_of(encoder, records, features)
        assert torch.equal(states(model, batch)[LAYER], first[LAYER])
        assert_right(states(model, batch_of(encoder, records, features, width)))
        for record, own in zip(records, wanted, strict=True):  # not even rounding differs where nothing is padded
            found = states(model, batch_of(encoder, [record], features))
            assert all(torch.equal(found[layer], own[layer]) for layer in own)
        assert len(runs) == NUM_GROUPS
        assert opened == []


def test_gradients_of_an_adapter_are_those_with_pixels(records: list[Record], tmp_path: Path) -> None:
    model, encoder = loaded(tmp_path, "llava_onevision")
    features = keep(model, encoder)
    student = add_lora(model, rank=2, alpha=2, dropout=0.0)
    torch.manual_seed(0)
    trained = {name: one for name, one in student.named_parameters() if one.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(0, 0.1)
    gradients = []
    for kept in (None, features, features):
        assert features_of(student) is features
        found = states(student, batch_of(encoder, [records[1]], kept))
        torch.stack([state.square().mean() for state in found.values()]).sum().backward()
        gradients.append({name: one.grad for name, one in trained.items()})
        student.zero_grad()
    assert len(features) == 1
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradient, gradients[1][name])
        assert torch.equal(gradient, gradients[2][name])


@pytest.mark.parametrize(("family", "part"), [("llava_onevision", "image_newline"), ("idefics3", "connector")])
def test_a_part_of_the_tower_by_any_name_trains(family: str, part: str, tmp_path: Path) -> None:
    model, encoder = loaded(tmp_path, family)
    keep(model, encoder)
    model.get_output_embeddings().requires_grad_(True)
    model.get_input_embeddings().requires_grad_(True)
    assert features_of(model) is not None
    getattr(model.base_model, part).requires_grad_(True)
    assert features_of(model) is None


def test_what_a_picture_becomes_depends_on_its_sample(records: list[Record], tmp_path: Path) -> None:
    """LLaVA-OneVision cuts a picture into crops only when it is alone."""
    model, encoder = loaded(tmp_path, "llava_onevision")
    features = keep(model, encoder)
    states(model, batch_of(encoder, records[:2], features))
    batches = [batch_of(encoder, [record], features) for record in records[:2]]
    alone, beside = (batch.inputs[PICTURES].groups[0].held for batch in batches)
    assert len(alone.features) > len(beside.features)  # of two pictures


def test_a_projector_of_other_weights_shares_nothing(tmp_path: Path) -> None:
    model, encoder = loaded(tmp_path, "llava_onevision")
    features = keep(model, encoder)
    again: Any = ModelRef(tmp_path / "llava_onevision").load().requires_grad_(False)
    again.base_model.language_model.layers[0].mlp.up_proj.weight.data.mul_(2)
    assert keep(again, encoder) is features
    other: Any = ModelRef(tmp_path / "llava_onevision").load().requires_grad_(False)
    other.base_model.image_newline.data.add_(1)
    assert keep(other, encoder) is not features


def test_files_and_a_memory_that_is_full(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLSI_CACHE_ROWS", str(tmp_path / "kept"))
    model, encoder = loaded(tmp_path, "idefics3")
    wanted = states(model, batch_of(encoder, records, keep(model, encoder, mib=0, disk_mib=8)))
    files = sorted((tmp_path / "kept").rglob("*.safetensors"))
    assert len(files) == NUM_GROUPS
    files[0].write_bytes(files[0].read_bytes()[:-3])
    monkeypatch.setattr(features_module, "_latest", {})
    later = ModelRef(tmp_path / "idefics3").load().requires_grad_(False)
    features = keep(later, encoder, mib=0, disk_mib=8)
    with counted(later, monkeypatch) as (runs, opened):
        assert torch.equal(states(later, batch_of(encoder, records, features))[LAYER], wanted[LAYER])
        assert len(runs) == 1
        assert len(opened) in (1, 2)  # as the group of that file has one picture, in one sample or two, or two pictures
    assert len(features) == 0
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == NUM_GROUPS


def test_a_processor_that_looks_at_the_pixels_is_given_them(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then only the tower is spared: also where what was said about a picture cannot be written."""
    model, encoder = loaded(tmp_path, "llava")
    features = keep(model, encoder)
    said = StandIn.__call__
    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "__call__", lambda *a, **k: {**said(*a, **k), "pixel_values": torch.zeros(1, 3, 4, 4)})
        wanted = states(model, batch_of(encoder, [records[0]], features))
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "about", lambda _: "")
        states(model, batch_of(encoder, [records[3]], features))
    with counted(model, monkeypatch) as (runs, opened):
        assert torch.equal(states(model, batch_of(encoder, [records[0]], features))[LAYER], wanted[LAYER])
        states(model, batch_of(encoder, [records[3]], features))
        assert (len(runs), len(opened)) == (0, 2)


def test_losses_of_a_run_are_those_without(rows: Path, tmp_path: Path) -> None:
    teacher = save_vlm(tmp_path / "teacher", "llava_onevision")
    student = save_vlm(tmp_path / "student", "llava_onevision", num_layers=2, hidden=16, seed=2)
    schedule = {"steps": 2, "learning_rate": 0.01}
    spec = {
        "name": "kept",
        "teacher": {"model": str(teacher), "dtype": "float32", "layers": [1, 3]},
        "data": {"path": str(rows), "max_length": 250},
        "rows": {"top_k": 8},
        "distill": {"recipe": "last", "batch_size": 4, "micro_batch_size": 2, "lora": {"rank": 2, "alpha": 2}}
        | {"interact": {"schedule": schedule}, "sft": {"schedule": schedule}},
        "run": {"device": "cpu", "batch_tokens": 300},
    }
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec))
    cache = vc.build_teacher(vc.load_spec(file), out=tmp_path / "cache")
    losses = []
    for mib in (0, 8):
        run = vc.distill(
            cache, student=str(student), out=tmp_path / f"run-{mib}", overrides=[f"run.vision_cache_mib={mib}"]
        )
        losses.append([line["loss"] for line in metrics_of(run) if "loss" in line])
    assert min(losses[0]) > 0.1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(*features_module._latest.values()) == NUM_GROUPS
