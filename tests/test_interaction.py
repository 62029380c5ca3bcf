"""One micro-batch of the interaction step against Algorithm 1 over dense divergences; memory, synchronisation, errors.

Legend: T response tokens, L teacher layers, V vocabulary, D hidden size.
"""

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributions import Categorical, kl_divergence

from vlsi_cache.errors import ModelError
from vlsi_cache.models.layers import Backbone
from vlsi_cache.models.load import load_model
from vlsi_cache.models.verbalizer import build_verbalizers, logit_lens
from vlsi_cache.sparse import kl
from vlsi_cache.sparse.drawing import Matcher
from vlsi_cache.sparse.kl import LayerRows
from vlsi_cache.sparse.matching import match_layers, match_rng
from vlsi_cache.spec import InteractSpec, Schedule
from vlsi_cache.stages import interaction as module
from vlsi_cache.stages.interaction import LOWEST, MATCH, VALUE, Interaction, interaction, read_terms

NUM_TOKENS, VOCABULARY, NUM_TEACHER = 7, 50, 4
SETTINGS = InteractSpec(schedule=Schedule(steps=1), lambda_last=0.5)


@dataclass
class Case:
    backbone: Backbone
    logprobs_LTV: Tensor
    rows: LayerRows
    hidden: dict[int, Tensor]


@pytest.fixture
def case(student_folder: Path) -> Case:
    """Every token of the vocabulary kept, for a student of three layers."""
    backbone = Backbone(load_model(str(student_folder)))
    backbone.model.requires_grad_(False)
    torch.manual_seed(0)
    logprobs_LTV = torch.log_softmax(torch.randn(NUM_TEACHER + 1, NUM_TOKENS, VOCABULARY) * 2, -1)
    ordered, ids = logprobs_LTV.sort(-1, descending=True)
    zeros_LT = torch.zeros(NUM_TEACHER + 1, NUM_TOKENS)
    entropy_LT = Categorical(logits=logprobs_LTV).entropy()
    rows = LayerRows.of(ids, ordered, ids[..., :0], zeros_LT, entropy_LT, v_real=VOCABULARY)
    hidden = {k: torch.randn(NUM_TOKENS, backbone.hidden_size, requires_grad=True) for k in (1, 2, 3)}
    return Case(backbone, logprobs_LTV, rows, hidden)


def run(case: Case, verbalizers: Any, **options: Any) -> np.ndarray:
    given: Any = {"settings": SETTINGS, "rng": match_rng(3, 0, 0), **options}
    return interaction(case.hidden, case.backbone, verbalizers, case.rows, **given).numpy()


