"""Which samples go together: parts of the cache, and micro-batches of one forward pass. Pure arithmetic, no torch."""

from collections.abc import Sequence

import numpy as np

PADDED_SHARE = 8  # about what one more batch costs, in batches: doubling a good batch gains a few percent


def plan_parts(num_tokens_N: Sequence[int], *, seed: int, tokens_per_part: int) -> list[list[int]]:
    """Deal all samples, in an order drawn from `seed`, into parts of at most `tokens_per_part` tokens.

    A longer sample is a part of its own. Raw Philox words are sorted instead of shuffling with a numpy Generator,
    whose streams may change between numpy versions: the same seed must give the same cache for ever.
    """
    keys_N = np.random.Philox(seed).random_raw(len(num_tokens_N)) if len(num_tokens_N) else np.zeros(0)
    parts: list[list[int]] = []
    room = 0
    for index in np.argsort(keys_N, kind="stable").tolist():
        if not parts or num_tokens_N[index] > room:
            parts.append([])
            room = tokens_per_part
        parts[-1].append(index)
        room -= num_tokens_N[index]
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


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The share of all tokens of these batches that is padding."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / max(1, padded)
