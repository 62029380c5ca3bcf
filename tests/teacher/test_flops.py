"""The arithmetic of a teacher's forward against torch's own counter, on tiny models of every family."""

import html

import pytest
import torch
from helpers.families import tiny_inputs, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import vlsi_cache as vc
from vlsi_cache.errors import SpecError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.teacher.plan import forward_flops, gpu_peak, picture_patches


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
