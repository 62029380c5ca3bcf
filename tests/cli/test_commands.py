"""The command line: help, exit codes, messages, JSON, and what it does to real small caches."""

import datetime
import errno
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from helpers.fakes import LAYERS, WORDS, write_cache, write_demo, write_run

import vlsi_cache as vc
from vlsi_cache import errors, io
from vlsi_cache.config.spec import load_spec
from vlsi_cache.config.training import Recipe

STAGES = ["plan", "generate", "train-verbalizers", "build-teacher", "distill", "evaluate", "exits"]


STAGES += ["init-student", "demo", "ablate"]


LOOK = ["ls", "inspect", "sample", "stats", "trace", "match", "verify", "diff", "report", "specs"]
COMMANDS = [*STAGES, *LOOK, "prune", "merge", "push", "pull", "repair", "import", "export"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "caches" / "fake", skipped=1)


def test_the_command_tree_is_complete(run: Any) -> None:
    code, out, _ = run("-h")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if line.startswith("│ ") and line[2].islower()] == COMMANDS
    assert out.index("STAGES") < out.index("LOOK") < out.index("CHANGE")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_an_example_and_the_common_options(run: Any, name: str) -> None:
    code, out, _ = run(name, "-h")
    assert code == 0
    assert f"Example:  vlsi-cache {name}" in out
    for option in ("--json", "--quiet", "--verbose", "--version"):
        assert option in out


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'zarr', 'transformers', 'pydantic', 'numpy', 'matplotlib'} & set(sys.modules)"
    code = (
        f"import sys; sys.argv = ['vlsi-cache', '-h']; from vlsi_cache_cli.main import main; main(); assert not {heavy}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("words", [["--version"], ["ls", "--version"], ["plan", "--version"]])
def test_version_everywhere(run: Any, words: list[str]) -> None:
    code, out, _ = run(*words)
    assert (code, out.split()[0]) == (0, "vlsi-cache")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inspct"], "Did you mean 'inspect'"),
        (["inspect"], "Missing argument 'CACHE'"),
        (["plan"], "name a SPEC to price its build, or a cache with --exits CACHE"),
        (
            ["plan", "--exits", "c", "--set", "rows.top_k=8", "--gpu", "A100"],
            "--set and --gpu belong to the price of a",
        ),
        (["plan", "demo", "--jsn"], "--json"),
        (["distill", "c", "-o", "r", "--recipe", "vlsl"], "vlsi"),
        (["sample", "c", "i", "--top", "0"], "--top"),
    ],
)
def test_usage_errors(run: Any, words: list[str], says: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("flags", [["--device", "cpu"], ["--trust-remote-code"], ["--device", "cpu", "--deep"]])
def test_flags_of_verify_that_would_do_nothing(run: Any, cache: Path, flags: list[str]) -> None:
    code, out, err = run("verify", cache, *flags)
    assert (code, out) == (2, "")
    assert f"error: {flags[0]}" in err
    assert "does nothing without --recompute" in err


ERRORS = [
    (errors.SpecError("bad"), 2),
    (errors.DataError("bad"), 2),
    (errors.ModelError("bad"), 2),
    (errors.CacheNotFoundError("bad"), 3),
    (errors.CacheIncompleteError("bad"), 3),
    (errors.CacheCorruptError("bad"), 3),
    (errors.FingerprintMismatchError("bad"), 3),
    (errors.SampleNotFoundError("bad"), 3),
    (errors.DiskFullError("bad"), 3),
    (OSError(errno.ENOSPC, "No space left on device", "x"), 3),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), 3),
    (RuntimeError("I/O error: No space left on device (os error 28)"), 3),
    (PermissionError(errno.EACCES, "Permission denied", "x"), 3),
    (RuntimeError("bad"), 2),
]


