"""Prompt and response are what the chat template writes; the oracle is transformers' own over the conversation."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vlsi_cache.config.sections import DataSpec, Encoding
from vlsi_cache.data import table
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.measuring import fit_rows
from vlsi_cache.data.records import Record, read_records
from vlsi_cache.errors import DataError, FingerprintMismatchError, ModelError, SpecError
from vlsi_cache.train.loader import check_response_ids

WORDS = "the capital of france is paris because one two three user assistant system model USER ASSISTANT yes no"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% elif m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% else %}{{ m['content'] }} "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
HYBRID = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% set c = m['content'] %}{% set r = m.reasoning_content or '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last or r %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
THINKING = HYBRID.replace(
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}", "<think>\n"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
DEEPSEEK = R1.replace("<think>\n", "")
SILENT = CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")

ADDED = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>")
PLAIN = ("<end_of_turn>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<|User|>", "<|Assistant|>", "\n\n")


def _byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([f"{WORDS}\n{WORDS}\n\n"] * 4, trainer)
    return core


def _sentencepiece() -> Tokenizer:
    """As Llama-2 and Mistral have it: a space is put before a text."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    space = decoders.Replace("\u2581", " ")
    core.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [*map(chr, range(33, 127)), "\u2581"]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=special, initial_alphabet=letters, show_progress=False)
    core.train_from_iterator([WORDS] * 4, trainer)
    return core


CORES = {"byte-level": _byte_level, "sentencepiece": _sentencepiece}


@pytest.fixture(scope="module")
def cores() -> dict[str, str]:
    return {name: make().to_str() for name, make in CORES.items()}


def _tokenizer(core: str, template: str | None, *, plain: tuple[str, ...] = PLAIN, add_bos: bool = False) -> Any:
    made = Tokenizer.from_str(core)
    made.add_special_tokens(["<s>", "</s>", *ADDED])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if add_bos:
        bos = ("<s>", made.token_to_id("<s>"))
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=template, extra_special_tokens=list(ADDED), **names
    )


def _row(answer: str, *, before: Any = (), ask: str = "what is the capital of france?", **more: Any) -> Record:
    keys = {key: more.pop(key) for key in ("reasoning_content", "tool_calls") if key in more}
    turns = [*before, {"role": "user", "content": ask}, {"role": "assistant", "content": answer, **keys}]
    messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return Record("r", messages, (), "digest", **more)


def _conversation(row: Record) -> list[dict[str, Any]]:
    """The messages as a user of transformers writes them."""
    return [{**m, "content": "".join(part["text"] for part in m["content"])} for m in row.messages]


HISTORY = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
THOUGHT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "<think>\nno\n</think>\n\ntwo"}]
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama-3": (LLAMA3, "<|eot_id|>"),
    "llama-2": (LLAMA2, "</s>"),
    "vicuna": (VICUNA, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "hybrid": (HYBRID, "<|im_end|>"),
    "thinking": (THINKING, "<|im_end|>"),
    "deepseek": (DEEPSEEK, "</s>"),
    "silent": (SILENT, "<|im_end|>"),
}
ANSWERS = ["paris", "the capital is paris", " paris ", "one\n\ntwo\n", "1. one"]


