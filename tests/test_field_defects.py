"""What went wrong with caches of other tools in the field, one test each: here it cannot happen."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.caches import build, file_bytes, header_of, make_case, standard_case
from helpers.tiny import make_rows, save_model, write_spec
from helpers.variants import build_variant, plain, variant_of

import vlsi_cache as vc
from vlsi_cache.data.collate import plan_parts
from vlsi_cache.errors import CacheCorruptError, DataError, FingerprintMismatchError
from vlsi_cache.sparse.topk import sample_uniforms, teacher_rows
from vlsi_cache.store import reader
from vlsi_cache.store.check import repair, verify
from vlsi_cache.store.dataset import plan_windows
from vlsi_cache.store.format import response_digest
from vlsi_cache.store.writer import CacheWriter
from vlsi_cache.teacher.build import build_teacher, cache_header, fingerprint
from vlsi_cache.teacher.forward import load_teacher
from vlsi_cache.teacher.inputs import open_teacher_inputs


def test_a_second_run_never_overwrites_a_finished_part(tmp_path: Path) -> None:
    case, root = standard_case(), tmp_path / "c"
    before = file_bytes(build(root, case))
    times = {file: file.stat().st_mtime_ns for file in root.rglob("*") if file.is_file()}
    writer = CacheWriter.create_or_resume(root, header_of(case), case.vocab_order)
    other = standard_case(seed=1)
    assert [writer.write_part(index, other.parts[index]) for index in range(3)] == [False] * 3
    assert file_bytes(root) == before
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_a_crash_loses_no_committed_part(tmp_path: Path) -> None:
    """The process dies in the middle of part 2 without a word; parts 0 and 1 are there, part 2 is not half there."""
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from helpers.caches import header_of, standard_case
from vlsi_cache import io
from vlsi_cache.store.writer import CacheWriter
case = standard_case()
writer = CacheWriter.create_or_resume({str(tmp_path / "c")!r}, header_of(case), case.vocab_order)
for index in (0, 1):
    writer.write_part(index, case.parts[index])
io.fsync_tree = lambda _: os._exit(9)
writer.write_part(2, case.parts[2])
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    cache = reader.open(tmp_path / "c", allow_incomplete=True)
    assert cache.parts == [0, 1]
    assert [len(cache.read_part(index)) for index in (0, 1)] == [2, 3]


@pytest.mark.parametrize("name", ["plain-fast", "top-p-exact", "sampled-default"])
def test_a_reader_is_told_nothing_but_the_path(tmp_path: Path, name: str) -> None:
    """Number of draws, widths, quantiser, codecs, dtype of the ids: all of it is in the cache."""
    variant = variant_of(name)
    row = vc.open(build_variant(tmp_path / "c", variant))["a"]
    rows = variant.case.parts[0].rows
    assert rows is not None
    want = rows.tokens(slice(0, 5))
    np.testing.assert_array_equal(row.padded_to(20).ids_LTK, want.padded_to(20).ids_LTK)
    np.testing.assert_allclose(row.padded_to(20).logprobs_LTK, want.padded_to(20).logprobs_LTK, rtol=1e-3)


@pytest.mark.parametrize("profile", ["default", "exact", "fast"])
def test_ids_above_two_to_the_seventeenth_do_not_wrap(tmp_path: Path, profile: str) -> None:
    vocab_size, shown = 200_003, [0, 65_535, 65_536, 131_071, 131_072, 131_073, 200_002]
    case = make_case([[1]], ["a"], vocab_size=vocab_size, num_layers=1, top_k=len(shown), num_tail=1)
    rows = case.parts[0].rows
    assert rows is not None
    ids = np.array(shown)[None, None]
    rows = replace(rows, ids_LTK=ids, tail_ids_LTm=np.array([[[151_935]]]))
    case = replace(case, parts=[replace(case.parts[0], rows=rows, response_ids=[np.array([151_645], np.uint32)])])
    if profile == "fast":
        case = replace(case, id_of_rank=np.arange(vocab_size), num_head=0)
    header = header_of(case).model_copy(update={"profile": profile})
    writer = CacheWriter.create_or_resume(tmp_path / "c", header, case.vocab_order)
    writer.write_part(0, case.parts[0])
    assert writer.finish()
    row = reader.open(tmp_path / "c")["a"]
    assert row.ids_LTK.ravel().tolist() == shown
    assert row.tail_ids_LTm.ravel().tolist() == [151_935]
    assert row.response_ids_R.tolist() == [151_645]


def seen_facts(spec_file: Path) -> str:
    """Digests and draws that must not depend on Python's `hash`."""
    inputs, case = open_teacher_inputs(vc.load_spec(spec_file)), standard_case()
    facts = [
        fingerprint(inputs), [r.digest for r in inputs.records], cache_header(inputs, [[0]]).digest,
        header_of(case).digest, case.vocab_order.digest, sample_uniforms(0, "a", 2, 2, 2).tolist(),
    ]  # fmt: skip
    return json.dumps(facts)


