"""Lossless coding of descending float32 log-probs as unsigned gaps, which have few high bits and compress well.

The bit pattern of a negative float rises as the float falls, so a row of descending log-probs is a rising row of
integers; what is stored is the first of them and then the differences, modulo 2**32.

Shapes: K kept entries, N any leading axes.
"""

import numpy as np

__all__ = ["decode_gaps", "encode_gaps", "undo_gaps"]


def encode_gaps(logprobs_NK: np.ndarray) -> np.ndarray:
    """uint32 of the same shape; `decode_gaps` gives back every bit."""
    bits_NK = np.ascontiguousarray(logprobs_NK, np.float32).view(np.uint32)
    gaps_NK = bits_NK.copy()
    np.subtract(bits_NK[..., 1:], bits_NK[..., :-1], out=gaps_NK[..., 1:])
    return gaps_NK


def decode_gaps(gaps_NK: np.ndarray) -> np.ndarray:
    """float32 log-probs, bit for bit those that were encoded."""
    return np.cumsum(gaps_NK, axis=-1, dtype=np.uint32).view(np.float32)


def undo_gaps(gaps_KN: np.ndarray) -> None:
    """Turn gaps into bit patterns in place, entries on the FIRST axis."""
    for entry in range(1, len(gaps_KN)):
        np.add(gaps_KN[entry - 1], gaps_KN[entry], out=gaps_KN[entry])
