"""Stage build: the frozen teacher runs once over the data, and every (layer, response token) becomes a sparse row.

The data alone decides parts and batches, so a build that was killed repeats the same batches and writes the same
bytes. Only response positions leave the layers, only one layer's logits exist at a time, in vocabulary blocks.

Legend: T response tokens, L layers (intermediate targets, then the final layer), D hidden size, m tail samples.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vlsi_cache.data.batches import plan_batches, plan_parts
from vlsi_cache.data.collate import Batch, collate
from vlsi_cache.models.layers import Backbone
from vlsi_cache.models.verbalizer import Verbalizers
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.sparse.topk import sample_uniforms, stack_layers, teacher_rows
from vlsi_cache.spec import CacheSpec
from vlsi_cache.store import reader
from vlsi_cache.store.layout import TABLE_NAME, CacheHeader
from vlsi_cache.store.reader import Cache
from vlsi_cache.store.writer import CacheWriter, PartSamples

from .inputs import TeacherInputs, open_teacher_inputs
from .loop import say
from .runs import versions

BYTES_PER_ENTRY = 5  # uint32 id and u8 level, before compression: what `store.part_mib` counts
BYTES_PER_SCALAR = 4
MAX_WAITING_PARTS = 2  # finished parts that wait for the disk before the teacher has to


def build_teacher(
    spec: CacheSpec, *, out: Path | str, device: str | None = None, rank: int = 0, world: int = 1
) -> Cache:
    """Build the cache of `spec` at `out`, or go on with it after a kill; a finished one is only opened.

    Any number of processes may work on one `out`: process `rank` of `world` takes its own parts first, then whatever
    is missing. Raises FingerprintMismatchError when `out` holds a cache of something else, DiskFullError, DataError,
    ModelError.
    """
    out = Path(out)
    inputs = open_teacher_inputs(spec)
    parts = plan_parts(
        [len(ids) for ids in inputs.response_ids], seed=spec.rows.seed, tokens_per_part=part_tokens(inputs)
    )
    writer = CacheWriter.create_or_resume(out, cache_header(inputs, parts), id_of_rank(inputs))
    missing = writer.missing_parts(rank=rank, world=world)
    if inputs.skipped:
        say(f"{len(inputs.skipped)} rows left out, listed with reasons in {out / 'cache.json'}")
    if missing:
        _build_parts(inputs, parts, missing, writer, device=device)
    else:
        say(f"{out} is finished: all {len(parts)} parts are there; nothing to do")
    if missing or not (out / TABLE_NAME).is_file():
        writer.finish()
    return reader.open(out)


def cache_header(inputs: TeacherInputs, parts: list[list[int]]) -> CacheHeader:
    """What `cache.json` says; `fingerprint` holds, field by field, everything that decides the bytes."""
    spec = inputs.spec
    return CacheHeader(
        created_by=f"vlsi-cache {versions()['vlsi-cache']}",
        spec=spec.model_dump(mode="json"),
        fingerprint=fingerprint(inputs),
        layers=[*inputs.target_layers, inputs.num_model_layers],
        num_model_layers=inputs.num_model_layers,
        top_k=spec.rows.top_k,
        tail_samples=spec.rows.tail_samples,
        taus=list(spec.rows.taus),
        v_real=inputs.encoder.v_real,
        profile=spec.store.profile,
        num_parts=len(parts),
        num_samples=len(inputs.records),
        num_tokens=sum(len(ids) for ids in inputs.response_ids),
        skipped=inputs.skipped,
        parents=[],
    )


def fingerprint(inputs: TeacherInputs) -> dict[str, Any]:
    """Teacher weights (which hold the head), verbalizers, tokenizer and processor, data in order, and settings."""
    content = "\n".join(f"{record.id} {record.digest}" for record in inputs.records)
    return {
        "teacher.weights": inputs.weights_digest,
        **{f"verbalizer.{layer}": digest for layer, digest in inputs.verbalizer_digests().items()},
        **{f"encoder.{key}": value for key, value in inputs.encoder.fingerprint().items()},
        "data.content": hashlib.sha256(content.encode()).hexdigest(),
        "data.num_samples": len(inputs.records),
        "layers": [*inputs.target_layers, inputs.num_model_layers],
        "v_real": inputs.encoder.v_real,
        **inputs.spec.fingerprint_fields(),
    }


def id_of_rank(inputs: TeacherInputs) -> np.ndarray:
    """uint32 [v_real]: token ids by falling frequency in the data set's responses, then by id."""
    counts = np.bincount(np.concatenate(inputs.response_ids), minlength=inputs.encoder.v_real)
    return np.argsort(-counts, kind="stable").astype(np.uint32)


