"""Prompt and response as token ids, apart: the response ids are the contract between teacher and student.

The prompt is the chat template's text of all messages but the last, ending where the assistant begins; the response is
the last message's text and the end-of-turn token. Image tokens stand in the prompt only, so teacher and student may
differ in them (VLsI, Section 3; the ids of the response may not differ).
Shapes: P prompt tokens, R response tokens, S = P + R.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from vlsi_cache.errors import DataError, ModelError, list_problems

from .records import Record, text_of
from .vision import Vision, load_vision, pixel_path, token_ids

# Some chat templates print today's date, and a prompt must not depend on the day it was made: theirs is this day.
_DAY = {"%Y": "2024", "%y": "24", "%m": "07", "%-m": "7", "%B": "July", "%b": "Jul", "%d": "26", "%-d": "26"}
_DAY |= {"%A": "Friday", "%a": "Fri", "%H": "12", "%M": "00", "%S": "00", "%F": "2024-07-26"}
_FIXED_DAY = "".join(f" | replace('{code}', '{text}')" for code, text in _DAY.items())
_FIXED_DAY = "{%- macro strftime_now(format) -%}{{ format" + _FIXED_DAY + " }}{%- endmacro -%}\n"
_ASKED, _ANSWERED = "vlsi-probe-question", "vlsi-probe-answer"
_ROLE_NAMES = ("eos_token", "bos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_PLACEHOLDER_KEYS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class Encoded:
    """One sample, on the CPU: int64 ids, and the model's own media arrays. `input_ids` is prompt, then response."""

    input_ids: np.ndarray
    num_prompt: int
    response_ids: np.ndarray
    token_types: np.ndarray | None = None
    media: dict[str, np.ndarray] = field(default_factory=dict)