def test_nothing_depends_on_the_hash_seed_of_the_process(tmp_path: Path, teacher_folder: Path) -> None:
    """Digests, draws, parts and order of reading, in this process and in one with another seed of Python's `hash`."""
    spec_file = write_spec(tmp_path, teacher_folder, num_rows=6)
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_field_defects import seen_facts; print(hash('a'), seen_facts(Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(spec_file)]
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seeded, _, said = done.stdout.partition(" ")
    assert int(seeded) != hash("a")
    assert said.strip() == seen_facts(spec_file)
    assert len(json.loads(said)) == 6


@pytest.mark.parametrize("what", ["file", "empty folder", "half a part"])
def test_that_a_name_exists_does_not_mean_that_it_is_done(tmp_path: Path, what: str) -> None:
    case, root = standard_case(), tmp_path / "c"
    want = file_bytes(build(root, case) / "parts")
    place = root / "parts" / "000001.zarr"
    place.rename(tmp_path / "aside")
    if what == "file":
        place.write_bytes(b"half-written")
    else:
        place.mkdir()
        if what == "half a part":
            (place / "zarr.json").write_bytes((tmp_path / "aside" / "zarr.json").read_bytes())
    with pytest.raises(CacheCorruptError, match=r"000001\.zarr/part\.json` is missing; run: vlsi-cache repair"):
        reader.open(root)
    writer = CacheWriter.create_or_resume(root, header_of(case), case.vocab_order)
    with pytest.raises(CacheCorruptError, match=r"000001\.zarr"):
        writer.finish()
    assert not verify(root).ok
    assert repair(root).quarantined == ["parts/000001.zarr"]
    assert file_bytes(build(root, case) / "parts") == want


@pytest.mark.parametrize("field", ["logprobs_LTK", "lse_LTn", "entropy_LT", "gold_logprob_LT", "tail_mass_LT"])
def test_rows_that_are_not_numbers_are_refused_and_not_skipped(tmp_path: Path, field: str) -> None:
    case = standard_case()
    writer = CacheWriter.create_or_resume(tmp_path / "c", header_of(case), case.vocab_order)
    values = getattr(case.parts[1].rows, field).copy()
    values[0, 3] = np.nan
    part = replace(case.parts[1], rows=replace(case.parts[1].rows, **{field: values}))  # type: ignore[type-var]
    with pytest.raises(DataError, match=rf"`{field}` is not a number in sample 'sample-3'"):
        writer.write_part(1, part)
    assert writer.missing_parts() == [0, 1, 2]


def test_another_shuffle_seed_does_not_pass(tmp_path: Path, teacher_folder: Path) -> None:
    """It would put other samples into the parts: refused, and the order of reading has a seed of its own."""
    spec_file = write_spec(tmp_path, teacher_folder, num_rows=6)
    build_teacher(vc.load_spec(spec_file), out=tmp_path / "c")
    with pytest.raises(FingerprintMismatchError, match=r"`rows\.seed`: the cache has 0, this run has 1"):
        build_teacher(vc.load_spec(spec_file, overrides=["rows.seed=1"]), out=tmp_path / "c")
    lengths = [5] * 20
    parts = [plan_parts(lengths, seed=seed, tokens_per_part=20) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    nine = [range(i, i + 1) for i in range(9)]
    orders = [
        [w.order for w in plan_windows({0: nine, 1: nine}, seed=seed, epoch=0, rank=0, world=1, window_parts=2)]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][0]) == sorted(orders[2][0])


def test_a_resumed_build_cannot_mix_two_configurations(tmp_path: Path) -> None:
    case, root = standard_case(), tmp_path / "c"
    writer = CacheWriter.create_or_resume(root, header_of(case), case.vocab_order)
    writer.write_part(0, case.parts[0])
    for changes in ({"profile": "exact"}, {"tail_samples": 1}, {"fingerprint": {"teacher": "other"}}):
        with pytest.raises(FingerprintMismatchError, match=r"the cache has .*, this run has"):
            CacheWriter.create_or_resume(root, header_of(case).model_copy(update=changes), case.vocab_order)
    # and a part that was made for another configuration is noticed even if somebody copies it in
    other = replace(case, parts=case.parts)
    foreign = CacheWriter.create_or_resume(
        tmp_path / "other", header_of(other).model_copy(update={"fingerprint": {"teacher": "other"}}), other.vocab_order
    )
    foreign.write_part(1, case.parts[1])
    (tmp_path / "other" / "parts" / "000001.zarr").rename(root / "parts" / "000001.zarr")
    with pytest.raises(CacheCorruptError, match="belongs to another cache"):
        reader.open(root, allow_incomplete=True)


def test_alignment_is_by_token_ids_and_not_by_length(tmp_path: Path) -> None:
    """Response ids of the same number that are other ones have another digest, and the stored ones are checked."""
    one, two = np.array([5, 6, 7]), np.array([5, 7, 6])
    assert response_digest(one) != response_digest(two)
    case = make_case([[3]], ["a"])
    root = build(tmp_path / "c", replace(case, parts=[replace(case.parts[0], response_ids=[one.astype(np.uint32)])]))
    other = build(tmp_path / "o", replace(case, parts=[replace(case.parts[0], response_ids=[two.astype(np.uint32)])]))
    name = "parts/000000.zarr/response_ids/c/0"
    (root / name).write_bytes((other / name).read_bytes())  # the same length, its own valid checksum
    with pytest.raises(CacheCorruptError, match=r"response ids are not those of part\.json"):
        reader.open(root)["a"]


def test_every_sample_of_a_batch_has_its_own_draws(tmp_path: Path, teacher_folder: Path) -> None:
    """Two samples with the same text draw differently, and each draws the same alone as in a batch."""
    rows = make_rows(3)
    twin = {**rows[1], "id": "twin"}
    spec_file = write_spec(tmp_path, teacher_folder)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, twin]))
    inputs = open_teacher_inputs(vc.load_spec(spec_file, overrides=["rows.tail_samples=8"]))
    teacher = load_teacher(inputs, device="cpu")
    together, alone = teacher.rows([0, 1, 2, 3]), [teacher.rows([i])[0] for i in range(4)]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.tail_ids_LTm, other.tail_ids_LTm)
    np.testing.assert_array_equal(together[1].ids_LTK, together[3].ids_LTK)
    assert (together[1].tail_ids_LTm != together[3].tail_ids_LTm).mean() > 0.5
    assert not np.array_equal(sample_uniforms(0, "a", 2, 2, 2), sample_uniforms(0, "b", 2, 2, 2))


