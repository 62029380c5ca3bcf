"""Checkpoints of training: what trains, the optimizer's moments and the step; reading one runs no code."""

import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vlsi_cache.errors import CacheCorruptError, list_problems
from vlsi_cache.io import checksum, difference_from, put_all_back, remove, replacing
from vlsi_cache.models.load import own_memory
from vlsi_cache.processes import ALONE, Processes
from vlsi_cache.progress import say
from vlsi_cache.run_files import CHECKPOINT, read_checkpoint, sealed
from vlsi_cache.shares import gather_weights, is_sharded, whole_and_rows

from .shards import read_shards, shapes_in, write_shards

STAGES = ("gates", "verbalize", "interact", "sft", "exits")  # in the order in which a run comes to them
NAME = re.compile(rf"({'|'.join(STAGES)})-(\d{{7,}})")
TENSORS = "state.safetensors"


class Checkpoints:
    """`RUN/checkpoints/STAGE-STEP/`: what trains, the optimizer's moments and the step; the two newest are kept.

    Tensors are safetensors files, the rest is JSON: nothing is ever unpickled. `checkpoint.json` has the checksums of
    the tensors, and its own. Where the newest one is damaged, training goes on from the one before. Of several
    `processes` the first one writes, or each its share of a model that is sharded; one folder is read into any of them.
    """

    def __init__(self, run: Path, processes: Processes = ALONE) -> None:
        self.folder, self._processes = run / "checkpoints", processes
        processes.from_first(self._clear)
        self._whole: list[tuple[str, int]] = []  # checkpoints that have been looked at or written
        self.student: str | None = None  # the digest of a finished student that a stage reads: written into each

    def _clear(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        put_all_back(self.folder)
        for leftover in self.folder.glob(".*.tmp-*"):
            remove(leftover)

    def latest(self) -> tuple[str, int] | None:
        """(stage, step) of the newest checkpoint that is whole; a damaged one is told once.

        Raises CacheCorruptError when there are some, and all are damaged.
        """
        if self._whole:
            return self._whole[-1]
        problems: list[str] = []
        for stage, step in reversed(self._there()):
            try:
                self._check(stage, step)
            except CacheCorruptError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                say(f"warning: {problem}; training goes on from the checkpoint before it, {stage} step {step}")
            return stage, step
        if problems:
            raise CacheCorruptError(
                f"every checkpoint is damaged: restore one from a copy, or delete {self.folder} (and what the run has "
                f"trained: `verbalizers`, `student`) and run the same command again, it trains from the start:\n"
                f"{list_problems(problems)}"
            )
        return None

    def step_of(self, stage: str) -> int:
        """Steps of `stage` that the newest checkpoint holds; 0 when it is of another stage."""
        newest = self.latest()
        return newest[1] if newest and newest[0] == stage else 0

    def student_of(self, stage: str, step: int) -> str | None:
        """The `student` that a checkpoint was written with."""
        return read_checkpoint(self._place(stage, step) / CHECKPOINT).get("student")

    def save(self, stage: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        before = self.latest()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        state = _state(_stepped(trained, optimizer), optimizer)
        if any(map(is_sharded, state.values())):
            self._save_shards(stage, step, state)
        else:
            self._processes.from_first(lambda: self._save(stage, step, state))
        self._whole = [one for one in (before, (stage, step)) if one is not None]
        self._processes.from_first(self._thin)

    def _save(self, stage: str, step: int, state: dict[str, torch.Tensor]) -> None:
        with replacing(self._place(stage, step)) as temporary:
            temporary.mkdir()
            save_file(state, temporary / TENSORS)
            _seal(temporary, stage, step, self.student)

    def _save_shards(self, stage: str, step: int, state: dict[str, torch.Tensor]) -> None:
        """All processes write into a new folder, which the first one makes and gives its name once all have written."""
        with ExitStack() as opened:

            def begin() -> Path:
                temporary = opened.enter_context(replacing(self._place(stage, step)))
                temporary.mkdir()
                return temporary

            temporary = self._processes.from_first(begin)
            write_shards(temporary, state)
            self._processes.from_first(lambda: _seal(temporary, stage, step, self.student))
        self._processes.wait()  # until it has its name

    def _thin(self) -> None:
        for other in self._there():
            if other not in self._whole:
                shutil.rmtree(self._place(*other))

    def load(self, stage: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Put the tensors back by name; raises CacheCorruptError when they are damaged or do not fit the model."""
        self._check(stage, step)
        folder, named = self._place(stage, step), dict(model.named_parameters())
        file = folder / TENSORS
        if not file.exists() or any(map(is_sharded, named.values())):
            _load_shards(folder, _stepped(named, optimizer), optimizer)
            if optimizer is not None:
                gather_weights(optimizer)
            return
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            for key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                kind, name = key.split("/", 1)
                if name not in named:
                    raise CacheCorruptError(f"{file}: holds `{name}`, which this model does not have; start a new run")
                if kind == "parameter":
                    named[name].copy_(tensors.get_tensor(key))
                elif optimizer is not None:
                    _restore_moment(optimizer, named[name], kind, tensors.get_tensor(key))

    def _place(self, stage: str, step: int) -> Path:
        return self.folder / f"{stage}-{step:07d}"

    def _there(self) -> list[tuple[str, int]]:
        """All checkpoints, whole or not, in the order in which a run comes to them."""
        names = [found for entry in self.folder.iterdir() if (found := NAME.fullmatch(entry.name))]
        return sorted(((one[1], int(one[2])) for one in names), key=lambda one: (STAGES.index(one[0]), one[1]))

    def _check(self, stage: str, step: int) -> None:
        """Raise CacheCorruptError unless a checkpoint is what was written; one of an earlier release has no sums."""
        if (stage, step) in self._whole:
            return
        folder = self._place(stage, step)
        record = read_checkpoint(folder / CHECKPOINT)
        if (record["stage"], record["step"]) != (stage, step):
            raise CacheCorruptError(f"{folder / CHECKPOINT}: is of {record['stage']} step {record['step']}")
        sums = record.get("files") or {TENSORS: None}
        for name, recorded in sums.items():
            file = folder / Path(name).name
            if recorded and (problem := difference_from(recorded, file)):
                raise CacheCorruptError(f"{file}: {problem}")
            try:
                safe_open(file, framework="pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise CacheCorruptError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
        self._whole.append((stage, step))


def _seal(folder: Path, stage: str, step: int, student: str | None) -> None:
    """Write what is in a folder of tensors, and the checksum of each file."""
    files = {file.name: checksum(file) for file in sorted(folder.glob("*.safetensors"))}
    about = {"stage": stage, "step": step, **({} if student is None else {"student": student}), "files": files}
    (folder / CHECKPOINT).write_text(sealed(about), encoding="utf-8")


def _load_shards(folder: Path, named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
    """Fill parameters and moments, of which the folder or this process or both have shares."""
    wanted: dict[str, torch.Tensor] = {}
    for key, shape in shapes_in(folder).items():
        kind, name = key.split("/", 1)
        if name not in named:
            raise CacheCorruptError(f"{folder}: holds `{name}`, which this model does not have; start a new run")
        if kind == "parameter":
            wanted[key] = named[name].detach()
        elif optimizer is not None:
            wanted[key] = torch.zeros(shape) if kind == "step" else torch.zeros_like(named[name].detach())
            optimizer.state[named[name]][kind] = wanted[key]
    read_shards(folder, wanted)


def _stepped(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[str, nn.Parameter]:
    """What the optimizer steps under each name: the weight itself, or this process's rows of it."""
    rows = {} if optimizer is None else {id(whole): own for whole, own in whole_and_rows(optimizer)}
    return {name: rows.get(id(one), one) for name, one in named.items()}


def _state(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    state = {f"parameter/{name}": parameter.detach().contiguous() for name, parameter in named.items()}
    if optimizer is not None:
        for name, parameter in named.items():
            for kind, value in optimizer.state[parameter].items():
                state[f"{kind}/{name}"] = torch.as_tensor(value).contiguous()
    return state


def _restore_moment(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
    # The step count of AdamW lives on the CPU, the moments beside their parameter.
    optimizer.state[parameter][kind] = own_memory(value if kind == "step" else value.to(parameter.device))
