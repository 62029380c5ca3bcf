"""Where rows lie: shards, globs, compressed files, folders of `datasets`; and what is refused without being opened."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlsi_cache.config.sections import DataSpec
from vlsi_cache.config.spec import load_spec
from vlsi_cache.data import sources as readers
from vlsi_cache.data.images import Shelf, decode_image, load_media, picture_size
from vlsi_cache.data.records import RecordSet, read_records
from vlsi_cache.data.writing import write_rows
from vlsi_cache.errors import DataError, SpecError

ROOT = Path(__file__).parents[2]
SAVED = ROOT / "tests" / "golden" / "saved-to-disk"  # by datasets 5.2.0: three rows with pictures in two shards


def picture(shade: int = 7, form: str = "PNG", size: tuple[int, int] = (8, 6), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 7, 7)).save(buffer, format=form, **options)
    return buffer.getvalue()


def row(number: int, **more: Any) -> dict[str, Any]:
    ask, tell = {"role": "user", "content": f"And {number}?"}, {"role": "assistant", "content": "Yes."}
    return {"id": str(number), "messages": [ask, tell], **more}


def seen(number: int, image: Any) -> dict[str, Any]:
    ask = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"And {number}?"}]}
    tell = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    return {"id": str(number), "messages": [ask, tell], "images": [image]}


def read(path: Path | str, **options: Any) -> RecordSet:
    return read_records(DataSpec(path=str(path), **options))


def ids(path: Path | str, **options: Any) -> list[str]:
    return [record.id for record in read(path, **options)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six rows in three shards of `train`, one in `test`."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        rows = [row(2 * number), row(2 * number + 1)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{number:05d}-of-00003.parquet")
    pq.write_table(pa.Table.from_pylist([row(9)]), folder / "test-00000-of-00001.parquet")
    return folder


# --- which files ----------------------------------------------------------------------------------------------------


def test_glob(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ids(shards / "train-*.parquet") == list("012345")
    assert ids(shards / "train-*.parquet", limit=3) == list("012")
    assert ids(shards / "train-0000[12]*") == list("2345")
    assert ids(f"{shards.parent}/**/test*.parquet") == ["9"]
    monkeypatch.chdir(shards)
    assert ids("train-*") == list("012345")


def test_folder(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        DataError, match=r"shards of 2 splits \(`test`, `train`\); name one .* such as test-\*\.parquet"
    ):
        read(shards)
    (shards / "test-00000-of-00001.parquet").unlink()
    (shards / "README.md").write_text("about")
    (shards / ".train.tmp-1.parquet").write_text("half")
    assert ids(shards) == list("012345")
    assert "shards" not in capsys.readouterr().err
    (shards / "train-00001-of-00003.parquet").unlink()
    assert ids(shards) == list("0145")
    assert "2 of the 3 shards of `train` are read" in capsys.readouterr().err
    write_rows([row(7)], shards / "more.jsonl")
    with pytest.raises(DataError, match=r"1 \.jsonl, 2 \.parquet files; name those of one kind"):
        read(shards)


def test_pictures_of_a_folder_lie_below_it(tmp_path: Path) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "a.png").write_bytes(picture())
    for number in range(2):
        write_rows([seen(number, "images/a.png")], tmp_path / "data" / f"{number}.jsonl")
    for path in (tmp_path / "data", tmp_path / "data" / "*.jsonl", tmp_path / "data" / "0.jsonl"):
        assert read(path)[0].images[0].path == (tmp_path / "data" / "images" / "a.png").resolve()


def test_rows_of_shards_are_named_by_their_file(shards: Path) -> None:
    bad = {"id": "bad", "messages": row(0)["messages"][:1]}
    pq.write_table(pa.Table.from_pylist([row(7), bad]), shards / "train-00001-of-00003.parquet")
    with pytest.raises(DataError, match=r"1 of 6 rows .*\n  - train-00001-of-00003\.parquet row 1: has no assistant"):
        read(shards / "train-*")


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_lines(kind: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps(seen(n, {"bytes": None, "path": "a.png"})) + "\r\n" for n in range(40)).encode()
    (tmp_path / "a.png").write_bytes(picture())
    file = tmp_path / f"rows.jsonl.{kind}"
    if kind == "gz":
        file.write_bytes(gzip.compress(lines))
    else:
        with pa.CompressedOutputStream(str(file), "zstd") as stream:
            stream.write(lines)
    assert ids(file) == [str(number) for number in range(40)]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"rows\.jsonl\..* cannot be read as (gzip|Zstandard)"):
        read(file)
    file.write_bytes(b"plain")
    with pytest.raises(DataError, match=r"rows\.jsonl\..* cannot be read as (gzip|Zstandard)"):
        read(file)


def test_json_list(tmp_path: Path) -> None:
    """As LLaVA's files are; a bad row is one bad row."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row(0), row(1), row(2)], indent=1), encoding="utf-8-sig")
    assert ids(file) == list("012")
    file.write_text(f'[{json.dumps(row(0))}, {{"id": {"9" * 6000}}}, {json.dumps(row(2))}]')
    found = read(file, bad_rows="list")
    assert [record.id for record in found] == ["0", "2"]
    assert found.skipped == [{"id": "rows.json row 1", "reason": "holds a whole number of more than 4300 digits"}]
    file.write_text("\n".join(json.dumps(row(number)) for number in range(3)))
    assert ids(file) == list("012")
    for broken in ('[{"id": 1}', '[{"id": 1} {"id": 2}]', "[1] 2", "7", ""):
        file.write_text(broken)
        with pytest.raises(DataError, match=r"rows\.json (is not JSON|holds neither)"):
            read(file)


