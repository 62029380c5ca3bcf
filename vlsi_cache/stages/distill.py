"""From a cache to a student: open both, run the stages of the recipe in order, merge the adapter, save, report.

The teacher is not needed here, only its cache. A run that was killed goes on from its newest checkpoint and logs the
same metrics.
"""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlsi_cache.data.records import RecordSet, read_records
from vlsi_cache.data.tokenize import Encoder, load_encoder
from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.models.adapter import add_lora, merge_lora
from vlsi_cache.models.layers import Backbone
from vlsi_cache.models.load import load_config, load_model, resolve_model, save_student, weights_digest
from vlsi_cache.models.verbalizer import Verbalizers, load_verbalizers
from vlsi_cache.spec import CacheSpec, DistillSpec, apply_overrides, change, spec_from_dict
from vlsi_cache.store import reader
from vlsi_cache.store.reader import Cache

from .feed import Feed, cached_records
from .inputs import target_layers
from .interact import interact
from .loop import Checkpoints, MetricsLog, pick_device, say
from .runs import Run, finish_run, open_run
from .sft import sft
from .verbalize import verbalize

STAGE_SEEDS = {"verbalize": 1, "interact": 2, "sft": 3}  # each stage sees the data in an order of its own
FIXED_BY_THE_CACHE = ("name", "teacher", "rows", "store", "train_verbalizers")


def distill(
    cache: Cache | Path | str,
    *,
    student: str | None = None,
    out: Path | str,
    recipe: str | None = None,
    overrides: Iterable[str] = (),
    device: str | None = None,
) -> Path:
    """Train `student` against `cache` into the run folder `out`, or go on with it; returns the run folder.

    `overrides` are `key=value` changes to the spec stored in the cache, such as `distill.sft.schedule.steps=100`.
    The trained model is `out/student`, a plain Hugging Face folder. Raises SpecError, ModelError (another tokenizer),
    FingerprintMismatchError (the data has changed, or `out` is another run), CacheIncompleteError.
    """
    opened = cache if isinstance(cache, Cache) else reader.open(cache)
    spec = distill_spec(opened, student=student, recipe=recipe, overrides=overrides)
    path = resolve_model(str(spec.distill.student))
    student_side = _open_student(opened, spec, path)  # a student that does not fit leaves no run folder behind
    run = open_run(
        Path(out),
        "distill",
        spec,
        device=device,
        cache=str(opened.path.resolve()),
        cache_digest=opened.header.digest,
        student=path,
        student_digest=weights_digest(path),
        recipe=spec.distill.recipe,
    )
    if run.is_done:
        say(f"{out} is finished; nothing to do")
        return run.path
    state = _load(opened, spec, path, run, *student_side, device=device)
    with closing(state.log):
        finish_run(run, stages=_run_stages(state))
    return run.path


def distill_spec(
    cache: Cache, *, student: str | None = None, recipe: str | None = None, overrides: Iterable[str] = ()
) -> CacheSpec:
    """The spec stored in the cache with the changes for this run; what the cache has fixed cannot be changed."""
    stored = spec_from_dict(cache.header.spec, where=str(cache.path))
    # A cache may come from somebody else: running a model's own code is allowed by this call's overrides alone.
    stored = change(stored, distill={**stored.distill.model_dump(), "trust_remote_code": False})
    spec = apply_overrides(stored, overrides)
    fixed = [key for key in FIXED_BY_THE_CACHE if getattr(spec, key) != getattr(stored, key)]
    if fixed:
        raise SpecError(f"`{'`, `'.join(fixed)}` were decided when {cache.path} was built; distill cannot change them")
    changes = {"student": student or spec.distill.student, "recipe": recipe or spec.distill.recipe}
    if changes["student"] is None:
        raise SpecError("no student: give --student FOLDER-OR-ID, or `distill.student` in the spec")
    return change(spec, distill=change(spec.distill, **changes).model_dump())


def stage_steps(distill: DistillSpec, num_samples: int) -> dict[str, int]:
    """Optimizer steps of the stages that the recipe runs; the sum is the same for every recipe."""
    verbalize_steps = distill.verbalize.num_steps(num_samples, distill.batch_size)
    interact_steps = distill.interact.schedule.num_steps(num_samples, distill.batch_size)
    sft_steps = distill.sft.schedule.num_steps(num_samples, distill.batch_size)
    if distill.recipe == "vlsi":
        return {"verbalize": verbalize_steps, "interact": interact_steps, "sft": sft_steps}
    if distill.recipe == "last":
        return {"interact": verbalize_steps + interact_steps, "sft": sft_steps}
    return {"sft": verbalize_steps + interact_steps + sft_steps}


@dataclass(frozen=True)
class StudentState:
    """Everything the stages of one run share."""

    cache: Cache
    spec: CacheSpec
    run: Run
    student_path: str
    records: RecordSet
    encoder: Encoder
    model: Any
    layers: list[int]
    device: torch.device
    log: MetricsLog
    checkpoints: Checkpoints

    def feed(self, stage: str, num_skip: int) -> Feed:
        """Micro-batches of the cached samples; teacher rows come along only where the stage compares with them."""
        distill = self.spec.distill
        layers = {"verbalize": [], "interact": self.teacher_layers, "sft": []}[stage]
        pairs = cached_records(
            self.cache,
            self.records,
            layers=layers,
            seed=distill.seed * len(STAGE_SEEDS) + STAGE_SEEDS[stage],
            window_parts=distill.window_parts,
            num_skip=num_skip,
        )
        return Feed(pairs, self.encoder, micro_batch_size=distill.micro_batch_size, device=self.device)

    @property
    def teacher_layers(self) -> list[int]:
        """Cached layers that the interaction reads: all for `vlsi`, the last one otherwise."""
        return self.cache.layers if self.layers else self.cache.layers[-1:]


