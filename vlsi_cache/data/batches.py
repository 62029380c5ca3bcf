"""Which samples go together: parts of the cache, and micro-batches of one forward pass. Pure arithmetic, no torch."""

from collections.abc import Sequence

import numpy as np


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

    A longer sample is a batch of its own. Longest first: if memory does not do, the first batch says so.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches
