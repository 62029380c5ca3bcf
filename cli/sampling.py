"""The table of one sample: response tokens down, layers across."""

import shutil
from typing import TYPE_CHECKING, Any

from .output import say

if TYPE_CHECKING:
    from rich.table import Table

    from vlsi_cache.store.reader import Cache

CELL_WIDTH = 16  # characters of a layer's column, its padding included
TOKEN_WIDTH = 22


def sample_grid(cache: "Cache", sample_id: str, *, top: int) -> dict[str, Any]:
    """JSON-ready: the sample's tokens and what every layer says, see report.example.grid_of."""
    from vlsi_cache.report.example import cache_encoder, grid_of

    row = cache.row(sample_id)
    encoder, note = cache_encoder(cache)
    if note:
        say(note)
    return {"id": row.sample_id, "kind": row.kind, **grid_of(row, layers=cache.layers, encoder=encoder, top=top)}


def grid_text(grid: dict[str, Any]) -> str:
    """As many layers side by side as the terminal is wide; the rest below."""
    from rich.console import Console

    width = shutil.get_terminal_size((120, 24)).columns
    per_block = max(1, (width - TOKEN_WIDTH) // CELL_WIDTH)
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        kind = f" ({grid['kind']})" if grid["kind"] else ""
        console.print(f"sample {grid['id']}{kind}, {grid['num_tokens']} response tokens", markup=False)
        console.print("word and probability in %; * is the word of the response", markup=False)
        for start in range(0, len(grid["layers"]), per_block):
            console.print(_block(grid, start, min(start + per_block, len(grid["layers"]))))
    return captured.get().rstrip()


def _block(grid: dict[str, Any], start: int, stop: int) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from vlsi_cache.report.example import visible
    from vlsi_cache.report.text import layer_name

    layers = grid["layers"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("response", no_wrap=True)
    for layer in layers[start:stop]:
        table.add_column(layer_name(layer, layers), no_wrap=True)
    for t, token in enumerate(grid["tokens"]):
        cells = [_cell(grid["grid"][index][t], grid["token_ids"][t]) for index in range(start, stop)]
        table.add_row(str(grid["positions"][t]), Text(visible(token)), *cells)
    return table


def _cell(cell: dict[str, Any], gold: int) -> Any:
    from rich.text import Text

    from vlsi_cache.report.example import visible

    text = Text()
    for number, (index, word, prob) in enumerate(zip(cell["ids"], cell["words"], cell["probs"], strict=True)):
        line = f"{visible(word)[:9]}{'*' if index == gold else ''} {100 * prob:.0f}"
        text.append(("\n" if number else "") + line, style="bold green" if index == gold else "")
    return text