def _run_stages(state: StudentState) -> list[dict[str, Any]]:
    distill, stages = state.spec.distill, []
    steps = stage_steps(distill, len(state.cache))
    verbalizers = None
    if "verbalize" in steps:
        verbalizers, entry = _verbalize(state, steps["verbalize"])
        stages.append(entry)
    torch.manual_seed(distill.seed)
    uses_lora = "interact" in steps or distill.sft.mode == "lora+embed_head"
    model = add_lora(state.model, **distill.lora.model_dump()) if uses_lora else state.model
    if distill.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if "interact" in steps:
        stages.append(interact(state, model, verbalizers, num_steps=steps["interact"]))
    stages.append(sft(state, model, num_steps=steps["sft"]))
    trained = merge_lora(model) if uses_lora else model
    save_student(trained, state.student_path, state.run.path / "student")
    return stages


def _verbalize(state: StudentState, num_steps: int) -> tuple[Verbalizers, dict[str, Any]]:
    """Train the student's verbalizers, or read them back when an earlier attempt has finished them."""
    distill, backbone = state.spec.distill, Backbone(state.model)
    folder = state.run.path / "verbalizers"
    if (folder / "verbalizers.json").is_file():
        loaded = load_verbalizers(str(folder), backbone, state.layers)
        seconds = state.log.stage_seconds("verbalize")
        return loaded, {"name": "verbalize", "steps": num_steps, "seconds": seconds}
    verbalizers, entry = verbalize(
        backbone,
        state.layers,
        lambda num_skip: state.feed("verbalize", num_skip),
        architecture=state.spec.verbalizer,
        schedule=distill.verbalize,
        num_steps=num_steps,
        batch_size=distill.batch_size,
        micro_batch_size=distill.micro_batch_size,
        v_real=state.encoder.v_real,
        checkpoints=state.checkpoints,
        checkpoint_steps=distill.checkpoint_steps,
        log=state.log,
        seed=distill.seed,
    )
    verbalizers.save(
        folder, provenance={"teacher_digest": state.run.record["student_digest"], "model": state.student_path}
    )
    verbalizers.requires_grad_(False)
    return verbalizers, entry


def _open_student(cache: Cache, spec: CacheSpec, path: str) -> tuple[Encoder, list[int]]:
    """The student's encoder and target layers, checked against the cache; no weights."""
    distill = spec.distill
    encoder = load_encoder(
        path,
        min_pixels=spec.data.min_pixels,
        max_pixels=spec.data.max_pixels,
        trust_remote_code=distill.trust_remote_code,
    )
    _check_tokenizer(cache, encoder, path)
    config = load_config(path, trust_remote_code=distill.trust_remote_code)
    return encoder, _student_layers(distill, config, num_teacher=len(cache.layers) - 1)


def _load(
    cache: Cache, spec: CacheSpec, path: str, run: Run, encoder: Encoder, layers: list[int], *, device: str | None
) -> StudentState:
    distill, where = spec.distill, pick_device(device or spec.run.device)
    model = load_model(
        path,
        # The CPU trains in fp32 without autocast, so mixed bf16 and fp32 weights would not fit each other there.
        dtype="float32" if where.type == "cpu" and distill.student_dtype == "auto" else distill.student_dtype,
        device=str(where),
        trust_remote_code=distill.trust_remote_code,
        attn_implementation=distill.attn_implementation,
    )
    return StudentState(
        cache=cache,
        spec=spec,
        run=run,
        student_path=path,
        records=read_records(spec.data),
        encoder=encoder,
        model=model,
        layers=layers,
        device=where,
        log=MetricsLog(run.path),
        checkpoints=Checkpoints(run.path),
    )


def _student_layers(distill: DistillSpec, config: Any, *, num_teacher: int) -> list[int]:
    if distill.recipe != "vlsi":
        return []
    layers = target_layers(distill.layers, distill.num_layers, config, where="distill.layers")
    if len(layers) > num_teacher:
        raise SpecError(
            f"`distill.layers` names {len(layers)} student layers and the cache holds {num_teacher} intermediate "
            "teacher layers; Algorithm 1 needs at least as many teacher layers as student layers"
        )
    return layers


def _check_tokenizer(cache: Cache, encoder: Encoder, path: str) -> None:
    cached, own = str(cache.header.fingerprint["encoder.tokenizer"]), str(encoder.fingerprint()["tokenizer"])
    if cached != own or cache.header.v_real != encoder.v_real:
        raise ModelError(
            f"student {path} has another tokenizer than the teacher of {cache.path}: "
            f"{encoder.v_real} tokens, map {own[:12]}, against {cache.header.v_real} tokens, map {cached[:12]}. "
            "Rows are over token ids, so both must share one vocabulary; choose a student of the teacher's family"
        )
