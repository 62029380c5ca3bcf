"""Comparing caches: equal ones are equal, and every kind of difference is named with both values."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.caches import Case, build, copy_cache, header_of, make_case, standard_case
from helpers.profiles import build_with

from vlsi_cache.errors import CacheIncompleteError, CacheNotFoundError, SpecError
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.store import reader
from vlsi_cache.store.derive.prune import prune
from vlsi_cache.store.diff import diff
from vlsi_cache.store.writer import CacheWriter


def exact(root: Path, case: Case) -> reader.Cache:
    return build_with(root, case, header_of(case).model_copy(update={"profile": "exact"}))


def with_rows(case: Case, index: int, **arrays: np.ndarray) -> Case:
    part = case.parts[index]
    assert part.rows is not None
    rows = SparseRows(**{**vars(part.rows), **arrays})
    return replace(case, parts=[*case.parts[:index], replace(part, rows=rows), *case.parts[index + 1 :]])


def test_equal_caches(built: Path, tmp_path: Path) -> None:
    found = diff(built, copy_cache(built, tmp_path / "copy"))
    assert found.is_equal
    assert str(found) == "equal: 7 samples in both, the rows of 7 compared"
    assert found.as_dict()["equal"] is True
    assert [layer.same_top1 for layer in found.layers] == [1.0] * 4
    assert diff(built, built, samples=0).is_equal
    assert diff(built, built, samples=3).num_compared == 3


def test_every_number_is_what_it_says(tmp_path: Path) -> None:
    """Two rows of three and four kept words, worked out by hand."""
    case = make_case([[2]], ["a"], num_layers=1, top_k=3, num_tail=1)
    p_a = np.array([[0.5, 0.2, 0.1], [0.6, 0.2, 0.1]])
    p_b = np.array([[0.4, 0.3, 0.1], [0.6, 0.2, 0.1]])
    ids_a, ids_b = np.array([[[5, 6, 7], [1, 2, 3]]]), np.array([[[6, 5, 8], [1, 2, 3]]])
    entropy, tails = np.array([[1.0, 2.0]], np.float32), [1 - p.sum(1, keepdims=True).T for p in (p_a, p_b)]
    one, other = (
        exact(
            tmp_path / name,
            with_rows(
                case,
                0,
                ids_LTK=ids,
                logprobs_LTK=np.log(p)[None].astype(np.float32),
                tail_mass_LT=tail.astype(np.float32),
                entropy_LT=entropy + np.float32(shift),
            ),
        )
        for name, ids, p, tail, shift in (("a", ids_a, p_a, tails[0], 0), ("b", ids_b, p_b, tails[1], 0.5))
    )
    found = diff(one, other)
    (layer,) = found.layers
    # token 0 shares ids 5 (0.5 against 0.3) and 6 (0.2 against 0.4); all else is one bucket of 0.3
    kl = 0.5 * np.log(0.5 / 0.3) + 0.2 * np.log(0.2 / 0.4) + 0.3 * np.log(0.3 / 0.3)
    dlogp = [np.log(0.5 / 0.3), np.log(0.4 / 0.2), 0, 0, 0]
    assert not found.is_equal
    assert (layer.num_tokens, layer.num_common, layer.only_a, layer.only_b) == (2, 5, 1, 1)
    assert layer.same_top1 == 0.5
    assert layer.mean_kl == pytest.approx(kl / 2, abs=1e-6)
    assert layer.mean_dlogp == pytest.approx(np.mean(dlogp), abs=1e-6)
    assert layer.max_dlogp == pytest.approx(np.log(2), abs=1e-6)
    assert layer.mean_dtail == pytest.approx(0, abs=1e-6)
    assert (layer.mean_dentropy, layer.max_dentropy) == (0.5, 0.5)
    assert "50.00 %" in str(found)
    json.dumps(found.as_dict(), default=str)


def test_header_fingerprint_and_layers(built: Path, tmp_path: Path) -> None:
    small = prune(built, tmp_path / "small", layers=[2, "last"], top_k=3)
    found = diff(built, small)
    assert not found.is_equal
    assert found.fingerprint["prune.1.top_k"] == [None, 3]
    assert found.header["layers"] == [[1, 2, 3, 4], [2, 4]]
    assert [layer.layer for layer in found.layers] == [2, 4]
    assert [layer.same_top1 for layer in found.layers] == [1.0, 1.0]
    assert all(layer.only_a == 3 * layer.num_tokens and not layer.only_b for layer in found.layers)
    assert all(layer.mean_kl < 1e-6 for layer in found.layers)  # the same distribution, in coarser buckets
    assert "`prune.1.layers`: a has nothing, b has [2, 4]" in str(found)


def test_samples_tokens_and_responses(built: Path, tmp_path: Path) -> None:
    fewer = prune(built, tmp_path / "fewer", where="part > 0", tokens="entropy>2.5")
    found = diff(fewer, built)
    assert (found.only_a, found.only_b) == ([], ["sample-0", "sample-1"])
    assert (found.tokens_only_a, found.tokens_only_b) == (0, 22 - fewer.num_tokens)
    assert "2 samples only in b: 'sample-0', 'sample-1'" in str(found)
    case = standard_case()
    part = case.parts[0]
    changed = replace(
        part, response_ids=[part.response_ids[0] + 1, part.response_ids[1]], digests=["new", "digest-sample-1"]
    )
    other = build(tmp_path / "other", replace(case, parts=[changed, *case.parts[1:]]))
    found = diff(built, other)
    assert (found.other_responses, found.other_records, found.num_compared) == (["sample-0"], ["sample-0"], 6)
    assert "error: 1 samples have other response ids: 'sample-0'" in str(found)
    assert not found.is_equal


def test_caches_with_nothing_in_common(built: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", make_case([[1]], ["\u00e9 one token"], num_layers=5, vocab_size=50))
    found = diff(built, other)
    assert (found.num_common, found.num_compared) == (0, 0)
    assert "no rows to compare" in str(found)
    empty = build(tmp_path / "empty", make_case([], []))
    assert diff(empty, empty).is_equal
    assert diff(built, empty).only_a == [f"sample-{i}" for i in range(7)]


def test_other_ranks_and_profiles_alone(tmp_path: Path) -> None:
    case = standard_case()
    one = exact(tmp_path / "one", case)
    other = exact(tmp_path / "other", replace(case, id_of_rank=case.id_of_rank[::-1].copy()))
    found = diff(one, other)
    assert list(found.header) == ["id_of_rank_xxh3"]
    assert all(layer.is_equal for layer in found.layers)
    found = diff(one, prune(one, tmp_path / "fast", profile="fast"))
    assert all(layer.same_top1 == 1 and 0 < layer.max_dlogp < 0.005 for layer in found.layers)


def test_caches_that_cannot_be_compared(built: Path, tmp_path: Path) -> None:
    case = standard_case()
    CacheWriter.create_or_resume(tmp_path / "half", header_of(case), case.vocab_order).write_part(0, case.parts[0])
    with pytest.raises(CacheIncompleteError):
        diff(built, tmp_path / "half")
    with pytest.raises(CacheNotFoundError):
        diff(tmp_path / "nowhere", built)
    with pytest.raises(SpecError, match="samples -1"):
        diff(built, built, samples=-1)
