"""Sequences that branch, for models that no mask keeps from seeing one branch in another (layers with a state).

The trunk of each, what all its branches share, runs first; then the branches, in rows of their own, each from the cache
that its trunk has left (`models/branches.py`). Shapes: R branches, S tokens of a sequence or of the longest branch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .sequence import Encoded

# Of the inputs of a batch, its `Branches`; all other inputs are those of the trunks.
BRANCHES = "branches"


class Star(NamedTuple):
    """A sequence as a trunk, its first `num_trunk` tokens, and branches that do not branch again: the places in the
    sequence of their tokens behind the trunk. A sequence without branches is all trunk."""

    num_trunk: int
    branches: list[np.ndarray]

    @property
    def num_tokens(self) -> int:
        """Tokens that run; what some of the branches share beyond the trunk runs in each of them."""
        return self.num_trunk + sum(map(len, self.branches))


def star_of(one: Encoded) -> Star:
    """The trunk is as long as what all branches share."""
    if one.positions is None:
        return Star(len(one.input_ids), [])
    begins = 1 + np.flatnonzero(np.diff(one.positions) != 1)
    num_trunk = int(one.positions[begins].min())
    path, branches = np.zeros(0, np.int64), []
    for own in np.split(np.arange(len(one.input_ids)), begins):
        path = np.concatenate([path[: one.positions[own[0]]], own])
        branches.append(path[num_trunk:])
    return Star(num_trunk, branches)


class BranchRows(NamedTuple):
    """Branches that run together, padded on the right: ids and mask int64 [R, S], and which row of the trunks each
    goes on from, int64 [R]."""

    ids_RS: Tensor
    mask_RS: Tensor
    trunk_R: Tensor


@dataclass(frozen=True)
class Branches:
    """The rows of a batch behind its trunks, by the pass that they run in."""

    passes: tuple[BranchRows, ...]

    def to(self, device: Any, *, non_blocking: bool = False) -> "Branches":
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Branches":
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Branches":
        return Branches(tuple(BranchRows(*map(change, rows)) for rows in self.passes))


def branches_of(passes: Sequence[Sequence[tuple[int, np.ndarray]]], *, pad_id: int) -> Branches:
    """`passes` has for each branch the number of its trunk, and its ids."""
    found = []
    for rows in passes:
        width = max(len(ids_S) for _, ids_S in rows)
        ids_RS, mask_RS = np.full((len(rows), width), pad_id, np.int64), np.zeros((len(rows), width), np.int64)
        for row, (_, ids_S) in enumerate(rows):
            ids_RS[row, : len(ids_S)], mask_RS[row, : len(ids_S)] = ids_S, 1
        trunk_R = np.array([trunk for trunk, _ in rows])
        found.append(BranchRows(*map(torch.from_numpy, (ids_RS, mask_RS, trunk_R))))
    return Branches(tuple(found))
