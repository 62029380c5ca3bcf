"""Which text of a chat row is prompt and which is response: decided by what the model's chat template writes.

P is the template over the messages before the answer with its generation prompt, what a model sees at inference; F is
the template over the whole conversation. Where F goes on from P, the rest of F is the response, up to and with the end
of the turn: whatever the template adds, trims or moves is then right by construction.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vlsi_cache.config.sections import PromptMode
from vlsi_cache.errors import DataError, ModelError, SpecError

from .messages import Message, text_of
from .records import Record

# Some chat templates print today's date, and a prompt must not depend on the day it was made: theirs is this day.
_DAY = {"%Y": "2024", "%y": "24", "%m": "07", "%-m": "7", "%B": "July", "%b": "Jul", "%d": "26", "%-d": "26"}
_DAY |= {"%A": "Friday", "%a": "Fri", "%H": "12", "%M": "00", "%S": "00", "%F": "2024-07-26"}
_FIXED_DAY = "".join(f" | replace('{code}', '{text}')" for code, text in _DAY.items())
_FIXED_DAY = "{%- macro strftime_now(format) -%}{{ format" + _FIXED_DAY + " }}{%- endmacro -%}\n"
_ASKED, _ANSWERED, _RULED = "vlsi-probe-question", "vlsi-probe-answer", "vlsi-probe-rule"
_ROLE_NAMES = ("eos_token", "bos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
# What `apply_chat_template` or every template is given anyway.
_GIVEN = frozenset(
    {"messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
    | {"tools", "documents", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
    | {
        "range",
        "dict",
        "lipsum",
        "cycler",
        "joiner",
        "namespace",
        "return_assistant_tokens_mask",
        "raise_exception",
        "strftime_now",
        *_ROLE_NAMES,
    }
)
_EXTRA_KEYS = ("reasoning_content", "tool_calls", "name", "tool_call_id")
_OPENING = re.compile(r"<(\w[\w:-]*)>|\[([A-Z][A-Z_]*)\]")
SHOWN = 80  # characters of prompt and conversation in a message


@dataclass(frozen=True)
class Turn:
    """The text before the answer and the answer's, which ends in the end of turn where the template writes one.

    `notes`: what a user should hear about this row, in words that are the same for all rows of its kind.
    """

    prompt: str
    response: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Shape:
    """What a template does around a plain answer.

    `header` is what belongs to the prompt and is no generation prompt ("" for most), `lead` what still stands between
    the prompt and the answer ("", Vicuna's space, an empty think block), `tail` what follows the answer. `asked` is the
    generation prompt.
    """

    as_parts: bool
    ignores_generation: bool
    header: str
    lead: str
    tail: str
    asked: str


@dataclass(frozen=True)
class Chat:
    """The chat template of a model with the arguments it is given; made by `open_chat`.

    `mode`: "generation" ends the prompt where the template ends it at inference, "template" where the answer begins in
    the whole conversation.
    """

    tokenizer: Any
    name: str
    templates: Mapping[bool, str]  # for rows without tools, with tools
    args: Mapping[str, Any]
    mode: PromptMode
    shape: _Shape
    eot_id: int
    eot: str
    writes_eot: bool
    control: Mapping[str, int]
    remarks: list[str] = field(default_factory=list)

    @property
    def template(self) -> str:
        return self.templates[False]

    def refuse_control(self, record: Record, *, with_response: bool = True) -> None:
        """Raise DataError for a text that holds a token which steers the chat."""
        for number, message in enumerate(record.messages if with_response else record.prompt_messages):
            is_response = number == len(record.messages) - 1
            what = "the response" if is_response else f"the {message['role']} text"
            self._refuse(text_of(message), what)
            for key in _EXTRA_KEYS:
                if value := message.get(key):
                    self._refuse(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), f"`{key}`")
        if record.tools:
            self._refuse(json.dumps(record.tools, ensure_ascii=False), "`tools`")

    def turns(self, records: Sequence[Record], *, with_response: bool = True) -> list[Turn | DataError]:
        """Prompt and response of rows, or what the model sees before it answers; of what has none the error.

        The response of a row is an error where the template does not go on from its own prompt.
        """
        given = [[_given(one, as_parts=self.shape.as_parts) for one in record.messages] for record in records]
        asked = [messages[:-1] for messages in given]
        befores = self._render_all(records, asked, generation=self.mode == "generation")
        wholes = self._render_all(records, given, generation=False) if with_response else befores
        found: list[Turn | DataError] = []
        for record, before, whole in zip(records, befores, wholes, strict=True):
            try:
                before, whole = _text_or_raise(before), _text_or_raise(whole)
                found.append(self._turn(record, before, whole) if with_response else Turn(self._prompt(before), ""))
            except DataError as error:
                found.append(error)
        return found

    def _turn(self, record: Record, before: str, whole: str) -> Turn:
        """`before` is what the template writes before the answer, with its generation prompt if that is asked for;
        raises DataError where the template does not go on from its own prompt."""
        prompt = self._prompt(before) if self.mode == "generation" else self._before_answer(record, before, whole)
        notes = tuple(self._unread(record))
        if self.shape.ignores_generation and _has_more(record.messages[-1]):
            # The header is that of a plain answer; of another one it is what both have.
            prompt = prompt[: max(_common_length(prompt, whole), len(prompt) - len(self.shape.header))]
        if whole.startswith(prompt):
            response = self._cut(whole[len(prompt) :])
            if record.answer.strip() not in response:
                notes += ("the chat template leaves out a part of their answer",)
            return Turn(prompt, response, notes)
        own = None if _has_more(record.messages[-1]) else self._continued(record, prompt)
        if own is None:
            raise DataError(self._does_not_go_on(prompt, whole))
        return Turn(prompt, own + self.eot * self.writes_eot, notes)

    def answer_of(self, text: str) -> str:
        """The content of a generated turn: without what the template itself puts before and after an answer."""
        lead, tail = self.shape.lead, self.shape.tail.split(self.eot)[0] if self.writes_eot else ""
        text = text.removeprefix(lead) if lead else text
        return text.removesuffix(tail) if tail else text

    def _prompt(self, before: str) -> str:
        return before + self.shape.header if self.mode == "template" or self.shape.ignores_generation else before

    def _before_answer(self, record: Record, before: str, whole: str) -> str:
        """F before the answer's content; before what the template writes of its reasoning or tool calls."""
        if whole.startswith(before):
            if not _has_more(record.messages[-1]):
                starts = (whole.find(text, len(before)) for text in (record.answer, record.answer.strip()))
                start = next((at for at in starts if at >= 0), None)
            else:
                asked = self._render(record, record.messages[:-1], generation=True)
                start = max(len(before), _common_length(asked, whole))
            if start is not None:
                # A space before the answer is one token with its first word.
                return before + whole[len(before) : start].rstrip(" ")
        raise DataError(
            f"the chat template of `{self.name}` changes the messages before an answer once it is known, so where the "
            f"answer begins is not clear: `{_tail(before)}` becomes `{_around(whole, _common_length(before, whole))}`"
        )

    def _cut(self, text: str) -> str:
        """The response up to and with the last end of turn; what follows it is nobody's."""
        if self.writes_eot:
            end = text.rfind(self.eot)
            if end < 0:
                raise DataError(f"the chat template of `{self.name}` does not end this answer with `{self.eot}`")
            return text[: end + len(self.eot)]
        return text.removesuffix(self.shape.tail) if self.shape.tail else text

    def _continued(self, record: Record, prompt: str) -> str | None:
        """An answer that goes on from what the prompt has opened (`<think>`), without writing that twice; else None."""
        before = self._render(record, record.messages[:-1], generation=False)
        opened = _open_tags(prompt[_common_length(before, prompt) :])
        if not opened:
            return None
        start, end = opened[-1]
        answer = record.answer
        if answer.lstrip().startswith(start):
            # The prompt has written the white space after the tag as well.
            answer = answer.lstrip().removeprefix(start).removeprefix(prompt[prompt.rindex(start) + len(start) :])
        return answer if end in answer else None

    def _does_not_go_on(self, prompt: str, whole: str) -> str:
        known = sorted(_known_args(self.templates))
        example = "{enable_thinking: false}" if "enable_thinking" in known else f"{{{known[0]}: ...}}" if known else ""
        argument = f"give the template an argument, `data.template: {example}` (it reads {', '.join(known)}), or "
        return (
            f"the chat template of `{self.name}` writes this answer otherwise than it asks for it: the prompt ends "
            f"`{_tail(prompt)}`, the whole conversation has `{_around(whole, _common_length(prompt, whole))}` there; "
            f"{argument if known else ''}train as the template writes history: `data.prompt: template`"
        )

    def _unread(self, record: Record) -> Iterable[str]:
        """What the row has and the template never names."""
        template = self.templates[bool(record.tools)]
        for key in self._never_read[bool(record.tools)]:
            if any(message.get(key) for message in record.messages):
                yield f"the chat template does not read their `{key}`"
        if record.tools and not re.search(r"\btools\b", template):
            yield "the chat template does not read their `tools`"
        for key in record.template_args:
            if not re.search(rf"\b{re.escape(key)}\b", template):
                yield f"the chat template does not read `{key}` of their `chat_template_kwargs`"

    @cached_property
    def _never_read(self) -> dict[bool, list[str]]:
        """Keys of messages that the templates never name."""
        return {tools: [key for key in _EXTRA_KEYS if key not in text] for tools, text in self.templates.items()}

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in sorted(self.control, key=len, reverse=True)))

    def _refuse(self, text: str, what: str) -> None:
        found = self.control_pattern.search(text) if self.control else None
        if found:
            raise DataError(f"{what} holds the control token `{found.group()}`, which would not be read as text")

    def _render(self, record: Record, messages: Sequence[Message], *, generation: bool) -> str:
        given = [_given(message, as_parts=self.shape.as_parts) for message in messages]
        return self._rendered(given, record.tools, {**self.args, **record.template_args}, generation=generation)

    def _render_all(
        self, records: Sequence[Record], conversations: Sequence[list[Any]], *, generation: bool
    ) -> list[str | DataError]:
        """What the template writes of each; rows that give it nothing but messages go through it together, which takes
        half the time."""
        plain = [
            number
            for number, (record, messages) in enumerate(zip(records, conversations, strict=True))
            if messages and record.tools is None and not record.template_args
        ]
        found: dict[int, str | DataError] = {}
        # Where the template refuses one of them each is asked for alone.
        with suppress(DataError):
            together = [conversations[number] for number in plain]
            found |= zip(plain, self._rendered(together, None, self.args, generation=generation), strict=True)
        for number, (record, messages) in enumerate(zip(records, conversations, strict=True)):
            if number not in found:
                args = {**self.args, **record.template_args}
                try:
                    found[number] = self._rendered(messages, record.tools, args, generation=generation)
                except DataError as error:
                    found[number] = error
        return [found[number] for number in range(len(records))]

    def _rendered(
        self, messages: list[Any], tools: list[Any] | None, args: Mapping[str, Any], *, generation: bool
    ) -> Any:
        template = self.templates[bool(tools)]
        return _rendered(self.tokenizer, template, messages, args, name=self.name, generation=generation, tools=tools)


