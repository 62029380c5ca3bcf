"""What a frozen vision tower makes of a picture, computed once and given back whenever it is shown again.

A picture goes through the tower alone, so its features are the same bits in whatever batch it is met first; a run that
is taken up again gets the same ones. Models of one process that have the same tower share them, as a teacher and the
students made from it do; files on the disk (`feature_files`) keep them for later commands.

Shapes: n tokens of one picture, D hidden size.
"""

import inspect
import threading
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlsi_cache.config.sections import RunSpec
from vlsi_cache.data import table
from vlsi_cache.data.collate import PICTURES
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.vision import Pictures
from vlsi_cache.progress import say

from .feature_files import FeatureFiles

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
    """Features by the digest of the picture: on the host, up to `max_bytes`, and in `files`.

    When the memory is full nothing is added and nothing leaves: an order that comes round again would throw each
    picture out just before it is wanted.
    """

    def __init__(self, max_bytes: int, files: FeatureFiles | None = None) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._held: dict[str, Held] = {}
        self._files = files
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def limit(self, max_bytes: int, files: FeatureFiles | None) -> None:
        """Other limits from now on; what is held stays."""
        self._max_bytes, self._files = max_bytes, files

    def get(self, digest: str) -> Held | None:
        held = self._held.get(digest)
        if held is None and self._files is not None and (tensors := self._files.get(digest)) is not None:
            grid, features, *deep = (tensors[name] for name in sorted(tensors))
            held = Held(grid.numpy(), features, tuple(deep))
            self._hold(digest, held)
        return held

    def put(self, digest: str, held: Held) -> None:
        self._hold(digest, held)
        if self._files is not None:
            tensors = [torch.from_numpy(held.grid), held.features, *held.deep]
            self._files.put(digest, {f"{number:04}": one.contiguous() for number, one in enumerate(tensors)})

    def _hold(self, digest: str, held: Held) -> None:
        with self._lock:
            if digest not in self._held and self._num_bytes + held.num_bytes <= self._max_bytes:
                self._num_bytes += held.num_bytes
                self._held[digest] = held


_kept: "WeakKeyDictionary[nn.Module, PictureFeatures]" = WeakKeyDictionary()
_latest: dict[str, PictureFeatures] = {}  # of the tower that was met last, by its key


def keep_features(model: nn.Module, run: RunSpec, encoder: Encoder) -> None:
    """From now on the features of this model's pictures are kept, where its tower can be asked for them; or it is said
    why not."""
    max_bytes, disk_bytes = run.vision_cache_mib << 20, run.vision_disk_mib << 20
    body = _body(model)
    if not (max_bytes or disk_bytes) or body in _kept:
        return
    names = inspect.signature(body.forward).parameters
    if not (hasattr(body, "get_image_features") and hasattr(body, "visual") and "mm_encoder_outputs" in names):
        kind = body.config.model_type
        sees = getattr(body.config, "vision_config", None) is not None
        why = "its processor prepares the pictures of a sample together" if sees else "it sees no pictures"
        say(f"features of pictures: nothing is kept for `{kind}`: {why}")
        return
    key = _key_of(body, encoder)
    files = _files(key, disk_bytes) if disk_bytes else None
    if key not in _latest:
        _latest.clear()  # those of other towers live as long as their models
        _latest[key] = PictureFeatures(max_bytes, files)
    _latest[key].limit(max_bytes, files)
    _kept[body] = _latest[key]


def _key_of(body: Any, encoder: Encoder) -> str:
    """A digest of all that the features of a picture follow from."""
    digest = xxhash.xxh3_128()
    for name, tensor in body.visual.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    named = encoder.fingerprint()
    pixels = {name: named[name] for name in ("image_processor", "pixel_path", "min_pixels", "max_pixels")}
    attention = getattr(body.visual.config, "_attn_implementation", None)
    return table.key_of(
        [type(body).__name__, digest.hexdigest(), pixels, attention, torch.__version__, version("transformers")]
    )[:40]


def _files(key: str, max_bytes: int) -> FeatureFiles | None:
    """The folder of a tower beside the tables of rows; None, and the reason told, where there can be none."""
    root = table.folder()
    if root is None:
        say(f"run.vision_disk_mib: nothing is kept on the disk, since {table.VARIABLE} is off")
        return None
    try:
        return FeatureFiles(root, key, max_bytes)
    except OSError as error:
        say(f"run.vision_disk_mib: nothing can be kept in {root} ({error}); {table.VARIABLE} names another folder")
        return None


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
