"""The text-only instruction set: deterministic, without overlap, and made without importing what it describes."""

import sys

import pytest

from vlsi_cache.config.sections import DataSpec
from vlsi_cache.data.records import read_records
from vlsi_cache.demo import docstrings

SOME = ("textwrap", "json", "heapq", "statistics")


def _texts(split: str, number: int) -> set[str]:
    return {row["messages"][number]["content"] for row in docstrings.rows(split=split)}


def test_a_row_by_hand() -> None:
    rows = [row for split in docstrings.SPLITS for row in docstrings.rows(split=split, modules=["textwrap"])]
    row = next(row for row in rows if row["id"] == "textwrap.wrap")
    question = "What does `textwrap.wrap(text, width=70, **kwargs)` of the Python standard library do?"
    assert row["messages"] == [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "Wrap a single paragraph of text, returning a list of wrapped lines."},
    ]
    assert row["kind"] == "function"


def test_splits_share_nothing() -> None:
    assert not _texts("train", 0) & _texts("heldout", 0)
    assert not _texts("train", 1) & _texts("heldout", 1)


def test_size_and_order() -> None:
    train, heldout = (list(docstrings.rows(split=split)) for split in ("train", "heldout"))
    assert len(train) > 3000
    assert 0.08 < len(heldout) / (len(train) + len(heldout)) < 0.18
    assert list(docstrings.rows(split="train", num_samples=10)) == train[:10]
    assert list(docstrings.rows(split="train", num_samples=10, seed=1)) != train[:10]
    docstrings.entries.cache_clear()
    assert list(docstrings.rows(split="train")) == train


def test_entries_are_clean() -> None:
    entries = docstrings.entries(None)
    for field in ("name", "question", "answer"):
        assert len({getattr(entry, field) for entry in entries}) == len(entries)
    assert all(4 <= len(entry.answer.split()) <= 80 for entry in entries)
    assert not any(part.startswith("_") for entry in entries for part in entry.name.split("."))
    assert not any(entry.name.split(".")[0] in ("test", "idlelib", "lib2to3") for entry in entries)
    assert not any("(self" in entry.question for entry in entries if entry.kind == "method")


def test_nothing_is_imported() -> None:
    before = set(sys.modules)
    list(docstrings.rows(split="train", modules=["turtle", "antigravity"]))
    assert not {"turtle", "antigravity"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split is `test`, must be one of heldout, train"),
        ({"split": "train", "modules": ["nomodule"]}, "no module `nomodule`"),
        ({"split": "train", "modules": ["heapq"], "num_samples": 999}, "num_samples is 999, split `train`"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(docstrings.rows(**options))


def test_as_a_source() -> None:
    options = {"split": "train", "modules": list(SOME), "num_samples": 20}
    records = read_records(DataSpec(generator="docstrings", options=options))
    assert len(records) == 20
    assert not records.skipped
