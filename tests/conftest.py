"""Tiny models, rows and specs that the tests share; everything is made here, nothing is fetched."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import save_model, write_spec

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLSI_CACHE_ROWS"] = "off"  # no test finds what another one has left

gc.disable()  # until everything is imported


# The files that take longest, first: the last ones are then short, and no process waits long for the other.
LONGEST = (
    "test_demo_run", "test_tables", "test_vlms", "test_ablate", "test_damage", "test_distill_rows", "test_benchmarks",
    "test_acceptance", "test_recompute", "test_demo_data", "test_distill", "test_training", "test_prune",
    "test_batch_reduction", "test_crafted", "test_run_damage", "test_commands", "test_scale", "test_field_defects",
    "test_verbalizer_subsets", "test_heldout", "test_student_verbalizers", "test_trace", "test_merge", "test_examples",
    "test_generate", "test_build", "test_build_batches", "test_pages", "test_runs",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What torch and transformers are made of lives until the end: the collector need not go through it again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _nothing_waits_for_the_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test cuts the power: what was flushed and what was not look alike. Children of their own still flush."""
    from vlsi_cache import io

    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_disk":  # what is flushed, and when
            for name in ("fsync_file", "fsync_dir", "fsync_tree"):
                patch.setattr(io, name, lambda path: None if os.path.lexists(path) else os.stat(path))
            patch.setattr(os, "fsync", os.fstat)
        yield


# Where figures are looked at. Elsewhere a page gets the first figure of its kind again: drawing one takes longer than
# training a tiny student.
DRAW_ALL = ("test_ablation_report", "test_checkup", "test_match", "test_pages", "test_stats")
_drawn: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def _each_kind_of_figure_is_drawn_once(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.stem in DRAW_ALL:
        yield
        return
    from vlsi_cache.report import ablation, figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "ablation_dots", _drawn_once(ablation.ablation_dots))
        for name, function in list(vars(figures).items()):
            own = getattr(function, "__module__", "") == figures.__name__
            if own and name != "svg_of" and getattr(function, "__annotations__", {}).get("return") is str:
                patch.setattr(figures, name, _drawn_once(function))
        assert figures.loss_curves.__name__ == "drawn"
        yield


def _drawn_once(draw: Callable[..., str]) -> Callable[..., str]:
    def drawn(*args: Any, **options: Any) -> str:
        if draw.__name__ not in _drawn:
            _drawn[draw.__name__] = draw(*args, **options)
        return _drawn[draw.__name__]

    return drawn


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("teacher"), num_layers=5, hidden=32, seed=1)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("student"), num_layers=3, hidden=16, seed=2, padding=3)


@pytest.fixture
def spec_file(tmp_path: Path, teacher_folder: Path) -> Path:
    return write_spec(tmp_path, teacher_folder)


@pytest.fixture
def part_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A part cache of this test's own, for caches on object stores."""
    monkeypatch.setenv("VLSI_CACHE_DIR", str(tmp_path / "part-cache"))
    return tmp_path / "part-cache"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    from vlsi_cache_cli.main import main

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlsi-cache", *map(str, words)])
        code = main()
        out, err = capsys.readouterr()
        return code, out, err

    return call
