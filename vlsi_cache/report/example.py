"""One sample of a cache for people: the picture, the question, and what every layer says at every response token.

Shape suffixes: L layers, T response tokens with a row, K kept entries.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlsi_cache.io import write_atomically
from vlsi_cache.progress import html_text as escape
from vlsi_cache.runs.metrics import read_json

from .layers import gold_ids, gold_ranks
from .page import paragraph
from .text import layer_name

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlsi_cache.data.records import Record
    from vlsi_cache.store.part import Row

TextOf = Callable[[int], str | None]
EXAMPLE_NAME = "example.json"
MAX_TOKENS = 24  # columns of the picture; a longer response is cut, and says so
PICTURE_WIDTH = 384  # pixels; a larger picture is made smaller


def example_of(
    row: "Row", record: "Record", text: TextOf | None = None, *, layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """JSON-ready: question, answer, the pictures as base64 PNG, and `grid_of` the row.

    `text` gives the text of a token id. `layers` are the cache's; without them the report takes them from the cache
    that it is about.
    """
    texts = [part["text"] for message in record.prompt_messages for part in message["content"] if "text" in part]
    return {
        "id": row.sample_id,
        "kind": row.kind,
        "question": "\n".join(texts),
        "answer": record.answer,
        "png": [png_of(media.open()) for media in record.images],
        **grid_of(row, layers=layers, text=text, tokens=slice(MAX_TOKENS)),
    }


def grid_of(
    row: "Row",
    *,
    layers: Sequence[int] | None,
    text: TextOf | None = None,
    top: int = 1,
    tokens: slice = slice(None),
) -> dict[str, Any]:
    """JSON-ready: `tokens` (the response), and `grid`, per layer and token the `top` words and the layer's numbers.

    `text` gives the text of a token id; where it gives None, and without it, a word is `#` and the id. `tokens` are the
    rows to show. `gold_rank` counts from 0; None means not among the kept entries. Infinite numbers become None.
    """
    known: dict[int, str] = {}

    def word(token: int) -> str:
        if token not in known:
            found = None if text is None else text(token)
            known[token] = f"#{token}" if found is None else found
        return known[token]

    chosen = range(row.num_tokens)[tokens]
    gold_T, ranks_LT = gold_ids(row).tolist(), gold_ranks(row).tolist()
    grid = [[_cell(row, index, t, top, ranks_LT[index][t], word) for t in chosen] for index in range(row.num_layers)]
    return {
        "layers": None if layers is None else list(layers),
        "top_k": row.top_k,
        "num_tokens": row.num_tokens,
        "positions": [int(row.positions_T[t]) for t in chosen],
        "token_ids": [gold_T[t] for t in chosen],
        "tokens": [word(gold_T[t]) for t in chosen],
        "grid": grid,
    }


def _cell(row: "Row", layer: int, t: int, top: int, rank: int, word: Callable[[int], str]) -> dict[str, Any]:
    logprobs_K = row.logprobs_LTK[layer, t, :top].astype(np.float64)
    logprobs_K = logprobs_K[np.isfinite(logprobs_K)]  # what is left is padding
    ids = row.ids_LTK[layer, t, : len(logprobs_K)].tolist()
    return {
        "ids": ids,
        "words": [word(token) for token in ids],
        "probs": [round(float(prob), 6) for prob in np.exp(logprobs_K)],
        "entropy": _rounded(row.entropy_LT[layer, t]),
        "tail_mass": _rounded(row.tail_mass_LT[layer, t]),
        "gold_logprob": _rounded(row.gold_logprob_LT[layer, t]),
        "gold_rank": rank if rank >= 0 else None,
    }


def _rounded(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def visible(word: str) -> str:
    """A token's text with what is invisible made visible."""
    return "".join(_visible(char) for char in word) if word.strip(" ") else word.replace(" ", "\u2423") or "\u2205"


def _visible(char: str) -> str:
    return char if char.isprintable() else {"\n": "\u21b5", "\t": "\u21e5"}.get(char, "\ufffd")


def save_example(folder: Path, example: dict[str, Any]) -> Path:
    """Keep an example beside the report that shows it."""
    file = folder / EXAMPLE_NAME
    write_atomically(file, json.dumps(example, ensure_ascii=False, indent=1))
    return file


def load_example(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / EXAMPLE_NAME)


def example_html(example: dict[str, Any]) -> str:
    """Picture, question and answer, and under them the grid of layers and tokens."""
    pictures = "".join(picture_html(png) for png in example["png"])
    facts = (("question", "question"), ("answer", "answer of the training row"), ("id", "sample id"))
    listed = "".join(f"<dt>{name}</dt><dd>{escape(str(example[key]))}</dd>" for key, name in facts if example.get(key))
    cut = example["num_tokens"] - len(example["tokens"])
    note = (
        "Top word of each cached layer, and its probability as the strength of the colour. Framed: the response's word."
    )
    more = f" {cut} more tokens are not shown." if cut else ""
    return (
        f'<div class="example">{pictures}<dl>{listed}</dl></div>{grid_html(example)}{paragraph(note + more, note=True)}'
    )


def picture_html(png: str) -> str:
    return f'<img src="data:image/png;base64,{escape(png)}" alt="picture of the sample">'


def grid_html(example: dict[str, Any]) -> str:
    """Response tokens from left to right, the final layer on top."""
    head = "".join(f'<th class="word">{escape(visible(token))}</th>' for token in example["tokens"])
    layers, lines = example["layers"], []
    for layer, cells in reversed(list(zip(layers, example["grid"], strict=True))):
        lines.append(f"<tr><th>{layer_name(layer, layers)}</th>{''.join(_cell_html(cell) for cell in cells)}</tr>")
    return f'<div class="scroll"><table class="grid"><tr><th>layer</th>{head}</tr>{"".join(lines)}</table></div>'


def _cell_html(cell: dict[str, Any]) -> str:
    prob, mark = cell["probs"][0], ' class="gold"' if cell["gold_rank"] == 0 else ""
    logprob = "-inf" if cell["gold_logprob"] is None else f"{cell['gold_logprob']:.2f}"
    hint = f"entropy {cell['entropy']:.2f} nats, response token: log-prob {logprob}"
    word = f'<span class="word">{escape(visible(cell["words"][0]))}</span>'
    return f'<td{mark} style="--p: {prob:.3f}" title="{escape(hint)}">{word}<small>{100 * prob:.0f} %</small></td>'


def png_of(image: "Image") -> str:
    """A picture as base64 PNG, made smaller where it is large."""
    if image.width > PICTURE_WIDTH:
        image = image.resize((PICTURE_WIDTH, max(1, round(image.height * PICTURE_WIDTH / image.width))))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
