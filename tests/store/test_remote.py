"""A cache on an object store reads as the folder it was copied from: its rows, its errors, and only what is asked for.

What a store does is shown by a real S3 server behind a proxy that counts and fails, what is ours by one in memory.
"""

import errno
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.caches import build, file_bytes, header_of, make_case
from helpers.remote import assert_same_rows, copied, new_url, objects_of
from helpers.s3 import ENVIRONMENT, Proxy, Request, free_port
from helpers.variants import VARIANTS, build_variant, variant_of
from vlsi_cache_cli.main import main

import vlsi_cache as vc
from vlsi_cache.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheNotFoundError,
    DiskFullError,
    SpecError,
    StoreError,
)
from vlsi_cache.store.dataset import PartWindowReader
from vlsi_cache.store.format import sealed_json, unseal_json
from vlsi_cache.store.remote import mirror, part_cache
from vlsi_cache.store.writer import CacheWriter

pytestmark = pytest.mark.usefixtures("part_cache_dir")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts whose rows are nearly all of their bytes."""
    return build(
        tmp_path_factory.mktemp("wide") / "cache", make_case([[700], [800]], ["a", "b"], num_layers=8, top_k=64)
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty parts of one small sample."""
    names = [f"sample-{i}" for i in range(50)]
    return build(tmp_path_factory.mktemp("many") / "cache", make_case([[2]] * 50, names, top_k=3, num_layers=2))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_rows(tmp_path: Path, name: str) -> None:
    root = build_variant(tmp_path / "cache", variant_of(name))
    cache, local = vc.open_cache(url := copied(root)), vc.open_cache(root)
    assert_same_rows(local, cache, [2])
    assert_same_rows(local, cache)
    assert_same_rows(local, vc.open_cache(url), ["last", 1])  # out of the part cache
    assert cache.token_text(3) == local.token_text(3)
    assert vc.inspect(url)["layer_bytes"] == vc.inspect(root)["layer_bytes"]
    assert vc.verify(url).ok


@pytest.mark.parametrize("name", ["plain-default", "top-p-exact", "plain-fast"])
def test_parts_of_earlier_writers_say_nothing_of_their_chunks(tmp_path: Path, name: str) -> None:
    root = build_variant(tmp_path / "cache", variant_of(name))
    (root / "samples.parquet").unlink()
    for record in root.glob("parts/*/part.json"):
        value = unseal_json(record.read_bytes(), record)
        assert value.pop("chunk_bytes")
        record.write_bytes(sealed_json(value))
    assert_same_rows(vc.open_cache(root), vc.open_cache(copied(root)), ["last"])


def test_only_the_layers_asked_for_are_read(s3: Proxy, wide: Path) -> None:
    url = copied(wide, "s3")
    total = sum(map(len, file_bytes(wide).values()))
    s3.clear()
    cache = vc.open_cache(url)
    rows = {row.sample_id: row for row in PartWindowReader(cache, layers=["last"], seed=0, epoch=0)}
    assert s3.received_bytes <= total * (1 / 8 + 0.05)
    arrays = [one for one in s3.requests if one.range and "offsets" not in one.path]
    assert len([one for one in arrays if "/ids/" in one.path]) == 2  # one for each part
    local = vc.open_cache(wide)
    assert all(np.array_equal(local.row(name, ["last"]).ids_LTK, row.ids_LTK) for name, row in rows.items())
    s3.clear()
    assert_same_rows(vc.open_cache(wide), vc.open_cache(url), ["last"])
    assert all(one.range is None for one in s3.requests)  # records and the table are asked for, rows are here


def test_inspect_asks_little_of_many_parts(s3: Proxy, many: Path) -> None:
    url = new_url("s3")
    for name, content in file_bytes(many).items():
        if "/c/" not in name and "zarr.json" not in name:  # nothing else is looked at
            objects_of(url).put(name, content)
    s3.clear()
    assert vc.inspect(url)["num_samples"] == 50
    assert len(s3.requests) < 20, s3.requests


