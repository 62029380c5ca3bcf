"""The sections of a spec: what may be said, with every default, and what goes together.

A spec says WHAT; flags of the command line say where and how.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import SpecError

Recipe = Literal["vlsi", "last", "sft"]
Structure = Literal["mlp", "mlp-x2", "verb-ffn", "verb-ffn-x2", "ffn", "ffn-x2", "decoder", "decoder-x2"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TargetLayers = Literal["auto"] | tuple[Annotated[int, Field(ge=1)], ...]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
DEFAULT_BATCH_TOKENS = 8192

Batched = TypeVar("Batched", "TrainVerbalizersSpec", "DistillSpec")


class Strict(BaseModel):
    """Base of all sections: unknown keys are refused, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TeacherSpec(Strict):
    """The frozen teacher: a folder, `package:NAME/sub/folder` of an installed package, or a hub id."""

    model: str
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    layers: TargetLayers = "auto"
    num_layers: Annotated[int, Field(ge=0)] = 0
    verbalizers: str | None = None

    @model_validator(mode="after")
    def _layers_are_named_once(self) -> "TeacherSpec":
        if self.layers == "auto" and self.num_layers == 0:
            raise ValueError("name the target layers: `layers: [2, 6, ...]`, or `num_layers: 7` to space them evenly")
        if self.layers != "auto" and self.num_layers not in (0, len(self.layers)):
            raise ValueError(f"`layers` names {len(self.layers)} layers, `num_layers` is {self.num_layers}; drop one")
        return self


class DataSpec(Strict):
    """Chat rows: a Parquet or JSONL file (`path`), or an installed generator of rows (`generator`, `options`)."""

    path: str | None = None
    media_root: str | None = None
    generator: str | None = None
    options: dict[str, Any] = {}
    limit: Annotated[int, Field(ge=1)] | None = None
    max_length: Annotated[int, Field(ge=8)] = 4096
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    bad_rows: Literal["refuse", "list"] = "refuse"

    @model_validator(mode="after")
    def _one_source(self) -> "DataSpec":
        if (self.path is None) == (self.generator is None):
            raise ValueError("name exactly one source: `path` (a .jsonl or .parquet file) or `generator`")
        if self.options and self.generator is None:
            raise ValueError("`options` belong to a `generator`, and none is named")
        return self


class TokensSpec(Strict):
    """Which response tokens get rows: all, or those one rule chooses. The entropy is that of the last layer, in nats.

    `entropy_above`: above this value. `entropy_top`: this share of each part's tokens, those of highest entropy.
    `random`: this share, drawn from `rows.seed` and the sample's id.
    """

    entropy_above: Annotated[float, Field(ge=0)] | None = None
    entropy_top: Annotated[float, Field(gt=0, le=1)] | None = None
    random: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> "TokensSpec":
        if len([rule for rule in (self.entropy_above, self.entropy_top, self.random) if rule is not None]) > 1:
            raise ValueError("name one of `entropy_above`, `entropy_top` and `random`")
        return self

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
    top_k: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], ...] = 64
    top_p: Annotated[float, Field(gt=0, lt=1)] | None = None
    min_k: Annotated[int, Field(ge=1)] = 1
    num_draws: Annotated[int, Field(ge=1, le=65535)] = 50
    tail_samples: Annotated[int, Field(ge=0, le=64)] = 4
    taus: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    select_tokens: TokensSpec = TokensSpec()
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> "RowsSpec":
        if self.taus[:1] != (1.0,) or len(set(self.taus)) != len(self.taus):
            raise ValueError("`taus` starts with 1.0 (the log-probs are stored at 1.0) and names no value twice")
        smallest = self.top_k if isinstance(self.top_k, int) else min(self.top_k, default=0)
        if smallest < 1:
            raise ValueError("`top_k` is a number, or a list with one number for each cached layer")
        if self.min_k > smallest:
            raise ValueError(f"`min_k` {self.min_k} is above `top_k` {smallest}")
        if self.top_p is None and self.min_k > 1:
            raise ValueError("`min_k` belongs to `top_p`, and none is named")
        if self.kind == "sampled" and self.top_p is not None:
            raise ValueError("`top_p` belongs to `kind: top-k`")
        return self

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
    part_mib: Annotated[float, Field(gt=0)] = 64.0


