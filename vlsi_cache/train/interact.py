"""Stage interact: each verbalized student layer learns the teacher layer that Algorithm 1 matches it with.

An adapter on the language model trains (or its decoder layers); verbalizers, head, embeddings and vision tower are
frozen, with gradients flowing through verbalizers and head into the backbone. Layers are matched by the unbiased
forward KL, whatever is trained.

`interact` is the loop over optimizer steps, `micro_batch` what happens to one micro-batch; both are read from top to
bottom. The divergence from many teacher layers at once is `sparse/kl.py`, the draw `sparse/matching.py`.

Legend: T response tokens, M candidate teacher layers, n matched ones (1 but for `bottom_k`), D hidden size.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlsi_cache.config.training import InteractSpec, Operation
from vlsi_cache.errors import ModelError
from vlsi_cache.interrupts import stopping_between_steps
from vlsi_cache.models.backbone import LayerSequence, head_of
from vlsi_cache.models.verbalizer import Verbalizers
from vlsi_cache.run_files import read_metrics
from vlsi_cache.runs.diagnostics import interact_findings, warn_of
from vlsi_cache.runtime import autocast, memory_gib, seed_step
from vlsi_cache.sparse.alm import AlignedKL, ChunkRows, aligned_kl
from vlsi_cache.sparse.cross_entropy import linear_cross_entropy
from vlsi_cache.sparse.divergences import Divergence
from vlsi_cache.sparse.head import Head
from vlsi_cache.sparse.kl import CandidateKL, LayerRows, candidate_kl
from vlsi_cache.sparse.matching import Matching, SearchRange, match_rng
from vlsi_cache.sparse.rows import SparseRows

from .loader import MicroBatch
from .optim import all_done, clip_gradients, make_optimizer, optimizer_step
from .probe import is_due, probe
from .student import StudentState

# A divergence is never negative; rounded log-probs can take one of nearly 0 a little below it.
LOWEST_NATS = -0.05


@dataclass(frozen=True)
class Targets:
    """What one micro-batch learns, on the device: rows of the teacher's intermediate layers, then of its final one.

    `gold_T` are the response ids (int64), `share_T` what each token counts for in the loss of the whole batch.
    """

    rows: LayerRows | ChunkRows
    gold_T: Tensor
    share_T: Tensor


class Term(NamedTuple):
    """One student layer against what it has learned in one micro-batch. Everything stays on the device.

    loss: what it adds to the loss of the whole batch, in nats, without weights. tokens: the divergence of each token,
    [n * T]; of labels the loss alone, [1]. target_n: the teacher targets, by their place in the cache; None for labels.
    match_logits_M: the log-weights that the target was drawn by; None where nothing was drawn.
    """

    layer: int
    loss: Tensor
    tokens: Tensor
    target_n: Tensor | None = None
    match_logits_M: Tensor | None = None


def interact(state: StudentState, model: Any, verbalizers: Verbalizers | None, *, num_steps: int) -> dict[str, Any]:
    """Run the stage from its newest checkpoint; returns its entry for `run.json`.

    Raises ModelError for a loss or a gradient that is not finite, InterruptedRunError after a signal.
    """
    distill, checkpoints, log = state.spec.distill, state.checkpoints, state.log
    settings, header, layers = distill.interact, state.cache.header, state.layers
    newest = checkpoints.latest()
    if newest and newest[0] == "sft":  # an earlier attempt has come further
        return {"name": "interact", "steps": num_steps, "seconds": log.stage_seconds("interact")}
    backbone = state.shared_out(model)
    optimizer = make_optimizer(model.parameters(), settings.schedule)
    first = checkpoints.step_of("interact")
    if first:
        checkpoints.load("interact", first, model, optimizer)
    log.start_stage("interact", step=first, num_steps=num_steps)
    head = head_of(backbone, compiled=state.compiled).real(state.encoder.vocab_size)
    capture = verbalizers.capture if verbalizers is not None else partial(backbone.capture, layers=[])
    with state.feed("interact", first * distill.batch_size) as feed, stopping_between_steps() as signals:
        for step in range(first, num_steps):
            started, waited, num_tokens = time.monotonic(), feed.wait_s, 0
            layer_weight = settings.layer_weight(step / num_steps)
            if distill.exit_weight is not None:  # of the layers' mean
                layer_weight = distill.exit_weight / (1 if settings.layer_reduction == "mean" else max(1, len(layers)))
            results: list[tuple[MicroBatch, list[Term]]] = []
            probed = None
            for micro in feed.batch():
                seed_step(distill.seed, "interact", step, micro.place)
                batch, cached = micro.batch, micro.rows
                assert cached is not None
                terms: list[Term] = []
                results.append((micro, terms))
                # Token selection may leave a sample without rows.
                if not len(batch.gold_T) and not state.is_sharded:
                    continue
                num_tokens += len(batch.gold_T)
                with autocast(state.device):
                    hidden = capture(batch.inputs, rows_T=batch.rows_T, positions_T=batch.positions_T)
                if not len(batch.gold_T):
                    pass_through(hidden, settings)
                    continue
                targets = Targets(rows_of(micro, settings), batch.gold_T, micro.share_T)
                rng = match_rng(distill.seed, step, micro.place)
                terms += micro_batch(hidden, targets, head, verbalizers, settings, rng, layer_weight)
                if probed is None and cached.num_tokens and is_due(step, num_steps):
                    matches = {
                        term.layer: (term.target_n[0], term.match_logits_M)
                        for term in terms
                        if term.layer in layers and term.target_n is not None
                    }
                    is_sampled = header.row_kind == "sampled"
                    probed = probe(
                        hidden,
                        head,
                        verbalizers,
                        matches,
                        probed_rows(micro),
                        batch.gold_T,
                        is_sampled=is_sampled,
                        tokens_P=None if micro.chunks is None else micro.chunks.index_P,
                    )
                del hidden, targets
            # From here on the host waits for the device.
            losses = losses_of(results, settings, state.teacher_layers)
            state.processes.sum_gradients(optimizer)
            clip_gradients(optimizer, settings.schedule, "interact", step, num_steps)
            rate = optimizer_step(optimizer, settings.schedule, step, num_steps)

            own = StepOfOne(losses, [matches_of(terms, layers, state.teacher_layers) for _, terms in results], probed)
            done = all_done(state.processes, own, num_tokens, memory_gib(state.device), is_ending=signals.came)
            losses, matched, probed = of_all(done.found)
            seconds = time.monotonic() - started
            # What was not trained in this step is not logged either: 0 would read as a perfect match.
            # `kl_last` is the last layer's loss, whatever `last` and `alpha_ce` make of it.
            kl_last = losses.get(backbone.num_layers)
            by_layer = {layer: losses[layer] for layer in layers if layer in losses}
            reduced = sum(by_layer.values()) / (len(layers) or 1 if settings.layer_reduction == "mean" else 1)
            log.write(
                stage="interact",
                step=step + 1,
                num_steps=num_steps,
                loss=settings.lambda_last * (kl_last or 0.0) + layer_weight * reduced,
                **({} if kl_last is None else {"kl_last": kl_last}),
                layers={str(layer): value for layer, value in by_layer.items()},
                matched_layers=matched,
                # What could be matched, for readers that no longer find the cache; once in a while is enough.
                **({"teacher_layers": state.teacher_layers[:-1]} if layers and is_due(step, num_steps) else {}),
                **({} if probed is None else {"probe": probed}),
                learning_rate=rate,
                tokens_per_s=done.num_tokens / seconds,
                data_wait_pct=100 * (feed.wait_s - waited) / seconds,
                memory_gib=done.memory_gib,
            )
            if (step + 1) % distill.checkpoint_steps == 0 or step + 1 == num_steps or done.is_ending:
                checkpoints.save("interact", step + 1, model, optimizer)
                done.end_here()
    warn_of(interact_findings(read_metrics(log.path)))
    return {"name": "interact", "steps": num_steps, "seconds": log.stage_seconds("interact")}


def rows_of(micro: MicroBatch, settings: InteractSpec) -> LayerRows | ChunkRows:
    """What the teacher says of a micro-batch, on its device."""
    batch, cached = micro.batch, micro.rows
    assert cached is not None
    if micro.chunks is None:
        return LayerRows.of(cached, tau=settings.tau, device=batch.gold_T.device)
    return ChunkRows.of(cached, micro.chunks, batch.gold_T, tau=settings.chunk_temperature, device=batch.gold_T.device)


def probed_rows(micro: MicroBatch) -> SparseRows:
    """The rows of a micro-batch; without tail samples where another vocabulary has lost some, as they are matched."""
    assert micro.rows is not None
    if micro.chunks is None or not micro.chunks.lost_P.any():
        return micro.rows
    return dataclasses.replace(micro.rows, tail_ids_LTm=micro.rows.tail_ids_LTm[..., :0])


def _compare(
    state_TD: Tensor, head: Head, rows: LayerRows | ChunkRows, window: range, divergence: Divergence, share_T: Tensor
) -> CandidateKL | AlignedKL:
    """One student layer against the teacher layers `window`."""
    if isinstance(rows, ChunkRows):
        return aligned_kl(state_TD, head, rows, window, divergence=divergence, share_T=share_T)
    return candidate_kl(state_TD, head, rows, window, divergence=divergence, share_T=share_T)


def micro_batch(
    hidden: Mapping[int, Tensor | LayerSequence],
    targets: Targets,
    head: Head,
    verbalizers: Verbalizers | None,
    settings: InteractSpec,
    rng: np.random.Generator,
    layer_weight: float = 1.0,
) -> list[Term]:
    """Step back through what `hidden` came from, with what the micro-batch adds to the loss of the whole batch.

    That is lambda_last * last + layer_weight * (sum or mean of the layers), each a sum over the tokens by their shares.
    `hidden` is by layer, the model's last one among them: [T, D], or sequences for verbalizers that need them. `head`
    has the rows of the real vocabulary alone. With no verbalizers, or a weight of 0, only the last layer is left. The
    terms come back in the order last layer, target layers; nothing is read from the device. Raises ModelError for a
    head that trains.
    """
    if head.requires_grad:
        raise ModelError("the head trains: while layers are compared through it, in stage interact, it must be frozen")
    rows, gold_T, share_T = targets.rows, targets.gold_T, targets.share_T
    device, final, last = share_T.device, rows.num_layers - 1, max(hidden)
    at_last, at_layers = _divergence(settings.last, settings), _divergence(settings.intermediate, settings)
    matching = _matching(settings)
    gradients: dict[int, Tensor] = {}
    terms: list[Term] = []

    def cross_entropy(state_TD: Tensor) -> Tensor:
        with autocast(device):
            return linear_cross_entropy(state_TD, head, gold_T, share_T=share_T)

    def add(term: Term, leaf: Tensor, weight: float) -> None:
        """Step back as far as the hidden states that the term stands on."""
        if leaf.requires_grad:
            (term.loss * weight).backward()
            assert leaf.grad is not None
            gradients[term.layer] = leaf.grad
        terms.append(term._replace(loss=term.loss.detach()))

    # The last layer speaks through the head alone.
    if settings.lambda_last and settings.last != "none":
        _, leaf = cut(hidden[last])
        if at_last is None:
            loss = cross_entropy(leaf)
            add(Term(last, loss, loss.detach()[None]), leaf, settings.lambda_last)
        else:
            with autocast(device):
                only = range(final, final + 1)
                kl = _compare(leaf, head, rows, only, at_last, share_T)
            loss, tokens_T = kl.choose(0)
            if settings.alpha_ce:
                loss = (1 - settings.alpha_ce) * loss + settings.alpha_ce * cross_entropy(leaf)
            target_n = torch.full((1,), final, dtype=torch.long, device=device)
            add(Term(last, loss, tokens_T, target_n), leaf, settings.lambda_last)
            del kl

    # Algorithm 1 over the target layers; one layer's state is alive at a time.
    layers = verbalizers.layers if verbalizers is not None and layer_weight and settings.intermediate != "none" else []
    weight = layer_weight / (len(layers) if settings.layer_reduction == "mean" and layers else 1)
    search = SearchRange(len(layers), final, rng=rng, matching=matching) if layers else None
    for layer in layers:
        assert verbalizers is not None
        assert search is not None
        own, leaf = cut(hidden[layer])
        with autocast(device):
            state_TD = verbalizers.apply(layer, own)
        if at_layers is None:
            loss = cross_entropy(state_TD)
            add(Term(layer, loss, loss.detach()[None]), leaf, weight)
            continue
        with autocast(device):
            window = search.range
            # Every candidate teacher layer in one pass over the vocabulary.
            kl = _compare(state_TD, head, rows, window, at_layers, share_T)
        target_n, match_logits_M = search.draw(kl.matching_M)
        chosen = [kl.choose(target - window.start) for target in target_n]
        loss, tokens = torch.stack([one.value for one in chosen]).mean(), torch.cat([one.tokens_T for one in chosen])
        add(Term(layer, loss, tokens, target_n, match_logits_M), leaf, weight)
        del kl, chosen, state_TD, loss

    if gradients:  # once through the backbone for all terms
        torch.autograd.backward([_tensor_of(hidden[layer]) for layer in gradients], list(gradients.values()))
    return terms


def pass_through(hidden: Mapping[int, Tensor | LayerSequence], settings: InteractSpec) -> None:
    """Step back with a gradient of 0 as far as `micro_batch` does: where layers are sharded, all processes gather each
    layer together, those without rows too."""
    deepest = max(layer for layer in hidden if settings.trains_last or layer != max(hidden))
    (0.0 * _tensor_of(hidden[deepest])).sum().backward()


def losses_of(
    results: Sequence[tuple[MicroBatch, list[Term]]], settings: InteractSpec, teacher_layers: Sequence[int]
) -> dict[int, float]:
    """The loss of each student layer over the whole batch of one step, in nats per response token.

    Raises ModelError for a token whose divergence is negative or not finite, naming sample and layers.
    """
    terms = [(micro, term) for micro, found in results for term in found]
    if not terms:
        return {}
    lowest_N = torch.stack([_finite_or_lowest(term.tokens).min().double() for _, term in terms]).tolist()
    losses_N = torch.stack([term.loss.double() for _, term in terms]).tolist()
    losses: dict[int, float] = {}
    for (micro, term), loss, lowest in zip(terms, losses_N, lowest_N, strict=True):
        if not np.isfinite(loss) or lowest < LOWEST_NATS * settings.tau**2:
            raise ModelError(_impossible(micro, term, loss, lowest, teacher_layers))
        losses[term.layer] = losses.get(term.layer, 0.0) + loss
    return losses


class StepOfOne(NamedTuple):
    """What one process has found in a step: losses by layer, matches of each of its micro-batches, and its probe."""

    losses: dict[int, float]
    matches: list[list[list[int]]]
    probed: dict[str, Any] | None


def of_all(steps: Sequence[StepOfOne]) -> tuple[dict[int, float], list[list[int]], dict[str, Any] | None]:
    """The losses of the whole batch, the matches in the order of its micro-batches, and the first probe."""
    losses: dict[int, float] = {}
    for step in steps:
        for layer, loss in step.losses.items():
            losses[layer] = losses.get(layer, 0.0) + loss
    # Micro-batches were dealt out in turns.
    matched = [match for turn in zip(*(step.matches for step in steps), strict=True) for one in turn for match in one]
    return losses, matched, next((step.probed for step in steps if step.probed is not None), None)


def matches_of(terms: Sequence[Term], layers: Sequence[int], teacher_layers: Sequence[int]) -> list[list[int]]:
    """The matched teacher layers of a micro-batch, one for each student target; n lists where n are matched."""
    matched = [term.target_n for term in terms if term.layer in layers and term.target_n is not None]
    if not matched:
        return [[]]
    return [[teacher_layers[target] for target in match] for match in torch.stack(matched, 1).tolist()]


def _impossible(micro: MicroBatch, term: Term, loss: float, lowest: float, teacher_layers: Sequence[int]) -> str:
    """What is wrong with a term whose loss or one of whose tokens cannot be."""
    where = f"samples `{micro.sample_ids[0]}` to `{micro.sample_ids[-1]}`"
    against = "the labels"
    if term.target_n is not None:
        # Where several layers are matched, all tokens stand there once for each.
        match, token = divmod(int(_finite_or_lowest(term.tokens).argmin()), len(term.tokens) // len(term.target_n))
        against = f"teacher layer {teacher_layers[int(term.target_n[match])]}"
        if np.isfinite(loss) or not np.isfinite(lowest):
            ends = np.cumsum(micro.batch.num_tokens)
            where = f"sample `{micro.sample_ids[int(np.searchsorted(ends, token, side='right'))]}`"
    if np.isfinite(loss) and np.isfinite(lowest):
        what = f"{lowest:.4g} nats at one token: the cached rows are damaged, run vlsi-cache verify CACHE"
    else:
        what = (
            "not finite: training has diverged (start a new run with a lower `learning_rate` or a longer `warmup` for "
            "stage interact), or the cached rows are damaged (run vlsi-cache verify CACHE)"
        )
    return f"{where}: the divergence of student layer {term.layer} from {against} is {what}"


def _finite_or_lowest(tokens: Tensor) -> Tensor:
    return tokens.masked_fill(~tokens.isfinite(), -torch.inf)


def _divergence(operation: Operation, settings: InteractSpec) -> Divergence | None:
    """None for labels and for nothing."""
    if operation in ("ce", "none"):
        return None
    return Divergence(operation, settings.beta, settings.skew)


def _matching(settings: InteractSpec) -> Matching:
    return Matching(
        mode=settings.matching,
        scale=settings.scale,
        temperature=settings.temperature,
        fixed_temperature=settings.fixed_temperature,
        bottom_k=settings.bottom_k,
    )


def cut(hidden: Tensor | LayerSequence) -> tuple[Tensor | LayerSequence, Tensor]:
    """The same hidden states with a gradient of their own, and the tensor that will hold it."""
    whole = _tensor_of(hidden)
    leaf = whole.detach().requires_grad_(whole.requires_grad)
    return (dataclasses.replace(hidden, hidden_BSD=leaf) if isinstance(hidden, LayerSequence) else leaf), leaf


def _tensor_of(hidden: Tensor | LayerSequence) -> Tensor:
    return hidden.hidden_BSD if isinstance(hidden, LayerSequence) else hidden
