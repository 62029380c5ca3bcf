"""One micro-batch of the interaction step against Algorithm 1 over dense divergences; memory, synchronisation, errors.

Legend: T response tokens, L teacher layers, V vocabulary, D hidden size.
"""

import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.draws import even_generators
from oracles import literal_algorithm_1
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributions import Categorical, kl_divergence

from tests.helpers.rows import layer_rows
from vlsi_cache.config.training import InteractSpec, Schedule
from vlsi_cache.errors import ModelError
from vlsi_cache.models.backbone import Backbone, head_of
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.verbalizer import Verbalizers, build_verbalizers, logit_lens
from vlsi_cache.sparse import kl
from vlsi_cache.sparse.matching import Matching, SearchRange, match_rng
from vlsi_cache.train import interact as module
from vlsi_cache.train.interact import Targets, Term, losses_of, matches_of, micro_batch

NUM_TOKENS, VOCABULARY, NUM_TEACHER = 7, 50, 4
SETTINGS = InteractSpec(schedule=Schedule(steps=1), lambda_last=0.5)


@dataclass
class Case:
    backbone: Backbone
    logprobs_LTV: Tensor
    targets: Targets
    hidden: dict[int, Tensor]
    verbalizers: Verbalizers


@pytest.fixture
def case(student_folder: Path) -> Case:
    """Every token of the vocabulary kept, for a student of three layers."""
    backbone = Backbone(ModelRef(str(student_folder)).load())
    backbone.model.requires_grad_(False)
    torch.manual_seed(0)
    logprobs_LTV = torch.log_softmax(torch.randn(NUM_TEACHER + 1, NUM_TOKENS, VOCABULARY) * 2, -1)
    ordered, ids = logprobs_LTV.sort(-1, descending=True)
    zeros_LT = torch.zeros(NUM_TEACHER + 1, NUM_TOKENS)
    entropy_LT = Categorical(logits=logprobs_LTV).entropy()
    layers = layer_rows(ids, ordered, ids[..., :0], zeros_LT, entropy_LT, vocab_size=VOCABULARY)
    gold_T = torch.randint(VOCABULARY, (NUM_TOKENS,))
    targets = Targets(layers, gold_T, torch.full((NUM_TOKENS,), 1 / NUM_TOKENS))
    hidden = {k: torch.randn(NUM_TOKENS, backbone.hidden_size, requires_grad=True) for k in (1, 2, 3)}
    return Case(backbone, logprobs_LTV, targets, hidden, logit_lens(backbone, [1, 2]))


def run(case: Case, changes: dict[str, Any] | None = None, **options: Any) -> list[Term]:
    settings = InteractSpec(schedule=Schedule(steps=1), **{"lambda_last": 0.5, **(changes or {})})
    verbalizers = options.pop("verbalizers", case.verbalizers)
    rng = match_rng(3, 0, 0)
    return micro_batch(
        case.hidden, case.targets, head_of(case.backbone).real(VOCABULARY), verbalizers, settings, rng, **options
    )


def result(terms: list[Term], sample_ids: list[str], num_tokens: list[int]) -> Any:
    """The terms of a micro-batch of these samples."""
    micro = SimpleNamespace(sample_ids=sample_ids, batch=SimpleNamespace(num_tokens=num_tokens))
    return micro, terms


def dense_table(case: Case) -> list[list[Tensor]]:
    """The divergences of the student's targets and of its last layer from every teacher layer, for every token."""
    backbone = case.backbone
    states = [backbone.final_norm(case.hidden[1]), backbone.final_norm(case.hidden[2]), case.hidden[3]]
    students = [Categorical(logits=state_TD @ backbone.head_weight[:VOCABULARY].T) for state_TD in states]
    return [[kl_divergence(Categorical(logits=one), student) for one in case.logprobs_LTV] for student in students]


def check(case: Case, loss: Tensor) -> None:
    """The gradients that were left are those of this loss."""
    wanted = torch.autograd.grad(loss, list(case.hidden.values()), allow_unused=True)
    for hidden_TD, wanted_TD in zip(case.hidden.values(), wanted, strict=True):
        if wanted_TD is None:
            assert hidden_TD.grad is None
        else:
            torch.testing.assert_close(hidden_TD.grad, wanted_TD, rtol=1e-4, atol=1e-6)


