"""Where a model keeps its parts: what is tried for every family, and what the families need that are not as most.

Nothing here is believed: `probe.py` holds every loaded model against its own logits. A family that is refused is added
by an entry of FAMILIES (the error shows it), which the probe then judges.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from vlsi_cache.errors import ModelError


@dataclass(frozen=True)
class Family:
    """One family. Names that are tried in order; paths with dots, from the model with its head; "" asks transformers.

    decoder: the text stack, which holds the layers and the final norm (`get_decoder()`).
    head: the module whose weight [V, D] gives the logits (`get_output_embeddings()`).
    multiply, divide, cap: settings of the text configuration that the logits are multiplied with, divided by, and
    softly capped at. What a model really does is found by the probe, which tries the configuration's word first.
    """

    decoder: str = ""
    layers: tuple[str, ...] = ("layers", "h", "blocks")
    final_norm: tuple[str, ...] = (
        *("norm", "final_layernorm", "final_layer_norm", "final_norm", "norm_f", "ln_f", "embedding_norm"),
        *("layer_norm", "ln_out", "out_norm"),
    )
    head: str = ""
    multiply: tuple[str, ...] = ("logit_scale",)
    divide: tuple[str, ...] = ("logits_scaling",)
    cap: tuple[str, ...] = ("final_logit_softcapping",)


# Vision-language families are as text ones behind `get_decoder()`. How a picture becomes tokens is said by the family's
# processor (`data/vision.py`), and which token stands for it by its configuration: `tests/helpers/vlms.py` has one
# description of each that is tested.
GENERIC = Family()
FAMILIES: dict[str, Family] = {}  # by `model_type`; the others are GENERIC

# Between their layers runs more than one hidden state per token, so none of them can be read through the head.
SEVERAL_STREAMS = ("altup_num_inputs", "hc_mult")
SHOWN = 8  # modules named in an error


@dataclass(frozen=True)
class Parts:
    """The text stack of a model, and the names of the list of decoder layers and of the final norm in it."""

    decoder: Any
    layers: str
    final_norm: str


def find_parts(model: Any) -> Parts:
    """The parts of a model with a head, without an adapter; raises ModelError, with the entry that would add it."""
    family = FAMILIES.get(model.config.model_type, GENERIC)
    decoder = _at(model, family.decoder) if family.decoder else model.get_decoder()
    if decoder is model:  # a few families put the text stack in `model` and do not say so
        decoder = getattr(model, "model", decoder)
    layers = next((name for name in family.layers if isinstance(getattr(decoder, name, None), nn.ModuleList)), "")
    norm = next((name for name in family.final_norm if isinstance(getattr(decoder, name, None), nn.Module)), "")
    if not layers:
        raise _unknown(model, decoder, "list of decoder layers", family.layers)
    if not norm:
        raise _unknown(model, decoder, "final norm", family.final_norm)
    return Parts(decoder, layers, norm)


def head_module(model: Any) -> Any:
    """The language head of a model without an adapter; None where it has none."""
    family = FAMILIES.get(model.config.model_type, GENERIC)
    return _at(model, family.head) if family.head else model.get_output_embeddings()


def logit_change(config: Any) -> tuple[float, float | None]:
    """What the configuration says that logits are multiplied with, and softly capped at."""
    family, text = FAMILIES.get(config.model_type, GENERIC), config.get_text_config()

    def first(names: tuple[str, ...]) -> float | None:
        found = (getattr(text, name, None) for name in names)
        return next((float(value) for value in found if value is not None), None)

    scale, divisor, cap = first(family.multiply), first(family.divide), first(family.cap)
    return (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor), cap


def how_to_add(model: Any) -> str:
    """What to write for a family that is not known, with the modules that its model has."""
    config: Any = model.config
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    outer = [name for name in norms if not any(name.startswith(f"{one}.") for one in lists)]
    wide = [name for name, module in model.named_children() if isinstance(module, nn.Linear)]
    kind = config.model_type
    return (
        f"Add it in vlsi_cache/models/families.py, and the probe will judge it:\n"
        f'    FAMILIES["{kind}"] = Family(\n'
        f'        decoder="...",        # the module that holds layers and norm: a part of the paths below\n'
        f'        layers=("...",),      # lists of modules here: {_listed(lists)}\n'
        f'        final_norm=("...",),  # norms outside of them: {_listed(outer)}\n'
        f'        head="...",           # linear layers at the top: {_listed(wide)}\n'
        f"        multiply=(), divide=(), cap=(),  # settings of its text configuration that change the logits\n"
        f"    )"
    )


def check_family(config: Any) -> None:
    """Raise ModelError for families whose layers cannot be read one by one, from the configuration alone."""
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"`{config.model_type}` is an encoder-decoder model; teacher and student must be decoders")
    for key in SEVERAL_STREAMS:
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 1:
            raise ModelError(
                f"`{config.model_type}` carries {value} hidden states per token from layer to layer (`{key}`): what a "
                "layer says cannot be read through the head. Choose a teacher or student of another family"
            )


def _at(model: Any, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ModelError(
            f"`{type(model).__name__}`: no module `{path}`, which vlsi_cache/models/families.py names for "
            f"`{model.config.model_type}`; another version of transformers may call it otherwise"
        ) from None


def _unknown(model: Any, decoder: Any, what: str, names: tuple[str, ...]) -> ModelError:
    looked = ", ".join(f"`{name}`" for name in names)
    return ModelError(
        f"`{type(model).__name__}`: no {what} found in `{type(decoder).__name__}` (looked for {looked}); this family "
        f"is unknown. {how_to_add(model)}"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(f"`{name}`" for name in names[:SHOWN]) or "none") + more
