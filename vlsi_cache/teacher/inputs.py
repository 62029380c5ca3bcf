"""The teacher's side of a spec, opened once: encoder, records that fit, target layers; the weights only when asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vlsi_cache.config.sections import CacheSpec, TeacherSpec
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.measuring import Responses, fit_rows
from vlsi_cache.data.records import RecordSet, read_records
from vlsi_cache.data.sequence import Extent, Layout, num_tokens, sequences
from vlsi_cache.models.backbone import Backbone, target_layers
from vlsi_cache.models.families import check_family
from vlsi_cache.models.load import ModelRef, max_positions, resolve_model
from vlsi_cache.models.parallel import check_cut
from vlsi_cache.models.probe import check_vocabulary, checked_backbone
from vlsi_cache.models.verbalizer import Verbalizers, load_verbalizers, logit_lens
from vlsi_cache.models.verbalizer_files import find_folder, verbalizers_digest
from vlsi_cache.processes import launched
from vlsi_cache.progress import say


@dataclass(frozen=True)
class TeacherInputs:
    """`records[i]` has `num_prompt_N[i]` prompt tokens and the response ids `response_ids[i]` (uint32, with the
    end-of-turn token); `extents[i]` says what it has in common with the record before.
    `target_layers` are intermediate layers; the final one comes on top.
    `provenance` is what `generate` says of the responses, if they come from there."""

    spec: CacheSpec
    model: ModelRef
    encoder: Encoder
    records: RecordSet
    num_prompt_N: np.ndarray
    response_ids: Sequence[np.ndarray]
    extents: Sequence[Extent]
    skipped: list[dict[str, str]]
    num_model_layers: int
    target_layers: list[int]
    provenance: dict[str, Any] | None = None

    def sequences(self, indices: Sequence[int], layout: Layout) -> list[list[int]]:
        """The records that run together as one sequence: turns of a row, or responses to one prompt."""
        return sequences(self.extents, indices, layout)

    def lengths(self, indices: Sequence[int], layout: Layout) -> list[int]:
        """Tokens of the sequences of some records, prompt and response."""
        return [num_tokens(self.extents, sequence, layout) for sequence in self.sequences(indices, layout)]

    def padded_tokens(self, indices: Sequence[int], layout: Layout) -> int:
        """Tokens of a batch of these records once all sequences are as long as the longest."""
        lengths = self.lengths(indices, layout)
        return len(lengths) * max(lengths)

    @property
    def layers(self) -> list[int]:
        """The layers that get rows: the targets, then the final one."""
        return [*self.target_layers, self.num_model_layers]

    @cached_property
    def num_response_tokens(self) -> list[int]:
        """Of each record."""
        ids = self.response_ids
        return ids.num_tokens_N.tolist() if isinstance(ids, Responses) else [len(one) for one in ids]

    @cached_property
    def weights_digest(self) -> str:
        return self.model.digest

    @property
    def verbalizers_path(self) -> str | None:
        path = self.spec.teacher.verbalizers
        return None if path is None else str(find_folder(path))

    def verbalizer_digests(self) -> dict[str, str]:
        """File digest per target layer; `logit lens` for each where the spec names no verbalizers."""
        if self.verbalizers_path is None:
            return {str(layer): "logit lens" for layer in self.target_layers}
        return verbalizers_digest(self.verbalizers_path, self.target_layers)

    def load_backbone(self, device: str) -> Backbone:
        """The frozen teacher, on one device or several as `teacher.parallel` has it."""
        model = self.model.load(device)
        for note in self.model.notes:
            say(note)
        backbone = checked_backbone(model, self.encoder)
        say(f"teacher: {self.model.path} on {backbone.device}")
        return backbone

    def load_verbalizers(self, backbone: Backbone) -> Verbalizers:
        if self.verbalizers_path is None:
            return logit_lens(backbone, self.target_layers)
        found = load_verbalizers(
            self.verbalizers_path, backbone, self.target_layers, teacher_digest=self.weights_digest
        )
        made, wanted = found.architecture.structure, self.spec.verbalizer.structure
        if made != wanted:
            say(f"verbalizers: `{made}`, as they were trained; `verbalizer.structure: {wanted}` holds for students")
        return found


def teacher_ref(teacher: TeacherSpec) -> ModelRef:
    """The model that a spec names as its teacher."""
    return ModelRef(
        resolve_model(teacher.model),
        teacher.revision,
        teacher.gguf_file,
        teacher.dtype,
        teacher.attn_implementation,
        teacher.trust_remote_code,
        teacher.parallel,
    )


def open_teacher_inputs(spec: CacheSpec) -> TeacherInputs:
    """Read rows, tokenizer and config; every problem with them comes up here, before any weight is loaded."""
    model = teacher_ref(spec.teacher)
    config = model.config
    check_family(config)
    if spec.teacher.parallel == "tensor":
        check_cut(model.path, config, launched()[1])
    layers = target_layers(spec.teacher.layers, spec.teacher.num_layers, config, where="teacher.layers")
    encoder = model.encoder(spec.data.encoding())
    # Before the rows are read, which may take long: nothing of what is refused here depends on them.
    check_vocabulary(encoder, getattr(config.get_text_config(), "vocab_size", None))
    num_workers = spec.run.num_workers
    records = read_records(spec.data, num_workers=num_workers)
    # Rows that are too long are listed, never cut: a student could not tell that the end is missing.
    limits: dict[str, Any] = {"max_length": spec.data.max_length, "max_positions": max_positions(model.config)}
    kept, too_long = fit_rows(records, encoder, **limits, bad_rows=spec.data.bad_rows, num_workers=num_workers)
    return TeacherInputs(
        spec=spec,
        model=model,
        encoder=encoder,
        records=records.take(kept.index_N),
        num_prompt_N=kept.num_prompt_N.astype(np.int64),
        response_ids=kept.response_ids,
        extents=kept.extents,
        skipped=[*records.skipped, *too_long],
        num_model_layers=int(config.get_text_config().num_hidden_layers),
        target_layers=layers,
        provenance=records.provenance,
    )
