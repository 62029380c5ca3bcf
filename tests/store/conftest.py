"""The small cache that most tests of the store read or damage."""

from pathlib import Path

import pytest
from helpers.caches import Case, build, copy_cache, standard_case


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
