"""One micro-batch of the interaction step: Algorithm 1 over the student's target layers, and the last layer.

Each term goes through verbalizer, head and back before the next one, so one layer's state is alive at a time beside
the gradients in the hidden states; the backbone is stepped back through once, at the end. What is logged stays on the
device until the optimizer step is done.

Legend: T response tokens, S student target layers, N terms: the last layer, then the S target layers.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from vlsi_cache.config.sections import InteractSpec
from vlsi_cache.errors import ModelError
from vlsi_cache.interrupts import stopping_between_steps
from vlsi_cache.models.backbone import Backbone, LayerSequence, head_of
from vlsi_cache.models.verbalizer import Verbalizers
from vlsi_cache.run_files import read_metrics
from vlsi_cache.runs.diagnostics import interact_findings, warn_of
from vlsi_cache.runtime import autocast, memory_gib, seed_step
from vlsi_cache.sparse.cross_entropy import linear_cross_entropy
from vlsi_cache.sparse.divergences import Divergence, DivergenceName
from vlsi_cache.sparse.kl import CandidateKL, LayerRows, candidate_kl
from vlsi_cache.sparse.matching import Matcher, Matching, match_rng
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.sparse.vocab_pass import moved
from vlsi_cache.store.format import CacheHeader

from .loader import MicroBatch, feeding
from .optim import clip_gradients, make_optimizer, optimizer_step
from .probe import is_due, probe
from .student import StudentState

# A divergence is never negative; rounded log-probs can take one of nearly 0 a little below it.
LOWEST_NATS = -0.05


VALUE, LOWEST, LOWEST_TOKEN, MATCH, KEPT = range(5)  # columns of what is logged of a term


@dataclass(frozen=True)
class MicroRows:
    """The rows of a micro-batch, ready on the device: the teacher's intermediate layers, then the final one."""

    layers: LayerRows
    gold_T: Tensor
    gold_logprob_LT: Tensor
    unit_T: Tensor  # which unit a token is matched with: the micro-batch, or its sample
    count_U: Tensor  # tokens of each unit
    share_T: Tensor  # what a token counts for in the loss of the whole batch
    places: list[int]  # of each unit's first sample in the whole batch

    @classmethod
    def of(
        cls, micro: MicroBatch, rows: SparseRows, header: CacheHeader, settings: InteractSpec, device: torch.device
    ) -> "MicroRows":
        """Everything that the terms of one micro-batch are made from but the student."""
        layers = LayerRows.of(
            rows.ids_LTK,
            rows.logprobs_LTK,
            rows.tail_ids_LTm,
            rows.tail_mass_LT,
            rows.entropy_LT,
            rows.lse_LTn,
            v_real=header.v_real,
            tau=settings.tau,
            taus=header.taus,
            device=device,
        )
        # Samples without rows have nothing to match.
        units = {micro.place + i: count for i, count in enumerate(micro.batch.num_tokens) if count}
        if settings.match_unit == "batch":
            units = {micro.place: sum(units.values())}
        counts = list(units.values())
        count_U = torch.tensor(counts)
        unit_T = torch.repeat_interleave(torch.arange(len(counts)), count_U)
        gold_LT = moved(torch.from_numpy(rows.gold_logprob_LT.astype(np.float32)), device)
        unit_T, count_U = moved(unit_T, device), moved(count_U, device)
        return cls(layers, micro.batch.gold_T, gold_LT, unit_T, count_U, micro.share_T, list(units))

    def mean_of_units(self, x_MT: Tensor) -> Tensor:
        """Mean over the tokens of each unit, [M, U]."""
        if self.num_units == 1:
            return x_MT.mean(1, keepdim=True)
        sums_MU = x_MT.new_zeros(len(x_MT), self.num_units).index_add_(1, self.unit_T, x_MT)
        return sums_MU / self.count_U

    @property
    def num_units(self) -> int:
        return len(self.count_U)


@dataclass(frozen=True)
class Terms:
    """What is left of a micro-batch's terms, on the device; columns of `numbers_N5` (float64):

    what the micro-batch adds to the loss of the whole batch, in nats; the lowest value of a token (-inf if one is not
    finite), that token, its teacher target (-1: the labels, whose loss is known for all tokens together), and the share
    of the whole batch that is not left out.
    `matched_US`: the teacher targets of all units. `match_logits`: what they were drawn by, [M, U] for each student
    target; empty where nothing was drawn.
    """

    layers: list[int]
    numbers_N5: Tensor
    matched_US: Tensor
    match_logits: list[Tensor]