def test_terms_and_gradients_are_those_of_algorithm_1_over_dense_divergences(case: Case) -> None:
    table = dense_table(case)
    kld = np.array([[float(v.detach().mean()) for v in row[:NUM_TEACHER]] for row in table[:2]])
    matched = literal_algorithm_1(kld, match_rng(3, 0, 0).random(2).tolist())
    expected = [table[2][NUM_TEACHER].mean(), *(table[s][matched[s]].mean() for s in range(2))]
    terms = run(case)
    assert [term.layer for term in terms] == [3, 1, 2]
    np.testing.assert_allclose([float(term.loss) for term in terms], [float(x.detach()) for x in expected], rtol=1e-4)
    assert [term.target_n.tolist() for term in terms if term.target_n is not None] == [
        [x] for x in [NUM_TEACHER, *matched]
    ]
    assert matches_of(terms, [1, 2], [2, 4, 6, 8, 9]) == [[[2, 4, 6, 8][x] for x in matched]]
    check(case, 0.5 * expected[0] + expected[1] + expected[2])


def test_operations_are_what_they_are_called(case: Case) -> None:
    table, gold_T = dense_table(case), case.targets.gold_T
    head_VD = case.backbone.head_weight[:VOCABULARY]
    states = [case.backbone.final_norm(case.hidden[1]), case.backbone.final_norm(case.hidden[2]), case.hidden[3]]
    ce = [torch.nn.functional.cross_entropy(state_TD @ head_VD.T, gold_T) for state_TD in states]
    last = table[2][NUM_TEACHER].mean()
    matched = [int(term.target_n) for term in run(case)[1:] if term.target_n is not None]
    layers = [table[s][matched[s]].mean() for s in range(2)]
    for changes, options, expected in (
        ({"intermediate": "none"}, {}, 0.5 * last),
        ({"last": "none"}, {}, layers[0] + layers[1]),
        ({"lambda_last": 0.0}, {}, layers[0] + layers[1]),
        ({"intermediate": "ce"}, {}, 0.5 * last + ce[0] + ce[1]),
        ({"last": "ce"}, {}, 0.5 * ce[2] + layers[0] + layers[1]),
        ({"alpha_ce": 0.25}, {}, 0.5 * (0.75 * last + 0.25 * ce[2]) + layers[0] + layers[1]),
        ({"layer_reduction": "mean"}, {}, 0.5 * last + (layers[0] + layers[1]) / 2),
        ({}, {"layer_weight": 0.5}, 0.5 * last + (layers[0] + layers[1]) / 2),
        ({}, {"layer_weight": 0.0}, 0.5 * last),
        ({}, {"verbalizers": None}, 0.5 * last),
    ):
        for hidden_TD in case.hidden.values():
            hidden_TD.grad = None
        terms = run(case, changes, **options)
        assert case.hidden[1].grad is not None or 1 not in [term.layer for term in terms]
        grads = torch.autograd.grad(expected, list(case.hidden.values()), allow_unused=True, retain_graph=True)
        for hidden_TD, wanted_TD in zip(case.hidden.values(), grads, strict=True):
            found_TD = torch.zeros_like(hidden_TD) if hidden_TD.grad is None else hidden_TD.grad
            wanted_TD = torch.zeros_like(hidden_TD) if wanted_TD is None else wanted_TD
            torch.testing.assert_close(found_TD, wanted_TD, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["random", "uniform", "uniform_stretch", "bottom_k", "multinomial", "range", "order"])
def test_matching_modes_draw_as_described(mode: Any) -> None:
    num_student, num_teacher, num_draws = 3, 7, 512
    kld = np.random.default_rng(0).gamma(1.0, 1.0, (num_student, num_teacher))
    bottom = 3 if mode == "bottom_k" else 1
    matching, drawn_US = Matching(mode, bottom_k=bottom), []
    for rng in even_generators(num_draws, num_student):
        search = SearchRange(num_student, num_teacher, rng=rng, matching=matching)
        drawn_US.append([search.draw(torch.from_numpy(row[search.range.start : search.range.stop]))[0] for row in kld])
    drawn_SnU = torch.stack([torch.stack(drawn_S) for drawn_S in drawn_US], 2).numpy()
    if mode in ("uniform", "uniform_stretch"):
        assert (drawn_SnU[:, 0] == {"uniform": [[0], [2], [4]], "uniform_stretch": [[0], [3], [6]]}[mode]).all()
        return
    if mode == "bottom_k":
        assert (np.sort(drawn_SnU[..., 0], 1) == np.sort(np.argsort(kld, 1)[:, :3], 1)).all()
        return
    if mode == "order":
        assert (np.diff(drawn_SnU[:, 0], axis=0) > 0).all()
    for s in range(num_student):
        allowed = np.arange(num_teacher) <= (
            num_teacher - num_student + s if mode in ("range", "order") else num_teacher
        )
        weights = allowed * (1.0 if mode == "random" else np.exp(-kld[s]))
        if mode == "order" and s:
            continue  # depends on the match before: the first target's window is that of `range`
        found = np.bincount(drawn_SnU[s, 0], minlength=num_teacher) / num_draws
        np.testing.assert_allclose(found, weights / weights.sum(), atol=0.02)


