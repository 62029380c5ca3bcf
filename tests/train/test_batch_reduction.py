"""The loss of a step is that of its whole batch, however it is cut, against transformers' own logits in float64.

Legend: T response tokens, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import make_rows, write_spec
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer

import vlsi_cache as vc
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.lora import train_decoder_layers
from vlsi_cache.models.verbalizer import logit_lens
from vlsi_cache.run_files import read_metrics
from vlsi_cache.runs.run_dir import Run
from vlsi_cache.store.reader import Cache
from vlsi_cache.teacher import verbalize as train_verbalizers_module
from vlsi_cache.train import distill, interact, sft, verbalize
from vlsi_cache.train.loader import loss_shares
from vlsi_cache.train.optim import Stage
from vlsi_cache.train.student import open_student

NUM_ROWS, SIZES = 8, (1, 4, 8)
# The same weights all the time, so that what every stage finds is the loss of what was loaded.
STILL = {"learning_rate": 1e-30, "final_learning_rate": 0.0}
REDUCTIONS = ["token", "sample"]

Gradients = list[list[Tensor]]


@dataclass(frozen=True)
class Setup:
    """A cache of all rows, some tokens of which have rows; nearly every word of them is kept, bit by bit."""

    cache: Cache
    teacher: Path
    student: Path
    spec_file: Path

    def responses(self, model: Any) -> list[tuple[Tensor, list[Tensor], Tensor]]:
        """Of each sample: response ids, log-probs [T, V] of layer 1 and on (the last one is the model's own), and the
        tokens that have rows."""
        tokenizer: Any = AutoTokenizer.from_pretrained(self.teacher)
        found = []
        for row in make_rows(NUM_ROWS):
            messages: Any = row["messages"]
            prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
            whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
            ids = tokenizer(whole, return_tensors="pt", add_special_tokens=False)["input_ids"]
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            output = model(ids, output_hidden_states=True)
            inner = [model.lm_head(model.model.norm(hidden)) for hidden in output.hidden_states[1:-1]]
            layers = [logits[0, start - 1 : -1] for logits in (*inner, output.logits)]
            with_rows_T = torch.from_numpy(self.cache[row["id"]].positions_T.astype("int64"))
            found.append((ids[0, start:], layers, with_rows_T))
        return found


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Setup:
    folder = tmp_path_factory.mktemp("reduction")
    file = write_spec(folder, teacher_folder, num_rows=NUM_ROWS)
    num_kept = len(AutoTokenizer.from_pretrained(teacher_folder)) - 1
    changes = [f"rows.top_k={num_kept}", "rows.taus=[1.0]", "rows.select_tokens.random=0.15", "store.profile=exact"]
    cache = vc.build_teacher(vc.load_spec(file, overrides=changes), out=folder / "cache")
    counts = cache.sample_table()["num_tokens"].to_pylist()
    assert min(counts) == 0 < max(counts) < max(len(cache[name].response_ids_R) for name in cache)
    return Setup(cache, teacher_folder, student_folder, file)


@dataclass(frozen=True)
class First:
    """What the steps of a stage have logged, and the gradients that they were made from, by step."""

    lines: list[dict[str, Any]]
    gradients: Gradients
    names: list[str]

    def gradient(self, name: str) -> Tensor:
        return self.gradients[0][self.names.index(name)]


def run_stage(setup: Setup, stage: str, folder: Path, size: int, changes: list[str], *, num_steps: int = 1) -> First:
    gradients: Gradients = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients.append([p.grad.clone() for p in parameters])

    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (verbalize, interact, sft):
            patch.setattr(module, "clip_gradients", keep)
        if stage == "teacher":
            section = [f"{key}={value}" for key, value in {"steps": num_steps, **STILL}.items()]
            overrides = [f"train_verbalizers.schedule.{one}" for one in section]
            overrides += [f"train_verbalizers.{one}" for one in sizes(size)]
            spec = vc.load_spec(setup.spec_file, overrides=[*overrides, *changes])
            patch.setattr(train_verbalizers_module, "write_report", lambda *_, **__: None)  # no report
            vc.train_verbalizers(spec, out=folder)
        else:
            names = run_student_stage(setup, stage, folder, size, changes, num_steps)
    return First(read_metrics(folder / "metrics.jsonl"), gradients, names)


def sizes(size: int) -> list[str]:
    return [f"micro_batch_size={size}", f"batch_size={NUM_ROWS}"]


def run_student_stage(
    setup: Setup, stage: str, folder: Path, size: int, changes: list[str], num_steps: int
) -> list[str]:
    """Names of what has a gradient."""
    schedules = ("verbalize", "interact.schedule", "sft.schedule")
    overrides = [f"distill.{name}.{key}={value}" for name in schedules for key, value in STILL.items()]
    overrides += [f"distill.{one}" for one in (*sizes(size), "interact.mode=layers", "sft.mode=full", "lora.rank=64",
                                               "lora.alpha=64")]  # fmt: skip
    spec = distill.distill_spec(setup.cache, student=str(setup.student), overrides=[*overrides, *changes])
    folder.mkdir()
    state = open_student(setup.cache, spec, str(setup.student)).load(Run(folder, {}), device="cpu")
    model, backbone = state.model, Backbone(state.model)
    if stage == "verbalize":
        verbalize.verbalize(
            backbone,
            state.layers,
            partial(state.feed, "verbalize"),
            Stage(spec.distill, spec.distill.verbalize, num_steps, state.checkpoints, state.log, compiled=False),
            architecture=spec.verbalizer,
            vocab_size=state.encoder.vocab_size,
        )
    elif stage == "interact":
        train_decoder_layers(model)
        interact.interact(state, model, logit_lens(backbone, state.layers), num_steps=num_steps)
    else:
        sft.sft(state, model, num_steps=num_steps, stop=num_steps)
    state.log.close()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def check_same(found: dict[int, First]) -> None:
    """However the batch is cut, one loss and one gradient."""
    whole = found[NUM_ROWS]
    for size, one in found.items():
        assert [line["loss"] for line in one.lines] == pytest.approx([line["loss"] for line in whole.lines], rel=1e-6)
        for line, expected in zip(one.lines, whole.lines, strict=True):
            assert line.get("layers", {}) == pytest.approx(expected.get("layers", {}), rel=1e-6)
        for gradients, wanted in zip(one.gradients, whole.gradients, strict=True):
            assert gradients, size
            largest = max(float(gradient.abs().max()) for gradient in wanted)
            assert largest > 0
            for gradient, expected in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6 * max(1.0, largest))


def reduced(values: list[Tensor], reduction: str) -> Tensor:
    """Of the values of each sample's tokens; samples without tokens do not count."""
    if reduction == "token":
        return torch.cat(values).mean()
    return torch.stack([value_T.mean() for value_T in values if len(value_T)]).mean()


def load_double(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@pytest.mark.parametrize(
    ("stage", "reduction", "loss"),
    [
        ("teacher", "token", "ce"),
        ("teacher", "sample", "kl_to_final"),
        ("verbalize", "token", "kl_to_final"),
        ("verbalize", "sample", "ce"),
    ],
)
def test_verbalizers_learn_from_the_whole_batch(
    stage: str, reduction: str, loss: str, setup: Setup, tmp_path: Path
) -> None:
    section = "train_verbalizers" if stage == "teacher" else "distill"
    changes = [f"{section}.batch_reduction={reduction}", f"verbalizer.loss={loss}"]
    found = {size: run_stage(setup, stage, tmp_path / f"{size}", size, changes) for size in SIZES}
    check_same(found)
    vocab_size = setup.cache.header.vocab_size
    with torch.no_grad():
        responses = setup.responses(load_double(setup.teacher if stage == "teacher" else setup.student))
    nll, trained = {}, 0.0
    for layer in [1, 2, 3, 4] if stage == "teacher" else [1, 2]:
        logprobs = [layers[layer - 1][:, :vocab_size].log_softmax(1) for _, layers, _ in responses]
        golds = [ids for ids, _, _ in responses]
        losses = [-logp_TV.gather(1, ids[:, None])[:, 0] for logp_TV, ids in zip(logprobs, golds, strict=True)]
        nll[str(layer)] = float(reduced(losses, reduction))
        if loss == "kl_to_final":
            own = [Categorical(logits=layers[-1][:, :vocab_size]) for _, layers, _ in responses]
            losses = [kl_divergence(p, Categorical(logits=q)) for p, q in zip(own, logprobs, strict=True)]
        trained += float(reduced(losses, reduction))
    for one in found.values():
        assert one.lines[0]["layers"] == pytest.approx(nll, rel=1e-5)
        assert one.lines[0]["loss"] == pytest.approx(trained, rel=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_layers_learn_from_the_whole_batch(reduction: str, setup: Setup, tmp_path: Path) -> None:
    changes = [f"distill.batch_reduction={reduction}", "distill.interact.matching=uniform"]
    found = {size: run_stage(setup, "interact", tmp_path / f"{size}", size, changes) for size in SIZES}
    check_same(found)
    vocab_size, model = setup.cache.header.vocab_size, load_double(setup.student)
    with torch.no_grad():
        teacher = setup.responses(load_double(setup.teacher))
    values: dict[tuple[int, int], list[Tensor]] = {(1, 1): [], (2, 3): [], (3, 5): []}  # student and teacher layer
    for (_, students, with_rows_T), (_, teachers, _) in zip(setup.responses(model), teacher, strict=True):
        for (layer, target), losses in values.items():
            logits = (x[with_rows_T, :vocab_size] for x in (teachers[target - 1], students[layer - 1]))
            p, q = (Categorical(logits=x, validate_args=False) for x in logits)  # there may be no token
            losses.append(kl_divergence(p, q))
    first, second, last = (reduced(losses, reduction) for losses in values.values())
    (first + second + last).backward()
    first, second, last = (float(term.detach()) for term in (first, second, last))
    for size, one in found.items():
        (line,) = one.lines
        assert {tuple(match) for match in line["matched_layers"] if match} == {(1, 3)}
        assert line["layers"] == pytest.approx({"1": first, "2": second}, rel=1e-4), size
        assert line["kl_last"] == pytest.approx(last, rel=1e-4)
        assert line["loss"] == pytest.approx(first + second + last, rel=1e-4)
    for name in found[NUM_ROWS].names:
        torch.testing.assert_close(
            found[NUM_ROWS].gradient(name).double(), model.get_parameter(name).grad, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_labels_are_learned_from_the_whole_batch(reduction: str, setup: Setup, tmp_path: Path) -> None:
    changes = [f"distill.batch_reduction={reduction}"]
    found = {size: run_stage(setup, "sft", tmp_path / f"{size}", size, changes) for size in SIZES}
    check_same(found)
    model = load_double(setup.student)
    losses = [-layers[-1].log_softmax(1).gather(1, ids[:, None])[:, 0] for ids, layers, _ in setup.responses(model)]
    expected = reduced(losses, reduction)
    expected.backward()
    expected = float(expected.detach())
    for one in found.values():
        assert one.lines[0]["loss"] == pytest.approx(expected, rel=1e-5)
    for name in found[NUM_ROWS].names:
        torch.testing.assert_close(
            found[NUM_ROWS].gradient(name).double(), model.get_parameter(name).grad, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    ("reduction", "changes"),
    [
        ("sample", {"matching": "uniform", "alpha_ce": 0.3, "layer_reduction": "mean"}),
        ("token", {"matching": "uniform_stretch", "intermediate": "jsd", "layers_full_until": 0.0}),
        ("sample", {"matching": "bottom_k", "bottom_k": 4, "last": "reverse_kl"}),
        ("token", {"intermediate": "ce", "last": "ce", "lambda_last": 0.5}),
    ],
    ids=str,
)
def test_no_setting_makes_the_loss_depend_on_micro_batches(
    reduction: str, changes: dict[str, Any], setup: Setup, tmp_path: Path
) -> None:
    """The second step has half the weight of the layers where they fade out; every cut matches the same layers."""
    overrides = [f"distill.interact.{key}={value}" for key, value in changes.items()]
    overrides.append(f"distill.batch_reduction={reduction}")
    found = {size: run_stage(setup, "interact", tmp_path / f"{size}", size, overrides, num_steps=2) for size in SIZES}
    check_same(found)


def test_shares_are_those_of_the_whole_batch() -> None:
    in_batch = [2, 0, 3, 1]
    for reduction, expected in (("token", [1 / 6] * 6), ("sample", [1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9, 1 / 3])):
        kind: Any = reduction
        assert loss_shares(in_batch, in_batch, kind).tolist() == pytest.approx(expected)
        cut = torch.cat([loss_shares(in_batch[:2], in_batch, kind), loss_shares(in_batch[2:], in_batch, kind)])
        assert cut.tolist() == pytest.approx(expected)
    assert loss_shares([0, 0], [0, 0], "token").tolist() == loss_shares([0], [0], "sample").tolist() == []
