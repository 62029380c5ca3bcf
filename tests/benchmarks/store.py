"""What the store costs: bytes, speed of writing and reading, opening. Ratios in one run; nothing here is a test.

    python tests/benchmarks/store.py [--cache CACHE] [--exact CACHE] [--samples 1000000] [--out FILE.md]

`--cache` is a real cache (default profile) whose rows are measured; without it the rows are synthetic, and only the
ratios mean something. `--exact` is the same build in the `exact` profile, for the error of the quantiser.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numcodecs
import numpy as np
import zarr

from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.store import reader
from vlsi_cache.store.dataset import PartWindowReader
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.store.part import Row
from vlsi_cache.store.reader import Cache
from vlsi_cache.store.vocab_order import one_order, order_by_count
from vlsi_cache.store.writer import CacheWriter, PartSamples

PROFILES = ("default", "exact", "fast")
ENTRY_NAMES = ("ids", "levels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--exact", type=Path)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="where the caches of this run are written")
    args = parser.parse_args()
    report = [f"# Store\n\n`{' '.join(['python', *sys.argv])}`\n", machine()]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        parts = real_parts(args.cache) if args.cache else synthetic_parts()
        report += [f"Rows: {args.cache or 'synthetic'}; {describe(parts)}\n"]
        if args.cache:
            report += bytes_table(reader.open(args.cache), folder)
        if args.exact and args.cache:
            report += quantisation(reader.open(args.cache), reader.open(args.exact))
        report += speeds(parts, folder)
        report += opening(args.samples, folder)
    text = "\n".join(report)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


def machine() -> str:
    names = ("numpy", "zarr", "numcodecs", "pyarrow")
    versions = ", ".join(f"{name} {__import__(name).__version__}" for name in names)
    return f"{os.cpu_count()} cores ({platform.machine()}), shared; Python {platform.python_version()}, {versions}\n"


def describe(parts: list[PartSamples]) -> str:
    rows = parts[0].rows
    assert rows is not None
    tokens = sum(part.rows.num_tokens for part in parts if part.rows is not None)
    samples = sum(len(part.sample_ids) for part in parts)
    shape = f"{rows.num_layers} layers, k = {rows.top_k}, m = {rows.num_tail}"
    return f"{len(parts)} parts, {samples} samples, {tokens} tokens, {shape}"


def real_parts(path: Path) -> list[PartSamples]:
    cache = reader.open(path)
    return [samples_of(cache.read_part(index)) for index in cache.parts]


def samples_of(rows: list[Row]) -> PartSamples:
    names = ("ids_LTK", "logprobs_LTK", "tail_ids_LTm", "lse_LTn", "entropy_LT", "gold_logprob_LT", "tail_mass_LT")
    joined = SparseRows.concat([SparseRows(**{name: getattr(row, name) for name in names}) for row in rows])
    return PartSamples(
        [row.sample_id for row in rows],
        [row.kind for row in rows],
        [row.digest for row in rows],
        [row.response_ids_R for row in rows],
        joined,
    )


def synthetic_parts(
    *,
    num_parts: int = 12,
    per_part: int = 160,
    length: int = 146,
    num_layers: int = 8,
    top_k: int = 64,
    vocab_size: int = 49152,
    num_tail: int = 4,
) -> list[PartSamples]:
    """Zipf-like ids and log-probs: no statement about bytes, only about speed."""
    rng = np.random.default_rng(0)
    parts = []
    for part in range(num_parts):
        LT = (num_layers, per_part * length)
        ids = (rng.pareto(0.7, (*LT, top_k + num_tail)) * 20).astype(np.int64) % vocab_size
        logprobs = -np.sort(rng.gamma(6.0, 0.9, (*LT, top_k)), axis=-1).astype(np.float32)
        logprobs -= np.log(np.exp(logprobs.astype(np.float64)).sum(-1, keepdims=True) * 1.2).clip(0).astype(np.float32)
        rows = SparseRows(
            ids_LTK=ids[..., :top_k],
            logprobs_LTK=logprobs,
            tail_ids_LTm=ids[..., top_k:],
            lse_LTn=rng.normal(12, 3, (*LT, 1)).astype(np.float32),
            entropy_LT=rng.uniform(0, 6, LT).astype(np.float32),
            gold_logprob_LT=-rng.uniform(0, 9, LT).astype(np.float32),
            tail_mass_LT=(1 - np.exp(logprobs).sum(-1)).clip(0, 1).astype(np.float32),
        )
        names = [f"{part}-{i}" for i in range(per_part)]
        response = [rng.integers(0, vocab_size, length).astype(np.uint32) for _ in names]
        parts.append(PartSamples(names, [""] * per_part, names, response, rows))
    return parts


def write_cache(root: Path, parts: list[PartSamples], profile: str, *, vocab_size: int = 49152) -> float:
    """Write all parts; seconds for the parts alone."""
    rows = parts[0].rows
    assert rows is not None
    header = CacheHeader(
        fingerprint={},
        layers=list(range(1, rows.num_layers + 1)),
        num_model_layers=rows.num_layers,
        top_k=[rows.top_k] * rows.num_layers,
        tail_samples=rows.num_tail,
        vocab_size=vocab_size,
        profile=profile,  # type: ignore[arg-type]
        num_parts=len(parts),
        num_samples=sum(len(part.sample_ids) for part in parts),
        num_response_tokens=sum(len(ids) for part in parts for ids in part.response_ids),
    )
    kept = np.stack([np.bincount(ids.ravel(), minlength=vocab_size) for ids in rows.ids_LTK[:, :2048]])
    vocab_order = one_order(np.arange(vocab_size), rows.num_layers)
    if profile != "fast":
        vocab_order = order_by_count(kept, np.zeros(vocab_size, np.int64))
    writer = CacheWriter.create_or_resume(root, header, vocab_order)
    began = time.perf_counter()
    for index, part in enumerate(parts):
        writer.write_part(index, part)
    seconds = time.perf_counter() - began
    writer.finish()
    return seconds


def bytes_table(cache: Cache, folder: Path) -> list[str]:
    """Stored bytes per (layer, token) beside the raw arrays and beside zarr's default compression of them."""
    cells = cache.num_tokens * len(cache.layers)
    part = cache.part(cache.parts[0])
    raw_parts = cache.num_tokens / part.record.num_tokens
    lines = ["## Bytes per (layer, token)\n", "| array | here | raw | zarr's defaults on raw |", "|---|---|---|---|"]
    raw = dict(_raw_arrays(samples_of(cache.read_part(cache.parts[0]))))
    total = dict.fromkeys(("here", "raw", "zarr"), 0.0)
    names = {"ids": "ids", "levels": "logprobs", "tail_ids": "tail_ids"}
    for name, size in cache.bytes_by_array().items():
        array = raw.get(names.get(name, name))
        row = {"here": size / cells, "raw": 0.0, "zarr": 0.0}
        if array is not None:
            row["raw"] = array.nbytes * raw_parts / cells
            row["zarr"] = _zarr_default_bytes(array, folder / "defaults") * raw_parts / cells
        for key, value in row.items():
            total[key] += value
        lines.append(f"| {name} | {row['here']:.2f} | {row['raw']:.1f} | {row['zarr']:.1f} |")
    lines.append(f"| total | **{total['here']:.1f}** | {total['raw']:.1f} | {total['zarr']:.1f} |")
    entries = sum(cache.bytes_by_array().get(name, 0) for name in ENTRY_NAMES) / cells
    return [*lines, f"\nids and levels {entries:.1f}, everything else {total['here'] - entries:.1f}.\n"]


