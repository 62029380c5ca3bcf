"""Commands that only read: ls, inspect, sample, stats, trace, match, verify, diff, report, specs."""

import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlsi_cache.config.layers import parse_layers
from vlsi_cache.errors import SpecError
from vlsi_cache.progress import printable

from .output import OK, PROBLEMS, Answer, require_cache

CachePath = Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of a cache.")]


def ls(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to look, with all folders below.")] = Path(),
) -> Answer:
    """List caches and runs below a folder."""
    from .listing import find_artifacts, listing_table

    found = find_artifacts(folder)
    return Answer(found, lambda: listing_table(found) if found else f"no caches and no runs below {folder.resolve()}")


def inspect(cache: CachePath) -> Answer:
    """Show what a cache is: origin, progress, layers, bytes."""
    import vlsi_cache as vc

    found = vc.inspect(cache)
    return Answer(found.as_dict(), lambda: str(found))


def sample(
    cache: CachePath,
    sample_id: Annotated[str, typer.Argument(metavar="ID", help="Sample id; `inspect` shows some.")],
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Words per layer and token.")] = 1,
    layers: Annotated[str | None, typer.Option(metavar="LIST", help="Layers to show, e.g. 2-6,18,last.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="A:B", help="Response tokens A to B - 1, from 0.")] = None,
) -> Answer:
    """Show what every layer says, token by token.

    The words come from the cache, each after the response so far: no model and no tokenizer is needed. A cache that is
    still being built will do. What a layer says when it is left to itself: vlsi-cache trace.
    """
    import vlsi_cache as vc

    chosen = None if layers is None else parse_layers(layers)
    grid = vc.sample(cache, sample_id, top=top, layers=chosen, tokens=tokens).as_dict()
    return Answer(grid, lambda: grid_text(grid), is_styled=True)


def stats(
    cache: CachePath,
    parts: Annotated[int, typer.Option(min=0, metavar="N", help="Evenly spaced parts to read; 0: all.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE.html", help="Also write figures.")] = None,
) -> Answer:
    """Show what the layers say: entropy, loss, ranks, KL.

    Means over response tokens, per layer, and how far the layers are from each other.
    """

    import vlsi_cache as vc
    from vlsi_cache.report.layers import stats_text
    from vlsi_cache.report.pages import write_stats_page
    from vlsi_cache.report.text import check_page

    check_page(out)
    found = vc.stats(cache, parts=parts)
    if out is None:
        return Answer(found.as_dict(), lambda: stats_text(found))
    file = write_stats_page(found, out)
    return Answer({**found.as_dict(), "page": file}, lambda: f"{stats_text(found)}\n\npage: {file}")


def trace(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, package:NAME, or a distill run.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the user says.")],
    verbalizers: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Verbalizers of MODEL; none: the logit lens. Default: those of the run."),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A picture before the text; repeatable.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="LIST", help="Layers to trace, e.g. 2-6,18,last; default: all.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that a layer may say.")] = 32,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE.html", help="Also write a page.")] = None,
    gguf_file: Annotated[str | None, typer.Option(metavar="FILE", help="The .gguf file of MODEL to read.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: CUDA when there is one.")] = None,
) -> Answer:
    """Show what every layer would answer by itself.

    Greedy text of each layer: its verbalizer chooses every token, and its own tokens are fed back. What the layers say
    of a given response, word by word, needs no model: vlsi-cache sample.
    """
    import vlsi_cache as vc
    from vlsi_cache.report.pages import write_trace_page
    from vlsi_cache.report.text import check_page

    check_page(out)
    found = vc.trace(
        model,
        prompt=prompt,
        verbalizers=verbalizers,
        images=image or [],
        layers=None if layers is None else parse_layers(layers),
        max_new_tokens=max_new_tokens,
        gguf_file=gguf_file,
        device=device,
    )
    if out is None:
        return Answer(found.as_dict(), lambda: str(found))
    file = write_trace_page(found, out)
    return Answer({**found.as_dict(), "page": file}, lambda: f"{found}\n\npage: {file}")


def match(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a distill run of recipe vlsi.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE.html", help="Also write a page.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the heat maps as a PNG.")] = None,
    share: Annotated[
        float, typer.Option(metavar="X", help="Share of the steps that are its start, and its end.")
    ] = 0.1,
) -> Answer:
    """Show which teacher layers the student was matched with.

    At the start and at the end of the interaction, beside what uniform sampling gives: keeping the order of the layers
    pushes matches deep by itself. A run that is still going shows what is there.
    """
    import vlsi_cache as vc
    from vlsi_cache.report.pages import write_match_page, write_match_png
    from vlsi_cache.report.text import check_page, check_picture

    check_page(out)
    check_picture(png)
    found = vc.match(run, share=share)
    files = {"page": out and write_match_page(found, out), "png": png and write_match_png(found, png)}
    written = {name: file for name, file in files.items() if file}
    lines = "".join(f"\n{name}: {file}" for name, file in written.items())
    return Answer({**found.as_dict(), **written}, lambda: f"{found}" + (f"\n{lines}" if lines else ""))


