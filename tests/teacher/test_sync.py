"""A cache that follows its data: what a build from nothing would hold, of which only what is new is made."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import make_rows, write_jsonl, write_spec

import vlsi_cache as vc
from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.errors import CacheCorruptError, CacheIncompleteError, FingerprintMismatchError, SpecError
from vlsi_cache.processes import ALONE
from vlsi_cache.store.format import RECORD_NAME
from vlsi_cache.store.reader import Cache
from vlsi_cache.store.writer import CacheWriter
from vlsi_cache.teacher import sync
from vlsi_cache.teacher.forward import Teacher
from vlsi_cache.teacher.inputs import open_teacher_inputs
from vlsi_cache.teacher.recompute import recompute

GONE, CHANGED, NEW = ("row-3", "row-17"), ("row-5",), 6
Ran = list[str]


def make_spec(folder: Path, teacher: Path) -> CacheSpec:
    return vc.load_spec(write_spec(folder, teacher), overrides=["store.profile=exact"])


@pytest.fixture(scope="module")
def built(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches of the data as it was, and from nothing of the data as `change_data` leaves it."""
    folder = tmp_path_factory.mktemp("sync")
    spec = make_spec(folder, teacher_folder)
    vc.build_teacher(spec, out=folder / "old")
    change_data(folder)
    vc.build_teacher(spec, out=folder / "changed")
    return {name: folder / name for name in ("old", "changed")}


