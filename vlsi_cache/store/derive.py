"""What every cache made out of caches needs: where it may go, room for it, and where it came from."""

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlsi_cache.errors import CacheIncompleteError, SpecError, command_line

from . import commit
from .layout import CacheHeader
from .reader import Cache, open

CachePath = Cache | str | os.PathLike[str]
OPTIONS = ("layers", "top_k", "samples", "min_kept_mass", "where", "tokens", "profile")


def open_source(cache: CachePath) -> Cache:
    """The cache to read from; it must be complete."""
    source = cache if isinstance(cache, Cache) else open(cache)
    if not source.is_complete:
        raise CacheIncompleteError(
            f"`{source.path}` is not finished: {len(source.parts)} of {source.header.num_parts} parts are there; "
            "only a complete cache can be changed"
        )
    return source


def check_target(out: Path, sources: Sequence[Cache]) -> None:
    """The new cache must be another folder than those it is made from, and neither a file nor inside of them."""
    if out.exists() and not out.is_dir():
        raise SpecError(f"`{out}` is a file; name a new folder for the cache")
    for source in sources:
        if source.path.resolve() in (out.resolve(), *out.resolve().parents):
            raise SpecError(f"`{out}` is or lies in the source `{source.path}`, which stays as it is; name another one")


def check_room(out: Path, need_bytes: int) -> None:
    """DiskFullError before anything is written when it cannot fit."""
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    commit.check_free_space(folder, need_bytes)


def token_texts(source: Cache) -> Callable[[], list[str]] | None:
    """What writes the token texts of `source` again; None when it has none."""
    if source.header.text_xxh3 is None:
        return None
    return lambda: [source.token_text(token) or "" for token in range(source.header.v_real)]


def lineage(source: Cache, operation: str, **facts: Any) -> dict[str, Any]:
    """What the header of a cache says about one of those it is made from."""
    header = source.header
    return {
        "path": str(source.path.resolve()),
        "digest": header.digest,
        "operation": operation,
        **facts,
        "data": data_sections(header),
        "parents": header.parents,
    }


def data_sections(header: CacheHeader) -> list[dict[str, Any]]:
    """The `data` sections of all specs whose rows the cache holds: one, or several after a merge."""
    sections = [section for parent in header.parents for section in parent.get("data", [])]
    if not sections:
        sections = [header.spec["data"]] if "data" in header.spec else []
    return [section for i, section in enumerate(sections) if section not in sections[:i]]


def merged_responses(headers: Sequence[CacheHeader]) -> list[dict[str, Any]]:
    """Where the responses of all these caches come from, each origin once; `{}` for those of unknown origin."""
    if not any(header.responses for header in headers):
        return []
    found = [origin for header in headers for origin in header.responses or [{}]]
    return [origin for i, origin in enumerate(found) if origin not in found[:i]]


def resume_command(header: CacheHeader, root: Path) -> str:
    """The command that continues an unfinished cache."""
    paths = [str(parent.get("path", "CACHE")) for parent in header.parents]
    if not paths:
        return command_line("build-teacher", "SPEC", "-o", root)
    if header.parents[0].get("operation") == "merge":
        return command_line("merge", *paths, "-o", root)
    cuts = header.parents[0].get("cuts", {})
    words = [f"--{name.replace('_', '-')} {_as_option(name, cuts[name])}" for name in OPTIONS if name in cuts]
    return " ".join([command_line("prune", *paths, "-o", root), *words])


def _as_option(name: str, value: Any) -> str:
    if name == "samples":
        return shlex.quote(str(value.get("file") or "FILE"))
    return shlex.quote(",".join(map(str, value)) if isinstance(value, list) else str(value))
