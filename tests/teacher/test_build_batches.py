"""The same rows in any batch and block, in a stream too; errors that name their batch; nothing hangs."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.builds import part_bytes
from helpers.probe_models import make_model
from helpers.tiny import save_tokenizer, write_spec

import vlsi_cache as vc
from vlsi_cache.errors import BatchTooLargeError, ModelError
from vlsi_cache.io import ahead
from vlsi_cache.sparse.quantize import encode_levels, undo_descents
from vlsi_cache.sparse.rows import SparseRows
from vlsi_cache.sparse.topk import teacher_rows
from vlsi_cache.teacher import forward as teacher_module
from vlsi_cache.teacher.build import build_teacher
from vlsi_cache.teacher.forward import PartBatch, Teacher, load_teacher
from vlsi_cache.teacher.inputs import open_teacher_inputs

NUM_SAMPLES = 16
TIED = 1e-5  # log-probs nearer than that may change places with the order of a sum
SAME_KL = 1e-6  # nats


@pytest.fixture(scope="module")
def tiny(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp("tiny")
    inputs = open_teacher_inputs(vc.load_spec(write_spec(folder, teacher_folder, num_rows=NUM_SAMPLES)))
    return load_teacher(inputs, device="cpu")


@pytest.fixture(scope="module")
def shipped() -> Teacher:
    """The teacher of the demo, with its verbalizers and pictures."""
    spec = vc.load_spec("demo", overrides=[f"data.limit={NUM_SAMPLES}", "run.device=cpu"])
    return load_teacher(open_teacher_inputs(spec), device="cpu")


def rows_in_batches(teacher: Teacher, size: int) -> SparseRows:
    indices = list(range(NUM_SAMPLES))
    batches = [indices[start : start + size] for start in range(0, NUM_SAMPLES, size)]
    return SparseRows.concat([rows for batch in batches for rows in teacher.rows(batch)])


def levels(rows: SparseRows) -> np.ndarray:
    stored_KN = np.moveaxis(encode_levels(rows.logprobs_LTK), -1, 0).copy()
    undo_descents(stored_KN)
    return np.moveaxis(stored_KN, 0, -1).astype(int)


def kept_kl(one: SparseRows, other: SparseRows) -> np.ndarray:
    """KL of two rows over the ids that both keep and one bucket for all others, float64 [L, T]."""
    same_LTKK = one.ids_LTK[..., :, None] == other.ids_LTK[..., None, :]
    logp_LTK = one.logprobs_LTK.astype(np.float64)
    logq_LTK = np.where(same_LTKK, other.logprobs_LTK[..., None, :].astype(np.float64), -np.inf).max(-1)
    both_LTK = same_LTKK.any(-1) & np.isfinite(logp_LTK)
    p_LTK, q_LTK = (np.where(both_LTK, np.exp(logs), 0.0) for logs in (logp_LTK, logq_LTK))
    with np.errstate(invalid="ignore", divide="ignore"):
        terms_LTK = np.where(both_LTK, p_LTK * (logp_LTK - logq_LTK), 0.0)
        rest = [np.clip(1 - share_LTK.sum(-1), 1e-9, None) for share_LTK in (p_LTK, q_LTK)]
        return terms_LTK.sum(-1) + rest[0] * np.log(rest[0] / rest[1])


def assert_same_rows(one: SparseRows, other: SparseRows, *, same_draws: bool = True) -> None:
    moved_LTK = one.ids_LTK != other.ids_LTK
    # An id stands elsewhere, or not at all, only beside another that is as likely.
    assert (np.abs(one.logprobs_LTK - other.logprobs_LTK)[moved_LTK] <= TIED).all()
    assert moved_LTK.mean() < 0.01
    finite_LTK = np.isfinite(one.logprobs_LTK)
    np.testing.assert_array_equal(finite_LTK, np.isfinite(other.logprobs_LTK))
    np.testing.assert_allclose(one.logprobs_LTK[finite_LTK], other.logprobs_LTK[finite_LTK], rtol=0, atol=2e-5)
    assert np.abs(levels(one) - levels(other)).max() <= 1
    assert np.abs(kept_kl(one, other)).max() <= SAME_KL
    if same_draws:  # a uniform at the very edge between two ids may fall on either side
        assert (one.tail_ids_LTm != other.tail_ids_LTm).mean() < 1e-3
    for name in ("lse_LTn", "entropy_LT", "gold_logprob_LT", "tail_mass_LT"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("which", ["tiny", "shipped"])
def test_rows_do_not_depend_on_batch_or_block(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher: Teacher = request.getfixturevalue(which)
    alone = rows_in_batches(teacher, 1)
    assert alone.num_tokens > NUM_SAMPLES
    for size in (3, 16):
        assert_same_rows(alone, rows_in_batches(teacher, size))

    def in_small_blocks(*args: Any, **options: Any) -> dict[str, torch.Tensor]:
        return teacher_rows(*args, **options, block=96)

    monkeypatch.setattr(teacher_module, "teacher_rows", in_small_blocks)
    blocks = rows_in_batches(teacher, 3)
    # A draw goes through the groups of a block and then its runners-up: other blocks give other draws of the same tail.
    assert_same_rows(alone, blocks, same_draws=False)
    blocks.validate(teacher.inputs.encoder.vocab_size)


def test_the_comparison_of_rows_notices_a_difference(tiny: Teacher) -> None:
    rows = rows_in_batches(tiny, 16)
    for name, change in (("logprobs_LTK", 1e-4), ("entropy_LT", 1e-3), ("tail_mass_LT", 1e-3), ("tail_ids_LTm", 1)):
        with pytest.raises(AssertionError):
            assert_same_rows(rows, replace(rows, **{name: getattr(rows, name) - np.array(change, "f4")}))
    swapped = replace(rows, ids_LTK=rows.ids_LTK[..., [1, 0, *range(2, rows.top_k)]])
    with pytest.raises(AssertionError):
        assert_same_rows(rows, swapped)


def test_a_stream_is_the_rows_of_its_batches_in_order(tiny: Teacher) -> None:
    batches = [PartBatch(0, [3, 1]), PartBatch(0, [0]), PartBatch(2, [5, 2, 4])]
    found = list(tiny.stream(batches))
    assert [work for work, _ in found] == batches
    for (_, indices), rows in found:
        for one, wanted in zip(rows, tiny.rows(indices), strict=True):
            for name, value in vars(wanted).items():
                np.testing.assert_array_equal(getattr(one, name), value)
    assert list(tiny.stream([])) == []


def no_threads_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("vlsi-cache")]


def test_work_ahead_is_in_order_bounded_and_ends() -> None:
    done: list[int] = []
    taken: list[int] = []

    def work(item: int) -> int:
        done.append(item)
        return item * item

    for result in ahead(work, range(20), num_ahead=3):
        taken.append(result)
        time.sleep(0.001)
        assert len(done) <= len(taken) + 4
    assert taken == [item * item for item in range(20)]
    assert no_threads_left()


def test_an_error_ahead_comes_after_what_is_good_and_leaves_no_thread() -> None:
    def work(item: int) -> int:
        if item == 5:
            raise OSError("no such picture")
        return item

    taken: list[int] = []
    with pytest.raises(OSError, match="no such picture"):
        taken.extend(ahead(work, range(100)))
    assert taken == [0, 1, 2, 3, 4]
    assert no_threads_left()


def test_leaving_early_does_not_wait_for_what_is_left() -> None:
    started: list[int] = []
    stream = ahead(lambda item: started.append(item) or item, iter(range(10**9)))
    assert next(stream) == 0
    stream.close()
    assert len(started) <= 4
    assert no_threads_left()


def fails_at(sample: str, error: BaseException, method: str) -> Callable[..., Any]:
    """`Teacher.<method>` that raises when the record `sample` is in the batch, inside the place that names errors."""
    original = getattr(Teacher, method)

    def failing(self: Teacher, *args: Any) -> Any:
        if sample in [self.inputs.records[i].id for i in args[-1]]:
            raise error
        return original(self, *args)

    return failing


def test_a_failed_batch_names_its_samples_and_nothing_hangs(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = vc.load_spec(spec_file)
    whole = build_teacher(spec, out=tmp_path / "whole")
    victim = whole.part_record(whole.parts[-1]).sample_ids[0]
    for method in ("_tail_uniforms", "_narrowed"):  # in the thread, and behind the forward pass
        out = tmp_path / method
        with monkeypatch.context() as patch:
            patch.setattr(Teacher, method, fails_at(victim, RuntimeError("boom"), method))
            with pytest.raises(ModelError, match=rf"part {whole.parts[-1]}: .*`{victim}`.* failed: RuntimeError: boom"):
                build_teacher(spec, out=out)
        assert no_threads_left()
        # What was good before it is there, also the rows that were still on their way.
        assert vc.open(out, allow_incomplete=True).parts == whole.parts[:-1]
        build_teacher(spec, out=out)
        assert part_bytes(out) == part_bytes(tmp_path / "whole")


def too_much_for_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def too_much_for_any_cpu() -> None:
    torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize("allocate", [too_much_for_a_gpu, too_much_for_any_cpu])
def test_out_of_memory_says_what_to_do(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocate: Callable[[], None]
) -> None:
    spec = vc.load_spec(spec_file)
    inputs = open_teacher_inputs(spec)
    layer_rows = Teacher._layer_rows

    def small_memory(self: Teacher, batch: Any, uniforms_LTm: Any) -> Any:
        if batch.inputs["input_ids"].numel() > 150:
            allocate()
        return layer_rows(self, batch, uniforms_LTm)

    monkeypatch.setattr(Teacher, "_layer_rows", small_memory)
    with pytest.raises(
        BatchTooLargeError, match=r"^part 0: out of memory in a batch of \d+ samples and 1\d\d tokens .*`row-"
    ) as caught:
        build_teacher(spec, out=tmp_path / "cache")
    assert "with `--batch-tokens` and a smaller number: it goes on where it was" in str(caught.value)
    assert no_threads_left()
    cache = build_teacher(vc.load_spec(spec_file, overrides=["run.batch_tokens=100"]), out=tmp_path / "cache")
    assert len(cache) == len(inputs.records)


def test_ctrl_c_ends_the_build_at_once(spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "_narrowed", fails_at("row-11", KeyboardInterrupt(), "_narrowed"))
        with pytest.raises(KeyboardInterrupt):
            build_teacher(vc.load_spec(spec_file), out=tmp_path / "cache")
    assert no_threads_left()


def test_rows_of_no_number_name_sample_token_and_layer(tiny: Teacher) -> None:
    indices = [4, 7]
    prepared = tiny.prepare(PartBatch(0, indices))
    launched = tiny.launch(prepared)
    at = launched.num_tokens[0] + 1
    spoiled = launched.layers[2]["lse_Tn"].clone()
    spoiled[at] = torch.nan
    launched.layers[2]["lse_Tn"] = spoiled
    with pytest.raises(ModelError, match=r"^sample `row-7`, response token 1, layer 3: the logits are not finite"):
        tiny.collect(launched)


@pytest.mark.parametrize(("family", "key"), [("gpt_neo", "max_position_embeddings"), ("mpt", "max_seq_len")])
def test_a_packed_row_is_no_wider_than_the_model_s_positions(family: str, key: str, tmp_path: Path) -> None:
    """Samples that fit: these families have a buffer that is as long as their positions."""
    size = save_tokenizer(tmp_path / "teacher")
    make_model(family, vocab_size=size, **{key: 160}).save_pretrained(tmp_path / "teacher")
    spec = write_spec(tmp_path, tmp_path / "teacher", num_rows=12)
    overrides = ["teacher.layers=[1]", "run.batch_tokens=400"]
    cache = vc.build_teacher(vc.load_spec(spec, overrides=overrides), out=tmp_path / "c")
    assert len(cache) > 0
