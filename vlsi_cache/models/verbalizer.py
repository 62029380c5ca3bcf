"""Verbalizers: what stands between an intermediate layer and the model's own final norm and head; and their files.

`logits = head(final_norm(verbalizer(h)))`; head and final norm are the model's own, frozen and shared. The residual
style starts as the logit lens exactly, because the last projection of every block is zero at the start.

FOLDER/layer_0002.safetensors   weights, and the architecture in the header: the file's hash covers both
FOLDER/verbalizers.json         architecture, layers, provenance (digests of the teacher's weights and head), and the
                                checksum of each file; earlier releases wrote none

Legend: B rows, S positions, T response tokens, D hidden size.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlsi_cache.config.sections import PreNorm, Structure, Style
from vlsi_cache.errors import CacheCorruptError, ModelError, command_line
from vlsi_cache.io import checksum, difference_from, hash_of, replacing, write_atomically
from vlsi_cache.run_files import RUN, read_run, read_verbalizers

from .backbone import Backbone, LayerSequence, head_digest
from .load import own_memory, resolve_model

FORMAT_VERSION = 1
RECORD = "verbalizers.json"
ADDED_LATER = ("loss",)  # to the provenance
FROM_WHERE = "a teacher's come from vlsi-cache train-verbalizers, a student's from a distill run of recipe `vlsi`"
HEADER_KEY = "verbalizer"  # one key: the order of several in a safetensors header is not fixed


def find_folder(path: str | Path) -> Path:
    """The verbalizers that `path` names: a folder of them, the run that has trained them, or `package:NAME/...`."""
    folder = Path(resolve_model(path))
    inner = folder / "verbalizers"
    return inner if inner.is_dir() and not (folder / RECORD).is_file() else folder


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:04d}.safetensors"


def write(
    folder: Path, layers: dict[int, dict[str, Tensor]], architecture: dict[str, Any], provenance: dict[str, Any]
) -> Path:
    """Write the layers, then the record that names them together with those already there.

    Of several processes that write into one folder, the caller must let in one at a time.
    """
    there = _read_record(folder) if (folder / RECORD).exists() else None
    if there is not None:
        # Whether settings fit is for the caller to know: an earlier release did not write them here.
        added = {key: provenance[key] for key in ADDED_LATER if key in provenance}
        there["provenance"] = {**added, **there["provenance"]}
    record = {"format_version": FORMAT_VERSION, "architecture": architecture, "provenance": provenance}
    if there is not None and any(there.get(key) != value for key, value in record.items()):
        raise ModelError(f"{folder} holds verbalizers of another model or architecture; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    sums: dict[str, Any] = {} if there is None else dict(there.get("files", {}))
    for layer, tensors in layers.items():
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with replacing(layer_file(folder, layer)) as temporary:
            save_file(on_cpu, temporary, metadata={HEADER_KEY: _canonical(architecture)})
            sums[layer_file(folder, layer).name] = checksum(temporary)
    named = sorted({*layers, *(there["layers"] if there else [])})
    write_atomically(
        folder / RECORD, json.dumps({**record, "layers": named, "files": dict(sorted(sums.items()))}, indent=1) + "\n"
    )
    return folder


def read_record(folder: Path, layers: Sequence[int]) -> dict[str, Any]:
    """`verbalizers.json`; raises ModelError when it is not there or does not name all of `layers`, CacheCorruptError
    when it is damaged."""
    if not (folder / RECORD).exists():
        raise ModelError(f"no verbalizers in {folder} (`{RECORD}` is missing); {FROM_WHERE}")
    record = _read_record(folder)
    if record["format_version"] != FORMAT_VERSION:
        raise ModelError(
            f"{folder / RECORD}: format version {record['format_version']}, this release reads {FORMAT_VERSION}"
        )
    missing = [layer for layer in layers if layer not in record["layers"] or not layer_file(folder, layer).is_file()]
    if missing:
        numbers = ",".join(map(str, missing))
        again = command_line("train-verbalizers", "SPEC", "-o", folder.parent, "--layers", numbers)
        of_teacher = "" if _is_of_student(folder) else f"those of a teacher with {again}, "
        raise ModelError(
            f"verbalizers {folder}: none for layers {missing}, there are {record['layers']}; name target layers "
            f"that are there, or train the missing ones: {of_teacher}those of a "
            "student in a new distill run that has them in `distill.layers`"
        )
    return record


def load_layer(folder: Path, layer: int, module: nn.Module, architecture: dict[str, Any]) -> None:
    """Put the tensors of one file into `module`, which may be on the meta device; raises ModelError, CacheCorruptError
    for a file that is not what was written."""
    file = layer_file(folder, layer)
    check_layers(folder, [layer])
    try:
        with safe_open(file, framework="pt") as tensors:
            if (tensors.metadata() or {}).get(HEADER_KEY) != _canonical(architecture):
                raise ModelError(f"{file}: its architecture is not the one {RECORD} says; train the verbalizers again")
            state = {name: own_memory(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118 - no mapping
        module.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{file}: cannot be read as a verbalizer of this model: {reason}") from None


def check_layers(folder: Path, layers: Sequence[int]) -> None:
    """Raise CacheCorruptError for the first file that is not what was written, as far as the record has its sum."""
    sums = _read_record(folder).get("files", {})
    for file in (layer_file(folder, layer) for layer in layers):
        if file.name in sums and (problem := difference_from(sums[file.name], file)):
            raise CacheCorruptError(f"{file} is damaged: its {problem}; {_train_again(folder)}")


def whole_layers(folder: Path) -> list[int]:
    """Layers that the record names and whose files are what was written."""
    found = []
    for layer in _read_record(folder)["layers"] if (folder / RECORD).exists() else []:
        try:
            check_layers(folder, [layer])
        except CacheCorruptError:
            continue
        found += [layer] if layer_file(folder, layer).is_file() else []
    return found


def verbalizers_digest(folder: str | Path, layers: Sequence[int]) -> dict[str, str]:
    """sha256 of each layer's file (key: the layer as text), which holds weights and architecture."""
    folder = Path(folder)
    read_record(folder, layers)
    check_layers(folder, layers)
    return {str(layer): hash_of(layer_file(folder, layer), hashlib.sha256)[0] for layer in layers}


