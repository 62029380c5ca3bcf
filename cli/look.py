"""Commands that only read: ls, inspect, sample, stats, trace, match, verify, diff, report, specs."""

import contextlib
import datetime
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlsi_cache.config.layers import parse_layers
from vlsi_cache.errors import CacheNotFoundError, SpecError, VlsiCacheError
from vlsi_cache.processes import refuse_launch
from vlsi_cache.progress import human_bytes

from .output import OK, PROBLEMS, Answer, CachePath, require_cache

if TYPE_CHECKING:
    from vlsi_cache.store.format import CacheHeader

NUM_LOOKS, LOOK_AGAIN_S = 3, 0.05
MARKERS = {"cache.json": "cache", "run.json": "run", "demo.json": "demo", "ablation.json": "ablation"}
PageFile = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE.html", help="Also write a page.")]


def ls(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Where to look, with all folders below; or the URL of a cache.")
    ] = ".",
) -> Answer:
    """List caches and runs below a folder."""
    from vlsi_cache.store.location import UrlPath, place_of

    place = place_of(folder, "folder")
    found = [_remote_cache(place)] if isinstance(place, UrlPath) else find_artifacts(place)
    return Answer(found, lambda: listing_table(found) if found else f"no caches and no runs below {place.resolve()}")


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
    from vlsi_cache.report.example import grid_text

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
    out: PageFile = None,
    gguf_file: Annotated[str | None, typer.Option(metavar="FILE", help="The .gguf file of MODEL to read.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: CUDA when there is one.")] = None,
) -> Answer:
    """Show what every layer would answer by itself.

    Greedy text of each layer: its verbalizer chooses every token, and its own tokens are fed back. What the layers say
    of a given response, word by word, needs no model: vlsi-cache sample. Of a student whose layers run again
    (distill.traversal) also their mixing ratios in the prompt, which -o draws token by token.
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
    out: PageFile = None,
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
    parallel: Annotated[
        Literal["none", "device_map", "tensor"] | None,
        typer.Option(help="With --recompute: how the teacher lies on several GPUs; default: what its spec says."),
    ] = None,
) -> Answer:
    """Check that every file is what was written.

    Exit code 1 when something is wrong; every problem comes with what to do about it. One process; with --recompute and
    a teacher that is cut (--parallel tensor), those of one torchrun.
    """
    import vlsi_cache as vc

    flags = {"--device": device, "--trust-remote-code": trust_remote_code or None, "--parallel": parallel}
    if recompute is None and (given := [flag for flag, value in flags.items() if value is not None]):
        raise SpecError(f"{given[0]} does nothing without --recompute N: files are checked without the teacher")
    if recompute is None:
        refuse_launch("verify")
    require_cache(cache)
    if recompute is not None and (parallel or _parallel_of(cache)) != "tensor":
        refuse_launch("verify")
    found = vc.verify(cache, deep=deep)
    answer = Answer({"ok": found.ok, **asdict(found)}, str(found), exit_code=OK if found.ok else PROBLEMS)
    if recompute is None:
        return answer
    if not found.ok:
        return replace(answer, text=f"{answer.text}\nnothing was recomputed: mend these files first")
    from vlsi_cache.store.reader import open
    from vlsi_cache.teacher.recompute import recompute as run_teacher

    how: Any = {"device": device, "trust_remote_code": trust_remote_code, "parallel": parallel}
    again = run_teacher(open(cache), num_samples=recompute, **how)
    data = {**answer.data, "ok": again.ok, "recompute": again.as_dict()}
    return Answer(data, f"{answer.text}\n{again}", exit_code=OK if again.ok else PROBLEMS)


def _parallel_of(cache: str) -> str | None:
    """How the teacher of a cache has lain on its GPUs, as far as its header can be read."""
    from vlsi_cache.store.header import header_at
    from vlsi_cache.store.location import place_of

    try:
        header = header_at(place_of(cache))
    except VlsiCacheError:  # which is for the check to tell
        return None
    return None if header is None else (header.spec.get("teacher") or {}).get("parallel")


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder or URL of a cache.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder or URL of the cache to compare it with.")],
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
        str,
        typer.Argument(metavar="CACHE-or-RUN", help="Folder of a cache, a run, an ablation or a demo; a cache's URL."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE.html",
            help="Where the page goes. Default: report.html in the folder; of a URL, report-NAME.html here.",
        ),
    ] = None,
) -> Answer:
    """Write report.html: figures on one self-contained page."""
    from vlsi_cache.report.pages import write_report

    file = write_report(path, out)
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


def find_artifacts(folder: Path) -> list[dict[str, Any]]:
    """Caches, runs, ablations and demos in and below a folder, in the order of their paths.

    A cache costs the same to list whatever its size: one listing of `parts/`, nothing in it.
    """
    if not folder.is_dir():
        raise CacheNotFoundError(f"no folder `{folder}`")
    found = (_describe(path, marker) for path, marker in _walk(folder))
    return [one for one in found if one is not None]


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Folders with a marker; what is inside a cache or a run is not looked at."""
    for current, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        marker = next((name for name in MARKERS if name in files or name in folders), None)
        if marker:
            yield Path(current), marker
        if marker in ("cache.json", "run.json"):
            folders.clear()


