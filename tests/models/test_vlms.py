"""Every vision-language family that is said to work, from rows with pictures to an exported student that generates.

The oracles are transformers' own: the family's processor on the whole text, the model's forward pass over that, its
`output_hidden_states`, and `generate` on the exported folder, which is opened without anything of ours.

Legend: B rows, S positions, T response tokens, V vocabulary.
"""

import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.vlms import VLMS, importable_processors, picture_rows, real_processor, save_vlm
from transformers import AutoModelForImageTextToText

import vlsi_cache as vc
from vlsi_cache.config.sections import DataSpec
from vlsi_cache.data import encoder as encoder_module
from vlsi_cache.data.collate import SEEN_UNTIL, collate, collate_prompts
from vlsi_cache.data.encoder import load_encoder
from vlsi_cache.data.records import Record, read_records, with_answer
from vlsi_cache.errors import ModelError
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.probe import checked_backbone

PICTURES = [[(16, 16)], [(30, 12), (12, 20)], [], [(9, 33)]]
PALIGEMMA = [[(16, 16)], [(30, 12), (12, 20)], [(9, 33)]]  # its processor wants a picture in every sample
PADDED = ("gemma3", "paligemma")  # their token types are part of the mask
TOP_K = 8


def spec_of(folder: Path, teacher: Path, rows: Path) -> Path:
    schedule = {"steps": 1, "learning_rate": 0.01}
    spec = {
        "name": "vlm",
        "teacher": {"model": str(teacher), "dtype": "float32", "layers": [1, 3]},
        "data": {"path": rows.name, "max_length": 250},
        "rows": {"top_k": TOP_K},
        "store": {"profile": "exact"},
        "distill": {
            "layers": [1],
            "batch_size": 4,
            "micro_batch_size": 4,
            "verbalize": schedule,
            "interact": {"schedule": schedule},
            "sft": {"schedule": schedule},
            "lora": {"rank": 2, "alpha": 2},
        },
        "run": {"device": "cpu", "batch_tokens": 300, "vision_cache_mib": 8},
    }
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(spec))
    return file


def as_processed(processor: Any, record: Record) -> dict[str, Any]:
    """What the family's own template and processor make of the conversation, up to the end of the answer."""
    tokenizer = processor.tokenizer
    images = [[image.open() for image in record.images]] if record.images else None
    if "suffix" in inspect.signature(processor.__call__).parameters:  # PaliGemma's, which takes the answer apart
        prompt = tokenizer.apply_chat_template(record.messages[:-1], tokenize=False)
        found = processor(text=[prompt], images=images, suffix=[record.answer], return_tensors="pt")
        return {key: value for key, value in found.items() if key != "labels"}
    text = tokenizer.apply_chat_template(record.messages, tokenize=False)
    text = text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]
    has_bos = text.startswith(str(tokenizer.bos_token))
    return processor(text=[text], images=images, add_special_tokens=not has_bos, return_tensors="pt")


