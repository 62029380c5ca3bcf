"""Students with another tokenizer than their teacher: equal tokenizers change no bit, other ones learn, and what cannot
be aligned is refused with one error.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import metrics_of
from helpers.spellings import OTHER_TEMPLATE, byte_fallback, byte_level, metaspace, save_llama
from helpers.tiny import WORDS, make_rows, write_jsonl, write_spec

import vlsi_cache as vc
from vlsi_cache.errors import DataError, FingerprintMismatchError, ModelError, SpecError
from vlsi_cache.models.load import ModelRef
from vlsi_cache.store.arrays import BYTES_ARRAY
from vlsi_cache.store.reader import Cache
from vlsi_cache.teacher.sync import sync_cache
from vlsi_cache.train.aligned import open_aligner
from vlsi_cache.train.loader import match_records
from vlsi_cache.train.student import cached_sources

BYTE = ["distill.alignment=byte"]
SHORT = [f"distill.{name}.steps=2" for name in ("verbalize", "interact.schedule", "sft.schedule")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Cache:
    folder = tmp_path_factory.mktemp("byte")
    spec = vc.load_spec(write_spec(folder, teacher_folder, num_rows=16), overrides=[*SHORT, "data.max_length=128"])
    return vc.build_teacher(spec, out=folder / "cache")


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SentencePiece with bytes, and a template that ends a turn otherwise."""
    tokenizer = byte_fallback([" ".join(WORDS[:5])], size=50, template=OTHER_TEMPLATE)
    return save_llama(tmp_path_factory.mktemp("other"), tokenizer, num_layers=3, hidden=16, seed=2)


def without_bytes(cache: Cache, folder: Path, *, only_a_part: bool = False, **spec: Any) -> Cache:
    """The cache as an earlier release has written it, or one part of it alone, as in a merged one."""
    from vlsi_cache.store.format import RECORD_NAME, sealed_json

    shutil.copytree(cache.path, folder)
    header = cache.header
    files = {name: file for name, file in header.vocab_files.items() if only_a_part or not name.startswith("bytes")}
    header = header.model_copy(update={"vocab_files": files, "spec": {**header.spec, **spec}})
    (folder / "cache.json").write_bytes(sealed_json(header.model_dump()))
    for name in () if only_a_part else ("vocab", "vocab-copy"):
        for path in (folder / name).glob("bytes*"):
            shutil.rmtree(path)
    for index in cache.parts[:1] if only_a_part else cache.parts:
        part, record = folder / "parts" / f"{index:06d}.zarr", cache.part_record(index)
        shutil.rmtree(part / BYTES_ARRAY)
        files = {name: file for name, file in record.files.items() if not name.startswith(BYTES_ARRAY)}
        (part / RECORD_NAME).write_bytes(sealed_json(record.model_copy(update={"files": files}).model_dump()))
    (folder / "samples.parquet").unlink()
    return vc.open(folder)


def test_a_student_of_the_same_tokenizer_trains_bit_for_bit_as_without(
    cache: Cache, student_folder: Path, tmp_path: Path
) -> None:
    changes = {"tokens": [], "byte": BYTE}
    for name, more in changes.items():
        vc.distill(cache, student=str(student_folder), out=tmp_path / name, overrides=more)
    tokens, byte = ([line | {"elapsed_s": 0} for line in metrics_of(tmp_path / name)] for name in changes)
    assert tokens == byte
    assert {line["stage"] for line in byte} == {"verbalize", "interact", "sft"}
    files = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in changes]
    assert files[0] == files[1]


def test_another_tokenizer_learns_in_all_stages_and_is_evaluated(
    cache: Cache, other_folder: Path, tmp_path: Path
) -> None:
    more = [*BYTE, "distill.interact.schedule.steps=12", "distill.interact.schedule.learning_rate=0.03"]
    more += ["distill.batch_size=16", "distill.micro_batch_size=8"]
    run = vc.distill(cache, student=str(other_folder), out=tmp_path / "run", overrides=more)
    lines = [line for line in metrics_of(run) if line["stage"] == "interact"]
    assert lines[-1]["kl_last"] < 0.9 * lines[0]["kl_last"]
    assert all(lines[-1]["layers"][layer] < lines[0]["layers"][layer] for layer in ("1", "2"))
    assert set(lines[0]["probe"]) == {"1", "2", "3"}
    result = vc.evaluate(run, cache=cache)
    of_cache = result["cache"]
    assert of_cache["alignment"] == "byte"
    assert 0 < of_cache["num_rows"] <= of_cache["num_tokens"]
    assert 0 < of_cache["kl"] < np.inf
    assert [len(kl_L) for kl_L in of_cache["layers"].values()] == [5, 5]
    assert set(result["layers"]) == {"1", "2"}
    start = vc.evaluate(
        other_folder, spec=vc.load_spec(Path(cache.path).parent / "spec.yaml", overrides=BYTE), cache=cache
    )
    assert of_cache["kl"] < start["cache"]["kl"]
    # The last layer alone, from labels and from chunks.
    last = vc.distill(cache, student=str(other_folder), out=tmp_path / "last", recipe="last", overrides=BYTE)
    assert {line["stage"] for line in metrics_of(last)} == {"interact", "sft"}


