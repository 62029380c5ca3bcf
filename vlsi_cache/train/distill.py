"""From a cache to a student: open both, run the stages of the recipe in order, merge the adapter, save, report.

The teacher is not needed here, only its cache. A run that was killed goes on from its newest checkpoint and logs the
same metrics.
"""

import json
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import (
    Overrides,
    apply_overrides,
    change,
    override_list,
    spec_from_dict,
    unused_by_recipe,
)
from vlsi_cache.config.training import DistillSpec
from vlsi_cache.errors import CacheCorruptError, SpecError
from vlsi_cache.io import refuse_url, write_atomically
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.load import ModelRef, resolve_model
from vlsi_cache.models.lora import (
    add_lora,
    checkpoint_activations,
    merge_lora,
    reach_note,
    train_decoder_layers,
    train_gates_and_projector,
)
from vlsi_cache.models.mixing import mixing_of
from vlsi_cache.models.save import check_ours, save_student
from vlsi_cache.models.traversal_files import to_dtype
from vlsi_cache.models.verbalizer import WITH_GATES, Verbalizers, load_verbalizers, logit_lens
from vlsi_cache.processes import Processes, joined
from vlsi_cache.progress import say
from vlsi_cache.report.mixing import MIXING_NAME
from vlsi_cache.report.pages import ensure_report, write_report
from vlsi_cache.run_files import STUDENT_RECORD
from vlsi_cache.runs.run_dir import (
    WHOLE_BATCH,
    already_done,
    check_has_exits,
    check_has_student,
    check_run_folder,
    finish_run,
    open_run,
    python_call,
)
from vlsi_cache.runs.trackers import check_trackers
from vlsi_cache.store import reader
from vlsi_cache.store.reader import Cache

from .exits import exits
from .fitting import check_verbalizers, take_verbalizers
from .interact import interact
from .optim import Stage, refuse_destroyed
from .sft import sft, supervised, what_trains
from .sharding import has_shares
from .student import GATES_FOLDER, StudentState, open_student, write_gates
from .verbalize import verbalize

FIXED_BY_THE_CACHE = ("name", "teacher", "rows", "store", "train_verbalizers")


def distill(
    cache: Cache | Path | str,
    *,
    student: str | None = None,
    out: Path | str,
    recipe: str | None = None,
    overrides: Overrides = (),
    device: str | None = None,
) -> Path:
    """Train `student` against `cache` into the run folder `out`, or go on with it; returns the run folder.

    `overrides` are changes to the spec stored in the cache, such as `["distill.sft.schedule.steps=100"]` or the same as
    a dict, `{"distill": {"sft": {"schedule": {"steps": 100}}}}`.
    The trained model is `out/student`, a plain Hugging Face folder. Raises SpecError, ModelError (another tokenizer),
    FingerprintMismatchError (the data has changed, or `out` is another run), CacheIncompleteError, DataError (samples
    too long for the student), RunBusyError (another process works on `out`).

    Under `torchrun` or `accelerate launch` all processes call it alike, and share every batch.
    """
    refuse_url(out, "out")
    with joined() as processes:
        changes = override_list(overrides)
        return _distill(cache, student, Path(out), recipe, changes, device=device, processes=processes)


def _distill(
    cache: Cache | Path | str,
    student: str | None,
    out: Path,
    recipe: str | None,
    overrides: list[str],
    *,
    device: str | None,
    processes: Processes,
) -> Path:
    check_run_folder(out, "distill")
    opened = cache if isinstance(cache, Cache) else reader.open(cache)
    spec = distill_spec(opened, student=student, recipe=recipe, overrides=overrides)
    check_trackers(spec.run.track)
    path = resolve_model(str(spec.distill.student))
    inputs = open_student(opened, spec, path)  # a student that does not fit leaves no run folder behind
    for unused in unused_by_recipe(spec.distill, overrides):  # one script may well run all recipes
        say(f"`--set {unused}` does nothing here: no stage that `recipe: {spec.distill.recipe}` runs looks at it")
    student_digest = ModelRef(path).digest
    given = check_verbalizers(spec.distill.verbalizers, inputs.layers, spec.verbalizer, student_digest=student_digest)
    processes.check_same(
        {"cache": opened.header.digest, "student": student_digest, "spec": spec.model_dump(mode="json")}
    )
    processes.check_batch(spec.distill.batch_size, spec.distill.micro_batch_size, "distill")
    own_device = processes.own_device(device, spec.run.device)

    def check_data() -> None:
        if not (out / "run.json").is_file():
            inputs.check_turns()
            inputs.check_lengths()

    processes.from_first(check_data)
    options = {"student": student, "out": str(out), "recipe": recipe, "overrides": overrides, "device": device}
    with open_run(
        out,
        "distill",
        spec,
        device=device,
        call=python_call("distill", repr(str(opened.path)), **options),
        processes=processes,
        cache=str(opened.path.resolve()),
        cache_digest=opened.header.digest,
        student=path,
        student_digest=student_digest,
        recipe=spec.distill.recipe,
        **WHOLE_BATCH,
        **given,
    ) as run:
        if already_done(run):
            check_has_student(out, run.record)
            check_has_exits(out, run.record)
            processes.from_first(lambda: ensure_report(out))
            return out
        check_ours(out / "student", STUDENT_RECORD)
        with processes.passing():
            stages = _run_stages(inputs.load(run, device=own_device, processes=processes))

        def finish() -> None:
            finish_run(run, stages=stages)
            write_report(out)

        processes.from_first(finish)
    return out