def test_one_layer_s_state_is_alive_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[weakref.ref] = []

    def candidate_kl(*args: Any, **options: Any) -> Any:
        assert not [state for state in states if state() is not None]
        found = kl.candidate_kl(*args, **options)
        states.append(weakref.ref(found))
        return found

    monkeypatch.setattr(module, "candidate_kl", candidate_kl)
    run(case, verbalizers=build_verbalizers(case.backbone, [1, 2]).requires_grad_(False))
    assert len(states) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alpha_ce": 0.5, "intermediate": "jsd"},
        {"matching": "bottom_k", "bottom_k": 2},
    ],
    ids=str,
)
def test_nothing_is_read_back_from_the_device(case: Case, changes: dict[str, Any]) -> None:
    # Fake tensors have no values: whatever would wait for one raises.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        case.hidden = {k: mode.from_tensor(x.detach()).requires_grad_() for k, x in case.hidden.items()}
        terms = run(case, changes)
        with pytest.raises(DataDependentOutputException):
            terms[0].loss.item()
    assert all(hidden.grad is not None for hidden in case.hidden.values())


def test_a_head_that_trains_is_refused(case: Case) -> None:
    case.backbone.head_weight.requires_grad_()
    with pytest.raises(ModelError, match=r"the head trains: .* must be frozen"):
        run(case)


@pytest.mark.parametrize(
    ("value", "shown"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (None, r"-0\.3\d* nats")]
)
def test_an_impossible_divergence_names_sample_and_layers(case: Case, value: float | None, shown: str) -> None:
    case.hidden = {k: x.detach() for k, x in case.hidden.items()}
    options: dict[str, Any] = {}
    if value is not None:
        case.hidden[2][4] = value
        where = "layer 2 from teacher layer [468]"
    else:
        # A row that says: one entry of probability 0.6, and nothing else.
        layers = case.targets.rows
        case.hidden[3] = (1e3 * case.backbone.head_weight[layers.ids_LTX[-1, :, 0]]).detach()
        layers.logprobs_LTK[-1, 4:, 0], layers.logprobs_LTK[-1, 4:, 1:] = -0.51, -torch.inf
        options, where = {"verbalizers": None}, "layer 3 from teacher layer 9"
    terms = run(case, **options)
    micro = [result([], ["x"], [0]), result(terms, ["a", "b", "c"], [3, 1, 3])]
    with pytest.raises(ModelError, match=f"sample `c`: the divergence of student {where} is {shown}"):
        losses_of(micro, SETTINGS, [2, 4, 6, 8, 9])


def test_every_matched_layer_is_looked_at(case: Case) -> None:
    case.hidden = {k: x.detach() for k, x in case.hidden.items()}
    healthy = run(case, {"matching": "bottom_k", "bottom_k": 4, "last": "none"})
    # One token of one of the four teacher layers says what cannot be; it is among the matched ones, wherever it comes.
    for damaged in range(4):
        whole = case.targets.rows.tail_mass_LT.clone()
        case.targets.rows.tail_mass_LT[damaged, 5] = torch.nan
        terms = run(case, {"matching": "bottom_k", "bottom_k": 4, "last": "none"})
        case.targets.rows.tail_mass_LT.copy_(whole)
        damaged_result = result(terms, ["a", "b"], [3, 4])
        with pytest.raises(ModelError, match=f"sample `b`: .* from teacher layer {[2, 4, 6, 8][damaged]} is not"):
            losses_of([damaged_result], SETTINGS, [2, 4, 6, 8, 9])
    losses_of([result(healthy, ["a", "b"], [3, 4])], SETTINGS, [2, 4, 6, 8, 9])


def test_labels_that_cannot_be_learned_name_the_micro_batch(case: Case) -> None:
    case.hidden = {k: x.detach() for k, x in case.hidden.items()}
    case.hidden[3][6] = torch.nan
    terms = run(case, {"last": "ce"})
    with pytest.raises(
        ModelError, match="samples `a` to `b`: the divergence of student layer 3 from the labels is not"
    ):
        losses_of([result(terms, ["a", "b"], [3, 4])], SETTINGS, [2, 4, 6, 8, 9])


def test_micro_batches_without_rows_add_nothing(case: Case) -> None:
    terms = run(case)
    empty, full = result([], ["a"], [0]), result(terms, ["b"], [7])
    assert losses_of([empty, empty], SETTINGS, []) == {}
    assert losses_of([empty, full], SETTINGS, [2, 4, 6, 8, 9])[3] == pytest.approx(float(terms[0].loss))
    assert matches_of([], [1, 2], [2, 4, 6, 8, 9]) == [[]]