def _is_of_student(folder: Path) -> bool:
    """Whether a distill run has trained them."""
    return (folder.parent / RUN).is_file() and read_run(folder.parent)["kind"] == "distill"


def _read_record(folder: Path) -> dict[str, Any]:
    return read_verbalizers(folder / RECORD, f"restore it from a copy, or {_train_again(folder)}")


def _train_again(folder: Path) -> str:
    """What makes damaged verbalizers anew."""
    run = folder.parent
    if (run / RUN).is_file() and _is_of_student(folder):
        return f"delete {folder} and {run / 'checkpoints'} and train again in {run}, or in another folder"
    again = command_line("train-verbalizers", "SPEC", "-o", run)
    return f"run again what has trained it, which takes what it needs from its checkpoint: {again}"


def _canonical(architecture: dict[str, Any]) -> str:
    return json.dumps(architecture, sort_keys=True)


NUM_BLOCKS = {
    "mlp": 1,
    "mlp-x2": 1,  # one block of two linear maps; the other `-x2` stack two whole blocks
    "verb-ffn": 1,
    "verb-ffn-x2": 2,
    "ffn": 1,
    "ffn-x2": 2,
    "decoder": 1,
    "decoder-x2": 2,
}
LOGIT_LENS = "logit-lens"
LAST_PROJECTIONS = frozenset({"down_proj", "o_proj"})
PLAIN_STD = 0.02
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

    @property
    def needs_sequence(self) -> bool:
        """Whether it attends, and so takes a `LayerSequence` instead of [T, D]."""
        return self.structure.startswith("decoder")


class Mlp(nn.Module):
    """One linear map, or two with the activation between them."""

    def __init__(self, size: int, *, num_linears: int, activation: str) -> None:
        super().__init__()
        self.up_proj = nn.Linear(size, size, bias=False) if num_linears == 2 else None
        self.down_proj = nn.Linear(size, size, bias=False)
        self.activation = _activation(activation)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(hidden if self.up_proj is None else self.activation(self.up_proj(hidden)))


