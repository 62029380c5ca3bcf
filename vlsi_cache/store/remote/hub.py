"""A data set of the Hugging Face hub as objects: hf://datasets/ORG/NAME[@REVISION][/FOLDER].

The revision is resolved to its commit once: whatever is read afterwards is of one state, for as long as this lives.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from vlsi_cache.errors import CacheCorruptError, SpecError, StoreError, VlsiCacheError
from vlsi_cache.store.location import UrlPath

from .objects import Got

MAX_RETRIES = 5
READ_ONLY = "a finished cache is put there with: vlsi-cache push CACHE hf://datasets/ORG/NAME"


class HubObjects:
    """The files of one commit, below one folder. Safe to use from several threads."""

    def __init__(self, url: UrlPath) -> None:
        pieces = url.key.split("/")
        if url.bucket != "datasets" or len(pieces) < 2:
            raise SpecError(f"`{url}` names no data set of the hub; write hf://datasets/ORG/NAME or .../NAME@REVISION")
        name, _, revision = pieces[1].partition("@")
        self.url, self.repo = url, f"{pieces[0]}/{name}"
        self.revision, self._folder = revision or None, "/".join(pieces[2:])

    def look_again(self) -> None:
        """Read from the newest commit from now on."""
        self.__dict__.pop("_commit", None)

    @cached_property
    def _commit(self) -> str:
        from huggingface_hub import HfApi

        with self._explained(""):
            info = HfApi().dataset_info(self.repo, revision=self.revision)
        assert info.sha is not None
        return info.sha

    def get_top(self, name: str) -> bytes:
        """A file of the data set itself, whatever folder the cache is in."""
        return HubObjects(UrlPath(f"hf://datasets/{self.repo}@{self._commit}")).get(name).data

    def get(self, key: str, *, span: tuple[int, int] | None = None, etag: str | None = None) -> Got:
        """A file, or its bytes `span`; FileNotFoundError, CacheCorruptError, StoreError. The ETag is the commit."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        del etag  # of this commit, as everything here
        headers: dict[str, Any] = build_hf_headers()
        # Bytes of the file itself are counted: no encoding on the way.
        headers |= {"Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={span[0]}-{span[1] - 1}"} if span is not None else {}
        place = hf_hub_url(self.repo, self.path_of(key), repo_type="dataset", revision=self._commit)
        with self._explained(key):
            answer = http_backoff("GET", place, headers=headers, max_retries=MAX_RETRIES)
            hf_raise_for_status(answer)
        data = answer.content
        if span is not None and len(data) != span[1] - span[0]:
            what = f": {len(data)} bytes at {span[0]}, and {span[1] - span[0]} were asked for"
            raise CacheCorruptError.at(self.url / key, what)
        return Got(data, self._commit)

    def get_unless(self, key: str, etag: str | None) -> Got | None:
        """A file; None if it was read from this commit before."""
        return None if etag == self._commit else self.get(key)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """The size of every file below `prefix`."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        folder, cut = self.path_of(prefix), len(self._folder) + 1 if self._folder else 0
        try:
            with self._explained(prefix):
                found = list(
                    HfApi().list_repo_tree(
                        self.repo, folder or None, recursive=True, revision=self._commit, repo_type="dataset"
                    )
                )
        except FileNotFoundError:
            return {}
        return {one.path[cut:]: one.size for one in found if isinstance(one, RepoFile)}

    def put(self, key: str, data: bytes | Path) -> None:
        del data
        raise SpecError(f"`{self.url / key}` cannot be written", hint=READ_ONLY)

    def put_new(self, key: str, data: bytes) -> bool:
        del data
        raise SpecError(f"`{self.url / key}` cannot be written", hint=READ_ONLY)

    def delete(self, keys: list[str]) -> None:
        raise SpecError(f"`{self.url / keys[0]}` cannot be deleted", hint=READ_ONLY)

    def path_of(self, key: str) -> str:
        """A file of the cache by its path in the data set."""
        return "/".join(piece for piece in (self._folder, key) if piece)

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn what huggingface_hub raises into our errors."""
        from huggingface_hub import errors as of

        place = self.url / key if key else self.url
        try:
            yield
        except of.EntryNotFoundError as error:
            raise FileNotFoundError(str(place)) from error
        except (of.GatedRepoError, of.RepositoryNotFoundError, of.RevisionNotFoundError) as error:
            what = f"there is no data set at `{self.url}` that you may read"
            hint = "is the address right? for one that is private or gated log in with: hf auth login"
            raise StoreError(what, file=self.url, hint=hint) from error
        except VlsiCacheError:
            raise
        except Exception as error:  # of the HTTP library beneath it, which changes from release to release
            what = f"`{place}` cannot be read ({(str(error).splitlines() or [''])[0]})"
            raise StoreError(what, file=place, hint="is the address right, and the hub up?") from error
