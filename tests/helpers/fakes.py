"""Small caches, runs and demos with made-up numbers, for the tests of reports and commands."""

import base64
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlsi_cache.report.example import grid_of
from vlsi_cache.sparse.rows import SparseRows, draw_rows, top_p_widths, truncate
from vlsi_cache.store.files import load_header, load_part_record
from vlsi_cache.store.format import CacheHeader, part_dir, sealed_json
from vlsi_cache.store.reader import open as open_cache
from vlsi_cache.store.vocab_order import load_vocab, one_order
from vlsi_cache.store.writer import CacheWriter, PartSamples

V, K, M, NUM_DRAWS = 60, 5, 2, 8
LAYERS = [1, 2, 3, 4]
WORDS = ["the", "red", "bar", " is", "blue", "two", "<b>", "\n", " ", "3", "4", "top", "left", ".", "<|im_end|>"]
KINDS = ("bar_value", "colour", "count")
SPEC = {"name": "fake", "description": "made-up <rows>", "teacher": {"model": "/nowhere/at/all"}}


def token_texts() -> list[str]:
    """Text of each of the V tokens."""
    return [WORDS[index % len(WORDS)] for index in range(V)]


def dense_rows(gold_T: np.ndarray, rng: np.random.Generator) -> SparseRows:
    """Sparse rows of random distributions that lean more towards the gold token the deeper the layer."""
    logits = rng.normal(size=(len(LAYERS), len(gold_T), V))
    for index in range(len(LAYERS)):
        logits[index, np.arange(len(gold_T)), gold_T] += 2.2 * index
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logp, axis=-1, kind="stable")
    kept = np.take_along_axis(logp, ids[..., :K], axis=-1).astype(np.float32)
    p = np.exp(logp)
    return SparseRows(
        ids_LTK=ids[..., :K],
        logprobs_LTK=kept,
        tail_ids_LTm=ids[..., K : K + M],
        lse_LTn=np.zeros((*kept.shape[:2], 1), np.float32),
        entropy_LT=(-(p * logp).sum(-1)).astype(np.float32),
        gold_logprob_LT=logp[:, np.arange(len(gold_T)), gold_T].astype(np.float32),
        tail_mass_LT=(1 - np.exp(kept).sum(-1)).astype(np.float32),
    )


def write_cache(
    path: Path,
    *,
    num_parts: int = 2,
    num_written: int | None = None,
    skipped: int = 0,
    texts: bool = True,
    rows: str = "top-k",
    every: int = 1,
    profile: Literal["default", "exact", "fast"] = "default",
) -> Path:
    """A cache of three samples a part; `num_written` parts are there.

    `rows` are "top-k", "top-p" (of different widths) or "sampled"; only every `every`-th response token has a row.
    """
    rng = np.random.default_rng(0)
    responses = [rng.integers(0, V, size=int(size)) for size in rng.integers(4, 9, size=3 * num_parts)]
    width = NUM_DRAWS if rows == "sampled" else K
    header = CacheHeader(
        spec=SPEC,
        fingerprint={"teacher.weights": "feed", "rows.top_k": K},
        layers=LAYERS,
        num_model_layers=LAYERS[-1],
        row_kind="sampled" if rows == "sampled" else "top-k",
        truncated=rows != "top-k",
        top_k=[width] * len(LAYERS),
        tail_samples=0 if rows == "sampled" else M,
        vocab_size=V,
        profile=profile,
        num_parts=num_parts,
        num_samples=len(responses),
        num_response_tokens=sum(map(len, responses)),
        skipped=[{"id": f"long-{n}", "reason": f"prompt <too> long: {400 + n} tokens"} for n in range(skipped)],
    )
    vocab_order = one_order(np.arange(V), len(LAYERS))
    writer = CacheWriter.create_or_resume(path, header, vocab_order, token_texts=token_texts if texts else None)
    for part in range(num_parts if num_written is None else num_written):
        chosen = responses[3 * part : 3 * part + 3]
        positions = [np.arange(0, len(ids), every, dtype=np.uint32) for ids in chosen]
        made = [dense_rows(ids, rng).select_tokens(at) for ids, at in zip(chosen, positions, strict=True)]
        samples = PartSamples(
            sample_ids=[f"sample-{3 * part + n}" for n in range(3)],
            kinds=list(KINDS),
            digests=["00"] * 3,
            response_ids=[ids.astype(np.uint32) for ids in chosen],
            rows=reshaped(SparseRows.concat(made), rows, rng),
            positions=positions,
        )
        writer.write_part(part, samples)
    if num_written is None:
        writer.finish()
    return path


def write_many_parts(path: Path, num_parts: int) -> Path:
    """A finished cache of so many parts: the first one is written, the others are links to its files."""
    first = write_cache(path.with_name(f"{path.name}-first"), num_parts=1)
    table = load_vocab(first, old := load_header(first))
    sizes = {"num_samples": 3 * num_parts, "num_response_tokens": old.num_response_tokens * num_parts}
    header = old.model_copy(update={"num_parts": num_parts, **sizes})
    writer = CacheWriter.create_or_resume(path, header, table, token_texts=token_texts)
    record = load_part_record(first, old, 0)
    for index in range(num_parts):
        folder = part_dir(path, index)
        shutil.copytree(part_dir(first, 0), folder, copy_function=os.link)
        (folder / "part.json").unlink()
        names = [f"sample-{index}-{n}" for n in range(3)]
        own = {"index": index, "sample_ids": names, "cache_digest": writer.header.digest}
        (folder / "part.json").write_bytes(sealed_json(record.model_copy(update=own).model_dump()))
    writer.finish()
    return path


