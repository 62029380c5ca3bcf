"""The folder of a trained student, opened by transformers alone: it generates, ends its turn, its weights are tied."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import save_tokenizer, write_spec
from PIL import Image
from tiny_qwen2vl import TEACHER_DIR
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    pipeline,
)

import vlsi_cache as vc

MESSAGES = [{"role": "user", "content": "say one"}]


class SaysAndStops(LogitsProcessor):
    """The third new token is `end`, whatever the model says; the others are anything else."""

    def __init__(self, end: int, *, num_prompt: int) -> None:
        self.end, self.length = end, num_prompt + 2

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.end] = float("inf") if input_ids.shape[1] == self.length else -float("inf")
        return scores


def generated(model: Any, inputs: Any, end: int) -> list[int]:
    """New tokens of a long generation that the folder's own settings must end."""
    num_prompt = inputs["input_ids"].shape[1]
    stop = LogitsProcessorList([SaysAndStops(end, num_prompt=num_prompt)])
    return model.generate(**inputs, max_new_tokens=12, do_sample=False, logits_processor=stop)[0, num_prompt:].tolist()


def save_text_student(folder: Path, generation: GenerationConfig | None) -> Path:
    """Tied weights, and an end of sequence in its configuration that is not the end of a turn."""
    size = save_tokenizer(folder)
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=size + 3,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=7,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = generation or model.generation_config
    model.save_pretrained(folder)
    if generation is None:
        (folder / "generation_config.json").unlink()
    return folder


def trained(spec: Any, student: Path, folder: Path) -> Path:
    cache = vc.build_teacher(spec, out=folder / "cache")
    changes = [f"distill.{stage}steps=1" for stage in ("verbalize.", "interact.schedule.", "sft.schedule.")]
    return vc.distill(cache, student=str(student), out=folder / "run", recipe="last", overrides=changes) / "student"


def check_tied(model: Any, source: Any) -> None:
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is embeddings
    assert not torch.equal(head, source.get_output_embeddings().weight)


@pytest.mark.parametrize("own", ["no file", "one more end"])
def test_a_text_student_opens_generates_and_ends_its_turn(own: str, teacher_folder: Path, tmp_path: Path) -> None:
    more = GenerationConfig(eos_token_id=[11], pad_token_id=5, repetition_penalty=1.5) if own != "no file" else None
    source = save_text_student(tmp_path / "student", more)
    spec = vc.load_spec(write_spec(tmp_path, teacher_folder))
    folder = trained(spec, source, tmp_path)
    shutil.rmtree(source)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == (end if more is None else [end, 11])  # 7 was only its configuration's guess
    assert settings["pad_token_id"] == (pad if more is None else 5)
    assert settings.get("repetition_penalty") == (None if more is None else 1.5)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert generated(model, inputs, end)[2:] == [end]
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    torch.manual_seed(3)
    check_tied(model, Qwen2ForCausalLM(model.config))
    talk = pipeline("text-generation", model=str(folder), tokenizer=str(folder), device="cpu")
    stop = LogitsProcessorList([SaysAndStops(end, num_prompt=inputs["input_ids"].shape[1])])
    answer = talk(MESSAGES, max_new_tokens=12, do_sample=False, logits_processor=stop)[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    assert len(tokenizer(answer["content"])["input_ids"]) < 12


def test_a_qwen2_vl_student_opens_generates_and_ends_its_turn(tmp_path: Path) -> None:
    config = Qwen2VLConfig.from_pretrained(TEACHER_DIR)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 1, ["full_attention"]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(3)
    source = Qwen2VLForConditionalGeneration(config)
    source.save_pretrained(tmp_path / "student")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
        shutil.copyfile(TEACHER_DIR / name, tmp_path / "student" / name)
    small = ["data.options.num_samples=16", "teacher.layers=[4]", "distill.batch_size=4", "distill.micro_batch_size=4"]
    folder = trained(vc.load_spec("demo", overrides=small), tmp_path / "student", tmp_path)
    shutil.rmtree(tmp_path / "student")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == end
    check_tied(model, source)
    image = Image.new("RGB", (64, 64), "red")
    inputs = processed(folder, tokenizer, image)
    assert generated(model, inputs, end)[2:] == [end]


def processed(folder: Path, tokenizer: Any, image: Any) -> Any:
    """Inputs from the folder's own processor; transformers has none of Qwen2-VL where torchvision is missing."""
    parts = [{"type": "image"}, {"type": "text", "text": "what colour?"}]
    messages = [{"role": "user", "content": parts}]
    if find_spec("torchvision") is not None:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(folder)
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return processor(text=[text], images=[image], return_tensors="pt")
    from transformers import AutoImageProcessor

    pixels = AutoImageProcessor.from_pretrained(folder)(images=[image], return_tensors="pt")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 16), return_tensors="pt")
    types = (ids["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return {**ids, **pixels, "mm_token_type_ids": types}
