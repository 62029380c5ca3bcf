"""Images by reference: a path, encoded bytes, or how to read them again, with a digest. No decoded pixels are kept."""

import base64
import binascii
import errno
import hashlib
import io
import os
import stat
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from vlsi_cache.errors import DataError, DiskFullError
from vlsi_cache.io import is_disk_full

from .messages import Message, Note, image_parts, text_of
from .values import shown

# The formats that are read. Pillow knows more, but some of them start programs (EPS), hold no picture of their own or
# are decoded by code that few have tried. Its JPEG reader reads MPO too.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_KNOWN = "PNG, JPEG, WebP, GIF, BMP and TIFF are read"
# How their files begin: a text that is no path is a picture in base64 if it begins so.
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)  # of EXIF: the picture lies on its side
# Pillow clips these to white when it converts them to 8 bit.
_DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class Media:
    """One image: the digest of its file, its upright (width, height) in pixels, and where it is.

    It is a file of its own (`path`), bytes in memory (`data`), or bytes in a file of rows that `again` reads once more:
    pictures of a large set would not all fit into memory.
    """

    sha256: str
    size: tuple[int, int]
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False, compare=False)
    again: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Another process gets the bytes of a picture that stands in a file of rows."""
        data = self.data if self.again is None else self.read()
        return {**self.__dict__, "data": data, "again": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def open(self) -> Image.Image:
        """Decode to an upright RGB image; raises DataError if the file is not the one that was read before, or is
        damaged in its middle, which the header does not tell (see `picture_size`)."""
        data = self.read()
        try:
            return decode_image(data)
        except DataError as error:
            raise DataError(f"{self._name} {error}") from None

    @property
    def _name(self) -> str:
        return f"image `{self.path}`" if self.path else f"the image of sha256 {self.sha256[:12]}..."

    def read(self) -> bytes:
        """The file as it was read before; raises DataError if it is another one now."""
        if self.data is not None:
            data = self.data
        elif self.again is not None:
            data = self.again()
        else:
            assert self.path is not None
            data = read_file(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise DataError(f"{self._name} has changed since the rows were read; start again")
        return data


def decode_image(data: bytes) -> Image.Image:
    """Decode all pixels to RGB, turned upright as the camera says; raises DataError for anything else than one picture.

    The first picture is taken of an MPO file, as cameras write them: the others are previews. No step holds more than
    two copies of the pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_kind(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image if image.mode == "RGB" else image.convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"cannot be decoded: {_found(data)}; {_KNOWN}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise DataError(f"cannot be decoded: {_reason(error)}") from None


def picture_size(data: bytes) -> tuple[int, int]:
    """Upright (width, height) in pixels, from the header of a file that is as long as it says.

    Any other one is decoded whole, which finds what is wrong with it, if anything is. Raises what `decode_image` does.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_kind(image)
            if _is_whole(data, image.format or ""):
                lies = image.format != "PNG" and image.getexif().get(_ORIENTATION) in _LYING
                width, height = image.size
                return (height, width) if lies else (width, height)
    except Exception:
        pass
    return decode_image(data).size


def _is_whole(data: bytes, form: str) -> bool:
    """Whether a file ends where it should, and its header says all of the size."""
    if form in ("JPEG", "MPO"):
        return data[-64:].rstrip(b"\0\r\n ").endswith(b"\xff\xd9")
    if form == "PNG":  # its orientation may stand behind the pixels
        turned = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
        return data.endswith(b"IEND\xaeB`\x82") and not any(mark in data for mark in turned)
    if form == "WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if form == "BMP":
        return len(data) >= int.from_bytes(data[2:6], "little") > 0
    return form == "GIF" and data.endswith(b";")


Keep = Callable[[Media, bytes], Media]


class Shelf:
    """Bytes of pictures that cannot be read again where they come from: in memory, and when it is full in a file.

    The file has no name and goes with the last picture on it.
    """

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        self._room = max_bytes
        self._file: Any = None

    def put(self, data: bytes) -> Callable[[], bytes] | None:
        """How to read them later; None where they are to be kept in memory."""
        self._room -= len(data)
        if self._room >= 0:
            return None
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it lives as long as the pictures
            weakref.finalize(self, self._file.close)
        try:
            start = self._file.seek(0, os.SEEK_END)
            if self._file.write(data) < len(data):  # what a full disk does to a file without a buffer
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise DiskFullError(
                f"the disk of {tempfile.gettempdir()} is full: pictures that cannot be read again from their file lie "
                "there. Name a folder with room in TMPDIR, or write the rows as Parquet in row groups of 100 rows"
            ) from error
        return partial(self._read, start, len(data))

    def _read(self, start: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, start)  # threads read at the same time


def load_media(
    image: Any,
    *,
    root: Path | None,
    known: dict[Path | str, Media],
    again: Callable[[], bytes] | None = None,
    shelf: Shelf | None = None,
    decode: bool = True,
) -> Media:
    """Check one picture of a row and make its reference.

    It is bytes, a text (a path, a data URI or base64), or a mapping with `bytes` or `path`. `known` remembers what has
    been decoded already, by its path or its sha256: a picture that is in many rows is kept once. With `again`, which
    reads its bytes once more, none are kept; without, they go onto the `shelf`. Without `decode` the header is believed
    as `picture_size` does. Raises DataError with the reason alone.
    """
    measured = partial(_media_of, decode=decode)
    keep = partial(_keep, again=again, shelf=shelf)
    if isinstance(image, Media):  # a frame of a video
        return image
    entry = image if isinstance(image, Mapping) else {"bytes": image} if _is_bytes(image) else {"path": image}
    if entry.get("bytes") is not None:
        media = _load_bytes(_decode_bytes(entry["bytes"], "`bytes`"), known, keep, measured)
    elif isinstance(entry.get("path"), str) and entry["path"]:
        media = _load_text(entry["path"], root, known, keep, measured)
    elif entry is image:
        raise DataError("has neither `path` nor `bytes`")
    else:
        raise DataError(f"is a {type(image).__name__}, must be a path, bytes, or a mapping with `path` or `bytes`")
    _check_digest(entry.get("sha256"), media)
    return media


def bytes_of(image: Any) -> bytes:
    """The encoded bytes that a picture of a row itself holds, however they are written; raises DataError."""
    value = image
    if isinstance(image, Mapping):
        value = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(value, str):
        value = _inline(value) or value
    return _decode_bytes(value, "`bytes`")


def read_file(path: Path) -> bytes:
    """A file whole; raises DataError where it cannot be read, or is none: a pipe would wait for ever."""
    try:
        kind = kind_of_file(path.stat().st_mode)
        if kind != "file":
            raise DataError(f"is a {kind}, not a file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {_reason(error)}") from None


def kind_of_file(mode: int) -> str:
    """What a path is, in words; `file` is all that is ever opened."""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def _load_text(
    text: str, root: Path | None, known: dict[Path | str, Media], keep: Keep, measured: Callable[..., Media]
) -> Media:
    """A text names a file, or is a picture itself."""
    if text[:8].lower().startswith(("http://", "https://")):
        raise DataError(f"`{shown(text)}` is a web address, and nothing is downloaded: save it and name the file")
    if text[:5].lower() == "data:":
        inline = _inline(text)
        if inline is None:
            raise DataError(f"`{shown(text)}` is no data URI of base64 (data:image/png;base64,...)")
        return _load_bytes(_decode_bytes(inline, "the data URI"), known, keep, measured)
    try:
        file = file_inside(text.removeprefix("file://"), root)
    except DataError:
        if not _looks_like_base64(text):
            raise
        return _load_bytes(_decode_bytes(text, "the text"), known, keep, measured)
    if file not in known:
        try:
            known[file] = measured(read_file(file), path=file)
        except DataError as error:
            raise DataError(f"`{shown(text)}` {error}") from None
    return known[file]


def _inline(text: str) -> str | None:
    """The base64 of a data URI; None if it is none."""
    head, comma, rest = text.partition(",")
    return rest if comma and head[:5].lower() == "data:" and head.lower().endswith(";base64") else None


def _looks_like_base64(text: str) -> bool:
    try:
        return base64.b64decode(text[:16], validate=True).startswith(_BEGINNINGS)
    except (binascii.Error, ValueError):
        return False


def _load_bytes(data: bytes, known: dict[Path | str, Media], keep: Keep, measured: Callable[..., Media]) -> Media:
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 not in known:
        known[sha256] = keep(measured(data), data)
    return known[sha256]


def _keep(media: Media, data: bytes, *, again: Callable[[], bytes] | None, shelf: Shelf | None) -> Media:
    again = shelf.put(data) if again is None and shelf is not None else again
    return replace(media, data=data if again is None else None, again=again)


def file_inside(path: str, root: Path | None) -> Path:
    """The real file behind `path`, which must lie below `root` after `..` and links are followed."""
    if root is None:
        raise DataError(f"`{shown(path)}` is a path, and data.media_root is not set")
    try:
        file = (root / path).resolve()
        kind = kind_of_file(file.stat().st_mode) if file.exists() else None
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"`{shown(path)}` is no usable path: {_reason(error)}") from None
    if not file.is_relative_to(root):
        raise DataError(f"`{shown(path)}` lies outside the media folder {root}")
    if kind is None:
        raise DataError(f"`{shown(path)}` does not exist in {root}")
    if kind != "file":
        raise DataError(f"`{shown(path)}` is a {kind}, not a file")
    return file


def _media_of(data: bytes, *, path: Path | None = None, decode: bool) -> Media:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        size = decode_image(data).size if decode else picture_size(data)
    return Media(hashlib.sha256(data).hexdigest(), size, path)


def _is_bytes(value: Any) -> bool:
    return isinstance(value, bytes | bytearray | memoryview)


def _decode_bytes(value: Any, what: str) -> bytes:
    if _is_bytes(value):
        return bytes(value)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise DataError(f"{what} is not base64 text") from None


def _check_digest(expected: Any, media: Media) -> None:
    if expected is not None and str(expected).lower() != media.sha256:
        raise DataError(f"sha256 is {media.sha256[:12]}..., the row says {shown(str(expected)[:12])}...")


def _check_kind(image: Image.Image) -> None:
    if image.mode.startswith(_DEEP_MODES):
        raise DataError(f"has pixels of mode `{image.mode}`; convert it to 8 bits a channel")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise DataError(f"has {getattr(image, 'n_frames', 1)} frames, must be one picture")


def _found(data: bytes) -> str:
    """What the first bytes of a file say it is, without opening it as that."""
    if len(data) < 4:  # Pillow's tests of first bytes do not look whether there are any
        return f"it has {len(data)} bytes"
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        if name not in FORMATS and accepts is not None and accepts(data[:16]) is True:
            return f"it is a file of format {name}"
    return "it is no picture that is known here"


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown((text or type(error).__name__).split("<_io.BytesIO")[0].strip())


MARKER = "<image>"  # of LLaVA and LLaMA-Factory, in the text of a user


def place_pictures(messages: list[Message], row: Mapping[str, Any], note: Note) -> list[Any]:
    """One picture for each image part, in order, as the row gives it; the parts end as {"type": "image"} alone.

    Pictures are held by the parts themselves, or by the row: then there is a part or a marker `<image>` for each. The
    markers become parts, in place. A single `image` that has neither stands before the first text of the user.
    """
    key, given = _of_row(row)
    if given and not any(image_parts(messages)):
        num_markers = sum(text_of(message).count(MARKER) for message in messages if message["role"] == "user")
        if num_markers and num_markers != len(given):
            raise DataError(f"has {num_markers} markers `{MARKER}` for {len(given)} `{key}`; one marker for each")
        if num_markers:
            note(f"markers `{MARKER}` in the text are read as the places of pictures")
            _split_markers(messages)
        elif key == "image":
            note(f"`image` without a marker `{MARKER}` is put before the first text of the user")
            _put_first(messages, len(given))
    if any(MARKER in text_of(message) for message in messages):
        note(f"the letters `{MARKER}` stand in texts and stay text: no picture of the row belongs to them")
    return _assign(messages, key, given)


def _of_row(row: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The pictures that the row itself gives, and the key that they are under."""
    images, image = row.get("images"), row.get("image")
    if images is not None and not isinstance(images, list | tuple):
        raise DataError(f"`images` is a {type(images).__name__}, must be a list")
    if isinstance(image, str | list | tuple) and not image:
        image = None
    if image is None:
        return "images", list(images or ())
    if images:
        raise DataError("has both `image` and `images`; keep one of them")
    return "image", list(image) if isinstance(image, list | tuple) else [image]


def _assign(messages: list[Message], key: str, given: list[Any]) -> list[Any]:
    parts = list(image_parts(messages))
    bare = [part for part in parts if "picture" not in part]
    if len(bare) != len(given):
        own = f"; {len(parts) - len(bare)} parts (`image_url` and the like) hold their own" if bare != parts else ""
        raise DataError(f'has {len(bare)} parts {{"type": "image"}} for {len(given)} `{key}`; one part for each{own}')
    rest, placed, number = iter(given), [], 0
    for part in parts:
        if "picture" in part:
            placed.append(part.pop("picture"))
            continue
        index = part.pop("index", number)
        if isinstance(index, bool) or index != number:
            raise DataError(f"image part {number} has `index` `{shown(index)}`; pictures are taken in their order")
        number += 1
        placed.append(next(rest))
    return placed


def _split_markers(messages: list[Message]) -> None:
    for message in messages:
        if message["role"] != "user":
            continue
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] != "text":
                parts.append(part)
                continue
            for number, text in enumerate(part["text"].split(MARKER)):
                parts += [{"type": "image"}] if number else []
                parts += [{"type": "text", "text": text}] if text else []
        message["content"] = parts


def _put_first(messages: list[Message], num_images: int) -> None:
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        raise DataError("has an `image` and no message of the user to put it into")
    first["content"] = [*({"type": "image"} for _ in range(num_images)), *first["content"]]
