"""The page of `stats`: tables and heat maps of what the layers of a cache say."""

from pathlib import Path

from . import figures
from . import figures as heat_maps
from .layers import CacheStats, LayerSummary, big_number, stats_notes, stats_rows
from .page import figure, html_table, page, paragraph, section, tiles, write_page


def write_stats_page(stats: CacheStats, file: Path) -> Path:
    """Write the page to `file` in one step; returns it."""
    return write_page(file, stats_page(stats))


def stats_page(stats: CacheStats) -> str:
    """One self-contained HTML document."""
    last = stats.layers[-1]
    numbers = [
        (f"{stats.num_tokens:,}", "rows a layer were read"),
        (str(len(stats.layers)), "layers"),
        (f"{last.entropy['mean']:.2f}", "nats, mean entropy of the last layer"),
        (big_number(last.perplexity), "perplexity of the response in the last layer"),
    ]
    notes = stats_notes(stats)
    first, *others = stats_rows(stats)
    return page(
        f"Layers of cache {stats.name}",
        notes[0],
        [
            tiles(numbers),
            section("Layer by layer", _layer_figure(stats), html_table(*first, strong="last"), _note(notes[1])),
            section("Entropy", *_entropy_figures(stats)),
            section("How far the layers are apart", *_kl_parts(stats), *(html_table(*one) for one in others)),
            paragraph(notes[2]) if stats.kl_LL is None else "",
        ],
    )


def _note(text: str) -> str:
    return paragraph(f"{text[0].upper()}{text[1:]}.", note=True)


def _names(stats: CacheStats) -> list[str]:
    return [str(one.layer) for one in stats.layers[:-1]] + ["last"]


def _layer_figure(stats: CacheStats) -> str:
    summaries = [
        LayerSummary(
            layer=one.layer,
            entropy=one.entropy["mean"],
            kept_mass=one.kept_mass["mean"] if one.kept_mass else float("nan"),
            gold_nll=one.gold_nll,
            top1_agreement=one.top1_agreement,
            gold_in_top_k=one.gold_in_top_k,
        )
        for one in stats.layers
    ]
    caption = (
        "How surprised each layer is by the response, how unsure it is, and how often it agrees with the last one."
    )
    return figure(figures.layer_figure(summaries), caption)


def _entropy_figures(stats: CacheStats) -> list[str]:
    spread = heat_maps.distribution_map(stats.entropy_share_LB, stats.entropy_edges, _names(stats))
    shown = stats.tokens_P > 0
    by_position = heat_maps.position_map(
        stats.entropy_LP[:, shown],
        stats.position_edges_P[shown].tolist(),
        stats.tokens_P[shown].tolist(),
        _names(stats),
    )
    return [
        figure(spread, "Share of a layer's tokens with this entropy. Left: sure of the next word, right: unsure."),
        figure(by_position, "Mean entropy along the response; a column with a dash reaches to the next one."),
    ]


def _kl_parts(stats: CacheStats) -> list[str]:
    if stats.kl_LL is None:
        return []
    caption = (
        "Mean KL of the row's layer from the column's layer, in nats. Faint next to the diagonal: neighbours say "
        "almost the same, and one of them could go."
    )
    return [figure(heat_maps.kl_map(stats.kl_LL, _names(stats)), caption), _note(stats_notes(stats)[2])]
