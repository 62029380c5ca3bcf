"""Text from data, models and file names, made safe for a terminal and a page.

A sample's kind or a token may hold codes that colour, move or rename a terminal, or turn the direction of the text.
"""

import html
import re

__all__ = ["UNSAFE", "html_text", "printable"]

# C0 and C1 controls, marks that turn the direction, line and paragraph separators, halves of surrogate pairs.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, keep: str = "\n\t") -> str:
    """`text` with everything unsafe but `keep` written out: `\\x1b`, `\\u202e`."""
    return UNSAFE.sub(lambda found: found[0] if found[0] in keep else _written(found[0]), text)


def html_text(text: str) -> str:
    """`text` for a page; controls are no characters of HTML and are written out."""
    return html.escape(printable(text))


def _written(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}"