def _describe(path: Path, marker: str) -> dict[str, Any] | None:
    """One line's facts; None for what has been deleted meanwhile."""
    describe = {"cache.json": _cache, "run.json": _run, "demo.json": _demo, "ablation.json": _ablation}[marker]
    problem = ""
    for attempt in range(NUM_LOOKS):
        if attempt:  # whoever works there may have been in the middle of something
            time.sleep(LOOK_AGAIN_S)
        try:
            # When the file that makes it a cache or a run was written: for a cache, when its build began.
            written = datetime.datetime.fromtimestamp((path / marker).stat().st_mtime).isoformat(" ", "minutes")
            return {"path": str(path), "kind": MARKERS[marker], "date": written, **describe(path)}
        except VlsiCacheError as error:
            problem = str(error)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{marker} cannot be read ({type(error).__name__}: {error})"
        if not os.path.lexists(path / marker):
            return None
    unknown = {"date": "", "state": "unreadable", "problem": problem, "size_bytes": None}
    return {"path": str(path), "kind": MARKERS[marker], **unknown}


def _cache(path: Path) -> dict[str, Any]:
    from vlsi_cache.store.files import load_header
    from vlsi_cache.store.format import list_parts

    header, done = load_header(path), len(list_parts(path))
    return _cache_facts(header, done, _cache_size(path, done))


def _remote_cache(url: Path) -> dict[str, Any]:
    """One line's facts about a cache on an object store; when it was written is not asked for."""
    from vlsi_cache.store.reader import open

    cache = open(url, allow_incomplete=True)
    facts = _cache_facts(cache.header, len(cache.parts), sum(cache.bytes_by_array().values()))
    return {"path": str(url), "kind": "cache", "date": "", **facts}


def _cache_facts(header: "CacheHeader", done: int, size_bytes: int | None) -> dict[str, Any]:
    return {
        "state": "complete" if done == header.num_parts else f"{done}/{header.num_parts} parts",
        "size_bytes": size_bytes,
        "num_samples": header.num_samples,
        "num_response_tokens": header.num_response_tokens,
        "layers": header.layers,
        "row_kind": header.row_kind,
        "top_k": header.top_k,
        "profile": header.profile,
        "name": header.spec.get("name", ""),
    }


def _cache_size(path: Path, num_parts: int) -> int | None:
    """Bytes of a finished cache, from the file sizes that samples.parquet lists; None where it does not know."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from vlsi_cache.store.files import refuse_special
    from vlsi_cache.store.format import TABLE_NAME
    from vlsi_cache.store.table import FILES_KEY

    try:
        refuse_special(path / TABLE_NAME)
        metadata = pq.read_schema(path / TABLE_NAME, memory_map=False).metadata or {}
        sizes = json.loads(metadata[FILES_KEY])["sizes"]
        listed = sum(size for files in sizes.values() for size in files if size is not None)
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError):
        return None
    return listed + _folder_size(path, without=("parts", "tmp")) if len(sizes) == num_parts else None


def _run(path: Path) -> dict[str, Any]:
    from vlsi_cache.run_files import read_evaluation, read_run

    record, evaluation = read_run(path), read_evaluation(path)
    match = (evaluation or {}).get("exact_match") or {}
    what = " ".join(filter(None, [record["kind"], record.get("recipe")]))
    state, size = record["status"], _folder_size(path)
    problem = {"problem": record["message"]} if "message" in record else {}
    return {"state": state, "size_bytes": size, "name": what, "exact_match": match.get("all"), **problem}


def _demo(path: Path) -> dict[str, Any]:
    from vlsi_cache.run_files import read_demo

    name = f"{len(read_demo(path / 'demo.json', 'run the demo again')['seeds'])} seed(s)"
    return {"state": "done", "size_bytes": _folder_size(path), "name": name}


def _ablation(path: Path) -> dict[str, Any]:
    from vlsi_cache.run_files import read_ablation

    record = read_ablation(path / "ablation.json")
    tables, size = record.get("tables", {}), _folder_size(path)
    runs = {row["run"] for rows in tables.values() for row in rows if row["run"] is not None}
    entries = [record["runs"].get(run, {}).get(str(seed)) for run in runs for seed in record["seeds"]]
    num_done = sum(entry is not None and entry["status"] == "done" for entry in entries)
    state = "done" if tables and num_done == len(entries) else f"{num_done}/{len(entries)} runs"
    return {"state": state, "size_bytes": size, "name": ", ".join(tables)}


def _folder_size(path: Path, *, without: tuple[str, ...] = ()) -> int:
    """Bytes of all files below a folder; a cache inside it counts with what is known of its size."""
    total = 0
    for current, folders, files in os.walk(path):
        if "cache.json" in files and current != str(path):
            folders.clear()
            total += (_describe(Path(current), "cache.json") or {}).get("size_bytes") or 0
            continue
        if current == str(path):
            folders[:] = [name for name in folders if name not in without]
        for name in files:
            with contextlib.suppress(OSError):  # beside a live run checkpoints go and files are replaced all the time
                total += os.lstat(os.path.join(current, name)).st_size
    return total


def listing_table(found: list[dict[str, Any]]) -> str:
    """One line per cache, run, ablation and demo; below them what is wrong with some."""
    from vlsi_cache.report.text import percent, table

    rows = [
        [
            one["path"],
            one["kind"],
            one.get("name", ""),
            one["state"],
            "" if one["size_bytes"] is None else human_bytes(one["size_bytes"]),
            str(one.get("num_samples", "")),
            str(len(one["layers"])) if "layers" in one else "",
            _widths(one["top_k"]) if "top_k" in one else "",
            one.get("profile", ""),
            one["date"],
            percent(one["exact_match"]) if one.get("exact_match") is not None else "",
        ]
        for one in found
    ]
    heads = ["path", "kind", "what", "state", "size", "samples", "layers", "k", "profile", "date", "exact match"]
    problems = [f"{one['path']}: {one['problem']}" for one in found if "problem" in one]
    return "\n".join([table(heads, rows), *([""] if problems else []), *problems])


def _widths(top_k: list[int]) -> str:
    return str(top_k[0]) if len(set(top_k)) == 1 else f"{min(top_k)}-{max(top_k)}"


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
