"""Beginning a cache, or finding that the one that is there is another: `vocab/`, then `cache.json`, then parts.

The frequency-rank table comes first because the header carries its digest: whichever process renames its table into
place decides it for all, so that a table made from the teacher's own rows need not come out the same everywhere. Once
`cache.json` says what is in it, a second copy is written.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from vlsi_cache import disk
from vlsi_cache.errors import CacheCorruptError, FingerprintMismatchError, SpecError, command_line, list_problems
from vlsi_cache.outputs import check_folder

from . import commit
from .arrays import read_vocab, read_vocab_text, write_vocab
from .files import load_header
from .layout import HEADER_NAME, IDENTITY_FIELDS, VOCAB_NAME, CacheHeader, sealed_json
from .ranks import RankTable
from .vocab import complete_copies, foreign_names, vocab_files

MAX_SHOWN = 120  # characters of a differing fingerprint value in a message

Ranks = RankTable | Callable[[], RankTable]
TokenTexts = Callable[[], Sequence[str]] | None


def publish_header(
    root: Path, header: CacheHeader, ranks: Ranks, token_texts: TokenTexts
) -> tuple[CacheHeader, RankTable]:
    """Create the cache at `root` or join the one that is there; its header and its frequency ranks.

    Raises FingerprintMismatchError with every field that differs, SpecError when the folder is something else.
    """
    if (root / HEADER_NAME).exists():
        _compare(root, load_header(root), _as_stored(header))
        complete_copies(root, load_header(root))
    else:
        root.mkdir(parents=True, exist_ok=True)
        _refuse_foreign_directory(root)
    table = _publish_vocab(root, header, ranks, token_texts)
    if not (root / HEADER_NAME).exists():
        _create_header(root, header, table)
    stored = load_header(root)
    _compare(root, stored, _as_stored(header))
    if stored.id_of_rank_xxh3 != table.digest:
        raise CacheCorruptError(
            f"`{root / VOCAB_NAME}`: the table does not match cache.json; run: {command_line('repair', root)}"
        )
    complete_copies(root, stored)
    return stored, table


def _create_header(root: Path, header: CacheHeader, table: RankTable) -> None:
    complete = {
        "id_of_rank_xxh3": table.digest,
        "num_head_ranks": table.heads_LH.shape[1],
        "text_xxh3": _text_digest(root, header.v_real),
        "vocab_files": vocab_files(root),
    }
    with commit.tmp_path(root, HEADER_NAME) as tmp, commit.disk_full_is_an_error(root, 0):
        commit.write_durable(tmp, sealed_json(_as_stored(header.model_copy(update=complete)).model_dump()))
        commit.publish_new_file(tmp, root / HEADER_NAME)


def _as_stored(header: CacheHeader) -> CacheHeader:
    """The header after a trip through JSON, so that what is compared later is what a reader will see."""
    try:
        return CacheHeader.model_validate(json.loads(json.dumps(header.model_dump(), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise SpecError(f"the header of the cache cannot be written as JSON: {error}") from error


def check_root(root: Path) -> None:
    """Raise SpecError unless `root` is a cache, or a folder that can become one."""
    check_folder(root)
    if root.is_dir() and not (root / HEADER_NAME).exists():
        _refuse_foreign_directory(root)


def _refuse_foreign_directory(root: Path) -> None:
    """An existing folder may only hold what an interrupted start of a cache leaves: `vocab/`, and files in `tmp/`."""
    found = foreign_names(root)
    if found:
        raise SpecError(
            f"`{root}` is not empty and not a cache: it holds {sorted(found)[:4]}; name a new folder for the cache"
        )


def _publish_vocab(root: Path, header: CacheHeader, ranks: Ranks, token_texts: TokenTexts) -> RankTable:
    """Write `vocab/` unless it is there; the ranks that are there in the end."""
    v_real, num_layers = header.v_real, len(header.layers)
    if not (root / VOCAB_NAME).exists():
        table = (ranks if isinstance(ranks, RankTable) else ranks()).checked(num_layers, v_real)
        _refuse_other_table(root, table)
        text, offsets = _joined(token_texts, v_real)
        need_bytes = table.id_of_rank_V.nbytes + table.heads_LH.nbytes + len(text or b"")
        commit.check_free_space(root, need_bytes)
        with commit.tmp_path(root, VOCAB_NAME) as tmp, commit.disk_full_is_an_error(root, need_bytes):
            write_vocab(tmp, table, text, offsets)
            disk.fsync_tree(tmp)
            commit.publish_dir(tmp, root / VOCAB_NAME)
    try:
        heads = num_layers, num_head_ranks(root)
        return read_vocab(root / VOCAB_NAME, v_real, heads).checked(num_layers, v_real)
    except (CacheCorruptError, SpecError) as error:
        raise CacheCorruptError(f"`{root / VOCAB_NAME}` is damaged ({error}); {_remedy(root)}") from error


def _refuse_other_table(root: Path, table: RankTable) -> None:
    """A lost table may only be made again if it comes out the same: the parts hold its ranks."""
    if (root / HEADER_NAME).exists() and (wanted := load_header(root).id_of_rank_xxh3) != table.digest:
        raise CacheCorruptError(
            f"`{root / VOCAB_NAME}` is lost, and the table made anew is another (xxh3 {table.digest}, cache.json says "
            f"{wanted}); restore this folder from a copy of the cache"
        )


def _remedy(root: Path) -> str:
    if (root / HEADER_NAME).exists():
        return f"run: {command_line('repair', root)}"
    return "no part depends on it yet: delete this folder and run the same command again"


def num_head_ranks(root: Path) -> int:
    """H of the table in `vocab/`: from the header, or while there is none from the array's own metadata."""
    if (root / HEADER_NAME).exists():
        return load_header(root).num_head_ranks
    path = root / VOCAB_NAME / "heads" / "zarr.json"
    try:
        return int(json.loads(path.read_bytes())["shape"][1])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CacheCorruptError(f"`{path}` cannot be read: {error}") from error


def _joined(token_texts: TokenTexts, v_real: int) -> tuple[bytes | None, np.ndarray | None]:
    if token_texts is None:
        return None, None
    texts = token_texts()
    if len(texts) != v_real:
        raise SpecError(f"{len(texts)} token texts for a vocabulary of {v_real}")
    pieces = [text.encode("utf-8", "replace") for text in texts]
    return b"".join(pieces), np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)


def _text_digest(root: Path, v_real: int) -> str | None:
    if not (root / VOCAB_NAME / "text").is_dir():
        return None
    return xxhash.xxh3_64_hexdigest(read_vocab_text(root / VOCAB_NAME, v_real)[0])


def _compare(root: Path, stored: CacheHeader, asked: CacheHeader) -> None:
    fields = ["contract", *(name for name in IDENTITY_FIELDS if name != "id_of_rank_xxh3")]  # the table there is taken
    lines = differences(stored.fingerprint, asked.fingerprint)
    lines += differences(*({name: getattr(header, name) for name in fields} for header in (stored, asked)))
    if lines:
        raise FingerprintMismatchError(
            f"`{root}` was made from something else ({len(lines)} fields differ):\n"
            f"{list_problems(lines, limit=100)}\nname another folder, or go back to what the cache was made from"
        )


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
