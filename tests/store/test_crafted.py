"""Caches with right checksums and wrong values: whoever can write a file can seal it. Each is an error that says where.

Every case seals one small cache again with one wrong value, in the header, a commit record or an array.
"""

import gc
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xxhash
from helpers.caches import build, copy_cache, header_of, make_case, put_back, standard_case
from helpers.damage import data_file
from helpers.variants import build_variant, variant_of
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]

from vlsi_cache.errors import CacheCorruptError, VlsiCacheError
from vlsi_cache.report.describe import describe_cache, description_text
from vlsi_cache.store import reader
from vlsi_cache.store.check import verify
from vlsi_cache.store.files import load_header
from vlsi_cache.store.format import sealed_json

HUGE = 10**12


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    del value["xxh3"]
    change(value)
    path.write_bytes(sealed_json(value))


def reseal_parts(root: Path) -> None:
    """The header has another digest: the parts say so, too."""
    digest = load_header(root).digest
    for record in root.glob("parts/*/part.json"):
        reseal(record, lambda value: value.update(cache_digest=digest))


def record_of(root: Path) -> Path:
    return root / "parts" / "000001.zarr" / "part.json"


@pytest.fixture(scope="module")
def lent(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy for all cases that put their files back."""
    return copy_cache(built, tmp_path_factory.mktemp("lent") / "cache")


@pytest.fixture(scope="module", autouse=True)
def _only_its_own_garbage() -> Iterator[None]:
    """Seconds are counted here, and looking through what other tests of this process hold would be among them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def everything(root: Path) -> None:
    """What a person would do with a cache, reading all of it."""
    cache = reader.open(root)
    description_text(describe_cache(root))
    for index in cache.parts:
        cache.read_part(index)
    cache.token_text(0)


def assert_refused(root: Path, names: str) -> None:
    """By reading and by verify, within a second, naming the file or field."""
    began = time.process_time()
    with pytest.raises(CacheCorruptError) as error:
        everything(root)
    assert re.search(names, str(error.value)), str(error.value)
    report = verify(root)
    assert any(re.search(names, str(problem)) for problem in report.problems), str(report)
    assert time.process_time() - began < 1


WRONG = (-1, HUGE * HUGE, True, 1.5, "7", None, [1], {})
HEADER_CASES: list[tuple[str, Any]] = [
    *((name, value) for name in ("num_parts", "num_samples", "num_response_tokens", "v_real") for value in WRONG),
    *((name, value) for name in ("tail_samples", "num_head_ranks", "num_model_layers") for value in WRONG),
    ("num_parts", HUGE),
    ("v_real", HUGE),
    ("v_real", 2**31),
    ("num_head_ranks", HUGE),
    ("tail_samples", HUGE),
    ("format_version", True),
    ("format_version", "1"),
    ("format_version", 2),
    ("format", 7),
    ("layers", list(range(10**6))),
    *(
        ("layers", value)
        for value in ([], [4, 3, 2, 1], [1, 1, 2, 4], [-1, 2, 3, 4], [1, 2, 3, "4"], [1, 2, 3, HUGE], 7)
    ),
    *(
        ("top_k", value)
        for value in ([], [6], [6, 6, 6, 0], [6, 6, 6, HUGE], [6, 6, 6, True], [6.0] * 4, "6", [6] * 10**6)
    ),
    *(("taus", value) for value in ([], [0.0], [2.0], [1.0, -1.0], [1.0, True], ["1.0"], 1.0, [1.0] * 10**5)),
    *((name, value) for name in ("fingerprint", "spec", "vocab_files") for value in ("x", 7, None, [], [{}])),
    *(("spec", {name: value}) for name in ("rows", "teacher", "data", "run", "store") for value in ("x", 7, [1])),
    ("spec", {"name": 7}),
    ("spec", {"description": [1]}),
    *(("fingerprint", {"rows.seed": value}) for value in ("x", 1.5, [], True)),
    *(("fingerprint", {"rows.select_tokens": value}) for value in ("x", 7, [1])),
    ("fingerprint", {"prune.x.layers": 1}),
    ("fingerprint", {"prune.": 1}),
    *(("skipped", value) for value in ("x", 7, ["x"], [{}], [{"id": 7, "reason": "x"}], [{"id": "x", "reason": None}])),
    *(("responses", value) for value in ("x", 7, ["x"], [{"counts": "x"}], [{"settings": 7}], [{"model": 7}])),
    *(("responses", [{"counts": {"written": value, "generated": 1}}]) for value in ("x", -1, 1.5, HUGE * HUGE, None)),
    *(("parents", value) for value in ("x", 7, ["x"], [{"data": 7}], [{"data": [7]}], [{"parents": "x"}])),
    *(
        ("parents", value)
        for value in ([{"path": 7}], [{"cuts": 7}], [{"operation": {}}], [{"parents": [{"data": "x"}]}])
    ),
    *(("row_kind", value) for value in (7, "x", None)),
    *(("profile", value) for value in (7, "x", None)),
    *(("truncated", value) for value in (7, "x", None)),
    *(("created_by", value) for value in (7, None, "\ud800")),
    ("unknown", 1),
]


@pytest.mark.parametrize("number", range(len(HEADER_CASES)))
def test_headers(lent: Path, number: int) -> None:
    name, wrong = HEADER_CASES[number]
    with put_back(lent / "cache.json"):
        reseal(lent / "cache.json", lambda value: value.update({name: wrong}))
        assert_refused(lent, r"cache\.json")


def test_a_header_that_is_deep(root: Path) -> None:
    def deepen(value: dict[str, Any]) -> None:
        for _ in range(200):
            value["parents"] = [{"parents": value["parents"]}]

    reseal(root / "cache.json", deepen)
    assert_refused(root, r"cache\.json.*deeper than 100")


RECORD_CASES: list[tuple[str, Any]] = [
    *(
        (name, value)
        for name in ("num_tokens", "num_response_tokens", "num_entries", "index")
        for value in (*WRONG, HUGE)
    ),
    ("cache_digest", 7),
    ("cache_digest", "x"),
    ("format_version", 2),
    *(("sample_ids", value) for value in (["a"], ["a", "a", "b"], [1, 2, 3], ["a", "b", "\ud800"], None, "abc")),
    *((name, value) for name in ("kinds", "digests", "response_xxh3") for value in (["x"], [1, 2, 3], "x", None)),
    *(
        ("sample_tokens", value)
        for value in ([3, 4, 3], [3, 4, -2], [10, -3, 2], [HUGE, 4, 2], [3.0, 4.0, 2.0], [9, 0, 0])
    ),
    *(("sample_response_tokens", value) for value in ([3, 4, 3], [2, 5, 2], [-3, 10, 2], ["3", "4", "2"])),
    *(
        (name, value)
        for name in ("entropy_last", "gold_logprob_last", "kept_mass")
        for value in ([1.0], ["x"] * 3, None)
    ),
    *(("summary", value) for value in ({}, {"entropy": [1.0]}, {"x": [1.0] * 4}, "x", None)),
    *(("skipped", value) for value in ("x", ["x"], None)),
    *(("files", value) for value in ({}, "x", {"zarr.json": 7}, {"zarr.json": {"size": -1, "xxh3": "x"}})),
]


@pytest.mark.parametrize("number", range(len(RECORD_CASES)))
def test_commit_records(lent: Path, number: int) -> None:
    name, wrong = RECORD_CASES[number]
    with put_back(record_of(lent), lent / "samples.parquet"):
        reseal(record_of(lent), lambda value: value.update({name: wrong}))
        (lent / "samples.parquet").unlink()
        assert_refused(lent, r"000001\.zarr/part\.json")


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"num_tokens": HUGE, "num_entries": HUGE * 24, "sample_tokens": [HUGE, 0, 0]}, "rows for 3 response tokens"),
        (
            {
                "num_tokens": HUGE,
                "num_response_tokens": HUGE,
                "num_entries": HUGE * 24,
                "sample_tokens": [HUGE, 0, 0],
                "sample_response_tokens": [HUGE, 0, 0],
            },
            "which its file of .* bytes cannot hold",
        ),
        (
            {
                "num_tokens": 10**4,
                "num_response_tokens": 10**4,
                "num_entries": 24 * 10**4,
                "sample_tokens": [10**4, 0, 0],
                "sample_response_tokens": [10**4, 0, 0],
            },
            "a chunk holds .* bytes, and must hold|token counts are not those",
        ),
    ],
)
def test_counts_that_fit_each_other_and_not_the_files(root: Path, counts: dict[str, Any], says: str) -> None:
    reseal(record_of(root), lambda value: value.update(counts))
    (root / "samples.parquet").unlink()
    reseal(root / "cache.json", lambda value: value.update(num_response_tokens=counts["num_tokens"] + 19))
    reseal_parts(root)
    assert_refused(root, says)


