"""Figures as inline SVG. Text and lines take the colours of the page, so that they are readable on dark and light.

Every function returns one `<svg>` element that refers to nothing outside itself. matplotlib is imported when used.
"""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlsi_cache.progress import printable
from vlsi_cache.runs.metrics import final_loss, smooth

from .layers import LayerStats
from .matches import Matches
from .mixing import Mixing
from .text import layer_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN_PX = 950  # of the page's text column, 62rem without its padding
MAX_NUMBERED = 12  # columns up to which every cell carries its number
MAX_LABELS = 25
MAX_SHARE = 20  # percent of a layer's tokens in one bin, from where the colour is full

# Colours that the page replaces by its own; any other colour stays as it is.
INK, MUTED, LINE = "#1f2328", "#656d76", "#d1d9e0"
PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"}
ACCENT, WARM, GREY, GREEN = "#3d7fd6", "#dd8a2c", "#8b929b", "#2f9e74"
RECIPE_COLOURS = {"sft": GREY, "last": WARM, "vlsi": ACCENT, "any-depth": GREEN, "trol": GREEN}
DASHED = (0, (3, 2))
LOSS = "loss [nats per token]"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vlsi-cache",  # ids that depend on the content alone: the same data give the same page
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.08,
}

Scores = Mapping[str, Mapping[str, Sequence[float]]]  # recipe -> kind of question -> one value a seed
Curves = Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]]  # stage -> label -> steps, values


@dataclass(frozen=True)
class Panel:
    """One quantity over the steps, by layer: the student's side, and the teacher's where it has one."""

    title: str
    unit: str
    student: Mapping[int, Sequence[float]]
    teacher: Mapping[int, Sequence[float]]


MARGINS_IN = {"left": 0.7, "right": 0.12, "top": 0.36, "bottom": 0.52}  # room for title, numbers and labels
GAP_IN = (0.82, 0.86)  # between panels side by side, and between rows of them


def _fix_margins(figure: "Figure", columns: int, rows: int, top: float) -> None:
    """Margins in inches that fit charts of whole numbers, with `top` more for a legend above.

    matplotlib's own layout measures every text twice, which takes longer than all else about a figure.
    """
    width, height = figure.get_size_inches()
    left, right = MARGINS_IN["left"] / width, 1 - MARGINS_IN["right"] / width
    bottom, high = MARGINS_IN["bottom"] / height, 1 - (MARGINS_IN["top"] + top) / height
    # matplotlib counts gaps in panels.
    panel_w = (width * (right - left) - GAP_IN[0] * (columns - 1)) / columns
    panel_h = (height * (high - bottom) - GAP_IN[1] * (rows - 1)) / rows
    figure.subplots_adjust(left, bottom, right, high, wspace=GAP_IN[0] / panel_w, hspace=GAP_IN[1] / panel_h)


