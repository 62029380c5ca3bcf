"""Which samples and tokens a smaller cache keeps.

`--where` is a small language over the sample table: `kind == "chart" and entropy > 0.5`. Python's own parser reads it,
and only comparisons of columns with literals are evaluated: there is nothing to call.
"""

import ast
import hashlib
import math
import operator
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vlsi_cache.errors import SampleNotFoundError, SpecError, first_of
from vlsi_cache.io import refuse_url
from vlsi_cache.sparse.rows import select_at_random, select_by_entropy
from vlsi_cache.store.arrays import SAMPLE_ARRAYS, part_specs
from vlsi_cache.store.encoding import check_sample_arrays
from vlsi_cache.store.files import check_part_files, load_part_record
from vlsi_cache.store.format import CacheHeader, canonical_json, part_dir
from vlsi_cache.store.reader import Cache
from vlsi_cache.store.remote.fetch import Want

if TYPE_CHECKING:
    import pyarrow as pa

# the names people write, and the columns of the table
COLUMNS = {
    "id": "id",
    "kind": "kind",
    "source": "kind",
    "tokens": "num_tokens",
    "response_tokens": "num_response_tokens",
    "entropy": "entropy_last",
    "gold_logprob": "gold_logprob_last",
    "kept_mass": "kept_mass",
    "part": "part",
}
TEXT_COLUMNS = ("id", "kind", "source")
MAX_CHARACTERS = 10_000
OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
Value = np.ndarray | str | int | float | list[Any]


def samples_where(text: str, table: "pa.Table") -> np.ndarray:
    """bool [S]: the samples of the table for which the expression is true; SpecError when it is none.

    A mean that does not exist (of a sample without rows) compares as false.
    """
    try:
        if len(text) > MAX_CHARACTERS:
            raise _wrong(text[:40] + "...", f"it is longer than {MAX_CHARACTERS} characters")
        found = _truth(ast.parse(text.strip(), mode="eval").body, text, table)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, SpecError):
            raise
        raise _wrong(text, f"it cannot be read ({error.msg if isinstance(error, SyntaxError) else error})") from None
    return found


def _truth(node: ast.expr, text: str, table: "pa.Table") -> np.ndarray:
    if isinstance(node, ast.BoolOp):
        pieces = [_truth(value, text, table) for value in node.values]
        combine = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        return combine.reduce(pieces)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ~_truth(node.operand, text, table)
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        pairs = zip(sides[:-1], node.ops, sides[1:], strict=True)
        return np.logical_and.reduce([_compared(left, op, right, text, table) for left, op, right in pairs])
    raise _wrong(text, f"`{_excerpt(node)}` is no comparison")


def _compared(left: ast.expr, op: ast.cmpop, right: ast.expr, text: str, table: "pa.Table") -> np.ndarray:
    one, other = _value(left, text, table), _value(right, text, table)
    kinds = {_kind(left, one), _kind(right, other)}
    shown = f"{_excerpt(left)} ... {_excerpt(right)}"
    if not isinstance(left, ast.Name) and not isinstance(right, ast.Name):
        raise _wrong(text, f"`{shown}` compares no column")
    if len(kinds - {"nothing"}) > 1:
        raise _wrong(text, f"`{shown}` compares text with a number")
    if isinstance(op, ast.In | ast.NotIn):
        if not isinstance(left, ast.Name) or not isinstance(other, list):
            raise _wrong(text, f"`{shown}`: write a column, `in`, and a list such as ['a', 'b']")
        column = _as_array(one)
        inside = np.logical_or.reduce([np.zeros(len(table), bool), *(column == item for item in other)])
        return ~inside if isinstance(op, ast.NotIn) else inside
    if type(op) not in OPERATORS or isinstance(one, list) or isinstance(other, list):
        raise _wrong(text, f"`{shown}`: the operators are == != < <= > >= in, not in")
    return np.broadcast_to(np.asarray(OPERATORS[type(op)](one, other), bool), len(table)).copy()


