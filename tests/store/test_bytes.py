"""The bytes of response tokens and of the vocabulary: checked, and kept by all that makes a cache out of caches."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.caches import Case, header_of, make_case
from helpers.remote import copied

from vlsi_cache.data import offsets
from vlsi_cache.errors import CacheCorruptError, DataError
from vlsi_cache.store import reader
from vlsi_cache.store.arrays import BYTES_ARRAY, UNKNOWN_BYTES
from vlsi_cache.store.check import repair, verify
from vlsi_cache.store.derive.merge import merge
from vlsi_cache.store.derive.prune import prune
from vlsi_cache.store.diff import diff
from vlsi_cache.store.format import RECORD_NAME, part_dir, sealed_json
from vlsi_cache.store.reader import Cache
from vlsi_cache.store.vocab_order import VocabTexts
from vlsi_cache.store.writer import CacheWriter

PIECES = [bytes([index]) * (index % 3) for index in range(100)]
KINDS_V = (np.arange(100) % 4).astype(np.uint8)
LENGTHS = [[3, 1, 4], [2, 5]]


def case_of(names: Sequence[str], seed: int = 0) -> Case:
    return make_case(LENGTHS, list(names), seed=seed)


def lengths_of(case: Case, part: int) -> list[np.ndarray]:
    return [np.arange(len(ids), dtype=np.uint16) + 7 for ids in case.parts[part].response_ids]


def write(root: Path, case: Case, *, knows: Sequence[bool] = (True, True), says_words: bool = True) -> Cache:
    """A cache of which some parts say the bytes of their tokens; of the second sample they are not known."""
    texts = [str(index) for index in range(100)]
    said = VocabTexts(texts, PIECES, KINDS_V) if says_words else VocabTexts(texts)
    writer = CacheWriter.create_or_resume(root, header_of(case), case.vocab_order, token_texts=lambda: said)
    for index, part in enumerate(case.parts):
        lengths = lengths_of(case, index)
        lengths[1] = np.full_like(lengths[1], UNKNOWN_BYTES)
        writer.write_part(index, replace(part, byte_lengths=lengths) if knows[index] else part)
    writer.finish()
    return reader.open(root)


def assert_kept(cache: Cache, case: Case, *, known: Sequence[str]) -> None:
    for part, samples in enumerate(case.parts):
        for name, lengths in zip(samples.sample_ids, lengths_of(case, part), strict=True):
            if name in cache:
                found = cache.row(name, ["last"]).response_bytes_R
                assert (found is not None) == (name in known), name
                np.testing.assert_array_equal(lengths if found is None else found, lengths)
    pieces = cache.token_pieces()
    assert pieces is not None
    assert pieces[0] == PIECES
    np.testing.assert_array_equal(pieces[1], KINDS_V)
    assert verify(cache.path, deep=True).ok


def test_bytes_stay_through_prune_merge_repair_and_a_store(tmp_path: Path) -> None:
    case = case_of("abcde")
    cache = write(tmp_path / "cache", case)
    assert_kept(cache, case, known="acd")
    assert zarr.open_array(cache.path / "parts" / "000000.zarr" / BYTES_ARRAY, mode="r").shape == (8,)
    assert_kept(prune(cache, tmp_path / "small", layers=["last"], top_k=3, tokens="top:0.6"), case, known="acd")
    other = case_of("vwxyz", seed=1)
    # A part of an earlier release says nothing; in one part with others its samples are unknown.
    mixed = write(tmp_path / "mixed", other, knows=(True, False))
    assert_kept(mixed, other, known="vx")
    joined = prune(mixed, tmp_path / "joined", where="kind == 'kind'", top_k=1, layers=["last"])
    assert_kept(joined, other, known="vx")
    both = merge([cache, mixed], tmp_path / "both")
    assert_kept(both, case, known="acd")
    assert_kept(both, other, known="vx")
    old = write(tmp_path / "old", case_of("mnopq", seed=2), knows=(False, False), says_words=False)
    assert old.token_pieces() is None
    assert_kept(merge([old, cache], tmp_path / "old and new"), case, known="acd")
    far = reader.open(copied(tmp_path / "cache"))
    np.testing.assert_array_equal(far.row("a", ["last"]).response_bytes_R, [7, 8, 9])
    pieces = far.token_pieces()
    assert pieces is not None
    assert pieces[0] == PIECES
    file = tmp_path / "cache" / "parts" / "000000.zarr" / BYTES_ARRAY / "c" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert "response_bytes" in str(verify(cache.path))
    assert repair(cache.path).quarantined == ["parts/000000.zarr"]


def test_diff_sees_other_bytes_and_not_those_that_nobody_has_said(tmp_path: Path) -> None:
    case = case_of("abcde")
    one, silent = write(tmp_path / "one", case), write(tmp_path / "silent", case, knows=(False, False))
    assert diff(one, silent).is_equal
    other = write(tmp_path / "other", case)
    change_lengths(other, np.array([1, 1, 1, *[UNKNOWN_BYTES], 7, 8, 9, 10], np.uint16))
    found = diff(one, reader.open(other.path))
    assert found.other_bytes == ["a"]
    assert not found.is_equal
    assert "the response tokens of 1 samples are other bytes of its text: 'a'" in str(found)


def change_lengths(cache: Cache, lengths_R: np.ndarray) -> None:
    """Other lengths in the first part, sealed as though a writer had written them."""
    from vlsi_cache.store.arrays import part_specs
    from vlsi_cache.store.codec import encode_array
    from vlsi_cache.store.files import hash_file

    record, folder = cache.part_record(0), part_dir(cache.path, 0)
    file = f"{BYTES_ARRAY}/c/0"
    (folder / file).write_bytes(b"".join(encode_array(lengths_R, part_specs(cache.header, record)[BYTES_ARRAY])))
    files = {**record.files, file: hash_file(folder / file)}
    (folder / RECORD_NAME).write_bytes(sealed_json(record.model_copy(update={"files": files}).model_dump()))


def test_lengths_that_no_writer_writes_are_refused(tmp_path: Path) -> None:
    case = case_of("abcde")
    cache = write(tmp_path / "cache", case)
    change_lengths(cache, np.array([1, UNKNOWN_BYTES, 1, 1, 7, 8, 9, 10], np.uint16))
    with pytest.raises(CacheCorruptError, match=r"of the 3 tokens of sample 'a' the bytes of 1 are unknown"):
        reader.open(cache.path).row("a")
    part = replace(case.parts[0], byte_lengths=[np.zeros(2, np.uint16)] * 3)
    writer = CacheWriter.create_or_resume(tmp_path / "new", header_of(case), case.vocab_order)
    with pytest.raises(DataError, match=r"`byte_lengths` of sample 'a' are 2, it has 3 response tokens"):
        writer.write_part(0, part)


def test_damaged_bytes_of_the_vocabulary_are_told(tmp_path: Path) -> None:
    cache = write(tmp_path / "cache", case_of("abcde"))
    kinds = cache.path / "vocab" / "bytes_kinds" / "c" / "0"
    kinds.write_bytes((cache.path / "vocab" / "bytes_offsets" / "c" / "0").read_bytes())
    with pytest.raises(CacheCorruptError, match=r"bytes_kinds.* is not the file that cache.json names"):
        reader.open(cache.path).token_pieces()
    assert "vocab/bytes_kinds/c/0" in str(verify(cache.path))
    assert repair(cache.path).restored == ["vocab"]
    assert cache.token_pieces() is not None
    header = json.loads((cache.path / "cache.json").read_text())
    assert {"bytes/zarr.json", "bytes/c/0"} <= set(header["vocab_files"])


def test_what_is_unknown_is_the_same_number_for_who_writes_and_for_who_reads() -> None:
    assert offsets.UNKNOWN == UNKNOWN_BYTES
