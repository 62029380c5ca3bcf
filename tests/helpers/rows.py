"""Teacher rows from bare arrays, as the layer-wise loss takes them."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from vlsi_cache.sparse.kl import LayerRows

NAMES = ("ids_LTK", "logprobs_LTK", "tail_ids_LTm", "tail_mass_LT", "entropy_LT", "lse_LTn")


def layer_rows(*arrays: Tensor, taus: tuple[float, ...] = (1.0,), **options: Any) -> LayerRows:
    """`LayerRows` of arrays in the order of NAMES; the last one may be left out."""
    return LayerRows.of(SimpleNamespace(**dict(zip(NAMES, arrays, strict=False)), taus=taus), **options)
