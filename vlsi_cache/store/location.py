"""Where a cache is: a folder, or a URL on an object store.

`place_of` turns what a user names into a path. A `UrlPath` prints as its URL and joins like any other path, so that
messages and records name a cache in one way wherever it lies; nothing can be opened by it.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vlsi_cache.io import refuse_url

SCHEMES = ("s3", "gs", "az", "hf", "memory")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)  # pathlib makes s3:/bucket of s3://bucket


class UrlPath(type(Path())):
    """A place on an object store, as a path whose text is the URL."""

    __slots__ = ()

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def __fspath__(self) -> str:
        return str(self)

    def resolve(self, strict: bool = False) -> "UrlPath":
        """Itself: a URL is absolute."""
        del strict
        return self

    def absolute(self) -> "UrlPath":
        return self

    @property
    def scheme(self) -> str:
        return self.parts[0].removesuffix(":")

    @property
    def bucket(self) -> str:
        return self.parts[1] if len(self.parts) > 1 else ""

    @property
    def key(self) -> str:
        """The path in the bucket, without a slash in front; empty for the bucket itself."""
        return "/".join(self.parts[2:])


def place_of(path: str | os.PathLike[str], what: str = "cache") -> Path:
    """The folder or the URL that `path` names; a `file://` URL is a folder.

    Raises SpecError for a URL of another kind, and for one without a bucket; `what` names the setting.
    """
    found = _URL.fullmatch(os.fspath(path))
    if found is None:
        return Path(path)
    scheme, rest = found[1].lower(), found[2]
    if scheme == "file":
        return Path(unquote(urlsplit(f"file:///{rest}").path))
    place = UrlPath(f"{scheme}:/{rest}")
    if scheme not in SCHEMES or not place.bucket:
        refuse_url(path, what)
    return place
