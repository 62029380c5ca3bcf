"""The build: rows against a hand-written logit lens, the same bytes after any crash, refusals, nothing too large."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.builds import dense_logprobs, part_bytes
from helpers.launch import run_together
from helpers.tiny import make_rows, write_jsonl, write_spec
from torch.utils._python_dispatch import TorchDispatchMode

import vlsi_cache as vc
from vlsi_cache.errors import DataError, DiskFullError, FingerprintMismatchError, ModelError, SpecError, VlsiCacheError
from vlsi_cache.store.writer import CacheWriter
from vlsi_cache.teacher.build import build_teacher
from vlsi_cache.teacher.forward import Teacher
from vlsi_cache.teacher.verbalize import train_verbalizers


def test_rows_equal_a_hand_written_logit_lens(spec_file: Path, teacher_folder: Path, tmp_path: Path) -> None:
    cache = build_teacher(vc.load_spec(spec_file), out=tmp_path / "cache")
    assert cache.layers == [1, 2, 3, 4, 5]
    assert len(cache) == 40
    for source in make_rows(40)[::6]:
        row = cache[str(source["id"])]
        dense, ids = dense_logprobs(teacher_folder, source, cache.layers)
        np.testing.assert_array_equal(row.response_ids_R, ids)
        order = np.argsort(-dense, axis=-1, kind="stable")[..., :8]
        kept = np.take_along_axis(dense, order, -1)
        # Ids agree but where two fp32 logits are closer than the rounding between two ways to compute them.
        own = np.take_along_axis(dense, row.ids_LTK.astype(np.int64), -1)
        np.testing.assert_allclose(own, kept, atol=1e-4)
        # One u8 level is 1/255 of p^(1/4), so p is off by about 2 p^(3/4) / 255; restoring the kept mass then scales
        # the row by at most the sum of these errors over the kept mass.
        kept_p, step = np.exp(kept), 2.05 * np.exp(0.75 * kept) / 255
        scaled = kept_p * step.sum(-1, keepdims=True) / kept_p.sum(-1, keepdims=True)
        assert (np.abs(np.exp(row.logprobs_LTK) - kept_p) <= step + scaled + 1e-6).all()
        np.testing.assert_allclose(row.tail_mass_LT, 1 - np.exp(kept).sum(-1), atol=1e-5)
        np.testing.assert_allclose(row.entropy_LT, -(np.exp(dense) * dense).sum(-1), atol=1e-4)
        gold = np.take_along_axis(dense, np.broadcast_to(ids[None, :, None], (5, len(ids), 1)), -1)[..., 0]
        np.testing.assert_allclose(row.gold_logprob_LT, gold, atol=1e-4)
        assert not (row.tail_ids_LTm[..., None] == row.ids_LTK[..., None, :]).any()


def test_an_interrupted_build_ends_in_the_same_bytes(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = vc.load_spec(spec_file)
    build_teacher(spec, out=tmp_path / "whole")
    write = CacheWriter.write_part
    written: list[int] = []

    def stop_after_two(self: CacheWriter, index: int, samples: Any) -> Any:
        if len(written) == 2:
            raise OSError("power cut")
        written.append(index)
        return write(self, index, samples)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_part", stop_after_two)
        with pytest.raises(OSError, match="power cut"):
            build_teacher(spec, out=tmp_path / "cut")
    with pytest.raises(VlsiCacheError, match=r"2 of \d+ parts|incomplete|not finished"):
        vc.open(tmp_path / "cut")
    build_teacher(spec, out=tmp_path / "cut")
    assert part_bytes(tmp_path / "cut") == part_bytes(tmp_path / "whole")


def test_two_ranks_fill_one_cache(spec_file: Path, tmp_path: Path) -> None:
    spec = vc.load_spec(spec_file)
    build_teacher(spec, out=tmp_path / "one")
    build_teacher(spec, out=tmp_path / "two", rank=1, world=2)
    assert part_bytes(tmp_path / "one") == part_bytes(tmp_path / "two")


def test_parts_that_others_have_written_meanwhile_are_left(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is done does not stay to make again what a slower one has made by then."""
    spec = vc.load_spec(spec_file)
    parts = len(build_teacher(spec, out=tmp_path / "one").parts)
    launch, begun = Teacher.launch, list[int]()

    def counted(self: Teacher, prepared: Any) -> Any:
        if prepared.work.part not in begun:
            begun.append(prepared.work.part)
        if begun == [0, 1] and not (tmp_path / "two" / "samples.parquet").exists():
            with monkeypatch.context() as patch:
                patch.setattr(Teacher, "launch", launch)
                build_teacher(spec, out=tmp_path / "two", rank=0, world=2)
        return launch(self, prepared)

    monkeypatch.setattr(Teacher, "launch", counted)
    build_teacher(spec, out=tmp_path / "two", rank=1, world=2)
    assert parts > 4
    assert len(begun) <= 4  # part 0 for the vocabulary order, its own first one, and what a thread had prepared
    assert part_bytes(tmp_path / "one") == part_bytes(tmp_path / "two")


