"""`run.batch_tokens: auto`: which number is found and why, that it is recorded, and that it is taken again."""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.builds import part_bytes
from helpers.tiny import make_rows, write_jsonl

import vlsi_cache as vc
from vlsi_cache.errors import BatchTooLargeError
from vlsi_cache.store.writer import CacheWriter
from vlsi_cache.teacher import batch_size, build
from vlsi_cache.teacher.batch_size import Trial, grow
from vlsi_cache.teacher.build import build_teacher
from vlsi_cache.teacher.inputs import open_teacher_inputs
from vlsi_cache.teacher.recompute import recompute


def found(
    shares: dict[int, float], speeds: dict[int, float], *, start: int = 256, most: int = 10**9
) -> tuple[int, str]:
    """`grow` over batches that hold as many tokens as they may, `most` at most."""

    def run(batch: list[int]) -> Trial:
        size = len(batch)
        if size not in shares:
            raise BatchTooLargeError("out of memory")
        return Trial(size, shares[size], speeds.get(size, float(size)))

    return grow(lambda tokens: list(range(min(tokens, most))), len, run, start)


@pytest.mark.parametrize(
    ("shares", "speeds", "most", "number", "reason"),
    [
        ({256: 0.1, 512: 0.2, 1024: 0.4}, {}, 10**9, 1024, "2048 would take about 80%"),
        ({256: 0.1, 512: 0.2, 1024: 0.3}, {}, 10**9, 1024, "2048 is out of memory"),
        ({256: 0.1, 512: 0.3, 1024: 0.85}, {}, 10**9, 512, "1024 takes 85%"),
        ({256: 0.01, 512: 0.02, 1024: 0.04}, {256: 100, 512: 200, 1024: 209}, 10**9, 512, "no faster (209 tokens/s)"),
        ({256: 0.01, 512: 0.02}, {}, 512, 512, "a larger one would not put more samples together"),
        ({256: 2.0}, {}, 10**9, 256, "512 would take about 400%"),
    ],
)
def test_where_it_stops_and_why(
    shares: dict[int, float], speeds: dict[int, float], most: int, number: int, reason: str
) -> None:
    shares = {size: share + 1e-9 for size, share in shares.items()}
    got, why = found(shares, speeds, most=most)
    assert (got, reason in why) == (number, True), why


def test_a_cap_and_a_sample_that_does_not_fit() -> None:
    sizes = [1 << power for power in range(8, 25)]
    got, why = found(dict.fromkeys(sizes, 1e-6), {})
    assert (got, "larger ones are not tried" in why) == (batch_size.MOST_TOKENS, True)
    with pytest.raises(BatchTooLargeError):
        found({}, {})
    assert grow(lambda _: [], len, lambda _: pytest.fail("nothing to run"), 1)[0] == 1


def test_memory_that_is_used_is_seen() -> None:
    """In a process of its own: one that has run much before may have the memory already."""
    code = """
        import torch
        from vlsi_cache.teacher import batch_size
        cpu = torch.device("cpu")
        available = batch_size.available_bytes(cpu)
        assert 2**26 < available < 2**46
        gauge = batch_size.memory_gauge({cpu})
        nothing, much = gauge(lambda: None), gauge(lambda: torch.ones(2**24).sum())
        print((much - nothing) * available)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(2**26, rel=0.5), done.stderr


@pytest.mark.parametrize(
    ("names", "limit", "left"),
    [
        (("memory.max", "memory.current", "inactive_file"), "5000", 5000 - 3000 + 700),
        (("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"), "5000", 2700),
        (("memory.max", "memory.current", "inactive_file"), "max", None),
    ],
)
def test_the_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str, str], limit: str, left: int | None
) -> None:
    monkeypatch.setattr(batch_size, "CGROUP", tmp_path)
    without = batch_size.available_bytes(torch.device("cpu"))
    (tmp_path / "memory").mkdir()
    (tmp_path / names[0]).write_text(f"{limit}\n")
    (tmp_path / names[1]).write_text("3000\n")
    (tmp_path / names[0]).with_name("memory.stat").write_text(f"anon 5\n{names[2]} 700\n")
    found = batch_size.available_bytes(torch.device("cpu"))
    assert found == left if left is not None else found > without / 2


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
    assert number >= max(open_teacher_inputs(spec).lengths([0]))
    assert recompute(cache, num_samples=3).ok
