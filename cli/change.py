"""Commands that make a new cache out of others, copy one, or mend one: prune, merge, push, pull, repair."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlsi_cache.config.layers import parse_layers, shown_layers
from vlsi_cache.errors import SpecError
from vlsi_cache.progress import human_bytes, printable, say

from .output import Answer, CachePath, require_cache

if TYPE_CHECKING:
    from vlsi_cache.store.derive.prune import PrunePlan
    from vlsi_cache.store.remote.transfer import Transfer


def prune(
    cache: CachePath,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="NEW", help="Where the smaller cache goes: a folder or a URL.")
    ] = None,
    layers: Annotated[str | None, typer.Option(metavar="LIST", help="Layers to keep, e.g. 2-6,18,last.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, metavar="K", help="Entries to keep per distribution.")] = None,
    samples: Annotated[Path | None, typer.Option(metavar="FILE", help="Samples to keep: one id a line.")] = None,
    min_kept_mass: Annotated[
        float | None, typer.Option(metavar="X", help="Keep samples whose top-k holds at least this mass.")
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="EXPR", help="Samples to keep, e.g. 'kind == \"chart\" and entropy > 0.5'.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="RULE", help="Tokens to keep: 'entropy>0.5', top:0.3 or random:0.2.")
    ] = None,
    profile: Annotated[str | None, typer.Option(metavar="P", help="Store values as: default or fast.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the new cache would be.")] = False,
    suggest: Annotated[bool, typer.Option("--suggest", help="Only propose layers to drop, with their KL.")] = False,
    keep: Annotated[int | None, typer.Option(min=1, metavar="N", help="With --suggest: layers to be left.")] = None,
    max_kl: Annotated[float | None, typer.Option(metavar="X", help="With --suggest: nats a drop may cost.")] = None,
) -> Answer:
    """Make a smaller cache: fewer layers, a smaller k, fewer samples or tokens.

    The old one stays as it is. Run again after a crash to go on.
    """
    import vlsi_cache as vc

    options: dict[str, Any] = {"top_k": top_k, "samples": samples, "min_kept_mass": min_kept_mass, "where": where}
    options |= {"layers": None if layers is None else parse_layers(layers), "tokens": tokens, "profile": profile}
    if suggest:
        cuts = {"out": out, "dry_run": dry_run or None, **options}
        given = ", ".join(f"--{name.replace('_', '-')}" for name, value in cuts.items() if value is not None)
        if given:
            raise SpecError(f"--suggest only proposes layers and writes nothing, so {given} would do nothing with it")
        return _suggestion(cache, keep=keep, max_kl=max_kl)
    if keep is not None or max_kl is not None:
        raise SpecError("--keep and --max-kl belong to --suggest; the layers to keep are named with --layers")
    if out is None:
        raise SpecError("name the folder of the new cache with -o NEW")
    if all(value is None for value in options.values()):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(options))
        raise SpecError(f"nothing to prune: say what to keep with one or more of {names}")
    source = vc.open(cache)
    planned = vc.prune(source, out, dry_run=True, **options)
    facts = {**asdict(planned), "dry_run": dry_run}
    if dry_run:
        return Answer(facts, f"would write {out}: {_cuts(planned)}")
    say(_cuts(planned))
    small = vc.prune(source, out, **options)
    facts["bytes"] = sum(small.bytes_by_array().values())
    return Answer(facts, f"cache: {out} ({human_bytes(facts['bytes'])} of {human_bytes(planned.source_bytes)})")


def _suggestion(cache: str, *, keep: int | None, max_kl: float | None) -> Answer:
    import vlsi_cache as vc
    from vlsi_cache.report.layers import suggest_layers, suggestion_text

    found = suggest_layers(vc.open(cache), keep=keep, max_kl=max_kl)
    return Answer(found.as_dict(), lambda: suggestion_text(found))


def merge(
    caches: Annotated[
        list[str], typer.Argument(metavar="A B [C ...]", help="Folders or URLs of caches.", show_default=False)
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="NEW", help="Where the new cache goes: a folder or a URL.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the new cache would be.")] = False,
) -> Answer:
    """Join caches of one teacher with different samples.

    The old ones stay as they are. Run again after a crash to go on.
    """
    import vlsi_cache as vc

    planned = vc.merge(caches, out, dry_run=True)
    facts = {**asdict(planned), "dry_run": dry_run}
    size = human_bytes(planned.estimated_bytes)
    holds = f"{planned.num_samples} samples in {planned.num_parts} parts, about {size}"
    if dry_run:
        return Answer(facts, f"would write {out}: {holds}")
    say(holds)
    facts["bytes"] = sum(vc.merge(caches, out).bytes_by_array().values())
    return Answer(facts, f"cache: {out} ({planned.num_samples} samples, {human_bytes(facts['bytes'])})")


def push(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Folder of a finished cache.")],
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="Where it goes: s3://, gs:// or az://BUCKET/NAME, or hf://datasets/ORG/NAME."
        ),
    ],
) -> Answer:
    """Copy a cache to an object store.

    Every file is compared with its checksum on the way. What is there already stays: run again after a crash to go on.
    A data set of the hub gets a card, and is private where it is new.
    """
    import vlsi_cache as vc

    return _transferred(vc.push(cache, url))


def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="The cache: s3://BUCKET/NAME, gs://, az:// or hf://.")],
    out: Annotated[Path, typer.Argument(metavar="CACHE", help="The folder where it goes.")],
    layers: Annotated[str | None, typer.Option(metavar="LIST", help="Only these layers, e.g. 2-6,18,last.")] = None,
    samples: Annotated[Path | None, typer.Option(metavar="FILE", help="Only these samples: one id a line.")] = None,
) -> Answer:
    """Copy a cache from an object store.

    Every file is compared with its checksum. With --layers or --samples little else is fetched, and the result is a
    pruned cache. Run again after a crash to go on.
    """
    import vlsi_cache as vc

    chosen = None if layers is None else parse_layers(layers)
    return _transferred(vc.pull(url, out, layers=chosen, samples=samples))


def _transferred(done: "Transfer") -> Answer:
    before = f", {done.parts_before} of them were there" if done.parts_before else ""
    return Answer(
        asdict(done), f"cache: {done.target} ({done.num_parts} parts{before}; {human_bytes(done.moved_bytes)})"
    )


def repair(
    cache: CachePath,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete leftovers without asking.")] = False,
) -> Answer:
    """Move broken parts out of the way for the next build.

    They go to `quarantine/` inside the cache. What killed processes have left in `tmp/` is deleted, after a question.
    Of a cache on an object store every byte is read; stop builds of it first. The next build or push mends it.
    """
    import vlsi_cache as vc
    from vlsi_cache.store.check import sweep

    require_cache(cache)
    done = vc.repair(cache, yes=yes)
    text = str(done)
    if done.left and _confirmed(done.left):
        removed = sweep(cache)
        done, text = replace(done, removed=[*done.removed, *removed], left=[]), f"{text}\nremoved: {', '.join(removed)}"
    return Answer(asdict(done), f"{cache}: {text}")


def _confirmed(left: list[str]) -> bool:
    """Ask before anything is deleted; nobody to ask means no."""
    if not sys.stdin.isatty():
        return False
    return typer.confirm(printable(f"delete what killed processes left: {', '.join(left)}?"), err=True)


def _cuts(planned: "PrunePlan") -> str:
    named = shown_layers(planned.layers, last=planned.layers[-1])
    layers = f"{len(planned.layers)} of {len(planned.layers) + len(planned.dropped_layers)} layers {named}"
    entries = f"top-{max(planned.top_k)} of {max(planned.source_top_k)}"
    samples = f"{planned.num_samples} of {planned.source_samples} samples"
    tokens = f"{planned.num_tokens} of {planned.source_tokens} rows per layer"
    profile = f"profile {planned.profile}"
    sizes = f"about {human_bytes(planned.estimated_bytes)} instead of {human_bytes(planned.source_bytes)}"
    saved = ", ".join(f"{name} {human_bytes(size)}" for name, size in planned.saved_bytes.items() if size)
    return f"{layers}, {entries}, {samples}, {tokens}, {profile}; {sizes} (saved: {saved})"


COMMANDS = (  # name, function, example
    ("prune", prune, "prune caches/demo -o caches/small --layers 2,4,last --top-k 8"),
    ("merge", merge, "merge caches/a caches/b -o caches/both"),
    ("push", push, "push caches/demo s3://bucket/demo"),
    ("pull", pull, "pull s3://bucket/demo caches/demo --layers 8,24,last"),
    ("repair", repair, "repair caches/demo"),
)
