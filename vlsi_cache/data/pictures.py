"""The pictures of samples and batches, apart from their tokens: which go through the vision tower together, which of
them are there more than once, and what of them is known without their pixels.

A processor writes as many tokens for a picture as its image processor says. What that said, without the pixels, is kept
with the features of the picture (`Recorder`), and takes its place later (`StandIn`): then nothing is decoded, resized
or normalised again, whatever the text around the picture.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

TEXT_KEYS = ("token_type_ids",)  # of the arrays of a sample: those of its tokens, not of its pictures


class Features(Protocol):
    """What keeps the features of pictures: `get` gives those of a digest, with what is known `about` it, or None."""

    def get(self, digest: str) -> Any: ...


@dataclass(frozen=True)
class PictureGroup:
    """Pictures that are prepared and go through the tower together: one of the Qwen VLs', all of a sample's elsewhere.

    `num_rows` is how many rows (first axis) of each array of a sample are this group's, in the order of the groups.
    `held` are its features, then its pixels are in no array; `about` is what the encoder wants to be told with them.
    `media` are its arrays as tensors, once it is in a batch: of a group that is held, or that is there twice, none.
    """

    digest: str
    num_tokens: int
    num_rows: dict[str, int]
    about: str = ""
    held: Any = None
    media: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Pictures:
    """The groups of pictures of a sample or batch in the order of their tokens. `are_kept`: by digest, for later."""

    groups: tuple[PictureGroup, ...]
    are_kept: bool = False

    def to(self, device: Any, *, non_blocking: bool = False) -> "Pictures":
        return self._each(lambda one: one.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Pictures":
        """Pixels in page-locked memory; features lie in memory that is not copied again."""
        return self._each(lambda one: one.pin_memory() if isinstance(one, torch.Tensor) else one)

    def _each(self, change: Callable[[Any], Any]) -> "Pictures":
        groups = (
            replace(
                group,
                held=None if group.held is None else change(group.held),
                media={name: change(tensor) for name, tensor in group.media.items()},
            )
            for group in self.groups
        )
        return replace(self, groups=tuple(groups))

    @staticmethod
    def joined(several: Sequence["Pictures"]) -> "Pictures":
        groups = tuple(group for one in several for group in one.groups)
        return Pictures(groups, any(one.are_kept for one in several))


def pictures_of_batch(samples: Sequence[tuple[dict[str, np.ndarray], Pictures | None]]) -> Pictures | None:
    """Those of a batch of samples, each with its arrays, cut by group; None where the model is to be given all pixels.

    That is where nothing is kept and no group is there twice.
    """
    seeing = [(media, pictures) for media, pictures in samples if pictures or not media.keys() <= {*TEXT_KEYS}]
    groups: list[PictureGroup] = []
    seen: set[str] = set()
    are_kept = False
    for media, pictures in seeing:
        if pictures is None:
            return None
        are_kept |= pictures.are_kept
        first = dict.fromkeys(media, 0)
        for group in pictures.groups:
            rows = {name: slice(first[name], first[name] + num) for name, num in group.num_rows.items() if num}
            first |= {name: own.stop for name, own in rows.items()}
            own_media = {}
            if group.held is None and group.digest not in seen:
                own_media = {name: torch.from_numpy(media[name][own]) for name, own in rows.items()}
            seen.add(group.digest)
            groups.append(replace(group, media=own_media))
    if not are_kept and len(seen) == len(groups):
        return None
    return Pictures(tuple(groups), are_kept)


def joined_media(groups: Sequence[PictureGroup]) -> dict[str, torch.Tensor]:
    """The tensors of all groups one behind the other; those of a group that is there twice stand in the first one."""
    media = {group.digest: group.media for group in reversed(groups)}
    each = [media[group.digest] for group in groups]
    names = dict.fromkeys(name for one in each for name in one)
    return {name: join_rows([one[name] for one in each if name in one]) for name in names}


def join_rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate along the first axis; LLaVA-OneVision's patch axis, which varies, is padded with zeros."""
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat([*tensors])
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    joined = tensors[0].new_zeros(sum(map(len, tensors)), *shape)
    first = 0
    for tensor in tensors:
        joined[(slice(first, first + len(tensor)), *map(slice, tensor.shape[1:]))] = tensor
        first += len(tensor)
    return joined


def group_digest(digests: Sequence[str]) -> str:
    """One name for several pictures in this order; that of a picture alone is its own."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\0".join(digests).encode()).hexdigest()


def is_pixels(name: str, array: Any) -> bool:
    """Whether an array that a processor gives is the picture itself, or a mask over it, and not a fact about it."""
    return "pixel" in name or str(array.dtype).rpartition(".")[2].startswith(("float", "bfloat"))


class Recorder:
    """An image processor that remembers what it has said, in place of the one that it asks."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self._said: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        said = self._image_processor(*args, **kwargs)
        self._said.append(dict(said))  # as it is now: processors take out what the model does not want
        return said

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)

    def about(self) -> str:
        """That as text, without the pixels, for a `StandIn`; "" where it cannot be written so."""
        if len(self._said) != 1:
            return ""
        try:
            return json.dumps({name: _written(name, value) for name, value in self._said[0].items()})
        except (TypeError, ValueError):
            return ""


class StandIn:
    """An image processor that says again what a `Recorder` has heard, with zeros that take no memory for pixels."""

    def __init__(self, image_processor: Any, about: str) -> None:
        self._image_processor, self._about = image_processor, about

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from transformers import BatchFeature

        del args, kwargs
        return BatchFeature({name: _read(value) for name, value in json.loads(self._about).items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)


def _written(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray):
        found = {"dtype": str(value.dtype), "shape": list(value.shape)}
        return found if is_pixels(name, value) else {**found, "values": value.tolist()}
    if isinstance(value, Mapping):
        raise TypeError(f"`{name}` is a mapping")
    return [_written(name, one) for one in value] if isinstance(value, list | tuple) else value


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(one) for one in value]
    if not isinstance(value, dict):
        return value
    kind, shape, values = value["dtype"], value["shape"], value.get("values", 0)  # zeros stand for pixels
    if kind.startswith("torch."):
        tensor = torch.tensor(values, dtype=getattr(torch, kind.removeprefix("torch.")))
        return tensor.reshape(shape) if "values" in value else tensor.expand(shape)
    array = np.asarray(values, dtype=kind)
    return array.reshape(shape) if "values" in value else np.broadcast_to(array, shape)
