"""Killed at any moment, a build goes on: no half part is ever visible, the files come out byte for byte the same."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.caches import build, file_bytes, header_of, make_case, standard_case

from vlsi_cache.errors import CacheNotFoundError
from vlsi_cache.store import header, reader
from vlsi_cache.store.check import repair, verify

# One process that has imported everything forks a writer for every step and kills it there. A step is any operation of
# Python on a file or folder of the cache (audit events), and every fsync; killed at the commits and every n-th other.
# Whoever goes on then brings a rank table of its own: the one that was there first must decide every byte.
KILL_AT_EVERY_STEP = """
    import os, sys, traceback
    import pyarrow.dataset, zarr.codecs, zarr.storage  # or every child would import them
    from dataclasses import replace
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from helpers.caches import build, file_bytes, make_case
    from vlsi_cache.store import check, dataset, reader, table
    from vlsi_cache.store.derive import prune

    base, stride = Path({base!r}), {stride}
    case = make_case([[2, 1]], ["a", "b"], num_layers=2, top_k=2, num_tail=1)
    other = replace(case, id_of_rank=case.id_of_rank[::-1])
    TOUCHING = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "fsync")

    def child(work):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = work() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def killed_writer(root, step, log=None):
        left, fsync = step, os.fsync
        def count(event, args):
            nonlocal left
            if event in TOUCHING and (event == "fsync" or str(root) in str(args[0])):
                if log is not None:
                    commits = event in ("os.rename", "os.link") and str(args[1]).startswith(str(root))
                    os.write(log, b"C" if commits and "/tmp/" not in str(args[1])[len(str(root)):] else b".")
                left -= 1
                if left < 0:
                    os._exit(99)
        def audited_fsync(handle):
            count("fsync", ())
            fsync(handle)
        def work():
            os.fsync = audited_fsync
            sys.addaudithook(count)
            build(root, case)
        return child(work)

    def state(root):
        parts = sorted(p.name for p in (root / "parts").iterdir()) if (root / "parts").is_dir() else []
        def work():  # whatever is visible is whole
            if parts and (root / "cache.json").exists():
                cache = reader.open(root)
                assert list(cache) == ["a", "b"] and len(cache.read_part(0)) == 2
        assert child(work) == 0, (root, "a half-written part is visible")
        return len(parts)

    def resume(root):
        want = want_first if (root / "vocab").exists() else want_other
        def work():
            build(root, other)
            assert check.verify(root, deep=True).ok
            assert file_bytes(root / "parts") == want
            assert file_bytes(root / "vocab") == file_bytes(root / "vocab-copy")
            rows = reader.open(root).read_part(0)
            assert (rows[0].ids_LTK == case.parts[0].rows.ids_LTK[:, :2]).all()
            assert list((root / "tmp").iterdir()) == []
        assert child(work) == 0, (root, "the build did not continue")

    log = os.open(base / "log", os.O_CREAT | os.O_WRONLY)
    assert killed_writer(base / "whole", 10**9, log) == 0
    steps = (base / "log").read_text()
    assert steps.count("C") == 5, steps  # vocab, cache.json, vocab-copy, the part, the table
    assert child(lambda: build(base / "other", other) and 0) == 0
    want_first, want_other = (file_bytes(base / name / "parts") for name in ("whole", "other"))
    assert want_first != want_other
    commits = [i for i, step in enumerate(steps) if step == "C"]
    chosen = sorted({{*range(0, len(steps), stride), *commits, *(i + 1 for i in commits)}})
    seen = set()
    for step in chosen:
        root = base / f"at{{step}}"
        assert killed_writer(root, step) == 99, step
        seen.add(state(root))
        resume(root)
    assert seen == {{0, 1}}, seen
    print(len(chosen))
