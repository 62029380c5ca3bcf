"""The arithmetic of a teacher's forward against torch's own counter, on tiny models of every family."""

import html
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import tiny_inputs, tiny_model
from helpers.tiny import write_spec
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import vlsi_cache as vc
from vlsi_cache.config.training import TraversalSpec
from vlsi_cache.errors import SpecError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.traversal import add_traversal, answering
from vlsi_cache.models.traversal_files import save_traversed
from vlsi_cache.teacher.plan import forward_flops, gpu_peak, num_passes, picture_patches


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_vl", "llava_onevision"])
@torch.no_grad()
def test_flops_are_those_that_torch_counts(family: str) -> None:
    model, inputs = tiny_model(family), tiny_inputs(family)
    model.set_attn_implementation("eager")  # torch does not count its fused attention on a CPU
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    num_rows, length = inputs["input_ids"].shape
    head = 2 * Backbone(model).head_weight.numel() * num_rows * length
    patches = {"qwen2_vl": [16, 16], "llava_onevision": [4] * 4}.get(family, [])
    found = forward_flops(model, [length] * num_rows, patches)
    assert found.total == pytest.approx(counter.get_total_flops() - head, rel=0.03)
    assert (found.vision > 0) == bool(patches)
    # The square is the square: three times the length, nine times the attention and three times the rest.
    longer = forward_flops(model, [3 * length] * num_rows, patches)
    assert (longer.attention, longer.weights, longer.vision) == (9 * found.attention, 3 * found.weights, found.vision)


@pytest.mark.parametrize(
    "settings",
    [TraversalSpec(), TraversalSpec(mode="all", num_passes=3), TraversalSpec(mixing="first")],
    ids=["prompt", "all", "first"],
)
@torch.no_grad()
def test_every_pass_of_a_traversed_layer_is_counted(settings: TraversalSpec) -> None:
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    model.set_attn_implementation("eager")
    add_traversal(model, settings)
    ids_BS = inputs["input_ids"]
    responses_BS = torch.arange(ids_BS.shape[1]).expand(ids_BS.shape) > 2
    with FlopCounterMode(display=False) as counter, answering(model, responses_BS):
        model(**inputs, use_cache=False)
    head = 2 * Backbone(model).head_weight.numel() * ids_BS.numel()
    found = forward_flops(model, [ids_BS.shape[1]] * len(ids_BS), [], passes=num_passes(settings))
    assert found.total == pytest.approx(counter.get_total_flops() - head, rel=0.03)


def test_the_plan_of_a_traversed_teacher(teacher_folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(teacher_folder)
    add_traversal(model, TraversalSpec())
    save_traversed(model, tmp_path / "traversed")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "traversed")
    file = write_spec(tmp_path, teacher_folder, num_rows=4)
    plain = vc.plan(vc.load_spec(file))
    twice = vc.plan(vc.load_spec(file, overrides=[f"teacher.model={tmp_path / 'traversed'}"]))
    assert twice.attention_flops == 2 * plain.attention_flops
    assert 1.2 * plain.teacher_flops < twice.teacher_flops < 2 * plain.teacher_flops  # the heads run once


def test_gpus_by_name() -> None:
    assert gpu_peak("h100") == ("H100", 989.0)
    assert gpu_peak("rtx-4090") == gpu_peak("RTX4090") == ("RTX 4090", 165.0)
    with pytest.raises(SpecError, match="no GPU `V100` in the table of peaks; known: A100, B200, H100"):
        gpu_peak("V100")


def test_a_single_picture_is_cut_into_crops() -> None:
    config = tiny_model("llava_onevision").config
    config.image_grid_pinpoints = [[8, 16], [16, 16]]  # (height, width)
    assert picture_patches(object(), config, [(16, 8)]) == [4] * 3
    assert picture_patches(object(), config, [(16, 16)]) == [4] * 5
    assert picture_patches(object(), config, [(16, 8), (8, 8)]) == [4] * 2


def test_the_plan_names_the_gpu_it_assumes() -> None:
    spec = vc.load_spec("demo", overrides=["data.options.num_samples=6"])
    on_h100, on_l40s = vc.plan(spec), vc.plan(spec, gpu="l40s")
    assert "hours of one H100, if it reaches 40 % of its 989 TFLOP/s in bf16" in str(on_h100)
    assert on_h100._repr_html_() == f"<pre>{html.escape(str(on_h100))}</pre>"
    assert on_l40s.hours / on_h100.hours == pytest.approx(989 / 362)
    assert on_h100.vision_flops > 0 < on_h100.attention_flops < on_h100.teacher_flops
    assert on_h100.hours == pytest.approx(on_h100.teacher_flops / (0.4 * 989e12 * 3600))
