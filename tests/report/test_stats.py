"""Statistics of layers and the proposal of layers to drop, against small oracles over all rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.fakes import LAYERS, write_cache
from helpers.pages import checked

from vlsi_cache.errors import CacheIncompleteError, SpecError
from vlsi_cache.report import figures as heat_maps
from vlsi_cache.report.figures import some_ticks
from vlsi_cache.report.layers import (
    CacheStats,
    big_number,
    cache_stats,
    gold_ids,
    gold_ranks,
    kl_tokens_of_part,
    position_edges,
    removal_order,
    spaced,
    stats_text,
    suggest_layers,
    suggestion_text,
)
from vlsi_cache.report.pages import write_stats_page
from vlsi_cache.sparse.row_kl import sparse_kl_rows
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.store.reader import Cache
from vlsi_cache.store.reader import open as open_cache


def opened(folder: Path, rows: str = "top-k", **options: int) -> Cache:
    return open_cache(write_cache(folder / "cache", rows=rows, num_parts=3, **options))


def all_rows(cache: Cache) -> SparseRows:
    return SparseRows.concat([row for part in cache.parts for row in cache.read_part(part)])


@pytest.mark.parametrize(("rows", "every"), [("top-k", 1), ("top-k", 2), ("top-p", 1), ("sampled", 1)])
def test_stats_against_the_rows(tmp_path: Path, rows: str, every: int) -> None:
    cache = opened(tmp_path, rows, every=every)
    found, whole = cache_stats(cache), all_rows(cache)
    assert (found.num_tokens, found.parts, found.row_kind == "sampled") == (
        whole.num_tokens,
        cache.parts,
        rows == "sampled",
    )
    samples = [cache[name] for name in cache]
    ranks_LT = np.concatenate([gold_ranks(row) for row in samples], axis=1)
    for index, (layer, one) in enumerate(zip(LAYERS, found.layers, strict=True)):
        entropy_T = whole.entropy_LT[index].astype(float)
        assert one.layer == layer
        assert one.entropy["mean"] == pytest.approx(entropy_T.mean())
        for name, share in {"p5": 0.05, "p50": 0.5, "p95": 0.95}.items():
            near = np.quantile(entropy_T, [max(0, share - 0.04), min(1, share + 0.04)], method="inverted_cdf")
            assert near[0] - 0.002 <= one.entropy[name] <= near[1] + 0.002
        assert one.gold_nll == pytest.approx(-whole.gold_logprob_LT[index].astype(float).mean())
        assert one.perplexity == pytest.approx(np.exp(one.gold_nll))
        assert one.gold_in_top_k == pytest.approx((ranks_LT[index] >= 0).mean())
        assert one.gold_is_top == pytest.approx((ranks_LT[index] == 0).mean())
        same_T = whole.ids_LTK[index, :, 0] == whole.ids_LTK[-1, :, 0]
        assert one.top1_agreement == pytest.approx(same_T.mean())
        if rows != "sampled":
            assert one.kept_mass is not None
            assert one.kept_mass["mean"] == pytest.approx(1 - whole.tail_mass_LT[index].astype(float).mean())
            assert one.kept_mass["p1"] <= one.kept_mass["p50"]
    check_positions(found, samples)
    assert found.entropy_share_LB.sum(1) == pytest.approx(1)


def check_positions(found: CacheStats, samples: list) -> None:
    positions_T = np.concatenate([row.positions_T for row in samples]).astype(int)
    entropy_LT = np.concatenate([row.entropy_LT for row in samples], axis=1)
    edges = [*found.position_edges_P.tolist(), 10**9]
    for index in range(len(edges) - 1):
        chosen_T = (positions_T >= edges[index]) & (positions_T < edges[index + 1])
        assert found.tokens_P[index] == chosen_T.sum()
        if chosen_T.any():
            np.testing.assert_allclose(found.entropy_LP[:, index], entropy_LT[:, chosen_T].mean(1), rtol=1e-5)


@pytest.mark.parametrize("rows", ["top-k", "top-p"])
def test_kl_columns_are_means_over_tokens(tmp_path: Path, rows: str) -> None:
    cache = opened(tmp_path, rows)
    found, whole = cache_stats(cache), all_rows(cache)
    assert found.kl_tokens == whole.num_tokens
    for i in range(len(LAYERS) - 1):
        there = sparse_kl_rows(whole.layer(i), whole.layer(i + 1)).mean()
        back = sparse_kl_rows(whole.layer(i + 1), whole.layer(i)).mean()
        last = sparse_kl_rows(whole.layer(i), whole.layer(-1)).mean()
        one = found.layers[i]
        assert (one.kl_to_next, one.kl_from_next) == (pytest.approx(there), pytest.approx(back))
        assert one.kl_to_last == pytest.approx(last)
    assert (found.layers[-1].kl_to_next, found.layers[-1].kl_to_last) == (None, 0.0)
    for part in (found.as_dict(), cache_stats(cache).as_dict()):
        assert json.dumps(part, allow_nan=False) == json.dumps(found.as_dict(), allow_nan=False)


def test_the_profile_changes_little(tmp_path: Path) -> None:
    kl = [
        cache_stats(open_cache(write_cache(tmp_path / profile, profile=profile))).kl_LL
        for profile in ("exact", "default", "fast")
    ]
    np.testing.assert_allclose(kl[1], kl[0], rtol=0.02, atol=1e-3)
    np.testing.assert_allclose(kl[2], kl[0], rtol=0.02, atol=1e-3)


def test_some_parts_and_all_parts(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    assert cache_stats(cache, parts=2).parts == [0, 2]
    assert cache_stats(cache, parts=0).parts == [0, 1, 2]
    assert "from 2 evenly spaced of 3 parts" in stats_text(cache_stats(cache, parts=2))
    assert (spaced(range(100), 1), spaced([], 4), spaced(range(3), 0)) == ([0], [], [0, 1, 2])
    assert (kl_tokens_of_part(8), kl_tokens_of_part(64), kl_tokens_of_part(10**6)) == (512, 256, 1)
    assert position_edges(cache).tolist() == [0, 1, 2, 3, 4, 6]


def test_rows_of_draws_leave_columns_out_and_say_so(tmp_path: Path) -> None:
    cache = opened(tmp_path, "sampled")
    found = cache_stats(cache)
    assert found.kl_LL is None
    assert found.as_dict()["kl_between_layers"] is None
    assert {one.kept_mass for one in found.layers} == {None}
    text = stats_text(found)
    assert "the rows are draws" in text
    assert "KL to next" not in text
    html = checked(write_stats_page(found, tmp_path / "s.html"), num_figures=3)
    assert "the rows are draws" in html
    with pytest.raises(SpecError, match="rows of draws"):
        suggest_layers(cache)


def test_the_page_stands_alone_and_is_the_same_every_time(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    html = checked(write_stats_page(cache_stats(cache), tmp_path / "s.html"), num_figures=4)
    assert "KL to next" in html
    assert "Layers of cache fake" in html
    assert write_stats_page(cache_stats(cache), tmp_path / "t.html").read_text() == html


def test_an_unfinished_cache_has_statistics_once_it_has_a_part(tmp_path: Path) -> None:
    half = open_cache(write_cache(tmp_path / "half", num_written=1), allow_incomplete=True)
    assert cache_stats(half).num_tokens == half.num_tokens
    empty = open_cache(write_cache(tmp_path / "empty", num_written=0), allow_incomplete=True)
    with pytest.raises(CacheIncompleteError, match="nothing to measure"):
        cache_stats(empty)


def test_maps_of_many_layers_are_labelled_now_and_then() -> None:
    num = 81
    svg = heat_maps.kl_map(np.random.default_rng(0).random((num, num)), [str(n) for n in range(num)])
    assert 20 < svg.count("<text") < 80
    for num, most in ((1, 5), (6, 5), (20, 10), (81, 25)):
        ticks = some_ticks(num, most)
        assert ticks == sorted(set(ticks))
        assert (ticks[-1], len(ticks) <= most + 1) == (num - 1, True)
    assert [big_number(x) for x in (3.14159, 12345.6, 3e9, float("inf"))] == ["3.142", "12,346", "3.0e+09", "inf"]


def test_removal_order_by_hand() -> None:
    kl_LL = np.array(
        [
            [0.0, 0.3, 0.9, 2.0],
            [0.2, 0.0, 0.1, 0.5],
            [0.8, 0.4, 0.0, 0.35],
            [3.0, 2.0, 1.0, 0.0],
        ]
    )
    # 1 goes to 2 (0.1); then 2 has 0 (0.8) and 3 (0.35), and 0 has 2 (0.9); then 0 has 3 alone
    assert removal_order(kl_LL) == [(1, 2, 0.1), (2, 3, 0.35), (0, 3, 2.0)]
    assert removal_order(np.zeros((3, 3))) == [(1, 2, 0.0), (0, 2, 0.0)]
    assert removal_order(np.zeros((1, 1))) == []


def test_suggested_layers(tmp_path: Path) -> None:
    cache = opened(tmp_path, "top-p")
    stats, found = cache_stats(cache), suggest_layers(cache, keep=2)
    assert found.tokens == stats.kl_tokens
    assert [LAYERS.index(one.layer) for one in found.order] == [i for i, _, _ in removal_order(stats.kl_LL)]
    assert (len(found.layers), found.layers[-1], found.num_dropped) == (2, LAYERS[-1], 2)
    assert sorted([*found.layers, *found.dropped]) == LAYERS
    assert found.worst_kl >= max(one.kl for one in found.order[:1])
    assert all(0 < one.kept_mass < 1 for one in found.order)
    assert json.loads(json.dumps(found.as_dict()))["dropped"] == found.dropped
    text = suggestion_text(found)
    assert text.count("drop\n") == 2
    assert f"--layers {found.layers[0]},last" in text
    assert "keep less than half of their mass" in text


def test_limits_of_a_suggestion(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    free = suggest_layers(cache)
    assert (free.layers, free.num_dropped, len(free.order)) == (LAYERS, 0, len(LAYERS) - 1)
    assert "nothing is dropped" in suggestion_text(free)
    first, second, *_ = (one.kl for one in free.order)
    assert suggest_layers(cache, max_kl=first).num_dropped == 1
    assert suggest_layers(cache, max_kl=first * 0.99).layers == LAYERS
    assert suggest_layers(cache, max_kl=100).layers == LAYERS[-1:]
    assert suggest_layers(cache, keep=1, max_kl=max(first, second)).num_dropped >= 2
    assert suggest_layers(cache, keep=3, max_kl=100).num_dropped == 1
    for options in ({"keep": 0}, {"keep": 5}, {"max_kl": -1.0}, {"max_kl": float("nan")}):
        with pytest.raises(SpecError, match=next(iter(options))):
            suggest_layers(cache, **options)


def test_padding_is_never_the_response_word(tmp_path: Path) -> None:
    """Padding has id 0: a response word 0 that was cut off has no rank."""
    cache = opened(tmp_path, "top-p")
    for row in (cache[name] for name in cache):
        ranks_LT = gold_ranks(row)
        assert (ranks_LT < row.widths_LT).all()
        gold_T = gold_ids(row)
        for layer, t in np.argwhere(ranks_LT < 0):
            assert gold_T[t] not in row.ids_LTK[layer, t, : row.widths_LT[layer, t]]
