"""What `inspect` says: bytes per layer from the indices of shards, raw bytes, origin, progress, rows left out."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.fakes import LAYERS, V, write_cache

from vlsi_cache.errors import CacheCorruptError
from vlsi_cache.report.describe import describe_cache, description_text, lineage, reasons, rows_text
from vlsi_cache.store.arrays import BYTES, ArraySpec, data_file_name, part_specs
from vlsi_cache.store.codec import encode_array, encode_chunk, layer_bytes
from vlsi_cache.store.derive.prune import prune
from vlsi_cache.store.format import part_dir
from vlsi_cache.store.reader import open as open_cache


def written(folder: Path, values: np.ndarray, spec: ArraySpec) -> Path:
    file = folder / "data"
    file.write_bytes(b"".join(encode_array(values, spec)))
    return file


def test_bytes_of_every_layer_of_a_shard(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values_LTK = np.zeros((3, 2500, 4), np.uint16)
    values_LTK[1] = rng.integers(0, 9999, (2500, 4))
    spec = ArraySpec((2500, 3, 4), np.dtype(np.uint16), (1000, 1, 4), True, BYTES)
    file = written(tmp_path, values_LTK, spec)
    found_L = layer_bytes(file, spec, np.zeros(3))
    assert found_L.sum() == file.stat().st_size - 16 * 9 - 4
    whole = [sum(len(encode_chunk(v[t : t + 1000], spec)) for t in (0, 1000)) for v in values_LTK]
    assert (found_L > whole).all()
    assert found_L[1] > found_L[0] == found_L[2]


def test_bytes_of_every_layer_of_a_flat_array(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 9999, 35).astype(np.uint16)
    spec = ArraySpec((35,), np.dtype(np.uint16), (10,), True, BYTES)
    file = written(tmp_path, values, spec)
    found_L = layer_bytes(file, spec, np.array([10, 0, 15, 10]))
    first, second, third, fourth = (
        len(encode_chunk(np.resize(values[t : t + 10], 10), spec)) for t in range(0, 40, 10)
    )
    assert found_L.tolist()[:3] == pytest.approx([first, 0, second + third / 2])
    assert found_L.sum() == file.stat().st_size - 16 * 4 - 4
    assert abs(found_L[3] - third / 2 - fourth) < 8


@pytest.mark.parametrize("rows", ["top-k", "top-p", "sampled"])
def test_bytes_per_array_and_layer(tmp_path: Path, rows: str) -> None:
    cache = open_cache(write_cache(tmp_path / "cache", rows=rows, every=2))
    facts = describe_cache(cache.path)
    raw = dict.fromkeys(facts["raw_bytes"], 0)
    for part in cache.parts:
        for name, spec in part_specs(cache.header, cache.part_record(part)).items():
            raw[name] += spec.size_bytes
    assert facts["raw_bytes"] == raw
    assert facts["measured_parts"] == cache.parts
    for name in facts["layer_bytes"][0]["by_array"]:
        stored = facts["size_bytes"][name]
        layers = sum(one["by_array"][name] for one in facts["layer_bytes"]) * facts["num_tokens"]
        assert stored - 2 * (16 * len(LAYERS) + 4) <= layers <= stored
    assert facts["num_tokens"] < facts["num_response_tokens"] == facts["planned_response_tokens"]
    share = 100 * facts["num_tokens"] / facts["num_response_tokens"]
    text = description_text(facts)
    assert f"response tokens ({share:.1f} %)" in text
    assert f"{facts['bytes_per_response_token']:.1f} per response token" in text
    assert {"top-k": "top-5 words of 60", "top-p": "top-p, at most 5", "sampled": "8 draws"}[rows] in rows_text(facts)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_progress_of_an_unfinished_cache(tmp_path: Path) -> None:
    half = write_cache(tmp_path / "half", num_parts=9, num_written=2)
    (half / "tmp" / "000002.elsewhere.1.0123456789ab.zarr").mkdir(parents=True)
    facts = describe_cache(half)
    assert (facts["complete"], facts["missing_parts"]) == (False, [2, 3, 4, 5, 6, 7, 8])
    assert facts["tmp"] == {"abandoned": [], "perhaps_alive": ["000002.elsewhere.1.0123456789ab.zarr"]}
    text = description_text(facts)
    assert "7 parts: 2, 3, 4, 5, 6, ...; planned are 27 samples" in text
    assert "1 perhaps alive: 000002.elsewhere" in text
    empty = describe_cache(write_cache(tmp_path / "empty", num_written=0))
    assert "0 of 2 parts" in description_text(empty)


def test_origin_and_rows_left_out(tmp_path: Path) -> None:
    first = write_cache(tmp_path / "first", skipped=9)
    second = prune(open_cache(first), tmp_path / "second", layers=[2, 3, "last"])
    third = prune(second, tmp_path / "third", top_k=3)
    facts = describe_cache(third.path)
    assert [Path(one["path"]).name for one in lineage(facts["parents"])] == ["second", "first"]
    text = description_text(facts)
    assert f"parent      {first}" in text
    assert "prune.1.layers: [2, 3, 4]" in text
    assert facts["skipped_by_reason"] == {"prompt <too> long: .. tokens": 9}
    assert "left out    9 rows" in text
    assert text.count("prompt <too> long: 40") == 5
    assert "teacher.weights: feed" in text
    assert f"of {V}, 2 tail samples; profile default" in text


def test_reasons_are_counted_without_their_numbers_and_names() -> None:
    found = [{"id": "a", "reason": f"image `{n}.png` has {n} pixels"} for n in range(3)] + [{"id": "b", "reason": "no"}]
    assert reasons(found) == {"image .. has .. pixels": 3, "no": 1}
    assert reasons([]) == {}


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    cache = open_cache(write_cache(tmp_path / "cache"))
    specs = part_specs(cache.header, cache.part_record(0))
    file = part_dir(cache.path, 0) / data_file_name("ids", specs["ids"])
    content = bytearray(file.read_bytes())
    content[-6] ^= 1
    file.write_bytes(content)
    with pytest.raises(CacheCorruptError, match=r"ids/c/0/0/0`.*vlsi-cache verify"):
        describe_cache(cache.path)
