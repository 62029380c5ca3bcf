"""Shares of decoder layers and rows of the head: what a process holds, gradients, norm and a step against the whole
model, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import tiny_inputs, tiny_model
from helpers.launch import run_together

from vlsi_cache.config.sections import RunSpec
from vlsi_cache.config.training import Schedule
from vlsi_cache.errors import CacheCorruptError, ModelError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.lora import add_lora, checkpoint_activations, train_everything, train_head_and_embeddings
from vlsi_cache.processes import ALONE, Processes, joined
from vlsi_cache.runs.shards import read_shards, shapes_in, write_shards
from vlsi_cache.shares import is_sharded, local, whole_and_rows
from vlsi_cache.train.optim import make_optimizer, optimizer_step
from vlsi_cache.train.sharding import clip_to_norm, shard, shards_layers

CPU = torch.device("cpu")
SCHEDULE = Schedule(steps=2, learning_rate=1e-3, final_learning_rate=1e-3)


def whole(family: str) -> Any:
    """All weights train, or a fresh adapter with checkpointed activations, beside head and embeddings."""
    if family == "llama":
        return train_everything(tiny_model(family, tie_word_embeddings=True).requires_grad_(False)).train()
    model = add_lora(tiny_model(family).requires_grad_(False), rank=4, alpha=4, dropout=0.0)
    train_head_and_embeddings(model)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:  # else adapters begin with gradients of 0 for the other factor
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    checkpoint_activations(model)
    return model.train()


def passes(backbone: Backbone, family: str, rank: int) -> None:
    """Forward, then backward from two layers and the head, as a stage does it; each process has other tokens."""
    rows_T, positions_T = torch.tensor([rank, rank]), torch.tensor([1, 2 + rank])
    hidden = backbone.capture(tiny_inputs(family), [1, 3], rows_T, positions_T)
    leaves = [state.detach().requires_grad_() for state in hidden.values()]
    for leaf in leaves:
        (leaf @ backbone.head_weight.T).log_softmax(-1)[:, 7].sum().backward()
    torch.autograd.backward(list(hidden.values()), [leaf.grad for leaf in leaves])


def compared(family: str, processes: Processes) -> dict[str, float]:
    """Differences of gradients, norm and stepped weights from the whole model's over the tokens of all processes."""
    reference, model = whole(family), whole(family)
    for rank in range(processes.world):
        passes(Backbone(reference), family, rank)
    backbone = Backbone(model)
    before = sum(one.nbytes for one in backbone.layers.parameters())
    shard(backbone, CPU)
    here = sum(local(one).nbytes for one in backbone.layers.parameters())
    optimizer, plain = (make_optimizer(one.parameters(), SCHEDULE) for one in (model, reference))
    passes(backbone, family, processes.rank)
    processes.sum_gradients(optimizer)
    rows = {id(weight): own for weight, own in whole_and_rows(optimizer)}
    stepped = [rows.get(id(one), one) for one in model.parameters()]
    norm, wanted = clip_to_norm(stepped, 0.5), torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    worst = 0.0
    for one, other in zip(stepped, reference.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            found = gathered(one.grad)
            worst = max(worst, float((found - other.grad).abs().max() / other.grad.abs().max()))
    gradients = sum(one.grad.nbytes for one in model.parameters() if id(one) in rows and one.grad is not None)
    start = flat(reference)
    for each in (optimizer, plain):
        optimizer_step(each, SCHEDULE, 0, 2)
    moved = (flat(model) - flat(reference)).norm() / (flat(reference) - start).norm()
    moments = sum(local(optimizer.state[own]["exp_avg"]).nbytes for own in rows.values())
    head = moments / sum(one.nbytes for one in model.parameters() if id(one) in rows)
    return {
        "share": here / before,
        "norm": float(norm / wanted),
        "worst": worst,
        "moved": float(moved),
        "head": head,
        "gradients": gradients,
        "weights": len(rows),
    }


def gathered(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def flat(model: Any) -> torch.Tensor:
    return torch.cat([gathered(one).detach().flatten() for one in model.parameters()])


def test_gradients_of_shares_and_a_step_are_those_of_the_whole_model() -> None:
    def work(_: int) -> list[dict[str, float]]:
        with joined() as processes:
            return [compared(family, processes) for family in ("llama", "qwen2_vl")]

    for found in run_together(2, work):
        for one in found:
            assert 0.45 <= one["share"] <= 0.55
            assert one["norm"] == pytest.approx(1, abs=1e-5)
            assert one["worst"] < 1e-4
            assert one["moved"] < 1e-2  # Adam makes much of gradients that are nearly 0
            assert 0.45 <= one["head"] <= 0.55
            assert one["gradients"] == 0
        assert [one["weights"] for one in found] == [1, 2]  # tied, and not


def test_what_cannot_be_sharded_is_refused() -> None:
    backbone = Backbone(tiny_model("llama"))
    backbone.rope_limit = 8
    with pytest.raises(ModelError, match="a batch can take one pass or two"):
        shard(backbone, CPU)
    model = tiny_model("llama")
    layers = Backbone(model).layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(ModelError, match=r"have the weight `model.layers.0.mlp.gate_proj.weight` in common"):
        shard(Backbone(model), CPU)
    layers[1].mlp = torch.nn.Linear(2, 2).requires_grad_(False).to(torch.float32)
    weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    layers[1].mlp.weight = weight
    with pytest.raises(ModelError, match=r"decoder layers are quantised \(`1.mlp.weight`\)"):
        shard(Backbone(model), CPU)


def test_shares_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"parameter/a": torch.arange(3.0)})
    assert shapes_in(tmp_path) == {"parameter/a": torch.Size([3])}
    found = {"parameter/a": torch.zeros(3)}
    read_shards(tmp_path, found)
    assert found["parameter/a"].tolist() == [0, 1, 2]
    with pytest.raises(CacheCorruptError, match=r"does not fit this model \(.*\); start a new run"):
        read_shards(tmp_path, {"parameter/a": torch.zeros(4)})


def test_one_process_holds_everything_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert not shards_layers(RunSpec(parallel="fsdp"), ALONE)
    assert "there is one process, which holds everything; start several with torchrun" in capsys.readouterr().err
    assert not shards_layers(RunSpec(), Processes(0, 2))
    assert capsys.readouterr().err == ""
    assert shards_layers(RunSpec(parallel="fsdp"), Processes(1, 2))
