"""A shallower student: keep some decoder layers of a model and write the rest of it unchanged."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from vlsi_cache.config.layers import parse_layers
from vlsi_cache.config.sections import Dtype
from vlsi_cache.errors import ModelError
from vlsi_cache.io import check_apart, refuse_url

from .backbone import Backbone
from .load import ModelRef, resolve_model
from .save import check_ours, write_folder

RECORD = "init_student.json"


def decoder_layers(text: str) -> list[int]:
    """`0-5,24-29` -> [0, ..., 5, 24, ..., 29]; raises SpecError, or ModelError unless the numbers rise strictly."""
    layers: list[int] = []
    for layer in parse_layers(text):
        if isinstance(layer, str):
            raise ModelError(f"layers `{text}`: decoder layers are counted from 0 here; name `{layer}` by its number")
        layers.append(layer)
    _check_rising(layers)
    return layers


def init_student(
    teacher: str | Path,
    layers: str | Sequence[int],
    out: str | Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Write `teacher` with only the decoder layers `layers` (0-based, rising, or `0-5,24-29`) as a folder at `out`.

    The folder opens with `from_pretrained` and generates; `init_student.json` in it says where it comes from. A folder
    that is there is replaced only if it was made here. Raises ModelError, SpecError.
    """
    refuse_url(out, "out")
    layers = decoder_layers(layers) if isinstance(layers, str) else list(layers)
    _check_rising(layers)
    source, out = ModelRef(str(teacher), revision, gguf_file, dtype, trust_remote_code=trust_remote_code), Path(out)
    folder = Path(resolve_model(source.path))
    if folder.is_absolute():  # else a hub id
        check_apart(out, folder)
    check_ours(out, RECORD)
    model = source.load()
    num_source_layers = Backbone(model).num_layers
    keep_layers(model, layers)
    record = {
        "source": source.path,
        "revision": revision,
        "gguf_file": gguf_file,
        "source_digest": source.digest,
        "num_source_layers": num_source_layers,
        "kept_layers": layers,
    }
    return write_folder(model, source, out, record=RECORD, facts=record)


def keep_layers(model: transformers.PreTrainedModel, layers: Sequence[int]) -> None:
    """Drop all other decoder layers of the text stack in place, and make the configuration say so."""
    backbone = Backbone(model)
    num_layers = backbone.num_layers
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong or not layers:
        raise ModelError(
            f"layers {wrong or list(layers)}: this model has {num_layers} decoder layers, 0 to {num_layers - 1}"
        )
    # Several config objects describe the text stack (the model's nested one, the stack's own); each holds the depth.
    owners = [module.config for module in backbone.decoder.modules() if hasattr(module, "config")]
    for config in {id(config): config for config in (model.config.get_text_config(), *owners)}.values():
        _prune_config(config, layers, num_layers)
    setattr(backbone.decoder, backbone.layers_name, nn.ModuleList(backbone.layers[layer] for layer in layers))
    for index, layer in enumerate(backbone.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 - no module class declares it


def _prune_config(config: Any, layers: Sequence[int], num_layers: int) -> None:
    per_layer: dict[str, Any] = {
        key: [value[layer] for layer in layers]
        for key, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == num_layers and re.search(r"layer", key)
    }
    window = getattr(config, "max_window_layers", None)
    if window is not None:
        per_layer["max_window_layers"] = sum(layer < window for layer in layers)
    for key, value in per_layer.items():
        setattr(config, key, value)
    config.num_hidden_layers = len(layers)


def _check_rising(layers: Sequence[int]) -> None:
    if sorted(set(layers)) != list(layers):
        raise ModelError(f"layers {list(layers)} must rise strictly, each named once")
