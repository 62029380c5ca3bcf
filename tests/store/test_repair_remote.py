"""Repair of a cache on an object store: what is damaged moves to quarantine there, and a build makes it again."""

from pathlib import Path
from typing import Any

import pytest
from helpers.caches import Case, file_bytes, header_of
from helpers.remote import assert_same_rows, new_url, objects_of

import vlsi_cache as vc
from vlsi_cache.errors import CacheCorruptError, SpecError, StoreError
from vlsi_cache.store.remote.objects import BucketObjects
from vlsi_cache.store.writer import CacheWriter

pytestmark = pytest.mark.usefixtures("part_cache_dir")


def pushed(built: Path, scheme: str = "memory") -> tuple[str, BucketObjects]:
    vc.push(built, url := new_url(scheme))
    objects = objects_of(url)
    assert isinstance(objects, BucketObjects)
    return url, objects


def flip(objects: BucketObjects, key: str) -> None:
    content = bytearray(objects.get(key).data)
    content[len(content) // 2] ^= 4
    objects.put(key, bytes(content))


def named(objects: BucketObjects, prefix: str, end: str) -> str:
    return next(name for name in sorted(objects.sizes(prefix)) if name.endswith(end))


def contents(objects: BucketObjects, prefix: str = "") -> dict[str, bytes]:
    return {name: objects.get(name).data for name in objects.sizes(prefix)}


def continued(url: str, case: Case) -> None:
    """What the same build line does."""
    writer = CacheWriter.create_or_resume(url, header_of(case), case.vocab_order)
    for index in writer.missing_parts():
        assert writer.write_part(index, case.parts[index])
    assert writer.finish()


def test_what_is_damaged_moves_and_the_build_makes_it_again(built: Path, case: Case, tmp_path: Path, run: Any) -> None:
    url, objects = pushed(built)
    good = contents(objects)
    assert run("repair", url)[1].strip() == f"{url}: nothing to repair"
    flip(objects, damaged := named(objects, "parts/000001.zarr", "/levels/c/0/0/0"))
    flip(objects, "parts/000002.zarr/part.json")
    bad = contents(objects, "parts")
    code, out, err = run("repair", url)
    assert (code, "2 parts are missing: run the command that builds the cache again" in out) == (0, True), err
    moved = {name.replace("quarantine/", "parts/"): data for name, data in contents(objects, "quarantine").items()}
    assert moved == {name: data for name, data in bad.items() if "000000.zarr" not in name}
    assert {name: good[name] for name in objects.sizes("parts")} == contents(objects, "parts")  # the whole part 0
    assert not {damaged, "samples.parquet"} & set(objects.sizes())
    assert vc.open(url, allow_incomplete=True).parts == [0]
    continued(url, case)
    assert {name: data for name, data in contents(objects).items() if "quarantine" not in name} == good
    assert_same_rows(vc.open(built), vc.open(url))
    vc.pull(url, tmp_path / "back")
    assert file_bytes(tmp_path / "back") == file_bytes(built)


@pytest.mark.parametrize("by", ["push", "build"])
def test_a_lost_table_of_ids_is_made_again_only_if_it_is_the_same(built: Path, case: Case, by: str) -> None:
    url, objects = pushed(built)
    good = contents(objects, "vocab")
    flip(objects, named(objects, "vocab", "heads/zarr.json"))
    assert [problem.file.split("/")[0] for problem in vc.verify(url).problems] == ["vocab"]
    assert vc.repair(url).quarantined == ["vocab"]
    assert not objects.sizes("vocab")
    other = Case(case.parts, case.id_of_rank[::-1], case.num_layers, case.top_k, case.num_tail)
    with pytest.raises(CacheCorruptError, match="the table made anew is another"):
        continued(url, other)
    assert not objects.sizes("vocab")
    if by == "push":
        vc.push(built, url)
    else:
        continued(url, case)
    assert contents(objects, "vocab") == good
    assert vc.verify(url).ok


def test_table_leftovers_and_foreign_parts(built: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, objects = pushed(built)
    for name, content in contents(objects, "parts/000000.zarr").items():
        objects.put(name.replace("000000", "000077"), content)
    objects.put(f"parts/000000.zarr/{'ab' * 8}/ids/zarr.json", b"of a writer that came second")
    objects.put("samples.parquet", b"PAR1")
    done = vc.repair(url)
    assert (done.quarantined, done.removed, done.table_rebuilt) == (["parts/000077.zarr"], [], True)
    assert done.left == [f"parts/000000.zarr/{'ab' * 8}"]
    assert_same_rows(vc.open(built), vc.open(url))
    assert "abandoned; `--yes` removes it" in run("repair", url)[1]
    monkeypatch.setattr("vlsi_cache_cli.change._confirmed", lambda _: True)
    assert f"removed: parts/000000.zarr/{'ab' * 8}" in run("repair", url)[1]
    assert vc.repair(url, yes=True).removed == []
    assert vc.verify(url).ok


def test_a_part_that_was_made_again_meanwhile_stays(built: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record is not the one that was checked, which the condition of the write finds."""
    url, objects = pushed(built)
    good = contents(objects, "parts")
    flip(objects, damaged := named(objects, "parts/000001.zarr", "/ids/c/0/0/0"))
    record, replace, seen = "parts/000001.zarr/part.json", BucketObjects.replace, []

    def made_again(self: BucketObjects, key: str, data: bytes, *, etag: str | None) -> bool:
        """Another one has repaired and built between the check and the write."""
        seen.extend(self.sizes("quarantine"))
        self.put(damaged, good[damaged])
        self.put(record, good[record])  # another object with the same content
        return replace(self, key, data, etag=etag)

    with monkeypatch.context() as patch:
        patch.setattr(BucketObjects, "replace", made_again)
        with pytest.raises(CacheCorruptError, match=r"1.zarr/part.json` has changed on the store while it was read"):
            vc.repair(url)
    assert seen == ["quarantine/000001.zarr/part.json"]
    assert not objects.sizes("quarantine")
    assert contents(objects, "parts") == good
    flip(objects, damaged)
    assert vc.repair(url).missing_parts == [1]
    continued(url, case)
    assert vc.verify(url).ok


@pytest.mark.usefixtures("s3")
def test_conditional_writes_and_copies_on_a_real_server() -> None:
    objects = objects_of(new_url("s3"))
    assert isinstance(objects, BucketObjects)
    assert objects.put_new("record", b"one")
    first = objects.get("record").etag
    assert objects.replace("record", b"two", etag=first)
    assert objects.get("record").data == b"two"
    assert not objects.replace("record", b"three", etag=first)
    objects.copy("record", "quarantine/a b")
    assert contents(objects) == {"record": b"two", "quarantine/a b": b"two"}


def test_a_replacement_whose_answer_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The retry is told that the object is another one, and it is ours."""
    import obstore
    from obstore.exceptions import PreconditionError

    objects, put = objects_of(new_url()), obstore.put
    assert isinstance(objects, BucketObjects)
    objects.put("record", b"one")

    def lose(store: Any, path: str, data: bytes, **options: Any) -> None:
        put(store, path, data, **options)
        raise PreconditionError("the ETag is another one")

    monkeypatch.setattr(obstore, "put", lose)
    assert objects.replace("record", b"two", etag=objects.get("record").etag)


@pytest.mark.parametrize("step", ["replace", "copy", "delete"])
def test_a_kill_in_the_middle(built: Path, case: Case, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """At every step: the part is not taken for one, and the next repair goes on."""
    url, objects = pushed(built)
    flip(objects, named(objects, "parts/000001.zarr", "/ids/c/0/0/0"))
    whole, calls = getattr(BucketObjects, step), []

    def killed(self: BucketObjects, *args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == (3 if step == "delete" else 1):  # after the table and the files: the record's own place
            raise KeyboardInterrupt
        return whole(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BucketObjects, step, killed)
        with pytest.raises(KeyboardInterrupt):
            vc.repair(url)
    assert not vc.verify(url).ok
    assert (
        CacheWriter.create_or_resume(url, header_of(case), case.vocab_order).missing_parts() == []
    )  # held by the mark
    assert vc.repair(url).missing_parts == [1]
    continued(url, case)
    assert vc.verify(url).ok


def test_what_cannot_be_read_now_is_not_moved(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, objects = pushed(built)
    before, get = contents(objects), BucketObjects.get

    def refused(self: BucketObjects, key: str, **options: Any) -> Any:
        if "/ids/c/" in key:
            raise StoreError(f"`{self.url / key}` cannot be read", file=self.url / key)
        return get(self, key, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BucketObjects, "get", refused)
        for check in (vc.repair, vc.verify):
            with pytest.raises(StoreError, match="cannot be read"):
                check(url)
    assert contents(objects) == before


def test_what_is_no_cache_that_can_be_repaired(built: Path) -> None:
    with pytest.raises(SpecError, match=r"`hf://datasets/a/b` cannot be repaired: a data set of the hub is only read"):
        vc.repair("hf://datasets/a/b")
    url, objects = pushed(built)
    objects.delete([name for name in objects.sizes() if not name.startswith("vocab/")])
    assert vc.repair(url).interrupted_start
    objects.put("cache.json", b"{}")
    with pytest.raises(CacheCorruptError, match=f"`{url}/cache.json`"):
        vc.repair(url)
