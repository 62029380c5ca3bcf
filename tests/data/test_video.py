"""Videos as pictures: which frames are shown, and that they are those of the file; rows that hold videos."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlsi_cache.config.sections import VideoSpec
from vlsi_cache.data import video
from vlsi_cache.data.video import Frame, chosen_times, load_frames, thinned
from vlsi_cache.errors import DataError

av = pytest.importorskip("av")
BITS = 8  # of a frame's number, which is written into the frame in stripes


def save_video(path: Path, *, num_frames: int, rate: int = 10, size: tuple[int, int] = (64, 48), gop: int = 12) -> Path:
    """Each frame shows its own number: a black or white stripe for each bit."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", gop
        for number in range(num_frames):
            bits = [255 * (number >> bit & 1) for bit in range(BITS)]
            pixels = np.broadcast_to(np.repeat(bits, size[0] // BITS)[None, :, None], (size[1], size[0], 3))
            pixels = np.ascontiguousarray(pixels, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(frames: list[Any]) -> list[int]:
    """Which frame each picture is."""
    stripes = [np.asarray(frame.open()).mean((0, 2)).reshape(BITS, -1).mean(1) > 128 for frame in frames]
    return [sum(1 << bit for bit in range(BITS) if stripe[bit]) for stripe in stripes]


def test_frames_are_those_in_the_middle_of_equal_stretches(tmp_path: Path) -> None:
    file = save_video(tmp_path / "a.mp4", num_frames=30)  # 3 seconds
    frames = load_frames(file, VideoSpec(fps=1, max_frames=8))
    assert numbers(frames) == [5, 15, 25]
    assert [frame.size for frame in frames] == [(64, 48)] * 3
    assert len({frame.sha256 for frame in frames}) == 3
    assert numbers(load_frames(file, VideoSpec(fps=10, max_frames=5))) == [3, 9, 15, 21, 27]
    assert numbers(load_frames(file, VideoSpec(fps=0.1))) == [15]  # one at least
    # The same video under another name has the same frames; another choice has others.
    (tmp_path / "b.mp4").write_bytes(file.read_bytes())
    assert load_frames(tmp_path / "b.mp4", VideoSpec()) == load_frames(file, VideoSpec())
    assert {one.sha256 for one in load_frames(file, VideoSpec(fps=2))}.isdisjoint(frame.sha256 for frame in frames)


def test_a_long_video_is_not_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames far ahead are looked for from the keyframe before them, and are the same ones."""
    file = save_video(tmp_path / "a.mp4", num_frames=36, rate=1, gop=4)
    rule = VideoSpec(fps=1, max_frames=3)
    wanted = [6, 18, 30]
    assert numbers(load_frames(file, rule)) == wanted
    seeks: list[int] = []
    found = video._frames

    def counted(container: Any, stream: Any, times: Any) -> Any:
        class Counting:
            def seek(self, *args: Any, **options: Any) -> None:
                seeks.append(args[0])
                container.seek(*args, **options)

            def decode(self, stream: Any) -> Any:
                return container.decode(stream)

        return found(Counting(), stream, times)

    monkeypatch.setattr(video, "_frames", counted)
    video._decoded.cache_clear()
    assert numbers(load_frames(file, rule)) == wanted
    assert len(seeks) >= 3


def test_the_times_of_frames() -> None:
    assert chosen_times(10, VideoSpec(fps=0.2)) == (2.5, 7.5)
    assert chosen_times(3600, VideoSpec(fps=1, max_frames=4)) == (450, 1350, 2250, 3150)
    assert chosen_times(0, VideoSpec()) == (0,)
    assert thinned(list("abcdefghij"), VideoSpec(max_frames=3)) == ["b", "f", "i"]
    assert thinned(["a"], VideoSpec()) == ["a"]


def test_a_turned_video_is_shown_upright(tmp_path: Path) -> None:
    (frame, *_) = load_frames(save_video(tmp_path / "a.mp4", num_frames=3), VideoSpec())
    assert frame.size == (64, 48)

    class Turned:
        rotation = 90

        def to_image(self) -> Image.Image:
            return Image.new("RGB", (64, 48))

    assert video._upright(Turned()).size == (48, 64)


def test_a_frame_is_a_picture_that_can_be_written(tmp_path: Path) -> None:
    (frame,) = load_frames(save_video(tmp_path / "a.mp4", num_frames=10), VideoSpec())
    assert frame.read().startswith(b"\x89PNG")
    assert isinstance(frame, Frame)


def test_a_video_that_changes_is_noticed(tmp_path: Path) -> None:
    file = save_video(tmp_path / "a.mp4", num_frames=10)
    (frame,) = load_frames(file, VideoSpec())
    frame.open()
    save_video(file, num_frames=20)
    with pytest.raises(DataError, match=r"video `.*a\.mp4` has changed since the rows were read; start again"):
        frame.open()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no video at all", "is no video that can be read"),
        (b"", "is no video that can be read"),
        (b"#EXTM3U\n#EXTINF:1,\na.mp4\n", "is no video that can be read"),  # a list of other files
    ],
)
def test_what_is_no_video(tmp_path: Path, content: bytes, message: str) -> None:
    save_video(tmp_path / "a.mp4", num_frames=3)
    (tmp_path / "x.m3u8").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_frames(tmp_path / "x.m3u8", VideoSpec())


def test_a_video_that_is_cut_off_is_named(tmp_path: Path) -> None:
    whole = save_video(tmp_path / "a.mkv", num_frames=250).read_bytes()
    (tmp_path / "b.mkv").write_bytes(whole[: len(whole) * 4 // 5])
    frames = load_frames(tmp_path / "b.mkv", VideoSpec())
    with pytest.raises(DataError, match=r"video `.*b\.mkv` is cut off: it ends before second"):
        frames[-1].open()


def test_without_pyav_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_video(tmp_path / "a.mp4", num_frames=3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"needs PyAV: pip install 'vlsi-cache\[video\]'"):
        load_frames(file, VideoSpec())
    os.mkfifo(tmp_path / "p")
    with pytest.raises(DataError, match="is a named pipe, not a file"):
        load_frames(tmp_path / "p", VideoSpec())
