"""The command `ablate`: all variants of one or more of the paper's tables, from one cache."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import OK, PROBLEMS, STAGES, Answer, command
from .stages import Device, Sets, SpecName

AXES = ("matching", "operations", "verbalizer", "sft", "decoding", "loss", "k", "layers")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    example = "vlsi-cache ablate demo --axis matching --student models/small --seeds 3 -o ablation"
    command(app, "ablate", panel=STAGES, example=example)(ablate)


def ablate(
    spec: SpecName,
    axis: Annotated[
        list[str],
        typer.Option(metavar="|".join([*AXES, "FILE.yaml"]), help="Which table; repeatable, runs are shared."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where cache, runs and tables go.")],
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Train every variant with N seeds.")] = 1,
    cache: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="A cache of SPEC; default: DIR/cache, built if missing.")
    ] = None,
    student: Annotated[
        str | None, typer.Option(metavar="ID", help="Folder or hub id; default: the student of the spec.")
    ] = None,
    variants: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these variants, and the default; --dry-run lists all.")
    ] = None,
    sets: Sets = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list variants, steps and remaining runs.")] = False,
) -> Answer:
    """Train and compare all variants of a table.

    One cache (or smaller ones cut from it) and the same seeds for all, and the same number of steps but for the tables
    that say so. Every student is measured on the spec's held-out rows. Run again after a crash to go on, or to add
    tables, variants and seeds: finished runs are taken. Exit code 1 when a run has diverged; the others are done all
    the same.

    A table of your own is a YAML file: `title`, and `variants`, each with `name`, `what` and a list `set` of KEY=VALUE
    changes to the spec; the shipped ones in cache_specs/ablations are examples, its README lists the other keys.
    """
    import vlsi_cache as vc
    from vlsi_cache.report.ablation import ablation_text, num_failed

    result = vc.ablate(
        vc.load_spec(spec, overrides=sets or []),
        axes=axis,
        out=out,
        seeds=seeds,
        cache=cache,
        student=student,
        variants=None if variants is None else [name.strip() for name in variants.split(",")],
        device=device,
        dry_run=dry_run,
    )
    if dry_run:
        return Answer(result, lambda: _preview(result))
    text = f"\n\ntable: {out / 'ablation.csv'}\nreport: {out / 'report.html'}"
    return Answer(result, lambda: ablation_text(result) + text, PROBLEMS if num_failed(result) else OK)


def _preview(plan: dict[str, Any]) -> str:
    """The variants of every table with their steps, and how much is left to do."""
    from vlsi_cache.report.ablation import label, title
    from vlsi_cache.report.text import table

    blocks = []
    for axis, rows in plan["tables"].items():
        cells, reasons = [], []
        for row in rows:
            steps = plan["steps"].get(row["run"], {})
            parts = ", ".join(f"{stage} {count}" for stage, count in steps.items())
            cells.append([label(row), row["what"], f"{sum(steps.values())} ({parts})" if steps else "not possible"])
            if row["run"] is None:
                reasons.append(f"not possible: {label(row)}: {row['reason']}")
        blocks.append("\n".join([title(plan, axis), table(["variant", "what", "steps"], cells), *reasons]))
    runs = f"{plan['num_runs']} runs ({len(plan['seeds'])} seed(s)), {plan['num_remaining']} of them remain"
    return "\n\n".join([*blocks, f"{plan['budget']}\n{runs}"])
