"""A page or a picture as a file: templates filled with texts that nobody can trust, and names that are checked first.

Every page is one file with everything inside, so that it needs no network. jinja2 is imported when a page is written.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlsi_cache.errors import SpecError
from vlsi_cache.io import check_file, refuse_url, write_atomically
from vlsi_cache.progress import human_bytes, human_seconds, printable

from .example import visible
from .text import percent

if TYPE_CHECKING:
    from jinja2 import Environment

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEAD_BYTES = 4096
OPENING = b":root { color-scheme: light dark; --paper: #ffffff;"  # of the style of every page that we have written


def render(template: str, **content: Any) -> str:
    """A page from its template; the title, the first line (`lead`) and what the template asks for are in `content`."""
    return _templates().get_template(template).render(content)


@cache
def _templates() -> "Environment":
    """The templates. Users' texts are escaped and their control characters written out; what is missing is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    templates = Environment(
        loader=PackageLoader("vlsi_cache.report"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "bytes": human_bytes,
        "percent": percent,
        "seconds": human_seconds,
        "sentence": lambda text: text[0].upper() + text[1:],
        "visible": visible,
        "yaml": _yaml,
    }
    return templates


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def write_page(file: Path, html: str) -> Path:
    """Write one self-contained HTML document; returns the file."""
    _check_page_name(file)
    return write_file(file, html.encode())


def check_page(file: Path | None) -> None:
    """Raise SpecError for a name that is none of a page, or a place where none can go or where one is not ours."""
    if file is None:
        return
    _check_page_name(file)
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


def _check_page_name(file: Path) -> None:
    refuse_url(file, "page")
    if file.suffix.lower() not in (".html", ".htm"):
        raise SpecError(f"{file} is to be a page: its name must end in .html")


def write_file(file: Path, content: bytes) -> Path:
    """Write a file that is there whole or not at all; returns it. Raises SpecError where there is a folder."""
    if file.is_dir():
        raise SpecError(f"{file} is a folder; name a file")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)
    return file
