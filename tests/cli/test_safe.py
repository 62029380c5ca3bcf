"""What data hold never steers the terminal; and options that would do nothing are refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.fakes import write_cache
from vlsi_cache_cli.output import Answer, run_guarded

import vlsi_cache as vc
from vlsi_cache.errors import DataError
from vlsi_cache.progress import html_text, printable
from vlsi_cache.report.pages import write_report
from vlsi_cache.store.format import sealed_json

NASTY = "\x1b[31m\x1b]0;title\x07\x9b2J\u202egnp\r\n<b>"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    """A cache whose samples' kinds are codes for a terminal."""
    root = write_cache(tmp_path / "nasty\x1b[2J" / "cache", skipped=1)
    for file in root.glob("parts/*/part.json"):
        record = json.loads(file.read_text())
        record.pop("xxh3")
        record["kinds"] = [NASTY] * len(record["kinds"])
        file.write_bytes(sealed_json(record))
    (root / "samples.parquet").unlink()
    return root


def test_codes_in_data_never_reach_the_terminal(run: Any, nasty: Path) -> None:
    sample = next(iter(vc.open(nasty)))
    shown = 0
    for words in (
        ("sample", nasty, sample),
        ("sample", nasty, f"{sample}\x1b[1m"),
        ("inspect", nasty),
        ("ls", nasty.parent.parent),
        ("stats", nasty),
        ("verify", nasty),
        ("diff", nasty, nasty),
        ("prune", nasty, "-o", "x", "--where", "kind == '\x1b['", "--dry-run"),
        ("plan", "no\x1b[spec"),
        ("plan", "demo", "--set", "rows.\x1b[=1"),
        ("match", f"{nasty}\x9b"),
        ("sample", nasty, sample, "--\x1b[x"),
    ):
        _, out, err = run(*words)
        assert not UNSAFE.search(out + err), words
        shown += "\\x1b[" in out + err
        _, out, err = run(*words, "--json")
        assert not UNSAFE.search(out + err), words
        if out:
            json.loads(out)
    assert shown > 8  # they are written out, not left out
    kind = json.loads(run("sample", nasty, sample, "--json")[1])["kind"]
    assert kind == NASTY  # JSON has the text itself
    html = write_report(nasty).read_text()
    assert not UNSAFE.search(html)


def test_messages_of_libraries_and_of_stages_are_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    from vlsi_cache.progress import say

    def work() -> Answer:
        warnings.simplefilter("always")
        say(f"reading {NASTY}")
        warnings.warn(f"odd {NASTY}", UserWarning, stacklevel=1)
        raise DataError(f"row {NASTY}")

    assert run_guarded(work, as_json=False, quiet=False, verbose=False) == 2
    err = capsys.readouterr().err
    assert not UNSAFE.search(err)
    assert err.count("\\x1b[31m\\x1b]0;title\\x07\\x9b2J\\u202egnp\\x0d") == 3


def test_text_that_is_no_code_stays() -> None:
    text = "caf\u00e9 \u4f60\u597d \U0001f600 e\u0301 a\tb\nc"
    assert printable(text) == text
    assert printable("a\nb\ud800\u2028", keep="") == "a\\x0ab\\ud800\\u2028"
    assert html_text("<\x1b>") == "&lt;\\x1b&gt;"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("prune", "CACHE", "--suggest", "-o", "x"),
            "writes nothing, so --out would",
        ),
        (("prune", "CACHE", "--suggest", "--layers", "last", "--dry-run"), "so --dry-run, --layers would do nothing"),
        (
            ("build-teacher", "demo", "-o", "x", "--device", "cpu", "--set", "run.device=cpu"),
            "--device and",
        ),
        (("build-teacher", "demo", "-o", "x", "--kernels", "eager", "--set", "run.kernels=auto"), "say the same"),
        (("distill", "CACHE", "-o", "x", "--recipe", "sft", "--set", "distill.recipe=sft"), "--recipe and --set"),
        (
            ("generate", "demo", "-o", "x.parquet", "--limit", "3", "--set", "data.limit=2"),
            "--limit and",
        ),
        (("generate", "demo", "-o", "x.parquet", "--seed", "3"), "`seed` 3 belongs to sampling"),
        (("train-verbalizers", "demo", "-o", "x", "--rank", "1"), "rank 1 of 1"),
        (("build-teacher", "demo", "-o", "x", "--rank", "2"), "rank 2 of 1"),
        (("plan", "demo", "--set", "rows.num_draws=50"), "`rows.num_draws` does nothing"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "CACHE" in words:
        write_cache(tmp_path / "c")
    code, out, err = run(*("c" if word == "CACHE" else word for word in words))
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "x").exists()


def test_a_notebook_shows_a_cache_escaped(nasty: Path) -> None:
    html = vc.open(nasty)._repr_html_()
    assert html.startswith("<table><tr><th>cache</th><td>")
    assert not UNSAFE.search(html)
    assert "nasty\\x1b[2J" in html
    assert len(html) < 2000
    facts = dict(re.findall(r"<th>(.*?)</th><td>(.*?)</td>", html))
    assert facts["samples"] == str(len(vc.open(nasty)))
    assert facts["layers"].endswith("last")


def test_pixel_limits_of_a_student_are_not_replaced_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    from vlsi_cache.config.sections import DataSpec
    from vlsi_cache.models.load import resolve_model
    from vlsi_cache.train.fitting import say_pixels

    path = resolve_model("package:vlsi_cache/demo/teacher")
    own = json.loads((Path(path) / "preprocessor_config.json").read_text())["size"]["longest_edge"]
    for named, said in (
        (own * 2, f"`data.max_pixels` {own * 2} takes the place of the student's own, {own}"),
        (own, ""),
    ):
        say_pixels(DataSpec(path="rows.jsonl", max_pixels=named), path)
        err = capsys.readouterr().err
        assert said in err
        assert bool(said) == bool(err)
    say_pixels(DataSpec(path="rows.jsonl"), path)
    assert not capsys.readouterr().err
