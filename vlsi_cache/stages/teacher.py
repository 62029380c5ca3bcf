"""The loaded teacher at work: records in, sparse rows out.

Only response positions leave the layers, and only one layer's logits exist at a time, in vocabulary blocks.
Legend: T response tokens, L layers (intermediate targets, then the final layer), m tail samples, N draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlsi_cache.data.collate import Batch, collate
from vlsi_cache.models.layers import Backbone
from vlsi_cache.models.verbalizer import Verbalizers
from vlsi_cache.sparse.logits import Head
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.sparse.select import keyed_uniforms
from vlsi_cache.sparse.topk import sample_uniforms, stack_layers, teacher_rows
from vlsi_cache.sparse.truncate import draw_rows, top_p_widths, truncate

from .inputs import TeacherInputs
from .loop import head_of, say

SCANNED_K = 64  # of sampled rows: the likeliest tokens are drawn from directly, the rest through the tail


@dataclass(frozen=True)
class Teacher:
    """The loaded teacher and what it writes."""

    backbone: Backbone
    verbalizers: Verbalizers
    inputs: TeacherInputs
    device: torch.device

    @torch.inference_mode()
    def rows(self, indices: list[int]) -> list[SparseRows]:
        """The sparse rows of some records, one SparseRows [L, T_i] per record; no token is left out yet."""
        inputs = self.inputs
        batch = collate([inputs.encoder.encode(inputs.records[i]) for i in indices], pad_id=inputs.encoder.pad_id)
        rows = stack_layers(list(self._layer_rows(batch.to(self.device), self._tail_uniforms(indices))))
        rows = self._narrowed(rows, indices)
        stops = np.cumsum(batch.num_tokens)
        return [rows.tokens(slice(int(stop - n), int(stop))) for stop, n in zip(stops, batch.num_tokens, strict=True)]

    @property
    def head(self) -> Head:
        return head_of(self.backbone)

    @property
    def num_layers(self) -> int:
        return len(self.inputs.target_layers) + 1

    def _tail_uniforms(self, indices: list[int]) -> np.ndarray:
        """float64 [L, T, m], keyed by sample: the draws do not depend on the batch."""
        inputs, rows = self.inputs, self.inputs.spec.rows
        drawn = [
            sample_uniforms(
                rows.seed,
                inputs.records[i].id,
                num_tokens=len(inputs.response_ids[i]),
                num_layers=self.num_layers,
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
        shape = (self.num_layers, rows.num_tail)
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

    def _layer_rows(self, batch: Batch, uniforms_LTm: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
        inputs, rows = self.inputs, self.inputs.spec.rows
        v_real = inputs.encoder.v_real
        widths = rows.widths(self.num_layers)
        hidden = dict(self.verbalizers.capture(batch.inputs, batch.rows_T, batch.positions_T))
        for index, layer in enumerate([*inputs.target_layers, inputs.num_model_layers]):
            state: Any = hidden.pop(layer)
            yield teacher_rows(
                state if layer == inputs.num_model_layers else self.verbalizers.apply(layer, state),
                self.head,
                batch.gold_T,
                top_k=min(SCANNED_K, v_real - 1) if rows.kind == "sampled" else widths[index],
                uniforms_Tm=torch.from_numpy(uniforms_LTm[index]).to(self.device),
                taus=rows.taus,
                v_real=v_real,
            )


def load_teacher(inputs: TeacherInputs, *, device: str | None) -> Teacher:
    """Load weights and verbalizers onto the device of the flag, or else of the spec."""
    backbone = inputs.load_backbone(device or inputs.spec.run.device)
    say(f"teacher: {inputs.model_path} on {backbone.device}")
    return Teacher(backbone, inputs.load_verbalizers(backbone), inputs, backbone.device)