class Schedule(Strict):
    """Length and learning rate of one training stage: `steps` or `epochs`; one epoch when neither is named."""

    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

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
    the response's positions, as the tuned lens learns it.
    """

    structure: Structure = "verb-ffn"
    style: Literal["residual", "plain"] = "residual"
    final_norm: bool = True
    pre_norm: Literal["rms", "none"] = "rms"
    loss: Literal["ce", "kl_to_final"] = "ce"


def _check_batches(spec: Batched) -> Batched:
    if spec.batch_size % spec.micro_batch_size:
        raise ValueError(
            f"`batch_size` {spec.batch_size} is not a multiple of `micro_batch_size` {spec.micro_batch_size}"
        )
    return spec


class TrainVerbalizersSpec(Strict):
    """Training of the teacher's verbalizers, each by the loss of its layer; everything else is frozen."""

    schedule: Schedule = Schedule(epochs=1)
    batch_size: Annotated[int, Field(ge=1)] = 256
    micro_batch_size: Annotated[int, Field(ge=1)] = 4
    checkpoint_steps: Annotated[int, Field(ge=1)] = 200
    seed: Seed = 0

    _whole_micro_batches = model_validator(mode="after")(_check_batches)


class LoraSpec(Strict):
    """Adapter on the linear layers of the language model; the vision tower is never adapted."""

    rank: Annotated[int, Field(ge=1)] = 64
    alpha: Annotated[float, Field(gt=0)] = 64.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


Operation = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "l2_topk", "ce", "none"]
DIVERGENCES = frozenset({"forward_kl", "reverse_kl", "jsd", "skewed_kl", "l2_topk"})


