"""Stage verbalize: train one verbalizer per target layer to say the response, or what the model says; the rest is
frozen.

The same loop serves the teacher (`train_verbalizers`) and the student (called by `distill`). Since backbone and head
are frozen, the layers' gradients are independent: each layer is stepped through the head and back before the next
one, so one layer's logits are alive at a time.

Legend: T response tokens, D hidden size.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlsi_cache.data.collate import Batch
from vlsi_cache.data.records import RecordSet
from vlsi_cache.disk import refuse_url
from vlsi_cache.errors import SpecError
from vlsi_cache.interrupts import stopping_between_steps
from vlsi_cache.layer_names import shown_layers
from vlsi_cache.models.layers import Backbone
from vlsi_cache.models.verbalizer import Verbalizers, build_verbalizers
from vlsi_cache.progress import say
from vlsi_cache.report.checkup import verbalizer_findings
from vlsi_cache.report.stats import read_metrics
from vlsi_cache.sparse.whole import head_output, kl_to_output, linear_cross_entropy
from vlsi_cache.spec import CacheSpec, Schedule, VerbalizerSpec

from .feed import Feed, feeding, shuffled_records
from .inputs import TeacherInputs, open_teacher_inputs
from .loop import (
    Checkpoints,
    MetricsLog,
    autocast,
    choose_kernels,
    clip_gradients,
    head_of,
    make_grouped_optimizer,
    memory_gib,
    optimizer_step,
    refuse_destroyed,
    seed_step,
    warn_of,
)
from .runs import WHOLE_BATCH, Run, already_done, check_run_folder, finish_run, open_run, python_call, waiting_for
from .verbalizer_subsets import (
    check_folder_of_all,
    check_neighbours,
    check_shared_folder,
    choose_layers,
    subset_name,
    trained_layers,
)

KIND = "train-verbalizers"


def train_verbalizers(
    spec: CacheSpec,
    *,
    out: Path | str,
    device: str | None = None,
    layers: str | Sequence[int] | None = None,
    rank: int = 0,
    world: int = 1,
) -> Path:
    """Train the teacher's verbalizers into the folder `out`; run again after a kill, it goes on.

    Writes `verbalizers/layer_KKKK.safetensors`, `verbalizers.json`, `metrics.jsonl`, `run.json`, `report.html`. With
    `layers` (`A:B`, `2,6,10` or numbers), or as `rank` of `world`, it trains these target layers alone, bit by bit as
    they would be beside the others: several processes may work on one `out`, each in a run folder of its own in it.
    Raises SpecError, FingerprintMismatchError, RunBusyError.
    """
    refuse_url(out, "out")
    out = Path(out)
    if layers is None and world == 1:
        check_folder_of_all(out)
        check_run_folder(out, KIND)
    else:
        check_shared_folder(out)
    inputs = open_teacher_inputs(spec)
    if not inputs.target_layers:
        raise SpecError("`teacher.layers` is empty: there is nothing to verbalize")
    chosen = choose_layers(inputs.target_layers, layers, rank=rank, world=world)
    facts = {
        "teacher_digest": inputs.weights_digest,
        "data_digest": RecordSet(tuple(inputs.records), []).digest,
        "num_samples": len(inputs.records),
        "encoder": inputs.encoder.fingerprint(),
        **WHOLE_BATCH,
    }
    with _opened(inputs, out, chosen, device=device, facts=facts) as run:
        wanted = chosen or inputs.target_layers
        if not set(wanted) <= set(trained_layers(out)) or not already_done(run):
            finish_run(run, stages=[_train(inputs, out, run.path, wanted, device=device)])
    if chosen is not None:
        say(f"trained: layers {shown_layers(chosen)}; report: {run.path / 'report.html'}")
    trained = trained_layers(out)
    left = [layer for layer in inputs.target_layers if layer not in trained]
    if left:
        say(f"{out}: these layers are not there yet: --layers {shown_layers(left)}")
    return out


@contextmanager
def _opened(
    inputs: TeacherInputs, out: Path, chosen: list[int] | None, *, device: str | None, facts: dict[str, Any]
) -> Iterator[Run]:
    """The run over all layers in `out`, or over the chosen ones in a folder of its own below."""
    name = "" if chosen is None else subset_name(inputs.target_layers, chosen)
    file = out / name / "run.json"
    stored = f"vlsi_cache.CacheSpec(**json.loads(pathlib.Path({str(file)!r}).read_text())['spec'])"
    call = python_call("train_verbalizers", stored, out=str(out), device=device, layers=chosen)
    own = {} if chosen is None else {"layers": chosen}
    with ExitStack() as stack:
        if chosen is None:
            check_folder_of_all(out)
            run = open_run(out, KIND, inputs.spec, device=device, call=call, **facts)
            yield stack.enter_context(run)
            return
        # Two that start at once must see each other.
        check_neighbours(out, name, chosen, inputs.spec, facts)
        with waiting_for(out):
            check_neighbours(out, name, chosen, inputs.spec, facts)
            run = open_run(out / name, KIND, inputs.spec, device=device, call=call, **facts, **own)
            opened = stack.enter_context(run)
        yield opened


def _train(inputs: TeacherInputs, out: Path, folder: Path, layers: list[int], *, device: str | None) -> dict[str, Any]:
    """Train in the run folder `folder`, save into `out`; returns the stage's entry for `run.json`."""
    spec, settings = inputs.spec, inputs.spec.train_verbalizers
    backbone = inputs.load_backbone(device or spec.run.device)
    say(f"teacher: {inputs.model_path} on {backbone.device}")

    def make_feed(num_skip: int) -> Feed:
        num_tokens = [len(ids) for ids in inputs.response_ids]
        return Feed(
            shuffled_records(inputs.records, num_tokens, seed=settings.seed, num_skip=num_skip),
            inputs.encoder,
            batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch_size,
            reduction=settings.batch_reduction,
            device=backbone.device,
        )

    with closing(MetricsLog(folder)) as log:
        verbalizers, stage = verbalize(
            backbone,
            layers,
            make_feed,
            architecture=spec.verbalizer,
            schedule=settings.schedule,
            num_steps=settings.schedule.num_steps(len(inputs.records), settings.batch_size),
            batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch_size,
            v_real=inputs.encoder.v_real,
            checkpoints=Checkpoints(folder),
            checkpoint_steps=settings.checkpoint_steps,
            log=log,
            seed=settings.seed,
            compiled=choose_kernels(spec.run, backbone.device),
        )
    facts = {"teacher_digest": inputs.weights_digest, "model": spec.teacher.model, "loss": spec.verbalizer.loss}
    # The run over all layers holds the folder already.
    with waiting_for(out) if folder != out else nullcontext():
        verbalizers.save(out / "verbalizers", provenance=facts)
    return {**stage, "layers": layers}


