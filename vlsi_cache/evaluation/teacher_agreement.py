"""How far a model is from a teacher on the samples of a cache: the divergences that it is trained on, measured.

The KL is the unbiased estimate by which layers are matched, over the same tokens and with the same checks as in
training; the rows of one part are in memory at a time, and logits of a few tokens.

Legend: T response tokens, L cached teacher layers, K kept entries, V vocabulary, D hidden size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from vlsi_cache.data.collate import plan_batches
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.errors import DataError, ModelError, VlsiCacheError
from vlsi_cache.models.backbone import Backbone, head_of
from vlsi_cache.models.verbalizer import Verbalizers
from vlsi_cache.progress import progress, say
from vlsi_cache.sparse.head import Head, compute_dtype
from vlsi_cache.sparse.kl import LayerRows, candidate_kl
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.store import reader
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.store.reader import Cache
from vlsi_cache.train.loader import MicroBatch, Pair, encode_pairs, match_records
from vlsi_cache.train.probe import agreement
from vlsi_cache.train.student import cached_sources, check_tokenizer

LOGIT_BYTES = 2**26  # logits that are alive at a time


@dataclass
class _Sums:
    """Sums over the response tokens met so far."""

    num_samples: int = 0
    num_tokens: int = 0
    entropy: float = 0.0
    kl: float = 0.0
    agree: int = 0
    mass: float = 0.0
    kl_L: dict[int, np.ndarray] = field(default_factory=dict)


@torch.no_grad()
def against_cache(
    backbone: Backbone,
    verbalizers: Verbalizers | None,
    encoder: Encoder,
    cache: Cache,
    *,
    batch_tokens: int,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure a model on the (first `limit`) samples of a cache.

    `kl`: forward KL(teacher || model) of the last layer in nats per response token; `teacher_entropy`;
    `top1_agreement`: share of tokens where both name the same word first, and `mass_on_top_k`: the model's mass on the
    teacher's kept words (both None for rows of draws); `layers`: the KL of each verbalized layer to every cached
    teacher layer. Raises ModelError (another tokenizer), FingerprintMismatchError (the data has changed), DataError.
    """
    check_tokenizer(cache.header, encoder, encoder.name, where=cache.path)
    head, sums = head_of(backbone).real(cache.header.v_real), _Sums()
    for micro in progress(_batches(cache, encoder, verbalizers, batch_tokens, limit), "cache", unit="batch"):
        sums.num_samples += len(micro.sample_ids)
        if micro.rows is not None and micro.rows.num_tokens:  # token selection may leave a sample without rows
            _add(sums, micro, micro.rows, backbone, verbalizers, head, cache.header)
    if not sums.num_tokens:
        raise DataError(f"{cache.path}: none of its first {sums.num_samples} samples has a row to compare with")
    return _means(sums, cache)


def _batches(
    cache: Cache, encoder: Encoder, verbalizers: Verbalizers | None, batch_tokens: int, limit: int | None
) -> Iterator[MicroBatch]:
    """The samples part by part, as the build has them; all layers where some are verbalized, else the last."""
    by_id, left = match_records(cache, cached_sources(cache)), len(cache) if limit is None else limit
    for part in cache.parts:
        rows = cache.read_part(part, None if verbalizers is not None else ["last"])[:left]
        left -= len(rows)
        pairs: list[Pair] = [(by_id[row.sample_id], row) for row in rows]
        lengths = [encoder.measure(by_id[row.sample_id])[0] + len(row.response_ids_R) for row in rows]
        for batch in plan_batches(lengths, batch_tokens):
            yield encode_pairs([pairs[i] for i in batch], encoder)
        if not left:
            return


