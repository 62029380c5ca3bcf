"""What `ls` has to say. A cache costs the same to list whatever its size: one listing of `parts/`, nothing in it."""

import datetime
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlsi_cache.errors import CacheNotFoundError, VlsiCacheError
from vlsi_cache.progress import human_bytes

NUM_LOOKS, LOOK_AGAIN_S = 3, 0.05
MARKERS = {"cache.json": "cache", "run.json": "run", "demo.json": "demo", "ablation.json": "ablation"}


def find_artifacts(folder: Path) -> list[dict[str, Any]]:
    """Caches, runs, ablations and demos in and below a folder, in the order of their paths."""
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
            return {"path": str(path), "kind": MARKERS[marker], "date": _date(path / marker), **describe(path)}
        except VlsiCacheError as error:
            problem = str(error)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{marker} cannot be read ({type(error).__name__}: {error})"
        if not os.path.lexists(path / marker):
            return None
    unknown = {"date": "", "state": "unreadable", "problem": problem, "size_bytes": None}
    return {"path": str(path), "kind": MARKERS[marker], **unknown}


def _date(file: Path) -> str:
    """When the file that makes a folder a cache or a run was written: for a cache, when its build began."""
    return datetime.datetime.fromtimestamp(file.stat().st_mtime).isoformat(" ", "minutes")


def _cache(path: Path) -> dict[str, Any]:
    from vlsi_cache.store.files import load_header
    from vlsi_cache.store.format import list_parts

    header, done = load_header(path), len(list_parts(path))
    return {
        "state": "complete" if done == header.num_parts else f"{done}/{header.num_parts} parts",
        "size_bytes": _cache_size(path, done),
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
    from vlsi_cache.run_files import read_object

    name = f"{len(read_object(path / 'demo.json', 'run the demo again')['seeds'])} seed(s)"
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
        total += sum(_size(os.path.join(current, name)) for name in files)
    return total


def _size(file: str) -> int:
    """0 for one that is gone: beside a live run checkpoints go and files are replaced all the time."""
    try:
        return os.lstat(file).st_size
    except OSError:
        return 0


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
