"""The objects of an object store below one URL: read, list, write once. Every error says what to do.

obstore speaks to S3, Google Cloud Storage and Azure, retries what a dropped connection or a busy server has spoilt, and
finds credentials where each cloud's own tools look for them (environment, metadata service); none is ever in a spec.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlsi_cache.errors import CacheCorruptError, SpecError, StoreError
from vlsi_cache.store.location import UrlPath

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# Eight tries over half a minute: longer than a store is busy, short enough for a person who mistyped an address.
RETRIES: Any = {
    "max_retries": 7,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
CLIENT: Any = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "10m"}
# Pieces of an upload that was killed are kept, and paid for, unseen by any listing: so what a part holds goes in one.
LARGE = 128 * 2**20
ALLOW_HTTP = ("AWS_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP")
CREDENTIALS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_KEY"),
    "az": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_ID"),
}
_memory: dict[str, Any] = {}  # the stores of memory://NAME, which live as long as the process
_lock = threading.Lock()
_used_in: int | None = None  # the process that used a store first


@dataclass(frozen=True)
class Got:
    """The bytes of an object, or of a span of it, and its ETag."""

    data: bytes
    etag: str | None


class Objects(Protocol):
    """What a reader or a writer needs of a store; keys are relative to `url`."""

    url: UrlPath

    def get(self, key: str, *, span: tuple[int, int] | None = None, etag: str | None = None) -> Got: ...
    def get_unless(self, key: str, etag: str | None) -> Got | None: ...
    def sizes(self, prefix: str = "") -> dict[str, int]: ...
    def put(self, key: str, data: bytes | Path) -> None: ...
    def put_new(self, key: str, data: bytes) -> bool: ...
    def delete(self, keys: list[str]) -> None: ...


def open_objects(url: UrlPath) -> Objects:
    """The store of a URL. Raises SpecError where the library for it is not installed."""
    if url.scheme == "hf":
        from .hub import HubObjects

        return HubObjects(url)
    return BucketObjects(url)


class BucketObjects:
    """Objects of s3://, gs://, az:// and memory://. Safe to use from several threads, which work at the same time."""

    def __init__(self, url: UrlPath) -> None:
        self.url = url
        self._store = _store_of(url)

    def get(self, key: str, *, span: tuple[int, int] | None = None, etag: str | None = None) -> Got:
        """An object, or its bytes `span`. With `etag` it must be the one that had this ETag before.

        Raises FileNotFoundError; CacheCorruptError when it is another one now, or has no such bytes; StoreError.
        """
        import obstore
        from obstore.exceptions import PreconditionError

        options: Any = {} if span is None else {"range": span}
        options |= {} if etag is None else {"if_match": etag}
        try:
            with self._explained(key, "read"):
                found = obstore.get(self._store, self._path(key), options=options)
                data = bytes(found.bytes())  # a connection that drops here goes on behind the last byte that came
        except PreconditionError as error:
            raise changed(self.url / key) from error
        if span is not None and len(data) != span[1] - span[0]:  # a range that passes the end comes back short
            what = f": {len(data)} bytes at {span[0]}, and {span[1] - span[0]} were asked for"
            raise CacheCorruptError.at(self.url / key, what)
        return Got(data, found.meta["e_tag"])

    def get_unless(self, key: str, etag: str | None) -> Got | None:
        """An object; None if it is still the one that had this ETag."""
        import obstore
        from obstore.exceptions import NotModifiedError

        try:
            with self._explained(key, "read"):
                found = obstore.get(self._store, self._path(key), options={"if_none_match": etag} if etag else {})
                return Got(bytes(found.bytes()), found.meta["e_tag"])
        except NotModifiedError:
            return None

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """The size of every object below `prefix`."""
        import obstore

        cut = len(self._path("")) + 1 if self._path("") else 0
        with self._explained(prefix, "list"):
            pages = obstore.list(self._store, self._path(prefix) or None, chunk_size=1000)
            return {one["path"][cut:]: one["size"] for page in pages for one in page}

    def put(self, key: str, data: bytes | Path) -> None:
        """Write an object; it appears whole, in place of an older one. Only a very large one travels in pieces."""
        import obstore

        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        with self._explained(key, "write"):
            obstore.put(self._store, self._path(key), data, use_multipart=size > LARGE)

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one; whether what is there now is `data`, by whomever.

        The answer to a put may be lost and the retry be told that the name is taken, by ourselves: so what is there
        decides.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            with self._explained(key, "write"):
                obstore.put(self._store, self._path(key), data, mode="create", use_multipart=False)
            return True
        except AlreadyExistsError:
            return self.get(key).data == data
        except StoreError:  # a time-out, perhaps after it was written
            try:
                found = self.get(key).data
            except (StoreError, FileNotFoundError):
                found = None
            if found is None:
                raise
            return found == data

    def replace(self, key: str, data: bytes, *, etag: str | None) -> bool:
        """Write an object in place of the one that had this ETag; whether what is there now is `data`."""
        import obstore
        from obstore.exceptions import PreconditionError

        try:
            with self._explained(key, "write"):
                there = obstore.head(self._store, self._path(key))
                if there["e_tag"] != etag:
                    return False
                known: Any = {name: there[name] for name in ("e_tag", "version") if there[name] is not None}
                obstore.put(self._store, self._path(key), data, mode=known, use_multipart=False)
            return True
        except (PreconditionError, StoreError):  # perhaps after it was written, and the answer was lost
            if self.get(key).data == data:
                return True
            raise

    def copy(self, source: str, target: str) -> None:
        """Copy an object within the store."""
        import obstore

        with self._explained(source, "read"):
            obstore.copy(self._store, self._path(source), self._path(target))

    def delete(self, keys: list[str]) -> None:
        import obstore

        if keys:
            with self._explained(keys[0], "delete"):
                obstore.delete(self._store, [self._path(key) for key in keys])

    def _path(self, key: str) -> str:
        return "/".join(piece for piece in (self.url.key, key) if piece)

    @contextmanager
    def _explained(self, key: str, verb: str) -> Iterator[None]:
        """Turn what obstore raises into StoreError; what the caller handles itself passes."""
        from obstore import exceptions as of

        place = self.url / key if key else self.url
        _refuse_fork(self.url)
        try:
            yield
        except (of.PermissionDeniedError, of.UnauthenticatedError) as error:
            hint = f"no permission to {verb} it: {_credentials_hint(self.url.scheme)}"
            raise StoreError(f"`{place}` cannot be {PARTICIPLE[verb]}", file=place, hint=hint) from error
        except (of.PreconditionError, of.NotModifiedError, of.AlreadyExistsError):
            raise
        except of.BaseError as error:
            if verb == "list" and _is_no_bucket(error):
                hint = "is the address right? whoever owns the store has to make the bucket first"
                what = f"there is no bucket `{self.url.scheme}://{self.url.bucket}`"
                raise StoreError(what, file=place, hint=hint) from error
            what = f"`{place}` cannot be {PARTICIPLE[verb]} ({_first_line(error)})"
            hint = f"is the address right, and the store up? {_credentials_hint(self.url.scheme)}"
            raise StoreError(what, file=place, hint=hint) from error


