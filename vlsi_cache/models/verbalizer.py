"""Verbalizers: what stands between an intermediate layer and the model's own final norm and head.

`logits = head(final_norm(verbalizer(h)))`; head and final norm are the model's own, frozen and shared. The residual
style starts as the logit lens exactly, because the last projection of every block is zero at the start.

Legend: B rows, S positions, T response tokens, D hidden size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vlsi_cache.config.training import PreNorm, Structure, Style
from vlsi_cache.data.sequence import Layout
from vlsi_cache.errors import ModelError

from .backbone import Backbone, LayerSequence, head_digest
from .traversal import plain_class
from .verbalizer_files import FROM_WHERE, RECORD, load_layer, read_record, write

# For each structure its number of blocks, and the linear maps of a block; a decoder layer counts none of its own.
BLOCKS = {
    "mlp": (1, 1),
    "mlp-x2": (1, 2),  # one block of two linear maps; the other `-x2` stack two whole blocks
    "verb-ffn": (1, 3),
    "verb-ffn-x2": (2, 3),
    "ffn": (1, 3),
    "ffn-x2": (2, 3),
    "decoder": (1, 0),
    "decoder-x2": (2, 0),
    "logit-lens": (0, 0),
}
LAST_PROJECTIONS = frozenset({"down_proj", "o_proj"})
PLAIN_STD = 0.02
WITH_GATES = " with gates"  # behind the digest of a traversed student whose gates a stage has trained
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Architecture:
    """Everything that decides what a verbalizer computes, apart from its weights.

    `style: residual` is `h + f(norm(h))`, zero at the start; `plain` is `f(norm(h))` from N(0, 0.02). The paper's
    literal `head(verbFFN(h))` is plain with `pre_norm: none` and `final_norm: false`. A decoder layer has its own
    norms and residuals, so `pre_norm` does not apply to it, and `style` decides only how it starts.
    """

    structure: str
    hidden_size: int
    intermediate_size: int
    style: Style = "residual"
    final_norm: bool = True
    pre_norm: PreNorm = "rms"
    activation: str = "silu"
    norm_eps: float = NORM_EPS


class FeedForward(nn.Module):
    """One linear map; two with the activation between them; or three, gated (SwiGLU)."""

    def __init__(self, size: int, width: int, *, num_linears: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False) if num_linears == 3 else None
        self.up_proj = nn.Linear(size, width, bias=False) if num_linears >= 2 else None
        self.down_proj = nn.Linear(width, size, bias=False)
        self.activation = ACT2FN[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        if self.up_proj is None:
            return self.down_proj(hidden)
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(hidden)))
        return self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(nn.Module):
    """`h + f(norm(h))`, or without the residual in plain style."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        size, width, structure = architecture.hidden_size, architecture.hidden_size, architecture.structure
        if structure.startswith("ffn"):
            width = architecture.intermediate_size
            if width < 1:
                raise ModelError(f"a verbalizer of structure `{structure}` cannot be built for this model")
        self.norm = nn.RMSNorm(size, eps=architecture.norm_eps) if architecture.pre_norm == "rms" else nn.Identity()
        _, num_linears = BLOCKS[structure]
        self.body = FeedForward(size, width, num_linears=num_linears, activation=architecture.activation)
        self.is_residual = architecture.style == "residual"

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.body(self.norm(hidden))
        return hidden + output if self.is_residual else output


