"""Tables of the acceptance benchmark, and what must hold in them."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from measuring import Report

PACKAGES = ("torch", "transformers", "peft", "numpy", "zarr")
VLSI, LAST, SFT, FADED = "adaptive", "last", "sft", "mean, fade 0-0.3"
FEWER = "last, without the steps of verbalizers"  # what these steps are worth to last-layer KD
ANY_DEPTH = "any-depth"  # beside FEWER, which takes as many steps of the student
LENS, EARLY = "any-depth, logit lens, even map, jsd", "any-depth, logit lens, labels"
OF_DEPTH = (ANY_DEPTH, LENS, EARLY)
WIDE, DENSE = "16 entries", "dense rows"
MONOTONE_NATS, FIDELITY_NATS = 0.02, 0.02  # tolerances
ORDERED = ("adaptive", "printed", "order", "joint")  # matchings whose teacher layers rise with the student's
Seeds = Sequence[dict[str, Any]]


class Check(NamedTuple):
    """One thing that must hold: the figures of all seeds, and whether all of them do."""

    what: str
    figures: str
    holds: bool


def write(report: Report, found: Mapping[str, Seeds], asserted: Mapping[str, bool]) -> bool:
    """Say everything; returns whether all that must hold does."""
    checks = [check for cell, seeds in found.items() if asserted[cell] for check in must_hold(cell, seeds)]
    if checks:
        report.say("## What must hold\n")
        report.table("what", "figures, one for each seed", "holds")
        for check in checks:
            report.row(check.what, check.figures, "yes" if check.holds else "**no**")
    for cell, seeds in found.items():
        _scores(report, cell, seeds)
        _depth(report, cell, seeds)
    _teacher(report, found)
    return all(check.holds for check in checks)


def must_hold(cell: str, seeds: Seeds) -> Iterator[Check]:
    """The checks of one cell."""
    last, vlsi = _gains(seeds, LAST, SFT), _gains(seeds, VLSI, SFT)
    yield Check(f"{cell}: last-layer KD is nearer to the truth than sft alone, by", _listed(last), min(last) > 0)
    yield Check(f"{cell}: VLsI is nearer to the truth than sft alone, by", _listed(vlsi), min(vlsi) > 0)
    if cell.startswith("cold"):
        over = _gains(seeds, VLSI, LAST)
        yield Check(f"{cell}: VLsI is nearer to the truth than last-layer KD, by", _listed(over), min(over) > 0)
    for layer in seeds[0]["variants"][VLSI]["layers"]:
        for ruler, by in (("layers", "VLsI's verbalizers"), ("anew", "verbalizers trained anew for each")):
            better = [_layer(seed, LAST, layer, ruler) - _layer(seed, VLSI, layer, ruler) for seed in seeds]
            what = (
                f"{cell}: student layer {layer} says the response better after VLsI than after last-layer KD ({by}), by"
            )
            yield Check(what, _listed(better), min(better) > 0)
    for name, width in ((VLSI, 8), (WIDE, 16)):
        lost = [-gain for gain in _gains(seeds, name, DENSE)]
        what = f"{cell}: training from {width} of 36 entries is farther from the truth than from dense rows, by"
        yield Check(what, _listed(lost), max(map(abs, lost)) < FIDELITY_NATS)
    for when in ("start", "end"):
        pairs = [
            (_nearest(seed["layer_kls"][when]["cache"]), _nearest(seed["layer_kls"][when][DENSE])) for seed in seeds
        ]
        what = f"{cell}: nearest teacher layer of each student layer at the {when}, cache and dense"
        yield Check(what, "; ".join(f"{a} \\| {b}" for a, b in pairs), all(a == b for a, b in pairs))
    falls = [_largest_rise(seed["teacher_layers"]["100%"]) for seed in seeds]
    yield Check(
        f"{cell}: the teacher's verbalizers know more with every layer, largest exception", _listed(falls),
        max(falls) < MONOTONE_NATS,
    )  # fmt: skip
    broken = [_unordered(seed) for seed in seeds]
    yield Check(f"{cell}: matches that break the order, of all", "; ".join(f"{a} of {b}" for a, b in broken),
                not any(a for a, _ in broken))  # fmt: skip


def _scores(report: Report, cell: str, seeds: Seeds) -> None:
    start = statistics.mean(seed["student"] for seed in seeds)
    report.say(
        f"\n## {cell}\n\nTeacher {_spread([seed['teacher'] for seed in seeds])} from the truth, student at the start "
        f"{start:.3f}; seeds {', '.join(str(seed['seed']) for seed in seeds)}. Nats per word; a difference below 0 is "
        "nearer to the truth, with the number of seeds for which it is. NLL: loss of the response at a layer of the "
        "student, through the verbalizers of the seed's VLsI run, through which VLsI students were trained; anew: "
        "through verbalizers that were trained for the finished student, on other rows.\n"
    )
    layers = list(seeds[0]["variants"][VLSI]["layers"])
    report.table(
        "variant", "KL from the truth, mean (range)", f"- {LAST}", "seeds", f"- {VLSI}", "seeds",
        *(f"NLL layer {layer}" for layer in layers), *(f"anew {layer}" for layer in layers), "mean match",
    )  # fmt: skip
    for name in sorted(seeds[0]["variants"], key=lambda one: statistics.mean(_kls(seeds, one))):
        differences = []
        for base in (LAST, VLSI):
            over = [-gain for gain in _gains(seeds, name, base)]
            differences += [f"{statistics.mean(over):+.3f}", f"{sum(x < 0 for x in over)}/{len(over)}"]
        nll = [_mean_layer(seeds, name, layer, ruler) for ruler in ("layers", "anew") for layer in layers]
        report.row(name, _spread(_kls(seeds, name)), *differences, *nll, _mean_match(seeds, name))


def _depth(report: Report, cell: str, seeds: Seeds) -> None:
    """What the last layer pays for layers that answer, and how much better these say the response; seed by seed."""
    names = [name for name in (VLSI, FADED, *OF_DEPTH) if name in seeds[0]["variants"]]
    if ANY_DEPTH not in names:
        return
    layers = list(seeds[0]["variants"][FEWER]["anew"])
    report.say(
        f"\n### {cell}: layers that answer, against `{FEWER}` and exits trained afterwards\n\n"
        "Nats, one figure for each seed; of a layer through verbalizers trained anew for each student, above 0 is "
        "better than that baseline.\n"
    )
    report.table("variant", "last layer behind, KL", *(f"layer {layer} ahead, NLL" for layer in layers))
    for name in names:
        ahead = [
            [_layer(one, FEWER, layer, "anew") - _layer(one, name, layer, "anew") for one in seeds] for layer in layers
        ]
        report.row(name, _listed([-gain for gain in _gains(seeds, name, FEWER)]), *map(_listed, ahead))


def _teacher(report: Report, found: Mapping[str, Seeds]) -> None:
    report.say(
        "\n## Loss of the teacher's verbalizers by layer, at shares of their training, mean over seeds\n\n"
        "Nats per response token.\n"
    )
    by_source = {seeds[0]["source"]: seeds for seeds in found.values()}
    for source, seeds in by_source.items():
        tables = [seed["teacher_layers"] for seed in seeds]
        report.say(f"\nSource `{source}`:\n")
        report.table("share", *tables[0]["100%"])
        for share in tables[0]:
            row = (statistics.mean(table[share][layer] for table in tables) for layer in tables[0][share])
            report.row(share, *(f"{x:.2f}" for x in row))


def _kls(seeds: Seeds, name: str) -> list[float]:
    return [seed["variants"][name]["kl"] for seed in seeds]


def _gains(seeds: Seeds, name: str, base: str) -> list[float]:
    """How much nearer to the truth `name` is than `base`, by seed."""
    return [b - a for a, b in zip(_kls(seeds, name), _kls(seeds, base), strict=True)]


def _layer(seed: dict[str, Any], name: str, layer: str, ruler: str) -> float:
    """Loss of the response at a student's layer: through VLsI's verbalizers (`layers`), or its own (`anew`)."""
    return seed["variants"][name][ruler][layer]


def _mean_layer(seeds: Seeds, name: str, layer: str, ruler: str) -> str:
    if any(ruler not in seed["variants"][name] for seed in seeds):
        return ""
    return f"{statistics.mean(_layer(seed, name, layer, ruler) for seed in seeds):.2f}"


def _nearest(kls: list[list[float]]) -> list[int]:
    return [row.index(min(row)) for row in kls]


def _largest_rise(by_layer: dict[str, float]) -> float:
    """How much more a layer loses than the one before it, at most."""
    losses = [by_layer[layer] for layer in sorted(by_layer, key=int)]
    return max(b - a for a, b in pairwise(losses))


def _unordered(seed: dict[str, Any]) -> tuple[int, int]:
    """Matches of the ordered variants that do not rise strictly, and all of them."""
    matches = [match for name in ORDERED for match in seed["variants"].get(name, {"matched": []})["matched"]]
    return sum(sorted(set(match)) != match for match in matches), len(matches)


def _mean_match(seeds: Seeds, name: str) -> str:
    matches = [match for seed in seeds for match in seed["variants"][name]["matched"]]
    return " ".join(f"{statistics.mean(column):.1f}" for column in zip(*matches, strict=True)) if matches else ""


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