@pytest.mark.parametrize(("error", "expected"), ERRORS, ids=lambda value: type(value).__name__)
def test_exit_codes(run: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: int) -> None:
    monkeypatch.setitem(vars(vc), "plan", raising(error))
    code, out, err = run("plan", "demo")
    assert (code, out) == (expected, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    if io.is_disk_full(error):
        assert err.count("disk is full") == (not isinstance(error, errors.DiskFullError))
        assert err.endswith(":\n  vlsi-cache plan demo\n")


def test_debug_shows_the_traceback(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLSI_CACHE_DEBUG", "1")
    monkeypatch.setitem(vars(vc), "plan", raising(errors.SpecError("bad")))
    assert "Traceback" in run("plan", "demo")[2]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyboardInterrupt(), "vlsi-cache build-teacher demo -o 'my caches/a'"),
        (errors.InterruptedRunError("vlsi-cache other"), "vlsi-cache other"),
    ],
)
def test_interruption_prints_the_command_that_goes_on(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, says: str
) -> None:
    monkeypatch.setitem(vars(vc), "build_teacher", raising(error))
    code, _, err = run("build-teacher", "demo", "-o", "my caches/a")
    assert code == 130
    assert err.splitlines()[-1].strip() == says


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "vlsi_cache_cli.main", "specs", "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()
    _, err = child.communicate()
    assert (child.returncode, err) == (0, b"")


