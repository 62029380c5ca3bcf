"""The base of all sections of a spec, and those about training: verbalizers, and from a cache to a student."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Recipe = Literal["vlsi", "last", "sft", "trol", "any-depth"]
Structure = Literal[
    "mlp", "mlp-x2", "verb-ffn", "verb-ffn-x2", "ffn", "ffn-x2", "decoder", "decoder-x2", "logit-lens"
]  # fmt: skip
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
BatchReduction = Literal["token", "sample"]
Alignment = Literal["tokens", "byte"]
Style = Literal["residual", "plain"]
PreNorm = Literal["rms", "none"]
# Bounds that no model, machine or training comes near: what is beyond them was mistyped.
MAX_LAYERS = 4096
Count = Annotated[int, Field(ge=1, le=2**20)]
Steps = Annotated[int, Field(ge=1, le=10**9)]
Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0, le=1e6)]
Layer = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
TargetLayers = Literal["auto"] | Annotated[tuple[Layer, ...], Field(max_length=MAX_LAYERS)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Strict(BaseModel):
    """Base of all sections: unknown keys are refused, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, values: Any) -> Any:
        """Yes and no would pass for 1 and 0."""
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key)
            if field is None or field.annotation is bool:
                continue
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, bool):
                    raise ValueError(f"`{key}` is read as {one}, and yes or no is no value of it")
        return values

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for problem in self._contradictions():
            raise ValueError(problem)
        return self

    def _contradictions(self) -> Iterator[str]:
        """Of a section, what contradicts what in it; the first of them is told."""
        return iter(())

    def changed(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that have not their default."""
        return [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]


class Schedule(Strict):
    """Length and learning rate of one training stage: `steps` or `epochs`; one epoch when neither is named."""

    steps: Steps | None = None
    epochs: Factor | None = None
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 1e-4
    final_learning_rate: Annotated[float, Field(ge=0, le=100)] = 1e-6
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    clip_norm: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("steps") is not None and values.get("epochs") is not None:
            raise ValueError("name one of `steps` and `epochs`, not both")
        named = values.get("steps") is not None or values.get("epochs") is not None
        return values if named else {**values, "epochs": 1.0}

    def num_steps(self, num_samples: int, batch_size: int) -> int:
        """Optimizer steps over `num_samples`; an epoch is rounded up to whole batches."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, -int(-self.epochs * num_samples // batch_size))


class VerbalizerSpec(Strict):
    """Architecture of the verbalizers, for teacher and student alike (VLsI, Table 4f), and what they learn.

    `loss: ce` is the cross-entropy with the response; `kl_to_final` the divergence from what the model itself says at
    the response's positions, as the tuned lens learns it. `structure: logit-lens` has no weights: a layer is read by
    the model's own norm and head, nothing is trained for it, and the steps of stage verbalize train the student.
    """

    structure: Structure = "verb-ffn"
    style: Style = "residual"
    final_norm: bool = True
    pre_norm: PreNorm = "rms"
    loss: Literal["ce", "kl_to_final"] = "ce"

    def _contradictions(self) -> Iterator[str]:
        if self.is_lens and (changed := self.changed(("style", "final_norm", "pre_norm", "loss"))):
            yield (
                f"`{'`, `'.join(changed)}` belong to verbalizers that are trained, and `structure: logit-lens` is the "
                "model's own norm and head"
            )

    @property
    def is_lens(self) -> bool:
        return self.structure == "logit-lens"


class TrainVerbalizersSpec(Strict):
    """Training of the teacher's verbalizers, each by the loss of its layer; everything else is frozen.

    `batch_reduction` as in `DistillSpec`.
    """

    schedule: Schedule = Schedule(epochs=1)
    batch_size: Count = 256
    micro_batch_size: Count = 4
    batch_reduction: BatchReduction = "token"
    checkpoint_steps: Steps = 200
    seed: Seed = 0

    def _contradictions(self) -> Iterator[str]:
        yield from _broken_batches(self)


def _broken_batches(spec: "TrainVerbalizersSpec | DistillSpec") -> Iterator[str]:
    if spec.batch_size % spec.micro_batch_size:
        yield f"`batch_size` {spec.batch_size} is not a multiple of `micro_batch_size` {spec.micro_batch_size}"


class LoraSpec(Strict):
    """Adapter on the linear layers of the language model; the vision tower is never adapted."""

    rank: Annotated[int, Field(ge=1, le=65536)] = 64
    alpha: Factor = 64.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "l2_topk"]