def open_chat(
    tokenizer: Any,
    templates: Mapping[bool, str],
    *,
    name: str,
    args: Mapping[str, Any],
    mode: PromptMode,
    placeholder_ids: Iterable[int],
    sees_pictures: bool,
) -> Chat:
    """Learn from a short conversation how the template writes turns. Raises ModelError, SpecError."""
    known = _known_args(templates)
    if unread := sorted(set(args) - known):
        reads = ", ".join(f"`{one}`" for one in sorted(known)) or "no arguments"
        raise SpecError(f"`data.template` names `{unread[0]}`, and the chat template of `{name}` reads {reads}")

    def render(messages: list[dict[str, Any]], *, generation: bool = False) -> str:
        return _rendered(tokenizer, templates[False], messages, args, name=name, generation=generation, tools=None)

    shape = _probe(render, name, mode)
    added = tokenizer.added_tokens_decoder
    eos = tokenizer.eos_token_id
    tail = tokenizer(shape.tail, add_special_tokens=False, verbose=False)["input_ids"] if shape.tail else []
    found = [index for index in tail if index == eos or (index in added and _is_marker(added[index]))]
    eot_id = found[0] if found else eos
    if eot_id is None:
        raise ModelError(f"`{name}` ends a turn with no added token and names no eos_token")
    eot = str(added[eot_id]) if eot_id in added else str(tokenizer.convert_ids_to_tokens(eot_id))
    remarks = []
    if not found:
        remarks.append(f"the chat template of `{name}` writes no end of turn: responses end with `{eot}`")
    if shape.ignores_generation and shape.header:
        remarks.append(
            f"the chat template of `{name}` ignores `add_generation_prompt`: `{shape.header.strip()}`, which it writes "
            "before an answer, is part of the prompt"
        )
    written = _probe_text(render, shape.as_parts, sees_pictures)
    control = {str(token): index for index, token in added.items() if _is_marker(token) and str(token) in written}
    ends = {str(token) for token in added.values()}
    for start, end in _open_tags(shape.asked):  # what begins reasoning is content; nothing ends Gemma's turn markers so
        if end in ends or any(end in template for template in templates.values()):
            control.pop(start, None)
    vocabulary = tokenizer.get_vocab()
    roles = (getattr(tokenizer, role, None) for role in (*_ROLE_NAMES, "image_token", "video_token"))
    control |= {role: vocabulary[role] for role in roles if role is not None and role in vocabulary}
    control |= {str(tokenizer.convert_ids_to_tokens(index)): index for index in (eot_id, *placeholder_ids)}
    return Chat(tokenizer, name, templates, dict(args), mode, shape, int(eot_id), eot, bool(found), control, remarks)