def test_terms_and_gradients_are_those_of_algorithm_1_over_dense_divergences(case: Case) -> None:
    backbone = case.backbone

    def dense(state_TD: Tensor) -> list[Tensor]:
        student = Categorical(logits=state_TD @ backbone.head_weight[:VOCABULARY].T)
        return [kl_divergence(Categorical(logits=one), student).mean() for one in case.logprobs_LTV]

    verbalizers = logit_lens(backbone, [1, 2])
    states = [backbone.final_norm(case.hidden[1]), backbone.final_norm(case.hidden[2]), case.hidden[3]]
    table = [dense(state) for state in states]
    kld = np.array([[float(v.detach()) for v in row[:NUM_TEACHER]] for row in table[:2]])
    matched = match_layers(kld, rng=match_rng(3, 0, 0))
    expected = [table[2][NUM_TEACHER], table[0][matched[0]], table[1][matched[1]]]
    loss = 0.5 * expected[0] + expected[1] + expected[2]
    wanted = torch.autograd.grad(0.25 * loss, list(case.hidden.values()))

    terms = run(case, verbalizers, scale=0.25)
    np.testing.assert_allclose(terms[:, VALUE], [float(x.detach()) for x in expected], rtol=1e-4)
    assert terms[:, MATCH].astype(int).tolist() == [NUM_TEACHER, *matched]
    assert (terms[:, LOWEST] <= terms[:, VALUE]).all()
    for hidden_TD, wanted_TD in zip(case.hidden.values(), wanted, strict=True):
        torch.testing.assert_close(hidden_TD.grad, wanted_TD, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", ["normalized", "printed"])
def test_drawn_layers_are_those_of_the_reference(temperature: Any) -> None:
    generator = np.random.default_rng(0)
    for trial in range(200):
        num_student = int(generator.integers(1, 6))
        num_teacher = num_student + int(generator.integers(0, 12))
        kld = generator.gamma(1.0, 2.0, (num_student, num_teacher))
        if trial % 3 == 0:
            kld[:] = kld[0, 0]  # all equal
        matcher = Matcher(num_student, num_teacher, rng=match_rng(trial, 0, 0), temperature=temperature)
        for row in kld:
            window = matcher.window()
            matcher.choose(torch.from_numpy(row[window.start : window.stop]))
        expected = match_layers(kld, rng=match_rng(trial, 0, 0), temperature=temperature)
        assert [int(match) for match in matcher.matched] == expected


def test_one_layer_s_state_is_alive_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[weakref.ref] = []

    def candidate_kl(*args: Any, **options: Any) -> Any:
        assert not [state for state in states if state() is not None]
        found = kl.candidate_kl(*args, **options)
        states.append(weakref.ref(found))
        return found

    monkeypatch.setattr(module, "candidate_kl", candidate_kl)
    run(case, build_verbalizers(case.backbone, [1, 2]).requires_grad_(False))
    assert len(states) == 3


def test_nothing_is_read_back_from_the_device(case: Case) -> None:
    # Fake tensors have no values: whatever would wait for one raises.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        case.hidden = {k: mode.from_tensor(x.detach()).requires_grad_() for k, x in case.hidden.items()}
        verbalizers = logit_lens(case.backbone, [1, 2])
        terms = interaction(
            case.hidden, case.backbone, verbalizers, case.rows, settings=SETTINGS, rng=match_rng(0, 0, 0)
        )
        with pytest.raises(DataDependentOutputException):
            terms[0, 0].item()
    assert all(hidden.grad is not None for hidden in case.hidden.values())


def test_a_head_that_trains_is_refused(case: Case) -> None:
    case.backbone.head_weight.requires_grad_()
    with pytest.raises(ModelError, match=r"the head trains: .* must be frozen"):
        run(case, None)


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan nats"), (None, r"-0\.3\d* nats")])
def test_an_impossible_divergence_names_sample_and_layers(case: Case, value: float | None, shown: str) -> None:
    case.hidden = {k: x.detach() for k, x in case.hidden.items()}
    if value is not None:
        case.hidden[2][4] = value
        verbalizers, where = logit_lens(case.backbone, [1, 2]), "target layer 2 of 2 from teacher layer [68]"
    else:
        # A row that says: one entry of probability 0.6, and nothing else.
        state_TD = 1e3 * case.backbone.head_weight[case.rows.ids_LTX[-1, :, 0]]
        case.hidden[3], case.rows.tail_mass_LT[-1] = state_TD.detach(), 0.0
        case.rows.logprobs_LTK[-1, 4:, 0], case.rows.logprobs_LTK[-1, 4:, 1:] = -0.51, -torch.inf
        verbalizers, where = None, "last layer from teacher layer 9"
    terms = interaction(case.hidden, case.backbone, verbalizers, case.rows, settings=SETTINGS, rng=match_rng(3, 0, 0))
    micro = [Interaction(None, ["x"], [0]), Interaction(terms, ["a", "b", "c"], [3, 1, 3])]
    with pytest.raises(ModelError, match=f"sample `c`: the divergence of the student's {where} is {shown}"):
        read_terms(micro, SETTINGS, [2, 4, 6, 8, 9])


def test_micro_batches_without_rows_are_left_out() -> None:
    empty = Interaction(None, ["a"], [0])
    assert read_terms([empty, empty], SETTINGS, []).shape == (0, 1, 4)
    full = Interaction(torch.ones(3, 4, dtype=torch.float64), ["b"], [2])
    assert read_terms([empty, full], SETTINGS, [1, 2]).shape == (1, 3, 4)
