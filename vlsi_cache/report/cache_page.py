"""The page of a cache: what it is, what its layers know, what it costs, and one sample of it."""

from typing import TYPE_CHECKING, Any

from . import figures
from .describe import response_text
from .example import MAX_TOKENS, example_html, grid_of
from .layers import LayerSummary, layer_summaries
from .page import details, facts_table, figure, html_table, page, paragraph, section, spec_details, tiles
from .text import human_bytes, layer_name, percent

if TYPE_CHECKING:
    from vlsi_cache.store.reader import Cache


def cache_page(cache: "Cache") -> str:
    """What a cache is, what its layers know, what it costs, and one sample of it."""
    from vlsi_cache.store.lineage import surprise_warning

    header = cache.header
    state = "complete" if cache.is_complete else f"{len(cache.parts)} of {header.num_parts} parts"
    lead = f"{header.spec.get('description') or 'a vlsi-cache'}; {state}"
    numbers = tiles(
        [
            (f"{cache.num_samples:,}", "samples"),
            (f"{cache.num_tokens:,}", "response tokens"),
            (str(len(cache.layers)), "layers"),
            (human_bytes(sum(cache.bytes_by_array().values())), "on disk"),
        ]
    )
    return page(
        f"Cache {header.spec.get('name') or cache.path.name}",
        lead,
        [
            numbers,
            section("What the layers know", paragraph(surprise_warning(cache)), *_layers_html(layer_summaries(cache))),
            section("One sample", _sample_html(cache)),
            section("Bytes", bytes_html(cache.bytes_per_layer_token())),
            section("Rows left out", *_skipped_html(header.skipped)),
            section("How it was made", *_provenance_html(header)),
        ],
    )


def bytes_html(per_layer_token: dict[str, float]) -> str:
    """Where the bytes of a cache go."""
    total = per_layer_token.get("total", sum(per_layer_token.values()))
    arrays = {name: value for name, value in per_layer_token.items() if name != "total"}
    caption = f"Bytes on disk per layer and response token; {total:.1f} in all. In a small cache metadata weighs more."
    return figure(figures.bytes_bars(arrays), caption)


def _layers_html(summaries: list[LayerSummary]) -> list[str]:
    layers = [one.layer for one in summaries]
    rows = [
        [
            layer_name(one.layer, layers),
            f"{one.gold_nll:.3f}",
            f"{one.entropy:.3f}",
            percent(one.top1_agreement),
            percent(one.gold_in_top_k),
            percent(one.kept_mass),
        ]
        for one in summaries
    ]
    heads = ["layer", "loss, nats", "entropy, nats", "top word as last", "response word kept", "kept mass"]
    return [
        figure(
            figures.layer_figure(summaries), "Means over response tokens; the loss is that of the response's words."
        ),
        html_table(heads, rows),
    ]


def _sample_html(cache: "Cache") -> str:
    sample_id = next(iter(cache), None)
    if sample_id is None:
        return ""
    grid = grid_of(cache[sample_id], layers=cache.layers, text=cache.token_text, tokens=slice(MAX_TOKENS))
    note = "" if cache.header.text_xxh3 else "The cache carries no token texts: words are token ids."
    return example_html({**grid, "png": [], "id": sample_id, "question": "", "answer": ""}) + paragraph(note, note=True)


def _skipped_html(skipped: list[dict[str, Any]], *, limit: int = 20) -> list[str]:
    if not skipped:
        return [paragraph("None.")]
    rows = [[str(one["id"]), str(one["reason"])] for one in skipped[:limit]]
    more = len(skipped) - len(rows)
    return [html_table(["row", "reason"], rows), paragraph(f"and {more} more, listed in cache.json" if more else "")]


def _provenance_html(header: Any) -> list[str]:
    facts = [("made by", header.created_by), ("format version", str(header.format_version))]
    facts += [("parent", str(parent.get("path", parent))) for parent in header.parents]
    facts += [("responses", response_text(origin)) for origin in header.responses]
    fingerprint = "\n".join(f"{key}: {value}" for key, value in header.fingerprint.items())
    return [
        facts_table(facts),
        details("the fingerprint", fingerprint),
        spec_details(header.spec),
    ]
