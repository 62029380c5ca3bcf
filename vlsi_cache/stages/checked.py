"""A loaded model that has been held against itself, with the encoder that writes its inputs."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from vlsi_cache.data.collate import collate
from vlsi_cache.data.media import Media
from vlsi_cache.data.records import Record
from vlsi_cache.data.tokenize import Encoded, Encoder
from vlsi_cache.errors import DataError, ModelError
from vlsi_cache.models.layers import Backbone
from vlsi_cache.models.probe import Probe, check_against_itself
from vlsi_cache.progress import say

# Of different lengths, so that the second is padded, with responses of several tokens.
QUESTIONS = ("probe: which of these two comes first, and why?", "probe?")
ANSWERS = ("the second one, because it is shorter.", "one.")
PICTURE_SIZE = (56, 56)
PICTURE_TOKENS = 512  # a prompt with a small picture that is longer is not worth its time
NAMED_TOKENS = 3


def checked_backbone(model: Any, encoder: Encoder) -> Backbone:
    """The model's parts, once it has said the same our way as its own; raises ModelError."""
    backbone = Backbone(model)
    check_vocabulary(encoder, backbone.real_vocab_limit)
    if note := check_against_itself(backbone, lambda: make_probe(backbone, encoder), name=encoder.name):
        say(note)
    return backbone


def check_vocabulary(encoder: Encoder, num_rows: int | None) -> None:
    """Raise ModelError where the tokenizer has ids that no row of the embedding stands for."""
    if num_rows is None or encoder.v_real <= num_rows:
        return
    above = sorted(index for index in encoder.id_of.values() if index >= num_rows)
    texts = ", ".join(f"`{text}`" for text in encoder.tokenizer.convert_ids_to_tokens(above[:NAMED_TOKENS]))
    more = f" and {len(above) - NAMED_TOKENS} more" if len(above) > NAMED_TOKENS else ""
    raise ModelError(
        f"model `{encoder.name}`: its tokenizer has ids up to {encoder.v_real - 1} and its embedding {num_rows} rows: "
        f"{texts}{more} stand for nothing. Resize the embedding (`model.resize_token_embeddings({encoder.v_real})`) "
        "and save the model again, or take these tokens out of the tokenizer"
    )


def make_probe(backbone: Backbone, encoder: Encoder) -> Probe:
    """Two short samples as the model gets them; the shorter one shows a small picture where the model sees any."""
    longer, shorter = zip(QUESTIONS, ANSWERS, strict=True)
    # Some models want a picture in every sample, and are shown one in both.
    samples = [
        _encoded(encoder, *longer) or _with_picture(encoder, *longer) or _plain(encoder, *longer),
        _with_picture(encoder, *shorter) or _encoded(encoder, *shorter) or _plain(encoder, *shorter),
    ]
    batch = _collated(backbone, encoder, samples)
    first, num_shorter = samples[0], max(1, len(samples[0].response_ids) // 2)
    return Probe(
        together=batch.inputs,
        rows_T=batch.rows_T,
        positions_T=batch.positions_T,
        alone=[_collated(backbone, encoder, [sample]).inputs for sample in samples],
        shorter=_collated(backbone, encoder, [_cut(first, num_shorter)]).inputs,
        num_shorter=num_shorter,
    )


def _collated(backbone: Backbone, encoder: Encoder, samples: Sequence[Encoded]) -> Any:
    return collate(samples, pad_id=encoder.pad_id, device=backbone.device)


def _encoded(encoder: Encoder, question: str, answer: str) -> Encoded | None:
    try:
        return encoder.encode(_record(question, answer))
    except DataError:
        return None


def _plain(encoder: Encoder, question: str, answer: str) -> Encoded:
    """Without the chat template, which wants more than a question and an answer: the model alone is judged here."""
    ids_P, ids_R = (
        np.asarray(encoder.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        for text in (question, answer)
    )
    return Encoded(np.concatenate([ids_P, ids_R]), len(ids_P), ids_R)


def _with_picture(encoder: Encoder, question: str, answer: str) -> Encoded | None:
    """A sample with a picture in its question; None where that costs many tokens or cannot be written."""
    if encoder.vision is None:
        return None
    buffer = BytesIO()
    Image.linear_gradient("L").resize(PICTURE_SIZE).convert("RGB").save(buffer, "png")
    data = buffer.getvalue()
    picture = Media(hashlib.sha256(data).hexdigest(), PICTURE_SIZE, data=data)
    record = _record(question, answer, picture)
    try:
        return encoder.encode(record) if encoder.measure(record)[0] <= PICTURE_TOKENS else None
    except DataError:
        return None


def _record(question: str, answer: str, *images: Media) -> Record:
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": parts}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return Record(id="probe", messages=turns, images=images, digest="")


def _cut(sample: Encoded, num_tokens: int) -> Encoded:
    """The sample with only the first tokens of its response."""
    stop = sample.num_prompt + num_tokens
    return replace(
        sample,
        input_ids=sample.input_ids[:stop],
        response_ids=sample.response_ids[:num_tokens],
        token_types=None if sample.token_types is None else sample.token_types[:stop],
    )
