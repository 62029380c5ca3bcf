"""Where a cache came from: the caches it was made of, their data, the command that continues it, and whether its
teacher knows the responses.

A teacher on its own answers, drawn at temperature 1, finds them as likely as its entropy says: mean loss and mean
entropy are equal. What the loss has above the entropy is surprise beyond the teacher's own uncertainty: `build-teacher`
warns of it, and `inspect` shows it.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from vlsi_cache.config.sections import DataSpec
from vlsi_cache.config.spec import stored_data
from vlsi_cache.errors import SpecError, command_line

from .format import CacheHeader

if TYPE_CHECKING:
    from .reader import Cache

OPTIONS = ("layers", "top_k", "samples", "min_kept_mass", "where", "tokens", "profile")  # of the command prune

# The demo's teacher, trained on its rows, is below its entropy by 0.002 nats; SmolLM2, which never saw docstrings
# answered this way, is 1.5 nats above it. Held-out rows of a tuned teacher lie near 0.
SURPRISE_NATS = 0.5


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
        return [DataSpec.model_validate(stored_data(section)) for section in data_sections(header)]
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


@dataclass(frozen=True)
class Surprise:
    """Means over the response tokens with rows, last layer, in nats."""

    gold_nll: float
    entropy: float

    @property
    def nats(self) -> float:
        return self.gold_nll - self.entropy


def surprise_of(cache: "Cache") -> Surprise | None:
    """From the table of samples alone; None where it holds no finite means."""
    table = cache.sample_table()
    weights_S = table["num_tokens"].to_numpy().astype(np.float64)
    gold_S, entropy_S = (table[name].to_numpy().astype(np.float64) for name in ("gold_logprob_last", "entropy_last"))
    known_S = np.isfinite(gold_S) & np.isfinite(entropy_S) & (weights_S > 0)
    if not known_S.any():
        return None
    share_S = weights_S[known_S] / weights_S[known_S].sum()
    return Surprise(gold_nll=-float(share_S @ gold_S[known_S]), entropy=float(share_S @ entropy_S[known_S]))


def is_own(header: CacheHeader, origin: Mapping[str, Any]) -> bool | None:
    """Whether the cache's teacher itself has generated these responses; None when that is not known.

    The digest of a hub id names a commit and that of a folder the content of its files: the two say nothing about
    each other.
    """
    theirs, teachers = origin.get("weights"), header.fingerprint.get("teacher.weights")
    if theirs is None or teachers is None:
        return None
    kinds = {str(digest).partition(":")[0] for digest in (theirs, teachers)}
    return theirs == teachers if len(kinds) == 1 else None


def surprise_warning(cache: "Cache") -> str:
    """What goes wrong with students of this cache, and what to do; empty when its teacher suits the responses."""
    own, found = [is_own(cache.header, origin) for origin in cache.header.responses], surprise_of(cache)
    if found is None or not found.nats > SURPRISE_NATS or (own and all(own)):
        return ""
    whose = "were generated by another model" if False in own else "are not known to be its own"
    perplexity = f"{math.exp(found.gold_nll):.3g}" if found.gold_nll < 50 else "beyond measure"
    return (
        f"the teacher is poor on these responses, which {whose}: its last layer says them at {found.gold_nll:.2f} nats "
        f"per token (perplexity {perplexity}), where its own uncertainty is {found.entropy:.2f} nats: "
        f"{found.nats:.2f} nats of surprise, more than {SURPRISE_NATS}. Students learn to imitate a teacher that was "
        "not tuned on such answers, and can end up worse than by plain finetuning (`--recipe sft`). Either let the "
        "teacher answer itself (vlsi-cache generate SPEC -o rows.parquet, then build over these rows), or tune the "
        "teacher on the data first"
    )
