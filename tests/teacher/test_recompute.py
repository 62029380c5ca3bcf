"""The teacher asked again: agrees with every kind of cache it wrote, sees what no checksum can."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import make_rows, save_model, write_jsonl, write_spec
from vlsi_cache_cli.main import main

import vlsi_cache as vc
from vlsi_cache.errors import DataError, FingerprintMismatchError
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.store import reader
from vlsi_cache.store.derive.prune import prune
from vlsi_cache.store.format import sealed_json
from vlsi_cache.store.writer import CacheWriter, PartSamples
from vlsi_cache.teacher.build import build_teacher
from vlsi_cache.teacher.recompute import recompute

KINDS = {
    "default": [],
    "exact": ["store.profile=exact"],
    "fast": ["store.profile=fast"],
    "per layer": ["rows.top_k=[2,3,4,5,8]"],
    "top-p": ["rows.top_p=0.5", "rows.min_k=2"],
    "sampled": ["rows.kind=sampled", "rows.num_draws=20"],
    "chosen tokens": ["rows.select_tokens.entropy_top=0.4"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_a_fresh_cache(spec_file: Path, tmp_path: Path, kind: str) -> None:
    cache = build_teacher(vc.load_spec(spec_file, overrides=KINDS[kind]), out=tmp_path / "c")
    report = recompute(cache, num_samples=12, seed=3)
    assert report.ok, str(report)
    assert [one.layer for one in report.layers] == cache.layers
    assert min(one.num_tokens for one in report.layers) > 5
    assert min(one.top1_agreement for one in report.layers) > 0.9
    assert "12 samples recomputed: the teacher says the same" in str(report)
    if kind == "exact":
        assert max(one.max_dlogp for one in report.layers) < 1e-4


def test_agrees_with_a_pruned_cache(spec_file: Path, tmp_path: Path) -> None:
    build_teacher(vc.load_spec(spec_file), out=tmp_path / "c")
    small = prune(tmp_path / "c", tmp_path / "small", layers=[2, "last"], top_k=3)
    report = recompute(small, num_samples=30)
    assert report.ok, str(report)
    assert [one.layer for one in report.layers] == [2, 5]


def test_a_merged_cache_whose_sources_use_the_same_ids(spec_file: Path, tmp_path: Path) -> None:
    """Row 1 of the one source is in the cache, row 1 of the other is not: the content says which is which."""
    rows = make_rows(8)
    names = [str(row["id"]) for row in rows]
    other = [{**row, "id": name} for row, name in zip(make_rows(8, start=50), names, strict=True)]
    pieces = []
    for number, (content, kept) in enumerate([(rows, names[:4]), (other, names[4:])]):
        file = write_jsonl(spec_file.parent / f"rows-{number}.jsonl", content)
        spec = vc.load_spec(spec_file, overrides=[f"data.path={file}", "teacher.layers=[2]"])
        pieces.append(prune(build_teacher(spec, out=tmp_path / f"c{number}"), tmp_path / f"p{number}", samples=kept))
    merged = vc.merge(pieces, tmp_path / "both")
    assert sorted(merged) == sorted(names)
    report = recompute(merged, num_samples=8)
    assert report.changed == {}
    assert report.ok, str(report)


def rewritten(source: Path, target: Path, change: Any) -> reader.Cache:
    """A cache of the same header whose rows went through `change` before they were written: every checksum is right."""
    cache = reader.open(source)
    writer = CacheWriter.create_or_resume(target, cache.header, cache.vocab_order)
    for index in cache.parts:
        record, rows = cache.part_record(index), cache.read_part(index)
        names = ("ids_LTK", "logprobs_LTK", "tail_ids_LTm", "lse_LTn", "entropy_LT", "gold_logprob_LT", "tail_mass_LT")
        whole = SparseRows.concat([SparseRows(**{name: getattr(row, name) for name in names}) for row in rows])
        samples = PartSamples(
            record.sample_ids, record.kinds, record.digests, [row.response_ids_R for row in rows], change(whole)
        )
        writer.write_part(index, samples)
    assert writer.finish()
    cache = reader.open(target)
    assert cache.verify(deep=True).ok
    return cache


def swap_ids(rows: Any) -> Any:
    ids = rows.ids_LTK.copy()
    ids[2, :, [0, 1]] = ids[2, :, [1, 0]]
    return replace(rows, ids_LTK=ids)


def sharpen(rows: Any) -> Any:
    logprobs = rows.logprobs_LTK.copy()
    logprobs[2] = np.minimum(logprobs[2] * 1.2, 0)
    return replace(rows, logprobs_LTK=logprobs)


def shift_last_entry(rows: Any) -> Any:
    """An id in place of the least likely one, which only one of the two rows then keeps."""
    ids = rows.ids_LTK.copy()
    free = next(token for token in range(300) if not (ids[2] == token).any() and not (rows.tail_ids_LTm == token).any())
    ids[2, :, 0] = free
    return replace(rows, ids_LTK=ids)


def more_entropy(rows: Any) -> Any:
    entropy = rows.entropy_LT.copy()
    entropy[2] += 0.05
    return replace(rows, entropy_LT=entropy)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    spec_file = write_spec(folder, teacher_folder, num_rows=12)
    return build_teacher(vc.load_spec(spec_file, overrides=["store.profile=exact"]), out=folder / "c").path


@pytest.mark.parametrize("change", [swap_ids, sharpen, shift_last_entry, more_entropy])
def test_sees_wrong_rows_with_right_checksums(exact: Path, tmp_path: Path, change: Any) -> None:
    report = recompute(rewritten(exact, tmp_path / "wrong", change), num_samples=12)
    assert not report.ok
    assert [one.layer for one in report.layers if not one.ok] == [3], str(report)
    assert "do not train on this cache" in str(report)
    same = rewritten(exact, tmp_path / "same", lambda rows: rows)
    assert recompute(same, num_samples=5).ok


def test_changed_and_missing_records_are_listed(spec_file: Path, tmp_path: Path) -> None:
    cache = build_teacher(vc.load_spec(spec_file), out=tmp_path / "c")
    rows = make_rows(40)[:-1]
    rows[3]["messages"][1]["content"] = "dog"  # type: ignore[index]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    report = recompute(cache, num_samples=30)
    assert not report.ok
    assert set(report.changed) == {"row-3", "row-39"}
    assert "the cache has" in report.changed["row-3"]
    assert "is not in the data any more" in str(report)
    assert all(layer.ok for layer in report.layers)


def test_another_teacher_is_refused_with_both_values(spec_file: Path, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher", num_layers=5, hidden=32, seed=1)
    override = [f"teacher.model={teacher}"]
    cache = build_teacher(vc.load_spec(spec_file, overrides=override), out=tmp_path / "c")
    was = cache.header.fingerprint["teacher.weights"]
    save_model(teacher, num_layers=5, hidden=32, seed=2)
    with pytest.raises(FingerprintMismatchError, match=rf"`teacher.weights`: the cache has \"{was}\", this run has"):
        recompute(cache, num_samples=1)
    with pytest.raises(DataError, match="`num_samples` is 0"):
        recompute(cache, num_samples=0)


def test_a_spec_in_a_cache_cannot_switch_on_remote_code(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlsi_cache.teacher import recompute as module

    build_teacher(vc.load_spec(spec_file), out=tmp_path / "c")
    value = json.loads((tmp_path / "c" / "cache.json").read_text())
    del value["xxh3"]
    value["spec"]["teacher"]["trust_remote_code"] = True
    (tmp_path / "c" / "cache.json").write_bytes(sealed_json(value))
    seen: list[bool] = []
    opened = module.open_teacher_inputs
    monkeypatch.setattr(
        module, "open_teacher_inputs", lambda spec: seen.append(spec.teacher.trust_remote_code) or opened(spec)
    )
    assert recompute(reader.open(tmp_path / "c"), num_samples=1).ok
    recompute(reader.open(tmp_path / "c"), num_samples=1, trust_remote_code=True)
    assert seen == [False, True]


def test_command_line(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> tuple[int, str]:
        command = ["vlsi-cache", "verify", "--recompute", "5", "--device", "cpu", *map(str, words)]
        monkeypatch.setattr(sys, "argv", command)
        code = main()
        return code, capsys.readouterr().out

    rewritten(exact, tmp_path / "wrong", swap_ids)
    capsys.readouterr()
    code, out = run("--json", exact)
    assert code == 0
    said = json.loads(out)["recompute"]
    assert (said["ok"], said["num_samples"], said["changed"]) == (True, 5, {})
    assert [one["layer"] for one in said["layers"] if one["ok"] and one["top1_agreement"] == 1.0] == [1, 2, 3, 4, 5]
    code, out = run(tmp_path / "wrong")
    assert code == 1
    assert "layer 3" in out
    assert "WRONG" in out
    (tmp_path / "wrong" / "parts" / "000000.zarr" / "ids" / "zarr.json").unlink()
    code, out = run(tmp_path / "wrong")
    assert code == 1
    assert "nothing was recomputed: mend these files first" in out
