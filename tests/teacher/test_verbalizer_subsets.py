"""Training some of the target layers: the same bits as all at once, several processes in one folder, refusals.

Legend: T response tokens, V vocabulary.
"""

import json
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import POSITIONS_T, ROWS_T, tiny_inputs, tiny_model
from helpers.memory import PeakMemory
from helpers.tiny import make_rows, write_jsonl, write_spec

import vlsi_cache as vc
from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.data.collate import Batch
from vlsi_cache.errors import FingerprintMismatchError, ModelError, SpecError
from vlsi_cache.models import verbalizer_files
from vlsi_cache.models.backbone import Backbone, head_of
from vlsi_cache.models.verbalizer import build_verbalizers
from vlsi_cache.runs.run_dir import waiting_for
from vlsi_cache.teacher import verbalize as teacher_verbalize
from vlsi_cache.teacher.verbalize import choose_layers, loss_table, subset_name
from vlsi_cache.train import verbalize as verbalize_module
from vlsi_cache.train.verbalize import layer_losses

TARGETS = [2, 6, 10, 14, 18, 22]


@pytest.fixture
def spec(spec_file: Path) -> CacheSpec:
    return vc.load_spec(spec_file)


def files_of(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (out / "verbalizers").iterdir()}


@pytest.mark.parametrize(
    ("layers", "rank", "world", "chosen", "name"),
    [
        (None, 0, 1, None, ""),
        ("6-18", 0, 1, [6, 10, 14, 18], "layers-6-18"),
        ("10,2", 0, 1, [2, 10], "layers-2,10"),
        ([22], 0, 1, [22], "layers-22"),
        ("2,22", 0, 1, [2, 22], "layers-2,22"),
        ("2-22", 0, 1, TARGETS, "layers-2-22"),
        (None, 1, 4, [6, 22], "layers-6,22"),
        ("5-12,22", 0, 1, [6, 10, 22], "layers-6,10,22"),
    ],
)
def test_layers_are_chosen_by_name_or_by_rank(layers: Any, rank: int, world: int, chosen: Any, name: str) -> None:
    assert choose_layers(TARGETS, layers, rank=rank, world=world) == chosen
    assert not name or subset_name(TARGETS, chosen) == name


