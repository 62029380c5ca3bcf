"""What layers say, word by word: of a sample of a cache at its response tokens, or left to themselves (a trace).

Shape suffixes: L layers, T response tokens with a row, K kept entries.
"""

import base64
import io
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlsi_cache.errors import SpecError
from vlsi_cache.progress import printable
from vlsi_cache.store.reader import Cache, CachePath, open

from .layers import gold_ids, gold_ranks
from .mixing import Mixing
from .text import table, visible

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.table import Table

    from vlsi_cache.data.records import Record
    from vlsi_cache.store.part import Row

TextOf = Callable[[int], str | None]
MAX_TOKENS = 24  # columns of the picture; a longer response is cut, and says so
CELL_WIDTH, TOKEN_WIDTH, WORD_WIDTH = 17, 22, 9  # characters of a layer's column, of the first two, and of a word
PICTURE_WIDTH = 384  # pixels; a larger picture is made smaller


@dataclass(frozen=True)
class SampleGrid:
    """What every layer says at the response tokens of one sample.

    `grid[l][t]` holds for layer `layers[l]` and token `tokens[t]` (id `token_ids[t]`, response token `positions[t]`):
    `ids`, `words` and `probs` of its top words, `entropy` in nats, `tail_mass`, `gold_logprob` and `gold_rank`, from 0.
    """

    id: str
    kind: str
    row_kind: str
    final_layer: int
    has_texts: bool
    num_response_tokens: int
    layers: list[int]
    top_k: int
    num_tokens: int
    positions: list[int]
    token_ids: list[int]
    tokens: list[str]
    grid: list[list[dict[str, Any]]]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def sample(
    cache: CachePath,
    sample_id: str,
    *,
    top: int = 1,
    layers: Sequence[int | str] | None = None,
    tokens: str | None = None,
) -> SampleGrid:
    """The `top` words of every layer at every response token of a sample; `tokens` are those to show, `A:B`.

    Raises SampleNotFoundError; SpecError for `layers` or `tokens` that are not there.
    """
    opened = cache if isinstance(cache, Cache) else open(cache, allow_incomplete=True)
    numbers = [opened.layers[index] for index in opened.header.layer_indices(layers)]
    row = opened.row(sample_id, layers)
    shown = slice(None) if tokens is None else _rows_at(row.positions_T, tokens, sample_id)
    return SampleGrid(
        id=row.sample_id,
        kind=row.kind,
        row_kind=opened.header.row_kind,
        final_layer=opened.layers[-1],
        has_texts=opened.header.text_xxh3 is not None,
        num_response_tokens=len(row.response_ids_R),
        **grid_of(row, layers=numbers, text=opened.token_text, top=top, tokens=shown),
    )


def _rows_at(positions_T: np.ndarray, tokens: str, sample_id: str) -> slice:
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
        for line in _grid_head(grid):
            console.print(line, markup=False)
        for start in range(0, len(grid["layers"]), per_block):
            console.print(_grid_block(grid, start, min(start + per_block, len(grid["layers"]))))
    return captured.get().rstrip()


def _grid_head(grid: dict[str, Any]) -> list[str]:
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


def _grid_block(grid: dict[str, Any], start: int, stop: int) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("response", no_wrap=True)
    for layer in grid["layers"][start:stop]:
        table.add_column("last" if layer == grid["final_layer"] else str(layer), no_wrap=True)
    for t, token in enumerate(grid["tokens"]):
        cells = [_grid_cell(grid, index, t) for index in range(start, stop)]
        table.add_row(str(grid["positions"][t]), Text(visible(token)), *cells)
    return table


def _grid_cell(grid: dict[str, Any], index: int, t: int) -> Any:
    """The top words, and under them in grey the numbers of the distribution."""
    from rich.text import Text

    cell, gold = grid["grid"][index][t], grid["token_ids"][t]
    text = Text()
    for token, word, prob in zip(cell["ids"], cell["words"], cell["probs"], strict=True):
        line = f"{visible(word)[:WORD_WIDTH]}{'*' if token == gold else ''} {100 * prob:.0f}\n"
        text.append(line, style="bold green" if token == gold else "")
    tail = "" if grid["row_kind"] == "sampled" else f"{_short_percent(cell['tail_mass'])} "
    rank = "#-" if cell["gold_rank"] is None else f"#{cell['gold_rank'] + 1}"
    entropy = "?" if cell["entropy"] is None else f"{cell['entropy']:.2f}"
    return text.append(f"{entropy} {tail}{rank}", style="dim")


def _short_percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.0995 else f"{100 * share:.0f}%"


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


def png_of(image: "Image") -> str:
    """A picture as base64 PNG, made smaller where it is large."""
    if image.width > PICTURE_WIDTH:
        image = image.resize((PICTURE_WIDTH, max(1, round(image.height * PICTURE_WIDTH / image.width))))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Token:
    """A token that a layer has chosen, and the probability it gave it."""

    id: int
    text: str
    prob: float


@dataclass(frozen=True)
class Said:
    """What one layer has answered; `has_ended`: by itself, with an end of turn as the last of its tokens."""

    layer: int
    text: str
    tokens: list[Token]
    has_ended: bool

    @property
    def mean_prob(self) -> float:
        """Mean probability of the chosen tokens, the end of turn included."""
        return sum(token.prob for token in self.tokens) / len(self.tokens)


@dataclass(frozen=True)
class Trace:
    """Greedy answers of some layers to one prompt, shallow to deep; `png`: the pictures, base64; `mixing`: how much a
    student whose layers are traversed has taken of their further passes."""

    model: str
    verbalizers: str
    prompt: str
    images: list[str]
    png: list[str]
    num_layers: int
    said: list[Said]
    mixing: Mixing | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without the pixels."""
        facts = {key: getattr(self, key) for key in ("model", "verbalizers", "prompt", "images", "num_layers")}
        if self.mixing is not None:
            facts["mixing"] = self.mixing.as_dict()
        return {**facts, "layers": [{**asdict(one), "mean_prob": one.mean_prob} for one in self.said]}

    def name(self, layer: int) -> str:
        """`last` for the model itself."""
        return "last" if layer == self.num_layers else str(layer)

    def __str__(self) -> str:
        rows = []
        for one in self.said:
            text = visible(one.text) + ("" if one.has_ended else " ...")
            rows.append([self.name(one.layer), f"{100 * one.mean_prob:.0f}", text])
        mixing = "" if self.mixing is None else f"\n\n{self.mixing}"
        return f"{table(['layer', 'mean probability, %', 'text'], rows)}\n\n{self.note}{mixing}"

    @property
    def note(self) -> str:
        """How to read it."""
        lens = self.verbalizers == "none"
        how = "the model's own norm and head make of it (logit lens)" if lens else "its verbalizer says"
        return (
            f"each layer answers by itself: the token that {how} is fed back; the mean is over its tokens, the end of "
            "turn included; three dots: cut at --max-new-tokens"
        )
