"""Several processes, many rows, data that grows, and what the paper's setting costs on paper.

    .venv/bin/python tests/benchmarks/scale.py [--case ranks sync rows paper] [--rows 1000000] [-o results/FILE.md]

`ranks`: a random student of SmolLM2's width (12 layers) trains as one process and as two under torchrun, each with one
thread, in turns; a speed is the median of a stage's steps but the first. `sync`: a cache follows its data, which has
grown by a tenth, against a build of all of it. `rows`: a tiny teacher builds a cache of many short rows as two
processes: speed and memory over time, the same command again, and a student's wait for rows. `paper`: `plan` over rows
with the sizes of the paper's, for Qwen2-VL-72B, from its configuration alone. All commands are run as a user would.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from data import save_teacher
from measuring import Report, setting

import vlsi_cache as vc
from vlsi_cache.run_files import read_metrics

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
COMMAND = [sys.executable, "-m", "vlsi_cache_cli"]


def torchrun(num_processes: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(num_processes),
        "-m",
        "vlsi_cache_cli",
    ]


def run(command: Sequence[str | Path], **environment: str) -> float:
    """Seconds of a command; raises with what it has said."""
    started = time.monotonic()
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **ENVIRONMENT, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return time.monotonic() - started


def write_spec(folder: Path, name: str, **sections: Any) -> Path:
    spec = {
        "name": name,
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "layers": [1, 2]},
        "data": {"path": f"{name}.jsonl"},
        "run": {"device": "cpu"},
        **sections,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(spec))
    return path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- processes of one launch ------------------------------------------------------------------------------------------


def ranks_case(report: Report, folder: Path, *, steps: int, hidden: int, num_layers: int) -> None:
    save_teacher(folder / "teacher", num_layers=3, hidden=hidden)
    save_teacher(folder / "student", num_layers=num_layers, hidden=hidden)
    write_rows(folder / "ranks.jsonl", documents(64))
    spec = write_spec(folder, "ranks", store={"profile": "exact", "part_mib": 4})
    run([*COMMAND, "build-teacher", spec, "-o", folder / "cache"])
    changes = {
        "batch_size": 8,
        "micro_batch_size": 2,
        "num_layers": 2,
        "verbalize.steps": 1,
        "interact.schedule.steps": steps,
        "sft.schedule.steps": steps,
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"distill.{key}={value}")]
    engines = {"1": (COMMAND, "ddp"), "2, ddp": (torchrun(2), "ddp"), "2, fsdp": (torchrun(2), "fsdp")}
    speeds: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    memory: dict[str, float] = {}
    for turn in range(2):
        for name, (command, parallel) in engines.items():
            out = folder / f"run-{turn}-{command[2]}-{parallel}"
            more = ["--set", f"run.parallel={parallel}"]
            run([*command, "distill", folder / "cache", "--student", folder / "student", "-o", out, *sets, *more])
            for line in read_metrics(out / "metrics.jsonl"):
                if line["step"] > 1:
                    speeds[name].setdefault(line["stage"], []).append(line["tokens_per_s"])
                    memory[name] = max(memory.get(name, 0.0), line["memory_gib"])
    report.say("\n## Two processes against one\n\nTokens a second of the whole batch, against one process.\n")
    report.table("processes", "interact", "sft", "peak memory of a process, GiB")
    base = {stage: statistics.median(found) for stage, found in speeds["1"].items()}
    for name, by_stage in speeds.items():
        shown = [f"{statistics.median(by_stage[stage]) / base[stage]:.2f}" for stage in ("interact", "sft")]
        report.row(name, *shown, f"{memory[name]:.2f}")


def documents(num_rows: int) -> list[dict[str, Any]]:
    """Rows of about 130 tokens, three fifths of them prompt."""
    draw = random.Random(0)
    rows = []
    for number in range(num_rows):
        length = min(400, max(30, int(draw.lognormvariate(4.6, 0.45))))
        said = [" ".join(f"w{draw.randrange(40_000)}" for _ in range(share * length // 5)) for share in (3, 2)]
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
        rows.append({"id": f"r{number}", "messages": turns})
    return rows


# --- data that grows --------------------------------------------------------------------------------------------------


def sync_case(report: Report, folder: Path, *, num_rows: int, hidden: int) -> None:
    save_teacher(folder / "teacher", num_layers=8, hidden=hidden)
    rows = documents(num_rows)
    spec = write_spec(folder, "sync", store={"part_mib": 0.5})
    write_rows(folder / "sync.jsonl", rows[: num_rows * 10 // 11])
    run([*COMMAND, "build-teacher", spec, "-o", folder / "grown"])
    write_rows(folder / "sync.jsonl", rows)
    start_s = run([*COMMAND, "plan", spec])  # imports, rows, tokenizer: what both pay
    sync_s = run([*COMMAND, "build-teacher", spec, "-o", folder / "grown", "--sync"])
    whole_s = run([*COMMAND, "build-teacher", spec, "-o", folder / "whole"])
    found = vc.diff(folder / "grown", folder / "whole", samples=num_rows)
    worst = max(layer.mean_kl for layer in found.layers)
    assert [found.only_a, found.only_b, found.other_responses, found.fingerprint] == [[], [], [], {}]
    report.say("\n## Data that has grown by a tenth\n")
    report.table("", "of a whole build")
    report.row("sync, whole command", f"{sync_s / whole_s:.3f}")
    report.row(
        "the same without what every command pays (start, reading rows)",
        f"{(sync_s - start_s) / (whole_s - start_s):.3f}",
    )
    report.say(f"\n{num_rows} rows; the rows of both caches differ by {worst:.2g} nats at most, mean of a layer.")


# --- many rows --------------------------------------------------------------------------------------------------------


def rows_case(report: Report, folder: Path, *, num_rows: int, batch_size: int) -> None:
    save_teacher(folder / "teacher", num_layers=2, hidden=64, vocab_size=1_024)
    write_short_rows(folder / "rows.jsonl", num_rows)
    teacher = {"model": str(folder / "teacher"), "dtype": "float32", "layers": [1]}
    store = {"part_mib": 1 if num_rows > 10_000 else 0.01}
    spec = write_spec(folder, "rows", teacher=teacher, rows={"top_k": 8, "tail_samples": 2}, store=store)
    many, kept = folder / "many", {"VLSI_CACHE_ROWS": str(folder / "tables")}
    first_s = run([*COMMAND, "plan", spec], **kept)
    build = watched_build(spec, many, kept)
    again_s = run([*COMMAND, "build-teacher", spec, "-o", many], **kept)
    looks = {name: run([*COMMAND, name, where], **kept) for name, where in (("inspect", many), ("ls", folder))}
    looks["verify"] = run([*COMMAND, "verify", many], **kept)
    sets = {"recipe": "last", "batch_size": batch_size, "micro_batch_size": batch_size, "sft.schedule.steps": 1}
    words = [word for key, value in sets.items() for word in ("--set", f"distill.{key}={value}")]
    student = ["--student", folder / "teacher", "-o", folder / "run"]
    epoch_s = run([*COMMAND, "distill", many, *student, *words], **kept)
    lines = [line for line in read_metrics(folder / "run" / "metrics.jsonl") if line["stage"] == "interact"]
    waits = [line["data_wait_pct"] for line in lines[1:]]
    report.say(f"\n## {num_rows:,} short rows, {len(build)} of the build's parts\n")
    report.table("what", "found")
    report.row("first command over them (`plan`), s", f"{first_s:.1f}")
    report.row(
        "build by two processes, s (rows a second)", f"{build[-1].seconds:.1f} ({num_rows / build[-1].seconds:,.0f})"
    )
    report.row("speed of the last tenth of the parts, of the first tenth", f"{slowing(build, 'seconds'):.3f}")
    report.row("the same by CPU time of both processes", f"{slowing(build, 'cpu_s'):.3f}")
    tenth, rest = build[len(build) // 10], build[len(build) // 10 :]
    report.row(
        "peak memory of a process afterwards, of that after a tenth",
        f"{max(b.memory for b in rest) / tenth.memory:.3f}",
    )
    report.row("the build's command again, s", f"{again_s:.1f}")
    report.row("inspect, ls, verify, s", ", ".join(f"{seconds:.1f}" for seconds in looks.values()))
    report.row("an epoch of a student, s (steps)", f"{epoch_s:.0f} ({len(lines)})")
    report.row("of its steps, waiting for rows, mean, %", f"{statistics.mean(waits):.2f}")


def write_short_rows(path: Path, num_rows: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(num_rows):
            said = [" ".join(f"w{draw.randrange(1_000)}" for _ in range(draw.randint(2, 6))) for _ in range(2)]
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
            file.write(json.dumps({"id": f"r{number}", "messages": turns}) + "\n")


class Seen(NamedTuple):
    """A build when one more part was there: seconds and CPU seconds so far, bytes of its largest process."""

    seconds: float
    cpu_s: float
    memory: int


def slowing(build: Sequence[Seen], clock: str) -> float:
    """How fast the last tenth of the parts came, of how fast the first tenth did."""
    times = [getattr(seen, clock) for seen in build]
    tenth = max(1, len(times) // 10)
    return (times[tenth] - times[0]) / (times[-1] - times[-1 - tenth])


def watched_build(spec: Path, out: Path, kept: dict[str, str]) -> list[Seen]:
    """A build by two processes. The clocks of one that has ended stand still, so its last parts are of the other."""
    command = [*COMMAND, "build-teacher", str(spec), "-o", str(out), "--world", "2"]
    environment = {**os.environ, **ENVIRONMENT, **kept}
    seen: list[Seen] = []
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        processes = [
            subprocess.Popen([*command, "--rank", str(rank)], env=environment, stdout=said, stderr=said)
            for rank in range(2)
        ]
        while all(one.poll() is None for one in processes):  # both, for the one that ends later is alone
            num_parts = len(list((out / "parts").glob("*/part.json")))
            uses = [usage(one.pid) for one in processes]
            now = Seen(time.monotonic() - started, sum(cpu_s for cpu_s, _ in uses), max(size for _, size in uses))
            seen += [now] * (num_parts - len(seen))
            time.sleep(0.05)
        for one in processes:
            assert one.wait() == 0, said.seek(0) or said.read()[-2000:]
    return seen


def usage(pid: int) -> tuple[float, int]:
    """CPU seconds and resident bytes of a process; zeros of one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


