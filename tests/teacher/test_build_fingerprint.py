"""A build goes on only with what the cache was made from: any one thing changed is refused, with both values."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import make_rows, save_model, write_jsonl, write_spec
from helpers.tokenizers import save_qwen, tiny_tokenizer
from safetensors.torch import load_file, save_file

import vlsi_cache as vc
from vlsi_cache.config.sections import Encoding
from vlsi_cache.data.encoder import load_encoder
from vlsi_cache.errors import FingerprintMismatchError
from vlsi_cache.io import checksum
from vlsi_cache.store.header import differences
from vlsi_cache.teacher import build
from vlsi_cache.teacher.build import build_teacher, fingerprint
from vlsi_cache.teacher.inputs import open_teacher_inputs
from vlsi_cache.teacher.verbalize import train_verbalizers

NUM_ROWS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teacher, verbalizers, rows, spec and the cache of all that."""
    folder = tmp_path_factory.mktemp("made")
    teacher = save_model(folder / "teacher", num_layers=5, hidden=32, seed=1)
    spec_file = write_spec(folder, teacher, num_rows=NUM_ROWS)
    spec = vc.load_spec(spec_file, overrides=["train_verbalizers.schedule.steps=1"])
    verbalizers = train_verbalizers(spec, out=folder / "run") / "verbalizers"
    verbalizers.rename(folder / "verbalizers")
    build_teacher(load(folder), out=folder / "cache")
    return folder


