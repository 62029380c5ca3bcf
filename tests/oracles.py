"""What decides what is right, where it is not another program: the paper's algorithm as it is printed.

Shapes: S student target layers, L teacher target layers.
"""

import numpy as np


def literal_algorithm_1(kld_SL: np.ndarray, draws_S: list[float], *, printed: bool = False) -> list[int]:
    """VLsI Algorithm 1 over a full table of divergences, with one uniform draw for each student target.

    Line 10 adds 1 to the draw inside the window, which leaves the table in most passes; here the match is start + draw,
    and the 1 moves the next window's start. `printed` divides by the temperature as line 8 prints it.
    """
    (num_student, num_teacher), start, matches = kld_SL.shape, 0, []
    for s in range(num_student):
        candidates = kld_SL[s, start : num_teacher - num_student + s + 1]
        spread = candidates.max() - candidates.min() + 1e-6
        excess = candidates - candidates.min()
        logits = -excess / (2.0 / spread) if printed else -excess * (2.0 / spread)
        p = np.exp(logits) / np.exp(logits).sum()
        match = start + min(int((np.cumsum(p) <= draws_S[s]).sum()), len(p) - 1)
        matches.append(match)
        start = match + 1
    return matches
