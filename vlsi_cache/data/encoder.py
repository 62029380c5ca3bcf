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
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlsi_cache.config.sections import AS_IT_IS, Encoding
from vlsi_cache.errors import DataError, ModelError, RowError

from .chat import Chat, Turn, open_chat
from .pictures import Features
from .records import Record, alike
from .sequence import MIN_SHARED, PADDED, Encoded, Extent, Layout, Piece, join, num_in_common, sequences
from .token_bytes import TokenBytes, token_bytes
from .tokens import TextReader
from .values import shown
from .vision import Prompt, Vision, load_vision, pixel_path, token_ids

# How rows become tokens; counts up when that changes for some row. 1: the answer was read apart from its prompt.
CONTRACT = 2
_PLACEHOLDER_KEYS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
READ_TOGETHER = 64  # records whose texts the tokenizer is given at once
_STRADDLES = "a token stands half in their prompt and half in their response: the response is read as it goes on"


@dataclass(frozen=True)
class Measured:
    """A sample that fits: its place among the records, its tokens, and how many of them, its first ones, it has in
    common with the sample before (0: those two are not run together)."""

    index: int
    num_prompt: int
    response_ids: np.ndarray
    num_shared: int

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + len(self.response_ids)

    @property
    def extent(self) -> Extent:
        return Extent(self.num_tokens, self.num_shared)


class _Text(NamedTuple):
    """The texts of a sample, the ids of its prompt with placeholders not expanded, and those of its response [R]."""

    turn: Turn
    prompt_ids: np.ndarray
    response_ids: np.ndarray


class _Shared(NamedTuple):
    """What two samples have in common: the first ids, with placeholders not expanded, the first pictures, and tokens,
    with placeholders expanded."""

    num_ids: int
    num_images: int
    num_shared: int


