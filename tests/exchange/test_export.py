"""Export: files read by pyarrow alone against the rows of the cache, and read back by import; going on; refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.caches import build, standard_case
from helpers.exchange import say_all, write_axolotl
from helpers.tiny import make_rows, save_model, write_spec
from transformers import AutoTokenizer

import vlsi_cache as vc
from vlsi_cache.errors import CacheCorruptError, DataError, SpecError
from vlsi_cache.exchange import exporting
from vlsi_cache.store.reader import Cache


@pytest.fixture(scope="module")
def imported(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of one layer with its rows of text."""
    folder = tmp_path_factory.mktemp("imported")
    files = write_axolotl(folder / "kd.jsonl", say_all(teacher_folder, make_rows(8)))
    return vc.import_cache(files, folder / "cache", format="axolotl", tokenizer=str(teacher_folder), profile="exact")


def read_all(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_parquet_has_every_layer(tmp_path: Path, run: Any) -> None:
    cache = vc.open_cache(build(tmp_path / "cache", standard_case()))
    code, out, err = run("export", cache.path, "-o", tmp_path / "all", "--format", "parquet", "--json")
    assert code == 0, err
    assert (json.loads(out)["num_rows"], json.loads(out)["num_files"]) == (len(cache) * 4, 3)
    found = {(row["id"], row["layer"]): row for row in read_all(tmp_path / "all")}
    assert len(found) == len(cache) * 4
    arrays = {"ids": "ids_LTK", "logprobs": "logprobs_LTK", "tail_ids": "tail_ids_LTm", "tail_mass": "tail_mass_LT"}
    arrays |= {"entropy": "entropy_LT", "gold_logprob": "gold_logprob_LT", "lse": "lse_LTn"}
    for name in cache:
        row = cache[name]
        for index, layer in enumerate(cache.layers):
            other = found[name, layer]
            assert other["response_ids"] == row.response_ids_R.tolist()
            assert other["positions"] == row.positions_T.tolist()
            for key, array in arrays.items():
                np.testing.assert_array_equal(np.array(other[key], np.float32), getattr(row, array)[index])
    vc.export_cache(cache, tmp_path / "two", format="parquet", layers=[2, "last"])
    assert {row["layer"] for row in read_all(tmp_path / "two")} == {2, 4}
    about = json.loads(pq.read_metadata(tmp_path / "two" / "data-000000.parquet").metadata[b"vlsi_cache.export"])
    assert (about["v_real"], about["layers"], about["cache_digest"]) == (100, [2, 4], cache.header.digest)


def test_distillkit_reads_what_it_would_write(imported: Cache, teacher_folder: Path, tmp_path: Path) -> None:
    done = vc.export_cache(imported, tmp_path / "theirs", format="distillkit")
    assert (done.num_rows, done.left_out) == (len(imported), [])
    config = yaml.safe_load((tmp_path / "theirs" / "compression_config.yaml").read_text())
    assert (config["d"], config["k"], config["exact_k"], config["exact_dtype"]) == (300, 8, 8, "float32")
    schema = pq.read_schema(tmp_path / "theirs" / "data-000000.parquet")
    bytes_lists = pa.list_(pa.list_(pa.uint8()))
    assert schema.field("compressed_logprobs").type.equals(bytes_lists)
    assert schema.field("bytepacked_indices").type.equals(bytes_lists)
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    for row, name in zip(read_all(tmp_path / "theirs"), imported, strict=True):
        cached, text = imported[name], tokenizer.decode(row["input_ids"])
        num_rows, num_response = len(row["input_ids"]), len(cached.response_ids_R)
        assert text.startswith("<|im_start|>user")
        assert len(row["compressed_logprobs"]) == len(row["bytepacked_indices"]) == len(row["labels"]) == num_rows
        # A row is about the token behind it, and DistillKit compares it where its own token has a label.
        first = num_rows - num_response
        assert [label >= 0 for label in row["labels"]] == [False] * first + [True] * num_response
        assert row["input_ids"][first + 1 :] == cached.response_ids_R[:-1].tolist()
        for place, packed in enumerate(row["bytepacked_indices"]):
            bits = format(int.from_bytes(bytes(packed), "big"), f"0{8 * len(packed)}b")
            ids = [int(bits[9 * k : 9 * k + 9], 2) for k in range(8)]
            values = np.frombuffer(bytes(row["compressed_logprobs"][place]), "<f4")
            assert np.exp(values.astype(float)).sum() < 1
            if place >= first:
                assert ids == cached.ids_LTK[0, place - first].tolist()
                np.testing.assert_array_equal(values, cached.logprobs_LTK[0, place - first])
    assert_same_rows(imported, tmp_path / "theirs", tmp_path / "back", "distillkit", teacher_folder)


def test_axolotl_counts_its_rows_from_the_end(imported: Cache, teacher_folder: Path, tmp_path: Path) -> None:
    vc.export_cache(imported, tmp_path / "theirs", format="axolotl")
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    for row in read_all(tmp_path / "theirs"):
        cached = imported[row["id"]]
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        token_ids = tokenizer(text, add_special_tokens=False).input_ids
        before = len(token_ids) - len(row["logprobs"])
        assert len(row["target_token_ids"]) == len(row["logprobs"])
        response = slice(before, before + len(cached.response_ids_R))
        assert token_ids[response] == cached.response_ids_R.tolist()
        assert row["target_token_ids"][: len(cached.response_ids_R)] == cached.ids_LTK[0].tolist()
        assert all(np.isfinite(row["logprobs"]).reshape(-1))
    assert_same_rows(imported, tmp_path / "theirs", tmp_path / "back", "axolotl", teacher_folder)


def assert_same_rows(cache: Cache, files: Path, out: Path, format: str, tokenizer: Path) -> None:
    data = cache.header.spec["data"]["path"] if format == "distillkit" else None
    back = vc.import_cache(files, out, format=format, tokenizer=str(tokenizer), data=data, profile="exact")
    assert sorted(back) == sorted(cache)
    for name in cache:
        one, other = cache[name], back[name]
        assert one.ids_LTK.tolist() == other.ids_LTK.tolist()
        np.testing.assert_allclose(one.logprobs_LTK, other.logprobs_LTK, atol=1e-6)
        np.testing.assert_allclose(one.tail_mass_LT, other.tail_mass_LT, atol=1e-6)
        np.testing.assert_allclose(one.gold_logprob_LT, other.gold_logprob_LT, atol=1e-6)


def test_it_goes_on_and_refuses_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imported: Cache) -> None:
    cache = vc.open_cache(build(tmp_path / "cache", standard_case()))
    write_part, out = exporting._write_part, tmp_path / "out"

    def write_first(file: Path, *args: Any) -> None:
        if "000001" in file.name:
            (file.parent / f".{file.name}.tmp-0123").write_bytes(b"half")
            raise KeyboardInterrupt
        write_part(file, *args)

    monkeypatch.setattr(exporting, "_write_part", write_first)
    with pytest.raises(KeyboardInterrupt):
        vc.export_cache(cache, out, format="parquet")
    first = (out / "data-000000.parquet").stat().st_mtime_ns
    monkeypatch.setattr(exporting, "_write_part", write_part)
    assert vc.export_cache(cache, out, format="parquet").num_files == 3
    assert (out / "data-000000.parquet").stat().st_mtime_ns == first
    assert not list(out.glob(".*tmp*"))
    whole = (out / "data-000001.parquet").read_bytes()
    (out / "data-000001.parquet").write_bytes(whole[:-20])
    with pytest.raises(
        DataError, match=r"data-000001\.parquet` is not as it was written .*; delete it and run the same"
    ):
        vc.export_cache(cache, out, format="parquet")
    (out / "data-000001.parquet").unlink()
    vc.export_cache(cache, out, format="parquet")
    assert (out / "data-000001.parquet").read_bytes() == whole
    manifest = (out / exporting.MANIFEST).read_text()
    (out / exporting.MANIFEST).write_text("{")
    with pytest.raises(CacheCorruptError, match=r"vlsi-cache-export\.json.*name a new folder"):
        vc.export_cache(cache, out, format="parquet")
    (out / exporting.MANIFEST).write_text(manifest)
    for options, folder, message in (
        ({"format": "parquet", "layers": ["last"]}, out, "is another export"),
        ({"format": "parquet"}, tmp_path, "holds .*cache, which it is made from|is not empty"),
        ({"format": "axolotl", "layers": [1]}, tmp_path / "a", "has no layers"),
        ({"format": "onnx"}, tmp_path / "a", "what can be exported"),
        ({"format": "axolotl"}, tmp_path / "a", "does not say which rows it is of"),
    ):
        with pytest.raises(SpecError, match=message):
            vc.export_cache(cache, folder, **options)
    other = save_model(tmp_path / "other", num_layers=1, hidden=8, seed=0, extra="other words altogether")
    with pytest.raises(
        SpecError, match=r"the tokenizer of .*other` is not the one of .*; leave --tokenizer out"
    ) as found:
        vc.export_cache(imported, tmp_path / "a", format="axolotl", tokenizer=str(other))
    assert "student" not in str(found.value)
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(SpecError, match="is not empty and no export"):
        vc.export_cache(imported, tmp_path / "full", format="axolotl")


