"""A text-only instruction set out of the running Python: what the parts of its standard library do.

Questions and answers come from the sources' docstrings, read with `ast`: nothing is imported or executed. The rows
are the same on every machine with one Python version; which split a row belongs to depends on its answer alone.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Of 256 values of the answer's digest, the range that belongs to the split.
SPLITS: dict[str, range] = {"heldout": range(32), "train": range(32, 256)}
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "pydoc_data"}
MIN_WORDS, MAX_WORDS = 4, 80
MAX_SIGNATURE = 120

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Entry:
    """One documented name of the standard library."""

    name: str
    kind: str
    question: str
    answer: str


def rows(
    *, split: str, num_samples: int | None = None, seed: int = 0, modules: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Chat rows of `split` ("train" or "heldout") in an order drawn from `seed`; all of them if no number is given.

    `modules` are top-level names such as "textwrap" or "json". Raises ValueError for an unknown split or module, and
    for more samples than there are.
    """
    if split not in SPLITS:
        raise ValueError(f"split is `{split}`, must be one of {', '.join(SPLITS)}")
    chosen = [entry for entry in entries(modules and tuple(modules)) if _digest(entry.answer)[0] in SPLITS[split]]
    if num_samples is not None and num_samples > len(chosen):
        raise ValueError(f"num_samples is {num_samples}, split `{split}` of this Python has {len(chosen)} rows")
    chosen.sort(key=lambda entry: _digest(f"{seed} {entry.name}"))
    for entry in chosen[:num_samples]:
        messages = [{"role": "user", "content": entry.question}, {"role": "assistant", "content": entry.answer}]
        yield {"id": entry.name, "kind": entry.kind, "messages": messages}


@cache
def entries(modules: tuple[str, ...] | None = None) -> tuple[Entry, ...]:
    """All entries in the order of their files; no name, question or answer comes twice."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    kept = []
    for file in _files(root, modules):
        for entry in _file_entries(file, ".".join(_names(file.relative_to(root)))):
            keys = {f"name {entry.name}", f"asks {entry.question}", f"says {entry.answer.casefold().rstrip('.')}"}
            if not keys & seen:
                kept.append(entry)
                seen |= keys
    return tuple(kept)


def _files(root: Path, modules: tuple[str, ...] | None) -> list[Path]:
    tops = {
        path.stem: path for path in sorted(root.iterdir()) if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    tops = {name: path for name, path in tops.items() if name.isidentifier() and _is_public(name)}
    unknown = [name for name in modules or () if name not in tops]
    if unknown:
        raise ValueError(f"no module `{unknown[0]}` in the standard library's sources at {root}")
    found = []
    for name in modules or tops:
        found += sorted(tops[name].rglob("*.py")) if tops[name].is_dir() else [tops[name]]
    return [file for file in found if all(_is_public(name) for name in _names(file.relative_to(root)))]


def _is_public(name: str) -> bool:
    return not name.startswith("_") and name not in SKIPPED


def _names(path: Path) -> list[str]:
    """The packages and the module that a file is: `json/__init__.py` is `json`."""
    names = [*path.parts[:-1], path.stem]
    return names[:-1] if path.stem == "__init__" else names


def _file_entries(file: Path, module: str) -> Iterator[Entry]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    yield from _entry(tree, module, "module", f"What is the module `{module}` of the Python standard library for?")
    yield from _body_entries(tree.body, module, in_class=False)


def _body_entries(body: list[ast.stmt], prefix: str, *, in_class: bool) -> Iterator[Entry]:
    for node in body:
        if not isinstance(node, _Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if isinstance(node, ast.ClassDef):
            question = f"What is the class `{name}` of the Python standard library?"
            yield from _entry(node, name, "class", question)
            yield from _body_entries(node.body, name, in_class=True)
        else:
            call = f"{name}({_signature(node, in_class=in_class)})"
            question = f"What does `{call}` of the Python standard library do?"
            if len(call) <= MAX_SIGNATURE:
                yield from _entry(node, name, "method" if in_class else "function", question)


def _entry(node: ast.Module | ast.ClassDef | _Function, name: str, kind: str, question: str) -> Iterator[Entry]:
    paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
    answer = " ".join(paragraph.split())
    if ">>>" not in answer and MIN_WORDS <= len(answer.split()) <= MAX_WORDS:
        yield Entry(name, kind, question, answer)


def _signature(node: _Function, *, in_class: bool) -> str:
    """The parameters as in the source, without annotations and without `self`."""
    arguments = node.args
    static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    if in_class and not static:
        first = arguments.posonlyargs or arguments.args
        if first and len(arguments.defaults) < len(arguments.posonlyargs) + len(arguments.args):
            first.pop(0)
    return ast.unparse(arguments)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
