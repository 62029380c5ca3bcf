"""Layer matching where the divergences are: Algorithm 1 and its ablations on the device, without reading anything back.

Shapes: S student target layers, L teacher target layers, M candidates of a window, U units that are matched
separately (the micro-batch, or each of its samples), n matches of one unit (1 but for `bottom_k`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlsi_cache.errors import SpecError

from .vocab_pass import moved

__all__ = ["Matcher", "Matching", "MatchingMode", "match_rng", "search_window"]

MatchingMode = Literal[
    "vlsi", "order", "range", "multinomial", "bottom_k", "uniform", "uniform_stretch", "random"
]  # fmt: skip


@dataclass(frozen=True)
class Matching:
    """How teacher layers are chosen (VLsI Table 4e, from the last row upwards).

    vlsi: softmax at the adaptive temperature, in order, within the search range. order: the same at temperature 1.
    range: without the order. multinomial: over all layers. bottom_k: the mean of the `bottom_k` nearest ones.
    uniform: s * floor(L / S), which never reaches the deepest. uniform_stretch: evenly from the first to the last.
    random: any. `temperature` `fixed` divides by `fixed_temperature`; it applies to `vlsi` alone, as `scale` does.
    `sampler: joint` draws all student layers at once, from the product of their weights over all increasing
    assignments, which has no bias towards deep layers.
    """

    mode: MatchingMode = "vlsi"
    scale: float = 2.0
    eps: float = 1e-6
    temperature: Literal["normalized", "printed", "fixed"] = "normalized"
    fixed_temperature: float = 1.0
    bottom_k: int = 1
    sampler: Literal["greedy", "joint"] = "greedy"

    @property
    def in_order(self) -> bool:
        return self.mode in ("vlsi", "order")

    def logits(self, values_MU: Tensor, allowed_MU: Tensor) -> Tensor:
        """Log-weights of the candidates, -inf where they are not allowed."""
        excess_MU = values_MU - values_MU.masked_fill(~allowed_MU, torch.inf).amin(0)
        if self.mode == "random":
            logits_MU = torch.zeros_like(excess_MU)
        elif self.mode != "vlsi":
            logits_MU = -excess_MU
        elif self.temperature == "fixed":
            logits_MU = -excess_MU / self.fixed_temperature
        else:
            spread_U = excess_MU.masked_fill(~allowed_MU, 0.0).amax(0) + self.eps
            # Deviation: see `matching.match_probabilities` for what the paper prints.
            factor_U = self.scale / spread_U if self.temperature == "normalized" else spread_U / self.scale
            logits_MU = -excess_MU * factor_U
        return logits_MU.masked_fill(~allowed_MU, -torch.inf)


class Matcher:
    """One pass over the student's target layers, in their order; `matched` gets one [n, U] tensor a layer, and
    `drawn_by` the log-weights [M, U] of each draw. Every unit has a generator of its own in `rngs`.

    The window of a student target is fixed beforehand, from the first teacher target it could ever take to the last;
    what the order forbids within it is masked.
    """

    def __init__(
        self,
        num_student: int,
        num_teacher: int,
        *,
        rngs: Sequence[np.random.Generator],
        matching: Matching = Matching(),
    ) -> None:
        if num_student:
            search_window(0, 0, num_student, num_teacher)  # refuses more student than teacher layers
        if matching.mode == "bottom_k" and not 1 <= matching.bottom_k <= num_teacher:
            raise SpecError(f"`bottom_k` is {matching.bottom_k}, and the cache has {num_teacher} intermediate layers")
        self.num_student, self.num_teacher, self.matching = num_student, num_teacher, matching
        # One draw for each target and unit, whatever the divergences are.
        self._uniforms_SU = torch.from_numpy(np.stack([rng.random(num_student) for rng in rngs], axis=1))
        self._joint: list[Tensor] | None = None
        self.matched: list[Tensor] = []
        self.drawn_by: list[Tensor] = []

    def window(self, student: int | None = None) -> range:
        """Teacher targets that a student target, by default the next one, may be matched with."""
        student = len(self.matched) if student is None else student
        num_student, num_teacher = self.num_student, self.num_teacher
        last = num_teacher - num_student + student
        match self.matching.mode:
            case "vlsi" | "order":
                return range(student, last + 1)
            case "range":
                return range(last + 1)
            case "uniform":
                only = student * (num_teacher // num_student)
                return range(only, only + 1)
            case "uniform_stretch":
                only = round(student * (num_teacher - 1) / max(1, num_student - 1))
                return range(only, only + 1)
        return range(num_teacher)

    def choose(self, values_MU: Tensor) -> Tensor:
        """Match the next student target by its divergences from `window()`: [n, U], indices into the window."""
        window, student = self.window(), len(self.matched)
        if self._joint is not None:
            index_nU = self._joint[student] - window.start
        elif self.matching.mode == "bottom_k":
            index_nU = values_MU.topk(self.matching.bottom_k, dim=0, largest=False).indices
        else:
            allowed_MU = torch.ones_like(values_MU, dtype=torch.bool)
            if self.matching.in_order and self.matched:
                targets_M1 = torch.arange(window.start, window.stop, device=values_MU.device)[:, None]
                allowed_MU = targets_M1 > self.matched[-1]
            index_nU = self._draw(student, self.matching.logits(values_MU.double(), allowed_MU))[None]
        self.matched.append(index_nU + window.start)
        return index_nU

    def draw_all(self, values: list[Tensor]) -> None:
        """Draw all matches from the divergences [M, U] of every student target's window, for `sampler: joint`."""
        assert not self.matched
        ready = []
        for student, values_MU in enumerate(values):
            allowed_MU = torch.ones_like(values_MU, dtype=torch.bool)
            logits_LU = values_MU.new_full((self.num_teacher, values_MU.shape[1]), -torch.inf, dtype=torch.float64)
            logits_LU[student : student + len(values_MU)] = self.matching.logits(values_MU.double(), allowed_MU)
            ready.append(logits_LU)
        # Backward: the log-weight of all that may follow a match, over the targets behind it.
        after_LU = torch.zeros_like(ready[-1])
        totals = []
        for logits_LU in reversed(ready):
            totals.append(logits_LU + after_LU)
            behind_LU = totals[-1].flip(0).logcumsumexp(0).flip(0)
            after_LU = torch.cat([behind_LU[1:], torch.full_like(behind_LU[:1], -torch.inf)])
        targets_L1 = torch.arange(self.num_teacher, device=after_LU.device)[:, None]
        drawn: list[Tensor] = []
        for student, total_LU in enumerate(reversed(totals)):
            allowed_LU = targets_L1 > drawn[-1] if drawn else torch.ones_like(total_LU, dtype=torch.bool)
            drawn.append(self._draw(student, total_LU.masked_fill(~allowed_LU, -torch.inf))[None])
        self._joint = drawn

    def _draw(self, student: int, logits_MU: Tensor) -> Tensor:
        """One index [U] by inverse CDF."""
        self.drawn_by.append(logits_MU)
        self._uniforms_SU = moved(self._uniforms_SU, logits_MU.device)
        uniforms_U = self._uniforms_SU[student]
        cdf_MU = (logits_MU - logits_MU.amax(0)).exp().cumsum(0)
        index_U = (cdf_MU <= uniforms_U * cdf_MU[-1]).sum(0)
        # Rounding may lift the draw past the end; values that are not finite are reported later, where nothing waits.
        return index_U.clamp(max=len(logits_MU) - 1)


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
