"""What every training loop shares: optimizer, schedule, clipping. The loops are elsewhere."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from vlsi_cache.config.training import DistillSpec, Schedule, TrainVerbalizersSpec
from vlsi_cache.errors import InterruptedRunError, ModelError
from vlsi_cache.processes import ALONE, Processes
from vlsi_cache.runs.checkpoints import Checkpoints
from vlsi_cache.runs.metrics import MetricsLog
from vlsi_cache.shares import gather_weights, group_of_rows, is_sharded

from .sharding import clip_to_norm

Found = TypeVar("Found")


@dataclass(frozen=True)
class Stage:
    """One stage of a run, as its loop needs it beside model and data; `settings` have its batch sizes and seed."""

    settings: DistillSpec | TrainVerbalizersSpec
    schedule: Schedule
    num_steps: int
    checkpoints: Checkpoints
    log: MetricsLog
    compiled: bool
    processes: Processes = ALONE


def make_optimizer(parameters: Iterable[nn.Parameter], schedule: Schedule) -> torch.optim.AdamW:
    """AdamW over the parameters that train; betas 0.9, 0.999."""
    return make_grouped_optimizer({"": parameters}, schedule)


def make_grouped_optimizer(groups: Mapping[str, Iterable[nn.Parameter]], schedule: Schedule) -> torch.optim.AdamW:
    """One AdamW for several named groups of parameters, each of which is clipped by itself.

    Beside weights that are sharded over processes it steps rows of the whole ones; what is no matrix stays whole.
    """
    trainable: list[dict[str, Any]] = []
    for name, group in groups.items():
        chosen = [p for p in group if p.requires_grad]
        shares: list[Any] = [p for p in chosen if is_sharded(p)]
        matrices = [p for p in chosen if shares and p.ndim > 1 and not is_sharded(p)]
        dealt = {id(p) for p in (*shares, *matrices)}
        trainable.append({"name": name, "params": [p for p in chosen if id(p) not in dealt]})
        if shares:  # all at once, five times as fast as one by one
            trainable.append({"name": name, "params": shares, "foreach": True})
        if matrices:
            trainable.append({**group_of_rows(name, matrices, shares[0].device_mesh), "foreach": True})
    return torch.optim.AdamW(trainable, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)


def learning_rate(schedule: Schedule, step: int, num_steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a cosine down to the final rate."""
    # Rounded up, so that any warm-up at all is one step at least.
    num_warmup = math.ceil(schedule.warmup * num_steps)
    if step < num_warmup:
        return schedule.learning_rate * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    span = schedule.learning_rate - schedule.final_learning_rate
    return schedule.final_learning_rate + 0.5 * span * (1 + math.cos(math.pi * progress))


def clip_gradients(optimizer: torch.optim.Optimizer, schedule: Schedule, stage: str, step: int, num_steps: int) -> None:
    """Clip each group of parameters to its own norm; raises ModelError for a gradient that is not finite."""
    # Each group has a norm of its own: one layer with a large gradient does not shrink the steps of the others.
    groups: dict[str, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:  # shares of weights and whole ones of one name have one norm
        groups.setdefault(group["name"], []).extend(group["params"])
    for name, parameters in groups.items():
        norm = clip_to_norm(parameters, schedule.clip_norm)
        if not torch.isfinite(norm):
            of = f" of {name}" if name else ""
            raise ModelError(
                f"stage {stage}, step {step + 1} of {num_steps}: the gradient norm{of} is {float(norm)} at learning "
                f"rate {learning_rate(schedule, step, num_steps):.3g}: training has diverged. Start a new run with a "
                "lower `learning_rate` or a longer `warmup` for this stage"
            )


@dataclass(frozen=True)
class Done(Generic[Found]):
    """A step of all processes: what each has `found`, tokens of all, peak memory of the one that took most."""

    found: list[Found]
    num_tokens: int
    memory_gib: float
    is_ending: bool

    def end_here(self) -> None:
        """Raise InterruptedRunError after a signal to any of them; all have saved the step by now."""
        if self.is_ending:
            raise InterruptedRunError


def all_done(processes: Processes, found: Found, num_tokens: int, memory_gib: float, *, is_ending: bool) -> Done[Found]:
    """Tell each other how a step went; a signal that came to one ends it for all."""
    everyone = processes.gather((found, num_tokens, memory_gib, is_ending))
    founds, tokens, memories, endings = zip(*everyone, strict=True)
    own = processes.num_shares  # those that work as one have all found the same
    return Done(list(founds[:own]), sum(tokens[:own]), max(memories), any(endings))


def refuse_destroyed(parameters: Iterable[tuple[str, torch.Tensor]], stage: str) -> None:
    """Raise ModelError for trained weights that are not finite: no gradient follows a stage's last update."""
    bad = [name for name, parameter in parameters if not torch.isfinite(parameter).all()]
    if bad:
        raise ModelError(
            f"stage {stage} has destroyed {len(bad)} of its weights with its last updates (`{bad[0]}` is not finite). "
            "Start a new run with a lower `learning_rate` or a longer `warmup` for this stage"
        )


def optimizer_step(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, num_steps: int) -> float:
    """Set the rate of this step, update, clear; returns the rate. All processes of a launch call it alike."""
    rate = learning_rate(schedule, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # their memory is free while the next batch runs forward
    gather_weights(optimizer)
    return rate
