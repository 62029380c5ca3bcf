"""Small integers for the arrays that take most of a cache: log-probs as one byte an entry, ascending ids as deltas.

level = round(255 * p ** (1/4)). Levels are stored in vocabulary order as the first value and then descents, which are
small and compress well.

Shapes: K kept entries, N any leading axes (layers and tokens in either order).
"""

import numpy as np

from vlsi_cache.errors import DataError

__all__ = [
    "decode_gaps",
    "decode_levels",
    "encode_gaps",
    "encode_levels",
    "logprobs_of_levels",
    "undo_descents",
    "undo_gaps",
]

ROWS_AT_A_TIME = 1024  # keeps the temporaries of one step inside the processor's cache


with np.errstate(divide="ignore"):
    LOGPROB_OF_LEVEL = (4.0 * np.log(np.arange(256) / 255.0)).astype(np.float32)  # level 0 is -inf


def encode_levels(logprobs_NK: np.ndarray) -> np.ndarray:
    """Quantise descending log-probs (natural log, -inf = padding) to uint8 of the same shape.

    Probabilities below 1.5e-11 become level 0 and are padding after decoding. Raises DataError for rows that are not
    descending or not numbers.
    """
    flat_RK = logprobs_NK.reshape(-1, logprobs_NK.shape[-1])
    stored_RK = np.empty(flat_RK.shape, np.uint8)
    for start in range(0, len(flat_RK), ROWS_AT_A_TIME):
        part_rK = flat_RK[start : start + ROWS_AT_A_TIME]
        if not (part_rK[:, :1] <= 0).all() or not (part_rK[:, 1:] <= part_rK[:, :-1]).all():
            raise DataError(
                f"log-probs in rows {start} to {start + len(part_rK) - 1} are not descending from at most 0"
            )
        root_rK = np.multiply(part_rK, np.float32(0.25), dtype=np.float32)
        np.exp(root_rK, out=root_rK)
        root_rK *= np.float32(255)
        root_rK += np.float32(0.5)  # truncation by the cast then rounds
        level_rK = root_rK.astype(np.uint8)
        stored_RK[start : start + ROWS_AT_A_TIME, 0] = level_rK[:, 0]
        np.subtract(level_rK[:, :-1], level_rK[:, 1:], out=stored_RK[start : start + ROWS_AT_A_TIME, 1:])
    return stored_RK.reshape(logprobs_NK.shape)


def decode_levels(stored_NK: np.ndarray, tail_mass_N: np.ndarray, mask_NK: np.ndarray | None = None) -> np.ndarray:
    """Log-probs (float32) whose kept mass is 1 - `tail_mass_N`; level 0 gives -inf, and so does a False in the mask."""
    # level_k = first - descents = 2 * first - cumsum, all modulo 256.
    level_NK = np.cumsum(stored_NK, axis=-1, dtype=np.uint8)
    np.subtract(2 * stored_NK[..., :1], level_NK, out=level_NK)
    if mask_NK is not None:
        level_NK *= mask_NK
    return logprobs_of_levels(level_NK, tail_mass_N)


def undo_descents(stored_KN: np.ndarray) -> None:
    """Turn descents into levels in place, entries on the FIRST axis: several times as fast as along the last."""
    for entry in range(1, len(stored_KN)):
        np.subtract(stored_KN[entry - 1], stored_KN[entry], out=stored_KN[entry])


def logprobs_of_levels(level_NK: np.ndarray, tail_mass_N: np.ndarray) -> np.ndarray:
    """Log-probs (float32) of levels, scaled so that the kept mass is 1 - `tail_mass_N`; level 0 gives -inf."""
    flat_RK = level_NK.reshape(-1, level_NK.shape[-1])
    kept_R1 = 1.0 - np.asarray(tail_mass_N, np.float32).reshape(-1, 1)
    logprobs_RK = np.empty(flat_RK.shape, np.float32)
    for start in range(0, len(flat_RK), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        _scale_rows(flat_RK[rows], kept_R1[rows], logprobs_RK[rows])
    return logprobs_RK.reshape(level_NK.shape)


def _scale_rows(level_RK: np.ndarray, kept_R1: np.ndarray, out_RK: np.ndarray) -> None:
    # p = (level / 255)^4 by two squarings: arithmetic is faster than a second look-up in a table
    np.multiply(level_RK, np.float32(1 / 255), out=out_RK)
    np.square(out_RK, out=out_RK)
    np.square(out_RK, out=out_RK)
    mass_R1 = out_RK.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        shift_R1 = np.log(np.clip(kept_R1, 0.0, 1.0) / np.where(mass_R1 > 0, mass_R1, 1.0))
    np.take(LOGPROB_OF_LEVEL, level_RK, out=out_RK, mode="clip")
    out_RK += shift_R1
    np.minimum(out_RK[:, :1], 0.0, out=out_RK[:, :1])  # rounding may lift a probability of 1, and only the first is one


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
