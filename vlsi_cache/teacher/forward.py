"""The frozen teacher on its device: batches go in, sparse rows of every target layer come out.

One thread prepares batches ahead; rows of one batch travel to the host while the next one runs.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from vlsi_cache.data.collate import Batch, collate
from vlsi_cache.data.preparing import EncodeAll, Preparer
from vlsi_cache.data.sequence import Layout
from vlsi_cache.errors import BatchTooLargeError, ModelError, VlsiCacheError
from vlsi_cache.io import ahead
from vlsi_cache.models.backbone import Backbone, head_of
from vlsi_cache.models.features import features_of, keep_features
from vlsi_cache.models.verbalizer import Verbalizers
from vlsi_cache.sparse.head import choose_kernels
from vlsi_cache.sparse.rows import SparseRows, draw_rows, keyed_uniforms, top_p_widths, truncate
from vlsi_cache.sparse.topk import sample_uniforms, stack_layers, teacher_rows

from .inputs import TeacherInputs

SCANNED_K = 64  # of sampled rows: the likeliest tokens are drawn from directly, the rest through the tail
SHOWN_SAMPLES = 5
NO_PART = -1


class PartBatch(NamedTuple):
    """Records of one part (NO_PART: of none in particular) that go through the teacher together."""

    part: int
    indices: list[int]


@dataclass(frozen=True)
class Prepared:
    """A batch ready for the device, in page-locked memory where there is a GPU."""

    work: PartBatch
    batch: Batch
    uniforms_LTm: torch.Tensor


@dataclass(frozen=True)
class Launched:
    """Rows of each layer, on the host as soon as `event` has happened (None: they are there)."""

    work: PartBatch
    num_tokens: list[int]
    layers: list[dict[str, torch.Tensor]]
    event: torch.cuda.Event | None


@dataclass(frozen=True)
class Teacher:
    """The loaded teacher and what it writes."""

    backbone: Backbone
    verbalizers: Verbalizers
    inputs: TeacherInputs
    device: torch.device
    compiled: bool = False

    @property
    def layout(self) -> Layout:
        """How samples lie in its batches."""
        return self.verbalizers.layout

    def rows(self, indices: list[int]) -> list[SparseRows]:
        """The sparse rows of some records, one SparseRows [L, T_i] per record; no token is left out yet."""
        return self.collect(self.launch(self.prepare(PartBatch(NO_PART, indices))))

    def stream(self, batches: Iterable[PartBatch]) -> Generator[tuple[PartBatch, list[SparseRows]], None, None]:
        """The rows of many batches, in order; close it to leave early."""
        # One batch is always behind: its rows travel to the host and are cut there while the GPU runs the next one.
        behind: Launched | None = None
        encoder, num_workers = self.inputs.encoder, self.inputs.spec.run.num_workers
        features = features_of(self.backbone.model)
        with (
            Preparer(encoder, num_workers, self.layout, features=features) as preparer,
            closing(
                ahead(
                    partial(self.prepare, encode_all=preparer.encode_all),
                    batches,
                    num_ahead=1 + preparer.num_threads,
                    num_threads=preparer.num_threads,
                )
            ) as ready,
        ):
            while True:
                failure: Exception | None = None
                try:
                    prepared = next(ready, None)
                    launched = None if prepared is None else self.launch(prepared)
                except Exception as error:  # of the next batch: the one before it is still good
                    failure, launched = error, None
                if behind is not None:
                    yield behind.work, self.collect(behind)
                if failure is not None:
                    raise failure
                if launched is None:
                    return
                behind = launched

    def prepare(self, work: PartBatch, encode_all: EncodeAll | None = None) -> Prepared:
        """Encode the records, here or as `encode_all` does, and draw their uniforms."""
        encoder, records = self.inputs.encoder, self.inputs.records
        with self._naming(work):
            layout, features = self.layout, features_of(self.backbone.model)
            here = partial(encoder.encode_all, layout=layout, features=features)
            sequences = (encode_all or here)([records[i] for i in work.indices])
            batch = collate(
                sequences, pad_id=encoder.pad_id, row_width=layout.row_width, marks_responses=layout.marks_responses
            )
            uniforms_LTm = torch.from_numpy(self._tail_uniforms(work.indices))
            if self.device.type == "cuda":
                # From page-locked memory the copy to the GPU runs beside the host; from other memory it blocks.
                batch, uniforms_LTm = batch.pinned(), uniforms_LTm.pin_memory()
            return Prepared(work, batch, uniforms_LTm)

    @torch.inference_mode()
    def launch(self, prepared: Prepared) -> Launched:
        """Queue the forward pass, all layers and the way back to the host; a CPU is done when this returns."""
        with self._naming(prepared.work):
            batch = prepared.batch.to(self.device, non_blocking=True)
            uniforms_LTm = prepared.uniforms_LTm.to(self.device, non_blocking=True)
            layers = [_to_host(rows) for rows in self._layer_rows(batch, uniforms_LTm)]
            event = None
            if self.device.type == "cuda":
                # The copies above are only queued. The event comes after them in the stream: once it has happened, the
                # host may read the rows, however much of the next batch is queued behind it.
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self.device))
            return Launched(prepared.work, prepared.batch.num_tokens, layers, event)

    def collect(self, launched: Launched) -> list[SparseRows]:
        """Wait for the rows, check them, and cut them to the spec and by record."""
        indices = launched.work.indices
        with self._naming(launched.work):
            if launched.event is not None:
                launched.event.synchronize()
            rows = self._narrowed(stack_layers(launched.layers, place=self._place(launched)), indices)
        stops = np.cumsum(launched.num_tokens)
        sizes = zip(stops, launched.num_tokens, strict=True)
        return [rows.tokens(slice(int(stop - n), int(stop))) for stop, n in sizes]

    @contextmanager
    def _naming(self, work: PartBatch) -> Iterator[None]:
        """Errors say which batch it was; what already speaks of its own place stays as it is."""
        try:
            yield
        except VlsiCacheError:
            raise
        except Exception as error:  # of torch or of the model's own code: neither knows what a sample is
            part = "" if work.part == NO_PART else f"part {work.part}: "
            ids = [self.inputs.records[i].id for i in work.indices]
            names = ", ".join(f"`{name}`" for name in ids[:SHOWN_SAMPLES])
            names += f" and {len(ids) - SHOWN_SAMPLES} more" if len(ids) > SHOWN_SAMPLES else ""
            if is_out_of_memory(error):
                num_tokens = self.inputs.padded_tokens(work.indices, self.layout)
                raise BatchTooLargeError(
                    f"{part}out of memory in a batch of {len(ids)} samples and {num_tokens} tokens ({names}); run the "
                    "same command again with `--batch-tokens` and a smaller number: it goes on where it was"
                ) from error
            raise ModelError(f"{part}the batch of samples {names} failed: {type(error).__name__}: {error}") from error

    def _place(self, launched: Launched) -> Callable[[int, int], str]:
        stops = np.cumsum(launched.num_tokens)

        def place(layer: int, token: int) -> str:
            number = int(np.searchsorted(stops, token, side="right"))
            name = self.inputs.records[launched.work.indices[number]].id
            at = token - int(stops[number]) + launched.num_tokens[number]
            return f"sample `{name}`, response token {at}, layer {self.inputs.layers[layer]}"

        return place

    def _tail_uniforms(self, indices: list[int]) -> np.ndarray:
        """float64 [L, T, m], keyed by sample: the draws do not depend on the batch."""
        inputs, rows = self.inputs, self.inputs.spec.rows
        drawn = [
            sample_uniforms(
                rows.seed,
                inputs.records[i].id,
                num_tokens=len(inputs.response_ids[i]),
                num_layers=len(self.inputs.layers),
                num_tail=rows.num_draws if rows.kind == "sampled" else rows.tail_samples,
            )
            for i in indices
        ]
        return np.concatenate(drawn, axis=1)

    def _narrowed(self, rows: SparseRows, indices: list[int]) -> SparseRows:
        """Rows as the spec wants them: cut at the mass `top_p`, or replaced by draws."""
        spec, inputs = self.inputs.spec.rows, self.inputs
        if spec.kind == "top-k" and spec.top_p is None:
            return rows
        # Keyed by sample, token and layer: which draws a token gets depends neither on its batch nor on its part.
        shape = (len(self.inputs.layers), rows.num_tail)
        uniforms_LTm = np.concatenate(
            [
                keyed_uniforms(
                    f"{spec.seed}\0narrow\0{inputs.records[i].id}", (len(inputs.response_ids[i]), *shape)
                ).transpose(1, 0, 2)
                for i in indices
            ],
            axis=1,
        )
        if spec.kind == "sampled":
            return draw_rows(rows, uniforms_LTm)
        assert spec.top_p is not None
        kept_LT = top_p_widths(rows.logprobs_LTK, top_p=spec.top_p, min_k=spec.min_k)
        return truncate(rows, np.minimum(kept_LT, rows.widths_LT), uniforms_LTm)

    def _layer_rows(self, batch: Batch, uniforms_LTm: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        inputs, rows = self.inputs, self.inputs.spec.rows
        vocab_size = inputs.encoder.vocab_size
        widths = rows.widths(len(self.inputs.layers))
        # `pop`: what a layer takes is free as soon as its rows are made; all layers at once are the largest memory.
        hidden = dict(self.verbalizers.capture(batch.inputs, batch.rows_T, batch.positions_T))
        for index, layer in enumerate(inputs.layers):
            state: Any = hidden.pop(layer)
            yield teacher_rows(
                state if layer == inputs.num_model_layers else self.verbalizers.apply(layer, state),
                head_of(self.backbone, compiled=self.compiled),
                batch.gold_T,
                top_k=min(SCANNED_K, vocab_size - 1) if rows.kind == "sampled" else widths[index],
                uniforms_Tm=uniforms_LTm[index],
                taus=rows.taus,
                vocab_size=vocab_size,
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory did not do: for that of the host, torch raises a plain RuntimeError."""
    said = any(words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory"))
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def load_teacher(inputs: TeacherInputs, *, device: str | None) -> Teacher:
    """Load weights and verbalizers onto the device of the flag, or else of the spec."""
    backbone = inputs.load_backbone(device or inputs.spec.run.device)
    compiled = choose_kernels(inputs.spec.run, backbone.device)
    keep_features(backbone.model, inputs.spec.run, inputs.encoder)
    return Teacher(backbone, inputs.load_verbalizers(backbone), inputs, backbone.device, compiled)


def _to_host(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows on their way to page-locked memory; on a CPU they are there."""
    if next(iter(rows.values())).device.type != "cuda":
        return rows
    return {
        name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
        for name, value in rows.items()
    }
