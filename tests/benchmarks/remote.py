"""A cache on an object store over a slow link: requests, bytes, and how long training waits for rows.

    .venv/bin/python tests/benchmarks/remote.py [--delay 0.05 --parts 1000] [-o results/FILE.md]

A moto server on loopback, and a proxy in front of it that holds every request for `--delay` seconds. A step of a
student is a sleep of 50 ms a sample: what counts is whether rows are there when it ends. Waiting is a share of the time
after the first window; bytes are a share of the cache's. With TMPDIR=/dev/shm no disk is in it.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measuring import setting

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.caches import build, file_bytes, make_case
from helpers.s3 import ENVIRONMENT, Proxy, make_bucket, proxied, serving

import vlsi_cache as vc
from vlsi_cache.store.location import UrlPath, place_of
from vlsi_cache.store.remote.objects import open_objects

NUM_LAYERS, SAMPLES_PER_PART, STEP_S, WINDOW = 8, 8, 0.05, 4


def epoch_case(root: Path, proxy: Proxy, delay_s: float, layers: list[int | str] | None) -> str:
    """One epoch with an empty part cache, and what a second one still asks for."""
    total = sum(map(len, file_bytes(root).values()))
    proxy.clear()
    proxy.delay_s = delay_s
    cache = vc.open_cache("s3://bucket/epoch")
    reader = vc.PartWindowReader(cache, layers=layers, seed=0, epoch=0, window_parts=WINDOW)
    first_wait = first_end = 0.0
    for number, _ in enumerate(reader):
        if number == WINDOW * SAMPLES_PER_PART - 1:
            first_wait, first_end = reader.wait_s, time.perf_counter()
        time.sleep(STEP_S)
    share = (reader.wait_s - first_wait) / (time.perf_counter() - first_end)
    read, num_requests = proxy.received_bytes / total, len(proxy.requests)
    proxy.clear()
    for _ in vc.PartWindowReader(vc.open_cache("s3://bucket/epoch"), layers=layers, seed=0, epoch=1):
        pass
    shown = "all" if layers is None else "the last"
    return (
        f"| {shown} of {NUM_LAYERS} | {num_requests} | {read:.3f} | {first_wait:.2f} | {share:.4f} | "
        f"{len(proxy.requests)} | {proxy.received_bytes / total:.5f} |"
    )


def inspect_case(root: Path, proxy: Proxy, delay_s: float, num_parts: int) -> str:
    """`inspect` with an empty part cache; only what it can ask for is on the store."""
    objects_at = place_of(f"s3://bucket/inspect-{num_parts}")
    assert isinstance(objects_at, UrlPath)
    objects = open_objects(objects_at)
    names = [path.relative_to(root).as_posix() for path in root.glob("parts/*/part.json")]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: objects.put(name, root / name), ["cache.json", "samples.parquet", *names]))
    proxy.clear()
    proxy.delay_s = delay_s
    began = time.perf_counter()
    vc.inspect(str(objects_at))
    return f"| {num_parts:,} | {len(proxy.requests)} | {time.perf_counter() - began:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--parts", type=int, default=1000)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    lines = ["# A cache on an object store\n"]
    lines.append(setting(sys.argv[1:], "remote.py", torch.device("cpu"), ("obstore", "moto")))
    with tempfile.TemporaryDirectory() as name, serving() as port, proxied(port) as proxy:
        folder = Path(name)
        os.environ |= {**ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.endpoint, "VLSI_CACHE_DIR": str(folder / "cache")}
        make_bucket(port, "bucket")
        ids = [f"sample-{i}" for i in range(16 * SAMPLES_PER_PART)]
        lengths = [[100] * SAMPLES_PER_PART] * 16
        root = build(folder / "epoch", make_case(lengths, ids, num_layers=NUM_LAYERS, top_k=64, vocab_size=5000))
        vc.push(root, "s3://bucket/epoch")
        lines += ["| layers | requests | bytes read | first wait s | later waiting | again: requests | bytes |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for layers in (["last"], None):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            lines.append(epoch_case(root, proxy, args.delay, layers))
        lines += ["", "| parts | requests of inspect | s |", "|---|---|---|"]
        for num_parts in (10, args.parts):
            ids = [f"sample-{i}" for i in range(num_parts)]
            small = build(folder / f"{num_parts}", make_case([[2]] * num_parts, ids, num_layers=2, top_k=3))
            lines.append(inspect_case(small, proxy, args.delay, num_parts))
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
