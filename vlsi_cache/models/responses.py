"""What a model answers to prompts: the one place that calls `model.generate`, for `evaluate` and for `generate`.

The model's own distribution over the real vocabulary is what is followed: the habits that a model folder brings along
in its generation_config.json (top-k, repetition penalty, ...) are left out, as a cache has none of them either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from vlsi_cache.data.collate import collate_prompts
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.records import Record
from vlsi_cache.errors import SpecError


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: the likeliest at temperature 0, else a draw; or the best of `num_beams` beams."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SpecError(f"`max_new_tokens` is {self.max_new_tokens}, must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise SpecError(f"`temperature` is {self.temperature}, must be 0 (the likeliest token) or above")
        if not 0 < self.top_p <= 1:
            raise SpecError(f"`top_p` is {self.top_p}, must be above 0 and at most 1")
        if self.top_p < 1 and not self.temperature:
            raise SpecError(f"`top_p` {self.top_p} belongs to sampling: give a `temperature` above 0 as well")


@dataclass(frozen=True)
class Response:
    """Generated ids, without the end of turn; and whether the model came to it."""

    ids: list[int]
    ended: bool


@torch.inference_mode()
def respond(model: Any, encoder: Encoder, records: Sequence[Record], decoding: Decoding) -> list[Response]:
    """One response to the prompt of each record, all in one batch; draws are keyed by torch's random state."""
    encoded = [encoder.encode(record, with_response=False) for record in records]
    inputs = collate_prompts(encoded, pad_id=encoder.pad_id, device=model.device)
    own, model.generation_config = model.generation_config, _config(model, encoder, decoding)
    try:
        output = model.generate(**inputs)
    finally:
        model.generation_config = own
    return [_response(ids, encoder.eot_id) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]


def _config(model: Any, encoder: Encoder, decoding: Decoding) -> GenerationConfig:
    drawn = {"temperature": decoding.temperature, "top_k": 0, "top_p": decoding.top_p} if decoding.temperature else {}
    padding = list(range(encoder.vocab_size, model.get_output_embeddings().weight.shape[0]))
    return GenerationConfig(
        do_sample=bool(drawn),
        **drawn,
        num_beams=decoding.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=encoder.eot_id,
        pad_token_id=encoder.pad_id,
        suppress_tokens=padding or None,
    )


def _response(ids: list[int], eot_id: int) -> Response:
    ended = eot_id in ids
    return Response(ids[: ids.index(eot_id)] if ended else ids, ended)
