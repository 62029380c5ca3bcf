"""What all formats that are read have in common: sequences of tokens, each with distributions for its last ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from vlsi_cache.data.reading import content_id
from vlsi_cache.data.sources import Files

from .targets import TopK

Format = Literal["distillkit", "axolotl", "vllm"]


@dataclass(frozen=True)
class Sequence:
    """A sequence of another tool, for instance a conversation, and where its rows belong.

    `where` it stands, for messages; `key`, the id of its row in the data, and `token_ids` int64 [S] are None where the
    tool does not keep them. Row 0 is the distribution of token `first`; None: the last row is that of the last token of
    the whole conversation as the chat template writes it. `rows` unpacks all of them, given the tokens that stand
    there; `width` is their widest one and `least` their narrowest.
    """

    where: str
    num_rows: int
    width: int
    least: int
    rows: Callable[[np.ndarray], TopK]
    first: int | None = None
    key: str | None = None
    token_ids: np.ndarray | None = None


class Source(Protocol):
    """The files of one format. `rounding` is how far a mass may be off by the tool's own rounding; `knows_gold`: it
    says the log-prob of every token that followed; `has_messages`: its files are chat rows as well, beside `columns`;
    `facts` go into the fingerprint."""

    format: Format
    files: Files
    rounding: float
    knows_gold: bool
    has_messages: bool
    columns: tuple[str, ...]
    facts: dict[str, Any]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError when ids of this vocabulary cannot be in the files."""
        ...

    def sequences(self, start: int = 0) -> Iterator[Sequence]:
        """All of them in order, from number `start` on."""
        ...


def digest_of_files(paths: tuple[Path, ...]) -> list[str]:
    """What tells these files from others, by name and content."""
    return [f"{path.name} {content_id(path) or path.stat().st_size}" for path in paths]
