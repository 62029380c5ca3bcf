"""Videos as pictures: which frames are shown, and that they are those of the file; rows that hold videos."""

import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlsi_cache as vc
from tests.helpers.tiny import write_jsonl
from vlsi_cache.config.sections import DataSpec, VideoSpec
from vlsi_cache.data import table, video
from vlsi_cache.data.encoder import load_encoder
from vlsi_cache.data.records import Record, RecordSet, read_records, row_of, write_rows
from vlsi_cache.data.sequence import Layout
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


def read(folder: Path, *rows: dict[str, Any], **options: Any) -> RecordSet:
    write_jsonl(folder / "rows.jsonl", list(rows))
    return read_records(DataSpec(path=str(folder / "rows.jsonl"), video={"max_frames": 3}, **options))


def asked(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "That."}], **more}


def kinds(record: Record) -> list[str]:
    return [part.get("text", part["type"]) for part in record.messages[0]["content"]]


def test_rows_with_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_video(tmp_path / "a.mp4", num_frames=30)
    save_video(tmp_path / "b.mp4", num_frames=10)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    video = {"type": "video"}
    records = read(
        tmp_path,
        asked("What?", video="a.mp4"),
        asked("<video>and <image>?<video>", videos=["a.mp4", {"path": "b.mp4"}], images=["red.png"]),
        asked([{**video, "video": "b.mp4"}, {"type": "text", "text": "What?"}]),
        asked([{"type": "video_url", "video_url": {"url": "b.mp4"}}, {"type": "text", "text": "So?"}]),
        asked([{"type": "text", "text": "What?"}, video], videos=[["red.png"] * 5]),
    )
    frame = ["image"]
    assert [kinds(record) for record in records] == [
        [*3 * frame, "What?"],
        [*3 * frame, "and ", "image", "?", *frame],
        [*frame, "What?"],
        [*frame, "So?"],
        ["What?", *3 * frame],
    ]
    assert numbers(list(records[0].images)) == [5, 15, 25]
    assert numbers([*records[1].images[:3], records[1].images[4]]) == [5, 15, 25, 5]
    assert records[1].images[3].size == (8, 8)
    assert records[0].images == records[1].images[:3]
    said = capsys.readouterr().err
    assert "videos are read as pictures: the frames that `data.video` chooses (5 rows)" in said
    assert "markers `<video>` in the text are read as the places of videos (1 row)" in said
    # What a generated file holds of it are pictures.
    write_rows([row_of(record) for record in records], tmp_path / "out.parquet")
    again = read_records(DataSpec(path=str(tmp_path / "out.parquet")))
    assert [kinds(record) for record in again] == [kinds(record) for record in records]
    assert numbers(list(again[0].images)) == [5, 15, 25]


def test_frames_are_found_again_in_kept_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(table.VARIABLE, str(tmp_path / "tables"))
    monkeypatch.setattr(table, "WORTH_S", 0)
    save_video(tmp_path / "a.mp4", num_frames=30)
    row = asked("What?", video="a.mp4")
    first = read(tmp_path, row)
    load = video.load_frames
    monkeypatch.setattr(video, "load_frames", lambda *_: pytest.fail("looked at again"))
    again = read(tmp_path, row)
    assert again[0].images == first[0].images
    sent = pickle.loads(pickle.dumps(again[0]))  # noqa: S301 - as workers are given records
    assert numbers(list(sent.images)) == [5, 15, 25]
    # Another choice of frames, or another file of that name, are other rows.
    monkeypatch.setattr(video, "load_frames", load)
    other = read_records(DataSpec(path=str(tmp_path / "rows.jsonl"), video={"max_frames": 1}))
    assert (len(other[0].images), other[0].digest == first[0].digest) == (1, False)
    save_video(tmp_path / "a.mp4", num_frames=20)
    assert numbers(list(read(tmp_path, row)[0].images)) == [5, 15]


