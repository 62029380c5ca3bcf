"""What a model's layers could draft, from a cache alone: how often each names the last layer's word, and what it reads.

Legend: T response tokens, L cached layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.errors import SpecError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.draft_costs import CONFIDENCE, Answer, Costs, drafts_of
from vlsi_cache.models.traversal import traversal_of
from vlsi_cache.progress import progress
from vlsi_cache.store import reader
from vlsi_cache.store.reader import Cache

from .inputs import teacher_ref
from .plan import active_weights, num_passes, verbalizer_size


def costs_of(model: Any, verbalizer_parameters: Mapping[int, int]) -> Costs:
    """Weights that a token reads in a model (on the meta device, too), with verbalizers of these sizes at its exits."""
    backbone, text = Backbone(model), model.config.get_text_config()
    state = traversal_of(model)
    # Of an answer's tokens, which come one by one, `mode: all` alone runs a layer again.
    passes = num_passes(state.settings) if state is not None and state.mode == "all" else 1
    by_layer = [passes * round(sum(active_weights(layer, text).values())) for layer in backbone.layers]
    sums = np.cumsum(by_layer).tolist()
    below = {layer: sums[layer - 1] + count for layer, count in verbalizer_parameters.items()}
    return Costs(below, sums[-1], backbone.head_weight.numel())


@dataclass(frozen=True)
class ExitPlan:
    """One layer as an exit: `agreement` with the last layer's word, `weights` that a draft reads; and of its drafts
    `acceptance`, `tokens_per_pass` and `speedup` (by weights read)."""

    layer: int
    agreement: float
    weights: int
    acceptance: float
    tokens_per_pass: float
    speedup: float


def exit_plan(layer: int, answers: list[Answer], costs: Costs) -> ExitPlan:
    """What drafting from a layer comes to along these answers."""
    drafts, agreement = drafts_of(answers), float(np.concatenate([one.agrees_T for one in answers]).mean())
    speedup = costs.speedup(layer, drafts)
    return ExitPlan(layer, agreement, costs.of_exit(layer), drafts.acceptance, drafts.tokens_per_pass, speedup)


def plan_exits(cache: Cache | Path | str) -> list[ExitPlan]:
    """What each cached layer could draft for the model of a cache; reads rows and a configuration, and no weights.

    Along answers of the model itself the drafts are those that decoding would have; along other texts an estimate.
    Raises SpecError for a cache that does not tell which word a layer names first.
    """
    opened = cache if isinstance(cache, Cache) else reader.open(cache)
    if reason := _why_not(opened):
        raise SpecError(f"{opened.path} {reason}, so what its layers could draft is not known")
    spec = spec_from_dict(opened.header.spec, where=str(opened.path))
    model = teacher_ref(spec.teacher)
    sizes = dict.fromkeys(opened.layers[:-1], 0)
    if spec.teacher.verbalizers is not None:
        verbalizer, text = spec.verbalizer, model.config.get_text_config()
        sizes = dict.fromkeys(sizes, verbalizer_size(text, verbalizer.structure, verbalizer.pre_norm))
    costs, answers = costs_of(model.empty(), sizes), _answers(opened)
    return [exit_plan(layer, answers[layer], costs) for layer in opened.layers[:-1]]


def _why_not(cache: Cache) -> str:
    header = cache.header
    if header.row_kind != "top-k":
        return "holds draws from the teacher and not its first words"
    if len(header.layers) < 2:
        return "holds the last layer alone"
    if not header.spec.get("teacher"):
        return "was imported and does not name its teacher"
    return ""


def _answers(cache: Cache) -> dict[int, list[Answer]]:
    """By layer, what its drafts would meet along each sample's response."""
    found: dict[int, list[Answer]] = {layer: [] for layer in cache.layers[:-1]}
    for part in progress(cache.parts, "exits", unit="part"):
        for row in cache.read_part(part):
            first_LT, sure_LT = row.ids_LTK[:, :, 0], np.exp(row.logprobs_LTK[:, :, 0]) >= CONFIDENCE
            if first_LT.shape[1] != len(row.response_ids_R):
                raise SpecError(
                    f"{cache.path} holds a selection of the response tokens (sample `{row.sample_id}` has rows for "
                    f"{first_LT.shape[1]} of {len(row.response_ids_R)}), and drafts run over all: build one without "
                    "`rows.select_tokens`"
                )
            for place, layer in enumerate(found):
                found[layer].append(Answer(first_LT[place] == first_LT[-1], sure_LT[place]))
    return found
