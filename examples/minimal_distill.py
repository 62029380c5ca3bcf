"""The whole method in plain lines: what `vlsi-cache distill CACHE` does, without its checks, checkpoints and options.

    python examples/minimal_distill.py CACHE STUDENT

Three stages, each a loop of AdamW: the student's verbalizers learn to say the response; the student's verbalized layers
learn the teacher layers that Algorithm 1 matches them with; the student learns the labels. No teacher is loaded.

Legend: T response tokens, D hidden size, V head rows.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import vlsi_cache as vc
from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.config.training import Schedule
from vlsi_cache.data.records import read_records
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.lora import text_linears
from vlsi_cache.models.verbalizer import build_verbalizers
from vlsi_cache.sparse.kl import LayerRows, candidate_kl
from vlsi_cache.sparse.matching import SearchRange, match_rng
from vlsi_cache.train.loader import MicroBatch, encode_pairs


def main(cache_path: str, student: str) -> dict[str, list[float]]:
    """Distil the student, whose weights are left in memory only; returns the loss of every step by stage."""
    cache = vc.open_cache(cache_path)
    spec = spec_from_dict(cache.header.spec, where=cache_path)  # as the cache was built, with the schedules in it
    distill = spec.distill
    named = ModelRef(student)
    model, encoder = named.load("cpu"), named.encoder(spec.data.encoding())  # every weight is frozen, in float32
    records = {record.id: record for record in read_records(spec.data)}

    def batches(stage_seed: int, layers: list[int]) -> Iterator[MicroBatch]:
        """Batches for ever: rows of the cache with the same samples as the student's encoder reads them."""
        dataset = vc.CacheDataset(cache, layers=layers)

        def collate(rows: list[Any]) -> MicroBatch:
            return encode_pairs([(records[row.sample_id], row) for row in rows], encoder)

        for epoch in itertools.count():
            order = vc.PartWindowSampler(dataset, seed=stage_seed, epoch=epoch, window_parts=distill.window_parts)
            yield from DataLoader(dataset, distill.batch_size, sampler=order, collate_fn=collate, drop_last=True)

    losses: dict[str, list[float]] = {"verbalize": [], "interact": [], "sft": []}

    # Verbalize: head and backbone are frozen, each verbalizer has the cross-entropy of its own layer.
    backbone = Backbone(model)
    head_VD = backbone.head_weight[: cache.header.vocab_size]
    architecture = spec.verbalizer.model_dump(exclude={"loss"})
    verbalizers = build_verbalizers(backbone, list(distill.layers), **architecture, seed=distill.seed)
    groups = [{"params": list(one.parameters())} for one in verbalizers.by_layer.values()]
    for update, batch in steps(groups, distill.verbalize, batches(3 * distill.seed + 1, [])):
        inputs = batch.batch
        with torch.no_grad():
            hidden = verbalizers.capture(inputs.inputs, inputs.rows_T, inputs.positions_T)
        layer_losses = [
            cross_entropy(verbalizers.apply(layer, hidden[layer]) @ head_VD.T, inputs.gold_T)
            for layer in verbalizers.layers
        ]
        torch.stack(layer_losses).sum().backward()
        losses["verbalize"].append(sum(float(loss.detach()) for loss in layer_losses))
        update()
    verbalizers.requires_grad_(False)

    # Interact: an adapter on the language model learns; gradients flow through frozen verbalizers and head.
    torch.manual_seed(distill.seed)
    lora = LoraConfig(r=distill.lora.rank, lora_alpha=distill.lora.alpha, target_modules=text_linears(model))
    model = get_peft_model(model, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch_source = batches(3 * distill.seed + 2, cache.layers)
    for step, (update, batch) in enumerate(steps([{"params": trained}], distill.interact.schedule, batch_source)):
        inputs, rows = batch.batch, batch.rows
        hidden = verbalizers.capture(inputs.inputs, inputs.rows_T, inputs.positions_T)
        teacher = LayerRows.of(rows)
        final = teacher.num_layers - 1
        last = candidate_kl(hidden[backbone.num_layers], head_VD, teacher, range(final, final + 1)).loss()
        total = distill.interact.lambda_last * last
        search = SearchRange(len(verbalizers.layers), final, rng=match_rng(distill.seed, step, 0))  # Algorithm 1
        for layer in verbalizers.layers:
            candidates = search.range
            kl = candidate_kl(verbalizers.apply(layer, hidden[layer]), head_VD, teacher, candidates)
            matched, _ = search.draw(kl.matching_M)
            total = total + kl.loss(matched[0] - candidates.start)
        total.backward()
        losses["interact"].append(float(total.detach()))
        update()

    # Sft: adapter, head and embeddings learn the labels.
    for module in (model.get_base_model().get_input_embeddings(), model.get_base_model().get_output_embeddings()):
        module.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backbone = Backbone(model)
    for update, batch in steps([{"params": trained}], distill.sft.schedule, batches(3 * distill.seed + 3, [])):
        inputs = batch.batch
        hidden = backbone.capture(inputs.inputs, [], inputs.rows_T, inputs.positions_T)
        loss = cross_entropy(hidden[backbone.num_layers] @ backbone.head_weight.T, inputs.gold_T)
        loss.backward()
        losses["sft"].append(float(loss.detach()))
        update()
    return losses


def steps(groups: list[dict[str, Any]], schedule: Schedule, batches: Iterator[MicroBatch]) -> Iterator[Any]:
    """One `(update, batch)` for each optimizer step: AdamW, each group clipped by itself, warm-up, then a cosine."""
    optimizer, num_steps = torch.optim.AdamW(groups, lr=0.0, weight_decay=schedule.weight_decay), schedule.steps
    assert num_steps is not None
    num_warmup = math.ceil(schedule.warmup * num_steps)
    for step in range(num_steps):
        progress = max(0.0, (step - num_warmup) / max(1, num_steps - num_warmup))
        span = schedule.learning_rate - schedule.final_learning_rate
        rate = schedule.final_learning_rate + 0.5 * span * (1 + math.cos(math.pi * progress))
        if step < num_warmup:
            rate = schedule.learning_rate * (step + 1) / num_warmup

        def update(rate: float = rate) -> None:
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], schedule.clip_norm)
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

        yield update, next(batches)


if __name__ == "__main__":
    for stage, values in main(*sys.argv[1:3]).items():
        print(stage, " ".join(f"{value:.4f}" for value in values))
