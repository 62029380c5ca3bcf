"""Values of a row: as a message may show them, and as JSON can hold them."""

import json
import math
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from vlsi_cache.errors import DataError
from vlsi_cache.progress import printable as escaped

_MAX_SHOWN = 120  # characters of one value in a message
_MAX_BITS = 256  # of a whole number
_MAX_DEPTH = 64  # of nested lists and mappings that a chat template may be given
# One line, whatever is in the text.
printable = partial(escaped, keep="")


def shown(value: Any) -> str:
    """A value in a message: control characters escaped, the middle of a long one left out."""
    if isinstance(value, str):
        text = value
    else:
        try:
            text = repr(value)
        except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists in lists
            text = f"a {type(value).__name__} that cannot be shown"
    if len(text) <= _MAX_SHOWN:
        return printable(text)
    return f"{printable(text[: _MAX_SHOWN - 20])}...{printable(text[-20:])} ({len(text):,} characters)"


def listed(names: Any) -> str:
    """Names of keys or columns in backticks, the first twenty."""
    names = [f"`{shown(name)}`" for name in names]
    more = [f"{len(names) - 20} more"] if len(names) > 20 else []
    return ", ".join([*names[:20], *more])


def is_empty(value: Any) -> bool:
    """Whether a key with this value says nothing."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def text_value(value: Any, what: str) -> str:
    """The value if it is a text that can be UTF-8; raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"{what} is a {type(value).__name__}, must be a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half a surrogate pair at character {error.start}, which is no text") from None
    return value


def parse_json(text: str | bytes) -> Any:
    """What JSON text says; raises DataError with the reason alone."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise DataError(f"is not JSON: {error}") from None
    except RecursionError:
        raise DataError("is not JSON that can be read: it is nested too deeply") from None
    except ValueError:  # what `int` says of a text that is too long for it
        raise DataError(f"holds a whole number of more than {sys.get_int_max_str_digits()} digits") from None


def given_json(value: Any, what: str) -> Any:
    """A value that may be written as JSON text instead, in lists and mappings alone; raises DataError."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except DataError as error:
            raise DataError(f"{what} is given as text and {error}") from None
    return _plain(value, what, 0)


def _plain(value: Any, what: str, depth: int) -> Any:
    """A copy that JSON, the digest and every chat template read in the same way."""
    if depth > _MAX_DEPTH:
        raise DataError(f"{what} is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, str):
        return text_value(value, f"a text of {what}")
    if isinstance(value, Mapping):
        return {text_value(key, f"a key of {what}"): _plain(one, what, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, what, depth + 1) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{what} holds {value}, which is no JSON")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise DataError(f"{what} holds a whole number of more than {_MAX_BITS} bits")
    if value is None or isinstance(value, bool | int | float):
        return value
    raise DataError(f"{what} holds a {type(value).__name__}, which is no JSON")
