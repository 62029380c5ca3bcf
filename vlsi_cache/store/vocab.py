"""The files of `vocab/`, without which no rank becomes a token id, and of its second copy `vocab-copy/`.

`cache.json` says how long every file is and what it hashes to, so that either copy can be judged by itself, and what is
broken in the one is taken from the other.
"""

import os
from pathlib import Path

import numpy as np
import xxhash

from vlsi_cache import disk
from vlsi_cache.errors import CacheCorruptError, SpecError, command_line

from . import commit
from .arrays import read_vocab, read_vocab_text
from .files import advised, hash_file, refuse_elsewhere
from .layout import HEADER_NAME, VOCAB_COPY_NAME, VOCAB_NAME, CacheHeader, FileRecord
from .ranks import RankTable

VOCAB_NAMES = (VOCAB_NAME, VOCAB_COPY_NAME)


def load_vocab(root: Path, header: CacheHeader) -> RankTable:
    """The frequency ranks, checked against cache.json."""
    try:
        ranks = read_vocab(root / VOCAB_NAME, header.v_real, (len(header.layers), header.num_head_ranks))
    except CacheCorruptError as error:
        raise advised(error, root) from error
    _check_vocab(root, "id_of_rank", ranks.digest, header.id_of_rank_xxh3)
    try:
        return ranks.checked(len(header.layers), header.v_real)
    except SpecError as error:
        raise CacheCorruptError(f"`{root / VOCAB_NAME}`: {error}") from error


def load_texts(root: Path, header: CacheHeader) -> tuple[bytes, np.ndarray]:
    """Text of all tokens as UTF-8, and the offset of each, int64 [V + 1]; checked against cache.json."""
    try:
        text, offsets = read_vocab_text(root / VOCAB_NAME, header.v_real)
    except CacheCorruptError as error:
        raise advised(error, root) from error
    _check_vocab(root, "text", xxhash.xxh3_64_hexdigest(text), header.text_xxh3)
    return text, offsets


def _check_vocab(root: Path, name: str, found: str, expected: str | None) -> None:
    if found != expected:
        raise CacheCorruptError(
            f"`{root / VOCAB_NAME / name}`: xxh3 of the table is {found}, cache.json says {expected}; "
            f"run: {command_line('repair', root)}"
        )


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
        disk.fsync_tree(tmp)
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
