"""Run folders: `run.json` says what the run is and whether it is done; opening one again continues it."""

import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.errors import (
    DiskFullError,
    FingerprintMismatchError,
    InterruptedRunError,
    ProcessLostError,
    RunBusyError,
    SpecError,
    VlsiCacheError,
    list_problems,
)
from vlsi_cache.io import check_folder, put_all_back, remove, write_atomically
from vlsi_cache.processes import ALONE, Processes, typed_command
from vlsi_cache.progress import say
from vlsi_cache.run_files import RUN, read_run
from vlsi_cache.runtime import check_device

from .metrics import next_step

PACKAGES = ("vlsi-cache", "torch", "transformers", "peft", "zarr", "numpy")
LOCK_NAME = ".lock"
# What a kill can leave behind of files and folders that get their name at the end.
LEFTOVERS = (".*.tmp-*", "verbalizers/.*", "exits/.*")
# What a training records: its loss is that of the whole batch. Where this is not recorded, an earlier release has taken
# the mean over micro-batches of the mean of each one's tokens, which was another loss for every `micro_batch_size`.
WHOLE_BATCH = {"loss_reduced_over": "batch"}
READ_BY_DISTILL = ("verbalizer", "distill", "evaluate")  # sections that do not decide what is in a cache


@dataclass(frozen=True)
class Run:
    """A run folder and the content of its `run.json`."""

    path: Path
    record: dict[str, Any]

    @property
    def is_done(self) -> bool:
        return self.record["status"] == "done"


@contextmanager
def open_run(
    path: Path,
    kind: str,
    spec: CacheSpec,
    *,
    device: str | None,
    call: str,
    processes: Processes = ALONE,
    **facts: Any,
) -> Iterator[Run]:
    """Begin a run, or go on with the one at `path` if it is the same, and keep other processes off it meanwhile.

    Of several `processes` of one launch the first one holds the folder for all.

    Of `facts` that have a digest beside them, `name` and `name_digest`, the digest alone decides: a copy is the same.
    `call` is the Python that goes on with it. `run.json` is of the newest call; an error that would come again makes
    it `failed`, with the message, Ctrl-C and SIGTERM make it `interrupted`. Raises SpecError when the folder holds
    anything else, FingerprintMismatchError when it is another run, RunBusyError when another process works on it,
    CacheCorruptError when `run.json` is damaged, ModelError when the device is not here.
    """
    with ExitStack() as stack:
        run = _opened_run(path, kind, spec, device=device, call=call, facts=facts)
        yield processes.from_first(lambda: stack.enter_context(run))


@contextmanager
def _opened_run(
    path: Path, kind: str, spec: CacheSpec, *, device: str | None, call: str, facts: dict[str, Any]
) -> Iterator[Run]:
    file = path / RUN
    check_run_folder(path, kind)
    if not file.exists() or read_run(path)["status"] != "done":
        check_device(device or spec.run.device)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        record = {
            "kind": kind,
            "status": "running",
            "spec": spec.model_dump(mode="json"),
            **facts,
            "device": device or spec.run.device,
            "versions": versions(),
            "command": _this_command() or call,
            "stages": [],
        }
        existing = read_run(path) if file.exists() else None
        if existing is not None:
            _check_same(path, existing, record, ("kind", *(name for name in facts if f"{name}_digest" not in facts)))
        if existing is not None and existing["status"] == "done":
            record = existing
        else:
            write_atomically(file, json.dumps(record, indent=1))
        _remove_leftovers(path)
        with _failure_kept(file):
            yield Run(path, record)


def check_run_folder(path: Path, kind: str) -> None:
    """Raise SpecError unless `path` is a run of this kind, or can become one."""
    check_folder(path)
    if (path / RUN).exists():
        there = read_run(path)["kind"]
        if there != kind:
            raise SpecError(f"{path} is a `{there}` run, and this is `{kind}`; choose another folder with -o")
    elif path.is_dir() and any(not _is_ours(entry.name) for entry in path.iterdir()):
        raise SpecError(f"{path} exists and is no run of ours; choose another folder with -o")


@contextmanager
def _failure_kept(file: Path) -> Iterator[None]:
    """Write into `run.json` why the run has ended before it was done; a full disk is told by the error alone.

    What interrupts it comes out as InterruptedRunError with the command that goes on.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(_end(file, status="interrupted").get("command") or "") from None
    except DiskFullError:
        raise
    except ProcessLostError:
        _end(file, status="interrupted")
        raise
    except VlsiCacheError as error:
        _end(file, status="failed", message=str(error))
        raise


def _end(file: Path, **facts: str) -> dict[str, Any]:
    """Write how the run has ended, unless it is done; returns what `run.json` says then."""
    record = read_run(file.parent)
    if record["status"] != "done":
        record |= facts
        write_atomically(file, json.dumps(record, indent=1))
    return record


def already_done(run: Run) -> bool:
    """Whether nothing is left to do, which is said."""
    if not run.is_done:
        return False
    say(f"{run.path} is finished; nothing to do")
    return True


def finish_run(run: Run, *, stages: list[dict[str, Any]]) -> None:
    """Mark the run done."""
    record = {**run.record, "status": "done", "stages": stages}
    write_atomically(run.path / "run.json", json.dumps(record, indent=1))


def python_call(name: str, first: str, **options: Any) -> str:
    """The call `vlsi_cache.name(first, option=...)`; options that are not set are left out."""
    given = [f"{key}={value!r}" for key, value in options.items() if value not in (None, [])]
    return f"vlsi_cache.{name}({', '.join([first, *given])})"


def versions() -> dict[str, str]:
    """What ran: the interpreter and the packages whose version can change a result."""
    return {"python": platform.python_version()} | _package_versions()


@cache
def _package_versions() -> dict[str, str]:
    """Read once in a process: what is imported does not change."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Every leaf in which two JSON values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(name for name in new if name not in old)]
        return [d for name in keys for d in differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)]
    return [] if old == new else [f"`{key}`: {old!r} there, {new!r} now"]


