"""The head of a cache: `cache.json`, the files of `vocab/`, and their second copy `vocab-copy/`.

Without the vocabulary order no stored number becomes a token id. `cache.json` says how long every file is and what it
hashes to, so that either copy can be judged by itself, and what is broken in the one is taken from the other.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from vlsi_cache import io
from vlsi_cache.errors import CacheCorruptError, FingerprintMismatchError, SpecError, list_problems
from vlsi_cache.io import check_folder

from . import commit
from .files import hash_file, load_header, refuse_elsewhere, repair_hint
from .format import HEADER_NAME, IDENTITY_FIELDS, VOCAB_COPY_NAME, VOCAB_NAME, CacheHeader, FileRecord, sealed_json
from .vocab_order import VocabOrder, read_vocab, read_vocab_text, write_vocab

VOCAB_NAMES = (VOCAB_NAME, VOCAB_COPY_NAME)


def load_vocab(root: Path, header: CacheHeader) -> VocabOrder:
    """The order of the vocabulary, checked against cache.json."""
    try:
        vocab_order = read_vocab(root / VOCAB_NAME, header.vocab_size, (len(header.layers), header.num_head_ranks))
    except CacheCorruptError as error:
        error.hint = error.hint or repair_hint(root)
        raise
    _check_vocab(root, "id_of_rank", vocab_order.digest, header.id_of_rank_xxh3)
    try:
        return vocab_order.checked(len(header.layers), header.vocab_size)
    except SpecError as error:
        raise CacheCorruptError(f"`{root / VOCAB_NAME}`: {error}", file=root / VOCAB_NAME) from error


def load_texts(root: Path, header: CacheHeader) -> tuple[bytes, np.ndarray]:
    """Text of all tokens as UTF-8, and the offset of each, int64 [V + 1]; checked against cache.json."""
    try:
        text, offsets = read_vocab_text(root / VOCAB_NAME, header.vocab_size)
    except CacheCorruptError as error:
        error.hint = error.hint or repair_hint(root)
        raise
    _check_vocab(root, "text", xxhash.xxh3_64_hexdigest(text), header.text_xxh3)
    return text, offsets


def _check_vocab(root: Path, name: str, found: str, expected: str | None) -> None:
    if found != expected:
        path = root / VOCAB_NAME / name
        what = f"`{path}`: xxh3 of the table is {found}, cache.json says {expected}"
        raise CacheCorruptError(what, file=path, hint=repair_hint(root))


def vocab_files(root: Path) -> dict[str, FileRecord]:
    """Size and hash of every file of `vocab/`, by its path inside."""
    folder = root / VOCAB_NAME
    return {name: hash_file(folder / name) for name in _file_names(folder)}


def vocab_problems(root: Path, header: CacheHeader, name: str) -> list[tuple[str, str]]:
    """What is wrong with the copy `name`, file by file: (path in the cache, what)."""
    problems = []
    for file, expected in header.vocab_files.items():
        path, what = root / name / file, ""
        try:
            refuse_elsewhere(root, path)
            found = hash_file(path)
        except FileNotFoundError:
            what = "is missing"
        except (OSError, CacheCorruptError) as error:
            what = str(error)
        else:
            if found.size != expected.size:
                what = f"{found.size} bytes, cache.json says {expected.size}"
            elif found != expected:
                what = f"xxh3 is {found.xxh3}, cache.json says {expected.xxh3}"
        if what:
            problems.append((f"{name}/{file}", what))
    foreign = [file for file in _file_names(root / name) if header.vocab_files and file not in header.vocab_files]
    return problems + [(f"{name}/{file}", "does not belong to the table") for file in foreign]


def whole_files(root: Path, header: CacheHeader) -> dict[str, bytes] | None:
    """The content of every file of `vocab/`, each from a copy in which it is whole; None if one is whole in neither."""
    content = {}
    for file, expected in header.vocab_files.items():
        for name in VOCAB_NAMES:
            path = root / name / file
            found = path.read_bytes() if path.is_file() else b""
            if len(found) == expected.size and xxhash.xxh3_64_hexdigest(found) == expected.xxh3:
                content[file] = found
                break
    return content if content and len(content) == len(header.vocab_files) else None


def publish_files(root: Path, name: str, content: dict[str, bytes]) -> bool:
    """Write a copy of the table under `name` unless that name is taken."""
    need_bytes = sum(map(len, content.values()))
    with commit.tmp_path(root, name, ".zarr") as tmp, commit.disk_full_is_an_error(root, need_bytes):
        for file, data in content.items():
            (tmp / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp / file).write_bytes(data)
        io.fsync_tree(tmp)
        return commit.publish_dir(tmp, root / name)


def complete_copies(root: Path, header: CacheHeader) -> list[str]:
    """Make `vocab/` or its copy again where the whole folder is missing and the other is whole; the names made."""
    missing = [name for name in VOCAB_NAMES if not os.path.lexists(root / name)]
    content = whole_files(root, header) if missing else None
    return [name for name in missing if content is not None and publish_files(root, name, content)]


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


def _file_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


MAX_SHOWN = 120  # characters of a differing fingerprint value in a message
OrderOrMaker = VocabOrder | Callable[[], VocabOrder]
TokenTexts = Callable[[], Sequence[str]] | None


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
    table = _publish_vocab(root, header, vocab_order, token_texts)
    if not (root / HEADER_NAME).exists():
        _create_header(root, header, table)
    stored = load_header(root)
    _compare(root, stored, _as_stored(header))
    if stored.id_of_rank_xxh3 != table.digest:
        what = f"`{root / VOCAB_NAME}`: the table does not match cache.json"
        raise CacheCorruptError(what, file=root / VOCAB_NAME, hint=repair_hint(root))
    complete_copies(root, stored)
    return stored, table


def _create_header(root: Path, header: CacheHeader, table: VocabOrder) -> None:
    complete = {
        "id_of_rank_xxh3": table.digest,
        "num_head_ranks": table.heads_LH.shape[1],
        "text_xxh3": _text_digest(root, header.vocab_size),
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


def _publish_vocab(root: Path, header: CacheHeader, vocab_order: OrderOrMaker, token_texts: TokenTexts) -> VocabOrder:
    """Write `vocab/` unless it is there; the order that is there in the end."""
    vocab_size, num_layers = header.vocab_size, len(header.layers)
    if not (root / VOCAB_NAME).exists():
        table = (vocab_order if isinstance(vocab_order, VocabOrder) else vocab_order()).checked(num_layers, vocab_size)
        _refuse_other_table(root, table)
        text, offsets = _joined(token_texts, vocab_size)
        need_bytes = table.id_of_rank_V.nbytes + table.heads_LH.nbytes + len(text or b"")
        commit.check_free_space(root, need_bytes)
        with commit.tmp_path(root, VOCAB_NAME) as tmp, commit.disk_full_is_an_error(root, need_bytes):
            write_vocab(tmp, table, text, offsets)
            io.fsync_tree(tmp)
            commit.publish_dir(tmp, root / VOCAB_NAME)
    try:
        heads = num_layers, num_head_ranks(root)
        return read_vocab(root / VOCAB_NAME, vocab_size, heads).checked(num_layers, vocab_size)
    except (CacheCorruptError, SpecError) as error:
        what = f"`{root / VOCAB_NAME}` is damaged ({error})"
        raise CacheCorruptError(what, file=root / VOCAB_NAME, hint=_remedy(root)) from error


def _refuse_other_table(root: Path, table: VocabOrder) -> None:
    """A lost table may only be made again if it comes out the same: the parts hold places in it."""
    if (root / HEADER_NAME).exists() and (wanted := load_header(root).id_of_rank_xxh3) != table.digest:
        raise CacheCorruptError(
            f"`{root / VOCAB_NAME}` is lost, and the table made anew is another (xxh3 {table.digest}, cache.json says "
            f"{wanted})",
            file=root / VOCAB_NAME,
            hint="restore this folder from a copy of the cache",
        )


def _remedy(root: Path) -> str:
    if (root / HEADER_NAME).exists():
        return repair_hint(root)
    return "no part depends on it yet: delete this folder and run the same command again"


def num_head_ranks(root: Path) -> int:
    """H of the table in `vocab/`: from the header, or while there is none from the array's own metadata."""
    if (root / HEADER_NAME).exists():
        return load_header(root).num_head_ranks
    path = root / VOCAB_NAME / "heads" / "zarr.json"
    try:
        return int(json.loads(path.read_bytes())["shape"][1])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CacheCorruptError(f"`{path}` cannot be read: {error}", file=path) from error


def _joined(token_texts: TokenTexts, vocab_size: int) -> tuple[bytes | None, np.ndarray | None]:
    if token_texts is None:
        return None, None
    texts = token_texts()
    if len(texts) != vocab_size:
        raise SpecError(f"{len(texts)} token texts for a vocabulary of {vocab_size}")
    pieces = [text.encode("utf-8", "replace") for text in texts]
    return b"".join(pieces), np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)


def _text_digest(root: Path, vocab_size: int) -> str | None:
    if not (root / VOCAB_NAME / "text").is_dir():
        return None
    return xxhash.xxh3_64_hexdigest(read_vocab_text(root / VOCAB_NAME, vocab_size)[0])


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
