"""Commands that only read: ls, inspect, sample, stats, verify, diff, report, specs."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from .output import LOOK, OK, PROBLEMS, Answer, command, require_cache

CachePath = Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of a cache.")]


def register(app: typer.Typer) -> None:
    """Add the reading commands to `app`."""
    for name, function, example in COMMANDS:
        command(app, name, panel=LOOK, example=f"vlsi-cache {example}")(function)


def ls(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to look, with all folders below.")] = Path(),
) -> Answer:
    """List caches and runs below a folder."""
    from .listing import find_artifacts, listing_table

    found = find_artifacts(folder)
    return Answer(found, lambda: listing_table(found) if found else f"no caches and no runs below {folder.resolve()}")


def inspect(cache: CachePath) -> Answer:
    """Show what a cache is: origin, progress, layers, bytes."""
    from vlsi_cache.report.describe import describe_cache, description_text

    facts = describe_cache(cache)
    return Answer(facts, lambda: description_text(facts))


def sample(
    cache: CachePath,
    sample_id: Annotated[str, typer.Argument(metavar="ID", help="Sample id; `inspect` shows some.")],
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Words per layer and token.")] = 1,
    layers: Annotated[str | None, typer.Option(metavar="LIST", help="Layers to show, e.g. 2-6,18,last.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="A:B", help="Response tokens A to B - 1, from 0.")] = None,
) -> Answer:
    """Show what every layer says, token by token.

    The words come from the cache: no model and no tokenizer is needed. A cache that is still being built will do.
    """
    from .sampling import grid_text, sample_grid

    grid = sample_grid(cache, sample_id, top=top, layers=layers, tokens=tokens)
    return Answer(grid, lambda: grid_text(grid))


def stats(
    cache: CachePath,
    parts: Annotated[int, typer.Option(min=0, metavar="N", help="Evenly spaced parts to read; 0: all.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE.html", help="Also write figures.")] = None,
) -> Answer:
    """Show what the layers say: entropy, loss, ranks, KL.

    Means over response tokens, per layer, and how far the layers are from each other.
    """
    from vlsi_cache.report.layer_stats import cache_stats, stats_text
    from vlsi_cache.store.reader import open

    found = cache_stats(open(cache, allow_incomplete=True), parts=parts)
    if out is None:
        return Answer(found.as_dict(), lambda: stats_text(found))
    from vlsi_cache.report.stats_page import write_stats_page

    file = write_stats_page(found, out)
    return Answer({**found.as_dict(), "page": file}, lambda: f"{stats_text(found)}\n\npage: {file}")


def verify(
    cache: CachePath,
    deep: Annotated[bool, typer.Option(help="Also read every byte and compare its checksum.")] = False,
    recompute: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Also run the teacher on N random samples and compare.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where the teacher runs; default: what its spec says.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the teacher.")
    ] = False,
) -> Answer:
    """Check that every file is what was written.

    Exit code 1 when something is wrong; every problem comes with what to do about it.
    """
    from vlsi_cache.store.verify import verify as verify_cache

    require_cache(cache)
    found = verify_cache(cache, deep=deep)
    answer = Answer({"ok": found.ok, **asdict(found)}, str(found), exit_code=OK if found.ok else PROBLEMS)
    if recompute is None:
        return answer
    if not found.ok:
        return replace(answer, text=f"{answer.text}\nnothing was recomputed: mend these files first")
    from vlsi_cache.stages.recompute import recompute as run_teacher
    from vlsi_cache.store.reader import open

    again = run_teacher(open(cache), num_samples=recompute, device=device, trust_remote_code=trust_remote_code)
    data = {**answer.data, "ok": again.ok, "recompute": again.as_dict()}
    return Answer(data, f"{answer.text}\n{again}", exit_code=OK if again.ok else PROBLEMS)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a cache.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of the cache to compare it with.")],
    samples: Annotated[int, typer.Option(min=0, metavar="N", help="Common samples whose rows are compared.")] = 200,
) -> Answer:
    """Compare two caches: origin, samples, and what every layer says.

    Exit code 1 when something differs.
    """
    import vlsi_cache as vc

    found = vc.diff(a, b, samples=samples)
    return Answer(found.as_dict(), lambda: str(found), exit_code=OK if found.is_equal else PROBLEMS)


def report(
    path: Annotated[
        Path, typer.Argument(metavar="CACHE-or-RUN", help="Folder of a cache, a run, an ablation or a demo.")
    ],
) -> Answer:
    """Write report.html: figures on one self-contained page."""
    from vlsi_cache.report.html import write_report

    file = write_report(path)
    return Answer({"report": file}, f"report: {file}")


def specs() -> Answer:
    """List the specs that come with the package."""
    from vlsi_cache.report.text import table
    from vlsi_cache.spec import load_spec, shipped_specs

    found = [
        {"name": name, "description": load_spec(name).description, "file": file}
        for name, file in shipped_specs().items()
    ]
    rows = [[str(one["name"]), str(one["description"])] for one in found]
    return Answer(found, lambda: table(["spec", "what it is"], rows))


COMMANDS = (
    ("ls", ls, "ls caches"),
    ("inspect", inspect, "inspect caches/demo"),
    ("sample", sample, "sample caches/demo 5f0c2a --top 3"),
    ("stats", stats, "stats caches/demo -o stats.html"),
    ("verify", verify, "verify caches/demo --deep"),
    ("diff", diff, "diff caches/demo caches/small"),
    ("report", report, "report runs/a"),
    ("specs", specs, "specs"),
)
