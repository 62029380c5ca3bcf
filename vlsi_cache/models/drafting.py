"""Self-speculative decoding: one layer of the model drafts, the whole model checks, and the text is the model's own.

The layer, read by its verbalizer or by the model's own norm and head, names the next tokens one after the other; only
the layers below it run for that. Then the whole model runs once over all of them, and keeps those that it would have
said itself and one more token of its own. At temperature 0 the text is that of greedy decoding (where two words are
equally likely within rounding, either may come); with a temperature it has the same distribution, by the rule of
Leviathan et al. (arXiv 2211.17192).

Shapes: B rows that still speak, P positions of the longest prompt, S places in the key-value cache, N drafted tokens, V
vocabulary, D hidden size.
"""

import inspect
import statistics
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.processes import Processes

from .backbone import Backbone, head_of
from .branches import trunk_positions
from .draft_costs import CONFIDENCE, NUM_DRAFTS
from .traversal import traversal_of
from .verbalizer import Verbalizers, logit_lens

REWOUND_TOLERANCE = 1e-3  # of the range of hidden states, as the other probes of a model have it


@dataclass
class Drafter:
    """Layer `layer` of a model as the one that drafts, at most `num_drafts` tokens at a time and no further than the
    first that it gives less than the probability `confidence`; and what has come of it so far."""

    backbone: Backbone
    verbalizers: Verbalizers
    layer: int
    num_drafts: int = NUM_DRAFTS
    confidence: float = CONFIDENCE
    num_drafted: int = 0  # within the answers: what lies behind the end of one does not count
    num_accepted: int = 0
    num_checks: int = 0  # passes of the whole model, rows counted one by one

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        layer: int,
        *,
        verbalizers: Verbalizers | None = None,
        num_drafts: int = NUM_DRAFTS,
        confidence: float = CONFIDENCE,
    ) -> "Drafter":
        """Raises SpecError for a layer or a number that cannot be, ModelError for a model that cannot be rewound."""
        backbone.check_layers([layer])
        if num_drafts < 1:
            raise SpecError(f"the number of drafted tokens is {num_drafts}, must be at least 1")
        verbalizers = logit_lens(backbone, [layer]) if verbalizers is None else verbalizers
        if layer not in verbalizers.layers:
            raise SpecError(f"no verbalizer for layer {layer} to draft with; there are {verbalizers.layers}")
        if verbalizers.needs_sequence:
            structure = verbalizers.architecture.structure
            raise SpecError(
                f"a verbalizer of structure `{structure}` looks at all tokens again, and drafts come one by one: draft "
                "with a structure without attention, such as `verb-ffn`, or with the logit lens (so is a model read "
                "that is named by its own folder, RUN/student)"
            )
        check_rewinds(backbone)
        return cls(backbone, verbalizers, layer, num_drafts, confidence)

    def summed(self, processes: Processes) -> "Drafter":
        """The same with what has come of it in all processes of a launch."""
        found = processes.gather((self.num_drafted, self.num_accepted, self.num_checks))
        drafted, accepted, checks = (sum(counts) for counts in zip(*found, strict=True))
        return replace(self, num_drafted=drafted, num_accepted=accepted, num_checks=checks)

    def __str__(self) -> str:
        counts = self.counts
        return (
            f"layer {self.layer} ({counts['structure']}) drafted the answers: {100 * counts['acceptance']:.0f} % of "
            f"its words stood, {counts['tokens_per_pass']:.2f} words a pass of the model"
        )

    @property
    def counts(self) -> dict[str, Any]:
        """`acceptance`: share of drafted tokens kept; `tokens_per_pass`: of the whole model, 1 without drafts."""
        drafted, checks = max(1, self.num_drafted), max(1, self.num_checks)
        return {
            "layer": self.layer,
            "structure": self.verbalizers.architecture.structure,
            "num_drafts": self.num_drafts,
            "confidence": self.confidence,
            "num_drafted": self.num_drafted,
            "acceptance": self.num_accepted / drafted,
            "tokens_per_pass": 1 + self.num_accepted / checks,
        }


