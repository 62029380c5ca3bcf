"""A cache in a data set of the Hugging Face hub, read through huggingface_hub from a hub on loopback."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.caches import file_bytes
from helpers.hub import COMMIT, serving_hub
from helpers.remote import assert_same_rows
from huggingface_hub import constants

import vlsi_cache as vc
from vlsi_cache.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheNotFoundError,
    FingerprintMismatchError,
    SpecError,
    StoreError,
)
from vlsi_cache.store.remote import hub_push

pytestmark = pytest.mark.usefixtures("part_cache_dir")
URL = "hf://datasets/org/charts"


@pytest.fixture
def hub(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was asked of a hub that holds the cache in the folder `cache` of a data set."""
    with at_hub(built.parent, monkeypatch) as asked:
        yield asked


@contextmanager
def at_hub(root: Path, monkeypatch: pytest.MonkeyPatch, *, refuses_commits: bool = False) -> Iterator[list[str]]:
    """huggingface_hub speaks with a hub on loopback whose data set holds the files of `root`."""
    with serving_hub(root, refuses_commits=refuses_commits) as (address, asked):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
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
    with pytest.raises(SpecError, match=r"cannot be written; .*vlsi-cache push CACHE hf://datasets/ORG/NAME"):
        vc.prune(built, f"{URL}/new", layers=["last"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match=f"`{URL}/cache` cannot be read .*offline mode is enabled"):
        vc.open_cache(f"{URL}/cache")


def test_a_pushed_cache_is_the_one_that_is_pulled(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub_push, "COMMIT_PARTS", 2)
    root, url = tmp_path / "hub", f"{URL}/one"
    with at_hub(root, monkeypatch) as asked:
        done = vc.push(built, url)
        assert (done.num_parts, done.parts_before) == (len(vc.open_cache(built).parts), 0)
        assert "a new private data set" in capsys.readouterr().err
        assert {"org/charts private=True", "org/charts private=private"} & {*asked}  # by the version of huggingface_hub
        commits = [one for one in asked if one.startswith("commit:")]
        assert commits[:2] == ["commit: The beginning of a cache", "commit: The card"]
        assert commits[-1] == "commit: The table of samples: the cache is whole"
        assert len(commits) == 3 + -(-done.num_parts // 2)
        vc.pull(url, tmp_path / "back")
        assert file_bytes(tmp_path / "back") == file_bytes(built)
        again = vc.push(built, url)
        assert (again.parts_before, again.moved_bytes) == (done.num_parts, 0)
        assert [one for one in asked if one.startswith("commit:")] == commits
    card = (root / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n")
    cache = vc.open_cache(built)
    assert f"| cache digest | `{cache.header.digest}` |" in card
    for layer, line in zip(cache.layers, card.split("## Rows by layer")[1].splitlines()[4:], strict=False):
        rows = [cache[name].layer(cache.layers.index(layer)) for name in cache]
        kept = 1 - sum(float(one.tail_mass_LT.sum()) for one in rows) / cache.num_tokens
        assert line.startswith(f"| {layer} | {kept:.3f} |")


def test_a_killed_push_goes_on_and_another_cache_is_refused(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_push, "COMMIT_PARTS", 1)
    root, send, calls = tmp_path / "hub", hub_push._send, []

    def dies(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        send(*args)

    with at_hub(root, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(hub_push, "_send", dies)
            with pytest.raises(KeyboardInterrupt):
                vc.push(built, URL)
        with pytest.raises(CacheIncompleteError):
            vc.open_cache(URL)
        (root / "README.md").write_text("my own words")
        assert vc.push(built, URL).parts_before == 1
        assert (root / "README.md").read_text() == "my own words"
        assert_same_rows(vc.open_cache(built), vc.open_cache(URL), ["last"])
        small = vc.prune(built, tmp_path / "small", layers=["last"])
        with pytest.raises(FingerprintMismatchError):
            vc.push(small.path, URL)


def test_a_damaged_part_and_a_token_that_may_not_write(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    with (
        at_hub(tmp_path / "closed", monkeypatch, refuses_commits=True),
        pytest.raises(StoreError, match="hf auth login"),
    ):
        vc.push(copy, URL)
    file = next(
        path
        for path in sorted((copy / "parts" / "000000.zarr").rglob("*"))
        if path.is_file() and "entropy" in path.parts and "c" in path.parts
    )
    file.write_bytes(bytes(file.stat().st_size))
    with at_hub(tmp_path / "hub", monkeypatch), pytest.raises(CacheCorruptError, match=r"000000\.zarr"):
        vc.push(copy, URL)
