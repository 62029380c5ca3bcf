"""Every way a file of a cache can be wrong is noticed, and the error names the file."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from helpers.caches import Case, build, file_bytes, header_of, make_case
from helpers.damage import data_file, flip, part_path
from helpers.variants import PROFILES, VARIANTS, build_variant, last_part_alone, plain, variant_of

from vlsi_cache.errors import CacheCorruptError, VlsiCacheError
from vlsi_cache.store import files, reader
from vlsi_cache.store.check import repair, verify
from vlsi_cache.store.format import list_parts, sealed_json
from vlsi_cache.store.vocab_order import VOCAB_NAMES
from vlsi_cache.store.writer import CacheWriter

PAYLOAD = "ids levels tail_ids lse entropy gold_logprob tail_mass offsets response_offsets response_ids positions"


def read_everything(root: Path) -> None:
    cache = reader.open(root)
    for index in cache.parts:
        cache.read_part(index)
    cache.token_text(0)


def assert_noticed(root: Path, name: str, *, by_deep: bool = True) -> None:
    """Reading raises an error that names the file; verify and deep verify list it."""
    with pytest.raises(CacheCorruptError) as error:
        read_everything(root)
    assert name in str(error.value)
    for deep in (False, by_deep):
        report = verify(root, deep=deep)
        assert any(name in problem.file for problem in report.problems), str(report)


@pytest.mark.parametrize("array", PAYLOAD.split())
def test_flipped_bit_truncation_emptiness_and_absence(root: Path, array: str) -> None:
    path = data_file(root, array)
    good = path.read_bytes()
    for bit in (8 * len(good) // 3, 8 * len(good) - 1):
        flip(path, bit)
        assert_noticed(root, f"000001.zarr/{array}")
        path.write_bytes(good)
    for damaged in (good[:-1], good[: len(good) // 2], b"", good + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(CacheCorruptError, match=f"000001.zarr/{array}/c.* bytes, part.json says"):
            read_everything(root)
    assert not verify(root).ok
    path.unlink()
    with pytest.raises(CacheCorruptError, match=f"000001.zarr/{array}/c.* is missing; run: vlsi-cache"):
        read_everything(root)
    assert any(array in problem.file for problem in verify(root).problems)
    path.write_bytes(good)
    assert verify(root, deep=True).ok


def test_bits_all_over_a_payload_file_are_covered(root: Path) -> None:
    path = data_file(root, "entropy")
    good = path.read_bytes()
    for bit in range(5, 8 * len(good), 101):
        flip(path, bit)
        with pytest.raises(CacheCorruptError, match=r"000001\.zarr/entropy"):
            reader.open(root).read_part(1)
        path.write_bytes(good)


@pytest.mark.parametrize("name", ["ids/zarr.json", "zarr.json", "part.json"])
def test_flipped_bit_in_metadata(root: Path, name: str) -> None:
    """Our reader does without `zarr.json`, so it is `verify` that looks after those of others."""
    path = part_path(root) / name
    good = path.read_bytes()
    for bit in (8 * good.index(b'"') + 8, 8 * len(good) // 2, 8 * (len(good) - 3)):
        flip(path, bit)
        if name == "part.json":
            assert_noticed(root, f"000001.zarr/{name}")
        assert any(name in problem.file for problem in verify(root).problems)
        path.write_bytes(good)


@pytest.mark.parametrize("name", ["cache.json", "vocab"])
def test_damage_outside_the_parts(root: Path, name: str) -> None:
    path = root / name if name == "cache.json" else root / "vocab" / "id_of_rank" / "c" / "0"
    flip(path, 8 * (path.stat().st_size // 2))
    assert_noticed(root, name)
    path.write_bytes(b"")
    assert_noticed(root, name)


def test_swapped_parts(root: Path) -> None:
    one, two, aside = part_path(root, 0), part_path(root, 1), root / "tmp" / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    with pytest.raises(CacheCorruptError, match="this is part 1 under the name of part 0"):
        read_everything(root)
    report = verify(root)
    assert [problem.file for problem in report.problems] == [f"parts/00000{i}.zarr/part.json" for i in (0, 1)]


def test_swapped_parts_of_equal_sizes_are_noticed_when_read(root: Path) -> None:
    """The table of sizes cannot see it; the commit record of the part can."""
    cache = reader.open(root)
    part_path(root, 0).rename(root / "tmp" / "aside")
    shutil.copytree(part_path(root, 2), part_path(root, 0))
    with pytest.raises(CacheCorruptError, match="this is part 2 under the name of part 0"):
        cache.read_part(0)


def test_part_of_another_cache(root: Path, tmp_path: Path) -> None:
    names = [f"sample-{i}" for i in range(7)]
    other = build(tmp_path / "other", make_case([[5, 1], [3, 4, 2], [6, 7]], names, seed=5))
    shutil.rmtree(part_path(root))
    shutil.copytree(part_path(other), part_path(root))
    with pytest.raises(CacheCorruptError, match=r"000001.zarr/part.json`: the part belongs to another cache"):
        read_everything(root)
    assert not verify(root).ok


def test_foreign_things_are_listed(root: Path) -> None:
    shutil.copytree(part_path(root), part_path(root, 77))
    (part_path(root) / "notes.txt").write_text("x")
    assert {p.file for p in verify(root).problems} == {"parts/000077.zarr", "parts/000001.zarr/notes.txt"}
    with pytest.raises(CacheCorruptError, match=r"000077.zarr` is not part of this cache"):
        reader.open(root)


@pytest.mark.parametrize("name", ["../../../cache.json", "/etc/passwd", "ids/../ids/zarr.json", "a\\b", "", "ids//c"])
def test_names_cannot_leave_the_cache(root: Path, name: str) -> None:
    path = part_path(root) / "part.json"
    value = json.loads(path.read_text())
    del value["xxh3"]
    value["files"][name] = {"size": 1, "xxh3": "0"}
    path.write_bytes(sealed_json(value))
    with pytest.raises(CacheCorruptError, match="files listed and files expected differ"):
        read_everything(root)
    assert not verify(root).ok


@pytest.mark.parametrize("where", ["ids/zarr.json", "ids", "ids/c/0", ".", "part.json"])
def test_symbolic_links_are_refused(root: Path, tmp_path: Path, where: str) -> None:
    inside, outside = part_path(root) / where, tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(CacheCorruptError, match=r"symbolic link|bytes, part\.json says"):
        read_everything(root)
    assert not verify(root).ok


@pytest.mark.parametrize("damage", [b"", b"PAR1 nonsense PAR1", None])
def test_a_damaged_sample_table_is_rebuilt(root: Path, damage: bytes | None) -> None:
    path = root / "samples.parquet"
    want = reader.open(root).sample_table()
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 4]) + content[201:] if damage is None else damage)
    assert [problem.file for problem in verify(root).problems] == ["samples.parquet"]
    assert reader.open(root).sample_table() == want
    if damage is None:  # only the pages are damaged, which the footer does not show
        assert repair(root).table_rebuilt
    assert verify(root).ok
    path.unlink()
    assert repair(root).table_rebuilt
    assert verify(root).ok


def test_repair_makes_the_build_continue(root: Path, built: Path, case: Case) -> None:
    flip(data_file(root, "levels"), 100)
    (root / "vocab" / "id_of_rank" / "c" / "0").write_bytes(b"")
    dead = root / "tmp" / f"000002.{files.host_name()}.999999999.0123456789ab.zarr"
    dead.mkdir()
    report = repair(root)
    assert report.quarantined == ["parts/000001.zarr", "vocab"]
    assert report.restored == ["vocab"]
    assert report.left == [f"tmp/{dead.name}"]
    assert dead.exists()
    assert report.missing_parts == [1]
    assert (root / "quarantine" / "000001.zarr").is_dir()
    assert repair(root, yes=True).removed == [f"tmp/{dead.name}"]
    build(root, case)
    assert verify(root, deep=True).ok
    assert file_bytes(root / "parts") == file_bytes(built / "parts")
    assert str(repair(root)) == "nothing to repair"


def damages(good: bytes, num_bits: int) -> Iterator[tuple[str, bytes | None]]:
    """Ways in which a file can be wrong, each of them another content than the good one."""
    for bit in np.linspace(0, 8 * len(good) - 1, num_bits).astype(int).tolist():
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", bytes(flipped)
    for length in sorted({len(good) - 1, len(good) // 2, 0}):
        yield f"cut to {length} bytes", good[:length]
    yield "one byte more", good + b"\0"
    third = len(good) // 3
    for name, low, high in (("front", 0, third), ("middle", third, 2 * third), ("all", 0, len(good))):
        hole = good[:low] + bytes(high - low) + good[high:]
        if hole != good:
            yield f"{name} zeroed", hole
    yield "deleted", None


def assault(root: Path, num_bits: int, folders: Sequence[str] = VOCAB_NAMES) -> tuple[int, list[str]]:
    """Damage every file of the last part and of `folders`, the vocabulary's, one at a time: (tried, unnoticed)."""
    tried, unnoticed = 0, []
    part = f"parts/{max(os.listdir(root / 'parts'))}"
    for path in sorted(file for name in (part, *folders) for file in (root / name).rglob("*")):
        if path.is_dir():
            continue
        name, good = path.relative_to(root).as_posix(), path.read_bytes()
        array = name.split("/c/")[0].removesuffix("/zarr.json") if name.startswith("parts") else name
        for what, content in damages(good, num_bits):
            if content is not None and name.endswith("part.json") and content.split() == good.split():
                continue  # a line end is no part of sealed JSON
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            tried += 1
            problems = [problem for problem in verify(root).problems if problem.file.startswith(array)]
            if not problems or not all("repair" in problem.todo for problem in problems):
                unnoticed.append(f"{name}: {what}: by verify")
            if name.startswith("parts") or (name.startswith("vocab/") and "/c/" in name):
                try:
                    read_everything(root)
                    if not name.endswith("zarr.json"):  # our reader does without those of the parts
                        unnoticed.append(f"{name}: {what}: by reading")
                except CacheCorruptError as error:
                    if array.split("/c/")[0] not in str(error) or "; run: vlsi-cache" not in str(error):
                        unnoticed.append(f"{name}: {what}: the error is {error}")
            path.unlink(missing_ok=True)
            path.write_bytes(good)
    assert verify(root, deep=True).ok
    return tried, unnoticed


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("plain-exact", VOCAB_NAMES),  # which lie alike in all caches
        ("per-layer-fast", ()),
        ("sampled-default", ()),
        ("chosen-fast", ()),
    ],
)
def test_every_damage_to_every_file_is_noticed(tmp_path: Path, name: str, folders: Sequence[str]) -> None:
    root = build_variant(tmp_path / "c", last_part_alone(variant_of(name)))
    tried, unnoticed = assault(root, num_bits=2, folders=folders)
    assert unnoticed == []
    assert tried > (250 if folders else 150)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_damage_to_every_file_is_noticed_in_all_variants(tmp_path: Path, name: str) -> None:
    tried, unnoticed = assault(build_variant(tmp_path / "c", variant_of(name)), num_bits=12)
    print(name, tried)
    assert unnoticed == []
    assert tried > 500


