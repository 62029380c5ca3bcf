"""Layer matching: VLsI Algorithm 1 over a whole table of KL divergences, as the paper has it.

Training draws the same on the device (`drawing.py`), for which this is the reference.

Shapes: S student target layers, L teacher target layers.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.sparse.matching import search_window

__all__ = ["Temperature", "choose", "match_layers"]

Temperature = Literal["normalized", "printed"]


def choose(
    kld_window: Sequence[float] | np.ndarray,
    rng: np.random.Generator,
    *,
    scale: float = 2.0,
    eps: float = 1e-6,
    temperature: Temperature = "normalized",
    student: int = 0,
    start: int = 0,
) -> int:
    """Draw an index into the window, likelier where the divergence is smaller (Algorithm 1, lines 8 to 10).

    `student` and `start` only name the layers in the error for a divergence that is not finite.
    """
    probs = match_probabilities(kld_window, scale=scale, eps=eps, temperature=temperature, student=student, start=start)
    # Always exactly one draw, also for a window of one, so that the stream does not depend on the divergences.
    cdf = np.cumsum(probs)
    return int(min(np.searchsorted(cdf, rng.random() * cdf[-1], side="right"), len(probs) - 1))


def match_probabilities(
    kld_window: Sequence[float] | np.ndarray,
    *,
    scale: float = 2.0,
    eps: float = 1e-6,
    temperature: Temperature = "normalized",
    student: int = 0,
    start: int = 0,
) -> np.ndarray:
    """The adaptive-temperature softmax over one window, float64."""
    kld = np.asarray(kld_window, np.float64)
    bad = np.flatnonzero(~np.isfinite(kld))
    if bad.size:
        raise ModelError(
            f"the KL divergence of student target index {student} to teacher target index {start + bad[0]} is "
            f"{kld[bad[0]]}: training has diverged or the cache is damaged; run: vlsi-cache verify CACHE"
        )
    # Deviation: the minimum is subtracted first, which changes no probability but keeps a window of one or of equal
    # divergences finite.
    excess = kld - kld.min()
    spread = excess.max() + eps
    if temperature == "normalized":
        # Deviation: the paper prints T = scale / (max - min + eps) and divides by it, which has the unit nats squared
        # and turns greedy while divergences are large. Multiplying is min-max scaling, as its text describes.
        logits = -excess * scale / spread
    elif temperature == "printed":
        logits = -excess * spread / scale
    else:
        raise SpecError(f"`temperature` is {temperature!r}, it must be `normalized` or `printed`")
    weights = np.exp(logits)
    return weights / weights.sum()


def match_layers(
    kld_SL: np.ndarray,
    *,
    rng: np.random.Generator,
    scale: float = 2.0,
    eps: float = 1e-6,
    temperature: Temperature = "normalized",
) -> list[int]:
    """Match every student target to a teacher target, strictly increasing (Algorithm 1 over a full table)."""
    num_student, num_teacher = kld_SL.shape
    matches: list[int] = []
    for student in range(num_student):
        # Deviation: line 10 adds 1 to the draw inside the window, which leaves the table in most passes. The match is
        # start + draw, and the 1 moves the next window's start.
        start, last = search_window(student, matches[-1] + 1 if matches else 0, num_student, num_teacher)
        window = kld_SL[student, start : last + 1]
        draw = choose(window, rng, scale=scale, eps=eps, temperature=temperature, student=student, start=start)
        matches.append(start + draw)
    return matches