def _value(node: ast.expr, text: str, table: "pa.Table") -> Value:
    """A column, a literal, or a list of literals."""
    if isinstance(node, ast.Name):
        if node.id not in COLUMNS:
            raise _wrong(text, f"there is no column `{node.id}`")
        column = table[COLUMNS[node.id]]
        return _as_array(column.to_pylist()) if node.id in TEXT_COLUMNS else column.to_numpy()
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        items = [_value(item, text, table) for item in node.elts]
        if any(isinstance(item, np.ndarray | list) for item in items):
            raise _wrong(text, f"`{_excerpt(node)}`: a list holds literals only")
        return items
    sign = -1 if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else 1
    inner = node.operand if isinstance(node, ast.UnaryOp) and sign < 0 else node
    if isinstance(inner, ast.Constant) and type(inner.value) in (int, float, *((str,) if sign > 0 else ())):
        return inner.value if sign > 0 else -inner.value  # type: ignore[operator]
    raise _wrong(text, f"`{_excerpt(node)}` is neither a column, nor a number, nor text in quotes")


def _as_array(values: Any) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _kind(node: ast.expr, value: Value) -> str:
    items = value if isinstance(value, list) else [value]
    if isinstance(node, ast.Name):
        return "text" if node.id in TEXT_COLUMNS else "number"
    kinds = {"text" if isinstance(item, str) else "number" for item in items}
    return "mixture" if len(kinds) > 1 else next(iter(kinds), "nothing")


def _excerpt(node: ast.expr) -> str:
    shown = ast.unparse(node)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _wrong(text: str, problem: str) -> SpecError:
    return SpecError(
        f"where `{text}`: {problem}; compare the columns {', '.join(COLUMNS)} with numbers or text in quotes, "
        "joined with and, or, not, in"
    )


def refuse_unknown(cache: Cache, names: Iterable[str]) -> None:
    """SpecError for a choice by numbers that the cache lacks, which nothing could be compared with."""
    unknown = sorted(set(names).intersection(cache.header.lacks))
    if unknown:
        raise SpecError(
            f"`{cache.path}` does not know {' and '.join(f'`{name}`' for name in unknown)} of its rows, since the "
            "files that it was imported from do not: choose by something else (`tokens`, `kept_mass`, random:SHARE)"
        )


SampleIds = str | os.PathLike[str] | Iterable[str]


@dataclass(frozen=True)
class TokenRule:
    """`entropy>0.5`, `top:0.3` or `random:0.2`."""

    kind: Literal["entropy", "top", "random"]
    amount: float

    @property
    def text(self) -> str:
        return f"{self.kind}{'>' if self.kind == 'entropy' else ':'}{self.amount!r}"


def parse_token_rule(text: str) -> TokenRule:
    """The rule written in `text`; SpecError when there is none."""
    for kind, mark in (("entropy", ">"), ("top", ":"), ("random", ":")):
        name, found, number = text.replace(" ", "").partition(mark)
        if name == kind and found:
            try:
                amount = float(number)
            except ValueError:
                amount = math.nan
            if (kind == "entropy" and 0 <= amount < math.inf) or 0 < amount <= 1:
                return TokenRule(kind, amount)  # pyright: ignore[reportArgumentType]  (one of the three above)
    raise SpecError(
        f"tokens `{text}`: write entropy>0.5 (in nats), or top:0.3 or random:0.2 (a share above 0, up to 1)"
    )


