"""Commands that read the files of other tools as a cache, and write a cache for them: import, export."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vlsi_cache.config.layers import parse_layers
from vlsi_cache.progress import human_bytes

from .output import Answer, CachePath


def import_files(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="File or folder of the other tool.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="CACHE", help="Where the cache goes: a folder or a URL.")],
    format: Annotated[str, typer.Option(metavar="F", help="distillkit, axolotl or vllm (prompt_logprobs).")],
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", "--model", metavar="ID", help="Folder or hub id with the teacher's tokenizer."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="ROWS", help="Chat rows the teacher was given; axolotl: SOURCE itself.")
    ] = None,
    compression: Annotated[
        Path | None, typer.Option(metavar="FILE", help="distillkit: compression_config.yaml, if not in SOURCE.")
    ] = None,
    logprobs_field: Annotated[str, typer.Option(metavar="NAME", help="axolotl: the column of log-probs.")] = "logprobs",
    profile: Annotated[str, typer.Option(metavar="P", help="Store values as: default, exact or fast.")] = "default",
) -> Answer:
    """Read another tool's log-probs as a cache.

    DistillKit's captures, Axolotl's (TRL's) top-k data sets, vLLM's prompt_logprobs as JSONL: a cache of one layer, the
    last, for `distill --recipe last`. What the files do not say is recorded as not known. Run again after a crash to go
    on.
    """
    import vlsi_cache as vc

    cache = vc.import_cache(
        source,
        out,
        format=format,
        tokenizer=tokenizer,
        data=data,
        compression=compression,
        logprobs_field=logprobs_field,
        profile=profile,
    )
    facts = {
        "path": str(cache.path),
        "num_samples": cache.num_samples,
        "num_tokens": cache.num_tokens,
        "lacks": list(cache.header.lacks),
        "left_out": cache.header.skipped,
        "bytes": sum(cache.bytes_by_array().values()),
    }
    text = f"cache: {out} ({cache.num_samples} samples, {cache.num_tokens} rows, {human_bytes(facts['bytes'])})"
    return Answer(facts, text)


def export(
    cache: CachePath,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the files go.")],
    format: Annotated[str, typer.Option(metavar="F", help="distillkit, axolotl or parquet.")],
    layers: Annotated[str | None, typer.Option(metavar="LIST", help="parquet: only these, e.g. 2-6,18,last.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Folder or hub id that makes prompts; default: the cache's teacher."),
    ] = None,
) -> Answer:
    """Write a cache for another tool.

    distillkit and axolotl get the last layer, parquet every one, with a row for each sample and layer. Run again after
    a crash to go on.
    """
    import vlsi_cache as vc

    chosen = None if layers is None else parse_layers(layers)
    done = vc.export_cache(cache, out, format=format, layers=chosen, tokenizer=tokenizer)
    left = f", {len(done.left_out)} samples left out" if done.left_out else ""
    return Answer(asdict(done), f"{done.format}: {out} ({done.num_rows} rows{left}; {human_bytes(done.num_bytes)})")


COMMANDS = (  # name, function, example
    (
        "import",
        import_files,
        "import FOLDER -o caches/theirs --format distillkit --tokenizer Qwen/Qwen3-8B --data ROWS",
    ),
    ("export", export, "export caches/demo -o theirs --format axolotl"),
)