def swap_first_two_chunks(path: Path, num_chunks: int) -> None:
    """Two chunks of a shard change places, each with its own valid checksum, and the index says so correctly."""
    content = path.read_bytes()
    index = np.frombuffer(content[-16 * num_chunks - 4 : -4], "<u8").reshape(-1, 2)
    pieces = [content[at : at + size] for at, size in index.tolist()]
    pieces[:2] = pieces[1::-1]
    sizes = np.array([len(piece) for piece in pieces])
    table = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8").tobytes()
    path.write_bytes(b"".join([*pieces, table, google_crc32c.value(table).to_bytes(4, "little")]))
    assert path.stat().st_size == len(content)
    assert path.read_bytes() != content


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("array", ["ids", "entropy"])
def test_swapped_chunks_with_valid_checksums_are_noticed_by_deep_verify(
    tmp_path: Path, profile: str, array: str
) -> None:
    root = build_variant(tmp_path / "c", plain(profile))
    swap_first_two_chunks(data_file(root, array), num_chunks=3)
    report = verify(root, deep=True)
    assert [problem.file.split("/c/")[0] for problem in report.problems] == [f"parts/000001.zarr/{array}"], str(report)
    assert repair(root).quarantined == ["parts/000001.zarr"]


@pytest.mark.parametrize("name", [*(f"plain-{profile}" for profile in PROFILES), "per-layer-fast", "sampled-exact"])
def test_swapped_and_foreign_parts_of_every_kind(tmp_path: Path, name: str) -> None:
    variant = variant_of(name)
    root = build_variant(tmp_path / "c", variant)
    one, two, aside = part_path(root, 0), part_path(root, 1), root / "tmp" / "aside"
    for source, target in ((one, aside), (two, one), (aside, two)):
        source.rename(target)
    with pytest.raises(CacheCorruptError, match=r"this is part 1 under the name of part 0; run: vlsi-cache repair"):
        read_everything(root)
    assert not verify(root).ok
    shutil.rmtree(one)
    shutil.rmtree(two)
    other = build_variant(
        tmp_path / "other",
        type(variant)(variant.case, variant.header.model_copy(update={"fingerprint": {"teacher": "another"}})),
    )
    shutil.copytree(other / "parts", root / "parts", dirs_exist_ok=True)
    with pytest.raises(CacheCorruptError, match=r"belongs to another cache .*; run: vlsi-cache repair"):
        read_everything(root)
    assert sum("another cache" in problem.what for problem in verify(root).problems) == 2


