"""Run folders: `run.json` says what the run is and whether it is done; opening one again continues it."""

import importlib.metadata
import json
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlsi_cache.errors import FingerprintMismatchError, SpecError, list_problems
from vlsi_cache.spec import CacheSpec

from .loop import read_json, write_atomically

PACKAGES = ("vlsi-cache", "torch", "transformers", "peft", "zarr", "numpy")


@dataclass(frozen=True)
class Run:
    """A run folder and the content of its `run.json`."""

    path: Path
    record: dict[str, Any]

    @property
    def is_done(self) -> bool:
        return self.record["status"] == "done"


def open_run(path: Path, kind: str, spec: CacheSpec, *, device: str | None, **facts: Any) -> Run:
    """Begin a run, or go on with the one at `path` if it is the same; raises when the folder holds anything else."""
    record = {
        "kind": kind,
        "status": "running",
        "spec": spec.model_dump(mode="json"),
        **facts,
        "device": device or spec.run.device,
        "versions": versions(),
        "command": shlex.join(["vlsi-cache", *sys.argv[1:]]),
        "stages": [],
    }
    file = path / "run.json"
    if not file.exists():
        if path.exists() and any(path.iterdir()):
            raise SpecError(f"{path} exists and is no run of ours; choose another folder with -o")
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(record, indent=1))
        return Run(path, record)
    existing = read_json(file)
    _check_same(path, existing, record, ("kind", *facts))
    return Run(path, existing)


def finish_run(run: Run, *, stages: list[dict[str, Any]]) -> None:
    """Mark the run done and write its report."""
    from vlsi_cache.report.html import write_report

    record = {**run.record, "status": "done", "stages": stages}
    write_atomically(run.path / "run.json", json.dumps(record, indent=1))
    write_report(run.path)


def versions() -> dict[str, str]:
    """What ran: the interpreter and the packages whose version can change a result."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Every leaf in which two JSON values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(name for name in new if name not in old)]
        return [d for name in keys for d in differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)]
    return [] if old == new else [f"`{key}`: {old!r} there, {new!r} now"]


def _check_same(path: Path, existing: dict[str, Any], wanted: dict[str, Any], keys: tuple[str, ...]) -> None:
    problems = [d for key in keys for d in differences(existing.get(key), wanted.get(key), key)]
    old, new = ({k: v for k, v in record["spec"].items() if k != "run"} for record in (existing, wanted))
    problems += differences(old, new, "spec")
    if problems:
        raise FingerprintMismatchError(
            f"{path} is another run; choose a new folder with -o, or bring the settings back:\n"
            + list_problems(problems)
        )
