"""Evaluation against a cache, by beams, and through borrowed verbalizers: every number against dense torch.

Legend: T response tokens, V vocabulary.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launch import run_together
from helpers.pages import evaluation_page
from helpers.tiny import make_rows, save_model, write_jsonl, write_spec

import vlsi_cache as vc
from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.data.collate import collate
from vlsi_cache.data.encoder import Encoder, load_encoder
from vlsi_cache.data.records import read_records
from vlsi_cache.errors import FingerprintMismatchError, ModelError, SpecError
from vlsi_cache.evaluation.teacher_agreement import trained_on
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.verbalizer import logit_lens
from vlsi_cache.report.text import evaluation_table
from vlsi_cache.run_files import read_evaluation
from vlsi_cache.store.reader import Cache
from vlsi_cache.teacher.generate import Decoding, respond

SHORT = ["distill.sft.schedule.steps=1", "distill.verbalize.steps=1", "distill.interact.schedule.steps=1"]
HELD_OUT = ["data.path=heldout.jsonl", "store.profile=exact", "run.batch_tokens=130"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heldout")


@pytest.fixture(scope="module")
def spec_path(folder: Path, teacher_folder: Path) -> Path:
    return write_spec(folder, teacher_folder, num_rows=16)


@pytest.fixture(scope="module")
def cache(folder: Path, spec_path: Path, teacher_folder: Path) -> Cache:
    """Held-out rows with every word of the vocabulary: what is measured on it is exact."""
    whole = [f"rows.top_k={load_encoder(teacher_folder).vocab_size}", "rows.tail_samples=0"]
    changes = [*HELD_OUT, f"data.path={folder / 'heldout.jsonl'}", *whole]
    return vc.build_teacher(vc.load_spec(spec_path, overrides=changes), out=folder / "heldout")


@pytest.fixture(scope="module")
def run(folder: Path, spec_path: Path, student_folder: Path) -> Path:
    trained = vc.build_teacher(vc.load_spec(spec_path), out=folder / "cache")
    changes = [*SHORT, "distill.student_dtype=float32", "evaluate.generate=false"]
    return vc.distill(trained, student=str(student_folder), out=folder / "run", overrides=changes)


@pytest.fixture(scope="module")
def lens_folder(folder: Path, student_folder: Path) -> Path:
    """Verbalizers that are the logit lens of the student."""
    return logit_lens(Backbone(ModelRef(student_folder).load()), [1, 2]).save(folder / "lens", provenance={})


def logprobs_of(path: Path, records: Any, encoder: Encoder, layer: int | None = None) -> torch.Tensor:
    """[T, V] of all response tokens, row after row, in float64 out of plain transformers; of a layer by logit lens."""
    model = ModelRef(path).load().double()
    found = []
    for record in records:
        batch = collate([encoder.encode(record)], pad_id=encoder.pad_id)
        with torch.no_grad():
            output: Any = model(**batch.inputs, output_hidden_states=True)
            logits = output.logits if layer is None else lens(model, output.hidden_states[layer])
        found.append(logits[0, batch.positions_T, : encoder.vocab_size].log_softmax(-1))
    return torch.cat(found)


def lens(model: Any, hidden_BSD: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.norm(hidden_BSD))


def test_kl_agreement_and_mass_are_those_of_dense_torch(
    folder: Path, cache: Cache, teacher_folder: Path, student_folder: Path, lens_folder: Path
) -> None:
    """k is the whole vocabulary, and the student is read by logit lens: nothing is estimated."""
    spec = vc.load_spec(folder / "spec.yaml", overrides=["evaluate=null", "run.batch_tokens=130"])
    result = vc.evaluate(student_folder, spec=spec, cache=cache, verbalizers=lens_folder)
    assert result.keys() == {"cache", "verbalizers", "measured_with"}
    found = result["cache"]

    encoder, records = load_encoder(student_folder), read_records(vc.load_spec(folder / "spec.yaml").evaluate.data)  # type: ignore[union-attr]
    teacher_TV = logprobs_of(teacher_folder, records, encoder)
    student_TV = logprobs_of(student_folder, records, encoder)
    kl_T = (teacher_TV.exp() * (teacher_TV - student_TV)).sum(1)
    assert (found["num_samples"], found["num_tokens"]) == (12, len(teacher_TV))
    assert found["kl"] == pytest.approx(float(kl_T.mean()), rel=1e-5)
    assert found["teacher_entropy"] == pytest.approx(float(-(teacher_TV.exp() * teacher_TV).sum(1).mean()), rel=1e-5)
    same_T = teacher_TV.argmax(1) == student_TV.argmax(1)
    assert found["top1_agreement"] == pytest.approx(float(same_T.double().mean()))
    assert found["mass_on_top_k"] == pytest.approx(1.0, rel=1e-5)
    assert found["trained_on"] is None

    assert found["teacher_layers"] == [1, 2, 3, 4, 5]
    assert found["layers"].keys() == {"1", "2"}
    for layer in (1, 2):
        own_TV = logprobs_of(student_folder, records, encoder, layer)
        for number, kl in zip((1, 2, 3, 4, None), found["layers"][str(layer)], strict=True):
            layer_TV = logprobs_of(teacher_folder, records, encoder, number)
            expected = (layer_TV.exp() * (layer_TV - own_TV)).sum(1).mean()
            assert kl == pytest.approx(float(expected), rel=1e-5)


def test_tokens_without_rows_do_not_count_and_mass_is_that_of_the_kept_words(
    folder: Path, spec_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    changes = [*HELD_OUT, f"data.path={folder / 'heldout.jsonl'}", "rows.select_tokens.random=0.5", "rows.top_k=3"]
    cut = vc.build_teacher(vc.load_spec(spec_path, overrides=changes), out=folder / "cut")
    spec = vc.load_spec(folder / "spec.yaml", overrides=["evaluate=null"])
    found = vc.evaluate(student_folder, spec=spec, cache=folder / "cut")["cache"]
    encoder, chosen, teacher = load_encoder(student_folder), [], []
    for record in read_records(spec_from_dict(cut.header.spec, where="here").data):
        row = cut[record.id]
        student_TV = logprobs_of(student_folder, [record], encoder)[row.positions_T]
        chosen.append(student_TV)
        teacher.append(logprobs_of(teacher_folder, [record], encoder)[row.positions_T])
    student_TV, teacher_TV = torch.cat(chosen), torch.cat(teacher)
    assert found["num_tokens"] == len(student_TV) < sum(len(cut[name].response_ids_R) for name in cut)
    top_T3 = teacher_TV.topk(3, dim=1).indices
    assert found["mass_on_top_k"] == pytest.approx(float(student_TV.exp().gather(1, top_T3).sum(1).mean()), rel=1e-5)
    assert found["top1_agreement"] == pytest.approx(float((top_T3[:, 0] == student_TV.argmax(1)).double().mean()))
    few = vc.evaluate(student_folder, spec=spec, cache=cut, limit=5)["cache"]
    assert (few["num_samples"], few["num_tokens"]) == (5, sum(cut[name].num_tokens for name in list(cut)[:5]))


def test_a_run_says_what_it_was_measured_with(
    run: Path, folder: Path, cache: Cache, lens_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    own = vc.evaluate(run, cache=cache)
    assert read_evaluation(run) == own
    assert (own["cache"]["trained_on"], own["cache"]["num_trained_on"]) == (False, 0)
    assert "verbalizers" not in own
    borrowed = vc.evaluate(run, verbalizers=run)  # the run's folder stands for the verbalizers in it
    assert borrowed["layers"] == own["layers"]
    assert borrowed["verbalizers"]["same_start"] is True
    assert borrowed["verbalizers"]["path"] == str((run / "verbalizers").resolve())
    foreign = vc.evaluate(run, verbalizers=lens_folder)
    assert foreign["verbalizers"]["same_start"] is False
    assert foreign["layers"] != own["layers"]
    assert "OTHER weights" in evaluation_table(foreign)

    few = ["train_verbalizers.schedule.steps=2", "teacher.layers=[1, 2]", f"teacher.model={run / 'student'}"]
    spec = vc.load_spec(folder / "spec.yaml", overrides=few)
    fresh = vc.evaluate(run, verbalizers=vc.train_verbalizers(spec, out=folder / "ruler"))
    assert "trained on this very student" in evaluation_table(fresh)
    assert fresh["nll"] == own["nll"]
    assert fresh["layers"].keys() == {"1", "2"}

    again = vc.evaluate(run, cache=folder / "cache")
    assert (again["cache"]["trained_on"], again["cache"]["num_trained_on"]) == (True, 16)
    assert "NOT HELD OUT: the run was trained on these rows" in evaluation_table(again)
    text, html = evaluation_table(own), evaluation_page(own)
    for shown in (f"{own['cache']['kl']:.4f}", f"{own['cache']['layers']['2'][-1]:.3f}", "same first word"):
        assert shown in text
        assert shown in html
    assert "NOT HELD OUT" not in text


def test_rows_that_were_trained_on_are_known_by_their_content(
    run: Path, folder: Path, cache: Cache, spec_path: Path, tmp_path: Path
) -> None:
    """Of a cache that is smaller than the run's, or larger, or another over some of its rows; and without the run's."""
    record = json.loads((run / "run.json").read_text())
    trained = vc.open(folder / "cache")
    even = [f"row-{index}" for index in range(0, 16, 2)]
    half = vc.prune(trained, out=tmp_path / "half", samples=even)
    write_jsonl(tmp_path / "mixed.jsonl", [{**row, "id": f"other-{row['id']}"} for row in make_rows(20)[12:]])
    changes = [f"data.path={tmp_path / 'mixed.jsonl'}", "store.profile=exact"]
    mixed = vc.build_teacher(vc.load_spec(spec_path, overrides=changes), out=tmp_path / "mixed")
    on_half = {**record, "cache": str(half.path), "cache_digest": half.header.digest}
    for measured, of, expected in (
        (half, record, 8),
        (trained, on_half, 8),
        (mixed, record, 4),
        (mixed, on_half, 2),
        (cache, on_half, 0),
    ):
        found = trained_on(measured, of, num_samples=len(measured))
        assert found == {"trained_on": expected > 0, "num_trained_on": expected}
    assert trained_on(trained, on_half, num_samples=3)["num_trained_on"] == len({*list(trained)[:3]} & {*even})
    result = vc.evaluate(run, cache=mixed)
    for shown in (evaluation_table(result), evaluation_page(result)):
        assert "NOT HELD OUT: the run was trained on 4 of these rows" in shown

    gone, another = {**record, "cache": str(tmp_path / "gone")}, {**record, "cache": str(mixed.path)}
    for of in (gone, another, None):
        assert trained_on(cache, of, num_samples=12) == {"trained_on": None, "num_trained_on": None}
    result["cache"] |= trained_on(mixed, gone, num_samples=8)
    for shown in (evaluation_table(result), evaluation_page(result)):
        assert "NOT KNOWN TO BE HELD OUT" in shown


def test_rows_and_vocabulary_must_be_those_of_the_cache(
    folder: Path, tmp_path: Path, cache: Cache, student_folder: Path
) -> None:
    spec = vc.load_spec(folder / "spec.yaml", overrides=["evaluate=null"])
    stranger = save_model(tmp_path / "stranger", num_layers=2, hidden=16, seed=3, extra="quite other words here")
    with pytest.raises(ModelError, match="another tokenizer"):
        vc.evaluate(stranger, spec=spec, cache=cache)
    kept = (folder / "heldout.jsonl").read_text()
    try:
        write_jsonl(folder / "heldout.jsonl", [*make_rows(11, start=1000), *make_rows(1, start=2000)])
        with pytest.raises(FingerprintMismatchError, match="is no longer in the data"):
            vc.evaluate(student_folder, spec=spec, cache=cache)
    finally:
        (folder / "heldout.jsonl").write_text(kept)
    with pytest.raises(SpecError, match="or a --cache"):
        vc.evaluate(student_folder, spec=spec)
    with pytest.raises(ModelError, match=f"no verbalizers in {tmp_path}"):
        vc.evaluate(student_folder, spec=spec, cache=cache, verbalizers=tmp_path)
    with pytest.raises(SpecError, match="beams are for answers"):
        vc.evaluate(student_folder, spec=spec, cache=cache, num_beams=2)
    with pytest.raises(SpecError, match=r"a layer drafts answers to held-out rows, and the spec has none"):
        vc.evaluate(student_folder, spec=spec, cache=cache, draft_exit=1)


def test_one_beam_is_greedy_and_a_wide_one_is_exhaustive(student_folder: Path, spec_path: Path) -> None:
    """Two tokens and as many beams as there are words: the best of all answers, by hand."""
    encoder, model = load_encoder(student_folder), ModelRef(student_folder).load()
    records = read_records(vc.load_spec(spec_path).data)[:6]
    greedy = respond(model, encoder, records, Decoding(2))
    best = [respond(model, encoder, [record], Decoding(2, num_beams=encoder.vocab_size))[0] for record in records]
    assert best != greedy  # or this test says little
    for record, first, other in zip(records, greedy, best, strict=True):
        prompt = encoder.encode(record, with_response=False).input_ids.tolist()
        first_V = next_logprobs(model, encoder, [prompt])[0]
        then_VV = next_logprobs(model, encoder, [[*prompt, word] for word in range(encoder.vocab_size)])
        top = int(first_V.argmax())
        expected = [] if top == encoder.eot_id else [top, int(then_VV[top].argmax())]
        assert first.ended is (encoder.eot_id in [top, *expected])
        assert first.ids == [word for word in expected if word != encoder.eot_id]
        scores_VV = (first_V[:, None] + then_VV) / 2  # the mean over the tokens, as beams are compared
        scores_VV[encoder.eot_id] = -torch.inf  # ends there
        word, second = divmod(int(scores_VV.argmax()), encoder.vocab_size)
        ids = [] if first_V[encoder.eot_id] > scores_VV.max() else [word, second]
        assert other.ids == [word for word in ids if word != encoder.eot_id]


@pytest.mark.parametrize("has_verbalizers", [True, False])
def test_a_layer_drafts_the_answers(run: Path, lens_folder: Path, spec_path: Path, has_verbalizers: bool) -> None:
    """Through the command's own function; that texts are the same is what `test_drafting` asks of many models."""
    spec = vc.load_spec(spec_path, overrides=["evaluate.generate=true", "distill.student_dtype=float32"])
    given: Any = {"verbalizers": lens_folder} if has_verbalizers else {}
    plain = vc.evaluate(run / "student", spec=spec, **given)
    result = vc.evaluate(run / "student", spec=spec, draft_exit=1, **given)
    assert result["exact_match"] == plain["exact_match"]
    assert result["drafts"]["num_drafted"] > 0
    assert (result["drafts"]["layer"], result["drafts"]["structure"]) == (1, "logit-lens")
    assert result["measured_with"]["draft_exit"] == 1
    assert re.search(
        r"layer 1 \(logit-lens\) drafted the answers: \d+ % of its words stood, \d\.", evaluation_table(result)
    )
    with pytest.raises(SpecError, match="drafts are for one answer at a time, not for 2 beams"):
        vc.evaluate(run / "student", spec=spec, draft_exit=1, num_beams=2)
    with pytest.raises(SpecError, match="a layer drafts answers, and the spec generates none"):
        vc.evaluate(run, draft_exit=1)


