"""Where the tokens of a response lie in its bytes, and how the tokens of two tokenizers lie beside each other.

Both sides write one answer, each with its own chat template. What is aligned is what both have: all of the response but
its end of turn where it is the same, else the answer itself. Where both have a border between tokens at the same byte,
a chunk ends and the next one begins, so that every aligned byte is in one chunk.

Shapes: R response tokens, C chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlsi_cache.errors import DataError

from .chat import Turn
from .records import Record
from .token_bytes import ADDED, NOTHING, TokenBytes

UNKNOWN = 0xFFFF  # the length of every token of a response whose tokens do not add up to its text
SHOWN = 24  # bytes on both sides of the first that differs


def token_lengths(ids: Sequence[int], text: bytes, table: TokenBytes) -> np.ndarray:
    """uint16 [R]: how many bytes of `text` each token is, so that they add up to all of it.

    The first token, and one behind an added token, may begin with a space that the text does not have: SentencePiece
    puts it there. Raises DataError where the tokens are another text, as after a normaliser that changes letters.
    """
    at, lengths, may_add_space = 0, [], True
    for number, index in enumerate(ids):
        piece, kind = (table.pieces[index], table.kinds_V[index]) if index < len(table) else (b"", NOTHING)
        before, behind = table.strips.get(index, (False, False))
        start = at + (_num_spaces(text, at) if before else 0)
        if may_add_space and piece[:1] == b" " and _leading_spaces(ids[number:], table) == _num_blanks(text, at) + 1:
            piece = piece[1:]
        if kind == NOTHING or not text.startswith(piece, start):
            raise DataError(_differs(number, piece, text, at))
        end = start + len(piece)
        end += _num_spaces(text, end) if behind else 0
        lengths.append(end - at)
        at, may_add_space = end, kind == ADDED
    if at < len(text):
        raise DataError(_differs(len(lengths), b"", text, at))
    if max(lengths, default=0) >= UNKNOWN:
        raise DataError(f"a token of {max(lengths)} bytes; {UNKNOWN - 1} are the most")
    return np.array(lengths, np.uint16)


def _num_spaces(text: bytes, at: int) -> int:
    """White space of any kind from there on."""
    rest = text[at:]
    return len(rest) - len(rest.lstrip())


def _num_blanks(text: bytes, at: int) -> int:
    rest = text[at:]
    return len(rest) - len(rest.lstrip(b" "))


def _leading_spaces(ids: Sequence[int], table: TokenBytes) -> int:
    """How many spaces these tokens begin with."""
    num = 0
    for index in ids:
        piece = table.pieces[index] if index < len(table) and table.kinds_V[index] != ADDED else b""
        num += _num_blanks(piece, 0)
        if not piece or piece.strip(b" "):
            break
    return num


def _differs(number: int, piece: bytes, text: bytes, at: int) -> str:
    """Names the first byte in which a token and the text differ."""
    same = next((i for i, (a, b) in enumerate(zip(piece, text[at:], strict=False)) if a != b), None)
    at += min(len(piece), len(text) - at) if same is None else same
    there = f"`{_shown(text, at)}` has byte 0x{text[at]:02x}" if at < len(text) else "the text ends"
    own = piece[same : same + 1] if same is not None else b""
    said = (
        f"token {number} has byte 0x{own[0]:02x}" if own else f"token {number} is `{piece.decode('utf-8', 'replace')}`"
    )
    return (
        f"its tokens are not its text: at byte {at} {there}, {said}; a normaliser of the tokenizer has changed the "
        "text (lower-case letters, composed characters), so no byte offsets are known"
    )


def _shown(text: bytes, at: int) -> str:
    return repr(text[max(0, at - SHOWN) : at + SHOWN].decode("utf-8", "replace"))[1:-1]


def response_texts(encoder: Any, records: Sequence[Record]) -> list[bytes]:
    """What the encoder reads as the responses, in UTF-8, with the end of turn where the template writes one."""
    turns = encoder.chat.turns(records)
    for record, turn in zip(records, turns, strict=True):
        if not isinstance(turn, Turn):
            raise DataError(f"row `{record.id}`: {turn}")
    return [turn.response.encode("utf-8", "surrogatepass") for turn in turns]


def response_lengths(encoder: Any, record: Record, ids: Sequence[int], text: bytes) -> np.ndarray:
    """uint16 [R]: the bytes of each response token; a token that only we put at the end has none.

    Raises DataError, naming the row, where that is not exact, or where the tokenizer's spelling says nothing of bytes.
    """
    table = encoder.token_bytes
    if table is None:
        raise DataError(f"row `{record.id}`: the tokenizer of `{encoder.name}` does not say which bytes its tokens are")
    ids = [int(index) for index in ids]
    try:
        if encoder.chat.writes_eot:
            return token_lengths(ids, text, table)
        return np.append(token_lengths(ids[:-1], text, table), np.uint16(0))
    except DataError as error:
        raise DataError(f"row `{record.id}`, tokenizer of `{encoder.name}`: {error}") from None


def lengths_or_unknown(
    encoder: Any, records: Sequence[Record], response_ids: Sequence[np.ndarray]
) -> list[np.ndarray] | None:
    """`response_lengths` of many rows, UNKNOWN where that is not exact; None where no row has any."""
    if encoder.token_bytes is None:
        return None
    found = []
    for record, ids, text in zip(records, response_ids, response_texts(encoder, records), strict=True):
        try:
            found.append(response_lengths(encoder, record, ids.tolist(), text))
        except DataError:  # told where somebody asks for them
            found.append(np.full(len(ids), UNKNOWN, np.uint16))
    return found


@dataclass(frozen=True)
class Side:
    """A response of one tokenizer: its ids [R], its bytes, where its tokens start [R + 1]; the last one ends the turn.

    `before_R`: how many bytes of a token's own spelling stand in front of its place in the text: a space that
    SentencePiece has put there.
    """

    ids_R: np.ndarray
    text: bytes
    starts: np.ndarray
    before_R: np.ndarray

    @classmethod
    def of(cls, ids_R: np.ndarray, lengths_R: np.ndarray, table: TokenBytes) -> "Side":
        """From ids and lengths alone. White space that a token has taken with it is written as spaces."""
        pieces = [table.pieces[index] for index in ids_R.tolist()]
        text = b"".join(
            piece[len(piece) - length :] if length <= len(piece) else piece.ljust(length)
            for piece, length in zip(pieces, lengths_R.tolist(), strict=True)
        )
        lengths_R = lengths_R.astype(np.int64)
        before_R = np.array([len(piece) for piece in pieces], np.int64) - lengths_R
        before_R[table.kinds_V[ids_R] == ADDED] = 0
        starts = np.concatenate([[0], np.cumsum(lengths_R)])
        return cls(np.asarray(ids_R, np.int64), text, starts, before_R)

    @property
    def body(self) -> bytes:
        """All but the end of the turn."""
        return self.text[: self.starts[-2]]


class Alignment(NamedTuple):
    """The chunks of two responses: int64 [C, 4], of each the first teacher token, the one behind the last, and those of
    the student.

    `begins_alike_C`: both begin with whole tokens, or with tokens that lack the same of their spelling, so that what
    either may say next are the same texts. `num_bytes` are aligned. `ends_turn`: the last chunk is the end of the turn,
    whose bytes need not be the same.
    """

    chunks_C4: np.ndarray
    begins_alike_C: np.ndarray
    num_bytes: int
    ends_turn: bool


def align(teacher: Side, student: Side, answer: str) -> Alignment:
    """The chunks of two responses that say `answer`; raises DataError where they do not say the same.

    White space around the answer that one side alone has is left out, or belongs to the token that holds it together
    with a piece of the answer. The ends of the turn are a chunk of their own where both stand right behind what is
    aligned.
    """
    starts, length = _common(teacher.body, student.body, answer.strip().encode("utf-8", "surrogatepass"))
    placed = [_placed(side, start, length) for side, start in zip((teacher, student), starts, strict=True)]
    shared = np.intersect1d(placed[0].borders, placed[1].borders)
    # Tokens without bytes belong to the next one that has some.
    firsts = [np.searchsorted(one.place_R, shared) for one in placed]
    chunks_C4 = np.stack([firsts[0][:-1], firsts[0][1:], firsts[1][:-1], firsts[1][1:]], axis=1)
    ends_turn = len(teacher.body) - starts[0] == len(student.body) - starts[1] == length
    if ends_turn:
        behind = [len(side.ids_R) for side in (teacher, student)]
        chunks_C4 = np.concatenate([chunks_C4, [[behind[0] - 1, behind[0], behind[1] - 1, behind[1]]]])
    begins_alike_C = placed[0].before_R[chunks_C4[:, 0]] == placed[1].before_R[chunks_C4[:, 2]]
    num_bytes = int(shared[-1] - shared[0]) if len(shared) else 0
    return Alignment(chunks_C4.astype(np.int64), begins_alike_C, num_bytes, ends_turn)


class _Placed(NamedTuple):
    """Where the tokens of a body begin, counted from the aligned stretch, the borders between tokens in it, and
    `before_R` with the white space that a token has in front of the stretch."""

    place_R: np.ndarray
    borders: np.ndarray
    before_R: np.ndarray


def _placed(side: Side, start: int, length: int) -> _Placed:
    place_R, before_R = side.starts[:-2] - start, side.before_R.copy()
    before_R[-1] = 0  # the end of the turn is said as a whole
    first = int(np.searchsorted(place_R, 0, side="right")) - 1  # the last token that begins at or before the stretch
    if first >= 0 and side.starts[first] < start < side.starts[first + 1]:
        outside = side.text[side.starts[first] : start]
        if not outside.strip():
            before_R[first] += len(outside)
            place_R[first] = 0
    borders, end = np.unique(place_R[(place_R >= 0) & (place_R < length)]), start + length
    next_border = side.starts[np.searchsorted(side.starts[:-2], end)]  # of the first token at or behind the end
    if length and not side.text[end:next_border].strip():
        borders = np.append(borders, length)
    return _Placed(place_R, borders, before_R)


def _common(teacher: bytes, student: bytes, answer: bytes) -> tuple[tuple[int, int], int]:
    """Where the stretch begins that both have, on both sides, and how long it is."""
    if teacher == student:
        return (0, 0), len(teacher)
    cores = teacher.strip(), student.strip()
    if cores[0] == cores[1]:
        return _widened((teacher, student), (teacher.find(cores[0]), student.find(cores[1])), len(cores[0]))
    found = teacher.rfind(answer), student.rfind(answer)  # what templates add stands before the answer
    if answer and min(found) >= 0:
        return _widened((teacher, student), found, len(answer))
    at = next((i for i, (a, b) in enumerate(zip(*cores, strict=False)) if a != b), min(map(len, cores)))
    raise DataError(
        f"teacher and student do not say the same: from byte {at} on the teacher's tokens say "
        f"`{_shown(cores[0], at)}`, the student's `{_shown(cores[1], at)}`"
    )


def _widened(texts: tuple[bytes, bytes], starts: tuple[int, int], length: int) -> tuple[tuple[int, int], int]:
    """The stretch with what both have on its sides."""
    one, other = starts
    while min(one, other) and texts[0][one - 1] == texts[1][other - 1]:
        one, other, length = one - 1, other - 1, length + 1
    while texts[0][one + length : one + length + 1] == texts[1][other + length : other + length + 1] != b"":
        length += 1
    return (one, other), length
