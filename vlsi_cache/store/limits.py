"""What a header and a commit record may claim. Both are input like any other: a checksum says nothing of who made it.

The limits are far above what any cache needs, and low enough that what a reader allocates or loops over for a claim is
small; array_sizes in schema.py then holds the counts of a part against the sizes of its files.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

MAX_PARTS = 1_000_000  # six digits, as in their names
MAX_LAYERS = 4096
MAX_TAUS = 64
MAX_TAIL = 1 << 16
MAX_WIDTH = 1 << 31
MAX_VOCABULARY = 1 << 24
MAX_RANKS = 1 << 28  # layers times tokens: what the table of ids by rank takes
MAX_COUNT = 1 << 48  # samples, tokens, entries, bytes of a file
MAX_DEPTH = 100  # caches made of caches made of caches
# Blosc packs a constant block of 2 MiB into some 80 bytes; no honest array shrinks more.
MAX_SHRINK = 1 << 16

SECTIONS = ("teacher", "data", "rows", "store", "train_verbalizers", "distill", "evaluate", "run")
_PRUNED = re.compile(r"prune\.\d{1,9}\.\w+")


def shown(value: object) -> str:
    """A value from a file in a message, cut where it is long."""
    if isinstance(value, list | tuple | dict | set) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_numbers(layers: Sequence[int], top_k: Sequence[int], taus: Sequence[float], v_real: int, widest: int) -> None:
    """Raise ValueError for layers, widths or temperatures that no cache can have."""
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= MAX_COUNT:
        raise ValueError(f"`layers` must be distinct and ascending, got {shown(list(layers))}")
    if not 1 <= v_real <= MAX_VOCABULARY or v_real * len(layers) > MAX_RANKS:
        raise ValueError(
            f"impossible: v_real {v_real} with {len(layers)} layers; at most {MAX_VOCABULARY} tokens, and {MAX_RANKS} "
            "ranks of all layers"
        )
    if len(top_k) != len(layers) or not all(1 <= k <= widest for k in top_k):
        raise ValueError(f"`top_k` must be 1 to {widest} for each of {len(layers)} layers, got {shown(list(top_k))}")
    if not taus or taus[0] != 1.0 or not all(math.isfinite(tau) and tau > 0 for tau in taus):
        raise ValueError(f"impossible: taus {shown(list(taus))}; they are above 0 and the first is 1.0")


def check_origin(
    *,
    spec: dict[str, Any],
    fingerprint: dict[str, Any],
    skipped: Iterable[dict[str, Any]],
    responses: Iterable[dict[str, Any]],
    parents: Sequence[dict[str, Any]],
) -> None:
    """Raise ValueError where what a header tells of its origin is not of the kind that readers take it for."""
    for name in ("name", "description"):
        _want(spec, name, str, "spec")
    for name in SECTIONS:
        _want(spec, name, dict, "spec")
    _check_fingerprint(fingerprint)
    for one in skipped:
        if not isinstance(one.get("id"), str) or not isinstance(one.get("reason"), str):
            raise ValueError(f"`skipped` holds rows as `id` and `reason`, both text, got {shown(one)}")
    for one in responses:
        _want(one, "model", str, "responses")
        _want(one, "weights", str, "responses")
        _want(one, "settings", dict, "responses")
        _want(one, "counts", dict, "responses")
        for name, count in (one.get("counts") or {}).items():
            if type(count) is not int or not 0 <= count <= MAX_COUNT:
                raise ValueError(f"`responses`: count `{name}` must be a whole number, got {shown(count)}")
    _check_parents(parents, 1)


def _check_fingerprint(fingerprint: dict[str, Any]) -> None:
    _want(fingerprint, "rows.seed", int, "fingerprint")
    _want(fingerprint, "rows.select_tokens", dict, "fingerprint")
    for name in fingerprint:
        if name.startswith("prune.") and not _PRUNED.fullmatch(name):
            raise ValueError(f"`fingerprint`: `{shown(name)}` must be prune.NUMBER.NAME")


def _check_parents(parents: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"`parents` is deeper than {MAX_DEPTH}")
    if not isinstance(parents, list) or not all(isinstance(one, dict) for one in parents):
        raise ValueError(f"`parents` must be a list of objects, got {shown(parents)}")
    for one in parents:
        for name in ("path", "digest", "operation"):
            _want(one, name, str, "parents")
        _want(one, "cuts", dict, "parents")
        sections = one.get("data", [])
        if not isinstance(sections, list) or not all(isinstance(section, dict) for section in sections):
            raise ValueError(f"`parents`: `data` must be a list of objects, got {shown(sections)}")
        _check_parents([] if one.get("parents") is None else one["parents"], depth + 1)


def _want(values: dict[str, Any], name: str, kind: type, where: str) -> None:
    value = values.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        names = {str: "text", dict: "an object", int: "a whole number"}
        raise ValueError(f"`{where}`: `{name}` must be {names[kind]}, got {shown(value)}")
