"""`run.batch_tokens: auto`: which number is found and why, that it is recorded, and that it is taken again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.builds import part_bytes
from helpers.tiny import make_rows, write_jsonl

import vlsi_cache as vc
from vlsi_cache.config.sections import DEFAULT_BATCH_TOKENS
from vlsi_cache.data.sequence import PADDED
from vlsi_cache.errors import BatchTooLargeError
from vlsi_cache.store.writer import CacheWriter
from vlsi_cache.teacher import build
from vlsi_cache.teacher.build import build_teacher
from vlsi_cache.teacher.inputs import open_teacher_inputs
from vlsi_cache.teacher.recompute import recompute


def found(speeds: dict[int, float], *, samples: int = 10**9, most: int = 10**9) -> tuple[int, str]:
    """`grow` over batches that hold as many tokens as they may, `samples` at most; sizes without a speed do not fit."""

    def speed(batch: list[int]) -> float:
        if len(batch) not in speeds:
            raise BatchTooLargeError("out of memory")
        return speeds[len(batch)]

    return build.grow(lambda tokens: list(range(min(tokens, samples))), speed, start=256, most=most)


@pytest.mark.parametrize(
    ("speeds", "limits", "number", "reason"),
    [
        ({256: 100, 512: 200, 1024: 300}, {}, 1024, "300 tokens/s; 2048 is out of memory"),
        ({256: 100, 512: 200, 1024: 209}, {}, 512, "200 tokens/s; 1024 is no faster (209 tokens/s)"),
        ({256: 100, 512: 200}, {"samples": 512}, 512, "a larger one would not put more samples together"),
        ({256: 100, 512: 200, 1024: 300, 2048: 400}, {"most": 1024}, 1024, "300 tokens/s; larger ones are not tried"),
    ],
)
def test_where_it_stops_and_why(speeds: dict[int, float], limits: dict[str, int], number: int, reason: str) -> None:
    got, why = found(speeds, **limits)
    assert (got, reason in why) == (number, True), why


def test_no_data_and_a_sample_that_does_not_fit() -> None:
    with pytest.raises(BatchTooLargeError):
        found({})
    nothing = build.grow(lambda _: [], lambda _: pytest.fail("nothing to run"), start=1, most=2)
    assert nothing == (1, "there is no data")


AUTO = "run.batch_tokens=auto"


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What the search will find, one number a search; searching more often is an error."""
    wanted: list[int] = []
    monkeypatch.setattr(build, "find_batch_tokens", lambda *_: wanted.pop(0))
    yield wanted
    assert wanted == []


def test_the_number_found_is_recorded_and_taken_again(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: list[int], capsys: Any
) -> None:
    build_teacher(vc.load_spec(spec_file, overrides=["run.batch_tokens=150"]), out=tmp_path / "said")
    build_teacher(vc.load_spec(spec_file, overrides=["run.batch_tokens=60"]), out=tmp_path / "other")
    write, written = CacheWriter.write_part, []

    def stop_after_one(self: CacheWriter, index: int, samples: Any) -> bool:
        if written:
            raise OSError("power cut")
        written.append(index)
        return write(self, index, samples)

    spec, out = vc.load_spec(spec_file, overrides=[AUTO]), tmp_path / "auto"
    numbers.append(150)
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_part", stop_after_one)
        with pytest.raises(OSError, match="power cut"):
            build_teacher(spec, out=out)
    sizes: list[int] = []
    plan = build.plan_batches
    monkeypatch.setattr(build, "plan_batches", lambda lengths, tokens: sizes.append(tokens) or plan(lengths, tokens))
    cache = build_teacher(spec, out=out, rank=1, world=2)  # searches no more
    assert set(sizes) == {150}
    assert "batch tokens: 150 (recorded in" in capsys.readouterr().err
    assert cache.header.spec["run"]["batch_tokens"] == 150
    assert cache.header.spec == vc.open(tmp_path / "said").header.spec
    assert part_bytes(out) == part_bytes(tmp_path / "said")
    sizes.clear()
    (out / "parts" / "000000.zarr").rename(tmp_path / "taken")
    build_teacher(vc.load_spec(spec_file, overrides=["run.batch_tokens=60"]), out=out)
    assert set(sizes) == {60}  # what is said counts more than what is recorded


def test_two_processes_that_find_two_numbers_take_the_first_recorded(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: list[int]
) -> None:
    spec, out = vc.load_spec(spec_file, overrides=[AUTO]), tmp_path / "cache"
    numbers += [60, 150]
    settle = build.settled_batch_tokens

    def after_the_other(*args: Any) -> int:
        number = settle(*args)  # there is no cache yet: this one has found its number, and then the other is first
        if len(numbers) == 1:
            build_teacher(spec, out=out, rank=1, world=2)
            (out / "parts" / "000001.zarr").rename(tmp_path / "taken")
        return number

    monkeypatch.setattr(build, "settled_batch_tokens", after_the_other)
    sizes: list[int] = []
    plan = build.plan_batches
    monkeypatch.setattr(build, "plan_batches", lambda lengths, tokens: sizes.append(tokens) or plan(lengths, tokens))
    cache = build_teacher(spec, out=out)
    assert cache.header.spec["run"]["batch_tokens"] == 150
    assert set(sizes) == {150}
    monkeypatch.undo()
    build_teacher(vc.load_spec(spec_file, overrides=["run.batch_tokens=150"]), out=tmp_path / "said")
    assert part_bytes(out) == part_bytes(tmp_path / "said")


def test_a_real_search_and_what_else_reads_the_number(spec_file: Path, tmp_path: Path, capsys: Any) -> None:
    write_jsonl(tmp_path / "rows.jsonl", make_rows(40))
    spec = vc.load_spec(spec_file, overrides=[AUTO])
    assert spec.run.batch_tokens == "auto"
    vc.plan(spec)
    cache = build_teacher(spec, out=tmp_path / "cache")
    number = cache.header.spec["run"]["batch_tokens"]
    said = capsys.readouterr().err
    assert f"batch tokens: {number} (" in said
    assert "kernels: eager (no fused kernels needed on cpu)" in said
    assert max(open_teacher_inputs(spec).lengths([0], PADDED)) <= number <= DEFAULT_BATCH_TOKENS
    assert recompute(cache, num_samples=3).ok
