"""What the reading commands open in a cache of many parts; and that they need no torch and no network."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.fakes import write_cache, write_many_parts, write_run
from vlsi_cache_cli.look import find_artifacts

from vlsi_cache.report.describe import MEASURED_PARTS, describe_cache, description_text

NUM_PARTS = 200
_watched: list[tuple[str, str]] | None = None


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _watched is not None and event in ("open", "os.listdir", "os.scandir"):
        _watched.append((event, str(args[0])))


@contextmanager
def watched(folder: Path) -> Iterator[list[tuple[str, str]]]:
    """Every file opened and every folder listed below `folder`; a hook cannot be taken away, so it is switched off."""
    global _watched
    if _hook not in _hooks:
        sys.addaudithook(_hook)
        _hooks.append(_hook)
    _watched = seen = []
    try:
        yield seen
    finally:
        _watched = None
        seen[:] = [(event, path) for event, path in seen if path.startswith(str(folder))]


_hooks: list[object] = []


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many_parts(tmp_path_factory.mktemp("caches") / "many", NUM_PARTS)


def test_ls_does_not_look_into_the_parts(cache: Path) -> None:
    with watched(cache.parent) as seen:
        (found,) = [one for one in find_artifacts(cache.parent) if one["path"] == str(cache)]
    assert (found["state"], found["num_samples"]) == ("complete", 3 * NUM_PARTS)
    files = [file for file in cache.rglob("*") if file.is_file() and file.relative_to(cache).parts[0] != "tmp"]
    assert found["size_bytes"] == sum(file.lstat().st_size for file in files)
    own = [(event, path) for event, path in seen if path.startswith(f"{cache}/") or path == str(cache)]
    assert [path for event, path in own if event == "open"] == [str(cache / "cache.json")]
    assert not [path for _, path in own if ".zarr" in path]
    assert len(own) < 30  # the folders of `vocab/` and a few more


def test_inspect_opens_a_few_parts_only(cache: Path) -> None:
    with watched(cache) as seen:
        facts = describe_cache(cache)
    opened = [path for event, path in seen if event == "open"]
    assert len({path.split(".zarr")[0] for path in opened if ".zarr" in path}) == MEASURED_PARTS
    assert len(opened) < 12 * MEASURED_PARTS + 3
    assert facts["measured_parts"] == [0, 66, 133, 199]
    assert "measured on 4 evenly spaced parts of 200" in description_text(facts)
    stored = sum(facts["size_bytes"][name] for name in facts["layer_bytes"][0]["by_array"])
    layers = sum(one["bytes"] for one in facts["layer_bytes"])
    assert 0.75 * stored < layers <= stored  # what is missing are the indices of the shards


COMMANDS = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "tokenizers", "huggingface_hub"}:
            raise ImportError(f"{name} is imported by a command that only looks")
sys.meta_path.insert(0, Refuse())
def refuse_network(event, args):
    if event.startswith("socket.connect"):
        raise OSError("a command that only looks wants the network")
sys.addaudithook(refuse_network)
from vlsi_cache_cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["vlsi-cache", *words]
    assert main() == 0, words
"""


def test_looking_needs_no_torch_and_no_network(tmp_path: Path) -> None:
    cache, run = write_cache(tmp_path / "cache"), tmp_path / "run"
    write_run(run)
    folder, small = str(cache), ["sample", str(cache), "sample-0"]
    lines = [["ls", str(tmp_path)], ["inspect", folder], small, ["verify", folder, "--deep"], ["specs"]]
    lines += [["stats", folder], ["stats", folder, "-o", str(tmp_path / "stats.html")]]
    lines += [["report", folder], ["report", str(run)]]
    both = [*lines, *([*line, "--json"] for line in lines)]
    child = subprocess.run([sys.executable, "-c", COMMANDS, json.dumps(both)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
