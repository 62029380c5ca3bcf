"""Rows in, records out: every way a row can be wrong is named, and nothing disappears in silence."""

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlsi_cache.config.sections import DataSpec
from vlsi_cache.data import reading, sources
from vlsi_cache.data.records import RecordSet, read_records
from vlsi_cache.data.writing import as_base64, write_rows
from vlsi_cache.errors import DataError


def picture(width: int = 8, height: int = 6, *, mode: str = "RGB", form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 7).save(buffer, format=form, **options)
    return buffer.getvalue()


PNG = picture()
ASK = {"role": "user", "content": "What is it?"}
SEE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
TELL = {"role": "assistant", "content": "A cat."}
GOOD = {"id": "good", "messages": [ASK, TELL]}


def read(rows: list[Any], folder: Path, **options: Any) -> RecordSet:
    path = folder / "rows.jsonl"
    write_rows(rows, path)
    return read_records(DataSpec(path=str(path), **options))


def seen(image: Any, **more: Any) -> dict[str, Any]:
    return {"id": "seen", "messages": [SEE, TELL], "images": [image], **more}


# --- what a record is -----------------------------------------------------------------------------------------------


def test_record(tmp_path: Path) -> None:
    row = seen({"bytes": PNG}, system="Be short.", kind="pet", extra={"ignored": 1})
    (record,) = read([row], tmp_path)
    assert (record.id, record.kind, record.answer) == ("seen", "pet", "A cat.")
    assert [message["role"] for message in record.prompt_messages] == ["system", "user"]
    assert record.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert record.images[0].size == (8, 6)
    assert record.images[0].open().mode == "RGB"
    assert record.images[0].sha256 == hashlib.sha256(PNG).hexdigest()


def test_digest_is_of_content_alone(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}, TELL]
    (tmp_path / "cat.png").write_bytes(PNG)
    rows = [
        GOOD,
        {"id": "b", "kind": "x", "messages": parts},
        {"id": "c", "messages": [{"role": "system", "content": "s"}, ASK, TELL]},
        {"id": "d", "system": "s", "messages": [ASK, TELL]},
        {**seen("cat.png"), "id": "e"},
        {**seen({"bytes": PNG}), "id": "f"},
        {**seen({"bytes": picture(9, 6)}), "id": "g"},
    ]
    a, b, c, d, e, f, g = (record.digest for record in read(rows, tmp_path))
    assert (a, c, e) == (b, d, f)
    assert len({a, c, e, g}) == 4


def test_digests_are_of_one_way_to_write_json(tmp_path: Path) -> None:
    """Keys in order, nothing between them, letters as they are: of the sample, and of what is before its answer."""
    messages = [{"role": "system", "content": 'a "rule"\n'}, {"role": "user", "content": "\u00e9?"}, TELL]
    tools, args = [{"type": "function", "name": "x"}], {"b": 1.5, "a": [True]}
    rows = [{"messages": messages, "tools": tools, "chat_template_kwargs": args}, {"messages": [ASK, TELL, ASK, TELL]}]
    whole, first, second = read(rows, tmp_path)
    for record, more in ((whole, {"tools": tools, "template_args": args}), (first, {}), (second, {})):
        pairs = ((record.messages, record.digest), (record.messages[:-1], record.opening))
        for said, digest in pairs:
            content = {"images": [], "messages": said, **more}
            text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
            assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)
    assert len(second.messages) == 4


def test_the_bytes_of_one_picture_are_kept_once(tmp_path: Path) -> None:
    """However they are written, and in however many rows: several responses to one picture take no more memory."""
    forms = [{"bytes": PNG}, {"bytes": base64.b64encode(PNG).decode()}, {"bytes": picture(9, 6)}, {"bytes": PNG}]
    write_rows([{**seen(one), "id": str(i)} for i, one in enumerate(forms)], tmp_path / "rows.parquet")
    images = [record.images[0] for record in read_records(DataSpec(path=str(tmp_path / "rows.parquet")))]
    assert [image.read() for image in images] == [PNG, PNG, picture(9, 6), PNG]
    assert {image.data for image in images} == {None}  # they are read again from the file
    assert len({id(image) for image in images}) == 2


def test_id_defaults_to_digest(tmp_path: Path) -> None:
    (record,) = read([{"messages": [ASK, TELL]}], tmp_path)
    assert record.id == record.digest[:16]


def test_number_as_id(tmp_path: Path) -> None:
    assert read([{**GOOD, "id": 0}], tmp_path)[0].id == "0"


