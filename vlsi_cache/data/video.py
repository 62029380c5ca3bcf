"""Videos as pictures: a few frames of each, chosen once by a rule, stand where the video stood.

Teacher and student see the same frames, whatever their families make of pictures. The rule (`data.video`) goes by time
and not by the numbers of frames, which files state wrongly: n = fps x duration, at most `max_frames`, and frame i is
what is shown at the middle of the i-th of n equal stretches. Decoding is PyAV's.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from vlsi_cache.config.sections import VideoSpec
from vlsi_cache.errors import DataError

from .images import Media, file_inside, kind_of_file
from .messages import Message, Note
from .values import is_empty, shown

MARKER = "<video>"
SEEK_S = 2.0  # further ahead than this, the next frame is looked for from the keyframe before it
HELD_VIDEOS = 2  # whose frames stay decoded: a sample opens those of one after another
LEAST_SHOWN_S = 1.0  # for which the last frame of a file is taken to be shown, where its header does not say
# A file says what it is, and some kinds name further files or addresses to read: those are not opened.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif,asf"
_TURNED = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


Stamp = tuple[int, int]  # size and mtime_ns of a file
FramesOf = Callable[[Any], Sequence[Any]]


@dataclass(frozen=True)
class Clip:
    """A video file and the times, in seconds, of the frames that are shown of it; its `stamp` when it was read."""

    path: Path
    sha256: str
    times: tuple[float, ...]
    stamp: Stamp = field(compare=False)

    def check(self) -> None:
        """Raise DataError if the file is not the one that was read before."""
        stamp = _stamp(self.path)
        if stamp != self.stamp and _digest_at(self.path, stamp) != self.sha256:
            raise DataError(f"video `{self.path}` has changed since the rows were read; start again")


@dataclass(frozen=True)
class Frame(Media):
    """One frame as a picture; its digest is that of the video file and the frame's time."""

    clip: Clip = field(kw_only=True, repr=False, compare=False)
    number: int = field(kw_only=True, compare=False)

    def open(self) -> Image.Image:
        """The frame, upright and RGB; raises DataError if the file has changed."""
        self.clip.check()
        return _decoded(self.clip)[self.number]

    def read(self) -> bytes:
        """The frame as PNG."""
        buffer = io.BytesIO()
        self.open().save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def load_frames(path: Path, rule: VideoSpec) -> list[Media]:
    """The frames that `rule` chooses of a video file. Raises DataError, with the reason alone, for any other file."""
    stamp = _stamp(path)
    sha256 = _digest_at(path, stamp)
    with _opened(path) as (container, stream):
        times = chosen_times(_duration(container, stream), rule)
        first = next(_frames(container, stream, times[:1]), None)
    if first is None:
        raise DataError("has no frame that can be decoded")
    clip = Clip(path, sha256, times, stamp)
    digests = [frame_digest(sha256, time) for time in times]
    return [Frame(digest, first.size, clip=clip, number=number) for number, digest in enumerate(digests)]


def frame_digest(video_sha256: str, time: float) -> str:
    """What a frame is known by."""
    return hashlib.sha256(f"{video_sha256} {time!r}".encode()).hexdigest()


def chosen_times(duration: float, rule: VideoSpec) -> tuple[float, ...]:
    """The middles, in seconds, of as many equal stretches of the video as `rule` shows frames."""
    num_frames = max(1, min(round(duration * rule.fps), rule.max_frames))
    return tuple(round((number + 0.5) * duration / num_frames, 6) for number in range(num_frames))


def thinned(frames: Sequence[Any], rule: VideoSpec) -> list[Any]:
    """Of frames that are pictures already, at most `max_frames`, evenly spaced."""
    num_frames = min(len(frames), rule.max_frames)
    return [frames[int((number + 0.5) * len(frames) / num_frames)] for number in range(num_frames)]


@lru_cache(HELD_VIDEOS)
def _decoded(clip: Clip) -> list[Image.Image]:
    """All frames that are shown of a video, decoded together: a sample shows them all."""
    try:
        with _opened(clip.path) as (container, stream):
            frames = list(_frames(container, stream, clip.times))
    except DataError as error:
        raise DataError(f"video `{clip.path}` {error}") from None
    if len(frames) < len(clip.times):
        raise DataError(
            f"video `{clip.path}` is cut off: it ends before second {clip.times[len(frames)]:g}, and its header says "
            "that it is longer; mend it, or leave the row out"
        )
    return frames