class Verbalizer(nn.Module):
    """The verbalizer of one layer, fp32 whatever the backbone's dtype; final norm and head are not part of it."""

    def __init__(self, architecture: Architecture, *, new_decoder_layer: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        num_blocks, _ = BLOCKS[architecture.structure]
        if architecture.structure.startswith("decoder"):
            assert new_decoder_layer is not None
            self.blocks = nn.ModuleList(new_decoder_layer() for _ in range(num_blocks))
        else:
            self.blocks = nn.ModuleList(Block(architecture) for _ in range(num_blocks))

    def forward(self, hidden: Tensor | LayerSequence) -> Tensor:
        """[T, D] -> [T, D] before the final norm, in the input's dtype; a decoder verbalizer takes a LayerSequence."""
        sequence = hidden if isinstance(hidden, LayerSequence) else None
        given = hidden.hidden_BSD if isinstance(hidden, LayerSequence) else hidden
        state = given.float()
        # Matrix products in the backbone's dtype, with the fp32 weights as masters; an outer autocast stays as it is.
        is_16_bit = given.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(given.device.type, dtype=given.dtype) if is_16_bit else nullcontext():
            for block in self.blocks:
                output = block(state) if sequence is None else block(state, **sequence.layer_kwargs)
                state = output[0] if isinstance(output, tuple) else output
        return (state if sequence is None else sequence.gather(state)).to(given.dtype)


class Verbalizers(nn.Module):
    """The verbalizers of some target layers of one backbone, which they use but do not own."""

    def __init__(self, backbone: Backbone, architecture: Architecture, layers: Sequence[int]) -> None:
        super().__init__()
        backbone.check_layers(layers)
        self.architecture = architecture
        self._backbone = backbone
        self.by_layer = nn.ModuleDict(
            {
                str(k): Verbalizer(architecture, new_decoder_layer=lambda k=k: _decoder_layer(backbone, k))
                for k in layers
            }
        )

    @property
    def layers(self) -> list[int]:
        """Target layers, in the order they were asked for."""
        return [int(key) for key in self.by_layer]

    @property
    def needs_sequence(self) -> bool:
        """Whether `apply` takes what `Backbone.capture_sequences` gives instead of what `capture` gives."""
        return self.architecture.structure.startswith("decoder") and bool(self.layers)

    @property
    def layout(self) -> Layout:
        """How samples lie in the batches that `capture` takes where the backbone is frozen."""
        return self._backbone.layout if self.needs_sequence else self._backbone.frozen_layout

    def capture(
        self, inputs: dict[str, Any], rows_T: Tensor, positions_T: Tensor, *, with_final: bool = True
    ) -> "dict[int, Tensor] | dict[int, Tensor | LayerSequence]":
        """The backbone's hidden states in the form that `apply` takes; the final one only if asked."""
        capture = self._backbone.capture_sequences if self.needs_sequence else self._backbone.capture
        return capture(inputs, self.layers, rows_T, positions_T, with_final=with_final)

    def apply(self, layer: int, hidden: Tensor | LayerSequence) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What enters the head for one layer, [T, D] in the dtype of `hidden`; differentiable in `hidden`."""
        state_TD = self.by_layer[str(layer)](hidden)
        # Of a model spread over several devices, norm and head may lie on different ones; states come to the head.
        normed_TD = self._backbone.final_norm(state_TD) if self.architecture.final_norm else state_TD
        return normed_TD.to((hidden.hidden_BSD if isinstance(hidden, LayerSequence) else hidden).device)

    def save(self, folder: str | Path, *, provenance: dict[str, Any]) -> Path:
        """Write `layer_KKKK.safetensors` per layer, then `verbalizers.json`, each complete or not at all.

        Layers add up over several calls as long as architecture and provenance are the same; another set is refused.
        """
        tensors = {int(key): module.state_dict() for key, module in self.by_layer.items()}
        facts = {**provenance, "head_digest": head_digest(self._backbone)}
        return write(Path(folder), tensors, dataclasses.asdict(self.architecture), facts)


def build_verbalizers(
    backbone: Backbone,
    layers: Sequence[int],
    *,
    structure: Structure = "verb-ffn",
    style: Style = "residual",
    final_norm: bool = True,
    pre_norm: PreNorm = "rms",
    seed: int = 0,
) -> Verbalizers:
    """Fresh fp32 verbalizers on the backbone's device; a layer starts the same whichever others are built with it."""
    text = backbone.text_config
    width = getattr(text, "intermediate_size", 0)
    if structure == "logit-lens":
        return logit_lens(backbone, layers)
    architecture = Architecture(
        structure=structure,
        hidden_size=backbone.hidden_size,
        intermediate_size=width if isinstance(width, int) else 0,  # some families have none, or one for each layer
        style=style,
        final_norm=final_norm,
        pre_norm=pre_norm,
        activation=str(getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None) or "silu"),
        norm_eps=float(getattr(text, "rms_norm_eps", None) or NORM_EPS),
    )
    with torch.device("meta"):
        verbalizers = Verbalizers(backbone, architecture, layers)
    verbalizers.to_empty(device="cpu")
    for layer in layers:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        _initialize(verbalizers.by_layer[str(layer)], style, generator)
    return verbalizers.to(backbone.device)


def frozen_layout(backbone: Backbone, verbalizers: Verbalizers | None) -> Layout:
    """How samples lie for a frozen model that is read at its last layer, and through verbalizers if there are any."""
    return backbone.frozen_layout if verbalizers is None else verbalizers.layout


def logit_lens(backbone: Backbone, layers: Sequence[int]) -> Verbalizers:
    """Verbalizers without parameters: final norm and head straight on the hidden state."""
    return Verbalizers(backbone, Architecture("logit-lens", backbone.hidden_size, 0, pre_norm="none"), layers)


def load_verbalizers(
    folder: str | Path,
    backbone: Backbone,
    layers: Sequence[int],
    *,
    teacher_digest: str | None = None,
    trainable: bool = False,
    check_head: bool = True,
) -> Verbalizers:
    """Read the verbalizers of `layers` back, fp32, on the backbone's device.

    Raises ModelError when layers are missing, when they are of another width, were trained with other weights than
    `teacher_digest`, or for another head than the backbone's (`check_head=False` allows that on purpose).
    """
    record = read_record(Path(folder), layers)
    architecture = _architecture(Path(folder), record)
    if architecture.hidden_size != backbone.hidden_size:
        raise ModelError(
            f"verbalizers {folder}: made for hidden size {architecture.hidden_size}, this model has "
            f"{backbone.hidden_size}; {FROM_WHERE}"
        )
    _check_identity(folder, record["provenance"], "teacher_digest", teacher_digest, "weights")
    if check_head:
        _check_identity(folder, record["provenance"], "head_digest", head_digest(backbone), "head or final norm")
    with torch.device("meta"):
        verbalizers = Verbalizers(backbone, architecture, layers)
    for layer in layers:
        load_layer(Path(folder), layer, verbalizers.by_layer[str(layer)], record["architecture"])
    return verbalizers.to(backbone.device).requires_grad_(trainable).train(trainable)


