"""What was measured once is found again by the next command, says the same, and is never believed when it is wrong."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers.tiny import make_rows, save_tokenizer, write_jsonl
from vlsi_cache.config.sections import DataSpec
from vlsi_cache.data import checking, measuring, preparing, reading, stored, table
from vlsi_cache.data.encoder import Encoder, load_encoder
from vlsi_cache.data.measuring import fit_rows
from vlsi_cache.data.preparing import Preparer
from vlsi_cache.data.records import RecordSet, read_records, units
from vlsi_cache.data.workers import Workers
from vlsi_cache.errors import DataError, ModelError, RowError, WorkerDiedError


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of tables; sources of any size are kept."""
    monkeypatch.setenv(table.VARIABLE, str(tmp_path / "tables"))
    monkeypatch.setattr(table, "WORTH_S", 0)
    return tmp_path / "tables"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    LlamaConfig(num_hidden_layers=1).save_pretrained(folder)
    return load_encoder(folder)


BAD = {"id": "bad", "messages": [{"role": "user", "content": "and?"}]}
TURNS = {
    "id": "turns",
    "extra": 1,
    "messages": [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)],
}


def rows_of(folder: Path, num: int = 6) -> Path:
    return write_jsonl(folder / "rows.jsonl", [*make_rows(num), BAD, TURNS, make_rows(1)[0]])


def read(path: Path, **options: Any) -> RecordSet:
    return read_records(DataSpec(path=str(path), bad_rows="list", **options))


def forbid(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{name} is not to be called")

    monkeypatch.setattr(module, name, fail)


def everything(records: RecordSet) -> list[Any]:
    return [[(one, [image.read() for image in one.images]) for one in records], records.skipped, records.digest]


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "arrow", "parquet"])
def test_the_second_command_reads_no_row(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same records, the same bad rows and the same remarks, whatever the file is."""
    lines = rows_of(tmp_path).read_bytes()
    path, rows = tmp_path / f"same.{kind}", [json.loads(line) for line in lines.splitlines()]
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind in ("arrow", "parquet"):
        found = pa.Table.from_pylist([{"extra": None, "kind": None, **row} for row in rows])
        if kind == "parquet":
            pq.write_table(found, path)
        else:
            with pa.ipc.new_stream(str(path), found.schema) as writer:
                writer.write_table(found)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else lines.decode())
    first, told = everything(read(path)), capsys.readouterr().err
    forbid(monkeypatch, reading, "raw_rows")
    assert everything(read(path)) == first
    assert capsys.readouterr().err == told
    assert "each of the assistant's turns is a sample" in told
    assert "not read: `extra`" in told
    assert [one["id"] for one in first[1]] == ["bad", "row-0"]


def test_names_of_many_are_those_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of one table or two, in any order, in stretches that do not fit: as the records say, one by one."""
    monkeypatch.setattr(stored, "AT_ONCE", 3)
    first, second = rows_of(tmp_path), write_jsonl(tmp_path / "more.jsonl", make_rows(12)[7:])
    for found in (read(first, turns="all"), read_records(DataSpec(path=[str(first), str(second)], bad_rows="list"))):
        turned = found.take(np.array([4, 0, 6, 5, 9, 1][: len(found)]) % len(found))
        for records in (found, turned, turned.take(np.array([2, 0, 1]))):
            assert list(stored.names_of(records.records)) == [(one.id, one.digest, one.row) for one in records]
            lines = "\n".join(f"{one.id} {one.digest}" for one in records)
            assert stored.content_digest(records.records) == hashlib.sha256(lines.encode()).hexdigest()
            assert stored.content_digest(list(records)) == stored.content_digest(records.records)
            for name, same_N in zip(
                ("row", "opening"), stored.neighbours(records.records, with_openings=True), strict=True
            ):
                each = [getattr(one, name) for one in records]
                assert same_N.tolist() == [False, *(one == other for one, other in pairwise(each))]
    listed = list(found)
    assert units(found, "prompt") == units(listed, "prompt")
    assert units(found, "row") == units(listed, "row")


def test_what_is_refused_is_refused_from_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataSpec(path=str(rows_of(tmp_path)))
    for number in range(2):
        with pytest.raises(DataError, match=r"2 of 9 rows cannot be used; mend them"):
            read_records(data)
        if number == 0:
            forbid(monkeypatch, reading, "raw_rows")


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    """Also where size and times are what they were."""
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(3))
    before, stat = read(path), path.stat()
    path.write_bytes(path.read_bytes().replace(b"say 1 green", b"say 1 GREEN"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = read(path)
    assert after[1].messages[0]["content"][0]["text"] == "say 1 GREEN"
    assert [a.digest == b.digest for a, b in zip(before, after, strict=True)] == [True, False, True]
    # The records of the command that is still at work are those that it has checked.
    assert before[1].messages[0]["content"][0]["text"] == "say 1 green"


def test_a_large_file_is_known_by_its_inode_and_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHECKED_BYTES", 10)
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(3))
    assert reading.content_id(path) == ""  # it has changed just now, and may do so again
    monkeypatch.setattr(checking, "JUST_NOW_NS", 0)
    before = reading.content_id(path)
    assert before == reading.content_id(path) != ""
    stat = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert reading.content_id(path) != before


def pictures(folder: Path, *, size: tuple[int, int] = (8, 6), colour: str = "red") -> Path:
    Image.new("RGB", size, colour).save(folder / "a.png")
    ask = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": "red"}]
    return write_jsonl(folder / "rows.jsonl", [{"id": str(n), "images": ["a.png"], "messages": messages} for n in "ab"])


def test_a_changed_picture_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pictures(tmp_path)
    before = [record.digest for record in read(path)]
    with monkeypatch.context() as patch:
        forbid(patch, reading, "raw_rows")
        assert [record.digest for record in read(path)] == before
    pictures(tmp_path, colour="blue")
    assert [record.digest for record in read(path)] != before
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"image 0 `a\.png` does not exist"):
        read(path)