class Encoder:
    """Tokenizer, chat template and image processor of one model; made by `load_encoder`."""

    def __init__(self, tokenizer: Any, vision: Vision | None, placeholder_ids: Iterable[int], *, name: str) -> None:
        self.tokenizer = tokenizer
        self.vision = vision
        self.name = name
        self.chat_template = _chat_template(tokenizer, vision, name)
        self.id_of = dict(tokenizer.get_vocab())
        self._as_parts, tail = self._probe()
        self.eot_id = self._end_of_turn(tail)
        self.control_ids = self._find_control({self.eot_id, *placeholder_ids})

    @property
    def image_processor(self) -> Any:
        return None if self.vision is None else self.vision.image_processor

    @property
    def pixel_path(self) -> str:
        """ "none" for a text-only model, else "pil" or "torchvision"."""
        return pixel_path(self.vision)

    @property
    def pad_id(self) -> int:
        pad_id = self.tokenizer.pad_token_id
        return self.eot_id if pad_id is None else int(pad_id)

    @cached_property
    def v_real(self) -> int:
        """Rows of the head that stand for a token: the highest id + 1, which is len(tokenizer) where ids have no gap.

        Heads have more rows than that (padding, not the same in every size of a family).
        """
        return max(self.id_of.values()) + 1

    def fingerprint(self) -> dict[str, str | int | None]:
        """What decides token ids and pixels. Teacher and student must agree in `tokenizer`, not in the rest."""
        vision = self.vision
        return {
            "tokenizer": _sha256(sorted((index, token) for token, index in self.id_of.items())),
            "chat_template": _sha256(self.chat_template),
            "image_processor": None if vision is None else vision.digest(),
            "pixel_path": self.pixel_path,
            "min_pixels": None if vision is None else vision.min_pixels,
            "max_pixels": None if vision is None else vision.max_pixels,
        }

    def measure(self, record: Record) -> tuple[int, np.ndarray]:
        """Number of prompt tokens and response ids int64 [R], as `encode` gives them, without reading pixels.

        Raises DataError if the row cannot be encoded for this model.
        """
        try:
            text, response_ids = self._prompt_text(record), self._response_ids(record)
            if self.vision is None:
                return len(token_ids(self.tokenizer, text)), response_ids
            return self.vision.num_tokens(text, record.images), response_ids
        except DataError as error:
            raise DataError(f"row `{record.id}`: {error}") from None

    def encode(self, record: Record, *, with_response: bool = True) -> Encoded:
        """Ids and pixels of one sample; raises DataError if the row cannot be encoded for this model."""
        try:
            text = self._prompt_text(record)
            response_ids = self._response_ids(record) if with_response else np.zeros(0, dtype=np.int64)
            if self.vision is None:
                ids_P, types_P, media = np.asarray(token_ids(self.tokenizer, text), dtype=np.int64), None, {}
            else:
                prompt = self.vision.encode(text, record.images)
                ids_P, types_P, media = prompt.ids_P, prompt.token_types_P, prompt.media
        except DataError as error:
            raise DataError(f"row `{record.id}`: {error}") from None
        types_S = None if types_P is None else np.concatenate([types_P, np.zeros_like(response_ids)])
        return Encoded(np.concatenate([ids_P, response_ids]), len(ids_P), response_ids, types_S, media)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a response up to its end of turn, if it has one."""
        kept = list(map(int, ids))
        kept = kept[: kept.index(self.eot_id)] if self.eot_id in kept else kept
        return self.tokenizer.decode(kept, clean_up_tokenization_spaces=False)

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """Text of every token by itself; part of a character shows as the replacement character."""
        return [self.tokenizer.decode([int(index)], clean_up_tokenization_spaces=False) for index in ids]

    def _prompt_text(self, record: Record) -> str:
        """The chat template's text, with a beginning-of-sequence token if the tokenizer wants one: never two."""
        if record.images and self.vision is None:
            raise DataError(f"has {len(record.images)} images, and `{self.name}` is a text-only model")
        for message in record.prompt_messages:
            self._refuse_control(text_of(message), f"the {message['role']} text")
        text = self._render(record.prompt_messages, add_generation_prompt=True)
        return text if text.startswith(self._bos) else self._bos + text

    def _response_ids(self, record: Record) -> np.ndarray:
        self._refuse_control(record.answer, "the response")
        ids = token_ids(self.tokenizer, record.answer)
        if any(index in self._control_set for index in ids):
            bad = next(index for index in ids if index in self._control_set)
            raise DataError(f"the response is read as the control token `{self.tokenizer.convert_ids_to_tokens(bad)}`")
        return np.asarray([*ids, self.eot_id], dtype=np.int64)

    def _refuse_control(self, text: str, what: str) -> None:
        found = self._control_pattern.search(text)
        if found:
            raise DataError(f"{what} holds the control token `{found.group()}`, which would not be read as text")

    @cached_property
    def _control_set(self) -> frozenset[int]:
        return frozenset(self.control_ids.values())

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in sorted(self.control_ids, key=len, reverse=True)))

    @cached_property
    def _bos(self) -> str:
        """The token the tokenizer itself puts first; "" if it puts none."""
        plain, full = (self.tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
        bos = self.tokenizer.bos_token
        begins = full[:1] == [self.tokenizer.bos_token_id] and plain[:1] != full[:1]
        return bos if begins and bos is not None else ""

    def _find_control(self, placeholder_ids: set[int]) -> dict[str, int]:
        """Tokens that steer the chat: those the template writes, those with a role, and media placeholders.

        Other special tokens (the boxes of Qwen2-VL) are ordinary content of a response.
        """
        special = {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        control = {token: index for token, index in special.items() if token in self.chat_template}
        names = (getattr(self.tokenizer, name, None) for name in (*_ROLE_NAMES, "image_token", "video_token"))
        control |= {name: self.id_of[name] for name in names if name is not None and name in self.id_of}
        return control | {str(self.tokenizer.convert_ids_to_tokens(index)): index for index in placeholder_ids}

    def _end_of_turn(self, tail: str) -> int:
        """The first special token after the assistant's text in the chat template; else the end of sequence."""
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= {self.tokenizer.eos_token_id}
        found = [index for index in token_ids(self.tokenizer, tail) if index in special]
        eot_id = found[0] if found else self.tokenizer.eos_token_id
        if eot_id is None:
            raise ModelError(f"`{self.name}` ends a turn with no special token and names no eos_token")
        return int(eot_id)

    def _probe(self) -> tuple[bool, str]:
        """Whether the template wants lists of parts even for plain text, and what it writes after an answer."""
        reason = "it leaves them out"
        for self._as_parts in (False, True):
            try:
                text = self._render([_turn("user", _ASKED), _turn("assistant", _ANSWERED)], add_generation_prompt=False)
            except DataError as error:
                reason = str(error)
                continue
            if _ASKED in text and _ANSWERED in text:
                return self._as_parts, text.split(_ANSWERED)[-1]
        raise ModelError(f"the chat template of `{self.name}` does not write a question and an answer: {reason}")

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                [message if self._as_parts else _plain(message) for message in messages],
                chat_template=_FIXED_DAY * ("strftime_now" in self.chat_template) + self.chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"the chat template of `{self.name}` refuses the messages: {error}") from None


def load_encoder(
    model: str | Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
    config_from: str | None = None,
) -> Encoder:
    """The encoder of a model folder, or of a hub id if one is named; raises ModelError if a piece is missing.

    `config_from` is where the model's configuration lies, for an adapter's folder, which has none.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = str(model)
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options, **({"gguf_file": gguf_file} if gguf_file else {}))
        config = None if gguf_file else AutoConfig.from_pretrained(config_from or path, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"the tokenizer of `{path}` cannot be loaded: {error}") from error
    vision = load_vision(path, config, tokenizer, min_pixels=min_pixels, max_pixels=max_pixels, **options)
    found = (getattr(config, key, None) for key in _PLACEHOLDER_KEYS if vision is not None)
    return Encoder(tokenizer, vision, {index for index in found if index is not None}, name=path)


def fit_rows(
    records: Sequence[Record],
    encoder: Encoder,
    max_length: int,
    *,
    bad_rows: Literal["refuse", "list"] = "refuse",
) -> tuple[list[tuple[int, int, np.ndarray]], list[dict[str, str]]]:
    """Measure all rows: the (index, number of prompt tokens, response ids) that fit, and the {id, reason} that do not.

    No row is ever cut. Raises DataError if none fits, or (unless `bad_rows` is "list") if one cannot be encoded.
    """
    kept: list[tuple[int, int, np.ndarray]] = []
    skipped: list[dict[str, str]] = []
    problems: list[str] = []
    for index, record in enumerate(tqdm(records, desc="measure rows", unit="row", delay=2, disable=None)):
        try:
            num_prompt, response_ids = encoder.measure(record)
        except DataError as error:
            problems.append(str(error))
            skipped.append({"id": record.id, "reason": str(error).removeprefix(f"row `{record.id}`: ")})
            continue
        num_tokens = num_prompt + len(response_ids)
        if num_tokens <= max_length:
            kept.append((index, num_prompt, response_ids))
        else:
            skipped.append({"id": record.id, "reason": f"{num_tokens} tokens, data.max_length is {max_length}"})
    _check_fit(len(kept), skipped, problems, encoder.name, bad_rows)
    return kept, skipped


def _check_fit(
    num_kept: int, skipped: list[dict[str, str]], problems: list[str], name: str, bad_rows: Literal["refuse", "list"]
) -> None:
    if problems and bad_rows == "refuse":
        advice = "mend them, or leave them out with data.bad_rows: list"
        raise DataError(f"{len(problems)} rows cannot be encoded for `{name}`; {advice}\n{list_problems(problems)}")
    if not num_kept:
        lines = [f"row `{row['id']}`: {row['reason']}" for row in skipped]
        raise DataError(f"no row is left for `{name}` out of {len(skipped)}\n{list_problems(lines)}")


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message without images as a plain string, which every template can read."""
    has_image = any(part["type"] == "image" for part in message["content"])
    return message if has_image else {"role": message["role"], "content": text_of(message)}


def _chat_template(tokenizer: Any, vision: Vision | None, name: str) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        template = getattr(getattr(vision, "processor", None), "chat_template", None)
    if not isinstance(template, str):
        raise ModelError(f"`{name}` has no chat template; put a chat_template.jinja beside its tokenizer.json")
    return template


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