def _raw_arrays(samples: PartSamples) -> Iterator[tuple[str, np.ndarray]]:
    """What one would store without thinking: int32 ids, float16 log-probs, float32 scalars, token by token."""
    rows = samples.rows
    assert rows is not None
    for name, array in vars(rows).items():
        turned = np.ascontiguousarray(np.moveaxis(array, 0, 1))
        dtype = np.int32 if "ids" in name else np.float16 if "logprobs" in name else np.float32
        yield name.rsplit("_", 1)[0], turned.astype(dtype)


def _zarr_default_bytes(array: np.ndarray, path: Path) -> int:
    shutil.rmtree(path, ignore_errors=True)
    zarr.create_array(path, data=array)
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def quantisation(cache: Cache, exact: Cache) -> list[str]:
    """KL(exact || stored) over the kept entries and the tail as one bucket, nats."""
    kls, changed, num_tokens = [], 0, 0
    for name in exact:
        want, got = exact[name], cache[name]
        p = np.exp(want.logprobs_LTK.astype(np.float64))
        q = np.exp(got.logprobs_LTK.astype(np.float64))
        tail_p, tail_q = 1 - p.sum(-1), 1 - q.sum(-1)
        same = (want.ids_LTK == got.ids_LTK).all(-1)
        kl = (p * np.log(p / q.clip(1e-30))).sum(-1) + tail_p.clip(1e-12) * np.log(
            tail_p.clip(1e-12) / tail_q.clip(1e-12)
        )
        kls.append(kl[same])
        changed += int((want.ids_LTK[..., 0] != got.ids_LTK[..., 0]).sum())
        num_tokens += want.num_tokens
    kl = np.concatenate(kls)
    return [
        "## Quantisation\n",
        f"KL(exact rows || default), {kl.size} rows with equal ids ({num_tokens} tokens): mean {kl.mean():.2e}, "
        f"p99 {np.quantile(kl, 0.99):.2e}, max {kl.max():.2e} nats; top-1 changed in {changed} rows.\n",
    ]


