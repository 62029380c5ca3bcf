"""What the gates of a traversed student do, layer by layer and token by token (TroL, Figure 6).

Legend: L layers, S tokens of a prompt.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.run_files import read_object

from .text import table

MIXING_NAME = "mixing.json"  # in a run
NOTE = (
    "mixing ratio w of each layer: its further pass has the weight w, what was there 1 - w; means over the prompt's "
    "tokens of text and of pictures"
)


@dataclass(frozen=True)
class Mixing:
    """Of one prompt: its tokens, which of them are of pictures, and the mixing ratios [L][S]."""

    tokens: list[str]
    is_picture: list[bool]
    ratios: list[list[float]]

    @property
    def normalized_LS(self) -> np.ndarray:
        """Each layer's ratios from its lowest (0) to its highest (1), as the paper shows them."""
        ratios_LS = np.array(self.ratios)
        low_L1, high_L1 = ratios_LS.min(1, keepdims=True), ratios_LS.max(1, keepdims=True)
        return (ratios_LS - low_L1) / np.maximum(high_L1 - low_L1, 1e-9)

    @property
    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows of a table: mean, lowest and highest ratio of each layer, for text and pictures."""
        ratios_LS, is_picture_S = np.array(self.ratios), np.array(self.is_picture)
        parts = {"text": ~is_picture_S, "pictures": is_picture_S}
        shown = {name: ratios_LS[:, chosen_S] for name, chosen_S in parts.items() if chosen_S.any()}
        heads = ["layer", *shown, "lowest", "highest"]
        columns = [*(part_LS.mean(1) for part_LS in shown.values()), ratios_LS.min(1), ratios_LS.max(1)]
        return heads, [[str(at + 1), *(f"{w_L[at]:.3f}" for w_L in columns)] for at in range(len(ratios_LS))]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{table(*self.rows)}\n\n{NOTE}"


def mixing_from(found: Mapping[str, Any] | None) -> Mixing | None:
    """What `models.mixing_of` has found."""
    return None if found is None else Mixing(found["tokens"], found["is_picture"], found["ratios"])


def mixing_of_run(run: Path) -> Mixing | None:
    """That of a run whose student is traversed, on its first sample; None for other runs."""
    file = run / MIXING_NAME
    return mixing_from(read_object(file, f"delete {file}: only a figure is lost")) if file.exists() else None