@pytest.fixture
def spec(built: dict[str, Path], teacher_folder: Path, tmp_path: Path) -> CacheSpec:
    """Its data is as it was, and `tmp_path / "cache"` the cache of it."""
    shutil.copytree(built["old"], tmp_path / "cache")
    return make_spec(tmp_path, teacher_folder)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Ids of the samples that have gone through the teacher."""
    found: Ran = []
    launch = Teacher.launch

    def counted(self: Teacher, prepared: Any) -> Any:
        found.extend(self.inputs.records[index].id for index in prepared.work.indices)
        return launch(self, prepared)

    monkeypatch.setattr(Teacher, "launch", counted)
    return found


def change_data(folder: Path) -> set[str]:
    """Some rows go, one says something else, others come; the ids that need the teacher."""
    rows = [row for row in make_rows(40) if row["id"] not in GONE]
    for row in rows:
        if row["id"] in CHANGED:
            row["messages"][-1]["content"] += " indeed"
    more = make_rows(NEW, start=500)
    write_jsonl(folder / "rows.jsonl", [*more[:2], *rows, *more[2:]])
    return {*CHANGED, *(row["id"] for row in more)}


def arrays_of(root: Path) -> dict[str, int]:
    """The inodes of all files of parts but the commit records, by path."""
    files = (path for path in (root / "parts").rglob("*") if path.is_file() and path.name != RECORD_NAME)
    return {str(path.relative_to(root)): path.stat().st_ino for path in files}


def assert_as_built_anew(synced: Cache, from_nothing: Path) -> None:
    whole = vc.open_cache(from_nothing)
    assert synced.header.fingerprint == whole.header.fingerprint
    assert synced.num_tokens == synced.header.num_response_tokens == whole.num_tokens
    found = vc.diff(synced, whole, samples=100)
    assert [found.only_a, found.only_b, found.other_responses, found.other_records] == [[]] * 4
    assert found.num_compared == whole.num_samples
    assert all(layer.max_dlogp < 1e-5 and not layer.only_a and not layer.only_b for layer in found.layers)
    assert vc.verify(synced.path, deep=True).ok


def test_only_what_is_new_goes_through_the_teacher(
    spec: CacheSpec, built: dict[str, Path], tmp_path: Path, ran: Ran
) -> None:
    old = vc.open_cache(tmp_path / "cache")
    before, parts = arrays_of(old.path), len(old.parts)
    untouched = {part for part in old.parts if not {*old.part_record(part).sample_ids} & {*GONE, *CHANGED}}
    assert 0 < len(untouched) < parts
    wanted = change_data(tmp_path)
    ran.clear()
    synced = vc.sync_cache(spec, out=tmp_path / "cache")
    assert sorted(ran) == sorted(wanted)
    after = arrays_of(synced.path)
    for part in untouched:  # none was left empty, so that all keep their numbers
        own = [path for path in before if path.startswith(f"parts/{part:06d}.zarr")]
        assert own
        assert all(after[path] == before[path] for path in own)
    assert not (tmp_path / ".cache.sync").exists()
    assert synced.header.parents[0]["num_kept"] == 40 - len(GONE) - len(CHANGED)
    assert synced.header.parents[0]["num_added"] == len(wanted)
    assert_as_built_anew(synced, built["changed"])
    ran.clear()
    assert vc.sync_cache(spec, out=tmp_path / "cache").header.digest == synced.header.digest
    assert vc.build_teacher(spec, out=tmp_path / "cache").header.digest == synced.header.digest
    assert not ran


def test_a_student_trains_on_it_and_its_rows_are_the_teachers(
    spec: CacheSpec, tmp_path: Path, student_folder: Path
) -> None:
    change_data(tmp_path)
    cache = vc.sync_cache(spec, out=tmp_path / "cache")
    report = recompute(cache, num_samples=12)
    assert report.ok, str(report)
    short = ["distill.recipe=last", *(f"distill.{stage}.steps=1" for stage in ("verbalize", "interact.schedule"))]
    assert (vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=short) / "student").is_dir()


def test_rows_that_only_leave_need_no_teacher(
    spec: CacheSpec, built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = vc.open_cache(tmp_path / "cache")
    of_part_0 = cache.part_record(0).sample_ids
    write_jsonl(tmp_path / "rows.jsonl", [row for row in make_rows(40) if row["id"] not in of_part_0])
    monkeypatch.setattr(sync, "load_teacher", None)
    synced = vc.sync_cache(spec, out=tmp_path / "cache")
    assert len(synced.parts) == len(cache.parts) - 1
    assert set(synced) == {f"row-{number}" for number in range(40)} - set(of_part_0)
    assert vc.verify(synced.path, deep=True).ok
    before = vc.diff(synced, built["old"])
    assert before.num_compared == len(synced)
    assert all(layer.is_equal for layer in before.layers)


@contextmanager
def dying_at(name: str, number: int) -> Iterator[None]:
    """The writer's method `name` raises, as a kill would, when it is called for the `number`-th time."""
    act: Callable[..., Any] = getattr(CacheWriter, name)
    calls = []

    def dies(self: CacheWriter, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return act(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, name, dies)
        yield


@pytest.mark.parametrize(("name", "number"), [("adopt_part", 2), ("write_encoded", 3), ("finish", 1)])
def test_a_killed_sync_leaves_the_old_cache_and_goes_on(
    name: str,
    number: int,
    spec: CacheSpec,
    built: dict[str, Path],
    tmp_path: Path,
    ran: Ran,
) -> None:
    old = vc.open_cache(tmp_path / "cache")
    wanted = change_data(tmp_path)
    ran.clear()
    with dying_at(name, number), pytest.raises(KeyboardInterrupt):
        vc.sync_cache(spec, out=tmp_path / "cache")
    assert vc.open_cache(tmp_path / "cache").header.digest == old.header.digest
    assert vc.verify(tmp_path / "cache").ok
    if name == "finish":  # all parts are there
        assert sorted(ran) == sorted(wanted)
        ran.clear()
    synced = vc.sync_cache(spec, out=tmp_path / "cache")
    assert bool(ran) == (name != "finish")
    assert_as_built_anew(synced, built["changed"])


def test_data_that_changes_again_after_a_kill(
    spec: CacheSpec,
    built: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", make_rows(42))
    with dying_at("finish", 1), pytest.raises(KeyboardInterrupt):
        vc.sync_cache(spec, out=tmp_path / "cache")
    change_data(tmp_path)
    synced = vc.sync_cache(spec, out=tmp_path / "cache")
    assert "the data has changed since" in capsys.readouterr().err
    assert_as_built_anew(synced, built["changed"])


def test_several_processes_and_one_that_comes_too_late(spec: CacheSpec, tmp_path: Path, ran: Ran) -> None:
    old = vc.open_cache(tmp_path / "cache")
    wanted = change_data(tmp_path)
    ran.clear()
    late = sync.find_changes(old, open_teacher_inputs(spec))
    for rank in range(2):
        synced = vc.sync_cache(spec, out=tmp_path / "cache", rank=rank, world=2)
    assert sorted(ran) == sorted(wanted)
    # This one has read the old cache, and finds the new one in its place.
    inputs, work = open_teacher_inputs(spec), tmp_path / ".cache.sync"
    parts = [[] for _ in late.kept] + sync.parts_of(inputs, late.new)
    plan = sync.Plan(sync._synced_header(old, inputs, parts, late), parts, late)
    with pytest.raises(CacheCorruptError):
        sync._make(plan, old, work / "cache", inputs, device=None, rank=0, world=1, group=ALONE)
    shutil.copytree(synced.path, work / "cache")
    with pytest.raises(SpecError, match="has become another cache while it was synced"):
        sync._take_place(work, old)
    assert vc.open_cache(tmp_path / "cache").header.digest == synced.header.digest
    assert vc.verify(tmp_path / "cache", deep=True).ok


def test_a_part_that_a_synced_cache_has_lost_is_made_again(
    spec: CacheSpec, built: dict[str, Path], tmp_path: Path, ran: Ran
) -> None:
    change_data(tmp_path)
    synced = vc.sync_cache(spec, out=tmp_path / "cache")
    lost = synced.part_record(1).sample_ids
    record = tmp_path / "cache" / "parts" / "000001.zarr" / RECORD_NAME
    record.write_bytes(record.read_bytes()[:-20])
    assert vc.repair(tmp_path / "cache").quarantined
    with pytest.raises(CacheIncompleteError, match="--sync"):
        vc.open_cache(tmp_path / "cache")
    with pytest.raises(SpecError, match="--sync"):
        vc.build_teacher(spec, out=tmp_path / "cache")
    ran.clear()
    assert_as_built_anew(vc.sync_cache(spec, out=tmp_path / "cache"), built["changed"])
    assert sorted(ran[: len(lost)]) == sorted(lost)


def test_what_cannot_be_synced(spec: CacheSpec, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="pull it"):
        vc.sync_cache(spec, out="s3://bucket/cache")
    cache = vc.sync_cache(spec, out=tmp_path / "new")  # which builds it
    assert not cache.header.parents
    change_data(tmp_path)
    wider = vc.load_spec(tmp_path / "spec.yaml", overrides=["store.profile=exact", "rows.top_k=9"])
    with pytest.raises(FingerprintMismatchError, match=r"`rows\.top_k`: the cache has 8, this run has 9"):
        vc.sync_cache(wider, out=tmp_path / "cache")
    vc.prune(cache, tmp_path / "pruned", layers=[2, "last"])
    with pytest.raises(FingerprintMismatchError, match="cannot be synced"):
        vc.sync_cache(spec, out=tmp_path / "pruned")
    (tmp_path / "cache" / "parts" / "000001.zarr").rename(tmp_path / "aside")
    os.unlink(tmp_path / "cache" / "samples.parquet")
    with pytest.raises(CacheIncompleteError, match="end its build first"):
        vc.sync_cache(spec, out=tmp_path / "cache")


def test_new_rows_beside_kept_ones_with_one_prompt(spec: CacheSpec, tmp_path: Path, ran: Ran) -> None:
    """A row whose left neighbour has its rows already starts from the beginning of the prompt."""
    rows = make_rows(12)
    shutil.rmtree(tmp_path / "cache")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    vc.build_teacher(spec, out=tmp_path / "cache")
    twins = [json.loads(json.dumps(row)) for row in rows[:4]]
    for twin in twins:
        twin["id"] = f"twin-{twin['id']}"
        twin["messages"][-1]["content"] = "quite another answer"
    paired = [row for pair in zip(rows[:4], twins, strict=True) for row in pair]
    write_jsonl(tmp_path / "rows.jsonl", [*paired, *rows[4:]])
    ran.clear()
    synced = vc.sync_cache(spec, out=tmp_path / "cache")
    assert sorted(ran) == sorted(twin["id"] for twin in twins)
    assert np.isfinite(synced["twin-row-0"].logprobs_LTK[..., 0]).all()
    assert_as_built_anew(synced, vc.build_teacher(spec, out=tmp_path / "whole").path)


def test_kinds_and_the_order_of_rows_follow_without_the_teacher(spec: CacheSpec, tmp_path: Path, ran: Ran) -> None:
    rows = make_rows(40)
    for row in rows[::3]:
        row["kind"] = "hard"
    write_jsonl(tmp_path / "rows.jsonl", [row for row in rows[::-1] if row["id"] != "row-7"])
    before = arrays_of(tmp_path / "cache")
    synced = vc.sync_cache(spec, out=tmp_path / "cache")
    assert not ran
    table = synced.sample_table()
    kinds = dict(zip(table["id"].to_pylist(), table["kind"].to_pylist(), strict=True))
    assert kinds == {row["id"]: row.get("kind", "") for row in rows if row["id"] != "row-7"}
    assert len([path for path, inode in arrays_of(synced.path).items() if before.get(path) == inode]) > len(before) / 2
    assert_as_built_anew(synced, vc.build_teacher(spec, out=tmp_path / "whole").path)
    assert vc.diff(synced, tmp_path / "whole").header == {}


def test_a_link_stays_and_the_folder_it_names_is_synced(
    spec: CacheSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    change_data(tmp_path)
    synced = vc.sync_cache(spec, out=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert vc.open_cache(tmp_path / "cache").header.digest == synced.header.digest
    write_jsonl(tmp_path / "rows.jsonl", make_rows(39))
    monkeypatch.chdir(tmp_path / "cache")
    assert vc.sync_cache(spec, out=".").num_samples == 39
