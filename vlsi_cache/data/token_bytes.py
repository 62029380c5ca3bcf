"""The bytes that every token of a vocabulary stands for, read from its own spelling.

A decoder gives the replacement character for a token that holds half of a character, and drops a leading space where
it takes the token for the first of a text. The spelling in the vocabulary says both: byte-level BPE writes each byte as
a letter of its alphabet, SentencePiece a space as U+2581 and a byte without a piece as `<0xNN>`. Whether this is right
for a text is not believed but compared, see `offsets.token_lengths`.

Shapes: V vocabulary.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

# Kinds of tokens: a piece of text; one byte for which there is no piece; an added token; none that has bytes.
TEXT, BYTE, ADDED, NOTHING = range(4)
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenBytes:
    """`pieces[id]` are the bytes of a token, `kinds_V` (uint8) one of TEXT, BYTE, ADDED, NOTHING.

    `strips`: of added tokens that take the white space before or behind them with them, which of the two.
    """

    pieces: Sequence[bytes]
    kinds_V: np.ndarray
    strips: dict[int, tuple[bool, bool]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def keys(self) -> list[tuple[bytes, int, int] | None]:
        """(bytes, kind, how many of the same came before) of every token: no two have the same; None without bytes."""
        seen: dict[tuple[bytes, int], int] = {}
        found: list[tuple[bytes, int, int] | None] = []
        for piece, kind in zip(self.pieces, self.kinds_V.tolist(), strict=True):
            if kind == NOTHING or not piece:
                found.append(None)
                continue
            number = seen.get((piece, kind), 0)
            seen[piece, kind] = number + 1
            found.append((piece, kind, number))
        return found


def token_bytes(tokenizer: Any, vocab_size: int) -> TokenBytes | None:
    """The bytes of the ids below `vocab_size`; None for a kind of tokenizer whose spelling says nothing of bytes."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    spelling = _Spelling.of(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    if spelling is None:
        return None
    pieces, kinds_V = [b""] * vocab_size, np.full(vocab_size, NOTHING, np.uint8)
    added = tokenizer.added_tokens_decoder
    for text, index in tokenizer.get_vocab().items():
        if index < vocab_size and index not in added and (read := spelling.read(text)) is not None:
            pieces[index], kinds_V[index] = read
    strips = {}
    for index, token in added.items():
        if index < vocab_size:
            pieces[index], kinds_V[index] = token.content.encode(), ADDED
            if token.lstrip or token.rstrip:
                strips[index] = (token.lstrip, token.rstrip)
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown < vocab_size and not spelling.is_byte_level:  # stands for any text
        kinds_V[unknown] = NOTHING
    return TokenBytes(pieces, kinds_V, strips)


@dataclass(frozen=True)
class _Spelling:
    """How a vocabulary writes bytes: in the letters of byte-level BPE, or as text with replacements."""

    is_byte_level: bool
    replaced: Sequence[tuple[str, str]] = ()
    has_byte_pieces: bool = False

    @classmethod
    def of(cls, decoder: dict[str, Any] | None) -> "_Spelling | None":
        """That of a vocabulary with this decoder (of tokenizer.json)."""
        steps = list(_steps(decoder))
        types = {step["type"] for step in steps}
        if "ByteLevel" in types:
            return cls(is_byte_level=True)
        if not types or not types <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
            return None
        replaced = []
        for step in steps:
            if step["type"] == "Metaspace":
                replaced.append((step["replacement"], " "))
            elif step["type"] == "Replace":
                if "String" not in step["pattern"]:
                    return None
                replaced.append((step["pattern"]["String"], step["content"]))
        return cls(is_byte_level=False, replaced=replaced, has_byte_pieces="ByteFallback" in types)

    def read(self, text: str) -> tuple[bytes, int] | None:
        """Bytes and kind of a token that is spelt so; None where it is not."""
        if self.is_byte_level:
            if any(letter not in BYTE_OF_LETTER for letter in text):
                return None
            return bytes(BYTE_OF_LETTER[letter] for letter in text), TEXT
        if self.has_byte_pieces and (match := _BYTE_PIECE.fullmatch(text)):
            return bytes([int(match[1], 16)]), BYTE
        for old, new in self.replaced:
            text = text.replace(old, new)
        return text.encode("utf-8", "surrogatepass"), TEXT


def _steps(decoder: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    if decoder is not None and decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder is not None:
        yield decoder


def _letters() -> dict[str, int]:
    """The alphabet of GPT-2: bytes that are printable characters stand for themselves, the others come after U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF_LETTER = _letters()


def vocabulary_map(teacher: TokenBytes, student: TokenBytes, ends: tuple[int, int] | None = None) -> np.ndarray:
    """int64 [V of the teacher]: the student's token with the same bytes, or -1. No two have the same one.

    Tokens of the same kind first, so that equal vocabularies map to themselves; then a byte without a piece to the
    piece of that byte, and the other way round. Added tokens map to added ones alone. `ends` are the tokens that end a
    turn in both, whatever they are called.
    """
    place = {key: index for index, key in enumerate(student.keys) if key is not None}
    found_V = np.array([-1 if key is None else place.get(key, -1) for key in teacher.keys], np.int64)
    taken = set(found_V[found_V >= 0].tolist())
    for index in np.flatnonzero(found_V < 0).tolist():
        if (key := teacher.keys[index]) is None or key[1] == ADDED:
            continue
        other = place.get((key[0], BYTE if key[1] == TEXT else TEXT, 0), -1)
        if other >= 0 and other not in taken:
            found_V[index] = other
            taken.add(other)
    if ends is not None:
        found_V[found_V == ends[1]] = -1
        found_V[ends[0]] = ends[1]
    return found_V
