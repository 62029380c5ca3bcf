"""Samples as sequences of tokens: what several samples share stands once in the sequence that holds them all.

Turns of a conversation begin with all tokens of the turn before, and lie in one line. Responses to one prompt, and
questions on one picture, branch from what they share: a sequence is a tree whose branches lie one behind the other.
A token's position is its depth in the tree, as if its sample were alone; what it sees are the tokens on its own path.
Shapes: P prompt tokens, R response tokens, S tokens of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .pictures import Pictures
from .vision import Prompt

MIN_SHARED = 16  # tokens; for fewer a branch is not worth its place in the mask
MIN_SHARE = 1 / 8  # of a sample; for less a second pass, from the cache of the first, is not worth its start
MOST_BRANCHES = 16  # that go on from one cache: they are planned as one sequence, and more would save little


class Layout(NamedTuple):
    """How the samples of a batch lie for a model: in rows of at most `row_width` tokens that hold several sequences (0:
    each has a row, padded), and whether a sequence may branch.

    With `marks_responses` every sample is a sequence of its own, and a batch says which tokens are answers: for models
    that do something else with a prompt, where the answer of one turn is prompt in the next.

    Branches of a packed row are kept apart by the mask. Padded ones have rows of their own, which go on from the cache
    that their trunk has left (`data/branches.py`).
    """

    row_width: int = 0
    branches: bool = False
    marks_responses: bool = False

    @property
    def goes_on_from_caches(self) -> bool:
        """Whether sequences branch once at most, each into branches with rows of their own."""
        return self.branches and not self.row_width


PADDED = Layout()


class Span(NamedTuple):
    """A sample of a sequence: its response ids int64 [R], the place of the first of them in the sequence, and that of
    the prompt's last token, which stands somewhere before."""

    last_prompt: int
    first: int
    response_ids: np.ndarray

    @property
    def places_R(self) -> np.ndarray:
        """Where the response stands."""
        return self.first + np.arange(len(self.response_ids))

    @property
    def before_R(self) -> np.ndarray:
        """Where the hidden states are that predict it, each of its tokens."""
        return np.concatenate([[self.last_prompt], self.places_R])[:-1]


@dataclass(frozen=True)
class Encoded:
    """One sequence, on the CPU: int64 ids, and the model's own media arrays. `input_ids` is prompt, then response.

    Of several samples `joined` has the span of each in order, `num_prompt` and `response_ids` are those of the last,
    and `positions` [S] are depths where the sequence branches (None: 0 to S - 1). `pictures` say what of
    `media` is whose; the pixels of those whose features are held are not in it. `answer_type`: see `vision.Prompt`.
    """

    input_ids: np.ndarray
    num_prompt: int
    response_ids: np.ndarray
    token_types: np.ndarray | None = None
    media: dict[str, np.ndarray] = field(default_factory=dict)
    pictures: Pictures | None = None
    joined: tuple[Span, ...] = ()
    positions: np.ndarray | None = None
    answer_type: int = 0

    @property
    def spans(self) -> tuple[Span, ...]:
        """All samples of the sequence, in order."""
        return self.joined or (Span(self.num_prompt - 1, self.num_prompt, self.response_ids),)


class Piece(NamedTuple):
    """What a sample adds to a sequence: it begins with the first `num_shared` tokens of the sample before it."""

    num_shared: int
    prompt: Prompt
    response_ids: np.ndarray


def join(pieces: Sequence[Piece]) -> Encoded:
    """One sequence of samples, each of which goes on from the one before or branches from it."""
    ids: list[np.ndarray] = []
    depths: list[np.ndarray] = []
    spans: list[Span] = []
    path, num_tokens, num_prompt = np.zeros(0, np.int64), 0, 0
    for num_shared, prompt, response_ids in pieces:
        added = np.concatenate([prompt.ids_P, response_ids])
        ids.append(added)
        depths.append(num_shared + np.arange(len(added)))
        path = np.concatenate([path[:num_shared], num_tokens + np.arange(len(added))])
        num_tokens += len(added)
        num_prompt = len(path) - len(response_ids)
        spans.append(Span(int(path[num_prompt - 1]), num_tokens - len(response_ids), response_ids))
    prompts = [piece.prompt for piece in pieces]
    positions_S = np.concatenate(depths)
    return Encoded(
        np.concatenate(ids),
        num_prompt,
        pieces[-1].response_ids,
        _token_types(pieces),
        _media([prompt.media for prompt in prompts]),
        _pictures(prompts),
        tuple(spans) if len(spans) > 1 else (),
        None if np.array_equal(positions_S, np.arange(num_tokens)) else positions_S,
        prompts[0].answer_type,
    )


