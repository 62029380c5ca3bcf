"""Trackers beside `metrics.jsonl` (`run.track`): TensorBoard and Weights & Biases, as Accelerate drives them.

They get every number of every line. The log stays what counts: a tracker that fails is left out from then on, and
training goes on.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xxhash
import yaml

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.errors import SpecError
from vlsi_cache.progress import say

# Packages, any of which serves, and what installs them.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
NOT_SHOWN = ("stage", "step", "num_steps", "teacher_layers", "student_layers")


def check_trackers(names: Iterable[str]) -> None:
    """Raise SpecError for a tracker whose package is not installed."""
    for name in names:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise SpecError(
                f"`run.track` names {name}, which is not installed; install it with: pip install 'vlsi-cache[track]'"
            )


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one line of the log, by names such as `interact/loss`, `interact/layers/8` or
    `interact/probe/last/kl`; of matched layers the mean over the micro-batches, by the layer of the student."""
    shown = {key: value for key, value in metrics.items() if key not in NOT_SHOWN}
    matched = [match for match in shown.pop("matched_layers", None) or [] if match]
    if matched:
        names = list(metrics.get("layers", {}))
        means = (sum(one) / len(matched) for one in zip(*matched, strict=True))
        shown["matched_layers"] = dict(zip(names, means, strict=True))
    return dict(_leaves(shown, metrics["stage"]))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}/{key}")
    elif isinstance(value, int | float):
        yield name, float(value)


class Trackers:
    """The trackers of one run folder, started with its first stage; steps count on over the stages."""

    def __init__(self, folder: Path, spec: CacheSpec, kind: str) -> None:
        self._folder, self._spec, self._kind = folder, spec, kind
        self._running: dict[str, Any] = {}
        self._is_started = False

    def start(self, step: int) -> None:
        """Begin at `step`, or go on there: later ones that TensorBoard has, of a lost attempt, are dropped."""
        if self._is_started:
            return
        self._is_started = True
        for name in dict.fromkeys(self._spec.run.track):
            self._try(name, lambda name=name: self._start(name, step))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for name, tracker in list(self._running.items()):
            self._try(name, lambda tracker=tracker: tracker.log(numbers(metrics), step=step))

    def close(self) -> None:
        for name, tracker in list(self._running.items()):
            self._try(name, tracker.finish)
        self._running.clear()

    def _start(self, name: str, step: int) -> None:
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        PartialState()  # whatever Accelerate logs needs to know which process this is
        if name == "tensorboard":
            tracker = TensorBoardTracker(name, self._folder, purge_step=step + 1 if step else None)
        else:
            project = os.environ.get("WANDB_PROJECT", self._spec.name)
            tracker = WandBTracker(
                project, dir=str(self._folder), id=self._id(), name=self._folder.name, resume="allow"
            )
        tracker.start()
        self._running[name] = tracker
        settings = self._spec.model_dump(mode="json")
        if name == "tensorboard":  # takes texts and numbers alone
            tracker.log({f"{self._kind}/spec": f"```\n{yaml.safe_dump(settings, sort_keys=False)}```"}, step=step)
        else:
            tracker.store_init_configuration({"kind": self._kind, **settings})

    def _id(self) -> str:
        """The same for every attempt of this run, so that they are one run there too."""
        file = self._folder / "wandb" / "id.txt"
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            file.write_text(xxhash.xxh3_64_hexdigest(f"{self._folder.resolve()} {time.time_ns()}".encode()) + "\n")
        return file.read_text().strip()

    def _try(self, name: str, act: Any) -> None:
        try:
            act()
        except Exception as error:  # of the tracker's own: a server, a full disk, a version
            self._running.pop(name, None)
            reason = " ".join(str(error).split())[:200]
            say(
                f"warning: {name} is left out from here on ({type(error).__name__}: {reason}); metrics.jsonl has it all"
            )
