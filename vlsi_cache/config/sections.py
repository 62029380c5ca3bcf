"""The sections of a spec, each with its defaults, bounds and what contradicts what; those about training are beside."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlsi_cache.errors import SpecError

from .training import (
    MAX_LAYERS,
    Count,
    DistillSpec,
    Dtype,
    Seed,
    Strict,
    TargetLayers,
    TrainVerbalizersSpec,
    VerbalizerSpec,
)

Turns = Literal["all", "last"]
Together = Literal["prompt", "row"]
PromptMode = Literal["generation", "template"]
Traversed = Literal["none", "prompt", "all"]  # tokens
Kernels = Literal["auto", "eager", "compiled"]
StudentParallel = Literal["ddp", "fsdp"]
BadRows = Literal["refuse", "list"]
TeacherParallel = Literal["none", "device_map", "tensor"]
DEFAULT_BATCH_TOKENS = 8192


class TeacherSpec(Strict):
    """The frozen teacher: a folder, `package:NAME/sub/folder` of an installed package, or a hub id.

    `parallel` says how it lies on several GPUs. `none`: whole on one of them; device `auto` is the first, or the CPU.
    `device_map`: as `none` on a device that is named or that torchrun has numbered, while device `auto` spreads its
    layers over all GPUs of the machine, one after the other at work (transformers' `device_map`). `tensor`: every
    matrix is cut into a piece for each process of a torchrun, and all GPUs work at once (tensor parallelism). Rows
    differ by rounding only, so it is not part of the fingerprint.
    """

    model: str
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    parallel: TeacherParallel = "device_map"
    layers: TargetLayers = "auto"
    num_layers: Annotated[int, Field(ge=0, le=MAX_LAYERS)] = 0
    verbalizers: str | None = None

    def _contradictions(self) -> Iterator[str]:
        if self.layers == "auto" and self.num_layers == 0:
            yield "name the target layers: `layers: [2, 6, ...]`, or `num_layers: 7` to space them evenly"
        if self.layers != "auto" and self.num_layers not in (0, len(self.layers)):
            yield f"`layers` names {len(self.layers)} layers, `num_layers` is {self.num_layers}; drop one"


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens and pixels, see `DataSpec`; None: as the model brings it along."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    prompt: PromptMode = "generation"


AS_IT_IS = Encoding()


class VideoSpec(Strict):
    """Which frames of a video are shown, as pictures: `fps` a second, at most `max_frames`, evenly spread."""

    fps: Annotated[float, Field(gt=0, le=1000)] = 1.0
    max_frames: Annotated[int, Field(ge=1, le=4096)] = 8


class DataSpec(Strict):
    """Chat rows: Parquet or JSONL files (`path`: a file, a folder of shards, a glob, a folder of
    `datasets.save_to_disk`, or a list of these), or an installed generator of rows (`generator`, `options`).

    `turns`: which of the assistant's turns are learned: `all`, each a sample of its own with the prompt that it has at
    inference, or the `last` one of every row.
    `keep_together`: which neighbours stay together when samples are dealt into parts of a cache and shuffled, so that
    what they share runs once: those that begin alike (`prompt`: responses to one prompt, questions on the same
    pictures, at most 16), or the turns of each `row` alone.
    `template`: arguments for the chat template (`{enable_thinking: false}`). `prompt`: where the prompt of a trained
    answer ends: `generation`, as the template ends it at inference; `template`, where the answer begins in the whole
    conversation ("train as the template writes history").
    """

    path: str | Annotated[list[str], Field(min_length=1)] | None = None
    media_root: str | None = None
    generator: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    limit: Annotated[int, Field(ge=1, le=2**40)] | None = None
    max_length: Annotated[int, Field(ge=8, le=2**24)] = 4096
    min_pixels: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_pixels: Annotated[int, Field(ge=1, le=2**31)] | None = None
    bad_rows: BadRows = "refuse"
    template: dict[str, Any] = Field(default_factory=dict)
    prompt: PromptMode = "generation"
    turns: Turns = "all"
    keep_together: Together = "prompt"
    video: VideoSpec = VideoSpec()

    def _contradictions(self) -> Iterator[str]:
        if (self.path is None) == (self.generator is None):
            yield "name exactly one source: `path` (.jsonl or .parquet files) or `generator`"
        if self.options and self.generator is None:
            yield "`options` belong to a `generator`, and none is named"

    def encoding(self) -> Encoding:
        """What an encoder is told of this section."""
        return Encoding(self.min_pixels, self.max_pixels, self.template, self.prompt)


class TokensSpec(Strict):
    """Which response tokens get rows: all, or those one rule chooses. The entropy is that of the last layer, in nats.

    `entropy_above`: above this value. `entropy_top`: this share of each part's tokens, those of highest entropy.
    `random`: this share, drawn from `rows.seed` and the sample's id.
    """

    entropy_above: Annotated[float, Field(ge=0, le=100)] | None = None
    entropy_top: Annotated[float, Field(gt=0, le=1)] | None = None
    random: Annotated[float, Field(gt=0, le=1)] | None = None

    def _contradictions(self) -> Iterator[str]:
        if len([rule for rule in (self.entropy_above, self.entropy_top, self.random) if rule is not None]) > 1:
            yield "name one of `entropy_above`, `entropy_top` and `random`"

    @property
    def expected_share(self) -> float:
        """Share of the tokens that will be kept, as far as it is known beforehand."""
        return self.entropy_top or self.random or 1.0


class RowsSpec(Strict):
    """What is kept of each (layer, token) distribution.

    `kind: top-k` keeps the `top_k` likeliest tokens (a list names one k for each cached layer, the final one last);
    with `top_p`, only as many of them as reach that mass, at least `min_k`. `kind: sampled` keeps `num_draws` draws
    from the whole distribution instead, and needs no tail samples.
    """

    kind: Literal["top-k", "sampled"] = "top-k"
    top_k: Count | Annotated[tuple[Count, ...], Field(max_length=MAX_LAYERS + 1)] = 64
    top_p: Annotated[float, Field(gt=0, lt=1)] | None = None
    min_k: Count = 1
    num_draws: Annotated[int, Field(ge=1, le=65535)] = 50
    tail_samples: Annotated[int, Field(ge=0, le=64)] = 4
    taus: Annotated[tuple[Annotated[float, Field(gt=0, le=1e3)], ...], Field(max_length=16)] = (1.0,)
    select_tokens: TokensSpec = TokensSpec()
    seed: Seed = 0

    def _contradictions(self) -> Iterator[str]:
        if self.taus[:1] != (1.0,) or len(set(self.taus)) != len(self.taus):
            yield "`taus` starts with 1.0 (the log-probs are stored at 1.0) and names no value twice"
        smallest = self.top_k if isinstance(self.top_k, int) else min(self.top_k, default=0)
        if smallest < 1:
            yield "`top_k` is a number, or a list with one number for each cached layer"
        if self.min_k > smallest:
            yield f"`min_k` {self.min_k} is above `top_k` {smallest}"
        if self.top_p is None and self.min_k > 1:
            yield "`min_k` belongs to `top_p`, and none is named"
        if self.kind == "sampled" and self.top_p is not None:
            yield "`top_p` belongs to `kind: top-k`"

    def widths(self, num_layers: int) -> list[int]:
        """The largest number of entries of each of `num_layers` cached layers."""
        if self.kind == "sampled":
            return [self.num_draws] * num_layers
        if isinstance(self.top_k, int):
            return [self.top_k] * num_layers
        if len(self.top_k) != num_layers:
            raise SpecError(
                f"`rows.top_k` names {len(self.top_k)} numbers and {num_layers} layers are cached: "
                "one for each target layer, and the final layer last"
            )
        return list(self.top_k)


class StoreSpec(Strict):
    """How the rows lie on disk. `part_mib` is the uncompressed size a part aims at, in MiB.

    `default`: one byte a log-prob, compressed. `exact`: every bit of the log-probs, compressed. `fast`: two bytes a
    log-prob, not compressed, read through a memory map.
    """

    profile: Literal["default", "exact", "fast"] = "default"
    part_mib: Annotated[float, Field(gt=0, le=2**16)] = 64.0


class EvaluateSpec(Strict):
    """Held-out rows and what is measured on them; `num_beams` above 1 searches answers with that many beams.

    `traversal`: which tokens are traversed by a student whose layers run again, when that is not as it was trained
    (TroL, Tables 7, 9 and 10); a plain model gets gates that nobody has trained.
    """

    data: DataSpec
    generate: bool = True
    num_beams: Annotated[int, Field(ge=1, le=1024)] = 1
    max_new_tokens: Count = 64
    batch_size: Count = 16
    traversal: Traversed | None = Field(default=None, exclude_if=lambda value: value is None)

    def _contradictions(self) -> Iterator[str]:
        if not self.generate and self.num_beams > 1:
            yield "`num_beams` searches answers, and `generate: false` asks for none"


class RunSpec(Strict):
    """Where the build runs; not part of the fingerprint (another batch size changes rows by rounding only).

    `batch_tokens: auto`: a new build looks for the number that suits the machine and records it in the cache; whatever
    else reads the number takes the default. `kernels`: sums over the vocabulary as torch runs them (`eager`) or fused
    by `torch.compile`; `auto` fuses them on CUDA. `vision_cache_mib`: memory of the host for what a frozen vision tower
    makes of pictures, so that it runs once for each (or once for those of a sample, where the processor prepares them
    together); 0 keeps nothing. They go through the tower alone, which is slower than a batch of them: it pays where
    pictures are shown three times or more. `vision_disk_mib`: the same on the disk, in the user's cache folder, for
    later commands with the same tower. `workers`: processes that read rows and prepare samples, started where there is
    enough to do; 0 does it all in the process itself, `auto` takes one less than there are cores, at most 8. `track`:
    trackers that get what `metrics.jsonl` of a training has, TensorBoard (in RUN/tensorboard) and Weights & Biases (as
    its own environment variables say). `parallel`: what each process of a `torchrun` holds of the student that it
    trains, or of the teacher whose verbalizers it trains: the whole (`ddp`), or its share of every decoder layer
    (`fsdp`).
    """

    device: str = "auto"
    batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1, le=2**31)] = DEFAULT_BATCH_TOKENS
    kernels: Kernels = "auto"
    vision_cache_mib: Annotated[int, Field(ge=0, le=2**24)] = 0
    vision_disk_mib: Annotated[int, Field(ge=0, le=2**30)] = 0
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = "auto"
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    parallel: StudentParallel = "ddp"

    @property
    def num_workers(self) -> int:
        """The number of worker processes, counted where it is left open."""
        if self.workers != "auto":
            return self.workers
        return min(8, max(0, len(os.sched_getaffinity(0)) - 1) if hasattr(os, "sched_getaffinity") else 1)

    @property
    def num_batch_tokens(self) -> int:
        """The number, or the default where it is to be found."""
        return DEFAULT_BATCH_TOKENS if self.batch_tokens == "auto" else self.batch_tokens

    def with_batch_tokens(self, number: int) -> "RunSpec":
        """The same run with the number that was found, as it is recorded."""
        return self.model_copy(update={"batch_tokens": number})


class CacheSpec(Strict):
    """One experiment: a teacher, a data set, what to keep, and how students are distilled from it by default."""

    name: str
    description: str = ""
    teacher: TeacherSpec
    data: DataSpec
    rows: RowsSpec = RowsSpec()
    store: StoreSpec = StoreSpec()
    verbalizer: VerbalizerSpec = VerbalizerSpec()
    train_verbalizers: TrainVerbalizersSpec = TrainVerbalizersSpec()
    distill: DistillSpec = DistillSpec()
    evaluate: EvaluateSpec | None = None
    run: RunSpec = RunSpec()

    @model_validator(mode="before")
    @classmethod
    def _held_out_rows_are_rendered_alike(cls, values: Any) -> Any:
        """Held-out rows take `data.template` and `data.prompt` where `evaluate.data` names none of its own."""
        try:
            data, held_out = values["data"], values["evaluate"]["data"]
        except (KeyError, TypeError):
            return values
        if not isinstance(data, Mapping) or not isinstance(held_out, Mapping):
            return values
        alike = {key: data[key] for key in ("template", "prompt") if key in data}
        return {**values, "evaluate": {**values["evaluate"], "data": {**alike, **held_out}}}

    def _contradictions(self) -> Iterator[str]:
        distill, exits = self.distill, self.distill.exits
        if not self.verbalizer.is_lens:
            return
        if distill.verbalizers is not None:
            yield "`distill.verbalizers` names some, and `verbalizer.structure: logit-lens` reads layers without any"
        if exits is not None and (distill.recipe != "any-depth" or exits.changed(("schedule", "loss"))):
            yield (
                "`distill.exits` trains verbalizers of the finished student, and `verbalizer.structure: logit-lens` "
                "reads layers without any; leave it out, but for the `weight` of `recipe: any-depth`"
            )

    def fingerprint_fields(self) -> dict[str, Any]:
        """The settings that decide the bytes of a cache, by their dotted key."""
        return {
            "teacher.dtype": self.teacher.dtype,
            **{f"rows.{key}": value for key, value in self.rows.model_dump(mode="json").items()},
            "store.profile": self.store.profile,
            "store.part_mib": self.store.part_mib,
            "data.max_length": self.data.max_length,
            # Of caches of earlier releases, which kept turns together and nothing else, it is not part.
            **({"data.keep_together": "prompt"} if self.data.keep_together == "prompt" else {}),
        }
