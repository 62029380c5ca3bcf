"""What `evaluation.json` says, for the terminal and for the report of a run."""

from collections.abc import Mapping
from typing import Any

from .page import html_table, paragraph, tiles
from .text import kinds_of, percent, table

Table = tuple[list[str], list[list[str]]]


def evaluation_table(result: Mapping[str, Any]) -> str:
    """The content of `evaluation.json` for the terminal."""
    lines = [f"held-out samples: {result['num_samples']}{_left_out(result)}"] if "num_samples" in result else []
    lines += [f"{name}: {result[name]:.4g}" for name in ("perplexity", "nll") if result.get(name) is not None]
    match, counts = result.get("exact_match"), result.get("num_by_kind") or {}
    if match:
        rows = [[k, str(counts.get(k, result["num_samples"])), f"{100 * match[k]:.1f}"] for k in kinds_of([match])]
        lines += ["", table(["kind", "samples", "exact match, %"], rows)]
    blocks = ["\n".join(lines), "\n".join(_notes(result)), *(table(*one) for one in _layer_losses(result))]
    blocks += ["\n".join(_teacher_lines(result)), *(table(*one) for one in _divergences(result))]
    return "\n\n".join(block for block in blocks if block)


def evaluation_html(evaluation: dict[str, Any] | None) -> list[str]:
    """The numbers of `evaluation.json`; nothing when there are none."""
    if not evaluation:
        return []
    match, counts = evaluation.get("exact_match"), evaluation.get("num_by_kind") or {}
    samples = f"held-out samples{_left_out(evaluation)}"
    shown = [(f"{evaluation['num_samples']:,}", samples)] if "num_samples" in evaluation else []
    shown += [(percent(match["all"]), "exact match")] if match else []
    shown += [(f"{evaluation['perplexity']:.3f}", "perplexity")] if evaluation.get("perplexity") else []
    shown += [(f"{evaluation['cache']['kl']:.3f}", "nats from the teacher")] if evaluation.get("cache") else []
    rows = (
        [[k, str(counts.get(k, evaluation["num_samples"])), percent(match[k])] for k in kinds_of([match])]
        if match
        else []
    )
    return [
        tiles(shown),
        html_table(["kind", "samples", "exact match"], rows, strong="all") if rows else "",
        *(paragraph(note, note=True) for note in _notes(evaluation)),
        *(html_table(*one) for one in _layer_losses(evaluation)),
        *(paragraph(line) for line in _teacher_lines(evaluation)),
        *(html_table(*one) for one in _divergences(evaluation)),
    ]


def _left_out(result: Mapping[str, Any]) -> str:
    return f" ({result['num_skipped']:,} left out)" if result.get("num_skipped") else ""


def _notes(result: Mapping[str, Any]) -> list[str]:
    """What is not as usual: beams, borrowed verbalizers."""
    beams, borrowed = result.get("num_beams") or 1, result.get("verbalizers")
    notes = [f"answers by beam search with {beams} beams"] if beams > 1 else []
    if borrowed:
        notes.append(f"layers read through verbalizers of {borrowed['path']}{_trained_on(borrowed)}")
    return notes


def _trained_on(borrowed: Mapping[str, Any]) -> str:
    if borrowed.get("same_student"):
        return ", trained on this very student"
    starts = {True: ", trained on what this run started from", False: ", trained on OTHER weights than it started from"}
    return starts.get(borrowed["same_start"], "")


def _layer_losses(result: Mapping[str, Any]) -> list[Table]:
    rows = [[layer, f"{nll:.3f}"] for layer, nll in (result.get("layers") or {}).items()]
    return [(["layer", "nats per token"], rows)] if rows else []


def _teacher_lines(result: Mapping[str, Any]) -> list[str]:
    """How far the model is from the teacher of a cache."""
    found = result.get("cache")
    if not found:
        return []
    lines = [
        f"against the teacher of {found['cache']}: {found['num_samples']:,} samples, {found['num_tokens']:,} tokens",
        f"KL(teacher || student) of the last layer: {found['kl']:.4f} nats per token "
        f"(teacher's entropy {found['teacher_entropy']:.4f})",
    ]
    if found["top1_agreement"] is not None:
        lines.append(
            f"same first word: {percent(found['top1_agreement'])} of tokens; "
            f"student's mass on the teacher's kept words: {percent(found['mass_on_top_k'])}"
        )
    return [*lines, *_held_out(found)]


def _held_out(found: Mapping[str, Any]) -> list[str]:
    """What is to be said about rows that are not, or not known to be, held out."""
    trained = found.get("trained_on")
    if trained is None:
        return ["NOT KNOWN TO BE HELD OUT: the rows that the model was trained on cannot be looked up"]
    num = found.get("num_trained_on")  # an earlier release did not count
    part = "" if num in (None, found["num_samples"]) else f"{num:,} of "
    return [f"NOT HELD OUT: the run was trained on {part}these rows"] if trained else []


def _divergences(result: Mapping[str, Any]) -> list[Table]:
    """KL of every verbalized student layer to every cached teacher layer."""
    found = result.get("cache") or {}
    if not found.get("layers"):
        return []
    *intermediate, _ = found["teacher_layers"]
    heads = ["KL, nats: student layer", *(f"to {layer}" for layer in intermediate), "to last"]
    return [(heads, [[layer, *(f"{kl:.3f}" for kl in kls)] for layer, kls in found["layers"].items()])]
