"""Uniforms that fill their cube evenly: shares over few of them are as close as over many random ones."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch.quasirandom import SobolEngine


def even_generators(num: int, num_uniforms: int) -> Iterator[Any]:
    """`num` generators whose `random(num_uniforms)` are together the points of a Sobol sequence."""
    for point in SobolEngine(num_uniforms, scramble=True, seed=0).draw(num).double().numpy():
        yield SimpleNamespace(random=lambda n, point=point: point[:n])
