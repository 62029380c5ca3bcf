"""Prompt and response as token ids: the response ids are the contract between teacher and student.

The texts are what the chat template writes (`chat.py`); both are read together, so that a token of the response is what
it is in its place. Image tokens stand in the prompt only, so teacher and student may differ in them (VLsI, Section 3;
the ids of the response may not differ).
Shapes: P prompt tokens, R response tokens, S = P + R.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlsi_cache.config.sections import AS_IT_IS, Encoding
from vlsi_cache.errors import DataError, ModelError, RowError

from .chat import Chat, Turn, open_chat
from .records import Record
from .values import shown
from .vision import Features, Pictures, Prompt, Vision, load_vision, pixel_path, token_ids

# How rows become tokens; counts up when that changes for some row. 1: the answer was read apart from its prompt.
CONTRACT = 2
_PLACEHOLDER_KEYS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
READ_TOGETHER = 64  # records whose texts the tokenizer is given at once
_STRADDLES = "a token stands half in their prompt and half in their response: the response is read as it goes on"


class Span(NamedTuple):
    """A response in a sequence: its ids int64 [R] stand behind `num_prompt` tokens."""

    num_prompt: int
    response_ids: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """One sequence, on the CPU: int64 ids, and the model's own media arrays. `input_ids` is prompt, then response.

    `earlier` are the samples that it holds as well: all of their tokens are its first ones. With `pictures`, the pixels
    of those whose features are held are not in `media`.
    """

    input_ids: np.ndarray
    num_prompt: int
    response_ids: np.ndarray
    token_types: np.ndarray | None = None
    media: dict[str, np.ndarray] = field(default_factory=dict)
    earlier: tuple[Span, ...] = ()
    pictures: Pictures | None = None

    @property
    def spans(self) -> list[Span]:
        """All samples of the sequence, in order."""
        return [*self.earlier, Span(self.num_prompt, self.response_ids)]


@dataclass(frozen=True)
class Measured:
    """A sample that fits: its place among the records, its tokens, and whether it goes on where the last one ended."""

    index: int
    num_prompt: int
    response_ids: np.ndarray
    goes_on: bool

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + len(self.response_ids)


def sequences(goes_on: Sequence[bool], indices: Sequence[int]) -> list[list[int]]:
    """Those of the samples `indices` that run together, in order: each goes on where its left neighbour has ended."""
    found: list[list[int]] = []
    for index in indices:
        if found and goes_on[index] and found[-1][-1] == index - 1:
            found[-1].append(index)
        else:
            found.append([index])
    return found


class _Text(NamedTuple):
    """The texts of a sample, the ids of its prompt with placeholders not expanded, and those of its response [R]."""

    turn: Turn
    prompt_ids: list[int]
    response_ids: np.ndarray


class Encoder:
    """Tokenizer, chat template and image processor of one model; made by `load_encoder`."""

    def __init__(
        self,
        tokenizer: Any,
        vision: Vision | None,
        placeholder_ids: Iterable[int],
        *,
        name: str,
        encoding: Encoding = AS_IT_IS,
        rope_limit: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.rope_limit = rope_limit  # a longer sequence has another rope, in all of its tokens
        self.vision = vision
        self.name = name
        self.id_of = dict(tokenizer.get_vocab())
        self.chat: Chat = open_chat(
            tokenizer,
            _chat_templates(tokenizer, vision, name),
            name=name,
            args=encoding.template_args,
            mode=encoding.prompt,
            placeholder_ids=placeholder_ids,
            sees_pictures=vision is not None,
        )
        self.notes: Counter[str] = Counter()  # of the rows read since somebody cleared it, for `fit_rows` to tell
        self.origin: dict[str, Any] | None = None  # what `load_encoder` was given

    @property
    def can_be_sent(self) -> bool:
        """Whether another process can load it."""
        return self.origin is not None

    def __reduce__(self) -> Any:
        if self.origin is None:
            raise TypeError("only an encoder that was loaded from a folder can be given to another process")
        return _loaded_again, (self.origin, self.fingerprint())

    @property
    def eot_id(self) -> int:
        """The token that ends a response."""
        return self.chat.eot_id

    @property
    def control_ids(self) -> dict[str, int]:
        """Tokens that steer the chat and must not stand in a text: those that the template writes around texts, those
        with a role, and media placeholders. Other added tokens (the boxes of Qwen2-VL, `<think>`) are content."""
        return dict(self.chat.control)

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
    def vocab_size(self) -> int:
        """Rows of the head that stand for a token: the highest id + 1, which is len(tokenizer) where ids have no gap.

        Heads have more rows than that (padding, not the same in every size of a family).
        """
        return max(self.id_of.values()) + 1

    def fingerprint(self) -> dict[str, Any]:
        """What decides token ids and pixels. Teacher and student must agree in `tokenizer`, not in the rest."""
        vision, templates = self.vision, self.chat.templates
        return {
            "contract": CONTRACT,
            "tokenizer": _sha256(sorted((index, token) for token, index in self.id_of.items())),
            "chat_template": _sha256(self.chat.template),
            **({"tool_template": _sha256(templates[True])} if templates[True] != templates[False] else {}),
            "template_args": dict(self.chat.args),
            "prompt": self.chat.mode,
            "image_processor": None if vision is None else vision.digest(),
            "pixel_path": self.pixel_path,
            "min_pixels": None if vision is None else vision.min_pixels,
            "max_pixels": None if vision is None else vision.max_pixels,
        }

    def deciding(self) -> str | None:
        """A digest of all that decides token ids; None where that cannot be told, as of code that is not in a library.

        `fingerprint` says less: it is what teacher and student agree on, and what a cache has stored.
        """
        is_known = not type(self.tokenizer).__module__.startswith("transformers_modules")
        if not (is_known and self.tokenizer.is_fast):
            return None
        chat = self.chat
        facts = [self.name, self.fingerprint(), self.tokenizer.backend_tokenizer.to_str(), self.rope_limit, self._bos]
        facts += [repr(chat.shape), chat.eot_id, chat.writes_eot, dict(chat.control), dict(chat.templates)]
        facts += [type(self.tokenizer).__name__, self.tokenizer.special_tokens_map, repr(type(self.vision))]
        return _sha256(json.loads(json.dumps(facts, sort_keys=True, default=str)))

    def measure(self, record: Record, *, with_response: bool = True) -> tuple[int, np.ndarray]:
        """Number of prompt tokens and response ids int64 [R], as `encode` gives them, without reading pixels.

        Raises DataError if the row cannot be encoded for this model.
        """
        with _naming(record):
            text = self._read(record, with_response)
            return self._num_prompt(record, text), text.response_ids

    def measure_all(self, records: Iterable[Record], *, with_response: bool = True) -> Iterator[Measured | RowError]:
        """`measure` of many records, in order; of what cannot be encoded the error.

        A sample goes on where one before it ended if `encode_all` puts both into one sequence.
        """
        before: tuple[Record, _Text] | None = None
        remaining, index = iter(records), 0
        while chosen := list(islice(remaining, READ_TOGETHER)):
            for record, text in zip(chosen, self._read_all(chosen, with_response), strict=True):
                try:
                    if isinstance(text, RowError):
                        raise text
                    with _naming(record):
                        num_prompt = self._num_prompt(record, text)
                    goes_on = before is not None and self._goes_on(*before, record, text)
                    yield Measured(index, num_prompt, text.response_ids, goes_on)
                    before = (record, text)
                except RowError as error:
                    yield error
                index += 1

    def measured(self, records: Iterable[Record]) -> list[Measured]:
        """`measure_all` of samples that have been encoded before; raises RowError where one cannot be."""
        found = []
        for one in self.measure_all(records):
            if isinstance(one, RowError):
                raise one
            found.append(one)
        return found

    def encode(self, record: Record, *, with_response: bool = True) -> Encoded:
        """Ids and pixels of one sample, or of its prompt as the model sees it at inference; raises DataError."""
        with _naming(record):
            return self._encoded(record, self._read(record, with_response))

    def encode_all(self, records: Sequence[Record], *, features: Features | None = None) -> list[Encoded]:
        """Ids and pixels of some samples, as few sequences: turns of a row that go on from each other are one.

        The samples come in the same order. Pictures whose `features` are held are not opened. Raises DataError.
        """
        texts = []
        for record in records:
            with _naming(record):
                texts.append(self._read(record, True))
        found: list[Encoded] = []
        earlier: list[Span] = []
        for index, (record, text) in enumerate(zip(records, texts, strict=True)):
            with _naming(record):
                if index + 1 < len(records) and self._goes_on(record, text, records[index + 1], texts[index + 1]):
                    earlier.append(Span(self._num_prompt(record, text), text.response_ids))
                    continue
                found.append(replace(self._encoded(record, text, features), earlier=tuple(earlier)))
                earlier = []
        return found

    def _encoded(self, record: Record, text: _Text, features: Features | None = None) -> Encoded:
        response_ids = text.response_ids
        if self.vision is None:
            prompt = Prompt(np.asarray(text.prompt_ids, dtype=np.int64), None, {})
        else:
            prompt = self.vision.encode(text.turn.prompt, record.images, features)
        types_P, num_prompt = prompt.token_types_P, len(prompt.ids_P)
        types_S = None if types_P is None else np.concatenate([types_P, np.zeros_like(response_ids)])
        ids_S = np.concatenate([prompt.ids_P, response_ids])
        return Encoded(ids_S, num_prompt, response_ids, types_S, prompt.media, pictures=prompt.pictures)

    def _num_prompt(self, record: Record, text: _Text) -> int:
        if self.vision is None:
            return len(text.prompt_ids)
        return self.vision.num_tokens(text.turn.prompt, record.images, text.prompt_ids)

    def _goes_on(self, record: Record, text: _Text, later: Record, longer: _Text) -> bool:
        """Whether the tokens of `later` begin with all those of `record`, and what the model sees there is the same."""
        whole = [*text.prompt_ids, *text.response_ids.tolist()]
        if record.row != later.row or not record.row or longer.prompt_ids[: len(whole)] != whole:
            return False
        # In a merged cache two sources may have rows of one id.
        if [one.sha256 for one in record.images] != [one.sha256 for one in later.images[: len(record.images)]]:
            return False
        if self.vision is not None:
            # Some processors prepare a picture otherwise where there are more of them.
            same_pictures = self.vision.takes_pictures_alone or len(record.images) == len(later.images)
            if not (self.vision.shares_prompts and same_pictures):
                return False
        return self.rope_limit is None or self._num_prompt(later, longer) + len(longer.response_ids) <= self.rope_limit

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a response up to its end of turn, if it has one."""
        kept = list(map(int, ids))
        kept = kept[: kept.index(self.eot_id)] if self.eot_id in kept else kept
        return self.tokenizer.decode(kept, clean_up_tokenization_spaces=False)

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """Text of every token by itself; part of a character shows as the replacement character."""
        return [self.tokenizer.decode([int(index)], clean_up_tokenization_spaces=False) for index in ids]

    def answer(self, ids: Iterable[int]) -> str:
        """The content of a generated response: `decode` without what the template itself writes around an answer."""
        return self.chat.answer_of(self.decode(ids))

    def _read(self, record: Record, with_response: bool) -> _Text:
        (text,) = self._read_all([record], with_response)
        if isinstance(text, RowError):
            raise text
        return text

    def _read_all(self, records: Sequence[Record], with_response: bool) -> list[_Text | RowError]:
        """The texts and ids of some records, or why one has none: the tokenizer reads all of them at once."""
        turns: list[Turn | RowError] = []
        for record in records:
            try:
                with _naming(record):
                    turns.append(self._turn(record, with_response))
            except RowError as error:
                turns.append(error)
        good = [turn for turn in turns if isinstance(turn, Turn)]
        prompts = iter(self._ids([turn.prompt for turn in good]))
        wholes = iter(self._ids([turn.prompt + turn.response for turn in good]) if with_response else ())
        found: list[_Text | RowError] = []
        for record, turn in zip(records, turns, strict=True):
            if isinstance(turn, RowError):
                found.append(turn)
                continue
            prompt_ids, response_ids = next(prompts), list[int]()
            try:
                with _naming(record):
                    if with_response:
                        response_ids = self._response_ids(turn, prompt_ids, next(wholes))
            except RowError as error:
                found.append(error)
                continue
            self.notes.update(turn.notes)
            found.append(_Text(turn, prompt_ids, np.asarray(response_ids, dtype=np.int64)))
        return found

    def _turn(self, record: Record, with_response: bool) -> Turn:
        if record.images and self.vision is None:
            raise DataError(f"has {len(record.images)} images, and `{self.name}` is a text-only model")
        turn = self.chat.turn(record) if with_response else Turn(self.chat.prompt(record), "")
        if not turn.prompt.startswith(self._bos):  # never two
            turn = replace(turn, prompt=self._bos + turn.prompt)
        return turn

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as `token_ids` gives them one by one."""
        if not texts or not self.tokenizer.is_fast:
            return [token_ids(self.tokenizer, text) for text in texts]
        options = {"return_attention_mask": False, "return_token_type_ids": False}
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False, **options)["input_ids"]

    def _response_ids(self, turn: Turn, prompt_ids: list[int], ids: list[int]) -> list[int]:
        """Those of the response, out of the `ids` of prompt and response read together."""
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:
            ids = self._continuation(turn.response)
            self.notes[_STRADDLES] += 1
        if not self.chat.writes_eot:
            ids = [*ids, self.eot_id]
        self._refuse_control_ids(ids, turn.response)
        return ids

    def _continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on from another one: without the space that some tokenizers put before a text."""
        alone = token_ids(self.tokenizer, text)
        if not self._adds_space:
            return alone
        for anchor in ("\n", ".", "a", self.chat.eot):
            before, ids = token_ids(self.tokenizer, anchor), token_ids(self.tokenizer, anchor + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return alone

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space before a text, as SentencePiece does."""
        first = self.tokenizer.convert_ids_to_tokens(token_ids(self.tokenizer, "a")[:1])
        return bool(first) and str(first[0]).startswith(("\u2581", "\u0120", " "))

    def _refuse_control_ids(self, ids: Sequence[int], text: str) -> None:
        """Control tokens that the response is read as though its text, and the template, do not write them."""
        unknown = self.tokenizer.unk_token_id
        control = set(self.chat.control.values())
        found = [index for index in ids[:-1] if index in control]
        written = len(self.chat.control_pattern.findall(text)) - self.chat.writes_eot
        if found and (unknown in found or len(found) > written):
            bad = unknown if unknown in found else found[0]
            raise DataError(f"the response is read as the control token `{self.tokenizer.convert_ids_to_tokens(bad)}`")

    @cached_property
    def _bos(self) -> str:
        """The token the tokenizer itself puts first; "" if it puts none."""
        plain, full = (self.tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
        bos = self.tokenizer.bos_token
        begins = full[:1] == [self.tokenizer.bos_token_id] and plain[:1] != full[:1]
        return bos if begins and bos is not None else ""


def load_encoder(
    model: str | Path,
    encoding: Encoding = AS_IT_IS,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    config_from: str | None = None,
    rope_limit: int | None = None,
) -> Encoder:
    """The encoder of a model folder, or of a hub id if one is named.

    `config_from` is where the model's configuration lies, for an adapter's folder, which has none. Turns that end
    behind `rope_limit`, where the rope of some models changes, are sequences of their own. Raises ModelError if
    a piece is missing, SpecError for an argument that the chat template does not read.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = str(model)
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options, **({"gguf_file": gguf_file} if gguf_file else {}))
        config = None if gguf_file else AutoConfig.from_pretrained(config_from or path, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"the tokenizer of `{path}` cannot be loaded: {error}") from error
    vision = load_vision(path, config, tokenizer, encoding, **options)
    found = (getattr(config, key, None) for key in _PLACEHOLDER_KEYS if vision is not None)
    placeholders = {index for index in found if index is not None}
    encoder = Encoder(tokenizer, vision, placeholders, name=path, encoding=encoding, rope_limit=rope_limit)
    encoder.origin = {
        "model": model,
        "encoding": encoding,
        "revision": revision,
        "gguf_file": gguf_file,
        "trust_remote_code": trust_remote_code,
        "config_from": config_from,
        "rope_limit": rope_limit,
    }
    return encoder


def _loaded_again(origin: dict[str, Any], fingerprint: dict[str, Any]) -> Encoder:
    """The encoder in another process; raises ModelError if its folder has changed meanwhile."""
    encoder = load_encoder(**origin)
    if encoder.fingerprint() != fingerprint:
        raise ModelError(f"tokenizer or processor of `{encoder.name}` have changed meanwhile; run the command again")
    return encoder


@contextmanager
def _naming(record: Record) -> Iterator[None]:
    """Errors say which row it was."""
    try:
        yield
    except RowError:  # it says so already
        raise
    except DataError as error:
        raise RowError(f"row `{shown(record.id)}`: {error}", reason=str(error)) from None


def _chat_templates(tokenizer: Any, vision: Vision | None, name: str) -> dict[bool, str]:
    """The template for rows without tools, and the one with: some tokenizers have one for each."""
    try:
        return {has_tools: tokenizer.get_chat_template(tools=[] if has_tools else None) for has_tools in (False, True)}
    except ValueError:
        template = getattr(getattr(vision, "processor", None), "chat_template", None)
    if not isinstance(template, str):
        raise ModelError(f"`{name}` has no chat template; put a chat_template.jinja beside its tokenizer.json")
    return {False: template, True: template}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
