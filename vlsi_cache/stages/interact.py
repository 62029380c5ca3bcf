"""Stage interact: each verbalized student layer learns the teacher layer that Algorithm 1 matches it with.

The adapter on the language model trains; verbalizers, head, embeddings and vision tower are frozen, with gradients
flowing through verbalizers and head into the backbone. Layers are matched by the unbiased forward KL.

What happens to one micro-batch stands in `interaction.py`.
"""

import time
from functools import partial
from typing import Any

from vlsi_cache.interrupts import stopping_between_steps
from vlsi_cache.models.layers import Backbone
from vlsi_cache.models.verbalizer import Verbalizers
from vlsi_cache.report.checkup import interact_findings
from vlsi_cache.report.stats import read_metrics
from vlsi_cache.sparse.matching import match_rng

from .feed import feeding
from .interaction import Interaction, MicroRows, interaction, read_numbers
from .loop import autocast, clip_gradients, make_optimizer, memory_gib, optimizer_step, seed_step, warn_of
from .probe import is_due, probe
from .student import StudentState


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
