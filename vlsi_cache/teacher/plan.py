"""Plan: what a build will cost in bytes, arithmetic, memory and hours, before any weight is loaded.

A weight that multiplies a token counts 2 FLOP, attention 4 * length^2 * width in every layer: the whole square, as
profilers count it, although a causal kernel need not compute the half of it above the diagonal.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.training import PreNorm, TraversalSpec
from vlsi_cache.data.sequence import Layout
from vlsi_cache.errors import SpecError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.packing import likely_layout
from vlsi_cache.models.probe import check_vocabulary
from vlsi_cache.models.verbalizer import num_parameters
from vlsi_cache.models.verbalizer_files import read_record
from vlsi_cache.progress import html_text, human_bytes
from vlsi_cache.train.distill import schedule_steps, shown_steps, stage_steps

from .build import part_tokens
from .inputs import TeacherInputs, open_teacher_inputs

__all__ = [
    "DEFAULT_GPU",
    "ForwardFlops",
    "GPUS",
    "UTILISATION",
    "forward_flops",
    "gpu_peak",
    "num_passes",
    "picture_patches",
]

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


def num_passes(traversal: TraversalSpec | None) -> int:
    """How often each decoder layer runs over a batch. Which tokens are traversed decides what is mixed, not what runs:
    a further pass is over all of them, those of answers too."""
    return 1 if traversal is None or traversal.mixing == "first" else traversal.num_passes


def forward_flops(model: Any, lengths: Iterable[int], patches: Iterable[int], *, passes: int = 1) -> ForwardFlops:
    """Of samples of these lengths in tokens and pictures of these numbers of patches, without the head.

    `model` may be on the meta device. Each of `patches` is what one attention of the vision tower sees; `passes` is how
    often each decoder layer runs.
    """
    lengths, patches = list(lengths), list(patches)
    layers, text = Backbone(model).layers, model.config.get_text_config()
    num_heads = getattr(text, "num_attention_heads", None) or 0  # Mamba has none
    width = num_heads * (getattr(text, "head_dim", None) or text.hidden_size // max(num_heads, 1))
    # Two products, queries with keys and weights with values, of two operations each.
    squares = float(sum(length * length for length in lengths))
    weights = sum(active_weights(layers, text).values())
    return ForwardFlops(
        weights=2.0 * passes * weights * sum(lengths),
        attention=4.0 * passes * len(layers) * width * squares,
        vision=_vision(model, patches) if patches else 0.0,
    )


def picture_patches(image_processor: Any, config: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Patches that the vision tower sees of one sample's pictures, (width, height) each: one number an attention."""
    if hasattr(image_processor, "get_number_of_image_patches") and hasattr(image_processor, "merge_size"):
        return [int(image_processor.get_number_of_image_patches(height, width, {})) for width, height in sizes]
    vision = config.vision_config
    per_crop = (vision.image_size // vision.patch_size) ** 2
    crops = len(sizes)
    # LLaVA-OneVision cuts a picture that is alone into crops of the best grid, and sees the whole picture once more.
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
    weights = active_weights(model, config, without=text)
    each = sum(count / (merged if "merger" in name else 1) for name, count in weights.items())
    depth = getattr(config, "depth", None) or config.num_hidden_layers
    width = getattr(config, "embed_dim", None) or config.hidden_size
    return 2.0 * each * sum(patches) + 4.0 * depth * width * float(sum(number * number for number in patches))


def active_weights(module: nn.Module, config: Any, without: Collection[int] = ()) -> dict[str, float]:
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


# Compressed bytes by profile, measured on SmolLM2-135M at k = 64 (49,152 tokens): of a kept entry (id and value), of a
# scalar. Ids of a vocabulary above 65,536 take about a quarter of a byte more where they are compressed (not measured).
ENTRY_BYTES = {"default": 1.54, "exact": 3.55, "fast": 4.0}
SCALAR_BYTES = {"default": 2.3, "exact": 3.3, "fast": 4.0}
MORE_FOR_LARGE_VOCABULARY = {"default": 0.27, "exact": 0.27, "fast": 2.0}


@dataclass(frozen=True)
class Plan:
    """What a build will cost. Sizes are estimates of the compressed cache, hours are those of one `gpu` at
    `utilisation` of its dense bf16 peak."""

    name: str
    num_samples: int
    num_skipped: int
    num_prompt_tokens: int
    num_response_tokens: int
    layers: list[int]
    top_k: list[int]
    tail_samples: int
    num_parts: int
    bytes_per_layer_token: float
    bytes_per_response_token: float
    total_bytes: float
    hidden_state_bytes: float
    teacher_parameters: int
    verbalizer_parameters: int
    teacher_memory_bytes: float
    teacher_flops: float
    attention_flops: float
    vision_flops: float
    gpu: str
    peak_tflops: float
    utilisation: float
    hours: float
    recipe: str
    student_steps: dict[str, int]
    student_schedule_steps: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f"<pre>{html_text(str(self))}</pre>"

    def __str__(self) -> str:
        weights = f"{self.teacher_parameters / 1e9:,.3f} B parameters, {self.verbalizer_parameters / 1e9:,.3f} B"
        sizes = f"{self.bytes_per_layer_token:.0f} B per (layer, token), {self.bytes_per_response_token:,.0f} B"
        widths = f"top-{self.top_k[0]}" if len(set(self.top_k)) == 1 else f"top-k {self.top_k}"
        lines = [
            f"plan of `{self.name}`",
            f"  data       {self.num_samples:,} samples, {self.num_prompt_tokens:,} prompt and "
            f"{self.num_response_tokens:,} response tokens; {self.num_skipped:,} rows left out",
            f"  rows       {len(self.layers)} layers {self.layers}, {widths}, {self.tail_samples} tail samples",
            f"  cache      about {human_bytes(self.total_bytes)} in {self.num_parts} parts: {sizes} per response token",
            f"             (hidden states in bf16 would take {human_bytes(self.hidden_state_bytes)})",
            f"  teacher    {weights} in verbalizers, {human_bytes(self.teacher_memory_bytes)} of memory for weights",
            f"  compute    {self.teacher_flops:.3g} FLOP, of which attention {self.attention_flops:.2g} and pictures "
            f"{self.vision_flops:.2g}",
            f"             {self.hours:,.2g} hours of one {self.gpu}, if it reaches {100 * self.utilisation:.0f} % of "
            f"its {self.peak_tflops:,.0f} TFLOP/s in bf16 (--gpu: another)",
            f"  student    {self.recipe}: {shown_steps(self.student_steps, self.student_schedule_steps)} steps",
        ]
        return "\n".join(lines)


def plan(spec: CacheSpec, *, gpu: str = DEFAULT_GPU) -> Plan:
    """Price the build of `spec`; loads tokenizer, config and rows, but no weights. Raises what a build would raise.

    `gpu` is one of `flops.GPUS`; hours are at 40 % of its peak.
    """
    gpu, peak = gpu_peak(gpu)
    inputs = open_teacher_inputs(spec)
    num_tokens = sum(inputs.num_response_tokens)
    layers, text = inputs.layers, inputs.model.config.get_text_config()
    model = inputs.model.empty()
    check_vocabulary(inputs.encoder, Backbone(model).real_vocab_limit)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    verbalizers = 0 if spec.teacher.verbalizers is None else _verbalizer_parameters(inputs)
    per_layer_token = _bytes_per_layer_token(inputs)
    patches: list[int] = []
    everything, layout, traversal = range(len(inputs.records)), likely_layout(text), inputs.model.traversal
    if traversal is not None and traversal.mode == "prompt":
        layout = Layout(layout.row_width, marks_responses=True)
    for sequence in inputs.sequences(everything, layout):
        record = max((inputs.records[i] for i in sequence), key=lambda one: len(one.images))
        if inputs.encoder.vision is not None and record.images:
            sizes = [image.size for image in record.images]
            patches += picture_patches(inputs.encoder.vision.image_processor, inputs.model.config, sizes)
    forward = forward_flops(model, inputs.lengths(everything, layout), patches, passes=num_passes(traversal))
    # One layer's head and its verbalizer after the other, at the response tokens alone.
    heads = 2.0 * num_tokens * (len(layers) * text.vocab_size * text.hidden_size + verbalizers)
    flops = forward.total + heads
    per_weight = torch.finfo(_dtype(inputs)).bits // 8
    return Plan(
        name=spec.name,
        num_samples=len(inputs.records),
        num_skipped=len(inputs.skipped),
        num_prompt_tokens=int(inputs.num_prompt_N.sum()),
        num_response_tokens=num_tokens,
        layers=layers,
        top_k=spec.rows.widths(len(layers)),
        tail_samples=spec.rows.tail_samples,
        num_parts=-(-num_tokens // part_tokens(inputs)),
        bytes_per_layer_token=per_layer_token,
        bytes_per_response_token=per_layer_token * len(layers),
        total_bytes=per_layer_token * len(layers) * num_tokens,
        hidden_state_bytes=2.0 * text.hidden_size * len(layers) * num_tokens,
        teacher_parameters=parameters,
        verbalizer_parameters=verbalizers,
        teacher_memory_bytes=float(parameters * per_weight + verbalizers * 4),
        teacher_flops=flops,
        attention_flops=forward.attention,
        vision_flops=forward.vision,
        gpu=gpu,
        peak_tflops=peak,
        utilisation=UTILISATION,
        hours=flops / (UTILISATION * peak * 1e12) / 3600,
        recipe=spec.distill.recipe,
        student_steps=stage_steps(spec, len(inputs.records)),
        student_schedule_steps=schedule_steps(spec, len(inputs.records)),
    )


def _bytes_per_layer_token(inputs: TeacherInputs) -> float:
    """Averaged over layers and over all response tokens, with rows or without; top-p is not known beforehand."""
    rows, profile = inputs.spec.rows, inputs.spec.store.profile
    more = 0.0 if inputs.encoder.vocab_size <= 65536 else MORE_FOR_LARGE_VOCABULARY[profile]
    widths = rows.widths(len(inputs.layers))
    num_tail = 0 if rows.kind == "sampled" else rows.tail_samples
    row = sum(widths) / len(widths) * (ENTRY_BYTES[profile] + more) + num_tail * (2 + more)
    row += (3 + len(rows.taus)) * SCALAR_BYTES[profile]
    return row * rows.select_tokens.expected_share


def _verbalizer_parameters(inputs: TeacherInputs) -> int:
    path, text = inputs.verbalizers_path, inputs.model.config.get_text_config()
    assert path is not None
    built = read_record(Path(path), inputs.target_layers)["architecture"]  # `verbalizer` says what would be trained
    return len(inputs.target_layers) * verbalizer_size(text, built["structure"], built.get("pre_norm", "rms"))


def verbalizer_size(text: Any, structure: str, pre_norm: PreNorm) -> int:
    """Parameters of one layer's verbalizer for a model with this text configuration."""
    return num_parameters(
        structure,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 0,
        num_heads=(num_heads := getattr(text, "num_attention_heads", None) or 1),
        num_kv_heads=getattr(text, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // num_heads,
        pre_norm=pre_norm,
    )


def _dtype(inputs: TeacherInputs) -> torch.dtype:
    if inputs.spec.teacher.dtype == "auto":
        declared = getattr(inputs.model.config, "dtype", None)
        return declared if isinstance(declared, torch.dtype) else torch.float32
    return getattr(torch, inputs.spec.teacher.dtype)