# --- on paper ---------------------------------------------------------------------------------------------------------

PAPER_ROWS, RESPONSE_TOKENS, PROMPT_TOKENS = 2_900_000, 200, 60
PICTURE = (672, 504)
STUDENT_PARAMETERS = 2.2e9
REQUESTS_PER_PART = 12  # as remote.py has counted
PART_BYTES = 40e6  # of a part of 64 MiB, compressed: assumed


def paper_case(report: Report, folder: Path) -> None:
    """The paper's 2.9 M rows, from a few rows of the sizes that are assumed of all."""
    from PIL import Image
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLImageProcessor

    teacher, num_rows = folder / "qwen2-vl-72b", 8
    text = {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152_064,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 8192, "num_heads": 16, "patch_size": 14}
    demo = Path(vc.__file__).parent / "demo" / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(demo)
    ids = {"image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>")}
    Qwen2VLConfig(text_config=text, vision_config=vision, dtype="bfloat16", **ids).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    Qwen2VLImageProcessor.from_pretrained(
        demo, patch_size=14, size={"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}
    ).save_pretrained(teacher)
    Image.new("RGB", PICTURE).save(folder / "picture.png")
    word = next(text for text in (" the", " it", "a") if len(tokenizer.encode(text, add_special_tokens=False)) == 1)
    ask = [{"type": "image"}, {"type": "text", "text": word * PROMPT_TOKENS}]
    turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": word * (RESPONSE_TOKENS - 1)}]
    write_rows(
        folder / "paper.jsonl", [{"id": str(n), "images": ["picture.png"], "messages": turns} for n in range(num_rows)]
    )
    sections = {"teacher": {"model": str(teacher), "dtype": "bfloat16", "num_layers": 20}}
    plan = vc.plan(vc.load_spec(write_spec(folder, "paper", rows={"top_k": 64, "tail_samples": 4}, **sections)))
    times = PAPER_ROWS / num_rows
    hours, num_bytes = plan.hours * times, plan.total_bytes * times
    num_tokens = (plan.num_prompt_tokens + plan.num_response_tokens) * times
    student_hours = 6 * STUDENT_PARAMETERS * num_tokens / (plan.utilisation * plan.peak_tflops * 1e12) / 3600
    requests = REQUESTS_PER_PART * num_bytes / PART_BYTES  # every node reads all parts, once for its 8 processes
    report.say("\n## The paper's setting, on paper\n")
    report.say(
        f"{PAPER_ROWS:,} rows of one picture ({PICTURE[0]} x {PICTURE[1]}), {plan.num_prompt_tokens // num_rows} "
        f"prompt and {plan.num_response_tokens // num_rows} response tokens; {len(plan.layers)} layers of Qwen2-VL-72B "
        f"({plan.teacher_parameters / 1e9:.1f} B parameters), k {plan.top_k[0]}; a student of "
        f"{STUDENT_PARAMETERS / 1e9:.1f} B at 6 FLOP a parameter and token; {100 * plan.utilisation:.0f} % of the peak "
        f"of a {plan.gpu}, nodes of 8. Sizes are `plan`'s; nothing of this has run.\n"
    )
    report.table("", "8 GPUs", "64 GPUs")
    report.row("teacher's pass, hours", *(f"{hours / number:.2g}" for number in (8, 64)))
    report.row(
        "cache, TB (hidden states)", *[f"{num_bytes / 1e12:.2f} ({plan.hidden_state_bytes * times / 1e12:.0f})"] * 2
    )
    report.row("written by a node, MB/s", *[f"{num_bytes / 1e6 / (3600 * hours / 8):.0f}"] * 2)
    report.row("an epoch of the student, hours", *(f"{student_hours / number:.2g}" for number in (8, 64)))
    report.row(
        "read by a node, MB/s", *[f"{num_bytes / 1e6 / (3600 * student_hours / number):.0f}" for number in (8, 64)]
    )
    report.row("requests of a node in an epoch, millions", *[f"{requests / 1e6:.2f}"] * 2)


CASES = ("ranks", "sync", "rows", "paper")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to see that all of it runs")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args(arguments)
    report = Report("Several processes and many rows")
    report.say(
        setting(
            sys.argv[1:] if arguments is None else arguments, "scale.py", torch.device("cpu"), ("torch", "transformers")
        )
    )
    for case in args.case:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if case == "ranks":
                sizes = (
                    {"steps": 2, "hidden": 64, "num_layers": 4}
                    if args.tiny
                    else {"steps": 5, "hidden": 576, "num_layers": 12}
                )
                ranks_case(report, folder, **sizes)
            elif case == "sync":
                sync_case(report, folder, num_rows=44 if args.tiny else 1100, hidden=64 if args.tiny else 256)
            elif case == "rows":
                rows_case(report, folder, num_rows=400 if args.tiny else args.rows, batch_size=16 if args.tiny else 256)
            else:
                paper_case(report, folder)
    if args.out:
        report.write(args.out)


if __name__ == "__main__":
    main()
