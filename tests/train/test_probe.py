"""The probes of the interaction against dense distributions, and that a run is the same with and without them.

Legend: L teacher layers (the final one last), T response tokens, V vocabulary, K kept entries, m tail samples.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import write_spec
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Categorical

import vlsi_cache as vc
from tests.helpers.rows import layer_rows
from vlsi_cache.config.training import InteractSpec, Schedule
from vlsi_cache.models.backbone import Backbone, head_of
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.verbalizer import Verbalizers, build_verbalizers
from vlsi_cache.run_files import read_metrics
from vlsi_cache.runs.diagnostics import Finding
from vlsi_cache.sparse.divergences import Bucketed
from vlsi_cache.sparse.kl import FORWARD_KL
from vlsi_cache.sparse.matching import match_rng
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.train import interact as interact_module
from vlsi_cache.train import probe as module
from vlsi_cache.train import verbalize as verbalize_module
from vlsi_cache.train.interact import Targets, micro_batch
from vlsi_cache.train.probe import is_due, probe

NUM_TOKENS, V, NUM_TEACHER, K, NUM_TAIL = 9, 60, 4, 6, 3
Matches = dict[int, tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class Case:
    backbone: Backbone
    verbalizers: Verbalizers
    logp_LTV: Tensor
    cached: SparseRows
    targets: Targets
    hidden: dict[int, Tensor]

    def terms(self, **changes: Any) -> Matches:
        settings = InteractSpec(schedule=Schedule(steps=1), **changes)
        rng = match_rng(3, 0, 0)
        terms = micro_batch(self.hidden, self.targets, head_of(self.backbone).real(V), self.verbalizers, settings, rng)
        matched = [term for term in terms if term.layer in (1, 2) and term.target_n is not None]
        return {term.layer: (term.target_n[0], term.match_logits_M) for term in matched}

    def probe(self, terms: Matches, **options: Any) -> dict[str, dict[str, float]]:
        head = head_of(self.backbone).real(V)
        return probe(self.hidden, head, self.verbalizers, terms, self.cached, self.targets.gold_T, **options)


@pytest.fixture
def case(student_folder: Path) -> Case:
    """A student of three layers whose head has more rows than the vocabulary, rows of different widths."""
    backbone = Backbone(ModelRef(str(student_folder)).load())
    backbone.model.requires_grad_(False)
    torch.manual_seed(0)
    logp_LTV = torch.log_softmax(torch.randn(NUM_TEACHER + 1, NUM_TOKENS, V) * 2, -1)
    ordered, ids = logp_LTV.sort(-1, descending=True)
    logprobs_LTK, ids_LTK = ordered[..., :K].clone(), ids[..., :K].clone()
    logprobs_LTK[1, ::2, K - 2 :], ids_LTK[1, ::2, K - 2 :] = -torch.inf, 0
    tail_LT = (1 - logprobs_LTK.exp().sum(-1)).clamp(min=0)
    gold_T = torch.randint(V, (NUM_TOKENS,))
    gold_LT = logp_LTV.gather(2, gold_T.expand(NUM_TEACHER + 1, -1)[..., None])[..., 0]
    entropy_LT, drawn_LTm = Categorical(logits=logp_LTV).entropy(), ids[..., K : K + NUM_TAIL]
    cached = SparseRows(
        ids_LTK=ids_LTK.numpy().astype(np.uint32),
        logprobs_LTK=logprobs_LTK.numpy(),
        tail_ids_LTm=drawn_LTm.numpy().astype(np.uint32),
        lse_LTn=np.zeros((NUM_TEACHER + 1, NUM_TOKENS, 1), np.float32),
        entropy_LT=entropy_LT.numpy(),
        gold_logprob_LT=gold_LT.numpy(),
        tail_mass_LT=tail_LT.numpy(),
    )
    layers = layer_rows(ids_LTK, logprobs_LTK, drawn_LTm, tail_LT, entropy_LT, vocab_size=V)
    targets = Targets(layers, gold_T, torch.full((NUM_TOKENS,), 1 / NUM_TOKENS))
    verbalizers = build_verbalizers(backbone, [1, 2], style="plain").requires_grad_(False)
    hidden = {k: torch.randn(NUM_TOKENS, backbone.hidden_size, requires_grad=True) for k in (1, 2, 3)}
    return Case(backbone, verbalizers, logp_LTV, cached, targets, hidden)


@torch.no_grad()
def expected(case: Case, layer: int, j: int, tokens: list[int]) -> dict[str, float]:
    """Token by token, from whole distributions."""
    state_TD = case.hidden[layer] if layer == 3 else case.verbalizers.apply(layer, case.hidden[layer])
    logq_TV = torch.log_softmax(state_TD @ case.backbone.head_weight[:V].T, -1).double()
    sums: dict[str, float] = {}
    for t in tokens:
        logq_V = logq_TV[t]
        kept = [
            int(i) for i, p in zip(case.cached.ids_LTK[j, t], case.cached.logprobs_LTK[j, t], strict=True) if p > -99
        ]
        p_V = case.logp_LTV[j, t].double().exp()
        rest = 1 - float(p_V[kept].sum())
        tail = float(logq_V[case.cached.tail_ids_LTm[j, t].astype(int)].mean())
        own = logq_V.topk(len(kept)).indices.tolist()
        values = {
            "kl": -Categorical(probs=p_V).entropy() - (p_V[kept] * logq_V[kept]).sum() - rest * tail,
            "student_entropy": Categorical(logits=logq_V).entropy(),
            "teacher_entropy": Categorical(probs=p_V).entropy(),
            "student_loss": -logq_V[case.targets.gold_T[t]],
            "teacher_loss": -p_V[case.targets.gold_T[t]].log(),
            "kept_mass": 1 - rest,
            "student_mass": logq_V[kept].exp().sum(),
            "overlap": len(set(kept) & set(own)) / len(kept),
            "top1_agreement": float(own[0] == kept[0]),
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value) / len(tokens)
    return sums


@pytest.mark.parametrize("chunk_logits", [2**22, 2 * V])
def test_probes_are_what_dense_distributions_give(
    case: Case, chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr(module, "MAX_TOKENS", 6)
    terms = case.terms()
    found, tokens = case.probe(terms), [0, 1, 3, 4, 6, 7]
    assert list(found) == ["1", "2", "3"]
    matched = [int(target) for target, _ in terms.values()]
    for layer, target in zip((1, 2, 3), (*matched, NUM_TEACHER), strict=True):
        numbers = dict(found[str(layer)])
        entropy = numbers.pop("match_entropy", None)
        assert (entropy is None) == (layer == 3)
        assert numbers == pytest.approx(expected(case, layer, target, tokens), rel=1e-4, abs=1e-6)


def test_of_several_matched_layers_the_nearest_one_is_shown(case: Case) -> None:
    terms = case.terms(matching="bottom_k", bottom_k=2)
    found = case.probe(terms)
    for layer, (target, _) in terms.items():
        nearest = int(target)
        assert found[str(layer)] == pytest.approx(  # without `match_entropy`: the nearest ones are not drawn
            expected(case, layer, nearest, list(range(NUM_TOKENS))), rel=1e-4, abs=1e-6
        )


def test_the_sampling_entropy_is_that_of_the_draw(case: Case) -> None:
    entropies = {mode: case.probe(case.terms(matching=mode))["1"]["match_entropy"] for mode in ("random", "uniform")}
    assert entropies == pytest.approx({"random": np.log(NUM_TEACHER), "uniform": 0.0}, abs=1e-6)


def test_without_matches_only_the_last_layer_is_there(case: Case) -> None:
    for changes in ({"intermediate": "ce"}, {"intermediate": "none"}):
        assert list(case.probe(case.terms(**changes))) == ["3"]


def test_rows_of_draws_give_no_shares_of_a_top_k(case: Case) -> None:
    assert set(case.probe(case.terms(), is_sampled=True)["3"]) == {
        "kl", "student_entropy", "teacher_entropy", "student_loss", "teacher_loss"
    }  # fmt: skip


def test_without_tail_samples_the_divergence_is_never_negative() -> None:
    """As the value that layers are matched by: rounding takes that of a student like its teacher below 0."""
    torch.manual_seed(0)
    logits_TV = torch.randn(200, V) * 3
    logp_TV = logits_TV.log_softmax(-1)
    logp_TK, ids_TK = logp_TV.topk(K)
    tail_T = 1 - logp_TK.exp().sum(1)
    assert float(FORWARD_KL(Bucketed.of(logp_TK, tail_T, logp_TK)).min()) < 0
    none_T0 = ids_TK[:, :0]
    teacher = module.TeacherTokens(ids_TK, logp_TK, none_T0, tail_T, torch.zeros(200), torch.zeros(200))
    assert float(module._compare(logits_TV, teacher, ids_TK[:, 0], False)["kl"].min()) == 0


def test_first_and_last_step_are_probed_and_about_twenty_in_all() -> None:
    for num_steps in (1, 2, 5, 19, 20, 21, 40, 160, 12345):
        due = [step for step in range(num_steps) if is_due(step, num_steps)]
        assert due[0] == 0
        assert due[-1] == num_steps - 1
        assert min(num_steps, 11) <= len(due) <= 21


def test_a_run_is_the_same_with_and_without_probes(
    teacher_folder: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    cache = vc.build_teacher(vc.load_spec(write_spec(tmp_path, teacher_folder)), out=tmp_path / "cache")
    options = {"student": str(student_folder), "overrides": ["distill.lora.dropout=0.1"]}
    monkeypatch.setattr(interact_module, "interact_findings", lambda _: [Finding("low_kept_mass", "too low")])
    monkeypatch.setattr(
        verbalize_module,
        "verbalizer_findings",
        lambda _, vocab_size, stage: [Finding("raw", f"{stage} ln {vocab_size}")],
    )
    with_probes = vc.distill(cache, out=tmp_path / "with", **options)
    said = capfd.readouterr().err
    assert (said.count("warning: too low"), said.count(f"warning: verbalize ln {cache.header.vocab_size}")) == (1, 1)
    monkeypatch.setattr(interact_module, "is_due", lambda *_: False)
    without = vc.distill(cache, out=tmp_path / "without", **options)
    clock = {"elapsed_s", "tokens_per_s", "data_wait_pct", "memory_gib"}
    lines = [
        [{k: v for k, v in line.items() if k not in clock} for line in read_metrics(run / "metrics.jsonl")]
        for run in (with_probes, without)
    ]
    probes = [line.pop("probe") for line in lines[0] if "probe" in line]
    assert len(probes) == 5
    could_match = [line.pop("teacher_layers") for line in lines[0] if "teacher_layers" in line]
    assert could_match == [[1, 2, 3, 4]] * 5  # for readers that no longer find the cache
    assert all(set(probed) == {"1", "2", "3"} for probed in probes)
    assert json.dumps(lines[0]) == json.dumps(lines[1])
    ours, others = (load_file(run / "student" / "model.safetensors") for run in (with_probes, without))
    assert all(torch.equal(ours[name], others[name]) for name in ours)
