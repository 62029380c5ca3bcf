"""Layer matching: VLsI Algorithm 1 over a whole table of KL divergences, as the paper has it.

Training draws the same on the device (`drawing.py`), for which this is the reference.

Shapes: S student target layers, L teacher target layers.
"""

from collections.abc import Sequence
from math import comb
from typing import Literal

import numpy as np

from vlsi_cache.errors import ModelError, SpecError

__all__ = ["Temperature", "choose", "match_layers", "match_rng", "null_distribution", "search_window"]

Temperature = Literal["normalized", "printed"]


def match_rng(seed: int, step: int, place: int) -> np.random.Generator:
    """The generator of what is matched together, by the place of its first sample in the batch of this step."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, place])))


def search_window(student: int, start: int, num_student: int, num_teacher: int) -> tuple[int, int]:
    """First and last (inclusive) teacher target of this student target (Algorithm 1, lines 4 and 5).

    `start` is 1 + the match before, 0 at first. The last one leaves a deeper teacher target for every student target
    still to come, so no window is ever empty.
    """
    if not 1 <= num_student <= num_teacher:
        raise SpecError(
            f"{num_student} student target layers cannot be matched in order with {num_teacher} of the teacher: "
            "cache at least as many teacher targets as the student has"
        )
    last = num_teacher - num_student + student
    if not 0 <= student < num_student or not student <= start <= last:
        raise ValueError(f"student target {student} of {num_student} cannot start its window at {start}, last {last}")
    return start, last


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


def null_distribution(
    num_student: int, num_teacher: int, *, mode: str = "vlsi", sampler: str = "greedy"
) -> np.ndarray | None:
    """P(student target s is matched with teacher target l), [S, L], if the divergences said nothing at all.

    Order preservation alone pushes matches deep; any drift must be read against this. None for the uniform modes, in
    which the divergences say nothing anyway.
    """
    search_window(0, 0, num_student, num_teacher)
    if mode.startswith("uniform"):
        return None
    if mode not in ("vlsi", "order"):
        last_S = np.arange(num_student) + (num_teacher - num_student if mode == "range" else num_teacher)
        allowed_SL = np.arange(num_teacher) <= last_S[:, None]
        return allowed_SL / allowed_SL.sum(1, keepdims=True)
    if sampler == "joint":  # all increasing assignments alike
        ways = [
            [comb(j, s) * comb(num_teacher - 1 - j, num_student - 1 - s) for j in range(num_teacher)]
            for s in range(num_student)
        ]
        return np.array(ways) / comb(num_teacher, num_student)
    match_SL = np.zeros((num_student, num_teacher))
    starts = {0: 1.0}
    for student in range(num_student):
        for start, prob in starts.items():
            first, last = search_window(student, start, num_student, num_teacher)
            match_SL[student, first : last + 1] += prob / (last + 1 - first)
        starts = {match + 1: prob for match, prob in enumerate(match_SL[student]) if prob}
    return match_SL
