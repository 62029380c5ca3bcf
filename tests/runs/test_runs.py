"""Run folders: who may work on one, what a kill leaves in it, what it says about itself."""

import json
import os
import pathlib
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import make_rows, write_jsonl

import vlsi_cache as vc
from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.errors import DiskFullError, FingerprintMismatchError, ModelError, RunBusyError, SpecError
from vlsi_cache.io import replacing
from vlsi_cache.report.pages import ensure_report, run_page
from vlsi_cache.runs import metrics
from vlsi_cache.runs import run_dir as runs_module
from vlsi_cache.runs.metrics import read_run
from vlsi_cache.runs.run_dir import WHOLE_BATCH, already_done, finish_run, open_run, spec_changes_note


@pytest.fixture
def spec(spec_file: Path) -> CacheSpec:
    return vc.load_spec(spec_file)


def opened(path: Path, spec: CacheSpec) -> Any:
    return open_run(path, "distill", spec, device=None, call="vlsi_cache.distill()")


def test_one_process_at_a_time(spec: CacheSpec, tmp_path: Path) -> None:
    with opened(tmp_path / "run", spec):
        (tmp_path / "run" / ".student.tmp-first").mkdir()
        with pytest.raises(RunBusyError, match=f"process {os.getpid()} on host {socket.gethostname()}"):
            opened(tmp_path / "run", spec).__enter__()
        assert (tmp_path / "run" / ".student.tmp-first").is_dir()  # what the first one is writing stays
    with opened(tmp_path / "run", spec):
        pass


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # from Python 3.12: the child has no threads
def test_a_killed_process_lets_go_of_its_run(spec: CacheSpec, tmp_path: Path) -> None:
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with opened(tmp_path / "run", spec):
                os.write(writes, b"open")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writes)
    try:
        assert os.read(reads, 4) == b"open"
        with pytest.raises(RunBusyError, match=f"process {child} on host"):
            opened(tmp_path / "run", spec).__enter__()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reads)
    with opened(tmp_path / "run", spec) as run:
        assert not run.is_done


def test_what_a_kill_leaves_is_removed_and_nothing_else(spec: CacheSpec, tmp_path: Path) -> None:
    killed: list[Any] = []

    def half_of(target: Path) -> Path:
        killed.append(replacing(target))
        return killed[-1].__enter__()

    run = tmp_path / "run"
    run.mkdir()
    half_of(run / "run.json").write_text("half")  # killed before there was a run.json
    (run / ".lock").write_text("")
    with opened(run, spec):
        pass
    assert {file.name for file in run.iterdir()} == {".lock", "run.json"}
    student = half_of(run / "student")
    for folder in (student, run / "checkpoints", run / "verbalizers"):
        folder.mkdir()
    (student / "model.safetensors").write_text("half")
    half_of(run / "verbalizers" / "layer_0001.safetensors").write_text("half")
    (run / "verbalizers" / "layer_0002.safetensors").write_text("whole")
    half_of(run / "metrics.jsonl").write_text("half")
    (run / "notes.txt").write_text("mine")
    with opened(run, spec):
        pass
    left = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    assert left == {".lock", "run.json", "notes.txt", "verbalizers/layer_0002.safetensors"}
    assert not student.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".run.json.tmp-0123").write_text("half")
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(SpecError, match="no run of ours"):
        opened(tmp_path / "mine", spec).__enter__()
    assert {file.name for file in (tmp_path / "mine").iterdir()} == {".run.json.tmp-0123", "thesis.tex"}


