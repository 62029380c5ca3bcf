"""What exits say, cost and could draft: against logits of the model itself, a literal decoding, and the decoder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import tiny_model
from helpers.tiny import write_spec
from transformers import AutoModelForCausalLM

import vlsi_cache as vc
from vlsi_cache.config.training import TraversalSpec
from vlsi_cache.data.collate import collate_prompts
from vlsi_cache.data.records import read_records
from vlsi_cache.errors import CacheCorruptError, ModelError, SpecError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.draft_costs import CONFIDENCE, Answer, Costs, drafts_of
from vlsi_cache.models.drafting import Drafter, decode
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.traversal import add_traversal
from vlsi_cache.models.verbalizer import load_verbalizers
from vlsi_cache.report.pages import write_report
from vlsi_cache.report.text import exits_table
from vlsi_cache.store.reader import Cache
from vlsi_cache.teacher.draft_plan import costs_of
from vlsi_cache.train.student import cached_sources

CHANGES = (
    *("distill.verbalize.steps=1", "distill.interact.schedule.steps=2", "distill.sft.schedule.steps=2"),
    *("distill.batch_size=4", "distill.micro_batch_size=4", "distill.exits.schedule.steps=6"),
    *("distill.exits.schedule.learning_rate=0.02", "run.workers=0"),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Cache:
    folder = tmp_path_factory.mktemp("exits")
    return vc.build_teacher(vc.load_spec(write_spec(folder, teacher_folder)), out=folder / "cache")


@pytest.fixture(scope="module")
def run(cache: Cache, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "last"
    return vc.distill(cache, student=str(student_folder), out=out, recipe="last", overrides=CHANGES)


def test_scores_are_those_of_the_model_s_own_logits(run: Path, cache: Cache) -> None:
    found = vc.exits(run, cache=cache)
    assert (found["trained_on"], found["num_trained_on"]) == (True, len(cache))
    assert not (run / "exits.json").exists()
    model = AutoModelForCausalLM.from_pretrained(run / "student").eval()
    backbone = Backbone(model)
    verbalizers = load_verbalizers(run / "exits", backbone, [1, 2])
    nlls: dict[int, list[float]] = {1: [], 2: [], 3: []}
    agrees: dict[int, list[bool]] = {1: [], 2: [], 3: []}
    encoder = ModelRef(run / "student").encoder()
    with torch.no_grad():
        for record in cached_sources(cache):
            one = encoder.encode(record)
            states = model.model(input_ids=torch.from_numpy(one.input_ids)[None], output_hidden_states=True)
            before = slice(one.num_prompt - 1, -1)
            last_TV = model.lm_head(states.last_hidden_state[0, before])[:, : encoder.vocab_size]
            for layer in nlls:
                logits_TV = last_TV
                if layer < 3:
                    state_TD = verbalizers.apply(layer, states.hidden_states[layer][0, before])
                    logits_TV = model.lm_head(state_TD)[:, : encoder.vocab_size]
                logp_TV = logits_TV.log_softmax(-1)
                nlls[layer] += (-logp_TV[torch.arange(len(logp_TV)), one.response_ids]).tolist()
                agrees[layer] += (logits_TV.argmax(-1) == last_TV.argmax(-1)).tolist()
    for one in found["exits"]:
        assert one["nll"] == pytest.approx(np.mean(nlls[one["layer"]]), rel=1e-4)
        assert one["agreement"] == pytest.approx(np.mean(agrees[one["layer"]]), abs=0.01)
        assert one["seconds"] > 0
    sizes = [sum(p.numel() for p in layer.parameters() if p.ndim > 1) for layer in model.model.layers]
    of_exit = sum(p.numel() for p in verbalizers.by_layer["2"].parameters())
    head = model.lm_head.weight.numel()
    assert found["exits"][1]["weights"] == sizes[0] + sizes[1] + of_exit + head
    assert found["exits"][2]["weights"] == sum(sizes) + head
    for points in found["rules"].values():
        depths = [point["depth"] for point in points]
        assert min(depths) >= 1
        assert max(depths) <= 3
        deepest = max(points, key=lambda point: point["depth"])
        assert deepest["agreement"] >= found["exits"][0]["agreement"]
    own = vc.exits(run)
    assert json.loads((run / "exits.json").read_text())["exits"] == own["exits"]
    page = write_report(run).read_text()
    assert "<h2>Exits</h2>" in page
    assert "3 (last)" in page
    record = json.loads((run / "student" / "vlsi_cache.json").read_text())
    (run / "student" / "vlsi_cache.json").write_text(json.dumps({**record, "weights": "other"}))
    page = write_report(run).read_text()
    assert "Its exits were measured on another student; run: vlsi-cache exits" in page
    assert "3 (last)" not in page
    (run / "student" / "vlsi_cache.json").write_text("{")
    with pytest.raises(CacheCorruptError, match=r"student/vlsi_cache.json: is not JSON"):
        write_report(run)
    (run / "student" / "vlsi_cache.json").write_text(json.dumps(record))


def test_rows_are_those_that_the_cache_holds(run: Path, cache: Cache, tmp_path: Path) -> None:
    names = sorted(cache)[:5]
    few = vc.prune(cache, out=tmp_path / "few", samples=names)
    found = vc.exits(run, cache=few)
    assert (found["num_samples"], found["num_tokens"]) == (5, sum(len(cache[name].response_ids_R) for name in names))
    assert f"5 samples of {few.path}, NOT HELD OUT: the run was trained on 5 of them;" in exits_table(found)
    vc.exits(run)
    kept = json.loads((run / "exits.json").read_text())
    (run / "exits.json").write_text(json.dumps({key: value for key, value in kept.items() if key != "xxh3"}))
    with pytest.raises(CacheCorruptError, match=r"exits.json: xxh3 of the content is .* delete it and run"):
        write_report(run)
    (run / "exits.json").unlink()


def literal_decoding(answer: Answer, num_drafts: int) -> tuple[int, int, int]:
    """Drafted, kept and checked, word by word."""
    said, drafted, kept, checks = 1, 0, 0, 0
    while said < len(answer.agrees_T):
        checks += 1
        right, tried, is_right = 0, 0, True
        for place in range(said, said + num_drafts):
            tried += 1
            is_right = is_right and place < len(answer.agrees_T) and bool(answer.agrees_T[place])
            right += is_right
            if place >= len(answer.agrees_T) or not answer.sure_T[place]:
                break
        left = len(answer.agrees_T) - said
        drafted += min(tried, left) if said + right + 1 >= len(answer.agrees_T) else tried
        kept += right
        said += right + 1
    return drafted, kept, checks


def always(length: int, *, agrees: bool = True) -> Answer:
    return Answer(np.full(length, agrees), np.ones(length, dtype=bool))


def test_drafts_are_counted_as_decoding_would() -> None:
    rng = np.random.default_rng(0)
    answers = [Answer(rng.random(length) < 0.8, rng.random(length) < 0.9) for length in (1, 2, 5, 30, 60)]
    for num_drafts in (1, 4, 7):
        wanted = np.sum([literal_decoding(one, num_drafts) for one in answers], axis=0).tolist()
        found = drafts_of(answers, num_drafts)
        assert [found.num_drafted, found.num_accepted, found.num_checks] == wanted
    assert drafts_of([always(1)]).tokens_per_pass == 1.0  # one word comes with the prompt
    costs = Costs({1: 10}, layers=100, head=10)
    assert costs.speedup(1, drafts_of([always(21)], 4)) == pytest.approx(5 * 110 / (4 * 20 + 110))
    assert costs.speedup(1, drafts_of([always(400, agrees=False)], 4)) == pytest.approx(110 / (4 * 20 + 110), rel=0.01)


@pytest.mark.parametrize(("mode", "times"), [("all", 3), ("prompt", 1)])
def test_a_token_reads_the_layers_of_a_traversed_student_as_often_as_they_run(mode: str, times: int) -> None:
    model = tiny_model("llama")
    plain = costs_of(model, {2: 7})
    add_traversal(model, TraversalSpec(mode=mode, num_passes=3))
    found = costs_of(model, {2: 7})
    assert (found.layers, found.below[2] - 7, found.head) == (
        times * plain.layers,
        times * (plain.below[2] - 7),
        plain.head,
    )


def test_along_own_answers_the_prediction_is_what_decoding_does(run: Path, cache: Cache, tmp_path: Path) -> None:
    """A cache of the student over its own answers says beforehand how many of the drafts stand."""
    student, answers, file = ModelRef(run / "student"), tmp_path / "own.parquet", cache.path.parent / "spec.yaml"
    backbone, encoder = Backbone(student.load("cpu")), student.encoder()
    vc.generate(vc.load_spec(file), out=answers, model=str(run), max_new_tokens=12)
    changes = [f"teacher.model={run / 'student'}", f"teacher.verbalizers={run / 'exits'}", "teacher.layers=[1, 2]"]
    own = vc.load_spec(file, overrides=[*changes, f"data.path={answers}", "data.limit=null"])
    built = vc.build_teacher(own, out=tmp_path / "own")
    first = {name: built[name].ids_LTK[:, :, 0] for name in built}
    sure = {name: np.exp(built[name].logprobs_LTK[:, :, 0]) >= CONFIDENCE for name in built}
    planned = {plan.layer: plan for plan in vc.plan_exits(built)}
    # The others end otherwise in their text than in the tokens that were said: a random model speaks broken letters.
    as_said = [one for one in read_records(own.data) if (first[one.id][-1] == encoder.encode(one).response_ids).all()]
    assert len(as_said) > 5
    prompts = [encoder.encode(record, with_response=False) for record in as_said]
    verbalizers = load_verbalizers(run / "exits", backbone, [1, 2])
    for place, layer in enumerate((1, 2)):
        along = {name: Answer(one[place] == one[-1], sure[name][place]) for name, one in first.items()}
        agrees_T = np.concatenate([one.agrees_T for one in along.values()])
        assert planned[layer].agreement == pytest.approx(agrees_T.mean())
        assert planned[layer].acceptance == drafts_of(along.values()).acceptance
        drafter = Drafter.of(backbone, layer, verbalizers=verbalizers)
        ids: Any = {"eot_id": encoder.eot_id, "vocab_size": encoder.vocab_size}
        for prompt in prompts:  # one at a time: of a batch, the row that is sure for longest decides
            decode(drafter, collate_prompts([prompt], pad_id=encoder.pad_id), max_new_tokens=40, **ids)
        wanted = drafts_of([along[record.id] for record in as_said])
        found = (drafter.num_drafted, drafter.num_accepted, drafter.num_checks)
        # Words that two layers find nearly equally likely can fall either way in batches of other shapes.
        assert found == pytest.approx((wanted.num_drafted, wanted.num_accepted, wanted.num_checks), abs=3)


def test_what_has_no_exits_is_refused(
    run: Path, cache: Cache, student_folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    other = vc.distill(
        cache,
        student=str(student_folder),
        out=tmp_path / "other",
        recipe="last",
        overrides=[*CHANGES, "distill.seed=5", "verbalizer.structure=decoder"],
    )
    attending = vc.exits(other, cache=cache, limit=3)["exits"][0]  # its verbalizer looks at all tokens again
    assert (attending["seconds"], attending.get("acceptance")) == (None, None)
    assert attending["nll"] > 0
    with pytest.raises(ModelError, match="trained for a model whose weights are"):
        vc.exits(run, verbalizers=other / "exits", cache=cache)
    copy, file = tmp_path / "copy", cache.path.parent / "spec.yaml"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "exits")
    shutil.copytree(other / "exits", copy / "exits")
    borrowed = pytest.raises(ModelError, match="trained for a model whose weights are")
    with borrowed:
        vc.exits(copy)
    with borrowed:
        vc.generate(vc.load_spec(file), out=tmp_path / "a.parquet", model=str(copy), draft_exit=1, limit=2)
    with borrowed:  # of a run without stage verbalize its exits are meant
        vc.exits(run, verbalizers=other)
    shutil.rmtree(copy / "exits")
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "status": "interrupted", "command": "again"}))
    early = pytest.raises(SpecError, match="has a student, and its exits are not trained yet; go on with: again")
    with early:
        vc.exits(copy)
    with early:
        vc.evaluate(copy, draft_exit=1, overrides={"evaluate.generate": True})
    with early:
        vc.generate(vc.load_spec(file), out=tmp_path / "a.parquet", model=str(copy), draft_exit=1)
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(SpecError, match=r"copy/exits is gone, or a part of it is: restore it from a copy"):
        vc.exits(copy)
    again = pytest.raises(SpecError, match=r"copy/exits is gone")
    with again:  # a run that is finished is not trained again in place
        vc.distill(cache, student=record["student"], out=copy, recipe="last", overrides=CHANGES)
    spec = {**record["spec"], "distill": {**record["spec"]["distill"], "layers": [], "exits": None}}
    (copy / "run.json").write_text(json.dumps({**record, "spec": spec}))
    with pytest.raises(SpecError, match=r"copy has no exits: its `distill.layers` is empty"):
        vc.exits(copy)
    shutil.copytree(run / "exits", copy / "exits")
    (copy / "run.json").write_text(json.dumps(record))
    made = json.loads((copy / "exits" / "verbalizers.json").read_text())
    for other_kind in ({"structure": "foo"}, {"foo": 1}):
        changed = {**made, "architecture": {**made["architecture"], **other_kind}}
        (copy / "exits" / "verbalizers.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=r"verbalizers.json: `architecture` is none that this release knows .*foo"):
            vc.exits(copy)
    (copy / "exits" / "verbalizers.json").write_text(json.dumps({**made, "layers": []}))
    with pytest.raises(ModelError, match=r"verbalizers.json names no layers: restore it"):
        vc.exits(copy)
    shutil.rmtree(copy / "student")
    with pytest.raises(SpecError, match=r"copy/student is gone, or a part of it is, and the run is finished"):
        vc.distill(cache, student=record["student"], out=copy, recipe="last", overrides=CHANGES)
    with pytest.raises(SpecError, match="holds no run, and exits are those of a run's student"):
        vc.exits(teacher_folder)
    with pytest.raises(ModelError, match=r"target layers \[3\] are out of range"):
        vc.evaluate(run, draft_exit=3, overrides={"evaluate.generate": True})
    last = vc.prune(cache, out=tmp_path / "last", layers=["last"])
    with pytest.raises(SpecError, match="holds the last layer alone"):
        vc.plan_exits(last)
