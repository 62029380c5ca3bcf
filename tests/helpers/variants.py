"""One small cache for every way rows can lie on disk: profiles, widths, sampled rows, chosen tokens, texts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from helpers.caches import Case, header_of, make_case

from vlsi_cache.sparse.rows import draw_rows, truncate
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.store.writer import CacheWriter

VOCAB_SIZE, NUM_LAYERS, NUM_DRAWS = 100, 3, 20
LENGTHS, NAMES = [[5, 1], [3, 4, 2]], list("abcde")
PROFILES = ("default", "exact", "fast")


@dataclass(frozen=True)
class Variant:
    """What to write, and the header that says how."""

    case: Case
    header: CacheHeader
    texts: Callable[[], list[str]] | None = None


def plain(profile: str, lengths: list[list[int]] = LENGTHS) -> Variant:
    names = NAMES[: sum(map(len, lengths))]
    case = make_case(lengths, names, vocab_size=VOCAB_SIZE, num_layers=NUM_LAYERS, top_k=6, num_tail=2)
    if profile == "fast":
        case = replace(case, id_of_rank=np.arange(VOCAB_SIZE), num_head=0)
    return Variant(case, header_of(case).model_copy(update={"profile": profile}))


def per_layer(profile: str) -> Variant:
    widths_L1 = np.array([[2], [6], [1]])
    return _cut(plain(profile), lambda n: np.broadcast_to(widths_L1, (3, n)), {"top_k": [2, 6, 1]})


def top_p(profile: str) -> Variant:
    rng = np.random.default_rng(1)
    return _cut(plain(profile), lambda n: rng.integers(1, 7, (NUM_LAYERS, n)), {"truncated": True})


def _cut(variant: Variant, widths: Callable[[int], np.ndarray], changes: dict[str, Any]) -> Variant:
    rng, parts = np.random.default_rng(5), []
    for part in variant.case.parts:
        assert part.rows is not None
        kept_LT = widths(part.rows.num_tokens)
        rows = truncate(part.rows, kept_LT, rng.random((*kept_LT.shape, part.rows.num_tail)))
        parts.append(replace(part, rows=rows))
    return Variant(replace(variant.case, parts=parts), variant.header.model_copy(update=changes))


def sampled(profile: str) -> Variant:
    case = make_case(LENGTHS, NAMES, vocab_size=VOCAB_SIZE, num_layers=NUM_LAYERS, top_k=6, num_tail=NUM_DRAWS)
    rng, parts = np.random.default_rng(2), []
    for part in case.parts:
        assert part.rows is not None
        parts.append(replace(part, rows=draw_rows(part.rows, rng.random(part.rows.tail_ids_LTm.shape))))
    changes = {"row_kind": "sampled", "truncated": True, "top_k": [NUM_DRAWS] * 3, "tail_samples": 0}
    same = plain(profile)
    return Variant(replace(same.case, parts=parts, num_tail=0), same.header.model_copy(update=changes))


def chosen(profile: str) -> Variant:
    """Only some response tokens have rows; the cache carries the texts of its tokens."""
    variant, rng, parts, total = plain(profile), np.random.default_rng(3), [], 0
    for part in variant.case.parts:
        ids = [rng.integers(0, VOCAB_SIZE, len(one) + 3).astype(np.uint32) for one in part.response_ids]
        at = [np.sort(rng.choice(len(one) + 3, len(one), replace=False)) for one in part.response_ids]
        total += sum(map(len, ids))
        parts.append(replace(part, response_ids=ids, positions=at))
    header = variant.header.model_copy(update={"num_response_tokens": total})
    return Variant(
        replace(variant.case, parts=parts), header, lambda: [f"<{token} \u00e9>" for token in range(VOCAB_SIZE)]
    )


KINDS: dict[str, Callable[[str], Variant]] = {
    "plain": plain,
    "per-layer": per_layer,
    "top-p": top_p,
    "sampled": sampled,
    "chosen": chosen,
}
VARIANTS = [f"{kind}-{profile}" for kind in KINDS for profile in PROFILES]


def last_part_alone(variant: Variant) -> Variant:
    """A cache of the last part only: nothing but that part is read again when a file of it is damaged."""
    part = variant.case.parts[-1]
    counts = {
        "num_parts": 1,
        "num_samples": len(part.sample_ids),
        "num_response_tokens": sum(map(len, part.response_ids)),
    }
    case, header = replace(variant.case, parts=[part]), variant.header.model_copy(update=counts)
    return Variant(case, header, variant.texts)


def variant_of(name: str) -> Variant:
    kind, profile = name.rsplit("-", 1)
    return KINDS[kind](profile)


def build_variant(root: Path, variant: Variant) -> Path:
    writer = CacheWriter.create_or_resume(root, variant.header, variant.case.vocab_order, token_texts=variant.texts)
    for index in writer.missing_parts():
        writer.write_part(index, variant.case.parts[index])
    assert writer.finish()
    return root
