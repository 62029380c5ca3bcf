"""Features of pictures on the disk, for later commands: one file a picture, in a folder for each tower.

The folder's name is a digest of all that the features follow from, so that they are never out of date. A file is
written under another name and then renamed, holds a checksum, and one that is not whole is made again. Nothing in here
is needed: the folders may be deleted at any time.
"""

import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlsi_cache.io import is_disk_full, remove
from vlsi_cache.progress import say

PREFIX = "features-"
STALE_S = 24 * 3600.0
_SUM = "xxh3"


class FeatureFiles:
    """Those of one tower, in `root`/features-`key`; all folders together stay below `max_bytes`.

    Where they would not, folders of other towers go, first those that were not used for longest; then nothing is added.
    Several processes may share a folder: each counts what was there when it began, and what it adds.
    """

    def __init__(self, root: Path, key: str, max_bytes: int) -> None:
        self.folder = root / f"{PREFIX}{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)  # used just now
        for leftover in root.glob(f"{PREFIX}*/*/.*.tmp-*"):
            with suppress(OSError):  # of a process that was killed; one that lives is done within a day
                if time.time() - leftover.stat().st_mtime > STALE_S:
                    leftover.unlink()
        folders = [folder for folder in root.glob(f"{PREFIX}*") if folder.is_dir()]
        self._sizes = {folder: _size(folder) for folder in sorted(folders, key=_used, reverse=True)}
        self._room = max_bytes - sum(self._sizes.values())
        self._sizes.pop(self.folder)

    def get(self, digest: str) -> dict[str, Tensor] | None:
        """The tensors of a picture; None where there are none, or they are damaged."""
        path = self._path(digest)
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
                said = file.metadata()[_SUM]
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, TypeError):
            said = found = None
        if found is None or said != _checksum(digest, found):
            with suppress(OSError):  # a folder that is not ours to write
                path.unlink(missing_ok=True)
            return None
        return found

    def put(self, digest: str, tensors: dict[str, Tensor]) -> None:
        """Keep them while there is room; a disk that is full ends it, and that is said."""
        path = self._path(digest)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if path.exists() or not self._has_room(size):
            return
        temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={_SUM: _checksum(digest, tensors)})
            temporary.rename(path)
            self._room -= size
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            self._room, self._sizes = 0, {}
            why = "the disk is full" if isinstance(error, OSError) and is_disk_full(error) else str(error)
            say(f"no more features of pictures are kept in {self.folder}: {why}")

    def _has_room(self, size: int) -> bool:
        while size > self._room and self._sizes:
            folder, freed = self._sizes.popitem()
            remove(folder)
            self._room += freed
        return size <= self._room

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"


def _checksum(name_of_picture: str, tensors: dict[str, Tensor]) -> str:
    """Of the tensors and the name that they are kept under: a file that was moved is not taken for another one."""
    digest = xxhash.xxh3_128(name_of_picture.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _used(folder: Path) -> float:
    return folder.stat().st_mtime


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.safetensors"):
        with suppress(OSError):  # it went meanwhile
            total += path.stat().st_size
    return total
