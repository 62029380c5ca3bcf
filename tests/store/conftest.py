"""The small cache that most tests of the store read or damage, and an S3 server for some of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.caches import Case, build, copy_cache, standard_case
from helpers.s3 import ENVIRONMENT, Proxy, make_bucket, proxied, serving


@pytest.fixture(scope="session")
def case() -> Case:
    return standard_case()


@pytest.fixture(scope="session")
def built(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished cache of `case`, to be read only."""
    return build(tmp_path_factory.mktemp("built") / "cache", case)


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return copy_cache(built, tmp_path / "cache")


@pytest.fixture(scope="session")
def server() -> Iterator[Proxy]:
    with serving() as port, proxied(port) as proxy:
        make_bucket(port, "bucket")
        yield proxy


@pytest.fixture
def s3(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """The proxy before an S3 server, where this process finds its settings."""
    server.clear()
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.endpoint}.items():
        monkeypatch.setenv(name, value)
    return server