@pytest.fixture
def there(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change things in; no teacher is ever loaded for a cache that is refused or finished."""
    monkeypatch.setattr(build, "load_teacher", None)
    return Path(shutil.copytree(made, tmp_path / "there"))


def load(folder: Path, *overrides: str) -> vc.CacheSpec:
    where = [f"teacher.model={folder / 'teacher'}", f"teacher.verbalizers={folder / 'verbalizers'}"]
    return vc.load_spec(folder / "spec.yaml", overrides=[*where, *overrides])


def refused(folder: Path, *overrides: str) -> str:
    """The message of the refusal; the cache is untouched."""
    root = folder / "cache"
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in root.rglob("*") if file.is_file()}
    with pytest.raises(FingerprintMismatchError) as error:
        build_teacher(load(folder, *overrides), out=root)
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in root.rglob("*") if f.is_file()} == before
    return str(error.value)


SETTINGS = [
    ("rows.top_k=9", "rows.top_k", "8", "9"),
    ("rows.top_k=[8,8,8,8,7]", "rows.top_k", "8", "[8, 8, 8, 8, 7]"),
    ("rows.top_p=0.5", "rows.top_p", "null", "0.5"),
    ("rows.kind=sampled", "rows.kind", '"top-k"', '"sampled"'),
    ("rows.tail_samples=2", "rows.tail_samples", "3", "2"),
    ("rows.taus=[1.0]", "rows.taus", "[1.0, 2.0]", "[1.0]"),
    ("rows.seed=5", "rows.seed", "0", "5"),
    ("rows.select_tokens.random=0.5", "rows.select_tokens", '"random": null', '"random": 0.5'),
    ("rows.select_tokens.entropy_above=1.0", "rows.select_tokens", '"entropy_above": null', '"entropy_above": 1.0'),
    ("store.profile=exact", "store.profile", '"default"', '"exact"'),
    ("store.part_mib=0.04", "store.part_mib", "0.02", "0.04"),
    ("teacher.dtype=bfloat16", "teacher.dtype", '"float32"', '"bfloat16"'),
    ("teacher.layers=[1,2,3]", "layers", "[1, 2, 3, 4, 5]", "[1, 2, 3, 5]"),
    ("data.limit=11", "data.num_samples", "12", "11"),
    ("data.max_length=65", "data.max_length", "64", "65"),
]


@pytest.mark.parametrize(("override", "field", "old", "new"), SETTINGS, ids=[one[0] for one in SETTINGS])
def test_one_setting(there: Path, override: str, field: str, old: str, new: str) -> None:
    line = next(line for line in refused(there, override).splitlines() if f"`{field}`" in line)
    assert re.search(rf"the cache has .*{re.escape(old)}.*, this run has .*{re.escape(new)}", line), line


def reverse_rows(folder: Path) -> None:
    write_jsonl(folder / "rows.jsonl", make_rows(NUM_ROWS)[::-1])


def one_letter(folder: Path) -> None:
    rows: list[Any] = make_rows(NUM_ROWS)
    rows[3]["messages"][0]["content"] += "."
    write_jsonl(folder / "rows.jsonl", rows)


def chat_template(folder: Path) -> None:
    file = folder / "teacher" / "chat_template.jinja"
    file.write_text("start\n" + file.read_text())


def head_weight(folder: Path) -> None:
    file = folder / "teacher" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][7, 3] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def tokenizer_map(folder: Path) -> None:
    file = folder / "teacher" / "tokenizer.json"
    value = json.loads(file.read_text())
    vocab = value["model"]["vocab"]
    one, two = list(vocab)[-2:]  # two merged words change places
    vocab[one], vocab[two] = vocab[two], vocab[one]
    file.write_text(json.dumps(value))


def verbalizer(folder: Path) -> None:
    file = folder / "verbalizers" / "layer_0003.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    record = folder / "verbalizers" / "verbalizers.json"  # other verbalizers, not damaged ones
    whole = json.loads(record.read_text())
    whole["files"][file.name] = checksum(file)
    record.write_text(json.dumps(whole))


CONTENT = [
    (reverse_rows, "data.content"),
    (one_letter, "data.content"),
    (chat_template, "encoder.chat_template"),
    (head_weight, "teacher.weights"),
    (tokenizer_map, "encoder.tokenizer"),
    (verbalizer, "verbalizer.3"),
]


@pytest.mark.parametrize(("change", "field"), CONTENT, ids=[one[0].__name__ for one in CONTENT])
def test_one_file(there: Path, change: Callable[[Path], None], field: str) -> None:
    # The verbalizers know their teacher, so a fingerprint is taken from what is there, before any of them is loaded.
    old = fingerprint(open_teacher_inputs(load(there)))[field]
    change(there)
    new = fingerprint(open_teacher_inputs(load(there)))[field]
    assert old != new
    message = refused(there)
    assert f"`{field}`: the cache has {json.dumps(old)}, this run has {json.dumps(new)}" in message
    assert message.count("the cache has") == 1 or field in ("encoder.tokenizer", "encoder.chat_template"), message


def test_the_pixel_budget(tmp_path: Path) -> None:
    """Through the encoder's own fingerprint, which the build takes over field by field."""
    folder = str(save_qwen(tmp_path, tiny_tokenizer()))
    budgets: tuple[dict[str, int], ...] = ({}, {"min_pixels": 300}, {"max_pixels": 3000})
    plain, small, large = (load_encoder(folder, Encoding(**budget)).fingerprint() for budget in budgets)
    for other, field in ((small, "min_pixels"), (large, "max_pixels")):
        lines = [line for line in differences(plain, other) if f"`{field}`" in line]
        assert lines == [f"`{field}`: the cache has {plain[field]}, this run has {other[field]}"]


def test_where_it_runs_is_no_setting(there: Path) -> None:
    """Neither `run:`, nor where the files lie, nor what students make of the cache later."""
    run = ("run.batch_tokens=64", "run.batch_tokens=auto", "run.kernels=compiled", "run.device=cuda:7")
    for override in (*run, "name=other", "distill.seed=9"):
        build_teacher(load(there, override), out=there / "cache")


def test_two_configurations_cannot_share_the_rest_of_a_build(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a build that is not finished refuses, so a resumed one cannot hold parts of both."""
    parts = sorted((there / "cache" / "parts").iterdir())
    assert len(parts) > 1
    shutil.rmtree(parts[-1])
    assert "`rows.seed`: the cache has 0, this run has 1" in refused(there, "rows.seed=1")
    monkeypatch.undo()
    build_teacher(load(there), out=there / "cache")
    assert vc.open(there / "cache").verify(deep=True).ok
