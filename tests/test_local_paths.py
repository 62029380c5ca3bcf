"""A URL where only a path is taken is one clear error, and no folder named `s3:` comes to be."""

import sys
from pathlib import Path
from typing import Any

import pytest
from vlsi_cache_cli.main import main

import vlsi_cache as vc
from vlsi_cache.errors import SpecError
from vlsi_cache.io import url_problem

URLS = ["s3://bucket/c", "gs://bucket/c", "http://host/c", "https://host/c", "hf://datasets/a/b", "file:///tmp/c"]


@pytest.mark.parametrize("url", URLS)
def test_what_is_a_url(url: str) -> None:
    assert "only local paths are supported" in url_problem(url, "cache")
    assert "only local paths are supported" in url_problem(Path(url), "cache")


@pytest.mark.parametrize("path", ["/tmp/c", "c", "./s3:/c", "org/name", "package:name/x", "C:/c", "", None, 7])
def test_what_is_none(path: Any) -> None:
    assert url_problem(path, "cache") == ""


def calls(url: str) -> dict[str, Any]:
    """Every way into the library that takes a path."""
    spec = vc.load_spec("demo")
    return {
        "train": lambda: vc.train_verbalizers(spec, out=url),
        "generate": lambda: vc.generate(spec, out=f"{url}.parquet"),
        "distill": lambda: vc.distill("cache", out=url),
        "evaluate": lambda: vc.evaluate(url),
        "ablate": lambda: vc.ablate(spec, axes=["loss"], out=url),
        "init": lambda: vc.init_student("model", "0", url),
        "init from": lambda: vc.init_student(url, "0", "out"),
        "match": lambda: vc.match(url),
        "spec": lambda: vc.load_spec(f"{url}.yaml"),
        "set": lambda: vc.load_spec("demo", overrides=[f"teacher.model={url}"]),
    }


@pytest.mark.parametrize("name", calls("s3://bucket/c"))
def test_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=r"`.*s3://bucket/c.*` is a URL \(s3\), and only local paths are supported"):
        calls("s3://bucket/c")[name]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["data: {path: URL}", "teacher: {model: URL}", "data: {media_root: URL, path: x}"])
def test_a_spec(tmp_path: Path, key: str) -> None:
    (tmp_path / "spec.yaml").write_text(f"name: x\n{key.replace('URL', 's3://bucket/c')}\n")
    with pytest.raises(SpecError, match=r"`s3://bucket/c` is a URL \(s3\)"):
        vc.load_spec(tmp_path / "spec.yaml")


@pytest.mark.parametrize(
    "words",
    [["inspect", "URL"], ["ls", "URL"], ["diff", "URL", "b"], ["merge", "URL", "b", "-o", "c"], ["match", "URL"]],
)
def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vlsi-cache", *(word.replace("URL", "http://a/b") for word in words)])
    assert main() == 2
    assert "is a URL (http), and only local paths are supported" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
