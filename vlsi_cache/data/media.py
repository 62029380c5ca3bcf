"""Images by reference: a path or encoded bytes, with a digest. Decoded pixels are never kept."""

import base64
import binascii
import hashlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vlsi_cache.errors import DataError

# Pillow clips these to white when it converts them to 8 bit.
_DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class Media:
    """One image: the digest of its file, its upright (width, height) in pixels, and where the file is."""

    sha256: str
    size: tuple[int, int]
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)

    def open(self) -> Image.Image:
        """Decode to an upright RGB image; raises DataError if the file is not the one that was read before."""
        return decode_image(self.read())

    def read(self) -> bytes:
        """The file as it was read before; raises DataError if it is another one now."""
        data = self.data if self.data is not None else _read_file(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise DataError(f"image `{self.path}` has changed since the rows were read; start again")
        return data


def decode_image(data: bytes) -> Image.Image:
    """Decode all pixels to RGB, turned upright as the camera says; raises DataError for anything else than one picture.

    The first picture is taken of an MPO file, as cameras write them: the others are previews.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_kind(image)
            return ImageOps.exif_transpose(image).convert("RGB")
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise DataError(f"cannot be decoded: {_reason(error)}") from None


def load_media(image: Any, *, root: Path | None, known: dict[Path | str, Media]) -> Media:
    """Check one entry of a row's `images` (a path, or a mapping with `bytes` or `path`) and make its reference.

    `known` remembers what has been decoded already, by its path or its sha256: the bytes of a picture that is in many
    rows are kept once. Raises DataError with the reason alone.
    """
    entry = {"path": image} if isinstance(image, str) else image
    if not isinstance(entry, Mapping):
        raise DataError(f"is a {type(image).__name__}, must be a path or a mapping with `path` or `bytes`")
    if entry.get("bytes") is not None:
        media = _load_bytes(_decode_bytes(entry["bytes"]), known=known)
    elif isinstance(entry.get("path"), str) and entry["path"]:
        media = _load_file(entry["path"], root=root, known=known)
    else:
        raise DataError("has neither `path` nor `bytes`")
    _check_digest(entry.get("sha256"), media)
    return media


def _load_bytes(data: bytes, *, known: dict[Path | str, Media]) -> Media:
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 not in known:
        known[sha256] = _media_of(data, path=None)
    return known[sha256]


def _load_file(path: str, *, root: Path | None, known: dict[Path | str, Media]) -> Media:
    file = _inside(path, root)
    if file not in known:
        try:
            known[file] = _media_of(_read_file(file), path=file)
        except DataError as error:
            raise DataError(f"`{path}` {error}") from None
    return known[file]


def _inside(path: str, root: Path | None) -> Path:
    """The real file behind `path`, which must lie below `root` after `..` and links are followed."""
    if root is None:
        raise DataError(f"`{path}` is a path, and data.media_root is not set")
    try:
        file = (root / path).resolve()
        is_file = file.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"`{path}` is no usable path: {_reason(error)}") from None
    if not file.is_relative_to(root):
        raise DataError(f"`{path}` lies outside the media folder {root}")
    if not is_file:
        raise DataError(f"`{path}` does not exist in {root}")
    return file


def _media_of(data: bytes, *, path: Path | None) -> Media:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        size = decode_image(data).size
    return Media(hashlib.sha256(data).hexdigest(), size, path, data if path is None else None)


def _decode_bytes(value: Any) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise DataError("`bytes` is not base64 text") from None


def _check_digest(expected: Any, media: Media) -> None:
    if expected is not None and str(expected).lower() != media.sha256:
        raise DataError(f"sha256 is {media.sha256[:12]}..., the row says {str(expected)[:12]}...")


def _check_kind(image: Image.Image) -> None:
    if image.mode.startswith(_DEEP_MODES):
        raise DataError(f"has pixels of mode `{image.mode}`; convert it to 8 bits a channel")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise DataError(f"has {getattr(image, 'n_frames', 1)} frames, must be one picture")


def _read_file(path: Path | None) -> bytes:
    assert path is not None
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__).split("<_io.BytesIO")[0].strip()
