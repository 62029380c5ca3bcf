"""Text that a layer drafts is the text without drafts, token by token; with a temperature, its distribution.

Legend: B rows, S positions, V vocabulary.
"""

from typing import Any

import pytest
import torch
import transformers
from helpers.families import DECODER, seen_sample, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from vlsi_cache.config.training import TraversalSpec
from vlsi_cache.data.collate import collate_prompts
from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.models import drafting
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.drafting import Drafter, check_rewinds, decode
from vlsi_cache.models.traversal import add_traversal
from vlsi_cache.models.verbalizer import build_verbalizers

END, VOCAB_SIZE, LAYER = 2, 60, 2  # the heads have a row more than the vocabulary
NARROW: dict[str, Any] = {"head_dim": 8, "sliding_window": 6}  # texts are longer than the window
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Gemma3TextConfig": NARROW,
    "Gemma2Config": {**NARROW, "final_logit_softcapping": 30.0},
    "MistralConfig": {"sliding_window": 6},
    "GPTNeoXConfig": {},
    "BloomConfig": {"n_head": 4, "n_layer": 5},  # no positions
}


def model_of(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**DECODER, **FAMILIES.get(name, {}), **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def prompts(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    width = max(lengths)
    ids_BS = torch.randint(3, 50, (len(lengths), width), generator=generator)
    mask_BS = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return {"input_ids": ids_BS * mask_BS, "attention_mask": mask_BS}


def greedy(model: Any, inputs: dict[str, Tensor], max_new_tokens: int) -> list[list[int]]:
    """What transformers says without drafts."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=END,
        pad_token_id=0,
        suppress_tokens=list(range(VOCAB_SIZE, model.get_output_embeddings().weight.shape[0])) or None,
    )
    said = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
    return [ids[: ids.index(END) + 1] if END in ids else ids for ids in said]


def drafted(drafter: Drafter, inputs: dict[str, Tensor], max_new_tokens: int, **how: Any) -> list[list[int]]:
    return decode(drafter, inputs, **{"max_new_tokens": max_new_tokens, "eot_id": END, "vocab_size": VOCAB_SIZE, **how})


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_is_that_without_drafts(name: str) -> None:
    model = model_of(name)
    drafter = Drafter.of(Backbone(model), LAYER, num_drafts=4, confidence=0.0)
    for lengths in ((5, 9, 14, 3), (7,)):
        inputs = prompts(lengths)
        assert drafted(drafter, inputs, 24) == greedy(model, inputs, 24)
    assert drafter.num_accepted > 0


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_the_text_behind_pictures(family: str) -> None:
    model = tiny_model(family)
    pictures = [[(4, 4)], [(4, 4), (4, 8)], []]
    samples = [seen_sample(family, 5 + 2 * i, given, seed=i) for i, given in enumerate(pictures)]
    inputs = collate_prompts(samples, pad_id=0)
    drafter = Drafter.of(Backbone(model), LAYER, num_drafts=4, confidence=0.0)
    assert drafted(drafter, inputs, 16) == greedy(model, inputs, 16)


@pytest.mark.parametrize("num_drafts", [1, 6])
def test_a_verbalizer_drafts(num_drafts: int) -> None:
    model = model_of("LlamaConfig")
    backbone = Backbone(model)
    verbalizers = build_verbalizers(backbone, [1, 3], style="plain")
    drafter = Drafter.of(backbone, 3, verbalizers=verbalizers, num_drafts=num_drafts, confidence=0.0)
    inputs = prompts((5, 8))
    assert drafted(drafter, inputs, 20) == greedy(model, inputs, 20)
    logit_lens = Drafter.of(backbone, 3, num_drafts=num_drafts, confidence=0.0)
    drafted(logit_lens, inputs, 20)
    assert logit_lens.num_accepted != drafter.num_accepted  # another reader drafts otherwise


def test_drafts_that_are_all_right_cost_one_pass_for_all() -> None:
    """Layers above the drafting one that add nothing: the layer says what the model says."""
    model = model_of("LlamaConfig")
    with torch.no_grad():
        for layer in model.model.layers[LAYER:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    drafter = Drafter.of(Backbone(model), LAYER, num_drafts=4, confidence=0.0)
    inputs = prompts((6,))
    said = drafted(drafter, inputs, 21)
    assert said == greedy(model, inputs, 21)
    assert len(said[0]) == 21
    assert drafter.counts["acceptance"] == 1.0
    assert drafter.num_checks == 4  # the prompt's own token, then five a pass
    assert drafter.counts["tokens_per_pass"] == 5.0


def test_drafts_end_with_the_first_that_the_layer_doubts() -> None:
    model = model_of("LlamaConfig")
    inputs = prompts((6, 9))
    said, counts = [], []
    for confidence in (0.0, 1.0):
        drafter = Drafter.of(Backbone(model), LAYER, confidence=confidence)
        said.append(drafted(drafter, inputs, 24))
        counts.append(drafter.num_drafted / drafter.num_checks)
    assert said == [greedy(model, inputs, 24)] * 2
    assert counts[0] > 6  # eight, but where an answer ends
    assert counts[1] <= 1


@torch.inference_mode()
def exact_tokens(model: Any, ids_S: Tensor, temperature: float) -> list[Tensor]:
    """The distributions [V] of the three tokens behind a prompt, each summed over all of what may come before it."""
    found, given_BS, weight_B = [], ids_S[None], torch.ones(1, dtype=torch.float64)
    for _ in range(3):
        probs_BV = (model(given_BS).logits[:, -1, :VOCAB_SIZE].double() / temperature).softmax(1)
        found.append(weight_B @ probs_BV)
        next_BV = torch.arange(VOCAB_SIZE).expand(len(given_BS), -1)
        given_BS = torch.cat([given_BS.repeat_interleave(VOCAB_SIZE, 0), next_BV.reshape(-1, 1)], 1)
        weight_B = (weight_B[:, None] * probs_BV).flatten()
    return found


def test_draws_have_the_distribution_of_draws_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, temperature, num_draws = model_of("LlamaConfig"), 0.6, 4000
    ids_S = prompts((6,))["input_ids"][0]
    inputs = {"input_ids": ids_S.repeat(num_draws, 1), "attention_mask": torch.ones(num_draws, 6, dtype=torch.long)}
    wanted = exact_tokens(model, ids_S, temperature)
    drafter = Drafter.of(Backbone(model), LAYER, num_drafts=4, confidence=0.0)

    def furthest() -> list[float]:
        """Of each token, the most that any word's share is away from what it should be, in standard deviations."""
        torch.manual_seed(0)
        said = torch.tensor(drafted(drafter, inputs, 3, temperature=temperature, eot_id=-1))
        shares = [ids.bincount(minlength=VOCAB_SIZE) / num_draws for ids in said.T]
        return [
            float(((share - wanted_V).abs() / (wanted_V * (1 - wanted_V) / num_draws).sqrt().clamp(min=1e-3)).max())
            for share, wanted_V in zip(shares, wanted, strict=True)
        ]

    assert max(furthest()) < 4
    assert 0.05 < drafter.counts["acceptance"] < 0.95
    monkeypatch.setattr(drafting.torch, "rand_like", torch.zeros_like)  # every draft stands
    assert max(furthest()) > 8


def test_what_cannot_draft() -> None:
    backbone = Backbone(model_of("LlamaConfig"))
    with pytest.raises(ModelError, match=r"target layers \[5\] are out of range"):
        Drafter.of(backbone, 5)
    with pytest.raises(SpecError, match="number of drafted tokens is 0"):
        Drafter.of(backbone, 2, num_drafts=0)
    with pytest.raises(SpecError, match=r"no verbalizer for layer 2 to draft with; there are \[1, 3\]"):
        Drafter.of(backbone, 2, verbalizers=build_verbalizers(backbone, [1, 3]))
    with pytest.raises(SpecError, match="`decoder` looks at all tokens again"):
        Drafter.of(backbone, 2, verbalizers=build_verbalizers(backbone, [2], structure="decoder"))
    with pytest.raises(ModelError, match="`Lfm2ForCausalLM` cannot draft: its layers keep a state"):
        check_rewinds(Backbone(model_of("Lfm2Config", full_attn_idxs=[1, 3])))
    traversed = model_of("LlamaConfig")
    add_traversal(traversed, TraversalSpec(mode="prompt"))
    with pytest.raises(ModelError, match="cannot draft: its layers are traversed"):
        check_rewinds(Backbone(traversed))


def test_a_model_that_does_not_forget_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "crop", lambda *_: None)
    with pytest.raises(ModelError, match=r"hidden states differ by .* after tokens were taken back"):
        check_rewinds(Backbone(model_of("LlamaConfig")))
