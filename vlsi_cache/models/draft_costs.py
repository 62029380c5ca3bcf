"""What drafting from a layer is worth, before a word is drafted: by how often the layer agrees with the last one, and
by the weights that each of the two reads.

Decoding one answer is bound by reading weights: a pass costs what it reads, whether for one token or for a few. A draft
reads the layers below the exit, its verbalizer and the head; a check reads the whole model once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

MOST_DRAFTS = 8  # that are looked at where the best number is asked for


@dataclass(frozen=True)
class Costs:
    """Weights that one token reads: `below` of all layers up to each exit, its verbalizer among them; `layers` of all
    layers; `head` with the final norm. Tables of embeddings give one row, and are left out."""

    below: Mapping[int, int]
    layers: int
    head: int

    def of_exit(self, layer: int) -> int:
        return self.below[layer] + self.head

    @property
    def of_all(self) -> int:
        return self.layers + self.head

    def speedup(self, layer: int, drafts: "Drafts") -> float:
        """Tokens of a pass of the whole model with its drafts, against one without, by weights read."""
        return drafts.tokens_per_pass * self.of_all / (drafts.num_drafts * self.of_exit(layer) + self.of_all)


@dataclass(frozen=True)
class Drafts:
    """What comes of drafting `num_drafts` tokens at a time: drafted within the answers, kept, and checked in passes."""

    num_drafts: int
    num_drafted: int
    num_accepted: int
    num_checks: int

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that stand."""
        return self.num_accepted / max(1, self.num_drafted)

    @property
    def tokens_per_pass(self) -> float:
        """Of the whole model; 1 without drafts."""
        return 1 + self.num_accepted / max(1, self.num_checks)


def drafts_of(agrees: Iterable[np.ndarray], num_drafts: int) -> Drafts:
    """What decoding would have come to where an exit agrees with the last layer at the tokens that `agrees` says.

    One array of bools [T] for each answer: its first token comes with the prompt, the others in passes of drafts and a
    check.
    Exact where the answers are the model's own greedy ones; an estimate along other texts.
    """
    drafted = accepted = checks = 0
    for agrees_T in agrees:
        differs_N = np.flatnonzero(~np.append(agrees_T, False))  # the end stops drafts as a difference does
        place, end = 1, len(agrees_T)
        while place < end:
            kept = min(int(differs_N[np.searchsorted(differs_N, place)]) - place, num_drafts)
            is_last = place + kept + 1 >= end
            # What lies behind the end of an answer counts nowhere.
            drafted += min(num_drafts, end - place) if is_last else num_drafts
            accepted, checks = accepted + kept, checks + 1
            place += kept + 1
    return Drafts(num_drafts, drafted, accepted, checks)


def best_drafts(agrees: list[np.ndarray], layer: int, costs: Costs) -> Drafts:
    """Those of the number of drafts at a time, 1 to MOST_DRAFTS, with the largest speed-up."""
    found = [drafts_of(agrees, count) for count in range(1, MOST_DRAFTS + 1)]
    return max(found, key=lambda drafts: costs.speedup(layer, drafts))
