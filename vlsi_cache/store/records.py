"""What a build hands to the writer, and the checks of it: the last place where a wrong row can be stopped."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlsi_cache.errors import DataError, list_problems
from vlsi_cache.sparse.rows import SparseRows

from .format import CacheHeader


@dataclass(frozen=True)
class PartSamples:
    """What goes into one part: samples in order, and their rows concatenated along the token axis.

    `positions` says which response tokens have a row; None: all of them. `rows` may be None where the layered arrays
    are given in their disk form.
    """

    sample_ids: list[str]
    kinds: list[str]
    digests: list[str]
    response_ids: list[np.ndarray]
    rows: SparseRows | None
    skipped: list[dict[str, Any]] = field(default_factory=list)
    positions: list[np.ndarray] | None = None

    @property
    def positions_or_all(self) -> list[np.ndarray]:
        if self.positions is not None:
            return self.positions
        return [np.arange(len(ids), dtype=np.uint32) for ids in self.response_ids]


def check_samples(header: CacheHeader, index: int, samples: PartSamples) -> None:
    """Everything that could put a wrong row on the disk, checked where the data enters."""
    problems = [*_id_problems(samples), *_shape_problems(header, samples)]
    if not problems:
        problems = _value_problems(header, samples)
    if problems:
        raise DataError(f"part {index} cannot be written:\n{list_problems(problems)}")


def _id_problems(samples: PartSamples) -> list[str]:
    ids, problems = samples.sample_ids, []
    if len(set(ids)) != len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})
        problems.append(f"sample ids occur twice: {twice[:3]}")
    for name in ids:
        try:
            name.encode()
        except UnicodeEncodeError:
            problems.append(f"sample id {name!r} is not valid unicode")
    return problems


def _shape_problems(header: CacheHeader, samples: PartSamples) -> list[str]:
    num = len(samples.sample_ids)
    columns = {"kinds": samples.kinds, "digests": samples.digests, "response_ids": samples.response_ids}
    if samples.positions is not None:
        columns["positions"] = samples.positions
    problems = [f"{len(v)} `{name}` for {num} samples" for name, v in columns.items() if len(v) != num]
    num_rows = sum(len(part) for part in samples.positions_or_all)
    LT = (len(header.layers), num_rows)
    rows = samples.rows
    assert rows is not None
    width = min(rows.ids_LTK.shape[-1], header.widest) if header.truncated else header.widest
    expected = {
        "ids_LTK": (*LT, width),
        "logprobs_LTK": (*LT, width),
        "tail_ids_LTm": (*LT, header.tail_samples),
        "lse_LTn": (*LT, len(header.taus)),
        "entropy_LT": LT,
        "gold_logprob_LT": LT,
        "tail_mass_LT": LT,
    }
    found = {name: np.shape(getattr(rows, name)) for name in expected}
    return problems + [f"`{n}` is {found[n]}, the cache needs {s}" for n, s in expected.items() if found[n] != s]


def _value_problems(header: CacheHeader, samples: PartSamples) -> list[str]:
    assert samples.rows is not None
    problems = _width_problems(header, samples.rows)
    for name in ("ids_LTK", "tail_ids_LTm"):
        ids = getattr(samples.rows, name)
        if ids.size and (ids.min() < 0 or ids.max() >= header.v_real):
            problems.append(f"`{name}` holds {ids.min()} to {ids.max()}, the vocabulary is 0 to {header.v_real - 1}")
    for name in ("logprobs_LTK", "lse_LTn", "entropy_LT", "gold_logprob_LT", "tail_mass_LT"):
        values = getattr(samples.rows, name)
        bad = np.isnan(values) if "logprob" in name else ~np.isfinite(values)  # a log-prob may be -inf
        if bad.any():
            token = int(np.nonzero(bad)[1].min())
            problems.append(f"`{name}` is not a number in sample {_sample_at(samples, token)!r}")
    for name, ids, at in zip(samples.sample_ids, samples.response_ids, samples.positions_or_all, strict=True):
        if ids.size and (ids.min() < 0 or int(ids.max()) >= 2**32):
            problems.append(f"response ids of sample {name!r} do not fit uint32")
        if (
            samples.positions is not None
            and at.size
            and (np.any(np.diff(at) <= 0) or not 0 <= at[0] <= at[-1] < len(ids))
        ):
            problems.append(f"positions of sample {name!r} must ascend within its {len(ids)} response tokens")
    return problems


def _sample_at(samples: PartSamples, token: int) -> str:
    ends = np.cumsum([len(part) for part in samples.positions_or_all])
    return samples.sample_ids[int(np.searchsorted(ends, token, side="right"))]


def _width_problems(header: CacheHeader, rows: SparseRows) -> list[str]:
    logprobs_LTK = rows.logprobs_LTK
    problems = ["`logprobs_LTK` must be descending"] if (logprobs_LTK[..., 1:] > logprobs_LTK[..., :-1]).any() else []
    if header.row_kind == "sampled":
        shares_LT = np.exp(logprobs_LTK.astype(np.float64)).sum(-1)
        wrong_LT = np.abs(shares_LT - 1) > 1e-5
        return problems + [f"the shares of sampled rows must sum to 1, found {x}" for x in shares_LT[wrong_LT][:1]]
    wide = [row for row, k in enumerate(header.top_k) if np.isfinite(logprobs_LTK[row, :, k:]).any()]
    return problems + [f"layer {header.layers[row]} keeps more than its {header.top_k[row]} entries" for row in wide]
