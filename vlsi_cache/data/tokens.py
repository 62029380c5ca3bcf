"""Texts as token ids, many at once, and where a prompt can be cut so that its ids are those of its two parts.

A fast tokenizer first looks for its added tokens, and reads what stands between two of them by itself: from one of them
on, ids do not depend on what comes before it. So a prompt, and the same prompt with its response, are read twice from
the prompt's last added token on, and once before that.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from .vision import token_ids


class TextReader:
    """The tokenizer's own ids of texts as they stand, no special tokens added; `markers` are where texts may be cut,
    as far as that is certain."""

    def __init__(self, tokenizer: Any, markers: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._is_plain = _is_plain(tokenizer)
        self.cutting = _cutting(tokenizer, markers) if self._is_plain else ()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; what stands there several times is read once."""
        different = [text for text in dict.fromkeys(texts) if text]
        found = self._read(different) if self._is_plain else [token_ids(self._tokenizer, text) for text in different]
        ids_of = {"": list[int](), **dict(zip(different, found, strict=True))}
        return [ids_of[text] for text in texts]

    def cut(self, text: str) -> tuple[str, str]:
        """A text in two parts: its ids are those of the first and then those of the second, and so are those of every
        text that goes on from it."""
        start = max((text.rfind(token) for token in self.cutting), default=-1)
        return text[: max(0, start)], text[max(0, start) :]

    def _read(self, texts: list[str]) -> list[list[int]]:
        """What `tokenizer(texts)` does, without the offsets that it finds as well: a third of its time."""
        backend, split = self._tokenizer.backend_tokenizer, self._tokenizer.split_special_tokens
        # Others who use this tokenizer leave their settings. To set one is an error while another thread reads.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != split:
            backend.encode_special_tokens = split
        return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _is_plain(tokenizer: Any) -> bool:
    """Whether texts go to the `tokenizers` library as they are: some classes write something around them."""
    from transformers import PreTrainedTokenizerFast

    names = ("__call__", "_encode_plus")
    own, plain = type(tokenizer), PreTrainedTokenizerFast
    return tokenizer.is_fast and all(getattr(own, name) is getattr(plain, name) for name in names)


def _cutting(tokenizer: Any, markers: Iterable[str]) -> tuple[str, ...]:
    """Those of the markers that are one token wherever they stand, whatever is beside them."""
    if tokenizer.split_special_tokens:
        return ()
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    behind_first = set[str]().union(*(token[1:] for token in added))  # no token of these begins inside another one
    found = []
    for text in markers:
        token = added.get(text)
        is_exact = token is not None and not (token.normalized or token.single_word or token.lstrip or token.rstrip)
        # Neither white space nor a letter: what tokens that look at their neighbours look for.
        is_apart = text == text.strip() and text[:1].isascii() and not (text[:1].isalnum() or text[:1] == "_")
        if is_exact and is_apart and text[0] not in behind_first:
            found.append(text)
    return tuple(found)
