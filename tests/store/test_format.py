"""The format is what FORMAT.md says: other programs read the same rows, and so does every later version of this one."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.caches import build, standard_case
from helpers.variants import PROFILES, VARIANTS, build_variant, plain, variant_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlsi_cache.store import format as names
from vlsi_cache.store import reader
from vlsi_cache.store.check import verify

GOLDEN = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
assert _spec is not None
assert _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
EXACT_FIELDS = ("ids_LTK", "tail_ids_LTm", "lse_LTn", "entropy_LT", "gold_logprob_LT", "tail_mass_LT")


def decode(root: Path) -> dict[str, dict[str, np.ndarray]]:
    """Every sample of a cache, by FORMAT.md alone: plain zarr, numpy and json, nothing of ours."""
    head, vocab = json.loads((root / "cache.json").read_text()), zarr.open_group(root / "vocab", mode="r")
    order, samples = vocab["id_of_rank"][:], {}
    id_of_rank = [[*first, *order[~np.isin(order, first)]] for first in vocab["heads"][:]]
    for index in range(head["num_parts"]):
        path = root / "parts" / f"{index:06d}.zarr"
        part = {one.name: zarr.open_array(one, mode="r")[...] for one in path.iterdir() if one.is_dir()}
        value = next(name for name in ("levels", "logprob_gaps", "logprobs", "counts") if name in part)
        (num_tokens, num_layers), width = part["entropy"].shape, max(head["top_k"])
        kept = part.get("kept", np.full((num_tokens, num_layers), width)).T
        mask = np.arange(width) < kept[..., None]
        ranks, stored = (np.zeros(mask.shape, part[name].dtype) for name in ("ids", value))
        for target, name in ((ranks, "ids"), (stored, value)):
            target[mask] = part[name] if "kept" in part else part[name].swapaxes(0, 1)[mask]
        tail_mass = part.get("tail_mass", np.zeros((num_tokens, num_layers), np.float32)).T
        if value == "levels":
            level = 2 * stored[..., :1] - np.cumsum(stored, -1, dtype=np.uint8)
            weight = np.where(mask, (level / 255.0) ** 4, 0)
            p = weight / weight.sum(-1, keepdims=True) * (1 - tail_mass[..., None].astype(float))
        elif value == "logprob_gaps":
            p = np.exp(np.cumsum(stored, -1, dtype=np.uint32).view(np.float32).astype(float))
        else:
            p = np.exp(stored.astype(float)) if value == "logprobs" else stored / width
        ids = np.stack([np.array(table)[rank] for table, rank in zip(id_of_rank, ranks, strict=True)])
        tail = part.get("tail_ids", np.zeros((num_tokens, num_layers, 0), int)).swapaxes(0, 1)
        found = {"ids_LTK": np.where(mask, ids, 0), "p_LTK": np.where(mask, p, 0), "tail_mass_LT": tail_mass}
        found["tail_ids_LTm"] = np.stack([np.array(table)[rank] for table, rank in zip(id_of_rank, tail, strict=True)])
        found |= {"lse_LTn": part["lse"].swapaxes(0, 1)}
        found |= {f"{name}_LT": part[name].T for name in ("entropy", "gold_logprob")}
        for s, name in enumerate(json.loads((path / "part.json").read_text())["sample_ids"]):
            (low, high), (first, last) = part["offsets"][s : s + 2], part["response_offsets"][s : s + 2]
            samples[name] = {key: array[:, low:high] for key, array in found.items()}
            samples[name] |= {"positions_T": part["positions"][low:high]}
            samples[name] |= {"response_ids_R": part["response_ids"][first:last]}
    return samples


@pytest.mark.parametrize("name", VARIANTS)
def test_an_independent_decoder_reads_the_same(tmp_path: Path, name: str) -> None:
    root = build_variant(tmp_path / "c", variant_of(name))
    cache, samples = reader.open(root), decode(root)
    assert list(samples) == list(cache) == list("abcde")
    for sample, want in samples.items():
        row = cache[sample]
        full = row.padded_to(want["ids_LTK"].shape[-1])
        for field in EXACT_FIELDS:
            np.testing.assert_array_equal(getattr(full, field), want[field], err_msg=field)
        for field in ("positions_T", "response_ids_R"):
            np.testing.assert_array_equal(getattr(row, field), want[field], err_msg=field)
        # float32 log-probs of size up to 32 are good to 2^-20, and the decoder works in float64
        got = np.exp(full.logprobs_LTK.astype(np.float64))
        np.testing.assert_allclose(got, want["p_LTK"], rtol=1e-5, atol=0)


def unpacked(name: str, root: Path) -> Path:
    for file, content in golden.unpack(GOLDEN / f"{name}.tar.xz").items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)
    return root


@pytest.mark.parametrize("name", VARIANTS)
def test_the_golden_caches_are_read_for_ever(tmp_path: Path, name: str) -> None:
    root = unpacked(name, tmp_path)
    report = verify(root, deep=True)
    assert [problem.file for problem in report.problems] == ["samples.parquet"], str(report)
    expected, found = np.load(GOLDEN / f"{name}.npz"), golden.expected_rows(root)
    assert set(expected) == set(found)
    assert len(expected["samples"]) == 5
    for field, got in found.items():
        assert (got.dtype, got.shape) == (expected[field].dtype, expected[field].shape), field
        if field == "logprobs_LTK" and name in (
            "plain-default",
            "per-layer-default",
            "top-p-default",
            "chosen-default",
        ):
            np.testing.assert_allclose(got, expected[field], rtol=1e-6, atol=1e-6)  # logs and sums of another numpy
        else:
            np.testing.assert_array_equal(got, expected[field], err_msg=field)


def test_the_golden_caches_cover_texts_and_chosen_tokens(tmp_path: Path) -> None:
    cache = reader.open(unpacked("chosen-default", tmp_path))
    assert cache.token_text(7) == "<7 \u00e9>"
    assert any(len(cache[name].positions_T) < len(cache[name].response_ids_R) for name in cache)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cache_written_today_is_the_golden_one(tmp_path: Path, name: str) -> None:
    """The same rows give the same bytes as when the golden caches were written: the writer has not drifted."""
    root = build_variant(tmp_path / "c", variant_of(name))
    data = {file: old for file, old in golden.unpack(GOLDEN / f"{name}.tar.xz").items() if "/c/" in file}
    assert len(data) > 10
    for file, old in data.items():
        assert (root / file).read_bytes() == old, file


@pytest.mark.parametrize("name", [*VARIANTS, *(f"many-{profile}" for profile in PROFILES)])
def test_tensorstore_opens_the_same_arrays(tmp_path: Path, name: str) -> None:
    tensorstore = pytest.importorskip("tensorstore", reason="`tensorstore` (of the `dev` extra) is not installed")
    many = name.startswith("many-")
    root = build_variant(tmp_path / "c", plain(name[5:], [[1500, 700]]) if many else variant_of(name))
    seen = 0
    for folder in [root / "vocab", root / "vocab-copy", *sorted((root / "parts").iterdir())]:
        for where in (path for path in folder.iterdir() if path.is_dir()):
            array = zarr.open_array(where, mode="r")
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(where)}}
            found = tensorstore.open(spec, open=True, read=True).result()
            assert found.dtype.numpy_dtype == array.dtype
            np.testing.assert_array_equal(found.read().result(), array[...], err_msg=where.name)
            seen += array.size > 0
    assert seen >= 10


def test_the_text_names_every_field_and_array() -> None:
    from vlsi_cache.store import arrays
    from vlsi_cache.store import format as schema

    text = Path(schema.__file__).with_name("FORMAT.md").read_text(encoding="utf-8")
    fields = {schema.STORED_NAMES.get(name, name) for name in schema.CacheHeader.model_fields}
    names = {*fields, *schema.PartRecord.model_fields, *arrays.SAMPLE_ARRAYS}
    names |= {*arrays.ENTRY_ARRAYS, *arrays.SCALAR_ARRAYS, "kept", "tail_ids", "heads", "text", "text_offsets"}
    names |= {arrays.BYTES_ARRAY, *arrays.PIECE_ARRAYS}
    assert sorted(name for name in names if f"`{name}`" not in text) == []
    identity = text.split("an object with the keys `fingerprint`, ")[1].split(".\n")[0].strip("`").split("`, `")
    assert identity == [schema.STORED_NAMES.get(name, name) for name in schema.IDENTITY_FIELDS]


def test_the_row_of_the_text_is_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block of FORMAT.md, as it stands there, reads what our reader reads."""
    import vlsi_cache.store.format as layout

    text = Path(layout.__file__).with_name("FORMAT.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    assert text.index("```python") < 400
    assert len([line for line in code.splitlines() if line]) <= 15
    build(tmp_path / "caches" / "demo", standard_case())
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(compile(code, "FORMAT.md", "exec"), found)
    row = reader.open("caches/demo").row("sample-3", ["last"])
    assert row.num_tokens
    np.testing.assert_array_equal(found["ids"], row.ids_LTK[0])
    np.testing.assert_allclose(found["probs"], np.exp(row.logprobs_LTK[0]), rtol=1e-5, atol=1e-9)


def test_codecs_are_those_of_the_text(tmp_path: Path) -> None:
    """(transpose, shuffle, blocksize) of every array as it lies on disk; None where a chunk is stored."""
    byte, id_codec = (False, "shuffle", 0), (False, "bitshuffle", 1 << 20)
    want = {
        "plain-default": {"ids": id_codec, "levels": (True, "bitshuffle", 1 << 17), "tail_ids": byte, "lse": byte},
        "plain-exact": {"ids": id_codec, "logprob_gaps": (True, "bitshuffle", 1 << 21), "entropy": byte},
        "plain-fast": {"ids": None, "logprobs": None, "tail_ids": None, "offsets": byte, "positions": byte},
        "top-p-default": {"ids": id_codec, "levels": (False, "bitshuffle", 1 << 17), "kept": byte},
        "top-p-exact": {"logprob_gaps": (False, "bitshuffle", 1 << 21), "tail_mass": byte},
        "sampled-exact": {"ids": id_codec, "counts": (False, "bitshuffle", 1 << 17), "response_ids": byte},
        "sampled-fast": {"ids": None, "counts": None, "kept": None},
    }
    for name, arrays in want.items():
        root = build_variant(tmp_path / name, variant_of(name))
        for array, codec in arrays.items():
            metadata = json.loads((root / "parts" / "000001.zarr" / array / "zarr.json").read_text())
            chain = metadata["codecs"]
            if chain[0]["name"] == "sharding_indexed":
                shard = chain[0]["configuration"]
                assert shard["index_location"] == "end"
                assert [one["name"] for one in shard["index_codecs"]] == ["bytes", "crc32c"]
                chain = shard["codecs"]
            names = [one["name"] for one in chain]
            turned = names[0] == "transpose"
            assert names == ["transpose"] * turned + ["bytes"] + ["blosc"] * (codec is not None) + ["crc32c"], name
            if codec is not None:
                blosc = chain[-2]["configuration"]
                assert (turned, blosc["shuffle"], blosc["blocksize"]) == codec, (name, array)
                assert (blosc["cname"], blosc["clevel"]) == ("zstd", 5)
            assert not turned or chain[0]["configuration"]["order"] == [1, 2, 0]


NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.none()
VALUES = st.lists(NUMBERS, max_size=9) | st.lists(NUMBERS | st.integers() | st.booleans() | st.text(), max_size=4)


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4))
@example({"a": [9.9e-5, -1e-05, 1e-04, 5e-324, 1e16, 9999999999999998.0, -0.0, 1.0, None, 10.00001]})
def test_a_seal_is_over_one_spelling(value: dict[str, object]) -> None:
    spelled = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    assert names.canonical_json(value) == names._read_json(value) == spelled


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_sealed(number: float) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        names._read_json({"a": [1.0, number]})


def test_a_library_that_spells_numbers_otherwise_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "to_json", lambda value, **_: json.dumps(value, indent=1).encode())
    assert verify(root).ok