# --- folders of datasets --------------------------------------------------------------------------------------------


def test_saved_to_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The oracle is what `datasets` itself read there."""
    records = read(SAVED)
    texts = [[part.get("text") for message in r.messages for part in message["content"]] for r in records]
    assert texts == [[None, f"What is it {i}?", f"Picture {i}."] for i in range(3)]
    assert [record.id for record in records] == ["a", "b", "c"]
    assert [record.images[0].open().getpixel((0, 0)) for record in records] == [(40 * i, 9, 9) for i in range(3)]
    assert "not read: `score`" in capsys.readouterr().err
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        shutil.copytree(SAVED, tmp_path / split)
    with pytest.raises(DataError, match=r"a DatasetDict with the splits `test`, `train`; name one of them: .*/test"):
        read(tmp_path)
    (tmp_path / "test" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"state\.json names `data-00001-of-00002\.arrow`, which are not in its folder"):
        read(tmp_path / "test")
    (tmp_path / "test" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json is not the state of a folder of datasets\.save_to_disk"):
        read(tmp_path / "test")


def test_arrow_file(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([seen(n, {"bytes": picture(n), "path": None}) for n in range(5)])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    records = read(tmp_path / "a.arrow")
    assert [record.images[0].read() for record in records] == [picture(n) for n in range(5)]


# --- pictures in files are read again, not kept ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow"])
def test_pictures_are_read_again(kind: str, tmp_path: Path) -> None:
    pictures = [picture(n) for n in range(9)]
    rows = [seen(n, {"bytes": one}) for n, one in enumerate(pictures)]
    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    else:
        write_rows(rows, file)
    records = read(file)
    images = [record.images[0] for record in records]
    assert {image.data for image in images} == {None}
    assert [image.read() for image in reversed(images)] == pictures[::-1]
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match=r"image 0 of rows\..* cannot be read again"):
        images[5].read()


def test_another_picture_in_its_place(tmp_path: Path) -> None:
    write_rows([seen(0, {"bytes": picture()})], tmp_path / "rows.parquet")
    image = read(tmp_path / "rows.parquet")[0].images[0]
    write_rows([seen(0, {"bytes": picture(9)})], tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"the image of sha256 .* has changed since the rows were read"):
        image.read()


def test_pictures_of_huge_row_groups_go_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_MAX_GROUP_BYTES", 10)
    monkeypatch.setattr(Shelf.__init__, "__defaults__", (150,))
    pictures = [picture(n) for n in range(5)]
    write_rows([seen(n, {"bytes": one}) for n, one in enumerate(pictures)], tmp_path / "rows.parquet")
    images = [record.images[0] for record in read(tmp_path / "rows.parquet")]
    (tmp_path / "rows.parquet").unlink()
    assert [image.read() for image in images] == pictures
    assert [image.data is None for image in images] == [False, True, True, True, True]


def test_plain_bytes_in_parquet(tmp_path: Path) -> None:
    """`images: list<binary>`, and a single struct `image` as `datasets` writes it."""
    marked = [{"role": "user", "content": "<image>What?"}, row(0)["messages"][1]]
    pq.write_table(pa.Table.from_pylist([{"messages": marked, "images": [picture()]}]), tmp_path / "a.parquet")
    one = {"messages": marked, "image": {"bytes": picture(), "path": "elsewhere.png"}}
    pq.write_table(pa.Table.from_pylist([one]), tmp_path / "b.parquet")
    a, b = read(tmp_path / "a.parquet")[0], read(tmp_path / "b.parquet")[0]
    assert a.digest == b.digest
    assert a.images[0].read() == b.images[0].read() == picture()


def test_nulls_of_one_schema_are_not_there(tmp_path: Path) -> None:
    call = {"function": {"name": "look", "arguments": {"where": "there"}}}
    other = {"function": {"name": "say", "arguments": {"what": "yes"}}}
    ask, tell = row(0)["messages"]
    rows = [
        {"id": str(n), "messages": [ask, {"role": "assistant", "content": None, "tool_calls": [c]}, tell], "tools": [c]}
        for n, c in enumerate((call, other))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write_rows(rows, tmp_path / "rows.jsonl")
    parquet, jsonl = read(tmp_path / "rows.parquet"), read(tmp_path / "rows.jsonl")
    assert [record.messages for record in parquet] == [record.messages for record in jsonl]
    assert parquet[0].tools == [call]
    assert parquet.digest == jsonl.digest


# --- one bad row ----------------------------------------------------------------------------------------------------


def test_lines_that_no_reader_takes(tmp_path: Path) -> None:
    good = [json.dumps(row(n, score=float("nan"))) for n in range(2)]
    bad = [
        '{"id": ' + "9" * 6000 + "}",
        "[" * 100_000,
        '{"id": NaN, "messages": ' + json.dumps(row(0)["messages"]) + "}",
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join([good[0], *bad, good[1]]))
    found = read(tmp_path / "rows.jsonl", bad_rows="list")
    assert [record.id for record in found] == ["0", "1"]
    assert [one["reason"] for one in found.skipped] == [
        "holds a whole number of more than 4300 digits",
        "is not JSON that can be read: it is nested too deeply",
        "`id` is nan, must be a text or a whole number",
    ]


# --- not opened -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pipe.jsonl", "a named pipe; read are"),
        ("/dev/null", "a device; read are"),
        ("nowhere.jsonl", "no such file or folder"),
        ("nowhere-*.jsonl", "it matches no file"),
        ("*.csv", "none of the 1 names that it matches can be read"),
        ("empty", "a folder that holds nothing; read are"),
        ("other", "a folder that holds only `a.txt`; read are"),
        ("x\0.jsonl", "embedded null"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_no_source(name: str, reason: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a.csv").touch()
    for folder in ("empty", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "other" / "a.txt").touch()
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 900


def test_pictures_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name, reason in (("pipe.png", "is a named pipe, not a file"), ("device.png", "lies outside the media folder")):
        with pytest.raises(DataError, match=reason):
            load_media(name, root=tmp_path.resolve(), known={})


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(("data", "name"), [(EPS, "EPS"), (b"P6\n1 1\n255\nabc", "PPM"), (b"8BPS" + bytes(30), "PSD")])
def test_other_formats_are_not_opened(data: bytes, name: str) -> None:
    with pytest.raises(DataError, match=f"it is a file of format {name}; PNG, JPEG, WebP, GIF, BMP and TIFF are read"):
        decode_image(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
def test_formats_that_are_read(form: str) -> None:
    options = {"save_all": True, "append_images": [Image.new("RGB", (8, 6))]} if form == "MPO" else {}
    image = decode_image(picture(200, form, **options))
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert abs(image.getpixel((3, 3))[0] - 200) < 8  # type: ignore[index,operator]


# The most memory that decoding takes beyond what the process had before, in bytes of the picture's pixels.
_MEMORY = """
import io, re, sys
from pathlib import Path
from PIL import Image
from vlsi_cache.data.images import decode_image

def peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

exif, buffer, mode = Image.Exif(), io.BytesIO(), sys.argv[1]
exif[0x0112] = 6
Image.new(mode, (2400, 1600)).save(buffer, "JPEG" if mode == "CMYK" else "TIFF", exif=exif)
data = buffer.getvalue()
del buffer
Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
before = peak_bytes()
image = decode_image(data)
assert image.size == (1600, 2400)
print((peak_bytes() - before) / (3 * image.width * image.height))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK"])
def test_memory_of_a_picture(mode: str) -> None:
    """At most three times its pixels, also for a turned picture in another mode, by what the kernel counts.

    A process of its own, whose allocator gives every large block back at once: memory that other work left behind
    would hide what is used.
    """
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _MEMORY, mode]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) <= 3


# --- specs ----------------------------------------------------------------------------------------------------------


def test_spec_keeps_a_glob(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("name: t\nteacher: {model: x, layers: [2]}\ndata: {path: data/train-*.parquet}\n")
    wanted = str(shards / "train-*.parquet")
    assert load_spec(file).data.path == wanted
    monkeypatch.chdir(shards)
    assert load_spec(file, overrides=["data.path=train-*.parquet"]).data.path == wanted
    assert load_spec(file, overrides=["data.path=../data"]).data.path == str(shards)


# --- several files --------------------------------------------------------------------------------------------------


def test_a_list_of_files_and_globs(tmp_path: Path) -> None:
    """In the order of the list, of several kinds; each file once."""
    for folder, start in (("a", 0), ("b", 2)):
        (tmp_path / folder).mkdir()
        write_rows([row(start), row(start + 1)], tmp_path / folder / "rows.jsonl")
    write_rows([row(4)], tmp_path / "more.parquet")
    paths = [str(tmp_path / name) for name in ("b/*.jsonl", "more.parquet", "a/rows.jsonl")]
    assert [record.id for record in read_records(DataSpec(path=paths))] == ["2", "3", "4", "0", "1"]
    with pytest.raises(DataError, match=r"names .*/b/rows\.jsonl more than once"):
        read_records(DataSpec(path=[*paths, str(tmp_path / "b")]))
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file or folder"):
        read_records(DataSpec(path=[*paths, str(tmp_path / "nowhere.jsonl")]))
    # Files of one name are told apart, and no folder is guessed for pictures.
    write_rows([seen(0, "a.png")], tmp_path / "a" / "rows.jsonl")
    with pytest.raises(
        DataError, match=r"/a/rows\.jsonl:1: image 0 `a\.png` is a path, and data\.media_root is not set"
    ):
        read_records(DataSpec(path=paths))


def test_spec_keeps_a_list(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("name: t\nteacher: {model: x, layers: [2]}\ndata: {path: [data/train-*.parquet, data]}\n")
    assert load_spec(file).data.path == [str(shards / "train-*.parquet"), str(shards)]
    monkeypatch.chdir(tmp_path)
    assert load_spec(file, overrides=["data.path=[data]"]).data.path == [str(shards)]
    file.write_text("name: t\nteacher: {model: x, layers: [2]}\ndata: {path: [../rows.jsonl]}\n")
    with pytest.raises(SpecError, match=r"`data\.path`: `\.\./rows\.jsonl` leaves the spec's folder"):
        load_spec(file)


# --- headers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_header_says_the_size(form: str, orientation: int) -> None:
    """The oracle is the picture as it is decoded, turned as the camera says."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"save_all": True, "append_images": [Image.new("RGB", (8, 6))]} if form == "MPO" else {}
    options = more if form in ("GIF", "BMP") else {**more, "exif": exif}
    data = picture(200, form, **options)
    assert picture_size(data) == decode_image(data).size
    with pytest.raises(DataError, match="cannot be decoded"):
        picture_size(data[: len(data) // 2])


def test_a_picture_that_is_broken_in_its_middle(tmp_path: Path) -> None:
    """Its header is whole. With `bad_rows: list` it is found at once, else its row is named when it is used."""
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 90).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    write_rows([row(0), seen(1, {"bytes": bytes(data)})], tmp_path / "rows.jsonl")
    record = read(tmp_path / "rows.jsonl")[1]
    with pytest.raises(DataError, match=r"the image of sha256 .* cannot be decoded"):
        record.images[0].open()
    left = read(tmp_path / "rows.jsonl", bad_rows="list")
    assert [record.id for record in left] == ["0"]
    assert "image 0 cannot be decoded" in left.skipped[0]["reason"]
