"""Train the teacher's verbalizers; several processes or nodes may each train some of the layers into one folder.

DIR/layers-2-34/    the run folder of a process: run.json, metrics, checkpoints, report
DIR/verbalizers/    the files of all layers, and the record that names them
DIR/.lock           held for the moments in which a process looks at the others, or adds its layers
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from vlsi_cache.config.layers import parse_ranges, shown_layers
from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.errors import FingerprintMismatchError, SpecError, list_problems
from vlsi_cache.io import check_folder, refuse_url
from vlsi_cache.models.features import features_of, keep_features
from vlsi_cache.models.load import share_digests
from vlsi_cache.models.parallel import teacher_processes
from vlsi_cache.models.verbalizer_files import whole_layers
from vlsi_cache.processes import ALONE, Processes, joined
from vlsi_cache.progress import say
from vlsi_cache.report.pages import ensure_report, write_report
from vlsi_cache.report.text import table
from vlsi_cache.run_files import METRICS, read_metrics, read_run
from vlsi_cache.runs.checkpoints import Checkpoints
from vlsi_cache.runs.metrics import MetricsLog, final_loss, layer_curves
from vlsi_cache.runs.run_dir import (
    LOCK_NAME,
    WHOLE_BATCH,
    Run,
    already_done,
    check_run_folder,
    differences,
    finish_run,
    open_run,
    python_call,
    waiting_for,
    whole_spec,
)
from vlsi_cache.runs.trackers import Trackers, check_trackers
from vlsi_cache.runtime import pick_device
from vlsi_cache.sparse.head import choose_kernels
from vlsi_cache.train.loader import Feed, shuffled_records
from vlsi_cache.train.optim import Stage
from vlsi_cache.train.sharding import shard, shards_layers
from vlsi_cache.train.verbalize import verbalize

from .inputs import TeacherInputs, open_teacher_inputs

PREFIX = "layers-"
# What decides a verbalizer's weights, beside the digests of teacher and data; a node may see the data elsewhere.
COMPARED = ("train_verbalizers", "verbalizer", "teacher")
NOT_COMPARED = ("layers", "num_layers", "verbalizers", "parallel")


def choose_layers(targets: list[int], layers: str | Sequence[int] | None, *, rank: int, world: int) -> list[int] | None:
    """The target layers of this process; None for all of them in one run. Raises SpecError.

    `layers` is `2-38` (the targets in it), `2,6,10`, or numbers; `rank` of `world` means every target whose index is
    `rank` modulo `world`.
    """
    if layers is not None and world > 1:
        raise SpecError("name the layers, or rank and world: not both")
    if not 0 <= rank < world:
        raise SpecError(f"rank {rank} of {world}: ranks go from 0 to {world - 1}")
    if layers is not None:
        return _named(targets, layers)
    if world == 1:
        return None
    if rank >= len(targets):
        raise SpecError(f"rank {rank} of {world} is left without a layer: there are {len(targets)} targets, {targets}")
    return targets[rank::world]


def subset_name(targets: list[int], chosen: list[int]) -> str:
    """`layers-2-34` for neighbouring targets from 2 to 34, `layers-2,18,34` otherwise, `layers-2` for one."""
    first = targets.index(chosen[0])
    if len(chosen) > 1 and targets[first : first + len(chosen)] == chosen:
        return f"{PREFIX}{chosen[0]}-{chosen[-1]}"
    return PREFIX + ",".join(map(str, chosen))


def check_folder_of_all(out: Path) -> None:
    """Raise SpecError when a run over all layers would start where subsets are."""
    subsets = _subsets(out)
    if subsets and not (out / "run.json").exists():
        raise SpecError(
            f"{out} holds trainings of some layers ({', '.join(folder.name for folder in subsets)}); go on there with "
            "--layers, or choose another folder with -o"
        )


def check_shared_folder(out: Path) -> None:
    """Raise SpecError for a folder that holds something else than trainings of verbalizers."""
    check_folder(out)
    if (out / "run.json").exists():
        whole = read_run(out)
        if whole["kind"] != "train-verbalizers" or whole["status"] != "done":
            raise SpecError(
                f"{out} holds a run of its own (`{whole['kind']}`, {whole['status']}); choose another folder"
            )
    elif out.is_dir() and any(
        entry.name not in (LOCK_NAME, "verbalizers") and not entry.name.startswith(PREFIX) for entry in out.iterdir()
    ):
        raise SpecError(f"{out} exists and holds something else; choose another folder with -o")


def check_neighbours(out: Path, name: str, chosen: list[int], spec: CacheSpec, facts: dict[str, Any]) -> None:
    """Raise SpecError when `out` is not for this, or another run there has one of these layers;
    FingerprintMismatchError when another run there has other settings, other data or another teacher."""
    check_shared_folder(out)
    neighbours = [folder for folder in _subsets(out) if folder.name != name]
    for folder in [*([out] if (out / "run.json").exists() else []), *neighbours]:
        record = read_run(folder)
        _check_same(folder, record, spec, facts)
        theirs = _layers_of_whole(out, record) if folder == out else record.get("layers", [])
        if both := [layer for layer in chosen if layer in theirs]:
            raise SpecError(
                f"layers {both} belong to {folder} already (it has {theirs}); name others, or delete that folder"
            )


def _layers_of_whole(out: Path, record: dict[str, Any]) -> list[int]:
    """What the run over all layers has trained; one of an earlier release says it by what no subset has."""
    for stage in record.get("stages", []):
        if "layers" in stage:
            return stage["layers"]
    added = {layer for folder in _subsets(out) for layer in read_run(folder).get("layers", [])}
    return [layer for layer in whole_layers(out / "verbalizers") if layer not in added]


def _named(targets: list[int], layers: str | Sequence[int]) -> list[int]:
    """The targets that are named one by one, and those that lie in a range."""
    items = parse_ranges(layers) if isinstance(layers, str) else [(layer, layer) for layer in layers]
    unknown = [item for item in items if isinstance(item, str) or (item[0] == item[1] and item[0] not in targets)]
    chosen = [t for t in targets if any(not isinstance(item, str) and item[0] <= t <= item[1] for item in items)]
    if unknown or not chosen:
        what = "none" if not unknown else shown_layers([one if isinstance(one, str) else one[0] for one in unknown])
        raise SpecError(f"layers `{layers}`: {what} is no target of the spec; the targets are {shown_layers(targets)}")
    return chosen


def _subsets(out: Path) -> list[Path]:
    return sorted(file.parent for file in out.glob(f"{PREFIX}*/run.json"))


def _check_same(folder: Path, record: dict[str, Any], spec: CacheSpec, facts: dict[str, Any]) -> None:
    there, fresh = whole_spec(record["spec"], str(folder)), spec.model_dump(mode="json")
    problems = [d for key in facts for d in differences(record.get(key), facts[key], key)]
    for name in COMPARED:
        old, new = (
            {key: value for key, value in spec[name].items() if key not in NOT_COMPARED} for spec in (there, fresh)
        )
        problems += differences(old, new, name)
    if problems:
        raise FingerprintMismatchError(
            f"{folder} was trained with other settings, and one set of verbalizers has the same for all its layers; "
            f"choose another folder with -o, or bring the settings back:\n{list_problems(problems)}"
        )


KIND = "train-verbalizers"
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of the training: the columns of Appendix B


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

    Writes `verbalizers/layer_KKKK.safetensors`, `verbalizers.json`, `metrics.jsonl`, `run.json`, `report.html`, and
    says how the loss of each layer has fallen. With `layers` (`A:B`, `2,6,10` or numbers), or as `rank` of `world`, it
    trains these target layers alone, bit by bit as they would be beside the others: several processes may work on one
    `out`, each in a run folder of its own in it.
    Under `torchrun` or `accelerate launch` all processes call it alike, and share every batch; with
    `teacher.parallel: tensor` they hold one teacher together, and each trains all verbalizers on the whole batch.
    Raises SpecError, FingerprintMismatchError, RunBusyError.
    """
    refuse_url(out, "out")
    is_cut = spec.teacher.parallel == "tensor"
    with teacher_processes("tensor") if is_cut else joined() as processes:
        if processes.num_shares > 1 and (layers is not None or world > 1):
            raise SpecError("`layers` and `rank` are for processes that were started one by one; leave them out here")
        chosen = {"layers": layers, "rank": rank, "world": world}
        return _train_verbalizers(spec, Path(out), device=device, processes=processes, **chosen)


