"""Every family that is said to work: what we read off a padded batch against transformers' own forward pass of each
sample alone; and the probe at load, which must notice a model that is read wrongly.

Legend: B rows, S positions, T response tokens, V vocabulary.
"""

import re
from typing import Any

import pytest
import torch
from helpers.probe_models import (
    FAMILIES,
    GROUPED,
    PLAIN,
    VOCAB_SIZE,
    WIDE,
    make_model,
    make_probe,
    our_logprobs,
    own_logprobs,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from vlsi_cache.data.sequence import Layout
from vlsi_cache.errors import ModelError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.families import FAMILIES as KNOWN
from vlsi_cache.models.families import Family, check_family
from vlsi_cache.models.probe import check_against_itself

# Their layers carry a state from token to token, see chunks of a row, or take no mask of ours.
PADDED = {
    *("bamba", "bloom", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "llama4_text", "mamba", "mamba2"),
    *("nemotron_h", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "zamba2"),
}
# Of these, those that do not go on from a cache with several tokens at once.
UNCACHED = {"jamba", "mamba", "recurrent_gemma"}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_log_probs_of_a_padded_batch_are_the_models_own(family: str) -> None:
    model, probe = make_model(family), make_probe()
    backbone = Backbone(model)
    note = check_against_itself(backbone, lambda: probe, name=family)
    assert bool(note) == (family == "falcon_h1")
    assert backbone.packs == (family not in PADDED), backbone.why_padded
    assert bool(backbone.why_padded) == (family in PADDED)
    assert bool(backbone.why_uncached) == (family in UNCACHED), backbone.why_uncached
    assert backbone.frozen_layout == (Layout(0, branches=True) if family in PADDED - UNCACHED else backbone.layout)
    assert backbone.layout.goes_on_from_caches is False  # what trains has no cache
    torch.testing.assert_close(our_logprobs(backbone, probe), own_logprobs(model, probe), rtol=0, atol=2e-4)
    captured = backbone.capture(probe.together, [1, 2], probe.rows_T, probe.positions_T)
    short = backbone.capture(probe.together, [1], probe.rows_T, probe.positions_T, with_final=False)
    assert torch.equal(short[1], captured[1])
    assert captured[1].shape == captured[2].shape == (6, backbone.hidden_size)


@pytest.mark.parametrize(
    ("family", "options", "key"),
    [
        ("gemma3n_text", {**WIDE, "num_kv_shared_layers": 0}, "altup_num_inputs"),
        ("deepseek_v4", PLAIN, "hc_mult"),
    ],
)
def test_families_of_several_residual_streams_are_refused_from_the_configuration(
    family: str, options: dict[str, Any], key: str
) -> None:
    with pytest.raises(ModelError, match=rf"carries 4 hidden states per token .*`{key}`"):
        check_family(AutoConfig.for_model(family, **options))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_a_constant_factor_is_found_named_and_used(dtype: torch.dtype, atol: float) -> None:
    model, probe = make_model("falcon_h1").to(dtype), make_probe()
    backbone = Backbone(model)
    note = check_against_itself(backbone, lambda: probe, name="m")
    assert "0.5 times what its head gives, its `lm_head_multiplier` 0.5" in note
    assert Backbone(model).logit_scale == 0.5  # also for what is made of the model later
    own_TV = own_logprobs(model, probe).float()
    torch.testing.assert_close(our_logprobs(backbone, probe), own_TV, rtol=0, atol=atol)
    assert check_against_itself(backbone, lambda: pytest.fail("probed twice"), name="m") == ""


class Changed(torch.nn.Module):
    """A head that does something to what goes in or comes out."""

    def __init__(self, head: Any, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, None
        self.before, self.after = before or (lambda x: x), after or (lambda x: x)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.after(self.before(hidden) @ self.weight.T)


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({}, {"before": lambda x: x / 4}, "0.25 times .*, which no setting of its configuration says"),
        ({"dim_model_base": 2}, {"before": lambda x: x / 8}, "0.125 times .*its `dim_model_base` 2/16"),
        ({"logit_scale": 0.3}, {}, "names a factor 0.3 of the logits, which `LlamaForCausalLM` does not apply"),
        ({"final_logit_softcapping": 3.0}, {}, "names a cap 3.0 of the logits"),
    ],
)
@torch.no_grad()
def test_what_a_model_does_decides_not_what_its_configuration_says(
    options: dict[str, Any], change: dict[str, Any], reason: str
) -> None:
    model, probe = make_model("llama", **options), make_probe()
    model.lm_head = Changed(model.lm_head, **change)
    backbone = Backbone(model)
    note = check_against_itself(backbone, lambda: probe, name="m")
    assert re.search(reason, note), note
    torch.testing.assert_close(our_logprobs(backbone, probe), own_logprobs(model, probe), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_head_is_refused(dtype: torch.dtype) -> None:
    model = make_model("llama").to(dtype)
    model.lm_head = Changed(model.lm_head, after=lambda x: x + 0.5 * x.sin())
    with pytest.raises(ModelError, match=r"another head than .* log-probs differ by up to 0\.\d+ nats.*not constant"):
        check_against_itself(Backbone(model), make_probe, name="m")


def test_a_model_that_depends_on_the_batch_is_refused() -> None:
    model = make_model("llama")
    model.model.layers[1].register_forward_hook(lambda _m, _a, output: output * (1 + 0.05 * output.shape[1]))
    with pytest.raises(ModelError, match="what it says of a sample depends on the batch"):
        check_against_itself(Backbone(model), make_probe, name="m")


@pytest.mark.parametrize("limit", [5, 9])
def test_a_rope_that_looks_at_the_longest_row_is_run_apart(limit: int) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = make_model("llama", max_position_embeddings=limit, rope_parameters=rope)
    assert check_against_itself(Backbone(model), make_probe, name="m") == ""
    found = Backbone(make_model("llama", max_position_embeddings=limit, rope_parameters=rope))
    found.rope_limit = None  # as if nobody knew
    with pytest.raises(ModelError, match="depends on the batch"):
        check_against_itself(found, make_probe, name="m")


def test_a_response_that_sees_what_comes_after_is_refused() -> None:
    model = make_model("llama")
    model.model.layers[0].register_forward_hook(lambda _m, _a, output: output + output.mean(1, keepdim=True))
    probe = make_probe((9, 9), (4, 2))
    with pytest.raises(ModelError, match="see the tokens that come after them"):
        check_against_itself(Backbone(model), lambda: probe, name="m")


def test_another_norm_between_layers_and_head_is_refused() -> None:
    model = make_model("llama")
    model.model.register_forward_hook(
        lambda _m, _a, output: setattr(output, "last_hidden_state", torch.tanh(output[0]))
    )
    with pytest.raises(ModelError, match="something else than `LlamaRMSNorm` stands between"):
        check_against_itself(Backbone(model), make_probe, name="m")


def test_a_forward_pass_that_fails_is_one_line() -> None:
    model = make_model("llama")
    model.model.norm.variance_epsilon = None  # as `rms_norm_eps: null` leaves it
    with pytest.raises(ModelError, match=r"its forward pass fails on two short samples: TypeError: .*NoneType"):
        check_against_itself(Backbone(model), make_probe, name="m")


def test_a_head_of_another_width_than_the_layers_is_refused() -> None:
    model = make_model("opt", word_embed_proj_dim=8)
    with pytest.raises(ModelError, match="its layers are 16 wide and its head takes 8"):
        check_against_itself(Backbone(model), make_probe, name="m")


def test_unknown_families_are_named_with_what_was_looked_for() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**GROUPED, "vocab_size": VOCAB_SIZE}))
    del model.model.norm
    with pytest.raises(
        ModelError, match=r"no final norm found in `LlamaModel` \(looked for `norm`, .*family is unknown"
    ):
        Backbone(model)


