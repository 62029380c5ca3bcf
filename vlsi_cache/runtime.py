"""The process that does the work: its device, precision, random state and memory."""

import hashlib
import sys

import torch

from .errors import ModelError
from .progress import say


def check_device(device: str) -> None:
    """Raise ModelError for a device that is not here; `auto` always is."""
    if device == "auto":
        return
    try:
        where = torch.device(device)
    except RuntimeError:
        where = None
    if where is None or where.type not in ("cpu", "cuda"):
        raise ModelError(f"device `{device}`: no such device; give `cpu`, `cuda`, `cuda:1` or `auto`")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device `{device}`: torch finds no CUDA device; use `cpu` or `auto`")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device `{device}`: torch finds {torch.cuda.device_count()} CUDA device(s), numbered from 0; use one of "
            "these, `cpu` or `auto`"
        )


def pick_device(device: str | None) -> torch.device:
    """`auto` and None mean CUDA when there is one, else the CPU; the choice is printed with its reason.

    Raises ModelError for a device that is not here.
    """
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        say(f"device: {device} ({'CUDA found' if device == 'cuda' else 'no CUDA found'})")
    check_device(str(device))
    return torch.device(str(device))


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on CUDA, nothing on the CPU (fp32 is exact there, and not slower at the sizes a CPU can train)."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def seed_step(seed: int, stage: str, step: int, place: int = 0) -> None:
    """Key torch's random state to this step and the micro-batch that begins at `place` of its batch.

    A resumed run draws the dropout that a whole one draws, and several processes that of one.
    """
    name = f"{seed} {stage} {step}" + (f" {place}" if place else "")
    digest = hashlib.sha256(name.encode()).digest()
    number = int.from_bytes(digest[:8], "little")
    if torch.cuda.is_available():
        torch.manual_seed(number)
    else:  # `torch.manual_seed` would also write down the stack for each kind of device that is not here: milliseconds
        torch.default_generator.manual_seed(number)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on CUDA, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 2**10 if sys.platform != "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
