"""Students against every kind of cache: selected tokens, sampled rows, other widths, other profiles."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import make_rows, write_jsonl, write_spec

import vlsi_cache as vc
from vlsi_cache.data.collate import collate
from vlsi_cache.data.encoder import load_encoder
from vlsi_cache.data.records import read_records
from vlsi_cache.data.sequence import Layout
from vlsi_cache.errors import SpecError
from vlsi_cache.processes import ALONE, Processes
from vlsi_cache.run_files import read_metrics
from vlsi_cache.store.part import Part, Row
from vlsi_cache.store.reader import Cache
from vlsi_cache.train.loader import Feed, MicroBatch, Sample, cached_records, encode_pairs

KINDS = {
    "selected": ["rows.select_tokens.entropy_top=0.3"],
    "few": ["rows.select_tokens.random=0.05"],
    "sampled": ["rows.kind=sampled", "rows.num_draws=12"],
    "top-p": ["rows.top_p=0.5", "rows.min_k=2"],
    "per layer": ["rows.top_k=[2, 8, 4, 3, 6]"],
    "exact": ["store.profile=exact"],
    "fast": ["store.profile=fast"],
}
PLAIN = "as the spec says"


BRIEF = [
    "distill.verbalize.steps=1",
    "distill.interact.schedule.steps=2",
    "distill.sft.schedule.steps=1",
    "distill.checkpoint_steps=100",
]
NUM_ROWS = 20
ALL_ROWS = [f"distill.{size}={NUM_ROWS}" for size in ("batch_size", "micro_batch_size")]  # in every step
CacheOf = Callable[[str], Cache]


@pytest.fixture(scope="module")
def cache_of(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheOf:
    """The cache of a kind, built once; its spec and rows lie beside it. Nobody writes to it."""

    @functools.cache
    def build(kind: str) -> Cache:
        folder = tmp_path_factory.mktemp("rows")
        spec = vc.load_spec(write_spec(folder, teacher_folder, num_rows=NUM_ROWS), overrides=KINDS.get(kind, []))
        return vc.build_teacher(spec, out=folder / "cache")

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_trains_on_it(kind: str, tmp_path: Path, cache_of: CacheOf, student_folder: Path) -> None:
    cache = cache_of(kind)
    if kind == "few":
        assert 0 in cache.sample_table()["num_tokens"].to_pylist()  # samples without any row are there, and trained on
    run = vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=BRIEF)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["stage"] == "interact"]
    assert len(lines) == 2
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert any(line["loss"] > 0 for line in lines)


@pytest.mark.parametrize("recipe", ["vlsi", "last"])
def test_other_divergences_and_temperatures_are_trained(
    recipe: str, tmp_path: Path, cache_of: CacheOf, student_folder: Path
) -> None:
    cache = cache_of("exact")
    first = {}
    for name, tau in (
        ("forward_kl", 1.0), ("forward_kl", 2.0), ("reverse_kl", 1.0), ("jsd", 2.0), ("skewed_kl", 1.0),
        ("l2_topk", 1.0),
    ):  # fmt: skip
        changes = [*BRIEF, *ALL_ROWS, *(f"distill.interact.{key}={name}" for key in ("intermediate", "last"))]
        changes += [f"distill.interact.tau={tau}", "distill.sft.fraction=0"]
        out = tmp_path / f"{name}-{tau}"
        run = vc.distill(cache, student=str(student_folder), out=out, recipe=recipe, overrides=changes)
        lines = [line for line in read_metrics(run / "metrics.jsonl") if line["stage"] == "interact"]
        assert lines[-1]["kl_last"] < lines[0]["kl_last"]
        first[name, tau] = lines[0]["kl_last"]
    assert len(set(first.values())) == len(first)


def test_ways_of_matching_and_operations_run_and_are_logged(
    tmp_path: Path, cache_of: CacheOf, student_folder: Path
) -> None:
    cache = cache_of(PLAIN)
    for name, changes in {
        "bottom": ["matching=bottom_k", "bottom_k=2"],
        "stretch": ["matching=uniform_stretch"],
        "mean": ["layer_reduction=mean"],
        "late": ["layers_full_until=0.4", "layers_zero_from=0.8", "alpha_ce=0.3", "schedule.steps=5"],
        "labels": ["intermediate=ce", "last=none"],
    }.items():
        overrides = [*BRIEF, *(f"distill.interact.{change}" for change in changes)]
        overrides += ["distill.micro_batch_size=2", "distill.sft.fraction=0"]
        run = vc.distill(cache, student=str(student_folder), out=tmp_path / name, overrides=overrides)
        lines = [line for line in read_metrics(run / "metrics.jsonl") if line["stage"] == "interact"]
        matches = [match for line in lines for match in line["matched_layers"]]
        if name == "stretch":
            assert all(match == [cache.layers[0], cache.layers[-2]] for match in matches)
        elif name == "mean":
            assert len(matches) == 2 * 2  # one match for each micro-batch
        elif name == "bottom":
            assert len(matches) == 2 * 2 * 2  # two micro-batches, two layers each
        elif name == "late":
            assert ["1" in line["layers"] for line in lines] == [True, True, True, True, False]
        elif name == "labels":
            assert matches == [[]] * len(matches)
            assert not any("kl_last" in line for line in lines)
        assert (run / "report.html").is_file()


def test_the_last_recipe_leaves_alone_what_it_does_not_use(
    tmp_path: Path, cache_of: CacheOf, student_folder: Path
) -> None:
    cache = cache_of("sampled")
    changes = ["matching=bottom_k", "bottom_k=9", "intermediate=jsd"]
    overrides = [*(f"distill.interact.{change}" for change in changes), *BRIEF]
    run = vc.distill(cache, student=str(student_folder), out=tmp_path / "run", recipe="last", overrides=overrides)
    assert (run / "student").is_dir()
    with pytest.raises(SpecError, match=r"`distill\.interact\.bottom_k` is 9, and .* has 4 intermediate layers"):
        vc.distill(cache, student=str(student_folder), out=tmp_path / "vlsi", overrides=overrides[:2])


def test_divergences_that_the_cache_does_not_allow_are_refused_before_anything_is_loaded(
    tmp_path: Path, cache_of: CacheOf, student_folder: Path
) -> None:
    cache = cache_of("sampled")
    for changes, message in (
        (["distill.interact.tau=3.0"], r"`distill\.interact\.tau` is 3\.0.* holds rows for \[1\.0, .*\] alone"),
        (["distill.interact.last=jsd"], "asks for jsd at tau 1.0, and .* holds draws from the teacher,"),
        (["distill.interact.intermediate=kl"], "interact.intermediate"),
    ):
        with pytest.raises(SpecError, match=message):
            vc.distill(cache, student=str(student_folder), out=tmp_path / "run", overrides=changes)
    assert not (tmp_path / "run").exists()


def test_only_tokens_with_rows_are_compared(cache_of: CacheOf, teacher_folder: Path) -> None:
    """The micro-batch's positions, golds and rows are those of the chosen tokens, sample by sample."""
    cache = cache_of("selected")
    encoder = load_encoder(str(teacher_folder))
    records = {record.id: record for record in read_records(vc.load_spec(cache.path.parent / "spec.yaml").data)}
    names = [name for name in cache if 0 < cache[name].num_tokens < len(cache[name].response_ids_R)][:4]
    assert len(names) == 4
    samples = iter([Sample(records[name], cache[name], cache[name].num_tokens) for name in names])
    feed = Feed(samples, encoder, batch_size=4, micro_batch_size=4, reduction="token", device=torch.device("cpu"))
    micro = feed.next()
    feed.close()
    whole = collate([encoder.encode(records[name]) for name in names], pad_id=encoder.pad_id)
    assert micro.rows is not None
    starts = np.cumsum([0, *whole.num_tokens[:-1]])
    wanted = np.concatenate([start + cache[name].positions_T for start, name in zip(starts, names, strict=True)])
    assert micro.batch.gold_T.tolist() == whole.gold_T[wanted.astype(np.int64)].tolist()
    assert micro.batch.positions_T.tolist() == whole.positions_T[wanted.astype(np.int64)].tolist()
    gold = np.concatenate([cache[name].response_ids_R[cache[name].positions_T] for name in names])
    np.testing.assert_array_equal(micro.batch.gold_T.numpy(), gold)
    np.testing.assert_array_equal(micro.rows.entropy_LT, np.concatenate([cache[n].entropy_LT for n in names], axis=1))