@pytest.mark.parametrize("kind", CORES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_response_is_what_the_template_writes(cores: dict[str, str], name: str, kind: str) -> None:
    """The sample is the whole conversation up to the end of the turn; its prompt is what a model is asked with."""
    template, end = TEMPLATES[name]
    tokenizer = _tokenizer(cores[kind], template)
    encoder = Encoder(tokenizer, None, (), name="m")
    assert tokenizer.convert_ids_to_tokens(encoder.eot_id) == end
    for answer in ANSWERS:
        for before in ((), HISTORY):
            row = _row(answer, before=before)
            sample = encoder.encode(row)
            turns = _conversation(row)
            whole = tokenizer.apply_chat_template(turns, tokenize=False)
            asked = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
            upto = whole[: whole.rindex(end) + len(end)]
            ids = tokenizer(upto, add_special_tokens=False)["input_ids"]
            header = "<|im_start|>assistant\n" * (name == "silent")
            prompt_ids = tokenizer(asked + header, add_special_tokens=False)["input_ids"]
            assert sample.input_ids[: sample.num_prompt].tolist() == prompt_ids
            assert encoder.encode(row, with_response=False).input_ids.tolist() == prompt_ids
            assert sample.input_ids[-1] == encoder.eot_id
            if ids[: len(prompt_ids)] == prompt_ids:
                assert sample.input_ids.tolist() == ids
            else:  # one token stands in both: only the texts are equal
                assert name == "thinking"
                assert tokenizer.decode(sample.input_ids) == tokenizer.decode(ids)
            num_prompt, response_ids = encoder.measure(row)
            assert (num_prompt, response_ids.tolist()) == (sample.num_prompt, sample.response_ids.tolist())


@pytest.mark.parametrize(
    ("template", "kind", "answer", "first"),
    [
        (CHATML, "sentencepiece", "the capital", "t"),  # never the token with a space before it
        (VICUNA, "sentencepiece", "the capital", "\u2581"),
        (VICUNA, "byte-level", "the capital", "\u0120"),
        (LLAMA2, "sentencepiece", "the capital", "\u2581"),
        (LLAMA3, "byte-level", "  the capital ", "t"),
        (HYBRID, "byte-level", "the capital", "<think>"),
    ],
)
def test_first_token(cores: dict[str, str], template: str, kind: str, answer: str, first: str) -> None:
    encoder = Encoder(_tokenizer(cores[kind], template), None, (), name="m")
    ids = encoder.encode(_row(answer)).response_ids
    assert encoder.tokenizer.convert_ids_to_tokens(int(ids[0])).startswith(first)


def test_token_across_the_border(cores: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    """`<think>\\n` and `\\n</think>`: the two line ends are one token, which a model that was asked cannot say."""
    encoder = Encoder(_tokenizer(cores["byte-level"], THINKING), None, (), name="m")
    rows = [_row("paris"), _row("paris", reasoning_content="because")]
    kept, _ = fit_rows(rows, encoder, 1000)
    tokens = [encoder.tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in (one.response_ids for one in kept)]
    assert tokens[0][:2] == ["\u010a", "</think>"]
    assert "because" in "".join(tokens[1])
    assert "1 of 2 rows: a token stands half in their prompt" in capfd.readouterr().err


@pytest.mark.parametrize("kind", CORES)
@pytest.mark.parametrize(
    "answer", ["because one\n</think>\n\nparis", "<think>\nbecause one\n</think>\n\nparis", "<think>\n</think>\nparis"]
)
def test_answer_goes_on_from_an_open_block(cores: dict[str, str], kind: str, answer: str) -> None:
    """What a model says itself after `<think>`, though its template drops the reasoning from a known answer."""
    tokenizer = _tokenizer(cores[kind], R1)
    encoder = Encoder(tokenizer, None, (), name="m")
    row = _row(answer)
    asked = tokenizer.apply_chat_template(_conversation(row)[:-1], tokenize=False, add_generation_prompt=True)
    said = answer.removeprefix("<think>\n") + "</s>"
    prompt_ids, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, asked + said))
    sample = encoder.encode(row)
    assert sample.num_prompt == len(prompt_ids)
    assert sample.input_ids.tolist() == ids
    back = encoder.answer(sample.response_ids)
    assert encoder.encode(_row(back)).response_ids.tolist() == sample.response_ids.tolist()


def test_answer_outside_an_open_block_is_refused(cores: dict[str, str]) -> None:
    encoder = Encoder(_tokenizer(cores["byte-level"], R1), None, (), name="m")
    with pytest.raises(DataError) as caught:
        encoder.measure(_row("paris", ask="what does <br> do?"))  # a tag of the user's opens nothing
    said = str(caught.value)
    assert said.startswith("row `r`: the chat template of `m` writes this answer otherwise than it asks for it")
    assert "do?<|Assistant|><think>\\n`" in said
    assert "<|Assistant|>paris</s>" in said
    assert said.endswith("there; train as the template writes history: `data.prompt: template`")
    switch = "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
    able = Encoder(_tokenizer(cores["byte-level"], R1.replace("<think>\n", switch)), None, (), name="m")
    with pytest.raises(
        DataError, match=r"`data.template: \{enable_thinking: false\}` \(it reads enable_thinking\), or"
    ):
        able.measure(_row("paris"))


