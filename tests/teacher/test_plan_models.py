"""What `plan` and a build say of a model that cannot be used, before any weight is loaded."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import save_tokenizer, write_spec
from transformers import AutoConfig, AutoModelForCausalLM

import vlsi_cache as vc
from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import load_spec
from vlsi_cache.errors import ModelError

from helpers.probe_models import FAMILIES  # isort: skip
from helpers.probe_models import GROUPED, PLAIN, WIDE

OPT = FAMILIES["opt"]


def spec_of(folder: Path, family: str, *, missing: int = 0, **options: Any) -> CacheSpec:
    """A teacher that is a configuration and a tokenizer, with `missing` rows too few in its embedding."""
    size = save_tokenizer(folder / "model")
    AutoConfig.for_model(family, vocab_size=size - missing, **options).save_pretrained(folder / "model")
    file = write_spec(folder, folder / "model", num_rows=6)
    return load_spec(str(file), overrides=["teacher.layers=[1]", "distill.layers=[1]"])


@pytest.mark.parametrize(
    ("family", "options", "missing", "reason"),
    [
        ("deepseek_v4", PLAIN, 0, "carries 4 hidden states per token"),
        ("opt", {**OPT, "_remove_final_layer_norm": True}, 0, "no final norm found"),
        ("bert", {**PLAIN, "is_decoder": True}, 0, "found in `Bert"),
        ("llama", GROUPED, 2, r"ids up to 299 and its embedding 298 rows: `<\|im_start\|>`, `<\|im_end\|>` stand for"),
    ],
)
def test_plan_raises_what_a_build_would(
    tmp_path: Path, family: str, options: dict[str, Any], missing: int, reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        vc.plan(spec_of(tmp_path, family, missing=missing, **options))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 3, "n_head": 2}),
        ("qwen3", WIDE),
        ("mpt", {"d_model": 16, "n_layers": 3, "n_heads": 2}),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}),
    ],
)
def test_plan_counts_the_parameters_of_any_family(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    spec = spec_of(tmp_path, family, **options)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    assert vc.plan(spec).teacher_parameters == sum(parameter.numel() for parameter in model.parameters())
