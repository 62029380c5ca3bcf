"""Small random caches for the store's tests, and the check that they are valid input."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.store.format import CacheHeader
from vlsi_cache.store.vocab_order import VocabOrder
from vlsi_cache.store.writer import CacheWriter, PartSamples


@dataclass
class Case:
    """Everything a build would hand to the writer."""

    parts: list[PartSamples]
    id_of_rank: np.ndarray
    num_layers: int
    top_k: int
    num_tail: int
    num_head: int = 3

    @property
    def vocab_order(self) -> VocabOrder:
        """The table, and heads of three ids for each layer."""
        heads = [np.roll(self.id_of_rank, -layer)[: self.num_head] for layer in range(self.num_layers)]
        return VocabOrder(self.id_of_rank, np.stack(heads))


def make_rows(
    rng: np.random.Generator, vocab_size: int, num_layers: int, num_tokens: int, top_k: int, m: int
) -> SparseRows:
    """Random rows that keep what real ones keep: descending, distinct ids, tail draws outside the kept ids."""
    LT = (num_layers, num_tokens)
    p_LTK = np.sort(rng.random((*LT, top_k)), axis=-1)[..., ::-1]
    tail_LT = rng.uniform(0.01, 0.5, LT).astype(np.float32)
    p_LTK = p_LTK / p_LTK.sum(-1, keepdims=True) * (1 - tail_LT[..., None])
    start_LT1 = rng.integers(0, vocab_size, (*LT, 1))
    return SparseRows(
        ids_LTK=(start_LT1 + np.arange(top_k)) % vocab_size,
        logprobs_LTK=np.log(p_LTK).astype(np.float32),
        tail_ids_LTm=(start_LT1 + top_k + rng.integers(0, vocab_size - top_k, (*LT, m))) % vocab_size,
        lse_LTn=rng.normal(10, 3, (*LT, 1)).astype(np.float32),
        entropy_LT=rng.uniform(0, 5, LT).astype(np.float32),
        gold_logprob_LT=-rng.uniform(0, 9, LT).astype(np.float32),
        tail_mass_LT=tail_LT,
    )


def make_case(
    lengths: list[list[int]],
    names: list[str],
    *,
    vocab_size: int = 100,
    num_layers: int = 4,
    top_k: int = 6,
    num_tail: int = 2,
    seed: int = 0,
) -> Case:
    """A cache of len(lengths) parts; `lengths` are the response tokens of each sample, `names` all ids in order."""
    rng = np.random.default_rng(seed)
    left, parts = iter(names), []
    for part in lengths:
        ids = [next(left) for _ in part]
        rows = make_rows(rng, vocab_size, num_layers, sum(part), top_k, num_tail)
        response = [rng.integers(0, vocab_size, length).astype(np.uint32) for length in part]
        parts.append(PartSamples(ids, ["kind"] * len(ids), [f"digest-{name}" for name in ids], response, rows))
    return Case(parts, rng.permutation(vocab_size), num_layers, top_k, num_tail)


def header_of(case: Case) -> CacheHeader:
    return CacheHeader(
        spec={"name": "test"},
        fingerprint={"teacher": "tiny", "taus": [1.0]},
        layers=list(range(1, case.num_layers + 1)),
        num_model_layers=case.num_layers,
        top_k=[case.top_k] * case.num_layers,
        tail_samples=case.num_tail,
        vocab_size=len(case.id_of_rank),
        num_parts=len(case.parts),
        num_samples=sum(len(part.sample_ids) for part in case.parts),
        num_response_tokens=sum(len(ids) for part in case.parts for ids in part.response_ids),
    )


def standard_case(seed: int = 0) -> Case:
    """Three parts, seven samples, one of them a single token."""
    return make_case([[5, 1], [3, 4, 2], [6, 7]], [f"sample-{i}" for i in range(7)], seed=seed)


def build(root: Path, case: Case) -> Path:
    """Build or continue the cache of `case` at `root`."""
    writer = CacheWriter.create_or_resume(root, header_of(case), case.vocab_order)
    for index in writer.missing_parts():
        writer.write_part(index, case.parts[index])
    assert writer.finish()
    return root


def copy_cache(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, copy_function=shutil.copyfile))


@contextmanager
def put_back(*files: Path) -> Iterator[None]:
    """These files may be changed, removed or replaced by anything; afterwards they are what they were."""
    contents = {file: file.read_bytes() for file in files}
    try:
        yield
    finally:
        for file, content in contents.items():
            if file.is_dir() and not file.is_symlink():
                file.rmdir()
            else:
                file.unlink(missing_ok=True)
            file.write_bytes(content)


def file_bytes(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