def test_unicode_survives(tmp_path: Path) -> None:
    text = "\u732b \U0001f408\u200d\u2b1b caf\u00e9 e\u0301 \u0627\n"
    (record,) = read([{"messages": [ASK, {"role": "assistant", "content": text}]}], tmp_path)
    assert record.answer == text


def test_parquet_equals_jsonl(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(PNG)
    sha256 = hashlib.sha256(PNG).hexdigest()
    rows = [
        GOOD,
        {"messages": [ASK, TELL, ASK, {"role": "assistant", "content": "\U0001f408"}], "system": "s"},
        {**seen("cat.png"), "kind": "k"},
        {**seen({"bytes": PNG, "sha256": sha256.upper()}), "id": "bytes"},
        {**seen({"bytes": base64.b64encode(PNG).decode()}), "id": "base64"},
    ]
    assert write_rows(rows, tmp_path / "rows.parquet") == 5
    jsonl, parquet = read(rows, tmp_path), read_records(DataSpec(path=str(tmp_path / "rows.parquet")))
    assert list(jsonl) == list(parquet)
    assert jsonl.digest == parquet.digest
    assert jsonl.digest != RecordSet(jsonl[1:], []).digest


def test_parquet_with_plain_text_content(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"messages": [ASK, TELL], "score": 1.5}]), tmp_path / "a.parquet")
    assert read_records(DataSpec(path=str(tmp_path / "a.parquet")))[0].answer == "A cat."


def test_limit_counts_rows_of_the_source(tmp_path: Path) -> None:
    assert len(read([{**GOOD, "id": str(i)} for i in range(5)], tmp_path, limit=3)) == 3


def test_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert len(read_records(DataSpec(path=str(path)))) == 1


