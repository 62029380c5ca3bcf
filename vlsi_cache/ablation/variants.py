"""The variants of the paper's tables, each as what it changes in a spec. Every table has the two baselines besides.

A variant that this cache or this release cannot give is in its table all the same, with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from vlsi_cache.config.sections import InteractSpec, Recipe, Structure
from vlsi_cache.errors import SpecError
from vlsi_cache.report.layers import suggest_layers
from vlsi_cache.store.format import CacheHeader

if TYPE_CHECKING:
    from vlsi_cache.store.reader import Cache

WIDTHS = (1, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Variant:
    """`changes` are `key=value` overrides, `layers` and `top_k` what a smaller cache keeps of the one at hand.

    `reason` says why it cannot be trained, where that is known beforehand; `own_steps`: it is about the number of
    steps, and need not take as many as the others.
    """

    name: str
    what: str
    changes: tuple[str, ...] = ()
    recipe: Recipe = "vlsi"
    layers: tuple[int, ...] | None = None
    top_k: int | None = None
    reason: str | None = None
    own_steps: bool = False


DEFAULT = Variant("vlsi", "all layers, with the settings of the spec")
LAST = Variant("last", "the last layer alone", recipe="last")
SFT = Variant("sft", "the labels alone", recipe="sft")
BASELINES = (LAST, SFT)


def matching(header: CacheHeader, cache: "Cache | None") -> list[Variant]:
    """Table 4e: how a teacher layer is chosen for each student layer."""
    del header, cache
    return [
        _matching("random", "any layer, equally likely"),
        _matching("uniform", "every floor(t/s)-th layer; the deepest are never used"),
        _matching("uniform_stretch", "evenly spaced from the first to the last"),
        replace(_matching("bottom_k", "the layer of smallest divergence", "bottom_k=1"), name="bottom-1"),
        replace(_matching("bottom_k", "the three layers of smallest divergence", "bottom_k=3"), name="bottom-3"),
        _matching("multinomial", "drawn by divergence"),
        _matching("range", "+ search range"),
        _matching("order", "+ order preservation"),
        replace(_matching("vlsi", "+ adaptive temperature"), name="adaptive"),
        replace(_matching("vlsi", "the temperature as Algorithm 1 prints it", "temperature=printed"), name="printed"),
        replace(_matching("vlsi", "all layers of the student drawn together", "sampler=joint"), name="joint"),
        replace(_matching("vlsi", "one match for each sample", "match_unit=sample"), name="per-sample"),
    ]


def operations(header: CacheHeader, cache: "Cache | None") -> list[Variant]:
    """Table 4d: what is trained at the matched layers, and what at the last one. L2 is over the kept entries."""
    del header, cache
    return [
        _operations("ce+ce", "ce", "ce"),
        _operations("ce+kld", "ce", "forward_kl"),
        _operations("kld+ce", "forward_kl", "ce"),
        _operations("l2+kld", "l2_topk", "forward_kl"),
        _operations("kld+x", "forward_kl", "none"),
        Variant("x+kld", "nothing; forward_kl", ("distill.interact.last=forward_kl",), recipe="last"),
        _operations("ce+x", "ce", "none"),
        _operations("kld+kld", "forward_kl", "forward_kl"),
    ]


def verbalizer(header: CacheHeader, cache: "Cache | None") -> list[Variant]:
    """Table 4f on the student's side: the teacher's rows are those of the cache, whichever verbalizers made them."""
    del header, cache
    structures = [Variant(name, f"structure {name}", (f"verbalizer.structure={name}",)) for name in get_args(Structure)]
    return [
        *structures,
        Variant("plain", "no residual connection", ("verbalizer.style=plain",)),
        Variant("kl_to_final", "learns what the model itself says", ("verbalizer.loss=kl_to_final",)),
    ]


def sft(header: CacheHeader, cache: "Cache | None") -> list[Variant]:
    """Table 4c: how much finetuning follows, and of which weights."""
    del header, cache
    return [
        _sft("no-sft", "no finetuning", "lora+embed_head", 0.0),
        _sft("half-sft", "stopped half way", "lora+embed_head", 0.5),
        _sft("whole-sft", "adapter, embeddings and head", "lora+embed_head", 1.0),
        _sft("half-sft-full", "all weights, stopped half way", "full", 0.5),
        _sft("whole-sft-full", "all weights", "full", 1.0),
    ]


def loss(header: CacheHeader, cache: "Cache | None") -> list[Variant]:
    """Other losses from the same rows, at the matched layers and the last one."""
    del header, cache
    divergences = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "l2_topk")
    return [
        *(_operations(name, name, name) for name in divergences),
        _interact("ce-mixed", "half of the last layer's loss is the labels'", "alpha_ce=0.5"),
        _interact("tau-2", "both sides softened", "tau=2.0"),
        _interact("layer-mean", "the mean over layers, not the sum", "layer_reduction=mean"),
        _interact("reliable", "no teacher layer that knows less than the student's", "reliable_only=true"),
        _interact("fade-out", "matched layers fade out", "layers_full_until=0.3", "layers_zero_from=0.7"),
        _interact(
            "mean-faded",
            "the mean over layers, faded out early: for a pretrained student",
            "layer_reduction=mean",
            "layers_full_until=0",
            "layers_zero_from=0.3",
        ),
    ]


def k(header: CacheHeader, cache: "Cache | None") -> list[Variant]:
    """How many entries of each row are kept: smaller caches cut from this one, without another teacher pass."""
    del cache
    smaller = [Variant(f"k-{width}", f"top {width}", top_k=width) for width in WIDTHS if width < header.widest]
    if header.row_kind == "sampled":
        reason = "the rows are draws from the teacher, and fewer draws need another teacher pass (`rows.num_draws`)"
        smaller = [replace(one, reason=reason) for one in smaller]
    return [*smaller, Variant(f"k-{header.widest}", "the cache as it is")]


def layers(header: CacheHeader, cache: "Cache | None") -> list[Variant]:
    """How many teacher layers are kept: smaller caches cut from this one. The last layer always stays."""
    targets = header.layers[:-1]
    quarter = targets[-max(1, -(-len(targets) // 4)) :]
    return [
        Variant("all-layers", f"layers {_listed(targets)}"),
        _cut("every-second", targets[::-2][::-1], header),
        _cut("deepest-quarter", quarter, header),
        _suggested(header, cache),
    ]


AXES: dict[str, Callable[[CacheHeader, "Cache | None"], list[Variant]]] = {
    "matching": matching,
    "operations": operations,
    "verbalizer": verbalizer,
    "sft": sft,
    "loss": loss,
    "k": k,
    "layers": layers,
}


def _interact(name: str, what: str, *changes: str) -> Variant:
    return Variant(name, what, tuple(f"distill.interact.{change}" for change in changes))


def _matching(mode: str, what: str, *changes: str) -> Variant:
    """A way of matching with its own settings at their defaults, whatever the spec says of another way."""
    keys = ("sampler", "scale", "temperature", "fixed_temperature", "bottom_k")
    plain = [f"{key}={InteractSpec.model_fields[key].default}" for key in keys]
    return _interact(mode, what, f"matching={mode}", *plain, *changes)


def _operations(name: str, intermediate: str, last: str) -> Variant:
    what = f"{'nothing' if intermediate == 'none' else intermediate}; {'nothing' if last == 'none' else last}"
    return _interact(name, what, f"intermediate={intermediate}", f"last={last}")


def _sft(name: str, what: str, mode: str, fraction: float) -> Variant:
    changes = (f"distill.sft.mode={mode}", f"distill.sft.fraction={fraction}")
    return Variant(name, what, changes, own_steps=True)


def _cut(name: str, targets: list[int], header: CacheHeader) -> Variant:
    return Variant(name, f"layers {_listed(targets)}", layers=(*targets, header.layers[-1]))


def _suggested(header: CacheHeader, cache: "Cache | None") -> Variant:
    """Half of the layers, those that the divergences between the cached layers tell least apart left out."""
    name, keep = "suggested-half", 1 + len(header.layers) // 2  # as many as every second one, and the last
    if cache is None:
        return Variant(name, "known once the cache is built", reason="chosen from the rows of the finished cache")
    try:
        return _cut(name, suggest_layers(cache, keep=keep).layers[:-1], header)
    except SpecError as error:
        return Variant(name, "chosen from the rows", reason=str(error))


def _listed(targets: list[int]) -> str:
    return ", ".join(map(str, targets))