Operation = DivergenceName | Literal["ce", "none"]
MatchingMode = Literal["vlsi", "order", "range", "multinomial", "bottom_k", "uniform", "uniform_stretch", "random"]
Temperature = Literal["normalized", "printed", "fixed"]
# Options of earlier releases with the values that changed nothing; docs/log.md has what they were measured to do.
REMOVED = {"match_unit": "batch", "sampler": "greedy", "reliable_only": False}
DIVERGENCES = frozenset(get_args(DivergenceName))
OF_OPERATIONS = {"beta": {"jsd"}, "skew": {"skewed_kl"}, "tau": DIVERGENCES}


class InteractSpec(Strict):
    """The interaction step (Algorithm 1 of the paper); `recipe: last` takes its last-layer term alone.

    `intermediate` and `last` say what is trained at the matched layers and at the last one (Table 4d): a divergence
    from the teacher, `ce` with the labels and no teacher, or nothing. `beta` is the teacher's share of the jsd's
    mixture, `skew` that of the skewed KL's. `tau` softens both sides of a divergence; it must be one of the cache's
    `rows.taus`. `alpha_ce` mixes the labels into the last layer: (1 - alpha_ce) * divergence + alpha_ce * ce.

    `matching` and what follows it choose teacher layers (Table 4e), by the forward KL whatever is trained: one match
    for a micro-batch. The intermediate terms have their full weight until `layers_full_until`, a share of the stage's
    steps, and none from `layers_zero_from` on. `chunk_temperature` is that at which chunks of bytes are compared with
    `alignment: byte` (see `sparse/alm.py`).

    `mode: lora` trains an adapter; `layers` the weights of the decoder layers themselves, for a student that is far
    from knowing the task, or has just been made. Head and embeddings are frozen in both.
    """

    schedule: Schedule = Schedule(epochs=1)
    mode: Literal["lora", "layers"] = "lora"
    lambda_last: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    intermediate: Operation = "forward_kl"
    last: Operation = "forward_kl"
    layer_reduction: Literal["sum", "mean"] = "sum"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    tau: Annotated[float, Field(gt=0, le=1e3)] = 1.0
    alpha_ce: Share = 0.0
    matching: MatchingMode = "vlsi"
    scale: Factor = 2.0
    temperature: Temperature = "normalized"
    fixed_temperature: Factor = 1.0
    bottom_k: Layer = 1
    layers_full_until: Share = 1.0
    layers_zero_from: Share = 1.0
    chunk_temperature: Factor = 100.0

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, values: Any) -> Any:
        """Specs of earlier releases, as caches and runs keep them, name options that are no longer there."""
        if not isinstance(values, dict):
            return values
        changed = [key for key, default in REMOVED.items() if values.get(key, default) != default]
        if changed:
            raise ValueError(f"`{'`, `'.join(changed)}` are no longer there: no measurement has found a use for them")
        return {key: value for key, value in values.items() if key not in REMOVED}

    def _contradictions(self) -> Iterator[str]:
        adaptive = self.changed(("scale", "temperature", "fixed_temperature"))
        if self.matching != "vlsi" and adaptive:
            yield f"`{'`, `'.join(adaptive)}` belong to `matching: vlsi`, and it is `{self.matching}`"
        if self.temperature == "fixed" and self.changed(["scale"]):
            yield "`scale` belongs to the adaptive temperatures, and `temperature` is `fixed`"
        if self.temperature != "fixed" and self.changed(["fixed_temperature"]):
            yield f"`fixed_temperature` belongs to `temperature: fixed`, and it is `{self.temperature}`"
        if self.matching != "bottom_k" and self.changed(["bottom_k"]):
            yield f"`bottom_k` belongs to `matching: bottom_k`, and it is `{self.matching}`"
        if self.layers_full_until > self.layers_zero_from:
            yield "`layers_full_until` lies behind `layers_zero_from`"
        of_matching = ("matching", "scale", "temperature")
        if not self.lambda_last:
            yield from self._idle(("last", "alpha_ce"), "with `lambda_last: 0`")
        if not self.layers_zero_from:
            yield from self._idle((*of_matching, "intermediate", "layer_reduction"), "with `layers_zero_from: 0`")
        for key in self.changed(OF_OPERATIONS):
            if OF_OPERATIONS[key].isdisjoint({self.intermediate, self.last}):
                yield f"`{key}` belongs to {', '.join(sorted(OF_OPERATIONS[key]))}, and none is trained"
        if self.alpha_ce and self.last not in DIVERGENCES:
            yield f"`alpha_ce` mixes the labels into a divergence, and `last` is `{self.last}`"
        if self.intermediate not in DIVERGENCES:
            fading = () if self.intermediate == "ce" else ("layer_reduction", "layers_full_until", "layers_zero_from")
            yield from self._idle((*of_matching, *fading), f"with `intermediate: {self.intermediate}`")
        if not self.trains_last and (self.intermediate == "none" or self.layers_zero_from < 1):
            yield (
                "the last layer is not trained (`last`, `lambda_last`), and the intermediate ones are not, or not to "
                "the end (`intermediate`, `layers_zero_from`): there would be steps with nothing to train"
            )

    def _idle(self, keys: Iterable[str], where: str) -> Iterator[str]:
        if changed := self.changed(keys):
            yield f"`{'`, `'.join(changed)}` do nothing {where}"

    @property
    def trains_last(self) -> bool:
        return bool(self.lambda_last) and self.last != "none"

    def layer_weight(self, progress: float) -> float:
        """The weight of the intermediate terms after this share of the stage's steps."""
        if progress < self.layers_full_until or self.layers_full_until == 1.0:
            return 1.0
        if progress >= self.layers_zero_from:
            return 0.0
        return (self.layers_zero_from - progress) / (self.layers_zero_from - self.layers_full_until)


