"""Killed at any moment, a build goes on: no half part is ever visible, the files come out byte for byte the same."""

import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from test_store_cases import build, file_bytes, make_case

from vlsi_cache.store import reader
from vlsi_cache.store.verify import verify

# One process that has imported everything forks a writer for every step and kills it there. A step is any operation of
# Python on a file or folder of the cache (audit events), and every fsync; killed at the commits and every n-th other.
KILL_AT_EVERY_STEP = """
    import os, sys, traceback
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_store_cases import build, file_bytes, make_case
    from vlsi_cache.store import prune, reader, sampler, table, verify

    base, stride = Path({base!r}), {stride}
    case = make_case([[2, 1]], ["a", "b"], num_layers=2, top_k=2, num_tail=1)
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

    def resume(root, want):
        def work():
            build(root, case)
            assert verify.verify(root, deep=True).ok
            assert file_bytes(root / "parts") == want
            assert list((root / "tmp").iterdir()) == []
        assert child(work) == 0, (root, "the build did not continue")

    log = os.open(base / "log", os.O_CREAT | os.O_WRONLY)
    assert killed_writer(base / "whole", 10**9, log) == 0
    steps = (base / "log").read_text()
    assert steps.count("C") == 4, steps  # cache.json, vocab, the part, the table
    want = file_bytes(base / "whole" / "parts")
    commits = [i for i, step in enumerate(steps) if step == "C"]
    chosen = sorted({{*range(0, len(steps), stride), *commits, *(i + 1 for i in commits)}})
    seen = set()
    for step in chosen:
        root = base / f"at{{step}}"
        assert killed_writer(root, step) == 99, step
        seen.add(state(root))
        resume(root, want)
    assert seen == {{0, 1}}, seen
    print(len(chosen))
"""


def run_kills(tmp_path: Path, stride: int) -> int:
    code = textwrap.dedent(KILL_AT_EVERY_STEP).format(
        tests=str(Path(__file__).parent), base=str(tmp_path), stride=stride
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


def test_killed_at_steps_of_the_commit(tmp_path: Path) -> None:
    assert run_kills(tmp_path, stride=43) >= 10


@pytest.mark.slow
def test_killed_at_every_step_of_the_commit(tmp_path: Path) -> None:
    assert run_kills(tmp_path, stride=1) >= 150


WRITER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_store_crash import many_parts, keep_building
    keep_building(Path({root!r}), int(sys.argv[1]))
"""


def many_parts(num_parts: int = 40):
    names = [f"s{i}" for i in range(2 * num_parts)]
    return make_case([[7, 5]] * num_parts, names, num_layers=3, top_k=8)


def keep_building(root: Path, rank: int) -> None:
    from test_store_cases import header_of

    from vlsi_cache.store.writer import CacheWriter

    case = many_parts()
    writer = CacheWriter.create_or_resume(root, header_of(case), case.ranks)
    for index in writer.missing_parts(rank, 2):
        writer.write_part(index, case.parts[index])
    writer.finish()


@pytest.mark.slow
def test_two_writers_killed_at_random_many_times(tmp_path: Path) -> None:
    root, rng, kills = tmp_path / "cache", random.Random(0), 0
    code = textwrap.dedent(WRITER).format(tests=str(Path(__file__).parent), root=str(root))
    running: dict[int, subprocess.Popen[bytes]] = {}
    while kills < 60 and len(list(root.glob("parts/*"))) < 40:
        for rank in (0, 1):
            if rank not in running or running[rank].poll() is not None:
                assert rank not in running or running[rank].returncode in (0, -9)
                running[rank] = subprocess.Popen([sys.executable, "-c", code, str(rank)])
        victim = running[rng.randrange(2)]
        while victim.poll() is None and not list(root.glob(f"tmp/*.{victim.pid}.*")):
            time.sleep(0.01)  # until it has something to lose
        time.sleep(rng.uniform(0, 0.2))
        victim.kill()
        victim.wait()
        kills += 1
        if (root / "cache.json").exists():
            cache = reader.open(root, allow_incomplete=True)
            assert all(len(cache.read_part(index)) == 2 for index in cache.parts[-3:])
    for process in running.values():
        process.kill()
        process.wait()
    assert kills >= 3
    build(root, many_parts())
    assert verify(root, deep=True).ok
    assert list((root / "tmp").iterdir()) == []
    assert file_bytes(root / "parts") == file_bytes(build(tmp_path / "whole", many_parts()) / "parts")


def test_writers_that_race_for_every_part_agree(tmp_path: Path) -> None:
    """Two processes start at once on the same directory, both finish, and every part is there once."""
    code = textwrap.dedent(WRITER).replace("keep_building(", "many_parts.__defaults__ = (4,); keep_building(")
    code = code.format(tests=str(Path(__file__).parent), root=str(tmp_path / "cache"))
    racers = [subprocess.Popen([sys.executable, "-c", code, "0"], env={**os.environ}) for _ in range(2)]
    assert [racer.wait() for racer in racers] == [0, 0]
    assert verify(tmp_path / "cache", deep=True).ok
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []


# One process that has imported everything forks a child again and again, and kills it after a random time.
KILL_WHILE_CHANGING = """
    import os, random, signal, time
    from pathlib import Path
    import zarr.codecs, zarr.storage  # a child that is still importing has nothing to lose
    from vlsi_cache.store import reader, table
    from vlsi_cache.store.merge import merge
    from vlsi_cache.store.prune import prune

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
