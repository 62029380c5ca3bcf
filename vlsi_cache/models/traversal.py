"""Layer traversing (TroL, arXiv 2406.12246): decoder layers that run again on their own output, mixed in by a gate.

The class of each layer is changed in place. A wrapper would fire the hooks on hidden states twice and change the names
of the weights; so a layer's inner passes are calls of its own class's `forward`, and its output is the mixed one.

Which tokens are traversed is decided by their place in the prompt, never by how many come in a call: by a mask
(RESPONSES, of a batch in training), by the length of the prompt that `generate` was given, or, of a call by itself, by
the cache: what comes on an empty one is a prompt, a token behind that is an answer's.

The key-value cache has keys and values of first passes alone. Every further pass attends to its own, and behind them to
the first pass's of what is in the cache. For a prompt in one call that is the same as without a cache; a prompt in
several calls would attend to keys that it would not have had, and is refused.

Legend: B rows, S positions, D hidden size, L layers.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlsi_cache.config.training import TraversalSpec
from vlsi_cache.errors import ModelError

from .families import find_parts
from .packing import unmaskable_kinds

TRAVERSED = "traversed"  # the argument of a layer that says which tokens are
GATES = "traversal_gates"  # in the text stack, beside its layers: adapters on the layers leave them alone
CACHE_NAMES = ("past_key_values", "layer_past")  # of the cache, as an argument of a layer
NEAR_ZERO_BIAS = -1.5  # sigmoid(2 * -1.5) = 0.047: nearly the plain model, and the gate still has a gradient
EVERY_TOKEN = True


@dataclass
class Traversal:
    """What all layers of one model share. `mode` is that of `settings`, or "none": the plain model.

    `responses_BS` marks the tokens of answers in the batch that runs, `num_prompt` is the length of the prompt that
    `generate` runs; None: the call decides for itself. `kept` takes the mixing ratio [B, S] of each layer, if asked.
    """

    settings: TraversalSpec
    gates: nn.ModuleList
    mode: str
    responses_BS: Tensor | None = None
    num_prompt: int | None = None
    kept: dict[int, Tensor] | None = field(default=None, repr=False)

    def tokens(self, layer: int, num_tokens: int, cache: Any) -> "Tensor | bool | None":
        """Which tokens of a call are traversed: none (None), EVERY_TOKEN, or those of a mask [B or 1, S].

        Raises ModelError for calls whose further passes would need keys that no cache has.
        """
        num_past = 0 if cache is None else _num_past(cache, layer)
        if self.mode == "none":
            return None
        if self.responses_BS is not None and not num_past:
            return EVERY_TOKEN if self.mode == "all" else ~self.responses_BS
        num_prompt = self.num_prompt
        if num_prompt is None:
            if num_past and num_tokens > 1:
                raise _refused(num_tokens, num_past, "and nothing says which of them are prompt")
            num_prompt = num_past or num_tokens
        num_new = max(0, min(num_prompt - num_past, num_tokens))  # tokens of the prompt in this call
        if num_past and num_new:
            raise _refused(num_tokens, num_past, f"and {num_new} of them are prompt")
        if self.mode == "all":
            if cache is not None and num_tokens - num_new > 1 - bool(num_new):
                raise _refused(num_tokens, num_past, "and `traversal.mode: all` runs those of an answer one by one")
            return EVERY_TOKEN
        if num_new == num_tokens:
            return EVERY_TOKEN
        return torch.arange(num_tokens)[None] < num_new if num_new else None

    def ratio(self, layer: int, hidden_BSD: Tensor) -> Tensor:
        """The mixing ratio w of each token, [B, S, 1] in fp32: 0.5 tanh + 0.5 would saturate in 16 bits."""
        if self.settings.mixing == "uniform":
            return hidden_BSD.new_full((*hidden_BSD.shape[:2], 1), 0.5, dtype=torch.float32)
        gate = cast(nn.Linear, self.gates[min(layer, len(self.gates) - 1)])
        with torch.autocast(hidden_BSD.device.type, enabled=False):
            bias = None if gate.bias is None else gate.bias.float()
            return torch.sigmoid(2 * F.linear(hidden_BSD.float(), gate.weight.float(), bias))

    def mixed(self, first_BSD: Tensor, again_BSD: Tensor | None, w_BS1: Tensor) -> Tensor:
        """One pass mixed into the one before, in fp32, in the dtype of the hidden states."""
        first, again = first_BSD.float(), None if again_BSD is None else again_BSD.float()
        if again is None:  # `mixing: first`
            mixed = (1 - w_BS1) * first
        else:
            mixed = w_BS1 * again if self.settings.mixing == "second" else (1 - w_BS1) * first + w_BS1 * again
        return mixed.to(first_BSD.dtype)


class FirstPass:
    """A cache, and what it has answered to the layer that runs: its keys and values, old and new."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.given: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.given = self._cache.update(keys, values, *args, **kwargs)
        assert self.given is not None
        return self.given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class FurtherPass(FirstPass):
    """The same cache for a further pass, which stores nothing: it sees the old keys and values, then its own."""

    def __init__(self, first: FirstPass) -> None:
        super().__init__(first._cache)
        self._first = first

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self._first.given is not None, "a layer that attends in a further pass has attended in its first one"
        num_past = self._first.given[0].shape[-2] - keys.shape[-2]
        if not num_past:
            return keys, values
        old_keys, old_values = (one[..., :num_past, :] for one in self._first.given)
        return torch.cat([old_keys, keys], -2), torch.cat([old_values, values], -2)


