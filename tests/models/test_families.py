"""Capture against transformers' own `output_hidden_states`, for tiny random models of every family in use.

Legend: B rows, S positions, T response tokens, V vocabulary, D hidden size.
"""

import warnings
from typing import Any

import pytest
import torch
from helpers.families import DECODER, HIDDEN_SIZE, NUM_LAYERS, POSITIONS_T, ROWS_T, VOCAB_SIZE, tiny_inputs, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from vlsi_cache.errors import ModelError
from vlsi_cache.models.backbone import Backbone, default_layers, head_of

FAMILIES = ("llama", "qwen2", "qwen2_vl", "llava_onevision")


class SeenShapes(TorchDispatchMode):
    """Remembers the last dimension of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.last_dims: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.last_dims |= {leaf.shape[-1] for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim}
        return output


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_capture_is_output_hidden_states_at_the_response_positions(family: str) -> None:
    model, inputs = tiny_model(family), tiny_inputs(family)
    expected = model(**inputs, output_hidden_states=True, use_cache=False)
    captured = Backbone(model).capture(inputs, [1, 3, 4], ROWS_T, POSITIONS_T)
    assert list(captured) == [1, 3, 4, NUM_LAYERS]
    for layer, hidden_TD in captured.items():
        torch.testing.assert_close(hidden_TD, expected.hidden_states[layer][ROWS_T, POSITIONS_T], rtol=0, atol=0)
    logits_TV = captured[NUM_LAYERS] @ Backbone(model).head_weight.T
    torch.testing.assert_close(logits_TV, expected.logits[ROWS_T, POSITIONS_T])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layers_above_the_deepest_target_run_only_for_the_final_state(family: str) -> None:
    model, inputs = tiny_model(family), tiny_inputs(family)
    backbone, ran = Backbone(model), []
    for index, layer in enumerate(backbone.layers):
        layer.register_forward_pre_hook(lambda *_, number=index + 1: ran.append(number))
    whole = backbone.capture(inputs, [1, 3], ROWS_T, POSITIONS_T)
    assert ran == [1, 2, 3, 4, 5]
    ran.clear()
    short = backbone.capture(inputs, [3, 1], ROWS_T, POSITIONS_T, with_final=False)
    assert ran == [1, 2, 3]
    assert set(short) == {1, 3}
    assert all(torch.equal(short[layer], whole[layer]) for layer in short)
    sequences = backbone.capture_sequences(inputs, [2], ROWS_T, POSITIONS_T, with_final=False)
    assert list(sequences) == [2]
    with pytest.raises(TypeError):
        backbone.capture({"input_ids": 3.0}, [1], ROWS_T, POSITIONS_T, with_final=False)
    assert len(backbone.layers) == NUM_LAYERS
    again = backbone.capture(inputs, [1, 3], ROWS_T, POSITIONS_T)
    assert torch.equal(again[NUM_LAYERS], whole[NUM_LAYERS])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_capture_never_makes_logits(family: str) -> None:
    model, inputs = tiny_model(family), tiny_inputs(family)
    with SeenShapes() as full:
        model(**inputs)
    assert VOCAB_SIZE in full.last_dims  # the probe sees logits where there are some
    with SeenShapes() as seen:
        Backbone(model).capture(inputs, [1, 3], ROWS_T, POSITIONS_T)
    assert VOCAB_SIZE not in seen.last_dims


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_names_the_parts_of_the_text_stack(family: str) -> None:
    model = tiny_model(family)
    backbone = Backbone(model)
    assert (backbone.num_layers, backbone.hidden_size, backbone.real_vocab_limit) == (
        NUM_LAYERS,
        HIDDEN_SIZE,
        VOCAB_SIZE,
    )
    assert backbone.head_weight is model.get_output_embeddings().weight
    assert backbone.final_norm is backbone.decoder.norm


def test_images_reach_the_captured_states() -> None:
    model, inputs = tiny_model("qwen2_vl"), tiny_inputs("qwen2_vl")
    backbone = Backbone(model)
    before = backbone.capture(inputs, [2], ROWS_T, POSITIONS_T)[2]
    after = backbone.capture({**inputs, "pixel_values": -inputs["pixel_values"]}, [2], ROWS_T, POSITIONS_T)[2]
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("layers", [[0], [NUM_LAYERS], [2, -1]])
def test_layers_out_of_range_are_refused_with_the_range(layers: list[int]) -> None:
    with pytest.raises(ModelError, match="intermediate targets are 1 to 4"):
        Backbone(tiny_model("llama")).capture(tiny_inputs("llama"), layers, ROWS_T, POSITIONS_T)


def test_hooks_are_gone_even_after_a_failing_forward() -> None:
    model = tiny_model("llama")
    backbone = Backbone(model)
    with pytest.raises(TypeError):
        backbone.capture({"input_ids": 3.0}, [1], ROWS_T, POSITIONS_T)
    backbone.capture(tiny_inputs("llama"), [1], ROWS_T, POSITIONS_T)
    assert not any(layer._forward_hooks for layer in backbone.layers)


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    captured = Backbone(model).capture(inputs, [2, 4], ROWS_T, POSITIONS_T)
    generator = torch.Generator().manual_seed(2)
    weights = {k: torch.randn(hidden.shape, generator=generator) for k, hidden in captured.items()}
    torch.stack([(hidden * weights[k]).sum() for k, hidden in captured.items()]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return adapted.train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_lora_gradients_are_the_same_with_gradient_checkpointing(family: str, use_reentrant: bool) -> None:
    torch.manual_seed(3)
    adapted, inputs = with_lora(tiny_model(family)), tiny_inputs(family)
    expected = gradients(adapted, inputs)
    assert expected
    assert all("lora" in name for name in expected)
    assert any(f"layers.{NUM_LAYERS - 1}." in name for name in expected)
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in adapted.modules())
    actual = gradients(adapted, inputs)
    assert set(actual) >= set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


@torch.no_grad()
def test_capture_runs_the_adapter() -> None:
    plain, inputs = tiny_model("llama"), tiny_inputs("llama")
    before = Backbone(plain).capture(inputs, [3], ROWS_T, POSITIONS_T)[3]
    torch.manual_seed(3)
    adapted = with_lora(plain).eval()
    after = Backbone(adapted).capture(inputs, [3], ROWS_T, POSITIONS_T)[3]
    expected = adapted(**inputs, output_hidden_states=True).hidden_states[3][ROWS_T, POSITIONS_T]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, rtol=0, atol=0)


def test_intermediate_gradient_stops_at_its_layer() -> None:
    model = tiny_model("llama")
    Backbone(model).capture(tiny_inputs("llama"), [2], ROWS_T, POSITIONS_T)[2].sum().backward()
    has_gradient = [layer.mlp.down_proj.weight.grad is not None for layer in model.model.layers]
    assert has_gradient == [True, True, False, False, False]


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**DECODER, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=0.3),
        GraniteConfig(**DECODER, logits_scaling=0.25),
        CohereConfig(**DECODER, logit_scale=3.0),
        LlamaConfig(**DECODER),
    ],
)
def test_scaled_and_capped_logits_are_those_of_the_model(config: Any) -> None:
    torch.manual_seed(0)
    model, inputs = AutoModelForCausalLM.from_config(config).double().eval(), tiny_inputs("llama")
    backbone = Backbone(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # large enough for the cap to bend them
        hidden_TD = backbone.capture(inputs, [], ROWS_T, POSITIONS_T)[NUM_LAYERS]
        expected_TV = model(**inputs).logits[ROWS_T, POSITIONS_T]
        logits_TV = head_of(backbone).logits_into(torch.empty_like(expected_TV), hidden_TD, 0)
    torch.testing.assert_close(logits_TV, expected_TV)
    plain_TV = hidden_TD @ backbone.head_weight.T
    assert torch.allclose(plain_TV, expected_TV) == isinstance(config, LlamaConfig)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_adapters_on_head_or_embeddings_are_refused(target: str, tied: bool, saved: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_config(LlamaConfig(**DECODER, tie_word_embeddings=tied))
    config = LoraConfig(target_modules=["q_proj"] if saved else [target], modules_to_save=[target] if saved else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config)
    with pytest.raises(ModelError, match=r"carries an adapter .*merge the adapter first"):
        Backbone(wrapped)


def test_encoder_decoder_models_are_refused() -> None:
    config = T5Config(vocab_size=VOCAB_SIZE, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(ModelError, match="encoder-decoder"):
        Backbone(T5ForConditionalGeneration(config))


def test_default_layers_are_those_of_the_paper() -> None:
    assert default_layers(28, 7) == list(range(2, 28, 4))
    assert default_layers(80, 20) == list(range(2, 80, 4))
    assert default_layers(24, 3) == [4, 12, 20]
    assert default_layers(80, 4) == [10, 30, 50, 70]
    assert default_layers(28, 3, model_type="llava_onevision") == [4, 12, 20]
    assert default_layers(28, 3) == [5, 14, 23]
    assert default_layers(8, 0) == []


def test_default_layers_are_distinct_intermediate_layers_at_any_size() -> None:
    for num_layers in range(2, 60):
        for num_targets in range(1, num_layers):
            layers = default_layers(num_layers, num_targets)
            assert sorted(set(layers)) == layers
            assert len(layers) == num_targets
            assert layers[0] >= 1
            assert layers[-1] < num_layers
    with pytest.raises(ModelError, match="7 intermediate"):
        default_layers(8, 8)
