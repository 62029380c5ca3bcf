"""Choosing what a prune keeps: samples by id, by kept mass and by expression; tokens by entropy, share and chance."""

from pathlib import Path

import numpy as np
import pytest
from helpers.caches import build, make_case

from vlsi_cache.errors import SampleNotFoundError, SpecError
from vlsi_cache.sparse.rows import keyed_uniforms
from vlsi_cache.store import reader
from vlsi_cache.store.derive.prune import prune


def test_samples_by_id(root: Path, tmp_path: Path) -> None:
    source = reader.open(root)
    file = tmp_path / "ids.txt"
    file.write_text("\ufeffsample-5\r\nsample-1\n\nsample-5\n", encoding="utf-8")
    small = prune(source, tmp_path / "small", samples=file)
    assert list(small) == ["sample-1", "sample-5"]
    assert small.header.num_samples == 2
    assert small.header.num_response_tokens == 1 + 6
    assert small.header.fingerprint["prune.1.samples"]["num"] == 2
    assert small.header.parents[0]["cuts"]["samples"]["file"] == str(file)
    for name in small:
        np.testing.assert_array_equal(small[name].logprobs_LTK, source[name].logprobs_LTK)
        np.testing.assert_array_equal(small[name].tail_ids_LTm, source[name].tail_ids_LTm)
    again = prune(source, tmp_path / "small", samples={"sample-5", "sample-1"})  # the same cut: nothing left to do
    assert list(again) == list(small)
    assert small.verify(deep=True).ok
    with pytest.raises(SampleNotFoundError, match=r"5 of 6 sample ids are not in .*: '7', 'a', 'b', ..."):
        prune(source, tmp_path / "x", samples=[*"bad7", "sample-1", "sample-1", "c"])
    with pytest.raises(SpecError, match="cannot be read"):
        prune(source, tmp_path / "x", samples=tmp_path / "nowhere.txt")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="not UTF-8"):
        prune(source, tmp_path / "x", samples=file)


def test_ids_of_every_kind(tmp_path: Path) -> None:
    names = ["\u00e9 \u2028 x", "\U0001f600", " padded ", "", "a\x85b", "plain"]
    source = reader.open(build(tmp_path / "c", make_case([[1, 1, 1], [1, 1, 1]], names)))
    file = tmp_path / "ids.txt"
    file.write_text("\n".join(names[:3]), encoding="utf-8")
    assert list(prune(source, tmp_path / "by file", samples=str(file))) == names[:3]
    assert list(prune(source, tmp_path / "by list", samples=names[3:5])) == names[3:5]
    assert list(prune(source, tmp_path / "where", where=f"id in [{names[0]!r}, {names[4]!r}]")) == [names[0], names[4]]


def test_where_reads_the_table(root: Path, tmp_path: Path) -> None:
    source = reader.open(root)
    table = source.sample_table().to_pylist()
    median = sorted(row["entropy_last"] for row in table)[3]
    expressions = {
        f"entropy > {median}": lambda row: row["entropy_last"] > median,
        f"not entropy > {median}": lambda row: row["entropy_last"] <= median,
        "tokens == 1 or part == 2": lambda row: row["num_tokens"] == 1 or row["part"] == 2,
        "2 < response_tokens <= 5": lambda row: 2 < row["num_response_tokens"] <= 5,
        "kind == 'kind' and id not in ('sample-0', 'sample-1')": lambda row: row["id"] not in ("sample-0", "sample-1"),
        "source != 'x' and kept_mass < 2 and gold_logprob < -4.5": lambda row: row["gold_logprob_last"] < -4.5,
        "tokens < response_tokens or id >= 'sample-5'": lambda row: row["id"] >= "sample-5",
        "part in {0, 2,}": lambda row: row["part"] in (0, 2),
    }
    for number, (text, wanted) in enumerate(expressions.items()):
        small = prune(source, tmp_path / str(number), where=text)
        assert list(small) == [row["id"] for row in table if wanted(row)], text


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch owned')",
        "(lambda: 1)() == 1",
        "entropy.__class__ == 1",
        "id == open('x').read()",
        "[x for x in (1,)] == 1",
        "entropy > (1).__class__",
        "f'{entropy}' == 'a'",
        "(tokens := 3) > 2",
        "tokens ** 99999999 > 1",
        "tokens > 9 ** 9 ** 9",
        "entropy",
        "not entropy",
        "entropy > '1'",
        "id == 1",
        "kind in 'abc'",
        "kind in ['a', 1]",
        "'a' in kind",
        "kind in [id]",
        "entropy is 1",
        "1 == 1",
        "nothing > 1",
        "entropy > None",
        "entropy > True",
        "entropy > -'a'",
        "entropy = 1",
        "entropy > 1; import os",
        "",
        "(" * 500,
        "not " * 2000 + "entropy > 1",
        "\0",
        "entropy > 1 #" + "x" * 20_000,
    ],
)
def test_where_evaluates_nothing_else(root: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match=r"compare the columns id, kind, source, tokens, .*, part with"):
        prune(root, tmp_path / "new", where=text)
    assert not (tmp_path / "new").exists()


