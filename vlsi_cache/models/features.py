"""What a frozen vision tower makes of pictures, computed once and given back whenever they are shown again.

Pictures that are prepared together (one of the Qwen VLs', all of a sample's elsewhere: `PictureGroup`) go through the
tower together and with no others, so their features are the same bits in whatever batch they are met first; a run that
is taken up again gets the same ones. Models of one process that have the same tower share them, as a teacher and the
students made from it do; files on the disk (`feature_files`) keep them for later commands.

The tower is all that is no part of the text stack: projectors and separate parameters count. Features go in by the
argument that transformers has for them (`mm_encoder_outputs`), in the shape in which its `generate` cuts them.

Shapes: n tokens of a group of pictures, N of a batch, D hidden size.
"""

import inspect
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import xxhash
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlsi_cache.config.sections import RunSpec
from vlsi_cache.data import table
from vlsi_cache.data.collate import PICTURES
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.pictures import PictureGroup, Pictures, joined_media
from vlsi_cache.progress import say

from .families import find_parts
from .feature_files import FeatureFiles
from .parallel import is_cut

ARGUMENT = "mm_encoder_outputs"
FORMAT = 3  # of what is kept; counts up when that changes
# Of a configuration: what says nothing about the tower.
OTHERS = ("text_config", "architectures", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Held:
    """One group: its features [n, D] and those for deeper layers, and what the encoder has said about it.

    `are_stacked` is how the model gives and wants each of them: one tensor, or a list of pictures.
    """

    features: Tensor
    deep: tuple[Tensor, ...] = ()
    are_stacked: tuple[bool, ...] = (False,)
    about: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(one.nbytes for one in (self.features, *self.deep)) + len(self.about)

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> "Held":
        features, *deep = (one.to(device, non_blocking=non_blocking) for one in (self.features, *self.deep))
        return Held(features, tuple(deep), self.are_stacked, self.about)

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        text = torch.tensor([*self.about.encode()], dtype=torch.uint8)
        found = {f"features-{number:02}": one.contiguous() for number, one in enumerate((self.features, *self.deep))}
        return {"about": text, "are_stacked": torch.tensor(self.are_stacked), **found}

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> "Held":
        features, *deep = (tensors[name] for name in sorted(tensors) if name.startswith("features-"))
        flags, text = tuple(tensors["are_stacked"].tolist()), bytes(tensors["about"].tolist()).decode()
        return Held(features, tuple(deep), flags, text)


class PictureFeatures:
    """Features by the digest of the group of pictures: on the host, up to `max_bytes`, and in `files`.

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
            held = Held.of(tensors)
            self._hold(digest, held)
        return held

    def put(self, digest: str, held: Held) -> None:
        self._hold(digest, held)
        if self._files is not None:
            self._files.put(digest, held.tensors())

    def _hold(self, digest: str, held: Held) -> None:
        with self._lock:
            if digest not in self._held and self._num_bytes + held.num_bytes <= self._max_bytes:
                self._num_bytes += held.num_bytes
                self._held[digest] = held


_kept: "WeakKeyDictionary[nn.Module, PictureFeatures]" = WeakKeyDictionary()
_latest: dict[str, PictureFeatures] = {}  # of the tower that was met last, by its key
_apart: "WeakSet[nn.Module]" = WeakSet()  # models whose tower has been seen to run without their text stack


def keep_features(model: nn.Module, run: RunSpec, encoder: Encoder) -> None:
    """From now on the features of this model's pictures are kept, where its tower can be asked for them; or it is said
    why not."""
    max_bytes, disk_bytes = run.vision_cache_mib << 20, run.vision_disk_mib << 20
    body = _body(model)
    if not (max_bytes or disk_bytes) or body in _kept:
        return
    if not _takes_features(body):
        sees = getattr(body.config, "vision_config", None) is not None
        why = f"its forward pass takes no `{ARGUMENT}`" if sees else "it sees no pictures"
        say(f"features of pictures: nothing is kept for `{body.config.model_type}`: {why}")
        return
    if any(is_cut(one) for module in _tower(model) for one in module.parameters(recurse=False)):
        say(f"features of pictures: nothing is kept for `{body.config.model_type}`: its tower is cut into pieces")
        return
    key = _key_of(model, encoder)
    files = _files(key, disk_bytes) if disk_bytes else None
    if key not in _latest:
        _latest.clear()  # those of other towers live as long as their models
        _latest[key] = PictureFeatures(max_bytes, files)
    _latest[key].limit(max_bytes, files)
    _kept[body] = _latest[key]


def _takes_features(body: Any) -> bool:
    return hasattr(body, "get_image_features") and ARGUMENT in inspect.signature(body.forward).parameters


def _key_of(model: nn.Module, encoder: Encoder) -> str:
    """A digest of all that the features of a picture follow from."""
    body, digest, inside = _body(model), xxhash.xxh3_128(), _names_of_text(model)
    for name, tensor in body.state_dict().items():
        if not name.startswith(inside):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    named = encoder.fingerprint()
    pixels = {name: named[name] for name in ("image_processor", "pixel_path", "min_pixels", "max_pixels")}
    attention = getattr(body.config.vision_config, "_attn_implementation", None)
    settings = _without_names(body.config.to_dict())
    software = [FORMAT, torch.__version__, version("transformers")]
    return table.key_of([type(body).__name__, digest.hexdigest(), settings, pixels, attention, *software])[:40]


def _without_names(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of the tower: without the text stack, tokens, and where it was loaded from."""
    found = {}
    for name, value in config.items():
        if not (name in OTHERS or str(name).startswith("_") or str(name).endswith(("_token_id", "_token_index"))):
            found[name] = _without_names(value) if isinstance(value, dict) else value
    return json.loads(json.dumps(found, sort_keys=True, default=str))


def _names_of_text(model: nn.Module) -> str:
    """What the names of the text stack's parts begin with, in the model below its head."""
    decoder = find_parts(_plain(model)).decoder
    return next(f"{name}." for name, module in _body(model).named_modules() if module is decoder)


def _tower(model: nn.Module) -> list[nn.Module]:
    """All modules that are no part of the text stack."""
    body, inside = _body(model), _names_of_text(model)
    return [module for name, module in body.named_modules() if name and not f"{name}.".startswith(inside)]


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
    if body not in _kept:
        return None
    inside = _names_of_text(model)
    trains = (one.requires_grad for name, one in body.named_parameters() if not name.startswith(inside))
    return None if any(trains) else _kept[body]


def with_features(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a batch with features in the place of pixels: those kept, and those made now.

    Where nothing is kept, pictures that are in the batch twice go through the tower once, all of them together.
    """
    inputs = dict(inputs)
    pictures: Pictures = inputs.pop(PICTURES)
    body, device = _body(model), inputs["input_ids"].device
    if not _takes_features(body):
        return inputs | joined_media(pictures.groups)
    if pictures.are_kept:
        found = [held.to(device) for held in _one_by_one(model, pictures.groups)]
    else:
        found = _together(body, pictures.groups)
    features, *deep = (
        _joined([(one.features, *one.deep)[level] for one in found], is_stacked=is_stacked)
        for level, is_stacked in enumerate(found[0].are_stacked)
    )
    outputs: Any = BaseModelOutputWithPooling(pooler_output=features)
    if deep:
        outputs.deepstack_features = deep
    return inputs | {ARGUMENT: {"image": outputs}}


def _joined(parts: Sequence[Tensor], *, is_stacked: bool) -> Any:
    return torch.cat([*parts])[None] if is_stacked else list(parts)


def _one_by_one(model: nn.Module, groups: Sequence[PictureGroup]) -> list[Held]:
    """The features of every group, of which those that are new are kept."""
    body, kept = _body(model), _kept.get(_body(model))
    found = {group.digest: group.held for group in groups if group.held is not None}
    if kept is not None:  # they may have been kept since the batch was prepared
        later = {group.digest: kept.get(group.digest) for group in groups if group.digest not in found}
        found |= {digest: held for digest, held in later.items() if held is not None}
    new = {group.digest: group for group in reversed(groups) if group.digest not in found}
    if new:
        # Not as inference tensors, which a later step could not train through.
        with torch.inference_mode(False), torch.no_grad(), _at_rest(model), _watched(model):
            for digest, group in reversed(new.items()):
                media = {name: tensor.clone() for name, tensor in group.media.items()}
                found[digest] = _run_tower(body, media, group.about)
        if kept is not None and body in _kept:
            for digest in reversed(new):
                kept.put(digest, found[digest].to("cpu"))
    return [found[group.digest] for group in groups]


def _together(body: Any, groups: Sequence[PictureGroup]) -> list[Held]:
    """The features of every group, from one run of the tower over those that differ."""
    own = {group.digest: group for group in reversed(groups)}
    several = [*own.values()]
    num_tokens = [group.num_tokens for group in several]
    whole = _run_tower(body, joined_media(several))
    if sum(num_tokens) != len(whole.features):  # a processor that does not say which tokens are its pictures'
        found = {group.digest: _run_tower(body, group.media) for group in several}
    else:
        levels = zip(*(one.split(num_tokens) for one in (whole.features, *whole.deep)), strict=True)
        found = {
            group.digest: Held(features, tuple(deep), whole.are_stacked)
            for group, (features, *deep) in zip(several, levels, strict=True)
        }
    return [found[group.digest] for group in groups]


def _run_tower(body: Any, media: dict[str, Tensor], about: str = "") -> Held:
    names = inspect.signature(body.get_image_features).parameters
    given = {name: tensor for name, tensor in media.items() if name in names}
    output = body.get_image_features(**given, return_dict=True)
    levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    flat_ND = [torch.cat([one.reshape(-1, one.shape[-1]) for one in level]) for level in map(_listed, levels)]
    return Held(flat_ND[0], tuple(flat_ND[1:]), tuple(isinstance(level, Tensor) for level in levels), about)


def _listed(level: Any) -> Sequence[Tensor]:
    """The pictures of a level, where it is not one tensor of them all."""
    return [level] if isinstance(level, Tensor) else level


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Without dropout in the tower, whose features would else be other ones the next time."""
    training = [module for module in _tower(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _watched(model: nn.Module) -> Iterator[None]:
    """The first time, see that the tower does without the text stack: otherwise features change as that trains, and
    none are kept."""
    body = _body(model)
    if body in _apart or body not in _kept:
        yield
        return
    ran: list[str] = []
    parts = find_parts(_plain(model)).decoder.named_modules()
    handles = [one.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, one in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if ran:
        del _kept[body]
        part = f"`{ran[0]}`" if ran[0] else "all"
        say(f"features of pictures: nothing is kept for `{body.config.model_type}`: they use {part} of its text stack")
    else:
        _apart.add(body)


def _body(model: nn.Module) -> Any:
    """The model below its head, without the wrapper of an adapter."""
    return _plain(model).base_model


def _plain(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
