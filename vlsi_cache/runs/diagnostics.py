"""What the logged numbers of a run say is wrong, each with the likely cause and what to do.

A threshold is where a number stops being plausible for training that works, not where it stops being good.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.progress import say

from .metrics import RunFiles, curve, layer_curves, read_json

Metrics = Sequence[Mapping[str, Any]]
LEAST_STEPS = 20  # a tenth of fewer steps is one or two, and says nothing about a trend
LOW_KEPT_MASS = 0.5  # below it the kept words weigh less than the one bucket that holds all others
LOW_STUDENT_MASS = 0.05  # of the teacher's: a layer that follows has nearly all of it, a uniform one about k / V
FLAT = 0.95  # of the loss at the start: the draws of the layers alone move it by a few percent
RISING = 1.1
SMALL_NATS = 0.05  # a divergence that starts below it has nowhere to fall


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong: `kind` for programs, `text` for people."""

    kind: str
    text: str


def verbalizer_findings(metrics: Metrics, *, vocab_size: int, stage: str = "verbalize") -> list[Finding]:
    """Layers that say the response worse than a uniform guess after the training of their verbalizers."""
    if not is_finished(metrics, stage):
        return []
    _, layers = layer_curves(metrics, stage)
    where = "`distill.verbalize` of a student, `train_verbalizers.schedule` of the teacher"
    if stage == "exits":
        where = "`distill.exits.schedule`"
    ends = {layer: _tenths(values)[1] for layer, values in layers.items()}
    worse = [f"layer {layer} {nats:.1f}" for layer, nats in ends.items() if nats > math.log(vocab_size)]
    if not worse:
        return []
    text = (
        "after their training the verbalizers say the response worse than a uniform guess would "
        f"({math.log(vocab_size):.1f} nats per token, ln V): {', '.join(worse)}. They are barely trained: raise the "
        f"steps or the learning rate ({where})"
    )
    return [Finding("verbalizers_worse_than_uniform", text)]


def interact_findings(metrics: Metrics) -> list[Finding]:
    """What looks wrong in a finished stage interact, from its losses and probes."""
    if not is_finished(metrics, "interact"):
        return []
    probes = [line["probe"] for line in metrics if line.get("probe")]
    final = max((int(layer) for probe in probes for layer in probe), default=0)
    return [*_low_kept_mass(probes, final), *_low_student_mass(probes, final), *_not_falling(metrics)]


def findings_of(run: RunFiles) -> list[Finding]:
    """All findings of a run folder; without the size of the vocabulary, which its cache knows, some are left out."""
    header = read_json(Path(run.record.get("cache") or "") / "cache.json") or {}
    stages = [stage for stage in run.record.get("stages") or [] if "v_real" in stage]
    vocab_size = header.get("v_real") or (stages[0]["v_real"] if stages else None)
    found: list[Finding] = []
    if vocab_size:
        for stage in ("verbalize", "exits"):
            found += verbalizer_findings(run.metrics, vocab_size=vocab_size, stage=stage)
    return [*found, *interact_findings(run.metrics)]


def is_finished(metrics: Metrics, stage: str) -> bool:
    """Whether the last step of a stage is logged."""
    lines = [line for line in metrics if line["stage"] == stage]
    return bool(lines) and lines[-1]["step"] == lines[-1]["num_steps"]


def _low_kept_mass(probes: Sequence[Mapping[str, Any]], final: int) -> Iterator[Finding]:
    for layer, mass in _means(probes, "kept_mass").items():
        if mass < LOW_KEPT_MASS:
            what = "the teacher's last layer" if layer == final else f"the teacher layers matched with layer {layer}"
            yield Finding(
                "low_kept_mass",
                f"the kept words of {what} hold {100 * mass:.0f} % of its probability: top-k is too small for a layer "
                "that is so unsure, or its verbalizer is barely trained. Build a cache with a larger `rows.top_k` for "
                "it or more `rows.tail_samples`, train the teacher's verbalizers for longer, or leave the layer out "
                "(`vlsi-cache prune --layers`)",
            )


def _low_student_mass(probes: Sequence[Mapping[str, Any]], final: int) -> Iterator[Finding]:
    late = probes[-max(1, len(probes) // 4) :]
    kept = _means(late, "kept_mass")
    for layer, mass in _means(late, "student_mass").items():
        if mass < LOW_STUDENT_MASS * kept[layer]:
            name = "the student's last layer" if layer == final else f"student layer {layer}"
            cause = "" if layer == final else "its verbalizer is raw (raise the steps of `distill.verbalize`), or "
            yield Finding(
                "low_student_mass",
                f"{name} gives {100 * mass:.2g} % of its probability to the words that hold {100 * kept[layer]:.0f} % "
                f"of the teacher's, at the end of the stage: {cause}its head does not belong to this vocabulary (is "
                "the student of the teacher's family, and its head trained?)",
            )


def _not_falling(metrics: Metrics) -> Iterator[Finding]:
    series = {f"student layer {layer}": values for layer, values in layer_curves(metrics, "interact")[1].items()}
    series["the student's last layer"] = curve(metrics, "interact", "kl_last")[1]
    for name, values in series.items():
        if len(values) < LEAST_STEPS:
            continue
        start, end = _tenths(values)
        if start < SMALL_NATS or end <= FLAT * start:
            continue
        raw = ", or the verbalizer is raw (raise the steps of `distill.verbalize`)" if "last" not in name else ""
        cause = (
            "the learning rate is probably too high: lower `distill.interact.schedule.learning_rate`, or raise `warmup`"
            if end > RISING * start
            else f"the learning rate of `distill.interact.schedule` is probably too low, the stage too short{raw}"
        )
        verb = "rose" if end > start else "hardly fell"
        yield Finding(
            "loss_not_falling",
            f"the loss of {name} {verb} in the interaction, from {start:.3g} in the first tenth of its steps to "
            f"{end:.3g} in the last one: {cause}",
        )


def _tenths(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last tenth, at least one value each."""
    num = max(1, len(values) // 10)
    return float(np.mean(values[:num])), float(np.mean(values[-num:]))


def _means(probes: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Mean of a probed number by layer, over the probes that have it."""
    found: dict[int, list[float]] = {}
    for layer, values in ((layer, values) for probe in probes for layer, values in probe.items() if key in values):
        found.setdefault(int(layer), []).append(values[key])
    return {layer: float(np.mean(values)) for layer, values in sorted(found.items())}


def warn_of(found: Iterable[Finding]) -> None:
    """Say what looks wrong."""
    for one in found:
        say(f"warning: {one.text}")
