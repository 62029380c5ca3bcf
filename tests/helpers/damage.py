"""Every way a file of a cache can be wrong is noticed, and the error names the file."""

from pathlib import Path


def part_path(root: Path, index: int = 1) -> Path:
    return root / "parts" / f"{index:06d}.zarr"


def data_file(root: Path, array: str) -> Path:
    return next(path for path in (part_path(root) / array / "c").rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)