def read_sample_ids(samples: SampleIds) -> list[str]:
    """Distinct sample ids, sorted; a path is a text file (UTF-8) with one id a line, empty lines aside."""
    if not isinstance(samples, str | os.PathLike):
        ids = list(samples)
        wrong = [one for one in ids if not isinstance(one, str)]
        if wrong:
            raise SpecError(f"samples: ids are text, got {wrong[0]!r}")
        return sorted(set(ids))
    refuse_url(samples, "samples")
    path = Path(samples)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SpecError(f"samples `{path}`: the list of ids cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"samples `{path}`: the list of ids is not UTF-8 text (byte {error.start})") from error
    # only line feeds end a line: an id may hold any other character that Unicode calls a line break
    return sorted({line.removesuffix("\r") for line in text.split("\n")} - {""})


def ids_digest(ids: list[str]) -> dict[str, Any]:
    """How a list of ids is named in a fingerprint."""
    return {"num": len(ids), "sha256": hashlib.sha256(canonical_json(ids)).hexdigest()}


def choose_samples(
    cache: Cache, *, ids: list[str] | None, min_kept_mass: float | None, where: str | None
) -> np.ndarray:
    """bool [S]: the samples of the table that all of these keep."""
    table = cache.sample_table()
    chosen_S = np.ones(len(table), bool)
    if ids is not None:
        chosen_S &= _named(cache, table, ids)
    if min_kept_mass is not None:
        if not 0 <= min_kept_mass <= 1:
            raise SpecError(f"min_kept_mass {min_kept_mass}: a mass is between 0 and 1")
        chosen_S &= table["kept_mass"].to_numpy() >= min_kept_mass
    if where is not None:
        chosen_S &= samples_where(where, table)
        refuse_unknown(cache, (node.id for node in ast.walk(ast.parse(where.strip())) if isinstance(node, ast.Name)))
    return chosen_S


def _named(cache: Cache, table: "pa.Table", ids: list[str]) -> np.ndarray:
    known, wanted = table["id"].to_pylist(), set(ids)
    unknown = sorted(wanted.difference(known))
    if unknown:
        names = first_of(unknown)
        raise SampleNotFoundError(f"{len(unknown)} of {len(ids)} sample ids are not in `{cache.path}`: {names}")
    return np.array([name in wanted for name in known], bool)


@dataclass(frozen=True)
class PartTokens:
    """What a token rule looks at in one part: spans of the samples, places in the response, last-layer entropies."""

    sample_ids: list[str]
    response_lengths: list[int]
    offsets: np.ndarray
    positions_T: np.ndarray
    entropy_T: np.ndarray


def read_part_tokens(cache: Cache, index: int) -> PartTokens:
    """The same of a part on disk; nothing else of it is read."""
    from vlsi_cache.store.codec import read_layered, read_samples

    last = [len(cache.layers) - 1]

    def read(root: Path) -> PartTokens:
        record, folder = load_part_record(root, cache.header, index), part_dir(root, index)
        check_part_files(root, index, record)
        specs = part_specs(cache.header, record)
        samples = read_samples(folder, specs, SAMPLE_ARRAYS)
        check_sample_arrays(folder, cache.header, record, samples)
        entropy_T = read_layered(folder, specs, ["entropy"], last)["entropy"][0]
        lengths = record.sample_response_tokens
        return PartTokens(record.sample_ids, lengths, samples["offsets"], samples["positions"], entropy_T)

    return cache.read_files(index, read, Want(layers=last, names=[*SAMPLE_ARRAYS, "entropy"]))


def choose_rows(header: CacheHeader, rule: TokenRule | None, part: PartTokens, chosen_S: np.ndarray) -> np.ndarray:
    """bool [T]: the rows of a part that stay; `chosen_S` are the samples that do."""
    rows_T = np.repeat(chosen_S, np.diff(part.offsets))
    if rule is None:
        return rows_T
    if rule.kind == "random":
        return rows_T & _at_random(header, rule.amount, part)
    option = {"above" if rule.kind == "entropy" else "top": rule.amount}
    rows_T[rows_T] = select_by_entropy(part.entropy_T[rows_T], **option)
    return rows_T


def _at_random(header: CacheHeader, share: float, part: PartTokens) -> np.ndarray:
    """Drawn as a build with this rule would; anew for tokens that its build, or a prune since, has chosen already."""
    built = header.fingerprint.get("rows.select_tokens") or {}
    times = any(value is not None for value in built.values()) + len(earlier_cuts(header, "tokens"))
    base, names, lengths = int(header.fingerprint.get("rows.seed", 0)), part.sample_ids, part.response_lengths
    of_response = select_at_random(names, lengths, share=share, seed=base + (times << 32))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    pieces = [start + part.positions_T[lo:hi] for start, (lo, hi) in zip(starts, pairwise(part.offsets), strict=False)]
    return of_response[np.concatenate([np.zeros(0, np.int64), *pieces]).astype(np.int64)]


def earlier_cuts(header: CacheHeader, what: str) -> list[Any]:
    """The values of the fingerprint's fields `prune.<number>.<what>`."""
    fields = header.fingerprint.items()
    return [value for name, value in fields if name.startswith("prune.") and name.endswith(f".{what}")]