def test_write_is_whole_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_rows([GOOD], path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="a row holds a set"):
        write_rows([GOOD, {"messages": {1}}], path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_write_refuses_other_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must end in \.jsonl or \.parquet"):
        write_rows([GOOD], tmp_path / "a.csv")


# --- one bad row ----------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "no messages": ({"id": "x"}, "`messages` is missing or empty"),
    "empty messages": ({"messages": []}, "`messages` is missing or empty"),
    "not a mapping": ([1], "is a list, must be a mapping"),
    "turn not a mapping": ({"messages": ["hi"]}, "message 0 is a str"),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}, TELL]}, "message 0 has the unknown role `robot`"),
    "no content": ({"messages": [{"role": "user"}, TELL]}, "message 0 has content of type NoneType"),
    "no assistant": ({"messages": [ASK]}, "has no assistant message, so no response"),
    "assistant not last": ({"messages": [ASK, TELL, ASK]}, "the last message is of role `user`"),
    "no prompt": ({"messages": [TELL]}, "has no message before the response"),
    "empty response": ({"messages": [ASK, {"role": "assistant", "content": " \n\t"}]}, "the response is empty"),
    "response without parts": ({"messages": [ASK, {"role": "assistant", "content": []}]}, "the response is empty"),
    "image in response": (
        {"messages": [ASK, {"role": "assistant", "content": [{"type": "image"}]}], "images": [{"bytes": "AA=="}]},
        "the response holds an image",
    ),
    "two system texts": (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, ASK, TELL]},
        "has both `system` and a system message",
    ),
    "unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}, TELL]},
        "message 0 has a part of the unknown type `audio`",
    ),
    "text part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}, TELL]},
        "a text part of message 0 is a NoneType, must be a text",
    ),
    "video part": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}, TELL]},
        'has 1 parts {"type": "video"} for 0 `videos`',
    ),
    "videos": ({**GOOD, "videos": [{"path": "a.mp4"}]}, "has 0 markers `<video>` for 1 `videos`; one marker for each"),
    "half a surrogate pair": (
        {"messages": [ASK, {"role": "assistant", "content": "ab\ud83d"}]},
        "holds half a surrogate pair at character 2",
    ),
    "bad id": ({**GOOD, "id": ["a"]}, "`id` is ['a'], must be a text"),
    "empty id": ({**GOOD, "id": ""}, "`id` is '', must be a text"),
    "bad kind": ({**GOOD, "kind": 3}, "`kind` is a int, must be a text"),
    "bad system": ({**GOOD, "system": 3}, "`system` is a int, must be a text"),
    "more images than parts": ({**GOOD, "images": ["a.png"]}, 'has 0 parts {"type": "image"} for 1 `images`'),
    "more parts than images": ({"messages": [SEE, TELL]}, 'has 1 parts {"type": "image"} for 0 `images`'),
    "images not a list": ({"messages": [SEE, TELL], "images": "a.png"}, "`images` is a str, must be a list"),
    "image of no kind": (seen(3), "image 0 is a int, must be a path"),
    "image without source": (seen({"sha256": "x"}), "image 0 has neither `path` nor `bytes`"),
    "missing image": (seen("cat.png"), "image 0 `cat.png` does not exist in"),
    "web address": (seen("https://example.org/cat.png"), "is a web address, and nothing is downloaded"),
    "folder as image": (seen("."), "image 0 `.` is a folder, not a file"),
    "impossible path": (seen("a\0b"), "is no usable path"),
    "too long a path": (seen("a" * 5000), "is no usable path"),
    "no base64": (seen({"bytes": "@@@"}), "image 0 `bytes` is not base64 text"),
    "no image file": (seen({"bytes": b"hello"}), "image 0 cannot be decoded: it is no picture that is known here; PNG"),
    "truncated png": (seen({"bytes": picture(64, 64)[:-30]}), "image 0 cannot be decoded"),
    "truncated jpeg": (seen({"bytes": picture(64, 64, form="JPEG")[:-200]}), "image 0 cannot be decoded"),
    "deep pixels": (seen({"bytes": picture(mode="I;16")}), "image 0 has pixels of mode `I;16`"),
    "wrong digest": (seen({"bytes": PNG, "sha256": "0" * 64}), "the row says 000000000000..."),
    "above the folder": (seen("../cat.png"), "lies outside the media folder"),
    "absolute path": (seen("/etc/hostname"), "lies outside the media folder"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row(name: str, tmp_path: Path) -> None:
    row, reason = BAD_ROWS[name]
    folder = tmp_path / "rows"
    folder.mkdir()
    (tmp_path / "cat.png").write_bytes(PNG)
    (folder / "rows.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(row, default=as_base64) + "\n")
    data = DataSpec(path=str(folder / "rows.jsonl"))
    with pytest.raises(DataError) as caught:
        read_records(data)
    line = str(caught.value).splitlines()[1]
    assert line.startswith("  - rows.jsonl:2: ")
    assert reason in line
    records = read_records(data.model_copy(update={"bad_rows": "list"}))
    assert [record.id for record in records] == ["good"]
    assert len(records.skipped) == 1
    assert reason in records.skipped[0]["reason"]


def test_animation_is_refused(tmp_path: Path) -> None:
    frames = [Image.new("L", (4, 4), shade) for shade in (0, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="image 0 has 2 frames, must be one picture"):
        read([seen({"bytes": buffer.getvalue()})], tmp_path)


def test_huge_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(DataError, match="exceeds limit of 40 pixels"):
        read([seen({"bytes": PNG})], tmp_path)


def test_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (tmp_path / "cat.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "cat.png")
    with pytest.raises(DataError, match=r"`link\.png` lies outside the media folder"):
        read([seen("link.png")], folder)
    assert len(read([seen("rows/link.png")], folder, media_root=str(folder / ".."))) == 1


def test_media_root_and_inner_dots(tmp_path: Path) -> None:
    media = tmp_path / "media" / "a"
    media.mkdir(parents=True)
    (media / "cat.png").write_bytes(PNG)
    rows = [seen("a/../a/cat.png"), {**seen(str(media / "cat.png")), "id": "absolute"}]
    records = read(rows, tmp_path, media_root=str(tmp_path / "media"))
    assert {record.images[0].path for record in records} == {media / "cat.png"}


def test_camera_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (record,) = read([seen({"bytes": picture(8, 6, form="JPEG", exif=exif)})], tmp_path)
    assert record.images[0].size == record.images[0].open().size == (6, 8)


def test_changed_image_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(PNG)
    (record,) = read([seen("cat.png")], tmp_path)
    (tmp_path / "cat.png").write_bytes(picture(9, 9))
    with pytest.raises(DataError, match="has changed since the rows were read"):
        record.images[0].open()


def test_one_file_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cat.png").write_bytes(PNG)
    opened: list[object] = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    read([{**seen("cat.png"), "id": str(i)} for i in range(3)], tmp_path)
    assert len(opened) == 1


def test_duplicate_ids(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2: id `good` was used before, at rows\.jsonl:1"):
        read([GOOD, GOOD], tmp_path)
    assert read([GOOD, GOOD], tmp_path, bad_rows="list").skipped[0]["id"] == "good"


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read([GOOD, *[{"messages": []}] * 12], tmp_path)
    lines = str(caught.value).splitlines()
    assert "12 of 13 rows cannot be used; mend them" in lines[0]
    assert "data.bad_rows: list" in lines[0]
    assert len(lines) == 12
    assert lines[-1].endswith("and 2 more")


def test_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n{\xff}\n{oops\n")
    records = read_records(DataSpec(path=str(path), bad_rows="list"))
    assert [row["id"] for row in records.skipped] == ["a.jsonl:2", "a.jsonl:3"]
    assert records.skipped[0]["reason"] == "is not UTF-8 (byte 1 of the line)"
    assert records.skipped[1]["reason"].startswith("is not JSON: ")


# --- bad sources ----------------------------------------------------------------------------------------------------


def test_no_row_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 1 rows cannot be used; no row is left"):
        read([{"messages": []}], tmp_path, bad_rows="list")


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        read([], tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_records(DataSpec(path=str(tmp_path / "a.jsonl")))


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"a\.csv, a `\.csv` file; read are \.parquet, \.jsonl"):
        read_records(DataSpec(path=str(tmp_path / "a.csv")))


def test_missing_media_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`data\.media_root` is .*no such folder"):
        read([GOOD], tmp_path, media_root=str(tmp_path / "nowhere"))


def test_broken_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_records(DataSpec(path=str(tmp_path / "a.parquet")))


def test_parquet_without_messages(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column `messages`, only `text`; write `messages`"):
        read_records(DataSpec(path=str(tmp_path / "a.parquet")))


# --- generators -----------------------------------------------------------------------------------------------------


def cats(*, num_samples: int, fail: bool = False) -> Any:
    for index in range(num_samples):
        yield {"messages": [ASK, {"role": "assistant", "content": f"Cat {index}."}]}
    if fail:
        raise KeyError("dog")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = EntryPoint("cats", f"{__name__}:cats", sources.GENERATORS)
    gone = EntryPoint("gone", f"{__name__}:gone", sources.GENERATORS)
    monkeypatch.setattr(sources, "entry_points", lambda *, group: [here, gone] if group == sources.GENERATORS else [])


@pytest.mark.usefixtures("installed")
def test_generator() -> None:
    records = read_records(DataSpec(generator="cats", options={"num_samples": 5}, limit=3))
    assert [record.answer for record in records] == ["Cat 0.", "Cat 1.", "Cat 2."]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dogs", {}, "no generator `dogs`; installed: cats, gone"),
        ("gone", {}, "generator `gone` .* cannot be loaded"),
        (
            "cats",
            {"num_samples": 1, "colour": "red"},
            "got an unexpected keyword argument 'colour'; it takes .*num_samples",
        ),
        ("cats", {}, "missing a required argument: 'num_samples'"),
        ("cats", {"num_samples": 2, "fail": True}, "generator `cats` failed after 2 rows: KeyError: 'dog'"),
    ],
)
def test_bad_generator(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_records(DataSpec(generator=name, options=options))


@pytest.mark.usefixtures("installed")
def test_path_out_of_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "cats", lambda: [seen("cat.png")])
    with pytest.raises(DataError, match=r"`cat\.png` is a path, and data\.media_root is not set"):
        read_records(DataSpec(generator="cats"))


def test_demo_generator_is_installed() -> None:
    pytest.importorskip("vlsi_cache.demo.data")
    records = read_records(DataSpec(generator="demo", options={"split": "heldout", "num_samples": 3}))
    assert [len(record.images) for record in records] == [1, 1, 1]


def test_rows_of_a_generator_are_made_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same options; the function itself counts, not its name."""
    calls = []

    def counted(num_samples: int) -> Iterator[dict[str, Any]]:
        calls.append(num_samples)
        yield from cats(num_samples=num_samples)

    monkeypatch.setattr(sources, "installed_generator", lambda _: counted)
    monkeypatch.setattr(reading, "installed_generator", lambda _: counted)
    data = DataSpec(generator="cats", options={"num_samples": 4})
    first, second = read_records(data), read_records(data)
    assert calls == [4]
    assert [(one.id, one.digest, one.messages) for one in first] == [
        (one.id, one.digest, one.messages) for one in second
    ]
    assert len(read_records(data.model_copy(update={"limit": 2}))) == 2
    assert len(read_records(DataSpec(generator="cats", options={"num_samples": 5}))) == 5
    assert calls == [4, 4, 5]
    monkeypatch.setattr(reading, "REMEMBERED_BYTES", 0)
    for _ in range(2):
        read_records(DataSpec(generator="cats", options={"num_samples": 6}))
    assert calls == [4, 4, 5, 6, 6]
