"""What a cache is: origin, progress, and where its bytes go. Reads indices and records, no rows.

Shape suffixes: L layers, T response tokens with a row.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.errors import CacheCorruptError, command_line
from vlsi_cache.progress import human_bytes
from vlsi_cache.store.arrays import BYTES_ARRAY, array_specs, data_file_name, layered_names, part_specs
from vlsi_cache.store.codec import layer_bytes, read_layered
from vlsi_cache.store.files import check_part_files, list_tmp, load_part_record
from vlsi_cache.store.format import CacheHeader, PartRecord, part_dir
from vlsi_cache.store.location import place_of
from vlsi_cache.store.reader import Cache, CachePath, open, surprise_of, surprise_warning
from vlsi_cache.store.remote.fetch import Want
from vlsi_cache.store.vocab_order import has_pieces

from .layers import spaced
from .text import layer_names, render, short, table

MEASURED_PARTS = 4  # parts whose shard indices are read: their layers are alike, and each costs a dozen open files
FIRST = 5  # samples that are named


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found: JSON-ready `facts`; `str` is the text for people."""

    facts: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    def as_dict(self) -> dict[str, Any]:
        return self.facts

    def __str__(self) -> str:
        return description_text(self.facts)


def inspect(cache: CachePath) -> Inspection:
    """What a cache is: origin, progress, layers, bytes. Reads records and indices, no rows.

    Raises what opening a cache raises, but not for one that is unfinished.
    """
    return Inspection(describe_cache(cache.path if isinstance(cache, Cache) else place_of(cache)))


def describe_cache(path: Path) -> dict[str, Any]:
    """JSON-ready facts about a cache, finished or not. Raises what opening a cache raises."""
    cache = open(path, allow_incomplete=True)
    header, surprise = cache.header, surprise_of(cache)
    done = set(cache.parts)
    dead, alive = list_tmp(path)

    def of_header(*names: str) -> dict[str, Any]:
        return {name: getattr(header, name) for name in names}

    return {
        "path": str(path),
        **of_header("created_by", "format_version", "contract", "digest"),
        "complete": cache.is_complete,
        "parts_done": len(done),
        "num_parts": header.num_parts,
        "missing_parts": [index for index in range(header.num_parts) if index not in done],
        "tmp": {"abandoned": dead, "perhaps_alive": alive},
        "num_samples": cache.num_samples,
        "planned_samples": header.num_samples,
        "num_tokens": cache.num_tokens,
        "num_response_tokens": _sum(cache, "num_response_tokens"),
        "planned_response_tokens": header.num_response_tokens,
        "lacks": list(header.lacks),
        **of_header("layers", "num_model_layers", "row_kind", "truncated", "top_k", "tail_samples", "taus", "profile"),
        "v_real": header.vocab_size,
        "token_texts": header.text_xxh3 is not None,
        "token_bytes": has_pieces(header),
        "parts_with_byte_offsets": len(cache.parts_with(BYTES_ARRAY)),
        "select_tokens": (header.spec.get("rows") or {}).get("select_tokens"),
        **_bytes(cache),
        "first_ids": [sample_id for sample_id, _ in zip(cache, range(FIRST), strict=False)],
        "skipped": header.skipped,
        "skipped_by_reason": reasons(header.skipped),
        "responses": header.responses,
        "last_layer": None if surprise is None else {"gold_nll": surprise.gold_nll, "entropy": surprise.entropy},
        "warning": surprise_warning(cache),
        **of_header("parents", "fingerprint", "spec"),
    }