def test_a_file_system_without_locks_is_said(
    spec: CacheSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_args: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(runs_module.fcntl, "flock", no_locks)
    with opened(tmp_path / "run", spec):
        pass
    assert "cannot be locked on this file system (Function not implemented)" in capsys.readouterr().err


def test_a_report_that_a_kill_kept_away_is_written_by_the_next_call(spec: CacheSpec, tmp_path: Path) -> None:
    with opened(tmp_path / "run", spec) as run:
        assert not already_done(run)
        finish_run(run, stages=[])
    with opened(tmp_path / "run", spec) as run:
        assert already_done(run)
        ensure_report(run.path)
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_run_that_has_failed_says_so_and_why_until_it_is_tried_again(spec: CacheSpec, tmp_path: Path) -> None:
    from vlsi_cache_cli.look import find_artifacts, listing_table

    run, file = tmp_path / "run", tmp_path / "run" / "run.json"
    with pytest.raises(ModelError), opened(run, spec):
        raise ModelError("training has <diverged>")
    record = json.loads(file.read_text())
    assert (record["status"], record["message"]) == ("failed", "training has <diverged>")
    assert "failed" in listing_table(find_artifacts(run))
    assert f"{run}: training has <diverged>" in listing_table(find_artifacts(run))
    assert "The run has failed: training has &lt;diverged&gt;." in run_page(read_run(run))
    with pytest.raises(SpecError, match="no trained student yet; it has failed: training has <diverged>"):
        vc.evaluate(run)
    with pytest.raises(DiskFullError), opened(run, spec):  # the same command goes on
        raise DiskFullError("full")
    record = json.loads(file.read_text())
    assert record["status"] == "running"
    assert "message" not in record
    with opened(run, spec) as opened_run:
        finish_run(opened_run, stages=[])
    with pytest.raises(ModelError), opened(run, spec):
        raise ModelError("not of this run any more")
    assert json.loads(file.read_text())["status"] == "done"


def test_a_run_says_what_its_newest_call_was(spec: CacheSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(device: str | None, versions: dict[str, str]) -> dict[str, Any]:
        monkeypatch.setattr(runs_module, "versions", lambda: versions)
        with open_run(tmp_path / "run", "distill", spec, device=device, call=f"distill({device})"):
            return json.loads((tmp_path / "run" / "run.json").read_text())

    call(None, {"torch": "1"})
    record = call("cpu", {"torch": "2"})
    assert (record["device"], record["command"], record["versions"]) == ("cpu", "distill(cpu)", {"torch": "2"})


@pytest.mark.parametrize("device", ["banana", "meta", "cuda:99"])
def test_a_device_that_is_not_here_makes_no_folder(spec: CacheSpec, tmp_path: Path, device: str) -> None:
    with pytest.raises(ModelError, match=f"device `{device}`: .*`auto`$"):
        open_run(tmp_path / "run", "distill", spec, device=device, call="").__enter__()
    with pytest.raises(ModelError, match=f"device `{device}`: .*`auto`$"):
        vc.generate(spec, out=tmp_path / "rows.parquet", device=device)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    with pytest.raises(ModelError, match=f"device `{device}`: .*`auto`$"):
        vc.evaluate(spec.teacher.model, spec=spec, device=device)


def test_the_command_is_what_continues_the_run(
    spec_file: Path, spec: CacheSpec, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = vc.build_teacher(spec, out="cache")
    short = ["distill.sft.schedule.steps=1", "distill.verbalize.steps=1", "distill.interact.schedule.steps=1"]
    vc.distill("cache", student=str(student_folder), out="run", recipe="sft", overrides=iter(short))
    command = json.loads(Path("run/run.json").read_text())["command"]
    assert command == (
        f"vlsi_cache.distill('cache', student={str(student_folder)!r}, out='run', recipe='sft', overrides={short!r})"
    )
    assert eval(command, {"vlsi_cache": vc}) == Path("run")  # the same run: refused if any setting differed
    vc.train_verbalizers(vc.load_spec(spec_file, overrides=["train_verbalizers.schedule.steps=1"]), out="verbalizers")
    command = json.loads(Path("verbalizers/run.json").read_text())["command"]
    assert eval(command, {"vlsi_cache": vc, "json": json, "pathlib": pathlib}) == Path("verbalizers")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/vlsi-cache", "distill", "cache", "-o", "a b"])
    vc.distill(cache, student=str(student_folder), out="a b", recipe="sft", overrides=short)
    assert json.loads(Path("a b/run.json").read_text())["command"] == "vlsi-cache distill cache -o 'a b'"


def test_verbalizers_do_not_go_on_with_other_rows(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlsi_cache.train import verbalize

    def stop(*_args: Any) -> float:
        raise KeyboardInterrupt

    spec = vc.load_spec(spec_file)
    monkeypatch.setattr(verbalize, "optimizer_step", stop)
    with pytest.raises(KeyboardInterrupt):
        vc.train_verbalizers(spec, out=tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["num_samples"] == 40
    assert len(record["encoder"]["chat_template"]) == 64
    rows = make_rows(40)
    rows[0], rows[1] = rows[1], rows[0]
    write_jsonl(spec_file.parent / "rows.jsonl", rows)
    both = f"`data_digest`: '{record['data_digest']}' there, '[0-9a-f]+' now"
    with pytest.raises(FingerprintMismatchError, match=both):
        vc.train_verbalizers(spec, out=tmp_path / "run")


def test_the_note_about_settings_that_distill_reads_from_the_cache(spec_file: Path, spec: CacheSpec) -> None:
    stored = json.loads(json.dumps(spec.model_dump(mode="json")))
    assert spec_changes_note(stored, spec) == ""
    ignored = ["run.device=cuda", "train_verbalizers.seed=3", "rows.top_k=4", "data.limit=9"]
    assert spec_changes_note(stored, vc.load_spec(spec_file, overrides=ignored)) == ""
    changed = ["distill.lora.rank=8", "verbalizer.structure=mlp", "evaluate.max_new_tokens=9", "distill.layers=[1]"]
    note = spec_changes_note(stored, vc.load_spec(spec_file, overrides=changed))
    for part in (
        "`distill.lora.rank`: 4 there, 8 now",
        "`verbalizer.structure`: 'verb-ffn' there, 'mlp' now",
        "`evaluate.max_new_tokens`: 8 there, 9 now",
        "`distill.layers`: [1, 2] there, [1] now",
        "`--set key=value`",
    ):
        assert part in note
    assert len(note.splitlines()) == 5


def test_a_setting_that_an_earlier_release_did_not_have_is_no_difference(spec: CacheSpec, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with opened(run, spec):
        pass
    record = json.loads((run / "run.json").read_text())
    del record["spec"]["distill"]["sft"]["fraction"], record["spec"]["evaluate"]["num_beams"]
    (run / "run.json").write_text(json.dumps(record))
    assert spec_changes_note(record["spec"], spec) == ""
    with opened(run, spec):
        pass
    record["spec"]["distill"]["sft"]["fraction"] = 0.5
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(FingerprintMismatchError, match=r"`spec.distill.sft.fraction`: 0.5 there, 1.0 now"):
        opened(run, spec).__enter__()


def test_a_run_goes_on_with_the_loss_it_was_begun_with(spec: CacheSpec, tmp_path: Path) -> None:
    """The first releases took the mean over micro-batches, and did not say so."""
    run = tmp_path / "run"

    def opened_again() -> Any:
        return open_run(run, "distill", spec, device=None, call="", **WHOLE_BATCH)

    with opened(run, spec):
        pass
    earlier = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(earlier | {"versions": {"vlsi-cache": "1.2.3"}}))
    with pytest.raises(
        FingerprintMismatchError, match=r"begun by vlsi-cache 1\.2\.3, .* the mean over the whole batch"
    ):
        opened_again().__enter__()
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    (run / "run.json").write_text(json.dumps(earlier | {"status": "done"}))
    with opened_again() as finished:
        assert finished.is_done  # nothing is trained any more
    assert json.loads((run / "run.json").read_text()) == earlier | {"status": "done"}
    (run / "run.json").write_text(json.dumps(earlier | WHOLE_BATCH))
    with opened_again():
        pass


def test_a_copy_of_what_a_run_was_made_of_goes_on_with_it(spec: CacheSpec, tmp_path: Path) -> None:
    def opened_with(student: str, digest: str) -> Any:
        own = spec.model_copy(update={"distill": spec.distill.model_copy(update={"student": student})})
        facts = {"cache": student, "cache_digest": digest, "student": student, "student_digest": digest}
        return open_run(tmp_path / "run", "distill", own, device=None, call="", **facts)

    with opened_with("a", "1"):
        pass
    with opened_with("b", "1") as run:
        assert (run.record["cache"], run.record["student"]) == ("b", "b")
    with pytest.raises(FingerprintMismatchError, match="`cache_digest`: '1' there, '2' now"):
        opened_with("b", "2").__enter__()


def test_the_seconds_of_a_stage_are_those_of_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    rest = {"stage": "sft", "num_steps": 4, "loss": 1.0, "tokens_per_s": 1.0, "data_wait_pct": 0.0}
    for first, times in ((0, (2.0, 5.0, 9.0)), (2, (6.0, 10.0))):  # the third step was lost: no checkpoint after it
        now = 100.0
        log = metrics.MetricsLog(tmp_path)
        log.start_stage("sft", step=first, num_steps=4)
        for step, seconds in enumerate(times, first + 1):
            now = 100.0 + seconds
            log.write(step=step, **rest)
        log.close()
    assert log.stage_seconds("sft") == 15.0
    earlier = [
        {"stage": "sft", "step": step, "num_steps": 3, "loss": 1.0, "elapsed_s": s}
        for step, s in ((1, 5.0), (2, 2.0), (3, 3.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in earlier))
    assert log.stage_seconds("sft") == 8.0  # of a release whose clock began again
