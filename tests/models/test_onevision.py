"""LLaVA-OneVision through every stage: anyres crops, pictures of different sizes, rows with none and with two.

Legend: B rows, S positions, T response tokens, D hidden size.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny import write_jsonl
from helpers.tokenizers import SPECIAL, tiny_tokenizer
from PIL import Image
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

import vlsi_cache as vc
from vlsi_cache.config.sections import DataSpec
from vlsi_cache.data import vision
from vlsi_cache.data.chat import Turn
from vlsi_cache.data.collate import collate, collate_prompts
from vlsi_cache.data.encoder import Encoder, load_encoder
from vlsi_cache.data.records import read_records
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.load import ModelRef
from vlsi_cache.teacher.recompute import recompute

SIDE, GRID = 8, [[8, 8], [8, 16], [16, 8], [16, 16], [8, 24]]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Width and height of the pictures of each row.
PICTURES = [[(8, 8)], [(30, 9)], [], [(12, 20), (40, 10)], [(9, 33)], [(16, 16)]]


def save_onevision(folder: Path, *, num_layers: int, hidden: int, seed: int) -> Path:
    tokenizer = tiny_tokenizer(TEMPLATE, special=(*SPECIAL, "<image>", "<video>"))
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=GRID).save_pretrained(folder)
    own = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 4,
        "vision_feature_select_strategy": "full",
    }
    (folder / "processor_config.json").write_text(json.dumps({**own, "vision_aspect_ratio": "anyres_max_9"}))
    torch.manual_seed(seed)
    text = Qwen2Config(
        vocab_size=len(tokenizer) + 5,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=4,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_onevision(tmp_path_factory.mktemp("ov") / "teacher", num_layers=4, hidden=32, seed=1)


def write_rows(folder: Path, pictures: list[list[tuple[int, int]]]) -> Path:
    rng, rows = np.random.default_rng(0), []
    for index, sizes in enumerate(pictures):
        names = []
        for number, (width, height) in enumerate(sizes):
            names.append(f"{index}-{number}.png")
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / names[-1])
        parts: list[dict[str, str]] = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": f"what {index}?"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat " * (1 + index % 3)}]
        rows.append({"id": f"row-{index}", "images": names, "messages": messages})
    return write_jsonl(folder / "rows.jsonl", rows)


def processor_of(encoder: Encoder) -> Any:
    return encoder.vision.processor  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


@torch.no_grad()
def test_a_batch_is_what_the_processor_and_the_model_make_of_it(teacher: Path, tmp_path: Path) -> None:
    """Against the real processor on the whole batch at once, and transformers' own hidden states."""
    encoder, model = load_encoder(teacher), ModelRef(teacher).load()
    records = list(read_records(DataSpec(path=str(write_rows(tmp_path, PICTURES)))))
    samples = [encoder.encode(record) for record in records]
    for record, sample in zip(records, samples, strict=True):
        assert encoder.measure(record)[0] == sample.num_prompt
    batch = collate(samples, pad_id=encoder.pad_id)
    assert batch.inputs["batch_num_images"].tolist() == [1, 1, 2, 1, 1]
    assert batch.inputs["pixel_values"].shape == (6, 5, 3, SIDE, SIDE)

    texts = [turn.prompt + turn.response for turn in encoder.chat.turns(records) if isinstance(turn, Turn)]
    images = [[image.open() for image in record.images] for record in records]
    whole = processor_of(encoder)(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    mask = whole["attention_mask"].bool()
    assert torch.equal(batch.inputs["attention_mask"].bool(), mask)
    assert torch.equal(batch.inputs["input_ids"][mask], whole["input_ids"][mask])
    for key in ("pixel_values", "image_sizes", "batch_num_images"):
        assert torch.equal(batch.inputs[key], whole[key]), key
    expected = model(**whole, output_hidden_states=True, use_cache=False).hidden_states
    captured = Backbone(model).capture(batch.inputs, [1, 2], batch.rows_T, batch.positions_T)
    for layer in (1, 2):
        theirs = expected[layer][batch.rows_T, batch.positions_T]
        torch.testing.assert_close(captured[layer], theirs, rtol=1e-5, atol=1e-5)


def test_image_tokens_are_counted_without_preparing_pictures(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every size as many as the processor writes, and past the first few sizes it is not run for one picture."""
    encoder, rng = load_encoder(teacher), np.random.default_rng(1)
    one: list[list[tuple[int, int]]] = [[(int(w), int(h))] for w, h in rng.integers(1, 60, (40, 2))]
    two = [[(5, 50), (17, 8)], [(50, 5), (17, 8)], [(5, 50), (17, 8)]]
    records = list(read_records(DataSpec(path=str(write_rows(tmp_path, [*one, *two])))))
    expected = [encoder.encode(record).num_prompt for record in records]
    assert len(set(expected)) > 5  # or this test says little
    ran: list[int] = []
    prepare = encoder.image_processor.preprocess

    def preprocess(images: Any, *args: Any, **options: Any) -> Any:
        ran.append(len(images[0]))
        return prepare(images, *args, **options)

    monkeypatch.setattr(
        type(encoder.image_processor), "preprocess", lambda _, *args, **options: preprocess(*args, **options)
    )
    assert [encoder.measure(record)[0] for record in records] == expected
    assert ran == [1] * vision.CHECKED_SIZES + [2] * 2  # the same sizes are known


def test_a_wrong_count_of_the_processor_is_not_believed(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(teacher)
    records = list(read_records(DataSpec(path=str(write_rows(tmp_path, [[(9, 9 + n)] for n in range(8)])))))
    expected = [encoder.encode(record).num_prompt for record in records]
    owner = type(processor_of(encoder))
    for wrong in (lambda *_, **__: {"num_image_tokens": [3]}, lambda *_, **__: 1 // 0):
        monkeypatch.setattr(owner, "_get_num_multimodal_tokens", wrong)
        fresh = load_encoder(teacher)
        assert [fresh.measure(record)[0] for record in records] == expected


@torch.no_grad()
def test_a_sample_says_the_same_alone_and_in_a_batch(teacher: Path, tmp_path: Path) -> None:
    encoder, backbone = load_encoder(teacher), Backbone(ModelRef(teacher).load())
    records = read_records(DataSpec(path=str(write_rows(tmp_path, PICTURES))))
    samples = [encoder.encode(record) for record in records]

    def states(chosen: list[Any]) -> torch.Tensor:
        batch = collate(chosen, pad_id=encoder.pad_id)
        return backbone.capture(batch.inputs, [3], batch.rows_T, batch.positions_T)[3]

    together = states(samples)
    torch.testing.assert_close(together, torch.cat([states([sample]) for sample in samples]), rtol=1e-4, atol=1e-4)
    prompts = collate_prompts(samples, pad_id=encoder.pad_id)
    generated = backbone.model.generate(**prompts, max_new_tokens=3, do_sample=False)  # pyright: ignore
    alone = collate_prompts([samples[3]], pad_id=encoder.pad_id)
    one = backbone.model.generate(**alone, max_new_tokens=3, do_sample=False)  # pyright: ignore
    assert torch.equal(generated[3, -3:], one[0, -3:])


def test_from_rows_to_a_scored_student(teacher: Path, tmp_path: Path) -> None:
    student = save_onevision(tmp_path / "small", num_layers=3, hidden=16, seed=2)
    rows = write_rows(tmp_path, PICTURES * 3)
    schedule = {"steps": 2, "learning_rate": 0.01}
    spec = {
        "name": "ov",
        "teacher": {"model": str(teacher), "dtype": "float32", "layers": [1, 2, 3]},
        "data": {"path": rows.name, "max_length": 200},
        "rows": {"top_k": 8},
        "train_verbalizers": {"schedule": schedule, "batch_size": 6, "micro_batch_size": 3},
        "distill": {
            "layers": [1, 2],
            "batch_size": 6,
            "micro_batch_size": 3,
            "verbalize": schedule,
            "interact": {"schedule": schedule},
            "sft": {"schedule": schedule},
            "lora": {"rank": 2, "alpha": 2},
        },
        "evaluate": {"data": {"path": rows.name, "max_length": 200}, "max_new_tokens": 4, "batch_size": 4},
        "run": {"device": "cpu", "batch_tokens": 300},
    }
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec))
    vc.train_verbalizers(vc.load_spec(file), out=tmp_path / "v")
    trained = f"teacher.verbalizers={tmp_path / 'v' / 'verbalizers'}"
    cache = vc.build_teacher(vc.load_spec(file, overrides=[trained]), out=tmp_path / "cache")
    assert cache.num_samples == 18
    report = recompute(cache, num_samples=18, device="cpu")
    assert report.ok, report
    run = vc.distill(cache, student=str(student), out=tmp_path / "run")
    before, after = ModelRef(student).load(), ModelRef(run / "student").load()
    tower = [name for name, _ in before.named_parameters() if "vision_tower" in name]
    changed = {name for name, p in before.named_parameters() if not torch.equal(p, after.get_parameter(name))}
    assert tower
    assert not changed & set(tower)
    assert any("language_model.layers" in name for name in changed)
    assert vc.evaluate(run)["num_samples"] == 18
