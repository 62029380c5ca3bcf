"""What goes into a cache comes out: through our reader, through plain Zarr, byte for byte."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.caches import Case, build, file_bytes, header_of, make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlsi_cache import io
from vlsi_cache.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheNotFoundError,
    DataError,
    DiskFullError,
    FingerprintMismatchError,
    SampleNotFoundError,
    SpecError,
)
from vlsi_cache.sparse.rows import redraw_tail
from vlsi_cache.store import files, reader
from vlsi_cache.store.check import verify
from vlsi_cache.store.format import list_parts, response_digest
from vlsi_cache.store.vocab_order import one_order
from vlsi_cache.store.writer import CacheWriter

QUANTISATION = 0.016  # largest error of a probability on the u8 fourth-root scale, 4 * 0.5 / 255, and rescaling


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.lists(st.integers(1, 6), max_size=4), min_size=1, max_size=2))
    num = sum(map(len, lengths))
    names = draw(st.lists(st.text(max_size=12), min_size=num, max_size=num, unique=True))
    vocab_size = draw(st.sampled_from([40, 65536, 65537]))
    num_layers, top_k, num_tail = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(0, 3))
    seed = draw(st.integers(0, 2**32))
    return make_case(
        lengths, names, vocab_size=vocab_size, num_layers=num_layers, top_k=top_k, num_tail=num_tail, seed=seed
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_rows_come_back(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = build(tmp_path_factory.mktemp("c") / "cache", case)
    cache = reader.open(root)
    assert list(cache) == [name for part in case.parts for name in part.sample_ids]
    assert cache.num_tokens == sum(part.rows.num_tokens for part in case.parts)
    for index, part in enumerate(case.parts):
        start = 0
        for i, row in enumerate(cache.read_part(index)):
            want = part.rows.tokens(slice(start, start + row.num_tokens))
            start += row.num_tokens
            assert row.sample_id in cache
            assert row.sample_id == part.sample_ids[i]
            np.testing.assert_array_equal(row.response_ids_R, part.response_ids[i])
            np.testing.assert_array_equal(row.positions_T, np.arange(row.num_tokens))
            for name in ("ids_LTK", "tail_ids_LTm"):
                np.testing.assert_array_equal(getattr(row, name), getattr(want, name))
            for name in ("lse_LTn", "entropy_LT", "gold_logprob_LT", "tail_mass_LT"):
                np.testing.assert_allclose(getattr(row, name), getattr(want, name), rtol=2.0**-16)
            np.testing.assert_allclose(np.exp(row.logprobs_LTK), np.exp(want.logprobs_LTK), atol=QUANTISATION)
    assert verify(root, deep=True).ok


def independent_part(root: Path, index: int) -> dict[str, np.ndarray]:
    """A decoder written from FORMAT.md alone, with zarr and numpy."""
    part = zarr.open_group(root / "parts" / f"{index:06d}.zarr", mode="r", zarr_format=3)
    vocab = zarr.open_group(root / "vocab", mode="r", zarr_format=3)
    order, heads = vocab["id_of_rank"][:], vocab["heads"][:]
    id_of_rank = np.stack([[*head, *(token for token in order if token not in head)] for head in heads])
    layer = np.arange(len(heads))[None, :, None]
    stored = part["levels"][:].astype(np.int64)
    stored[..., 1:] *= -1
    unscaled = (np.cumsum(stored, axis=-1) / 255.0) ** 4
    kept = 1.0 - part["tail_mass"][:].astype(np.float64)
    return {
        "ids_LTK": id_of_rank[layer, part["ids"][:]].swapaxes(0, 1),
        "p_LTK": (unscaled / unscaled.sum(-1, keepdims=True) * kept[..., None]).swapaxes(0, 1),
        "tail_ids_LTm": id_of_rank[layer, part["tail_ids"][:]].swapaxes(0, 1),
        "lse_LTn": part["lse"][:].swapaxes(0, 1),
        "entropy_LT": part["entropy"][:].T,
        "gold_logprob_LT": part["gold_logprob"][:].T,
        "tail_mass_LT": part["tail_mass"][:].T,
        "offsets": part["offsets"][:],
        "response_ids": part["response_ids"][:],
    }


def test_independent_decoder_agrees(root: Path) -> None:
    cache = reader.open(root)
    for index in cache.parts:
        raw = independent_part(root, index)
        for s, row in enumerate(cache.read_part(index)):
            span = slice(*raw["offsets"][s : s + 2])
            for name in ("ids_LTK", "tail_ids_LTm", "lse_LTn", "entropy_LT", "gold_logprob_LT", "tail_mass_LT"):
                np.testing.assert_array_equal(getattr(row, name), raw[name][:, span])
            np.testing.assert_allclose(np.exp(row.logprobs_LTK), raw["p_LTK"][:, span], rtol=1e-5, atol=1e-12)


def test_layer_subsets_are_slices(root: Path) -> None:
    cache = reader.open(root)
    name = next(iter(cache))
    full = cache[name]
    some = cache.row(name, layers=[cache.layers[0], "last"])
    for field in ("ids_LTK", "logprobs_LTK", "tail_mass_LT"):
        np.testing.assert_array_equal(getattr(some, field), getattr(full, field)[[0, -1]])
    assert cache.row(name, layers=[]).ids_LTK.shape == (0, *full.ids_LTK.shape[1:])
    with pytest.raises(SpecError, match="layer `99` is not in this cache"):
        cache.row(name, layers=[99])


def test_positions_may_be_a_subset(tmp_path: Path) -> None:
    case = make_case([[3]], ["a"])
    part = case.parts[0]
    longer = np.arange(7, dtype=np.uint32)
    case.parts[0] = type(part)(["a"], ["k"], ["d"], [longer], part.rows, positions=[np.array([1, 4, 6])])
    row = reader.open(build(tmp_path / "c", case))["a"]
    assert (row.positions_T.tolist(), row.response_ids_R.tolist()) == ([1, 4, 6], list(range(7)))


def test_sample_table_and_sizes(root: Path, case: Case) -> None:
    cache = reader.open(root)
    table = cache.sample_table().to_pydict()
    row = cache[table["id"][-1]]
    assert table["response_xxh3"][-1] == response_digest(row.response_ids_R)
    assert table["entropy_last"][-1] == pytest.approx(row.entropy_LT[-1].mean())
    (root / "samples.parquet").unlink()
    assert reader.open(root).sample_table().to_pydict() == table
    on_disk = sum(f.stat().st_size for f in (root / "parts").rglob("*") if f.is_file())
    assert sum(cache.bytes_by_array().values()) == on_disk
    assert cache.bytes_per_layer_token()["total"] == pytest.approx(on_disk / cache.num_tokens / len(cache.layers))
    assert len(repr(cache)) < 200
    assert len(case.parts) == len(cache.parts)


def test_same_input_gives_the_same_bytes(tmp_path: Path, case: Case) -> None:
    one, two = build(tmp_path / "one", case), build(tmp_path / "two", case)
    assert file_bytes(one / "parts") == file_bytes(two / "parts")
    assert (one / "cache.json").read_bytes() == (two / "cache.json").read_bytes()


def test_fingerprint_mismatch_lists_every_field_with_both_values(root: Path, case: Case) -> None:
    values = header_of(case).model_dump()
    values["fingerprint"] = {"teacher": "other", "new": [1, 2]}
    values["tail_samples"] = 9
    with pytest.raises(FingerprintMismatchError) as error:
        CacheWriter.create_or_resume(root, type(header_of(case))(**values), case.vocab_order)
    for text in ('"tiny"', '"other"', "nothing", "[1, 2]", "`tail_samples`: the cache has 2, this run has 9"):
        assert text in str(error.value)


def test_a_cache_keeps_its_rank_table(root: Path, case: Case) -> None:
    writer = CacheWriter.create_or_resume(root, header_of(case), one_order(case.id_of_rank[::-1], 4))
    assert writer.vocab_order.digest == case.vocab_order.digest


def test_long_values_show_where_they_part(tmp_path: Path, case: Case) -> None:
    long = {"files": [f"hash{i}" for i in range(100)]}
    changed = {"files": [*long["files"][:-1], "else"]}
    header = header_of(case)
    CacheWriter.create_or_resume(tmp_path / "c", header.model_copy(update={"fingerprint": long}), case.vocab_order)
    with pytest.raises(FingerprintMismatchError, match=r"hash99.*else"):
        CacheWriter.create_or_resume(
            tmp_path / "c", header.model_copy(update={"fingerprint": changed}), case.vocab_order
        )


def test_folder_of_something_else_is_refused(tmp_path: Path, case: Case) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SpecError, match=r"not empty and not a cache: it holds \['thesis.tex'\]"):
        CacheWriter.create_or_resume(tmp_path, header_of(case), case.vocab_order)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_rows_are_refused(tmp_path: Path, case: Case) -> None:
    writer = CacheWriter.create_or_resume(tmp_path / "c", header_of(case), case.vocab_order)
    part = case.parts[0]

    def changed(**arrays: np.ndarray) -> object:
        rows = type(part.rows)(**{**vars(part.rows), **arrays})
        return type(part)(part.sample_ids, part.kinds, part.digests, part.response_ids, rows)

    wide = part.rows.ids_LTK.copy()
    wide[0, 0, 0] = 151645
    nan = part.rows.entropy_LT.copy()
    nan[0, -1] = np.nan
    for bad, message in (
        (changed(ids_LTK=wide), "151645, the vocabulary is 0 to 99"),
        (changed(entropy_LT=nan), f"`entropy_LT` is not a number in sample {part.sample_ids[-1]!r}"),
        (changed(ids_LTK=wide[:, 1:]), "`ids_LTK` is"),
        (type(part)(part.sample_ids[:-1], part.kinds, part.digests, part.response_ids, part.rows), "`kinds` for"),
    ):
        with pytest.raises(DataError, match=message):
            writer.write_part(0, bad)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the cache has parts"):
        writer.write_part(99, part)
    assert list_parts(tmp_path / "c") == []
    assert list((tmp_path / "c" / "tmp").iterdir()) == []


def test_a_sample_in_two_parts_is_refused(tmp_path: Path) -> None:
    case = make_case([[2], [2]], ["same", "other"])
    case.parts[1] = type(case.parts[1])(["same"], ["k"], ["d"], case.parts[1].response_ids, case.parts[1].rows)
    with pytest.raises(DataError, match=r"'same' is in parts \[0, 1\]"):
        build(tmp_path / "c", case)


def test_missing_parts_own_first(tmp_path: Path) -> None:
    case = make_case([[1]] * 7, [str(i) for i in range(7)])
    writer = CacheWriter.create_or_resume(tmp_path / "c", header_of(case), case.vocab_order)
    writer.write_part(4, case.parts[4])
    assert writer.missing_parts(rank=1, world=3) == [1, 2, 5, 0, 3, 6]
    assert writer.write_part(4, case.parts[4]) is False
    assert writer.finish() is False


def test_incomplete_and_absent_caches_say_what_to_do(tmp_path: Path, case: Case) -> None:
    root = tmp_path / "c"
    writer = CacheWriter.create_or_resume(root, header_of(case), case.vocab_order)
    writer.write_part(1, case.parts[1])
    with pytest.raises(CacheIncompleteError, match=rf"1 of 3 parts .*vlsi-cache build-teacher SPEC -o {root}"):
        reader.open(root)
    cache = reader.open(root, allow_incomplete=True)
    assert not cache.is_complete
    assert list(cache) == case.parts[1].sample_ids
    with pytest.raises(CacheNotFoundError, match="does not exist"):
        reader.open(tmp_path / "nowhere")
    with pytest.raises(CacheNotFoundError, match="open the cache itself"):
        reader.open(root / "parts")
    with pytest.raises(CacheNotFoundError, match="holds 1"):
        reader.open(tmp_path)


def test_unknown_sample_names_close_ones(root: Path) -> None:
    cache = reader.open(root)
    with pytest.raises(SampleNotFoundError, match=r"no sample 'sample-33' .*did you mean 'sample-3'"):
        cache["sample-33"]
    assert "sample-33" not in cache


def test_newer_format_is_refused(root: Path) -> None:
    from vlsi_cache.store.format import sealed_json

    value = json.loads((root / "cache.json").read_text())
    del value["xxh3"]
    (root / "cache.json").write_bytes(sealed_json({**value, "format_version": 2, "novelty": 1}))
    with pytest.raises(CacheCorruptError, match="format version 2, this program reads 1 to 1; upgrade"):
        reader.open(root)


def test_full_disk_stops_with_what_is_missing(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "c"
    writer = CacheWriter.create_or_resume(root, header_of(case), case.vocab_order)
    usage = type("usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(DiskFullError, match=r"1000 are free, \d+ .*run the same command again, it continues"):
            writer.write_part(0, case.parts[0])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(io, "fsync_tree", full)
        with pytest.raises(DiskFullError, match="nothing committed is lost"):
            writer.write_part(0, case.parts[0])
    assert list((root / "tmp").iterdir()) == []
    build(root, case)
    assert verify(root).ok


def test_importing_the_package_imports_no_store_and_the_store_no_torch() -> None:
    code = (
        "import sys, vlsi_cache; assert not any(m.startswith(('vlsi_cache.store', 'zarr')) for m in sys.modules);"
        "import vlsi_cache.store.reader; assert 'zarr' not in sys.modules and 'pyarrow' not in sys.modules;"
        "import vlsi_cache.store.derive.prune, vlsi_cache.store.dataset; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_redrawn_tail_is_unbiased() -> None:
    p = np.array([0.4, 0.2, 0.1, 0.15, 0.1, 0.05])  # ids 0 to 5; kept 0 to 2, then only 0
    rng = np.random.default_rng(0)
    draws = 200_000
    stored = (3 + rng.choice(3, size=(1, draws, 1), p=p[3:] / p[3:].sum())).astype(np.uint16)
    ids = np.broadcast_to(np.array([1, 2], np.uint16), (1, draws, 2))
    mass = np.full((1, draws), p[3:].sum(), np.float32)
    uniforms = np.random.default_rng(1).random((1, draws, 1))
    tail, new_mass = redraw_tail(ids, np.broadcast_to(p[1:3], (1, draws, 2)), stored, mass, uniforms)
    np.testing.assert_allclose(new_mass, 0.6, atol=1e-6)
    found = np.bincount(tail.ravel(), minlength=6) / draws
    np.testing.assert_allclose(found, np.concatenate([[0], p[1:] / 0.6]), atol=5 * np.sqrt(0.25 / draws))
