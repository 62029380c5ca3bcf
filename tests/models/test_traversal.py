"""Traversed layers against the two passes written out by hand, and every way of decoding against the whole at once.

Legend: B rows, S positions, D hidden size, L layers.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import DECODER, HIDDEN_SIZE, NUM_LAYERS, tiny_inputs, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from vlsi_cache.config.training import TraversalSpec
from vlsi_cache.data.collate import RESPONSES, SEEN_UNTIL
from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.lora import add_lora, checkpoint_activations, train_gates_and_projector
from vlsi_cache.models.traversal import (
    add_traversal,
    mixing_ratios,
    num_gate_parameters,
    plain_class,
    prompting,
    remove_traversal,
    traversal_of,
)
from vlsi_cache.models.traversal_files import save_traversed, to_dtype
from vlsi_cache.models.verbalizer import build_verbalizers

PROMPT = TraversalSpec()
EVERYWHERE = TraversalSpec(mode="all")
NUM_PROMPT, WIDTH = 9, 16
# Its middle layers are windowed, shorter than a prompt, and its cache keeps a window alone.
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**DECODER),
    "qwen3": lambda: Qwen3Config(**DECODER),
    "mistral": lambda: MistralConfig(**DECODER, sliding_window=4),
    "gemma2": lambda: Gemma2Config(**DECODER, head_dim=8, sliding_window=4, final_logit_softcapping=None),
    "gemma3": lambda: Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=4, layer_types=_mixed_kinds()),
    "moe": lambda: Qwen3MoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    "gpt2": lambda: GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2),
}


def _mixed_kinds() -> list[str]:
    return ["full_attention" if layer == 2 else "sliding_attention" for layer in range(NUM_LAYERS)]


def family_model(family: str) -> Any:
    torch.manual_seed(0)
    return Auto.from_config(FAMILIES[family]()).eval()


def traversed(settings: TraversalSpec = PROMPT, model: Any = None) -> Any:
    model = tiny_model("llama") if model is None else model
    add_traversal(model, settings, seed=3)
    return model


def some_ids(num_rows: int = 1, width: int = WIDTH, seed: int = 1) -> Tensor:
    return torch.randint(3, 50, (num_rows, width), generator=torch.Generator().manual_seed(seed))


def at_once(model: Any, ids_BS: Tensor, num_prompt: int = NUM_PROMPT) -> Tensor:
    """Logits of prompt and answer in one pass, with the answer marked as in training."""
    responses_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    responses_BS[:, num_prompt:] = True
    backbone = Backbone(model)
    rows_T, positions_T = torch.cartesian_prod(torch.arange(len(ids_BS)), torch.arange(ids_BS.shape[1])).T
    inputs = {"input_ids": ids_BS, RESPONSES: responses_BS}
    hidden_TD = backbone.capture(inputs, [], rows_T, positions_T)[backbone.num_layers]
    return model.get_output_embeddings()(hidden_TD).view(*ids_BS.shape, -1)


class Captured:
    """Logits of the newest token, however generate comes to them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids_BS: Tensor, **options: Any) -> Any:
        return self.model.generate(
            ids_BS,
            **{"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options},
            return_dict_in_generate=True,
            output_logits=True,
        )


@torch.no_grad()
def test_two_passes_and_the_gate_are_those_of_the_formula() -> None:
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    ids_BS = some_ids(2)
    traversed(EVERYWHERE, model)
    inner: Any = plain.model
    state_BSD = inner.embed_tokens(ids_BS)
    positions = torch.arange(WIDTH)[None]
    rope = inner.rotary_emb(state_BSD, positions)
    mask = torch.full((WIDTH, WIDTH), torch.finfo(torch.float32).min).triu(1)[None, None]
    for layer, gate in zip(inner.layers, model.model.traversal_gates, strict=True):
        first = layer(state_BSD, attention_mask=mask, position_embeddings=rope)
        again = layer(first, attention_mask=mask, position_embeddings=rope)
        w = 0.5 * torch.tanh(first @ gate.weight.T) + 0.5  # as the released code has it
        assert float(w.min()) < 0.4 < 0.6 < float(w.max())
        state_BSD = (1 - w) * first + w * again
    expected = plain.lm_head(inner.norm(state_BSD))
    torch.testing.assert_close(model(ids_BS).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_vl", "llava_onevision"])
@torch.no_grad()
def test_closed_gates_give_the_plain_model(family: str) -> None:
    """Also that a second pass leaves nothing behind: in a cache, a router, a window."""
    inputs = tiny_inputs(family)
    model = family_model(family) if family in FAMILIES else tiny_model(family)
    expected = model(**inputs, use_cache=True, output_hidden_states=True)
    names = set(model.state_dict())
    layer_class = type(Backbone(model).layers[0])
    state = add_traversal(model, TraversalSpec(mode="all", gate_bias=True, gate_init="near_zero"))
    assert names < set(model.state_dict())
    assert {name.split(".")[-3] for name in set(model.state_dict()) - names} == {"traversal_gates"}
    for gate in state.gates:
        torch.nn.init.constant_(gate.bias, -30)  # type: ignore[arg-type]
    found = model(**inputs, use_cache=True, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    assert len(found.hidden_states) == len(expected.hidden_states) == Backbone(model).num_layers + 1
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == WIDTH
    for ours, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape
    assert all(isinstance(one, layer_class) for one in Backbone(model).layers)
    remove_traversal(model)
    assert set(model.state_dict()) == names
    assert type(Backbone(model).layers[0]) is layer_class
    torch.testing.assert_close(model(**inputs).logits, expected.logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_gives_what_one_pass_gives(family: str) -> None:
    model, ids_BS = traversed(model=family_model(family)), some_ids(2)
    expected = at_once(model, ids_BS)
    cache = DynamicCache(config=model.config)
    first = model(ids_BS[:, :NUM_PROMPT], past_key_values=cache).logits
    each = [model(ids_BS[:, [at]], past_key_values=cache).logits for at in range(NUM_PROMPT, WIDTH)]
    torch.testing.assert_close(torch.cat([first, *each], 1), expected, rtol=0, atol=1e-4)
    with prompting(model, 0):  # nothing is traversed
        assert float((model(ids_BS).logits - expected).abs().max()) > 0.1


@torch.no_grad()
def test_every_way_of_decoding_gives_what_one_pass_gives() -> None:
    model, ids_BS = traversed(), some_ids(2, NUM_PROMPT)
    generate = Captured(model)
    greedy = generate(ids_BS)
    again = at_once(model, greedy.sequences)
    expected = again[:, NUM_PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(greedy.logits, 1), expected, rtol=0, atol=1e-4)
    assert torch.equal(greedy.sequences[:, NUM_PROMPT:], expected.argmax(-1))
    torch.testing.assert_close(generate(ids_BS, use_cache=False).logits, greedy.logits, rtol=0, atol=1e-4)
    # Drafts of many tokens, in the first call together with the prompt.
    repeated = some_ids(1, 4).repeat(1, 3)
    drafted = generate(repeated, prompt_lookup_num_tokens=3, max_new_tokens=12)
    assert torch.equal(drafted.sequences, generate(repeated, max_new_tokens=12).sequences)
    torch.testing.assert_close(
        torch.stack(drafted.logits, 1)[:, :12],
        at_once(model, drafted.sequences, 12)[:, 11:-1],
        rtol=0,
        atol=1e-4,
    )
    # Beams: the score of each is what one pass gives it.
    for use_cache in (True, False):
        wanted = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "output_scores": True}
        beams = generate(ids_BS, use_cache=use_cache, **wanted)
        logp = at_once(model, beams.sequences).log_softmax(-1)[:, NUM_PROMPT - 1 : -1]
        scores = logp.gather(-1, beams.sequences[:, NUM_PROMPT:, None]).sum((1, 2))
        torch.testing.assert_close(beams.sequences_scores, scores, rtol=0, atol=1e-3)
    # Padded on the left beside a longer prompt.
    short = ids_BS[:1, :5]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    mask = torch.ones(2, NUM_PROMPT, dtype=torch.long)
    mask[0, :4] = 0
    together = generate(torch.cat([padded, ids_BS[1:]]), attention_mask=mask)
    for row, alone in enumerate((generate(short), generate(ids_BS[1:]))):
        torch.testing.assert_close(
            torch.stack(together.logits, 1)[row], torch.stack(alone.logits, 1)[0], rtol=0, atol=1e-4
        )
    # The next turn: all before it is prompt, the answer of the first turn too.
    longer = torch.cat([greedy.sequences, some_ids(2, 3, seed=5)], 1)
    turn = generate(longer)
    expected = at_once(model, turn.sequences, longer.shape[1])[:, longer.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(turn.logits, 1), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_what_would_see_other_keys_is_refused() -> None:
    model, ids_BS = traversed(), some_ids()
    with pytest.raises(ModelError, match=r"was given 4 tokens behind 4 .* and 4 of them are prompt: .*one call"):
        Captured(model)(ids_BS, prefill_chunk_size=4)
    cache = DynamicCache(config=model.config)
    model(ids_BS[:, :6], past_key_values=cache)
    with pytest.raises(ModelError, match=r"10 tokens behind 6 .*nothing says which of them are prompt"):
        model(ids_BS[:, 6:], past_key_values=cache)
    with pytest.raises(ModelError, match="10 of them are prompt"):  # an earlier turn's cache
        Captured(model)(ids_BS, past_key_values=cache)
    with pytest.raises(ModelError, match=r"given a `StaticLayer`: .*DynamicCache"):
        Captured(model)(ids_BS, cache_implementation="static")
    with pytest.raises(ModelError, match="traversed already"):
        add_traversal(model, PROMPT)
    everywhere = traversed(EVERYWHERE)
    with pytest.raises(ModelError, match=r"`traversal.mode: all` runs those of an answer one by one"):
        Captured(everywhere)(some_ids(1, 4).repeat(1, 3), prompt_lookup_num_tokens=3)
    assert len(Captured(everywhere)(ids_BS).sequences[0]) == WIDTH + 6
    assert traversal_of(everywhere).num_prompt is None  # type: ignore[union-attr]
    hybrid = Auto.from_config(
        Qwen3NextConfig(**DECODER, head_dim=8, num_experts=0, linear_num_value_heads=2, linear_num_key_heads=2)
    )
    with pytest.raises(ModelError, match="`Qwen3NextForCausalLM`: layers of linear_attention have a state"):
        add_traversal(hybrid, PROMPT)


@torch.no_grad()
def test_in_mode_all_the_tokens_of_the_answer_are_traversed_too() -> None:
    """From a cache their further passes see first-pass keys of what came before, as the released code has it."""
    model, ids_BS = traversed(EVERYWHERE), some_ids()
    whole = model(ids_BS).logits
    torch.testing.assert_close(at_once(model, ids_BS), whole, rtol=0, atol=1e-5)
    cache = DynamicCache(config=model.config)
    first = model(ids_BS[:, :NUM_PROMPT], past_key_values=cache).logits
    torch.testing.assert_close(first, whole[:, :NUM_PROMPT], rtol=0, atol=1e-4)
    nxt = model(ids_BS[:, [NUM_PROMPT]], past_key_values=cache).logits[:, 0]
    assert float((nxt - whole[:, NUM_PROMPT]).abs().max()) > 1e-3
    traversal_of(model).mode = "prompt"  # type: ignore[union-attr]
    cache.crop(-1)
    assert float((nxt - model(ids_BS[:, [NUM_PROMPT]], past_key_values=cache).logits[:, 0]).abs().max()) > 1e-3


@torch.no_grad()
def test_samples_of_a_packed_row_are_traversed_as_each_alone() -> None:
    model, ids = traversed(), [some_ids(1, 10, seed=2), some_ids(1, 6, seed=3)]
    expected = torch.cat([at_once(model, one, 4)[0] for one in ids])
    responses = torch.tensor([[False] * 4 + [True] * 6 + [False] * 4 + [True] * 2])
    inputs = {
        "input_ids": torch.cat(ids, 1),
        "position_ids": torch.tensor([[*range(10), *range(6)]]),
        SEEN_UNTIL: torch.tensor([[10] * 10 + [16] * 6]),
        RESPONSES: responses,
    }
    hidden = Backbone(model).capture(inputs, [2], torch.zeros(16, dtype=torch.long), torch.arange(16))
    torch.testing.assert_close(model.lm_head(hidden[NUM_LAYERS]), expected, rtol=0, atol=1e-4)
    assert Backbone(model).layout.marks_responses


def test_gates_and_layers_get_their_gradients_under_checkpointing() -> None:
    model, ids_BS = traversed(), some_ids(2)
    model.requires_grad_(True)
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            checkpoint_activations(model)
            model.train()
        model.zero_grad()
        loss = at_once(model, ids_BS).log_softmax(-1)[:, NUM_PROMPT - 1 : -1, 7].sum()
        at_once(model, some_ids(2, seed=9), 3)  # another batch, before the layers run again
        loss.backward()
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters()})
    for name, one in gradients[0].items():
        assert float(one.abs().max()) > 0, name
        torch.testing.assert_close(gradients[1][name], one, rtol=1e-4, atol=1e-5)


def test_responses_give_the_gates_nothing_in_mode_prompt() -> None:
    model, ids_BS = traversed(), some_ids()
    model.requires_grad_(True)
    at_once(model, ids_BS, 0).sum().backward()
    assert all(float(gate.weight.grad.abs().max()) == 0 for gate in model.model.traversal_gates)


def test_an_adapter_is_on_the_layers_and_not_on_the_gates() -> None:
    model = add_lora(traversed(), rank=2, alpha=2, dropout=0)
    assert not [name for name, _ in model.named_parameters() if "lora" in name and "gates" in name]
    with torch.no_grad():
        out = Captured(model)(some_ids(1, NUM_PROMPT))
        expected = at_once(model, out.sequences)[:, NUM_PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("width", "depth", "paper"), [(2048, 24, 49_152), (3072, 32, 98_304), (4096, 32, 131_072)])
def test_gates_have_as_many_numbers_as_in_the_paper(width: int, depth: int, paper: int) -> None:
    of = {"num_layers": depth, "hidden_size": width}
    assert num_gate_parameters(PROMPT, **of) == paper
    assert num_gate_parameters(TraversalSpec(gate_bias=True), **of) == paper + depth
    shared = TraversalSpec(gates="shared", gate_bias=True)  # what the released code has
    assert num_gate_parameters(shared, **of) == width + 1
    for settings in (PROMPT, shared):
        small = traversed(settings)
        counted = sum(one.numel() for name, one in small.named_parameters() if "traversal_gates" in name)
        assert counted == num_gate_parameters(settings, num_layers=NUM_LAYERS, hidden_size=HIDDEN_SIZE)


@torch.no_grad()
def test_more_passes_and_other_mixing() -> None:
    ids_BS, logits = some_ids(), {}
    for passes in (2, 3, 4):
        logits[passes] = traversed(TraversalSpec(mode="all", num_passes=passes))(ids_BS).logits
    assert float((logits[3] - logits[2]).abs().max()) > 0.05
    assert float((logits[4] - logits[3]).abs().max()) > 0.05
    # By hand in the first layer: each pass is mixed into what is there, by its gate.
    model = traversed(TraversalSpec(mode="all", num_passes=3))
    plain: Any = tiny_model("llama")
    layer, gate = plain.model.layers[0], model.model.traversal_gates[0]
    embedded = plain.model.embed_tokens(ids_BS)
    rope = plain.model.rotary_emb(embedded, torch.arange(WIDTH)[None])
    mask = torch.full((WIDTH, WIDTH), torch.finfo(torch.float32).min).triu(1)[None, None]
    state = layer(embedded, attention_mask=mask, position_embeddings=rope)
    for _ in range(2):
        w = torch.sigmoid(2 * gate(state))
        state = (1 - w) * state + w * layer(state, attention_mask=mask, position_embeddings=rope)
    found = model(ids_BS, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(found, state, rtol=0, atol=1e-5)
    for mixing in ("first", "second", "uniform", "random"):
        other = traversed(TraversalSpec(mode="all", mixing=mixing))  # type: ignore[arg-type]
        logits[mixing] = other(ids_BS).logits
        w_LBS = mixing_ratios(other, lambda one=other: one(ids_BS))
        assert w_LBS.shape == (NUM_LAYERS, 1, WIDTH)
        assert (w_LBS == 0.5).all() == (mixing == "uniform")
    torch.testing.assert_close(logits.pop("random"), logits[2])  # the same draw, which stays
    names = list(logits)
    assert all(not torch.allclose(logits[a], logits[b], atol=0.01) for a in names for b in names if a is not b)


def test_the_gate_does_not_saturate_in_16_bits() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    state = add_traversal(model, TraversalSpec(mode="all"))
    assert all(gate.weight.dtype == torch.float32 for gate in state.gates)
    gate = state.gates[0]
    hidden = torch.ones(1, 1, HIDDEN_SIZE, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.nn.init.constant_(gate.weight, 3.5 / HIDDEN_SIZE)  # type: ignore[arg-type]
        assert 0.999 < float(state.ratio(0, hidden)) < 1
        assert model(some_ids()).logits.dtype == torch.bfloat16
    assert plain_class(model.model.layers[0]).__name__ == "LlamaDecoderLayer"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate_init": "near_zero"}, "say `gate_bias: true`"),
        ({"mixing": "uniform", "gates": "shared"}, "`gates` do nothing with `mixing: uniform`"),
        ({"mixing": "first", "num_passes": 3}, "`num_passes` does nothing"),
        ({"num_passes": 5}, "less than or equal to 4"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, SpecError), match=message):
        TraversalSpec(**settings)


def test_a_copy_generates_by_itself() -> None:
    model = traversed()
    twin = copy.deepcopy(model)
    assert traversal_of(twin) is not traversal_of(model)
    assert twin.generate.__self__ is twin
    assert traversal_of(twin).gates is twin.model.traversal_gates  # type: ignore[union-attr]
    assert twin.model.layers[0].traversal is traversal_of(twin)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
@torch.no_grad()
def test_pictures_stand_in_the_prompt(family: str) -> None:
    model = traversed(model=tiny_model(family))
    inputs = {name: one[:1] for name, one in tiny_inputs(family).items() if name != "pixel_values"}
    pixels = tiny_inputs(family)["pixel_values"]
    inputs["pixel_values"] = pixels[: len(pixels) // 2]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    plain = {name: one for name, one in inputs.items() if one.shape[:2] != inputs["input_ids"].shape}
    longer = {**plain, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 4))
    longer[RESPONSES] = torch.arange(WIDTH + 4)[None] >= WIDTH
    at = torch.arange(WIDTH - 1, WIDTH + 3)
    backbone = Backbone(model)
    hidden = backbone.capture(longer, [], torch.zeros_like(at), at)[backbone.num_layers]
    torch.testing.assert_close(torch.cat(out.logits), model.lm_head(hidden), rtol=0, atol=1e-4)
    model.requires_grad_(False)
    train_gates_and_projector(model)
    names = {name for name, one in model.named_parameters() if one.requires_grad}
    rest = {name for name in names if "traversal_gates" not in name}
    assert len(names) - len(rest) == NUM_LAYERS
    assert rest
    assert all("merger" in name or "projector" in name or name.endswith("image_newline") for name in rest), rest


@torch.no_grad()
def test_a_verbalizer_that_is_a_decoder_layer_is_a_plain_one() -> None:
    model = traversed()
    backbone = Backbone(model)
    verbalizers = build_verbalizers(backbone, [2], structure="decoder")
    inputs = {"input_ids": some_ids(), RESPONSES: torch.arange(WIDTH)[None] >= NUM_PROMPT}
    at = torch.arange(NUM_PROMPT, WIDTH)
    hidden: Any = verbalizers.capture(inputs, torch.zeros_like(at), at)
    expected = backbone.capture(inputs, [2], torch.zeros_like(at), at)[2]
    # It starts as nothing: its last projections are zero.
    found = verbalizers.by_layer["2"](hidden[2])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert type(verbalizers.by_layer["2"].blocks[0]) is plain_class(model.model.layers[0])  # type: ignore[index,union-attr]


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
@torch.no_grad()
def test_a_folder_holds_all_of_it(family: str, tmp_path: Path) -> None:
    """Tied weights and renamed ones, several files, gates in fp32 beside 16 bits."""
    model = traversed(TraversalSpec(gate_bias=True), tiny_model(family, tie_word_embeddings=True))
    to_dtype(model, torch.bfloat16)
    save_traversed(model, tmp_path, max_shard_size="20KB")
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith("model.safetensors")]
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    opened = ModelRef(tmp_path, dtype="auto").load()
    state, before = traversal_of(opened), traversal_of(model)
    assert state is not None
    assert before is not None
    assert state.settings == before.settings
    own, theirs = model.state_dict(), opened.state_dict()
    assert own.keys() == theirs.keys()
    for name, one in own.items():
        assert theirs[name].dtype == (torch.float32 if "traversal_gates" in name else torch.bfloat16)
        assert torch.equal(theirs[name], one), name
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("per_layer", "shared"))
    with pytest.raises(ModelError, match=r"gates\.safetensors: its gates are not those of this model"):
        ModelRef(tmp_path).load()
