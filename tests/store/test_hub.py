"""A cache in a data set of the Hugging Face hub, read through huggingface_hub from a hub on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.caches import file_bytes
from helpers.hub import COMMIT, serving_hub
from helpers.remote import assert_same_rows
from huggingface_hub import constants

import vlsi_cache as vc
from vlsi_cache.errors import CacheNotFoundError, SpecError, StoreError

pytestmark = pytest.mark.usefixtures("part_cache_dir")
URL = "hf://datasets/org/charts"


@pytest.fixture
def hub(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was asked of a hub that holds the cache in the folder `cache` of a data set."""
    with serving_hub(built.parent) as (address, asked):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield asked


def test_it_reads_as_the_folder(hub: list[str], built: Path, tmp_path: Path) -> None:
    url = f"{URL}/cache"
    assert_same_rows(vc.open_cache(built), vc.open_cache(url), ["last"])
    assert all(COMMIT in path for path in hub if "/resolve/" in path)
    vc.pull(url, tmp_path / "back")
    assert file_bytes(tmp_path / "back") == file_bytes(built)
    assert vc.inspect(f"{URL}@main/cache")["num_samples"] == 7


def test_what_cannot_be(hub: list[str], built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del hub
    with pytest.raises(CacheNotFoundError, match=f"`{URL}` is not a cache, but holds 1: `{URL}/cache`"):
        vc.open_cache(URL)
    with pytest.raises(StoreError, match=r"there is no data set at `hf://datasets/org/none` .*hf auth login"):
        vc.open_cache("hf://datasets/org/none")
    with pytest.raises(SpecError, match="`hf://org/model` names no data set"):
        vc.open_cache("hf://org/model")
    with pytest.raises(SpecError, match=r"cannot be written; the hub is read here; .*hf upload ORG/NAME CACHE"):
        vc.push(built, f"{URL}/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match=f"`{URL}/cache` cannot be read .*offline mode is enabled"):
        vc.open_cache(f"{URL}/cache")