def distill_spec(
    cache: Cache, *, student: str | None = None, recipe: str | None = None, overrides: Iterable[str] = ()
) -> CacheSpec:
    """The spec stored in the cache with the changes for this run; what the cache has fixed cannot be changed."""
    if "import.format" in cache.header.fingerprint and "data" not in cache.header.spec:
        raise SpecError(
            f"{cache.path} was imported without the rows that its teacher was given, so students have no prompts to "
            "learn from: import it again with --data ROWS"
        )
    stored = spec_from_dict(cache.header.spec, where=str(cache.path))
    # A cache may come from somebody else: running a model's own code is allowed by this call's overrides alone.
    stored = change(
        stored,
        distill={**stored.distill.model_dump(), "trust_remote_code": False},
        run={**stored.run.model_dump(), "kernels": "auto"},  # what suits the teacher's machine need not suit this one
    )
    named = [f"distill.recipe={recipe}"] if recipe is not None else []  # with the rest: some settings need others
    spec = apply_overrides(stored, [*overrides, *named])
    fixed = [key for key in FIXED_BY_THE_CACHE if getattr(spec, key) != getattr(stored, key)]
    of_data = ("turns", "keep_together", "video")
    fixed += [f"data.{key}" for key in of_data if getattr(spec.data, key) != getattr(stored.data, key)]
    if fixed:
        raise SpecError(f"`{'`, `'.join(fixed)}` were decided when {cache.path} was built; distill cannot change them")
    student = student or spec.distill.student
    if student is None:
        raise SpecError("no student: give --student FOLDER-OR-ID, or `distill.student` in the spec")
    return change(spec, distill=change(spec.distill, student=student).model_dump())


def stage_steps(spec: CacheSpec, num_samples: int) -> dict[str, int]:
    """Optimizer steps of the stages that the recipe runs; the sum of those that all have is the same for every one."""
    distill, steps = spec.distill, schedule_steps(spec, num_samples)
    # Of the recipe `sft` as many are left out as of the others, not the same share.
    steps["sft"] -= distill.sft.steps_left_out(distill.sft.schedule.num_steps(num_samples, distill.batch_size))
    return {stage: count for stage, count in steps.items() if count}


def schedule_steps(spec: CacheSpec, num_samples: int) -> dict[str, int]:
    """Steps over which each stage's learning rate falls: those it runs, and those that `sft.fraction` leaves out."""
    distill, traversal, has_verbalizers = spec.distill, spec.distill.traversal, not spec.verbalizer.is_lens
    gates_steps = 0 if traversal is None else traversal.schedule.num_steps(num_samples, distill.batch_size)
    more = 0 if traversal is None or traversal.trains_gates else gates_steps  # for the next stage that trains it
    first = {"gates": gates_steps} if gates_steps and not more else {}
    verbalize_steps = distill.verbalize.num_steps(num_samples, distill.batch_size)
    interact_steps = distill.interact.schedule.num_steps(num_samples, distill.batch_size)
    sft_steps = distill.sft.schedule.num_steps(num_samples, distill.batch_size)
    last = {}
    if distill.exits is not None and has_verbalizers:
        last = {"exits": distill.exits.schedule.num_steps(num_samples, distill.batch_size)}
    if distill.trains_layers and has_verbalizers:
        return {**first, "verbalize": verbalize_steps, "interact": interact_steps + more, "sft": sft_steps, **last}
    if not distill.is_supervised:
        return {**first, "interact": verbalize_steps + interact_steps + more, "sft": sft_steps, **last}
    return {**first, "sft": verbalize_steps + interact_steps + sft_steps + more, **last}