def reasons(skipped: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How often each reason occurs, the most frequent first; numbers and names in it do not tell reasons apart."""
    kinds = (re.sub(r"`[^`]*`|\d+", "..", str(one.get("reason", ""))) for one in skipped)
    return dict(Counter(kinds).most_common())


def _sum(cache: Cache, column: str) -> int:
    return int(cache.sample_table()[column].to_numpy().sum())


def _bytes(cache: Cache) -> dict[str, Any]:
    """Bytes per array of all parts, exact, and per layer as the measured parts have them."""
    stored, measured = cache.bytes_by_array(), spaced(cache.parts, MEASURED_PARTS)
    sizes, num_tokens, num_entries = _measure(cache, measured)
    by_layer = []
    for index, layer in enumerate(cache.layers):
        of_layer = {name: float(size_L[index]) for name, size_L in sizes.items()}
        total = sum(of_layer.values())
        by_layer.append(
            {
                "layer": layer,
                "top_k": cache.header.top_k[index],
                "bytes": round(total * cache.num_tokens / num_tokens),
                "bytes_per_token": total / num_tokens,
                "by_array": {name: size / num_tokens for name, size in of_layer.items()},
            }
        )
    return {
        "size_bytes": stored,
        "vocab_bytes": _vocab_bytes(cache),
        "bytes_per_layer_token": cache.bytes_per_layer_token(),
        "bytes_per_token": sum(stored.values()) / max(1, cache.num_tokens),
        "bytes_per_response_token": sum(stored.values()) / max(1, _sum(cache, "num_response_tokens")),
        "raw_bytes": _raw_bytes(cache, num_entries / num_tokens),
        "measured_parts": measured,
        "layer_bytes": by_layer,
    }


def _vocab_bytes(cache: Cache) -> int:
    if cache.header.vocab_files:
        return sum(file.size for file in cache.header.vocab_files.values())
    return sum(file.lstat().st_size for file in (cache.path / "vocab").rglob("*") if file.is_file())


def _measure(cache: Cache, parts: Sequence[int]) -> tuple[dict[str, np.ndarray], int, int]:
    """(bytes [L] of every layered array, response tokens, 1 at least, entries) of these parts."""
    header, names = cache.header, layered_names(cache.header)
    sizes = {name: np.zeros(len(header.layers)) for name in names}
    num_tokens = num_entries = 0
    for part in parts:
        want = Want(names=names)  # their indices, and nothing of the layers
        record, found = cache.read_files(part, lambda root, part=part: _measured_part(root, header, part), want)
        for name, size_L in found.items():
            sizes[name] += size_L
        num_tokens += record.num_tokens
        num_entries += record.num_entries
    return sizes, max(1, num_tokens), num_entries


def _measured_part(root: Path, header: CacheHeader, part: int) -> tuple[PartRecord, dict[str, np.ndarray]]:
    """The record of a part, and the bytes [L] of its layered arrays."""
    record, folder = load_part_record(root, header, part), part_dir(root, part)
    check_part_files(root, part, record)
    specs, entries_L, sizes = part_specs(header, record), np.zeros(len(header.layers)), {}
    if header.is_ragged:
        kept_LT = read_layered(folder, specs, ["kept"], range(len(header.layers)))["kept"]
        entries_L = kept_LT.sum(1, dtype=np.int64)
    for name in layered_names(header):
        if not specs[name].size_bytes:
            continue
        file = folder / data_file_name(name, specs[name])
        try:
            sizes[name] = layer_bytes(file, specs[name], entries_L)
        except ValueError as error:
            raise CacheCorruptError(f"`{file}`: {error}; run: {command_line('verify', root)}") from error
    return record, sizes


def _raw_bytes(cache: Cache, entries_per_token: float) -> dict[str, int]:
    """Bytes of every array before compression; where rows are cut by mass, after the measured parts."""
    header, samples = cache.header, cache.sample_table()
    num_tokens = cache.num_tokens
    per_token = entries_per_token if header.truncated else sum(header.top_k)
    specs = array_specs(
        header,
        num_samples=len(samples) + len(cache.parts) - 1,  # every part has one offset more than samples
        num_tokens=num_tokens,
        num_response=_sum(cache, "num_response_tokens"),
        num_entries=round(per_token * num_tokens),
    )
    return {name: spec.size_bytes for name, spec in specs.items()}


def description_text(facts: dict[str, Any]) -> str:
    """The facts for people; how they look stands in templates/inspect.txt."""
    return render(
        "inspect.txt",
        **facts,
        rows=rows_text(facts),
        origins=[response_text(origin) for origin in facts["responses"]],
        arrays=_array_table(facts),
        layer_table=_layer_table(facts),
        ancestors=[_parent_text(parent) for parent in lineage(facts["parents"])],
    )


def response_text(origin: Mapping[str, Any]) -> str:
    """Who generated some of the responses and how, in a line."""
    if not origin:
        return "of unknown origin"
    settings, counts = origin.get("settings") or {}, origin.get("counts") or {}
    how = ", ".join(f"{name} {settings[name]}" for name in ("temperature", "top_p", "seed") if name in settings)
    kept = (
        f"; {counts['written']:,} of {counts['generated']:,} kept" if {"written", "generated"} <= counts.keys() else ""
    )
    return f"generated by {origin.get('model')} ({str(origin.get('weights'))[:20]}; {how}{kept})"


def rows_text(facts: dict[str, Any]) -> str:
    """What a row is, in a few words."""
    k = facts["top_k"]
    widths = str(k[0]) if len(set(k)) == 1 else f"{min(k)} to {max(k)}"
    if facts["row_kind"] == "sampled":
        what = f"{widths} draws"
    elif facts["truncated"]:
        what = f"{'' if facts['lacks'] else 'top-p, '}at most {widths} words"
    else:
        what = f"top-{widths} words"
    tails = "" if facts["row_kind"] == "sampled" else f", {facts['tail_samples']} tail samples"
    texts = "with" if facts["token_texts"] else "without"
    offsets = byte_offsets_text(facts)
    unknown = f"; not known of them: {', '.join(facts['lacks'])}" if facts["lacks"] else ""
    return f"{what} of {facts['v_real']:,}{tails}; profile {facts['profile']}; {texts} token texts, {offsets}{unknown}"


def byte_offsets_text(facts: dict[str, Any]) -> str:
    """Whether it is known which bytes tokens are, by which students with another tokenizer are compared."""
    of_words, num, num_parts = facts["token_bytes"], facts["parts_with_byte_offsets"], facts["parts_done"]
    if num in (0, num_parts) and of_words == (num > 0 or num_parts == 0):
        return "with byte offsets" if of_words else "without byte offsets"
    return f"byte offsets in {num} of {num_parts} parts, the vocabulary {'with' if of_words else 'without'} bytes"


def _array_table(facts: dict[str, Any]) -> str:
    sizes, per, raw = facts["size_bytes"], facts["bytes_per_layer_token"], facts["raw_bytes"]
    rows = []
    for name, size in sizes.items():
        uncompressed = human_bytes(raw[name]) if name in raw else ""
        share = f"{100 * size / raw[name]:.0f} %" if raw.get(name) else ""
        rows.append([name, human_bytes(size), uncompressed, share, f"{per[name]:.2f}"])
    rows.append(["total", human_bytes(sum(sizes.values())), human_bytes(sum(raw.values())), "", f"{per['total']:.2f}"])
    return table(["array", "stored", "raw", "stored/raw", "bytes per (layer, token)"], rows)


def _layer_table(facts: dict[str, Any]) -> str:
    of_layer, measured = facts["layer_bytes"], facts["measured_parts"]
    if not measured:
        return ""
    whole = max(1e-9, sum(one["bytes_per_token"] for one in of_layer))
    rows = []
    for name, one in zip(layer_names(facts["layers"]), of_layer, strict=True):
        per_token = one["bytes_per_token"]
        share = f"{100 * per_token / whole:.1f} %"
        rows.append([name, str(one["top_k"]), f"{per_token:.2f}", share, human_bytes(one["bytes"])])
    if len(measured) == facts["parts_done"]:
        return table(["layer", "k", "bytes per token", "share", "stored"], rows)
    note = f"layers: measured on {len(measured)} evenly spaced parts of {facts['parts_done']}"
    return f"{table(['layer', 'k', 'bytes per token', 'share', 'stored, about'], rows)}\n{note}"


def lineage(parents: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All ancestors, the nearest first."""
    for parent in parents:
        yield parent
        yield from lineage(parent.get("parents") or [])


def _parent_text(parent: dict[str, Any]) -> str:
    done = [f"{k} {short(v)}" for k, v in parent.items() if k not in ("path", "digest", "parents", "operation")]
    name = f"{parent.get('path', '')} ({str(parent.get('digest', ''))[:12]})"
    return f"{name}: {parent.get('operation', '')} {', '.join(done)}".rstrip(": ")