def _train_verbalizers(
    spec: CacheSpec,
    out: Path,
    *,
    device: str | None,
    layers: str | Sequence[int] | None,
    rank: int,
    world: int,
    processes: Processes,
) -> Path:
    if layers is None and world == 1:
        check_folder_of_all(out)
        check_run_folder(out, KIND)
    else:
        check_shared_folder(out)
    if spec.verbalizer.is_lens:
        raise SpecError(
            "`verbalizer.structure: logit-lens` has no weights to train: build-teacher without `teacher.verbalizers` "
            "reads the layers by the teacher's own norm and head"
        )
    settings = spec.train_verbalizers
    check_trackers(spec.run.track)
    processes.check_batch(settings.batch_size, settings.micro_batch_size, "train_verbalizers")
    own_device = processes.own_device(device, spec.run.device)
    inputs = processes.first_before_others(lambda: open_teacher_inputs(spec))
    share_digests(inputs.model, processes)
    if not inputs.target_layers:
        raise SpecError("`teacher.layers` is empty: there is nothing to verbalize")
    chosen = choose_layers(inputs.target_layers, layers, rank=rank, world=world)
    facts = {
        "teacher_digest": inputs.weights_digest,
        "data_digest": inputs.records.digest,
        "num_samples": len(inputs.records),
        "encoder": inputs.encoder.fingerprint(),
        **WHOLE_BATCH,
    }
    processes.check_same({**facts, "spec": spec.model_dump(mode="json")})
    with _opened(inputs, out, chosen, device=device, facts=facts, processes=processes) as run:
        wanted = chosen or inputs.target_layers
        if set(wanted) <= set(whole_layers(out / "verbalizers")) and already_done(run):
            processes.from_first(lambda: ensure_report(run.path))
        else:
            stages = [_train(inputs, out, run.path, wanted, device=own_device, processes=processes)]

            def finish() -> None:
                finish_run(run, stages=stages)
                write_report(run.path)

            processes.from_first(finish)
            say(f"loss of each layer, nats per response token, by share of the training:\n{loss_table(run.path)}")
    if chosen is not None:
        say(f"trained: layers {shown_layers(chosen)}; report: {run.path / 'report.html'}")
    trained = whole_layers(out / "verbalizers")
    left = [layer for layer in inputs.target_layers if layer not in trained]
    if left:
        say(f"{out}: these layers are not there yet: --layers {shown_layers(left)}")
    return out


