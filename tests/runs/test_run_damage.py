"""Damaged files of runs: each is one clear error wherever it is read, and a checkpoint goes back to the one before."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stopping import stop_after
from helpers.tiny import write_spec
from safetensors.torch import load_file, save_file

import vlsi_cache as vc
from vlsi_cache import run_files
from vlsi_cache.errors import CacheCorruptError
from vlsi_cache.models import verbalizer_files
from vlsi_cache.models.verbalizer import Architecture, Verbalizer
from vlsi_cache.runs.checkpoints import Checkpoints
from vlsi_cache.runs.metrics import MetricsLog
from vlsi_cache.store.reader import Cache

Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda old: old[: len(old) // 2], "is not JSON"),
    "empty": (lambda _: b"", "is empty"),
    "not UTF-8": (lambda old: old[:3] + b"\xff\xfe" + old[3:], "is not UTF-8 "),
    "not JSON": (lambda _: b"status: done", "is not JSON"),
    "wrong type": (lambda _: b"[]", "should be an object and is of type list"),
    "missing keys": (lambda _: b"{}", "is missing"),
    "NaN": (lambda old: b'{"x": NaN, ' + old[1:], "NaN is no number"),
    "deep": (lambda _: b"[" * 100_000, "is not JSON"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Cache:
    folder = tmp_path_factory.mktemp("damage")
    return vc.build_teacher(vc.load_spec(write_spec(folder, teacher_folder)), out=folder / "cache")


@pytest.fixture(scope="module")
def whole(cache: Cache, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, evaluated."""
    out = vc.distill(cache, student=str(student_folder), out=tmp_path_factory.mktemp("whole") / "run")
    vc.evaluate(out)
    return out


