"""Which picture of a row belongs to which place in its messages."""

from collections.abc import Mapping
from typing import Any

from vlsi_cache.errors import DataError

from .forms import Note
from .messages import Message, image_parts, text_of
from .values import shown

MARKER = "<image>"  # of LLaVA and LLaMA-Factory, in the text of a user


def place_pictures(messages: list[Message], row: Mapping[str, Any], note: Note) -> list[Any]:
    """One picture for each image part, in order, as the row gives it; the parts end as {"type": "image"} alone.

    Pictures are held by the parts themselves, or by the row: then there is a part or a marker `<image>` for each. The
    markers become parts, in place. A single `image` that has neither stands before the first text of the user.
    """
    key, given = _of_row(row)
    if given and not any(image_parts(messages)):
        num_markers = sum(text_of(message).count(MARKER) for message in messages if message["role"] == "user")
        if num_markers and num_markers != len(given):
            raise DataError(f"has {num_markers} markers `{MARKER}` for {len(given)} `{key}`; one marker for each")
        if num_markers:
            note(f"markers `{MARKER}` in the text are read as the places of pictures")
            _split_markers(messages)
        elif key == "image":
            note(f"`image` without a marker `{MARKER}` is put before the first text of the user")
            _put_first(messages, len(given))
    if any(MARKER in text_of(message) for message in messages):
        note(f"the letters `{MARKER}` stand in texts and stay text: no picture of the row belongs to them")
    return _assign(messages, key, given)


def _of_row(row: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The pictures that the row itself gives, and the key that they are under."""
    images, image = row.get("images"), row.get("image")
    if images is not None and not isinstance(images, list | tuple):
        raise DataError(f"`images` is a {type(images).__name__}, must be a list")
    if isinstance(image, str | list | tuple) and not image:
        image = None
    if image is None:
        return "images", list(images or ())
    if images:
        raise DataError("has both `image` and `images`; keep one of them")
    return "image", list(image) if isinstance(image, list | tuple) else [image]


def _assign(messages: list[Message], key: str, given: list[Any]) -> list[Any]:
    parts = list(image_parts(messages))
    bare = [part for part in parts if "picture" not in part]
    if len(bare) != len(given):
        own = f"; {len(parts) - len(bare)} parts (`image_url` and the like) hold their own" if bare != parts else ""
        raise DataError(f'has {len(bare)} parts {{"type": "image"}} for {len(given)} `{key}`; one part for each{own}')
    rest, placed, number = iter(given), [], 0
    for part in parts:
        if "picture" in part:
            placed.append(part.pop("picture"))
            continue
        index = part.pop("index", number)
        if isinstance(index, bool) or index != number:
            raise DataError(f"image part {number} has `index` `{shown(index)}`; pictures are taken in their order")
        number += 1
        placed.append(next(rest))
    return placed


def _split_markers(messages: list[Message]) -> None:
    for message in messages:
        if message["role"] != "user":
            continue
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            for number, text in enumerate(part["text"].split(MARKER)):
                parts += [{"type": "image"}] if number else []
                parts += [{"type": "text", "text": text}] if text else []
        message["content"] = parts


def _put_first(messages: list[Message], num_images: int) -> None:
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        raise DataError("has an `image` and no message of the user to put it into")
    first["content"] = [*({"type": "image"} for _ in range(num_images)), *first["content"]]
