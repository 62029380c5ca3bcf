"""The structure: imports only run down, slow packages stay out of the way, nothing is unpickled, the README is true."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vlsi_cache"
# From the ground up. A room imports from rooms below it, never from one beside or above it.
FLOORS = [
    {"errors"},
    {"io", "progress", "shares"},
    {"interrupts", "processes", "run_files", "runtime"},
    {"config"},
    {"sparse"},
    {"data", "store"},
    {"models"},
    {"runs"},
    {"report"},
    {"train"},
    {"teacher"},
    {"evaluation", "exchange"},
    {"ablation"},
    {"demo"},
]


def floor_of(room: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if room in rooms)


def rooms_imported(file: Path) -> set[str]:
    """Top rooms of our package that a file imports, anywhere in it."""
    found = set()
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else ["vlsi_cache", *parts[: len(parts) - node.level]]
            full = [*base, *(node.module or "").split(".")]
            names = [[*full, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "vlsi_cache" and len(name) > 1}
        found |= {"cli" for name in names if name[0] in ("cli", "vlsi_cache_cli")}
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_only_run_down(file: Path) -> None:
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    known = {name for floor in FLOORS for name in floor}
    for other in rooms_imported(file) - {room}:
        assert other in known, f"{file.name} imports `{other}`"
        assert floor_of(other) < floor_of(room), f"{file.name}: `{room}` may not import `{other}`"


def test_an_installed_package_has_every_room() -> None:
    folders = {file.parent for base in (PACKAGE, ROOT / "cli") for file in base.rglob("*.py")}
    # The command line is installed under a name of its own.
    names = {".".join(folder.relative_to(ROOT).parts).replace("cli", "vlsi_cache_cli") for folder in folders}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == names | {"vlsi_cache.cache_specs"}  # specs, without code


@pytest.mark.parametrize("room", ["config", "store", "report"])
def test_rooms_without_torch(room: str) -> None:
    files = [f for f in (PACKAGE / room).rglob("*.py") if f.stem != "__init__"]
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, vlsi_cache; sys.exit(any(m in sys.modules for m in ('torch', 'zarr', 'pydantic', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_nothing_is_unpickled() -> None:
    """Nothing that comes from a file: a worker's pipe holds what the process that started it has put in."""
    forbidden = re.compile(r"\bpickle\b|torch\.load\(|allow_pickle=True|\bdill\b|joblib|marshal|weights_only=False")
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    assert [str(f) for f in files if forbidden.search(f.read_text(encoding="utf-8"))] == []


def test_every_public_name_resolves_and_is_documented() -> None:
    import vlsi_cache as vc

    for name in vc.__all__:
        assert getattr(vc, name).__doc__, name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vc.no_such_name
    assert vc.open is vc.open_cache
    assert "open" not in vc.__all__  # a star import would put it in the place of Python's


def test_shipped_specs_are_valid_and_hold_the_papers_numbers() -> None:
    import vlsi_cache as vc
    from vlsi_cache.config.spec import shipped_specs
    from vlsi_cache.models.backbone import default_layers

    qwen = ["qwen2-vl-72b-to-2b", "qwen2-vl-72b-to-7b"]
    onevision = ["llava-onevision-72b-to-0.5b", "llava-onevision-72b-to-7b"]
    assert set(shipped_specs()) == {"demo", "smollm2", *qwen, *onevision}
    for name in shipped_specs():
        spec = vc.load_spec(name)
        assert vc.CacheSpec.model_validate(yaml.safe_load(spec.model_dump_json())) == spec
    for name in (*qwen, *onevision):
        paper, is_qwen = vc.load_spec(name), name in qwen
        assert list(paper.teacher.layers) == (default_layers(80, 20) if is_qwen else default_layers(80, 4))
        num_layers = 24 if name.endswith("0.5b") else 28
        num_targets = 7 if is_qwen else 3
        theirs = default_layers(num_layers, num_targets, model_type="qwen2_vl" if is_qwen else "llava_onevision")
        assert list(paper.distill.layers) == theirs
        batches = (paper.distill.batch_size, paper.train_verbalizers.batch_size)
        assert batches == ((512, 256) if is_qwen else (256, 128))
        distill = paper.distill
        schedules = [distill.verbalize, distill.interact.schedule, distill.sft.schedule]
        for schedule in (paper.train_verbalizers.schedule, *schedules):
            assert (schedule.epochs, schedule.learning_rate, schedule.final_learning_rate) == (1, 1e-4, 1e-6)
        assert (distill.lora.rank, distill.lora.alpha) == (64, 64)


