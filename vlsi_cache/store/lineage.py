"""Where a cache came from, by its header: the caches it was made of, their data, and the command that continues it."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlsi_cache.config.sections import DataSpec
from vlsi_cache.errors import SpecError, command_line

from .format import CacheHeader

OPTIONS = ("layers", "top_k", "samples", "min_kept_mass", "where", "tokens", "profile")  # of the command prune


def lineage(root: Path, header: CacheHeader, operation: str, **facts: Any) -> dict[str, Any]:
    """What the header of a cache says about one of those it is made from, that at `root`."""
    return {
        "path": str(root.resolve()),
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


def data_specs(header: CacheHeader, where: Path) -> list[DataSpec]:
    """The same as specs; SpecError for a section that is none."""
    try:
        return [DataSpec.model_validate(section) for section in data_sections(header)]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise SpecError(f"the `data` section in {where} is none: `{key}`: {first['msg']}") from error


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