@dataclass(frozen=True)
class Teacher:
    """The loaded teacher and what it writes."""

    backbone: Backbone
    verbalizers: Verbalizers
    inputs: TeacherInputs
    device: torch.device

    @torch.inference_mode()
    def rows(self, indices: list[int]) -> list[SparseRows]:
        """The sparse rows of some records, one SparseRows [L, T_i] per record."""
        inputs = self.inputs
        batch = collate([inputs.encoder.encode(inputs.records[i]) for i in indices], pad_id=inputs.encoder.pad_id)
        batch = batch.to(self.device)
        rows = stack_layers(list(self._layer_rows(batch, self._uniforms(indices))))
        stops = np.cumsum(batch.num_tokens)
        return [rows.tokens(slice(int(stop - n), int(stop))) for stop, n in zip(stops, batch.num_tokens, strict=True)]

    def _uniforms(self, indices: list[int]) -> np.ndarray:
        """float64 [L, T, m], keyed by sample: the draws do not depend on the batch."""
        inputs, rows = self.inputs, self.inputs.spec.rows
        drawn = [
            sample_uniforms(
                rows.seed,
                inputs.records[i].id,
                num_tokens=len(inputs.response_ids[i]),
                num_layers=len(inputs.target_layers) + 1,
                num_tail=rows.tail_samples,
            )
            for i in indices
        ]
        return np.concatenate(drawn, axis=1)

    def _layer_rows(self, batch: Batch, uniforms_LTm: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
        inputs, rows = self.inputs, self.inputs.spec.rows
        hidden = dict(self.verbalizers.capture(batch.inputs, batch.rows_T, batch.positions_T))
        for index, layer in enumerate([*inputs.target_layers, inputs.num_model_layers]):
            state: Any = hidden.pop(layer)
            yield teacher_rows(
                state if layer == inputs.num_model_layers else self.verbalizers.apply(layer, state),
                self.backbone.head_weight,
                batch.gold_T,
                top_k=rows.top_k,
                uniforms_Tm=torch.from_numpy(uniforms_LTm[index]).to(self.device),
                taus=rows.taus,
                v_real=inputs.encoder.v_real,
            )


def load_teacher(inputs: TeacherInputs, *, device: str | None) -> Teacher:
    """Load weights and verbalizers onto the device of the flag, or else of the spec."""
    backbone = inputs.load_backbone(device or inputs.spec.run.device)
    say(f"teacher: {inputs.model_path} on {backbone.device}")
    return Teacher(backbone, inputs.load_verbalizers(backbone), inputs, backbone.device)


def _build_parts(
    inputs: TeacherInputs, parts: list[list[int]], missing: list[int], writer: CacheWriter, *, device: str | None
) -> None:
    teacher = load_teacher(inputs, device=device)
    total = sum(len(ids) for ids in inputs.response_ids)
    left = sum(len(inputs.response_ids[i]) for part in missing for i in parts[part])
    with (
        tqdm(desc="build", total=total, initial=total - left, unit="tok", unit_scale=True, disable=None) as bar,
        ThreadPoolExecutor(1, thread_name_prefix="vlsi-cache-write") as disk,
    ):
        writing: deque[Future[Any]] = deque()
        for part in missing:
            samples = _part_samples(teacher, parts[part], bar)
            while writing and (writing[0].done() or len(writing) == MAX_WAITING_PARTS):
                bar.set_postfix_str("" if writing[0].done() else "waits for the disk")
                writing.popleft().result()  # a write that failed stops the build here, with its cause
            writing.append(disk.submit(writer.write_part, part, samples))
        while writing:
            writing.popleft().result()


def _part_samples(teacher: Teacher, indices: list[int], bar: Any) -> PartSamples:
    inputs = teacher.inputs
    lengths = [int(inputs.num_prompt_N[i]) + len(inputs.response_ids[i]) for i in indices]
    rows: dict[int, SparseRows] = {}
    for batch in plan_batches(lengths, inputs.spec.run.batch_tokens):
        for position, sample_rows in zip(batch, teacher.rows([indices[j] for j in batch]), strict=True):
            rows[position] = sample_rows
            bar.update(sample_rows.num_tokens)
    return PartSamples(
        sample_ids=[inputs.records[i].id for i in indices],
        kinds=[inputs.records[i].kind for i in indices],
        digests=[inputs.records[i].digest for i in indices],
        response_ids=[inputs.response_ids[i] for i in indices],
        rows=SparseRows.concat([rows[position] for position in range(len(indices))]),
        skipped=[],
    )


def part_tokens(inputs: TeacherInputs) -> int:
    rows = inputs.spec.rows
    entries = rows.top_k * BYTES_PER_ENTRY + (rows.tail_samples + 3 + len(rows.taus)) * BYTES_PER_SCALAR
    per_token = (len(inputs.target_layers) + 1) * entries
    return max(1, int(inputs.spec.store.part_mib * 2**20 / per_token))
