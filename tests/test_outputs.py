"""What is named with -o is looked at before any work is done for it, and nothing of anybody else is replaced."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.fakes import write_cache, write_run
from helpers.tiny import write_spec

import vlsi_cache as vc
from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.io import check_file, check_folder
from vlsi_cache.models.load import ModelRef
from vlsi_cache.report.pages import write_report


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, tokenizers, models, and parts of caches."""
    from vlsi_cache.store.derive import merge, prune
    from vlsi_cache.teacher import build, generate, verbalize
    from vlsi_cache.train import distill

    def refuse(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("read before the output was looked at")

    for module, name in (
        (build, "open_teacher_inputs"),
        (verbalize, "open_teacher_inputs"),
        (distill, "open_student"),
        (ModelRef, "load"),
        (generate, "model_named"),
        (generate, "read_records"),
        (prune, "open_source"),
        (merge, "open_source"),
    ):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(ModelRef, "digest", property(refuse))


def commands(spec: Path, cache: Path, student: Path) -> dict[str, list[Any]]:
    """Every command whose -o is a folder, without it."""
    return {
        "build-teacher": ["build-teacher", spec],
        "train-verbalizers": ["train-verbalizers", spec],
        "subset": ["train-verbalizers", spec, "--layers", "2"],
        "distill": ["distill", cache, "--student", student],
        "init-student": ["init-student", student, "--layers", "0"],
        "prune": ["prune", cache, "--top-k", "1"],
        "merge": ["merge", cache, cache],
        "ablate": ["ablate", spec, "--axis", "matching", "--student", student],
    }


def places(folder: Path) -> dict[str, Path]:
    """Where nothing of ours may go."""
    folder.mkdir()
    (folder / "file").write_text("mine")
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.png").write_text("mine")
    (folder / "gone").symlink_to("nowhere")
    return {name: folder / name for name in ("file", "photos", "gone", "file/below/it")}


@pytest.mark.usefixtures("nothing_is_read")
def test_a_folder_of_something_else_is_refused_before_anything_is_read(
    run: Any, teacher_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    spec, cache = write_spec(tmp_path, teacher_folder), write_cache(tmp_path / "cache")
    for kind, place in places(tmp_path / "mine").items():
        for name, words in commands(spec, cache, student_folder).items():
            code, _, err = run(*words, "-o", place)
            assert (code, err.count("error: ")) == (2, 1), (name, kind, err)
            assert str(place) in err, (name, err)
    assert (tmp_path / "mine" / "file").read_text() == "mine"
    assert (tmp_path / "mine" / "photos" / "cat.png").read_text() == "mine"
    assert not (tmp_path / "mine" / "nowhere").exists()


@pytest.mark.usefixtures("nothing_is_read")
def test_a_file_of_something_else_is_refused_before_anything_is_read(
    run: Any, teacher_folder: Path, tmp_path: Path
) -> None:
    spec, cache = write_spec(tmp_path, teacher_folder), write_cache(tmp_path / "cache")
    write_run(tmp_path / "run")
    for suffix, words in (
        (".parquet", ["generate", spec, "-o"]),
        (".html", ["stats", cache, "-o"]),
        (".html", ["trace", "no/model", "--prompt", "a", "-o"]),
        (".html", ["match", tmp_path / "run", "-o"]),
        (".png", ["match", tmp_path / "run", "--png"]),
    ):
        folder, file = tmp_path / f"folder{suffix}", tmp_path / f"file{suffix}"
        folder.mkdir(exist_ok=True)
        file.write_text("<!doctype html>\n<html><title>mine</title></html>")
        for place in (folder, file, file / f"below{suffix}"):
            code, out, err = run(*words, place)
            assert (code, out, err.count("error: ")) == (2, "", 1), (words, err)
            assert str(place) in err
        assert file.read_text().startswith("<!doctype html>\n<html><title>mine")


def test_no_permission_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)  # root may write everywhere
    for check, place in (
        (check_folder, tmp_path),
        (check_folder, tmp_path / "new" / "er"),
        (check_file, tmp_path / "a"),
    ):
        with pytest.raises(SpecError, match=f"no permission to write in {tmp_path}; name another place"):
            check(place)
    (tmp_path / "open").mkdir()
    check_folder(tmp_path / "open")
    check_file(tmp_path / "open" / "new" / "file")


def test_a_page_of_ours_is_written_over(run: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    page, picture = tmp_path / "match.html", tmp_path / "match.png"
    for _ in range(2):
        assert run("match", tmp_path / "run", "-o", page, "--png", picture)[0] == 0
    shutil.copy(write_report(tmp_path / "run"), page)
    assert run("match", tmp_path / "run", "-o", page)[0] == 0


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_student_never_takes_the_place_of_its_teacher(teacher_folder: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "models" / "teacher"
    shutil.copytree(teacher_folder, teacher)
    before = content(tmp_path)
    (tmp_path / "link").symlink_to(teacher)
    for out, how in (
        (teacher, "is"),
        (tmp_path / "link", "is"),
        (tmp_path / "models" / ".." / "models" / "teacher", "is"),
        (tmp_path / "models", "holds"),
        (teacher / "student", "lies in"),
    ):
        with pytest.raises(SpecError, match=f"{how} {teacher}, which it is made from"):
            vc.init_student(str(teacher), layers="0-1", out=out)
    assert content(tmp_path) == before


def test_only_a_student_that_was_made_here_and_stayed_so_is_replaced(teacher_folder: Path, tmp_path: Path) -> None:
    out, record = tmp_path / "student", tmp_path / "student" / "init_student.json"
    for layers in ("0-1", "0-2"):
        vc.init_student(str(teacher_folder), layers=layers, out=out)
    assert json.loads(record.read_text())["kept_layers"] == [0, 1, 2]
    assert json.loads(record.read_text())["weights"] == ModelRef(out).digest
    shutil.copytree(teacher_folder, tmp_path / "downloaded")
    with pytest.raises(ModelError, match=r"was not written here: it has no init_student\.json"):
        vc.init_student(str(teacher_folder), layers="0", out=tmp_path / "downloaded")
    shutil.copy(teacher_folder / "model.safetensors", out / "model.safetensors")  # trained by somebody since
    before = content(out)
    with pytest.raises(ModelError, match="holds other weights than were written there"):
        vc.init_student(str(teacher_folder), layers="0", out=out)
    assert content(out) == before


def test_work_of_generate_goes_into_no_folder_of_somebody_else(teacher_folder: Path, tmp_path: Path) -> None:
    spec = vc.load_spec(write_spec(tmp_path, teacher_folder))
    work = tmp_path / ".rows.parquet.work"
    work.mkdir()
    (work / "thesis.tex").write_text("mine")
    with pytest.raises(SpecError, match=r"holds something else \(`thesis\.tex`\); move it away"):
        vc.generate(spec, out=tmp_path / "rows.parquet", limit=2)
    assert (work / "thesis.tex").read_text() == "mine"


def test_a_student_in_a_run_folder_is_replaced_only_if_the_run_wrote_it(
    teacher_folder: Path, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlsi_cache.train import distill

    def killed(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    cache = vc.build_teacher(vc.load_spec(write_spec(tmp_path, teacher_folder)), out=tmp_path / "cache")
    run, options = tmp_path / "run", {"student": str(student_folder), "recipe": "sft"}
    with monkeypatch.context() as patch:
        patch.setattr(distill, "finish_run", killed)
        with pytest.raises(KeyboardInterrupt):
            vc.distill(cache, out=run, **options)  # the student is there, and the run is not done
    record = json.loads((run / "student" / "vlsi_cache.json").read_text())
    assert (record["recipe"], record["cache_digest"]) == ("sft", cache.header.digest)
    shutil.rmtree(run / "student")
    shutil.copytree(student_folder, run / "student")
    before = content(run / "student")
    with pytest.raises(ModelError, match=r"was not written here: it has no vlsi_cache\.json"):
        vc.distill(cache, out=run, **options)
    assert content(run / "student") == before
    shutil.rmtree(run / "student")
    vc.distill(cache, out=run, **options)
    assert json.loads((run / "run.json").read_text())["status"] == "done"