@pytest.mark.parametrize("layout", [Layout(), Layout(row_width=64)], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["exact", "top-p", PLAIN])
def test_a_process_decodes_its_own_samples_alone(
    cache_of: CacheOf, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, kind: str
) -> None:
    """Their rows are those that one process alone trains on, batch by batch."""
    cache, encoder = cache_of(kind), load_encoder(str(teacher_folder))
    records = read_records(vc.load_spec(cache.path.parent / "spec.yaml").data)
    decoded: list[str] = []
    row = Part.row

    def noted(self: Part, index: int) -> Row:
        decoded.append(self.record.sample_ids[index])
        return row(self, index)

    def taken(processes: Processes) -> list[MicroBatch]:
        order: Any = {"layers": cache.layers, "seed": 1, "window_parts": 2}
        own = cached_records(cache, records, decode=processes.num_shares == 1, **order)
        options: Any = {"batch_size": 8, "micro_batch_size": 2, "reduction": "token", "layout": layout}
        with Feed(own, encoder, device=torch.device("cpu"), processes=processes, **options) as feed:
            return [micro for _ in range(4) for micro in feed.batch()]

    alone = taken(ALONE)
    monkeypatch.setattr(Part, "row", noted)
    for rank in range(2):
        decoded.clear()
        shared = taken(Processes(rank, 2))
        wanted = [micro for start in range(0, 16, 4) for micro in alone[start : start + 4][rank::2]]
        assert [one.sample_ids for one in shared] == [one.sample_ids for one in wanted]
        said = [name for one in shared for name in one.sample_ids]
        assert decoded[: len(said)] == said  # what follows was made ready, and nobody took it
        for one, other in zip(shared, wanted, strict=True):
            assert one.rows is not None
            assert other.rows is not None
            for name, value in vars(other.rows).items():
                np.testing.assert_array_equal(getattr(one.rows, name), value, err_msg=name)
            assert torch.equal(one.share_T, other.share_T)