"""


def run_kills(tmp_path: Path, stride: int) -> int:
    code = textwrap.dedent(KILL_AT_EVERY_STEP).format(
        tests=str(Path(__file__).parents[1]), base=str(tmp_path), stride=stride
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


def test_killed_at_steps_of_the_commit(tmp_path: Path) -> None:
    assert run_kills(tmp_path, stride=43) >= 10


@pytest.mark.slow
def test_killed_at_every_step_of_the_commit(tmp_path: Path) -> None:
    assert run_kills(tmp_path, stride=1) >= 150


def test_killed_between_the_rank_table_and_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost and nothing is corrupt; a writer with another table then takes the one that is there."""
    case, root = standard_case(), tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(header, "_create_header", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(root, case)
    assert sorted(path.name for path in root.iterdir()) == ["tmp", "vocab"]
    report = verify(root)
    assert [problem.file for problem in report.problems] == ["cache.json"]
    assert "interrupted, and nothing is lost; run the command that builds" in str(report)
    assert "no part was written yet" in str(repair(root, yes=True))
    with pytest.raises(CacheNotFoundError, match="the start of a cache, interrupted before its first part: run"):
        reader.open(root)
    build(root, replace(case, id_of_rank=case.id_of_rank[::-1]))
    assert reader.open(root).vocab_order.digest == case.vocab_order.digest
    assert file_bytes(root / "parts") == file_bytes(build(tmp_path / "whole", case) / "parts")
    assert str(repair(root)) == "nothing to repair"


# Two writers at work on one cache, one of them killed at a random moment, and again; when a cache is finished in spite
# of that, it is compared with an undisturbed one and the next is begun.
KILL_AT_RANDOM = """
    import os, random, signal, sys, time, traceback
    import pyarrow.dataset, zarr.codecs, zarr.storage  # or every child would import them
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from helpers.caches import build, file_bytes
    from store.test_crash import keep_building, many_parts
    from vlsi_cache.store import check, dataset, reader, table
    from vlsi_cache.store.derive import prune

    base, wanted = Path({base!r}), {wanted}
    rng, kills, finished = random.Random(0), 0, 0

    def forked(work):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        return pid

    def succeed(work):
        assert os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]) == 0

    def parts_are_whole(root):
        cache = reader.open(root, allow_incomplete=True)
        assert all(len(cache.read_part(index)) == 2 for index in cache.parts)

    def compare(root):
        build(root, many_parts())
        assert check.verify(root, deep=True).ok
        assert list((root / "tmp").iterdir()) == []
        assert file_bytes(root / "parts") == file_bytes(base / "whole" / "parts")

    succeed(lambda: build(base / "whole", many_parts()))
    while kills < wanted:
        root, running = base / f"cache{{finished}}", {{}}
        while kills < wanted and len(list(root.glob("parts/*"))) < 40:
            for rank in (0, 1):
                if rank not in running:
                    running[rank] = forked(lambda: keep_building(root, rank))
            victim = rng.randrange(2)
            time.sleep(rng.uniform(0, 0.25))
            os.kill(running[victim], signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(running.pop(victim), 0)[1])
            assert code in (0, -9), code
            kills += code == -9
            if (root / "cache.json").exists():
                succeed(lambda: parts_are_whole(root))
        for pid in running.values():
            os.kill(pid, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (0, -9)
        succeed(lambda: compare(root))
        finished += 1
    print(kills, finished)
"""
WRITER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from store.test_crash import many_parts, keep_building
    keep_building(Path({root!r}), int(sys.argv[1]))
"""


def many_parts(num_parts: int = 40):
    names = [f"s{i}" for i in range(2 * num_parts)]
    return make_case([[7, 5]] * num_parts, names, num_layers=3, top_k=8)


def keep_building(root: Path, rank: int) -> None:
    from vlsi_cache.store.writer import CacheWriter

    case = many_parts()
    writer = CacheWriter.create_or_resume(root, header_of(case), case.vocab_order)
    for index in writer.missing_parts(rank, 2):
        writer.write_part(index, case.parts[index])
    writer.finish()


@pytest.mark.slow
def test_two_writers_killed_at_two_hundred_random_moments(tmp_path: Path) -> None:
    code = textwrap.dedent(KILL_AT_RANDOM).format(tests=str(Path(__file__).parents[1]), base=str(tmp_path), wanted=200)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kills, finished = map(int, done.stdout.split())
    assert kills == 200
    assert finished >= 2


def test_writers_that_race_for_every_part_agree(tmp_path: Path) -> None:
    """Two processes start at once on the same directory, both finish, and every part is there once."""
    code = textwrap.dedent(WRITER).replace("keep_building(", "many_parts.__defaults__ = (4,); keep_building(")
    code = code.format(tests=str(Path(__file__).parents[1]), root=str(tmp_path / "cache"))
    racers = [subprocess.Popen([sys.executable, "-c", code, "0"], env={**os.environ}) for _ in range(2)]
    assert [racer.wait() for racer in racers] == [0, 0]
    assert verify(tmp_path / "cache", deep=True).ok
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []


# One process that has imported everything forks a child again and again, and kills it after a random time.
KILL_WHILE_CHANGING = """
    import os, random, signal, time
    from pathlib import Path
    import pyarrow.dataset, zarr.codecs, zarr.storage  # a child that is still importing has nothing to lose
    from vlsi_cache.store import reader, table
    from vlsi_cache.store.derive.merge import merge
    from vlsi_cache.store.derive.prune import prune

    base, rng, seen = Path({base!r}), random.Random(0), []
    def change(out):
        {change}
    alive = True
    while alive:
        pid = os.fork()
        if pid == 0:
            change(base / "new")
            os._exit(0)
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if list((base / "new").glob(f"tmp/*.{{pid}}.*")):  # it has something to lose
                time.sleep(rng.uniform(0, 0.05 * (1 + len(seen))))  # longer every time: it ends on any machine
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        alive = os.waitpid(pid, 0)[1] != 0
        half = reader.open(base / "new", allow_incomplete=True) if (base / "new" / "cache.json").exists() else None
        assert half is None or all(half.read_part(index) for index in half.parts)
        seen.append(0 if half is None else len(half.parts))
    change(base / "whole")
    print(*seen)
"""


@pytest.mark.parametrize(
    "change",
    [
        """prune(base / "a", out, top_k=3, tokens="random:0.7", where="id != 'a3'")""",
        """merge([base / "a", base / "b"], out)""",
    ],
    ids=["prune", "merge"],
)
def test_killed_at_random_a_change_goes_on(tmp_path: Path, change: str) -> None:
    num_parts = {"prune": 9, "merge": 3}[change.partition("(")[0]]
    for number, name in enumerate("ab"):
        names = [f"{name}{i}" for i in range(2 * num_parts)]
        case = make_case([[30, 20]] * num_parts, names, num_layers=3, top_k=8, seed=number)
        build(tmp_path / name, case)
    before = file_bytes(tmp_path / "a"), file_bytes(tmp_path / "b")
    code = textwrap.dedent(KILL_WHILE_CHANGING).format(base=str(tmp_path), change=change)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = list(map(int, done.stdout.split()))
    assert len(seen) >= 3, seen
    assert seen == sorted(seen)
    assert (file_bytes(tmp_path / "a"), file_bytes(tmp_path / "b")) == before
    for folder in ("parts", "vocab"):
        assert file_bytes(tmp_path / "new" / folder) == file_bytes(tmp_path / "whole" / folder)
    assert (tmp_path / "new" / "cache.json").read_bytes() == (tmp_path / "whole" / "cache.json").read_bytes()
    assert verify(tmp_path / "new", deep=True).ok
    assert list((tmp_path / "new" / "tmp").iterdir()) == []
