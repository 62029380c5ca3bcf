"""Reading a cache: open, look up a sample, read a part; and whether its teacher knows the responses.

Shape suffixes: L layers, V vocabulary.
"""

import bisect
import math
import operator
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar

import numpy as np

from vlsi_cache.config.layers import shown_layers
from vlsi_cache.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheNotFoundError,
    SampleNotFoundError,
    command_line,
    did_you_mean,
)
from vlsi_cache.progress import html_text

from .arrays import PIECE_ARRAYS
from .codec import Known
from .files import hints_at_repair, load_header, load_part_record, refuse_special, repair_hint
from .format import HEADER_NAME, CacheHeader, PartRecord, list_parts, part_dir
from .header import is_interrupted_start, resume_command
from .location import UrlPath, place_of
from .part import Part, Row, load_part
from .remote.fetch import NOTHING, Want
from .remote.mirror import Mirror
from .vocab_order import VocabOrder, has_pieces, load_pieces, load_texts, load_vocab

if TYPE_CHECKING:
    import pyarrow as pa

    from .check import VerifyReport
    from .table import Index

Result = TypeVar("Result")
RECENT_BYTES = 256 << 20  # decoded parts that stay in memory for the next look, at least one


class Cache(Mapping[str, Row]):
    """A cache opened for reading; made by `open`. Safe to use from several threads.

    It is a mapping from sample ids (str) to rows, in the order of the sample table: by part, then as stored. An integer
    is a place in that order: `cache[0]` is the row of the first sample, `cache[-1]` that of the last.
    """

    __eq__ = object.__eq__  # Mapping's would read every row of both
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, path: Path, header: CacheHeader, index: "Index", mirror: Mirror | None = None) -> None:
        self.path = path
        self._mirror = mirror
        self.header = header
        self.recent_bytes = RECENT_BYTES
        self._index = index
        self._order: np.ndarray | None = None
        self._parts: OrderedDict[tuple[int, tuple[int, ...], bool], Part] = OrderedDict()
        self._known: Known = {}
        self._vocab_order: VocabOrder | None = None
        self._ids_LV: np.ndarray | None = None
        self._texts: tuple[bytes, np.ndarray] | None = None
        self._lock = threading.RLock()

    @property
    def layers(self) -> list[int]:
        return self.header.layers

    @property
    def num_samples(self) -> int:
        return self._index.num_samples

    @property
    def num_tokens(self) -> int:
        return int(self._index.column("num_tokens").to_numpy().sum())

    @property
    def parts(self) -> list[int]:
        """Indices of the committed parts."""
        return self._index.parts

    @property
    def is_complete(self) -> bool:
        return len(self.parts) == self.header.num_parts

    @property
    def vocab_order(self) -> VocabOrder:
        """What turns stored numbers into token ids, checked against cache.json."""
        with self._lock:
            if self._vocab_order is None:
                self._vocab_order = self._from_vocab(("id_of_rank", "heads"), load_vocab)
            return self._vocab_order

    def token_text(self, token: int) -> str | None:
        """The text of a token, from the cache itself; None when the cache carries no texts."""
        if self.header.text_xxh3 is None:
            return None
        with self._lock:
            if self._texts is None:
                self._texts = self._from_vocab(("text", "text_offsets"), load_texts)
        text, offsets = self._texts
        return text[offsets[token] : offsets[token + 1]].decode("utf-8", "replace")

    def token_pieces(self) -> tuple[list[bytes], np.ndarray] | None:
        """The bytes of every token and its kind (`data/token_bytes.py`); None when the cache does not carry them."""
        return self._from_vocab(PIECE_ARRAYS, load_pieces) if has_pieces(self.header) else None

    def __len__(self) -> int:
        return self.num_samples

    def __contains__(self, sample_id: object) -> bool:
        return self._position(sample_id) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.column("id").to_pylist())

    def __getitem__(self, key: str | SupportsIndex) -> Row:
        """The rows of a sample by its id (SampleNotFoundError), or by its place (IndexError)."""
        return self.at(key) if isinstance(key, Integral) else self.row(key)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        parts = f"{len(self.parts)} parts" if self.is_complete else f"{len(self.parts)}/{self.header.num_parts} parts"
        return f"Cache({str(self.path)!r}, {self.num_samples} samples, layers {self.layers}, {parts})"

    def _repr_html_(self) -> str:
        """What a notebook shows: a few facts, nothing that reads a part."""
        header, k = self.header, sorted(set(self.header.top_k))
        facts = {
            "cache": str(self.path),
            "parts": f"{len(self.parts)} of {header.num_parts}",
            "samples": f"{self.num_samples:,}",
            "response tokens": f"{self.num_tokens:,}",
            "layers": shown_layers(self.layers, last=self.layers[-1]),
            "rows": f"{header.row_kind}, {'k' if header.row_kind == 'top-k' else 'draws'} {', '.join(map(str, k))}",
            "profile": header.profile,
        }
        lines = "".join(f"<tr><th>{name}</th><td>{html_text(value)}</td></tr>" for name, value in facts.items())
        return f"<table>{lines}</table>"

    def row(self, sample_id: str, layers: Sequence[int | str] | None = None) -> Row:
        """The sample's rows, of the model layers `layers` ("last" is the last one); all layers by default."""
        where = self._position(sample_id)
        if where is None:
            raise SampleNotFoundError(self._not_found(sample_id), file=self.path)
        return self._row_of(where, sample_id, layers)

    def at(self, place: SupportsIndex, layers: Sequence[int | str] | None = None) -> Row:
        """The rows of the sample at `place` in the order of iteration; negative numbers count from the end."""
        index = operator.index(place)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a cache with {len(self)} samples")
        where = index % len(self)
        return self._row_of(where, self._index.column("id")[where].as_py(), layers)

    def _row_of(self, where: int, sample_id: str, layers: Sequence[int | str] | None) -> Row:
        """The rows of a line of the sample table, which says that they are of `sample_id`."""
        part_index = self._index.column("part")[where].as_py()
        row = self.part(part_index, layers, undone=True).row(self._index.column("row")[where].as_py())
        if row.sample_id != sample_id:
            path = part_dir(self.path, part_index)
            what = f" holds {row.sample_id!r}, samples.parquet says {sample_id!r}"
            raise CacheCorruptError.at(path, what, hint=repair_hint(self.path))
        return row

    def read_part(self, index: int, layers: Sequence[int | str] | None = None) -> list[Row]:
        """All samples of one part, in stored order."""
        part = self.part(index, layers, undone=True)
        return [part.row(i) for i in range(len(part))]

    def part(
        self, index: int, layers: Sequence[int | str] | None = None, *, keep: bool = True, undone: bool = False
    ) -> Part:
        """One part in its compact form; with `keep`, those read last stay in memory, up to `recent_bytes`.

        Its arrays are as on the disk; with `undone` its rows decode faster.
        """
        key = (index, tuple(self.header.layer_indices(layers)), undone)
        with self._lock:
            if key in self._parts:
                self._parts.move_to_end(key)
                return self._parts[key]
        ids_LV = self._ids_by_place()
        chosen_LV = None if ids_LV is None else ids_LV[list(key[1])]
        # What is mapped of a local copy may be fetched again, and then was never checked: it is looked at here, where
        # damage leads to another try.
        known = self._known if self._mirror is None else None

        def read(root: Path) -> Part:
            part = load_part(root, self.header, index, key[1], chosen_LV, undone=undone, known=known)
            if self._mirror is not None:
                with hints_at_repair(root):
                    part.check_blocks()
            return part

        part = self.read_files(index, read, Want(layers=key[1]))
        part = replace(part, folder=part_dir(self.path, index), is_copy=self._mirror is not None)
        if keep:
            with self._lock:
                self._parts[key] = part
                while len(self._parts) > 1 and sum(one.num_bytes for one in self._parts.values()) > self.recent_bytes:
                    self._parts.popitem(last=False)
        return part

    def _ids_by_place(self) -> np.ndarray | None:
        """uint32 [L, V]; None when every place is its own id, as in the `fast` profile."""
        with self._lock:
            if self._ids_LV is None and not self.vocab_order.is_identity:
                self._ids_LV = self.vocab_order.ids_LV()
            return self._ids_LV

    def sample_table(self) -> "pa.Table":
        """One line per sample: id, kind, part, row, first_token, token counts, digests, means of the last layer."""
        return self._index.table()

    def part_record(self, index: int) -> PartRecord:
        """The commit record of a part: per-layer summary, skipped samples, files."""
        return self.read_files(index, lambda root: load_part_record(root, self.header, index), NOTHING)

    def read_files(self, index: int, read: Callable[[Path], Result], want: Want) -> Result:
        """`read(root)`, where the files of part `index` are in their places below `root`, with what it wants of them.

        That is the cache's own folder; for a cache on an object store a local copy, in which all else is missing.
        """
        return read(self.path) if self._mirror is None else self._mirror.read(index, want, read)

    def _from_vocab(self, names: Sequence[str], read: Callable[[Path, CacheHeader], Result]) -> Result:
        if self._mirror is None:
            return read(self.path, self.header)
        return self._mirror.with_vocab(names, lambda root: read(root, self.header))

    def verify(self, *, deep: bool = False) -> "VerifyReport":
        """Check every file and every chunk (`deep`: also the hash of every file)."""
        from .check import verify

        return verify(self.path, deep=deep)

    def bytes_by_array(self) -> dict[str, int]:
        """Bytes on disk of every array over all parts; "metadata" is the rest of the parts."""
        total: dict[str, int] = {}
        for sizes in self._index.file_sizes.values():
            for name, size in sizes.items():
                array = name.split("/", 1)[0] if "/c/" in name else "metadata"
                total[array] = total.get(array, 0) + size
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def parts_with(self, array: str) -> list[int]:
        """The parts that have an array which not all of them need to have."""
        return [part for part, sizes in self._index.file_sizes.items() if f"{array}/zarr.json" in sizes]

    def bytes_per_layer_token(self) -> dict[str, float]:
        """Bytes per (layer, token) of every array, and their "total"."""
        cells = max(1, self.num_tokens * len(self.layers))
        sizes = self.bytes_by_array()
        return {**{name: size / cells for name, size in sizes.items()}, "total": sum(sizes.values()) / cells}

    def _position(self, sample_id: object) -> int | None:
        """The line of a sample in the table: by binary search, since a dict of a million ids takes 150 MB."""
        import pyarrow.compute as pc

        if not isinstance(sample_id, str):
            return None
        with self._lock:
            ids, order = self._index.column("id"), self._order
            if order is None:
                order = self._order = pc.call_function("sort_indices", [ids]).to_numpy()
        found = bisect.bisect_left(order, sample_id.encode(), key=lambda line: ids[int(line)].as_py().encode())
        if found == len(order) or ids[int(order[found])].as_py() != sample_id:
            return None
        if found + 1 < len(order) and ids[int(order[found + 1])].as_py() == sample_id:
            raise CacheCorruptError(
                f"sample {sample_id!r} is more than once in `{self.path}`, and ids must be unique over the whole cache",
                file=self.path,
                hint=f"run: {command_line('verify', self.path)}, then {command_line('repair', self.path)}",
            )
        return int(order[found])

    def _not_found(self, sample_id: object) -> str:
        guess = did_you_mean(sample_id, self._index.column("id")[:20000].to_pylist(), most=3, show=repr)
        missing = "" if self.is_complete else f" ({len(self.parts)} of {self.header.num_parts} parts are there)"
        return f"no sample {sample_id!r} in `{self.path}`{missing}{guess}"


