"""Students and verbalizers trained by several processes of one launch: as by one, whatever their number."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launch import environment, free_port, run_together
from helpers.runs import metrics_of
from helpers.tiny import write_spec
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import vlsi_cache as vc
from vlsi_cache import processes as processes_module
from vlsi_cache.config.spec import apply_overrides
from vlsi_cache.errors import ProcessLostError, SpecError
from vlsi_cache.processes import Processes, joined, speaks
from vlsi_cache.runs import checkpoints
from vlsi_cache.runs.shards import write_shards
from vlsi_cache.store.reader import Cache
from vlsi_cache.train import interact, sft

CHANGES = ("distill.batch_size=6", "distill.micro_batch_size=1", "distill.lora.dropout=0.2", "run.workers=0")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Cache:
    folder = tmp_path_factory.mktemp("processes")
    return vc.build_teacher(vc.load_spec(write_spec(folder, teacher_folder)), out=folder / "cache")


@pytest.fixture(scope="module")
def alone(cache: Cache, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    return vc.distill(cache.path, student=str(student_folder), out=out, overrides=CHANGES)


def distilled(cache: Cache, student: Path, out: Path, world: int, *more: str) -> list[Any]:
    def work(_: int) -> Path:
        return vc.distill(cache.path, student=str(student), out=out, overrides=[*CHANGES, *more])

    return run_together(world, work)


def assert_same(run: Path, alone: Path) -> None:
    lines, wanted = metrics_of(run), metrics_of(alone)
    assert [(line["stage"], line["step"]) for line in lines] == [(line["stage"], line["step"]) for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert line.get("matched_layers") == other.get("matched_layers")
        assert line.keys() == other.keys()  # probes too
        for layer, loss in other.get("layers", {}).items():
            assert line["layers"][layer] == pytest.approx(loss, abs=1e-4)
    ids = torch.arange(3, 35)[None]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(one / "student")(ids).logits for one in (run, alone))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("world", "parallel"), [(2, "ddp"), (3, "fsdp")])
def test_any_number_of_processes_trains_the_same_student(
    world: int, parallel: str, cache: Cache, alone: Path, student_folder: Path, tmp_path: Path
) -> None:
    more = (f"run.parallel={parallel}", "distill.checkpoint_steps=100")
    found = distilled(cache, student_folder, tmp_path / "run", world, *more)
    assert found == [tmp_path / "run"] * world
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"
    assert (tmp_path / "run" / "report.html").is_file()
    assert_same(tmp_path / "run", alone)


def signal_process_1(patch: pytest.MonkeyPatch, stage: Any, *, step: int, number: signal.Signals) -> None:
    """Send it a signal when its gradients of a step of this stage are summed, before it takes the step."""
    take = stage.optimizer_step

    def signalled(optimizer: Any, schedule: Any, index: int, num_steps: int) -> float:
        if index == step - 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)
        return take(optimizer, schedule, index, num_steps)

    patch.setattr(stage, "optimizer_step", signalled)


def test_a_killed_process_ends_the_others_and_another_number_goes_on(
    cache: Cache, alone: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signal_process_1(patch, interact, step=4, number=signal.SIGKILL)
        first, second = distilled(cache, student_folder, tmp_path / "run", 2, "distill.checkpoint_steps=2")
    assert isinstance(first, ProcessLostError)
    assert "another process of this launch has ended" in str(first)
    assert second is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / "interact-0000002").is_dir()
    distilled(cache, student_folder, tmp_path / "run", 3, "distill.checkpoint_steps=2")
    assert_same(tmp_path / "run", alone)


def test_a_signal_to_one_process_saves_the_step_of_all(
    cache: Cache, alone: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signal_process_1(patch, sft, step=2, number=signal.SIGTERM)
        found = distilled(cache, student_folder, tmp_path / "run", 2)
    assert [type(one).__name__ for one in found] == ["InterruptedRunError"] * 2
    assert (tmp_path / "run" / "checkpoints" / "sft-0000002").is_dir()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    vc.distill(cache.path, student=str(student_folder), out=tmp_path / "run", overrides=CHANGES)
    assert_same(tmp_path / "run", alone)


def test_a_kill_while_shares_are_saved_leaves_the_checkpoint_before(
    cache: Cache, alone: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun by two processes, gone on with by three, finished by one."""
    run, often = tmp_path / "run", ("run.parallel=fsdp", "distill.checkpoint_steps=2")

    def killed(folder: Path, tensors: Any) -> None:
        write_shards(folder, tensors)
        if "interact-0000004" in folder.name and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_shards", killed)
        first, second = distilled(cache, student_folder, run, 2, *often)
    assert first is None
    assert isinstance(second, ProcessLostError)
    there = sorted(one.name for one in (run / "checkpoints").iterdir())
    assert [name for name in there if not name.startswith(".")] == ["interact-0000002", "verbalize-0000004"]
    assert any(name.startswith(".interact-0000004.tmp-") for name in there)
    with monkeypatch.context() as patch:
        signal_process_1(patch, sft, step=2, number=signal.SIGTERM)  # head and embeddings train too, by rows
        found = distilled(cache, student_folder, run, 3, *often)
    assert [type(one).__name__ for one in found] == ["InterruptedRunError"] * 3
    files = sorted(one.name for one in (run / "checkpoints" / "sft-0000002").iterdir())
    assert files == ["checkpoint.json", *(f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2, 3))]
    vc.distill(cache.path, student=str(student_folder), out=run, overrides=[*CHANGES, *often])
    assert_same(run, alone)