def test_a_student_of_a_merged_cache_finds_the_rows_of_both(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    caches = []
    for name, first in (("a", 0), ("b", 500)):
        folder = tmp_path / name
        folder.mkdir()
        spec = write_spec(folder, teacher_folder, num_rows=10)
        write_jsonl(folder / "rows.jsonl", make_rows(10, start=first))
        caches.append(vc.build_teacher(vc.load_spec(spec), out=folder / "cache"))
    both = vc.merge(caches, out=tmp_path / "both")
    assert len(both) == 20
    run = vc.distill(both, student=str(student_folder), out=tmp_path / "run", overrides=BRIEF)
    assert (run / "student" / "config.json").is_file()
    with pytest.raises(SpecError, match="merged from 2 sources"):
        vc.distill(both, student=str(student_folder), out=tmp_path / "other", overrides=["data.limit=5"])
    assert not (tmp_path / "other").exists()


def test_padded_micro_batches_hold_samples_of_similar_length(cache_of: CacheOf, teacher_folder: Path) -> None:
    """Which samples share an optimizer step stays the same; packed batches need no order."""
    cache = cache_of(PLAIN)
    encoder = load_encoder(str(teacher_folder))
    records = {record.id: record for record in read_records(vc.load_spec(cache.path.parent / "spec.yaml").data)}
    names = list(cache)[:16]

    def taken(**options: Any) -> list[MicroBatch]:
        samples = iter([Sample(records[name], None, len(cache[name].response_ids_R)) for name in names])
        options = {"batch_size": 8, "micro_batch_size": 4, "reduction": "token", **options}
        with Feed(samples, encoder, device=torch.device("cpu"), **options) as feed:
            return [*feed.batch(), *feed.batch()]

    def padding(found: list[MicroBatch]) -> float:
        masks = [micro.batch.inputs["attention_mask"] for micro in found]
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    padded = taken()
    for first in (0, 2):
        said = [name for micro in padded[first : first + 2] for name in micro.sample_ids]
        assert sorted(said) == sorted(names[4 * first : 4 * first + 8])
        lengths = [int(n) for micro in padded[first : first + 2] for n in micro.batch.inputs["attention_mask"].sum(1)]
        assert lengths == sorted(lengths, reverse=True)
        assert sum(float(micro.share_T.sum()) for micro in padded[first : first + 2]) == pytest.approx(1)
    unsorted = [encode_pairs([(records[n], None) for n in names[i : i + 4]], encoder) for i in range(0, 16, 4)]
    assert padding(padded) < 0.7 * padding(unsorted)
    packed = taken(layout=Layout(row_width=64))
    assert [micro.sample_ids for micro in packed] == [names[i : i + 4] for i in range(0, 16, 4)]