def test_padding_rows_of_the_head_never_get_mass(tmp_path: Path) -> None:
    """152064 rows for 151936 tokens, in small: the padding has the largest logits of all and appears nowhere."""
    vocab_size, padding = 300, 128
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator)
    head = torch.randn(vocab_size + padding, 16, generator=generator)
    gold = torch.arange(7)
    head[vocab_size:] = 100 * hidden.sum(0)
    options = {"top_k": 20, "uniforms_Tm": np.random.default_rng(0).random((7, 50)), "vocab_size": vocab_size}
    padded = teacher_rows(hidden, head, gold, **options)  # type: ignore[arg-type]
    bare = teacher_rows(hidden, head[:vocab_size].clone(), gold, **options)  # type: ignore[arg-type]
    for name, values in padded.items():
        torch.testing.assert_close(values, bare[name], rtol=0, atol=0)
    assert int(padded["ids_TK"].max()) < vocab_size
    assert int(padded["tail_ids_Tm"].max()) < vocab_size
    mass = padded["logprobs_TK"].double().exp().sum(1) + padded["tail_mass_T"]
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)
    # and through a build: the head of this teacher has 128 rows more than its tokenizer has tokens
    teacher = save_model(tmp_path / "teacher", num_layers=5, hidden=32, seed=1, padding=128)
    cache = build_teacher(vc.load_spec(write_spec(tmp_path, teacher, num_rows=6)), out=tmp_path / "c")
    head_rows = json.loads((teacher / "config.json").read_text())["vocab_size"]
    assert cache.header.vocab_size == head_rows - 128
    assert max(int(cache[name].ids_LTK.max()) for name in cache) < cache.header.vocab_size


@pytest.mark.parametrize("name", ["plain-default", "plain-fast", "per-layer-exact"])
@pytest.mark.parametrize("content", [None, b""])
def test_a_lost_chunk_does_not_read_as_zeros(tmp_path: Path, name: str, content: bytes | None) -> None:
    variant = variant_of(name)
    root = build_variant(tmp_path / "c", variant)
    opened = reader.open(root)
    for file in sorted((root / "parts" / "000000.zarr").glob("*/c/**/*")):
        if file.is_dir():
            continue
        good = file.read_bytes()
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(CacheCorruptError, match="is missing" if content is None else "0 bytes, part.json says"):
            opened.read_part(0)  # also in a cache that was opened while it was whole
        file.unlink(missing_ok=True)
        file.write_bytes(good)
    assert len(opened.read_part(0)) == 2


def test_two_processes_that_write_the_same_part_lose_no_rows(tmp_path: Path) -> None:
    """Both have written it, one renames first: one part, whole, and nothing of the other is left."""
    variant, root = plain("default"), tmp_path / "c"
    writers = [CacheWriter.create_or_resume(root, variant.header, variant.case.vocab_order) for _ in range(2)]
    inner: list[bool] = []

    def race(tmp: Path, target: Path) -> bool:
        patch.undo()  # just before the first renames, the second writes the same part from beginning to end
        inner.append(writers[1].write_part(0, variant.case.parts[0]))
        return commit_publish(tmp, target)

    from vlsi_cache.store import writer

    commit_publish = writer.publish_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "publish_dir", race)
        assert writers[0].write_part(0, variant.case.parts[0]) is False
    assert inner == [True]
    writers[0].write_part(1, variant.case.parts[1])
    assert writers[1].finish()
    assert list((root / "tmp").iterdir()) == []
    assert verify(root, deep=True).ok
    assert file_bytes(root / "parts") == file_bytes(build_variant(tmp_path / "whole", variant) / "parts")
