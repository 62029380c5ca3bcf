"""How large the tensors are that some code makes."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Remembers the element count of the largest storage any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.itemsize)
        return result


class PeakMemory(TorchDispatchMode):
    """The most bytes that live at once in storages which the code inside has made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in args if isinstance(x, Tensor)}
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self._add(value.untyped_storage(), given)
        self.peak_bytes = max(self.peak_bytes, sum(self.alive.values()))
        return result

    def _add(self, storage, given: set[int]) -> None:
        if id(storage) not in self.alive and id(storage) not in given:
            self.alive[id(storage)] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, id(storage))
