"""Which response tokens get rows. Source: selective distillation by entropy (SE-KD, arXiv 2602.01395).

Shapes: T response tokens of several samples, one after another.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["keyed_uniforms", "select_by_entropy", "select_at_random"]


def select_by_entropy(entropy_T: np.ndarray, *, above: float | None = None, top: float | None = None) -> np.ndarray:
    """bool [T]: tokens with more than `above` nats, or the share `top` with the most (at least one, ties by order)."""
    if above is not None:
        return entropy_T > above
    assert top is not None
    num_kept = math.ceil(top * len(entropy_T))
    chosen_T = np.zeros(len(entropy_T), bool)
    chosen_T[np.argsort(-entropy_T, kind="stable")[:num_kept]] = True
    return chosen_T


def select_at_random(sample_ids: Sequence[str], lengths: Sequence[int], *, share: float, seed: int) -> np.ndarray:
    """bool [T]: each token with probability `share`; depends on the seed, the sample and the place in it alone."""
    drawn = [keyed_uniforms(f"{seed}\0tokens\0{name}", (n,)) for name, n in zip(sample_ids, lengths, strict=True)]
    return np.concatenate([np.zeros(0), *drawn]) < share


def keyed_uniforms(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 uniforms in [0, 1) that depend on the key alone, not on process, order or batch."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(shape)
