"""Caches on the stores of the tests: their URLs, copies as any tool makes them, and whether rows are the same."""

import uuid
from pathlib import Path

import numpy as np
from helpers.caches import file_bytes

from vlsi_cache.store.location import UrlPath, place_of
from vlsi_cache.store.reader import Cache
from vlsi_cache.store.remote.objects import Objects, open_objects


def new_url(scheme: str = "memory") -> str:
    return f"{scheme}://bucket/{uuid.uuid4().hex}"


def objects_of(url: str) -> Objects:
    place = place_of(url)
    assert isinstance(place, UrlPath)
    return open_objects(place)


def copied(root: Path, scheme: str = "memory") -> str:
    """The URL of a cache as any tool copies a folder."""
    url = new_url(scheme)
    objects = objects_of(url)
    for name, content in file_bytes(root).items():
        objects.put(name, content)
    return url


def assert_same_rows(one: Cache, other: Cache, layers: list[int | str] | None = None) -> None:
    assert list(one) == list(other)
    for name in one:
        for key, value in vars(one.row(name, layers)).items():
            assert np.array_equal(value, getattr(other.row(name, layers), key)), (name, key)