def test_rows_of_different_widths(teacher_folder: Path, tmp_path: Path) -> None:
    said = say_all(teacher_folder, make_rows(4))
    file = write_axolotl(tmp_path / "kd.jsonl", said)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        for name in ("logprobs", "target_token_ids"):
            row[name] = [one[: 3 + place % 5] for place, one in enumerate(row[name])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: Any = {"format": "axolotl", "tokenizer": str(teacher_folder), "profile": "exact"}
    cache = vc.import_cache(file, tmp_path / "cache", **options)
    assert cache.header.truncated
    assert cache.verify(deep=True).ok
    vc.export_cache(cache, tmp_path / "plain", format="parquet")
    found = {row["id"]: row for row in read_all(tmp_path / "plain")}
    for row in rows:
        assert found[row["id"]]["ids"] == row["target_token_ids"][: len(found[row["id"]]["ids"])]
        assert [len(one) for one in found[row["id"]]["ids"]] == cache[row["id"]].widths_LT[0].tolist()
    vc.export_cache(cache, tmp_path / "theirs", format="axolotl")
    back = vc.import_cache(tmp_path / "theirs", tmp_path / "back", **options)
    for name in cache:
        is_entry_LTK = np.isfinite(cache[name].logprobs_LTK)
        assert (back[name].ids_LTK[is_entry_LTK] == cache[name].ids_LTK[is_entry_LTK]).all()
        assert (np.isfinite(back[name].logprobs_LTK) == is_entry_LTK).all()


def test_an_imported_cache_is_compared_by_its_last_layer(teacher_folder: Path, tmp_path: Path) -> None:
    """It does not know the number of that layer among the teacher's."""
    cache = vc.build_teacher(vc.load_spec(write_spec(tmp_path, teacher_folder, num_rows=12)), out=tmp_path / "cache")
    vc.export_cache(cache, tmp_path / "theirs", format="distillkit")
    data = tmp_path / "rows.jsonl"
    options: Any = {"format": "distillkit", "tokenizer": str(teacher_folder), "data": data}
    back = vc.import_cache(tmp_path / "theirs", tmp_path / "back", **options)
    assert Path(back.header.spec["teacher"]["model"]).is_absolute()
    (found,) = vc.diff(cache, back).layers
    assert found.layer == cache.layers[-1]
    assert found.same_top1 > 0.9  # of values that are stored alike either may come first
    assert abs(found.mean_kl) < 1e-5