def next_logprobs(model: Any, encoder: Encoder, prompts: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(prompts)).logits[:, -1, : encoder.vocab_size]
    return logits.log_softmax(-1)


def test_the_folder_does_not_decide_how_words_are_chosen(student_folder: Path, spec_path: Path) -> None:
    """What a generation_config.json brings along changes nothing, and is there again afterwards."""
    encoder, model = load_encoder(student_folder), ModelRef(student_folder).load()
    records = read_records(vc.load_spec(spec_path).data)[:4]
    plain = respond(model, encoder, records, Decoding(8))
    for name, value in {"repetition_penalty": 9.0, "top_k": 1, "temperature": 0.1, "do_sample": True}.items():
        setattr(model.generation_config, name, value)
    assert respond(model, encoder, records, Decoding(8)) == plain
    torch.manual_seed(0)
    drawn = respond(model, encoder, records, Decoding(8, temperature=1.0))
    assert drawn != plain  # top_k 1 would have made them equal
    assert getattr(model.generation_config, "repetition_penalty") == 9.0  # noqa: B009 - not in its stubs


def test_beams_are_recorded(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    spec = vc.load_spec(folder / "spec.yaml")
    one, three = (vc.evaluate(run, spec=spec, num_beams=beams, limit=4) for beams in (None, 3))
    assert (one["num_beams"], three["num_beams"]) == (1, 3)
    assert "beam search with 3 beams" in evaluation_table(three)
    assert "beam" not in evaluation_table(one)


def test_any_number_of_processes_finds_the_same_scores(run: Path, cache: Cache, spec_path: Path) -> None:
    spec = vc.load_spec(spec_path, overrides=["run.batch_tokens=130", "run.workers=0", "evaluate.batch_size=2"])
    alone = vc.evaluate(run, spec=spec, cache=cache.path)
    assert alone["exact_match"] is not None
    assert alone["cache"]["layers"]
    for world in (2, 3):
        assert run_together(world, lambda _: vc.evaluate(run, spec=spec, cache=cache.path)) == [alone] * world


def test_processes_that_measure_something_else_are_refused(run: Path) -> None:
    first, second = run_together(2, lambda rank: vc.evaluate(run, limit=4 + rank))
    assert str(first) == str(second)
    assert "limit: `5` in process 1, `4` in process 0" in str(first)
