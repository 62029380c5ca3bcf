"""Export: the last layer of a cache for DistillKit or Axolotl, or every layer as plain Parquet.

One Parquet file for each part of the cache, which appears whole or not at all; those that are there stay, and the same
command goes on. What the other tool cannot be given is listed in the file, with reasons, and counted.
Shape suffixes: L layers, T response tokens, K kept entries, S tokens of a sequence.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlsi_cache import io
from vlsi_cache.data.messages import text_of
from vlsi_cache.data.records import Record
from vlsi_cache.errors import DataError, SpecError
from vlsi_cache.progress import progress, say
from vlsi_cache.run_files import read_object
from vlsi_cache.store.derive import open_source
from vlsi_cache.store.header import data_specs
from vlsi_cache.store.part import Row
from vlsi_cache.store.reader import Cache, CachePath

from .align import conversation_ids
from .axolotl import IDS, LOGPROBS
from .distillkit import CONFIG_NAME, Compression, as_yaml, exact_compression, pack_ids
from .targets import FILL

Target = Literal["distillkit", "axolotl", "parquet"]
MANIFEST = ".vlsi-cache-export.json"  # hidden: whoever reads the folder as a data set passes it over
ABOUT_KEY = b"vlsi_cache.export"
GROUP_ROWS = 64
LISTS = pa.list_(pa.list_(pa.float32()))
DISTILLKIT = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint64())),
        ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
        ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ("labels", pa.list_(pa.int64())),
    ]
)
AXOLOTL = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        (LOGPROBS, LISTS),
        (IDS, pa.list_(pa.list_(pa.int64()))),
    ]
)
PARQUET = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("digest", pa.string()),
        ("layer", pa.int32()),
        ("response_ids", pa.list_(pa.uint32())),
        ("positions", pa.list_(pa.uint32())),
        ("ids", pa.list_(pa.list_(pa.uint32()))),
        ("logprobs", LISTS),
        ("tail_ids", pa.list_(pa.list_(pa.uint32()))),
        ("tail_mass", pa.list_(pa.float32())),
        ("entropy", pa.list_(pa.float32())),
        ("gold_logprob", pa.list_(pa.float32())),
        ("lse", LISTS),
    ]
)
SCHEMAS = {"distillkit": DISTILLKIT, "axolotl": AXOLOTL, "parquet": PARQUET}


@dataclass(frozen=True)
class Exported:
    """A folder that was written: rows of the other tool, samples that it cannot be given, and bytes."""

    path: Path
    format: str
    num_files: int
    num_rows: int
    left_out: list[dict[str, str]]
    num_bytes: int


def export_cache(
    cache: CachePath,
    out: str | os.PathLike[str],
    *,
    format: str,
    layers: Sequence[int | str] | None = None,
    tokenizer: str | None = None,
) -> Exported:
    """Write the rows of a cache into the folder `out` for another tool; run again after a crash, it goes on.

    `distillkit` and `axolotl` get the last layer, with prompts from the rows that the cache was built from, tokenised
    anew by `tokenizer` (the teacher's by default). `parquet` gets `layers`, all by default, with one row for each
    sample and layer. Raises SpecError, DataError, FingerprintMismatchError (the data has changed).
    """
    io.refuse_url(out, "out")
    source, folder = open_source(cache), Path(out)
    if format not in get_args(Target):
        raise SpecError(f"format `{format}`: what can be exported is {', '.join(get_args(Target))}")
    if format != "parquet" and layers is not None:
        raise SpecError(f"{format} has no layers, and is given the last one: leave --layers out")
    if format == "parquet" and tokenizer is not None:
        raise SpecError("--tokenizer is of prompts, and parquet is given none")
    if format != "parquet" and source.header.row_kind == "sampled":
        raise SpecError(
            f"`{source.path}` holds draws, and {format} would take their shares for the teacher's log-probs"
        )
    chosen = [source.layers[row] for row in source.header.layer_indices(layers)] if format == "parquet" else ["last"]
    facts = {"format": format, "layers": chosen, "cache_digest": source.header.digest}
    _check(folder, source, facts)
    rows_of = _maker(source, format, chosen, tokenizer)
    _begin(folder, {**facts, "cache": str(source.path)})
    if format == "distillkit":
        compression = exact_compression(source.header.vocab_size, source.header.top_k[-1])
        io.write_atomically(folder / CONFIG_NAME, as_yaml(compression))
    files = [folder / f"data-{part:06d}.parquet" for part in source.parts]
    for part, file in zip(source.parts, progress(files, "export", unit="part", delay=2), strict=True):
        if not file.exists():
            _write_part(file, source, part, chosen, SCHEMAS[format], rows_of)
    return _summary(folder, format, files)


def _check(folder: Path, source: Cache, facts: dict[str, Any]) -> None:
    """Raise SpecError unless the folder is new or empty, or this export, begun before."""
    io.check_folder(folder)
    io.check_apart(folder, source.path)
    manifest = folder / MANIFEST
    if manifest.is_file():
        found = read_object(manifest, "name a new folder with -o")
        other = [
            f"`{name}`: there {found.get(name)}, now {value}"
            for name, value in facts.items()
            if found.get(name) != value
        ]
        if other:
            raise SpecError(f"`{folder}` is another export ({'; '.join(other)}); name a new folder with -o")
    elif folder.is_dir() and os.listdir(folder):
        raise SpecError(
            f"`{folder}` is not empty and no export: it holds {sorted(os.listdir(folder))[:4]}; name a new one"
        )


def _begin(folder: Path, manifest: dict[str, Any]) -> None:
    """Claim the folder, and drop what a run that was killed has left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    io.put_all_back(folder)
    for left in folder.glob(".*.tmp-*"):
        io.remove(left)
    io.write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))