class _opened:
    """`with _opened(path) as (container, stream)`: the first video stream; errors of PyAV as DataError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> tuple[Any, Any]:
        av = _pyav()
        try:
            self._container = av.open(
                str(self._path), options={"protocol_whitelist": "file", "format_whitelist": FORMATS}
            )
        except av.FFmpegError as error:
            raise DataError(f"is no video that can be read: {_reason(error)}") from None
        if not self._container.streams.video:
            self._container.close()
            raise DataError("has no video stream")
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        return self._container, stream

    def __exit__(self, kind: Any, error: BaseException | None, _trace: Any) -> None:
        self._container.close()
        if error is not None and isinstance(error, _pyav().FFmpegError):
            raise DataError(f"cannot be decoded: {_reason(error)}") from None


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise DataError("is a video, and reading videos needs PyAV: pip install 'vlsi-cache[video]'") from None
    return av


def _duration(container: Any, stream: Any) -> float:
    """Seconds, as the stream or the file says; counted where neither does."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    stated = None if container.duration is None else container.duration / 1e6
    start = _start(stream)
    if stated is not None and len(container.streams) == 1 and start == 0:
        return stated
    # What a file says is the end of its longest stream, which may be the sound. A file in which no stream ends there
    # is cut off, which is told when the frames are decoded.
    ends = _ends(container)
    if stated is not None and max(ends.values(), default=0.0) < stated - LEAST_SHOWN_S:
        return stated - start
    return max(0.0, ends.get(stream.index, start) - start)


def _start(stream: Any) -> float:
    return float((stream.start_time or 0) * stream.time_base)


def _ends(container: Any) -> dict[int, float]:
    """Seconds at which the last packets of all streams end, by the number of the stream; nothing is decoded."""
    ends: dict[int, float] = {}
    with _opened(Path(container.name)) as (again, same):
        # From the last keyframe of the video on: whatever ends with the file is behind it.
        _seek(again, same, (container.duration or 0) / 1e6)
        for packet in again.demux():
            if packet.pts is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                ends[packet.stream.index] = max(end, ends.get(packet.stream.index, 0.0))
    return ends


def _seek(container: Any, stream: Any, seconds: float) -> bool:
    """Go to the keyframe before; False for a file in which that is not possible."""
    try:
        container.seek(int(seconds / stream.time_base), stream=stream)
    except _pyav().FFmpegError:
        return False
    return True


def _frames(container: Any, stream: Any, times: Sequence[float]) -> Iterator[Image.Image]:
    """What is shown at each of the rising times; fewer where the file ends before."""
    start = _start(stream)
    decoder = container.decode(stream)
    current, following = None, next(decoder, None)
    for time in times:
        wanted = start + time
        is_far = following is not None and wanted - _begin(following) > SEEK_S
        if is_far and _seek(container, stream, wanted):
            decoder = container.decode(stream)
            current, following = None, next(decoder, None)
        while following is not None and (current is None or _begin(following) <= wanted):
            current, following = following, next(decoder, None)
        if current is None or (following is None and wanted > _end(current)):
            return
        yield _upright(current)


def _begin(frame: Any) -> float:
    return float(frame.time or 0.0)


def _end(frame: Any) -> float:
    lasts = float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0
    return _begin(frame) + max(LEAST_SHOWN_S, lasts)


