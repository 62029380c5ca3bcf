"""Settings that would do nothing where they are named: told instead of passed over.

A spec with all its defaults filled in, as a cache or a run keeps it, names everything; so this is asked of what a
person has written, in a file or with `--set`, and not of what is read back.
"""

from collections.abc import Iterable
from typing import Any

from .sections import CacheSpec
from .training_sections import DIVERGENCES, DistillSpec, InteractSpec

__all__ = ["unused_by_recipe", "unused_keys"]

OF_TOP_K = ("top_k", "top_p", "min_k", "tail_samples")
LENGTH = ("steps", "epochs")


def unused_keys(written: dict[str, Any], spec: CacheSpec, overrides: Iterable[str] = ()) -> list[str]:
    """Problems of a spec file (`written`, overrides included) that has become `spec`.

    What the file says of the other kind of rows goes when `--set rows.kind=...` changes the kind.
    """
    set_keys = [_key_of(override) for override in overrides]
    rows = written.get("rows") or {}
    named = {key for key in rows if "rows.kind" not in set_keys or _is_set(f"rows.{key}", set_keys)}
    kind = spec.rows.kind
    foreign = OF_TOP_K if kind == "sampled" else ("num_draws",)
    problems = [f"`rows.{key}` does nothing with `rows.kind: {kind}`" for key in foreign if key in named]
    for section, data in (("data", spec.data), ("evaluate.data", spec.evaluate and spec.evaluate.data)):
        if data is not None and data.generator is not None and data.media_root is not None:
            problems.append(f"`{section}.media_root` does nothing with a `generator`, which brings its pictures")
    return problems


def unused_by_recipe(distill: DistillSpec, overrides: Iterable[str]) -> list[str]:
    """Those of `overrides` that change a stage which the recipe does not run. Lengths count for every recipe."""
    return [override for override in overrides if not _is_used(_key_of(override), distill)]


def _is_used(key: str, distill: DistillSpec) -> bool:
    recipe, interact = distill.recipe, distill.interact
    section, _, rest = key.partition(".")
    if section == "verbalizer":
        return recipe == "vlsi"
    name, _, inner = rest.partition(".")
    if section != "distill" or not name or inner.rpartition(".")[2] in LENGTH:
        return True
    if name in ("layers", "num_layers"):
        return recipe == "vlsi"
    if name == "verbalize":
        return recipe == "vlsi" and distill.verbalizers is None
    if name == "lora":
        adapts = recipe != "sft" and interact.mode == "lora"
        return adapts or (bool(distill.sft.fraction) and distill.sft.mode == "lora+embed_head")
    if name == "sft" and inner:
        return inner.startswith("fraction") or bool(distill.sft.fraction)
    return name != "interact" or not inner or _is_used_by_interact(inner, distill)


def _is_used_by_interact(key: str, distill: DistillSpec) -> bool:
    if distill.recipe != "last":
        return distill.recipe == "vlsi"
    last = distill.interact.last
    of_last = {"beta": {"jsd"}, "skew": {"skewed_kl"}, "tau": DIVERGENCES}
    if key in of_last:
        return last in of_last[key]
    always = {"schedule", "mode", "lambda_last", "last", "alpha_ce"}
    assert always <= set(InteractSpec.model_fields)
    return key.partition(".")[0] in always


def _key_of(override: str) -> str:
    return override.partition("=")[0].strip()


def _is_set(key: str, set_keys: list[str]) -> bool:
    return any(one == key or one.startswith(f"{key}.") for one in set_keys)