@dataclass(frozen=True)
class Interaction:
    """A micro-batch after its turn; no terms if it has no rows."""

    terms: Terms | None
    sample_ids: Sequence[str]
    num_tokens: Sequence[int]

    def sample_of(self, token: int) -> str:
        """The id of the sample that a response token belongs to."""
        return self.sample_ids[int(np.searchsorted(np.cumsum(self.num_tokens), token, side="right"))]


def interaction(
    hidden: Mapping[int, Tensor | LayerSequence],
    backbone: Backbone,
    verbalizers: Verbalizers | None,
    rows: MicroRows,
    *,
    settings: InteractSpec,
    rngs: Sequence[np.random.Generator],
    layer_weight: float = 1.0,
    compiled: bool = False,
) -> Terms:
    """Step back through what `hidden` came from, with what the micro-batch adds to the loss of the whole batch.

    That is lambda_last * last + layer_weight * (sum or mean of the layers), each term a sum over the tokens by their
    shares. `hidden` is by layer. With no verbalizers, or a weight of 0, only the last term is left. `rngs`: a generator
    for each unit.
    """
    if backbone.head_weight.requires_grad:
        raise ModelError("the head trains: while layers are compared through it, in stage interact, it must be frozen")
    layers = verbalizers.layers if verbalizers is not None and layer_weight and settings.intermediate != "none" else []
    turn = _Turn(hidden, backbone, verbalizers, rows, settings, compiled)
    if settings.lambda_last and settings.last != "none":
        turn.last(settings.lambda_last)
    each = layer_weight / (len(layers) if settings.layer_reduction == "mean" and layers else 1)
    if settings.intermediate == "ce":
        for layer in layers:
            turn.labels(layer, each)
    else:
        turn.match_all(layers, rngs, each)
    return turn.finish()


def matcher_of(
    num_student: int, rows: MicroRows, settings: InteractSpec, rngs: Sequence[np.random.Generator]
) -> Matcher:
    """The choice of teacher layers that the settings describe."""
    matching = Matching(
        mode=settings.matching,
        scale=settings.scale,
        temperature=settings.temperature,
        fixed_temperature=settings.fixed_temperature,
        bottom_k=settings.bottom_k,
        sampler=settings.sampler,
    )
    num_teacher = rows.layers.num_layers - 1
    return Matcher(num_student, num_teacher, rngs=rngs, matching=matching)