def test_a_link_to_another_picture_is_measured_anew(tmp_path: Path) -> None:
    path = pictures(tmp_path)
    (tmp_path / "a.png").rename(tmp_path / "one.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "two.png")
    for name, size in (("one.png", (8, 6)), ("two.png", (9, 9))):
        (tmp_path / "a.png").unlink(missing_ok=True)
        (tmp_path / "a.png").symlink_to(tmp_path / name)
        assert read(path)[0].images[0].size == size


@pytest.mark.parametrize("how", ["missing", "broken", "empty"])
@pytest.mark.parametrize("bad_rows", ["refuse", "list"])
def test_a_picture_that_is_mended_is_seen(how: str, bad_rows: Any, tmp_path: Path) -> None:
    """A row that was refused for its picture is not refused from the table once the picture is good."""
    path, good = pictures(tmp_path), (tmp_path / "a.png").read_bytes()
    write_jsonl(path, [*(json.loads(line) for line in path.read_text().splitlines()), *make_rows(1)])
    (tmp_path / "a.png").unlink()
    if how != "missing":
        (tmp_path / "a.png").write_bytes(b"" if how == "empty" else b"no picture")
    data = DataSpec(path=str(path), bad_rows=bad_rows)
    if bad_rows == "list":
        assert len(read_records(data)) == 1
    else:
        with pytest.raises(DataError, match=r"2 of 3 rows cannot be used"):
            read_records(data)
    (tmp_path / "a.png").write_bytes(good)
    assert len(read_records(data)) == 3


def test_what_is_still_missing_is_refused_from_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pictures(tmp_path)
    write_jsonl(path, [*(json.loads(line) for line in path.read_text().splitlines()), *make_rows(1)])
    (tmp_path / "a.png").unlink()
    first = read(path).skipped
    forbid(monkeypatch, reading, "raw_rows")
    assert read(path).skipped == first


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_tokens_are_measured_once(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever `max_length` says: it decides which fit, and is asked each time."""
    reasoned = make_rows(9)[8]
    reasoned["messages"][1]["reasoning_content"] = "so"  # type: ignore[index]
    control = {"id": "c", "messages": [{"role": "user", "content": "<|im_end|>"}, *TURNS["messages"][1:2]]}
    path = write_jsonl(tmp_path / "rows.jsonl", [*make_rows(6), control, TURNS, reasoned])
    records = read(path)
    kept, skipped = fit_rows(records, encoder, 100, bad_rows="list")
    told = capsys.readouterr().err
    forbid(monkeypatch, measuring, "_measure")
    again, skipped_again = fit_rows(read(path), encoder, 100, bad_rows="list")
    assert capsys.readouterr().err == told
    assert "do not read" in told.replace("does not read", "do not read")
    assert skipped == skipped_again
    assert [row["id"] for row in skipped] == ["c"]
    for one, other in zip(kept, again, strict=True):
        num_prompt, ids = encoder.measure(records[one.index])
        assert (one.index, one.num_prompt, one.num_shared) == (other.index, num_prompt, other.num_shared)
        np.testing.assert_array_equal(one.response_ids, ids)
        np.testing.assert_array_equal(other.response_ids, ids)
    assert [one.num_shared > 0 for one in kept][-2]
    shorter = max(one.num_tokens for one in kept) - 1
    fewer, too_long = fit_rows(records, encoder, shorter, bad_rows="list")
    assert len(fewer) < len(kept)
    assert any("data.max_length is" in row["reason"] for row in too_long)
    with pytest.raises(DataError, match=r"1 rows cannot be encoded for .*\n  - row `c`: the user text holds"):
        fit_rows(records, encoder, 100)


def test_another_template_has_another_table(tmp_path: Path, encoder: Encoder) -> None:
    records = read(write_jsonl(tmp_path / "rows.jsonl", make_rows(4)))
    before = fit_rows(records, encoder, 100)[0][0].num_prompt
    folder = tmp_path / "other"
    encoder.tokenizer.save_pretrained(folder)
    encoder.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text((Path(encoder.name) / "config.json").read_text())
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("hello " + template)
    assert fit_rows(records, load_encoder(folder), 100)[0][0].num_prompt > before


# --- the folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["samples.arrow", "pictures.arrow", "contents.bin", "about.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_table_is_measured_again(
    name: str, how: str, tmp_path: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows_of(tmp_path)
    first = everything(read(path))
    (folder,) = kept.iterdir()
    file = folder / name
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if how == "cut" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    capsys.readouterr()
    assert everything(read(path)) == first
    assert "is damaged" in capsys.readouterr().err
    assert len(list(kept.iterdir())) == 1
    assert everything(read(path)) == first
    assert "is damaged" not in capsys.readouterr().err


def test_processes_that_work_at_once_do_not_meet(tmp_path: Path, kept: Path) -> None:
    path, found = rows_of(tmp_path), list[Any]()
    threads = [threading.Thread(target=lambda: found.append(everything(read(path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == found[0] for one in found)
    assert len(found) == 4
    assert len(list(kept.iterdir())) == 1


def test_tables_that_were_not_used_for_longest_go(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", make_rows(4, start=4 * n)) for n in range(3)]
    for age, path in enumerate(paths):
        read(path)
        newest = max(kept.iterdir(), key=lambda entry: (entry / "about.json").stat().st_mtime_ns)
        os.utime(newest / "about.json", (1000 * age, 1000 * age))
    read(paths[0])  # used just now
    size = sum(file.stat().st_size for file in next(kept.iterdir()).iterdir())
    monkeypatch.setattr(table, "MAX_BYTES", int(2.5 * size))
    read(write_jsonl(tmp_path / "new.jsonl", make_rows(4, start=100)))
    assert len(list(kept.iterdir())) == 2
    forbid(monkeypatch, reading, "raw_rows")
    read(paths[0])


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(table.VARIABLE, str(tmp_path / "file" / "below"))
    assert len(read(rows_of(tmp_path))) == 8
    assert "cannot be kept in" in capsys.readouterr().err
    monkeypatch.setenv(table.VARIABLE, "off")
    assert len(read(rows_of(tmp_path))) == 8
    assert "cannot be kept in" not in capsys.readouterr().err


def test_where_tables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(table.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert table.folder() == Path("/somewhere/vlsi-cache")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert table.folder() == Path.home() / ".cache" / "vlsi-cache"


@pytest.mark.parametrize("how", ["changed", "cut"])
def test_contents_that_change_while_a_command_runs(how: str, tmp_path: Path, kept: Path) -> None:
    """A row that is not the one that was checked is an error, whichever of its turns is asked for."""
    records = read(rows_of(tmp_path))
    (contents,) = kept.glob("*/contents.bin")
    turn = [record.id for record in records].index("turns/1")
    data = contents.read_bytes()
    with contents.open("r+b") as file:
        if how == "cut":
            file.truncate(10)
        else:
            file.write(data.replace(b"say 1 green", b"say 1 GREEN").replace(b'"text":"a"', b'"text":"z"'))
    for number in (1, turn, turn + 1):
        with pytest.raises(DataError, match=r"contents\.bin, where checked rows lie, has changed"):
            assert records[number].messages
    assert how == "cut" or records[0].messages  # the others are what they were


def test_a_folder_of_somebody_else(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set is found where its time of use cannot be noted; what is no set stays; nobody needs a home."""
    path = rows_of(tmp_path)
    for name in ("mine", ".mine.tmp-1"):
        (kept / name).mkdir(parents=True)
        (kept / name / "about.json").write_text("{}")
        os.utime(kept / name, (0, 0))
    monkeypatch.setattr(table, "MAX_BYTES", 0)
    first = everything(read(path))
    assert {"mine", ".mine.tmp-1"} < {entry.name for entry in kept.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError()))
        forbid(patch, reading, "raw_rows")
        assert everything(read(path)) == first
    monkeypatch.setenv(table.VARIABLE, "~nobody-of-this-name/tables")
    assert table.folder() is None
    assert everything(read(path)) == first


# --- workers --------------------------------------------------------------------------------------------------------


def test_workers_find_what_one_process_finds(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows and tokens, bad ones included, in their order."""
    monkeypatch.setenv(table.VARIABLE, "off")
    path = rows_of(tmp_path, 60)
    data = DataSpec(path=str(path), bad_rows="list")
    alone = read_records(data)
    told = capsys.readouterr().err
    for module, name, value in (
        (reading, "WORTH_BYTES", 0),
        (reading, "STRETCH_BYTES", 2000),
        (measuring, "TOGETHER", 7),
        (measuring, "FIRST_S", 0),
        (measuring, "WORTH_S", 0),
    ):
        monkeypatch.setattr(module, name, value)
    several = read_records(data, num_workers=2)
    assert capsys.readouterr().err == told
    assert everything(several) == everything(alone)
    one, two = (fit_rows(several, encoder, 100, num_workers=number)[0] for number in (0, 2))
    assert [(a.index, a.num_prompt, a.num_shared, a.response_ids.tolist()) for a in one] == [
        (b.index, b.num_prompt, b.num_shared, b.response_ids.tolist()) for b in two
    ]


def _die(_: Any, item: int) -> int:
    if item == 2:
        os._exit(7)
    return item


def _refuse(state: str, item: int) -> str:
    if item == 2:
        raise DataError(f"row {item} is bad")
    return f"{state}{item}"


def test_a_worker_that_dies_and_one_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))  # where workers find this file
    with Workers(2, "testing", "s") as workers:
        found = workers.map(_refuse, range(4))
        assert [next(found), next(found)] == ["s0", "s1"]
        with pytest.raises(DataError, match=r"^row 2 is bad$"):
            next(found)
        with pytest.raises(WorkerDiedError, match=r"that was testing has ended; .*run\.workers=0"):
            list(workers.map(_die, range(4)))


class _Unloadable:
    def __reduce__(self) -> Any:
        return open, ("/no/such/file",)


def test_workers_load_none_of_the_files_beside_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that cannot be loaded is told with its reason."""
    (tmp_path / "queue.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    with Workers(1, "testing", "s") as workers:
        assert workers.call(_refuse, 1) == "s1"
    with (
        Workers(1, "testing", _Unloadable()) as workers,
        pytest.raises(ModelError, match=r"FileNotFoundError: .*/no/such"),
    ):
        workers.call(_refuse, 1)


def test_rows_whose_folder_has_gone_are_measured_here(
    tmp_path: Path, kept: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = read(rows_of(tmp_path, 30))
    for name, value in (("TOGETHER", 7), ("FIRST_S", 0), ("WORTH_S", 0)):
        monkeypatch.setattr(measuring, name, value)
    shutil.rmtree(kept)
    forbid(monkeypatch, measuring, "Workers")
    assert len(fit_rows(records, encoder, 100, num_workers=2)[0]) == len(records)


_LONG = """
import sys, time
from vlsi_cache.data.workers import Workers

if "__main__" == __name__ and len(sys.argv) > 1:
    with Workers(2, "testing", 0) as workers:
        print(*(worker.process.pid for worker in workers._all), flush=True)
        workers.call(max, 1)
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_the_process_that_started_it(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(_LONG)
    command = [sys.executable, str(tmp_path / "long.py"), "go"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert process.stdout.readline() == "ready\n"
        assert len(pids) == 2
        process.send_signal(number)
        process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while any(map(_is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_is_alive, pids))


def _is_alive(pid: int) -> bool:
    """Not of one that has ended and that nobody has waited for yet."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_samples_are_the_same_whoever_prepares_them(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers take over in the middle; each gives what `Encoder.encode_all` does, or the error with the row's name."""
    monkeypatch.setattr(preparing, "START_S", 0)
    records = read(write_jsonl(tmp_path / "rows.jsonl", [*make_rows(6), TURNS]))
    with Preparer(encoder, 1) as preparer:
        for attempt in range(2):  # here, then in the worker
            for wanted, got in zip(encoder.encode_all(list(records)), preparer.encode_all(list(records)), strict=True):
                np.testing.assert_array_equal(wanted.input_ids, got.input_ids)
                assert [(span.last_prompt, span.first) for span in wanted.spans] == [
                    (span.last_prompt, span.first) for span in got.spans
                ]
            if attempt == 0:
                assert preparer._thread is not None
                preparer._thread.join()
                assert preparer._ready is not None
        control = replace(records[0], messages=[{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}])
        with pytest.raises(RowError, match=r"^row `row-0`: the response holds the control token"):
            preparer.encode_all([control])


def test_rows_are_read_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a stretch of them at once: they may hold pictures of a megabyte each."""
    path, ahead, taken = write_jsonl(tmp_path / "rows.jsonl", make_rows(20)), [], []
    rows, add = reading.raw_rows, reading.Reader._add

    def counted(*args: Any, **options: Any) -> Any:
        for row in rows(*args, **options):
            taken.append(row.where)
            yield row

    def noted(self: Any, found: Any, raw: Any, notes: set[str]) -> None:
        ahead.append(len(taken) - len(ahead))
        add(self, found, raw, notes)

    monkeypatch.setattr(reading, "raw_rows", counted)
    monkeypatch.setattr(reading.Reader, "_add", noted)
    monkeypatch.setattr(reading, "STRETCH_ROWS", 7)
    assert len(read(path)) == 20
    assert ahead == [1] * 20
