"""Quantised weights as transformers loads them: a teacher may be, a student may not.

FP8 checkpoints are the ones that need no other package: without a GPU transformers unpacks them.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import save_model, write_spec
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import vlsi_cache as vc
from vlsi_cache.data.records import read_records
from vlsi_cache.errors import FingerprintMismatchError, ModelError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.probe import checked_backbone
from vlsi_cache.models.save import init_student

IDS_BS = torch.arange(3, 13)[None]
BLOCK = 16


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "plain", num_layers=3, hidden=32, seed=4)


def with_settings(source: Path, out: Path, quantization: dict[str, Any]) -> Path:
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return out


@pytest.fixture(scope="module")
def fp8(plain: Path) -> Path:
    """As DeepSeek and Qwen publish theirs: blocks of 8-bit weights with a scale for each, head and norms in full."""
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    folder = with_settings(plain, plain.parent / "fp8", settings)
    weights = {}
    for name, weight_OI in load_file(folder / "model.safetensors").items():
        weights[name] = weight_OI
        if ".layers." in name and weight_OI.ndim == 2:
            blocks = weight_OI.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # [O / 16, 16, I / 16, 16]
            scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            small = (blocks / scale[:, None, :, None]).flatten(0, 1).flatten(1, 2)
            weights[name] = small.to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def unpacked(fp8: Path, plain: Path) -> Any:
    """The plain model with the numbers that the 8-bit weights stand for."""
    model = AutoModelForCausalLM.from_pretrained(plain)
    stored = load_file(fp8 / "model.safetensors")
    for name, scale in stored.items():
        if name.endswith("_scale_inv"):
            weight = stored[name.removesuffix("_scale_inv")].float()
            wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            model.get_parameter(name.removesuffix("_scale_inv")).data = weight * wide
    return model.eval()


def test_a_quantised_teacher_is_recorded_with_its_settings(
    fp8: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = vc.load_spec(write_spec(tmp_path, fp8, num_rows=6), overrides=["teacher.layers=[1]", "distill.layers=[1]"])
    cache = vc.build_teacher(spec, out=tmp_path / "cache")
    assert "its weights are quantised (fp8)" in capsys.readouterr().err
    settings = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    stored = json.loads((tmp_path / "cache" / "cache.json").read_text())["fingerprint"]
    assert stored["teacher.quantization"] == settings
    with torch.no_grad():
        wanted = unpacked(fp8, plain)(IDS_BS).logits
        rounded = AutoModelForCausalLM.from_pretrained(plain)(IDS_BS).logits
        found = ModelRef(fp8).load()(IDS_BS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (rounded - wanted).abs().max() > 0.01
    with pytest.raises(
        ModelError, match=r"student .*weights are quantised \(`fp8`.*name the model that it was made of"
    ):
        vc.distill(cache, student=str(fp8), out=tmp_path / "run")
    with pytest.raises(ModelError, match=r"student .*weights are quantised"):
        init_student(fp8, [0, 2], tmp_path / "small")
    # Other settings over the same files are another teacher.
    other = with_settings(fp8, tmp_path / "other", {**settings, "activation_scheme": "static"})
    assert ModelRef(other).digest == ModelRef(fp8).digest
    changed = spec.model_copy(update={"teacher": spec.teacher.model_copy(update={"model": str(other)})})
    with pytest.raises(FingerprintMismatchError, match=r"`teacher.quantization`: .*dynamic.*static"):
        vc.build_teacher(changed, out=tmp_path / "cache")


def test_an_adapter_on_quantised_weights_stays_beside_them(fp8: Path, tmp_path: Path) -> None:
    """Merged, its sum with a weight would be rounded to 8 bits again, and say something else than was trained."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(fp8), config).save_pretrained(folder)
    named = ModelRef(folder)
    adapted: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(fp8), str(folder)).eval()
    found = named.load()
    with torch.no_grad():
        torch.testing.assert_close(found(IDS_BS).logits, adapted(IDS_BS).logits, rtol=0, atol=1e-5)
    assert any("lora" in name for name, _ in found.named_parameters())
    assert checked_backbone(found, named.encoder()).num_layers == 3
    assert named.quantization == ModelRef(fp8).quantization
    assert [note for note in named.notes if "runs beside the quantised weights of" in note]
    # And so it teaches.
    file = write_spec(tmp_path, folder, num_rows=4)
    spec = vc.load_spec(file, overrides=["teacher.layers=[1]", "distill.layers=[1]", "store.profile=exact"])
    cache = vc.build_teacher(spec, out=tmp_path / "cache")
    encoder = named.encoder()
    for record in read_records(spec.data):
        sample, row = encoder.encode(record), cache[record.id]
        with torch.no_grad():
            logits_SV = adapted(torch.from_numpy(sample.input_ids)[None]).logits[0, :, : encoder.vocab_size]
        logprobs_TV = logits_SV[sample.num_prompt - 1 : -1].log_softmax(-1).numpy()
        wanted_TK = np.take_along_axis(logprobs_TV, row.ids_LTK[-1].astype(np.int64), 1)
        np.testing.assert_allclose(row.logprobs_LTK[-1], wanted_TK, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
    ],
)
def test_a_package_that_is_missing_is_named(plain: Path, tmp_path: Path, settings: Any, package: str) -> None:
    named = ModelRef(with_settings(plain, tmp_path / "m", settings))
    assert named.quantization == settings
    assert named.empty() is not None  # `plan` needs no package
    if find_spec(package.replace("-", "_")) is None:
        with pytest.raises(ModelError, match=f"it cannot be loaded: .*{package}"):
            named.load()


@torch.no_grad()
def test_torchao_s_weights_are_those_that_transformers_loads(plain: Path, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    shutil.copytree(plain, tmp_path / "m")
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings).save_pretrained(tmp_path / "m")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    named = ModelRef(tmp_path / "m")
    backbone = checked_backbone(named.load(), named.encoder())
    torch.testing.assert_close(backbone.model(IDS_BS).logits, model(IDS_BS).logits, rtol=0, atol=0)
    assert named.quantization is not None
    assert named.quantization["quant_method"] == "torchao"
    # An adapter is as it was trained; merged and rounded again it is 0.2 nats off.
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "a")
    found = ModelRef(tmp_path / "a").load()
    torch.testing.assert_close(found(IDS_BS).logits, adapted(IDS_BS).logits, rtol=0, atol=1e-5)
    model = adapted.unload()
    model.lm_head.weight = torch.nn.Parameter(model.model.layers[0].mlp.up_proj.weight.data, requires_grad=False)
    with pytest.raises(ModelError, match=r"its language head is quantised \(`Int8Tensor`.*modules_to_not_convert"):
        Backbone(model)