def test_readme_code_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_readme_names_every_command() -> None:
    import typer
    from vlsi_cache_cli.main import app

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert len(commands) > 10
    assert [c for c in commands if f"`{c}" not in text and f"vlsi-cache {c}" not in text] == []


# Libraries below us say with text alone what has happened.
READ_A_MESSAGE = {
    "io.py:is_disk_full": "safetensors and arrow give the number of the error in their text alone",
    "processes.py:is_of_a_connection": "gloo raises a plain RuntimeError when another process has ended",
    "models/save.py:mend_generation": "transformers names the settings that it refuses in its text alone",
    "store/remote/objects.py:_is_no_bucket": "obstore has no class for a missing bucket: its text has the status",
    "teacher/forward.py:is_out_of_memory": "torch raises a plain RuntimeError for the memory of the host",
}
SEARCHES = {"startswith", "endswith", "removeprefix", "removesuffix", "find", "index", "partition", "rpartition"}


def test_no_code_reads_the_message_of_an_error() -> None:
    found = {
        f"{file.relative_to(PACKAGE) if PACKAGE in file.parents else file.name}:{function.name}"
        for folder in (PACKAGE, ROOT / "cli")
        for file in folder.rglob("*.py")
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and reads_a_message(function)
    }
    assert found == set(READ_A_MESSAGE)


@pytest.mark.parametrize(
    "body",
    [
        "if 'run: ' in str(error): pass",
        "str(error).startswith('x')",
        "str(error).strip().split('; ')",
        "re.search('x', str(error))",
        "PATTERN.match(str(error))",
        "error.args[0].removeprefix('x')",
    ],
)
def test_the_check_of_messages_sees_them(body: str) -> None:
    code = f"def f():\n    try: pass\n    except OSError as error:\n        {body}"
    assert reads_a_message(ast.parse(code))
    assert not reads_a_message(ast.parse(code.replace(body, "' '.join(str(error).strip().split())")))


def reads_a_message(tree: ast.AST) -> bool:
    """Whether code looks for something in the text of an error: of one it has caught, or was given as `error`."""
    caught = {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name} | {"error"}

    def is_text(node: ast.AST) -> bool:
        """`str(error)` and `error.args`, also with methods behind them."""
        match node:
            case ast.Call(func=ast.Name("str" | "repr"), args=[ast.Name(name)]) | ast.Attribute(ast.Name(name), "args"):
                return name in caught
            case ast.Call(func=ast.Attribute(value=inner)) | ast.Subscript(value=inner):
                return is_text(inner)
        return False

    for node in ast.walk(tree):
        match node:
            case ast.Compare(ops=[ast.In() | ast.NotIn()], comparators=[text]) if is_text(text):
                return True
            case ast.Call(func=ast.Attribute(text, name), args=args) if is_text(text):
                if name in SEARCHES or (name in ("split", "rsplit") and args):
                    return True
            case ast.Call(func=ast.Attribute(), args=args) if any(map(is_text, args)):
                if node.func.attr in ("search", "match", "fullmatch", "findall", "finditer", "split", "sub"):
                    return True
    return False


def test_the_readme_s_tree_has_every_file_and_no_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("```\nvlsi_cache/\n")[1].split("\ncli/")[0]
    named = re.findall(r"^ +(\w+\.py)  ", tree, flags=re.MULTILINE)
    there = [file.name for file in PACKAGE.rglob("*.py") if file.name != "__init__.py" and file.parent.name != "derive"]
    assert sorted(named) == sorted(there)