def test_kept_mass(root: Path, tmp_path: Path) -> None:
    source = reader.open(root)
    masses = dict(zip(source, source.sample_table()["kept_mass"].to_pylist(), strict=True))
    limit = sorted(masses.values())[3]
    assert list(prune(source, tmp_path / "s", min_kept_mass=limit)) == [
        n for n, mass in masses.items() if mass >= limit
    ]


def test_tokens_by_entropy(root: Path, tmp_path: Path) -> None:
    source = reader.open(root)
    plan = prune(source, tmp_path / "small", tokens="entropy>2.5", dry_run=True)
    small = prune(source, tmp_path / "small", tokens=" entropy > 2.5 ")
    assert small.num_tokens == plan.num_tokens < source.num_tokens
    assert small.header.num_response_tokens == source.header.num_response_tokens
    for name in source:
        got, want = small[name], source[name]
        index = np.flatnonzero(want.entropy_LT[-1] > 2.5)
        np.testing.assert_array_equal(got.positions_T, index)
        np.testing.assert_array_equal(got.response_ids_R, want.response_ids_R)
        for field in ("ids_LTK", "logprobs_LTK", "tail_ids_LTm", "lse_LTn", "entropy_LT", "tail_mass_LT"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field)[:, index])
    assert 0 in small.sample_table()["num_tokens"].to_pylist()  # a sample may be left without rows, and stays
    assert list(small) == list(source)
    assert small.verify(deep=True).ok


def test_tokens_by_share_compose(root: Path, tmp_path: Path) -> None:
    source = reader.open(root)
    half = prune(source, tmp_path / "half", tokens="top:0.5")
    counts = {index: sum(row.num_tokens for row in source.read_part(index)) for index in source.parts}
    assert half.num_tokens == sum(-(-count // 2) for count in counts.values())
    fewer = prune(half, tmp_path / "fewer", tokens="entropy>4", top_k=2, where="tokens > 0")
    for name in fewer:
        got, want = fewer[name], source[name]
        assert set(got.positions_T) <= set(half[name].positions_T)
        np.testing.assert_array_equal(got.ids_LTK, want.ids_LTK[:, got.positions_T, :2])
        assert (got.entropy_LT[-1] > 4).all()
    assert fewer.verify(deep=True).ok
    assert {"prune.1.tokens", "prune.2.tokens", "prune.2.top_k"} <= fewer.header.fingerprint.keys()


def test_tokens_at_random_are_those_of_a_build_and_drawn_anew_after_it(tmp_path: Path) -> None:
    case = make_case([[400, 300], [500]], ["a", "b", "c"], num_layers=2, top_k=2, num_tail=0)
    source = reader.open(build(tmp_path / "source", case))
    small = prune(source, tmp_path / "small", tokens="random:0.5")
    for name in source:
        drawn = keyed_uniforms(f"0\0tokens\0{name}", (len(source[name].response_ids_R),)) < 0.5
        np.testing.assert_array_equal(small[name].positions_T, np.flatnonzero(drawn))
    again = prune(small, tmp_path / "again", tokens="random:0.5")
    assert 0.2 < again.num_tokens / source.num_tokens < 0.3