def verbalize(
    backbone: Backbone,
    layers: list[int],
    make_feed: Callable[[int], Feed],
    *,
    architecture: VerbalizerSpec,
    schedule: Schedule,
    num_steps: int,
    batch_size: int,
    micro_batch_size: int,
    v_real: int,
    checkpoints: Checkpoints,
    checkpoint_steps: int,
    log: MetricsLog,
    seed: int,
    compiled: bool = False,
) -> tuple[Verbalizers, dict[str, Any]]:
    """Train verbalizers of `layers`; `make_feed(num_skip)` gives the data from any sample on.

    Returns them and the stage's entry for `run.json`. Goes on from this stage's newest checkpoint.
    """
    verbalizers = build_verbalizers(backbone, layers, **architecture.model_dump(exclude={"loss"}), seed=seed)
    # One group a layer, so that the large gradient of one layer does not clip those of the others.
    groups = {f"layer {layer}": verbalizers.by_layer[str(layer)].parameters() for layer in layers}
    optimizer = make_grouped_optimizer(groups, schedule)
    first = checkpoints.step_of("verbalize")
    if first:
        checkpoints.load("verbalize", first, verbalizers, optimizer)
    log.start_stage("verbalize", step=first, num_steps=num_steps)
    num_micro = batch_size // micro_batch_size
    with feeding(make_feed(first * batch_size)) as feed, stopping_between_steps() as signals:
        for step in range(first, num_steps):
            started, waited, tokens = time.monotonic(), feed.wait_s, 0
            losses: list[LayerLoss] = []
            seed_step(seed, "verbalize", step)
            for _ in range(num_micro):
                micro = feed.next()
                tokens += len(micro.batch.gold_T)
                losses += layer_losses(
                    backbone,
                    verbalizers,
                    micro.batch,
                    micro.share_T,
                    loss=architecture.loss,
                    v_real=v_real,
                    compiled=compiled,
                )
            clip_gradients(optimizer, schedule, "verbalize", step, num_steps)
            rate = optimizer_step(optimizer, schedule, step, num_steps)

            trained, nll = (
                torch.stack(column).view(num_micro, -1).sum(0).tolist() for column in zip(*losses, strict=True)
            )
            seconds = time.monotonic() - started
            log.write(
                stage="verbalize",
                step=step + 1,
                num_steps=num_steps,
                loss=sum(trained),
                layers={str(layer): value for layer, value in zip(layers, nll, strict=True)},
                learning_rate=rate,
                tokens_per_s=tokens / seconds,
                data_wait_pct=100 * (feed.wait_s - waited) / seconds,
                memory_gib=memory_gib(backbone.device),
            )
            if (step + 1) % checkpoint_steps == 0 or step + 1 == num_steps or signals.came:
                checkpoints.save("verbalize", step + 1, verbalizers, optimizer)
                signals.end_here()
    refuse_destroyed(verbalizers.named_parameters(), "verbalize")
    warn_of(verbalizer_findings(read_metrics(log.path), v_real=v_real))
    entry = {"name": "verbalize", "steps": num_steps, "seconds": log.stage_seconds("verbalize"), "v_real": v_real}
    return verbalizers, entry


class LayerLoss(NamedTuple):
    """One layer and micro-batch, detached: what was trained, and the cross-entropy, in nats by the tokens' shares."""

    trained: torch.Tensor
    nll: torch.Tensor


def layer_losses(
    backbone: Backbone,
    verbalizers: Verbalizers,
    batch: Batch,
    share_T: torch.Tensor,
    *,
    loss: str,
    v_real: int,
    compiled: bool = False,
) -> Iterator[LayerLoss]:
    """The loss of each layer, the sum over the tokens by their shares; its gradient is left in the verbalizer."""
    head = head_of(backbone).real(v_real)
    with torch.no_grad(), autocast(backbone.device):
        wants_final = loss == "kl_to_final"
        hidden = dict(verbalizers.capture(batch.inputs, batch.rows_T, batch.positions_T, with_final=wants_final))
        final_TD: Any = hidden.pop(backbone.num_layers, None)
        own = head_output(final_TD, head, compiled=compiled) if wants_final else None
    for layer in verbalizers.layers:
        with autocast(backbone.device):
            state_TD = verbalizers.apply(layer, hidden.pop(layer))
            if own is None:
                trained = nll = linear_cross_entropy(state_TD, head, batch.gold_T, share_T=share_T, compiled=compiled)
            else:
                trained, nll = kl_to_output(state_TD, head, batch.gold_T, own, share_T=share_T, compiled=compiled)
        trained.backward()
        yield LayerLoss(trained.detach(), nll.detach())
