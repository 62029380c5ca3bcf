"""What a command does between reading the spec and its first batch: rows read, measured, found again, and prepared.

    .venv/bin/python tests/benchmarks/rows.py [--rows 200000 --pictures 1000 --workers 2] [-o results/FILE.md]

Everything is made here. Each case runs in a process of its own, for the demo's tokenizer and picture grid; seconds are
those between the loaded encoder and the samples that fit. CPU seconds are of the process and its workers: they say more
than the clock on a machine that others use.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import setting
from PIL import Image

WORDS = [f"{one}{two}" for one in ("so", "the", "of", "in", "it", "on") for two in ("", "re", "se", "n", "m")]
SIZE = (448, 336)


def write_text_rows(path: Path, num_rows: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(num_rows):
            said = [" ".join(draw.choices(WORDS, k=draw.randint(8, 24))) for _ in range(2)]
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
            file.write(json.dumps({"id": f"row-{number}", "messages": turns}) + "\n")


def write_picture_rows(folder: Path, num_rows: int, num_pictures: int) -> None:
    (folder / "images").mkdir()
    for number in range(num_pictures):
        noise = Image.effect_noise((SIZE[0] // 8, SIZE[1] // 8), 80).resize(SIZE).convert("RGB")
        noise.save(folder / "images" / f"{number}.jpg", quality=90)
    ask = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": "a picture of noise"}]
    with (folder / "pictures.jsonl").open("w") as file:
        for number in range(num_rows):
            image = f"images/{number % num_pictures}.jpg"
            file.write(json.dumps({"id": str(number), "images": [image], "messages": turns}) + "\n")


def memory_bytes(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{what}:")).split()[1])


def cpu_s() -> float:
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def measure_case(path: str, workers: int, batch: int) -> dict[str, Any]:
    """In a process of its own: seconds and memory until the samples that fit, and with `batch` until the first one."""
    import vlsi_cache
    from vlsi_cache.config.sections import DataSpec
    from vlsi_cache.data.encoder import load_encoder
    from vlsi_cache.data.measuring import fit_rows
    from vlsi_cache.data.records import read_records

    encoder = load_encoder(Path(vlsi_cache.__file__).parent / "demo" / "teacher")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    anonymous, resident = memory_bytes("RssAnon"), memory_bytes("VmRSS")
    started, spent = time.monotonic(), cpu_s()
    records = read_records(DataSpec(path=path), num_workers=workers)
    read_s = time.monotonic() - started
    kept, _ = fit_rows(records, encoder, 4096, num_workers=workers)
    found = {"read_s": read_s, "ready_s": time.monotonic() - started, "cpu_s": cpu_s() - spent}
    if batch:
        chosen = records.take(kept.index_N)
        encoder.encode_all([chosen[index] for index in range(batch)])
        found["batch_s"] = time.monotonic() - started
    found["bytes"] = (memory_bytes("RssAnon") - anonymous) / len(kept)
    found["peak"] = memory_bytes("VmHWM") - resident
    return found


def prepare_case(path: str, workers: int, seconds: float) -> dict[str, Any]:
    """Rows per second that come out of the workers, or out of this process without any, once they are ready."""
    import vlsi_cache
    from vlsi_cache.config.sections import DataSpec
    from vlsi_cache.data.encoder import load_encoder
    from vlsi_cache.data.preparing import encode_in_worker
    from vlsi_cache.data.records import read_records
    from vlsi_cache.data.sequence import PADDED
    from vlsi_cache.data.workers import Workers

    encoder = load_encoder(Path(vlsi_cache.__file__).parent / "demo" / "teacher")
    records = read_records(DataSpec(path=path))
    batches = (list(records[start : start + 8]) for start in range(0, len(records), 8))
    state = (encoder, PADDED)
    if not workers:
        stream = (encode_in_worker(state, batch) for batch in batches)
        return {"rows_per_s": _rate(stream, seconds)}
    with Workers(workers, "preparing samples", state) as several:
        return {"rows_per_s": _rate(several.map(encode_in_worker, batches), seconds, warm=2 * workers + 2)}


def _rate(stream: Any, seconds: float, warm: int = 1) -> float:
    for _ in range(warm):
        next(stream)
    started, num = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        num += len(next(stream))
    rate = num / (time.monotonic() - started)
    stream.close()
    return rate


def run_case(function: str, folder: Path, **options: Any) -> dict[str, Any]:
    code = f"import json, rows; print(json.dumps(rows.{function}(**{options!r})))"
    env = {**os.environ, "VLSI_CACHE_ROWS": str(folder / "tables"), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--picture-rows", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    lines = [
        "# From the spec to the first batch\n",
        setting(sys.argv[1:], "rows.py", torch.device("cpu"), ("torch", "transformers", "pyarrow", "pillow")),
        "| rows | command | read s | ready s | first batch s | CPU s | bytes a row | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text_rows(folder / "text.jsonl", args.rows)
        write_picture_rows(folder, args.picture_rows, args.pictures)
        cases = {
            f"{args.rows:,} of text": ("text.jsonl", 0),
            f"{args.picture_rows:,} of pictures": ("pictures.jsonl", 8),
        }
        for kind, (file, batch) in cases.items():
            for command in ("first", "second"):
                found = run_case("measure_case", folder, path=str(folder / file), workers=args.workers, batch=batch)
                lines.append(
                    f"| {kind} | {command} | {found['read_s']:.1f} | {found['ready_s']:.1f} | "
                    f"{found.get('batch_s', float('nan')):.1f} | {found['cpu_s']:.1f} | {found['bytes']:.0f} | "
                    f"{found['peak'] / 1e6:.0f} |"
                )
                print(lines[-1], flush=True)
        lines += ["", f"Preparing rows of one {SIZE[0]} x {SIZE[1]} JPEG:", "", "| workers | rows/s |", "|---|---|"]
        for workers in (0, 1, 2):
            path = str(folder / "pictures.jsonl")
            found = run_case("prepare_case", folder, path=path, workers=workers, seconds=args.seconds)
            lines.append(f"| {workers} | {found['rows_per_s']:.0f} |")
            print(lines[-1], flush=True)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
