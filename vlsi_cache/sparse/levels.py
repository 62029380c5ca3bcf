"""The quantiser of kept log-probs: one byte an entry, level = round(255 * p ** (1/4)).

Levels are stored in rank order as the first value and then descents, which are small and compress well.

Shapes: K kept entries, N any leading axes (layers and tokens in either order).
"""

import numpy as np

from vlsi_cache.errors import DataError

__all__ = ["decode_levels", "encode_levels"]

ROWS_AT_A_TIME = 4096  # keeps the temporaries of one step inside the processor's cache

with np.errstate(divide="ignore"):
    LOGPROB_OF_LEVEL = (4.0 * np.log(np.arange(256) / 255.0)).astype(np.float32)  # level 0 is -inf
PROB_OF_LEVEL = np.exp(LOGPROB_OF_LEVEL)


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
    flat_RK = stored_NK.reshape(-1, stored_NK.shape[-1])
    kept_R1 = 1.0 - np.asarray(tail_mass_N, np.float32).reshape(-1, 1)
    mask_RK = None if mask_NK is None else mask_NK.reshape(flat_RK.shape)
    logprobs_RK = np.empty(flat_RK.shape, np.float32)
    for start in range(0, len(flat_RK), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        _decode_rows(flat_RK[rows], kept_R1[rows], None if mask_RK is None else mask_RK[rows], logprobs_RK[rows])
    return logprobs_RK.reshape(stored_NK.shape)


def _decode_rows(stored_RK: np.ndarray, kept_R1: np.ndarray, mask_RK: np.ndarray | None, out_RK: np.ndarray) -> None:
    # level_k = first - descents = 2 * first - cumsum, all modulo 256.
    level_RK = np.cumsum(stored_RK, axis=1, dtype=np.uint8)
    np.subtract(2 * stored_RK[:, :1], level_RK, out=level_RK)
    if mask_RK is not None:
        level_RK *= mask_RK
    np.take(PROB_OF_LEVEL, level_RK, out=out_RK, mode="clip")
    mass_R1 = out_RK.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        shift_R1 = np.log(np.clip(kept_R1, 0.0, 1.0) / np.where(mass_R1 > 0, mass_R1, 1.0))
    np.take(LOGPROB_OF_LEVEL, level_RK, out=out_RK, mode="clip")
    out_RK += shift_R1
    np.minimum(out_RK, 0.0, out=out_RK)
