"""The map-style dataset: any order, any process, the same rows; and the sampler that makes it fast."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.caches import build, make_case

import vlsi_cache as vc
from vlsi_cache.errors import DataError, ModelError, SampleNotFoundError, SpecError
from vlsi_cache.store.dataset import PartWindowReader

LENGTHS = [[2, 1, 3], [1], [2, 2], [4, 1, 1, 1]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    num = sum(map(len, LENGTHS))
    return build(tmp_path_factory.mktemp("built") / "cache", make_case(LENGTHS, [f"s{i}" for i in range(num)]))


def test_every_sample_by_its_number(root: Path) -> None:
    cache = vc.open(root)
    dataset = vc.CacheDataset(cache, layers=[2, "last"])
    assert [row.sample_id for row in dataset] == list(cache)
    for index in (0, 5, -1):
        np.testing.assert_array_equal(dataset[index].ids_LTK, cache[dataset[index].sample_id].ids_LTK[[1, 3]])
    with pytest.raises(IndexError, match="sample 10 of a cache with 10 samples"):
        dataset[10]
    with pytest.raises(SpecError, match="layer `77`"):
        vc.CacheDataset(root, layers=[77])
    wanted = [7, 0, 3, 0]
    assert [row.sample_id for row in dataset.__getitems__(wanted)] == [dataset[i].sample_id for i in wanted]


def test_a_cache_is_a_mapping_with_places(root: Path) -> None:
    cache = vc.open_cache(root)
    names = list(cache)
    assert isinstance(cache, Mapping)
    assert (len(cache), list(cache.keys()), names[3] in cache, 3 in cache) == (10, names, True, False)
    assert [row.sample_id for row in cache.values()] == [name for name, _ in cache.items()] == names
    assert (cache.get("no such sample"), cache.get(names[2]).sample_id) == (None, names[2])
    for place in (0, 7, -1, -10, np.int64(4)):
        assert cache[place].sample_id == names[place]
    np.testing.assert_array_equal(cache.at(4, ["last"]).ids_LTK, cache[names[4]].ids_LTK[-1:])
    for place in (10, -11):
        with pytest.raises(IndexError, match=f"sample {place} of a cache with 10 samples"):
            cache[place]
    with pytest.raises(SampleNotFoundError, match="no sample '3'"):
        cache["3"]
    assert (cache == cache, cache == vc.open_cache(root), len({cache, cache})) == (True, False, 1)


def test_an_id_that_reads_like_a_number_is_an_id(tmp_path: Path) -> None:
    cache = vc.open_cache(build(tmp_path / "cache", make_case([[2, 1, 3]], ["2", "1", "0"])))
    assert [cache[key].sample_id for key in ("0", 0, "2", 2)] == ["0", "2", "2", "0"]


def test_a_copy_in_another_process_reads_the_same(root: Path) -> None:
    dataset = vc.CacheDataset(root, layers=["last"])
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert len(pickle.dumps(dataset)) < 1000
    assert [row.sample_id for row in copy] == [row.sample_id for row in dataset]
    assert copy[3].ids_LTK.shape[0] == 1


def test_the_sampler_gives_the_order_of_the_window_reader(root: Path) -> None:
    cache = vc.open(root)
    dataset = vc.CacheDataset(cache)
    for rank in (0, 1, 2):
        place = {"seed": 4, "rank": rank, "world": 3, "window_parts": 2}
        rows = [row.sample_id for row in PartWindowReader(cache, epoch=1, **place)]
        sampler = vc.PartWindowSampler(dataset, epoch=1, **place)
        assert [dataset[index].sample_id for index in sampler] == rows
        assert len(sampler) == len(rows)
        later = vc.PartWindowSampler(cache, epoch=1, start=2, **place)
        assert list(later) == list(sampler)[2:]
        later.set_epoch(2)
        assert list(later) == list(vc.PartWindowSampler(dataset, epoch=2, **place))
    with pytest.raises(DataError, match="rank 3 of 3"):
        vc.PartWindowSampler(cache, seed=0, rank=3, world=3)
    with pytest.raises(DataError, match="epoch -1"):
        later.set_epoch(-1)


@pytest.mark.slow
def test_spawned_workers_of_a_data_loader(root: Path) -> None:
    from torch.utils.data import DataLoader

    dataset = vc.CacheDataset(root)
    sampler = vc.PartWindowSampler(dataset, seed=1)
    loader = DataLoader(
        dataset, batch_size=3, sampler=sampler, num_workers=2, multiprocessing_context="spawn", collate_fn=list
    )
    assert [row.sample_id for batch in loader for row in batch] == [dataset[i].sample_id for i in sampler]


def test_a_row_of_a_cache_knows_its_vocabulary_and_temperatures(root: Path) -> None:
    import torch
    from torch.nn import functional as F

    cache = vc.open(root)
    row, vocab_size, width = cache["s0"], cache.header.vocab_size, cache["s0"].top_k
    torch.manual_seed(0)
    hidden_TD, weight_VD = torch.randn(row.num_tokens, 8), torch.randn(vocab_size + 30, 8)
    weight_VD[vocab_size:] *= 20  # padding rows that would take nearly all of the probability
    # The bucketed KL of the last layer, written down: the kept ids and one bucket for the rest of the vocabulary.
    q_TV = F.softmax((hidden_TD @ weight_VD[:vocab_size].T).double(), 1)
    ids_TK = torch.from_numpy(row.ids_LTK[-1].astype("int64"))
    logp_TK, tail_T = torch.from_numpy(row.logprobs_LTK[-1]).double(), torch.from_numpy(row.tail_mass_LT[-1]).double()
    q_TK = q_TV.gather(1, ids_TK)
    kept_T = torch.where(logp_TK.exp() > 0, logp_TK.exp() * (logp_TK - q_TK.log()), 0.0).sum(1)
    wanted = (kept_T + tail_T * (tail_T.log() - (1 - q_TK.sum(1)).log())).mean().item()
    assert width < vocab_size
    for carried in (row, vc.CacheDataset(cache)[list(cache).index("s0")], row.layer(-1)):
        said = {} if hasattr(carried, "vocab_size") else {"vocab_size": vocab_size}
        assert vc.sparse_kl(hidden_TD, weight_VD, carried, **said).item() == pytest.approx(wanted, rel=1e-4)
    assert vc.sparse_kl(hidden_TD, vc.Head(weight_VD), row, vocab_size=vocab_size).item() == pytest.approx(
        wanted, rel=1e-4
    )
    capped = vc.sparse_kl(hidden_TD, vc.Head(weight_VD, 0.5, 3.0), row).item()
    shaped_VD = weight_VD[:vocab_size]
    by_hand = 3 * torch.tanh(0.5 * hidden_TD @ shaped_VD.T / 3)  # these logits, through a head that is the identity
    assert vc.sparse_kl(by_hand, torch.eye(vocab_size), row).item() == pytest.approx(capped, rel=1e-4)
    assert capped != pytest.approx(wanted)

    with pytest.raises(DataError, match="do not carry the size of their vocabulary, and the rows of a head may"):
        vc.sparse_kl(hidden_TD, weight_VD, replace(row.layer(-1), vocab_size=None))
    with pytest.raises(DataError, match=rf"`vocab_size` is {vocab_size - 1}, and these rows carry {vocab_size}"):
        vc.sparse_kl(hidden_TD, weight_VD, row, vocab_size=vocab_size - 1)
    with pytest.raises(ModelError, match=rf"`vocab_size` is {vocab_size}, the head has {vocab_size - 1} rows"):
        vc.sparse_kl(hidden_TD, weight_VD[: vocab_size - 1], row)
    grid = list(map(float, cache.header.taus))
    with pytest.raises(DataError, match=re.escape(f"`tau` is 3.0, and the rows hold {grid} only")):
        vc.sparse_kl(hidden_TD, weight_VD, row, tau=3.0)
    with pytest.raises(DataError, match=r"`layer` is 9, and the rows have 4 layers"):
        vc.sparse_kl(hidden_TD, weight_VD, row, layer=9)