def test_vocabularies_with_no_word_in_common_leave_the_chunks(
    cache: Cache, other_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlsi_cache.train.aligned.vocabulary_map", lambda teacher, *_: np.full(len(teacher), -1))
    more = [*BYTE, "distill.verbalize.steps=1", "distill.interact.schedule.steps=1", "distill.sft.fraction=0"]
    run = vc.distill(cache, student=str(other_folder), out=tmp_path / "run", recipe="last", overrides=more)
    lines = metrics_of(run)
    assert all(0 < line["kl_last"] < np.inf for line in lines)
    assert lines[0]["probe"]["3"]["kept_mass"] == pytest.approx(0, abs=1e-6)


def test_rows_say_the_same_words_and_chunks_all_of_the_response(cache: Cache, other_folder: Path) -> None:
    encoder = ModelRef(str(other_folder)).encoder()
    aligner = open_aligner(cache, encoder)
    records = match_records(cache, cached_sources(cache))
    num_rows = num_chunks = 0
    for name in cache:
        row = cache.row(name)
        found = aligner.aligned(records[name], row)
        assert found.rows is not None
        assert found.chunks is not None
        found.rows.validate(encoder.vocab_size)
        # An oracle that knows nothing of chunks: what the teacher says of its tokens is said once, by rows of one token
        # or by chunks.
        alone = set(range(len(found.tokens_T))) - set(found.chunks.tokens_CW.flatten().tolist())
        of_rows = [place for place, token in enumerate(found.chunks.index_P.tolist()) if token in alone]
        number = {tuple(entropy_L): at for at, entropy_L in enumerate(row.entropy_LT.T.tolist())}
        token_of = [number[tuple(entropy_L)] for entropy_L in found.rows.entropy_LT.T.tolist()]
        teacher_tokens = [token_of[place] for place in of_rows]
        total_L = row.gold_logprob_LT[:, teacher_tokens].sum(1) + found.chunks.logprobs_LC.sum(1)
        np.testing.assert_allclose(total_L, row.gold_logprob_LT.sum(1), rtol=1e-4)
        # The first words that both have are the same.
        for place in range(found.rows.num_tokens):
            own = [(encoder.token_bytes.pieces[i], p) for i, p in _kept(found.rows, place)]  # type: ignore[union-attr]
            theirs = {aligner.teacher.pieces[i]: p for i, p in _kept(row, token_of[place])}
            assert all(theirs.get(piece) == p for piece, p in own if piece != b"</s>")
        num_rows, num_chunks = num_rows + found.rows.num_tokens, num_chunks + found.chunks.logprobs_LC.shape[1]
    assert num_rows > 20
    assert num_chunks > 20


def _kept(rows: Any, token: int) -> list[tuple[int, float]]:
    pairs = zip(rows.ids_LTK[-1, token].tolist(), rows.logprobs_LTK[-1, token].tolist(), strict=True)
    return [(index, logprob) for index, logprob in pairs if np.isfinite(logprob)]


def test_a_cache_of_an_earlier_release_is_read_with_the_teacher_s_tokenizer_or_refused(
    cache: Cache, other_folder: Path, tmp_path: Path
) -> None:
    old = without_bytes(cache, tmp_path / "old")
    assert old.header.digest == cache.header.digest
    assert old.verify(deep=True).ok
    encoder = ModelRef(str(other_folder)).encoder()
    records, name = match_records(cache, cached_sources(cache)), next(iter(cache))
    aligned = [open_aligner(one, encoder).aligned(records[name], one.row(name)) for one in (cache, old)]
    np.testing.assert_array_equal(aligned[0].tokens_T, aligned[1].tokens_T)
    teacher = {**cache.header.spec["teacher"], "model": str(tmp_path / "gone")}
    lost = without_bytes(cache, tmp_path / "lost", teacher=teacher)
    with pytest.raises(
        ModelError, match=r"does not say which bytes the teacher's tokens are.*gone.*build the cache again"
    ):
        vc.distill(lost, student=str(other_folder), out=tmp_path / "run", overrides=BYTE)
    mixed = without_bytes(cache, tmp_path / "mixed", only_a_part=True, teacher=teacher)
    assert "byte offsets in 2 of 3 parts, the vocabulary with bytes" in str(vc.inspect(mixed))
    with pytest.raises(ModelError, match=r"1 of the 3 parts of .* no byte offsets .*gone.*build the cache again"):
        vc.distill(mixed, student=str(other_folder), out=tmp_path / "run", overrides=BYTE)


def test_a_cache_of_an_earlier_release_that_follows_its_data_is_still_one_without_bytes(
    cache: Cache, other_folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    old = without_bytes(cache, tmp_path / "cache")
    assert "token texts, without byte offsets" in str(vc.inspect(old))
    assert "token texts, with byte offsets" in str(vc.inspect(cache))
    file = write_spec(tmp_path, teacher_folder, num_rows=16)
    write_jsonl(tmp_path / "rows.jsonl", [*make_rows(16), *make_rows(3, start=500)])
    synced = sync_cache(vc.load_spec(file, overrides=[*SHORT, "data.max_length=128"]), out=old.path)
    assert "row-500" in synced
    assert len(synced.parts) > len(cache.parts)
    assert (synced.parts_with(BYTES_ARRAY), synced.token_pieces()) == ([], None)
    assert "token texts, without byte offsets" in str(vc.inspect(synced))
    aligner = open_aligner(synced, ModelRef(str(other_folder)).encoder())
    record = match_records(synced, cached_sources(synced))["row-500"]
    assert len(aligner.aligned(record, synced.row("row-500")).tokens_T)


def test_what_cannot_be_aligned_is_refused(cache: Cache, other_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def refused(error: type[Exception], match: str, *changes: str, student: Path = other_folder) -> None:
        with pytest.raises(error, match=match):
            vc.distill(cache, student=str(student), out=out, overrides=[*BYTE, *changes])
        assert not out.exists()

    with pytest.raises(ModelError, match=r"another tokenizer than the teacher.*`distill.alignment: byte`"):
        vc.distill(cache, student=str(other_folder), out=out)
    refused(SpecError, "compares at `tau: 1` alone", "distill.interact.tau=2.0")
    refused(SpecError, "`l2_topk` has no value for a chunk", "distill.interact.last=l2_topk")
    with pytest.raises(SpecError, match=r"`interact.chunk_temperature` belongs to `alignment: byte`"):
        vc.distill(cache, student=str(other_folder), out=out, overrides=["distill.interact.chunk_temperature=2"])
    said = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "The Cat"}]
    rows = [{**row, "messages": said} for row in make_rows(4)]
    write_jsonl(tmp_path / "upper.jsonl", rows)
    upper = vc.build_teacher(
        vc.load_spec(Path(cache.path).parent / "spec.yaml", overrides=[f"data.path={tmp_path / 'upper.jsonl'}"]),
        out=tmp_path / "upper",
    )
    lower = save_llama(tmp_path / "lower", byte_level(lower=True), num_layers=3, hidden=16, seed=0)
    with pytest.raises(
        DataError, match=r"row `row-0`, tokenizer of `.*lower`.*at byte 0 `The Cat.* has byte 0x54.*0x74"
    ):
        vc.distill(upper, student=str(lower), out=out, overrides=BYTE)
    words = save_llama(tmp_path / "words", metaspace(), num_layers=3, hidden=16, seed=0)
    refused(DataError, "its tokens are not its text", student=words)
    # Another answer than the teacher's: the row is the same, so its template says something else.
    tokenizer = byte_level(
        template=OTHER_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | replace('big', 'huge') }}")
    )
    shouting = save_llama(tmp_path / "shouting", tokenizer, num_layers=3, hidden=16, seed=0)
    refused(FingerprintMismatchError, r"sample `row-\d+`: teacher and student do not say the same", student=shouting)


def test_a_stored_spec_of_an_earlier_release_compares_tokens(cache: Cache) -> None:
    spec = json.loads(json.dumps(cache.header.spec))
    del spec["distill"]["alignment"]
    del spec["distill"]["interact"]["chunk_temperature"]
    from vlsi_cache.config.spec import spec_from_dict

    assert spec_from_dict(spec, where="there") == spec_from_dict(cache.header.spec, where="here")