@pytest.mark.parametrize(
    ("layers", "rank", "world", "message"),
    [
        ("3", 0, 1, "`3`: 3 is no target of the spec; the targets are 2,6,10,14,18,22"),
        ("3-5", 0, 1, "`3-5`: none is no target"),
        ("2,7,last", 0, 1, "`2,7,last`: 7,last is no target"),
        ("18-6", 0, 1, "the shallower layer first"),
        ("2:7", 0, 1, "a range is written 2-7"),
        ("", 0, 1, "neither a layer"),
        ([], 0, 1, "none is no target"),
        ("2", 0, 2, "not both"),
        (None, 2, 2, "rank 2 of 2: ranks go from 0 to 1"),
        (None, 6, 7, "rank 6 of 7 is left without a layer: there are 6 targets"),
    ],
)
def test_what_names_no_layers_is_refused(layers: Any, rank: int, world: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        choose_layers(TARGETS, layers, rank=rank, world=world)


@pytest.mark.parametrize(
    "changes",
    [
        ["verbalizer.style=plain", "train_verbalizers.schedule.clip_norm=0.001"],
        ["verbalizer.style=plain", "verbalizer.structure=mlp-x2", "verbalizer.loss=kl_to_final"],
        ["verbalizer.structure=decoder", "verbalizer.style=plain"],
    ],
)
def test_subsets_end_in_the_bits_of_a_whole_training(
    changes: list[str], spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = vc.load_spec(spec_file, overrides=changes)
    whole = vc.train_verbalizers(spec, out=tmp_path / "whole")
    out, step = tmp_path / "parts", verbalize_module.optimizer_step

    def stop_at_step_4(optimizer: Any, schedule: Any, index: int, num_steps: int) -> float:
        if index == 3:
            raise KeyboardInterrupt
        return step(optimizer, schedule, index, num_steps)

    vc.train_verbalizers(spec, out=out, layers="2-4")
    with monkeypatch.context() as patch:
        patch.setattr(verbalize_module, "optimizer_step", stop_at_step_4)
        with pytest.raises(KeyboardInterrupt):
            vc.train_verbalizers(spec, out=out, layers=[1])
    vc.train_verbalizers(spec, out=out, rank=0, world=4)  # goes on, under another name for the same layer
    assert files_of(out) == files_of(whole)
    assert {path.name for path in out.iterdir()} == {".lock", "verbalizers", "layers-1", "layers-2-4"}
    assert {file.name for file in (out / "layers-2-4").iterdir()} >= {"run.json", "metrics.jsonl", "report.html"}
    assert json.loads((out / "layers-2-4" / "run.json").read_text())["layers"] == [2, 3, 4]


def test_a_build_takes_what_subsets_have_made_and_says_what_is_missing(spec_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    spec = vc.load_spec(spec_file, overrides=["train_verbalizers.schedule.steps=1"])
    vc.train_verbalizers(spec, out=out, layers="3-4")
    vc.train_verbalizers(spec, out=out, layers="1")
    trained = vc.load_spec(spec_file, overrides=[f"teacher.verbalizers={out / 'verbalizers'}", "data.limit=4"])
    missing = (
        rf"none for layers \[2\].*of a teacher with .*train-verbalizers SPEC -o {out} --layers 2, those of a student"
    )
    with pytest.raises(ModelError, match=missing):
        vc.build_teacher(trained, out=tmp_path / "cache")
    vc.train_verbalizers(spec, out=out, layers="2")
    assert vc.build_teacher(trained, out=tmp_path / "cache").is_complete


def test_two_that_add_their_layers_at_once_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads the record before either has written it, unless one waits for the other."""
    both, write = threading.Barrier(2), verbalizer_files.write_atomically

    def slow_write(path: Path, content: str) -> None:
        with suppress(threading.BrokenBarrierError):
            both.wait(timeout=1)
        write(path, content)

    monkeypatch.setattr(verbalizer_files, "write_atomically", slow_write)

    def add(layer: int) -> None:
        with waiting_for(tmp_path):
            verbalizer_files.write(tmp_path / "verbalizers", {layer: {"w": torch.ones(2)}}, {"structure": "mlp"}, {})

    threads = [threading.Thread(target=add, args=(layer,)) for layer in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((tmp_path / "verbalizers" / "verbalizers.json").read_text())["layers"] == [1, 2]


def test_layers_that_the_record_has_lost_are_added_by_the_next_call(spec: CacheSpec, tmp_path: Path) -> None:
    """On a file system without locks two processes can both replace the record."""
    out = tmp_path / "parts"
    for layers in ("1", "2"):
        vc.train_verbalizers(spec, out=out, layers=layers)
    before, record = files_of(out), out / "verbalizers" / "verbalizers.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "layers": [2]}))
    (out / "verbalizers" / ".layer_0001.safetensors.0123").write_text("half")
    vc.train_verbalizers(spec, out=out, layers="1")
    assert files_of(out) == before


def test_who_may_work_in_one_folder(
    spec: CacheSpec, spec_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "parts"
    vc.train_verbalizers(spec, out=out, layers="1-2")
    said = capsys.readouterr().err
    assert "these layers are not there yet: --layers 3,4" in said
    assert f"by share of the training:\n{loss_table(out / 'layers-1-2')}\n" in said
    before = files_of(out)
    with pytest.raises(SpecError, match=r"layers \[2\] belong to .*layers-1-2 already"):
        vc.train_verbalizers(spec, out=out, layers="2-4")
    with pytest.raises(SpecError, match="trainings of some layers"):
        vc.train_verbalizers(spec, out=out)
    file = out / "layers-1-2" / "run.json"
    earlier = json.loads(file.read_text())
    del earlier["spec"]["verbalizer"]["loss"]  # as a release wrote it that did not have the setting
    file.write_text(json.dumps(earlier))
    longer = vc.load_spec(spec_file, overrides=["train_verbalizers.schedule.steps=7"])
    with pytest.raises(FingerprintMismatchError, match=r"steps`: 6 there, 7 now") as refused:
        vc.train_verbalizers(longer, out=out, layers="3")
    assert "loss" not in str(refused.value)
    write_jsonl(spec_file.parent / "rows.jsonl", make_rows(39))
    with pytest.raises(FingerprintMismatchError, match="`data_digest`"):
        vc.train_verbalizers(spec, out=out, layers="3")
    assert {path.name for path in out.iterdir()} == {".lock", "verbalizers", "layers-1-2"}
    assert files_of(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(SpecError, match="holds something else"):
        vc.train_verbalizers(spec, out=tmp_path / "mine", layers="3")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_how_the_loss_of_each_layer_has_fallen(tmp_path: Path) -> None:
    """At each share the mean over the last tenth of the steps until then: 1, 1, 1, 2, 3 and 3 of them."""
    lines = [
        {"stage": "verbalize", "step": step, "num_steps": 40, "elapsed_s": step, "loss": 0.0}
        | {"layers": {"2": 10 - step / 8, "10": None if step == 3 else step / 50}}
        for step in range(1, 41)
        if step != 6  # lost by a kill
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line.split() for line in loss_table(tmp_path).splitlines()] == [
        ["layer", "10%", "30%", "50%", "70%", "90%", "100%"],
        ["-----", "----", "----", "----", "----", "----", "----"],
        ["2", "9.50", "8.50", "7.50", "6.56", "5.62", "5.12"],
        ["10", "0.08", "0.24", "0.40", "0.55", "0.70", "0.78"],
    ]


def test_a_whole_training_takes_in_layers_that_the_spec_names_later(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = write_spec(tmp_path, teacher_folder), tmp_path / "run"
    few = vc.load_spec(file, overrides=["teacher.layers=[1,3]"])
    with monkeypatch.context() as patch:
        patch.setattr(teacher_verbalize, "finish_run", lambda *_, **__: None)
        vc.train_verbalizers(few, out=out)
    more = vc.load_spec(file)
    with pytest.raises(SpecError, match="`train-verbalizers`, running"):
        vc.train_verbalizers(more, out=out, layers="2")
    vc.train_verbalizers(few, out=out)
    with pytest.raises(SpecError, match=r"layers \[3\] belong to .*run already"):
        vc.train_verbalizers(more, out=out, layers="2-3")
    for _ in range(2):
        vc.train_verbalizers(more, out=out, layers="2")
    vc.train_verbalizers(few, out=out)
    assert json.loads((out / "verbalizers" / "verbalizers.json").read_text())["layers"] == [1, 2, 3]
    before = files_of(out)
    shutil.rmtree(out / "layers-2")  # as the error says: then the layer is not the whole run's
    with pytest.raises(SpecError, match=r"layers \[1\] belong to .*run already \(it has \[1, 3\]\)"):
        vc.train_verbalizers(more, out=out, layers="1-2")
    vc.train_verbalizers(more, out=out, layers="2")
    assert files_of(out) == before


@pytest.mark.parametrize("loss", ["ce", "kl_to_final"])
def test_the_logits_of_one_layer_are_alive_at_a_time(loss: str) -> None:
    """Four layers need their hidden states and gradients more than one does, and no second block of logits."""
    backbone = Backbone(tiny_model("qwen2", vocab_size=1024).requires_grad_(False))
    repeats = 100
    rows_T, positions_T = ROWS_T.repeat(repeats), POSITIONS_T.repeat(repeats)
    gold_T = torch.arange(len(rows_T)) % 1024
    batch = Batch(tiny_inputs("qwen2"), rows_T, positions_T, gold_T, gold_T[None], [len(rows_T)])
    share_T = torch.full((len(rows_T),), 1 / len(rows_T))

    def peak_bytes(layers: list[int]) -> tuple[int, int]:
        verbalizers = build_verbalizers(backbone, layers)
        with PeakMemory() as memory:
            losses = list(layer_losses(verbalizers, head_of(backbone), batch, share_T, loss=loss))
        assert len(losses) == len(layers)
        return memory.peak_bytes, sum(p.grad.nbytes for p in verbalizers.parameters() if p.grad is not None)

    (one, gradients_of_one), (four, gradients_of_four) = peak_bytes([4]), peak_bytes([1, 2, 3, 4])
    hidden_bytes, logits_bytes = 3 * len(rows_T) * 32 * 4, len(rows_T) * 1024 * 4
    assert one > logits_bytes  # the probe sees them
    more = four - one - hidden_bytes - (gradients_of_four - gradients_of_one)
    assert more < logits_bytes / 10