class SftSpec(Strict):
    """Supervised finetuning on the labels, after the interaction step.

    `fraction` stops it after this share of the schedule's steps (Table 4c); the learning rate stays that of the whole
    schedule. 0: no finetuning, the student is what the interaction has made of it.
    """

    schedule: Schedule = Schedule(epochs=1)
    mode: Literal["lora+embed_head", "full"] = "lora+embed_head"
    fraction: Share = 1.0

    def steps_left_out(self, num_steps: int) -> int:
        """How many of the schedule's `num_steps` are not run; one is run at least, unless `fraction` is 0."""
        return num_steps - (max(1, round(self.fraction * num_steps)) if self.fraction else 0)


class TraversalSpec(Strict):
    """A student whose decoder layers run `num_passes` times each, on their own output (TroL, arXiv 2406.12246).

    A gate mixes each pass into what is there, for every token: w = sigmoid(2 gate(h)), (1 - w) h + w layer(h), where h
    is the output of the pass before. `mode: prompt` does so for tokens of the prompt, `all` for those of the answer
    too. `gates`: one linear map [hidden size, 1] for each layer, or one for all; `gate_bias` gives it a bias.
    `gate_init: paper` starts as torch's linear layers do (w near 0.5), `near_zero` with weight 0 and bias -1.5
    (w = 0.05), as the plain student nearly. `mixing` is for ablations (Table 4d): `first` keeps (1 - w) h alone,
    `second` w layer(h); in `uniform` w is 1/2, in `random` the gates stay as they are drawn.

    `schedule` is that of stage gates, which comes before all others and trains gates and vision projector alone.
    """

    mode: Literal["prompt", "all"] = "prompt"
    gates: Literal["per_layer", "shared"] = "per_layer"
    gate_bias: bool = False
    gate_init: Literal["paper", "near_zero"] = "paper"
    num_passes: Annotated[int, Field(ge=2, le=4)] = 2
    mixing: Literal["gated", "first", "second", "uniform", "random"] = "gated"
    schedule: Schedule = Schedule(epochs=1)

    def _contradictions(self) -> Iterator[str]:
        if self.gate_init == "near_zero" and not self.gate_bias:
            yield "`gate_init: near_zero` starts the bias at -1.5, and there is none: say `gate_bias: true`"
        if self.mixing == "uniform" and (changed := self.changed(("gates", "gate_bias", "gate_init"))):
            yield f"`{'`, `'.join(changed)}` do nothing with `mixing: uniform`, which has no gates"
        if self.mixing == "random" and self.changed(["gate_init"]):
            yield "`gate_init` does nothing with `mixing: random`, whose gates are drawn and stay so"
        if self.mixing == "first" and self.changed(["num_passes"]):
            yield "`num_passes` does nothing with `mixing: first`, which keeps the first pass alone"

    @property
    def trains_gates(self) -> bool:
        return self.mixing not in ("uniform", "random")


