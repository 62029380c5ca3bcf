"""What the teacher's side costs: rows against the head's matrix product, a build against the same without writing.

    python tests/benchmarks/teacher.py [--rounds 7] [--spec demo] [--out FILE.md]

One thread unless OMP_NUM_THREADS says otherwise. Nothing here is a test.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import vlsi_cache as vc
from vlsi_cache.data.collate import padding_share, plan_batches, plan_parts
from vlsi_cache.data.sequence import PADDED
from vlsi_cache.sparse.head import Head
from vlsi_cache.sparse.topk import teacher_rows
from vlsi_cache.store.vocab_order import one_order
from vlsi_cache.store.writer import CacheWriter
from vlsi_cache.teacher import build
from vlsi_cache.teacher.forward import Teacher, load_teacher
from vlsi_cache.teacher.group_writer import GroupWriter
from vlsi_cache.teacher.inputs import open_teacher_inputs

SHAPES = [(128, 576, 49152), (512, 576, 49152), (128, 896, 151936), (512, 896, 151936)]
TOP_K, NUM_TAIL = 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--spec", default="demo")
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    threads = (
        f"{torch.get_num_threads()} thread(s), {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    )
    report = [f"# Teacher\n\n`{' '.join(['python', *sys.argv])}`: {threads}\n"]
    report += row_costs(args.rounds) + skewed_padding() + build_costs(args.spec, args.sets, args.rounds)
    text = "\n".join(report) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


def row_costs(rounds: int) -> list[str]:
    lines = ["| T, d, V (fp32, k = 64, m = 4) | matrix product, ms | eager | compiled |", "|---|---|---|---|"]
    for shape in SHAPES:
        product, eager, compiled = fastest(row_works(*shape), rounds, time.thread_time)
        ratios = f"{eager / product:.2f} | {compiled / product:.2f}"
        lines.append(f"| {', '.join(map(str, shape))} | {product * 1e3:.0f} | {ratios} |")
    return ["## Rows of one layer, in units of the head's matrix product\n", *lines, ""]


def row_works(num_tokens: int, hidden_size: int, vocab: int) -> list[Callable[[], object]]:
    """The head's matrix product alone, and rows with sums as torch has them and fused."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(num_tokens, hidden_size, generator=generator) * 2 / hidden_size**0.5
    weight_VD = torch.randn(vocab, hidden_size, generator=generator)
    gold_T = torch.randint(vocab, (num_tokens,), generator=generator)
    uniforms_Tm = torch.rand(num_tokens, NUM_TAIL, dtype=torch.float64, generator=generator)
    out_TV = torch.empty(num_tokens, vocab)
    rows = partial(
        teacher_rows,
        hidden_TD,
        head=weight_VD,
        gold_ids_T=gold_T,
        top_k=TOP_K,
        uniforms_Tm=uniforms_Tm,
        vocab_size=vocab,
    )
    return [
        lambda: torch.mm(hidden_TD, weight_VD.T, out=out_TV),
        rows,
        partial(rows, head=Head(weight_VD, compiled=True)),
    ]


def fastest(works: list[Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """The least seconds of each, in turns, so that all meet the same machine."""
    for work in works:
        work()
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for index, work in enumerate(works):
            started = clock()
            work()
            best[index] = min(best[index], clock() - started)
    return best


def skewed_padding() -> list[str]:
    lines = ["| response tokens of a part | batch_tokens | padding | batches | full batches |", "|---|---|---|---|---|"]
    draws = np.random.Generator(np.random.Philox(0)).standard_normal(20_000)
    lengths = np.clip(245 * np.exp(draws), 8, 4096).astype(int)
    for tokens_per_part in (20_000, 200_000):
        parts = plan_parts((lengths // 2).tolist(), seed=0, tokens_per_part=tokens_per_part)
        for batch_tokens in (4096, 8192, 32768):
            batches = [[p[j] for j in b] for p in parts for b in plan_batches(lengths[p].tolist(), batch_tokens)]
            padding, full = padding_share(lengths.tolist(), batches), lengths.sum() / batch_tokens
            lines.append(f"| {tokens_per_part} | {batch_tokens} | {padding:.1%} | {len(batches)} | {full:.0f} |")
    return ["## Padding of 20,000 samples of log-normal length (median 245, half of it response)\n", *lines, ""]


def build_costs(name: str, sets: list[str], rounds: int) -> list[str]:
    spec = vc.load_spec(name, overrides=sets)
    inputs = open_teacher_inputs(spec)
    response = [len(ids) for ids in inputs.response_ids]
    parts = plan_parts(response, seed=spec.rows.seed, tokens_per_part=build.part_tokens(inputs))
    teacher = load_teacher(inputs, device=None)
    planned = build._batches(teacher, parts, range(len(parts)), spec.run.batch_tokens)
    batches = [batch.indices for batch in planned]
    padding = padding_share(inputs.lengths(range(len(inputs.records)), PADDED), batches)

    def without_writing() -> None:
        for batch in batches:
            teacher.rows(batch)

    plain, whole = fastest([without_writing, lambda: write(teacher, parts)], rounds, time.perf_counter)
    return [
        f"## Build of `{' '.join([name, *sets])}`\n",
        f"{len(inputs.records)} samples, {sum(response)} response tokens, {len(parts)} parts, {len(batches)} batches, "
        f"{padding:.1%} padding; batch after batch without writing {plain:.2f} s, the build {whole:.2f} s: "
        f"**{whole / plain:.3f}**",
    ]


def write(teacher: Teacher, parts: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        inputs = teacher.inputs
        vocab_order = one_order(np.arange(inputs.encoder.vocab_size), len(inputs.layers))
        header = build.cache_header(inputs, parts)
        writer = GroupWriter(lambda: CacheWriter.create_or_resume(Path(folder) / "cache", header, vocab_order))
        build.build_parts(teacher, parts, writer.missing_parts(), writer, inputs.spec.run.batch_tokens, [])


if __name__ == "__main__":
    main()
