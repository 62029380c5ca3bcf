"""Layer matching on the device: Algorithm 1 and the choices of the paper's Table 4e, without reading anything back.

Shapes: S student target layers, L teacher target layers, M candidates of one search range, n matches of one student
target (1 but for `bottom_k`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlsi_cache.config.training import MatchingMode, Temperature
from vlsi_cache.errors import SpecError

from .vocab_pass import to_device_async

__all__ = ["Matching", "SearchRange", "match_rng"]


@dataclass(frozen=True)
class Matching:
    """How teacher layers are chosen (VLsI Table 4e, from the last row upwards).

    vlsi: softmax at the adaptive temperature, in order, within the search range. order: the same at temperature 1.
    range: without the order. multinomial: over all layers. bottom_k: the mean of the `bottom_k` nearest ones.
    uniform: s * floor(L / S), which never reaches the deepest. uniform_stretch: evenly from the first to the last.
    random: any. `temperature: fixed` divides by `fixed_temperature`; it applies to `vlsi` alone, as `scale` does.
    """

    mode: MatchingMode = "vlsi"
    scale: float = 2.0
    eps: float = 1e-6
    temperature: Temperature = "normalized"
    fixed_temperature: float = 1.0
    bottom_k: int = 1

    @property
    def in_order(self) -> bool:
        """Whether a student layer is matched behind the match of the student layer before it."""
        return self.mode in ("vlsi", "order")

    def logits(self, kl_M: Tensor, allowed_M: Tensor) -> Tensor:
        """Log-weights of the candidates, [M]; -inf where they are not allowed."""
        # The minimum is subtracted first: it changes no probability and keeps a range of equal divergences finite.
        excess_M = kl_M - kl_M.masked_fill(~allowed_M, torch.inf).amin()
        if self.mode == "random":
            logits_M = torch.zeros_like(excess_M)
        elif self.mode != "vlsi":
            logits_M = -excess_M
        elif self.temperature == "fixed":
            logits_M = -excess_M / self.fixed_temperature
        else:
            spread = excess_M.masked_fill(~allowed_M, 0.0).amax() + self.eps
            # The paper prints T = scale / (max - min + eps) and divides by it, which has the unit nats squared and
            # turns greedy while divergences are large. Multiplying is the min-max scaling that its text describes.
            factor = self.scale / spread if self.temperature == "normalized" else spread / self.scale
            logits_M = -excess_M * factor
        return logits_M.masked_fill(~allowed_M, -torch.inf)


def match_rng(seed: int, step: int, place: int) -> np.random.Generator:
    """The generator of one micro-batch, by the place of its first sample in the batch of this step."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, place])))


class SearchRange:
    """The teacher targets that the next student target may be matched with, in one pass over the student's targets.

    The candidates of a student target are known beforehand: from the first teacher target that it could ever take to
    the last one that leaves a deeper target for every student target still to come. What the order forbids among them
    is masked when a match is drawn, so that nothing has to be read back from the device.
    """

    def __init__(
        self, num_student: int, num_teacher: int, *, rng: np.random.Generator, matching: Matching = Matching()
    ) -> None:
        if num_student > num_teacher:
            raise SpecError(
                f"{num_student} student target layers cannot be matched in order with {num_teacher} of the teacher: "
                "cache at least as many teacher targets as the student has"
            )
        if matching.mode == "bottom_k" and not 1 <= matching.bottom_k <= num_teacher:
            raise SpecError(f"`bottom_k` is {matching.bottom_k}, and the cache has {num_teacher} intermediate layers")
        self.num_student, self.num_teacher, self.matching = num_student, num_teacher, matching
        # One draw for each target, whatever the divergences are: the stream does not depend on them.
        self._uniforms_S = torch.from_numpy(rng.random(num_student))
        self._num_drawn = 0
        self._match: Tensor | None = None

    @property
    def range(self) -> range:
        """The candidates of the next student target."""
        student, num_student, num_teacher = self._num_drawn, self.num_student, self.num_teacher
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

    def draw(self, kl_M: Tensor) -> tuple[Tensor, Tensor | None]:
        """Match the next student target by its divergences from the candidates, likelier where they are smaller.

        Returns the matched teacher targets, int64 [n], and the log-weights [M] that they were drawn by; none where the
        nearest ones are taken.
        """
        window, matching = self.range, self.matching
        if matching.mode == "bottom_k":
            logits_M, index_n = None, kl_M.topk(matching.bottom_k, largest=False).indices
        else:
            allowed_M = torch.ones_like(kl_M, dtype=torch.bool)
            if matching.in_order and self._match is not None:
                allowed_M = torch.arange(window.start, window.stop, device=kl_M.device) > self._match
            logits_M = matching.logits(kl_M.double(), allowed_M)
            index_n = self._inverse_cdf(logits_M)
        self._match = window.start + index_n
        self._num_drawn += 1
        return self._match, logits_M

    def _inverse_cdf(self, logits_M: Tensor) -> Tensor:
        self._uniforms_S = to_device_async(self._uniforms_S, logits_M.device)
        cdf_M = (logits_M - logits_M.amax()).exp().cumsum(0)
        index = (cdf_M <= self._uniforms_S[self._num_drawn] * cdf_M[-1]).sum()
        # Rounding may lift the draw past the end; values that are not finite are reported later, where nothing waits.
        return index.clamp(max=len(logits_M) - 1)[None]
