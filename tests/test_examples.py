"""The examples are true: the minimal loop has the losses of `distill`, the own trainer learns, the commands exist."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import vlsi_cache as vc
from vlsi_cache.models.save import init_student
from vlsi_cache.run_files import read_metrics

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = [
    "data.options.num_samples=12",
    "distill.verbalize.steps=2",
    "distill.interact.schedule.steps=4",
    "distill.sft.schedule.steps=2",
    "distill.batch_size=4",
    "distill.micro_batch_size=4",
]


def test_the_minimal_loop_has_the_losses_of_distill_on_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import minimal_distill

    spec = vc.load_spec("demo", overrides=SHORT)
    cache = vc.build_teacher(spec, out=tmp_path / "cache", device="cpu")
    init_student(spec.teacher.model, "0-1,6-7", tmp_path / "student")
    run = vc.distill(cache, student=str(tmp_path / "student"), out=tmp_path / "run", device="cpu")
    lines = read_metrics(run / "metrics.jsonl")
    found = minimal_distill.main(str(tmp_path / "cache"), str(tmp_path / "student"))
    assert {stage: len(losses) for stage, losses in found.items()} == {"verbalize": 2, "interact": 4, "sft": 2}
    for stage, losses in found.items():
        # Ours sums over blocks of the vocabulary, the example's materialises the logits.
        assert losses == pytest.approx([line["loss"] for line in lines if line["stage"] == stage], rel=1e-4)


def test_the_own_trainer_learns(
    spec_file: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import hf_trainer
    import own_trainer

    vc.build_teacher(vc.load_spec(spec_file), out=tmp_path / "cache", device="cpu")
    losses = own_trainer.main(str(tmp_path / "cache"), str(student_folder), str(tmp_path / "out"), epochs=8)
    assert len(losses) == 8 * 5
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    # The same cache and student in transformers' own trainer: another order of samples, the same losses.
    options = {"num_train_epochs": 2, "lr_scheduler_type": "constant", "use_cpu": True}
    found = hf_trainer.main(str(tmp_path / "cache"), str(student_folder), str(tmp_path / "hf"), **options)
    assert len(found) == 2 * 5
    assert sum(found[:5]) == pytest.approx(sum(losses[:5]), rel=0.02)
    assert sum(found[5:]) == pytest.approx(sum(losses[5:10]), rel=0.02)
    assert (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda script: script.name)
def test_the_commands_of_a_script_are_ours(script: Path) -> None:
    from vlsi_cache_cli.main import app

    subprocess.run(["bash", "-n", script], check=True)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = script.read_text().replace("\\\n", " ")
    calls = re.findall(r"^ *(?:vlsi-cache|torchrun .*-m vlsi_cache_cli) (.*)$", text, flags=re.MULTILINE)
    assert calls
    for call in calls:
        name, *words = shlex.split(call)
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, call


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda script: script.name)
def test_examples_run_as_scripts(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(TypeError, match=r"main\(\) missing"):  # its arguments
        runpy.run_path(str(script), run_name="__main__")
