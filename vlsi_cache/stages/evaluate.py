"""Stage evaluate: what a model knows about held-out rows: exact match of greedy answers, perplexity, loss per layer.

Legend: T response tokens, D hidden size, V vocabulary.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vlsi_cache.data.batches import plan_batches
from vlsi_cache.data.collate import collate, collate_prompts
from vlsi_cache.data.records import Record, read_records
from vlsi_cache.data.tokenize import Encoder, fit_rows, load_encoder
from vlsi_cache.errors import SpecError
from vlsi_cache.models.layers import Backbone
from vlsi_cache.models.load import load_model, resolve_model
from vlsi_cache.models.verbalizer import Verbalizers, load_verbalizers
from vlsi_cache.sparse.whole import linear_cross_entropy
from vlsi_cache.spec import CacheSpec, Dtype, EvaluateSpec, spec_from_dict

from .loop import head_of, pick_device, read_json, say, write_atomically


def evaluate(
    model: Path | str,
    *,
    spec: CacheSpec | None = None,
    device: str | None = None,
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure a run's student (or any model folder) on the held-out rows of its spec.

    Device, dtype and attention are those of the spec; `device` wins over it. A model's own code runs only with
    `trust_remote_code`, whatever a spec or a run folder says: either may come from somebody else.

    Returns, and for a run also writes to RUN/evaluation.json: `exact_match` (all and per kind, or None when the spec
    does not generate), `nll` in nats per response token, `perplexity`, `layers` (nll per verbalized student layer,
    where the run has verbalizers; head and final norm are the trained student's own), `num_samples`, `num_by_kind`.
    Raises SpecError when no spec names held-out rows.
    """
    folder = Path(model)
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else None
    if run is not None:
        _check_has_student(folder, run)
    spec = spec or (spec_from_dict(run["spec"], where=str(folder / "run.json")) if run else None)
    if spec is None or spec.evaluate is None:
        raise SpecError(f"no held-out rows for {model}: give --spec with an `evaluate:` section")
    result = evaluate_model(
        str(folder / "student") if run else resolve_model(str(model)),
        spec.evaluate,
        verbalizers=str(folder / "verbalizers") if (folder / "verbalizers").is_dir() else None,
        dtype=spec.distill.student_dtype,
        trust_remote_code=trust_remote_code,
        attn_implementation=spec.distill.attn_implementation,
        device=device or spec.run.device,
        batch_tokens=spec.run.num_batch_tokens,
        limit=limit,
    )
    if run is not None:
        write_atomically(folder / "evaluation.json", json.dumps(result, indent=1))
    return result


def _check_has_student(folder: Path, run: dict[str, Any]) -> None:
    if run["kind"] != "distill":
        raise SpecError(
            f"{folder} is a `{run['kind']}` run: it holds a teacher's verbalizers and no student. Name a `distill` "
            "run, or a model's folder together with --spec"
        )
    if not (folder / "student").is_dir():
        raise SpecError(f"{folder} has no trained student yet; go on with: {run['command']}")


def evaluate_model(
    path: str,
    settings: EvaluateSpec,
    *,
    verbalizers: str | None = None,
    gguf_file: str | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device: str | None = None,
    batch_tokens: int = 8192,
    limit: int | None = None,
) -> dict[str, Any]:
    """`evaluate` for a model folder; `limit` takes the first rows only, `batch_tokens` bounds a perplexity batch."""
    data = settings.data
    encoder = load_encoder(
        path,
        gguf_file=gguf_file,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        trust_remote_code=trust_remote_code,
    )
    records = list(read_records(data))[:limit]
    kept, skipped = fit_rows(records, encoder, data.max_length, bad_rows=data.bad_rows)
    if skipped:
        say(f"{len(skipped)} held-out rows are longer than {data.max_length} tokens and were left out")
    where = pick_device(device)
    loaded = load_model(
        path,
        gguf_file=gguf_file,
        dtype=dtype,
        device=str(where),
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
    )
    backbone = Backbone(loaded)
    spoken = None if verbalizers is None else load_saved_verbalizers(verbalizers, backbone).to(where)
    used = [records[index] for index, _, _ in kept]
    lengths = [num_prompt + len(ids) for _, num_prompt, ids in kept]
    nll = mean_nll(backbone, spoken, used, plan_batches(lengths, batch_tokens), encoder)
    last = nll.pop(backbone.num_layers)
    return {
        "num_samples": len(used),
        "num_skipped": len(skipped),
        "num_by_kind": dict(Counter(record.kind for record in used)),
        "exact_match": exact_match(loaded, used, encoder, settings) if settings.generate else None,
        "nll": last,
        "perplexity": float(np.exp(last)),
        "layers": {str(layer): value for layer, value in nll.items()},
    }