@contextmanager
def _opened(
    inputs: TeacherInputs,
    out: Path,
    chosen: list[int] | None,
    *,
    device: str | None,
    facts: dict[str, Any],
    processes: Processes,
) -> Iterator[Run]:
    """The run over all layers in `out`, or over the chosen ones in a folder of its own below."""
    name = "" if chosen is None else subset_name(inputs.target_layers, chosen)
    file = out / name / "run.json"
    stored = f"vlsi_cache.CacheSpec(**json.loads(pathlib.Path({str(file)!r}).read_text())['spec'])"
    call = python_call("train_verbalizers", stored, out=str(out), device=device, layers=chosen)
    with ExitStack() as stack:
        if chosen is None:
            check_folder_of_all(out)
            run = open_run(out, KIND, inputs.spec, device=device, call=call, processes=processes, **facts)
            yield stack.enter_context(run)
            return
        yield processes.from_first(
            lambda: stack.enter_context(
                _opened_subset(inputs, out, name, chosen, device=device, call=call, facts=facts)
            )
        )


@contextmanager
def _opened_subset(
    inputs: TeacherInputs,
    out: Path,
    name: str,
    chosen: list[int],
    *,
    device: str | None,
    call: str,
    facts: dict[str, Any],
) -> Iterator[Run]:
    with ExitStack() as stack:
        # Once without the lock, so that a refusal does not wait for it; then with it, since two that start at once must
        # see each other. The lock of all is let go when the run has a folder and a lock of its own.
        check_neighbours(out, name, chosen, inputs.spec, facts)
        with waiting_for(out):
            check_neighbours(out, name, chosen, inputs.spec, facts)
            run = open_run(out / name, KIND, inputs.spec, device=device, call=call, **facts, layers=chosen)
            opened = stack.enter_context(run)
        yield opened


