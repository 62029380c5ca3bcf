"""Whose responses `generate` writes: the spec's teacher, the student of a run, or any other model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlsi_cache.data.tokenize import Encoder, load_encoder
from vlsi_cache.models.load import (
    encoder_folders,
    load_config,
    load_model,
    max_positions,
    resolve_model,
    weights_digest,
)
from vlsi_cache.progress import say
from vlsi_cache.run_files import read_run
from vlsi_cache.spec import CacheSpec, Dtype, spec_from_dict

from .evaluate import check_has_student
from .loop import pick_device


@dataclass(frozen=True)
class Speaker:
    """A model that is not loaded yet. Only the spec's own teacher may run code of its own, if the spec allows it."""

    path: str
    dtype: Dtype
    revision: str | None = None
    gguf_file: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def digest(self) -> str:
        return weights_digest(self.path, revision=self.revision, gguf_file=self.gguf_file)

    def encoder(self, spec: CacheSpec) -> Encoder:
        return load_encoder(
            **encoder_folders(self.path, revision=self.revision, gguf_file=self.gguf_file),
            trust_remote_code=self.trust_remote_code,
            **spec.data.encoding(),
        )

    def max_positions(self) -> int | None:
        options = {"revision": self.revision, "gguf_file": self.gguf_file}
        return max_positions(load_config(self.path, **options, trust_remote_code=self.trust_remote_code))

    def load(self, device: str) -> Any:
        where = device if device == "auto" else str(pick_device(device))  # auto spreads over all GPUs
        model = load_model(
            self.path,
            revision=self.revision,
            gguf_file=self.gguf_file,
            dtype=self.dtype,
            device=where,
            trust_remote_code=self.trust_remote_code,
            attn_implementation=self.attn_implementation,
        )
        say(f"model: {self.path} on {model.device}")
        return model


def speaker_of(spec: CacheSpec, model: str) -> Speaker:
    """`teacher`, a distill run's folder (its student), or a model's folder or hub id; raises SpecError, ModelError."""
    if model == "teacher":
        teacher = spec.teacher
        return Speaker(
            resolve_model(teacher.model),
            teacher.dtype,
            teacher.revision,
            teacher.gguf_file,
            teacher.attn_implementation,
            teacher.trust_remote_code,
        )
    folder, distill = Path(model), spec.distill
    if (folder / "run.json").exists():
        run = read_run(folder)
        check_has_student(folder, run)
        distill = spec_from_dict(run["spec"], where=str(folder / "run.json")).distill
        folder = folder / "student"
    path = str(folder.resolve()) if folder.is_dir() else resolve_model(model)
    return Speaker(path, distill.student_dtype, attn_implementation=distill.attn_implementation)