def test_a_process_without_rows_counts_for_nothing(
    student_folder: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token selection leaves one row in some samples and none in most. Begun by whole students, gone on with shares."""
    spec = vc.load_spec(write_spec(tmp_path, teacher_folder), overrides=["rows.select_tokens.random=0.05"])
    cache = vc.build_teacher(spec, out=tmp_path / "cache")
    counts = [len(row.positions_T) for row in (cache[name] for name in cache)]
    assert counts.count(0) > len(counts) / 2
    more = ["distill.recipe=last", "distill.sft.mode=full", "distill.gradient_checkpointing=true"]
    more += ["distill.verbalize.steps=1", "distill.interact.schedule.steps=3", "distill.sft.schedule.steps=2"]
    vc.distill(cache, student=str(student_folder), out=tmp_path / "alone", overrides=[*CHANGES, *more])
    with monkeypatch.context() as patch:
        signal_process_1(patch, interact, step=2, number=signal.SIGTERM)
        distilled(cache, student_folder, tmp_path / "run", 2, *more)
    assert (tmp_path / "run" / "checkpoints" / "interact-0000002" / "state.safetensors").is_file()
    distilled(cache, student_folder, tmp_path / "run", 2, *more, "run.parallel=fsdp")
    assert_same(tmp_path / "run", tmp_path / "alone")


def test_verbalizers_of_a_teacher(teacher_folder: Path, tmp_path: Path) -> None:
    changes = ["train_verbalizers.schedule.steps=4", "train_verbalizers.batch_size=4"]
    changes += ["train_verbalizers.micro_batch_size=2"]
    spec = vc.load_spec(write_spec(tmp_path, teacher_folder), overrides=changes)
    vc.train_verbalizers(spec, out=tmp_path / "alone")
    shared = apply_overrides(spec, ["run.parallel=fsdp"])
    found = run_together(2, lambda _: vc.train_verbalizers(shared, out=tmp_path / "together"))
    assert found == [tmp_path / "together"] * 2
    folders = [tmp_path / name / "verbalizers" for name in ("alone", "together")]
    files = sorted(path.name for path in folders[0].glob("*.safetensors"))
    assert files == sorted(path.name for path in folders[1].glob("*.safetensors"))
    for name in files:
        ours, theirs = (load_file(folder / name) for folder in folders)
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)


def test_what_cannot_be_shared_is_refused(
    cache: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = distilled(cache, student_folder, tmp_path / "run", 2, "distill.batch_size=3", "distill.micro_batch_size=1")
    assert all("2 processes cannot share a batch of 3 samples" in str(one) for one in found)
    assert "`distill.batch_size` that 2 divides" in str(found[0])
    found = distilled(cache, student_folder, tmp_path / "run", 2, "distill.micro_batch_size=6")
    assert "set `distill.micro_batch_size: 3`" in str(found[0])

    def other_spec(rank: int) -> Path:
        options = {"student": str(student_folder), "out": tmp_path / "run"}
        return vc.distill(cache.path, overrides=[*CHANGES, f"distill.seed={rank}"], **options)

    found = run_together(2, other_spec)
    assert all(isinstance(one, SpecError) and "do not see the same" in str(one) for one in found)
    assert str(found[0]).splitlines()[1:] == ["  - spec.distill.seed: `1` in process 1, `0` in process 0"]
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    found = distilled(cache, student_folder, tmp_path / "run", 2)
    assert all("asks for FSDP" in str(one) and "--set run.parallel=fsdp" in str(one) for one in found)


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_an_environment_that_no_launcher_makes(
    rank: str, world: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(SpecError, match="start this with torchrun"), joined():
        pass
    code, _, err = run("specs")
    assert (code, err.count("start this with torchrun")) == (2, 1)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_waits_for_others_says_so_and_can_be_stopped(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE set by hand, or a machine that never came."""

    def joining() -> str:
        err = io.StringIO()
        with redirect_stderr(err), pytest.raises((ProcessLostError, InterruptedError)) as caught, joined():
            pass
        return f"{err.getvalue()}{type(caught.value).__name__}: {caught.value}"

    def work(_: int) -> tuple[str, str]:
        os.environ.update(RANK=rank, WORLD_SIZE="2")
        monkeypatch.setattr(processes_module, "LATE_S", 0.1)
        monkeypatch.setattr(processes_module, "JOIN_S", 0.25)
        in_vain = joining()
        monkeypatch.setattr(processes_module, "JOIN_S", 100.0)

        def stop(*_: Any) -> None:
            raise InterruptedError

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.25)
        return in_vain, joining()

    ((in_vain, stopped),) = run_together(1, work, timeout_s=30)
    assert f"process {rank} of 2 waits for the others at 127.0.0.1:" in in_vain
    assert "not all others came; start all of them with torchrun, or unset RANK" in in_vain
    assert "InterruptedError" in stopped


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_lost_process_is_told_of_where_nobody_can_be_asked(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process has been killed, and with it the store it held."""
    monkeypatch.setattr(processes_module, "TOLD_S", timedelta(seconds=0.2))
    for name, value in environment(int(rank), 2, free_port()).items():
        monkeypatch.setenv(name, value)
    assert speaks("lost", is_lost=True)


def test_a_group_that_has_fallen_back_is_refused() -> None:
    """As with accelerate on a CPU: each process is alone, and believes to be the first."""

    def work(_: int) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
        with joined():
            pass

    found = run_together(2, work)
    assert all("has fallen back" in str(one) for one in found)


def test_gradients_are_summed_where_some_processes_have_none() -> None:
    def work(rank: int) -> list[Any]:
        parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in SHAPES]
        for number, one in enumerate(parameters[:-1]):
            if number != rank:
                one.grad = torch.full_like(one, 1 + rank + 10 * number)
        with joined() as processes:
            processes.sum_gradients(torch.optim.AdamW(parameters))
        return [None if one.grad is None else one.grad.tolist() for one in parameters]

    SHAPES = ((2, torch.float32), (3, torch.float64), (1, torch.float64), (4, torch.float32))
    assert run_together(2, work) == [[[2.0] * 2, [11.0] * 3, [43.0], None]] * 2


def test_the_first_one_s_error_is_that_of_all() -> None:
    def refused() -> None:
        raise SpecError("no such thing", hint="leave it")

    def work(_: int) -> None:
        with joined() as processes:
            processes.from_first(refused)

    assert [str(one) for one in run_together(2, work)] == ["no such thing; leave it"] * 2


def test_one_alone_asks_nobody() -> None:
    alone = Processes()
    assert alone.gather(3) == [3]
    assert alone.from_first(lambda: 4) == 4
    assert alone.own_device(None, "cuda:1") is None
    with joined() as found:
        assert (found.rank, found.world) == (0, 1)


def test_torchrun_on_the_command_line(cache: Cache, alone: Path, student_folder: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vlsi_cache_cli"]
    command = ["distill", str(cache.path), "--student", str(student_folder), "-o", str(tmp_path / "run"), "--json"]
    sets = [word for change in CHANGES for word in ("--set", change)]
    done = subprocess.run([*launch, *command, *sets], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(tmp_path / "run")  # one answer
    assert done.stderr.count("vlsi: verbalize") == 1  # and one voice
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["command"].startswith("torchrun --nproc-per-node 2 -m vlsi_cache_cli distill ")
    assert_same(tmp_path / "run", alone)


def test_commands_of_one_process_say_so(run: Any, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, wanted in (("0", "error: `stats` is one process, and 2 were started"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        code, out, err = run("stats", cache.path)
        assert (code, out) == (2, "")
        assert err.startswith(wanted)
        assert bool(err) == bool(wanted)