def load_exits(folder: Path, backbone: Backbone, *, student: str, start: str | None = None) -> Verbalizers:
    """All verbalizers of a folder as exits of a student: trained for its weights, whose digest is `student`, or for
    those that its run began with (`start`), whose head may have been another. Raises ModelError for any others."""
    record = read_record(folder, [])
    layers, made_for = sorted(map(int, record["layers"])), str(record["provenance"].get("teacher_digest"))
    if not layers:
        raise ModelError(f"{folder / RECORD} names no layers: restore it from a copy, or train a new run with -o")
    is_of_start = start is not None and made_for.removesuffix(WITH_GATES) == start
    digest = None if is_of_start else student
    return load_verbalizers(folder, backbone, layers, teacher_digest=digest, check_head=not is_of_start)


def _architecture(folder: Path, record: dict[str, Any]) -> Architecture:
    """The one that the record says; raises ModelError for one that this release does not know."""
    said = record["architecture"]
    names = {field.name for field in dataclasses.fields(Architecture)}
    if not {"structure", "hidden_size", "intermediate_size"} <= said.keys() <= names or said["structure"] not in BLOCKS:
        raise ModelError(
            f"{folder / RECORD}: `architecture` is none that this release knows ({said}): restore it from a copy, or "
            "train them again"
        )
    return Architecture(**said)


def num_parameters(
    structure: str,
    *,
    hidden_size: int,
    intermediate_size: int = 0,
    num_heads: int = 0,
    num_kv_heads: int = 0,
    head_dim: int = 0,
    qkv_bias: bool = False,
    pre_norm: PreNorm = "none",
) -> int:
    """Parameters of one layer's verbalizer, by arithmetic.

    With `pre_norm="none"` these are the numbers of the paper's Table 4f, which count a decoder layer's own two norms
    but no norm in front of the other structures; `rms` adds one weight of the hidden size per block.
    """
    if structure not in BLOCKS:
        raise ModelError(f"`{structure}` is no verbalizer structure; known: {', '.join(BLOCKS)}")
    num_blocks, num_linears = BLOCKS[structure]
    d = hidden_size
    if structure.startswith("decoder"):
        heads, kv_heads = num_heads * head_dim, num_kv_heads * head_dim
        attention = 2 * d * (heads + kv_heads) + qkv_bias * (heads + 2 * kv_heads)
        return num_blocks * (attention + 3 * d * intermediate_size + 2 * d)
    width = intermediate_size if structure.startswith("ffn") else d
    return num_blocks * (num_linears * d * width + (d if pre_norm == "rms" else 0))


def _decoder_layer(backbone: Backbone, layer: int) -> nn.Module:
    # Same index as the layer whose mask and rotary arguments it will get: the kind of attention must fit the mask.
    kind = cast(Any, plain_class(backbone.layers[layer - 1]))
    try:
        return kind(backbone.decoder.config, layer - 1)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"a verbalizer of structure `decoder` cannot be made for layer {layer}: `{kind.__name__}` takes "
            f"other arguments ({error}); choose another `verbalizer.structure`"
        ) from None


@torch.no_grad()
def _initialize(verbalizer: nn.Module, style: Style, generator: torch.Generator) -> None:
    """Fill every parameter: biases 0, norms 1, matrices random, the last projections 0 in residual style."""
    num_zeroed = 0
    for name, parameter in verbalizer.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif style == "residual" and LAST_PROJECTIONS & set(name.split(".")):
            parameter.zero_()
            num_zeroed += 1
        else:
            # 1/sqrt(fan-in) keeps activations near 1 at any width; the plain style is the usual N(0, 0.02).
            std = PLAIN_STD if style == "plain" else parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, std, generator=generator)
    if style == "residual" and not num_zeroed:
        raise ModelError(
            f"no `{'` or `'.join(sorted(LAST_PROJECTIONS))}` in this model's decoder layer to start at zero"
        )


def _check_identity(folder: str | Path, provenance: dict[str, Any], key: str, wanted: str | None, what: str) -> None:
    found = provenance.get(key)
    if wanted is not None and found != wanted:
        raise ModelError(
            f"verbalizers {folder}: trained for a model whose {what} are `{found}`, this one's are `{wanted}`; name "
            f"the model they were trained for, or verbalizers of this one: {FROM_WHERE}"
        )
