"""Caches made out of caches; here what each of them needs: where it may go, room for it, and its token texts."""

from collections.abc import Callable, Sequence
from pathlib import Path

from vlsi_cache.errors import CacheIncompleteError, SpecError
from vlsi_cache.store.files import check_free_space
from vlsi_cache.store.location import UrlPath
from vlsi_cache.store.reader import Cache, CachePath, open
from vlsi_cache.store.vocab_order import VocabTexts


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
    if not isinstance(out, UrlPath) and out.exists() and not out.is_dir():
        raise SpecError(f"`{out}` is a file; name a new folder for the cache")
    for source in sources:
        if source.path.resolve() in (out.resolve(), *out.resolve().parents):
            raise SpecError(f"`{out}` is or lies in the source `{source.path}`, which stays as it is; name another one")


def check_room(out: Path, need_bytes: int) -> None:
    """DiskFullError before anything is written when it cannot fit."""
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    check_free_space(folder, need_bytes)


def token_texts(source: Cache) -> Callable[[], VocabTexts] | None:
    """What writes the texts and bytes of the tokens of `source` again; None when it has none."""
    if source.header.text_xxh3 is None:
        return None

    def made() -> VocabTexts:
        texts = [source.token_text(token) or "" for token in range(source.header.vocab_size)]
        return VocabTexts(texts, *(source.token_pieces() or (None, None)))

    return made
