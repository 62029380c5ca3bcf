"""Weights of which each process of a launch holds some rows (torch's DTensor).

Two kinds train beside each other under `run.parallel: fsdp`. Decoder layers are shares themselves. What losses read
past its module stays whole in each process (the head's weight, embeddings), and the optimizer is given rows of it
instead: each process has the moments of its rows alone, steps them, and all tell each other what became of theirs.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WHOLE = "whole"  # in a group of an optimizer: the whole weights whose rows its parameters are


def is_sharded(tensor: "torch.Tensor") -> bool:
    """Whether processes hold a share each of a weight or gradient."""
    return hasattr(tensor, "placements")


def local(tensor: "torch.Tensor") -> "torch.Tensor":
    """The part of a tensor that this process holds; a whole one is returned as it is."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def rows_of(tensor: "torch.Tensor", mesh: Any) -> Any:
    """A copy of the rows that fall to this process, as a share of `tensor`, which all processes of the mesh have."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    everywhere: Any = DTensor.from_local(tensor.detach(), mesh, [Replicate()], run_check=False)
    return everywhere.redistribute(placements=[Shard(0)])


def group_of_rows(name: str, weights: "Sequence[torch.nn.Parameter]", mesh: Any) -> dict[str, Any]:
    """A group for an optimizer that steps this process's rows of whole weights."""
    from torch import nn

    return {"name": name, "params": [nn.Parameter(rows_of(one, mesh)) for one in weights], WHOLE: list(weights)}


def whole_and_rows(optimizer: "torch.optim.Optimizer") -> Iterator[tuple[Any, Any]]:
    """Each whole weight of which the optimizer steps rows, and its rows."""
    for group in optimizer.param_groups:
        if WHOLE in group:
            yield from zip(group[WHOLE], group["params"], strict=True)


def deal_gradients(optimizer: "torch.optim.Optimizer") -> None:
    """Leave to the rows their part of the gradient of each whole weight, and nothing to the whole one."""
    for whole, rows in whole_and_rows(optimizer):
        if whole.grad is not None:
            rows.grad, whole.grad = rows_of(whole.grad, rows.device_mesh), None


def gather_weights(optimizer: "torch.optim.Optimizer") -> None:
    """Make whole weights what the rows of all processes are; all processes call it alike."""
    for whole, rows in whole_and_rows(optimizer):
        whole.detach().copy_(rows.detach().full_tensor())
