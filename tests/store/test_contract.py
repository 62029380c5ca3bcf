"""The rows-to-tokens contract of a cache: in the header, in what is made of it, and never mixed with another."""

import json
from pathlib import Path

import pytest
from helpers.caches import build, header_of, make_case, standard_case
from helpers.profiles import build_with

from vlsi_cache.errors import CacheCorruptError, FingerprintMismatchError
from vlsi_cache.report.describe import describe_cache, description_text
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.store import reader
from vlsi_cache.store.derive.merge import merge
from vlsi_cache.store.derive.prune import prune
from vlsi_cache.store.diff import diff
from vlsi_cache.store.format import sealed_json


def contract_cache(root: Path, prefix: str, contract: int) -> reader.Cache:
    case = make_case([[5, 1], [3]], [f"{prefix}{i}" for i in range(3)], num_layers=3)
    return build_with(root, case, header_of(case).model_copy(update={"contract": contract}))


def test_a_cache_without_the_field_is_of_contract_1(tmp_path: Path) -> None:
    cache = contract_cache(tmp_path / "c", "a", 1)
    assert "contract" not in json.loads((tmp_path / "c" / "cache.json").read_text())
    assert cache.header.contract == 1
    assert describe_cache(cache.path)["contract"] == 1


def test_contract_2_is_stored_shown_and_inherited(tmp_path: Path) -> None:
    cache = contract_cache(tmp_path / "c", "a", 2)
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["contract"] == 2
    facts = describe_cache(cache.path)
    assert facts["contract"] == 2
    assert "rows-to-tokens contract 2" in description_text(facts)
    small = prune(cache, tmp_path / "small", top_k=3)
    both = merge([cache, contract_cache(tmp_path / "d", "b", 2)], tmp_path / "both")
    assert (small.header.contract, both.header.contract) == (2, 2)
    assert small.verify(deep=True).ok


def test_contracts_do_not_mix(tmp_path: Path) -> None:
    old, new = contract_cache(tmp_path / "old", "a", 1), contract_cache(tmp_path / "new", "b", 2)
    assert old.header.digest != new.header.digest
    with pytest.raises(FingerprintMismatchError, match=r"`contract`: .*old` has 1, .*new` has 2"):
        merge([old, new], tmp_path / "both")
    with pytest.raises(FingerprintMismatchError, match=r"`contract`: the cache has 1, this run has 2"):
        contract_cache(tmp_path / "old", "a", 2)
    assert diff(old, new).header["contract"] == [1, 2]


@pytest.mark.parametrize("wrong", [0, -1, True, 1.0, "2", None, 10**30])
def test_other_values_are_refused(tmp_path: Path, wrong: object) -> None:
    path = build(tmp_path / "c", standard_case()) / "cache.json"
    value = json.loads(path.read_text())
    del value["xxh3"]
    path.write_bytes(sealed_json({**value, "contract": wrong}))
    with pytest.raises(CacheCorruptError, match=r"cache\.json`: field `contract`: .*, got "):
        reader.open(tmp_path / "c")


def test_rows_know_the_vocabulary_and_the_temperatures(tmp_path: Path) -> None:
    build(tmp_path / "c", standard_case())
    cache = reader.open(tmp_path / "c")
    row = cache["sample-0"]
    for rows in (row, row.layer(-1), row.tokens(slice(1)), row.padded_to(9), SparseRows.concat([row, row])):
        assert (rows.vocab_size, rows.taus) == (100, (1.0,))
    assert {(one.vocab_size, one.taus) for one in cache.read_part(1, ["last"])} == {(100, (1.0,))}
