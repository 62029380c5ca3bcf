"""A cache into a data set of the Hugging Face hub, some parts a commit: what is committed is whole, a kill loses the
commit at hand, and the same command goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlsi_cache.errors import CacheCorruptError, StoreError, VlsiCacheError
from vlsi_cache.io import difference_from
from vlsi_cache.progress import say
from vlsi_cache.store.format import HEADER_NAME, RECORD_NAME, TABLE_NAME, VOCAB_NAME, part_dir
from vlsi_cache.store.header import repair_hint
from vlsi_cache.store.reader import Cache

from .card import MARK, card_of
from .hub import HubObjects

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

COMMIT_BYTES, COMMIT_PARTS = 4 << 30, 50  # of one commit at most, or one part
CARD = "README.md"


def push_parts(cache: Cache, hub: HubObjects, there: set[int], moved: Callable[[int], None]) -> None:
    """Commit what is missing: `vocab/`, `cache.json` and the card first, the parts that are not `there`, then the table
    of samples. `moved` is told the bytes of each commit."""
    present = hub.sizes()
    if HEADER_NAME not in present:
        names = [HEADER_NAME, *_files_below(cache.path, VOCAB_NAME)]
        _commit(hub, {name: cache.path / name for name in names}, "The beginning of a cache", moved)
    _write_card(cache, hub)
    batch: dict[str, Path] = {}
    num_parts = num_bytes = 0
    for index in (part for part in cache.parts if part not in there):
        files = _checked_files(cache, index)
        size = sum(path.stat().st_size for path in files.values())
        if batch and (num_parts == COMMIT_PARTS or num_bytes + size > COMMIT_BYTES):
            _commit(hub, batch, f"{num_parts} parts", moved)
            batch, num_parts, num_bytes = {}, 0, 0
        batch |= files
        num_parts, num_bytes = num_parts + 1, num_bytes + size
    if batch:
        _commit(hub, batch, f"{num_parts} parts", moved)
    if batch or TABLE_NAME not in present:
        _commit(hub, {TABLE_NAME: cache.path / TABLE_NAME}, "The table of samples: the cache is whole", moved)


def _files_below(root: Path, folder: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in sorted((root / folder).rglob("*")) if path.is_file()]


def _checked_files(cache: Cache, index: int) -> dict[str, Path]:
    """The files of a part by their names in the cache, each compared with its checksum."""
    folder, found = part_dir(cache.path, index), {}
    for name, file in cache.part_record(index).files.items():
        if problem := difference_from(file.model_dump(), folder / name):
            raise CacheCorruptError.at(folder / name, f" {problem}", hint=repair_hint(cache.path))
        found[(folder / name).relative_to(cache.path).as_posix()] = folder / name
    return {**found, (folder / RECORD_NAME).relative_to(cache.path).as_posix(): folder / RECORD_NAME}


def _write_card(cache: Cache, hub: HubObjects) -> None:
    """At the top of the data set, unless somebody has written one there."""
    text = card_of(cache, hub.url).encode()
    try:
        old = hub.get_top(CARD)
    except FileNotFoundError:
        old = None
    if old == text:
        return
    if old is not None and MARK.encode() not in old:
        say(f"{hub.url}: the {CARD} there is somebody's own and stays")
        return
    from huggingface_hub import CommitOperationAdd

    _send(hub, [CommitOperationAdd(CARD, text)], "The card")


def _commit(hub: HubObjects, files: dict[str, Path], message: str, moved: Callable[[int], None]) -> None:
    from huggingface_hub import CommitOperationAdd

    _send(hub, [CommitOperationAdd(hub.path_of(name), str(path)) for name, path in files.items()], message)
    for path in files.values():
        moved(path.stat().st_size)


def _send(hub: HubObjects, operations: "list[CommitOperationAdd]", message: str) -> None:
    from huggingface_hub import HfApi

    with _explained(hub):
        HfApi().create_commit(
            hub.repo, operations, commit_message=message, repo_type="dataset", revision=hub.revision or "main"
        )
    hub.look_again()


def make_dataset(hub: HubObjects) -> None:
    """A private data set of this name, if there is none."""
    from huggingface_hub import HfApi

    with _explained(hub):
        if not HfApi().repo_exists(hub.repo, repo_type="dataset"):
            HfApi().create_repo(hub.repo, repo_type="dataset", private=True, exist_ok=True)
            say(f"{hub.url}: a new private data set")


@contextmanager
def _explained(hub: HubObjects) -> Iterator[None]:
    try:
        yield
    except VlsiCacheError:
        raise
    except Exception as error:  # of huggingface_hub and the HTTP library beneath it
        what = f"`{hub.url}` cannot be written ({(str(error).splitlines() or [''])[0]})"
        hint = "are you logged in (hf auth login), with a token that may write there, and is the hub up?"
        raise StoreError(what, file=hub.url, hint=hint) from error
