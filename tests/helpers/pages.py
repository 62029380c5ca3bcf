"""Reports: numbers against small oracles, figures and pages that need nothing outside themselves."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from vlsi_cache.report.pages import run_page
from vlsi_cache.runs.metrics import RunFiles

VOID = {"meta", "img", "br", "link", "input", "path", "use", "rect"}


class Checker(HTMLParser):
    """Collects what a page refers to, its ids, and whether its tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.refs: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.refs += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def checked(file: Path, *, num_figures: int) -> str:
    """The page, after checking that it is whole, refers to nothing outside, and holds its figures."""
    html = file.read_text()
    page = Checker(html)
    assert page.open == []
    assert all(ref.startswith(("#", "data:")) for ref in page.refs)
    assert {ref[1:] for ref in page.refs if ref.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert page.tags.count("svg") == num_figures
    assert "<script" not in html
    # Figures shrink with the window and are no wider than the column; tables scroll in a box of their own.
    figures = re.findall(r"<svg[^>]*>", html)
    assert all("viewBox=" in one for one in figures)
    widths = [int(one) for one in re.findall(r'<svg[^>]*style="width: (\d+)px"', html)]
    assert len(widths) == len(figures)
    assert max(widths, default=0) <= 62 * 16 - 2 * 1.2 * 16
    assert "max-width: 100%" in html
    assert html.count("<table") == html.count('<div class="scroll"><table')
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", html)
    return html


def evaluation_page(result: dict[str, Any]) -> str:
    """The page of a run that has logged nothing and was evaluated with this result."""
    return run_page(RunFiles(Path("run"), {"kind": "distill", "status": "done"}, [], result))
