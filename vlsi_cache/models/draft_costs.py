"""What drafting from a layer is worth, before a word is drafted: by how often the layer agrees with the last one, and
by the weights that each of the two reads.

Decoding one answer is bound by reading weights: a pass costs what it reads, whether for one token or for a few. A draft
reads the layers below the exit, its verbalizer and the head; a check reads the whole model once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Drafts at a time, up to the first that the exit does not give this probability: of 4 without and 8 or 16 with 0.4 to
# 0.95, by weights read along the demo's and a synthetic source's texts (docs/log.md).
NUM_DRAFTS, CONFIDENCE = 8, 0.5


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
        drafts_a_pass = drafts.num_drafted / max(1, drafts.num_checks)
        return drafts.tokens_per_pass * self.of_all / (drafts_a_pass * self.of_exit(layer) + self.of_all)


@dataclass(frozen=True)
class Drafts:
    """What comes of drafting: tokens drafted within the answers, kept, and passes of checks."""

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


class Answer(NamedTuple):
    """Along one answer, for each of its tokens: whether the exit names the last layer's word, and whether it is sure of
    the word that it names (its probability is CONFIDENCE at least). Bools [T] each."""

    agrees_T: np.ndarray
    sure_T: np.ndarray


def drafts_of(answers: Iterable[Answer], num_drafts: int = NUM_DRAFTS) -> Drafts:
    """What decoding would have come to along these answers.

    The first token comes with the prompt, the others in passes: drafts up to the first that the exit is not sure of, at
    most `num_drafts`, then a check. Exact where the answers are the model's own greedy ones, but for how many drafts
    follow a wrong one (as many as along the answer, it is taken); an estimate along other texts.
    """
    drafted = accepted = checks = 0
    for agrees_T, sure_T in answers:
        # The end stops drafts as a difference does, and as doubt.
        differs_N, doubts_N = (np.flatnonzero(~np.append(one_T, False)) for one_T in (agrees_T, sure_T))
        place, end = 1, len(agrees_T)
        while place < end:
            tried = min(int(doubts_N[np.searchsorted(doubts_N, place)]) - place + 1, num_drafts)
            kept = min(int(differs_N[np.searchsorted(differs_N, place)]) - place, tried)
            is_last = place + kept + 1 >= end
            drafted += min(tried, end - place) if is_last else tried  # what lies behind the end counts nowhere
            accepted, checks = accepted + kept, checks + 1
            place += kept + 1
    return Drafts(drafted, accepted, checks)
