"""Commands that make a new cache out of one, or mend one: prune, repair."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlsi_cache.errors import SpecError

from .output import CHANGE, Answer, command, require_cache, say

if TYPE_CHECKING:
    from vlsi_cache.store.edit import PrunePlan

CachePath = Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of a cache.")]


def register(app: typer.Typer) -> None:
    """Add the changing commands to `app`."""
    for name, function, example in COMMANDS:
        command(app, name, panel=CHANGE, example=f"vlsi-cache {example}")(function)


def prune(
    cache: CachePath,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="NEW", help="Where the smaller cache goes.")],
    layers: Annotated[str | None, typer.Option(metavar="LIST", help="Layers to keep, e.g. 2-6,18,last.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, metavar="K", help="Entries to keep per distribution.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the new cache would be.")] = False,
) -> Answer:
    """Make a smaller cache with fewer layers or a smaller k.

    The old one stays as it is. Run again after a crash to go on.
    """
    from vlsi_cache.store.edit import plan_prune

    import vlsi_cache as vc
    from vlsi_cache.report.text import human_bytes

    if layers is None and top_k is None:
        raise SpecError("nothing to prune: name what to keep with --layers, --top-k or both")
    kept = None if layers is None else parse_layers(layers)
    planned = plan_prune(vc.open(cache), out, layers=kept, top_k=top_k)
    facts = {**asdict(planned), "dry_run": dry_run}
    if dry_run:
        return Answer(facts, f"would write {out}: {_cuts(planned)}")
    say(_cuts(planned))
    small = vc.prune(cache, out, layers=kept, top_k=top_k)
    facts["bytes"] = sum(small.bytes_by_array().values())
    return Answer(facts, f"cache: {out} ({human_bytes(facts['bytes'])} of {human_bytes(planned.source_bytes)})")


def repair(
    cache: CachePath,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete leftovers without asking.")] = False,
) -> Answer:
    """Move broken parts out of the way for the next build.

    They go to `quarantine/` inside the cache. What killed processes have left in `tmp/` is deleted, after a question.
    """
    import vlsi_cache as vc

    require_cache(cache)
    done = vc.repair(cache, yes=yes)
    text = str(done)
    if done.left and _confirmed(done.left):
        removed = vc.repair(cache, yes=True).removed
        done, text = replace(done, removed=removed, left=[]), f"{text}\nremoved: {', '.join(removed)}"
    return Answer(asdict(done), f"{cache}: {text}")


def parse_layers(text: str) -> list[int | str]:
    """`2-6,18,last` -> [2, 3, 4, 5, 6, 18, "last"]."""
    layers: list[int | str] = []
    for item in text.replace(" ", "").split(","):
        first, dash, last = item.partition("-")
        if item == "last":
            layers.append(item)
        elif first.isdecimal() and (last.isdecimal() or not dash) and int(first) <= int(last or first):
            layers.extend(range(int(first), int(last or first) + 1))
        else:
            raise SpecError(f"--layers {text}: `{item}` is neither a layer, nor a range such as 2-6, nor `last`")
    return layers


def _confirmed(left: list[str]) -> bool:
    """Ask before anything is deleted; nobody to ask means no."""
    if not sys.stdin.isatty():
        return False
    return typer.confirm(f"delete what killed processes left: {', '.join(left)}?", err=True)


def _cuts(planned: "PrunePlan") -> str:
    from vlsi_cache.report.text import human_bytes

    layers = f"{len(planned.layers)} of {len(planned.layers) + len(planned.dropped_layers)} layers {planned.layers}"
    sizes = f"about {human_bytes(planned.estimated_bytes)} instead of {human_bytes(planned.source_bytes)}"
    return f"{layers}, top-{planned.top_k} of {planned.source_top_k}; {sizes}"


COMMANDS = (
    ("prune", prune, "prune caches/demo -o caches/small --layers 2,4,last --top-k 8"),
    ("repair", repair, "repair caches/demo"),
)