def test_only_dead_leftovers_are_removed(root: Path, case: Case) -> None:
    host = files.host_name()
    names = {
        "dead": f"000001.{host}.999999999.0123456789ab.zarr",
        "own": f"000001.{host}.{os.getpid()}.0123456789ab.zarr",
        "alive": f"000001.{host}.{os.getppid()}.0123456789ab.zarr",
        "elsewhere": "000001.other-host.999999999.0123456789ab.zarr",
        "old": "000001.third-host.1.0123456789ab.zarr",
        "foreign": "notes.txt",
    }
    for name in names.values():
        (root / "tmp" / name).mkdir()
    os.utime(root / "tmp" / names["old"], (0, 0))
    CacheWriter.create_or_resume(root, header_of(case), case.vocab_order)
    left = {key for key, name in names.items() if (root / "tmp" / name).exists()}
    assert left == {"alive", "elsewhere", "foreign"}


def test_verify_never_raises(tmp_path: Path, root: Path) -> None:
    assert [problem.file for problem in verify(tmp_path / "nowhere").problems] == ["cache.json"]
    for index in list_parts(root):
        (part_path(root, index) / "part.json").write_bytes(b"[]")
    assert len(verify(root).problems) == 3
    with pytest.raises(VlsiCacheError):
        reader.open(root)
