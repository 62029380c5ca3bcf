"""Models that no mask keeps apart run what samples share once: each branch goes on from the cache of its trunk.

The oracle is transformers' own forward pass of each sample alone. Legend: T response tokens, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.probe_models import make_model, make_probe
from transformers import AutoModelForImageTextToText, Qwen3_5Config

from vlsi_cache.data.branches import BRANCHES
from vlsi_cache.data.collate import PICTURES, Batch, collate
from vlsi_cache.data.pictures import PictureGroup, Pictures
from vlsi_cache.data.sequence import PADDED, Encoded, Piece, join
from vlsi_cache.data.vision import Prompt
from vlsi_cache.models.backbone import Backbone, head_of
from vlsi_cache.models.probe import check_against_itself

IMAGE, START, END = 57, 58, 59


def star(num_trunk: int, own: list[int], responses: list[int], seed: int) -> tuple[Encoded, list[Encoded]]:
    """A prompt, then `own[i]` more tokens of it and a response, as one sequence and each alone."""
    rng = np.random.default_rng(seed)
    trunk, pieces, alone = rng.integers(3, 50, num_trunk), [], []
    for number, (more, length) in enumerate(zip(own, responses, strict=True)):
        ids_P, ids_R = rng.integers(3, 50, more), rng.integers(3, 50, length)
        whole = np.concatenate([trunk, ids_P])
        pieces.append(Piece(num_trunk if number else 0, Prompt(ids_P if number else whole, None, {}), ids_R))
        alone.append(Encoded(np.concatenate([whole, ids_R]), len(whole), ids_R))
    return join(pieces), alone


def turns(seed: int) -> tuple[Encoded, list[Encoded]]:
    """Two turns of a conversation in one line, and another answer to its first question."""
    rng = np.random.default_rng(seed)
    first, answer, then, second, other = (rng.integers(3, 50, length) for length in (21, 4, 6, 3, 5))
    line = np.concatenate([first, answer, then])
    pieces = [Piece(0, Prompt(first, None, {}), answer), Piece(25, Prompt(then, None, {}), second)]
    alone = [(first, answer), (line, second), (first, other)]
    both = [Encoded(np.concatenate([prompt, response]), len(prompt), response) for prompt, response in alone]
    return join([*pieces, Piece(21, Prompt(first[:0], None, {}), other)]), both


@contextmanager
def tokens_seen(model: Any) -> Iterator[list[int]]:
    """How many places, padding too, go through the first layer of the model, pass by pass."""
    seen: list[int] = []
    layer = Backbone(model).layers[0]
    handle = layer.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[:2].numel()))
    yield seen
    handle.remove()


def captured(model: Any, batch: Batch, layers: list[int]) -> dict[int, torch.Tensor]:
    return Backbone(model).capture(batch.inputs, layers, batch.rows_T, batch.positions_T)


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "bamba", "nemotron_h", "lfm2"])
@torch.no_grad()
def test_states_of_branches_are_those_of_each_sample_alone(family: str) -> None:
    model = make_model(family)
    backbone = Backbone(model)
    check_against_itself(backbone, make_probe, name=family)
    assert backbone.why_uncached == ""
    # Trunks of several lengths, branches of one token, turns, and a prompt with one response, which is all trunk.
    several = [star(40, [0, 3, 0, 5], [4, 2, 1, 7], 0), star(18, [0, 0], [1, 1], 1), turns(2), star(33, [0], [5], 3)]
    alone = [one for _, some in several for one in some]
    batch = collate([one for one, _ in several], pad_id=0)
    passes = batch.inputs[BRANCHES].passes
    assert batch.inputs["input_ids"].shape == (4, 40)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [40, 18, 21, 38]
    assert sorted(n for rows in passes for n in rows.mask_RS.sum(1).tolist()) == sorted([4, 5, 1, 12, 1, 1, 13, 5])
    with tokens_seen(model) as seen:
        found = captured(model, batch, [1, 2])
    assert seen == [4 * 40, *(rows.ids_RS.numel() for rows in passes)]
    assert sum(seen) < sum(len(one.input_ids) for one in alone)
    head, scale = head_of(backbone), 2e-5
    for layer in (1, 2):
        wanted = [captured(model, collate([one], pad_id=0), [layer])[layer] for one in alone]
        torch.testing.assert_close(found[layer], torch.cat(wanted), rtol=1e-4, atol=scale)
    logits_TV = torch.empty(len(batch.gold_T), backbone.real_vocab_limit)
    logprobs_TV = head.logits_into(logits_TV, found[backbone.num_layers], 0).log_softmax(-1)
    own = [model(torch.from_numpy(one.input_ids)[None], output_hidden_states=True) for one in alone]
    places = [slice(one.num_prompt - 1, -1) for one in alone]
    own_TV = torch.cat([output.logits[0, at] for output, at in zip(own, places, strict=True)]).log_softmax(-1)
    torch.testing.assert_close(logprobs_TV, own_TV, rtol=0, atol=1e-4)
    states_TD = torch.cat([output.hidden_states[1][0, at] for output, at in zip(own, places, strict=True)])
    torch.testing.assert_close(found[1], states_TD, rtol=1e-4, atol=scale)
    below = backbone.capture(batch.inputs, [1], batch.rows_T, batch.positions_T, with_final=False)
    assert torch.equal(below[1], found[1])


@torch.no_grad()
def test_a_pass_is_no_larger_than_the_batch_is_planned() -> None:
    """One long branch beside many short ones would be mostly padding."""
    model = make_model("bamba")
    several = [star(17, [0] * 9, [60, *[2] * 8], 0), star(60, [0, 0], [3, 20], 1)]
    batch = collate([one for one, _ in several], pad_id=0)
    sizes = [rows.ids_RS.shape for rows in batch.inputs[BRANCHES].passes]
    assert len(sizes) > 1
    assert all(shape.numel() <= 2 * (17 + 60 + 2 * 8) for shape in sizes)
    assert sum(shape[0] for shape in sizes) == 11
    found = captured(model, batch, [1])
    alone = [captured(model, collate([one], pad_id=0), [1]) for _, some in several for one in some]
    for layer, state_TD in found.items():
        torch.testing.assert_close(state_TD, torch.cat([one[layer] for one in alone]), rtol=1e-4, atol=2e-5)


def test_a_model_that_answers_from_its_cache_otherwise_runs_each_prompt_whole() -> None:
    model, told = make_model("bamba"), []

    def worn(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache, state_BSD = kwargs.get("past_key_values"), output.last_hidden_state
        if cache is not None and cache.get_seq_length() > state_BSD.shape[1]:
            told.append(state_BSD.copy_(state_BSD.roll(1, dims=-1)))

    model.base_model.register_forward_hook(worn, with_kwargs=True)
    backbone = Backbone(model)
    check_against_itself(backbone, make_probe, name="m")
    assert told
    assert str(backbone.why_uncached).startswith("going on from the cache of a prompt its log-probs differ by up to")
    assert backbone.frozen_layout == backbone.layout == PADDED


def seeing_model() -> Any:
    """A tiny Qwen3.5, whose text stack has layers of linear attention."""
    torch.manual_seed(0)
    text: dict[str, Any] = dict(make_model("qwen3_5_text").config.to_dict())
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": text["hidden_size"], "num_position_embeddings": 16}
    ids: dict[str, Any] = {
        "image_token_id": IMAGE,
        "video_token_id": 60,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    config = Qwen3_5Config(text_config={**text, "rope_parameters": rope}, vision_config=vision, **ids)
    return AutoModelForImageTextToText.from_config(config).eval()


@torch.no_grad()
def test_questions_on_one_picture_go_on_from_its_positions() -> None:
    """Text counts on from the largest position of the pictures before it, in each branch as in the sample alone."""
    model, rng = seeing_model(), np.random.default_rng(5)
    sequences, alone = [], []
    for height, width in ((4, 8), (8, 4)):
        seen = [START, *[IMAGE] * (height * width // 4), END]
        trunk = np.array([*rng.integers(3, 50, 2), *seen, *rng.integers(3, 50, 6)])
        media = {"pixel_values": rng.standard_normal((height * width, 3 * 2 * 4 * 4)).astype(np.float32)}
        media["image_grid_thw"] = np.array([[1, height, width]])
        pieces = []
        for number, own in enumerate((0, 4, 2)):
            ids_P, ids_R = rng.integers(3, 50, own), rng.integers(3, 50, 3 + number)
            whole = np.concatenate([trunk, ids_P])
            types_P = (whole == IMAGE).astype(np.int64)
            prompt = Prompt(ids_P, ids_P * 0, {}) if number else Prompt(whole, types_P, media)
            pieces.append(Piece(len(trunk) if number else 0, prompt, ids_R))
            ids_S = np.concatenate([whole, ids_R])
            alone.append(Encoded(ids_S, len(whole), ids_R, (ids_S == IMAGE).astype(np.int64), media))
        sequences.append(join(pieces))
    batch = collate(sequences, pad_id=0)
    assert len(batch.inputs["image_grid_thw"]) == 2  # the pictures of all six samples
    found = captured(model, batch, [1])
    for index, one in enumerate(alone):
        inputs = collate([one], pad_id=0).inputs
        Backbone(model).forget()
        output = model(**inputs, output_hidden_states=True, use_cache=False)
        for layer, wanted in ((1, output.hidden_states[1]), (4, output.hidden_states[-1])):
            own_TD = found[layer].split(batch.num_tokens)[index]
            torch.testing.assert_close(own_TD, wanted[0, one.num_prompt - 1 : -1], rtol=1e-4, atol=5e-5)
    # Kept features take the place of pixels.
    with_groups = [
        replace(one, pictures=Pictures((PictureGroup(name, 8, {"pixel_values": 32, "image_grid_thw": 1}),), True))
        for name, one in zip("ab", sequences, strict=True)
    ]
    given = collate(with_groups, pad_id=0)
    assert PICTURES in given.inputs
    assert "pixel_values" not in given.inputs
    again = captured(model, given, [1])
    torch.testing.assert_close(again, found, rtol=1e-4, atol=2e-5)
