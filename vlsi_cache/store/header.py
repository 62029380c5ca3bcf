"""`cache.json`: written once and compared with what a later build wants, and where it says that a cache came from."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlsi_cache.config.sections import DataSpec
from vlsi_cache.config.spec import stored_data
from vlsi_cache.errors import CacheCorruptError, FingerprintMismatchError, SpecError, command_line, list_problems
from vlsi_cache.io import check_folder

from .files import disk_full_is_an_error, load_header, publish_new_file, repair_hint, tmp_path, write_durable
from .format import HEADER_NAME, IDENTITY_FIELDS, VOCAB_NAME, CacheHeader, sealed_json
from .location import UrlPath
from .vocab_order import OrderOrMaker, TokenTexts, VocabOrder, complete_copies, publish_vocab, text_digest, vocab_files

MAX_SHOWN = 120  # characters of a differing fingerprint value in a message
# Fields of fingerprint and header that only say which rows there are and how they are laid out.
OF_THE_DATA = ("data.content", "data.num_samples", "num_parts", "num_samples", "num_response_tokens", "id_of_rank_xxh3")
OPTIONS = ("layers", "top_k", "samples", "min_kept_mass", "where", "tokens", "profile")  # of the command prune


def publish_header(
    root: Path, header: CacheHeader, vocab_order: OrderOrMaker, token_texts: TokenTexts
) -> tuple[CacheHeader, VocabOrder]:
    """Create the cache at `root` or join the one that is there; its header and its order of the vocabulary.

    Raises FingerprintMismatchError with every field that differs, SpecError when the folder is something else.
    """
    if (root / HEADER_NAME).exists():
        _compare(root, load_header(root), _as_stored(header))
        complete_copies(root, load_header(root))
    else:
        root.mkdir(parents=True, exist_ok=True)
        _refuse_foreign_directory(root)
    table = publish_vocab(root, header, vocab_order, token_texts)
    if not (root / HEADER_NAME).exists():
        _create_header(root, header, table)
    stored = load_header(root)
    _compare(root, stored, _as_stored(header))
    if stored.id_of_rank_xxh3 != table.digest:
        what = ": the table does not match cache.json"
        raise CacheCorruptError.at(root / VOCAB_NAME, what, hint=repair_hint(root))
    complete_copies(root, stored)
    return stored, table


def _create_header(root: Path, header: CacheHeader, table: VocabOrder) -> None:
    complete = {
        "id_of_rank_xxh3": table.digest,
        "num_head_ranks": table.heads_LH.shape[1],
        "text_xxh3": text_digest(root, header.vocab_size),
        "vocab_files": vocab_files(root),
    }
    with tmp_path(root, HEADER_NAME) as tmp, disk_full_is_an_error(root, 0):
        write_durable(tmp, sealed_json(_as_stored(header.model_copy(update=complete)).model_dump()))
        publish_new_file(tmp, root / HEADER_NAME)


def _as_stored(header: CacheHeader) -> CacheHeader:
    """The header after a trip through JSON, so that what is compared later is what a reader will see."""
    try:
        return CacheHeader.model_validate(json.loads(json.dumps(header.model_dump(), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise SpecError(f"the header of the cache cannot be written as JSON: {error}") from error


def check_root(root: Path) -> None:
    """Raise SpecError unless `root` is a cache, or a folder or a URL that can become one."""
    if isinstance(root, UrlPath):
        from .remote.upload import check_url

        check_url(root)
        return
    check_folder(root)
    if root.is_dir() and not (root / HEADER_NAME).exists():
        _refuse_foreign_directory(root)


def header_at(root: Path) -> CacheHeader | None:
    """The header of the cache in a folder or at a URL; None where none was begun."""
    if isinstance(root, UrlPath):
        from .remote.upload import stored_header

        return stored_header(root)
    return load_header(root) if (root / HEADER_NAME).exists() else None


def _refuse_foreign_directory(root: Path) -> None:
    """An existing folder may only hold what an interrupted start of a cache leaves: `vocab/`, and files in `tmp/`."""
    found = foreign_names(root)
    if found:
        raise SpecError(
            f"`{root}` is not empty and not a cache: it holds {sorted(found)[:4]}; name a new folder for the cache"
        )


def is_interrupted_start(root: Path) -> bool:
    """Whether a build was interrupted here before there was a `cache.json`: nothing is lost, it begins again."""
    if not root.is_dir() or (root / HEADER_NAME).exists() or foreign_names(root):
        return False
    return bool(os.listdir(root))


def foreign_names(root: Path) -> set[str]:
    """What a folder without `cache.json` holds beside what an interrupted start leaves."""
    found = set(os.listdir(root)) - {"tmp"}
    if (root / VOCAB_NAME / "id_of_rank").is_dir():
        found.discard(VOCAB_NAME)
    if (root / "tmp").is_dir():
        ours = (HEADER_NAME, f"{VOCAB_NAME}.")
        found |= {f"tmp/{name}" for name in os.listdir(root / "tmp") if not name.startswith(ours)}
    return found


def _compare(root: Path, stored: CacheHeader, asked: CacheHeader) -> None:
    compare_headers(root, stored, asked, without=("id_of_rank_xxh3",))  # the table there stays


def compare_headers(root: Path, stored: CacheHeader, asked: CacheHeader, *, without: Sequence[str]) -> None:
    """Raise FingerprintMismatchError with every field in which the cache at `root` is another than is asked for."""
    sides = [{**header.fingerprint, **identity_of(header, without=without)} for header in (stored, asked)]
    lines = differences(*sides)
    if lines:
        other = {name for name in {**sides[0], **sides[1]} if sides[0].get(name) != sides[1].get(name)}
        advice = "name another folder, or go back to what the cache was made from"
        if other <= set(OF_THE_DATA) and "import.format" not in asked.fingerprint:
            advice += "; if the data has changed, `build-teacher --sync` brings a finished cache up to it"
        raise FingerprintMismatchError(
            f"`{root}` was made from something else ({len(lines)} fields differ):\n"
            f"{list_problems(lines, limit=100)}\n{advice}"
        )


def identity_of(header: CacheHeader, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """The fields beside the fingerprint in which two headers must be equal for their parts to go together."""
    return {name: getattr(header, name) for name in ("contract", "lacks", *IDENTITY_FIELDS) if name not in without}


def differences(
    old: dict[str, Any], new: dict[str, Any], *, names: tuple[str, str] = ("the cache has", "this run has")
) -> list[str]:
    """One line for every field that differs, with both values, cut to where they part."""
    lines = []
    for name in {**old, **new}:
        texts = [json.dumps(values[name], sort_keys=True) if name in values else "nothing" for values in (old, new)]
        if texts[0] != texts[1]:
            start = max(0, _first_difference(*texts) - MAX_SHOWN // 2)
            shown = [_excerpt(text, start) for text in texts]
            lines.append(f"`{name}`: {names[0]} {shown[0]}, {names[1]} {shown[1]}")
    return lines


def _first_difference(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _excerpt(text: str, start: int) -> str:
    """At most MAX_SHOWN characters, chosen so that the place where two values part is among them."""
    end = start + MAX_SHOWN
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")


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


def is_synced(header: CacheHeader) -> bool:
    """Whether the cache has followed its data: its parts are not those of one build."""
    return bool(header.parents) and header.parents[-1].get("operation") == "sync"


def resume_command(header: CacheHeader, root: Path) -> str:
    """The command that continues an unfinished cache."""
    if is_synced(header):
        return command_line("build-teacher", "SPEC", "-o", root, "--sync")
    paths = [str(parent.get("path", "CACHE")) for parent in header.parents]
    if not paths:
        return command_line("build-teacher", "SPEC", "-o", root)
    if header.parents[0].get("operation") == "merge":
        return command_line("merge", *paths, "-o", root)
    if header.parents[0].get("operation") == "import":
        options = (f"--{name}={value}" for name, value in header.parents[0].get("cuts", {}).items())
        return command_line("import", *paths, "-o", root, *options)
    cuts = header.parents[0].get("cuts", {})
    words = [f"--{name.replace('_', '-')} {_as_option(name, cuts[name])}" for name in OPTIONS if name in cuts]
    return " ".join([command_line("prune", *paths, "-o", root), *words])


def _as_option(name: str, value: Any) -> str:
    if name == "samples":
        return shlex.quote(str(value.get("file") or "FILE"))
    return shlex.quote(",".join(map(str, value)) if isinstance(value, list) else str(value))