class Renamed(torch.nn.Module):
    """A Llama stack that calls its parts otherwise than all others do."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body, self.steps, self.last_step = [body], body.layers, body.norm  # the body is no submodule

    def forward(self, **inputs: Any) -> Any:
        return self.body[0](**inputs)


def test_an_unknown_family_is_added_by_the_lines_that_its_error_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = make_model("llama", logit_gain=1.0), make_probe()
    stack = Renamed(model.model)
    model.get_decoder = lambda: stack
    with pytest.raises(ModelError) as caught:
        Backbone(model)
    lines = str(caught.value)
    assert 'FAMILIES["llama"] = Family(' in lines
    assert "lists of modules here: `model.layers`" in lines
    assert "norms outside of them: `model.norm`" in lines
    assert "linear layers at the top: `lm_head`" in lines
    known = Family(decoder="model", layers=("layers",), final_norm=("norm",), head="lm_head", multiply=("logit_gain",))
    monkeypatch.setitem(KNOWN, "llama", known)
    backbone = Backbone(model)
    assert check_against_itself(backbone, lambda: probe, name="m") == ""
    with torch.no_grad():
        torch.testing.assert_close(our_logprobs(backbone, probe), own_logprobs(model, probe), rtol=0, atol=1e-5)
    monkeypatch.setitem(KNOWN, "llama", Family(decoder="model.stack"))
    with pytest.raises(ModelError, match=r"no module `model\.stack`, which .*families\.py names for `llama`"):
        Backbone(model)