def load_saved_verbalizers(folder: str, backbone: Backbone) -> Verbalizers:
    """All verbalizers that a folder holds."""
    layers = [int(name) for name in read_json(Path(folder) / "verbalizers.json")["layers"]]
    # The head may have been trained since: what a layer says is read through the head of the model that is measured.
    return load_verbalizers(folder, backbone, sorted(layers), check_head=False)


@torch.inference_mode()
def mean_nll(
    backbone: Backbone,
    verbalizers: Verbalizers | None,
    records: list[Record],
    batches: list[list[int]],
    encoder: Encoder,
) -> dict[int, float]:
    """Negative log-likelihood in nats per response token over the real vocabulary, by layer; the final one last."""
    layers = verbalizers.layers if verbalizers is not None else []
    sums: dict[int, float] = defaultdict(float)
    num_tokens, head = 0, head_of(backbone).real(encoder.v_real)
    for indices in tqdm(batches, desc="perplexity", disable=None):
        batch = collate([encoder.encode(records[i]) for i in indices], pad_id=encoder.pad_id).to(backbone.device)
        capture = verbalizers.capture if verbalizers is not None else partial(backbone.capture, layers=[])
        hidden: dict[int, Any] = dict(capture(batch.inputs, rows_T=batch.rows_T, positions_T=batch.positions_T))
        for layer in [*layers, backbone.num_layers]:
            state_TD = hidden.pop(layer)
            if verbalizers is not None and layer != backbone.num_layers:
                state_TD = verbalizers.apply(layer, state_TD)
            sums[layer] += float(linear_cross_entropy(state_TD, head, batch.gold_T)) * len(batch.gold_T)
        num_tokens += len(batch.gold_T)
    return {layer: total / num_tokens for layer, total in sums.items()}


def exact_match(model: Any, records: list[Record], encoder: Encoder, settings: EvaluateSpec) -> dict[str, float]:
    """Share of rows whose greedy answer is the reference, white space at the ends aside: `all`, and per kind."""
    right: Counter[str] = Counter()
    for record, answer in answers(model, records, encoder, settings):
        right[record.kind] += answer.strip() == record.answer.strip()
    counts = Counter(record.kind for record in records)
    per_kind = {kind: right[kind] / count for kind, count in sorted(counts.items()) if kind}
    return {"all": sum(right.values()) / len(records), **per_kind}


@torch.inference_mode()
def answers(
    model: Any, records: list[Record], encoder: Encoder, settings: EvaluateSpec
) -> Iterator[tuple[Record, str]]:
    """Greedy answers, in batches of similar length."""
    order = sorted(range(len(records)), key=lambda i: encoder.measure(records[i])[0])
    size = settings.batch_size
    for start in tqdm(range(0, len(order), size), desc="generate", disable=None):
        chosen = [records[i] for i in order[start : start + size]]
        encoded = [encoder.encode(record, with_response=False) for record in chosen]
        inputs = collate_prompts(encoded, pad_id=encoder.pad_id, device=model.device)
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=encoder.eot_id,
            pad_token_id=encoder.pad_id,
        )
        for record, ids in zip(chosen, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            stop = ids.index(encoder.eot_id) if encoder.eot_id in ids else len(ids)
            yield record, encoder.decode(ids[:stop])