def spec_changes_note(stored_spec: dict[str, Any], spec: CacheSpec) -> str:
    """What has changed since a cache was built among the settings that `distill` reads from it; empty if nothing."""
    stored, fresh = whole_spec(stored_spec, "the cache"), spec.model_dump(mode="json")
    changed = [d for name in READ_BY_DISTILL for d in differences(stored[name], fresh[name], name)]
    if not changed:
        return ""
    return (
        "these settings are not the ones the cache was built with, and `distill` reads those stored in the cache; "
        f"for other ones give it `--set key=value`:\n{list_problems(changed)}"
    )


def whole_spec(stored: dict[str, Any], where: str) -> dict[str, Any]:
    """A stored spec with the defaults of settings that an earlier release did not have."""
    return spec_from_dict(stored, where=where).model_dump(mode="json")


def _check_same(path: Path, existing: dict[str, Any], wanted: dict[str, Any], keys: tuple[str, ...]) -> None:
    (fact,) = WHOLE_BATCH
    if fact in keys and fact not in existing:
        if existing["status"] != "done":
            raise FingerprintMismatchError(
                f"{path} was begun by vlsi-cache {existing['versions']['vlsi-cache']}, whose loss depended on "
                "`micro_batch_size`; now it is the mean over the whole batch, and one run has one loss. Start it again "
                "in a new folder with -o, or finish it with that release"
            )
        keys = tuple(key for key in keys if key != fact)  # what is finished stays as it is
    problems = [d for key in keys for d in differences(existing.get(key), wanted.get(key), key)]
    specs = (whole_spec(record["spec"], str(path)) for record in (existing, wanted))
    old, new = ({name: section for name, section in spec.items() if name != "run"} for spec in specs)
    for spec in (old, new):  # how the teacher lies on its GPUs changes rounding only, as what is in `run` does
        spec["teacher"] = {**spec["teacher"], "parallel": None}
    if "student_digest" in keys:
        for spec in (old, new):
            spec["distill"] = {**spec["distill"], "student": None}
    problems += differences(old, new, "spec")
    if problems:
        raise FingerprintMismatchError(
            f"{path} is another run; choose a new folder with -o, or bring the settings back:\n"
            + list_problems(problems)
        )


def _this_command() -> str | None:
    """The command line, if this program is the command line."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    is_script = Path((sys.argv or [""])[0]).stem == "vlsi-cache"
    if is_script or getattr(main, "name", None) in ("vlsi_cache_cli.main", "vlsi_cache_cli.__main__"):
        return typed_command()
    return None


def _is_ours(name: str) -> bool:
    """Whether an entry of a folder without `run.json` is what a run leaves that was killed at its very beginning."""
    return name in (LOCK_NAME, "run.json") or name.startswith(".run.json.")


def _remove_leftovers(path: Path) -> None:
    put_all_back(path)
    for leftover in [found for pattern in LEFTOVERS for found in path.glob(pattern)]:
        remove(leftover)


@contextmanager
def waiting_for(path: Path) -> Iterator[None]:
    """Hold a folder that several processes share, as soon as no other one does."""
    path.mkdir(parents=True, exist_ok=True)
    with locked(path, wait=True) as is_alone:
        if is_alone:
            _remove_leftovers(path)
        yield


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a run folder; the kernel lets go of it when this process ends, however it ends.

    Gives False where the file system has no locks.
    """
    is_locked = True
    with (path / LOCK_NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunBusyError(
                f"{path} is being worked on by {file.read() or 'another process'}; wait for it, stop it, or choose "
                "another folder with -o"
            ) from None
        except OSError as error:
            is_locked = False
            advice = "run this again should layers be missing in the end" if wait else "do not start it a second time"
            say(f"{path} cannot be locked on this file system ({error.strerror}); {advice}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()}")
        file.flush()
        yield is_locked


def check_has_exits(folder: Path, run: dict[str, Any]) -> None:
    """Raise SpecError for a run whose spec trains exits and that has none: nothing else is read in their place."""
    spec = run["spec"]
    is_lens = spec.get("verbalizer", {}).get("structure") == "logit-lens"  # which has nothing to train
    if spec.get("distill", {}).get("exits") is None or is_lens or (folder / "exits" / "verbalizers.json").is_file():
        return
    if run["status"] != "done":
        raise SpecError(f"{folder} has a student, and its exits are not trained yet; {next_step(run)}")
    raise SpecError(
        f"{folder / 'exits'} is gone, or a part of it is: restore it from a copy, or train a new run with -o"
    )


def check_has_student(folder: Path, run: dict[str, Any]) -> None:
    """Raise SpecError unless the run folder holds a trained student."""
    if run["kind"] != "distill":
        raise SpecError(
            f"{folder} is a `{run['kind']}` run: it holds a teacher's verbalizers and no student. Name a `distill` "
            "run, or a model's folder together with --spec"
        )
    student = folder / "student"
    if run["status"] == "done" and not ((student / "config.json").is_file() and any(student.glob("*.safetensors"))):
        raise SpecError(
            f"{student} is gone, or a part of it is, and the run is finished: restore it from a copy, or train again "
            "in another folder with -o"
        )
    if not student.is_dir():
        raise SpecError(f"{folder} has no trained student yet; {next_step(run)}")
