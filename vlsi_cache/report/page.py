"""The page around a report: one HTML file with everything inside, for dark and light, wide and narrow."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlsi_cache.errors import SpecError
from vlsi_cache.io import check_file, refuse_url, write_atomically
from vlsi_cache.progress import html_text as escape

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEAD_BYTES = 4096
OPENING = b":root { color-scheme: light dark; --paper: #ffffff;"  # of the style of every page that we have written
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --muted: #59636e; --line: #d8dee4;
  --soft: #f6f8fa; --accent: #3d7fd6; --warm: #dd8a2c; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --ink: #e3e7ec; --muted: #98a2ad; --line: #343b44;
  --soft: #1b2027; --accent: #5b97e5; --warm: #e09a46; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1, h2, p, figcaption, .tile { overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.8rem 0 .5rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.lead, .note, figcaption { color: var(--muted); }
.note, figcaption { font-size: .88rem; }
.warning { border-left: 4px solid var(--warm); background: var(--soft); padding: .55rem .9rem; }
.scroll { overflow-x: auto; margin: .9rem 0; }
svg { display: block; height: auto; max-width: 100%; }
figure { margin: 1.2rem 0; }
figcaption { max-width: 46rem; margin-top: .35rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .85rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--muted); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.strong td { font-weight: 650; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; }
.tile { flex: 1 1 9rem; background: var(--soft); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-weight: 650; }
.tile span { color: var(--muted); font-size: .85rem; }
.example { display: flex; flex-wrap: wrap; gap: 1.3rem; align-items: flex-start; }
.example img { width: 12rem; image-rendering: pixelated; border: 1px solid var(--line); border-radius: 6px;
  background: #fff; }
.example dl { margin: 0; flex: 1 1 16rem; }
dt { color: var(--muted); font-size: .85rem; }
dd { margin: 0 0 .7rem; overflow-wrap: anywhere; }
.grid td { text-align: center; padding: .32rem .5rem; min-width: 3.9rem; border: 2px solid var(--paper);
  border-radius: 5px; background: color-mix(in srgb, var(--accent) calc(var(--p) * 62%), var(--soft)); }
.grid td small { display: block; color: var(--ink); opacity: .72; font-size: .72rem; line-height: 1.1; }
.grid td.gold { box-shadow: inset 0 0 0 2px var(--warm); }
.grid th { border: 0; padding: .32rem .5rem; text-align: center; font-family: ui-monospace, monospace; }
.grid th:first-child { text-align: right; font-family: inherit; font-weight: 400; }
.grid .word { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre; }
.said th { text-align: right; font-weight: 400; }
.said th:last-child { text-align: left; }
.said td:last-child { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.said span { border-radius: 3px; padding: .08rem 0;
  background: color-mix(in srgb, var(--accent) calc(var(--p) * 62%), var(--soft)); }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  overflow-x: auto; font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .9em; }
summary { cursor: pointer; color: var(--muted); margin: .6rem 0; }
"""


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """The whole document; `title` and `lead` are text, `sections` are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n' + "\n".join(sections) + "\n</main>\n"
        "</body>\n</html>\n"
    )


def write_page(file: Path, html: str) -> Path:
    """Write one self-contained HTML document; returns the file."""
    check_page_name(file)
    return write_file(file, html.encode())


def check_page_name(file: Path | None) -> None:
    """Raise SpecError for a name that is none of a page."""
    refuse_url(file, "page")
    if file is not None and file.suffix.lower() not in (".html", ".htm"):
        raise SpecError(f"{file} is to be a page: its name must end in .html")


def check_page(file: Path | None) -> None:
    """The same, and for a place where no page can go: SpecError also for a page that is none of ours."""
    check_page_name(file)
    if file is None:
        return
    check_file(file)
    if file.exists() and OPENING not in file.read_bytes()[:HEAD_BYTES]:
        raise SpecError(f"{file} exists and is no page of vlsi-cache; choose another name with -o, or move it away")


def check_picture(file: Path | None) -> None:
    """Raise SpecError for a name that is none of a PNG file, or a place where none can go."""
    if file is None:
        return
    if file.suffix.lower() != ".png":
        raise SpecError(f"{file} is to be a picture: its name must end in .png")
    check_file(file)
    if file.exists() and not file.read_bytes().startswith(PNG_SIGNATURE):
        raise SpecError(f"{file} exists and is no PNG file; choose another name, or move it away")


def write_file(file: Path, content: bytes) -> Path:
    """Write a file that is there whole or not at all; returns it. Raises SpecError where there is a folder."""
    if file.is_dir():
        raise SpecError(f"{file} is a folder; name a file")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)
    return file


def section(title: str, *parts: str) -> str:
    """A heading and HTML under it; nothing at all when there is nothing under it."""
    shown = [part for part in parts if part]
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(shown) + "\n</section>" if shown else ""


def paragraph(text: str, *, note: bool = False) -> str:
    return f"<p{' class=note' if note else ''}>{escape(text)}</p>" if text else ""


def warning(text: str) -> str:
    return f'<p class="warning">{escape(text)}</p>' if text else ""


def figure(svg: str, caption: str) -> str:
    return f'<figure><div class="scroll">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def html_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, strong: str | None = None) -> str:
    """A table of text; the row whose first cell is `strong` is set in bold."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headers)
    lines = [_row(row, strong=bool(row) and row[0] == strong) for row in rows]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def facts_table(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values, without a head; lines without a value are left out."""
    shown = [(name, value) for name, value in facts if value]
    lines = "".join(
        f"<tr><td>{escape(name)}</td><td style='text-align: left'>{escape(v)}</td></tr>" for name, v in shown
    )
    return f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>' if lines else ""


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """A line of large numbers, each with what it is."""
    shown = "".join(f'<div class="tile"><b>{escape(n)}</b><span>{escape(what)}</span></div>' for n, what in items)
    return f'<div class="tiles">{shown}</div>'


def details(summary: str, text: str) -> str:
    """Long text that is opened on a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>" if text else ""


def spec_details(spec: Any) -> str:
    """A resolved spec as YAML, opened on a click."""
    return details("the resolved spec", yaml.safe_dump(spec, sort_keys=False, allow_unicode=True) if spec else "")


def _row(cells: Sequence[str], *, strong: bool) -> str:
    return f"<tr{' class=strong' if strong else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
