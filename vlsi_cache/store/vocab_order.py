"""Token ids as places in an order of the vocabulary: small numbers compress, and every layer says other words.

All layers share one order of the vocabulary; each has a head of its own in front of it. `vocab/` keeps both, and the
texts of the tokens for people; `vocab-copy/` is its second copy. Without the order no stored number becomes a token id:
`cache.json` says how long every file is and what it hashes to, so that either copy can be judged by itself, and what is
broken in the one is taken from the other.
Shape suffixes: L layers, V vocabulary, H ids in a head.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from vlsi_cache import io
from vlsi_cache.errors import CacheCorruptError, SpecError

from .arrays import PIECE_ARRAYS, vocab_specs
from .codec import read_samples, write_arrays
from .files import (
    check_free_space,
    disk_full_is_an_error,
    hash_file,
    hints_at_repair,
    load_header,
    publish_dir,
    refuse_elsewhere,
    repair_hint,
    tmp_path,
)
from .format import HEADER_NAME, VOCAB_COPY_NAME, VOCAB_NAME, CacheHeader, FileRecord

VOCAB_NAMES = (VOCAB_NAME, VOCAB_COPY_NAME)
NUM_HEAD = 2048  # a longer head saves less than a thousandth of the ids


@dataclass(frozen=True)
class VocabOrder:
    """`id_of_rank_V`: all ids, the most frequent first. `heads_LH`: ids that come before all others in that layer."""

    id_of_rank_V: np.ndarray
    heads_LH: np.ndarray

    @property
    def digest(self) -> str:
        """xxh3-64 over the bytes of both arrays as little-endian uint32."""
        pieces = (np.ascontiguousarray(array, "<u4").tobytes() for array in (self.id_of_rank_V, self.heads_LH))
        return xxhash.xxh3_64_hexdigest(b"".join(pieces))

    @property
    def is_identity(self) -> bool:
        """Whether every place is its own id, as in the `fast` profile."""
        vocab_size = len(self.id_of_rank_V)
        return not self.heads_LH.size and np.array_equal(self.id_of_rank_V, np.arange(vocab_size))

    def ids_LV(self) -> np.ndarray:
        """uint32 [L, V]: the id at every place, layer by layer."""
        order_V = self.id_of_rank_V
        rows = [np.concatenate([head_H, order_V[~np.isin(order_V, head_H)]]) for head_H in self.heads_LH]
        return np.stack(rows).astype(np.uint32)

    def places_LV(self, dtype: np.dtype) -> np.ndarray:
        """[L, V]: the place of every id, layer by layer."""
        ids_LV = self.ids_LV()
        places_LV = np.empty(ids_LV.shape, dtype)
        np.put_along_axis(places_LV, ids_LV.astype(np.int64), np.arange(ids_LV.shape[1], dtype=dtype)[None], axis=1)
        return places_LV

    def select(self, layer_rows: list[int]) -> "VocabOrder":
        """The table of some of the layers."""
        return VocabOrder(self.id_of_rank_V, self.heads_LH[layer_rows])

    def checked(self, num_layers: int, vocab_size: int) -> "VocabOrder":
        """The table as uint32; SpecError unless the order is a permutation and every head holds distinct ids."""
        order_V, heads_LH = np.asarray(self.id_of_rank_V), np.asarray(self.heads_LH)
        if order_V.shape != (vocab_size,) or not _is_permutation(order_V):
            found = f"shape {order_V.shape}, values {order_V.min(initial=0)} to {order_V.max(initial=0)}"
            raise SpecError(f"`id_of_rank` must be a permutation of 0 to {vocab_size - 1}, got {found}")
        sorted_LH = np.sort(heads_LH, axis=1)
        repeats = heads_LH.size and (np.diff(sorted_LH.astype(np.int64), axis=1) == 0).any()
        if heads_LH.ndim != 2 or len(heads_LH) != num_layers or repeats or heads_LH.max(initial=0) >= vocab_size:
            raise SpecError(f"`heads` must be distinct ids for each of {num_layers} layers, got {heads_LH.shape}")
        return VocabOrder(order_V.astype(np.uint32), heads_LH.astype(np.uint32))


def _is_permutation(order_V: np.ndarray) -> bool:
    if order_V.min() < 0 or order_V.max() >= len(order_V):
        return False
    seen_V = np.zeros(len(order_V), bool)
    seen_V[order_V] = True
    return bool(seen_V.all())


def one_order(id_of_rank_V: np.ndarray, num_layers: int) -> VocabOrder:
    """One order for all layers."""
    return VocabOrder(np.asarray(id_of_rank_V), np.empty((num_layers, 0), np.uint32))


def order_by_count(kept_LV: np.ndarray, said_V: np.ndarray) -> VocabOrder:
    """Ids by how often they were kept: over all layers, and at the head of each layer; then by `said_V`, then by id."""
    ids_V = np.arange(len(said_V))
    order_V = np.lexsort((ids_V, -said_V, -kept_LV.sum(0)))
    place_V = np.empty_like(order_V)
    place_V[order_V] = ids_V
    heads = [np.lexsort((place_V, -kept_V))[: min(NUM_HEAD, len(ids_V))] for kept_V in kept_LV]
    return VocabOrder(order_V.astype(np.uint32), np.stack(heads).astype(np.uint32))


class VocabTexts(NamedTuple):
    """What the V tokens say: `texts` for people, and where they are known the bytes of each (`pieces`) and its kind
    (`kinds_V`, uint8; what they mean is `data/token_bytes.py`)."""

    texts: Sequence[str]
    pieces: Sequence[bytes] | None = None
    kinds_V: np.ndarray | None = None


def write_vocab(folder: Path, vocab_order: VocabOrder, said: dict[str, np.ndarray]) -> None:
    """Write `vocab/`: the order of the vocabulary, and what is known of what the tokens say."""
    arrays = {"id_of_rank": vocab_order.id_of_rank_V, "heads": vocab_order.heads_LH, **said}
    sizes = [len(said[name]) if name in said else None for name in ("text", "bytes")]
    write_arrays(folder, arrays, vocab_specs(len(vocab_order.id_of_rank_V), vocab_order.heads_LH.shape, *sizes))


def read_vocab(folder: Path, vocab_size: int, heads: tuple[int, int]) -> VocabOrder:
    """The order of the vocabulary, as it was written."""
    found = read_samples(folder, vocab_specs(vocab_size, heads, None), ["id_of_rank", "heads"])
    return VocabOrder(found["id_of_rank"], found["heads"])


def read_vocab_text(folder: Path, vocab_size: int) -> tuple[bytes, np.ndarray]:
    """UTF-8 bytes of all tokens one after the other, and int64 [V + 1] offsets; the caller knows that they exist."""
    return _read_pieces(folder, vocab_size, "text")


def _read_pieces(folder: Path, vocab_size: int, name: str) -> tuple[bytes, np.ndarray]:
    specs = vocab_specs(vocab_size, (0, 0), 0, 0)
    offsets = read_samples(folder, specs, [f"{name}_offsets"])[f"{name}_offsets"]
    if offsets[0] or (np.diff(offsets) < 0).any():
        what = f": offsets must rise from 0, found {offsets[0]} to {offsets.min()}"
        raise CacheCorruptError.at(folder / f"{name}_offsets", what)
    specs = vocab_specs(vocab_size, (0, 0), *[int(offsets[-1])] * 2)
    return read_samples(folder, specs, [name])[name].tobytes(), offsets


def load_vocab(root: Path, header: CacheHeader) -> VocabOrder:
    """The order of the vocabulary, checked against cache.json."""
    with hints_at_repair(root):
        vocab_order = read_vocab(root / VOCAB_NAME, header.vocab_size, (len(header.layers), header.num_head_ranks))
        _check_digest(root / VOCAB_NAME / "id_of_rank", vocab_order.digest, header.id_of_rank_xxh3)
    try:
        return vocab_order.checked(len(header.layers), header.vocab_size)
    except SpecError as error:
        raise CacheCorruptError.at(root / VOCAB_NAME, f": {error}") from error


def load_texts(root: Path, header: CacheHeader) -> tuple[bytes, np.ndarray]:
    """Text of all tokens as UTF-8, and the offset of each, int64 [V + 1]; checked against cache.json."""
    with hints_at_repair(root):
        text, offsets = read_vocab_text(root / VOCAB_NAME, header.vocab_size)
        _check_digest(root / VOCAB_NAME / "text", xxhash.xxh3_64_hexdigest(text), header.text_xxh3)
    return text, offsets


def has_pieces(header: CacheHeader) -> bool:
    """Whether the cache says which bytes its tokens are."""
    return "bytes/zarr.json" in header.vocab_files


def load_pieces(root: Path, header: CacheHeader) -> tuple[list[bytes], np.ndarray]:
    """The bytes of every token, and its kind, uint8 [V]; the caller knows that the cache has them."""
    folder = root / VOCAB_NAME
    with hints_at_repair(root):
        for name in (f"{name}/c/0" for name in PIECE_ARRAYS):
            if name in header.vocab_files and hash_file(folder / name) != header.vocab_files[name]:
                raise CacheCorruptError.at(folder / name, " is not the file that cache.json names")
        joined, offsets = _read_pieces(folder, header.vocab_size, "bytes")
        kinds_V = read_samples(folder, vocab_specs(header.vocab_size, (0, 0), 0, 0), ["bytes_kinds"])["bytes_kinds"]
    edges = offsets.tolist()
    return [joined[low:high] for low, high in pairwise(edges)], kinds_V


def text_digest(root: Path, vocab_size: int) -> str | None:
    """xxh3-64 of the token texts in `vocab/`; None where there are none."""
    if not (root / VOCAB_NAME / "text").is_dir():
        return None
    return xxhash.xxh3_64_hexdigest(read_vocab_text(root / VOCAB_NAME, vocab_size)[0])


def _check_digest(path: Path, found: str, expected: str | None) -> None:
    if found != expected:
        raise CacheCorruptError.at(path, f": xxh3 of the table is {found}, cache.json says {expected}")


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
    with tmp_path(root, name, ".zarr") as tmp, disk_full_is_an_error(root, need_bytes):
        for file, data in content.items():
            (tmp / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp / file).write_bytes(data)
        io.fsync_tree(tmp)
        return publish_dir(tmp, root / name)


def complete_copies(root: Path, header: CacheHeader) -> list[str]:
    """Make `vocab/` or its copy again where the whole folder is missing and the other is whole; the names made."""
    missing = [name for name in VOCAB_NAMES if not os.path.lexists(root / name)]
    content = whole_files(root, header) if missing else None
    return [name for name in missing if content is not None and publish_files(root, name, content)]


def _file_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


# What a build hands over: an order or a function that makes it when it is needed, and one for the texts of all tokens.
OrderOrMaker = VocabOrder | Callable[[], VocabOrder]
TokenTexts = Callable[[], Sequence[str] | VocabTexts] | None


def publish_vocab(root: Path, header: CacheHeader, vocab_order: OrderOrMaker, token_texts: TokenTexts) -> VocabOrder:
    """Write `vocab/` unless it is there; the order that is there in the end."""
    vocab_size, num_layers = header.vocab_size, len(header.layers)
    if not (root / VOCAB_NAME).exists():
        table = (vocab_order if isinstance(vocab_order, VocabOrder) else vocab_order()).checked(num_layers, vocab_size)
        _refuse_other_table(root, table)
        said = _joined(token_texts, vocab_size)
        need_bytes = sum(array.nbytes for array in (table.id_of_rank_V, table.heads_LH, *said.values()))
        check_free_space(root, need_bytes)
        with tmp_path(root, VOCAB_NAME) as tmp, disk_full_is_an_error(root, need_bytes):
            write_vocab(tmp, table, said)
            io.fsync_tree(tmp)
            publish_dir(tmp, root / VOCAB_NAME)
    try:
        heads = num_layers, num_head_ranks(root)
        return read_vocab(root / VOCAB_NAME, vocab_size, heads).checked(num_layers, vocab_size)
    except (CacheCorruptError, SpecError) as error:
        hint = "no part depends on it yet: delete this folder and run the same command again"
        hint = repair_hint(root) if (root / HEADER_NAME).exists() else hint
        raise CacheCorruptError.at(root / VOCAB_NAME, f" is damaged ({error})", hint=hint) from error


def _refuse_other_table(root: Path, table: VocabOrder) -> None:
    """A lost table may only be made again if it comes out the same: the parts hold places in it."""
    if (root / HEADER_NAME).exists() and (wanted := load_header(root).id_of_rank_xxh3) != table.digest:
        what = f" is lost, and the table made anew is another (xxh3 {table.digest}, cache.json says {wanted})"
        hint = "restore this folder from a copy of the cache"
        raise CacheCorruptError.at(root / VOCAB_NAME, what, hint=hint)


def num_head_ranks(root: Path) -> int:
    """H of the table in `vocab/`: from the header, or while there is none from the array's own metadata."""
    if (root / HEADER_NAME).exists():
        return load_header(root).num_head_ranks
    path = root / VOCAB_NAME / "heads" / "zarr.json"
    try:
        return int(json.loads(path.read_bytes())["shape"][1])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CacheCorruptError.at(path, f" cannot be read: {error}") from error


def _joined(token_texts: TokenTexts, vocab_size: int) -> dict[str, np.ndarray]:
    """The arrays of `vocab/` that say what tokens are."""
    if token_texts is None:
        return {}
    made = token_texts()
    said = made if isinstance(made, VocabTexts) else VocabTexts(made)
    if len(said.texts) != vocab_size or len(said.pieces if said.pieces is not None else said.texts) != vocab_size:
        raise SpecError(f"{len(said.texts)} token texts for a vocabulary of {vocab_size}")
    found = _end_to_end("text", [text.encode("utf-8", "replace") for text in said.texts])
    if said.pieces is not None and said.kinds_V is not None:
        found |= {**_end_to_end("bytes", said.pieces), "bytes_kinds": np.asarray(said.kinds_V, np.uint8)}
    return found


def _end_to_end(name: str, pieces: Sequence[bytes]) -> dict[str, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    return {name: np.frombuffer(b"".join(pieces), np.uint8), f"{name}_offsets": offsets}
