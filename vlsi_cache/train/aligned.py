"""A student with another tokenizer than the teacher of its cache: which of its tokens are compared with what.

Both say one answer, each as its own chat template writes it. A chunk of the alignment that begins alike on both sides
has the teacher's row at its first token, in the student's words; a chunk that is not one token with one meaning on both
sides is compared as a whole besides (`sparse/alm.py`). The end of the turn is a chunk like any other where both end it
right behind the answer: the teacher's token for it is the student's, whatever the two are called.

Shapes: R response tokens of one side, T tokens of the student that are compared with something, C chunks, L layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.offsets import Side, align, response_lengths, response_texts
from vlsi_cache.data.records import Record
from vlsi_cache.data.token_bytes import TokenBytes, vocabulary_map
from vlsi_cache.errors import DataError, FingerprintMismatchError, ModelError, VlsiCacheError
from vlsi_cache.models.load import ModelRef, resolve_model
from vlsi_cache.sparse.alm import Chunks, mapped_rows
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.store.arrays import BYTES_ARRAY
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.store.part import Row
from vlsi_cache.store.reader import Cache


class AlignedRow(NamedTuple):
    """A cached sample in the student's tokens: its response ids [R], which of them are compared with something (T), and
    with what. Rows and chunks count those T tokens; None where no layers were read."""

    sample_id: str
    response_ids_R: np.ndarray
    tokens_T: np.ndarray
    rows: SparseRows | None
    chunks: Chunks | None


@dataclass(frozen=True)
class Aligner:
    """The teacher's tokenizer of a cache beside a student's; made by `open_aligner`."""

    cache: Cache
    encoder: Encoder
    teacher: TokenBytes
    student: TokenBytes

    @cached_property
    def is_same(self) -> bool:
        """Whether both have one vocabulary."""
        return same_tokenizer(self.cache.header, self.encoder)

    def aligned(self, record: Record, row: Row) -> AlignedRow:
        """The row in the student's tokens. Raises FingerprintMismatchError where both do not say the same, DataError
        for a tokenizer that changes the text, ModelError where the cache does not say the bytes of its tokens."""
        ids_R = self.encoder.measure(record)[1]
        if self.is_same and np.array_equal(ids_R, row.response_ids_R):  # whatever bytes they are
            places_R = np.arange(len(ids_R))
            chunks_C4, alike_C = np.stack([places_R, places_R + 1] * 2, axis=1), np.ones(len(ids_R), bool)
        else:
            chunks_C4, alike_C = self._chunks(record, row, ids_R)
        has_row_R, row_of_R = np.zeros(len(row.response_ids_R) + 1, np.int64), np.full(len(row.response_ids_R), -1)
        row_of_R[row.positions_T] = np.arange(row.num_tokens)
        has_row_R[1:] = np.cumsum(row_of_R >= 0)
        if not row.num_layers:
            return AlignedRow(row.sample_id, ids_R, np.arange(len(ids_R)), None, None)
        first_t, behind_t, first_s, behind_s = chunks_C4.T
        compares_C = alike_C & (row_of_R[first_t] >= 0)
        map_V = self._map(int(row.response_ids_R[-1]))
        same_word_C = map_V[row.response_ids_R[first_t]] == ids_R[first_s]
        is_one_C = (behind_t - first_t == 1) & (behind_s - first_s == 1) & same_word_C & compares_C
        # What a chunk as a whole is compared with, needs all of its teacher tokens.
        as_whole_C = ~is_one_C & (has_row_R[behind_t] - has_row_R[first_t] == behind_t - first_t)
        used_R = np.zeros(len(ids_R), bool)
        used_R[first_s[compares_C]] = True
        for first, behind in zip(first_s[as_whole_C].tolist(), behind_s[as_whole_C].tolist(), strict=True):
            used_R[first:behind] = True
        place_R = np.cumsum(used_R) - 1
        rows, lost_P = mapped_rows(row.select_tokens(row_of_R[first_t[compares_C]]), map_V, self.encoder.vocab_size)
        chunks = Chunks(
            place_R[first_s[compares_C]],
            lost_P,
            _padded(place_R, first_s[as_whole_C], behind_s[as_whole_C]),
            _sums(row, row_of_R, first_t[as_whole_C], behind_t[as_whole_C]),
        )
        return AlignedRow(row.sample_id, ids_R, np.flatnonzero(used_R), rows, chunks)

    def _chunks(self, record: Record, row: Row, ids_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths_R = response_lengths(self.encoder, record, ids_R.tolist(), response_texts(self.encoder, [record])[0])
        theirs_R = row.response_bytes_R
        if theirs_R is None:
            theirs_R = self._recomputed(record, row)
        sides = Side.of(row.response_ids_R, theirs_R, self.teacher), Side.of(ids_R, lengths_R, self.student)
        try:
            found = align(*sides, record.answer)
        except DataError as error:
            raise FingerprintMismatchError(f"sample `{row.sample_id}`: {error}") from None
        return found.chunks_C4, found.begins_alike_C

    def _recomputed(self, record: Record, row: Row) -> np.ndarray:
        """The bytes of the teacher's tokens, of its own tokenizer and template, where the cache does not say them."""
        of_teacher = self._teacher_encoder
        if of_teacher is None:
            raise ModelError(
                f"sample `{row.sample_id}` of {self.cache.path} has no byte offsets, and the teacher's tokenizer, from "
                f"which they could be made, is not there ({_teacher_name(self.cache.header)}); build the cache again, "
                "or put the tokenizer where it was"
            )
        (text,) = response_texts(of_teacher, [record])
        return response_lengths(of_teacher, record, row.response_ids_R.tolist(), text)

    @cached_property
    def _teacher_encoder(self) -> Encoder | None:
        return teacher_encoder(self.cache)

    def _map(self, end_of_turn: int) -> np.ndarray:
        """`vocabulary_map`, with the teacher's token that ends a turn."""
        if end_of_turn not in self._maps:
            ends = (end_of_turn, self.encoder.eot_id)
            is_identity = self.is_same and ends[0] == ends[1]
            table = np.arange(len(self.teacher)) if is_identity else vocabulary_map(self.teacher, self.student, ends)
            self._maps[end_of_turn] = table
        return self._maps[end_of_turn]

    @cached_property
    def _maps(self) -> dict[int, np.ndarray]:
        return {}