def shown_steps(steps: dict[str, int], whole: dict[str, int]) -> str:
    """`verbalize 60, interact 160, sft 40 of 80`."""
    runs = {stage: steps.get(stage, 0) for stage in whole}
    return ", ".join(
        f"{stage} {count}" if count == whole[stage] else f"{stage} {count} of {whole[stage]}"
        for stage, count in runs.items()
    )


def _run_stages(state: StudentState) -> list[dict[str, Any]]:
    distill, num_samples = state.spec.distill, len(state.cache)
    steps, whole = stage_steps(state.spec, num_samples), schedule_steps(state.spec, num_samples)
    say(f"{distill.recipe}: {shown_steps(steps, whole)} steps of {distill.batch_size} samples")
    with closing(state.log):
        newest = state.checkpoints.latest()
        if newest and newest[0] == "exits":  # an earlier attempt has finished the student
            _check_is_there(state.student_folder)
            seconds = state.log.stage_seconds
            stages = [
                {"name": name, "steps": steps[name], "seconds": seconds(name)} for name in steps if name != "exits"
            ]
        else:
            stages = _train_student(state, steps, whole)
        if "exits" in steps:
            state = state.finished()
            stages.append(exits(state, num_steps=steps["exits"]))
    return stages


def _check_is_there(student: Path) -> None:
    """Raise CacheCorruptError for a finished student that is gone while its exits were trained."""
    if not (student / "config.json").is_file():
        raise CacheCorruptError(
            f"{student} is gone, and the exits are those of that student: restore it from a copy, or delete "
            f"{student.parent} and run the same command again, it trains from the start"
        )


def _train_student(state: StudentState, steps: dict[str, int], whole: dict[str, int]) -> list[dict[str, Any]]:
    """All stages that train it, and its folder."""
    distill, stages, verbalizers = state.spec.distill, [], None
    if "gates" in steps:
        state, entry = _gates(state, steps["gates"])
        stages.append(entry)
    # Before the adapter is there: verbalizers learn to read the student as it comes.
    if "verbalize" in steps:
        verbalizers, entry = _verbalize(state, steps["verbalize"])
        stages.append(entry)
    if has_shares(state.model):  # what comes next trains other weights, and its verbalizers read them
        state = state.renewed()
        verbalizers = None
    if distill.trains_layers and verbalizers is None:
        verbalizers = _readers(state, steps)
    if _uses_lora(distill, steps) and (note := reach_note(state.model, distill.lora.dropout)):
        say(note)
    model = _student_to_train(state, steps)
    if "interact" in steps:
        if distill.interact.mode == "layers":
            train_decoder_layers(model)
        stages.append(interact(state, model, verbalizers, num_steps=steps["interact"]))
    if "sft" in steps:
        if has_shares(model):
            verbalizers = None  # they hold the student of the stage before
            state = state.renewed()
            if distill.exit_weight:
                verbalizers = _readers(state, steps)
            model = _student_to_train(state, steps)
        taught = verbalizers if distill.exit_weight else None
        stages.append(sft(state, model, taught, num_steps=whole["sft"], stop=steps["sft"]))
    state.processes.from_first(lambda: _save(state, _trained(state, model, steps), stages[-1]["name"]))
    return stages


def _uses_lora(distill: DistillSpec, steps: dict[str, int]) -> bool:
    adapts = "interact" in steps and distill.interact.mode == "lora"
    return adapts or ("sft" in steps and distill.sft.mode == "lora+embed_head")


def _student_to_train(state: StudentState, steps: dict[str, int]) -> Any:
    """The student in training mode, with a fresh adapter if the recipe's stages use one."""
    distill = state.spec.distill
    torch.manual_seed(distill.seed)  # the adapter starts from the same weights in every attempt
    model = add_lora(state.model, **distill.lora.model_dump()) if _uses_lora(distill, steps) else state.model
    if distill.traversal is not None:
        train_gates_and_projector(model)
    if distill.gradient_checkpointing:
        checkpoint_activations(model)
    model.train()
    return model


