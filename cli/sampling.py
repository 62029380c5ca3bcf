"""The table of one sample: response tokens down, layers across."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlsi_cache.errors import SpecError
from vlsi_cache.layer_names import parse_layers
from vlsi_cache.printable import printable

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

CELL_WIDTH = 17  # characters of a layer's column, its padding included
TOKEN_WIDTH = 22
WORD_WIDTH = 9


def sample_grid(path: Path, sample_id: str, *, top: int, layers: str | None, tokens: str | None) -> dict[str, Any]:
    """JSON-ready: the sample's tokens and what the layers say, see report.example.grid_of."""
    from vlsi_cache.report.example import grid_of
    from vlsi_cache.store.reader import open

    cache = open(path, allow_incomplete=True)
    chosen = None if layers is None else parse_layers(layers)
    numbers = [cache.layers[index] for index in cache.header.layer_indices(chosen)]
    row = cache.row(sample_id, chosen)
    shown = slice(None) if tokens is None else _rows_at(row.positions_T, tokens, sample_id)
    return {
        "id": row.sample_id,
        "kind": row.kind,
        "row_kind": cache.header.row_kind,
        "final_layer": cache.layers[-1],
        "has_texts": cache.header.text_xxh3 is not None,
        "num_response_tokens": len(row.response_ids_R),
        **grid_of(row, layers=numbers, text=cache.token_text, top=top, tokens=shown),
    }


def _rows_at(positions_T: "np.ndarray", tokens: str, sample_id: str) -> slice:
    """The rows of response tokens A to B - 1, from `A:B`, `A:`, `:B` or `A`."""
    first, colon, last = (part.strip() for part in tokens.partition(":"))
    if not all(part.isdecimal() or (colon and not part) for part in (first, last or first)):
        raise SpecError(f"--tokens {tokens}: write A:B with response token numbers from 0, for instance 0:20")
    start = int(first or 0)
    stop = int(last) if last else (None if colon else start + 1)
    low = int(positions_T.searchsorted(start))
    high = len(positions_T) if stop is None else int(positions_T.searchsorted(stop))
    if low >= high:
        known = f"{positions_T[0]} to {positions_T[-1]}" if len(positions_T) else "none"
        raise SpecError(f"--tokens {tokens}: sample {sample_id!r} has no rows there; its response tokens are {known}")
    return slice(low, high)


def grid_text(grid: dict[str, Any]) -> str:
    """As many layers side by side as the terminal is wide; the rest below."""
    from rich.console import Console

    width = shutil.get_terminal_size((120, 24)).columns
    per_block = max(1, (width - TOKEN_WIDTH) // CELL_WIDTH)
    # the text goes to stdout, while whatever is printed now goes to stderr
    terminal = sys.__stdout__ is not None and sys.__stdout__.isatty()
    console = Console(width=width, highlight=False, force_terminal=terminal)
    with console.capture() as captured:
        for line in _head(grid):
            console.print(line, markup=False)
        for start in range(0, len(grid["layers"]), per_block):
            console.print(_block(grid, start, min(start + per_block, len(grid["layers"]))))
    return captured.get().rstrip()


def _head(grid: dict[str, Any]) -> list[str]:
    kind = f" ({grid['kind']})" if grid["kind"] else ""
    counts = f"{len(grid['tokens'])} of {grid['num_response_tokens']} response tokens"
    lines = [printable(f"sample {grid['id']}{kind}, {counts}", keep="")]
    if grid["row_kind"] == "sampled":
        lines += ["word and its share of the draws in %; * is the word of the response"]
        lines += ["below: entropy in nats, rank of the response's word among the draws"]
    else:
        lines += ["word and probability in %; * is the word of the response"]
        lines += ["below: entropy in nats, mass outside the kept words in %, rank of the response's word"]
    if not grid["has_texts"]:
        lines += ["the cache carries no token texts: words are token ids"]
    return lines


def _block(grid: dict[str, Any], start: int, stop: int) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from vlsi_cache.report.example import visible

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("response", no_wrap=True)
    for layer in grid["layers"][start:stop]:
        table.add_column("last" if layer == grid["final_layer"] else str(layer), no_wrap=True)
    for t, token in enumerate(grid["tokens"]):
        cells = [_cell(grid, index, t) for index in range(start, stop)]
        table.add_row(str(grid["positions"][t]), Text(visible(token)), *cells)
    return table


def _cell(grid: dict[str, Any], index: int, t: int) -> Any:
    """The top words, and under them in grey the numbers of the distribution."""
    from rich.text import Text

    from vlsi_cache.report.example import visible

    cell, gold = grid["grid"][index][t], grid["token_ids"][t]
    text = Text()
    for token, word, prob in zip(cell["ids"], cell["words"], cell["probs"], strict=True):
        line = f"{visible(word)[:WORD_WIDTH]}{'*' if token == gold else ''} {100 * prob:.0f}\n"
        text.append(line, style="bold green" if token == gold else "")
    tail = "" if grid["row_kind"] == "sampled" else f"{_percent(cell['tail_mass'])} "
    rank = "#-" if cell["gold_rank"] is None else f"#{cell['gold_rank'] + 1}"
    return text.append(f"{cell['entropy']:.2f} {tail}{rank}", style="dim")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.0995 else f"{100 * share:.0f}%"
