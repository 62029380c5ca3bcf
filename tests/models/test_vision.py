"""Vision-language models that read their inputs in ways of their own: PaliGemma's prefix, Aya Vision's logits."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

from vlsi_cache.data.collate import collate
from vlsi_cache.data.sequence import Encoded
from vlsi_cache.errors import ModelError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.probe import Probe, check_against_itself

from helpers.probe_models import make_probe  # isort: skip
from helpers.probe_models import our_logprobs, own_logprobs

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
}


def sample(num_prompt: int, num_response: int) -> Encoded:
    """As PaliGemma's processor types a prompt: all of it 0."""
    ids = np.random.default_rng(num_prompt).integers(3, 200, num_prompt + num_response)
    types_1P = np.zeros((1, num_prompt), dtype=np.int64)
    return Encoded(ids, num_prompt, ids[num_prompt:], media={"token_type_ids": types_1P}, answer_type=1)


def paligemma() -> Any:
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "projection_dim": 16},
        text_config={"model_type": "gemma", **TEXT},
        image_token_id=290,
    )
    return PaliGemmaForConditionalGeneration(config).eval()


def probe_of(samples: list[Encoded]) -> Probe:
    batch = collate(samples, pad_id=0)
    first, half = samples[0], len(samples[0].response_ids) // 2
    stop = first.num_prompt + half
    cut = Encoded(first.input_ids[:stop], first.num_prompt, first.response_ids[:half], media=first.media, answer_type=1)
    alone = [collate([one], pad_id=0).inputs for one in samples]
    shorter = collate([cut], pad_id=0).inputs
    return Probe(batch.inputs, batch.rows_T, batch.positions_T, alone, shorter, half, packed=None, branched=None)


def test_paligemmas_answers_see_what_came_before_alone() -> None:
    model, samples = paligemma(), [sample(9, 6), sample(4, 3)]
    probe = probe_of(samples)
    assert probe.together["token_type_ids"].tolist() == [[0] * 9 + [1] * 6, [0] * 4 + [1] * 11]
    assert check_against_itself(Backbone(model), lambda: probe, name="m") == ""
    backbone = Backbone(paligemma())
    with torch.no_grad():  # its own causal pass over the answer, token by token
        for row, one in enumerate(samples):
            found = our_logprobs(backbone, probe)[probe.rows_T == row]
            for j in range(len(one.response_ids)):
                ids = torch.from_numpy(one.input_ids[: one.num_prompt + j])[None]
                types = torch.tensor([[0] * one.num_prompt + [1] * j])
                expected = model(input_ids=ids, token_type_ids=types).logits[0, -1].log_softmax(-1)
                torch.testing.assert_close(found[j], expected, rtol=0, atol=1e-4)


def test_paligemma_with_types_of_the_prompt_everywhere_is_refused() -> None:
    probe = probe_of([sample(9, 6), sample(4, 3)])
    for inputs in (probe.together, *probe.alone, probe.shorter):
        inputs["token_type_ids"].zero_()
    with pytest.raises(ModelError, match="see the tokens that come after them"):
        check_against_itself(Backbone(paligemma()), lambda: probe, name="m")


def test_aya_visions_logits_have_no_factor() -> None:
    torch.manual_seed(0)
    config = AyaVisionConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config={"model_type": "cohere2", **TEXT, "logit_scale": 0.25},
        image_token_id=290,
    )
    model: Any = AyaVisionForConditionalGeneration(config).eval()
    backbone, probe = Backbone(model), make_probe()
    assert backbone.logit_scale == 0.25
    note = check_against_itself(backbone, lambda: probe, name="m")
    assert "names a factor 0.25 of the logits, which `AyaVisionForConditionalGeneration` does not apply" in note
    with torch.no_grad():
        torch.testing.assert_close(our_logprobs(backbone, probe), own_logprobs(model, probe), rtol=0, atol=1e-4)