def test_the_plan_is_compared_with_the_parts(root: Path) -> None:
    reseal(root / "cache.json", lambda value: value.update(num_samples=8))
    reseal_parts(root)
    assert_refused(root, r"cache\.json`?: `num_samples` is 8, and the parts hold 7")


def packed(values: np.ndarray) -> bytes:
    body = bytes(blosc.compress(np.ascontiguousarray(values), b"zstd", 5, 1, 0))
    return body + int(google_crc32c.value(body)).to_bytes(4, "little")


def rewrite(root: Path, name: str, change: Callable[[np.ndarray], np.ndarray], num_layers: int = 4) -> None:
    """Change an array of part 1 as its values lie in the file, and everything that says what it must be."""
    folder, path = record_of(root).parent, data_file(root, name)
    content = path.read_bytes()
    dtype = json.loads((folder / name / "zarr.json").read_text())["data_type"]
    if name in ("offsets", "response_offsets", "response_ids", "positions"):
        path.write_bytes(packed(change(np.frombuffer(blosc.decompress(content[:-4]), dtype).copy())))
    else:
        chunks = num_layers if "kept" not in {one.name for one in folder.iterdir()} or name not in FLAT else 1
        index = np.frombuffer(content[-16 * chunks - 4 : -4], "<u8").reshape(-1, 2).tolist()
        pieces = [content[at : at + size] for at, size in index]
        stored = pieces[0][:-4]
        is_packed = '"blosc"' in (folder / name / "zarr.json").read_text()
        values = np.frombuffer(blosc.decompress(stored) if is_packed else stored, dtype).copy()
        body = change(values)
        raw = bytes(np.ascontiguousarray(body).tobytes())
        pieces[0] = packed(body) if is_packed else raw + int(google_crc32c.value(raw)).to_bytes(4, "little")
        sizes = np.array([len(piece) for piece in pieces])
        table = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8").tobytes()
        path.write_bytes(b"".join([*pieces, table, google_crc32c.value(table).to_bytes(4, "little")]))
    content, file = path.read_bytes(), path.relative_to(folder).as_posix()
    entry = {"size": len(content), "xxh3": xxhash.xxh3_64_hexdigest(content)}
    ids = np.frombuffer(blosc.decompress((folder / "response_ids/c/0").read_bytes()[:-4]), "<u4")

    def update(value: dict[str, Any]) -> None:
        value["files"][file] = entry
        value.pop("chunk_bytes", None)  # as in parts of earlier writers
        if name == "response_ids":
            ends = np.cumsum(value["sample_response_tokens"])
            value["response_xxh3"] = [xxhash.xxh3_64_hexdigest(one.tobytes()) for one in np.split(ids, ends[:-1])]

    reseal(folder / "part.json", update)
    (root / "samples.parquet").unlink(missing_ok=True)