CachePath = Cache | str | os.PathLike[str]


def open(path: str | os.PathLike[str], *, allow_incomplete: bool = False) -> Cache:
    """Open a cache for reading: its header, and which samples lie where. Nothing is decoded yet.

    `path` is a folder, or a URL on an object store (s3://, gs://, az://): of that only what is asked for is read,
    through the local part cache.

    The files of a part are checked for their sizes when the part is first read; `verify` checks them all. A table of
    samples that is missing or stale is written again where the folder allows it. Raises CacheNotFoundError,
    CacheIncompleteError (not with `allow_incomplete`), CacheCorruptError.
    """
    from .table import load_index

    root = place_of(path)
    if isinstance(root, UrlPath):
        return _open_remote(root, allow_incomplete=allow_incomplete)
    refuse_special(root / HEADER_NAME)
    if not (root / HEADER_NAME).is_file():
        raise CacheNotFoundError(_not_a_cache(root), file=root)
    header = load_header(root)
    there = list_parts(root)
    done = sum(index < header.num_parts for index in there)
    if done < header.num_parts and not allow_incomplete:
        raise _not_finished(root, header, done)
    extra = [index for index in there if index >= header.num_parts]
    if extra:
        what = f" is not part of this cache of {header.num_parts} parts"
        raise CacheCorruptError.at(part_dir(root, extra[0]), what, hint=repair_hint(root))
    return Cache(root, header, load_index(root, header))