class _Turn:
    """The terms of one micro-batch as they come: each is stepped back as far as the hidden states it stands on."""

    def __init__(
        self,
        hidden: Mapping[int, Tensor | LayerSequence],
        backbone: Backbone,
        verbalizers: Verbalizers | None,
        rows: MicroRows,
        settings: InteractSpec,
        compiled: bool,
    ) -> None:
        self.hidden, self.backbone, self.verbalizers, self.rows = hidden, backbone, verbalizers, rows
        self.settings, self.compiled, self.head = settings, compiled, head_of(backbone).real(rows.layers.v_real)
        self.gradients: dict[int, Tensor] = {}
        self.layers: list[int] = []
        self.numbers: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.match_logits: list[Tensor] = []

    def last(self, weight: float) -> None:
        """The last layer, through the head alone."""
        layer, alpha = self.backbone.num_layers, self.settings.alpha_ce
        if self.settings.last == "ce":
            self.labels(layer, weight)
            return
        leaf, state_TD = self._state(layer)
        final = self.rows.layers.num_layers - 1
        loss, tokens_T = self._compare(state_TD, self.settings.last, range(final, final + 1)).choose(0)
        if alpha:
            loss = (1 - alpha) * loss + alpha * self._cross_entropy(state_TD)
        self._add(layer, leaf, loss * weight, loss, tokens_T, torch.full_like(self.rows.unit_T, final))

    def labels(self, layer: int, weight: float) -> None:
        """Cross-entropy of a layer with the response."""
        leaf, state_TD = self._state(layer)
        loss = self._cross_entropy(state_TD)
        self._add(layer, leaf, loss * weight, loss, loss.detach()[None], torch.full_like(self.rows.unit_T, -1))

    def matched(self, layer: int, matcher: Matcher, weight: float) -> None:
        """The divergence of a layer from the teacher layers that the matcher chooses."""
        leaf, state_TD = self._state(layer)
        window = matcher.window()
        candidates = self._compare(state_TD, self.settings.intermediate, window)
        index_nU = matcher.choose(self.rows.mean_of_units(candidates.matching_MT))
        losses, tokens, kept = [], [], []
        for index_U in index_nU:
            index_T = index_U[self.rows.unit_T]
            keep_T = self._reliable(candidates, window.start + index_T) if self.settings.reliable_only else None
            loss, tokens_T = candidates.choose(index_T, keep_T=keep_T)
            losses.append(loss)
            tokens.append(tokens_T)
            kept.append(self.rows.share_T.sum() if keep_T is None else (keep_T * self.rows.share_T).sum())
        loss = torch.stack(losses).mean()
        target_nT = window.start + index_nU[:, self.rows.unit_T]
        self._add(layer, leaf, loss * weight, loss, torch.cat(tokens), target_nT.flatten(), torch.stack(kept).mean())
        self.targets.append(window.start + index_nU)

    def match_all(self, layers: list[int], rngs: Sequence[np.random.Generator], weight: float) -> None:
        """Algorithm 1 over the student's target layers."""
        if not layers:
            return
        matcher = matcher_of(len(layers), self.rows, self.settings, rngs)
        if self.settings.sampler == "joint":
            matcher.draw_all([self.divergences(layer, matcher.window(s)) for s, layer in enumerate(layers)])
        for layer in layers:
            self.matched(layer, matcher, weight)
        self.match_logits = matcher.drawn_by

    def divergences(self, layer: int, window: range) -> Tensor:
        """What a layer would be matched by, [M, U], without a gradient."""
        with torch.no_grad():
            _, state_TD = self._state(layer)
            return self.rows.mean_of_units(self._compare(state_TD, "forward_kl", window).matching_MT)

    def finish(self) -> Terms:
        """Step back through the backbone, once for all terms."""
        if self.gradients:
            roots = [_cut_at(self.hidden[layer]) for layer in self.gradients]
            torch.autograd.backward(roots, list(self.gradients.values()))
        matched = [target_nU.flatten() for target_nU in self.targets]
        matched_US = torch.stack(matched, 1) if matched else self.rows.unit_T.new_empty(0, 0)
        return Terms(self.layers, torch.stack(self.numbers), matched_US, self.match_logits)

    def _state(self, layer: int) -> tuple[Tensor, Tensor]:
        """Hidden states of a layer with a gradient of their own, and what enters the head."""
        own, leaf = _cut(self.hidden[layer])
        if self.verbalizers is None or layer == self.backbone.num_layers:
            return leaf, leaf
        with autocast(leaf.device):
            return leaf, self.verbalizers.apply(layer, own)

    def _compare(self, state_TD: Tensor, operation: str, window: range) -> CandidateKL:
        settings = self.settings
        divergence = Divergence(cast(DivergenceName, operation), settings.beta, settings.skew)
        with autocast(state_TD.device):
            return candidate_kl(
                state_TD,
                self.head,
                self.rows.layers,
                window,
                divergence=divergence,
                share_T=self.rows.share_T,
                compiled=self.compiled,
            )

    def _cross_entropy(self, state_TD: Tensor) -> Tensor:
        """With the response."""
        rows = self.rows
        with autocast(state_TD.device):
            return linear_cross_entropy(state_TD, self.head, rows.gold_T, share_T=rows.share_T, compiled=self.compiled)

    def _reliable(self, candidates: CandidateKL, target_T: Tensor) -> Tensor:
        """1 for the tokens of units whose teacher layer says the response better than the student's layer, else 0."""
        teacher_1T = self.rows.gold_logprob_LT.gather(0, target_T[None])
        student_1T = candidates.gold_logprobs(self.rows.gold_T)[None]
        is_better_1U = self.rows.mean_of_units(teacher_1T) >= self.rows.mean_of_units(student_1T)
        return is_better_1U[0][self.rows.unit_T].to(student_1T.dtype)

    def _add(
        self,
        layer: int,
        leaf: Tensor,
        weighted: Tensor,
        loss: Tensor,
        tokens_T: Tensor,
        target_T: Tensor,
        kept: Tensor | None = None,
    ) -> None:
        if leaf.requires_grad:
            weighted.backward()
            assert leaf.grad is not None
            self.gradients[layer] = leaf.grad
        lowest, place = tokens_T.masked_fill(~tokens_T.isfinite(), -torch.inf).min(0)
        share = self.rows.share_T.sum() if kept is None else kept
        self.layers.append(layer)
        # Where several layers are matched, all tokens stand there once for each.
        token = place % len(self.rows.unit_T)
        numbers = (loss.detach(), lowest, token, target_T.gather(0, place[None])[0], share)
        self.numbers.append(torch.stack([x.double() for x in numbers]))