FLAT = ("ids", "levels", "logprob_gaps", "logprobs", "counts")


def put(at: int, value: object) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[at] = value
        return values

    return change


SIZED = ("ids", "levels", "entropy", "positions")
ARRAY_CASES: list[tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = [
    ("plain-default", "offsets", lambda a: a - HUGE),
    ("plain-default", "offsets", lambda a: a[::-1]),
    ("plain-default", "offsets", lambda a: a + 1),
    ("plain-default", "offsets", lambda a: a[:-1]),
    ("plain-default", "offsets", put(-1, 2**62)),
    ("plain-default", "response_offsets", lambda a: a - HUGE),
    ("plain-default", "response_offsets", put(1, 1)),
    ("plain-default", "positions", lambda a: a + 10**9),
    ("plain-default", "positions", put(1, 0)),
    ("plain-default", "positions", lambda a: a[::-1]),
    ("plain-default", "positions", lambda a: np.concatenate([a, a])),
    ("chosen-default", "positions", put(0, 2**32 - 1)),
    ("plain-default", "response_ids", put(0, 100)),
    ("plain-default", "response_ids", put(0, 2**32 - 1)),
    ("plain-default", "ids", put(0, 100)),
    ("plain-default", "ids", put(0, 65535)),
    ("plain-default", "tail_ids", put(0, 100)),
    ("plain-default", "levels", put(-1, 255)),
    ("plain-default", "levels", lambda a: a[::-1]),
    ("plain-exact", "logprob_gaps", put(0, 0x3F800000)),
    ("plain-exact", "logprob_gaps", put(0, 0x7FC00000)),
    ("plain-exact", "logprob_gaps", put(-1, 2**31)),
    ("plain-fast", "logprobs", put(0, 1.0)),
    ("plain-fast", "logprobs", put(0, np.nan)),
    ("plain-fast", "logprobs", put(1, 0.0)),
    ("plain-fast", "ids", put(0, 100)),
    ("top-p-default", "kept", put(0, 7)),
    ("top-p-default", "levels", lambda a: np.full_like(a, 255)),
    ("top-p-exact", "logprob_gaps", put(0, 0x3F800000)),
    ("top-p-fast", "logprobs", put(0, 1.0)),
    ("sampled-default", "counts", put(0, 0)),
    ("sampled-default", "counts", put(0, 255)),
    ("plain-default", "lse", put(0, np.nan)),
    ("plain-default", "lse", put(0, np.inf)),
    ("plain-default", "entropy", put(0, np.nan)),
    ("plain-default", "entropy", put(0, -np.inf)),
    ("plain-default", "gold_logprob", put(0, np.nan)),
    ("plain-default", "gold_logprob", put(0, 1.0)),
    ("plain-default", "tail_mass", put(0, 1.5)),
    ("plain-default", "tail_mass", put(0, -0.5)),
    ("plain-default", "tail_mass", put(0, np.nan)),
    *(("plain-default", name, lambda a: np.zeros(3, a.dtype)) for name in ("ids", "levels", "entropy", "positions")),
    *(
        ("plain-default", name, lambda a: np.zeros(10**7, a.dtype))
        for name in ("ids", "levels", "entropy", "positions")
    ),
]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("variants")
    names = sorted({name for name, _, _ in ARRAY_CASES})
    return {name: build_variant(folder / name, variant_of(name)) for name in names}


@pytest.mark.parametrize("number", range(len(ARRAY_CASES)))
def test_arrays(variants: dict[str, Path], number: int) -> None:
    name, array, change = ARRAY_CASES[number]
    root = variants[name]
    with put_back(data_file(root, array), record_of(root), root / "samples.parquet"):
        rewrite(root, array, change, num_layers=3)
        assert_refused(root, rf"000001\.zarr.*{array}")


def test_an_id_twice_in_a_row_is_seen_by_verify(variants: dict[str, Path], tmp_path: Path) -> None:
    """A sort of every row: too slow for reading."""
    for name in ("plain-default", "top-p-default", "plain-fast"):
        root = copy_cache(variants[name], tmp_path / name)
        rewrite(root, "ids", lambda values: np.zeros_like(values), num_layers=3)
        assert any("keeps an id twice" in problem.what for problem in verify(root).problems), name


@pytest.mark.parametrize("wrong", ["repeated", "beyond", "short"])
def test_tables_of_ranks(tmp_path: Path, wrong: str) -> None:
    case = make_case([[5, 1], [3]], list("abc"))
    root = build(tmp_path / "c", case)
    path = root / "vocab/id_of_rank/c/0"
    ids = np.frombuffer(blosc.decompress(path.read_bytes()[:-4]), "<u4").copy()
    ids[0] = {"repeated": ids[1], "beyond": 2**31, "short": ids[0]}[wrong]
    content = packed(ids[: 3 if wrong == "short" else None])
    heads = np.frombuffer(blosc.decompress((root / "vocab/heads/c/0/0").read_bytes()[:-4]), "<u4")
    digest = xxhash.xxh3_64_hexdigest(ids.tobytes() + heads.tobytes())

    def update(value: dict[str, Any]) -> None:
        value["id_of_rank_xxh3"] = digest
        value["vocab_files"]["id_of_rank/c/0"] = {"size": len(content), "xxh3": xxhash.xxh3_64_hexdigest(content)}

    path.write_bytes(content)
    shutil.rmtree(root / "vocab-copy")
    shutil.copytree(root / "vocab", root / "vocab-copy")
    reseal(root / "cache.json", update)
    reseal_parts(root)
    (root / "samples.parquet").unlink()
    assert_refused(root, r"vocab.*(id_of_rank|permutation)")


def test_an_id_in_two_parts(root: Path) -> None:
    reseal(record_of(root), lambda value: value.update(sample_ids=["sample-0", *value["sample_ids"][1:]]))
    table = (root / "samples.parquet").read_bytes()
    (root / "samples.parquet").unlink()
    with pytest.raises(CacheCorruptError, match=r"sample 'sample-0' is in parts \[0, 1\]"):
        reader.open(root)
    assert [p.file for p in verify(root).problems] == ["parts/000001.zarr/part.json"]
    (root / "samples.parquet").write_bytes(table)  # a table that says otherwise: the part is asked
    with pytest.raises(CacheCorruptError, match=r"holds 'sample-0', samples.parquet says 'sample-2'"):
        _ = reader.open(root)["sample-2"]


FILES = ["cache.json", "samples.parquet", "vocab/id_of_rank/c/0", "vocab/text/c/0", "vocab-copy/heads/zarr.json"]
FILES += ["parts/000001.zarr/part.json", "parts/000001.zarr/ids/c/0/0/0", "parts/000001.zarr/offsets/c/0"]
FILES += ["parts/000001.zarr/zarr.json", "parts/000001.zarr/entropy/zarr.json"]


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device", "a folder"])
@pytest.mark.parametrize("name", FILES)
def test_special_files_are_not_opened(
    variants: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    root = variants["chosen-default"]
    with put_back(root / name):
        with monkeypatch.context() as patch:
            patch.chdir(root / Path(name).parent)  # the name of a socket must be short
            replace_by(kind, Path(Path(name).name))
        report = verify(root, deep=True)
        assert not report.ok
        shown = r"symbolic link" if kind == "a device" and name.startswith("parts") else kind
        if name not in ("samples.parquet", "cache.json") and "vocab" not in name:
            assert any(re.search(shown, str(problem)) for problem in report.problems), str(report)
        if "zarr.json" in name and name.startswith("vocab"):
            return
        with pytest.raises(VlsiCacheError, match=shown):
            everything(root)


def replace_by(kind: str, file: Path) -> None:
    file.unlink()
    if kind == "a named pipe":
        os.mkfifo(file)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(file))
    elif kind == "a folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero")  # reading it never ends


def test_links_to_files_are_read(root: Path, tmp_path: Path) -> None:
    for name in ("cache.json", "samples.parquet"):
        (root / name).rename(tmp_path / name)
        (root / name).symlink_to(tmp_path / name)
    everything(root)


def test_what_is_crafted_is_not_what_a_writer_makes(root: Path) -> None:
    """The cases above change one thing each: sealed again without a change, the cache is fine."""
    reseal(root / "cache.json", lambda value: value.update(skipped=[]))
    reseal(record_of(root), lambda value: value.update(skipped=[]))
    rewrite(root, "positions", lambda values: values)
    everything(root)
    assert verify(root, deep=True).ok
    assert header_of(standard_case()).num_samples == 7
