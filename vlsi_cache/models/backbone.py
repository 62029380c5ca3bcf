"""Hidden states of target layers, gathered at the response positions, and the head that reads them.

Target k means "after k decoder layers" (`hidden_states[k]`); k = number of layers is the output of the final
norm, which is what enters the head. Logits are never computed here.

Legend: B rows, S positions, T response tokens, V head rows, D hidden size.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vlsi_cache.config.training import TargetLayers
from vlsi_cache.data.branches import BRANCHES
from vlsi_cache.data.collate import PICTURES, RESPONSES, SEEN_UNTIL
from vlsi_cache.data.sequence import Layout
from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.sparse.head import Head

from .branches import capture_branches, in_order
from .families import check_family, find_parts, head_module, logit_change
from .features import with_features
from .packing import unpacked, widest_row
from .parallel import whole, whole_head
from .traversal import TRAVERSED, answering, traversal_of

Kept = TypeVar("Kept")
# LLaVA-OneVision-7B: 28 layers, but the paper's targets are those of the 24-layer 0.5B model.
PAPER_LAYERS: dict[tuple[str | None, int, int], list[int]] = {("llava_onevision", 28, 3): [4, 12, 20]}


@dataclass(frozen=True)
class LayerSequence:
    """Whole-sequence output of one decoder layer, with the mask and rotary arguments of that same forward."""

    hidden_BSD: Tensor
    layer_kwargs: dict[str, Any]
    rows_T: Tensor
    positions_T: Tensor

    def gather(self, hidden_BSD: Tensor) -> Tensor:
        """The response positions of any tensor [B, S, D] of this batch, as [T, D]."""
        return _gather(hidden_BSD, self.rows_T, self.positions_T)


# (scale, cap) of models whose configuration does not say it, as `probe.py` has found it.
_found_changes: "WeakKeyDictionary[nn.Module, tuple[float, float | None]]" = WeakKeyDictionary()


# Why several sequences may not lie in one row of a batch ("": they may), as `probe.py` has found it.
_why_padded: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()
# Why a sequence may not branch, alike.
_why_unbranched: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()
# Why branches may not go on from the cache of what they share, of a model that is padded.
_why_uncached: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()


class _Enough(Exception):
    """Raised by a hook to leave a forward pass whose deepest wanted layer has run."""


class Backbone:
    """A loaded model, with an adapter or without: its text stack, final norm and head, and its hidden states.

    Holds the model, registers nothing on it. Raises ModelError for models that have no such parts. Whether the logits
    really are `head(final_norm(h))`, apart from a scale and a soft cap, is what `probe.py` finds out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # A PEFT wrapper puts its adapter into the layers of the model inside, which therefore is what runs.
        self._inner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else cast(Any, model)
        self.config = self._inner.config
        self.text_config = self.config.get_text_config()
        check_family(self.config)
        parts = find_parts(self._inner)
        self.decoder, self.layers_name = parts.decoder, parts.layers
        self._norm_name = parts.final_norm
        _check_head(self._inner)
        # What runs: everything below the head, the vision tower of a VLM included.
        self._body = cast(Any, self.decoder if self._inner.base_model is self._inner else self._inner.base_model)
        self._ropes: list[Any] = [module for module in self.decoder.modules() if _grows(module)]
        self._offsets: list[Any] = [module for module in self._inner.modules() if hasattr(module, "rope_deltas")]
        self._rope_kind, self.rope_limit = rope_of(self.text_config)

    @property
    def plain(self) -> Any:
        """The model without the wrapper of an adapter."""
        return self._inner

    @property
    def body(self) -> Any:
        """What a forward pass calls: everything below the head."""
        return self._body

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers of the text stack."""
        return getattr(self.decoder, self.layers_name)

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last decoder layer and the head."""
        return getattr(self.decoder, self._norm_name)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the language head, [V, D]; V can exceed the real vocabulary."""
        held = whole_head(self._inner)  # of a model that is cut into pieces
        return head_module(self._inner).weight if held is None else held.weight

    @property
    def head_bias(self) -> Tensor | None:
        """Bias of the language head, [V]; None in most families."""
        held = whole_head(self._inner)
        return getattr(head_module(self._inner), "bias", None) if held is None else held.bias

    @property
    def logit_scale(self) -> float:
        """What the model multiplies its logits with (1 in most families)."""
        return self._logit_change()[0]

    @property
    def logit_cap(self) -> float | None:
        """The model's soft cap on its logits: `cap * tanh(logits / cap)`."""
        return self._logit_change()[1]

    def _logit_change(self) -> tuple[float, float | None]:
        """Scale and cap as the configuration says, a first guess; or as `probe.py` has found them."""
        if self._inner in _found_changes:
            return _found_changes[self._inner]
        return logit_change(self.config)

    def change_logits(self, scale: float, cap: float | None) -> None:
        """Scale and soft cap are these, whatever the configuration says; for every Backbone of this model."""
        _found_changes[self._inner] = (scale, cap)

    @property
    def packs(self) -> bool:
        """Whether batches may be packed: the model has been seen to keep the sequences of a row apart."""
        return self.why_padded == ""

    @property
    def row_width(self) -> int:
        """Tokens of a row of a packed batch, at most; 0 where batches are not packed."""
        return widest_row(self.text_config) if self.packs else 0

    @property
    def layout(self) -> Layout:
        """How samples lie in the batches of this model, whether it trains or not."""
        if self._tells_prompts:
            return Layout(self.row_width, marks_responses=True)
        return Layout(self.row_width, self.why_unbranched == "")

    @property
    def frozen_layout(self) -> Layout:
        """How they lie where no gradient is asked for: then branches may go on from a cache."""
        if self._tells_prompts:
            return self.layout
        return Layout(0, branches=True) if not self.packs and self.why_uncached == "" else self.layout

    @property
    def _tells_prompts(self) -> bool:
        """Whether its layers are traversed for tokens of prompts alone."""
        traversal = traversal_of(self._inner)
        return traversal is not None and traversal.mode == "prompt"

    @property
    def why_unbranched(self) -> str | None:
        """Why the sequences of this model do not branch, as `why_padded` has it."""
        return _why_unbranched.get(self._inner)

    @why_unbranched.setter
    def why_unbranched(self, reason: str) -> None:
        _why_unbranched[self._inner] = reason

    @property
    def why_uncached(self) -> str | None:
        """Why the branches of this model do not go on from the cache of what they share, as `why_padded` has it."""
        return _why_uncached.get(self._inner)

    @why_uncached.setter
    def why_uncached(self, reason: str) -> None:
        _why_uncached[self._inner] = reason

    @property
    def why_padded(self) -> str | None:
        """Why batches are not packed; "" if they are, None where nobody has looked."""
        return _why_padded.get(self._inner)

    @why_padded.setter
    def why_padded(self, reason: str) -> None:
        _why_padded[self._inner] = reason

    @property
    def device(self) -> torch.device:
        """Where the head lies, and where captured hidden states are handed over."""
        return self.head_weight.device

    @property
    def num_layers(self) -> int:
        """Decoder layers of the text stack; also the key of the final layer."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width D of the text stack."""
        return self.head_weight.shape[1]

    @property
    def real_vocab_limit(self) -> int:
        """Rows of the head: an upper bound of the real vocabulary."""
        return self.head_weight.shape[0]

    def capture(
        self,
        inputs: dict[str, Any],
        layers: Sequence[int],
        rows_T: Tensor,
        positions_T: Tensor,
        *,
        with_final: bool = True,
    ) -> dict[int, Tensor]:
        """Run the model without its head; the hidden states [T, D] after each of `layers`, and of the final norm.

        `inputs` is what the model takes (input_ids, attention_mask, pixel_values, ...). Row t of the result is
        `hidden[rows_T[t], positions_T[t]]`, so that only response positions are kept. The final norm's output has the
        key `num_layers`; without it (`with_final`), decoder layers above the deepest of `layers` are not run.
        Differentiable, but for batches with BRANCHES. Raises ModelError for layers out of range.
        """
        if BRANCHES in inputs:
            return capture_branches(self, inputs, layers, rows_T, positions_T, with_final=with_final)
        groups = self._groups(inputs)
        if not groups:
            device = self.device

            def keep(hidden_BSD: Tensor, _kwargs: dict[str, Any]) -> Tensor:
                return _gather(hidden_BSD, rows_T, positions_T).to(device)

            captured, final_BSD = self._run(inputs, layers, keep, with_final=with_final)
            return captured if final_BSD is None else {**captured, self.num_layers: keep(final_BSD, {})}
        # One group of rows after the other, each as narrow as its longest row; the result in the order of rows_T.
        order: list[Tensor] = []
        parts: dict[int, list[Tensor]] = {}
        for rows_G in groups:
            row_of_B = torch.full_like(inputs["attention_mask"][:, 0], -1)
            row_of_B[rows_G] = torch.arange(len(rows_G), device=row_of_B.device)
            own_T = row_of_B[rows_T.to(row_of_B.device)]
            at = (own_T >= 0).nonzero()[:, 0]
            width = int(inputs["attention_mask"][rows_G].sum(1).max())
            narrow = {key: value[rows_G, :width] for key, value in inputs.items()}
            found = self.capture(narrow, layers, own_T[at], positions_T.to(at.device)[at], with_final=with_final)
            order.append(at)
            for layer, state_TD in found.items():
                parts.setdefault(layer, []).append(state_TD)
        return in_order(parts, order)

    def capture_sequences(
        self,
        inputs: dict[str, Any],
        layers: Sequence[int],
        rows_T: Tensor,
        positions_T: Tensor,
        *,
        with_final: bool = True,
    ) -> dict[int, "LayerSequence | Tensor"]:
        """Like `capture`, for verbalizers that attend: a `LayerSequence` per layer; the final one stays [T, D]."""

        def keep(hidden_BSD: Tensor, kwargs: dict[str, Any]) -> LayerSequence:
            kept = tree_map(
                lambda x: x.to(self.device) if isinstance(x, Tensor) else x,
                {**kwargs, "past_key_values": None, "use_cache": False},
            )
            return LayerSequence(hidden_BSD.to(self.device), kept, rows_T, positions_T)

        if self._groups(inputs):
            raise ModelError(
                f"the rope of this model changes at {self.rope_limit} tokens, and the batch has rows on both sides: "
                "verbalizers of structure `decoder` need batches of one row (`micro_batch_size: 1`, a small "
                "`run.batch_tokens`)"
            )
        captured, final_BSD = self._run(inputs, layers, keep, with_final=with_final)
        if final_BSD is None:
            return {**captured}
        return {**captured, self.num_layers: _gather(final_BSD, rows_T, positions_T).to(self.device)}

    def forget(self) -> None:
        """Drop what a forward pass leaves in the model for the next one, which would then depend on it.

        Dynamic NTK keeps the frequencies of the longest row it has seen; Qwen2-VL the offsets behind its pictures, for
        the tokens that are generated next.
        """
        for module in self._offsets:
            module.rope_deltas = None
        for rope in self._ropes:
            rope.register_buffer("inv_freq", rope.original_inv_freq.to(rope.inv_freq.device), persistent=False)
            rope.max_seq_len_cached = rope.original_max_seq_len

    def _groups(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Rows that may run together; nothing where all may, as with all but ropes that look at the longest row.

        Longrope has frequencies for rows up to a length, and others beyond; with dynamic NTK each longer row has its
        own. Padding counts as length, so the rows of a group are cut to its longest.
        """
        mask_BS = inputs.get("attention_mask")
        if self.rope_limit is None or mask_BS is None or len(mask_BS) < 2:
            return []
        lengths_B = mask_BS.sum(1)
        is_long_B = lengths_B > self.rope_limit
        longer = is_long_B.nonzero()[:, 0]
        if not len(longer) or (self._rope_kind == "longrope" and len(longer) == len(mask_BS)):
            return []
        groups = [longer] if self._rope_kind == "longrope" else list(longer.split(1))
        shorter = (~is_long_B).nonzero()[:, 0]
        if any(value.shape[:2] != mask_BS.shape for value in inputs.values()):
            raise ModelError(
                f"the rope of this model changes at {self.rope_limit} tokens: rows on both sides of it cannot run in "
                "one batch with pictures; use batches of one row (`micro_batch_size: 1`, a small `run.batch_tokens`)"
            )
        return [*groups, *([shorter] if len(shorter) else [])]

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise ModelError unless all `layers` are intermediate targets of this model."""
        wrong = [layer for layer in layers if not 1 <= layer < self.num_layers]
        if wrong:
            raise ModelError(
                f"target layers {wrong} are out of range: this model has {self.num_layers} decoder layers, so "
                f"intermediate targets are 1 to {self.num_layers - 1} (the last layer always comes on top)"
            )

    def _run(
        self,
        inputs: dict[str, Any],
        layers: Sequence[int],
        keep: Callable[[Tensor, dict[str, Any]], Kept],
        *,
        with_final: bool,
    ) -> tuple[dict[int, Kept], Tensor | None]:
        """Forward without the head: `keep(output, kwargs)` of each target layer, and the final norm's output if asked.

        Otherwise the run ends behind the deepest target.
        """
        self.check_layers(layers)
        captured: dict[int, Kept] = {}
        is_sharded = hasattr(self._body, "unshard")  # FSDP has to see the end of a forward pass

        def hook_for(layer: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                if len(args) > 1:  # some families hand over masks and positions without their names
                    names = list(inspect.signature(module.forward).parameters)
                    kwargs = {**kwargs, **dict(zip(names[1:], args[1:], strict=False))}
                kwargs = {name: value for name, value in kwargs.items() if name != TRAVERSED}
                captured[layer] = keep(output[0] if isinstance(output, tuple) else output, kwargs)
                if not with_final and len(captured) == len(set(layers)) and not is_sharded:
                    raise _Enough

            return hook

        if PICTURES in inputs:
            inputs = with_features(self.model, inputs)
        if SEEN_UNTIL in inputs:
            inputs = unpacked(self._inner, inputs)
        if inputs.get("past_key_values") is None:
            self.forget()
        # The hooks are gone before any backward pass, so the recomputation of gradient checkpointing cannot fire them.
        handles = [self.layers[k - 1].register_forward_hook(hook_for(k), with_kwargs=True) for k in layers]
        responses_BS = inputs.get(RESPONSES)
        inputs = {name: value for name, value in inputs.items() if name != RESPONSES}
        try:
            with answering(self._inner, responses_BS):
                output = self._body(**{"use_cache": False, **inputs})
        except _Enough:
            return captured, None
        finally:
            for handle in handles:
                handle.remove()
        return captured, output.last_hidden_state if with_final else None


def default_layers(num_layers: int, num_targets: int, *, model_type: str | None = None) -> list[int]:
    """Evenly spaced targets: the middle of each of `num_targets` equal blocks of layers."""
    if not 0 <= num_targets < num_layers:
        raise ModelError(
            f"{num_targets} target layers do not fit: a model of {num_layers} layers has {num_layers - 1} "
            "intermediate ones"
        )
    if (model_type, num_layers, num_targets) in PAPER_LAYERS:
        return list(PAPER_LAYERS[model_type, num_layers, num_targets])
    # Halves are rounded up: rounding them to even could name one layer twice.
    return [math.floor(num_layers * (j + 0.5) / num_targets + 0.5) for j in range(num_targets)]


def head_digest(backbone: Backbone) -> str:
    """What identifies head and final norm, whatever the dtype they are loaded in: a hash of their bf16 values."""
    digest = xxhash.xxh3_128()
    norm = [whole(parameter) for _, parameter in sorted(backbone.final_norm.named_parameters())]
    tensors = [backbone.head_weight, *([] if backbone.head_bias is None else [backbone.head_bias]), *norm]
    for tensor in tensors:
        digest.update(f"{list(tensor.shape)}".encode())
        for rows in tensor.detach().reshape(-1).split(2**24):
            digest.update(rows.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().data)
    return f"xxh3:{digest.hexdigest()}"


def _gather(hidden_BSD: Tensor, rows_T: Tensor, positions_T: Tensor) -> Tensor:
    return hidden_BSD[rows_T.to(hidden_BSD.device), positions_T.to(hidden_BSD.device)]


def rope_kinds(text_config: Any) -> list[dict[str, Any]]:
    """The settings of the rope; models with several kinds of layers have one entry for each."""
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    return [one for one in rope.values() if isinstance(one, dict)] or [rope]


def rope_of(text_config: Any) -> tuple[str, int | None]:
    """The kind of a rope that looks at the longest row of a batch, and the length at which it changes."""
    for rope in rope_kinds(text_config):
        kind = str(rope.get("rope_type") or rope.get("type") or "")
        if kind == "longrope":
            limit = rope.get("original_max_position_embeddings")
            return kind, int(limit or text_config.original_max_position_embeddings)
        if "dynamic" in kind:
            return "dynamic", int(text_config.max_position_embeddings)
    return "", None


def _grows(module: Any) -> bool:
    """Whether it is a rope whose frequencies change with the longest row, for good."""
    kind = getattr(module, "rope_type", None)
    return isinstance(kind, str) and "dynamic" in kind and hasattr(module, "max_seq_len_cached")


def _check_head(model: Any) -> None:
    name, head = type(model).__name__, head_module(model)
    if head is None:
        raise ModelError(f"`{name}` has no language head")
    for what, module in (("language head", head), ("word embeddings", model.get_input_embeddings())):
        # An adapter there would be in the model's logits and not in `head_weight`.
        if hasattr(module, "base_layer") or hasattr(module, "modules_to_save") or hasattr(module, "parametrizations"):
            raise ModelError(
                f"`{name}`: its {what} carries an adapter (`{type(module).__name__}`), and layers are read through the "
                "plain weight: merge the adapter first, or adapt the decoder layers alone"
            )
    is_plain = type(head.weight.data).__module__.split(".")[0] == "torch"  # torchao has tensors of its own
    if not (is_plain and head.weight.is_floating_point() and head.weight.ndim == 2):
        raise ModelError(
            f"`{name}`: its language head is quantised (`{type(head.weight.data).__name__}`, "
            f"{list(head.weight.shape)} {head.weight.dtype}), and layers are read through the plain weight: quantise "
            'the model without it (`modules_to_not_convert: ["lm_head"]`), or name the model that it was made of'
        )
    # A model without any weight is only looked at (`plan`).
    if head.weight.is_meta and not all(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"`{name}`: its language head is offloaded; load the model with more memory for its device")


def head_of(backbone: Backbone, *, compiled: bool = False) -> Head:
    """The model's head with what it does to its logits; `compiled` as `sparse.head.Head` has it."""
    return Head(backbone.head_weight, backbone.logit_scale, backbone.logit_cap, backbone.head_bias, compiled)


def target_layers(layers: TargetLayers, num_targets: int, config: Any, *, where: str) -> list[int]:
    """Resolve `auto` and check the range; intermediate targets are 1 .. num_hidden_layers - 1, strictly rising."""
    num_layers = int(config.get_text_config().num_hidden_layers)
    if layers == "auto":
        return default_layers(num_layers, num_targets, model_type=config.model_type)
    wrong = [layer for layer in layers if not 1 <= layer < num_layers]
    if wrong:
        raise SpecError(
            f"`{where}`: {wrong} out of range; this model has {num_layers} layers, so intermediate targets are "
            f"1 to {num_layers - 1} (the last layer always comes on top)"
        )
    if sorted(set(layers)) != list(layers):
        raise SpecError(f"`{where}`: {list(layers)} must rise strictly")
    return list(layers)
