"""SparseRows: selection, joining and the errors of `validate`."""

from dataclasses import fields, replace

import numpy as np
import pytest

from vlsi_cache.errors import DataError
from vlsi_cache.sparse.rows import SHAPES, SparseRows


def make_rows(num_layers: int = 2, num_tokens: int = 3, vocab_size: int = 10) -> SparseRows:
    rng = np.random.default_rng(0)
    probs_LTV = rng.dirichlet(np.ones(vocab_size), (num_layers, num_tokens))
    order_LTV = np.argsort(-probs_LTV, axis=-1, kind="stable")
    probs_LTV = np.take_along_axis(probs_LTV, order_LTV, -1)
    return SparseRows(
        ids_LTK=order_LTV[..., :4],
        logprobs_LTK=np.log(probs_LTV[..., :4]).astype(np.float32),
        tail_ids_LTm=order_LTV[..., 5:7],
        lse_LTn=np.ones((num_layers, num_tokens, 1), np.float32),
        entropy_LT=np.ones((num_layers, num_tokens), np.float32),
        gold_logprob_LT=-np.ones((num_layers, num_tokens), np.float32),
        tail_mass_LT=probs_LTV[..., 4:].sum(-1).astype(np.float32),
    )


def changed(rows: SparseRows, name: str, where: tuple[int, ...], value: float) -> SparseRows:
    array = getattr(rows, name).copy()
    array[where] = value
    return replace(rows, **{name: array})


def test_every_field_has_a_declared_shape():
    assert [*SHAPES, "vocab_size", "taus"] == [field.name for field in fields(SparseRows)]


def test_sizes_and_valid_rows():
    rows = make_rows()
    rows.validate(10)
    assert (rows.num_layers, rows.num_tokens, rows.top_k, rows.num_tail) == (2, 3, 4, 2)


def test_select_and_concat():
    rows = make_rows()
    np.testing.assert_array_equal(rows.layer(-1).ids_LTK[0], rows.ids_LTK[1])
    assert rows.layer(-1).num_layers == 1
    np.testing.assert_array_equal(rows.select_layers([1, 0]).entropy_LT, rows.entropy_LT[::-1])
    joined = SparseRows.concat([rows.tokens(slice(0, 1)), rows.tokens(slice(1, 3))])
    for name in SHAPES:
        np.testing.assert_array_equal(getattr(joined, name), getattr(rows, name))


def test_select_and_concat_refuse():
    rows = make_rows()
    with pytest.raises(DataError, match=r"\[2\] are outside these rows, which have 2 layers"):
        rows.select_layers([0, 2])
    with pytest.raises(DataError, match="no rows"):
        SparseRows.concat([])
    with pytest.raises(DataError, match=r"`ids_LTK`.*differ in shape"):
        SparseRows.concat([rows, rows.layer(0)])


@pytest.mark.parametrize(
    ("name", "where", "value", "message"),
    [
        ("ids_LTK", (1, 2, 3), 10, "`ids_LTK` at layer index 1, token 2, entry 3 is 10.*vocabulary of 10"),
        ("ids_LTK", (0, 0, 0), -1, "outside the real vocabulary"),
        ("tail_ids_LTm", (0, 1, 1), 99, "`tail_ids_LTm` at layer index 0, token 1, entry 1 is 99"),
        ("logprobs_LTK", (0, 0, 0), 0.5, "above 0, so it is no log-prob"),
        ("logprobs_LTK", (0, 2, 1), np.nan, "not a number"),
        ("logprobs_LTK", (1, 1, 3), -1e-6, "`logprobs_LTK` at layer index 1, token 1, entry 3.*descending"),
        ("gold_logprob_LT", (0, 0), np.nan, "`gold_logprob_LT` at layer index 0, token 0 is nan"),
        ("entropy_LT", (1, 0), np.inf, "not finite"),
        ("lse_LTn", (1, 0, 0), np.nan, "not finite"),
        ("tail_mass_LT", (1, 2), 1.5, r"outside \[0, 1\]"),
    ],
)
def test_validate_names_the_place(name: str, where: tuple[int, ...], value: float, message: str):
    with pytest.raises(DataError, match=message):
        changed(make_rows(), name, where, value).validate(10)


def test_validate_refuses_repeats_shapes_and_dtypes():
    rows = make_rows()
    with pytest.raises(DataError, match=r"layer index 0, token 1.*repeats an id"):
        changed(rows, "ids_LTK", (0, 1, 2), rows.ids_LTK[0, 1, 0]).validate(10)
    with pytest.raises(DataError, match=r"token 2 is .* a kept id"):
        changed(rows, "tail_ids_LTm", (0, 2, 1), rows.ids_LTK[0, 2, 3]).validate(10)
    with pytest.raises(DataError, match="`entropy_LT` has 2 along T, the other arrays have 3"):
        replace(rows, entropy_LT=rows.entropy_LT[:, :2]).validate(10)
    with pytest.raises(DataError, match="axes L T K"):
        replace(rows, ids_LTK=rows.ids_LTK[0]).validate(10)
    with pytest.raises(DataError, match="wrong dtype float"):
        replace(rows, ids_LTK=rows.ids_LTK.astype(np.float32)).validate(10)


def test_padding_and_unsigned_ids_are_valid():
    rows = make_rows()
    padded = replace(rows, ids_LTK=rows.ids_LTK.astype(np.uint32), logprobs_LTK=rows.logprobs_LTK.copy())
    padded.logprobs_LTK[..., 2:] = -np.inf
    padded.ids_LTK[..., 2:] = padded.ids_LTK[..., :1]
    padded.validate(10)
