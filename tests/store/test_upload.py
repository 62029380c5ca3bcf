"""Writing to an object store: whole or invisible, one writer of a part wins, and what was done is not done again."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.caches import Case, build, file_bytes, header_of, standard_case
from helpers.remote import assert_same_rows, copied, new_url, objects_of
from helpers.s3 import Proxy, Request
from helpers.tiny import make_rows, write_jsonl, write_spec
from helpers.variants import build_variant, variant_of

import vlsi_cache as vc
from vlsi_cache.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheNotFoundError,
    FingerprintMismatchError,
    SpecError,
    StoreError,
)
from vlsi_cache.run_files import read_metrics
from vlsi_cache.store.format import FileRecord
from vlsi_cache.store.remote import part_cache, upload
from vlsi_cache.store.remote.upload import RemoteWriter
from vlsi_cache.store.writer import CacheWriter

pytestmark = pytest.mark.usefixtures("part_cache_dir")


def writer_at(url: str, case: Case) -> RemoteWriter:
    writer = CacheWriter.create_or_resume(url, header_of(case), case.vocab_order)
    assert isinstance(writer, RemoteWriter)
    return writer


@pytest.mark.parametrize("name", ["plain-default", "top-p-exact", "chosen-fast"])
def test_there_and_back(tmp_path: Path, name: str) -> None:
    root, url = build_variant(tmp_path / "cache", variant_of(name)), new_url()
    done = vc.push(root, url)
    assert (done.num_parts, done.parts_before) == (2, 0)
    assert_same_rows(vc.open_cache(root), vc.open_cache(url), [2])
    assert vc.verify(url).ok
    vc.pull(url, tmp_path / "back")
    assert file_bytes(tmp_path / "back") == file_bytes(root)
    for again in (vc.push(root, url), vc.pull(url, tmp_path / "back")):
        assert (again.parts_before, again.moved_bytes) == (2, 0)


def test_a_copied_folder_is_pulled_too(built: Path, tmp_path: Path) -> None:
    vc.pull(copied(built), tmp_path / "back")
    assert file_bytes(tmp_path / "back") == file_bytes(built)


def test_a_copied_folder_is_gone_on_with(built: Path) -> None:
    """Parts beside their records, and parts under a digest, in one cache."""
    url = copied(built)
    objects = objects_of(url)
    objects.delete([name for name in objects.sizes() if "000001.zarr" in name or name == "samples.parquet"])
    assert vc.push(built, url).parts_before == 2
    assert_same_rows(vc.open_cache(built), vc.open_cache(url), ["last"])
    assert vc.verify(url).ok


def test_only_some_of_it(built: Path, tmp_path: Path, run: Any) -> None:
    vc.push(built, url := new_url())
    (tmp_path / "ids").write_text("sample-1\nsample-4\n")
    code, out, _ = run("pull", url, tmp_path / "some", "--layers", "2,last", "--samples", tmp_path / "ids")
    assert code == 0, out
    small, whole = vc.open_cache(tmp_path / "some"), vc.open_cache(built)
    assert small.header.parents[0]["path"] == url
    assert list(small) == ["sample-1", "sample-4"]
    for name in small:
        assert (small.row(name).ids_LTK == whole.row(name, [2, "last"]).ids_LTK).all()


def test_a_kill_in_the_middle_of_an_upload(s3: Proxy, built: Path) -> None:
    """Before and after it nothing is visible but whole parts; the next one goes on from there."""
    url = new_url("s3")
    command = [sys.executable, "-m", "vlsi_cache_cli.main", "push", str(built), url]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    num_parts = 0

    def kill(request: Request) -> None:
        nonlocal num_parts
        num_parts += request.method == "PUT" and request.path.endswith("part.json")
        if num_parts == 1 and request.method == "PUT" and "000001.zarr" in request.path:
            process.send_signal(signal.SIGKILL)

    s3.fault = kill
    assert process.wait(120) == -signal.SIGKILL
    with pytest.raises(CacheIncompleteError, match=f"`{url}` is not finished: 1 of 3 parts"):
        vc.open_cache(url)
    assert_same_rows_of_part_0(built, url)
    before = objects_of(url).sizes()
    s3.clear()
    assert vc.push(built, url).parts_before == 1
    put = {request.path.split("/", 3)[3] for request in s3.requests if request.method == "PUT"}
    assert not put & {name for name in before if name.startswith("parts/")}
    assert_same_rows(vc.open_cache(built), vc.open_cache(url))


def test_a_file_of_a_part_is_one_request(s3: Proxy, tmp_path: Path) -> None:
    """An upload in pieces that was killed would leave them in the bucket, where no listing shows them."""
    (tmp_path / "ids").write_bytes(bytes(12 * 2**20))
    url = new_url("s3")
    s3.clear()
    objects_of(url).put("ids", tmp_path / "ids")
    assert [request.method for request in s3.requests] == ["PUT"]
    assert objects_of(url).sizes() == {"ids": 12 * 2**20}


def assert_same_rows_of_part_0(root: Path, url: str) -> None:
    some, whole = vc.open_cache(url, allow_incomplete=True), vc.open_cache(root)
    assert some.parts == [0]
    assert all((some.row(name).ids_LTK == whole.row(name).ids_LTK).all() for name in some)


def test_the_first_writer_of_a_part_wins(case: Case) -> None:
    """The other one has uploaded everything but the commit: not one byte of it is taken."""
    url, other = new_url(), standard_case(seed=1)
    one, two = writer_at(url, case), writer_at(url, case)
    publish, made = RemoteWriter._publish, []

    def publish_second(self: RemoteWriter, tmp: Path, index: int) -> bool:
        if self is two:
            made.append(one.write_part(index, case.parts[index]))
        return publish(self, tmp, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteWriter, "_publish", publish_second)
        assert not two.write_part(0, other.parts[0])
    assert made == [True]
    names = objects_of(url).sizes("parts/000000.zarr")
    assert len({name.split("/")[2] for name in names}) == 3  # two folders and the record
    for index in one.missing_parts():
        assert one.write_part(index, case.parts[index])
    assert one.finish()
    assert len({name.split("/")[2] for name in objects_of(url).sizes("parts/000000.zarr")}) == 2
    assert vc.verify(url).ok
    row, wanted = vc.open_cache(url).row("sample-0"), case.parts[0].rows
    assert wanted is not None
    assert (row.ids_LTK == wanted.ids_LTK[:, : row.num_tokens]).all()


def test_the_first_vocabulary_order_wins(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    url, other = new_url(), standard_case(seed=1)
    publish, first = upload.upload_start, []

    def second(objects: Any, root: Path) -> bool:
        if not first:
            first.append(objects)
            writer_at(url, case)
        return publish(objects, root)

    monkeypatch.setattr(upload, "upload_start", second)
    assert writer_at(url, other).vocab_order.digest == case.vocab_order.digest


def test_an_answer_that_is_lost_after_the_commit(s3: Proxy, case: Case) -> None:
    """The retry is told that the name is taken, by itself: it has won all the same."""
    writer = writer_at(new_url("s3"), case)
    lost: list[str] = []

    def lose(request: Request) -> str | None:
        if request.method == "PUT" and request.path.endswith("part.json") and not lost:
            lost.append(request.path)
            return "lose"
        return None

    s3.fault = lose
    assert writer.write_part(0, case.parts[0])
    assert lost
    assert not writer.write_part(0, case.parts[0])


def test_a_put_whose_outcome_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore
    from obstore.exceptions import GenericError

    objects, put = objects_of(new_url()), obstore.put

    def time_out(store: Any, path: str, data: bytes, *, after: bool, **options: Any) -> None:
        if after:
            put(store, path, data, **options)
        raise GenericError("operation timed out")

    monkeypatch.setattr(obstore, "put", lambda *a, **o: time_out(*a, **o, after=True))
    assert objects.put_new("won", b"mine")
    monkeypatch.setattr(obstore, "put", lambda *a, **o: time_out(*a, **o, after=False))
    with pytest.raises(StoreError, match="operation timed out"):
        objects.put_new("nothing", b"mine")
    assert not objects.put_new("won", b"theirs")


def test_a_build_on_a_store_is_a_build(tmp_path: Path, teacher_folder: Path, capsys: Any) -> None:
    write_jsonl(tmp_path / "rows.jsonl", make_rows(6))
    spec = vc.load_spec(write_spec(tmp_path, teacher_folder))
    local, url = vc.build_teacher(spec, out=tmp_path / "local"), new_url()
    remote = vc.build_teacher(spec, out=url)
    assert (str(remote.path), remote.num_samples) == (url, local.num_samples)
    vc.pull(url, tmp_path / "back")
    assert file_bytes(tmp_path / "back" / "parts") == file_bytes(local.path / "parts")
    capsys.readouterr()
    vc.build_teacher(spec, out=url)
    assert f"{url} is finished" in capsys.readouterr().err
    other = vc.load_spec(tmp_path / "spec.yaml", overrides=["rows.top_k=4"])
    with pytest.raises(FingerprintMismatchError, match=f"`{url}` was made from something else"):
        vc.build_teacher(other, out=url)
    assert list((part_cache.folder() / "tmp").iterdir()) == []


def test_a_student_learns_the_same_from_afar(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", make_rows(6))
    local, url = vc.build_teacher(vc.load_spec(write_spec(tmp_path, teacher_folder)), out=tmp_path / "cache"), new_url()
    vc.push(local.path, url)
    few = [f"distill.{stage}.schedule.steps=2" for stage in ("interact", "sft")]
    losses, scores = [], []
    for name, cache in (("near", local.path), ("far", url)):
        run = vc.distill(cache, student=str(student_folder), out=tmp_path / name, recipe="last", overrides=few)
        losses.append([line["loss"] for line in read_metrics(run / "metrics.jsonl")])
        scores.append(vc.evaluate(run, cache=cache)["cache"]["kl"])
    assert losses[0] == losses[1]
    assert scores[0] == scores[1]
    assert json.loads((tmp_path / "far" / "run.json").read_text())["cache"] == url


def test_caches_made_of_others_go_to_a_store(built: Path, tmp_path: Path, run: Any) -> None:
    url = copied(built)
    halves = [tmp_path / "halves", f"{new_url()}/one", f"{new_url()}/two"]
    for half, where in zip(halves[1:], ("tokens < 5", "tokens >= 5"), strict=True):
        assert run("prune", url, "-o", half, "--where", where)[0] == 0
    code, out, _ = run("merge", *halves[1:], "-o", both := new_url(), "--json")
    assert code == 0, out
    assert run("diff", url, both)[0] == 1  # where they come from
    assert vc.diff(url, both).layers[-1].max_dlogp == 0
    assert run("prune", url, "-o", f"{url}/inside", "--layers", "last")[0] == 2


def test_what_is_in_the_way(case: Case, built: Path, tmp_path: Path, run: Any) -> None:
    url = new_url()
    objects_of(url).put("notes.txt", b"mine")
    for refused in (lambda: writer_at(url, case), lambda: vc.push(built, url)):
        with pytest.raises(SpecError, match=f"`{url}` is not empty and not a cache: it holds .'notes.txt'."):
            refused()
    other = build(tmp_path / "other", standard_case(seed=1))  # alike, but for the order of its vocabulary
    vc.push(built, url := new_url())
    with pytest.raises(FingerprintMismatchError, match=f"`{url}` was made from something else"):
        vc.push(other, url)
    vc.pull(url, tmp_path / "back")
    vc.push(other, url2 := new_url())
    with pytest.raises(FingerprintMismatchError, match="back` was made from something else"):
        vc.pull(url2, tmp_path / "back")
    with pytest.raises(CacheNotFoundError, match="nothing lies below it"):
        vc.pull(new_url(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert "vlsi-cache push CACHE s3://BUCKET/NAME" in run("push", url, url2)[2]
    assert "vlsi-cache pull s3://BUCKET/NAME CACHE" in run("pull", built, tmp_path / "x")[2]


def test_what_is_damaged_does_not_travel(root: Path, tmp_path: Path) -> None:
    vc.push(root, url := new_url())
    file = next(path for path in sorted(root.rglob("ids/c/0/0/0")))
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CacheCorruptError, match=f"`{file}`: .* bytes, xxh3 .*; listed are"):
        vc.push(root, new_url())
    (name,) = (name for name in objects_of(url).sizes("parts/000000.zarr") if name.endswith("/ids/c/0/0/0"))
    objects_of(url).put(name, bytes(content))
    with pytest.raises(CacheCorruptError, match=f"`{url}/{name}`: xxh3 is .*what lies on the store is damaged"):
        vc.pull(url, tmp_path / "back")
    assert list((tmp_path / "back" / "parts").iterdir()) == []


def test_no_permission_to_write(s3: Proxy, built: Path) -> None:
    s3.fault = lambda request: "403" if request.method == "PUT" else None
    with pytest.raises(StoreError, match=r"cannot be written; no permission to write it.*`AWS_ACCESS_KEY_ID`"):
        vc.push(built, new_url("s3"))


def test_what_killed_writers_left_on_the_disk_goes(case: Case) -> None:
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    from vlsi_cache.store.files import host_name

    left = part_cache.folder() / "tmp" / f"write.{host_name()}.{int(process.stdout)}.{'0' * 12}"
    (left / "parts").mkdir(parents=True)
    writer_at(new_url(), case)
    assert not left.exists()


def test_names_of_other_contents_are_other_folders() -> None:
    from vlsi_cache.store.format import files_digest

    one = {"a": FileRecord(size=1, xxh3="0"), "b": FileRecord(size=2, xxh3="1")}
    assert files_digest(one) == files_digest(dict(reversed(one.items())))
    assert files_digest(one) != files_digest({**one, "b": FileRecord(size=2, xxh3="2")})
