"""What every training loop shares: optimizer, schedule, metrics log, checkpoints, progress. The loops are elsewhere."""

import hashlib
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vlsi_cache.disk import checksum, difference_from, put_all_back, remove, replacing, write_atomically
from vlsi_cache.errors import CacheCorruptError, ModelError, list_problems
from vlsi_cache.models.layers import Backbone
from vlsi_cache.models.load import check_device, own_memory
from vlsi_cache.progress import Bar, say
from vlsi_cache.report.checkup import Finding
from vlsi_cache.run_files import CHECKPOINT, read_checkpoint, read_metrics, sealed
from vlsi_cache.sparse.kernels import pick_kernels
from vlsi_cache.sparse.logits import Head
from vlsi_cache.spec import RunSpec, Schedule


def warn_of(found: Iterable[Finding]) -> None:
    """Say what looks wrong."""
    for one in found:
        say(f"warning: {one.text}")


def pick_device(device: str | None) -> torch.device:
    """`auto` and None mean CUDA when there is one, else the CPU; the choice is printed with its reason.

    Raises ModelError for a device that is not here.
    """
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        say(f"device: {device} ({'CUDA found' if device == 'cuda' else 'no CUDA found'})")
    check_device(str(device))
    return torch.device(str(device))


def choose_kernels(run: RunSpec, device: torch.device) -> bool:
    """Whether sums over the vocabulary are compiled; printed with the reason."""
    compiled, reason = pick_kernels(run.kernels, device)
    say(f"kernels: {'compiled' if compiled else 'eager'} ({reason})")
    return compiled


def head_of(backbone: Backbone) -> Head:
    """The model's head with what it does to its logits."""
    return Head(backbone.head_weight, backbone.logit_scale, backbone.logit_cap, backbone.head_bias)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on CUDA, nothing on the CPU (fp32 is exact there, and not slower at the sizes a CPU can train)."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def make_optimizer(parameters: Iterable[nn.Parameter], schedule: Schedule) -> torch.optim.AdamW:
    """AdamW over the parameters that train; betas 0.9, 0.999."""
    return make_grouped_optimizer({"": parameters}, schedule)


def make_grouped_optimizer(groups: Mapping[str, Iterable[nn.Parameter]], schedule: Schedule) -> torch.optim.AdamW:
    """One AdamW for several named groups of parameters, each of which is clipped by itself."""
    trainable = [{"name": name, "params": [p for p in group if p.requires_grad]} for name, group in groups.items()]
    return torch.optim.AdamW(trainable, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)


