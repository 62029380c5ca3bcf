"""Samples as one batch of tensors, and where in it the hidden states of the responses lie.

Shapes: B sequences, S positions (padded on the right), T response tokens of all samples one after another.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from .branches import BRANCHES, branches_of, star_of
from .encoder import Measured
from .pictures import is_pixels, join_rows, pictures_of_batch
from .sequence import Encoded, Layout, num_tokens, sequences

IGNORE_INDEX = -100
# Of the inputs of a packed batch, [B, S]: the place in its row behind the last token that sees this one. What comes
# there is another sequence, or another branch. `models.backbone` makes the model's attention mask of it.
SEEN_UNTIL = "seen_until"


# Of the inputs of a batch, bool [B, S]: which tokens are of an answer, for models that do something else with a prompt.
RESPONSES = "responses"


# Of the inputs of a batch: its `Pictures`, where features of pictures are kept or a picture is there twice;
# `models.features` turns them into what the model takes.
PICTURES = "pictures"


@dataclass(frozen=True)
class Batch:
    """`model(**inputs)`; hidden[rows_T, positions_T] predicts gold_T. labels_BS has IGNORE_INDEX off the response.

    Of a packed batch, several sequences may lie in one row, and a sequence may branch: `inputs` then have SEEN_UNTIL
    and `position_ids`. So do those of a padded batch with sequences that branch: they are the trunks, and BRANCHES has
    the other rows, which count on from them. With PICTURES, pixels are apart, and RESPONSES are for a model whose
    layers are traversed. All of these go through `Backbone.capture` alone. Labels stand at the token's own position,
    as transformers wants them (it shifts them itself).
    """

    inputs: dict[str, Any]
    rows_T: torch.Tensor
    positions_T: torch.Tensor
    gold_T: torch.Tensor
    labels_BS: torch.Tensor
    num_tokens: list[int]

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> "Batch":
        """The same batch on another device; `non_blocking` as torch has it, for tensors of a pinned batch."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from where a GPU copies while the host goes on."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> "Batch":
        changed = {name: change(getattr(self, name)) for name in ("rows_T", "positions_T", "gold_T", "labels_BS")}
        inputs = {key: change(value) for key, value in self.inputs.items()}
        return Batch(inputs=inputs, num_tokens=self.num_tokens, **changed)

    def at(self, index_T: torch.Tensor, num_tokens: list[int]) -> "Batch":
        """The same samples with some of their response tokens, `num_tokens` of each; inputs and labels stay whole."""
        chosen = {name: getattr(self, name)[index_T] for name in ("rows_T", "positions_T", "gold_T")}
        return replace(self, num_tokens=num_tokens, **chosen)


def collate(
    sequences: Sequence[Encoded],
    *,
    pad_id: int,
    device: str | torch.device = "cpu",
    row_width: int = 0,
    marks_responses: bool = False,
) -> Batch:
    """Pad on the right: then the positions of a sample are the same in every batch.

    The sequences hold one or several samples each; `num_tokens` has one number for every sample, in their order.
    With a `row_width` they are packed: they lie end to end in fewer rows of at most so many tokens, where that makes
    less padding; one that is longer has a row of its own. Without, those that branch are taken apart. With
    `marks_responses` the inputs have RESPONSES, for which each sequence must be of one sample.
    """
    if not row_width and any(one.positions is not None for one in sequences):
        inputs, places_S2 = _branched_inputs(sequences, pad_id=pad_id)
    else:
        inputs, starts = _rows(sequences, row_width, pad_id=pad_id)
        places_S2 = [
            np.stack([np.full(len(one.input_ids), row), start + np.arange(len(one.input_ids))], axis=1)
            for (row, start), one in zip(starts, sequences, strict=True)
        ]
    spans = [(places, span) for places, one in zip(places_S2, sequences, strict=True) for span in one.spans]
    rows_T, positions_T = np.concatenate([places[span.before_R] for places, span in spans]).T.copy()
    gold_T = np.concatenate([span.response_ids for _, span in spans])
    labels_BS = np.full(1 + np.max([places.max(0) for places in places_S2], axis=0), IGNORE_INDEX, dtype=np.int64)
    labels_BS[tuple(np.concatenate([places[span.places_R] for places, span in spans]).T)] = gold_T
    if marks_responses:
        inputs[RESPONSES] = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
        rows_R, places_R = np.nonzero(labels_BS != IGNORE_INDEX)
        inputs[RESPONSES][rows_R, places_R] = True
    tensors = (torch.from_numpy(array) for array in (rows_T, positions_T, gold_T, labels_BS))
    return Batch(inputs, *tensors, num_tokens=[len(span.response_ids) for _, span in spans]).to(device)