def loss_table(run: Path) -> str:
    """The loss of every layer in the course of a training (VLsI, Appendix B), from the log of its run folder.

    At each share of the training stands the mean over the last tenth of the steps until then, in nats per response
    token.
    """
    steps, losses_by_layer = layer_curves(read_metrics(run / METRICS), "verbalize")
    rows = []
    for layer, losses in losses_by_layer.items():
        cells = [str(layer)]
        for share in SHARES:
            until = max(steps[0], share * steps[-1])
            cells.append(f"{final_loss([loss for step, loss in zip(steps, losses, strict=True) if step <= until]):.2f}")
        rows.append(cells)
    return table(["layer", *(f"{share:.0%}" for share in SHARES)], rows)


def _train(
    inputs: TeacherInputs,
    out: Path,
    folder: Path,
    layers: list[int],
    *,
    device: str | None,
    processes: Processes,
) -> dict[str, Any]:
    """Train in the run folder `folder`, save into `out`; returns the stage's entry for `run.json`."""
    spec, settings = inputs.spec, inputs.spec.train_verbalizers
    device, is_sharded = device or spec.run.device, shards_layers(spec.run, processes)
    backbone = inputs.load_backbone("cpu" if is_sharded else device)
    if is_sharded:
        shard(backbone, pick_device(device))
    keep_features(backbone.model, spec.run, inputs.encoder)
    # Branches from a cache are passes of their own, and processes that share layers run the same ones.
    needs_whole = is_sharded or spec.verbalizer.structure.startswith("decoder")

    def make_feed(num_skip: int) -> Feed:
        num_tokens = [len(ids) for ids in inputs.response_ids]
        return Feed(
            shuffled_records(
                inputs.records, num_tokens, spec.data.keep_together, seed=settings.seed, num_skip=num_skip
            ),
            inputs.encoder,
            batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch_size,
            reduction=settings.batch_reduction,
            device=backbone.device,
            layout=backbone.layout if needs_whole else backbone.frozen_layout,
            features=features_of(backbone.model),
            num_workers=spec.run.num_workers,
            processes=processes if processes.num_shares > 1 else ALONE,
        )

    trackers = Trackers(folder, inputs.spec, KIND)
    with closing(MetricsLog(folder, writes=processes.is_first, trackers=trackers)) as log, processes.passing():
        verbalizers, stage = verbalize(
            backbone,
            layers,
            make_feed,
            Stage(
                settings,
                settings.schedule,
                settings.schedule.num_steps(len(inputs.records), settings.batch_size),
                Checkpoints(folder, processes),
                log,
                choose_kernels(spec.run, backbone.device),
                processes,
            ),
            architecture=spec.verbalizer,
            vocab_size=inputs.encoder.vocab_size,
        )
    facts = {"teacher_digest": inputs.weights_digest, "model": spec.teacher.model, "loss": spec.verbalizer.loss}

    def save() -> None:
        # The run over all layers holds the folder already, so it must not wait for itself.
        with waiting_for(out) if folder != out else nullcontext():
            verbalizers.save(out / "verbalizers", provenance=facts)

    processes.from_first(save)
    return {**stage, "layers": layers}
