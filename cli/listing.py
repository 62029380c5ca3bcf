"""What `ls`, `inspect` and `verify` have to say."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlsi_cache.errors import CacheNotFoundError, VlsiCacheError

MARKERS = {"cache.json": "cache", "run.json": "run", "demo.json": "demo"}
FIRST = 5  # samples and reasons that are shown


def find_artifacts(folder: Path) -> list[dict[str, Any]]:
    """Caches, runs and demos in and below a folder, in the order of their paths."""
    if not folder.is_dir():
        raise CacheNotFoundError(f"no folder `{folder}`")
    return [_describe(path, marker) for path, marker in _walk(folder)]


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Folders with a marker; what is inside a cache or a run is not looked at, what is inside a demo is."""
    for current, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        marker = next((name for name in MARKERS if name in files), None)
        if marker:
            yield Path(current), marker
        if marker in ("cache.json", "run.json"):
            folders.clear()


def _describe(path: Path, marker: str) -> dict[str, Any]:
    describe = {"cache.json": _cache, "run.json": _run, "demo.json": _demo}[marker]
    try:
        facts = describe(path)
    except (VlsiCacheError, OSError, ValueError, KeyError, TypeError) as error:
        facts = {"state": "unreadable", "problem": str(error)}
    return {"path": str(path), "kind": MARKERS[marker], "size_bytes": _size(path), **facts}


def _cache(path: Path) -> dict[str, Any]:
    from vlsi_cache.store.files import load_header
    from vlsi_cache.store.layout import list_parts

    header, done = load_header(path), len(list_parts(path))
    state = "complete" if done == header.num_parts else f"{done}/{header.num_parts} parts"
    return {
        "state": state,
        "num_samples": header.num_samples,
        "layers": header.layers,
        "top_k": header.top_k,
        "name": header.spec.get("name", ""),
    }


def _run(path: Path) -> dict[str, Any]:
    from vlsi_cache.report.stats import read_run

    run = read_run(path)
    match = (run.evaluation or {}).get("exact_match") or {}
    what = " ".join(filter(None, [run.record["kind"], run.record.get("recipe")]))
    return {"state": run.record["status"], "name": what, "exact_match": match.get("all")}


def _demo(path: Path) -> dict[str, Any]:
    from vlsi_cache.report.stats import read_json

    return {"state": "done", "name": f"{len(read_json(path / 'demo.json')['seeds'])} seed(s)"}


def _size(path: Path) -> int:
    files = (Path(current) / name for current, _, names in os.walk(path) for name in names)
    return sum(file.lstat().st_size for file in files)


def listing_table(found: list[dict[str, Any]]) -> str:
    """One line per cache, run and demo."""
    from vlsi_cache.report.text import human_bytes, percent, table

    rows = [
        [
            one["path"],
            one["kind"],
            one.get("name", ""),
            human_bytes(one["size_bytes"]),
            one["state"],
            str(one.get("num_samples", "")),
            str(len(one["layers"])) if "layers" in one else "",
            str(one.get("top_k", "")),
            percent(one["exact_match"]) if one.get("exact_match") is not None else "",
        ]
        for one in found
    ]
    return table(["path", "kind", "what", "size", "state", "samples", "layers", "k", "exact match"], rows)


def describe_cache(path: Path) -> dict[str, Any]:
    """JSON-ready facts about a cache, finished or not."""
    import vlsi_cache as vc

    cache = vc.open(path, allow_incomplete=True)
    header = cache.header
    return {
        "path": str(path),
        "created_by": header.created_by,
        "format_version": header.format_version,
        "complete": cache.is_complete,
        "parts_done": len(cache.parts),
        "num_parts": header.num_parts,
        "num_samples": cache.num_samples,
        "num_tokens": cache.num_tokens,
        "layers": header.layers,
        "top_k": header.top_k,
        "tail_samples": header.tail_samples,
        "taus": header.taus,
        "v_real": header.v_real,
        "size_bytes": cache.bytes_by_array(),
        "bytes_per_layer_token": cache.bytes_per_layer_token(),
        "first_ids": [sample_id for sample_id, _ in zip(cache, range(FIRST), strict=False)],
        "skipped": header.skipped,
        "parents": header.parents,
        "fingerprint": header.fingerprint,
        "spec": header.spec,
    }


def description_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    from vlsi_cache.report.text import human_bytes, table

    sizes, per = facts["size_bytes"], facts["bytes_per_layer_token"]
    rows = [[name, f"{per[name]:.2f}", human_bytes(size)] for name, size in sizes.items()]
    rows.append(["total", f"{sum(sizes.values()) / max(1, facts['num_tokens'] * len(facts['layers'])):.2f}"])
    rows[-1].append(human_bytes(sum(sizes.values())))
    return "\n".join([*_head_lines(facts), "", table(["array", "bytes per (layer, token)", "size"], rows)])


def _head_lines(facts: dict[str, Any]) -> list[str]:
    spec, skipped = facts["spec"], facts["skipped"]
    state = "complete" if facts["complete"] else "not finished"
    first = ", ".join(facts["first_ids"])
    lines = [
        f"cache       {facts['path']} ({state}: {facts['parts_done']} of {facts['num_parts']} parts)",
        f"spec        {spec.get('name', '')}: {spec.get('description', '')}",
        f"teacher     {(spec.get('teacher') or {}).get('model', '')}",
        f"made by     {facts['created_by']}, format {facts['format_version']}",
        f"samples     {facts['num_samples']}, {facts['num_tokens']} response tokens; first: {first}",
        f"layers      {', '.join(map(str, facts['layers'][:-1]))} and last ({facts['layers'][-1]})",
        f"rows        top-{facts['top_k']} of {facts['v_real']} words, {facts['tail_samples']} tail samples",
        f"left out    {len(skipped)} rows",
    ]
    lines += [f"              {one['id']}: {one['reason']}" for one in skipped[:FIRST]]
    lines += [f"parent      {parent.get('path', parent)}" for parent in facts["parents"]]
    return lines