def _write_part(
    file: Path,
    source: Cache,
    part: int,
    layers: Sequence[int | str],
    schema: pa.Schema,
    rows_of: Callable[[Row], list[dict[str, Any]]],
) -> None:
    """One file from one part, a few samples at a time."""
    header, left_out = source.header, list[dict[str, str]]()
    loaded = source.part(part, layers, keep=False, undone=True)
    with io.replacing(file) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for start in range(0, len(loaded), GROUP_ROWS):
            group: list[dict[str, Any]] = []
            for index in range(start, min(start + GROUP_ROWS, len(loaded))):
                row = loaded.row(index)
                try:
                    group += rows_of(row)
                except DataError as error:
                    left_out.append({"id": row.sample_id, "reason": str(error)})
            writer.write_table(pa.Table.from_arrays([_column(group, field) for field in schema], schema=schema))
        about = {
            "cache_digest": header.digest,
            "layers": list(layers),
            "v_real": header.vocab_size,
            "taus": header.taus,
            "row_kind": header.row_kind,
            "left_out": left_out,
        }
        writer.add_key_value_metadata({ABOUT_KEY: json.dumps(about).encode()})


class Lists(NamedTuple):
    """Lists of numbers of different lengths, all numbers one behind the other."""

    values: np.ndarray
    lengths: np.ndarray


def _column(rows: list[dict[str, Any]], field: pa.Field) -> pa.Array:
    """A column of the rows; what is not a number is null. Lists of lists come as arrays, or as Lists."""
    values, kind = [row[field.name] for row in rows], field.type
    if not pa.types.is_list(kind) or pa.types.is_struct(kind.value_type):
        return pa.array(values, kind)
    if not pa.types.is_list(kind.value_type):
        return _listed(np.concatenate([*values, np.zeros(0)]), [len(one) for one in values], kind.value_type)
    lists = [one if isinstance(one, Lists) else Lists(one.reshape(-1), np.full(*one.shape)) for one in values]
    numbers = np.concatenate([*(one.values for one in lists), np.zeros(0)])
    lengths = np.concatenate([*(one.lengths for one in lists), np.zeros(0, np.int64)])
    return _of_lists(_listed(numbers, lengths, kind.value_type.value_type), [len(one.lengths) for one in lists])