def test_torchrun_numbers_the_processes_of_a_build(spec_file: Path, tmp_path: Path) -> None:
    spec = vc.load_spec(spec_file)
    build_teacher(spec, out=tmp_path / "one")
    missing_parts, write = CacheWriter.missing_parts, CacheWriter.write_part
    numbers, written = list[tuple[int, int]](), list[int]()

    def numbered(self: CacheWriter, rank: int = 0, world: int = 1) -> list[int]:
        numbers.append((rank, world))
        return missing_parts(self, rank, world)

    def noted(self: CacheWriter, index: int, samples: Any) -> bool:
        is_ours = write(self, index, samples)
        written.extend([index] * is_ours)
        return is_ours

    def work(_: int) -> tuple[tuple[int, int], list[int]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CacheWriter, "missing_parts", numbered)
            patch.setattr(CacheWriter, "write_part", noted)
            build_teacher(spec, out=tmp_path / "two")
        return numbers[0], written

    first, second = run_together(2, work)
    assert [first[0], second[0]] == [(0, 2), (1, 2)]
    # Each part is one process's, however much sooner one of them was there.
    assert sorted([*first[1], *second[1]]) == list(range(len(vc.open(tmp_path / "one").parts)))
    assert part_bytes(tmp_path / "one") == part_bytes(tmp_path / "two")


def test_a_finished_build_says_so_and_does_nothing(
    spec_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = vc.load_spec(spec_file)
    build_teacher(spec, out=tmp_path / "cache")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*") if f.is_file()}
    monkeypatch.setattr("vlsi_cache.teacher.build.load_teacher", None)  # would be an error if it were called
    build_teacher(spec, out=tmp_path / "cache")
    assert "nothing to do" in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*") if f.is_file()} == before


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("rows.top_k=9", "rows.top_k"),
        ("rows.tail_samples=2", "rows.tail_samples"),
        ("rows.taus=[1.0]", "rows.taus"),
        ("rows.seed=5", "rows.seed"),
        ("teacher.layers=[1,2,3]", "layers"),
        ("data.limit=39", "data.content"),
    ],
)
def test_another_setting_is_refused_with_both_values(
    spec_file: Path, tmp_path: Path, override: str, field: str
) -> None:
    build_teacher(vc.load_spec(spec_file), out=tmp_path / "cache")
    with pytest.raises(FingerprintMismatchError, match=field):
        build_teacher(vc.load_spec(spec_file, overrides=[override]), out=tmp_path / "cache")


def test_changed_order_and_content_of_the_data_are_refused(spec_file: Path, tmp_path: Path) -> None:
    build_teacher(vc.load_spec(spec_file), out=tmp_path / "cache")
    rows = make_rows(40)
    write_jsonl(tmp_path / "rows.jsonl", rows[::-1])
    with pytest.raises(FingerprintMismatchError, match=r"data\.content"):
        build_teacher(vc.load_spec(spec_file), out=tmp_path / "cache")
    rows[3]["messages"][1]["content"] += " more"  # type: ignore[index]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(FingerprintMismatchError, match=r"data\.content"):
        build_teacher(vc.load_spec(spec_file), out=tmp_path / "cache")


def test_rows_that_do_not_fit_are_listed_not_cut(spec_file: Path, tmp_path: Path) -> None:
    rows = make_rows(10)
    rows[4]["messages"][1]["content"] = "cat " * 80  # type: ignore[index]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    cache = build_teacher(vc.load_spec(spec_file), out=tmp_path / "cache")
    assert len(cache) == 9
    assert [entry["id"] for entry in cache.header.skipped] == ["row-4"]
    assert "max_length" in cache.header.skipped[0]["reason"]


def test_bad_places_and_layers(spec_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(VlsiCacheError, match="photos"):
        build_teacher(vc.load_spec(spec_file), out=other)
    assert [f.name for f in other.iterdir()] == ["holiday.jpg"]
    with pytest.raises(SpecError, match=r"\[9\].*5 layers"):
        build_teacher(vc.load_spec(spec_file, overrides=["teacher.layers=[2, 9]"]), out=tmp_path / "cache")
    write_jsonl(tmp_path / "rows.jsonl", [])
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        build_teacher(vc.load_spec(spec_file), out=tmp_path / "cache")
    with pytest.raises(ModelError, match="no-such/teacher"):
        build_teacher(vc.load_spec(spec_file, overrides=["teacher.model=no-such/teacher"]), out=tmp_path / "cache")


def test_a_full_disk_says_so_and_the_build_goes_on_later(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    spec = vc.load_spec(spec_file)
    build_teacher(spec, out=tmp_path / "whole")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.total, 0))
        with pytest.raises(DiskFullError, match="free"):
            build_teacher(spec, out=tmp_path / "cache")
    build_teacher(spec, out=tmp_path / "cache")
    assert part_bytes(tmp_path / "cache") == part_bytes(tmp_path / "whole")