def test_kept_tables_know_a_video_by_each_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to another video, one of two copies that changes, a video that comes, and PyAV that comes."""
    monkeypatch.setenv(table.VARIABLE, str(tmp_path / "tables"))
    monkeypatch.setattr(table, "WORTH_S", 0)
    save_video(tmp_path / "a.mp4", num_frames=30)
    for name in ("b.mp4", "c.mp4"):
        (tmp_path / name).write_bytes((tmp_path / "a.mp4").read_bytes())
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    rows = [asked("What?", video=f"{name}.mp4", id=name) for name in ("link", "b", "c")]

    def lengths() -> list[int]:
        return [len(record.images) for record in read(tmp_path, *rows)]

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        patch.setattr("vlsi_cache.data.reading.version", lambda _: "none")
        with pytest.raises(DataError, match="needs PyAV"):
            lengths()
    assert lengths() == [3, 3, 3]
    save_video(tmp_path / "b.mp4", num_frames=20)
    assert lengths() == [3, 2, 3]
    (tmp_path / "link.mp4").unlink()
    with pytest.raises(DataError, match=r"`link\.mp4` does not exist"):
        lengths()
    (tmp_path / "link.mp4").symlink_to("b.mp4")
    assert lengths() == [2, 2, 3]


def test_the_sound_may_be_longer_and_the_video_may_begin_late(tmp_path: Path) -> None:
    """A Matroska file says how long its longest stream is, from 0 on."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=8000)
        sound.layout = "mono"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 12 * number, np.uint8), format="rgb24")
            frame.pts = 10 + number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for second in range(9):
            heard = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            heard.sample_rate, heard.pts = 8000, 8000 * second
            container.mux(sound.encode(heard))
        container.mux(sound.encode())
    frames = load_frames(tmp_path / "a.mkv", VideoSpec())
    assert [round(np.asarray(frame.open()).mean() / 12) for frame in frames] == [5, 15]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (asked("What?", video="none.mp4"), "video 0 `none.mp4` does not exist in"),
        (asked("What?", video="rows.jsonl"), "video 0 `rows.jsonl` is no video that can be read"),
        (asked("What?", video="https://a.b/c.mp4"), "video 0 `https://a.b/c.mp4` is a web address"),
        (asked("What?", videos=["a.mp4"]), "has 0 markers `<video>` for 1 `videos`; one marker for each"),
        (asked("<video>?", videos=["a.mp4", "a.mp4"]), "has 1 markers `<video>` for 2 `videos`"),
        (asked("What?", video="a.mp4", videos=["a.mp4"]), "has both `video` and `videos`; keep one of them"),
        (asked("What?", video={"bytes": "AAAA"}), "video 0 is neither a path nor a list of frames"),
        (asked([{"type": "video", "video": []}]), 'has 1 parts {"type": "video"} for 0 `videos`'),
        (asked("What?", video="../a.mp4"), "video 0 `../a.mp4` lies outside"),
    ],
)
def test_videos_that_cannot_be_read(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    save_video(tmp_path / "a.mp4", num_frames=3)
    with pytest.raises(DataError, match=re.escape(message)):
        read(tmp_path, row)


def test_a_video_that_is_cut_off_is_left_out(tmp_path: Path) -> None:
    whole = save_video(tmp_path / "a.mkv", num_frames=250).read_bytes()
    (tmp_path / "b.mkv").write_bytes(whole[: len(whole) // 2])
    rows = [asked("What?", id=name, video=f"{name}.mkv") for name in "ab"]
    found = read(tmp_path, *rows, bad_rows="list")
    assert [record.id for record in found] == ["a"]
    assert [row["id"] for row in found.skipped] == ["b"]
    assert "is cut off" in found.skipped[0]["reason"]


def test_a_model_sees_the_frames(tmp_path: Path) -> None:
    """As the same pictures in a row of their own, and the questions on one video share it."""
    save_video(tmp_path / "a.mp4", num_frames=30, size=(112, 56))
    records = list(read(tmp_path, asked("What is it?", video="a.mp4"), asked("And what is that?", video="a.mp4")))
    encoder = load_encoder(Path(vc.__file__).parent / "demo" / "teacher")
    first = encoder.encode(records[0])
    assert len(first.media["image_grid_thw"]) == 3
    write_rows([row_of(records[0])], tmp_path / "out.parquet")
    (pictures,) = read_records(DataSpec(path=str(tmp_path / "out.parquet")))
    same = encoder.encode(pictures)
    np.testing.assert_array_equal(first.input_ids, same.input_ids)
    np.testing.assert_array_equal(first.media["pixel_values"], same.media["pixel_values"])
    (both,) = encoder.encode_all(records, Layout(4096, branches=True))
    assert len(both.media["image_grid_thw"]) == 3


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
