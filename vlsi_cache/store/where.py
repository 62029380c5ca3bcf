"""A small language over the sample table: `kind == "chart" and entropy > 0.5`.

Python's own parser reads it, and only comparisons of columns with literals are evaluated: there is nothing to call.
"""

import ast
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from vlsi_cache.errors import SpecError

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
        return _column(table, node.id)
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


def _column(table: "pa.Table", name: str) -> np.ndarray:
    column = table[COLUMNS[name]]
    if name in TEXT_COLUMNS:
        return _as_array(column.to_pylist())
    return column.to_numpy()


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