def _upright(frame: Any) -> Image.Image:
    image = frame.to_image().convert("RGB")
    turn = _TURNED.get(int(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)


def _reason(error: BaseException) -> str:
    return shown(getattr(error, "strerror", None) or str(error))


def _stamp(path: Path) -> Stamp:
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    if kind_of_file(found.st_mode) != "file":
        raise DataError(f"is a {kind_of_file(found.st_mode)}, not a file")
    return found.st_size, found.st_mtime_ns


@lru_cache(1024)
def _digest_at(path: Path, _stamp: Stamp) -> str:
    """sha256 of a file that has this stamp."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None


def frames_of(entry: Any, rule: VideoSpec, *, root: Path | None, known: dict[Path, list[Media]]) -> Sequence[Any]:
    """The pictures for one video of a row: a path, {path}, or a list of frames that are pictures themselves.

    `known` remembers what has been looked at already, by its path.
    """
    if isinstance(entry, list | tuple):
        if not entry:
            raise DataError("has no frames")
        return thinned(entry, rule)
    text = entry.get("path") if isinstance(entry, Mapping) else entry
    if not isinstance(text, str) or not text:
        raise DataError("is neither a path nor a list of frames: save it as a file and name the file")
    if text[:8].lower().startswith(("http://", "https://")):
        raise DataError(f"`{shown(text)}` is a web address, and nothing is downloaded: save it and name the file")
    name = text.removeprefix("file://")
    file_inside(name, root)
    assert root is not None
    file = root / name  # a link stays one: it may point elsewhere the next time
    if file not in known:
        try:
            known[file] = load_frames(file, rule)
        except DataError as error:
            raise DataError(f"`{shown(text)}` {error}") from None
    return known[file]


# --- where videos stand in a row --------------------------------------------------------------------------------------


def split_video_markers(messages: list[Message], row: Mapping[str, Any], note: Note) -> None:
    """Turn the markers `<video>` of the user's texts into parts, where the row's videos have no parts of their own."""
    key, given = _of_row(row)
    if not given or any(_video_parts(messages)):
        return
    asked = [message for message in messages if message["role"] == "user"]
    num_markers = sum(part.get("text", "").count(MARKER) for message in asked for part in message["content"])
    if not num_markers and key == "video" and asked:
        note(f"`video` without a marker `{MARKER}` is put before the first text of the user")
        asked[0]["content"] = [*({"type": "video"} for _ in given), *asked[0]["content"]]
        return
    if num_markers != len(given):
        raise DataError(f"has {num_markers} markers `{MARKER}` for {len(given)} `{key}`; one marker for each")
    note(f"markers `{MARKER}` in the text are read as the places of videos")
    for message in asked:
        message["content"] = [piece for part in message["content"] for piece in _pieces(part)]


def _pieces(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if part["type"] != "text":
        yield part
        return
    for number, text in enumerate(part["text"].split(MARKER)):
        if number:
            yield {"type": "video"}
        if text:
            yield {"type": "text", "text": text}


def frames_for_videos(
    messages: list[Message],
    pictures: list[Any],
    row: Mapping[str, Any],
    frames_of: FramesOf,
    note: Note,
) -> list[Any]:
    """Put one image part for each frame in the place of every video part; `frames_of` gives those of an entry.

    `pictures` are those of the image parts so far, in order; returns them with the frames between them.
    """
    parts = list(_video_parts(messages))
    key, given = _of_row(row)
    bare = [part for part in parts if "clip" not in part]
    if len(bare) != len(given):
        raise DataError(f'has {len(bare)} parts {{"type": "video"}} for {len(given)} `{key}`; one part for each')
    if not parts:
        return pictures
    rest, left, placed, number = iter(given), iter(pictures), [], 0
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "video":
                try:
                    frames = frames_of(part["clip"] if "clip" in part else next(rest))
                except DataError as error:
                    raise DataError(f"video {number} {error}") from None
                number += 1
                content += ({"type": "image"} for _ in frames)
                placed += frames
                continue
            content.append(part)
            if part["type"] == "image":
                placed.append(next(left))
        message["content"] = content
    note("videos are read as pictures: the frames that `data.video` chooses")
    return placed


def _video_parts(messages: list[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        yield from (part for part in message["content"] if part["type"] == "video")


def _of_row(row: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The videos that the row itself gives, and the key that they are under."""
    videos, video = row.get("videos"), row.get("video")
    if videos is not None and not isinstance(videos, list | tuple):
        raise DataError(f"`videos` is a {type(videos).__name__}, must be a list")
    if is_empty(video):
        return "videos", list(videos or ())
    if videos:
        raise DataError("has both `video` and `videos`; keep one of them")
    return "video", [video]