class Largest(TorchDispatchMode):
    """Remembers the shape of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.shapes.add(tuple(value.shape))
        return result


def test_no_logits_of_prompt_tokens_or_of_several_layers_exist(spec_file: Path) -> None:
    from vlsi_cache.teacher.forward import load_teacher
    from vlsi_cache.teacher.inputs import open_teacher_inputs

    inputs = open_teacher_inputs(vc.load_spec(spec_file))
    teacher = load_teacher(inputs, device="cpu")
    indices = list(range(12))
    num_response = sum(len(inputs.response_ids[i]) for i in indices)
    num_positions = num_response + int(inputs.num_prompt_N[indices].sum())
    with Largest() as largest:
        teacher.rows(indices)
    weights = {tuple(p.shape) for p in teacher.backbone.model.parameters()}
    wide = [s for s in largest.shapes - weights if s and s[-1] >= inputs.encoder.vocab_size]
    assert wide, "the response tokens' logits of one layer must have been seen"
    assert max(int(np.prod(s[:-1])) for s in wide) <= num_response < num_positions


def test_verbalizers_of_another_teacher_are_refused(spec_file: Path, tmp_path: Path) -> None:
    from helpers.tiny import save_model

    other = save_model(tmp_path / "other", num_layers=5, hidden=32, seed=9)
    spec = vc.load_spec(spec_file, overrides=[f"teacher.model={other}", "train_verbalizers.schedule.steps=1"])
    run = train_verbalizers(spec, out=tmp_path / "verbalizers")
    wrong = vc.load_spec(spec_file, overrides=[f"teacher.verbalizers={run / 'verbalizers'}"])
    with pytest.raises(ModelError, match="trained for a model whose weights are"):
        build_teacher(wrong, out=tmp_path / "cache")


def test_trained_verbalizers_beat_the_logit_lens_and_training_resumes(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlsi_cache.run_files import read_metrics
    from vlsi_cache.train import verbalize

    spec = vc.load_spec(spec_file, overrides=["train_verbalizers.schedule.steps=24"])
    whole = train_verbalizers(spec, out=tmp_path / "whole")
    step = verbalize.optimizer_step

    def stop_at_step_14(optimizer: Any, schedule: Any, index: int, num_steps: int) -> float:
        if index == 13:
            raise KeyboardInterrupt
        return step(optimizer, schedule, index, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr(verbalize, "optimizer_step", stop_at_step_14)
        with pytest.raises(KeyboardInterrupt):
            train_verbalizers(spec, out=tmp_path / "cut")
    cut = train_verbalizers(spec, out=tmp_path / "cut")
    losses = [[line["layers"] for line in read_metrics(run / "metrics.jsonl")] for run in (whole, cut)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 24
    for file in (whole / "verbalizers").glob("*.safetensors"):
        assert file.read_bytes() == (cut / "verbalizers" / file.name).read_bytes()
    trained = vc.load_spec(spec_file, overrides=[f"teacher.verbalizers={whole / 'verbalizers'}"])
    spec = vc.load_spec(spec_file)
    lens, verbal = (build_teacher(s, out=tmp_path / n) for s, n in ((spec, "lens"), (trained, "verbal")))
    nll = [-np.concatenate([cache[i].gold_logprob_LT for i in cache], axis=1).mean(1) for cache in (lens, verbal)]
    assert (nll[1][:-1] < nll[0][:-1]).all()
    np.testing.assert_allclose(nll[1][-1], nll[0][-1], rtol=1e-5)  # the final layer has no verbalizer


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments_leaves_identical_parts(tmp_path: Path, teacher_folder: Path) -> None:
    spec_file = write_spec(tmp_path, teacher_folder, num_rows=400)
    command = [sys.executable, "-m", "vlsi_cache_cli.main", "build-teacher", str(spec_file), "-o"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, env=environment)
    whole_s, kills = time.monotonic() - started, 0
    while kills < 20:
        process = subprocess.Popen([*command, str(tmp_path / "cut")], stderr=subprocess.PIPE, env=environment)
        time.sleep(random.uniform(0.3, 1.0) * whole_s)
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        if not alive:  # it had finished: take two parts away, so that there is something to kill again
            for part in sorted((tmp_path / "cut" / "parts").iterdir())[:2]:
                part.rename(tmp_path / f"taken-{kills}-{part.name}")
    subprocess.run([*command, str(tmp_path / "cut")], check=True, capture_output=True, env=environment)
    assert part_bytes(tmp_path / "cut") == part_bytes(tmp_path / "whole")
    assert vc.open(tmp_path / "cut").verify(deep=True).ok
