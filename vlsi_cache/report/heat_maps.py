"""Heat maps of layers as inline SVG: strength of one colour on the colour of the page, so both schemes are readable.

Shape suffixes: R rows, C columns.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .figures import ACCENT, WARM, some_ticks, styled_figure, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_NUMBERED = 12  # columns up to which every cell carries its number
MAX_LABELS = 25
MAX_SHARE = 20  # percent of a layer's tokens in one bin, from where the colour is full


def kl_map(kl_LL: np.ndarray, names: Sequence[str]) -> str:
    """Mean KL of the layer of the row from the layer of the column."""
    size = 1.2 + min(7.2, max(2.6, 0.42 * len(names)))
    with styled_figure(size + 0.9, size) as (figure, (axes,)):
        _draw(figure, axes, kl_LL, unit="nats", root=True)
        _label(axes, names, names)
        axes.set(xlabel="from layer", ylabel="KL of layer")
        if len(names) <= MAX_NUMBERED:
            for (i, j), value in np.ndenumerate(kl_LL):
                text = f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"
                axes.text(j, i, text if i != j else "", ha="center", va="center", fontsize=8)
        return svg_of(figure, "kl-map", "KL between all pairs of layers")


def position_map(entropy_LP: np.ndarray, first_P: Sequence[int], tokens_P: Sequence[int], names: Sequence[str]) -> str:
    """Mean entropy of every layer by position in the response; above it how many tokens there are."""
    with styled_figure(8.6, _height(names) + 0.9, rows=2, sharex=True, height_ratios=(0.6, _height(names))) as (
        figure,
        (counts, axes),
    ):
        counts.bar(np.arange(len(tokens_P)), tokens_P, width=0.86, color=WARM)
        counts.set(ylabel="tokens")
        counts.tick_params(axis="x", length=0)
        counts.locator_params(axis="y", nbins=2)
        _draw(figure, axes, entropy_LP, unit="nats")
        _label(axes, names, [_span(first_P, index) for index in range(len(first_P))])
        axes.set(xlabel="response token", ylabel="layer")
        return svg_of(figure, "position-map", "Entropy by layer and position in the response")


def distribution_map(share_LB: np.ndarray, edges: np.ndarray, names: Sequence[str]) -> str:
    """How the entropies of every layer are spread."""
    used = int(np.flatnonzero(share_LB.sum(0)).max(initial=0)) + 1
    with styled_figure(8.6, _height(names) + 0.5) as (figure, (axes,)):
        span = (edges[0], edges[used], len(names) - 0.5, -0.5)
        shown_LB = np.minimum(100 * share_LB[:, :used], MAX_SHARE)  # one narrow layer must not make the others pale
        _draw(figure, axes, shown_LB, unit=f"% of tokens, up to {MAX_SHARE}", extent=span)
        _label(axes, names, None)
        axes.set(xlabel="entropy [nats]", ylabel="layer")
        return svg_of(figure, "distribution-map", "Distribution of entropy in every layer")


def _height(names: Sequence[str]) -> float:
    return 0.7 + min(6.0, max(1.3, 0.24 * len(names)))


def _draw(figure: Any, axes: "Axes", values_RC: np.ndarray, *, unit: str, root: bool = False, **options: Any) -> None:
    """The cells as one small picture, with the scale beside it; NaN is left free."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgba

    colour = to_rgba(ACCENT)[:3]
    shades = LinearSegmentedColormap.from_list("shades", [(*colour, 0.0), (*colour, 0.9)])
    norm = PowerNorm(0.5 if root else 1.0, vmin=0, vmax=max(1e-9, float(np.nanmax(values_RC))))
    image = axes.imshow(
        np.ma.masked_invalid(values_RC), cmap=shades, norm=norm, aspect="auto", interpolation="none", **options
    )
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05, aspect=18)
    bar.set_label(unit)
    bar.ax.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(True)


def _label(axes: "Axes", rows: Sequence[str], columns: Sequence[str] | None) -> None:
    """The names of rows and columns, of some where there are many."""
    for labels, set_ticks in ((rows, axes.set_yticks), (columns, axes.set_xticks)):
        if labels is not None:
            at = some_ticks(len(labels), MAX_LABELS)
            set_ticks(at, [labels[index] for index in at])
    axes.tick_params(length=0)


def _span(first_P: Sequence[int], index: int) -> str:
    """`12`, or `12-` for the positions from 12 to the next bin."""
    alone = index + 1 < len(first_P) and first_P[index + 1] == first_P[index] + 1
    return str(first_P[index]) if alone else f"{first_P[index]}-"