@dataclass(frozen=True)
class StepNumbers:
    """The terms of one optimizer step on the host, over its whole batch, in nats per response token.

    `kept` is the share of the tokens whose teacher layer was reliable; `matched` holds, for each micro-batch, the
    teacher layers of its units, [U, S] ([n * U, S] where n layers are matched).
    """

    values: dict[int, float]
    kept: dict[int, float]
    matched: list[list[list[int]]]


def read_numbers(results: Sequence[Interaction], settings: InteractSpec, teacher_layers: Sequence[int]) -> StepNumbers:
    """The one place of a step that waits for the device.

    Raises ModelError for a token whose divergence is negative or not finite, naming sample and layers.
    """
    values: dict[int, float] = {}
    kept: dict[int, float] = {}
    matched: list[list[list[int]]] = []
    for result in results:
        if result.terms is None:
            matched.append([])
            continue
        numbers_N5 = result.terms.numbers_N5.cpu().numpy()
        for layer, numbers in zip(result.terms.layers, numbers_N5, strict=True):
            _refuse_impossible(result, layer, numbers, settings, teacher_layers)
            values[layer] = values.get(layer, 0.0) + float(numbers[VALUE])
            kept[layer] = kept.get(layer, 0.0) + float(numbers[KEPT])
        matched.append([[teacher_layers[j] for j in unit] for unit in result.terms.matched_US.tolist()])
    return StepNumbers(values, kept, matched)


def _refuse_impossible(
    result: Interaction, layer: int, numbers: np.ndarray, settings: InteractSpec, teacher_layers: Sequence[int]
) -> None:
    value, lowest, target = float(numbers[VALUE]), float(numbers[LOWEST]), int(numbers[MATCH])
    is_finite = np.isfinite(value) and np.isfinite(lowest)
    if is_finite and lowest >= LOWEST_NATS * settings.tau**2:
        return
    against = "the labels" if target < 0 else f"teacher layer {teacher_layers[target]}"
    # The labels' loss is known for all tokens together.
    if target < 0 or (np.isfinite(lowest) and not is_finite):
        where = f"samples `{result.sample_ids[0]}` to `{result.sample_ids[-1]}`"
    else:
        where = f"sample `{result.sample_of(int(numbers[LOWEST_TOKEN]))}`"
    if is_finite:
        what = f"{lowest:.4g} nats at one token: the cached rows are damaged, run vlsi-cache verify CACHE"
    else:
        what = (
            "not finite: training has diverged (start a new run with a lower `learning_rate` or a longer `warmup` for "
            "stage interact), or the cached rows are damaged (run vlsi-cache verify CACHE)"
        )
    raise ModelError(f"{where}: the divergence of student layer {layer} from {against} is {what}")


def _cut(hidden: Tensor | LayerSequence) -> tuple[Tensor | LayerSequence, Tensor]:
    """The same hidden states with a gradient of their own, and the tensor that will hold it."""
    whole = _cut_at(hidden)
    leaf = whole.detach().requires_grad_(whole.requires_grad)
    return (dataclasses.replace(hidden, hidden_BSD=leaf) if isinstance(hidden, LayerSequence) else leaf), leaf


def _cut_at(hidden: Tensor | LayerSequence) -> Tensor:
    return hidden.hidden_BSD if isinstance(hidden, LayerSequence) else hidden


