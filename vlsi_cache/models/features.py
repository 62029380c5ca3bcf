"""What a frozen vision tower makes of a picture, computed once and given back in every later step that shows it.

A picture goes through the tower alone, so its features are the same bits in whatever batch it is met first; a run that
is taken up again gets the same ones.

Shapes: n tokens of one picture, D hidden size.
"""

import inspect
import threading
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlsi_cache.data.collate import PICTURES
from vlsi_cache.data.vision import Pictures
from vlsi_cache.progress import say

PIXELS, GRIDS = "pixel_values", "image_grid_thw"


@dataclass(frozen=True)
class Held:
    """One picture: its grid of patches (time, height, width), features [n, D], and those for deeper layers."""

    grid: np.ndarray
    features: Tensor
    deep: tuple[Tensor, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(one.nbytes for one in (self.features, *self.deep))

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> "Held":
        features, *deep = (one.to(device, non_blocking=non_blocking) for one in (self.features, *self.deep))
        return Held(self.grid, features, tuple(deep))


class PictureFeatures:
    """Features by the digest of the picture, on the host, up to `max_bytes`.

    When it is full nothing is added and nothing leaves: an order that comes round again would throw each picture out
    just before it is wanted.
    """

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, digest: str) -> Held | None:
        return self._held.get(digest)

    def put(self, digest: str, held: Held) -> None:
        with self._lock:
            if digest not in self._held and held.num_bytes <= self._room:
                self._room -= held.num_bytes
                self._held[digest] = held


_kept: "WeakKeyDictionary[nn.Module, PictureFeatures]" = WeakKeyDictionary()


def keep_features(model: nn.Module, max_bytes: int) -> None:
    """From now on the features of this model's pictures are kept, where its tower can be asked for them; or it is said
    why not."""
    body = _body(model)
    names = inspect.signature(body.forward).parameters
    is_known = hasattr(body, "get_image_features") and hasattr(body, "visual") and "mm_encoder_outputs" in names
    if max_bytes and is_known and body not in _kept:
        _kept[body] = PictureFeatures(max_bytes)
    if max_bytes and not is_known:
        kind = body.config.model_type
        sees = getattr(body.config, "vision_config", None) is not None
        why = "its processor prepares the pictures of a sample together" if sees else "it sees no pictures"
        say(f"run.vision_cache_mib: nothing is kept for `{kind}`: {why}")


def features_of(model: nn.Module) -> PictureFeatures | None:
    """The features kept for this model; None where there are none, or while a part of the tower trains."""
    body = _body(model)
    if body not in _kept or any(parameter.requires_grad for parameter in body.visual.parameters()):
        return None
    return _kept[body]


def with_features(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a batch with features in the place of pixels: those kept, and those made now."""
    inputs = dict(inputs)
    pictures: Pictures = inputs.pop(PICTURES)
    body, pixels, first = _body(model), inputs.pop(PIXELS, None), 0
    kept, device = _kept.get(body), inputs["input_ids"].device
    found: list[Held] = []
    made: dict[str, Held] = {}
    for digest, held, grid in zip(pictures.digests, pictures.held, inputs[GRIDS].tolist(), strict=True):
        if held is None:
            own = slice(first, first + grid[0] * grid[1] * grid[2])
            first = own.stop
            held = made.get(digest)
            if held is None:
                assert pixels is not None
                # Not as inference tensors, which a later step could not train through.
                with torch.inference_mode(False), torch.no_grad():
                    grid_13 = torch.tensor([grid], device=device)
                    output = body.get_image_features(pixels[own].clone(), grid_13, return_dict=True)
                # For each of the deeper layers, a tuple of pictures.
                deep = tuple(level[0] for level in getattr(output, "deepstack_features", None) or ())
                held = made[digest] = Held(np.array(grid), output.pooler_output[0], deep)
                if kept is not None:
                    kept.put(digest, held.to("cpu"))
        found.append(held.to(device))
    outputs: Any = BaseModelOutputWithPooling(pooler_output=tuple(one.features for one in found))  # type: ignore[arg-type]
    if found[0].deep:
        outputs.deepstack_features = list(zip(*(one.deep for one in found), strict=True))
    inputs["mm_encoder_outputs"] = {"image": outputs}
    return inputs


def _body(model: nn.Module) -> Any:
    """The model below its head, without the wrapper of an adapter."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner.base_model