def _listed(values: np.ndarray, lengths: Any, kind: pa.DataType) -> pa.Array:
    return _of_lists(pa.array(values.astype(kind.to_pandas_dtype()), kind, from_pandas=True), lengths)


def _of_lists(values: pa.Array, lengths: Any) -> pa.Array:
    return pa.ListArray.from_arrays(_offsets(lengths), values)


def _offsets(lengths: Any) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


def _summary(folder: Path, format: str, files: Sequence[Path]) -> Exported:
    left_out: list[dict[str, str]] = []
    num_rows = 0
    for file in files:
        try:
            with pq.ParquetFile(file) as found:
                num_rows += found.metadata.num_rows
                left_out += json.loads(found.metadata.metadata[ABOUT_KEY])["left_out"]
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"`{file}` is not as it was written ({type(error).__name__}: {error}); delete it and run the same "
                "command again, which writes it anew"
            ) from None
    if left_out:
        say(f"{len(left_out)} samples left out, which {format} cannot be given; the first: {left_out[0]}")
    if not num_rows:
        raise DataError(f"{folder}: no sample of the cache can be given to {format}: {left_out[0]['reason']}")
    return Exported(folder, format, len(files), num_rows, left_out, sum(file.stat().st_size for file in files))


def _maker(
    source: Cache, format: str, layers: Sequence[int | str], tokenizer: str | None
) -> Callable[[Row], list[dict[str, Any]]]:
    """What makes rows of the other tool out of a sample; it raises DataError for one that the tool cannot be given."""
    if format == "parquet":
        return lambda row: [_plain_row(row, layer, int(name)) for layer, name in enumerate(layers)]
    prompts = Prompts(source, tokenizer)
    if format == "axolotl":
        return lambda row: [axolotl_row(row, prompts)]
    compression = exact_compression(source.header.vocab_size, source.header.top_k[-1])
    return lambda row: [distillkit_row(row, prompts, compression)]


def _plain_row(row: Row, layer: int, name: int) -> dict[str, Any]:
    """One layer of a sample; where rows differ in width, its entries without padding."""
    is_entry_TK = np.isfinite(row.logprobs_LTK[layer]) if row.logprobs_LTK.shape[1] else np.zeros((0, 0), bool)
    widths_T = None if is_entry_TK.all() else is_entry_TK.sum(1)
    blocks = {"ids": row.ids_LTK[layer], "logprobs": row.logprobs_LTK[layer]}
    if widths_T is not None:
        blocks = {key: Lists(block_TK[is_entry_TK], widths_T) for key, block_TK in blocks.items()}
    return {
        "id": row.sample_id,
        "kind": row.kind,
        "digest": row.digest,
        "layer": name,
        "response_ids": row.response_ids_R,
        "positions": row.positions_T,
        **blocks,
        "tail_ids": row.tail_ids_LTm[layer],
        "tail_mass": row.tail_mass_LT[layer],
        "entropy": row.entropy_LT[layer],
        "gold_logprob": row.gold_logprob_LT[layer],
        "lse": row.lse_LTn[layer],
    }