class InteractSpec(Strict):
    """The interaction step (Algorithm 1 of the paper); `recipe: last` takes its last-layer term alone.

    `intermediate` and `last` say what is trained at the matched layers and at the last one (Table 4d): a divergence
    from the teacher, `ce` with the labels and no teacher, or nothing. `beta` is the teacher's share of the jsd's
    mixture, `skew` that of the skewed KL's. `tau` softens both sides of a divergence; it must be one of the cache's
    `rows.taus`. `alpha_ce` mixes the labels into the last layer: (1 - alpha_ce) * divergence + alpha_ce * ce.

    `matching` and what follows it choose teacher layers (Table 4e), by the forward KL whatever is trained: one match
    for a micro-batch or for each sample (`match_unit`). `reliable_only`: a teacher layer that says the response worse
    than the student's own layer teaches it nothing. The intermediate terms have their full weight until
    `layers_full_until`, a share of the stage's steps, and none from `layers_zero_from` on.
    """

    schedule: Schedule = Schedule(epochs=1)
    lambda_last: Annotated[float, Field(ge=0)] = 1.0
    intermediate: Operation = "forward_kl"
    last: Operation = "forward_kl"
    layer_reduction: Literal["sum", "mean"] = "sum"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    tau: Annotated[float, Field(gt=0)] = 1.0
    alpha_ce: Annotated[float, Field(ge=0, le=1)] = 0.0
    matching: Literal["vlsi", "order", "range", "multinomial", "bottom_k", "uniform", "uniform_stretch", "random"] = (
        "vlsi"
    )
    match_unit: Literal["batch", "sample"] = "batch"
    sampler: Literal["greedy", "joint"] = "greedy"
    scale: Annotated[float, Field(gt=0)] = 2.0
    temperature: Literal["normalized", "printed", "fixed"] = "normalized"
    fixed_temperature: Annotated[float, Field(gt=0)] = 1.0
    bottom_k: Annotated[int, Field(ge=1)] = 1
    reliable_only: bool = False
    layers_full_until: Annotated[float, Field(ge=0, le=1)] = 1.0
    layers_zero_from: Annotated[float, Field(ge=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "InteractSpec":
        adaptive = {"scale": 2.0, "temperature": "normalized", "fixed_temperature": 1.0}
        changed = [key for key, default in adaptive.items() if getattr(self, key) != default]
        if self.matching != "vlsi" and changed:
            raise ValueError(f"`{'`, `'.join(changed)}` belong to `matching: vlsi`, and it is `{self.matching}`")
        if self.temperature != "fixed" and self.fixed_temperature != 1.0:
            raise ValueError(f"`fixed_temperature` belongs to `temperature: fixed`, and it is `{self.temperature}`")
        if self.matching != "bottom_k" and self.bottom_k != 1:
            raise ValueError(f"`bottom_k` belongs to `matching: bottom_k`, and it is `{self.matching}`")
        if self.sampler == "joint" and self.matching not in ("vlsi", "order"):
            raise ValueError(f"`sampler: joint` keeps the order of layers, which `matching: {self.matching}` does not")
        if self.reliable_only and self.tau != 1.0:
            raise ValueError("`reliable_only` compares the likelihood of the response, which is known at `tau` 1 alone")
        if self.layers_full_until > self.layers_zero_from:
            raise ValueError("`layers_full_until` lies behind `layers_zero_from`")
        self._nothing_belongs_to_another_operation()
        if not self.trains_last and (self.intermediate == "none" or self.layers_zero_from < 1):
            raise ValueError(
                "the last layer is not trained (`last`, `lambda_last`), and the intermediate ones are not, or not to "
                "the end (`intermediate`, `layers_zero_from`): there would be steps with nothing to train"
            )
        return self

    def _nothing_belongs_to_another_operation(self) -> None:
        used = {self.intermediate, self.last}
        for key, names in {"beta": {"jsd"}, "skew": {"skewed_kl"}, "tau": DIVERGENCES}.items():
            if getattr(self, key) != type(self).model_fields[key].default and not used & names:
                raise ValueError(f"`{key}` belongs to {', '.join(sorted(names))}, and none is trained")
        if self.alpha_ce and self.last not in DIVERGENCES:
            raise ValueError(f"`alpha_ce` mixes the labels into a divergence, and `last` is `{self.last}`")
        if self.intermediate in DIVERGENCES:
            return
        of_matching = ("matching", "match_unit", "sampler", "reliable_only", "scale", "temperature")
        of_layers = ("layer_reduction", "layers_full_until", "layers_zero_from")
        keys = of_matching if self.intermediate == "ce" else (*of_matching, *of_layers)
        changed = [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]
        if changed:
            raise ValueError(f"`{'`, `'.join(changed)}` do nothing with `intermediate: {self.intermediate}`")

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
    """Supervised finetuning on the labels, after the interaction step."""

    schedule: Schedule = Schedule(epochs=1)
    mode: Literal["lora+embed_head", "full"] = "lora+embed_head"


class DistillSpec(Strict):
    """From a cache to a student. `recipe` decides which stages run; all recipes take the same number of steps:

    vlsi: verbalize, interact over all target layers, sft. last: the steps of verbalize and interact go to last-layer
    distillation, then sft. sft: all steps go to sft.
    """

    student: str | None = None
    student_dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    recipe: Recipe = "vlsi"
    layers: TargetLayers = "auto"
    num_layers: Annotated[int, Field(ge=1)] = 7
    batch_size: Annotated[int, Field(ge=1)] = 512
    micro_batch_size: Annotated[int, Field(ge=1)] = 4
    gradient_checkpointing: bool = False
    verbalize: Schedule = Schedule(epochs=1)
    interact: InteractSpec = InteractSpec()
    sft: SftSpec = SftSpec()
    lora: LoraSpec = LoraSpec()
    checkpoint_steps: Annotated[int, Field(ge=1)] = 200
    window_parts: Annotated[int, Field(ge=1)] = 4
    seed: Seed = 0

    _whole_micro_batches = model_validator(mode="after")(_check_batches)

    @model_validator(mode="after")
    def _last_is_something(self) -> "DistillSpec":
        if self.recipe == "last" and not self.interact.trains_last:
            raise ValueError("`recipe: last` trains the last layer alone, and `interact` leaves it out")
        return self


class EvaluateSpec(Strict):
    """Held-out rows and what is measured on them."""

    data: DataSpec
    generate: bool = True
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    batch_size: Annotated[int, Field(ge=1)] = 16


class RunSpec(Strict):
    """Where the build runs; not part of the fingerprint (another batch size changes rows by rounding only).

    `batch_tokens: auto`: a new build looks for the number that suits the machine and records it in the cache; whatever
    else reads the number takes the default. `kernels`: sums over the vocabulary as torch runs them (`eager`) or fused
    by `torch.compile`; `auto` fuses them on CUDA.
    """

    device: str = "auto"
    batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = DEFAULT_BATCH_TOKENS
    kernels: Literal["auto", "eager", "compiled"] = "auto"

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

    def fingerprint_fields(self) -> dict[str, Any]:
        """The settings that decide the bytes of a cache, by their dotted key."""
        return {
            "teacher.dtype": self.teacher.dtype,
            **{f"rows.{key}": value for key, value in self.rows.model_dump(mode="json").items()},
            "store.profile": self.store.profile,
            "store.part_mib": self.store.part_mib,
            "data.max_length": self.data.max_length,
        }
