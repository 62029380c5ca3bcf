"""Writes the golden caches of format 1: one archive for every variant, and the rows that must come out of it.

They were written once and stay as they are: a reader of any later version must read them. Run this only to add a new
variant; files that exist are left alone.
"""

import io
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from helpers.variants import VARIANTS, build_variant, variant_of  # noqa: E402

from vlsi_cache.store import reader  # noqa: E402


def main() -> None:
    for name in VARIANTS:
        if (HERE / f"{name}.tar.xz").exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = build_variant(Path(folder) / "cache", variant_of(name))
            pack(root, HERE / f"{name}.tar.xz")
            np.savez_compressed(HERE / f"{name}.npz", **expected_rows(root))  # type: ignore[arg-type]


def pack(root: Path, target: Path) -> None:
    """All files of a cache but the table, which can be made again; the copy of `vocab/` is left out for its size."""
    with tarfile.open(target, "w:xz") as archive:
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            name = file.relative_to(root).as_posix()
            if name != "samples.parquet" and not name.startswith("vocab-copy/"):
                entry = tarfile.TarInfo(name)
                entry.size = file.stat().st_size
                archive.addfile(entry, io.BytesIO(file.read_bytes()))


def unpack(archive: Path) -> dict[str, bytes]:
    """The files of a golden cache by their path."""
    with tarfile.open(archive) as content:
        return {entry.name: content.extractfile(entry).read() for entry in content}  # type: ignore[union-attr]


def expected_rows(root: Path) -> dict[str, np.ndarray]:
    """What our reader gives, all samples one after another; rows that are narrower than the widest are padded."""
    cache = reader.open(root)
    rows = [cache[name].padded_to(cache.header.widest) for name in cache]
    arrays = {"samples": np.array(list(cache)), "lengths": np.array([row.num_tokens for row in rows])}
    for field in (
        "ids_LTK",
        "logprobs_LTK",
        "tail_ids_LTm",
        "lse_LTn",
        "entropy_LT",
        "gold_logprob_LT",
        "tail_mass_LT",
    ):
        arrays[field] = np.concatenate([getattr(row, field) for row in rows], axis=1)
    for field in ("positions_T", "response_ids_R"):
        arrays[field] = np.concatenate([getattr(row, field) for row in rows])
    return arrays


if __name__ == "__main__":
    main()