def speeds(parts: list[PartSamples], folder: Path) -> list[str]:
    rows = parts[0].rows
    assert rows is not None
    entries = sum(part.rows.ids_LTK.size for part in parts if part.rows is not None)
    mapped = Memmap(folder / "memmap", parts)
    base_s = best(mapped.epoch)
    raw_mb = mapped.num_bytes / 1e6
    plain_s = best(lambda: plain_write(folder / "plain", mapped.num_bytes))
    lines = [
        "## Writing and reading\n",
        f"{entries / 1e6:.0f} M entries. Token-major memmap of raw rows, shuffled samples copied out: "
        f"{raw_mb:.0f} MB in {base_s:.3f} s; plain file writing with fsync {raw_mb / plain_s:.0f} MB/s.\n",
        "| profile | MB | write M entries/s | write MB/s of raw | window epoch M entries/s | of memmap | one thread | "
        "some layers / all | random sample p50 ms | p99 ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for profile in PROFILES:
        root = folder / profile
        write_s = write_cache(root, parts, profile)
        cache = reader.open(root)
        size = sum(cache.bytes_by_array().values()) / 1e6
        epoch_s = best(lambda cache=cache: window_epoch(cache))
        single_s = best(lambda cache=cache: one_thread(cache))
        few = cache.layers[:: -(-len(cache.layers) // 3)][:3]
        share = best(lambda cache=cache, few=few: one_thread(cache, few)) / single_s
        p50, p99 = random_samples(root)
        lines.append(
            f"| {profile} | {size:.1f} | {entries / write_s / 1e6:.1f} | {raw_mb / write_s:.0f} | "
            f"{entries / epoch_s / 1e6:.0f} | **{base_s / epoch_s:.2f}** | {entries / single_s / 1e6:.0f} M/s | "
            f"{len(few)} of {len(cache.layers)}: {share:.2f} | {p50:.2f} | {p99:.2f} |"
        )
    return [*lines, ""]


class Memmap:
    """The baseline: raw rows in the order of the tokens, one file an array, read through a memory map."""

    def __init__(self, folder: Path, parts: list[PartSamples]) -> None:
        folder.mkdir()
        self.arrays = []
        self.num_bytes = 0
        lengths = [len(ids) for part in parts for ids in part.response_ids]
        self.edges = np.concatenate([[0], np.cumsum(lengths)])
        for name, _ in _raw_arrays(parts[0]):
            joined = np.concatenate([dict(_raw_arrays(part))[name] for part in parts])
            joined.tofile(folder / name)
            self.num_bytes += joined.nbytes
            self.arrays.append(np.memmap(folder / name, joined.dtype, "r", shape=joined.shape))

    def epoch(self) -> None:
        for index in np.random.default_rng(0).permutation(len(self.edges) - 1):
            span = slice(self.edges[index], self.edges[index + 1])
            for array in self.arrays:
                np.array(array[span])


def window_epoch(cache: Cache) -> None:
    for row in PartWindowReader(cache, seed=0, epoch=0):
        deliver(row)


def one_thread(cache: Cache, layers: list[int] | None = None) -> None:
    for index in cache.parts:
        part = cache.part(index, layers, keep=False, undone=True)
        for row in range(len(part)):
            deliver(part.row(row))


def deliver(row: Row) -> None:
    """What the memmap does too: contiguous arrays of one's own (a view of a mapped file is copied)."""
    np.ascontiguousarray(row.ids_LTK), np.ascontiguousarray(row.logprobs_LTK)


def random_samples(root: Path, num: int = 300) -> tuple[float, float]:
    """Milliseconds of single samples in random order, on a cache that has just been opened."""
    cache = reader.open(root)
    names = list(cache)
    times = []
    for index in np.random.default_rng(1).integers(0, len(names), num):
        began = time.perf_counter()
        row = cache[names[index]]
        np.array(row.ids_LTK), np.array(row.logprobs_LTK)
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.quantile(times, 0.5)), float(np.quantile(times, 0.99))


def plain_write(path: Path, num_bytes: int) -> None:
    block = np.random.default_rng(0).bytes(1 << 22)
    with path.open("wb") as file:
        for _ in range(max(1, num_bytes >> 22)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def best(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


OPEN_AND_LOOK = r"""
import re, sys, time
from vlsi_cache.store import reader
import pyarrow.parquet
began = time.perf_counter()
cache = reader.open(sys.argv[1])
opened = time.perf_counter() - began
names = sys.argv[2].split(",")
began = time.perf_counter()
cache[names[0]]
first = time.perf_counter() - began
began = time.perf_counter()
for name in names[1:]:
    cache[name]
later = (time.perf_counter() - began) / len(names[1:])
print(len(cache), opened, first, later, int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


def opening(num_samples: int, folder: Path) -> list[str]:
    """Caches of tiny samples, up to a million of them, each opened by a process of its own."""
    lines = [
        "## Opening\n",
        "| samples | parts | open s | first sample ms | next samples ms | peak memory MB | write us per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for num in (n for n in (1_000, 30_000, 1_000_000) if n <= num_samples):
        root = folder / f"many-{num}"
        per_part = min(num, 1000)
        shape = {"num_layers": 2, "top_k": 8, "vocab_size": 5000, "num_tail": 1, "length": 4}
        (template,) = synthetic_parts(num_parts=1, per_part=per_part, **shape)
        write_s = write_cache(root, [renamed(template, i) for i in range(num // per_part)], "default", vocab_size=5000)
        chosen = np.random.default_rng(0).integers(0, num, 20)
        names = ",".join(f"part-{i // per_part}-sample-{i % per_part}" for i in chosen)
        command = [sys.executable, "-c", OPEN_AND_LOOK, str(root), names]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        count, opened, first, later, memory = (float(x) for x in found)
        assert count == num
        lines.append(
            f"| {num:,} | {num // per_part:,} | {opened:.2f} | {1e3 * first:.1f} | {1e3 * later:.2f} | {memory:.0f} | "
            f"{1e6 * write_s / (4 * num):.1f} |"
        )
        shutil.rmtree(root)
    return [*lines, ""]


def renamed(part: PartSamples, number: int) -> PartSamples:
    names = [f"part-{number}-sample-{i}" for i in range(len(part.sample_ids))]
    return replace(part, sample_ids=names, digests=[f"{name:>64}" for name in names])


if __name__ == "__main__":
    numcodecs.blosc.set_nthreads(1)
    main()