def verify(
    cache: CachePath,
    deep: Annotated[bool, typer.Option(help="Also read every byte and compare its checksum.")] = False,
    recompute: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Also run the teacher on N random samples and compare.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="With --recompute: where the teacher runs; default: what its spec says.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="With --recompute: run code that comes with the teacher.")
    ] = False,
) -> Answer:
    """Check that every file is what was written.

    Exit code 1 when something is wrong; every problem comes with what to do about it.
    """
    import vlsi_cache as vc

    if recompute is None and (device is not None or trust_remote_code):
        flag = "--trust-remote-code" if device is None else f"--device {device}"
        raise SpecError(f"{flag} does nothing without --recompute N: files are checked without the teacher")
    require_cache(cache)
    found = vc.verify(cache, deep=deep)
    answer = Answer({"ok": found.ok, **asdict(found)}, str(found), exit_code=OK if found.ok else PROBLEMS)
    if recompute is None:
        return answer
    if not found.ok:
        return replace(answer, text=f"{answer.text}\nnothing was recomputed: mend these files first")
    from vlsi_cache.store.reader import open
    from vlsi_cache.teacher.recompute import recompute as run_teacher

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
    from vlsi_cache.report.pages import write_report

    file = write_report(path)
    return Answer({"report": file}, f"report: {file}")


def specs() -> Answer:
    """List the specs that come with the package."""
    from vlsi_cache.config.spec import load_spec, shipped_specs
    from vlsi_cache.report.text import table

    found = [
        {"name": name, "description": load_spec(name).description, "file": file}
        for name, file in shipped_specs().items()
    ]
    rows = [[str(one["name"]), str(one["description"])] for one in found]
    return Answer(found, lambda: table(["spec", "what it is"], rows))


COMMANDS = (  # name, function, example
    ("ls", ls, "ls caches"),
    ("inspect", inspect, "inspect caches/demo"),
    ("sample", sample, "sample caches/demo 5f0c2a --top 3"),
    ("stats", stats, "stats caches/demo -o stats.html"),
    ("trace", trace, "trace runs/a --prompt 'Which bar is the tallest?' --image chart.png"),
    ("match", match, "match runs/a -o match.html"),
    ("verify", verify, "verify caches/demo --deep"),
    ("diff", diff, "diff caches/demo caches/small"),
    ("report", report, "report runs/a"),
    ("specs", specs, "specs"),
)


if TYPE_CHECKING:
    from rich.table import Table


CELL_WIDTH = 17  # characters of a layer's column, its padding included


TOKEN_WIDTH = 22


WORD_WIDTH = 9


def grid_text(grid: dict[str, Any]) -> str:
    """As many layers side by side as the terminal is wide; the rest below."""
    from rich.console import Console

    width = shutil.get_terminal_size((120, 24)).columns
    per_block = max(1, (width - TOKEN_WIDTH) // CELL_WIDTH)
    # the text goes to stdout, while whatever is printed now goes to stderr
    terminal = sys.__stdout__ is not None and sys.__stdout__.isatty()
    console = Console(width=width, highlight=False, force_terminal=terminal)
    with console.capture() as captured:
        for line in _head(grid):
            console.print(line, markup=False)
        for start in range(0, len(grid["layers"]), per_block):
            console.print(_block(grid, start, min(start + per_block, len(grid["layers"]))))
    return captured.get().rstrip()


def _head(grid: dict[str, Any]) -> list[str]:
    kind = f" ({grid['kind']})" if grid["kind"] else ""
    counts = f"{len(grid['tokens'])} of {grid['num_response_tokens']} response tokens"
    lines = [printable(f"sample {grid['id']}{kind}, {counts}", keep="")]
    if grid["row_kind"] == "sampled":
        lines += ["word and its share of the draws in %; * is the word of the response"]
        lines += ["below: entropy in nats, rank of the response's word among the draws"]
    else:
        lines += ["word and probability in %; * is the word of the response"]
        lines += ["below: entropy in nats, mass outside the kept words in %, rank of the response's word"]
    if not grid["has_texts"]:
        lines += ["the cache carries no token texts: words are token ids"]
    return lines


def _block(grid: dict[str, Any], start: int, stop: int) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from vlsi_cache.report.text import visible

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("response", no_wrap=True)
    for layer in grid["layers"][start:stop]:
        table.add_column("last" if layer == grid["final_layer"] else str(layer), no_wrap=True)
    for t, token in enumerate(grid["tokens"]):
        cells = [_cell(grid, index, t) for index in range(start, stop)]
        table.add_row(str(grid["positions"][t]), Text(visible(token)), *cells)
    return table


def _cell(grid: dict[str, Any], index: int, t: int) -> Any:
    """The top words, and under them in grey the numbers of the distribution."""
    from rich.text import Text

    from vlsi_cache.report.text import visible

    cell, gold = grid["grid"][index][t], grid["token_ids"][t]
    text = Text()
    for token, word, prob in zip(cell["ids"], cell["words"], cell["probs"], strict=True):
        line = f"{visible(word)[:WORD_WIDTH]}{'*' if token == gold else ''} {100 * prob:.0f}\n"
        text.append(line, style="bold green" if token == gold else "")
    tail = "" if grid["row_kind"] == "sampled" else f"{_percent(cell['tail_mass'])} "
    rank = "#-" if cell["gold_rank"] is None else f"#{cell['gold_rank'] + 1}"
    return text.append(f"{cell['entropy']:.2f} {tail}{rank}", style="dim")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.0995 else f"{100 * share:.0f}%"
