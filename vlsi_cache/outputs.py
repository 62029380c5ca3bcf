"""Where results may go: looked at before any work is done for them."""

import os
from pathlib import Path

from vlsi_cache.errors import SpecError


def check_folder(out: Path) -> None:
    """Raise SpecError unless `out` is a folder to write into, or can become one."""
    if out.is_dir():
        _check_writable(out, out)
    elif os.path.lexists(out):
        what = "a link to nothing" if out.is_symlink() and not out.exists() else "a file"
        raise SpecError(f"{out} is {what}; name a folder with -o")
    else:
        _check_parents(out)


def check_file(out: Path) -> None:
    """Raise SpecError unless `out` is a file that can be written over, or can become one."""
    if out.is_dir():
        raise SpecError(f"{out} is a folder; name a file")
    _check_parents(out)


def check_apart(out: Path, source: Path) -> None:
    """Raise SpecError when `out` is, holds, or lies in the folder `source` that it is made from."""
    one, other = out.resolve(), source.resolve()
    if one == other or one in other.parents or other in one.parents:
        how = "is" if one == other else "holds" if one in other.parents else "lies in"
        raise SpecError(f"{out} {how} {source}, which it is made from and which stays as it is; name another folder")


def _check_parents(out: Path) -> None:
    """What is missing of the path is made when it is needed."""
    for parent in out.absolute().parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise SpecError(f"{out} cannot be written: {parent} is no folder; name another place")
            _check_writable(out, parent)
            return


def _check_writable(out: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SpecError(f"{out} cannot be written: no permission to write in {folder}; name another place")