def _rows(sequences: Sequence[Encoded], row_width: int, *, pad_id: int) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """The inputs of a batch, packed or padded, and (row, start) of every sequence."""
    lengths = [len(one.input_ids) for one in sequences]
    # `token_type_ids` are part of the mask (PaliGemma, Gemma 3), and say nothing of sequences.
    can_pack = row_width and not any("token_type_ids" in one.media for one in sequences)
    alone = [(row, 0) for row in range(len(sequences))]
    places = pack(lengths, row_width) if can_pack else alone
    if len({row for row, _ in places}) < len(sequences) or any(one.positions is not None for one in sequences):
        return _packed_inputs(sequences, places, pad_id=pad_id), places
    return _inputs(sequences, lengths, pad_id=pad_id, left=False), alone


def _branched_inputs(sequences: Sequence[Encoded], *, pad_id: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The trunks, padded on the left, so that what comes next goes on from the last place of every row; and the rows of
    the branches. Of every token of a sequence (row, position), int64 [S, 2]: rows of branches count on from the trunks.
    """
    stars = [star_of(one) for one in sequences]
    lengths = [star.num_trunk for star in stars]
    inputs = _inputs(sequences, lengths, pad_id=pad_id, left=True)
    # No pass has more tokens than a batch of these sequences is planned to have.
    most = len(stars) * max(star.num_tokens for star in stars)
    rows = [(number, branch_S) for number, star in enumerate(stars) for branch_S in star.branches]
    passes = [[rows[i] for i in some] for some in plan_batches([len(branch_S) for _, branch_S in rows], most)]
    places_S2 = []
    for row, (one, length) in enumerate(zip(sequences, lengths, strict=True)):
        places_S2.append(np.zeros((len(one.input_ids), 2), np.int64))
        places_S2[-1][:length] = np.stack([np.full(length, row), max(lengths) - length + np.arange(length)], axis=1)
    for row, (number, branch_S) in enumerate((pair for some in passes for pair in some), start=len(stars)):
        places_S2[number][branch_S] = np.stack([np.full(len(branch_S), row), np.arange(len(branch_S))], axis=1)
    ids = [[(number, sequences[number].input_ids[branch_S]) for number, branch_S in some] for some in passes]
    return inputs | {BRANCHES: branches_of(ids, pad_id=pad_id)}, places_S2


def collate_prompts(
    samples: Sequence[Encoded], *, pad_id: int, device: str | torch.device = "cpu"
) -> dict[str, torch.Tensor]:
    """The prompts alone, padded on the left, for `model.generate(**inputs)`."""
    inputs = _inputs(samples, [sample.num_prompt for sample in samples], pad_id=pad_id, left=True, shares=False)
    return {key: value.to(device) for key, value in inputs.items()}


def _inputs(
    samples: Sequence[Encoded], lengths: list[int], *, pad_id: int, left: bool, shares: bool = True
) -> dict[str, Any]:
    """The first `lengths` ids of every sample, padded to the longest, and their media (`shares`: see `_media`)."""
    ids = [sample.input_ids[:length] for sample, length in zip(samples, lengths, strict=True)]
    ones = [np.ones(length, dtype=np.int64) for length in lengths]
    inputs: dict[str, Any] = {"input_ids": _pad(ids, pad_id, left=left), "attention_mask": _pad(ones, 0, left=left)}
    types = [s.token_types[:n] for s, n in zip(samples, lengths, strict=True) if s.token_types is not None]
    if types:
        assert len(types) == len(samples)
        inputs["mm_token_type_ids"] = _pad(types, 0, left=left)
    keys = dict.fromkeys(key for sample in samples for key in sample.media)
    if "token_type_ids" in keys:
        typed = zip(samples, lengths, strict=True)
        inputs["token_type_ids"] = _pad(
            [_answer_typed(sample, length) for sample, length in typed], samples[0].answer_type, left=left
        )
        del keys["token_type_ids"]
    return inputs | _media(samples, keys, shares=shares)


def _packed_inputs(sequences: Sequence[Encoded], places: Sequence[tuple[int, int]], *, pad_id: int) -> dict[str, Any]:
    """Every sequence at its (row, start); positions begin at 0 in each."""
    lengths = [len(one.input_ids) for one in sequences]
    num_rows = 1 + max(row for row, _ in places)
    width = max(start + length for (_, start), length in zip(places, lengths, strict=True))
    ids_BS = np.full((num_rows, width), pad_id, dtype=np.int64)
    positions_BS, types_BS = (np.zeros((num_rows, width), dtype=np.int64) for _ in range(2))
    until_BS = np.tile(np.arange(1, width + 1), (num_rows, 1))  # padding sees itself
    # A model takes the pictures of a batch in the order in which their tokens stand in it.
    order = sorted(range(len(sequences)), key=lambda i: places[i])
    for index in order:
        (row, start), one = places[index], sequences[index]
        part = slice(start, start + lengths[index])
        ids_BS[row, part] = one.input_ids
        positions_BS[row, part] = np.arange(lengths[index]) if one.positions is None else one.positions
        until_BS[row, part] = start + seen_until(positions_BS[row, part])
        if one.token_types is not None:
            types_BS[row, part] = one.token_types
    arrays = {"input_ids": ids_BS, "position_ids": positions_BS, SEEN_UNTIL: until_BS}
    if any(one.token_types is not None for one in sequences):
        arrays["mm_token_type_ids"] = types_BS
    inputs: dict[str, Any] = {key: torch.from_numpy(array) for key, array in arrays.items()}
    chosen = [sequences[i] for i in order]
    return inputs | _media(chosen, dict.fromkeys(key for one in sequences for key in one.media), shares=True)


def seen_until(depths_S: np.ndarray) -> np.ndarray:
    """Of every token the place [S] behind the last one that sees it, where the branches of a tree lie one behind the
    other: there the next branch begins that leaves the path at or above the token."""
    until_S = np.full(len(depths_S), len(depths_S), dtype=np.int64)
    begins = 1 + np.flatnonzero(np.diff(depths_S) != 1)
    for place in begins[::-1]:
        hidden = depths_S[:place] >= depths_S[place]
        until_S[:place][hidden] = np.minimum(until_S[:place][hidden], place)
    return until_S


def _media(samples: Sequence[Encoded], keys: Iterable[str], *, shares: bool) -> dict[str, Any]:
    """The arrays of all pictures one after another. With `shares`, pixels are by group of pictures where those are not
    all to be run; else the model itself is to take the batch, with all pixels."""
    pictures = pictures_of_batch([(sample.media, sample.pictures) for sample in samples]) if shares else None
    found: dict[str, Any] = {}
    for key in keys:
        arrays = [sample.media[key] for sample in samples if key in sample.media]
        if pictures is None or not is_pixels(key, arrays[0]):
            found[key] = join_rows([torch.from_numpy(array) for array in arrays])
    return found if pictures is None else {**found, PICTURES: pictures}


def _answer_typed(sample: Encoded, length: int) -> np.ndarray:
    """The processor's types of the prompt, then those of an answer."""
    types_P = sample.media.get("token_type_ids", np.zeros(sample.num_prompt, np.int64)).reshape(-1)[:length]
    return np.concatenate([types_P, np.full(length - len(types_P), sample.answer_type, dtype=np.int64)])


def _pad(rows: list[np.ndarray], fill: int, *, left: bool) -> torch.Tensor:
    padded_BS = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for row, values in zip(padded_BS, rows, strict=True):
        if len(values):
            row[-len(values) if left else 0 :][: len(values)] = values
    return torch.from_numpy(padded_BS)


NARROWER = 8  # numbers of rows that are tried
# Tokens of a row at which the attention of a layer costs as much as its weights: about 6 times the hidden size.
DEAR_WIDTH = 8192


def pack(lengths: Sequence[int], row_width: int) -> list[tuple[int, int]]:
    """(row, start) of every sequence, in rows of at most `row_width` tokens or of one longer sequence.

    Rows hold several, so that padded tokens and attention cost little: long sequences first, each into the first row
    that has room. As many rows as the longest sequence allows are tried, and fewer, wider ones: a wider row fills
    better, and costs more attention.
    """
    longest, best, found = max(lengths), math.inf, [(row, 0) for row in range(len(lengths))]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    most = 1 + max(row for row, _ in _filled(lengths, order, longest))
    for num_rows in range(most, max(0, most - NARROWER), -1):
        low = max(longest, math.ceil(sum(lengths) / num_rows))
        high = low
        while True:  # the least width at which so few rows are enough, to within a few tokens
            places = _filled(lengths, order, high)
            if max(row for row, _ in places) < num_rows:
                break
            high += max(1, high // 64)
        if high > max(longest, row_width):
            break  # fewer rows are wider still
        width = max(start + length for (_, start), length in zip(places, lengths, strict=True))
        cost = (1 + max(row for row, _ in places)) * width * (1 + width / DEAR_WIDTH)
        if cost < best:
            best, found = cost, places
    return found


def _filled(lengths: Sequence[int], order: Sequence[int], width: int) -> list[tuple[int, int]]:
    used: list[int] = []
    places = [(0, 0)] * len(lengths)
    for index in order:
        row = next((row for row, taken in enumerate(used) if taken + lengths[index] <= width), len(used))
        if row == len(used):
            used.append(0)
        places[index] = (row, used[row])
        used[row] += lengths[index]
    return places


PADDED_SHARE = 8  # about what one more batch costs, in batches: doubling a good batch gains a few percent


def plan_parts(
    num_tokens_N: Sequence[int], *, seed: int, tokens_per_part: int, units: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Deal all samples, in an order drawn from `seed`, into parts of at most `tokens_per_part` tokens.

    Samples of one of the `units` (None: each is one) stay together. What is longer is a part of its own. Raw Philox
    words are sorted instead of shuffling with a numpy Generator, whose streams may change between numpy versions: the
    same seed must give the same cache for ever.
    """
    if units is None:
        units = [[index] for index in range(len(num_tokens_N))]
    keys_U = np.random.Philox(seed).random_raw(len(units)) if units else np.zeros(0)
    order_U = np.argsort(keys_U, kind="stable")
    # A million units dealt one by one take seconds. Their samples, unit by unit in the order in which they are dealt:
    sizes_U = np.fromiter(map(len, units), np.int64, len(units))
    starts_U, sizes_U = (np.cumsum(sizes_U) - sizes_U)[order_U], sizes_U[order_U]
    ends_U = np.cumsum(np.concatenate([[0], sizes_U]))
    samples = np.fromiter(chain.from_iterable(units), np.int64)
    samples = samples[np.repeat(starts_U - ends_U[:-1], sizes_U) + np.arange(len(samples))]
    # Tokens before each unit, and behind the last one: a part goes on for as long as its end is within its limit.
    before_U = np.concatenate([[0], np.cumsum(np.asarray(num_tokens_N, np.int64)[samples])])[ends_U]
    parts: list[list[int]] = []
    unit = 0
    while unit < len(units):
        fits = int(np.searchsorted(before_U, before_U[unit] + tokens_per_part, side="right")) - 1
        first, unit = unit, max(fits, unit + 1)
        parts.append(samples[ends_U[first] : ends_U[unit]].tolist())
    return parts


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group samples of similar length so that size * longest <= `batch_tokens` once padded; longest batch first.

    A longer sample is a batch of its own. Padding stays below 1 / PADDED_SHARE of `batch_tokens`: where the samples at
    hand are few for a batch of this size, two small batches cost less than one that is half padding. Longest first:
    if memory does not do, the first batch says so.
    """
    batches: list[list[int]] = []
    longest = padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        padding += longest - lengths[index]
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens or padding * PADDED_SHARE > batch_tokens:
            batches.append([])
            longest, padding = lengths[index], 0
        batches[-1].append(index)
    return batches


def plan_sample_batches(measured: Sequence[Measured], batch_tokens: int, layout: Layout) -> list[list[int]]:
    """Places of samples by batch, as `plan_batches` has them; samples of one sequence stay together."""
    extents = [one.extent for one in measured]
    runs = sequences(extents, range(len(measured)), layout)
    batches = plan_batches([num_tokens(extents, run, layout) for run in runs], batch_tokens)
    return [[index for number in batch for index in runs[number]] for batch in batches]


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The share of all tokens of these batches that is padding."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / max(1, padded)