def _trained(state: StudentState, model: Any, steps: dict[str, int]) -> Any:
    """The whole student that the stages have trained, without its adapter.

    Where it is sharded, that is the student of the beginning with what the last checkpoint has of it.
    """
    if has_shares(model):
        newest = state.checkpoints.latest()
        assert newest is not None
        model = _student_to_train(state.renewed(), steps)
        if newest[0] == "sft":
            model = what_trains(model, state.spec.distill.sft)
        elif state.spec.distill.interact.mode == "layers":
            train_decoder_layers(model)
        state.checkpoints.load(*newest, model, None)
    return merge_lora(model)


def _save(state: StudentState, trained: Any, stage: str) -> None:
    """Write the student as a plain folder: the adapter is folded into its weights."""
    refuse_destroyed(trained.named_parameters(), stage)
    _keep_mixing(state, trained.eval())
    # Head and embeddings may have been trained in fp32; configuration and all tensors agree again.
    facts = {key: state.run.record[key] for key in ("recipe", "cache_digest", "student_digest")}
    ids = {"end_of_turn": state.encoder.eot_id, "pad": state.encoder.pad_id}
    source = ModelRef(state.student_path)
    save_student(to_dtype(trained, state.dtype), source, state.student_folder, **ids, facts=facts)


def _keep_mixing(state: StudentState, trained: Any) -> None:
    """Of a traversed student, what its gates do with the first prompt, for the report."""
    if state.spec.distill.traversal is not None:
        prompt = state.encoder.encode(state.records[0], with_response=False)
        found = mixing_of(Backbone(trained), state.encoder, prompt)
        write_atomically(state.run.path / MIXING_NAME, json.dumps(found))


def _gates(state: StudentState, num_steps: int) -> tuple[StudentState, dict[str, Any]]:
    """Train gates and vision projector alone, unless an earlier attempt has; the state with a student that has them."""
    folder, traversal = state.run.path / GATES_FOLDER, state.spec.distill.traversal
    assert traversal is not None
    if state.processes.from_first(folder.exists):  # the student has been loaded with them
        return state, {"name": "gates", "steps": num_steps, "seconds": state.log.stage_seconds("gates")}
    train_gates_and_projector(state.model)
    if state.spec.distill.gradient_checkpointing:
        checkpoint_activations(state.model)
    state.model.train()
    entry = supervised(state, state.model, "gates", traversal.schedule, num_steps=num_steps, stop=num_steps)
    refuse_destroyed(state.model.named_parameters(), "gates")
    state.processes.from_first(lambda: write_gates(state.model, folder))
    return state.renewed(), entry


def _readers(state: StudentState, steps: dict[str, int]) -> Verbalizers:
    """What reads the layers of the student at hand: verbalizers that stage verbalize has left, or the logit lens."""
    if "verbalize" in steps:
        return _verbalize(state, steps["verbalize"])[0]
    return logit_lens(Backbone(state.model), state.layers)


def _verbalize(state: StudentState, num_steps: int) -> tuple[Verbalizers, dict[str, Any]]:
    """Train the student's verbalizers, or take those of the spec, or read back what an earlier attempt has finished."""
    distill = state.spec.distill
    folder = state.run.path / "verbalizers"
    if state.processes.from_first((folder / "verbalizers.json").exists):
        loaded = load_verbalizers(str(folder), Backbone(state.model), state.layers)
        seconds = state.log.stage_seconds("verbalize")
        return loaded, {"name": "verbalize", "steps": num_steps, "seconds": seconds}
    if distill.verbalizers is not None:
        into = folder if state.processes.is_first else None
        taken = take_verbalizers(distill.verbalizers, into, Backbone(state.model), state.layers)
        return taken, {"name": "verbalize", "steps": num_steps, "seconds": 0.0}
    verbalizers, entry = verbalize(
        state.shared_out(state.model),
        state.layers,
        lambda num_skip: state.feed("verbalize", num_skip),
        Stage(distill, distill.verbalize, num_steps, state.checkpoints, state.log, state.compiled, state.processes),
        architecture=state.spec.verbalizer,
        vocab_size=state.encoder.vocab_size,
    )
    # Of a traversed student stage gates has trained a part: these verbalizers are for no other run.
    made_for = state.run.record["student_digest"] + (WITH_GATES if distill.traversal is not None else "")
    facts = {"teacher_digest": made_for, "model": state.student_path}
    provenance = {**facts, "loss": state.spec.verbalizer.loss}
    state.processes.from_first(lambda: verbalizers.save(folder, provenance=provenance))
    return verbalizers.requires_grad_(False).eval(), entry  # as `load_verbalizers` gives them to a resumed run