def _padded(place_R: np.ndarray, first_C: np.ndarray, behind_C: np.ndarray) -> np.ndarray:
    """[C, W]: the tokens of each chunk, -1 behind its last."""
    width = int((behind_C - first_C).max(initial=1))
    tokens_CW = first_C[:, None] + np.arange(width)
    return np.where(tokens_CW < behind_C[:, None], place_R[np.minimum(tokens_CW, len(place_R) - 1)], -1)


def _sums(row: Row, row_of_R: np.ndarray, first_C: np.ndarray, behind_C: np.ndarray) -> np.ndarray:
    """float32 [L, C]: what each layer of the teacher gives the tokens of a chunk together, all of which have rows."""
    gold_LT = row.gold_logprob_LT.astype(np.float64)
    sums = [gold_LT[:, row_of_R[low:high]].sum(1) for low, high in zip(first_C, behind_C, strict=True)]
    return np.stack(sums, axis=1).astype(np.float32) if sums else np.zeros((row.num_layers, 0), np.float32)


def same_tokenizer(header: CacheHeader, encoder: Encoder) -> bool:
    """Whether the student has the vocabulary of the cache."""
    same = str(header.fingerprint.get("encoder.tokenizer")) == str(encoder.fingerprint()["tokenizer"])
    return same and header.vocab_size == encoder.vocab_size


def open_aligner(cache: Cache, encoder: Encoder) -> Aligner:
    """Raises ModelError where the bytes of the tokens of either side are not known."""
    student, found = encoder.token_bytes, cache.token_pieces()
    if student is None:
        raise ModelError(
            f"`distill.alignment: byte` needs to know which bytes the tokens of `{encoder.name}` are, and its "
            "tokenizer is neither byte-level BPE nor SentencePiece; choose a student of the teacher's family"
        )
    if found is not None:
        num_without = len(cache.parts) - len(cache.parts_with(BYTES_ARRAY))
        if num_without and not same_tokenizer(cache.header, encoder) and teacher_encoder(cache) is None:
            raise ModelError(
                f"{num_without} of the {len(cache.parts)} parts of {cache.path} have no byte offsets (an earlier "
                "release has built them), and the teacher's tokenizer, from which they could be made, is not at "
                f"{_teacher_name(cache.header)}; put it there, or build the cache again"
            )
        return Aligner(cache, encoder, TokenBytes(*found), student)
    of_teacher = teacher_encoder(cache)
    if of_teacher is None or of_teacher.token_bytes is None:
        raise ModelError(
            f"{cache.path} does not say which bytes the teacher's tokens are (an earlier release has built it, or the "
            "teacher's tokenizer is neither byte-level BPE nor SentencePiece), and no such tokenizer is at "
            f"{_teacher_name(cache.header)}: `distill.alignment: byte` is not possible; build the cache again"
        )
    return Aligner(cache, encoder, of_teacher.token_bytes, student)


def teacher_encoder(cache: Cache) -> Encoder | None:
    """The encoder of the cache's own teacher, if it is still there and its vocabulary is that of the cache."""
    try:
        spec = spec_from_dict(cache.header.spec, where=str(cache.path))
        named = ModelRef(resolve_model(spec.teacher.model), spec.teacher.revision, spec.teacher.gguf_file)
        encoder = named.encoder(spec.data.encoding())
    except VlsiCacheError:
        return None
    return encoder if same_tokenizer(cache.header, encoder) else None


def _teacher_name(header: CacheHeader) -> str:
    return f"`{(header.spec.get('teacher') or {}).get('model', 'an unknown place')}`"


def aligned_samples(aligner: Aligner, samples: Iterator[Any]) -> Iterator[Any]:
    """Cached samples with their rows in the student's tokens, which are also what is counted."""
    for sample in samples:
        row = aligner.aligned(*sample.pair)
        yield sample._replace(row=row, num_tokens=len(row.tokens_T))
