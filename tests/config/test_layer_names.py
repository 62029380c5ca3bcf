"""Lists of layers: one way to write them, and what is printed can be typed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlsi_cache.config.layers import parse_layers, parse_ranges, shown_layers
from vlsi_cache.errors import SpecError


def test_a_list_of_layers() -> None:
    assert parse_layers("2-6, 18,last") == [2, 3, 4, 5, 6, 18, "last"]
    assert parse_ranges("2-6,18,last") == [(2, 6), (18, 18), "last"]
    assert shown_layers([2, 3, 4, 5, 6, 18, 28], last=28) == "2-6,18,last"
    assert shown_layers([1, 2, "last"]) == "1,2,last"
    assert shown_layers([]) == ""


@given(st.sets(st.integers(0, 60), min_size=1), st.integers(50, 70))
def test_what_is_shown_is_what_is_read(layers: set[int], last: int) -> None:
    named = [layer for layer in sorted(layers) if layer <= last]
    read = parse_layers(shown_layers(named, last=last)) if named else []
    assert [last if layer == "last" else layer for layer in read] == named


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2:38", "`2:38` is neither a layer, nor a range such as 2-6, nor `last`; a range is written 2-38"),
        ("", "`` is neither"),
        ("1,,2", "`` is neither"),
        ("-3", "`-3` is neither"),
        ("2-", "`2-` is neither"),
        ("5-3", "the range `5-3` runs backwards"),
        ("1-99999999999", "is neither a layer"),
        ("\u0663", "is neither a layer"),
        ("LAST", "`LAST` is neither"),
    ],
)
def test_what_is_no_list_of_layers(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_layers(text)
