"""GGUF files: what transformers reads of one, read once.

For most architectures transformers parses the whole file anew for the configuration, the tokenizer and the weights, in
Python, and makes the table of tensor names once for every module of the model: 49,152 tokens and 30 layers take longer
than the weights themselves.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

_parsed: dict[tuple[Any, ...], Any] = {}  # of the file that is being opened, until its weights have been loaded


@contextmanager
def parsed_once(*, last: bool = False) -> Iterator[None]:
    """What is read of a GGUF file within is kept for the next time; after the `last` time it is forgotten.

    Does nothing where the package `gguf` is missing: transformers then says so.
    """
    try:
        gguf: Any = import_module("gguf")
    except ImportError:
        yield
        return
    from transformers import modeling_gguf_pytorch_utils as legacy

    class Reader(gguf.GGUFReader):
        """Slices of a memory map are objects of their own, which cost more than what they hold."""

        def _build_fields(self, *args: Any) -> Any:
            self.data: Any = self.data.view(np.ndarray)  # the same memory
            return super()._build_fields(*args)

    load = legacy.load_gguf_checkpoint

    def reader(path: Any, *args: Any) -> Any:
        return _kept(("reader", path, *args), path, lambda: Reader(path, *args))

    def loaded(path: Any, return_tensors: bool = False, *args: Any, **options: Any) -> Any:
        if return_tensors:
            return load(path, return_tensors, *args, **options)
        return copy.deepcopy(_kept(("fields", path), path, lambda: load(path)))

    names = cache(gguf.get_tensor_name_map)
    ours = ((gguf, "GGUFReader", reader), (gguf, "get_tensor_name_map", names), (legacy, load.__name__, loaded))
    theirs = [(module, name, getattr(module, name)) for module, name, _ in ours]
    try:
        for module, name, value in ours:  # transformers looks them up whenever it reads a file
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in theirs:
            setattr(module, name, value)
        if last:
            _parsed.clear()


def _kept(key: tuple[Any, ...], path: Any, make: Any) -> Any:
    status = Path(path).stat()
    key = (*key, status.st_size, status.st_mtime_ns)
    if key not in _parsed:
        _parsed[key] = make()
    return _parsed[key]
