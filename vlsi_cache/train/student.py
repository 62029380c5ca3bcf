"""The student's side of a run: its rows and weights, opened together, and what the stages share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import stored_data
from vlsi_cache.config.training import DistillSpec
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.measuring import measure_rows
from vlsi_cache.data.records import RecordSet, read_records
from vlsi_cache.data.stored import Joined
from vlsi_cache.errors import CacheCorruptError, DataError, SpecError, list_problems
from vlsi_cache.io import replacing
from vlsi_cache.models.backbone import Backbone, target_layers
from vlsi_cache.models.families import check_family
from vlsi_cache.models.features import features_of, keep_features
from vlsi_cache.models.load import ModelRef, check_plain, max_positions
from vlsi_cache.models.probe import check_vocabulary, checked_backbone
from vlsi_cache.models.save import mend_generation
from vlsi_cache.models.traversal import add_traversal
from vlsi_cache.processes import ALONE, Processes
from vlsi_cache.progress import muted, say
from vlsi_cache.runs.checkpoints import Checkpoints
from vlsi_cache.runs.metrics import MetricsLog
from vlsi_cache.runs.run_dir import Run
from vlsi_cache.runs.trackers import Trackers
from vlsi_cache.runtime import pick_device
from vlsi_cache.sparse.head import choose_kernels
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.store.header import data_sections, data_specs
from vlsi_cache.store.reader import Cache

from .aligned import Aligner, aligned_samples, open_aligner
from .fitting import check_settings, check_tokenizer, check_traversal, say_pixels
from .loader import Feed, cached_records, check_response_ids, match_records
from .sharding import shard, shards_layers, to_device_but_layers

SOURCE_KEYS = ("path", "media_root", "generator", "options", "limit", "turns")
CHECKED_RESPONSES = 32  # before a student's weights are loaded
# Each sees the data in an order of its own.
STAGE_SEEDS = {"gates": 0, "verbalize": 1, "interact": 2, "sft": 3, "exits": 4}
SEEDS_APART = 3  # of two runs


@dataclass(frozen=True)
class StudentInputs:
    """A student that fits the cache, without its weights; made by `open_student`."""

    cache: Cache
    spec: CacheSpec
    path: str
    config: Any
    encoder: Encoder
    layers: list[int]
    exit_layers: list[int]
    aligner: Aligner | None = None

    @cached_property
    def records(self) -> RecordSet:
        sections = data_sections(self.cache.header)
        # A merged cache was built from several sources of rows, which are read again one by one.
        if len(sections) < 2:
            own = captured_columns(self.cache.header)
            return read_records(self.spec.data, num_workers=self.spec.run.num_workers, read_elsewhere=own)
        if any(getattr(self.spec.data, name) != stored_data(sections[0]).get(name) for name in SOURCE_KEYS):
            raise SpecError(
                f"{self.cache.path} was merged from {len(sections)} sources of rows, each read from where it was: "
                f"leave {', '.join(f'`data.{name}`' for name in SOURCE_KEYS)} as they are"
            )
        return cached_sources(self.cache)

    def check_turns(self) -> None:
        """Raise FingerprintMismatchError when the first cached responses are not this student's: before any training.

        Every other one is compared when it is read.
        """
        # The first part is enough to tell a wrong tokenizer or template before hours of training.
        by_id, contract = match_records(self.cache, self.records), self.cache.header.contract
        for row in self.cache.read_part(self.cache.parts[0], [])[:CHECKED_RESPONSES]:
            record = by_id[row.sample_id]
            if self.aligner is not None:
                self.aligner.aligned(record, row)
                continue
            check_response_ids(record, self.encoder.measure(record)[1], row, self.encoder, contract=contract)

    def check_lengths(self) -> None:
        """Raise DataError when cached samples are longer, in this student's tokens, than its positions reach.

        Lengths differ from the teacher's: a picture can be more tokens, and a chat template can add some.
        """
        limit = max_positions(self.config)
        if limit is None:
            return
        by_id, too_long = match_records(self.cache, self.records), []
        sample_ids = self.cache.sample_table()["id"].to_pylist()
        measured, about = measure_rows(self.records, self.encoder, num_workers=self.spec.run.num_workers)
        num_prompt_N = measured.column("num_prompt").to_numpy()
        num_tokens_N = num_prompt_N + np.diff(measured.column("response_ids").offsets.to_numpy())  # type: ignore[union-attr]
        problems = {int(index): text for index, text, _ in about["problems"]}
        for sample_id in sample_ids:
            place = by_id.place_of(sample_id)
            if place in problems:
                raise DataError(problems[place])
            if num_tokens_N[place] > limit:
                too_long.append(f"sample `{sample_id}`: {num_tokens_N[place]} tokens")
        if too_long:
            raise DataError(
                f"{len(too_long)} of {len(sample_ids)} cached samples are longer for student {self.path} than its "
                f"{limit} positions (`max_position_embeddings`); make pictures smaller with `--set data.max_pixels=N`, "
                f"choose another student, or build a cache with a lower `data.max_length`:\n{list_problems(too_long)}"
            )

    def load(self, run: Run, *, device: str | None, processes: Processes = ALONE) -> "StudentState":
        """Load the weights onto the device of the flag, or else of the spec."""
        distill, where = self.spec.distill, pick_device(device or self.spec.run.device)
        has_autocast, is_sharded = where.type == "cuda", shards_layers(self.spec.run, processes)
        if is_sharded and distill.traversal is not None:
            raise SpecError(
                "`run.parallel: fsdp` shares out layers that run once in a step, and `distill.traversal` runs them "
                "again; leave one of the two out (`ddp` takes both)"
            )

        def reload(finished: Path | None = None) -> Any:
            return self._model(where, run.path / GATES_FOLDER, is_sharded=is_sharded, finished=finished)

        model = reload()
        if mended := mend_generation(model.generation_config):
            say(
                f"student: its generation_config.json sets {', '.join(f'`{name}`' for name in mended)}, which do "
                "nothing as they stand and cannot be saved: the trained student has the defaults"
            )
        dtype = model.dtype if has_autocast else _wanted_dtype(distill, self.config)
        if dtype != model.dtype:
            name = str(dtype).removeprefix("torch.")
            say(f"student: trained in float32, since {where.type} has no autocast here, and saved in {name}")
        return StudentState(
            cache=self.cache,
            spec=self.spec,
            run=run,
            student_path=self.path,
            records=self.records,
            encoder=self.encoder,
            aligner=self.aligner,
            model=model,
            dtype=dtype,
            layers=self.layers,
            exit_layers=self.exit_layers,
            device=where,
            compiled=choose_kernels(self.spec.run, where),
            log=MetricsLog(run.path, writes=processes.is_first, trackers=Trackers(run.path, self.spec, "distill")),
            checkpoints=Checkpoints(run.path, processes),
            processes=processes,
            is_sharded=is_sharded,
            reload=reload,
        )

    def _model(self, device: torch.device, gates: Path, *, is_sharded: bool, finished: Path | None) -> Any:
        """The student's weights, those of the beginning or of a `finished` one; where its layers will be sharded, these
        wait on the host. What stage gates has trained of a traversed one is in the folder `gates` once it has ended."""
        # Without autocast, bf16 weights and the fp32 ones that train would not fit each other.
        named = ModelRef(
            finished or self.path,
            dtype=self.spec.distill.student_dtype if device.type == "cuda" else "float32",
            attn_implementation=self.spec.distill.attn_implementation,
            trust_remote_code=self.spec.distill.trust_remote_code,
        )
        model = named.load("cpu" if is_sharded else str(device))
        for note in named.notes:
            say(note)
        distill = self.spec.distill
        if distill.traversal is not None and finished is None:
            if named.traversal is None:
                add_traversal(model, distill.traversal, seed=distill.seed)
            read_gates(model, gates)
        backbone = checked_backbone(model, self.encoder)
        if is_sharded:
            to_device_but_layers(backbone, device)
        keep_features(model, self.spec.run, self.encoder)
        return model


@dataclass(frozen=True)
class StudentState:
    """Everything the stages of one run share; `dtype` is the one that the trained student is saved in.

    `layers` are the target layers of the recipe, `exit_layers` those of stage exits. `is_sharded`: the processes share
    out the student's decoder layers (`run.parallel: fsdp`). `reload` gives the model as it was at the beginning, or the
    one in a folder.
    """

    cache: Cache
    spec: CacheSpec
    run: Run
    student_path: str
    records: RecordSet
    encoder: Encoder
    aligner: Aligner | None
    model: Any
    dtype: torch.dtype
    layers: list[int]
    exit_layers: list[int]
    device: torch.device
    compiled: bool
    log: MetricsLog
    checkpoints: Checkpoints
    processes: Processes
    is_sharded: bool
    reload: Callable[..., Any]

    def shared_out(self, model: Any) -> Backbone:
        """The backbone of the model that a stage trains, its layers sharded if this run has that."""
        backbone = Backbone(model)
        if self.is_sharded:
            shard(backbone, self.device)
        return backbone

    def renewed(self) -> "StudentState":
        """The same with the student as it was at the beginning, after a stage has sharded it."""
        with muted():
            return replace(self, model=self.reload())

    @property
    def student_folder(self) -> Path:
        return self.run.path / "student"

    def finished(self) -> "StudentState":
        """The same with the student as the run has saved it, once the one that was trained is let go."""
        nobody = replace(self, model=None)
        with muted():
            return replace(nobody, model=self.reload(self.student_folder))

    def feed(self, stage: str, num_skip: int) -> Feed:
        """Micro-batches of the cached samples; teacher rows come along only where the stage compares with them."""
        distill = self.spec.distill
        layers = self.teacher_layers if stage == "interact" else []
        samples = cached_records(
            self.cache,
            self.records,
            layers=layers,
            seed=distill.seed * SEEDS_APART + STAGE_SEEDS[stage],
            window_parts=distill.window_parts,
            num_skip=num_skip,
            # How many tokens of a sample are aligned, which all processes count, is known once it is decoded.
            decode=self.processes.num_shares == 1 or self.aligner is not None,
        )
        if self.aligner is not None:
            samples = aligned_samples(self.aligner, samples)
        return Feed(
            samples,
            self.encoder,
            batch_size=distill.batch_size,
            micro_batch_size=distill.micro_batch_size,
            reduction=distill.batch_reduction,
            device=self.device,
            layout=Backbone(self.model).layout,
            features=features_of(self.model),
            num_workers=self.spec.run.num_workers,
            processes=self.processes,
        )

    @property
    def teacher_layers(self) -> list[int]:
        """Cached layers that the interaction reads: all for `vlsi`, the last one otherwise."""
        return self.cache.layers if self.layers else self.cache.layers[-1:]


GATES_FOLDER, GATES_FILE = "gates", "trained.safetensors"  # in a run


def write_gates(model: Any, folder: Path) -> None:
    """What stage gates has trained, by its names: for the stages after it, and for a run that is taken up again."""
    trained = {name: one.detach().contiguous() for name, one in model.named_parameters() if one.requires_grad}
    with replacing(folder) as temporary:
        temporary.mkdir()
        save_file(trained, temporary / GATES_FILE)


@torch.no_grad()
def read_gates(model: Any, folder: Path) -> None:
    """Put it into the model, if the stage has ended; raises CacheCorruptError for a file that is damaged."""
    if not folder.exists():
        return
    named = dict(model.named_parameters())
    try:
        for name, tensor in load_file(folder / GATES_FILE).items():
            named[name].copy_(tensor)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CacheCorruptError(
            f"{folder / GATES_FILE}: cannot be read ({type(error).__name__}); restore it from a copy, or delete "
            f"{folder} and {folder.parent / 'checkpoints'} and run the same command again, it trains from the start"
        ) from None


def captured_columns(header: CacheHeader) -> tuple[str, ...]:
    """Columns of the rows that `import` has made the cache from, where one file holds both."""
    column = header.fingerprint.get("import.column")
    return () if column is None else (str(column), "target_token_ids")


def cached_sources(cache: Cache) -> RecordSet:
    """The rows that a cache was built from, read again; those of all sources of a merged one."""
    own = captured_columns(cache.header)
    sets = [read_records(section, read_elsewhere=own) for section in data_specs(cache.header, cache.path)]
    if len(sets) == 1:
        return sets[0]
    return RecordSet(Joined([found.records for found in sets]), [row for found in sets for row in found.skipped])


def open_student(cache: Cache, spec: CacheSpec, path: str) -> StudentInputs:
    """Read the student's tokenizer and config and check them against the cache; raises ModelError, SpecError."""
    distill = spec.distill
    named = ModelRef(path, trust_remote_code=distill.trust_remote_code)
    check_plain(named, "student")
    check_traversal(named, distill.traversal)
    encoder, config = named.encoder(spec.data.encoding()), named.config
    say_pixels(spec.data, path, trust_remote_code=distill.trust_remote_code)
    check_tokenizer(cache.header, encoder, path, where=cache.path, alignment=distill.alignment)
    aligner = open_aligner(cache, encoder) if distill.alignment == "byte" else None
    check_family(config)
    check_vocabulary(encoder, getattr(config.get_text_config(), "vocab_size", None))
    layers, exit_layers = check_settings(cache.header, distill, config, where=cache.path), []
    if distill.exits is not None:
        exit_layers = target_layers(distill.layers, distill.num_layers, config, where="distill.layers")
        if not exit_layers:
            raise SpecError("`distill.layers` is empty, and `distill.exits` reads target layers: name some")
    return StudentInputs(cache, spec, path, config, encoder, layers, exit_layers, aligner)


def _wanted_dtype(distill: DistillSpec, config: Any) -> torch.dtype:
    """The dtype that was asked for; with `auto`, the one that the student's configuration declares."""
    if distill.student_dtype != "auto":
        return getattr(torch, distill.student_dtype)
    declared = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return declared if isinstance(declared, torch.dtype) else torch.float32