@pytest.mark.parametrize("family", VLMS)
def test_from_pictures_to_a_student_that_generates(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importable_processors(monkeypatch)
    teacher = save_vlm(tmp_path / "teacher", family)
    student = save_vlm(tmp_path / "student", family, num_layers=2, hidden=16, seed=2)
    rows = picture_rows(tmp_path, PALIGEMMA if family == "paligemma" else PICTURES)
    records = list(read_records(DataSpec(path=str(rows))))
    encoder, processor = load_encoder(teacher), real_processor(teacher)
    model: Any = AutoModelForImageTextToText.from_pretrained(teacher).eval()
    cache = vc.build_teacher(vc.load_spec(spec_of(tmp_path, teacher, rows)), out=tmp_path / "cache")

    samples = [encoder.encode(record) for record in records]
    backbone = checked_backbone(model, encoder)
    batch = collate(samples, pad_id=encoder.pad_id, row_width=backbone.row_width)
    assert (SEEN_UNTIL in batch.inputs) == (family not in PADDED)
    states = backbone.capture(batch.inputs, [1, 3], batch.rows_T, batch.positions_T)
    for row, (record, sample) in enumerate(zip(records, samples, strict=True)):
        theirs = as_processed(processor, record)
        assert theirs["input_ids"][0].tolist() == sample.input_ids.tolist()
        assert encoder.measure(record)[0] == sample.num_prompt
        for key, value in sample.media.items():
            if key != "token_type_ids":
                np.testing.assert_array_equal(np.asarray(theirs[key]), value, err_msg=key)
        with torch.no_grad():
            own = model(**theirs, output_hidden_states=True, use_cache=False)
        places = slice(sample.num_prompt - 1, -1)
        for layer in (1, 3):
            wanted = own.hidden_states[layer][0, places]
            torch.testing.assert_close(states[layer].split(batch.num_tokens)[row], wanted, rtol=1e-4, atol=1e-4)
        cached, logprobs_TV = cache[record.id], own.logits[0, places, : encoder.vocab_size].log_softmax(-1).numpy()
        cached_TK, ids_TK = cached.logprobs_LTK[-1], cached.ids_LTK[-1]
        np.testing.assert_allclose(cached_TK, np.take_along_axis(logprobs_TV, ids_TK, 1), rtol=0, atol=1e-4)
        np.testing.assert_allclose(cached_TK[:, 0], logprobs_TV.max(1), rtol=0, atol=1e-4)

    # Two answers to one prompt see the pictures once, and are what each is alone.
    monkeypatch.setattr(encoder_module, "MIN_SHARED", 1)
    pairs = [one for record in records for one in (record, with_answer(record, "another one"))]
    trees = encoder.encode_all(pairs, backbone.layout)
    assert len(trees) == (len(pairs) if family in PADDED else len(records))
    once, apart = (
        collate(some, pad_id=encoder.pad_id, row_width=backbone.row_width)
        for some in (trees, [encoder.encode(one) for one in pairs])
    )
    found, wanted = (backbone.capture(b.inputs, [3], b.rows_T, b.positions_T)[3] for b in (once, apart))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    run = vc.distill(cache, student=str(student), out=tmp_path / "run")
    exported: Any = AutoModelForImageTextToText.from_pretrained(run / "student").eval()
    before, after = ModelRef(student).load().state_dict(), exported.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("layers" in name for name in changed)
    assert not any("vision" in name or "visual" in name for name in changed if "merger" not in name)
    # Two pictures, by its own processor and `generate` alone, and as `generate` and `evaluate` do it here, in a batch.
    prompt = encoder.tokenizer.apply_chat_template(records[1].messages[:-1], add_generation_prompt=True, tokenize=False)
    images = [[image.open() for image in records[1].images]]
    has_bos = prompt.startswith(str(encoder.tokenizer.bos_token))
    inputs = real_processor(run / "student")(
        text=[prompt], images=images, add_special_tokens=not has_bos, return_tensors="pt"
    )
    inputs.pop("labels", None)  # PaliGemma's are for training
    options = {"max_new_tokens": 3, "do_sample": False}
    words = exported.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    together = collate_prompts(samples, pad_id=encoder.pad_id)
    ours = exported.generate(**together, **options)[1, together["input_ids"].shape[1] :]
    assert len(words)
    assert ours[: len(words)].tolist() == words.tolist()


def test_a_teacher_of_one_family_and_a_student_of_another_share_a_vocabulary(tmp_path: Path) -> None:
    """Pictures are other tokens in other numbers for each of them, and other templates stand around them."""
    special = (*VLMS["qwen2_vl"].special, "<image>", "<video>")
    teacher = save_vlm(tmp_path / "teacher", "qwen2_vl", special=special)
    student = save_vlm(tmp_path / "student", "llava_onevision", num_layers=2, hidden=16, seed=2, special=special)
    rows = picture_rows(tmp_path, PICTURES)
    heldout = f"evaluate={{data: {{path: {rows}, max_length: 250}}, max_new_tokens: 3, batch_size: 2}}"
    spec = vc.load_spec(spec_of(tmp_path, teacher, rows), overrides=[heldout])
    cache = vc.build_teacher(spec, out=tmp_path / "cache")
    run = vc.distill(cache, student=str(student), out=tmp_path / "run")
    scores = vc.evaluate(run)
    assert scores["num_samples"] == len(PICTURES)
    # Perplexity of the exported student over the answers, by its own processor and forward pass.
    exported: Any = AutoModelForImageTextToText.from_pretrained(run / "student").eval()
    processor, encoder, nats = real_processor(run / "student"), load_encoder(student), []
    for record in read_records(DataSpec(path=str(rows))):
        num = len(encoder.measure(record)[1])
        theirs = as_processed(processor, record)
        with torch.no_grad():
            logits_SV = exported(**theirs).logits[0, :, : encoder.vocab_size]
        gold_T = theirs["input_ids"][0, -num:]
        nats += torch.nn.functional.cross_entropy(logits_SV[-num - 1 : -1], gold_T, reduction="none").tolist()
    assert scores["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    other = save_vlm(tmp_path / "other", "llava_onevision", num_layers=2, hidden=16)
    with pytest.raises(ModelError, match="has another tokenizer than the teacher"):
        vc.distill(cache, student=str(other), out=tmp_path / "refused")


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_processor_that_this_machine_cannot_load_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        importable_processors(patch)
        folder = save_vlm(tmp_path, "mistral3")
    with pytest.raises(ModelError, match="it needs torchvision, run: pip install torchvision"):
        load_encoder(folder)
