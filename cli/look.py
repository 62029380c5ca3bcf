"""Commands that only read: ls, inspect, sample, verify, report, specs."""

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
    from .listing import describe_cache, description_text

    facts = describe_cache(cache)
    return Answer(facts, lambda: description_text(facts))


def sample(
    cache: CachePath,
    sample_id: Annotated[str, typer.Argument(metavar="ID", help="Sample id; `inspect` shows some.")],
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Words per layer and token.")] = 1,
) -> Answer:
    """Show what every layer says, token by token."""
    import vlsi_cache as vc

    from .sampling import grid_text, sample_grid

    grid = sample_grid(vc.open(cache, allow_incomplete=True), sample_id, top=top)
    return Answer(grid, lambda: grid_text(grid))


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


def report(
    path: Annotated[Path, typer.Argument(metavar="CACHE-or-RUN", help="Folder of a cache, a run or a demo.")],
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
    ("verify", verify, "verify caches/demo --deep"),
    ("report", report, "report runs/a"),
    ("specs", specs, "specs"),
)
