"""The figure of one table of an ablation: a dot for every seed."""

from collections.abc import Mapping, Sequence

import numpy as np

from .figures import ACCENT, GREY, INK, styled_figure, svg_of

SeedValues = Mapping[str, Sequence[float]]  # label of a variant -> one value a seed


def ablation_dots(panels: Mapping[str, SeedValues], labels: Sequence[str], default: str, *, name: str) -> str:
    """One panel a score, one line a variant: dots are seeds, the bar their mean, the dashed line the default's."""
    with styled_figure(2.4 + 2.5 * len(panels), 1.0 + 0.3 * len(labels), len(panels), sharey=True) as (figure, axes_N):
        for axes, (title, values) in zip(axes_N, panels.items(), strict=True):
            if values.get(default):
                axes.axvline(float(np.mean(values[default])), color=INK, lw=0.9, linestyle=(0, (3, 2)))
            for y, label in enumerate(labels):
                colour, seeds = ACCENT if label == default else GREY, values.get(label, ())
                axes.plot(seeds, [y] * len(seeds), "o", color=colour, ms=5, alpha=0.75, mew=0)
                if len(seeds) > 1:
                    axes.vlines(float(np.mean(seeds)), y - 0.3, y + 0.3, color=colour, lw=2)
            axes.set(xlabel=title)
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=5)
            axes.grid(axis="x")
        return svg_of(figure, name, "Scores of every variant and seed")