def test_prompt_as_the_template_writes_history(cores: dict[str, str]) -> None:
    for template, header in ((R1, "<|Assistant|>"), (HYBRID, "<think>\n\n</think>\n\n"), (VICUNA, "ASSISTANT:")):
        tokenizer = _tokenizer(cores["byte-level"], template)
        encoder = Encoder(tokenizer, None, (), name="m", encoding=Encoding(prompt="template"))
        row = _row("paris")
        sample = encoder.encode(row)
        whole = tokenizer.apply_chat_template(_conversation(row), tokenize=False).rstrip("\n")
        assert tokenizer.decode(sample.input_ids) == whole
        assert tokenizer.decode(sample.input_ids[: sample.num_prompt]).endswith(header)
        assert tokenizer.decode(sample.response_ids).startswith((" paris", "paris"))
        asked = encoder.encode(row, with_response=False).input_ids
        assert asked.tolist() == sample.input_ids[: sample.num_prompt].tolist()
        assert encoder.answer(sample.response_ids) == "paris"
        assert encoder.fingerprint()["prompt"] == "template"


def test_arguments_of_the_template(cores: dict[str, str]) -> None:
    tokenizer = _tokenizer(cores["byte-level"], HYBRID)
    plain = Encoder(tokenizer, None, (), name="m")
    quick = Encoder(tokenizer, None, (), name="m", encoding=Encoding(template_args={"enable_thinking": False}))
    row = _row("paris")
    asked = tokenizer.apply_chat_template(
        _conversation(row)[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    sample = quick.encode(row)
    assert tokenizer.decode(sample.input_ids[: sample.num_prompt]) == asked
    assert tokenizer.decode(sample.response_ids) == "paris<|im_end|>"
    assert tokenizer.decode(plain.encode(row).response_ids) == "<think>\n\n</think>\n\nparis<|im_end|>"
    own = _row("paris", template_args={"enable_thinking": False})  # what the row says goes before the spec
    assert plain.encode(own).input_ids.tolist() == sample.input_ids.tolist()
    assert quick.fingerprint()["template_args"] == {"enable_thinking": False}
    assert quick.fingerprint() != plain.fingerprint()
    with pytest.raises(SpecError, match="names `enable_thinkin`, and the chat template of `m` reads `enable_thinking`"):
        Encoder(tokenizer, None, (), name="m", encoding=Encoding(template_args={"enable_thinkin": False}))
    with pytest.raises(SpecError, match="names `tokenize`, and the chat template of `m` reads `enable_thinking`"):
        Encoder(tokenizer, None, (), name="m", encoding=Encoding(template_args={"tokenize": True}))


def test_reasoning_tools_and_tool_calls(cores: dict[str, str]) -> None:
    tools = [{"type": "function", "function": {"name": "capital", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "capital", "arguments": {"of": "france"}}}
    template = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + HYBRID
    tokenizer = _tokenizer(cores["byte-level"], template)
    encoder = Encoder(tokenizer, None, (), name="m")
    rows = [
        _row("paris", reasoning_content="because one"),
        _row("", tool_calls=[call], tools=tools),
        _row("yes", tools=tools, before=THOUGHT),
    ]
    for row in rows:
        whole = tokenizer.apply_chat_template(_conversation(row), tools=row.tools, tokenize=False)
        assert tokenizer.decode(encoder.encode(row).input_ids) == whole.rstrip("\n")
    assert '"arguments": {"of": "france"}' in tokenizer.decode(encoder.encode(rows[1]).response_ids)


def test_what_the_template_does_not_read_is_told_once(cores: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    encoder = Encoder(_tokenizer(cores["byte-level"], SILENT), None, (), name="m")
    rows = [_row("paris", reasoning_content="because"), _row("yes", tools=[{"name": "x"}]), _row("no")]
    fit_rows(rows, encoder, 1000)
    said = capfd.readouterr().err
    assert "1 of 3 rows: the chat template does not read their `reasoning_content`\n" in said
    assert "1 of 3 rows: the chat template does not read their `tools`\n" in said
    assert "ignores `add_generation_prompt`: `<|im_start|>assistant`, which it writes" in said
    drops = Encoder(_tokenizer(cores["byte-level"], DEEPSEEK), None, (), name="m")
    fit_rows([_row("<think>one</think>two")], drops, 1000)
    assert "1 of 1 rows: the chat template leaves out a part of their answer" in capfd.readouterr().err


@pytest.mark.parametrize("refuses", [True, False])
@pytest.mark.parametrize("with_response", [True, False])
def test_rows_read_together_are_what_each_is_alone(cores: dict[str, str], with_response: bool, refuses: bool) -> None:
    """Among them rows that are refused, by the template too, and rows with arguments of their own."""
    rows = [
        _row("paris"),
        _row("paris", before=[{"role": "system", "content": "a rule"}] * refuses),
        _row("two", before=HISTORY),
        _row("<end_of_turn>"),
        _row("yes", ask="<end_of_turn>"),
        _row("yes", tools=[{"name": "x"}]),
        _row("no", template_args={"none": 1}),
        _row("no", reasoning_content="because"),
    ]
    encoder = Encoder(_tokenizer(cores["byte-level"], GEMMA), None, (), name="m")

    def alone(row: Record) -> tuple[int, list[int]] | str:
        try:
            num_prompt, ids = encoder.measure(row, with_response=with_response)
        except DataError as error:
            return str(error)
        return num_prompt, ids.tolist()

    found = encoder.measure_all(rows, with_response=with_response)
    results = [str(one) if isinstance(one, DataError) else (one.num_prompt, one.response_ids.tolist()) for one in found]
    together = dict(encoder.notes)
    encoder.notes.clear()
    assert results == [alone(row) for row in rows]
    assert together == dict(encoder.notes)
    refused = [index for index, one in enumerate(results) if isinstance(one, str)]
    assert refused == [1] * refuses + [3] * with_response + [4]


def test_turn_markers_and_content(cores: dict[str, str]) -> None:
    """Markers that reasoning and tools write are content; those around texts are not, special or not."""
    hybrid = Encoder(_tokenizer(cores["byte-level"], HYBRID), None, (), name="m")
    hybrid.encode(_row("<tool_call>x</tool_call>", ask="what is <think>?"))
    with pytest.raises(DataError, match=r"the user text holds the control token `<\|im_end\|>`"):
        hybrid.encode(_row("paris", ask="<|im_end|>"))
    seek = Encoder(_tokenizer(cores["byte-level"], DEEPSEEK), None, (), name="m")
    for text in ("a <|User|> b", "<|Assistant|>", "</s>"):
        with pytest.raises(DataError, match="the response holds the control token"):
            seek.encode(_row(text))
    seek.encode(_row("one\n\ntwo <|im_start|>"))  # an added token of white space, and one it never writes
    gemma = Encoder(_tokenizer(cores["byte-level"], GEMMA), None, (), name="m")
    for text in ("a <start_of_turn>user", "<end_of_turn>"):
        with pytest.raises(DataError, match="the user text holds the control token"):
            gemma.encode(_row("paris", ask=text))
    for template in (R1, THINKING):
        opens = Encoder(_tokenizer(cores["byte-level"], template), None, (), name="m")
        opens.encode(_row("<think>\nyes\n</think>\n\nparis", ask="what is <think>?"))
    with pytest.raises(DataError, match="`reasoning_content` holds the control token"):
        hybrid.encode(_row("paris", reasoning_content="<|im_start|>"))


def test_end_of_turn_need_not_be_special(cores: dict[str, str]) -> None:
    tokenizer = _tokenizer(cores["byte-level"], GEMMA)
    assert not tokenizer.added_tokens_decoder[tokenizer.convert_tokens_to_ids("<end_of_turn>")].special
    assert tokenizer.decode(Encoder(tokenizer, None, (), name="m").encode(_row("paris")).response_ids) == (
        "paris<end_of_turn>"
    )


def test_template_without_end_of_turn(cores: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    template = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}{{ '### assistant:\n' }}"
    encoder = Encoder(_tokenizer(cores["byte-level"], template), None, (), name="m")
    (kept, *_), _ = fit_rows([_row("paris")], encoder, 1000)
    assert encoder.tokenizer.decode(kept.response_ids) == "paris</s>"
    assert "writes no end of turn: responses end with `</s>`" in capfd.readouterr().err


@pytest.mark.parametrize("kind", CORES)
@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_one_beginning_of_sequence(cores: dict[str, str], template: str, kind: str) -> None:
    encoder = Encoder(_tokenizer(cores[kind], template, add_bos=True), None, (), name="m")
    ids = encoder.encode(_row("paris")).input_ids.tolist()
    assert (ids[0], ids.count(ids[0])) == (encoder.id_of["<s>"], 1)


def test_generated_answers_read_back(cores: dict[str, str]) -> None:
    """The content of what a model says, put into the row, gives the tokens that it said."""
    for kind in CORES:
        for template in (CHATML, VICUNA, LLAMA2, HYBRID, THINKING, DEEPSEEK):
            encoder = Encoder(_tokenizer(cores[kind], template), None, (), name="m")
            said = encoder.encode(_row("the capital is paris")).response_ids
            assert encoder.answer(said) == "the capital is paris"
            assert encoder.encode(_row(encoder.answer(said))).response_ids.tolist() == said.tolist()


def test_rows_beyond_the_positions_are_listed(cores: dict[str, str]) -> None:
    encoder = Encoder(_tokenizer(cores["byte-level"], CHATML), None, (), name="m")
    rows = [_row("paris"), _row("paris " * 40)]
    kept, skipped = fit_rows(rows, encoder, 1000, max_positions=60)
    num_tokens = len(encoder.encode(rows[1]).input_ids)
    assert [one.index for one in kept] == [0]
    assert skipped[0]["reason"] == f"{num_tokens} tokens, the model has 60 positions (`max_position_embeddings`)"


def test_no_end_at_all(cores: dict[str, str]) -> None:
    tokenizer = _tokenizer(cores["byte-level"], "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="ends a turn with no added token and names no eos_token"):
        Encoder(tokenizer, None, (), name="m")


def test_tool_template_of_its_own(cores: dict[str, str]) -> None:
    tokenizer = _tokenizer(cores["byte-level"], None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}
    encoder = Encoder(tokenizer, None, (), name="m")
    tools = [{"name": "capital"}]
    text = tokenizer.decode(encoder.encode(_row("paris", tools=tools)).input_ids)
    assert text == tokenizer.apply_chat_template(_conversation(_row("paris")), tools=tools, tokenize=False).rstrip("\n")
    assert encoder.fingerprint()["tool_template"] != encoder.fingerprint()["chat_template"]


def test_a_student_that_ends_turns_otherwise_is_told_so(cores: dict[str, str]) -> None:
    teacher = Encoder(_tokenizer(cores["byte-level"], CHATML), None, (), name="teacher")
    student = Encoder(_tokenizer(cores["byte-level"], CHATML.replace("<|im_end|>", "</s>")), None, (), name="student")
    row = _row("paris")
    cached: Any = SimpleNamespace(response_ids_R=teacher.encode(row).response_ids)
    check_response_ids(row, teacher.encode(row).response_ids, cached, teacher)
    with pytest.raises(FingerprintMismatchError) as caught:
        check_response_ids(row, student.encode(row).response_ids, cached, student)
    end, other = (f"{encoder.eot_id} `{encoder.chat.eot}`" for encoder in (student, teacher))
    assert str(caught.value).startswith(
        f"the chat template of student `student` ends a turn with {end}, the teacher's with {other} (sample `r`)"
    )
    thinks = Encoder(_tokenizer(cores["byte-level"], HYBRID), None, (), name="thinks")
    fresh = thinks.encode(row).response_ids
    with pytest.raises(FingerprintMismatchError, match=r"(?s)write answers as its template does(?!.*earlier release)"):
        check_response_ids(row, fresh, cached, thinks)
    with pytest.raises(FingerprintMismatchError, match=r"An earlier release has built this cache.*Build it again"):
        check_response_ids(row, fresh, cached, thinks, contract=1)


def test_mappings_of_a_row_in_a_file_keep_their_order(
    cores: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Templates write tools and their calls as the row has them; the digest is that of the content alone."""
    monkeypatch.setenv(table.VARIABLE, str(tmp_path / "tables"))
    monkeypatch.setattr(table, "WORTH_S", 0)
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "needs": ["of"]}}}]
    calls = [{"type": "function", "function": {"name": "find", "arguments": {"where": "here", "of": {"z": 1, "a": 2}}}}]
    turns = [
        {"role": "user", "content": "find it"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "there"},
        {"role": "assistant", "content": "it is there"},
    ]
    template = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + HYBRID
    tokenizer = _tokenizer(cores["byte-level"], template)
    row = {"id": "r", "messages": turns, "tools": tools}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    # Of the same content, in another order.
    (tmp_path / "sorted.jsonl").write_text(json.dumps(row, sort_keys=True) + "\n")
    encoder = Encoder(tokenizer, None, (), name="m")
    for _ in range(2):  # read, and out of the tables that this has left
        whole = [tokenizer.apply_chat_template(turns[:end], tools=tools, tokenize=False).rstrip("\n") for end in (2, 4)]
        for which, wanted in (("last", whole[1:]), ("all", whole)):
            found = read_records(DataSpec(path=str(tmp_path / "rows.jsonl"), turns=which))
            assert [tokenizer.decode(encoder.encode(one).input_ids) for one in found] == wanted
    other = read_records(DataSpec(path=str(tmp_path / "sorted.jsonl")))
    assert [one.digest for one in other] == [one.digest for one in found]
    assert tokenizer.decode(encoder.encode(other[-1]).input_ids) != whole[1]
