"""Which form the elementwise passes over a block of logits take: eager, or fused by `torch.compile`.

The eager form is the oracle of the other. On a GPU, fusing reads and writes each logit once instead of several times;
on a CPU a block lies in its cache and little is gained, so there it happens only when it is asked for.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Literal, TypeVar, cast

import torch

from vlsi_cache.errors import ModelError

__all__ = ["Kernels", "fused", "pick_kernels"]

Kernels = Literal["auto", "eager", "compiled"]
Function = TypeVar("Function", bound=Callable)


def pick_kernels(wanted: Kernels, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and why; raises ModelError where `compiled` is asked for and the device's compiler fails."""
    if wanted == "eager":
        return False, "asked for"
    if wanted == "auto" and device.type != "cuda":
        return False, f"no fused kernels needed on {device.type}"
    problem = _compiler_problem(device.type)
    if not problem:
        return True, "asked for" if wanted == "compiled" else "CUDA found"
    if wanted == "compiled":
        raise ModelError(f"kernels `compiled` were asked for, and torch.compile does not work here: {problem}")
    return False, f"torch.compile does not work here: {problem}"


def fused(function: Function, *, compiled: bool) -> Function:
    """`function`, or its compiled form."""
    return cast(Function, _compiled(function)) if compiled else function


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


@functools.cache
def _compiler_problem(device: str) -> str:
    """What goes wrong when a small function is compiled; empty if nothing does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(lambda x: x.exp().sum(1), dynamic=True)(torch.ones(2, 3, device=device))
    except Exception as error:  # a missing compiler shows in many ways, and auto must not fail for it
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return ""