def _refuse_fork(url: UrlPath) -> None:
    """Raise StoreError in a fork of the process that used a store first: without obstore's threads it would hang."""
    global _used_in
    with _lock:
        _used_in = _used_in or os.getpid()
    if _used_in != os.getpid():
        hint = "start workers afresh, in a DataLoader with multiprocessing_context='spawn', or have none"
        raise StoreError(f"`{url}` cannot be reached in a fork of a process that reads object stores", hint=hint)


PARTICIPLE = {"read": "read", "list": "listed", "write": "written", "delete": "deleted"}


def changed(place: UrlPath | Path) -> CacheCorruptError:
    """A part of a cache never changes: whoever reads two states of it would mix them."""
    what = " has changed on the store while it was read"
    return CacheCorruptError.at(place, what, hint="run the command again once nobody writes there; it reads afresh")


def _is_no_bucket(error: BaseException) -> bool:
    """Whether a listing failed for want of a bucket: one that is there can be listed, if only as empty."""
    return " 404 " in str(error)


def _first_line(error: BaseException) -> str:
    """What a library says, without its debugging text, and not longer than a line."""
    text = (str(error).splitlines() or [""])[0].strip()
    return text if len(text) <= 300 else f"{text[:297]}..."


def _credentials_hint(scheme: str) -> str:
    names = CREDENTIALS.get(scheme, ())
    given = [name for name in names if os.environ.get(name)]
    if not names:
        return "check the address"
    if given:
        return f"the credentials are those of `{given[0]}` in the environment"
    public = "; for a public bucket set AWS_SKIP_SIGNATURE=true" if scheme == "s3" else ""
    return f"the environment names no credentials (`{names[0]}` or others), nor may this machine have any{public}"


def _store_of(url: UrlPath) -> "ObjectStore":
    try:
        from obstore.store import MemoryStore, from_url
    except ImportError as error:
        hint = "pip install 'vlsi-cache[remote]'"
        raise SpecError(f"`{url}` is on an object store, and obstore is not installed", hint=hint) from error

    if url.scheme == "memory":
        with _lock:
            return _memory.setdefault(url.bucket, MemoryStore())
    open_store: Callable[..., Any] = from_url
    # Options of the client that are given here take the place of those in the environment, of which this is one.
    plain_http = any(os.environ.get(name, "").lower() in ("true", "1") for name in ALLOW_HTTP)
    client = {**CLIENT, "allow_http": plain_http}
    try:
        return open_store(f"{url.scheme}://{url.bucket}", client_options=client, retry_config=RETRIES)
    except Exception as error:  # settings of the environment that obstore cannot use
        raise StoreError(f"`{url}` cannot be opened ({_first_line(error)})", file=url) from error