def _probe(render: Any, name: str, mode: PromptMode) -> _Shape:
    """How the template writes a question and a plain answer, as texts or as lists of parts."""
    reason = "it leaves them out"
    for as_parts in (False, True):
        asked = [_given(_message("user", _ASKED), as_parts=as_parts)]
        answered = [*asked, _given(_message("assistant", _ANSWERED), as_parts=as_parts)]
        try:
            whole = render(answered)
            before, prompt = render(asked), render(asked, generation=True)
        except DataError as error:
            reason = str(error)
            continue
        if _ASKED in whole and _ANSWERED in whole:
            start = whole.rindex(_ANSWERED)
            tail = whole[start + len(_ANSWERED) :]
            written = whole[len(before) : start] if whole.startswith(before) else ""
            ignores = mode == "generation" and prompt == before
            header = lead = ""
            if ignores or mode == "template":
                # White space alone is the answer's own beginning (Llama-2), and so is a space before it (Vicuna).
                header = written.rstrip(" ") if written.strip() else ""
                lead = written[len(header) :]
            elif whole.startswith(prompt):
                lead = whole[len(prompt) : start]
            return _Shape(as_parts, ignores, header, lead, tail, prompt[_common_length(before, prompt) :])
    raise ModelError(f"the chat template of `{name}` does not write a question and an answer: {reason}")


