"""How far a model is from a teacher on the samples of a cache: the divergences that it is trained on, measured.

The KL is the unbiased estimate by which layers are matched, over the same tokens and with the same checks as in
training; the rows of one part are in memory at a time, and logits of a few tokens.

Legend: T response tokens, L cached teacher layers, K kept entries, V vocabulary, D hidden size.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from vlsi_cache.config.training import Alignment, InteractSpec
from vlsi_cache.data.collate import plan_sample_batches
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.sequence import Layout
from vlsi_cache.errors import DataError, ModelError, VlsiCacheError
from vlsi_cache.models.backbone import Backbone, head_of
from vlsi_cache.models.verbalizer import Verbalizers, frozen_layout
from vlsi_cache.processes import ALONE, Processes
from vlsi_cache.progress import progress, say
from vlsi_cache.sparse.alm import ChunkRows, aligned_kl
from vlsi_cache.sparse.head import Head, compute_dtype
from vlsi_cache.sparse.kl import LayerRows, candidate_kl
from vlsi_cache.store import reader
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.store.reader import Cache
from vlsi_cache.train.aligned import Aligner, open_aligner
from vlsi_cache.train.fitting import check_tokenizer
from vlsi_cache.train.interact import rows_of
from vlsi_cache.train.loader import MicroBatch, Pair, encode_pairs, match_records
from vlsi_cache.train.probe import agreement
from vlsi_cache.train.student import cached_sources

LOGIT_BYTES = 2**26  # logits that are alive at a time


@dataclass
class Sums:
    """Over response tokens: `kl` in nats, and over those with a row (`num_rows`, all of one tokenizer's) `entropy` in
    nats, `mass` and `agree` as `against_cache` has them."""

    num_samples: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    agree: int = 0
    kl: float = 0.0
    entropy: float = 0.0
    mass: float = 0.0
    kl_by_layer: dict[int, np.ndarray] = field(default_factory=dict)  # [L] each

    def add(self, other: "Sums") -> None:
        for name in ("num_samples", "num_tokens", "num_rows", "agree", "kl", "entropy", "mass"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for layer, kl_L in other.kl_by_layer.items():
            self.kl_by_layer[layer] = kl_L + self.kl_by_layer.get(layer, 0.0)


def against_cache(
    backbone: Backbone,
    verbalizers: Verbalizers | None,
    encoder: Encoder,
    cache: Cache,
    *,
    batch_tokens: int,
    limit: int | None = None,
    alignment: Alignment = "tokens",
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Measure a model on the (first `limit`) samples of a cache.

    `kl`: forward KL(teacher || model) of the last layer in nats per response token; `teacher_entropy` (None where the
    cache lacks it); `top1_agreement`: share of tokens where both name the same word first, and `mass_on_top_k`: the
    model's mass on the teacher's kept words (both None for rows of draws); `layers`: the KL of each verbalized layer to
    every cached teacher layer. With `alignment: byte` the KL is the sum of rows and chunks (`sparse/alm.py`, at the
    default temperature) per aligned token, and the shares are those of the words that both have, over the tokens with a
    row. Raises ModelError (another tokenizer), FingerprintMismatchError (the data has changed), DataError.
    """
    header, is_top = cache.header, cache.header.row_kind == "top-k"
    check_tokenizer(header, encoder, encoder.name, where=cache.path, alignment=alignment)
    aligner = open_aligner(cache, encoder) if alignment == "byte" else None
    layout = frozen_layout(backbone, verbalizers)
    batches = _batches(cache, encoder, verbalizers, batch_tokens, limit, layout, aligner, processes)
    own = [
        _sums(micro, backbone, verbalizers, header, encoder.vocab_size)
        for micro in progress(batches, "cache", unit="batch")
    ]
    sums = Sums()
    for one in processes.gather_shares(own):
        sums.add(one)
    num_tokens = sums.num_tokens
    if not num_tokens:
        raise DataError(f"{cache.path}: none of its first {sums.num_samples} samples has a row to compare with")
    if not np.isfinite([sums.kl, sums.mass, *(value for kl_L in sums.kl_by_layer.values() for value in kl_L)]).all():
        raise ModelError(
            f"the model's divergence from the teacher of {cache.path} is not finite: its last updates have destroyed "
            "it. Train it again in a new folder, with a lower `learning_rate` or a longer `warmup`"
        )
    teacher_model = (header.spec.get("teacher") or {}).get("model", "")
    return {
        "cache": str(cache.path.resolve()),
        "cache_digest": header.digest,
        "teacher": {"model": teacher_model, "weights": header.fingerprint.get("teacher.weights")},
        "num_samples": sums.num_samples,
        "num_tokens": num_tokens,
        "kl": sums.kl / num_tokens,
        **({} if aligner is None else {"alignment": "byte", "num_rows": sums.num_rows}),
        "teacher_entropy": None if "entropy" in header.lacks else sums.entropy / max(1, sums.num_rows),
        "top1_agreement": sums.agree / max(1, sums.num_rows) if is_top else None,
        "mass_on_top_k": sums.mass / max(1, sums.num_rows) if is_top else None,
        "teacher_layers": cache.layers,
        "layers": {str(layer): (kl_L / num_tokens).tolist() for layer, kl_L in sums.kl_by_layer.items()},
    }


@torch.no_grad()
def _sums(
    micro: MicroBatch, backbone: Backbone, verbalizers: Verbalizers | None, header: CacheHeader, vocab_size: int
) -> Sums:
    """The last layer against the teacher's last one, then each verbalized layer against all."""
    rows, found, num_tokens = micro.rows, Sums(num_samples=len(micro.sample_ids)), len(micro.batch.gold_T)
    if rows is None or not num_tokens:  # token selection may leave a sample without rows
        return found
    head, batch = head_of(backbone).real(vocab_size), micro.batch.to(backbone.device)
    layers = [] if verbalizers is None else verbalizers.layers
    capture = partial(backbone.capture, layers=[]) if verbalizers is None else verbalizers.capture
    hidden: dict[int, Any] = dict(capture(batch.inputs, rows_T=batch.rows_T, positions_T=batch.positions_T))
    teacher = rows_of(replace(micro, batch=batch), InteractSpec())
    final, last_TD = teacher.num_layers - 1, hidden.pop(backbone.num_layers)
    found.num_tokens, found.num_rows = num_tokens, rows.num_tokens
    found.kl = float(_kl_sums(last_TD, head, teacher, range(final, final + 1))[0])
    found.entropy = float(rows.entropy_LT[-1].sum(dtype=np.float64))
    of_rows = teacher.rows if isinstance(teacher, ChunkRows) else teacher
    if header.row_kind == "top-k" and of_rows is not None:
        ids_TK, logprobs_TK = of_rows.ids_LTX[final, :, : rows.top_k], of_rows.logprobs_LTK[final]
        own_TD = last_TD[teacher.index_P] if isinstance(teacher, ChunkRows) and teacher.index_P is not None else last_TD
        found.agree, found.mass = _agreement(own_TD, head, ids_TK, logprobs_TK)
    for layer in layers:
        assert verbalizers is not None
        state_TD = verbalizers.apply(layer, hidden.pop(layer))
        found.kl_by_layer[layer] = _kl_sums(state_TD, head, teacher, range(teacher.num_layers))
    return found


def _kl_sums(state_TD: Tensor, head: Head, teacher: LayerRows | ChunkRows, window: range) -> np.ndarray:
    """The KL from each teacher layer of the window, summed over the tokens."""
    if isinstance(teacher, ChunkRows):
        return aligned_kl(state_TD, head, teacher, window).sums_M().double().cpu().numpy()
    return candidate_kl(state_TD, head, teacher, window).matching_MT.double().sum(1).cpu().numpy()


def _batches(
    cache: Cache,
    encoder: Encoder,
    verbalizers: Verbalizers | None,
    batch_tokens: int,
    limit: int | None,
    layout: Layout,
    aligner: Aligner | None,
    processes: Processes,
) -> Iterator[MicroBatch]:
    """The share of this process of the samples, part by part, as the build has them; all layers where some are
    verbalized, else the last."""
    turns = itertools.cycle(range(processes.world))  # whose batch is next
    by_id, left = match_records(cache, cached_sources(cache)), len(cache) if limit is None else limit
    for part in cache.parts:
        rows = cache.read_part(part, None if verbalizers is not None else ["last"])[:left]
        left -= len(rows)
        records = [by_id[row.sample_id] for row in rows]
        found = rows if aligner is None else [aligner.aligned(*pair) for pair in zip(records, rows, strict=True)]
        pairs: list[Pair] = list(zip(records, found, strict=True))
        measured = encoder.measured(record for record, _ in pairs)
        for batch in plan_sample_batches(measured, batch_tokens, layout):
            if next(turns) == processes.rank:
                yield encode_pairs([pairs[i] for i in batch], encoder, layout)
        if not left:
            return


def _agreement(hidden_TD: Tensor, head: Head, ids_TK: Tensor, logprobs_TK: Tensor) -> tuple[int, float]:
    """(tokens whose likeliest word is the teacher's, sum of the mass on the teacher's kept words), in token chunks."""
    agree, mass = 0, 0.0
    size = max(1, LOGIT_BYTES // (4 * head.num_rows))
    for hidden_CD, ids_CK, logprobs_CK in zip(
        hidden_TD.split(size), ids_TK.long().split(size), logprobs_TK.split(size), strict=True
    ):
        logits_CV = hidden_CD.new_empty(len(hidden_CD), head.num_rows, dtype=compute_dtype(hidden_CD))
        head.logits_into(logits_CV, hidden_CD, 0)
        agrees_C, mass_C = agreement(logits_CV, ids_CK, logprobs_CK)
        agree, mass = agree + int(agrees_C.sum()), mass + float(mass_C.double().sum())
    return agree, mass


def trained_on(cache: Cache, run: Mapping[str, Any] | None, *, num_samples: int) -> dict[str, Any]:
    """Whether the first `num_samples` rows of a cache are in the one that a run was trained on, whatever their ids.

    `num_trained_on`: how many are; `trained_on`: whether any is. Both are None when it is not known: `run` (run.json)
    is None, or its cache cannot be opened, or is another one by now.
    """
    unknown = {"trained_on": None, "num_trained_on": None}
    if run is None:
        return unknown
    trained = cache
    if cache.header.digest != run.get("cache_digest"):
        try:
            trained = reader.open(str(run.get("cache")))
        except VlsiCacheError as error:
            say(f"not known whether the run was trained on these rows, its own cache cannot be opened: {error}")
            return unknown
        if trained.header.digest != run.get("cache_digest"):
            path = run.get("cache")
            say(f"not known whether the run was trained on these rows: {path} is another cache now than it was then")
            return unknown
    theirs = pc.SetLookupOptions(value_set=trained.sample_table()["digest"])
    is_in = pc.call_function("is_in", [cache.sample_table()["digest"][:num_samples]], theirs)
    num = int(is_in.to_numpy().sum())
    return {"trained_on": num > 0, "num_trained_on": num}
