"""Adapters: folders that hold one, mixtures of experts, and what has to be mended before a student is saved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import save_model, write_spec
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import vlsi_cache as vc
from vlsi_cache.config.spec import load_spec
from vlsi_cache.errors import ModelError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.lora import add_lora, experts_of, merge_lora, reach_note
from vlsi_cache.models.save import mend_generation

from helpers.probe_models import make_model  # isort: skip

IDS_BS = torch.arange(3, 13)[None]


def save_adapter(base: Path, out: Path, *, seed: int = 0, named: str | None = None) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(out)
    file = out / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": named or str(base)}))
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "base", num_layers=3, hidden=16, seed=4)


@torch.no_grad()
def test_a_folder_with_an_adapter_alone_is_its_base_with_it(base: Path) -> None:
    folder = save_adapter(base, base.parent / "adapter", named="../base")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))(IDS_BS).logits
    plain = ModelRef(base).load()(IDS_BS).logits
    found = ModelRef(folder).load()
    torch.testing.assert_close(found(IDS_BS).logits, expected, rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 0.1
    assert not any("lora" in name for name, _ in found.named_parameters())
    assert ModelRef(folder).config.num_hidden_layers == 3
    assert ModelRef(folder).encoder().name == str(base)
    digests = {ModelRef(base).digest, ModelRef(folder).digest, ModelRef(save_adapter(base, folder, seed=1)).digest}
    assert len(digests) == 3


@torch.no_grad()
def test_an_adapter_beside_the_weights_is_applied_and_hashed(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(base, folder)
    before = ModelRef(folder).digest
    assert before == ModelRef(base).digest
    save_adapter(base, folder, named="not/there")
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS_BS).logits  # transformers applies it without a word
    torch.testing.assert_close(ModelRef(folder).load()(IDS_BS).logits, expected, rtol=0, atol=1e-5)
    assert ModelRef(folder).digest != before
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no `adapter_model.safetensors`"):
        _ = ModelRef(folder).digest


def test_an_adapter_teaches_and_learns(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_adapter(base, tmp_path / "adapter")
    spec = load_spec(
        str(write_spec(tmp_path, folder, num_rows=8)), overrides=["teacher.layers=[1]", "distill.layers=[1]"]
    )
    cache = vc.build_teacher(spec, out=tmp_path / "cache")
    assert cache.header.fingerprint["teacher.weights"] == ModelRef(folder).digest
    assert f"merged into the weights of {base}" in capsys.readouterr().err
    run = vc.distill(
        cache, student=str(folder), out=tmp_path / "run", recipe="last", overrides=["distill.sft.fraction=0"]
    )
    student = ModelRef(run / "student").load()
    assert not (run / "student" / "adapter_config.json").exists()
    assert (run / "student" / "tokenizer.json").is_file()
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in ModelRef(base).load().parameters())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@torch.no_grad()
def test_experts_are_adapted_and_merged(family: str) -> None:
    model, before = make_model(family), make_model(family)(IDS_BS).logits
    note = reach_note(model, 0.0)
    adapted: Any = add_lora(model, rank=2, alpha=2.0, dropout=0.0)
    touched = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("experts" in name for name in touched)
    assert "tensors of experts, " in note
    assert int(note.split(", ")[-1].split("%")[0]) >= 90
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.1)
    expected = adapted(IDS_BS).logits
    assert (expected - before).abs().max() > 0.01
    Backbone(adapted).capture({"input_ids": IDS_BS}, [1], torch.zeros(1).long(), torch.ones(1).long())
    merged = merge_lora(adapted)
    torch.testing.assert_close(merged(IDS_BS).logits, expected, rtol=0, atol=1e-4)
    assert {name for name, _ in merged.named_parameters()} == {
        name for name, _ in make_model(family).named_parameters()
    }


def test_experts_out_of_reach_are_said_with_the_share() -> None:
    model = make_model("mixtral")
    all_weights = sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim > 1)
    linears = sum(one.weight.numel() for one in model.model.layers.modules() if isinstance(one, torch.nn.Linear))
    assert f"reaches {linears / all_weights:.0%} of the decoder layers' weights" in reach_note(model, 0.1)
    adapted = add_lora(model, rank=2, alpha=2.0, dropout=0.1)
    assert not any("experts" in name for name, weight in adapted.named_parameters() if weight.requires_grad)
    assert reach_note(make_model("llama"), 0.1) == ""
    assert experts_of(make_model("mamba")) == []  # its convolutions are no experts


def test_gpt2s_own_linear_layers_are_adapted() -> None:
    adapted = add_lora(make_model("gpt2"), rank=2, alpha=2.0, dropout=0.0)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 4 * 3


def test_mamba_is_adapted_where_peft_allows_it() -> None:
    options = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 30}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **options))
    adapted = add_lora(model, rank=2, alpha=2, dropout=0.0)
    names = [name for name, one in adapted.named_parameters() if one.requires_grad]
    assert any(".in_proj." in name for name in names)
    assert not any(".out_proj." in name for name in names)


def test_generation_settings_that_cannot_be_saved_are_put_back(tmp_path: Path) -> None:
    generation = GenerationConfig(temperature=0.9, top_p=0.6, eos_token_id=2)
    assert sorted(mend_generation(generation)) == ["temperature", "top_p"]
    generation.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    sampling = GenerationConfig(do_sample=True, temperature=0.9)
    assert mend_generation(sampling) == []
    assert sampling.temperature == 0.9
