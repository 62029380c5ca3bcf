"""A teacher cut into pieces for several processes: what it says, trains and answers is what a whole one does."""

import io
import json
import os
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.launch import run_together
from helpers.tiny import make_rows, save_tokenizer, write_jsonl, write_spec
from helpers.vlms import picture_rows, save_vlm
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3VLConfig, StableLmConfig
from vlsi_cache_cli.main import main

import vlsi_cache as vc
from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import change, spec_from_dict
from vlsi_cache.errors import DiskFullError, ModelError, ProcessLostError, SpecError
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.parallel import check_cut, gather_head
from vlsi_cache.processes import joined
from vlsi_cache.store.reader import Cache
from vlsi_cache.store.writer import CacheWriter

TOLERANCE = 1e-5  # nats, of weights in fp32
KINDS = ("untied", "tied", "qwen2_vl")
CHANGES = ("teacher.layers=[1,2]", "store.profile=exact", "run.workers=0", "data.max_length=200", "data.limit=24")
CHANGES += ("store.part_mib=0.006",)
CUT = ("teacher.parallel=tensor",)
ANSWERS = ("--temperature", "1.5", "--num-samples", "2", "--max-new-tokens", "40", "--seed", "7")
FEW = ("data.limit=6",)


def save_llama(folder: Path, *, is_tied: bool, heads: int = 2, kv_heads: int = 2) -> Path:
    """Vocabulary and inner width are odd, so that the pieces of two processes are not alike."""
    size = save_tokenizer(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=(size + 8) | 1,
        hidden_size=24,
        intermediate_size=35,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=is_tied,
        attention_bias=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Setup:
    """For each kind of teacher the file of its spec, and the cache that one process has built."""

    folder: Path
    files: dict[str, Path]
    caches: dict[str, Cache]

    def spec(self, kind: str, *more: str) -> CacheSpec:
        return vc.load_spec(self.files[kind], overrides=[*CHANGES, *more])

    def words(self, command: str, kind: str, *more: str, sets: tuple[str, ...] = ()) -> list[str]:
        overrides = [word for one in (*CHANGES, *sets) for word in ("--set", one)]
        return [command, str(self.files[kind]), *more, *overrides]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("parallel")
    files, caches = {}, {}
    for kind in KINDS:
        model = (folder / f"model-{kind}", folder / f"spec-{kind}")
        for one in model:
            one.mkdir()
        save_vlm(model[0], kind, num_layers=3) if kind == "qwen2_vl" else save_llama(model[0], is_tied=kind == "tied")
        files[kind] = write_spec(model[1], model[0])
        if kind == "qwen2_vl":
            picture_rows(model[1], [[(16, 24)], [], [(24, 16), (16, 16)], [(16, 24)]])
    setup = Setup(folder, files, caches)
    for kind in KINDS:
        caches[kind] = vc.build_teacher(setup.spec(kind), out=folder / f"alone-{kind}")
    (folder / "spec-grown").mkdir()  # the data of the first kind as it is later
    files["grown"] = write_spec(folder / "spec-grown", folder / "model-untied")
    write_jsonl(folder / "spec-grown" / "rows.jsonl", [*make_rows(3, start=900), *make_rows(24)[4:]])
    return setup


def command(*words: object) -> tuple[int, str, str]:
    """A command line in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["vlsi-cache", *map(str, words)]
    with redirect_stdout(out), redirect_stderr(err):
        code = main()
    return code, out.getvalue(), err.getvalue()


def assert_same_rows(found: Cache, wanted: Cache) -> None:
    assert sorted(found) == sorted(wanted)
    assert found.header.fingerprint == wanted.header.fingerprint
    for name in wanted:
        one, other = found[name], wanted[name]
        np.testing.assert_array_equal(one.response_ids_R, other.response_ids_R)
        for what in ("logprobs_LTK", "entropy_LT", "gold_logprob_LT", "tail_mass_LT", "lse_LTn"):
            np.testing.assert_allclose(getattr(one, what), getattr(other, what), rtol=0, atol=TOLERANCE, err_msg=what)
        # Where another id stands, it is as likely as the one that stands there.
        differs = one.ids_LTK != other.ids_LTK
        assert differs.mean() < 0.02
        for place in zip(*differs.nonzero(), strict=True):
            row = place[:2]
            same = np.flatnonzero(other.ids_LTK[row] == one.ids_LTK[place])
            logprob = other.logprobs_LTK[row][same[0]] if same.size else other.logprobs_LTK[row][-1]
            assert abs(logprob - one.logprobs_LTK[place]) < TOLERANCE


@pytest.fixture(scope="module")
def together(setup: Setup) -> list[dict[str, Any]]:
    """What two processes that hold the teachers together do, one after the other in one launch."""
    folder = setup.folder
    shutil.copytree(setup.caches["untied"].path, folder / "grown")

    def work(_: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind in KINDS:
            vc.build_teacher(setup.spec(kind, *CUT, "run.vision_cache_mib=4"), out=folder / f"cut-{kind}")
        vc.train_verbalizers(setup.spec("untied", *CUT), out=folder / "verbalizers-cut")
        out = ("-o", folder / "cut.parquet")
        found["generate"] = command(*setup.words("generate", "untied", *map(str, out), *ANSWERS, sets=(*CUT, *FEW)))
        verify = ("verify", setup.caches["tied"].path, "--recompute", 3)
        found["verify"] = command(*verify, "--parallel", "tensor", "--json")
        found["refused"] = command(*verify)
        found["sync"] = sync_after_a_full_disk(setup)
        found["subset"] = vc.train_verbalizers(setup.spec("untied", *CUT), out=folder / "some", rank=1, world=2)
        with joined():
            found["parameters"] = pieces(setup)
        return found

    return run_together(2, work)


def sync_after_a_full_disk(setup: Setup) -> dict[str, Any]:
    """Two attempts at one sync, of which the first process has no room for its second part."""
    cut, adopted = setup.spec("grown", *CUT), []
    adopt = CacheWriter.adopt_part

    def full(self: CacheWriter, *args: Any) -> bool:
        adopted.append(args[0])
        if len(adopted) == 2:
            raise DiskFullError("the disk is full")
        return adopt(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "adopt_part", full)
        with pytest.raises(DiskFullError, match="the disk is full"):
            vc.sync_cache(cut, out=setup.folder / "grown")
    before = vc.open(setup.folder / "grown").header.digest
    for _ in range(2):  # the second time there is nothing to do
        after = vc.sync_cache(cut, out=setup.folder / "grown").header.digest
    return {"adopted": adopted, "before": before, "after": after}


def pieces(setup: Setup) -> list[int]:
    """Numbers that this process holds of a model, and how many there are in all."""
    model = ModelRef(setup.folder / "model-untied", parallel="tensor").load()
    local = [one.to_local() if hasattr(one, "to_local") else one for one in model.parameters()]  # type: ignore[operator]
    return [sum(one.numel() for one in local), sum(one.numel() for one in model.parameters())]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_one_process(kind: str, setup: Setup, together: list[dict[str, Any]]) -> None:
    assert all(isinstance(one, dict) for one in together), together
    cache = vc.open(setup.folder / f"cut-{kind}")
    assert_same_rows(cache, setup.caches[kind])
    assert (cache.header.spec["teacher"]["parallel"], vc.verify(cache.path, deep=True).ok) == ("tensor", True)
    assert sorted(path.name for path in (setup.folder / f"cut-{kind}").iterdir()) == sorted(
        path.name for path in setup.caches[kind].path.iterdir()
    )


def test_a_cache_follows_its_data(setup: Setup, together: list[dict[str, Any]]) -> None:
    """The first process decides and writes, both raise its error; rows are those of a build from nothing."""
    ours, theirs = (one["sync"] for one in together)
    assert (len(ours["adopted"]), theirs["adopted"]) == (2, [])
    synced = vc.open(setup.folder / "grown")
    assert ours["before"] == theirs["before"] == setup.caches["untied"].header.digest
    assert ours["after"] == theirs["after"] == synced.header.digest
    assert [synced.header.parents[0][name] for name in ("num_kept", "num_added")] == [20, 3]
    assert_same_rows(synced, vc.build_teacher(setup.spec("grown"), out=setup.folder / "grown-alone"))
    assert vc.verify(synced.path, deep=True).ok
    assert not (setup.folder / ".grown.sync").exists()


def test_each_process_holds_a_piece(together: list[dict[str, Any]]) -> None:
    for own, everything in (one["parameters"] for one in together):
        assert own < 0.53 * everything  # norms and biases of outputs are whole


def test_verbalizers_are_those_of_one_process(setup: Setup, together: list[dict[str, Any]]) -> None:
    del together
    vc.train_verbalizers(setup.spec("untied"), out=setup.folder / "verbalizers-alone")
    folders = [setup.folder / f"verbalizers-{name}" / "verbalizers" for name in ("alone", "cut")]
    for layer in (1, 2):
        ours, theirs = (load_file(folder / f"layer_{layer:04}.safetensors") for folder in folders)
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)
    some = load_file(setup.folder / "some" / "verbalizers" / "layer_0002.safetensors")  # of the second of two launches
    for key, tensor in load_file(folders[1] / "layer_0002.safetensors").items():
        torch.testing.assert_close(some[key], tensor, rtol=0, atol=1e-5)
    assert not (setup.folder / "some" / "verbalizers" / "layer_0001.safetensors").exists()
    # The teacher lies otherwise, and it is the same training: one that is finished stays so.
    assert vc.train_verbalizers(setup.spec("untied"), out=setup.folder / "verbalizers-cut")


def test_answers_are_those_of_one_process(setup: Setup, together: list[dict[str, Any]], run: Any) -> None:
    (code, out, err), other = (one["generate"] for one in together)
    assert (code, other) == (0, (0, "", ""))  # one voice
    assert "each of 2 processes holds" in err
    assert "rows: " in out
    alone = setup.folder / "alone.parquet"
    assert run(*setup.words("generate", "untied", "-o", str(alone), *ANSWERS, sets=FEW))[0] == 0
    assert alone.read_bytes() == (setup.folder / "cut.parquet").read_bytes()


def test_verify_runs_the_teacher_in_pieces(together: list[dict[str, Any]]) -> None:
    (code, out, _), other = (one["verify"] for one in together)
    found = json.loads(out)["recompute"]
    assert (code, other[:2]) == (0, (0, ""))
    assert (found["ok"], found["num_samples"]) == (True, 3)
    assert max(layer["max_dlogp"] for layer in found["layers"]) < TOLERANCE
    code, out, err = together[0]["refused"]  # the spec in this cache says `device_map`
    assert (code, out) == (2, "")
    assert "`verify` is one process, and 2 were started" in err


def test_killed_refused_and_by_two_launches(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = setup.spec("untied", *CUT)
    save_llama(tmp_path / "odd", is_tied=False, heads=3, kv_heads=1)
    odd = change(spec, teacher=change(spec.teacher, model=str(tmp_path / "odd")))
    has_part = CacheWriter.has_part

    def dies(self: CacheWriter, index: int) -> bool:
        """The other process, when this one looks whether part 8 is there: parts 0 and 2 are made by then."""
        if index == 8:
            os.kill(others[0], signal.SIGKILL)
        return has_part(self, index)

    others: list[int] = []

    def first(_: int) -> Any:
        with joined() as processes:
            others[:] = [processes.gather(os.getpid())[1]]
        with pytest.raises(ModelError) as refused:
            vc.build_teacher(odd, out=tmp_path / "odd-cache")
        with pytest.raises(SpecError, match="auto` cannot be found with"):
            vc.build_teacher(setup.spec("untied", *CUT, "run.batch_tokens=auto"), out=tmp_path / "odd-cache")
        with monkeypatch.context() as patch:
            patch.setattr(CacheWriter, "has_part", dies)
            with pytest.raises(ProcessLostError) as lost:
                vc.build_teacher(spec, out=tmp_path / "cache", rank=0, world=2)
        return str(refused.value), str(lost.value)

    found, other = run_together(2, first)
    assert other is None
    assert "3 attention heads and 1 key-value heads, and 2 processes cannot share both evenly" in found[0]
    assert not (tmp_path / "odd-cache").exists()
    assert "another process of this launch has ended" in found[1]
    half = vc.open(tmp_path / "cache", allow_incomplete=True)
    num_parts = half.header.num_parts
    assert (list(half.parts), num_parts > 8) == ([0, 2], True)
    shutil.copytree(tmp_path / "cache", tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "parts").rglob("*.json")}

    def second(_: int) -> tuple[str, list[int]]:
        again = vc.build_teacher(spec, out=tmp_path / "again", rank=0, world=2)  # the same command
        written: list[int] = []
        write = CacheWriter.write_part

        def noted(self: CacheWriter, index: int, samples: Any) -> bool:
            written.append(index)
            return write(self, index, samples)

        with monkeypatch.context() as patch:
            patch.setattr(CacheWriter, "write_part", noted)
            vc.build_teacher(spec, out=tmp_path / "cache", rank=1, world=2)  # the other launch
        return str(again.path), written

    (_, written), (_, nothing) = run_together(2, second)
    odd_ones = list(range(1, num_parts, 2))
    assert written[: len(odd_ones)] == odd_ones  # its own first, then what the other one has left
    assert sorted([*written, *half.parts]) == list(range(num_parts))
    assert nothing == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in ("cache", "again"):
        assert_same_rows(vc.open(tmp_path / name), setup.caches["untied"])


def test_without_a_launcher_it_is_refused(
    setup: Setup, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = setup.words("build-teacher", "untied", "-o", str(tmp_path / "cache"), sets=CUT)
    code, _, err = run(*words)
    assert code == 2
    assert "torchrun --nproc-per-node 2 -m vlsi_cache_cli build-teacher" in err
    assert str(tmp_path / "cache") in err
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(*setup.words("generate", "untied", "-o", str(tmp_path / "rows.parquet")))
    assert (code, "`generate` is one process, and 2 were started" in err) == (2, True)
    monkeypatch.delenv("WORLD_SIZE")
    code, _, err = run("verify", setup.caches["untied"].path, "--parallel", "tensor")
    assert (code, "--parallel does nothing without --recompute" in err) == (2, True)
    with pytest.raises(ModelError, match="only the joined processes"):
        ModelRef(setup.folder / "model-untied", parallel="tensor").load()
    with pytest.raises(SpecError, match="cuts the teacher into one piece for each process, and this is one alone"):
        vc.sync_cache(setup.spec("untied", *CUT), out=setup.caches["untied"].path)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "world", "hint"),
    [
        (28, 4, 8, "28 attention heads and 4 key-value heads, and 8 processes .* start 2 or 4 processes"),
        (64, 8, 8, ""),
        (8, None, 3, "8 attention heads and 8 key-value heads, and 3 .* start 2 or 4 or 8 processes"),
        ([8, 4], [2, 1], 2, "4, 8 attention heads and 1, 2 key-value heads, .* use `teacher.parallel: device_map`"),
    ],
)
def test_heads_are_counted_before_loading(heads: Any, kv_heads: Any, world: int, hint: str) -> None:
    plan = LlamaConfig().base_model_tp_plan
    text = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, base_model_tp_plan=plan)
    config = SimpleNamespace(get_text_config=lambda: text)
    if not hint:
        check_cut("model", config, world)
        return
    with pytest.raises(ModelError, match=hint):
        check_cut("model", config, world)


def test_a_model_that_would_stay_whole_is_refused(setup: Setup) -> None:
    """Of some families transformers has no plan, or one for the head alone."""
    for config in (StableLmConfig(), Qwen3VLConfig()):
        check_cut("model", config, 1)
        with pytest.raises(ModelError, match=f"no plan to cut the layers of `{config.model_type}`.* use `teacher"):
            check_cut("model", config, 2)
    with pytest.raises(ModelError, match="no plan to cut the layers of `LlamaForCausalLM`"):
        gather_head(ModelRef(setup.folder / "model-untied").load(), "model")


@pytest.mark.parametrize(
    ("parallel", "device", "wanted"),
    [
        ("device_map", "auto", "auto"),
        ("device_map", "cuda:1", {"": "cuda:1"}),
        ("none", "auto", {"": "cuda"}),
        ("none", "cpu", None),
    ],
)
def test_where_a_whole_teacher_lies(
    parallel: Any, device: str, wanted: Any, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    asked: list[Any] = []

    def loads(*_: Any, device_map: Any, **__: Any) -> None:
        asked.append(device_map)
        raise OSError("seen enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loads)
    with pytest.raises(ModelError, match="seen enough"):
        ModelRef(setup.folder / "model-untied", parallel=parallel).load(device)
    assert asked == [wanted]


def test_specs_of_earlier_releases_say_nothing_of_it(setup: Setup) -> None:
    stored = json.loads(json.dumps(setup.caches["tied"].header.spec))
    del stored["teacher"]["parallel"]
    spec = spec_from_dict(stored, where="cache.json")
    assert spec.teacher.parallel == "device_map"
    assert setup.spec("tied", *CUT).fingerprint_fields() == spec.fingerprint_fields()