def _open_remote(url: UrlPath, *, allow_incomplete: bool) -> Cache:
    from .table import load_remote_index

    mirror = Mirror(url)
    header, index = mirror.header, load_remote_index(mirror)
    extra = [part for part in index.parts if part >= header.num_parts]
    if extra:
        raise CacheCorruptError.at(part_dir(url, extra[0]), f" is not part of this cache of {header.num_parts} parts")
    if len(index.parts) < header.num_parts and not allow_incomplete:
        raise _not_finished(url, header, len(index.parts))
    return Cache(url, header, index, mirror)


def _not_finished(root: Path, header: CacheHeader, done: int) -> CacheIncompleteError:
    what = f"`{root}` is not finished: {done} of {header.num_parts} parts are there"
    return CacheIncompleteError(what, file=root, hint=f"to continue run: {resume_command(header, root)}")


def _not_a_cache(root: Path) -> str:
    if not root.exists():
        return f"there is no cache at `{root}`: the path does not exist"
    above = next((parent for parent in root.absolute().parents if (parent / HEADER_NAME).is_file()), None)
    if above is not None:
        return f"`{root}` is a piece of a cache; open the cache itself: `{above}`"
    if is_interrupted_start(root):
        return (
            f"`{root}` is the start of a cache, interrupted before its first part: run the command that builds it again"
        )
    if root.is_dir():
        below = sorted(child.name for child in root.iterdir() if (child / HEADER_NAME).is_file())
        if below:
            return f"`{root}` is not a cache, but holds {len(below)}: {', '.join(f'`{root / n}`' for n in below[:4])}"
        if (root / "parts").is_dir():
            return f"`{root}` looks like a cache that lost its `{HEADER_NAME}`; without it the parts cannot be read"
    return f"`{root}` is not a cache: it has no `{HEADER_NAME}`"


# A teacher on its own answers, drawn at temperature 1, finds them as likely as its entropy says: mean loss and mean
# entropy are equal. What the loss has above the entropy is surprise beyond the teacher's own uncertainty:
# `build-teacher` warns of it, and `inspect` shows it.
# The demo's teacher, trained on its rows, is below its entropy by 0.002 nats; SmolLM2, which never saw docstrings
# answered this way, is 1.5 nats above it. Held-out rows of a tuned teacher lie near 0.
SURPRISE_NATS = 0.5


@dataclass(frozen=True)
class Surprise:
    """Means over the response tokens with rows, last layer, in nats."""

    gold_nll: float
    entropy: float

    @property
    def nats(self) -> float:
        return self.gold_nll - self.entropy


def surprise_of(cache: Cache) -> Surprise | None:
    """From the table of samples alone; None where it holds no finite means."""
    names = ("num_tokens", "gold_logprob_last", "entropy_last")  # of a million samples, ids and digests take a second
    weights_S, gold_S, entropy_S = (
        cache._index.column(name).to_numpy(zero_copy_only=False).astype(np.float64) for name in names
    )
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


def surprise_warning(cache: Cache) -> str:
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