def _probe_text(render: Any, as_parts: bool, sees_pictures: bool) -> str:
    """All that a template writes around system, user and assistant texts (and pictures), as far as it takes them."""
    turns = [_message("user", _ASKED), _message("assistant", _ANSWERED), _message("user", _ASKED)]
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _ASKED}]}
    conversations = [turns, [_message("system", _RULED), *turns], *([[picture]] if sees_pictures else [])]
    texts = []
    for conversation in conversations:
        try:
            texts.append(render([_given(message, as_parts=as_parts) for message in conversation]))
        except DataError:  # no system role, no pictures: nothing is written around them
            continue
    return "\0".join(texts)


def _rendered(
    tokenizer: Any,
    template: str,
    messages: list[Any],
    args: Mapping[str, Any],
    *,
    name: str,
    generation: bool,
    tools: list[dict[str, Any]] | None,
) -> Any:
    """What the template writes of the messages; of a list of conversations, a text for each. Raises DataError."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=_FIXED_DAY * ("strftime_now" in template) + template,
            add_generation_prompt=generation,
            tokenize=False,
            **args,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"the chat template of `{name}` refuses the messages: {_first_line(error)}") from None


def _given(message: Message, *, as_parts: bool) -> dict[str, Any]:
    """A message as the template is given it; without images as a plain string, which nearly every one can read."""
    more = {key: message[key] for key in _EXTRA_KEYS if message.get(key) is not None}
    has_image = any(part["type"] != "text" for part in message["content"])
    content = message["content"] if has_image or as_parts else text_of(message)
    return {"role": message["role"], "content": content, **more}


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _text_or_raise(text: str | DataError) -> str:
    if isinstance(text, DataError):
        raise text
    return text


def _has_more(message: Message) -> bool:
    """Whether an answer is more than its text."""
    return bool(message.get("reasoning_content") or message.get("tool_calls"))


def _open_tags(text: str) -> list[tuple[str, str]]:
    """(opening, closing) of the tags that are opened in `text` and not closed there."""
    pairs = [(m, f"</{m[1]}>" if m[1] else f"[/{m[2]}]") for m in _OPENING.finditer(text)]
    return [(match[0], end) for match, end in pairs if end not in text[match.end() :]]


def _is_marker(token: Any) -> bool:
    """Whether an added token steers the chat, as far as its form says; some tokenizers add words and white space."""
    text = str(token)
    return bool(token.special) or (re.fullmatch(r"\W.*\W", text) is not None and any(map(str.isalnum, text)))


def _known_args(templates: Mapping[bool, str]) -> frozenset[str]:
    """Names that the templates read and nobody gives them: what `data.template` may set."""
    names: frozenset[str] = frozenset()
    return names.union(*map(_free_names, templates.values())) - _GIVEN


def _free_names(template: str) -> frozenset[str]:
    """Variables that a template reads and does not set itself."""
    import jinja2
    from jinja2 import meta, nodes

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])
    # Marks of transformers around what the assistant says; they write nothing.
    plain = re.sub(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}", "", template)
    try:
        tree = environment.parse(plain)
        # A name that is set on one way through the template and not on another counts as its own.
        own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
        return frozenset(meta.find_undeclared_variables(tree)) - own
    except jinja2.TemplateError:  # what is wrong with it is said when it is rendered
        return frozenset()


def _common_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _tail(text: str) -> str:
    return repr(text[-SHOWN:])[1:-1]


def _around(text: str, place: int) -> str:
    return repr(text[max(0, place - SHOWN // 2) : place + SHOWN // 2])[1:-1]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
