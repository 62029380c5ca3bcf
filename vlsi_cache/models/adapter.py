"""What trains in the student: a LoRA adapter on the language model's linear layers, head and embeddings, or all."""

import warnings
from typing import Any, cast

import torch
from torch import nn

from .layers import Backbone

VISION_TOWERS = frozenset({"visual", "vision_tower", "vision_model"})  # what transformers' VLMs call it


def add_lora(model: nn.Module, *, rank: int, alpha: float, dropout: float) -> Any:
    """Wrap `model` with a fresh adapter on every linear layer of the text stack, and on nothing else.

    The modules are named in full: PEFT's `all-linear` would adapt the vision tower of a VLM as well.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=cast(int, alpha), lora_dropout=dropout, target_modules=text_linears(model), bias="none"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is being renamed
        return get_peft_model(cast(Any, model), config)


def text_linears(model: nn.Module) -> list[str]:
    """Full names of the linear layers inside the text decoder's layers."""
    decoder_layers = Backbone(model).layers
    inside = {id(module) for module in decoder_layers.modules() if isinstance(module, nn.Linear)}
    return [name for name, module in model.named_modules() if id(module) in inside]


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
    for parameter in Backbone(model).layers.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def train_head_and_embeddings(model: Any) -> None:
    """Let head and word embeddings train beside the adapter, in fp32 (tied weights stay one parameter)."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module in (plain.get_input_embeddings(), plain.get_output_embeddings()):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()


def train_everything(model: Any) -> Any:
    """Fold the adapter in and let all weights train, in fp32, but those of the vision tower.

    The projector between vision tower and language model belongs to the language side and trains.
    """
    # Cast before merging: in bf16 most of a small update would be rounded away.
    for parameter in _language_parameters(model):
        parameter.data = parameter.data.to(torch.float32)
    plain = merge_lora(model)
    for parameter in _language_parameters(plain):
        parameter.requires_grad_(True)
    return plain


def _language_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but those of the vision tower."""
    return [parameter for name, parameter in model.named_parameters() if not _is_in_vision_tower(name)]


def _is_in_vision_tower(name: str) -> bool:
    in_tower = any(part in VISION_TOWERS for part in name.split("."))
    return in_tower and not any(word in name for word in ("merger", "projector"))