class Prompts:
    """The rows that a cache was built from, tokenised again and held against its response ids."""

    def __init__(self, source: Cache, tokenizer: str | None) -> None:
        from vlsi_cache.models.load import ModelRef, resolve_model
        from vlsi_cache.train.fitting import tokenizer_difference
        from vlsi_cache.train.loader import match_records
        from vlsi_cache.train.student import cached_sources

        if "data" not in source.header.spec:
            raise SpecError(f"`{source.path}` does not say which rows it is of, and prompts are made from them")
        self.vocab_size = source.header.vocab_size
        teacher = source.header.spec.get("teacher") or {}
        name = tokenizer or str(teacher.get("model"))
        revision, gguf_file = (None, None) if tokenizer else (teacher.get("revision"), teacher.get("gguf_file"))
        encodings = [section.encoding() for section in data_specs(source.header, source.path)]
        self.encoder = ModelRef(resolve_model(name), revision, gguf_file).encoder(encodings[0])
        if difference := tokenizer_difference(source.header, self.encoder):
            advice = "leave --tokenizer out, or name" if tokenizer else "name the one that it was, with --tokenizer"
            raise SpecError(
                f"the tokenizer of `{name}` is not the one of `{source.path}`: {difference}. The rows that are written "
                f"are over the ids of the cache; {advice} a folder or hub id with the teacher's own tokenizer"
            )
        self._records = match_records(source, cached_sources(source))

    def of(self, row: Row) -> tuple[Record, np.ndarray, int]:
        """The record of a sample, all its tokens int64 [S], and how many are its prompt; raises DataError."""
        from vlsi_cache.train.loader import check_response_ids

        record = self._records[row.sample_id]
        if record.images:
            raise DataError(f"it has {len(record.images)} pictures")
        if row.num_tokens < len(row.response_ids_R):
            raise DataError(f"only {row.num_tokens} of its {len(row.response_ids_R)} response tokens have rows")
        ((token_ids, num_prompt),) = self.encoder.token_ids([record])
        check_response_ids(record, token_ids[num_prompt:], row, self.encoder)
        return record, token_ids, num_prompt


def distillkit_row(row: Row, prompts: Prompts, compression: Compression) -> dict[str, Any]:
    """A sequence without its last token, as DistillKit's own packing has them, and a row for each token.

    DistillKit compares where a label is: `labels` are the tokens from the last one of the prompt on, which have rows
    of the teacher. Prompt tokens before have flat rows, which no label asks for.
    """
    _, token_ids, num_prompt = prompts.of(row)
    first, ids_SK, logprobs_SK = num_prompt - 1, *_whole(row, num_prompt - 1, 0, prompts.vocab_size)
    labels = np.where(np.arange(len(token_ids) - 1) < first, -100, token_ids[:-1])
    packed_SB = np.ascontiguousarray(logprobs_SK.astype("<f4")).view(np.uint8)
    return {
        "input_ids": token_ids[:-1],
        "compressed_logprobs": packed_SB.reshape(len(labels), -1),
        "bytepacked_indices": pack_ids(ids_SK, compression.index_bits),
        "labels": labels,
    }


def axolotl_row(row: Row, prompts: Prompts) -> dict[str, Any]:
    """The messages up to the response, and rows for its tokens; the last one is about the last token of all.

    What the chat template writes behind the response has flat rows: such tokens have no label there.
    """
    record, token_ids, _ = prompts.of(row)
    plain = {"role", "content"}
    if other := sorted({key for message in record.messages for key in message} - plain):
        raise DataError(f"its messages have {', '.join(f'`{key}`' for key in other)}")
    if record.tools or record.template_args:
        raise DataError("it has tools or arguments for the chat template")
    whole = conversation_ids(prompts.encoder, record)
    if whole[: len(token_ids)] != token_ids.tolist():
        raise DataError("its tokens are not what the chat template makes of the whole conversation")
    ids_SK, logprobs_SK = _whole(row, 0, len(whole) - len(token_ids), prompts.vocab_size)
    messages = [{"role": message["role"], "content": text_of(message)} for message in record.messages]
    return {"id": row.sample_id, "messages": messages, LOGPROBS: logprobs_SK, IDS: ids_SK}


def _whole(row: Row, num_before: int, num_after: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs [S, K] of the rows, with flat ones before and after; FILL where there is no entry."""
    ids_TK, logprobs_TK = row.ids_LTK[-1].astype(np.int64), row.logprobs_LTK[-1].astype(np.float32)
    width = ids_TK.shape[1]
    flat_ids, flat = np.arange(width), np.full(width, -math.log(vocab_size), np.float32)
    ids = [np.tile(flat_ids, (num_before, 1)), ids_TK, np.tile(flat_ids, (num_after, 1))]
    logprobs = [np.tile(flat, (num_before, 1)), np.maximum(logprobs_TK, FILL), np.tile(flat, (num_after, 1))]
    return np.concatenate(ids), np.concatenate(logprobs).astype(np.float32)