def _token_types(pieces: Sequence[Piece]) -> np.ndarray | None:
    if pieces[0].prompt.token_types_P is None:
        return None
    each = []
    for _, prompt, response_ids in pieces:
        types_P = np.zeros_like(prompt.ids_P) if prompt.token_types_P is None else prompt.token_types_P
        each += [types_P, np.zeros_like(response_ids)]
    return np.concatenate(each)


def _pictures(prompts: Sequence[Prompt]) -> Pictures | None:
    found = [prompt.pictures for prompt in prompts if prompt.pictures is not None]
    return Pictures.joined(found) if found else None


def _media(each: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of all pictures, one after another."""
    keys = dict.fromkeys(key for media in each for key in media)
    return {key: np.concatenate([media[key] for media in each if key in media]) for key in keys}


class Extent(NamedTuple):
    """How many tokens a sample has, and how many of them, its first ones, it has in common with the sample before."""

    num_tokens: int
    num_shared: int


def sequences(extents: Sequence[Extent], indices: Sequence[int], layout: Layout) -> list[list[int]]:
    """Those of the samples `indices` that run together, in order; `extents` is by sample.

    A sample that goes on where its left neighbour has ended is in the same sequence. One that branches from it is too,
    where the model keeps branches apart, as long as all fits in one row; or as far as a common trunk pays.
    """
    if layout.marks_responses:
        return [[index] for index in indices]
    if layout.goes_on_from_caches:
        return _stars(extents, indices)
    found: list[list[int]] = []
    num_tokens, is_line = 0, True
    for index in indices:
        own = extents[index]
        if found and found[-1][-1] == index - 1 and own.num_shared:
            goes_on = own.num_shared == extents[index - 1].num_tokens
            longer = num_tokens + own.num_tokens - own.num_shared
            if (goes_on and is_line) or (layout.branches and longer <= layout.row_width):
                found[-1].append(index)
                num_tokens, is_line = longer, is_line and goes_on
                continue
        found.append([index])
        num_tokens, is_line = own.num_tokens, True
    return found


def _stars(extents: Sequence[Extent], indices: Sequence[int]) -> list[list[int]]:
    """`sequences` of one trunk each: the tokens that all its branches share."""
    found: list[list[int]] = []
    num_branches = trunk = 0
    for index in indices:
        own = extents[index]
        if found and found[-1][-1] == index - 1 and own.num_shared:
            if own.num_shared == extents[index - 1].num_tokens:
                found[-1].append(index)
                continue
            shorter = own.num_shared if num_branches == 1 else min(trunk, own.num_shared)
            # The branches that are there repeat what their trunk loses.
            pays = (num_branches - 1) * (trunk - shorter) < shorter and own.num_shared >= MIN_SHARE * own.num_tokens
            if pays and num_branches < MOST_BRANCHES and not _belongs_to_next(extents, index):
                found[-1].append(index)
                num_branches, trunk = num_branches + 1, shorter
                continue
        found.append([index])
        num_branches, trunk = 1, 0
    return found


def _belongs_to_next(extents: Sequence[Extent], index: int) -> bool:
    """Whether the sample shares so much more with the next one than with the one before that it opens a sequence."""
    own, after = extents[index], extents[index + 1] if index + 1 < len(extents) else Extent(0, 0)
    return 2 * own.num_shared < after.num_shared < own.num_tokens


def num_tokens(extents: Sequence[Extent], sequence: Sequence[int], layout: Layout = PADDED) -> int:
    """Tokens of a sequence of samples: what they share counts once."""
    first, *later = sequence
    total = extents[first].num_tokens + sum(extents[i].num_tokens - extents[i].num_shared for i in later)
    if not layout.goes_on_from_caches:
        return total
    # There is one trunk; a branch repeats what it shares beyond it.
    shared = [extents[i].num_shared for i in later if extents[i].num_shared < extents[i - 1].num_tokens]
    return total + sum(shared) - len(shared) * min(shared, default=0)


def num_in_common(ids: np.ndarray, others: np.ndarray) -> int:
    """How many of the first ids are equal."""
    length = min(len(ids), len(others))
    is_equal = ids[:length] == others[:length]
    return length if is_equal.all() else int(is_equal.argmin())
