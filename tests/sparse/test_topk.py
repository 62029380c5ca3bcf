"""Teacher rows against dense distributions; ties, padding, tail samples and memory."""

import math
import shutil

import numpy as np
import pytest
import torch
from helpers.memory import LargestTensor
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributions import Categorical

from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.sparse import head as kernels
from vlsi_cache.sparse import topk
from vlsi_cache.sparse.head import Head, pick_kernels
from vlsi_cache.sparse.topk import _top_slots, sample_uniforms, stack_layers, teacher_rows


def make_teacher(num_tokens: int, hidden_size: int, vocab: int, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens * vocab)
    hidden_TD = torch.randn(num_tokens, hidden_size, generator=generator) * spread / hidden_size**0.5
    weight_VD = torch.randn(vocab, hidden_size, generator=generator)
    return hidden_TD, weight_VD, torch.randint(vocab, (num_tokens,), generator=generator)


def uniforms(num_tokens: int, num_tail: int) -> np.ndarray:
    return sample_uniforms(0, "x", num_tokens, 1, num_tail)[0]


@pytest.mark.parametrize(
    ("num_tokens", "vocab", "vocab_size", "top_k", "block"),
    [
        (7, 1000, 1000, 5, 96),
        (5, 1000, 937, 64, 200),
        (4, 300, 300, 1, 1 << 14),
        (3, 77, 70, 69, 32),
        (1, 64, 64, 8, 64),
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_rows_equal_the_dense_distribution(
    num_tokens: int, vocab: int, vocab_size: int, top_k: int, block: int, has_bias: bool
):
    hidden_TD, weight_VD, gold_T = make_teacher(num_tokens, 16, vocab)
    weight_VD[vocab_size:] += 100.0  # padding rows that would win every place
    gold_T %= vocab_size
    bias_V = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * has_bias
    rows = teacher_rows(
        hidden_TD, Head(weight_VD, bias_V=bias_V if has_bias else None), gold_T, top_k=top_k,
        uniforms_Tm=uniforms(num_tokens, 3), vocab_size=vocab_size, taus=(1.0, 2.0, 0.5), block=block,
    )  # fmt: skip
    logits_TV = (hidden_TD @ weight_VD.T + bias_V)[:, :vocab_size].double()
    dense = Categorical(logits=logits_TV)
    order_TV = logits_TV.argsort(dim=1, descending=True, stable=True)
    close = {"rtol": 2e-5, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(rows["ids_TK"], order_TV[:, :top_k])
    torch.testing.assert_close(rows["logprobs_TK"], dense.logits.gather(1, rows["ids_TK"]), **close)
    torch.testing.assert_close(rows["entropy_T"], dense.entropy(), **close)
    torch.testing.assert_close(rows["gold_logprob_T"], dense.log_prob(gold_T), **close)
    for column, tau in enumerate((1.0, 2.0, 0.5)):
        torch.testing.assert_close(rows["lse_Tn"][:, column], (logits_TV / tau).logsumexp(1), **close)
    torch.testing.assert_close(
        rows["tail_mass_T"], dense.probs.gather(1, order_TV[:, top_k:]).sum(1), rtol=1e-4, atol=0, check_dtype=False
    )
    assert not (rows["tail_ids_Tm"][..., None] == rows["ids_TK"][:, None]).any()
    assert 0 <= int(rows["tail_ids_Tm"].min()) <= int(rows["tail_ids_Tm"].max()) < vocab_size
    assert all(rows[name].dtype == (torch.int64 if "ids" in name else torch.float32) for name in rows)


@pytest.mark.parametrize("levels", [1, 2, 5, 40])
@pytest.mark.parametrize(("top_k", "block"), [(1, 64), (3, 1024), (16, 100), (40, 1 << 14)])
def test_ties_go_to_the_lowest_id(levels: int, top_k: int, block: int):
    # Integer logits: a one-dimensional hidden state of 1 makes the head's entries the logits, exactly.
    logits_V = torch.randint(levels, (2500, 1), generator=torch.Generator().manual_seed(levels)).float()
    hidden_TD = torch.tensor([[1.0], [-1.0], [0.0]])
    rows = teacher_rows(
        hidden_TD, logits_V, torch.zeros(3, dtype=torch.long), top_k=top_k, uniforms_Tm=uniforms(3, 2), vocab_size=2411,
        block=block,
    )  # fmt: skip
    order = np.argsort(-(hidden_TD @ logits_V[:2411].T).numpy(), axis=1, kind="stable")
    np.testing.assert_array_equal(rows["ids_TK"].numpy(), order[:, :top_k])
    assert not (rows["tail_ids_Tm"][..., None] == rows["ids_TK"][:, None]).any()


@pytest.mark.parametrize("spread", [1.0, 12.0])
@pytest.mark.parametrize("block", [64, 1024])
def test_tail_samples_follow_the_complement(block: int, spread: float):
    num_draws, vocab, top_k = 20_000, 300, 6
    hidden_TD, weight_VD, gold_T = make_teacher(2, 8, vocab, spread)
    bias_V = torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    head = Head(weight_VD, bias_V=bias_V)
    rows = teacher_rows(
        hidden_TD, head, gold_T, top_k=top_k, uniforms_Tm=uniforms(2, num_draws), vocab_size=vocab, block=block
    )
    tail_TV = (hidden_TD @ weight_VD.T + bias_V).double().softmax(1).scatter(1, rows["ids_TK"], 0.0)
    tail_TV /= tail_TV.sum(1, keepdim=True)
    for tail_V, ids_m in zip(tail_TV, rows["tail_ids_Tm"], strict=True):
        counts_V = torch.bincount(ids_m, minlength=vocab).double()
        assert not counts_V[tail_V == 0].any()
        often = tail_V * num_draws >= 5
        observed, expected = counts_V[often], num_draws * tail_V[often]
        observed = torch.cat([observed, num_draws - observed.sum(0, keepdim=True)])
        expected = torch.cat([expected, (num_draws - expected.sum(0, keepdim=True)).clamp(min=1e-9)])
        chi2, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
        assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tail", [1, 40])
def test_a_processor_and_a_gpu_draw_the_same_ids(num_tail: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """They multiply with the rows of a group in other ways; the last group reaches behind the vocabulary."""
    hidden_TD, weight_VD, gold_T = make_teacher(9, 8, 1003)
    asked = {"top_k": 5, "vocab_size": 1003, "block": 256, "uniforms_Tm": uniforms(9, num_tail)}
    here = teacher_rows(hidden_TD.to(dtype), weight_VD.to(dtype), gold_T, **asked)
    monkeypatch.setattr(topk, "_is_on_host", lambda _: False)
    there = teacher_rows(hidden_TD.to(dtype), weight_VD.to(dtype), gold_T, **asked)
    assert torch.equal(here["tail_ids_Tm"], there["tail_ids_Tm"])


def test_extreme_uniforms_stay_outside_the_top_k():
    hidden_TD, weight_VD, gold_T = make_teacher(6, 8, 500)
    edges_Tm = np.tile([0.0, 2.0**-53, 1 - 2.0**-53, 0.5], (6, 1))
    rows = teacher_rows(hidden_TD, weight_VD, gold_T % 490, top_k=9, uniforms_Tm=edges_Tm, vocab_size=490, block=64)
    assert not (rows["tail_ids_Tm"][..., None] == rows["ids_TK"][:, None]).any()
    assert int(rows["tail_ids_Tm"].max()) < 490


def test_rows_do_not_depend_on_the_batch():
    # Small integers make the products exact, so that only the algorithm could differ.
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randint(-2, 3, (9, 8), generator=generator).float()
    weight_VD = torch.randint(-2, 3, (700, 8), generator=generator).float()
    gold_T, uniforms_Tm = torch.arange(9), uniforms(9, 4)

    def rows_of(part: slice) -> dict[str, Tensor]:
        return teacher_rows(
            hidden_TD[part], weight_VD, gold_T[part], top_k=7, uniforms_Tm=uniforms_Tm[part], vocab_size=650, block=128
        )

    together = rows_of(slice(0, 9))
    for name, value in rows_of(slice(0, 9)).items():
        assert torch.equal(value, together[name])
    for part in (slice(0, 1), slice(1, 6), slice(6, 9)):
        for name, value in rows_of(part).items():
            assert torch.equal(value, together[name][part]), name


def test_rows_do_not_depend_on_how_many_tokens_are_summed_at_a_time(monkeypatch: pytest.MonkeyPatch):
    hidden_TD, weight_VD, gold_T = make_teacher(7, 8, 500)
    asked = {"top_k": 9, "uniforms_Tm": uniforms(7, 4), "vocab_size": 490, "taus": (1.0, 2.0), "block": 128}
    together = teacher_rows(hidden_TD, weight_VD, gold_T % 490, **asked)
    monkeypatch.setattr(topk, "_tokens_at_a_time", lambda _: 3)
    for name, value in teacher_rows(hidden_TD, weight_VD, gold_T % 490, **asked).items():
        assert torch.equal(value, together[name]), name


def test_a_tail_without_mass_gives_the_lowest_free_id():
    weight_VD = torch.full((100, 1), -1.0)
    weight_VD[[0, 1, 50]] = 1.0
    rows = teacher_rows(
        torch.full((2, 1), 400.0), weight_VD, torch.tensor([0, 50]), top_k=3, uniforms_Tm=uniforms(2, 2), vocab_size=100
    )
    assert rows["tail_mass_T"].tolist() == [0.0, 0.0]
    assert rows["ids_TK"].tolist() == [[0, 1, 50]] * 2
    assert rows["tail_ids_Tm"].tolist() == [[2, 2]] * 2


def test_a_tiny_tail_mass_is_accurate():
    weight_VD = torch.zeros(200, 1)
    weight_VD[7] = 1.0
    rows = teacher_rows(
        torch.tensor([[40.0]]),
        weight_VD,
        torch.tensor([7]),
        top_k=2,
        uniforms_Tm=uniforms(1, 1),
        vocab_size=200,
        block=64,
    )
    assert rows["tail_mass_T"].item() == pytest.approx(198 * math.exp(-40), rel=1e-5)
    assert rows["entropy_T"].item() == pytest.approx(199 * 41 * math.exp(-40), rel=1e-2)


@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
def test_bf16_is_computed_in_fp32(head_dtype: torch.dtype):
    hidden_TD, weight_VD, gold_T = make_teacher(6, 32, 3000)
    hidden_TD, weight_VD = hidden_TD.bfloat16(), weight_VD.to(head_dtype)
    asked = {"top_k": 16, "uniforms_Tm": uniforms(6, 2), "vocab_size": 2900, "block": 512}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = teacher_rows(hidden_TD, weight_VD, gold_T % 2900, **asked)
    dense = Categorical(logits=hidden_TD.double() @ weight_VD[:2900].double().T)
    order_TV = dense.logits.argsort(dim=1, descending=True, stable=True)
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(rows["ids_TK"], order_TV[:, :16])
    torch.testing.assert_close(rows["logprobs_TK"], dense.logits.gather(1, rows["ids_TK"]), **close)
    torch.testing.assert_close(rows["entropy_T"], dense.entropy(), **close)
    torch.testing.assert_close(rows["tail_mass_T"], dense.probs.gather(1, order_TV[:, 16:]).sum(1), **close)
    again = teacher_rows(hidden_TD.double(), weight_VD.double(), gold_T % 2900, **asked)
    torch.testing.assert_close(rows["tail_ids_Tm"], again["tail_ids_Tm"])


def test_everything_kept_no_tail_and_no_tokens():
    hidden_TD, weight_VD, gold_T = make_teacher(3, 4, 40)
    rows = teacher_rows(hidden_TD, weight_VD, gold_T, top_k=40, uniforms_Tm=uniforms(3, 0), vocab_size=40)
    assert rows["tail_ids_Tm"].shape == (3, 0)
    assert rows["tail_mass_T"].tolist() == [0.0] * 3
    torch.testing.assert_close(rows["logprobs_TK"].exp().sum(1), torch.ones(3))
    none = teacher_rows(hidden_TD[:0], weight_VD, gold_T[:0], top_k=4, uniforms_Tm=uniforms(0, 2), vocab_size=40)
    assert none["ids_TK"].shape == (0, 4)
    assert none["tail_ids_Tm"].shape == (0, 2)


def test_requests_that_cannot_be_met():
    hidden_TD, weight_VD, gold_T = make_teacher(2, 4, 50)
    asked = {"top_k": 4, "uniforms_Tm": uniforms(2, 1), "vocab_size": 50}
    for wrong, error, message in [
        ({"top_k": 51}, SpecError, "`top_k` is 51, it must be from 1 to the 50 tokens"),
        ({"top_k": 0}, SpecError, "`top_k` is 0"),
        ({"top_k": 50}, SpecError, "keeps the whole vocabulary"),
        ({"vocab_size": 51}, ModelError, "`vocab_size` is 51, the head has 50 rows"),
        ({"taus": (1.0, 0.0)}, SpecError, "positive temperatures"),
        ({"uniforms_Tm": uniforms(3, 1)}, ModelError, "2 hidden states, but gold ids of shape"),
    ]:
        with pytest.raises(error, match=message):
            teacher_rows(hidden_TD, weight_VD, gold_T, **{**asked, **wrong})
    with pytest.raises(ModelError, match="shape"):
        teacher_rows(hidden_TD, weight_VD[:, :3], gold_T, **asked)


@pytest.mark.parametrize("gold", [-1, 47, 48, 63, 10**6])
def test_a_gold_id_outside_the_real_vocabulary_is_refused_with_its_place(gold: int):
    hidden_TD, weight_VD, gold_T = make_teacher(3, 4, 50)
    asked = {"top_k": 4, "uniforms_Tm": uniforms(3, 1), "vocab_size": 47, "block": 32}
    fine = teacher_rows(hidden_TD, weight_VD, gold_T % 47, **asked)
    bad = teacher_rows(hidden_TD, weight_VD, torch.tensor([0, 46, gold]), **asked)
    stack_layers([fine])
    with pytest.raises(ModelError, match="layer index 1, token 2: the gold id is outside the real vocabulary"):
        stack_layers([fine, bad])


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["hidden", "weight"])
def test_logits_that_are_not_finite_are_refused_with_their_place(value: float, place: str):
    hidden_TD, weight_VD, gold_T = make_teacher(3, 4, 300)
    asked = {"top_k": 2, "uniforms_Tm": uniforms(3, 1), "vocab_size": 300, "block": 128}
    fine = teacher_rows(hidden_TD, weight_VD, gold_T, **asked)
    (hidden_TD if place == "hidden" else weight_VD)[1, 0] = value
    bad = teacher_rows(hidden_TD, weight_VD, gold_T, **asked)
    token = 1 if place == "hidden" else 0
    with pytest.raises(ModelError, match=f"^layer index 1, token {token}: the logits are not finite"):
        stack_layers([fine, bad])
    with pytest.raises(ModelError, match=f"^1 of {token}"):
        stack_layers([fine, bad], place=lambda layer, at: f"{layer} of {at}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [1, 5, 64])
def test_no_value_is_read_on_the_host(kept: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """A tensor without values: whatever would wait for a GPU to learn one raises here."""
    monkeypatch.setattr(topk, "_is_on_host", lambda _: False)
    hidden_TD, weight_VD, gold_T = make_teacher(7, 8, 5000)
    uniforms_Tm = torch.from_numpy(uniforms(7, 3))
    asked = {"top_k": kept, "vocab_size": 4990, "block": 2048, "taus": (1.0, 2.0)}
    hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
    real = teacher_rows(hidden_TD, weight_VD, gold_T % 4990, uniforms_Tm=uniforms_Tm, **asked)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(one) for one in (hidden_TD, weight_VD, gold_T, uniforms_Tm)]
        with pytest.raises(DataDependentOutputException):
            fakes[2].min().item()  # what `int(gold.min())` would do: the mode notices
        with pytest.raises(DynamicOutputShapeException):
            fakes[2].nonzero()
        rows = teacher_rows(*fakes[:3], uniforms_Tm=fakes[3], **asked)
    assert {name: (one.shape, one.dtype) for name, one in rows.items()} == {
        name: (one.shape, one.dtype) for name, one in real.items()
    }


def test_signed_zeros_and_extremes_are_ordered_as_floats_are():
    special = [0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, math.inf, -math.inf, -1e30, 1.0, -1.0]
    logits_TV = torch.tensor([special * 30, (special * 30)[::-1], [-0.0, 0.0] * 165])
    for top_k in (1, 4, 100, 329):
        columns = _top_slots(torch.nn.functional.pad(logits_TV, (0, 22), value=-math.inf), top_k)
        order = np.argsort(-logits_TV.numpy(), axis=1, kind="stable")[:, :top_k]
        np.testing.assert_array_equal(columns.numpy(), np.sort(order, axis=1))


def test_nothing_of_the_vocabulary_s_size_is_allocated():
    hidden_TD, weight_VD, gold_T = make_teacher(64, 8, 8000)
    with LargestTensor() as sizes:
        teacher_rows(hidden_TD, weight_VD, gold_T, top_k=8, uniforms_Tm=uniforms(64, 4), vocab_size=8000, block=512)
    assert 64 * 512 <= sizes.largest <= max(2 * 64 * 512, weight_VD.numel())
    assert sizes.largest < 64 * 8000 / 4


def test_uniforms_are_keyed_by_seed_and_sample():
    first_LTm = sample_uniforms(7, "sample", 5, 3, 2)
    assert first_LTm.shape == (3, 5, 2)
    assert first_LTm.dtype == np.float64
    np.testing.assert_array_equal(sample_uniforms(7, "sample", 5, 3, 2), first_LTm)
    np.testing.assert_array_equal(sample_uniforms(7, "sample", 9, 3, 2)[:, :5], first_LTm)
    assert not np.isin(sample_uniforms(8, "sample", 5, 3, 2), first_LTm).any()
    assert not np.isin(sample_uniforms(7, "other", 5, 3, 2), first_LTm).any()
    # The value itself is pinned: it decides the bytes of every cache.
    assert sample_uniforms(0, "a", 1, 1, 1).item() == PINNED_UNIFORM


PINNED_UNIFORM = 0.026887376609951996


def test_stacked_layers_are_valid_rows():
    hidden_TD, weight_VD, gold_T = make_teacher(4, 8, 90)
    uniforms_LTm = sample_uniforms(0, "x", 4, 2, 3)
    layers = [
        teacher_rows(scale * hidden_TD, weight_VD, gold_T % 80, top_k=6, uniforms_Tm=uniforms_Tm, vocab_size=80)
        for scale, uniforms_Tm in zip((0.5, 1.0), uniforms_LTm, strict=True)
    ]
    rows = stack_layers(layers)
    rows.validate(80)
    assert (rows.num_layers, rows.num_tokens, rows.top_k, rows.num_tail) == (2, 4, 6, 3)


def test_compiled_sums_are_the_eager_ones():
    compiled, reason = pick_kernels("compiled" if shutil.which("gcc") else "auto", torch.device("cpu"))
    if not compiled:
        pytest.skip(f"no compiler: {reason}")
    for num_tokens in (6, 9):  # one compilation serves both
        hidden_TD, weight_VD, gold_T = make_teacher(num_tokens, 16, 900)
        asked = {
            "top_k": 7,
            "uniforms_Tm": uniforms(num_tokens, 3),
            "vocab_size": 870,
            "taus": (1.0, 2.0),
            "block": 256,
        }
        eager = teacher_rows(hidden_TD, weight_VD, gold_T % 870, **asked)
        for name, value in teacher_rows(hidden_TD, Head(weight_VD, compiled=True), gold_T % 870, **asked).items():
            torch.testing.assert_close(value, eager[name], rtol=1e-6, atol=2e-6, msg=name)


def test_which_kernels_and_why(monkeypatch: pytest.MonkeyPatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_kernels("auto", cpu) == (False, "no fused kernels needed on cpu")
    assert pick_kernels("eager", cuda) == (False, "asked for")
    monkeypatch.setattr(kernels, "_compiler_problem", lambda _: "")
    assert pick_kernels("auto", cuda) == (True, "CUDA found")
    assert pick_kernels("compiled", cpu) == (True, "asked for")
    monkeypatch.setattr(kernels, "_compiler_problem", lambda _: "no compiler")
    assert pick_kernels("auto", cuda) == (False, "torch.compile does not work here: no compiler")
    with pytest.raises(ModelError, match=r"`compiled` were asked for, and .* does not work here: no compiler"):
        pick_kernels("compiled", cpu)