class Traversed:
    """Before the class of a decoder layer in a class of both: `forward` runs that of the layer several times."""

    traversal: Traversal
    traversal_layer: int  # from 0
    cache_name: str
    argument_names: tuple[str, ...]

    def __call__(self, hidden_BSD: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Decided here and handed over: checkpointing runs `forward` again when another batch may be on its way.
        kwargs |= dict(zip(self.argument_names, args, strict=False))
        cache = kwargs.get(self.cache_name)
        tokens = self.traversal.tokens(self.traversal_layer, hidden_BSD.shape[1], cache)
        return super().__call__(hidden_BSD, **kwargs, **{TRAVERSED: tokens})  # type: ignore[misc]

    def forward(self, hidden_BSD: Tensor, *, traversed: "Tensor | bool | None" = None, **kwargs: Any) -> Any:
        run: Callable[..., Any] = super().forward  # type: ignore[misc]
        if traversed is None:
            return run(hidden_BSD, **kwargs)
        state, layer, cache = self.traversal, self.traversal_layer, kwargs.get(self.cache_name)
        first = None if cache is None else FirstPass(cache)
        output = run(hidden_BSD, **kwargs | {self.cache_name: first})
        mixed_BSD = before_BSD = output[0] if isinstance(output, tuple) else output
        for number in range(state.settings.num_passes - 1):
            w_BS1 = state.ratio(layer, mixed_BSD)
            if state.kept is not None and number == 0:
                state.kept[layer] = w_BS1[..., 0].detach()
            again_BSD = None
            if state.settings.mixing != "first":
                again = run(mixed_BSD, **kwargs | {self.cache_name: first and FurtherPass(first)})
                again_BSD = again[0] if isinstance(again, tuple) else again
            mixed_BSD = state.mixed(mixed_BSD, again_BSD, w_BS1)
        if isinstance(traversed, Tensor):
            mixed_BSD = torch.where(traversed.to(mixed_BSD.device)[..., None], mixed_BSD, before_BSD)
        return (mixed_BSD, *output[1:]) if isinstance(output, tuple) else mixed_BSD


_classes: dict[type, type] = {}  # of layers, by the class that they had


def add_traversal(model: Any, settings: TraversalSpec, *, seed: int = 0) -> Traversal:
    """Make the decoder layers of `model` traversed ones, in place, with fresh fp32 gates drawn from `seed`.

    Old names of weights stay; the gates are `traversal_gates` of the text stack. `model.generate` says from then on
    where the prompt ends. Raises ModelError for layers that cannot run twice.
    """
    if traversal_of(model) is not None:
        raise ModelError("the layers of this model are traversed already")
    parts = find_parts(model)
    layers = list(getattr(parts.decoder, parts.layers))
    _check(model, layers)
    gates = _new_gates(settings, len(layers), _width(model), seed)
    device = next(layers[0].parameters()).device
    setattr(parts.decoder, GATES, gates.to(device))
    state = Traversal(settings, gates, settings.mode)
    parts.decoder.traversal = state
    for number, layer in enumerate(layers):
        layer.__class__ = _traversed(type(layer))
        layer.traversal, layer.traversal_layer = state, number
    model.generate = MethodType(_generate, model)  # bound, so that a copy of the model has its own
    return state


def remove_traversal(model: Any) -> None:
    """Make the model a plain one again, in place; its gates are gone."""
    parts = find_parts(model)
    for layer in getattr(parts.decoder, parts.layers):
        layer.__class__ = plain_class(layer)
        del layer.traversal, layer.traversal_layer
    delattr(parts.decoder, GATES)
    del parts.decoder.traversal, model.generate


def traversal_of(model: Any) -> Traversal | None:
    """What the layers of a model share, with an adapter or without; None for a plain one."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(find_parts(plain).decoder, "traversal", None)


def plain_class(layer: nn.Module) -> type:
    """The class that a decoder layer has without traversal."""
    return getattr(type(layer), "plain", type(layer))


@contextmanager
def prompting(model: Any, num_prompt: int) -> Iterator[None]:
    """Inside, the first `num_prompt` tokens of every row are its prompt, however they come."""
    state = traversal_of(model)
    if state is None:
        yield
        return
    before, state.num_prompt = state.num_prompt, num_prompt
    try:
        yield
    finally:
        state.num_prompt = before


@contextmanager
def answering(model: Any, responses_BS: Tensor | None) -> Iterator[None]:
    """Inside, a batch runs whose tokens of answers are these; nothing where there is no mask, or a plain model."""
    state = traversal_of(model) if responses_BS is not None else None
    if state is None:
        yield
        return
    state.responses_BS = responses_BS
    try:
        yield
    finally:
        state.responses_BS = None


@torch.no_grad()
def mixing_ratios(model: Any, run: Callable[[], Any]) -> Tensor:
    """The mixing ratio of each layer and token [L, B, S], fp32 on the CPU, of the one batch that `run` runs."""
    state = traversal_of(model)
    assert state is not None
    state.kept = {}
    try:
        run()
        return torch.stack([state.kept[layer].cpu() for layer in sorted(state.kept)])
    finally:
        state.kept = None


def num_gate_parameters(settings: TraversalSpec, *, num_layers: int, hidden_size: int) -> int:
    """Numbers that the gates have: hidden size (and one, with a bias) for each of them."""
    if settings.mixing == "uniform":
        return 0
    return (hidden_size + settings.gate_bias) * (num_layers if settings.gates == "per_layer" else 1)


def _new_gates(settings: TraversalSpec, num_layers: int, width: int, seed: int) -> nn.ModuleList:
    if settings.mixing == "uniform":
        return nn.ModuleList()
    number = num_layers if settings.gates == "per_layer" else 1
    # On the CPU and in fp32 wherever the model is and whatever torch's defaults are: the same seed, the same gates.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        gates = nn.ModuleList(nn.Linear(width, 1, settings.gate_bias, dtype=torch.float32) for _ in range(number))
    if settings.gate_init == "near_zero":
        for gate in gates:
            nn.init.zeros_(cast(Tensor, gate.weight))
            nn.init.constant_(cast(Tensor, gate.bias), NEAR_ZERO_BIAS)
    return gates.requires_grad_(False)


def _check(model: Any, layers: list[Any]) -> None:
    name, text = type(model).__name__, model.config.get_text_config()
    advice = "its layers cannot be traversed; leave `traversal` out, or choose a student of another family"
    if kinds := unmaskable_kinds(text):
        raise ModelError(f"`{name}`: layers of {', '.join(kinds)} have a state that a further pass changes: {advice}")
    if getattr(text, "num_kv_shared_layers", 0):
        raise ModelError(f"`{name}`: some of its layers take keys and values of others: {advice}")
    for layer in layers:
        if not _cache_name(type(layer)):
            raise ModelError(f"`{name}`: `{type(layer).__name__}` has no argument {' or '.join(CACHE_NAMES)}: {advice}")
        if "forward" in vars(layer):
            raise ModelError(
                f"`{name}`: the `forward` of its layers has been replaced, as accelerate does for a model on several "
                "devices; load it onto one"
            )


def _traversed(own: type) -> type:
    if own not in _classes:
        names = tuple(inspect.signature(cast(Any, own).forward).parameters)[2:]
        facts = {"plain": own, "cache_name": _cache_name(own), "argument_names": names, "__module__": own.__module__}
        _classes[own] = type(f"Traversed{own.__name__}", (Traversed, own), facts)
    return _classes[own]


def _cache_name(layer_class: type) -> str:
    names = inspect.signature(cast(Any, layer_class).forward).parameters
    return next((name for name in CACHE_NAMES if name in names), "")


def _width(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[1]


def _num_past(cache: Any, layer: int) -> int:
    kinds = [type(one).__name__ for one in getattr(cache, "layers", [])[layer : layer + 1] if not _grows(one)]
    if not isinstance(cache, DynamicCache) or kinds:
        raise ModelError(
            f"a traversed layer was given a `{(kinds or [type(cache).__name__])[0]}`: its further passes need a cache "
            "that has as many keys as there are tokens. Leave out `cache_implementation`, or give a `DynamicCache`"
        )
    return int(cache.get_seq_length(layer))


def _grows(cache_layer: Any) -> bool:
    return isinstance(cache_layer, DynamicLayer)


def _refused(num_tokens: int, num_past: int, why: str) -> ModelError:
    return ModelError(
        f"a traversed layer was given {num_tokens} tokens behind {num_past} that are in the cache, {why}: it has keys "
        "of first passes alone, and their further passes would see others than in one call",
        hint="give the whole prompt in one call of `generate`: without `prefill_chunk_size`, and without "
        "`past_key_values` of an earlier turn",
    )


def _generate(model: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """`generate` of the model's class, during which the prompt ends where it ends now."""
    with prompting(model, _prompt_length(inputs, kwargs)):
        return type(model).generate(model, inputs, *args, **kwargs)


def _prompt_length(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    """Tokens of the prompt that `generate` was given, padding included; 1 where it begins by itself."""
    given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    return next((one.shape[1] for one in given if one is not None), 1)