def seed_step(seed: int, stage: str, step: int) -> None:
    """Key torch's random state to this step, so that a resumed run draws the dropout that a whole one draws."""
    digest = hashlib.sha256(f"{seed} {stage} {step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))


def learning_rate(schedule: Schedule, step: int, num_steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a cosine down to the final rate."""
    num_warmup = math.ceil(schedule.warmup * num_steps)
    if step < num_warmup:
        return schedule.learning_rate * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    span = schedule.learning_rate - schedule.final_learning_rate
    return schedule.final_learning_rate + 0.5 * span * (1 + math.cos(math.pi * progress))


def clip_gradients(optimizer: torch.optim.Optimizer, schedule: Schedule, stage: str, step: int, num_steps: int) -> None:
    """Clip each group of parameters to its own norm; raises ModelError for a gradient that is not finite."""
    for group in optimizer.param_groups:
        norm = nn.utils.clip_grad_norm_(group["params"], schedule.clip_norm)
        if not torch.isfinite(norm):
            of = f" of {group['name']}" if group["name"] else ""
            raise ModelError(
                f"stage {stage}, step {step + 1} of {num_steps}: the gradient norm{of} is {float(norm)} at learning "
                f"rate {learning_rate(schedule, step, num_steps):.3g}: training has diverged. Start a new run with a "
                "lower `learning_rate` or a longer `warmup` for this stage"
            )


def refuse_destroyed(parameters: Iterable[tuple[str, torch.Tensor]], stage: str) -> None:
    """Raise ModelError for trained weights that are not finite: no gradient follows a stage's last update."""
    bad = [name for name, parameter in parameters if not torch.isfinite(parameter).all()]
    if bad:
        raise ModelError(
            f"stage {stage} has destroyed {len(bad)} of its weights with its last updates (`{bad[0]}` is not finite). "
            "Start a new run with a lower `learning_rate` or a longer `warmup` for this stage"
        )


def optimizer_step(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, num_steps: int) -> float:
    """Set the rate of this step, update, clear; returns the rate."""
    rate = learning_rate(schedule, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return rate


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on CUDA, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 2**10 if sys.platform != "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


STAGES = ("verbalize", "interact", "sft")  # in the order in which a run comes to them
NAME = re.compile(rf"({'|'.join(STAGES)})-(\d{{7,}})")
TENSORS = "state.safetensors"


class MetricsLog:
    """`metrics.jsonl` of a run and the progress bar that shows its newest line; units are in the keys."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self._file: TextIO | None = None
        self._bar: Bar | None = None
        self._started = time.monotonic()

    def start_stage(self, stage: str, *, step: int, num_steps: int) -> None:
        """Begin (or go on with) a stage at `step`; lines that a lost attempt wrote beyond it are dropped."""
        if self._file is not None:
            self._file.close()
        kept = [line for line in read_metrics(self.path) if line["stage"] != stage or line["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        if step and not any((line["stage"], line["step"]) == (stage, step) for line in kept):
            say(f"warning: {self.path} has no line of {stage} step {step}, where training goes on: curves have a gap")
        if self._bar is None:  # the clock goes on where an earlier attempt has stopped
            self._started = time.monotonic() - (kept[-1]["elapsed_s"] if kept else 0.0)
        else:
            self._bar.close()
        self._bar = Bar(stage, unit="step", total=num_steps, done=step)

    def write(self, **metrics: Any) -> None:
        assert self._file is not None
        assert self._bar is not None
        metrics["elapsed_s"] = round(time.monotonic() - self._started, 3)
        self._file.write(json.dumps(_with_null(metrics)) + "\n")
        self._file.flush()
        speed, waited = int(metrics["tokens_per_s"]), metrics["data_wait_pct"]
        self._bar.note(f"loss={metrics['loss']:.3f}, tok/s={speed}, data={waited:.0f}%")
        self._bar.update()

    def stage_seconds(self, stage: str) -> float:
        """Time from the first to the last line of a stage, summed over attempts."""
        total, previous = 0.0, 0.0
        for line in read_metrics(self.path):
            # In the logs of earlier releases a new attempt starts its clock again.
            step_s = line["elapsed_s"] - previous if line["elapsed_s"] >= previous else line["elapsed_s"]
            total += step_s if line["stage"] == stage else 0.0
            previous = line["elapsed_s"]
        return total

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._bar is not None:
            self._bar.close()


class Checkpoints:
    """`RUN/checkpoints/STAGE-STEP/`: what trains, the optimizer's moments and the step; the two newest are kept.

    Tensors are a safetensors file, the rest is JSON: nothing is ever unpickled. `checkpoint.json` has the checksum of
    the tensors, and its own. Where the newest one is damaged, training goes on from the one before.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"
        self.folder.mkdir(parents=True, exist_ok=True)
        put_all_back(self.folder)
        for leftover in self.folder.glob(".*.tmp-*"):
            remove(leftover)
        self._whole: list[tuple[str, int]] = []  # checkpoints that have been looked at or written

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

    def save(self, stage: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        before, target = self.latest(), self._place(stage, step)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with replacing(target) as temporary:
            temporary.mkdir()
            save_file(_state(named, optimizer), temporary / TENSORS)
            record = {"stage": stage, "step": step, "files": {TENSORS: checksum(temporary / TENSORS)}}
            (temporary / CHECKPOINT).write_text(sealed(record), encoding="utf-8")
        self._whole = [one for one in (before, (stage, step)) if one is not None]
        for other in self._there():
            if other not in self._whole:
                shutil.rmtree(self._place(*other))

    def load(self, stage: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Put the tensors back by name; raises CacheCorruptError when they are damaged or do not fit the model."""
        self._check(stage, step)
        file = self._place(stage, step) / TENSORS
        named = dict(model.named_parameters())
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
        if problem := difference_from(record["files"][TENSORS], folder / TENSORS) if "files" in record else "":
            raise CacheCorruptError(f"{folder / TENSORS}: {problem}")
        try:
            safe_open(folder / TENSORS, framework="pt").__enter__()
        except (OSError, SafetensorError) as error:
            raise CacheCorruptError(f"{folder / TENSORS}: cannot be read ({' '.join(str(error).split())})") from None
        self._whole.append((stage, step))


def _with_null(value: Any) -> Any:
    """The same with null for numbers that are not finite: JSON has none, and readers of the log would refuse them."""
    if isinstance(value, dict):
        return {key: _with_null(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_null(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
