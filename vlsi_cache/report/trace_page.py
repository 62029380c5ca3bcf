"""What the layers of a model answer, each by itself: the record of a trace, its table and its page."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlsi_cache.progress import html_text as escape

from .example import picture_html, visible
from .page import page, paragraph, section, write_page
from .text import table


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
    """Greedy answers of some layers to one prompt, shallow to deep; `png`: the pictures, base64."""

    model: str
    verbalizers: str
    prompt: str
    images: list[str]
    png: list[str]
    num_layers: int
    said: list[Said]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without the pixels."""
        facts = {key: getattr(self, key) for key in ("model", "verbalizers", "prompt", "images", "num_layers")}
        return {**facts, "layers": [{**asdict(one), "mean_prob": one.mean_prob} for one in self.said]}

    def name(self, layer: int) -> str:
        """`last` for the model itself."""
        return "last" if layer == self.num_layers else str(layer)

    def __str__(self) -> str:
        rows = [[self.name(one.layer), f"{100 * one.mean_prob:.0f}", shown(one)] for one in self.said]
        return f"{table(['layer', 'mean probability, %', 'text'], rows)}\n\n{self.note}"

    @property
    def note(self) -> str:
        """How to read it."""
        lens = self.verbalizers == "none"
        how = "the model's own norm and head make of it (logit lens)" if lens else "its verbalizer says"
        return (
            f"each layer answers by itself: the token that {how} is fed back; the mean is over its tokens, the end of "
            "turn included; three dots: cut at --max-new-tokens"
        )


def shown(said: Said) -> str:
    """The text on one line."""
    return visible(said.text) + ("" if said.has_ended else " ...")


def write_trace_page(trace: Trace, file: Path) -> Path:
    """Write one self-contained HTML document in one step; returns the file."""
    return write_page(file, trace_page(trace))


def trace_page(trace: Trace) -> str:
    """Pictures and prompt, and a line of coloured tokens for each layer."""
    facts = [("prompt", trace.prompt), ("model", trace.model), ("verbalizers", trace.verbalizers)]
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    lines = "".join(_line_html(trace, one) for one in trace.said)
    said = f'<div class="scroll"><table class="said">{_HEAD}{lines}</table></div>'
    note = f"{trace.note[0].upper()}{trace.note[1:]}. The stronger the colour, the surer the layer was of the token."
    return page(
        "What each layer would answer",
        f"{len(trace.said)} layers of {Path(trace.model).name}",
        [
            f'<div class="example">{"".join(picture_html(png) for png in trace.png)}<dl>{listed}</dl></div>',
            section("Layer by layer", said, paragraph(note, note=True)),
        ],
    )


_HEAD = "<tr><th>layer</th><th>mean</th><th>answer</th></tr>"


def _line_html(trace: Trace, said: Said) -> str:
    tokens = "".join(_token_html(token) for token in said.tokens)
    more = "" if said.has_ended else " &hellip;"
    return f"<tr><th>{trace.name(said.layer)}</th><td>{100 * said.mean_prob:.0f} %</td><td>{tokens}{more}</td></tr>"


def _token_html(token: Token) -> str:
    hint = f"{100 * token.prob:.1f} %, token {token.id}"
    return f'<span style="--p: {token.prob:.3f}" title="{escape(hint)}">{escape(visible(token.text))}</span>'
