"""Model folders that are written here: a trained student, or a student made of a teacher's layers."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import transformers
from torch import nn

from vlsi_cache.config.layers import parse_layers
from vlsi_cache.config.training import Dtype
from vlsi_cache.errors import ModelError
from vlsi_cache.io import check_apart, check_folder, put_back, refuse_url, replacing
from vlsi_cache.run_files import STUDENT_RECORD, read_object

from .backbone import Backbone
from .gguf_files import parsed_once
from .load import SMALL_FILES, ModelRef, check_plain, first_line, model_errors, quiet, resolve_model
from .lora import base_of, is_adapter_alone
from .student_card import write_card
from .traversal import traversal_of
from .traversal_files import save_traversed

INIT_RECORD = "init_student.json"  # in the folder of a student made of some of a model's layers, as STUDENT_RECORD
ENCODER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template.json",
    "*processor_config.json",
)


def save_student(
    model: nn.Module,
    source: ModelRef,
    out: str | Path,
    *,
    end_of_turn: int,
    pad: int,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a plain folder that `from_pretrained` opens: weights, configuration, tokenizer and processor files.

    A student whose layers are traversed is written so that only `load_student` opens it (`traversal_files`).

    The encoder's files are copied from `source`. What the student generates ends with `end_of_turn`, as what it was
    trained on does. `facts` go into STUDENT_RECORD. `out` is replaced as a whole, and only if it was written here.
    Raises ModelError for a model that still has an adapter.
    """
    if hasattr(model, "peft_config"):
        raise ModelError("the student still has an adapter; merge it (`merge_lora`) before saving")
    plain = cast(transformers.PreTrainedModel, model)
    mend_generation(plain.generation_config)
    _end_turns(plain.generation_config, end_of_turn, pad)
    return write_folder(plain, source, Path(out), record=STUDENT_RECORD, facts=facts or {})


def write_folder(
    model: transformers.PreTrainedModel, source: ModelRef, out: Path, *, record: str, facts: Mapping[str, Any]
) -> Path:
    """Write model, the encoder files of `source` and the JSON file `record` beside `out`, then put all there at once.

    `record` holds `facts` and the digest of the weights: by it `check_ours` knows the folder again.
    """
    check_ours(out, record)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        temporary.mkdir()
        with quiet():
            model.save_pretrained(temporary) if traversal_of(model) is None else save_traversed(model, temporary)
        if record == STUDENT_RECORD and traversal_of(model) is None:
            write_card(model, temporary, facts)
        _copy_encoder(source, temporary)
        whole = {**facts, "weights": ModelRef(temporary).digest}
        (temporary / record).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return out


def check_ours(out: Path, record: str) -> None:
    """Raise ModelError unless `out` is new, empty, or as we wrote it, together with a file `record`."""
    put_back(out)
    check_folder(out)
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / record).exists():
        raise ModelError(
            f"{out} exists and was not written here: it has no {record}; move it away, or name another folder"
        )
    written = read_object(out / record, "move the folder away, or name another one")
    found = ModelRef(out).digest
    if written.get("weights", found) != found:  # an earlier release did not say
        raise ModelError(
            f"{out} holds other weights than were written there ({found}, {record} says {written['weights']}); move it "
            "away, or name another folder"
        )


def mend_generation(generation: Any) -> list[str]:
    """Put back to their defaults the generation settings that transformers reads but refuses to write; their names.

    It ignores them itself (a temperature without `do_sample`), so nothing is generated in another way. Raises
    ModelError for what cannot be mended.
    """
    try:
        generation.validate(strict=True)
        return []
    except ValueError as error:
        names = [name for name in re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE) if hasattr(generation, name)]
    for name in names:
        setattr(generation, name, getattr(transformers.GenerationConfig(), name))
    try:
        generation.validate(strict=True)
    except ValueError as error:
        raise ModelError(
            f"the student's generation_config.json cannot be saved again: {first_line(error)}; mend it"
        ) from None
    return names


def _end_turns(generation: Any, end_of_turn: int, pad: int) -> None:
    """Generation settings of the model's own file keep their other ends; a guess from its configuration does not."""
    own = generation.eos_token_id
    ends = [own] if isinstance(own, int) else list(own or [])
    if generation._from_model_config:
        ends, generation._from_model_config = [], False  # or some versions would guess again when it is opened
    if end_of_turn not in ends:
        ends = [end_of_turn, *ends]
    generation.eos_token_id = ends if len(ends) > 1 else end_of_turn
    generation.pad_token_id = pad if generation.pad_token_id is None else generation.pad_token_id


def _copy_encoder(source: ModelRef, out: Path) -> None:
    folder = source.folder(*SMALL_FILES, *([source.gguf_file] if source.gguf_file else []))
    if source.gguf_file:
        with quiet(), parsed_once(), model_errors(source.path, "its tokenizer cannot be read from the GGUF file"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=source.gguf_file)
            tokenizer.save_pretrained(out)
        return
    if is_adapter_alone(folder):  # its base's files, then its own over them
        _copy_encoder(ModelRef(base_of(folder)), out)
    for file in sorted({file for pattern in ENCODER_FILES for file in folder.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, out / file.name)


def decoder_layers(layers: str | Sequence[int]) -> list[int]:
    """`0-5,24-29` -> [0, ..., 5, 24, ..., 29]; raises SpecError, or ModelError unless the numbers rise strictly."""
    found = parse_layers(layers) if isinstance(layers, str) else layers
    numbers = [layer for layer in found if isinstance(layer, int)]
    if len(numbers) != len(found):
        raise ModelError(f"layers `{layers}`: decoder layers are counted from 0 here; name `last` by its number")
    if sorted(set(numbers)) != numbers:
        raise ModelError(f"layers {numbers} must rise strictly, each named once")
    return numbers


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
    layers = decoder_layers(layers)
    source, out = ModelRef(str(teacher), revision, gguf_file, dtype, trust_remote_code=trust_remote_code), Path(out)
    folder = Path(resolve_model(source.path))
    if folder.is_absolute():  # else a hub id
        check_apart(out, folder)
    check_ours(out, INIT_RECORD)
    check_plain(source, "student")
    model = source.load()
    if traversal_of(model) is not None:
        raise ModelError(
            f"model `{source.path}`: its layers are traversed, each with a gate that is trained for its place; make "
            "the student of a plain model, and say `distill.traversal` when it is trained"
        )
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
    return write_folder(model, source, out, record=INIT_RECORD, facts=record)


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
        if isinstance(value, list) and len(value) == num_layers and "layer" in key
    }
    window = getattr(config, "max_window_layers", None)
    if window is not None:
        per_layer["max_window_layers"] = sum(layer < window for layer in layers)
    for key, value in per_layer.items():
        setattr(config, key, value)
    config.num_hidden_layers = len(layers)