@torch.inference_mode()
def decode(
    drafter: Drafter,
    inputs: dict[str, Tensor],
    *,
    max_new_tokens: int,
    eot_id: int,
    vocab_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[list[int]]:
    """The ids that follow each prompt of `inputs` (padded on the left), with `eot_id` where the model came to it."""
    speaker = _Speaker(drafter, vocab_size, temperature, top_p)
    rows = speaker.begin(inputs)
    rows.said = {row: _cut(ids, eot_id, max_new_tokens) for row, ids in zip(rows.numbers, rows.ids, strict=True)}

    def is_over(said: list[int]) -> bool:
        return len(said) >= max_new_tokens or eot_id in said

    while going := [i for i, row in enumerate(rows.numbers) if not is_over(rows.said[row])]:
        if len(going) < len(rows.numbers):
            rows.keep(going)
        left = max_new_tokens - min(len(ids) for ids in rows.ids)
        num_drafts, accepted = speaker.speak(rows, min(drafter.num_drafts, left - 1))
        for row, ids, count in zip(rows.numbers, rows.ids, accepted, strict=True):
            num_before, said = len(rows.said[row]), _cut(ids, eot_id, max_new_tokens)
            rows.said[row] = said
            num_new = len(said) - num_before
            drafter.num_accepted += min(count, num_new)
            drafter.num_drafted += min(num_drafts, num_new) if is_over(said) else num_drafts
            drafter.num_checks += 1
    return [rows.said[row] for row in sorted(rows.said)]


def _cut(ids: list[int], eot_id: int, max_new_tokens: int) -> list[int]:
    ids = ids[:max_new_tokens]
    return ids[: ids.index(eot_id) + 1] if eot_id in ids else ids


@dataclass
class _Rows:
    """The rows of a batch that still speak. The last id of each is not in the cache yet."""

    cache: Any  # a DynamicCache whose layers keep all keys and values, as `check_rewinds` has seen
    mask_BS: Tensor
    next_B: Tensor  # the position of each row's next token; [4, B] where a model counts several
    ids: list[list[int]]
    numbers: list[int]  # which rows of the batch they are
    said: dict[int, list[int]] = field(default_factory=dict)

    def keep(self, rows: list[int]) -> None:
        index_B = torch.tensor(rows, device=self.mask_BS.device)
        self.next_B, self.mask_BS = self.next_B[..., index_B], self.mask_BS[index_B]
        for layer in self.cache.layers:
            layer.batch_select_indices(index_B.to(layer.keys.device))
        self.ids, self.numbers = [self.ids[i] for i in rows], [self.numbers[i] for i in rows]

    def accept(self, ids_BN: Tensor, num_accepted_B: Tensor, own_B: Tensor) -> None:
        """Take the first drafts of each row and the model's own token, and take back what the cache has of the rest."""
        num_drafts = ids_BN.shape[1]
        self.next_B = self.next_B + num_accepted_B + 1
        self._take_back(num_drafts - num_accepted_B)
        for ids, drafted, count, own in zip(
            self.ids, ids_BN.tolist(), num_accepted_B.tolist(), own_B.tolist(), strict=True
        ):
            ids += [*drafted[:count], own]

    def _take_back(self, num_B: Tensor) -> None:
        """Forget the last `num` places of each row. Rows stay padded on the left, so longer ones keep their windows."""
        least, most = int(num_B.min()), int(num_B.max())
        if least:
            self.mask_BS = self.mask_BS[:, :-least]
            crop(self.cache, len(self.cache.layers), least)
        if most == least:
            return
        width = self.mask_BS.shape[1]
        ends_B1 = (width - (num_B - least))[:, None]
        is_kept_BS = self.mask_BS.bool() & (torch.arange(width, device=num_B.device) < ends_B1)
        # Places that are kept, in their order, behind all others.
        order_BS = is_kept_BS.byte().argsort(dim=1, stable=True)[:, width - int(is_kept_BS.sum(1).max()) :]
        self.mask_BS = is_kept_BS.gather(1, order_BS).to(self.mask_BS.dtype)
        for layer in self.cache.layers:
            layer.keys, layer.values = (_gather_places(held, order_BS) for held in (layer.keys, layer.values))


def _gather_places(held_BHSD: Tensor, order_BS: Tensor) -> Tensor:
    index_B1S1 = order_BS.to(held_BHSD.device)[:, None, :, None]
    return held_BHSD.gather(2, index_B1S1.expand(-1, held_BHSD.shape[1], -1, held_BHSD.shape[3]))


def crop(cache: Any, num_layers: int, num_tokens: int) -> None:
    """Forget the last tokens in the first layers of a cache."""
    for layer in cache.layers[:num_layers]:
        layer.crop(-num_tokens)


@dataclass
class _Speaker:
    drafter: Drafter
    vocab_size: int
    temperature: float
    top_p: float

    def __post_init__(self) -> None:
        self.backbone = self.drafter.backbone
        self.head = head_of(self.backbone).real(self.vocab_size)
        self.places = "position_ids" in inspect.signature(self.backbone.body.forward).parameters
        self.warpers: list[Any] = [TemperatureLogitsWarper(self.temperature)] if self.temperature else []
        self.warpers += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []

    def begin(self, inputs: dict[str, Tensor]) -> _Rows:
        """Run the prompts and say the first token of each."""
        mask_BP = inputs["attention_mask"]
        self.backbone.forget()
        positions_BP = trunk_positions(self.backbone.plain, inputs)
        next_B = mask_BP.sum(1)
        if positions_BP.ndim == 3:  # behind pictures text counts on from the largest of their positions
            next_B = torch.cat([next_B[None], positions_BP[1:].amax((0, 2)).expand(3, -1) + 1])
        cache, count = DynamicCache(), len(mask_BP)
        rows = _Rows(cache, mask_BP, next_B, [[] for _ in range(count)], list(range(count)))
        last_B = torch.full((count,), mask_BP.shape[1] - 1)
        placed = {"position_ids": positions_BP} if self.places else {}
        given = {**inputs, **placed, "past_key_values": cache, "use_cache": True}
        found = self.backbone.capture(given, [], torch.arange(count), last_B)
        for ids, own in zip(
            rows.ids, self._say(self._logits(found[self.backbone.num_layers]))[0].tolist(), strict=True
        ):
            ids.append(own)
        return rows

    def speak(self, rows: _Rows, most: int) -> tuple[int, list[int]]:
        """Draft, check, and go on behind what is right; how many were drafted, and how many of each row stand."""
        drafter, layer = self.drafter, self.drafter.layer
        last_B1 = torch.tensor([[ids[-1]] for ids in rows.ids], device=rows.mask_BS.device)
        drafted, drafts_BV = [last_B1], []
        is_sure_B = torch.ones(len(last_B1), dtype=torch.bool, device=last_B1.device)
        for step in range(most):
            hidden = self._run(rows, drafted[-1], step, draft=True)
            state_BD = drafter.verbalizers.apply(layer, hidden[layer])
            own_B, probs_BV = self._say(self._logits(state_BD))
            drafted.append(own_B[:, None].to(last_B1.device))
            drafts_BV.append(probs_BV)
            if drafter.confidence:
                shares_BV = probs_BV if self.temperature else probs_BV.softmax(1)
                is_sure_B &= (shares_BV.gather(1, own_B[:, None])[:, 0] >= drafter.confidence).to(is_sure_B.device)
                if not is_sure_B.any():  # of a batch, the row that is sure for longest decides
                    break
        if drafts_BV:
            crop(rows.cache, layer, len(drafts_BV))
        ids_BM = torch.cat(drafted, 1)  # M = N + 1: with the last token that was said
        hidden = self._run(rows, ids_BM, 0, draft=False)
        logits_BMV = self._logits(hidden[self.backbone.num_layers]).unflatten(0, tuple(ids_BM.shape))
        rows.mask_BS = _seen(rows.mask_BS, ids_BM.shape[1])
        ids_BN = ids_BM[:, 1:]
        num_accepted_B, own_B = self._check(ids_BN, drafts_BV, logits_BMV)
        rows.accept(ids_BN, num_accepted_B, own_B)
        return len(drafts_BV), num_accepted_B.tolist()

    def say_at(self, rows: _Rows, ids_B1: Tensor, layer: int) -> list[int]:
        """The token of each row behind one more, said by an exit or by the last layer; the cache then has that one."""
        is_exit = layer < self.backbone.num_layers
        state = self._run(rows, ids_B1, 0, draft=is_exit)[layer]
        state_BD = self.drafter.verbalizers.apply(layer, state) if is_exit else state
        return self._say(self._logits(state_BD))[0].tolist()

    def _run(self, rows: _Rows, ids_BN: Tensor, num_before: int, *, draft: bool) -> dict[int, Any]:
        """Hidden states [B * N, D] of new tokens, at the layer that drafts or at the end; the cache then has them."""
        num_rows, num_new = ids_BN.shape
        steps_N = torch.arange(num_before, num_before + num_new, device=rows.next_B.device)
        placed = {"position_ids": rows.next_B[..., None] + steps_N} if self.places else {}
        seen = _seen(rows.mask_BS, num_before + num_new)
        given = {
            "input_ids": ids_BN,
            "attention_mask": seen,
            **placed,
            "past_key_values": rows.cache,
            "use_cache": True,
        }
        rows_T, positions_T = torch.arange(num_rows).repeat_interleave(num_new), torch.arange(num_new).repeat(num_rows)
        layers = [self.drafter.layer] if draft else []
        return self.backbone.capture(given, layers, rows_T, positions_T, with_final=not draft)

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] fp32, by a product in the model's own dtype, as its own head makes them."""
        products_TV = hidden_TD @ self.head.weight_VD.T.to(hidden_TD.dtype)
        return self.head.shape_(products_TV, slice(0, self.vocab_size)).float()

    def _say(self, logits_TV: Tensor) -> tuple[Tensor, Tensor]:
        """The token [T] that comes, and the distribution [T, V] it is drawn from (of greedy decoding, the logits)."""
        if not self.temperature:
            return logits_TV.argmax(1), logits_TV
        for warper in self.warpers:
            logits_TV = warper(None, logits_TV)
        probs_TV = logits_TV.softmax(1)
        return probs_TV.multinomial(1)[:, 0], probs_TV

    def _check(self, ids_BN: Tensor, drafts: list[Tensor], logits_BMV: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafts of each row stand, and the token that comes behind them; [B] each."""
        num_rows, num_drafts = ids_BN.shape
        own_T, probs_TV = self._say(logits_BMV.flatten(0, 1))
        own_BM, row_B = own_T.unflatten(0, (num_rows, -1)), torch.arange(num_rows, device=own_T.device)
        if not self.temperature:
            count_B = (own_BM[:, :num_drafts] == ids_BN.to(own_BM.device)).cumprod(1).sum(1)
            return count_B.to(ids_BN.device), own_BM[row_B, count_B].to(ids_BN.device)
        probs_BMV = probs_TV.unflatten(0, (num_rows, -1))
        none_B1V = torch.zeros_like(probs_BMV[:, :1])  # nothing was drafted for the token behind the last draft
        drafts_BMV = torch.cat([*(probs_BV[:, None].to(probs_TV.device) for probs_BV in drafts), none_B1V], 1)
        at_BN1 = ids_BN.to(probs_TV.device)[..., None]
        ratio_BN = (probs_BMV[:, :num_drafts].gather(2, at_BN1) / drafts_BMV[:, :num_drafts].gather(2, at_BN1))[..., 0]
        count_B = (torch.rand_like(ratio_BN) < ratio_BN).long().cumprod(1).sum(1)
        rest_BV = (probs_BMV - drafts_BMV)[row_B, count_B].clamp(min=0)
        # Equal distributions leave a rest of rounding alone, and are never refused but by it.
        rest_BV = torch.where(rest_BV.sum(1, keepdim=True) > 0, rest_BV, probs_BMV[row_B, count_B])
        return count_B.to(ids_BN.device), rest_BV.multinomial(1)[:, 0].to(ids_BN.device)


@torch.inference_mode()
def step_seconds(
    backbone: Backbone, verbalizers: Verbalizers, vocab_size: int, *, num_cached: int = 128, num_rounds: int = 7
) -> dict[int, float]:
    """Time of the next token of one text behind `num_cached` others, by the exit that says it and by the last layer.

    The median over rounds in which every exit has its turn. Raises ModelError for a model that cannot be rewound.
    """
    check_rewinds(backbone)
    layers, took = verbalizers.layers, dict[int, list[float]]()
    ids_BS = (torch.arange(num_cached, device=backbone.device)[None] * 7 + 11) % vocab_size
    speakers = {layer: _Speaker(Drafter(backbone, verbalizers, layer), vocab_size, 0.0, 1.0) for layer in layers}
    last = _Speaker(Drafter(backbone, verbalizers, backbone.num_layers), vocab_size, 0.0, 1.0)
    rows = last.begin({"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)})
    for number in range(num_rounds + 1):  # the first one warms up
        for layer, speaker in [*speakers.items(), (backbone.num_layers, last)]:
            started = time.perf_counter()
            speaker.say_at(rows, ids_BS[:, :1], layer)
            if number:
                took.setdefault(layer, []).append(time.perf_counter() - started)
            crop(rows.cache, layer, 1)
    return {layer: statistics.median(times) for layer, times in took.items()}


def _seen(mask_BS: Tensor, num_new: int) -> Tensor:
    return torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), num_new)], 1)


@torch.inference_mode()
def check_rewinds(backbone: Backbone) -> None:
    """Raise ModelError unless the model can go on from a cache from which tokens were taken back.

    What its layers keep is looked at, then eight tokens that run in pieces, two of them taken back in between, are
    compared with a run of all.
    """
    name = type(backbone.plain).__name__
    why = _why_not(backbone)
    if not why:
        ids_BS = (torch.arange(16, device=backbone.device).view(2, 8) * 7 + 11) % backbone.real_vocab_limit
        whole_TD, pieces_TD = (_last_state(backbone, ids_BS, pieces) for pieces in (False, True))
        scale = float((whole_TD.max() - whole_TD.min()).clamp(min=1e-9))
        found = float((whole_TD - pieces_TD).abs().max()) / scale
        tolerance = REWOUND_TOLERANCE if whole_TD.dtype == torch.float32 else 0.05
        if not found < tolerance:
            why = f"hidden states differ by {found:.2g} of their range after tokens were taken back"
    if why:
        raise ModelError(
            f"`{name}` cannot draft: {why}, and drafts that are wrong have to be taken back. Decode without drafts"
        )


def _why_not(backbone: Backbone) -> str:
    if traversal_of(backbone.plain) is not None:
        return "its layers are traversed, and their further passes need a prompt in one call"
    if "past_key_values" not in inspect.signature(backbone.body.forward).parameters:
        return "its forward pass takes no `past_key_values`"
    if backbone.rope_limit is not None:
        return f"its rope changes with the length of a text, at {backbone.rope_limit} tokens"
    kept = DynamicCache(config=backbone.text_config).layers
    other = {type(layer).__name__ for layer in kept if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    return f"its layers keep a state (`{'`, `'.join(sorted(other))}`)" if other else ""


def _last_state(backbone: Backbone, ids_BS: Tensor, in_pieces: bool) -> Tensor:
    """The final state [B, D] of the last token, from one run, or from three, of which the last but one ends wrong."""
    num_rows, width = ids_BS.shape
    cache, found = DynamicCache(), torch.empty(0)
    wrong_BS = torch.cat([ids_BS[:, :6], ids_BS[:, :2]], 1)
    runs = [(wrong_BS, 0, 5), (wrong_BS, 5, 8), (ids_BS, 6, 8)] if in_pieces else [(ids_BS, 0, width)]
    for said_BS, start, end in runs:
        if start == 6:
            crop(cache, len(cache.layers), 2)
        given = {"input_ids": said_BS[:, start:end], "attention_mask": torch.ones_like(ids_BS[:, :end])}
        if "position_ids" in inspect.signature(backbone.body.forward).parameters:
            given["position_ids"] = torch.arange(start, end, device=ids_BS.device).expand(num_rows, -1)
        last_B = torch.full((num_rows,), end - start - 1)
        held = {"past_key_values": cache, "use_cache": True}
        found = backbone.capture({**given, **held}, [], torch.arange(num_rows), last_B)[backbone.num_layers]
    return found
