"""Layer matching where the divergences are: Algorithm 1 row by row on the device, without reading anything back.

The same draws as `matching.match_layers` makes from the same generator. Shapes: M candidates of a window.
"""

import numpy as np
import torch
from torch import Tensor

from .matching import Temperature, search_window

__all__ = ["Matcher"]


class Matcher:
    """One pass of Algorithm 1 over the student's target layers, in their order.

    The window of a student target is fixed beforehand, from the first teacher target it could ever take to the last;
    what lies before the match of the layer above is masked. `matched` holds 0-dim tensors, teacher target indices.
    """

    def __init__(
        self,
        num_student: int,
        num_teacher: int,
        *,
        rng: np.random.Generator,
        scale: float = 2.0,
        eps: float = 1e-6,
        temperature: Temperature = "normalized",
    ) -> None:
        self.num_student, self.num_teacher = num_student, num_teacher
        self.scale, self.eps = scale, eps
        self.temperature: Temperature = temperature
        # One draw for each target, whatever the divergences are.
        self._uniforms = [float(rng.random()) for _ in range(num_student)]
        self._start: Tensor | None = None
        self.matched: list[Tensor] = []

    def window(self) -> range:
        """Teacher targets that the next student target may be matched with."""
        student = len(self.matched)
        _, last = search_window(student, student, self.num_student, self.num_teacher)
        return range(student, last + 1)

    def choose(self, values_M: Tensor) -> Tensor:
        """Draw from the divergences of `window()`: 0-dim, an index into it; values may be of any float dtype."""
        window, student = self.window(), len(self.matched)
        targets_M = torch.arange(window.start, window.stop, device=values_M.device)
        start = targets_M[0] if self._start is None else self._start
        weights_M = _weights(values_M.double(), targets_M >= start, self.scale, self.eps, self.temperature)
        cdf_M = weights_M.cumsum(0)
        drawn = torch.searchsorted(cdf_M, (self._uniforms[student] * cdf_M[-1])[None], right=True)[0]
        # Rounding may lift the draw past the end; values that are not finite are reported later, where nothing waits.
        drawn = drawn.clamp(max=len(window) - 1)
        self.matched.append(targets_M[0] + drawn)
        self._start = self.matched[-1] + 1
        return drawn


def _weights(values_M: Tensor, allowed_M: Tensor, scale: float, eps: float, temperature: Temperature) -> Tensor:
    """`matching.match_probabilities` over the allowed candidates, 0 elsewhere, not normalised."""
    excess_M = values_M - values_M.masked_fill(~allowed_M, torch.inf).min()
    spread = excess_M.masked_fill(~allowed_M, 0.0).max() + eps
    logits_M = -excess_M * (scale / spread if temperature == "normalized" else spread / scale)
    return logits_M.masked_fill(~allowed_M, -torch.inf).exp()