@pytest.fixture(scope="module")
def half(cache: Cache, student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its last step."""
    out = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, "sft", 3)
        with pytest.raises(KeyboardInterrupt):
            vc.distill(cache, student=str(student_folder), out=out)
    return out


def commands_of(file: str, folder: Path, cache: Path, student: Path) -> dict[str, list[Any]]:
    """Every command that reads a file of a run folder."""
    trace = ["trace", folder, "--prompt", "say one", "--max-new-tokens", 1]
    distill = ["distill", cache, "--student", student, "-o", folder]
    spec = cache.parent / "spec.yaml"
    by_name = {
        "distill": distill,
        "evaluate": ["evaluate", folder],
        "report": ["report", folder],
        "match": ["match", folder],
        "trace": trace,
        "generate": ["generate", spec, "-o", folder.parent / "rows.parquet", "--model", folder],
        "train-verbalizers": ["train-verbalizers", spec, "-o", folder],
        "subsets": ["train-verbalizers", spec, "-o", folder, "--layers", "2"],
        "ablate": ["ablate", spec, "--axis", "matching", "--student", student, "-o", folder, "--cache", cache],
    }
    names = {
        "run.json": ("distill", "evaluate", "report", "match", "trace", "generate", "train-verbalizers", "subsets"),
        "metrics.jsonl": ("report", "match"),
        "evaluation.json": ("report", "match"),
        "verbalizers/verbalizers.json": ("evaluate", "trace"),
        "ablation.json": ("ablate", "report"),
    }
    return {name: by_name[name] for name in names[file]}


def listed(run: Any, folder: Path) -> dict[str, Any]:
    code, out, _ = run("ls", folder, "--json")
    assert code == 0
    (found,) = [one for one in json.loads(out) if one["path"] == str(folder)]
    return found


RECORDS = ("run.json", "evaluation.json", "verbalizers/verbalizers.json", "ablation.json")
# Of an evaluation nothing has to be there: what is not measured is not shown.
CASES = [(file, kind) for file in RECORDS for kind in (*DAMAGES, "a folder")]
CASES.remove(("evaluation.json", "missing keys"))


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_a_damaged_record_is_one_error_in_every_command(
    file: str, kind: str, run: Any, whole: Path, cache: Cache, student_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    if file == "ablation.json":
        folder.mkdir()
        (folder / file).write_text(json.dumps({"runs": {}, "spec": {"name": "tiny"}}))
    else:
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoints"))
    damage(folder / file, kind)
    says = DAMAGES[kind][1] if kind in DAMAGES else "is a folder and should be a file"
    for name, words in commands_of(file, folder, cache.path, student_folder).items():
        code, out, err = run(*words)
        assert (code, out, err.count("error: ")) == (3, "", 1), (name, err)
        assert f"{folder / file}: " in err, name
        assert says in err, name
        assert "; " in err.partition(says)[2], f"{name} does not say what to do"
    if not file.startswith("verbalizers"):
        found = listed(run, folder)
        assert found["state"] == "unreadable"
        assert says in found["problem"]


def damage(file: Path, kind: str) -> None:
    old = file.read_bytes()
    if kind in DAMAGES:
        file.write_bytes(DAMAGES[kind][0](old))
    else:
        file.unlink()
        file.mkdir()


@pytest.mark.parametrize("kind", [*(kind for kind in DAMAGES if kind != "empty"), "a folder"])
def test_a_damaged_line_of_the_log_is_named(kind: str, run: Any, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoints", "student"))
    file = folder / "metrics.jsonl"
    if kind == "a folder":
        damage(file, kind)
        where, says = f"{file}: ", "is a folder"
    else:
        lines = file.read_bytes().split(b"\n")
        lines[2] = DAMAGES[kind][0](lines[2])
        file.write_bytes(b"\n".join(lines))
        where, says = f"{file}, line 3: ", DAMAGES[kind][1]
    for words in (["report", folder], ["match", folder]):
        code, _, err = run(*words)
        assert (code, err.count("error: ")) == (3, 1), err
        assert where in err
        assert says in err
        assert "delete it" in err
    with pytest.raises(CacheCorruptError, match=says):
        MetricsLog(folder).start_stage("sft", step=2, num_steps=4)


def test_a_last_line_that_a_kill_cut_short_is_left_out(whole: Path, tmp_path: Path) -> None:
    old = (whole / "metrics.jsonl").read_bytes()
    lines = run_files.read_metrics(whole / "metrics.jsonl")
    for cut in (1, 2, 40):
        (tmp_path / "metrics.jsonl").write_bytes(old[:-cut])
        assert run_files.read_metrics(tmp_path / "metrics.jsonl") == lines[:-1]
    assert run_files.read_metrics(tmp_path / "none.jsonl") == []


def test_a_log_that_ends_before_the_checkpoint_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path)
    log.start_stage("sft", step=2, num_steps=4)
    log.close()
    assert "has no line of sft step 2, where training goes on: curves have a gap" in capsys.readouterr().err


def test_a_number_that_is_not_finite_leaves_the_log_readable(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.start_stage("interact", step=0, num_steps=1)
    probe = {"1": {"kl": float("inf"), "overlap": 0.5}}
    numbers = {"loss": 1.0, "tokens_per_s": 1.0, "data_wait_pct": 0.0, "layers": {"1": float("nan")}}
    log.write(stage="interact", step=1, num_steps=1, probe=probe, **numbers)
    log.close()
    (line,) = run_files.read_metrics(log.path)
    assert (line["probe"], line["layers"]) == ({"1": {"kl": None, "overlap": 0.5}}, {"1": None})


def flip(file: Path, at: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 64
    file.write_bytes(content)


def cut(file: Path, at: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(at * (len(content) - 1))])


def newest_two(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("sft-*"))


def test_a_damaged_newest_checkpoint_is_told_and_the_run_ends_in_the_same_bits(
    half: Path, whole: Path, cache: Cache, student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    (newest,) = newest_two(folder)
    (before,) = (folder / "checkpoints").glob("interact-*")
    sums = json.loads((newest / "checkpoint.json").read_text())["files"]["state.safetensors"]
    flip(newest / "state.safetensors", 0.75)
    vc.distill(cache, student=str(student_folder), out=folder)
    err = capsys.readouterr().err
    assert err.count("training goes on from the checkpoint before it") == 1
    assert f"{newest / 'state.safetensors'}: xxh3 is " in err
    assert f"and was {sums['xxh3']}; training goes on from the checkpoint before it, interact step 5" in err
    students = [load_file(path / "student" / "model.safetensors") for path in (folder, whole)]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[1])
    assert not before.exists()
    assert [path.name for path in newest_two(folder)] == ["sft-0000002", "sft-0000004"]


def saved(folder: Path, *steps: int, stage: str = "sft") -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    for step in steps:
        optimizer.step()
        Checkpoints(folder).save(stage, step, model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("file", ["state.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("change", [flip, cut])
@pytest.mark.parametrize("at", [0.0, 0.05, 0.3, 0.6, 0.9, 1.0])
def test_every_damage_of_a_checkpoint_is_found(file: str, change: Any, at: float, tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path, 2, 4)
    change(tmp_path / "checkpoints" / "sft-0000004" / file, at)
    assert Checkpoints(tmp_path).latest() == ("sft", 2)
    with pytest.raises(CacheCorruptError, match=f"sft-0000004/{file}: "):
        Checkpoints(tmp_path).load("sft", 4, model, optimizer)
    change(tmp_path / "checkpoints" / "sft-0000002" / file, at)
    with pytest.raises(CacheCorruptError, match=r"every checkpoint is damaged: .*run the same command again") as caught:
        Checkpoints(tmp_path).latest()
    assert len(str(caught.value).splitlines()) == 3


def test_a_checkpoint_whose_files_are_gone_is_damaged(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4, 6)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["sft-0000004", "sft-0000006"]
    (folder / "sft-0000006" / "checkpoint.json").unlink()
    assert Checkpoints(tmp_path).latest() == ("sft", 4)
    (folder / "sft-0000004").rename(folder / "sft-0000005")
    with pytest.raises(CacheCorruptError, match="is of sft step 4"):
        Checkpoints(tmp_path).latest()
    (folder / "notes").mkdir()  # of the user
    shutil.rmtree(folder / "sft-0000006")
    shutil.rmtree(folder / "sft-0000005")
    assert Checkpoints(tmp_path).latest() is None
    saved(tmp_path, 2)
    assert (folder / "notes").is_dir()


def test_a_later_stage_is_newer_whatever_its_step(tmp_path: Path) -> None:
    saved(tmp_path, 40, stage="interact")
    saved(tmp_path, 2, stage="sft")
    assert Checkpoints(tmp_path).latest() == ("sft", 2)
    saved(tmp_path, 4, stage="sft")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"sft-0000002", "sft-0000004"}


def test_a_checkpoint_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path, 2)
    file = tmp_path / "checkpoints" / "sft-0000002" / "checkpoint.json"
    file.write_text(json.dumps({"stage": "sft", "step": 2, "number": 7}, indent=1))
    fresh = torch.nn.Linear(4, 4)
    Checkpoints(tmp_path).load("sft", 2, fresh, torch.optim.AdamW(fresh.parameters()))
    assert torch.equal(fresh.weight, model.weight)
    cut(tmp_path / "checkpoints" / "sft-0000002" / "state.safetensors", 0.5)
    with pytest.raises(CacheCorruptError, match=r"state.safetensors: cannot be read \("):
        Checkpoints(tmp_path).latest()
    del optimizer


ARCHITECTURE = {"structure": "mlp", "hidden_size": 8, "intermediate_size": 0}


def write_verbalizers(folder: Path) -> Path:
    verbalizer = Verbalizer(Architecture(**ARCHITECTURE))
    layers = {layer: dict(verbalizer.state_dict()) for layer in (1, 2)}
    return verbalizer_files.write(folder, layers, ARCHITECTURE, {"teacher_digest": "a", "head_digest": "b"})


@pytest.mark.parametrize("change", [flip, cut])
@pytest.mark.parametrize("at", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_every_damage_of_a_verbalizer_is_found(change: Any, at: float, tmp_path: Path) -> None:
    folder = write_verbalizers(tmp_path / "run" / "verbalizers")
    file = verbalizer_files.layer_file(folder, 2)
    recorded = json.loads((folder / "verbalizers.json").read_text())["files"][file.name]
    change(file, at)
    module = Verbalizer(Architecture(**ARCHITECTURE))
    key = "xxh3" if change is flip else "size"
    for read in (
        lambda: verbalizer_files.load_layer(folder, 2, module, ARCHITECTURE),
        lambda: verbalizer_files.verbalizers_digest(folder, [1, 2]),
    ):
        with pytest.raises(CacheCorruptError, match=f"{file} is damaged: its {key} is ") as caught:
            read()
        assert f"and was {recorded[key]}" in str(caught.value)
        assert f"vlsi-cache train-verbalizers SPEC -o {tmp_path / 'run'}" in str(caught.value)
    assert verbalizer_files.whole_layers(folder) == [1]
    verbalizer_files.load_layer(folder, 1, module, ARCHITECTURE)


def test_verbalizers_of_an_earlier_release_have_no_sums_and_are_read(tmp_path: Path) -> None:
    folder = write_verbalizers(tmp_path / "verbalizers")
    record = json.loads((folder / "verbalizers.json").read_text())
    del record["files"]
    (folder / "verbalizers.json").write_text(json.dumps(record))
    module = Verbalizer(Architecture(**ARCHITECTURE))
    verbalizer_files.load_layer(folder, 2, module, ARCHITECTURE)
    verbalizer_files.write(folder, {3: dict(module.state_dict())}, ARCHITECTURE, record["provenance"])
    assert list(json.loads((folder / "verbalizers.json").read_text())["files"]) == ["layer_0003.safetensors"]


def test_the_verbalizers_that_come_with_the_package_have_sums() -> None:
    folder = Path(vc.__file__).parent / "demo" / "teacher" / "verbalizers"
    record = json.loads((folder / "verbalizers.json").read_text())
    assert set(record["files"]) == {file.name for file in folder.glob("*.safetensors")}
    verbalizer_files.check_layers(folder, record["layers"])


def test_a_damaged_verbalizer_comes_back_from_the_checkpoint(teacher_folder: Path, tmp_path: Path) -> None:
    spec, out = vc.load_spec(write_spec(tmp_path, teacher_folder)), tmp_path / "run"
    vc.train_verbalizers(spec, out=out)
    file = out / "verbalizers" / "layer_0002.safetensors"
    good = file.read_bytes()
    flip(file, 0.5)
    vc.train_verbalizers(spec, out=out)  # what the error says
    assert file.read_bytes() == good


def test_a_damaged_batch_of_generate_is_named(tmp_path: Path) -> None:
    file, lines = tmp_path / "batch-000000.json", [{"ids": [1, 2, 345], "ended": True}]
    file.write_text(run_files.sealed({"responses": lines}))
    assert run_files.read_batch(file, 1) == lines
    with pytest.raises(CacheCorruptError, match="holds 1 responses, its batch has 2 prompts; delete it"):
        run_files.read_batch(file, 2)
    file.write_text(file.read_text().replace("345", "346"))
    with pytest.raises(CacheCorruptError, match=f"{file}: xxh3 of the content is .*; delete it"):
        run_files.read_batch(file, 1)
    file.write_text(json.dumps(lines))  # of an earlier release
    assert run_files.read_batch(file, 1) == lines
    file.write_text(json.dumps([{"ids": ["1"], "ended": True}]))
    with pytest.raises(CacheCorruptError, match="should be a valid integer"):
        run_files.read_batch(file, 1)


def test_a_file_that_is_none_of_safetensors_is_damaged(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    file = tmp_path / "checkpoints" / "sft-0000002" / "state.safetensors"
    save_file({"a": torch.ones(2)}, file)
    with pytest.raises(CacheCorruptError, match="every checkpoint is damaged"):
        Checkpoints(tmp_path).latest()