class ExitsSpec(Strict):
    """Verbalizers of the target layers, trained when the student is finished; it stays as it is (`train/exits.py`).

    `loss: kl_to_final` teaches a layer what the last one says, which is what drafts are accepted by; `ce` the response.
    `weight` is that of the layers' mean loss beside the last one's in recipe `any-depth`, in interaction and sft.
    """

    schedule: Schedule = Schedule(epochs=1)
    loss: Literal["kl_to_final", "ce"] = "kl_to_final"
    weight: Annotated[float, Field(gt=0, le=1e6)] = 0.1


class DistillSpec(Strict):
    """From a cache to a student. `recipe` decides which stages run; all recipes take the same number of steps:

    vlsi: verbalize, interact over all target layers, sft. last: the steps of verbalize and interact go to last-layer
    distillation, then sft. sft: all steps go to sft. What `sft.fraction` leaves out, it leaves out of every recipe.
    any-depth: as vlsi, but the layers' losses have the weight of `exits` from beginning to end, through sft too.
    trol: as sft, for a student with `traversal`. Of such a student stage gates comes first in every recipe, and its
    steps come on top; where no gates train they go to the next stage that trains the student. With `exits` stage exits
    comes last in every recipe, and its steps come on top.

    The loss of a step is the mean over the tokens of its `batch_size` samples, or with `batch_reduction: sample` over
    the samples, each with the mean of its tokens; `micro_batch_size` decides about memory and speed, not about it.

    `alignment: tokens` takes the teacher's tokens for the student's, which must share its tokenizer; `byte` compares a
    student of another tokenizer where the bytes of both are the same (`sparse/alm.py`).

    `recipe: sft` passes over `lora` as over `interact`, so that one spec serves all recipes; where the recipe's own
    stages would use an adapter but for `interact.mode: layers`, a changed `lora` is refused.
    """

    student: str | None = None
    student_dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    recipe: Recipe = "vlsi"
    layers: TargetLayers = "auto"
    num_layers: Layer = 7
    # A folder of verbalizers trained for this very student: `vlsi` takes them, and counts its verbalize steps as done.
    verbalizers: str | None = None
    batch_size: Count = 512
    micro_batch_size: Count = 4
    batch_reduction: BatchReduction = "token"
    alignment: Alignment = "tokens"
    gradient_checkpointing: bool = False
    verbalize: Schedule = Schedule(epochs=1)
    interact: InteractSpec = InteractSpec()
    sft: SftSpec = SftSpec()
    lora: LoraSpec = LoraSpec()
    # Left out where it is not set: specs of earlier releases are the same as they were.
    traversal: TraversalSpec | None = Field(default=None, exclude_if=lambda value: value is None)
    exits: ExitsSpec | None = Field(default=None, exclude_if=lambda value: value is None)
    checkpoint_steps: Steps = 200
    window_parts: Count = 4
    seed: Seed = 0

    def _contradictions(self) -> Iterator[str]:
        if self.verbalizers is not None and not self.trains_layers:
            yield f"`verbalizers` belong to `recipe: vlsi` and `any-depth`, and it is `{self.recipe}`"
        if self.recipe == "any-depth" and self.exits is None:
            yield (
                "`recipe: any-depth` trains exits, and there are none: say for how long with `exits.schedule` (with "
                "`verbalizer.structure: logit-lens`, which has nothing to train, how much they count: `exits.weight`)"
            )
        if self.layers != "auto" and self.changed(["num_layers"]) and self.num_layers != len(self.layers):
            yield (
                f"`layers` names {len(self.layers)} layers, `num_layers` is {self.num_layers}; drop one, or say "
                "`layers: auto` for so many evenly spaced ones"
            )
        yield from _broken_batches(self)
        yield from self._unaligned()
        fading = ("layer_reduction", "layers_full_until", "layers_zero_from")
        if self.recipe == "any-depth" and (idle := self.interact.changed(fading)):
            yield f"`interact.{'`, `interact.'.join(idle)}` do nothing in `recipe: any-depth`: see `exits.weight`"
        if self.recipe == "last" and not self.interact.trains_last:
            yield "`recipe: last` trains the last layer alone, and `interact` leaves it out"
        if self.is_supervised and not self.sft.fraction:
            yield f"`recipe: {self.recipe}` is supervised finetuning alone, and `sft.fraction: 0` leaves it out"
        if self.recipe == "trol" and self.traversal is None:
            yield "`recipe: trol` trains a student whose layers are traversed: say how in `traversal`"
        if self.recipe == "sft" and self.traversal is not None:
            yield "supervised finetuning of a student with `traversal` is `recipe: trol`, and it is `sft`"
        if self.traversal is not None and self.verbalizers is not None:
            yield "`verbalizers` read the student as it comes, and with `traversal` stage gates trains it before them"
        if self.is_supervised or self.interact.mode != "layers":
            return
        if self.sft.fraction and self.sft.mode != "full":
            yield (
                f"`interact.mode: layers` trains the weights themselves, and `sft.mode: {self.sft.mode}` an adapter on "
                "them; say `sft.mode: full`"
            )
        if changed := self.lora.changed(LoraSpec.model_fields):
            yield (
                f"`lora.{'`, `lora.'.join(changed)}` belong to an adapter, and `interact.mode: layers` trains none; "
                "leave `lora` as it is"
            )

    @property
    def trains_layers(self) -> bool:
        """Whether the layers learn beside the last one, each through its verbalizer."""
        return self.recipe in ("vlsi", "any-depth")

    @property
    def exit_weight(self) -> float | None:
        """The weight of the layers' mean loss beside the last one's, in every step; None where each has its own."""
        return self.exits.weight if self.recipe == "any-depth" and self.exits is not None else None

    @property
    def is_supervised(self) -> bool:
        """Whether the student learns from labels alone."""
        return self.recipe in ("sft", "trol")

    def _unaligned(self) -> Iterator[str]:
        interact = self.interact
        if self.alignment == "tokens":
            if interact.changed(["chunk_temperature"]):
                yield "`interact.chunk_temperature` belongs to `alignment: byte`, and it is `tokens`"
        elif not self.is_supervised:
            if interact.tau != 1.0:
                yield f"`alignment: byte` compares at `tau: 1` alone, and `interact.tau` is {interact.tau}"
            if "l2_topk" in (interact.intermediate, interact.last):
                yield "`l2_topk` has no value for a chunk of bytes (`alignment: byte`); choose another divergence"