def test_without_a_table_the_records_are_read(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = copied(built)
    objects_of(url).delete(["samples.parquet"])
    assert_same_rows(vc.open_cache(built), vc.open_cache(url))
    assert "samples.parquet: is missing" in str(vc.verify(url))
    objects_of(url).delete(["parts/000001.zarr/part.json"])
    with pytest.raises(CacheIncompleteError, match=r"`memory://bucket/\w+` is not finished: 2 of 3 parts"):
        vc.open_cache(url)
    monkeypatch.setattr(sys, "argv", ["vlsi-cache", "ls", url, "--json"])
    assert main() == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "2/3 parts"


@pytest.mark.parametrize("fault", ["503", "drop", "lose"])
def test_a_bad_link_is_tried_again(s3: Proxy, built: Path, fault: str) -> None:
    url = copied(built, "s3")
    s3.clear()
    spoilt: set[str] = set()

    def once(request: Request) -> str | None:
        if request.path in spoilt or request.number % 5:
            return None
        spoilt.add(request.path)
        return fault

    s3.fault = once
    assert_same_rows(vc.open_cache(built), vc.open_cache(url))
    assert len(spoilt) > 5


def test_a_slow_link_is_asked_for_many_things_at_once(s3: Proxy, built: Path) -> None:
    """Window after window is read ahead, and the arrays of a part together."""
    url = copied(built, "s3")
    s3.clear()
    s3.delay_s = 0.15
    rows = {row.sample_id: row for row in PartWindowReader(vc.open_cache(url), seed=0, epoch=0, window_parts=1)}
    assert s3.most_open >= 8
    local = vc.open_cache(built)
    assert all((rows[name].ids_LTK == local.row(name).ids_LTK).all() for name in local)


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_an_array_that_changes_between_two_reads(s3: Proxy, wide: Path, scheme: str) -> None:
    del s3
    url, name = copied(wide, scheme), "parts/000000.zarr/ids/c/0/0/0"
    cache = vc.open_cache(url)
    cache.part(0, [1])
    objects_of(url).put(name, (wide / name).read_bytes()[::-1])
    with pytest.raises(CacheCorruptError, match=f"`{url}/{name}` has changed on the store while it was read"):
        cache.part(0, [2])


def test_a_part_that_another_took_the_place_of(built: Path) -> None:
    url, name = copied(built), "parts/000000.zarr/part.json"
    cache = vc.open_cache(url)
    cache.part(0, [1])
    part_cache.make_room(0)
    objects_of(url).put(name, (built / name).read_bytes() + b" ")
    with pytest.raises(CacheCorruptError, match=f"`{url}/{name}` has changed on the store while it was read"):
        cache.part(0, [2])
    assert_same_rows(vc.open_cache(built), vc.open_cache(url))  # whoever begins now reads the new one alone


def test_a_damaged_record_in_the_part_cache(built: Path, part_cache_dir: Path) -> None:
    vc.open_cache(url := copied(built)).part(0)
    (record,) = part_cache_dir.glob("*/parts/000000.zarr/part.json")
    record.write_bytes(record.read_bytes()[:-9])
    assert_same_rows(vc.open_cache(built), vc.open_cache(url))


@pytest.mark.parametrize("name", ["ids/c/0/0/0", "response_ids/c/0", "entropy/c/0/0"])
def test_damage_on_the_store_and_on_the_disk(built: Path, part_cache_dir: Path, name: str) -> None:
    url, file = copied(built), f"parts/000001.zarr/{name}"
    cache = vc.open_cache(url)
    cache.part(1, keep=False)
    (local,) = part_cache_dir.glob(f"*/{file}")
    content = bytearray(local.read_bytes())
    content[3] ^= 1
    local.write_bytes(content)
    assert_same_rows(vc.open_cache(built), vc.open_cache(url))  # fetched again
    objects_of(url).put(file, bytes(content))
    part_cache.make_room(0)
    with pytest.raises(CacheCorruptError, match=f"`{url}/parts/000001.zarr/.*; what lies on the store is damaged"):
        vc.open_cache(url).part(1)
    report = vc.verify(url)
    assert [problem.file for problem in report.problems] == [file], report
    assert str(part_cache_dir) not in str(report)


def test_damage_of_what_is_mapped(tmp_path: Path, part_cache_dir: Path) -> None:
    root = build_variant(tmp_path / "cache", variant_of("plain-fast"))
    url, file = copied(root), "parts/000000.zarr/ids/c/0/0/0"
    vc.open_cache(url).part(0)
    (local,) = part_cache_dir.glob(f"*/{file}")
    content = bytearray(local.read_bytes())
    content[3] ^= 1
    local.write_bytes(content)
    assert_same_rows(vc.open_cache(root), vc.open_cache(url))
    objects_of(url).put(file, bytes(content))
    part_cache.make_room(0)
    with pytest.raises(CacheCorruptError, match=f"`{url}/{file}`: .*; what lies on the store is damaged"):
        vc.open_cache(url).part(0)


def test_a_fork_is_told(built: Path) -> None:
    """It would hang: the threads that speak to the store stay with the parent."""
    cache = vc.open_cache(copied(built))
    child = os.fork()
    if not child:
        code = 1
        try:
            cache.part(1)
        except StoreError as error:
            code = 42 if error.hint and "multiprocessing_context='spawn'" in error.hint else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


def test_a_file_that_is_missing(built: Path) -> None:
    url, file = copied(built), "parts/000001.zarr/lse/c/0/0/0"
    objects_of(url).delete([file])
    with pytest.raises(CacheCorruptError, match=f"`{url}/{file}` is missing"):
        vc.open_cache(url).part(1)
    assert f"{file}: `{url}/{file}` is missing" in str(vc.verify(url))


def test_the_part_cache_is_bounded(wide: Path, part_cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readers with the room of one part each take from the other what it does not work on."""
    url, local = copied(wide), vc.open_cache(wide)
    one = sum(path.stat().st_size for path in (wide / "parts" / "000001.zarr").rglob("*") if path.is_file())
    monkeypatch.setenv("VLSI_CACHE_BYTES", f"{1.2 * one / 1000:.1f} kB")
    monkeypatch.setattr(mirror, "SHARE_BETWEEN_LOOKS", 1 << 30)  # look every time
    problems: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(3):
                assert_same_rows(local, vc.open_cache(url))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not problems
    part_cache.make_room(part_cache.limit())
    blocks = sum(path.stat().st_blocks * 512 for path in part_cache_dir.glob("*/parts/*/**/*") if path.is_file())
    assert blocks <= 1.3 * one
    monkeypatch.setenv("VLSI_CACHE_BYTES", "much")
    with pytest.raises(SpecError, match="VLSI_CACHE_BYTES `much` is no size"):
        vc.open_cache(url)


def test_a_full_disk_under_the_part_cache(built: Path, part_cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = vc.open_cache(copied(built))
    cache.vocab_order  # noqa: B018

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFullError, match=f"under the part cache `{part_cache_dir}` is full.*VLSI_CACHE_DIR"):
            cache.part(0)
    assert_same_rows(vc.open_cache(built), cache)  # nothing half-written is taken for data


def test_a_fetch_that_was_killed(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written and not noted yet is fetched again."""
    cache = vc.open_cache(url := copied(built))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(part_cache, "write_held", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.part(0)
    assert_same_rows(vc.open_cache(built), vc.open_cache(url))


def test_what_is_no_cache(s3: Proxy, built: Path) -> None:
    del s3
    url = copied(built, "s3")
    with pytest.raises(CacheNotFoundError, match=f"`{url}x`: nothing lies below it"):
        vc.open_cache(f"{url}x")
    with pytest.raises(
        CacheNotFoundError, match=f"`{url}/parts` is not a cache: it has no `cache.json`, but .* objects"
    ):
        vc.open_cache(f"{url}/parts")
    with pytest.raises(CacheNotFoundError, match=r"`s3://bucket` is not a cache, but holds \d+"):
        vc.open_cache("s3://bucket")
    with pytest.raises(StoreError, match=r"there is no bucket `s3://no-such-bucket`; is the address right"):
        vc.open_cache("s3://no-such-bucket/x")
    with pytest.raises(SpecError, match=r"is a URL \(https\), and only local paths are supported here"):
        vc.open_cache("https://host/cache")


def test_no_permission(s3: Proxy, built: Path) -> None:
    url = copied(built, "s3")
    s3.fault = lambda _: "403"
    with pytest.raises(StoreError, match=f"`{url}/cache.json` cannot be read; no permission.*`AWS_ACCESS_KEY_ID`"):
        vc.open_cache(url)


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from vlsi_cache.store.remote import objects

    monkeypatch.setitem(objects.RETRIES, "max_retries", 1)
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["vlsi-cache", "inspect", "s3://bucket/cache"])
    assert main() == 3
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "error: `s3://bucket/cache/cache.json` cannot be read" in message
    assert "is the address right, and the store up?" in message


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlsi_cache.store.remote import objects

    monkeypatch.setitem(objects.RETRIES, "max_retries", 1)
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")  # of a machine in the cloud
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    with pytest.raises(StoreError, match=r"the environment names no credentials \(`AWS_ACCESS_KEY_ID` or others"):
        vc.open_cache("s3://bucket/cache")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(SpecError, match=r"obstore is not installed; pip install 'vlsi-cache\[remote\]'"):
        vc.open_cache("s3://bucket/cache")


def test_a_file_url_is_a_folder(built: Path) -> None:
    assert vc.open_cache(f"file://{built}").path == built


def test_incomplete_and_foreign_parts(tmp_path: Path) -> None:
    case = make_case([[2], [3]], ["a", "b"])
    root = tmp_path / "cache"
    writer = CacheWriter.create_or_resume(root, header_of(case), case.vocab_order)
    writer.write_part(1, case.parts[1])
    cache = vc.open_cache(url := copied(root), allow_incomplete=True)
    assert_same_rows(vc.open_cache(root, allow_incomplete=True), cache)
    assert "parts/000000.zarr: is missing" in str(vc.verify(url))