def reshaped(rows: SparseRows, kind: str, rng: np.random.Generator) -> SparseRows:
    """The same rows as top-p rows, or as draws."""
    LT = rows.entropy_LT.shape
    if kind == "top-p":
        widths_LT = top_p_widths(rows.logprobs_LTK, top_p=0.5, min_k=1)
        return truncate(rows, widths_LT, rng.random((*LT, M)))
    if kind == "sampled":
        more = replace(rows, tail_ids_LTm=np.repeat(rows.tail_ids_LTm, NUM_DRAWS // M, axis=-1))
        return draw_rows(more, rng.random((*LT, NUM_DRAWS)))
    return rows


def metrics_lines(recipe: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Lines as the stages write them: verbalize and interact with numbers per layer, sft with a loss only."""
    lengths = {"vlsi": (20, 40, 20), "any-depth": (20, 40, 20), "last": (0, 60, 20), "sft": (0, 0, 80)}[recipe]
    lines = []
    for stage, num in zip(("verbalize", "interact", "sft"), lengths, strict=True):
        for step in range(1, num + 1):
            fall = float(np.exp(-step / 15) + rng.normal() * 0.03)
            line = {"stage": stage, "step": step, "num_steps": num, "loss": 1 + 2 * fall, "tokens_per_s": 812.5}
            line |= {"learning_rate": 1e-3, "data_wait_pct": 1.5, "memory_gib": 0.9, "elapsed_s": 1.0}
            if stage == "verbalize":
                line["layers"] = {"1": 2.6 + fall, "2": 2.1 + fall}
            if stage == "interact":
                line |= {"kl_last": 0.4 + fall, "layers": {"1": 1.0, "2": 0.8} if recipe == "vlsi" else {}}
                line |= {"teacher_layers": [1, 2, 3]} if recipe == "vlsi" and step == 1 else {}
                pairs = [[1, 2], [1, 3], [2, 3]]
                chosen = rng.choice(3, size=2, p=[0.6, 0.3, 0.1])
                line["matched_layers"] = [pairs[n] if recipe == "vlsi" else [] for n in chosen]
            lines.append(line)
    return lines


def write_run(path: Path, *, recipe: str = "vlsi", seed: int = 0, cache: Path | None = None) -> dict[str, Any]:
    """A run folder; returns its evaluation."""
    path.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(recipe)])
    base = {"sft": 0.52, "last": 0.66, "vlsi": 0.71, "any-depth": 0.68}[recipe] + rng.normal() * 0.02
    match = {kind: float(np.clip(base + rng.normal() * 0.1, 0, 1)) for kind in KINDS}
    evaluation = {
        "num_samples": 300,
        "num_by_kind": dict.fromkeys(KINDS, 100),
        "exact_match": {"all": sum(match.values()) / len(match), **match},
        "nll": 0.3,
        "perplexity": 1.35,
        "layers": {"1": 2.0 - base, "2": 1.6 - base} if recipe == "vlsi" else {},
    }
    record = {
        "kind": "distill",
        "status": "done",
        "spec": SPEC,
        "recipe": recipe,
        "cache": str(cache) if cache else None,
        "student": "models/small",
        "device": "cpu",
        "versions": {"python": "3.11", "torch": "2.11"},
        "command": "vlsi-cache distill c -o r",
        "stages": [{"name": "sft", "steps": 20, "seconds": 12.5}],
    }
    (path / "run.json").write_text(json.dumps(record))
    (path / "evaluation.json").write_text(json.dumps(evaluation))
    lines = [json.dumps(line) for line in metrics_lines(recipe, rng)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"stage": "sft", "st')
    return evaluation


def write_demo(path: Path, *, seeds: int = 1) -> Path:
    """A demo folder with a cache and one run per recipe and seed; returns the folder."""
    cache = write_cache(path / "cache")
    runs: dict[str, list[dict[str, Any]]] = {"sft": [], "last": [], "vlsi": [], "any-depth": []}
    for seed in range(seeds):
        for recipe, entries in runs.items():
            name = f"runs/seed-{seed}/{recipe}"
            scores = write_run(path / name, recipe=recipe, seed=seed, cache=cache)
            exits = [
                {"layer": k, "accuracy": 0.2 * k + 0.01 * seed, "nll": 2.5 - 0.5 * k, "agreement": 0.25 * k}
                for k in (1, 2, 3)
            ]
            entry = {"seed": seed, "run": name, "seconds": 90.0, "exits": [] if recipe == "sft" else exits, **scores}
            entries.append(entry)
    demo = {
        "seeds": list(range(seeds)),
        "recipes": list(runs),
        "runs": runs,
        "cache": "cache",
        "bytes_per_layer_token": open_cache(cache).bytes_per_layer_token(),
        "teacher": {"exact_match": {"all": 0.97, **dict.fromkeys(KINDS, 0.97)}, "perplexity": 1.04},
        "budget": "80 optimizer steps for every recipe, fixed before & <not> after",
        "build_s": 61.0,
        "verify_s": 0.8,
    }
    (path / "demo.json").write_text(json.dumps(demo))
    return path


def fake_example(cache: Path) -> dict[str, Any]:
    """An example as `example_of` makes it, with a tiny picture."""
    from PIL import Image

    opened = open_cache(cache)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, format="PNG")
    grid = grid_of(opened["sample-0"], layers=opened.layers, text=opened.token_text, tokens=slice(24))
    picture = base64.b64encode(buffer.getvalue()).decode()
    texts = {"question": "How tall is the <red> bar?", "answer": "the red bar is 3", "kind": "bar_value"}
    return {"id": "sample-0", "png": [picture], **texts, **grid}
