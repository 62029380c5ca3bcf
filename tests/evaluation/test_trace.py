"""Free-running answers of layers against a naive loop without any cache; refusals; the page.

Legend: S positions, D hidden size, V vocabulary.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pages import checked
from helpers.probe_models import make_model
from helpers.tiny import save_model, save_tokenizer
from PIL import Image
from torch.nn.functional import silu

import vlsi_cache as vc
from vlsi_cache.data.collate import collate
from vlsi_cache.data.encoder import load_encoder
from vlsi_cache.errors import DataError, ModelError, SpecError
from vlsi_cache.evaluation import trace as module
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.verbalizer import build_verbalizers
from vlsi_cache.report.example import Trace
from vlsi_cache.report.pages import write_trace_page

QWEN2_VL = Path(vc.__file__).parent / "demo" / "teacher"
NUM_NEW = 6


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def save_verbalizers(
    model: Path, out: Path, layers: list[int], structure: Any = "verb-ffn", noise: float = 0.3
) -> Path:
    """Verbalizers that change what the layers say."""
    backbone = Backbone(ModelRef(model).load())
    verbalizers = build_verbalizers(backbone, layers, structure=structure)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in verbalizers.named_parameters():
            if "down_proj" in name or "o_proj" in name:
                parameter.normal_(0, noise)
    return verbalizers.save(out, provenance={"teacher_digest": ModelRef(model).digest})


@torch.no_grad()
def naive(folder: Path, verbalizers: Path, layer: int | None, prompt: str, images: list[Path]) -> tuple[list, list]:
    """Ids and probabilities, the whole sequence anew for every token, by transformers alone."""
    model, encoder = ModelRef(folder).load(), load_encoder(folder)
    encoded = encoder.encode(module._record(prompt, tuple(map(module._load_image, images))), with_response=False)
    inputs = collate([encoded], pad_id=0).inputs
    norm, head_VD = Backbone(model).final_norm, model.get_output_embeddings().weight[: encoder.vocab_size]
    ids, probs = [], []
    while len(ids) < NUM_NEW and encoder.eot_id not in ids:
        said_1S = torch.tensor([ids], dtype=torch.long)
        given = {**inputs, "input_ids": torch.cat([inputs["input_ids"], said_1S], 1)}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        if "mm_token_type_ids" in given:
            given["mm_token_type_ids"] = torch.cat([given["mm_token_type_ids"], torch.zeros_like(said_1S)], 1)
        states = model(**given, output_hidden_states=True, use_cache=False).hidden_states
        state_D = states[-1][0, -1]
        if layer is not None:
            weights = _weights(verbalizers, layer)
            hidden_D = states[layer][0, -1]
            eps = json.loads((verbalizers / "verbalizers.json").read_text())["architecture"]["norm_eps"]
            normed_D = hidden_D * (hidden_D.square().mean() + eps).rsqrt() * weights["norm.weight"]
            gate, up, down = (weights[f"body.{name}_proj.weight"] for name in ("gate", "up", "down"))
            state_D = norm(hidden_D + down @ (silu(gate @ normed_D) * (up @ normed_D)))
        probs_V = (head_VD @ state_D).softmax(0)
        ids.append(int(probs_V.argmax()))
        probs.append(float(probs_V.max()))
    return ids, probs


def _weights(verbalizers: Path, layer: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found = load_file(verbalizers / f"layer_{layer:04d}.safetensors")
    return {name.removeprefix("blocks.0."): tensor for name, tensor in found.items()}


@pytest.mark.parametrize(("family", "num_images"), [("llama", 0), ("qwen2_vl", 2), ("qwen2_vl", 0), ("bamba", 0)])
def test_layers_say_what_a_loop_without_a_cache_says(
    family: str, num_images: int, teacher_folder: Path, picture: Path, tmp_path: Path
) -> None:
    folder, layers = (teacher_folder, [1, 3, 4]) if family == "llama" else (QWEN2_VL, [2, 5, 7])
    if family == "bamba":  # a hybrid
        folder, layers = tmp_path / "model", [1, 2]
        make_model(family, vocab_size=save_tokenizer(folder), pad_token_id=0).save_pretrained(folder)
    images, trained = [picture] * num_images, tmp_path / "run"  # as train-verbalizers leaves it
    verbalizers = save_verbalizers(folder, trained / "verbalizers", layers, noise=0.02 if family == "qwen2_vl" else 0.3)
    found = vc.trace(
        folder, prompt="say the red dog", verbalizers=trained, images=images, max_new_tokens=NUM_NEW, device="cpu"
    )
    assert [found.name(one.layer) for one in found.said] == [*map(str, layers), "last"]
    for one, layer in zip(found.said, [*layers, None], strict=True):
        ids, probs = naive(folder, verbalizers, layer, "say the red dog", images)
        assert [token.id for token in one.tokens] == ids
        assert [token.prob for token in one.tokens] == pytest.approx(probs, rel=1e-4)
        assert one.mean_prob == pytest.approx(sum(probs) / len(probs), rel=1e-4)
        assert one.has_ended == (load_encoder(folder).eot_id in ids)
    assert len({one.text for one in found.said}) > 1


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_the_last_layer_is_greedy_generation(family: str, teacher_folder: Path, picture: Path) -> None:
    folder, images = (teacher_folder, []) if family == "llama" else (QWEN2_VL, [picture])
    model, encoder = ModelRef(folder).load(), load_encoder(folder)
    encoded = encoder.encode(module._record("what is it?", tuple(map(module._load_image, images))), with_response=False)
    inputs = collate([encoded], pad_id=0).inputs
    padding = list(range(encoder.vocab_size, model.get_output_embeddings().weight.shape[0]))  # no layer may say these
    options = {"do_sample": False, "eos_token_id": encoder.eot_id, "pad_token_id": 0, "suppress_tokens": padding}
    expected = model.generate(**inputs, max_new_tokens=12, **options)[0, encoded.num_prompt :].tolist()
    found = vc.trace(
        folder,
        prompt="what is it?",
        verbalizers="none",
        images=images,
        layers=["last"],
        max_new_tokens=12,
        device="cpu",
    )
    assert [token.id for token in found.said[0].tokens] == expected


def test_verbalizers_that_attend_run_whole_sequences(picture: Path, tmp_path: Path) -> None:
    plain = {"prompt": "how many?", "images": [picture], "layers": [2, 5, "last"], "max_new_tokens": 5, "device": "cpu"}
    # Zero at the start: what the layers say is the logit lens, which has a key-value cache.
    fresh = save_verbalizers(QWEN2_VL, tmp_path / "fresh", [2, 5], "decoder", noise=0.0)
    lens, attending = (vc.trace(QWEN2_VL, verbalizers=one, **plain) for one in ("none", fresh))
    assert [one.text for one in attending.said] == [one.text for one in lens.said]
    for a, b in zip(attending.said, lens.said, strict=True):
        assert [token.prob for token in a.tokens] == pytest.approx([token.prob for token in b.tokens], rel=1e-4)
    other = save_verbalizers(QWEN2_VL, tmp_path / "other", [2, 5], "decoder", noise=0.2)
    assert vc.trace(QWEN2_VL, verbalizers=other, **plain).said[0] != lens.said[0]


def test_a_run_brings_its_student_and_verbalizers(student_folder: Path, teacher_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(teacher_folder, run / "student")
    spec = {"name": "t", "teacher": {"model": str(teacher_folder), "layers": [1]}, "data": {"path": "rows.jsonl"}}
    record = {"kind": "distill", "status": "running", "recipe": "vlsi", "spec": spec}
    record["command"] = "vlsi-cache distill c -o run"
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(SpecError, match="--verbalizers none"):
        vc.trace(run, prompt="say", device="cpu")
    trained = save_model(tmp_path / "before", num_layers=5, hidden=32, seed=7)
    save_verbalizers(trained, run / "verbalizers", [1, 2])  # another head: that of the student before its last stage
    found = vc.trace(run, prompt="say", max_new_tokens=2, device="cpu")
    assert [one.layer for one in found.said] == [1, 2, 5]
    same = vc.trace(run, prompt="say", verbalizers=run / "verbalizers", max_new_tokens=2, device="cpu")
    assert same.said == found.said
    with pytest.raises(ModelError, match=rf"trained for a model whose weights.*vlsi-cache trace {run}"):
        vc.trace(run / "student", prompt="say", verbalizers=run / "verbalizers", device="cpu")
    with pytest.raises(ModelError, match="made for hidden size 32"):
        vc.trace(student_folder, prompt="say", verbalizers=run / "verbalizers", device="cpu")
    # A run without verbalizers takes those of a run that began with the same student, and no others.
    labels = tmp_path / "labels"
    shutil.copytree(teacher_folder, labels / "student")
    began_with = {**record, "recipe": "sft", "student_digest": ModelRef(trained).digest}
    (labels / "run.json").write_text(json.dumps(began_with))
    for folder in (run, run / "verbalizers"):
        taken = vc.trace(labels, prompt="say", verbalizers=folder, max_new_tokens=2, device="cpu")
        assert taken.said == found.said
    with pytest.raises(ModelError, match=rf"vlsi-cache trace {labels} --verbalizers {run}/verbalizers$"):
        vc.trace(labels / "student", prompt="say", verbalizers=run, device="cpu")
    (labels / "run.json").write_text(json.dumps({**began_with, "student_digest": "another"}))
    with pytest.raises(ModelError, match="began with the same student") as refused:
        vc.trace(labels, prompt="say", verbalizers=run, device="cpu")
    assert "vlsi-cache trace" not in str(refused.value)
    (run / "student").rename(run / "elsewhere")
    with pytest.raises(SpecError, match="no trained student yet; go on with: vlsi-cache distill c -o run"):
        vc.trace(run, prompt="say", device="cpu")
    (run / "run.json").write_text(
        json.dumps({**record, "kind": "train-verbalizers", "spec": {"teacher": {"model": "T"}}})
    )
    with pytest.raises(SpecError, match=rf"vlsi-cache trace T --verbalizers {run}/verbalizers"):
        vc.trace(run, prompt="say", device="cpu")


def test_what_does_not_fit_is_refused(teacher_folder: Path, picture: Path, tmp_path: Path) -> None:
    def call(**options: Any) -> Trace:
        return vc.trace(teacher_folder, **{"prompt": "say", "verbalizers": "none", "device": "cpu", **options})

    (tmp_path / "text.png").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.png")
    for options, error, says in (
        ({"verbalizers": None}, SpecError, "--verbalizers DIR is needed"),
        ({"verbalizers": tmp_path}, ModelError, "no verbalizers in"),
        ({"layers": []}, SpecError, "nothing to trace"),
        ({"max_new_tokens": 0}, SpecError, "nothing to trace"),
        ({"layers": [0, 1, 9]}, SpecError, r"no layers \[0, 9\] to trace: .* has 5 layers, 1 to 5"),
        ({"max_new_tokens": 500}, DataError, "the model has 256 positions"),
        ({"images": [picture]}, DataError, "text-only model"),
        ({"images": [tmp_path / "text.png"]}, DataError, "text.png cannot be decoded"),
        ({"images": [tmp_path / "none.png"]}, DataError, "none.png cannot be read"),
        ({"images": [tmp_path / "pipe.png"]}, DataError, "pipe.png is a named pipe, not a file"),
        ({"prompt": "a <|im_end|> b"}, DataError, "control token"),
    ):
        with pytest.raises(error, match=says):
            call(**options)
    with pytest.raises(ModelError, match="no such folder"):
        vc.trace(tmp_path / "nowhere", prompt="say", device="cpu")


def test_the_page_and_the_table(picture: Path, tmp_path: Path) -> None:
    found = vc.trace(
        QWEN2_VL, prompt="<b>?", verbalizers="none", images=[picture], layers=[3, "last"], max_new_tokens=3
    )
    html = checked(write_trace_page(found, tmp_path / "new" / "t.html"), num_figures=0)
    assert "data:image/png;base64," in html
    assert "&lt;b&gt;?" in html
    assert html.count('<span style="--p:') == sum(len(one.tokens) for one in found.said)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["3", "last"]
    assert lines[2].endswith(" ...") != found.said[0].has_ended
    assert json.loads(json.dumps(found.as_dict()))["layers"][1]["tokens"][0]["text"] == found.said[1].tokens[0].text