def interact(state: StudentState, model: Any, verbalizers: Verbalizers | None, *, num_steps: int) -> dict[str, Any]:
    """Run the stage from its newest checkpoint; returns its entry for `run.json`."""
    distill, checkpoints, log = state.spec.distill, state.checkpoints, state.log
    settings, layers = distill.interact, state.layers
    backbone = Backbone(model)
    optimizer = make_optimizer(model.parameters(), settings.schedule)
    newest = checkpoints.latest()
    if newest and newest[0] == "sft":
        return {"name": "interact", "steps": num_steps, "seconds": log.stage_seconds("interact")}
    first = checkpoints.step_of("interact")
    if first:
        checkpoints.load("interact", first, model, optimizer)
    log.start_stage("interact", step=first, num_steps=num_steps)
    num_micro = distill.batch_size // distill.micro_batch_size
    capture = verbalizers.capture if verbalizers is not None else partial(backbone.capture, layers=[])
    with feeding(state.feed("interact", first * distill.batch_size)) as feed, stopping_between_steps() as signals:
        for step in range(first, num_steps):
            started, waited, tokens = time.monotonic(), feed.wait_s, 0
            results: list[Interaction] = []
            layer_weight = settings.layer_weight(step / num_steps)
            probed = None
            seed_step(distill.seed, "interact", step)
            for _ in range(num_micro):
                micro = feed.next()
                assert micro.rows is not None
                terms = None
                if micro.rows.num_tokens:  # token selection may leave a sample without rows
                    tokens += len(micro.batch.gold_T)
                    batch = micro.batch
                    with autocast(state.device):
                        hidden = capture(batch.inputs, rows_T=batch.rows_T, positions_T=batch.positions_T)
                    rows = MicroRows.of(micro, micro.rows, state.cache.header, settings, state.device)
                    terms = interaction(
                        hidden,
                        backbone,
                        verbalizers,
                        rows,
                        settings=settings,
                        rngs=[match_rng(distill.seed, step, place) for place in rows.places],
                        layer_weight=layer_weight,
                        compiled=state.compiled,
                    )
                    if probed is None and is_due(step, num_steps):
                        is_sampled = state.cache.header.row_kind == "sampled"
                        probed = probe(hidden, backbone, verbalizers, rows, micro.rows, terms, is_sampled=is_sampled)
                    del rows
                results.append(Interaction(terms, micro.sample_ids, micro.batch.num_tokens))
            numbers = read_numbers(results, settings, state.teacher_layers)
            clip_gradients(optimizer, settings.schedule, "interact", step, num_steps)
            rate = optimizer_step(optimizer, settings.schedule, step, num_steps)

            seconds = time.monotonic() - started
            # What was not trained in this step is not logged either: 0 would read as a perfect match.
            # `kl_last` is the last layer's loss, whatever `last` and `alpha_ce` make of it.
            kl_last = numbers.values.get(backbone.num_layers)
            by_layer = {layer: numbers.values[layer] for layer in layers if layer in numbers.values}
            reduced = sum(by_layer.values()) / (len(layers) or 1 if settings.layer_reduction == "mean" else 1)
            log.write(
                stage="interact",
                step=step + 1,
                num_steps=num_steps,
                loss=settings.lambda_last * (kl_last or 0.0) + layer_weight * reduced,
                **({} if kl_last is None else {"kl_last": kl_last}),
                layers={str(layer): value for layer, value in by_layer.items()},
                **({"reliable": {str(k): v for k, v in numbers.kept.items()}} if settings.reliable_only else {}),
                matched_layers=[unit for units in numbers.matched for unit in units or [[]]],
                # What could be matched, for readers that no longer find the cache; once in a while is enough.
                **({"teacher_layers": state.teacher_layers[:-1]} if layers and is_due(step, num_steps) else {}),
                **({} if probed is None else {"probe": probed}),
                learning_rate=rate,
                tokens_per_s=tokens / seconds,
                data_wait_pct=100 * (feed.wait_s - waited) / seconds,
                memory_gib=memory_gib(state.device),
            )
            if (step + 1) % distill.checkpoint_steps == 0 or step + 1 == num_steps or signals.came:
                checkpoints.save("interact", step + 1, model, optimizer)
                signals.end_here()
    warn_of(interact_findings(read_metrics(log.path)))
    return {"name": "interact", "steps": num_steps, "seconds": log.stage_seconds("interact")}
