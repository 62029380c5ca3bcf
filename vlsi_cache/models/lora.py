"""What trains in the student: a LoRA adapter on the language model's linear layers, head and embeddings, or all."""

import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from vlsi_cache.errors import ModelError

from .backbone import Backbone
from .families import head_module
from .traversal import traversal_of

VISION_TOWERS = frozenset({"visual", "vision_tower", "vision_model"})  # what transformers' VLMs call it


_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # PEFT's list


def add_lora(model: nn.Module, *, rank: int, alpha: float, dropout: float) -> Any:
    """Wrap `model` with a fresh adapter on every linear layer and all experts of the text stack, and on nothing else.

    The modules are named in full: PEFT's `all-linear` would adapt the vision tower of a VLM as well. Raises ModelError
    where there is nothing to adapt.
    """
    from peft import LoraConfig, get_peft_model

    linears, experts = text_linears(model), reached_experts(model, dropout)
    if not linears and not experts:
        raise ModelError(
            f"`{type(model).__name__}` has no linear layers in its decoder layers for an adapter; use "
            "`distill.interact.mode: layers` and `distill.sft.mode: full`"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        lora_dropout=dropout,
        target_modules=linears,
        target_parameters=experts or None,
        bias="none",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is being renamed
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # it puts GPT-2's layers right
        return get_peft_model(cast(Any, model), config)


def text_linears(model: nn.Module) -> list[str]:
    """Full names of the linear layers inside the text decoder's layers that an adapter can be on.

    Kernels of Mamba read the weight of `out_proj` past its module, so PEFT refuses an adapter there.
    """
    inside = {id(module) for module in Backbone(model).layers.modules() if isinstance(module, nn.Linear | Conv1D)}
    found = [name for name, module in model.named_modules() if id(module) in inside]
    is_mamba = model.config.model_type in _MAMBA  # type: ignore[union-attr]
    return [name for name in found if not (is_mamba and name.endswith(".out_proj"))]


def experts_of(model: nn.Module) -> list[str]:
    """Full names of the experts' weights inside the text decoder's layers: one parameter [expert, out, in] for all."""
    modules = [one for one in Backbone(model).layers.modules() if not isinstance(one, _ConvNd)]
    inside = {id(weight) for one in modules for weight in one.parameters(recurse=False) if weight.ndim == 3}
    return [name for name, weight in model.named_parameters() if id(weight) in inside]


def reached_experts(model: nn.Module, dropout: float) -> list[str]:
    """The experts that an adapter trains: PEFT has no dropout for them, so all of them or none."""
    return experts_of(model) if dropout == 0 else []


def reach_note(model: nn.Module, dropout: float) -> str:
    """What an adapter reaches of a mixture of experts, for a person; "" for a model without experts."""
    experts = experts_of(model)
    if not experts:
        return ""
    layers = {id(weight) for weight in Backbone(model).layers.parameters() if weight.ndim > 1}
    sizes = {name: weight.numel() for name, weight in model.named_parameters() if id(weight) in layers}
    names = {*(f"{name}.weight" for name in text_linears(model)), *reached_experts(model, dropout)}
    share = sum(sizes.get(name, 0) for name in names) / sum(sizes.values())
    if dropout == 0:
        return f"adapter: on linear layers and on {len(experts)} tensors of experts, {share:.0%} of the layers' weights"
    return (
        f"warning: the adapter reaches {share:.0%} of the decoder layers' weights: with `distill.lora.dropout` "
        f"{dropout} the experts ({len(experts)} tensors) stay as they are; set it to 0 to adapt them too"
    )


def checkpoint_activations(model: Any) -> None:
    """Keep one activation per layer and make the others again in the backward pass."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # what older transformers call it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def merge_lora(model: Any) -> Any:
    """The plain model with the adapter folded into its weights; a model without adapter is returned as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def train_decoder_layers(model: Any) -> None:
    """Let the weights of the decoder layers train, in fp32; embeddings, final norm and head stay as they are."""
    _train(Backbone(model).layers.parameters())


def train_head_and_embeddings(model: Any) -> None:
    """Let head and word embeddings train beside the adapter, in fp32 (tied weights stay one parameter)."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    _train(plain.get_input_embeddings().parameters(recurse=False))
    _train(head_module(plain).parameters(recurse=False))


def train_everything(model: Any) -> Any:
    """Fold the adapter in and let all weights train, in fp32, but those of the vision tower.

    The projector between vision tower and language model belongs to the language side and trains.
    """
    # Cast before merging: in bf16 most of a small update would be rounded away.
    for parameter in _language_parameters(model):
        parameter.data = parameter.data.float()
    plain = merge_lora(model)
    _train(_language_parameters(plain))
    traversal = traversal_of(plain)
    if traversal is not None and not traversal.settings.trains_gates:
        traversal.gates.requires_grad_(False)
    return plain


def train_gates_and_projector(model: Any) -> None:
    """Let the gates of traversed layers train, and what lies between vision tower and text stack, in fp32."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    traversal = traversal_of(plain)
    assert traversal is not None
    inside = [*Backbone(plain).decoder.parameters(), *head_module(plain).parameters()]
    of_text = {id(parameter) for parameter in inside}
    _train(one for one in _language_parameters(plain) if id(one) not in of_text)
    if traversal.settings.trains_gates:
        _train(traversal.gates.parameters())


def _train(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def _language_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters but those of the vision tower."""
    for name, parameter in model.named_parameters():
        in_tower = not VISION_TOWERS.isdisjoint(name.split("."))
        if not in_tower or "merger" in name or "projector" in name:
            yield parameter


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def has_adapter(folder: Path) -> bool:
    """Whether opening this folder as a model applies an adapter."""
    return (folder / CONFIG).is_file()


def is_adapter_alone(folder: Path) -> bool:
    return has_adapter(folder) and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """What the adapter in `folder` is for: a folder (named from there or from here), or a hub id."""
    base = _read(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"adapter {folder}: its {CONFIG} names no `base_model_name_or_path`; write the base's folder in"
        )
    beside = folder / base
    return str(beside.resolve()) if beside.is_dir() else base


def adapter_files(folder: Path) -> dict[str, Path | str]:
    """What decides the adapter, for a digest: its weights, and its settings without where the base lies."""
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"adapter {folder}: no `{WEIGHTS}` beside its {CONFIG}; save it with `save_pretrained` again")
    settings = {key: value for key, value in _read(folder).items() if key != "base_model_name_or_path"}
    return {WEIGHTS: folder / WEIGHTS, CONFIG: json.dumps(settings, sort_keys=True)}


def with_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter of `folder` beside its weights."""
    from peft import PeftModel

    adapter_files(folder)
    return PeftModel.from_pretrained(model, str(folder))


def merged(adapted: Any, folder: Path) -> Any:
    """The plain model with the adapter folded into its weights; raises ModelError where that is not possible."""
    kind = _read(folder).get("peft_type")
    if not hasattr(adapted, "merge_and_unload"):
        raise ModelError(
            f"adapter {folder}: a `{kind}` cannot be merged into the weights; merge what can be, and name that"
        )
    return adapted.merge_and_unload()


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """A folder of links to all files but the adapter's, so that only the base is loaded."""
    with tempfile.TemporaryDirectory(prefix="vlsi-cache-base-") as plain:
        for file in folder.iterdir():
            if not file.name.startswith("adapter_"):
                (Path(plain) / file.name).symlink_to(file.resolve())
        yield Path(plain)


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{folder / CONFIG} is not a JSON object")
    return found
