"""Builds of hybrid models: a prompt that several rows share runs once, and the cache is that of each row alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.probe_models import make_model
from helpers.tiny import save_tokenizer, write_jsonl, write_spec
from transformers import AutoModelForCausalLM

import vlsi_cache as vc
from vlsi_cache.data.branches import BRANCHES
from vlsi_cache.data.collate import plan_sample_batches
from vlsi_cache.data.sequence import PADDED
from vlsi_cache.evaluation.scores import mean_nll
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.run_files import METRICS, read_metrics
from vlsi_cache.teacher.forward import Teacher, load_teacher
from vlsi_cache.teacher.inputs import open_teacher_inputs
from vlsi_cache.teacher.recompute import recompute

TIED = 1e-5  # log-probs nearer than that may change places with the order of a sum
# The delta rule runs in chunks of 64 tokens, in fp32: where they begin moves its rounding, as in any other batch.
SAME = {"qwen3_next": 2e-5}


def rows_of_several_answers() -> list[dict[str, Any]]:
    """Three prompts with four answers each, one with a single answer, and a conversation of two turns."""
    asked = ["the cat sees the red dog and has three", "one two three", "a big blue cat and the small green dog"]
    rows = []
    for number, question in enumerate(asked):
        user = {"role": "user", "content": f"{question} " * 3}
        for answer in ("red", "", "one two three cat", "the dog has a big one"):
            turns = [user, {"role": "assistant", "content": f"{answer} {number}".strip()}]
            rows.append({"id": f"row-{len(rows)}", "messages": turns})
    alone = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "blue and green"}]
    rows.append({"id": "alone", "messages": alone})
    again = [{"role": "user", "content": "and now?"}, {"role": "assistant", "content": "small"}]
    return [*rows, {"id": "turns", "messages": [*alone, *again]}]


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "bamba"])
def test_the_cache_of_shared_prompts_is_that_of_each_row_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = save_tokenizer(tmp_path / "teacher")
    make_model(family, vocab_size=size, pad_token_id=0).save_pretrained(tmp_path / "teacher")
    spec_file = write_spec(tmp_path, tmp_path / "teacher")
    write_jsonl(tmp_path / "rows.jsonl", rows_of_several_answers())
    # Less than the first prompt has with its answers, so that it is a batch of its own.
    overrides = ["teacher.layers=[1,2]", "run.batch_tokens=72", "data.max_length=128", "store.profile=exact"]
    spec = vc.load_spec(spec_file, overrides=[*overrides, "store.part_mib=1"])
    seen: list[dict[str, Any]] = []
    capture, launch = Backbone.capture, Teacher.launch

    def counted(self: Teacher, prepared: Any) -> Any:
        def spy(backbone: Backbone, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
            seen.append(inputs)
            return capture(backbone, inputs, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Backbone, "capture", spy)
            return launch(self, prepared)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "launch", counted)
        cache = vc.build_teacher(spec, out=tmp_path / "cache")
    assert "batches are padded" in capsys.readouterr().err
    inputs = open_teacher_inputs(spec)
    teacher = load_teacher(inputs, device="cpu")
    everything = range(len(inputs.records))
    assert teacher.layout.goes_on_from_caches
    assert not teacher.backbone.layout.branches  # what trains sees each prompt whole
    # Every token that is planned has gone through the model, once, and no other but padding.
    assert sum(BRANCHES in given for given in seen) >= 3
    own = [given["attention_mask"][:, -given["input_ids"].shape[1] :] for given in seen if BRANCHES not in given]
    planned = sum(inputs.lengths(everything, teacher.layout))
    assert sum(int(mask.sum()) for mask in own) == planned
    assert max(inputs.lengths(everything, teacher.layout)) > 72
    apart = sum(int(num) for num in inputs.num_prompt_N) + sum(len(ids) for ids in inputs.response_ids)
    assert planned < 0.6 * apart

    model, golds = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher"), []
    for index in everything:
        record = inputs.records[index]
        row, (alone,) = cache[record.id], teacher.rows([index])
        moved_LTK = row.ids_LTK != alone.ids_LTK
        assert (np.abs(row.logprobs_LTK - alone.logprobs_LTK)[moved_LTK] <= TIED).all()
        np.testing.assert_allclose(row.logprobs_LTK, alone.logprobs_LTK, rtol=0, atol=SAME.get(family, TIED))
        encoded = inputs.encoder.encode(record)
        with torch.no_grad():
            logits = model(torch.from_numpy(encoded.input_ids)[None]).logits[0, encoded.num_prompt - 1 : -1]
        own_TV = logits[:, : inputs.encoder.vocab_size].log_softmax(-1).numpy()
        own_TK = np.take_along_axis(own_TV, row.ids_LTK[-1].astype(np.int64), 1)
        np.testing.assert_allclose(row.logprobs_LTK[-1], own_TK, rtol=0, atol=1e-4)
        golds += np.take_along_axis(own_TV, encoded.response_ids[:, None], 1)[:, 0].tolist()
    assert recompute(cache, num_samples=4, device="cpu").ok
    records = list(inputs.records)
    batches = plan_sample_batches(inputs.encoder.measured(records), 100, teacher.backbone.frozen_layout)
    nll = mean_nll(teacher.backbone, None, records, batches, inputs.encoder)
    assert nll[inputs.num_model_layers] == pytest.approx(-np.mean(golds), abs=1e-4)


def test_verbalizers_train_alike_whether_prompts_run_once_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = save_tokenizer(tmp_path / "teacher")
    make_model("bamba", vocab_size=size, pad_token_id=0).save_pretrained(tmp_path / "teacher")
    spec_file = write_spec(tmp_path, tmp_path / "teacher")
    write_jsonl(tmp_path / "rows.jsonl", rows_of_several_answers())
    schedule = ["train_verbalizers.schedule.steps=2", "train_verbalizers.micro_batch_size=4"]
    spec = vc.load_spec(spec_file, overrides=["teacher.layers=[1,2]", "data.max_length=128", *schedule])
    losses = []
    for name in ("once", "padded"):
        out = vc.train_verbalizers(spec, out=tmp_path / name, device="cpu")
        losses.append([line["loss"] for line in read_metrics(out / METRICS) if "loss" in line])
        monkeypatch.setattr(Backbone, "frozen_layout", PADDED)
    assert len(losses[0]) == 2
    np.testing.assert_allclose(*losses, rtol=1e-5)
