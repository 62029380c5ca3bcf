"""How much arithmetic a teacher's forward takes, and how fast GPUs are by their data sheets.

A weight that multiplies a token counts 2 FLOP, attention 4 * length^2 * width in every layer: the whole square, as
profilers count it, although a causal kernel need not compute the half of it above the diagonal.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlsi_cache.errors import SpecError
from vlsi_cache.models.layers import Backbone

__all__ = ["DEFAULT_GPU", "GPUS", "UTILISATION", "ForwardFlops", "forward_flops", "gpu_peak", "picture_patches"]

# Dense bf16 peak in TFLOP/s, without sparsity, from the makers' data sheets.
GPUS = {
    "A100": 312.0,
    "B200": 2250.0,
    "H100": 989.0,
    "H200": 989.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
    "RTX 4090": 165.0,
}
DEFAULT_GPU, UTILISATION = "H100", 0.4


@dataclass(frozen=True)
class ForwardFlops:
    """FLOP of one pass over some samples: weights and attention of the text stack, and the vision tower."""

    weights: float
    attention: float
    vision: float

    @property
    def total(self) -> float:
        return self.weights + self.attention + self.vision


def gpu_peak(name: str) -> tuple[str, float]:
    """A GPU's name as the table has it and its peak, whatever the case and spaces; raises SpecError."""
    plain = {known.replace(" ", "").lower(): known for known in GPUS}
    known = plain.get(name.replace(" ", "").replace("-", "").replace("_", "").lower())
    if known is None:
        raise SpecError(f"no GPU `{name}` in the table of peaks; known: {', '.join(GPUS)}")
    return known, GPUS[known]


def forward_flops(model: Any, lengths: Iterable[int], patches: Iterable[int]) -> ForwardFlops:
    """Of samples of these lengths in tokens and pictures of these numbers of patches, without the head.

    `model` may be on the meta device. Each of `patches` is what one attention of the vision tower sees.
    """
    lengths, patches = list(lengths), list(patches)
    layers, text = Backbone(model).layers, model.config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    squares = float(sum(length * length for length in lengths))
    weights = sum(_active(layers, text).values())
    return ForwardFlops(
        weights=2.0 * weights * sum(lengths),
        attention=4.0 * len(layers) * width * squares,
        vision=_vision(model, patches) if patches else 0.0,
    )


def picture_patches(image_processor: Any, config: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Patches that the vision tower sees of one sample's pictures, (width, height) each: one number an attention."""
    if hasattr(image_processor, "get_number_of_image_patches") and hasattr(image_processor, "merge_size"):
        return [int(image_processor.get_number_of_image_patches(height, width, {})) for width, height in sizes]
    vision = config.vision_config
    per_crop = (vision.image_size // vision.patch_size) ** 2
    crops = len(sizes)
    if len(sizes) == 1 and (pinpoints := getattr(config, "image_grid_pinpoints", None)):
        from transformers.image_processing_utils import select_best_resolution

        width, height = sizes[0]
        rows, columns = (edge // vision.image_size for edge in select_best_resolution((height, width), pinpoints))
        crops = 1 + rows * columns
    return [per_crop] * crops


def _vision(model: Any, patches: list[int]) -> float:
    """The tower, and what joins its patches to the text: a merger sees several patches as one."""
    config = model.config.vision_config
    merged = getattr(config, "spatial_merge_size", 1) ** 2
    text = {id(weight) for weight in (*model.get_decoder().parameters(), model.get_output_embeddings().weight)}
    weights = _active(model, config, without=text)
    each = sum(count / (merged if "merger" in name else 1) for name, count in weights.items())
    depth = getattr(config, "depth", None) or config.num_hidden_layers
    width = getattr(config, "embed_dim", None) or config.hidden_size
    return 2.0 * each * sum(patches) + 4.0 * depth * width * float(sum(number * number for number in patches))


def _active(module: nn.Module, config: Any, without: Collection[int] = ()) -> dict[str, float]:
    """Weights by name that multiply every token: matrices and kernels, no tables; of experts those that are chosen."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    chosen, num_experts = getattr(config, "num_experts_per_tok", None), 1
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        num_experts = getattr(config, key, None) or num_experts
    share = min(1.0, chosen / num_experts) if chosen else 1.0
    return {
        name: weight.numel() * (share if ".experts." in f".{name}." else 1.0)
        for name, weight in module.named_parameters()
        if weight.ndim > 1 and id(weight) not in tables and id(weight) not in without
    }
