"""One chat row, checked: its messages, pictures and responses, or the reason why it cannot be used.

A row: `messages` [{role, content}], where content is a string or parts {"type": "text", "text": ...}, {"type": "image"}
and {"type": "video"}; `images`, one per image part and in order: a path, or {path | bytes, sha256}; `videos` alike,
each a path or a list of frames; optional `id`, `system`, `kind`, and what a chat template is given: `tools`,
`chat_template_kwargs`, and in messages `reasoning_content`, `tool_calls`, `name`, `tool_call_id`. Each message of the
assistant is a response that is learned (with `data.turns: last` the last one alone), but for those of `weight: 0` or
`train: false`: a row of n responses becomes n records, `ID/1` to `ID/n`, each of the messages up to its response. What
other tools write is read too, see `sources`, `messages`, `images` and `video`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vlsi_cache.config.sections import Turns
from vlsi_cache.errors import DataError

from .images import Media, place_pictures
from .messages import (
    UNSUPPORTED,
    Message,
    as_parts,
    check_messages,
    image_parts,
    learned_turns,
    text_of,
    turns_of,
)
from .values import given_json, is_empty, shown, text_value
from .video import FramesOf, frames_for_videos, split_video_markers

_MAX_ID_BITS = 256  # of an id that is a number
_LATER = ("messages", "images", "tools", "template_args")  # of a record that lies in a file
_AS_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))
_IN_ORDER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Record:
    """One response that is learned, and what comes before it; content is always a list of parts.

    The last message is that response; `system` has become the first one. `row` is the id of the row: `id` itself, where
    the row has one response. Messages may also hold `reasoning_content`, `tool_calls`,
    `name` and `tool_call_id`, as the chat template is given them; `tools` and `template_args` (the row's
    `chat_template_kwargs`) are what else it is given. Of a record that lies in a file (`Record.later`) all but its
    names and its digest is read when it is first asked for.
    """

    id: str
    messages: list[dict[str, Any]]
    images: tuple[Media, ...]
    digest: str
    kind: str = ""
    tools: list[dict[str, Any]] | None = field(default_factory=lambda: None)
    template_args: dict[str, Any] = field(default_factory=dict)
    row: str = ""

    @cached_property
    def opening(self) -> str:
        """What the sample begins with, see `opening_of`; samples of one opening begin alike."""
        return opening_of(as_json(self.prompt_messages), self.images, self.tools, self.template_args)

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """All messages before the response."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the response."""
        return text_of(self.messages[-1])

    @classmethod
    def later(cls, load: Callable[[str], dict[str, Any]], **known: Any) -> "Record":
        """A record of which only `known` is there; `load(name)` gives the field of that name, and others beside it."""
        record = object.__new__(cls)
        record.__dict__.update(known, _load=load)
        return record

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """A field that is not there yet: Python asks here for those alone."""
            if name not in _LATER or "_load" not in self.__dict__:
                raise AttributeError(f"a record has no `{name}`")
            self.__dict__.update(self._load(name))
            return self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        """All of it: another process gets a record that is whole."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def content_of(
    row: Mapping[str, Any], turns: Turns, notes: set[str], frames_of: FramesOf
) -> tuple[list[Message], list[Any], list[int]]:
    """The messages up to the last response, the pictures in them, one for each image part, and where responses are.

    Videos have become pictures: those that `frames_of` gives for the row's entry, see `video.frames_of`.
    """
    for key in UNSUPPORTED:
        if not is_empty(row.get(key)):
            raise DataError(f"has `{key}`, which {'are' if key.endswith('s') else 'is'} not supported yet")
    messages, may_learn = check_messages(turns_of(row, notes.add), notes.add)
    if row.get("system") is not None:
        if messages[0]["role"] == "system":
            raise DataError("has both `system` and a system message")
        messages.insert(0, {"role": "system", "content": as_parts(text_value(row["system"], "`system`"))})
        may_learn.insert(0, False)
    split_video_markers(messages, row, notes.add)
    pictures = place_pictures(messages, row, notes.add)
    pictures = frames_for_videos(messages, pictures, row, frames_of, notes.add)
    learned = learned_turns(messages, may_learn, turns, notes.add)
    messages = messages[: learned[-1] + 1]
    return messages, pictures[: sum(1 for _ in image_parts(messages))], learned


def id_of_row(row: Mapping[str, Any], content: bytes) -> str:
    """The id that a row gives itself, or else the beginning of its digest."""
    row_id = row.get("id")
    if row_id is None:
        return digest_of(content)[:16]
    if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
        raise DataError(f"`id` is {shown(row_id) or repr(row_id)}, must be a text or a whole number")
    if isinstance(row_id, int) and row_id.bit_length() > _MAX_ID_BITS:
        raise DataError(f"`id` is a whole number of more than {_MAX_ID_BITS} bits; write it as text")
    return text_value(str(row_id), "`id`")


def for_template(row: Mapping[str, Any], key: str) -> Any:
    """What `tools` or `chat_template_kwargs` of a row hold, also as JSON text; None for nothing."""
    found = None if is_empty(row.get(key)) else given_json(row[key], f"`{key}`")
    if is_empty(found):
        return None
    if key == "tools" and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise DataError("`tools` must be a list of mappings, one for each tool")
    if key != "tools" and not isinstance(found, dict):
        raise DataError(f"`{key}` is a {type(found).__name__}, must be a mapping of names and values")
    return found


def as_json(messages: Iterable[Message]) -> list[str]:
    """Each message in the one way in which it is written."""
    return [_AS_JSON.encode(message) for message in messages]


def content_text(
    messages: Sequence[str],
    images: Sequence[Media],
    tools: list[dict[str, Any]] | None,
    template_args: dict[str, Any],
) -> bytes:
    """All that a record is, but for its names: the same for every way to write the same row.

    `messages` are those of `as_json`: turns of one row have most of them in common.
    """
    sha256 = ",".join(f'"{image.sha256}"' for image in images)
    text = f'{{"images":[{sha256}],"messages":[{",".join(messages)}]'
    # Rows without these keep the digest that they had before there were any.
    text += f',"template_args":{_AS_JSON.encode(template_args)}' if template_args else ""
    text += f',"tools":{_AS_JSON.encode(tools)}' if tools else ""
    return f"{text}}}".encode()


def kept_text(
    messages: Sequence[Message],
    images: Sequence[Media],
    tools: list[dict[str, Any]] | None,
    template_args: dict[str, Any],
    content: bytes,
) -> bytes:
    """What is kept in a file of a record whose `content_text` is `content`: the same with all mappings in the order
    that the row has them in, in which chat templates write tools and their calls."""
    if not (tools or template_args or any("tool_calls" in message for message in messages)):
        return content
    facts: dict[str, Any] = {"images": [image.sha256 for image in images], "messages": messages}
    facts |= {"template_args": template_args} if template_args else {}
    return _IN_ORDER.encode(facts | ({"tools": tools} if tools else {})).encode()


def opening_of(
    before: Sequence[str],
    images: Sequence[Media],
    tools: list[dict[str, Any]] | None,
    template_args: dict[str, Any],
) -> str:
    """A short digest of the pictures, or of all that is said `before` the response (see `as_json`) where there are
    none."""
    if images:
        return hashlib.sha256("".join(image.sha256 for image in images).encode()).hexdigest()[:16]
    return digest_of(content_text(before, (), tools, template_args))[:16]


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