def test_stages_pass_on_what_was_typed(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = record_calls(monkeypatch, tmp_path)
    assert run("build-teacher", "demo", "-o", "c", "--set", "rows.top_k=8", "--rank", 1, "--world", 4)[0] == 0
    assert calls["build_teacher"][0].rows.top_k == 8
    assert calls["build_teacher"][1] == {"out": "c", "device": None, "rank": 1, "world": 4}
    assert run("build-teacher", "demo", "-o", "c", "--batch-tokens", "auto", "--kernels", "eager")[0] == 0
    made = calls["build_teacher"][0].run
    assert (made.batch_tokens, made.kernels) == ("auto", "eager")
    assert run("build-teacher", "demo", "-o", "c", "--batch-tokens", 64)[0] == 0
    assert calls["build_teacher"][0].run.batch_tokens == 64
    assert run("distill", "c", "--student", "s", "-o", "r", "--recipe", "last", "--set", "a=1", "--set", "b=2")[0] == 0
    assert calls["distill"][1]["recipe"] == "last"
    assert calls["distill"][1]["overrides"] == ["a=1", "b=2"]
    for recipe in get_args(Recipe):
        assert run("distill", "c", "-o", "r", "--recipe", recipe)[0] == 0
        assert calls["distill"][1]["recipe"] == recipe
    assert run("evaluate", "r", "--limit", "3")[0] == 0
    unset = dict.fromkeys(("spec", "cache", "verbalizers", "num_beams", "draft_exit", "device"))
    assert calls["evaluate"][1] == {**unset, "limit": 3, "overrides": [], "trust_remote_code": False}
    words = [
        "--trust-remote-code",
        "--cache",
        "c",
        "--verbalizers",
        "v",
        "--beams",
        5,
        "--draft-exit",
        2,
        "--set",
        "a=1",
    ]
    assert run("evaluate", "r", *words)[0] == 0
    given = {"cache": "c", "verbalizers": Path("v"), "num_beams": 5, "draft_exit": 2, "overrides": ["a=1"]}
    assert calls["evaluate"][1] == {**unset, **given, "limit": None, "trust_remote_code": True}
    words = ["--model", "m", "--temperature", "0.7", "--top-p", "0.9", "--num-samples", 2, "--max-new-tokens", 7]
    words += ["--batch-size", 3, "--seed", 4, "--limit", 5, "--set", "data.max_length=99", "--device", "cpu"]
    code, out, _ = run("generate", "demo", "-o", "r.parquet", *words)
    assert (code, "left out: 1" in out, "row-3: the response is empty" in out) == (0, True, True)
    assert calls["generate"][0].data.max_length == 99
    numbers = {"temperature": 0.7, "top_p": 0.9, "num_samples": 2, "max_new_tokens": 7, "batch_size": 3}
    numbers |= {"seed": 4, "limit": 5, "draft_exit": None}
    assert calls["generate"][1] == {"out": Path("r.parquet"), "model": "m", "device": "cpu", **numbers}
    assert run("init-student", "t", "--layers", "0-1,5", "-o", "s")[0] == 0
    assert calls["init_student"][1] == {"layers": "0-1,5", "out": Path("s"), "gguf_file": None}
    assert run("train-verbalizers", "demo", "-o", "v")[0] == 0


def test_what_stages_print_is_no_data(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(_spec: Any, **_options: Any) -> Any:
        print("loading")
        return SimpleNamespace(as_dict=lambda: {"hours": 1, "nll": math.nan, "layers": [math.inf]})

    monkeypatch.setitem(vars(vc), "plan", noisy)
    _, out, err = run("plan", "demo", "--json")
    assert (json.loads(out), err) == ({"hours": 1, "nll": None, "layers": [None]}, "loading\n")
    assert run("plan", "demo", "--json", "-q")[2] == ""


def test_ls(run: Any, cache: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "caches" / "half", num_written=1)
    write_run(tmp_path / "run")
    write_demo(tmp_path / "demo")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "cache.json").write_text("{")
    code, out, _ = run("ls", tmp_path, "--json")
    assert code == 0
    found = {str(Path(one["path"]).relative_to(tmp_path)): one for one in json.loads(out)}
    assert {"caches/fake", "caches/half", "run", "demo", "demo/cache", "demo/runs/seed-0/vlsi", "odd"} <= set(found)
    assert found["caches/fake"]["state"] == "complete"
    assert found["caches/fake"]["layers"] == LAYERS
    assert found["caches/half"]["state"] == "1/2 parts"
    assert found["caches/half"]["size_bytes"] is None
    whole = sum(file.lstat().st_size for file in (tmp_path / "demo").rglob("*") if file.is_file())
    assert found["demo"]["size_bytes"] == whole
    assert found["demo/cache"]["size_bytes"] < whole
    assert found["run"]["date"] <= datetime.datetime.now().isoformat(" ")
    assert found["odd"]["state"] == "unreadable"
    assert found["run"]["exact_match"] > 0.5
    assert str(cache) in run("ls", tmp_path)[1]
    assert run("ls", tmp_path / "nowhere")[0] == 3


def test_inspect(run: Any, cache: Path) -> None:
    facts = json.loads(run("inspect", cache, "--json")[1])
    assert (facts["complete"], facts["parts_done"], facts["num_samples"]) == (True, 2, 6)
    assert facts["bytes_per_layer_token"]["ids"] > 0
    code, out, _ = run("inspect", cache)
    assert code == 0
    for part in ("2 of 2 parts", "last (4)", "left out    1 rows", "prompt <too> long", "bytes per (layer, token)"):
        assert part in out


def test_inspect_of_an_unfinished_cache(run: Any, tmp_path: Path) -> None:
    half = write_cache(tmp_path / "half", num_written=1)
    assert json.loads(run("inspect", half, "--json")[1])["complete"] is False
    assert "1 of 2 parts" in run("inspect", half)[1]


def test_sample(run: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code, out, err = run("sample", cache, "sample-0", "--top", "2")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 60
    assert out.count("  response  ") >= 2  # the layers do not fit side by side
    grid = json.loads(run("sample", cache, "sample-0", "--json")[1])
    assert len(grid["grid"]) == len(LAYERS)
    assert {"entropy", "tail_mass", "gold_rank", "gold_logprob"} <= set(grid["grid"][0][0])
    assert set(grid["tokens"]) <= set(WORDS)
    cell = grid["grid"][-1][0]
    assert cell["words"][0] in WORDS
    rank = "#-" if cell["gold_rank"] is None else f"#{cell['gold_rank'] + 1}"
    assert f"{cell['entropy']:.2f}" in out
    assert rank in out
    code, out, err = run("sample", cache, "sample-00")
    assert (code, out) == (3, "")
    assert "did you mean" in err


def test_sample_of_some_layers_and_tokens(run: Any, cache: Path, tmp_path: Path) -> None:
    grid = json.loads(run("sample", cache, "sample-0", "--layers", "2,last", "--tokens", "1:3", "--json")[1])
    assert (grid["layers"], grid["positions"], len(grid["grid"]), len(grid["grid"][0])) == ([2, 4], [1, 2], 2, 2)
    out = run("sample", cache, "sample-0", "--layers", "2")[1]
    assert "last" not in out  # layer 2 is the last one shown, not the last one of the model
    for tokens, positions in {"2": [2], "2:": [2, 3], ":1": [0], " 0 : 2": [0, 1]}.items():
        found = json.loads(run("sample", cache, "sample-0", "--tokens", tokens, "--json")[1])["positions"]
        assert found[: len(positions)] == positions
    for words in (["--tokens", "3-4"], ["--tokens", "900:"], ["--tokens", ""], ["--layers", "9"]):
        code, out, err = run("sample", cache, "sample-0", *words)
        assert (code, out) == (2, "")
        assert words[1] in err
    half = write_cache(tmp_path / "half", num_written=1, every=2)
    grid = json.loads(run("sample", half, "sample-0", "--tokens", "1:5", "--json")[1])
    assert grid["positions"][:2] == [2, 4][: len(grid["positions"])]
    assert "1 of 2 parts" in run("sample", half, "sample-5")[2]


@pytest.mark.parametrize(("rows", "says"), [("top-p", "probability in %"), ("sampled", "share of the draws")])
def test_sample_of_other_rows(run: Any, tmp_path: Path, rows: str, says: str) -> None:
    other = write_cache(tmp_path / "other", rows=rows, texts=False)
    code, out, _ = run("sample", other, "sample-1", "--top", "9")
    assert code == 0
    assert says in out
    assert "words are token ids" in out
    grid = json.loads(run("sample", other, "sample-1", "--top", "9", "--json")[1])
    cells = [cell for line in grid["grid"] for cell in line]
    assert len({len(cell["ids"]) for cell in cells}) > 1
    assert all(min(cell["probs"]) > 0 for cell in cells)  # no padding
    assert cells[0]["words"][0] == f"#{cells[0]['ids'][0]}"


def test_stats(run: Any, cache: Path, tmp_path: Path) -> None:
    found = json.loads(run("stats", cache, "--parts", 1, "--json")[1])
    assert (found["parts"], [one["layer"] for one in found["layers"]]) == ([0], LAYERS)
    code, out, _ = run("stats", cache, "--parts", "0", "-o", tmp_path / "s.html")
    assert code == 0
    assert "KL to next" in out
    assert f"page: {tmp_path / 's.html'}" in out
    assert (tmp_path / "s.html").read_text().startswith("<!doctype html>")
    code, _, err = run("stats", write_cache(tmp_path / "empty", num_written=0))
    assert code == 3
    assert "nothing to measure" in err


def test_verify_and_repair(run: Any, cache: Path) -> None:
    code, out, _ = run("verify", cache, "--deep", "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)
    assert "nothing to repair" in run("repair", cache)[1]
    victim = next(path for path in (cache / "parts" / "000000.zarr" / "ids" / "c").rglob("0") if path.is_file())
    victim.write_bytes(victim.read_bytes()[:-1])
    code, out, _ = run("verify", cache)
    assert code == 1
    assert "vlsi-cache repair" in out
    code, out, _ = run("repair", cache, "--json")
    assert (code, json.loads(out)["missing_parts"]) == (0, [0])
    assert run("verify", cache / "nowhere")[0] == 3
    assert run("repair", cache / "nowhere")[0] == 3


def test_prune(run: Any, cache: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    code, out, _ = run("prune", cache, "-o", small, "--layers", "2-3,last", "--top-k", 3, "--dry-run", "--json")
    assert (code, json.loads(out)["layers"], small.exists()) == (0, [2, 3, 4], False)
    assert run("prune", cache, "-o", small, "--layers", "2-3,last", "--top-k", 3)[0] == 0
    facts = json.loads(run("inspect", small, "--json")[1])
    assert (facts["layers"], facts["top_k"]) == ([2, 3, 4], [3, 3, 3])
    for words in (["-o", small], ["-o", small, "--layers", "2-x"], ["-o", small, "--layers", "3-2,last"]):
        assert run("prune", cache, *words)[0] == 2


def test_prune_by_samples_and_tokens(run: Any, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("sample-0\nsample-1\nsample-4\n")
    small = tmp_path / "small"
    words = ["--samples", tmp_path / "ids.txt", "--where", "kind != 'count'", "--tokens", "top:0.5"]
    words += ["--min-kept-mass", 0.001, "--profile", "fast"]
    code, out, _ = run("prune", cache, "-o", small, *words, "--dry-run", "--json")
    facts = json.loads(out)
    assert (code, facts["num_samples"], facts["dry_run"]) == (0, 3, True)
    assert run("prune", cache, "-o", small, *words)[0] == 0
    facts = json.loads(run("inspect", small, "--json")[1])
    assert (facts["num_samples"], facts["parents"][0]["cuts"]["tokens"]) == (3, "top:0.5")
    assert run("verify", small, "--deep")[0] == 0
    code, _, err = run("prune", cache, "-o", small, "--where", "entropy > 99")
    assert (code, "nothing would be left of the 6 samples" in err) == (2, True)
    code, _, err = run("prune", cache, "-o", small, "--where", "__import__('os')")
    assert (code, "compare the columns id, kind" in err) == (2, True)
    assert run("prune", cache, "-o", small, "--top-k", 2)[0] == 3
    (tmp_path / "ids.txt").write_text("sample-9\n")
    assert run("prune", cache, "-o", small, "--samples", tmp_path / "ids.txt")[0] == 3


def test_merge_and_diff(run: Any, cache: Path, tmp_path: Path) -> None:
    for name, where in (("one", "part == 0"), ("other", "part == 1")):
        assert run("prune", cache, "-o", tmp_path / name, "--where", where)[0] == 0
    words = ["merge", tmp_path / "one", tmp_path / "other", "-o", tmp_path / "both"]
    code, out, _ = run(*words, "--dry-run", "--json")
    assert (code, json.loads(out)["num_samples"], (tmp_path / "both").exists()) == (0, 6, False)
    assert "6 samples in 2 parts" in run(*words, "--dry-run")[1]
    assert run(*words)[0] == 0
    assert run("verify", tmp_path / "both", "--deep")[0] == 0
    code, _, err = run("merge", tmp_path / "one", cache, "-o", tmp_path / "no")
    assert (code, "3 samples are in both" in err) == (2, True)
    assert run("merge", tmp_path / "one", "-o", tmp_path / "no")[0] == 2
    assert run("diff", cache, cache) == (0, "equal: 6 samples in both, the rows of 6 compared\n", "")
    code, out, _ = run("diff", cache, tmp_path / "both", "--samples", 4, "--json")
    facts = json.loads(out)
    assert (code, facts["equal"], facts["num_compared"], facts["only_a"]) == (1, False, 4, [])
    assert all(layer["max_dlogp"] == 0 for layer in facts["layers"])
    code, out, _ = run("diff", cache, tmp_path / "one")
    assert (code, "3 samples only in a" in out) == (1, True)
    assert run("diff", cache, tmp_path / "nowhere")[0] == 3


def test_report(run: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    code, out, _ = run("report", tmp_path / "run", "--json")
    assert code == 0
    assert Path(json.loads(out)["report"]).is_file()
    assert run("report", tmp_path)[0] == 3


def test_specs(run: Any) -> None:
    assert "demo" in [one["name"] for one in json.loads(run("specs", "--json")[1])]
    assert "demo" in run("specs")[1]


def test_the_folder_cannot_be_imported_under_its_own_name() -> None:
    root = Path(vc.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", "import cli"], cwd=root, capture_output=True, text=True)
    assert found.returncode == 1
    assert "vlsi_cache_cli" in found.stderr


def raising(error: BaseException) -> Any:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise error

    return fail


def record_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Put stand-ins for the stages in place; returns what each was called with."""
    calls: dict[str, tuple[Any, dict[str, Any]]] = {}
    cache = SimpleNamespace(path=tmp_path, num_samples=1, num_tokens=2, layers=[1, 2])
    evaluation = {"num_samples": 3, "exact_match": None, "perplexity": 1.2}
    answers = {"build_teacher": cache, "distill": tmp_path, "evaluate": evaluation}
    counts = {"written": 1, "generated": 2, "left_out": 1, "retokenised": 0}
    left_out = [{"id": "row-3", "reason": "the response is empty"}]
    answers["generate"] = {"path": "r.parquet", "counts": counts, "left_out": left_out}
    answers |= {"init_student": tmp_path, "train_verbalizers": tmp_path}
    for name, answer in answers.items():

        def stand_in(first: Any, _name: str = name, _answer: Any = answer, **options: Any) -> Any:
            calls[_name] = (first, options)
            return _answer

        monkeypatch.setitem(vars(vc), name, stand_in)
    assert load_spec("demo").name == "demo"
    return calls


def test_prune_suggests_layers_and_writes_nothing(run: Any, cache: Path, tmp_path: Path) -> None:
    code, out, _ = run("prune", cache, "--suggest", "--keep", 2)
    assert code == 0
    assert "what is left: --layers" in out
    code, out, _ = run("prune", cache, "--suggest", "--keep", 2, "--json")
    assert len(json.loads(out)["layers"]) == 2
    assert run("prune", cache, "--keep", 2, "-o", tmp_path / "new")[0] == 2
    code, _, err = run("prune", cache, "--layers", "last")
    assert (code, "-o NEW" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["caches"]


@pytest.mark.parametrize("name", ["my run", "a: b", "1e5", "it's", "null", "[x"])
def test_hints_can_be_pasted(name: str, tmp_path: Path, spec_file: Path) -> None:
    from vlsi_cache_cli.stages import _generated_text

    assert shlex.split(errors.command_line("repair", tmp_path / name)) == ["vlsi-cache", "repair", f"{tmp_path}/{name}"]
    data = vc.load_spec(spec_file).data
    result = {"path": name, "left_out": [], "media_root": f"/{name}"}
    result["counts"] = dict.fromkeys(("written", "generated", "retokenised", "left_out"), 0)
    words = shlex.split(_generated_text(result, data).split("use them with: ")[1])
    read = vc.load_spec(spec_file, overrides=[word for word in words if word != "--set"]).data
    assert (read.path, read.media_root) == (name, f"/{name}")


def test_one_odd_entry_does_not_end_a_listing(run: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    odd = {"a": ("ablation.json", "[]"), "b": ("demo.json", "{}"), "c": ("run.json", "[]"), "d": ("ablation.json", "{")}
    odd["f"] = ("demo.json", '{"cache": "c", "seeds": [0], "recipes": ["x"], "runs": {}}')
    odd["e"] = ("ablation.json", '{"tables": {"x": 1}}')
    for name, (file, text) in odd.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
        code, _, err = run("report", tmp_path / name)
        assert (code, err.count("\n")) == (3, 1), err
        assert file in err
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "run.json").symlink_to("nowhere")
    code, out, _ = run("ls", tmp_path, "--json")
    found = {Path(one["path"]).name: one["state"] for one in json.loads(out)}
    assert code == 0
    assert found.pop("good") == "done"
    assert set(found) == {*odd, "link"}
    assert set(found.values()) - {"0/0 runs"} == {"unreadable"}


def test_a_page_is_written_under_the_name_of_a_page(run: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    page, wrong = tmp_path / "m.html", tmp_path / "x.png"
    assert run("match", tmp_path / "run", "-o", page, "--png", page)[0] == 2
    for words in (("match", tmp_path / "run"), ("trace", tmp_path / "run", "--prompt", "a"), ("stats", tmp_path)):
        code, _, err = run(*words, "-o", wrong)
        assert code == 2
        assert "must end in .html" in err
    assert not page.exists()
    assert not wrong.exists()
