"""The parts of a run's page that show what happened inside: verbalizers, matches, probes, and what looks wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlsi_cache.runs.diagnostics import findings_of
from vlsi_cache.runs.metrics import RunFiles, layer_curves

from . import figures
from .matches import matches_html, matches_of
from .page import figure, html_table, paragraph, warning

PROGRESS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # where the paper's Appendix B reads the verbalizers' losses
WINDOW = 0.05  # of the steps, on either side of a point: single steps are noisy
MONOTONE_NATS = 0.02  # a deeper layer may be so much worse: the noise of such a mean

PANELS = (  # title, unit, the student's number, the teacher's
    ("KL of student from teacher", "nats", "kl", None),
    ("loss of the response", "nats", "student_loss", "teacher_loss"),
    ("entropy", "nats", "student_entropy", "teacher_entropy"),
    ("mass on the teacher's top-k", "[%]", "student_mass", "kept_mass"),
    ("top-k in common", "[%]", "overlap", None),
    ("same top word", "[%]", "top1_agreement", None),
)


def findings_html(run: RunFiles) -> str:
    """Why the run has failed, and what looks wrong; nothing where nothing does."""
    failure = [f"the run has failed: {run.record['message']}"] if run.record.get("status") == "failed" else []
    texts = [*failure, *(one.text for one in findings_of(run))]
    return "".join(warning(f"{text[0].upper()}{text[1:]}.") for text in texts)


def verbalizer_html(run: RunFiles) -> str:
    """Loss of every verbalizer over the verbalize stage."""
    steps, layers = layer_curves(run.metrics, "verbalize")
    if not steps:
        return ""
    svg = figures.verbalizer_losses(steps, layers, unit="nats per token")
    caption = "Cross-entropy of each verbalized layer on the response. Deeper layers should end lower."
    heads, rows = progress_rows(run.metrics)
    return figure(svg, caption) + html_table(heads, rows) + paragraph(progress_note(run.metrics), note=True)


def progress_rows(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Loss of every layer at some shares of the stage's steps (VLsI, Appendix B), as far as it has come."""
    points = _progress(metrics)
    heads = ["layer", *(f"{100 * share:.0f} %" for share in next(iter(points.values()), {}))]
    return heads, [[str(layer), *(f"{nats:.3f}" for nats in at.values())] for layer, at in points.items()]


def progress_note(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What the table is, and which layers end worse than a shallower one."""
    points = _progress(metrics)
    ends = {layer: at[PROGRESS[-1]] for layer, at in points.items() if PROGRESS[-1] in at}
    pairs = zip(list(ends)[:-1], list(ends)[1:], strict=True)
    worse = [f"{b} ({ends[b]:.3f}) after {a} ({ends[a]:.3f})" for a, b in pairs if ends[b] > ends[a] + MONOTONE_NATS]
    text = "Nats per response token at these shares of the training, each the mean of the steps around it."
    if worse:
        text += f" The losses do not fall with depth at the end: layer {', layer '.join(worse)}."
    return text


def _progress(metrics: Sequence[Mapping[str, Any]]) -> dict[int, dict[float, float]]:
    """Mean loss by layer and share of the stage, for the shares that it has reached."""
    steps, layers = layer_curves(metrics, "verbalize")
    if not steps:
        return {}
    num_steps = next(int(line["num_steps"]) for line in metrics if line["stage"] == "verbalize")
    reached = [share for share in PROGRESS if round(share * num_steps) <= steps[-1]]
    centres = {share: max(1.0, share * num_steps) for share in reached}
    around = {s: np.abs(np.array(steps) - centre) <= max(0.5, WINDOW * num_steps) for s, centre in centres.items()}
    return {
        layer: {share: float(np.mean(np.array(values)[near])) for share, near in around.items()}
        for layer, values in layers.items()
    }


def match_html(run: RunFiles) -> str:
    """Where the student's layers were matched, beside what no information at all would give."""
    found = matches_of(run)
    return "" if found is None else matches_html(found)


def probe_html(run: RunFiles) -> str:
    """Student layers beside their teacher layers at some steps of the interaction."""
    lines = [line for line in run.metrics if line.get("probe")]
    if not lines:
        return ""
    layers = sorted({int(layer) for line in lines for layer in line["probe"]})
    panels = [
        figures.Panel(title, unit, _series(lines, layers, own, unit), _series(lines, layers, other, unit))
        for title, unit, own, other in PANELS
    ]
    svg = figures.probe_curves([panel for panel in panels if panel.student], [line["step"] for line in lines], layers)
    caption = (
        "Means over some response tokens of one micro-batch, before its update: each verbalized layer of the student "
        "beside the teacher layer that it was matched with in that step, so a line also moves with the draw; the last "
        "layer beside the teacher's last."
    )
    return figure(svg, caption)


def _series(lines: Sequence[Mapping[str, Any]], layers: Sequence[int], key: str | None, unit: str) -> dict[int, Any]:
    """A probed number by layer, NaN at the steps without it; layers that never have it are left out."""
    scale = 100.0 if unit == "[%]" else 1.0
    found = {}
    for layer in layers:
        values = [line["probe"].get(str(layer), {}).get(key) for line in lines]
        if any(value is not None for value in values):
            found[layer] = [np.nan if value is None else scale * value for value in values]
    return found