NOTHING = _Shared(0, 0, 0)


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
        self._placeholder_ids = {*placeholder_ids}
        self.name = name
        self.id_of = dict(tokenizer.get_vocab())
        self.chat: Chat = open_chat(
            tokenizer,
            _chat_templates(tokenizer, vision, name),
            name=name,
            args=encoding.template_args,
            mode=encoding.prompt,
            placeholder_ids=self._placeholder_ids,
            sees_pictures=vision is not None,
        )
        self._control = {*self.chat.control.values()}
        self._reader = TextReader(tokenizer, self.chat.control)
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
    def placeholder_ids(self) -> set[int]:
        """Tokens that stand for pictures."""
        return self._placeholder_ids

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

    @cached_property
    def token_bytes(self) -> TokenBytes | None:
        """The bytes of every token; None where the vocabulary does not say them."""
        return token_bytes(self.tokenizer, self.vocab_size)

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

        What a sample has in common with the one before it is what `encode_all` has once in its sequences.
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
                        num_shared = 0 if before is None else self._shared(before, (record, text)).num_shared
                    yield Measured(index, num_prompt, text.response_ids, num_shared)
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
        """Ids and pixels of one sample, or of its prompt as the model sees it at inference; raises DataError.

        A batch of such samples is what the model itself takes, with all pixels.
        """
        with _naming(record):
            text = self._read(record, with_response)
        return replace(join([self._piece(record, text, NOTHING, None)]), pictures=None)

    def encode_all(
        self, records: Sequence[Record], layout: Layout = PADDED, *, features: Features | None = None
    ) -> list[Encoded]:
        """Ids and pixels of some samples, in as few sequences as `layout` allows (see `sequence.sequences`).

        The samples come in the same order. Pictures whose `features` are held are not opened. A batch of what this
        gives goes through `Backbone.capture`, which shows a picture that is in it twice to the tower once. Raises
        DataError.
        """
        read: list[tuple[Record, _Text]] = []
        shared: list[_Shared] = []
        extents: list[Extent] = []
        for record, text in zip(records, self._read_all(records, True), strict=True):
            if isinstance(text, RowError):
                raise text
            with _naming(record):
                shared.append(self._shared(read[-1], (record, text)) if read else NOTHING)
                length = self._num_prompt(record, text) + len(text.response_ids)
                extents.append(Extent(length, shared[-1].num_shared))
                read.append((record, text))
        found = []
        for first, *later in self._shown_alike(records, extents, layout):
            pieces = [self._piece(*read[first], NOTHING, features)]
            pieces += [self._piece(*read[index], shared[index], features) for index in later]
            found.append(join(pieces))
        return found

    def token_ids(self, records: Sequence[Record]) -> list[tuple[np.ndarray, int]]:
        """All ids int64 [S] of each sample, prompt and response, and how many are its prompt; raises DataError.

        Those without pictures are read together, which is several times as fast as one by one.
        """
        texts = iter(self._read_all([record for record in records if not record.images], True))
        found = []
        for record in records:
            if record.images:
                encoded = self.encode(record)
                found.append((encoded.input_ids, encoded.num_prompt))
                continue
            text = next(texts)
            if isinstance(text, RowError):
                raise text
            found.append((np.concatenate([text.prompt_ids, text.response_ids]), len(text.prompt_ids)))
        return found

    def _shown_alike(self, records: Sequence[Record], extents: Sequence[Extent], layout: Layout) -> list[list[int]]:
        """`sequences`; where branches have rows of their own, all pictures must be in what they share."""
        runs: list[list[int]] = []
        for run in sequences(extents, range(len(records)), layout):
            is_mixed = len({len(records[index].images) for index in run}) > 1
            runs += sequences(extents, run, PADDED) if is_mixed and layout.goes_on_from_caches else [run]
        return runs

    def _piece(self, record: Record, text: _Text, shared: "_Shared", features: Features | None) -> Piece:
        """What the sample has beyond what it shares."""
        with _naming(record):
            ids, images = text.prompt_ids[shared.num_ids :], record.images[shared.num_images :]
            if self.vision is None:
                prompt = Prompt(ids, None, {})
            elif shared.num_ids:
                prompt = self.vision.encode_ids(ids, images, features)
            else:
                prompt = self.vision.encode(text.turn.prompt, images, features)
            return Piece(shared.num_shared, prompt, text.response_ids)

    def _num_prompt(self, record: Record, text: _Text) -> int:
        if self.vision is None:
            return len(text.prompt_ids)
        return self.vision.num_tokens(text.turn.prompt, record.images, text.prompt_ids.tolist())

    def _shared(self, before: tuple[Record, _Text], after: tuple[Record, _Text]) -> "_Shared":
        """What `after` begins with of all tokens of `before`, where the model sees the same in them."""
        (record, text), (later, longer) = before, after
        if not alike(record, later):
            return NOTHING
        whole = np.concatenate([text.prompt_ids, text.response_ids])
        num_ids = num_in_common(whole, longer.prompt_ids)
        goes_on = num_ids == len(whole)
        num_images = min(len(record.images), len(later.images))
        # In a merged cache two sources may have rows of one id.
        same = [one.sha256 for one in record.images[:num_images]] == [one.sha256 for one in later.images[:num_images]]
        if not same or not num_ids:
            return NOTHING
        num_prompt = self._num_prompt(later, longer)
        if self.rope_limit is not None and num_prompt + len(longer.response_ids) > self.rope_limit:
            return NOTHING
        if self.vision is not None:
            # Some processors prepare a picture otherwise where there are more of them.
            same_pictures = self.vision.takes_pictures_alone or len(record.images) == len(later.images)
            if not (self.vision.shares_prompts and same_pictures):
                return NOTHING
            if not (goes_on or self.vision.may_branch):
                return NOTHING
            # The pictures of a branch are all in what it shares: then those of a sequence come in one order.
            if not goes_on and np.isin(longer.prompt_ids[num_ids:], list(self._placeholder_ids)).any():
                return NOTHING
        num_shared = num_prompt - (len(longer.prompt_ids) - num_ids)  # where no picture comes behind it
        if goes_on:
            num_shared = self._num_prompt(record, text) + len(text.response_ids)
        return _Shared(num_ids, num_images, num_shared) if goes_on or num_shared >= MIN_SHARED else NOTHING

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
        turns = self._turns(records, with_response)
        good = [turn for turn in turns if isinstance(turn, Turn)]
        # What stands behind the cut is read twice: alone, and with the response that goes on from it.
        cut = [self._reader.cut(turn.prompt) for turn in good]
        texts = [text for parts in cut for text in parts]
        texts += [last + turn.response for (_, last), turn in zip(cut, good, strict=True)] if with_response else []
        ids = self._reader.ids(texts)
        parts, wholes = zip(ids[: 2 * len(cut) : 2], ids[1 : 2 * len(cut) : 2], strict=True), iter(ids[2 * len(cut) :])
        found: list[_Text | RowError] = []
        for record, turn in zip(records, turns, strict=True):
            if isinstance(turn, RowError):
                found.append(turn)
                continue
            (first_ids, last_ids), response_ids = next(parts), list[int]()
            try:
                with _naming(record):
                    if with_response:
                        response_ids = self._response_ids(turn, last_ids, next(wholes))
            except RowError as error:
                found.append(error)
                continue
            self.notes.update(turn.notes)
            ids_P, ids_R = (np.asarray(ids, dtype=np.int64) for ids in (first_ids + last_ids, response_ids))
            found.append(_Text(turn, ids_P, ids_R))
        return found

    def _turns(self, records: Sequence[Record], with_response: bool) -> list[Turn | RowError]:
        """The texts of some records, or why one has none."""
        found: dict[int, Turn | RowError] = {}
        for number, record in enumerate(records):
            try:
                with _naming(record):
                    if record.images and self.vision is None:
                        raise DataError(f"has {len(record.images)} images, and `{self.name}` is a text-only model")
                    self.chat.refuse_control(record, with_response=with_response)
            except RowError as error:
                found[number] = error
        good = [number for number in range(len(records)) if number not in found]
        turns = self.chat.turns([records[number] for number in good], with_response=with_response)
        for number, turn in zip(good, turns, strict=True):
            if isinstance(turn, DataError):
                found[number] = _named(records[number], turn)
            elif turn.prompt.startswith(self._bos):  # never two
                found[number] = turn
            else:
                found[number] = replace(turn, prompt=self._bos + turn.prompt)
        return [found[number] for number in range(len(records))]

    def _response_ids(self, turn: Turn, prompt_ids: list[int], ids: list[int]) -> list[int]:
        """Those of the response, out of the `ids` of (the end of) the prompt and the response read together."""
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
        found = [index for index in ids[:-1] if index in self._control]
        if not found:
            return
        unknown = self.tokenizer.unk_token_id
        written = len(self.chat.control_pattern.findall(text)) - self.chat.writes_eot
        if unknown in found or len(found) > written:
            bad = unknown if unknown in found else found[0]
            raise DataError(f"the response is read as the control token `{self.tokenizer.convert_ids_to_tokens(bad)}`")

    @cached_property
    def _bos(self) -> str:
        """The token the tokenizer itself puts first; "" if it puts none."""
        # A processor's own: PaliGemma's takes that away from it, and puts one where it belongs, behind the pictures.
        tokenizer = self.tokenizer if self.vision is None else self.vision.tokenizer
        plain, full = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
        bos = tokenizer.bos_token
        begins = full[:1] == [tokenizer.bos_token_id] and plain[:1] != full[:1]
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
        raise _named(record, error) from None


def _named(record: Record, error: DataError) -> RowError:
    return RowError(f"row `{shown(record.id)}`: {error}", reason=str(error))


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