class SwiGlu(nn.Module):
    """Gated feed-forward block of inner width `width`: the verb-FFN has the hidden size, the FFN the model's width."""

    def __init__(self, size: int, width: int, *, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)
        self.activation = _activation(activation)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(nn.Module):
    """`h + f(norm(h))`, or without the residual in plain style."""

    def __init__(self, body: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        size, eps = architecture.hidden_size, architecture.norm_eps
        self.norm = nn.RMSNorm(size, eps=eps) if architecture.pre_norm == "rms" else nn.Identity()
        self.body = body
        self.is_residual = architecture.style == "residual"

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.body(self.norm(hidden))
        return hidden + output if self.is_residual else output


class Verbalizer(nn.Module):
    """The verbalizer of one layer, fp32 whatever the backbone's dtype; final norm and head are not part of it."""

    def __init__(self, architecture: Architecture, *, new_decoder_layer: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        num_blocks = NUM_BLOCKS.get(architecture.structure, 0)  # none in the logit lens
        self.blocks = nn.ModuleList(_new_block(architecture, new_decoder_layer) for _ in range(num_blocks))

    def forward(self, hidden: Tensor | LayerSequence) -> Tensor:
        """[T, D] -> [T, D] before the final norm, in the input's dtype; a decoder verbalizer takes a LayerSequence."""
        if self.architecture.needs_sequence:
            return self._attend(cast(LayerSequence, hidden))
        hidden_TD = cast(Tensor, hidden)
        state_TD = hidden_TD.float()
        with _compute_in(hidden_TD):
            for block in self.blocks:
                state_TD = block(state_TD)
        return state_TD.to(hidden_TD.dtype)

    def _attend(self, sequence: LayerSequence) -> Tensor:
        state_BSD = sequence.hidden_BSD.float()
        with _compute_in(sequence.hidden_BSD):
            for block in self.blocks:
                output = block(state_BSD, **sequence.layer_kwargs)
                state_BSD = output[0] if isinstance(output, tuple) else output
        return sequence.gather(state_BSD).to(sequence.hidden_BSD.dtype)


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
        return self.architecture.needs_sequence and bool(self.layers)

    def capture(
        self, inputs: dict[str, Any], rows_T: Tensor, positions_T: Tensor, *, with_final: bool = True
    ) -> "dict[int, Tensor] | dict[int, Tensor | LayerSequence]":
        """The backbone's hidden states in the form that `apply` takes; the final one only if asked."""
        capture = self._backbone.capture_sequences if self.needs_sequence else self._backbone.capture
        return capture(inputs, self.layers, rows_T, positions_T, with_final=with_final)

    def apply(self, layer: int, hidden: Tensor | LayerSequence) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What enters the head for one layer, [T, D] in the dtype of `hidden`; differentiable in `hidden`."""
        state_TD = self.by_layer[str(layer)](hidden)
        # Of a model spread over several devices, norm and head may lie on different ones.
        normed_TD = self._backbone.final_norm(state_TD) if self.architecture.final_norm else state_TD
        return normed_TD.to(self._backbone.device)

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


def logit_lens(backbone: Backbone, layers: Sequence[int]) -> Verbalizers:
    """Verbalizers without parameters: final norm and head straight on the hidden state."""
    return Verbalizers(backbone, Architecture(LOGIT_LENS, backbone.hidden_size, 0, pre_norm="none"), layers)


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
    architecture = Architecture(**record["architecture"])
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
    if structure not in NUM_BLOCKS:
        raise ModelError(f"`{structure}` is no verbalizer structure; known: {', '.join(NUM_BLOCKS)}")
    d, ffn = hidden_size, 3 * hidden_size * intermediate_size
    heads, kv_heads = num_heads * head_dim, num_kv_heads * head_dim
    attention = 2 * d * (heads + kv_heads) + qkv_bias * (heads + 2 * kv_heads)
    block = {"mlp": d * d, "verb-ffn": 3 * d * d, "ffn": ffn, "decoder": attention + ffn + 2 * d}
    size = 2 * d * d if structure == "mlp-x2" else block[structure.removesuffix("-x2")]
    norm = d if pre_norm == "rms" and not structure.startswith("decoder") else 0
    return NUM_BLOCKS[structure] * (size + norm)


def _new_block(architecture: Architecture, new_decoder_layer: Callable[[], nn.Module] | None) -> nn.Module:
    size, activation = architecture.hidden_size, architecture.activation
    match architecture.structure.removesuffix("-x2"):
        case "mlp":
            num_linears = 2 if architecture.structure == "mlp-x2" else 1
            return Block(Mlp(size, num_linears=num_linears, activation=activation), architecture)
        case "verb-ffn":
            return Block(SwiGlu(size, size, activation=activation), architecture)
        case "ffn" if architecture.intermediate_size > 0:
            return Block(SwiGlu(size, architecture.intermediate_size, activation=activation), architecture)
        case "decoder" if new_decoder_layer is not None:
            return new_decoder_layer()
    raise ModelError(f"a verbalizer of structure `{architecture.structure}` cannot be built for this model")


def _decoder_layer(backbone: Backbone, layer: int) -> nn.Module:
    # Same index as the layer whose mask and rotary arguments it will get: the kind of attention must fit the mask.
    source = cast(Any, backbone.layers[layer - 1])
    try:
        return type(source)(backbone.decoder.config, layer - 1)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"a verbalizer of structure `decoder` cannot be made for layer {layer}: `{type(source).__name__}` takes "
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


def _compute_in(hidden: Tensor) -> AbstractContextManager[Any]:
    # Matrix products in the backbone's dtype, with the fp32 weights as masters; an outer autocast stays as it is.
    if hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(hidden.device.type, dtype=hidden.dtype)
    return nullcontext()


def _activation(name: str) -> nn.Module:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def _check_identity(folder: str | Path, provenance: dict[str, Any], key: str, wanted: str | None, what: str) -> None:
    found = provenance.get(key)
    if wanted is not None and found != wanted:
        raise ModelError(
            f"verbalizers {folder}: trained for a model whose {what} are `{found}`, this one's are `{wanted}`; name "
            f"the model they were trained for, or verbalizers of this one: {FROM_WHERE}"
        )