def _add(
    sums: _Sums,
    micro: MicroBatch,
    rows: SparseRows,
    backbone: Backbone,
    verbalizers: Verbalizers | None,
    head: Head,
    header: CacheHeader,
) -> None:
    """One batch: the last layer against the last, then each verbalized layer against all."""
    batch = micro.batch.to(backbone.device)
    capture = verbalizers.capture if verbalizers is not None else partial(backbone.capture, layers=[])
    hidden: dict[int, Any] = dict(capture(batch.inputs, rows_T=batch.rows_T, positions_T=batch.positions_T))
    teacher = _on_device(rows, header, backbone.device)
    final, last_TD = teacher.num_layers - 1, hidden.pop(backbone.num_layers)
    kl_1T = candidate_kl(last_TD, head, teacher, range(final, final + 1)).matching_MT
    sums.num_tokens += rows.num_tokens
    sums.kl += float(kl_1T.double().sum())
    sums.entropy += float(rows.entropy_LT[-1].sum(dtype=np.float64))
    if header.row_kind == "top-k":
        num_kept = rows.top_k
        agree, mass = _agreement(last_TD, head, teacher.ids_LTX[final, :, :num_kept], teacher.logprobs_LTK[final])
        sums.agree, sums.mass = sums.agree + agree, sums.mass + mass
    for layer in verbalizers.layers if verbalizers is not None else []:
        assert verbalizers is not None
        state_TD = verbalizers.apply(layer, hidden.pop(layer))
        kl_L = candidate_kl(state_TD, head, teacher).matching_MT.double().sum(1).cpu().numpy()
        sums.kl_L[layer] = kl_L + sums.kl_L.get(layer, np.zeros_like(kl_L))


def _on_device(rows: SparseRows, header: CacheHeader, device: torch.device) -> LayerRows:
    return LayerRows.of(
        rows.ids_LTK,
        rows.logprobs_LTK,
        rows.tail_ids_LTm,
        rows.tail_mass_LT,
        rows.entropy_LT,
        v_real=header.v_real,
        device=device,
    )


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


def _means(sums: _Sums, cache: Cache) -> dict[str, Any]:
    num_tokens, is_top = sums.num_tokens, cache.header.row_kind == "top-k"
    if not np.isfinite([sums.kl, sums.mass, *(kl for kl_L in sums.kl_L.values() for kl in kl_L)]).all():
        raise ModelError(
            f"the model's divergence from the teacher of {cache.path} is not finite: its last updates have destroyed "
            "it. Train it again in a new folder, with a lower `learning_rate` or a longer `warmup`"
        )
    teacher = (cache.header.spec.get("teacher") or {}).get("model", "")
    return {
        "cache": str(cache.path.resolve()),
        "cache_digest": cache.header.digest,
        "teacher": {"model": teacher, "weights": cache.header.fingerprint.get("teacher.weights")},
        "num_samples": sums.num_samples,
        "num_tokens": num_tokens,
        "kl": sums.kl / num_tokens,
        "teacher_entropy": sums.entropy / num_tokens,
        "top1_agreement": sums.agree / num_tokens if is_top else None,
        "mass_on_top_k": sums.mass / num_tokens if is_top else None,
        "teacher_layers": cache.layers,
        "layers": {str(layer): (kl_L / num_tokens).tolist() for layer, kl_L in sums.kl_L.items()},
    }


def trained_on(cache: Cache, run: Mapping[str, Any] | None, *, num_samples: int) -> dict[str, Any]:
    """Whether the first `num_samples` rows of a cache are in the one that a run was trained on, whatever their ids.

    `num_trained_on`: how many are; `trained_on`: whether any is. Both are None when it is not known: `run` (run.json)
    is None, or its cache cannot be opened, or is another one by now.
    """
    trained = None if run is None else _cache_of(run, cache)
    if trained is None:
        return {"trained_on": None, "num_trained_on": None}
    theirs = pc.SetLookupOptions(value_set=trained.sample_table()["digest"])
    is_in = pc.call_function("is_in", [cache.sample_table()["digest"][:num_samples]], theirs)
    num = int(is_in.to_numpy().sum())
    return {"trained_on": num > 0, "num_trained_on": num}


def _cache_of(run: Mapping[str, Any], measured: Cache) -> Cache | None:
    """The cache that a run was trained on, which may be the `measured` one; None, and why, where it is not there."""
    digest, path = run.get("cache_digest"), str(run.get("cache"))
    if measured.header.digest == digest:
        return measured
    try:
        found = reader.open(path)
    except VlsiCacheError as error:
        say(f"not known whether the run was trained on these rows, its own cache cannot be opened: {error}")
        return None
    if found.header.digest != digest:
        say(f"not known whether the run was trained on these rows: {path} is another cache now than it was then")
        return None
    return found
