"""Tensors of a checkpoint whose weights are sharded: a safetensors file a process (torch.distributed.checkpoint).

Each process writes the rows that it holds; what all hold, one of them writes. Where the rows of a tensor lie stands in
the header of each file, so that any number of processes reads them back, and one alone.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from vlsi_cache.errors import CacheCorruptError


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what this process holds of `tensors`, together with all others; all have written when it returns.

    The error of one process is raised in all of them.
    """
    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first from error


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors`, whole or sharded in any way, from the files of any number of processes, or from one of whole
    tensors; by itself, whatever other processes do. Raises CacheCorruptError where they do not fit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nobody else takes part
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        reason = " ".join(str(first).split())[:200]
        raise CacheCorruptError(f"{folder}: does not fit this model ({reason}); start a new run") from error


def shapes_in(folder: Path) -> dict[str, torch.Size]:
    """Names and whole shapes of the tensors in a folder of such files."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: one.size for name, one in found.items()}  # type: ignore[union-attr]
