"""What only a GPU can show: 16-bit products with fp32 sums, compiled kernels, nothing that waits.

    pytest -m gpu tests/test_gpu.py

With VLSI_CACHE_TEST_DEVICE=cpu the same runs on a CPU, to see that it runs; rounding and waiting are not tested then.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import write_spec
from torch import Tensor
from torch.nn import functional as F

import vlsi_cache as vc
from tests.helpers.rows import layer_rows
from vlsi_cache.sparse.cross_entropy import linear_cross_entropy
from vlsi_cache.sparse.head import Head
from vlsi_cache.sparse.kl import LayerRows, candidate_kl
from vlsi_cache.sparse.topk import sample_uniforms, teacher_rows
from vlsi_cache.store.reader import Cache

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("VLSI_CACHE_TEST_DEVICE", "cuda"))
NUM_TOKENS, HIDDEN, VOCAB, VOCAB_SIZE, TOP_K = 256, 256, 20_032, 20_000, 32


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Raise where the host waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def states(scale: float = 3.0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden_TD = scale * torch.randn(NUM_TOKENS, HIDDEN, generator=draw)
    weight_VD = torch.randn(VOCAB, HIDDEN, generator=draw) / HIDDEN**0.5
    return hidden_TD.to(DEVICE, torch.bfloat16), weight_VD.to(DEVICE, torch.bfloat16)


def rows_of(hidden_TD: Tensor, weight_VD: Tensor, *, compiled: bool = False) -> dict[str, Tensor]:
    uniforms_Tm = torch.from_numpy(sample_uniforms(0, "x", NUM_TOKENS, 1, 4)[0]).to(DEVICE)
    gold_T = torch.arange(NUM_TOKENS, device=DEVICE)
    return teacher_rows(
        hidden_TD,
        Head(weight_VD, compiled=compiled),
        gold_T,
        top_k=TOP_K,
        uniforms_Tm=uniforms_Tm,
        vocab_size=VOCAB_SIZE,
        taus=(1.0, 2.0),
    )


def candidates(num: int) -> LayerRows:
    """Rows of a teacher whose states are the student's with noise."""
    hidden_TD, weight_VD = states()
    draw = torch.Generator().manual_seed(1)
    made = []
    for _ in range(num):
        noise_TD = torch.randn(NUM_TOKENS, HIDDEN, generator=draw).to(DEVICE, torch.bfloat16)
        made.append(rows_of(hidden_TD + noise_TD, weight_VD))
    stacked = {name: torch.stack([one[name] for one in made]).cpu() for name in made[0]}
    return layer_rows(
        stacked["ids_TK"], stacked["logprobs_TK"], stacked["tail_ids_Tm"], stacked["tail_mass_T"],
        stacked["entropy_T"], vocab_size=VOCAB_SIZE, device=DEVICE,
    )  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
def test_teacher_rows_are_those_of_float64_and_wait_for_nothing(compiled: bool) -> None:
    hidden_TD, weight_VD = states()
    rows_of(hidden_TD, weight_VD, compiled=compiled)  # compiles
    with nothing_waits():
        rows = rows_of(hidden_TD, weight_VD, compiled=compiled)
    log_TV = (hidden_TD.double() @ weight_VD[:VOCAB_SIZE].double().T).log_softmax(1)
    torch.testing.assert_close(rows["logprobs_TK"].double(), log_TV.gather(1, rows["ids_TK"]), rtol=1e-4, atol=1e-4)
    assert torch.allclose(rows["logprobs_TK"].double(), log_TV.topk(TOP_K).values, rtol=1e-4, atol=1e-4)
    kept_T = log_TV.gather(1, rows["ids_TK"]).exp().sum(1)
    torch.testing.assert_close(rows["tail_mass_T"].double(), 1 - kept_T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_has_float64_s_gradient_within_1e_3_and_waits_for_nothing(compiled: bool) -> None:
    hidden_TD, weight_VD = states()
    rows = candidates(6)

    def gradient(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        leaf_TD = hidden_TD.detach().requires_grad_()
        found = candidate_kl(leaf_TD, Head(weight_VD, compiled=compiled), rows, range(1, 5))
        loss = found.loss(found.matching_M.argmin())
        assert loss.grad_fn is not None
        exact_TD = loss.grad_fn.saved_tensors[0]  # before it is rounded to the dtype of the hidden states
        loss.backward()
        return loss.detach(), exact_TD

    gradient(hidden_TD, weight_VD)  # compiles
    with nothing_waits():
        value, found_TD = gradient(hidden_TD, weight_VD)
    wanted, wanted_TD = gradient(hidden_TD.double(), weight_VD.double())
    assert float(value) == pytest.approx(float(wanted), rel=1e-4)
    assert float((found_TD - wanted_TD).norm() / wanted_TD.norm()) < 1e-3


def test_cross_entropy_of_a_head_that_trains_in_fp32_under_autocast() -> None:
    hidden_TD, weight_VD = states()
    gold_T = torch.arange(NUM_TOKENS, device=DEVICE)
    leaf_TD, head_VD = hidden_TD.float().requires_grad_(), weight_VD.float().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(leaf_TD, Head(head_VD), gold_T)
    gradients = torch.autograd.grad(loss, (leaf_TD, head_VD))
    exact = leaf_TD.detach().double().requires_grad_(), head_VD.detach().double().requires_grad_()
    wanted = F.cross_entropy(exact[0] @ exact[1].T, gold_T)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    for found, right in zip(gradients, torch.autograd.grad(wanted, exact), strict=True):
        assert float((found - right).norm() / right.norm()) < 5e-3  # logit gradients are rounded to bf16


def test_a_build_and_a_student_of_it(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> None:
    def build(device: str) -> Cache:
        return vc.build_teacher(vc.load_spec(spec_file), out=tmp_path / device, device=device)

    spec_file = write_spec(tmp_path, teacher_folder)
    here, there = build("cpu"), build(str(DEVICE))
    for sample_id in here:
        mine, other = here[sample_id], there[sample_id]
        np.testing.assert_allclose(mine.entropy_LT, other.entropy_LT, atol=1e-3)
        np.testing.assert_allclose(mine.gold_logprob_LT, other.gold_logprob_LT, atol=1e-2)
    run = vc.distill(there, student=str(student_folder), out=tmp_path / "run", device=str(DEVICE))
    assert (run / "student").is_dir()