@contextmanager
def styled_figure(
    width: float, height: float, columns: int = 1, *, rows: int = 1, room_above: float | None = None, **options: Any
) -> Any:
    """A styled figure with axes side by side (or in `rows`), closed to pyplot: no display, no global state.

    `room_above` fixes the margins, with so many inches for a legend; without it they fit whatever is drawn.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {**STYLE, "figure.constrained_layout.use": room_above is None}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height))
        if room_above is not None:
            _fix_margins(figure, columns, rows, room_above)
        yield figure, figure.subplots(rows, columns, squeeze=False, **options).ravel()


def accuracy_bars(scores: Scores, kinds: Sequence[str], teacher: Mapping[str, float] | None = None) -> str:
    """Exact match per kind of question, one bar per recipe: the mean, with a line from the worst to the best seed."""
    with styled_figure(max(5.2, 1.6 + 0.86 * len(kinds)), 3.3) as (figure, (axes,)):
        centres, width = np.arange(len(kinds)), 0.8 / max(1, len(scores))
        for index, (recipe, of_kind) in enumerate(scores.items()):
            x = centres + (index - (len(scores) - 1) / 2) * width
            seeds = [100 * np.asarray(of_kind.get(kind) or [np.nan]) for kind in kinds]
            colour = RECIPE_COLOURS.get(recipe, GREEN)
            axes.bar(x, [values.mean() for values in seeds], width * 0.9, color=colour, label=recipe)
            if any(len(values) > 1 for values in seeds):
                low, high = [values.min() for values in seeds], [values.max() for values in seeds]
                axes.vlines(x, low, high, color=INK, lw=1.1)
        if teacher:
            y = [100 * teacher.get(kind, np.nan) for kind in kinds]
            axes.hlines(y, centres - 0.43, centres + 0.43, color=INK, lw=1.4, linestyles=DASHED, label="teacher")
        axes.set_xticks(centres, [kind.replace("_", "\n") for kind in kinds])
        axes.set(ylim=(0, 100), ylabel="exact match [%]", xlim=(-0.55, len(kinds) - 0.45))
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=len(scores) + 1)
        return svg_of(figure, "accuracy", "Exact match per kind of question and recipe")


def _label_lines(axes: "Axes", *, num_ticks: int | None = None, **texts: Any) -> None:
    """Title and labels of a chart over steps or layers, with lines across; over steps `num_ticks` whole numbers."""
    axes.set(**texts)
    axes.grid(axis="y")
    if num_ticks is not None:
        axes.locator_params(axis="x", integer=True, nbins=num_ticks)


def loss_curves(curves: Curves) -> str:
    """One panel per stage, one line per label: every step faint, the running mean on top."""
    with styled_figure(3.3 * len(curves) + 0.6, 2.9, len(curves), room_above=0) as (figure, panels):
        for axes, (stage, lines) in zip(panels, curves.items(), strict=True):
            for number, (label, (steps, values)) in enumerate(lines.items()):
                colour = RECIPE_COLOURS.get(label, (ACCENT, WARM, GREEN, GREY)[number % 4])
                axes.plot(steps, values, color=colour, lw=0.7, alpha=0.28)
                axes.plot(steps, smooth(values, max(1, len(values) // 12)), color=colour, lw=1.8, label=label)
            _label_lines(axes, title=stage, xlabel="step", ylabel=LOSS, num_ticks=6)
            if len(lines) > 1:
                axes.legend(handlelength=1.2)
        return svg_of(figure, "loss", "Training loss per stage")


def verbalizer_losses(steps: Sequence[int], layers: Mapping[int, Sequence[float]]) -> str:
    """Loss of every layer's verbalizer over training (left), and at the end (right)."""
    with styled_figure(8.2, 3.1, 2, room_above=0, width_ratios=(1.6, 1)) as (figure, (over_time, final)):
        colours = _shades(len(layers))
        for colour, (layer, values) in zip(colours, layers.items(), strict=True):
            over_time.plot(steps, smooth(values, max(1, len(values) // 12)), color=colour, lw=1.6, label=str(layer))
        _label_lines(over_time, title="over training", xlabel="step", ylabel=LOSS, num_ticks=6)
        over_time.legend(title="layer", ncols=2, handlelength=1.0, fontsize=8)
        names = [str(layer) for layer in layers]
        final.bar(names, [final_loss(values) for values in layers.values()], color=colours, width=0.7)
        _label_lines(final, title="at the end", xlabel="layer", ylabel=LOSS)
        return svg_of(figure, "verbalizers", "Loss of each layer's verbalizer")


def exit_lines(exits: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]) -> str:
    """Right words and held-out loss of every layer that answers, one line per recipe; a band over the seeds."""
    panels = (("accuracy", 100.0, "right words [%]"), ("nll", 1.0, LOSS))
    with styled_figure(8.2, 3.0, 2, room_above=0) as (figure, pair):
        for axes, (key, scale, name) in zip(pair, panels, strict=True):
            for recipe, of_layer in exits.items():
                layers, colour = sorted(of_layer), RECIPE_COLOURS.get(recipe, GREEN)
                values = [[scale * one[key] for one in of_layer[layer]] for layer in layers]
                means = [float(np.mean(of_seeds)) for of_seeds in values]
                axes.plot(layers, means, color=colour, lw=1.8, marker="o", ms=4, label=recipe)
                axes.fill_between(
                    layers, *zip(*((min(v), max(v)) for v in values), strict=True), color=colour, alpha=0.18, lw=0
                )
            axes.set_xticks(sorted({layer for of_layer in exits.values() for layer in of_layer}))
            _label_lines(axes, xlabel="student layer that answers", ylabel=name)
        pair[0].legend()
        return svg_of(figure, "exit-lines", "Right words and loss of each student layer")


def exit_curves(result: Mapping[str, Any]) -> str:
    """Words that are the last layer's, and right words, against the mean depth of what says them: by each confidence
    rule, and (points) by each exit alone."""
    with styled_figure(8.2, 3.0, 2, room_above=0) as (figure, pair):
        for axes, key, name in zip(pair, ("agreement", "accuracy"), ("the last layer's", "right"), strict=True):
            for (rule, points), colour in zip(result["rules"].items(), (ACCENT, WARM), strict=True):
                depths, shares = zip(*((one["depth"], 100 * one[key]) for one in points), strict=True)
                axes.plot(depths, shares, color=colour, lw=1.8, label=f"the first that is sure, by {rule}")
            depths, shares = zip(*((one["layer"], 100 * one[key]) for one in result["exits"]), strict=True)
            axes.plot(depths, shares, color=GREY, ls="", marker="o", ms=5, label="one layer alone")
            _label_lines(axes, xlabel="mean depth [layers]", ylabel=f"words that are {name} [%]")
        pair[0].legend()
        return svg_of(figure, "exits", "Quality of exits against their mean depth")


def probe_curves(panels: Sequence[Panel], steps: Sequence[int], layers: Sequence[int]) -> str:
    """Numbers of the probes over the steps, one line a layer; the teacher's side is dashed."""
    from matplotlib.lines import Line2D

    rows, colours = -(-len(panels) // 3), _shades(len(layers))
    with styled_figure(9.6, 2.5 * rows + 0.4, 3, rows=rows, room_above=0.4) as (figure, axes_list):
        for axes, panel in zip(axes_list, panels, strict=False):
            for of_layer, style in ((panel.teacher, DASHED), (panel.student, "-")):
                for layer, values in of_layer.items():
                    colour = colours[list(layers).index(layer)]
                    axes.plot(steps, values, color=colour, lw=1.4, ls=style)
            _label_lines(axes, title=panel.title, xlabel="step", ylabel=panel.unit, num_ticks=5)
        for axes in axes_list[len(panels) :]:
            axes.set_axis_off()
        names = zip(colours, layer_names(layers), strict=True)
        lines = [Line2D([], [], color=colour, lw=1.6, label=name) for colour, name in names]
        lines.append(Line2D([], [], color=MUTED, lw=1.4, ls=DASHED, label="teacher"))
        figure.legend(handles=lines, loc="upper left", ncols=len(lines), handlelength=1.4)
        return svg_of(figure, "probes", "Student layers beside their teacher layers over the interaction")


def match_map(found: Matches) -> str:
    """Shares of matches of each student layer with each teacher layer, one heat map beside the other."""
    with _match_figure(found) as figure:
        return svg_of(figure, "matches", "Matched layers beside the distribution of uniform sampling")


def match_png(found: Matches) -> bytes:
    """The heat maps as a PNG on white."""
    buffer = io.BytesIO()
    with _match_figure(found) as figure:
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def _match_figure(found: Matches) -> Any:
    maps = {"start of the interaction": found.start_SM, "end of the interaction": found.end_SM}
    if found.null_SM is not None:
        maps["no information (null)"] = found.null_SM
    student_layers, teacher_layers = found.student_layers, found.teacher_layers
    width = max(3.2, 0.9 + 0.27 * len(teacher_layers))
    height = max(2.3, 1.5 + 0.26 * len(student_layers))
    with styled_figure(width * len(maps), height, len(maps), sharey=True) as (figure, panels):
        for axes, (title, share_SM) in zip(panels, maps.items(), strict=True):
            visible_SM = np.ma.masked_less(share_SM, 0.005)
            axes.pcolormesh(visible_SM, cmap=_transparent_to_accent(0.85), vmin=0, vmax=1, edgecolors="none")
            if len(teacher_layers) <= MAX_NUMBERED:
                for (s, m), share in np.ndenumerate(share_SM):
                    if share >= 0.005:
                        axes.text(m + 0.5, s + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=8.5)
            shown = some_ticks(len(teacher_layers), 14)
            axes.set_xticks(np.array(shown) + 0.5, [str(teacher_layers[index]) for index in shown])
            axes.set_yticks(np.arange(len(student_layers)) + 0.5, [str(layer) for layer in student_layers])
            axes.tick_params(length=0)
            axes.set(xlim=(0, len(teacher_layers)), ylim=(len(student_layers), 0))
            axes.set(title=title, xlabel="teacher layer")
            axes.spines[["top", "right"]].set_visible(True)
        panels[0].set_ylabel("student layer")
        yield figure


def _transparent_to_accent(opacity: float) -> Any:
    """Shades of a heat map that let the page's own colour through."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    colour = to_rgb(ACCENT)
    return LinearSegmentedColormap.from_list("shades", [(*colour, 0.0), (*colour, opacity)])


def mixing_map(mixing: Mixing) -> str:
    """Mixing ratio of every layer and token of a prompt, each layer from its lowest to its highest; a line above shows
    which tokens are of pictures."""
    num_layers, num_tokens = len(mixing.ratios), len(mixing.tokens)
    with styled_figure(min(9.6, max(4.4, 1.2 + 0.16 * num_tokens)), 1.3 + 0.17 * num_layers) as (figure, (axes,)):
        axes.pcolormesh(mixing.normalized_LS, cmap=_transparent_to_accent(0.9), vmin=0, vmax=1, rasterized=True)
        pictures = [(place, 1) for place, is_picture in enumerate(mixing.is_picture) if is_picture]
        if pictures:
            axes.broken_barh(pictures, (-0.45, 0.3), color=WARM, clip_on=False)
        if num_tokens <= MAX_LABELS:
            texts = [printable(text.replace("\n", "\u21b5"), keep="\u21b5")[:8] for text in mixing.tokens]
            axes.set_xticks(np.arange(num_tokens) + 0.5, texts, rotation=60, ha="right", fontsize=8)
        shown = some_ticks(num_layers, 12)
        axes.set_yticks(np.array(shown) + 0.5, [str(layer + 1) for layer in shown])
        axes.tick_params(length=0)
        axes.set(xlim=(0, num_tokens), ylim=(num_layers, -0.6), xlabel="tokens of the prompt", ylabel="layer")
        return svg_of(figure, "mixing", "Mixing ratio of each layer and token of a prompt")


def bytes_bars(per_layer_token: Mapping[str, float]) -> str:
    """Bytes per (layer, response token) of every array of a cache."""
    shown = {name: value for name, value in per_layer_token.items() if value >= 0.005}
    with styled_figure(6.2, 0.9 + 0.27 * len(shown)) as (figure, (axes,)):
        names, values = list(shown), list(shown.values())
        axes.barh(names, values, color=ACCENT, height=0.62)
        for name, value in shown.items():
            label = f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"
            axes.annotate(label, (value, name), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set(xlabel="bytes per layer and response token, on disk", xlim=(0, 1.12 * max(values, default=1)))
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.grid(axis="x")
        return svg_of(figure, "bytes", "Bytes per array")


def layer_figure(layers: Sequence[LayerStats]) -> str:
    """What each cached layer knows: loss on the response and entropy (left), shares of tokens (right)."""
    names = layer_names([one.layer for one in layers])
    entropies = [one.entropy["mean"] for one in layers]
    kept = [100 * one.kept_mass["mean"] for one in layers if one.kept_mass]  # rows of draws have none
    dots: dict[str, Any] = {"marker": "o", "ms": 4}
    with styled_figure(8.2, 3.0, 2, room_above=0) as (figure, (nats, shares)):
        nats.plot(names, [one.gold_nll for one in layers], color=ACCENT, label="loss on the response", **dots)
        nats.plot(names, entropies, color=WARM, label="entropy", **dots)
        agreement = [100 * one.top1_agreement for one in layers]
        shares.plot(names, agreement, color=ACCENT, label="same top word as last", **dots)
        if kept:
            shares.plot(names, kept, color=GREEN, label="kept mass", **dots)
        _label_lines(nats, title="nats per token", xlabel="teacher layer", ylabel="nats", ylim=(0, None))
        _label_lines(shares, title="shares", xlabel="teacher layer", ylabel="[%]", ylim=(0, 104))
        for axes in (nats, shares):
            axes.legend(handlelength=1.4)
            axes.set_xticks(some_ticks(len(names), 10))
        return svg_of(figure, "cached-layers", "What each cached layer knows")


def some_ticks(num: int, most: int) -> list[int]:
    """At most `most` and one evenly spaced numbers below `num`, the last one among them and nothing close to it."""
    step = -(-num // most)
    return [*(index for index in range(0, num - 1, step) if num - 1 - index >= step), num - 1]


def _shades(num: int) -> list[tuple[float, float, float]]:
    """From warm (shallow) to the accent (deep)."""
    from matplotlib.colors import to_rgb

    shares = np.linspace(0, 1, max(1, num))[:, None]
    mixed = (1 - shares) * np.array(to_rgb(WARM)) + shares * np.array(to_rgb(ACCENT))
    return [(float(r), float(g), float(b)) for r, g, b in mixed[:num]]


def svg_of(figure: "Figure", name: str, label: str) -> str:
    """The figure as one `<svg>` for a page: colours of the page, its own ids, no namespaces, no metadata."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})  # `savefig` would draw everything twice
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text).replace('href="#', f'href="#{name}-')
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "inherit-font", text)
    text = text.replace("inherit-font", "system-ui, sans-serif")
    for colour, variable in PAGE_COLOURS.items():
        text = text.replace(colour, variable)
    text = re.sub(r'^(<svg[^>]*?)\swidth="[^"]*"', r"\1", re.sub(r'^(<svg[^>]*?)\sheight="[^"]*"', r"\1", text))
    # As wide as it was drawn, but no wider than the page's column; a narrow window makes it smaller.
    width = min(96 * figure.get_figwidth(), COLUMN_PX)
    return printable(text.replace("<svg", f'<svg role="img" aria-label="{label}" style="width: {width:.0f}px"', 1))


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
    from matplotlib.colors import PowerNorm

    norm = PowerNorm(0.5 if root else 1.0, vmin=0, vmax=max(1e-9, float(np.nanmax(values_RC))))
    options |= {"cmap": _transparent_to_accent(0.9), "norm": norm, "aspect": "auto", "interpolation": "none"}
    image = axes.imshow(np.ma.masked_invalid(values_RC), **options)
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
