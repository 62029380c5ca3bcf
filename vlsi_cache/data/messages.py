"""Rows as other tools write them, brought into the one form that is checked: turns with `role` and `content`.

Read are `messages` (OpenAI) and `conversations` (ShareGPT and LLaVA: `from` and `value`), either also as JSON text, and
TRL's `prompt` with `completion` or `chosen`, as texts or messages.
Every reading that is not a plain one is noted, so that it can be told.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vlsi_cache.config.sections import Turns
from vlsi_cache.errors import DataError

from .values import given_json, is_empty, listed, parse_json, shown, text_value

Note = Callable[[str], None]
# What is read of a row. Everything else is named in the log.
COLUMNS = ("id", "kind", "system", "messages", "conversations", "image", "images", "video", "videos", "tools")
COLUMNS += ("chat_template_kwargs", "prompt", "completion", "chosen", "label")
# Media that no model here is given: rows with them are refused.
UNSUPPORTED = ("audio", "audios")
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# Columns of other kinds of data, and the message that would say the same.
_QUESTIONS = ("prompt", "instruction", "question", "query", "input", "problem")
_ANSWERS = ("completion", "response", "output", "answer", "solution")
_WANTED = 'write `messages`: [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]'


def turns_of(row: Mapping[str, Any], note: Note) -> list[Any]:
    """The turns of a row, each as it is or as `role` and `content`; raises DataError if there are none."""
    found = [name for name in ("messages", "conversations") if not is_empty(row.get(name))]
    if len(found) == 2:
        raise DataError("has both `messages` and `conversations`; keep one of them")
    pair = [name for name in ("prompt", "completion", "chosen") if not is_empty(row.get(name))]
    if found and pair:
        note(f"`{found[0]}` is read, and {listed(pair)} {'are' if len(pair) > 1 else 'is'} not")
    if not found and (pair[1:] or pair == ["chosen"]):
        return _prompted(row, pair, note)
    if not found:
        names = [name for name in row if row[name] is not None and (name not in COLUMNS or name in pair)]
        raise DataError(f"`messages` is missing or empty{_advice(names)}")
    name = found[0]
    turns = _listed_turns(row[name], name, note)
    if name == "conversations":
        is_sharegpt = any(isinstance(turn, Mapping) and turn.get("from") is not None for turn in turns)
        note("rows are read as ShareGPT `conversations`" if is_sharegpt else "`conversations` is read as `messages`")
    return [_turn(turn, number) for number, turn in enumerate(turns)]


def _prompted(row: Mapping[str, Any], names: list[str], note: Note) -> list[Any]:
    """The turns of TRL's rows: what `completion` or `chosen` says is learned, and nothing of the prompt."""
    if {"completion", "chosen"} <= set(names):
        raise DataError("has both `completion` and `chosen`; keep one of them")
    if row.get("label") is not None and not row["label"]:
        raise DataError("has `label: false`: its answer is a bad one, and nothing here learns from those")
    told = names[-1]
    note(f"rows are read from {listed(names)}")
    said, before = (
        _told(row.get(name), name, speaker, note) for name, speaker in ((told, "assistant"), ("prompt", "user"))
    )
    if told == "chosen" and isinstance(said[0], Mapping) and said[0].get("role") != "assistant":
        # The whole conversation, in which the last turn alone was chosen; its beginning is the prompt once more.
        is_text = isinstance(row.get("prompt"), str) and len(before) == 1
        asked = [turn for turn in said[:-1] if isinstance(turn, Mapping) and turn.get("role") == "user"]
        repeats = before[0] in asked if is_text else _plain_turns(said[: len(before)]) == _plain_turns(before)
        if before and not repeats:
            raise DataError("`chosen` is a conversation that does not begin with `prompt`; keep one of them")
        return [*map(_not_learned, said[:-1]), said[-1]]
    if not before:
        raise DataError(f"`{told}` begins with the assistant, and there is no `prompt`")
    return [*map(_not_learned, before), *said]


def _told(value: Any, name: str, speaker: str, note: Note) -> list[Any]:
    """The turns of a column of TRL: messages, also as JSON text, or the text of one turn of `speaker`."""
    if is_empty(value):
        return []
    if isinstance(value, str):
        found = _messages_in(value)
        if found is None:
            return [{"role": speaker, "content": value}]
        value = found
        note(f"`{name}` is read as JSON text")
    return [_turn(turn, number) for number, turn in enumerate(_listed_turns(value, name, note))]


def _messages_in(text: str) -> list[Any] | None:
    """The messages that a text is as JSON; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = parse_json(text)
    except DataError:
        return None
    is_messages = found and all(isinstance(one, Mapping) and {"role", "from"} & set(one) for one in found)
    return found if is_messages else None


def _plain_turns(turns: list[Any]) -> list[Any]:
    return [(turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else turn for turn in turns]


def _not_learned(turn: Any) -> Any:
    if not isinstance(turn, Mapping) or turn.get("role") != "assistant":
        return turn
    return {**{key: value for key, value in turn.items() if key != "weight"}, "train": False}


def _listed_turns(turns: Any, name: str, note: Note) -> list[Any]:
    """The turns in a column, which may hold them as JSON text."""
    if isinstance(turns, str):
        try:
            turns = parse_json(turns)
        except DataError as error:
            raise DataError(f"`{name}` is a text and {error}") from None
        note(f"`{name}` is read as JSON text")
    if not isinstance(turns, list | tuple) or not turns:
        raise DataError(f"`{name}` is a {type(turns).__name__}, must be a list of messages")
    return list(turns)


def refuse_columns(names: Iterable[str], where: str) -> None:
    """Raise DataError for a file none of whose columns holds messages."""
    names = list(names)
    if not ({"messages", "conversations", "chosen"} & set(names) or {"prompt", "completion"} <= set(names)):
        raise DataError(f"{where} has no column `messages`{_advice(names)}")


def _advice(names: list[str]) -> str:
    """What is there instead of messages, and what would be read."""
    if not names:
        return ""
    asked, told = ([name for name in known if name in names] for known in (_QUESTIONS, _ANSWERS))
    from_them = f" from `{asked[0]}` and `{told[0]}`" if asked and told else ""
    return f", only {listed(names)}; {_WANTED}{from_them}"


def _turn(turn: Any, number: int) -> Any:
    if not isinstance(turn, Mapping) or (turn.get("from") is None and turn.get("value") is None):
        return turn
    if turn.get("role") is not None or turn.get("content") is not None:
        raise DataError(f"message {number} has `from` or `value` and also `role` or `content`; keep one pair")
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise DataError(f"message {number} is `from` `{shown(speaker)}`, which is unknown (known: {listed(_SPEAKERS)})")
    plain = {key: one for key, one in turn.items() if key not in ("from", "value")}
    if speaker == "function_call":
        return {**plain, "role": "assistant", "tool_calls": _calls(value, f"message {number}")}
    return {**plain, "role": _SPEAKERS[speaker], "content": value}


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls that a ShareGPT turn holds as JSON text: {name, arguments}, or a list of them."""
    try:
        found = parse_json(value) if isinstance(value, str) else value
    except DataError as error:
        raise DataError(f"{where} is a `function_call` and {error}") from None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f"{where} is a `function_call` and must hold `name` and `arguments`, not `{shown(value)}`")
    return [{"type": "function", "function": dict(call)} for call in calls]


Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
# Names that others give to `reasoning_content`: vLLM and OpenRouter, and the chat template of gpt-oss.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_KEYS = ("name", "tool_call_id")
_KEYS = ("role", "content", *_REASONING, "tool_calls", *_TEXT_KEYS, "weight", "train")
# Where a picture of its own can stand in a part.
_VIDEO_KEYS = ("video", "video_url", "url", "path")  # and a video
_KNOWN_PARTS = "known: text, image, image_url, video, video_url"
_PICTURE_KEYS = ("image", "image_url", "url", "path", "bytes", "base64")


def check_messages(turns: list[Any], note: Note) -> tuple[list[Message], list[bool]]:
    """The messages, and for each whether it may be learned; content is always a list of parts.

    An image part may hold its own `picture`, see `place_pictures`. Raises DataError with the first thing that is wrong.
    """
    checked = [_message(turn, f"message {number}", note) for number, turn in enumerate(turns)]
    return [message for message, _ in checked], [may_learn for _, may_learn in checked]


def learned_turns(messages: list[Message], may_learn: list[bool], turns: Turns, note: Note) -> list[int]:
    """Indices of the turns that are learned: the assistant's, all or the last one, but for those not to be learned."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [index for index in answers if may_learn[index]]
    if not answers:
        raise DataError("has no assistant message, so no response")
    if not learned:
        raise DataError("none of its assistant messages may be learned: they have `weight: 0` or `train: false`")
    if learned[-1] != answers[-1]:
        note("rows end before turns of `weight: 0` or `train: false`, which are not learned")
    elif answers[-1] != len(messages) - 1:
        raise DataError(f"the last message is of role `{messages[-1]['role']}`, must be the assistant's")
    if turns == "last" or len(learned) == 1:
        _check_response(messages, learned[-1], "the response", "")
        return learned[-1:]
    advice = "; mend it, give it `train: false`, or take the last turns alone with `data.turns: last`"
    for number, index in enumerate(learned, start=1):
        _check_response(messages, index, f"response {number} of {len(learned)}", advice)
    return learned


def _check_response(messages: list[Message], index: int, name: str, advice: str) -> None:
    response = messages[index]
    if index == 0:
        raise DataError(f"has no message before {name}{advice}")
    if any(part["type"] == "image" for part in response["content"]):
        raise DataError(f"{name} holds an image{advice}")
    if not text_of(response).strip() and "tool_calls" not in response:
        raise DataError(f"{name} is empty{advice}")


def as_parts(content: Any) -> Any:
    """Content as a list of parts: a plain string is one text part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(message: Message) -> str:
    """The text parts of one message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def image_parts(messages: list[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        yield from (part for part in message["content"] if part["type"] == "image")


def _message(turn: Any, where: str, note: Note) -> tuple[Message, bool]:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is a {type(turn).__name__}, must be a mapping with `role` and `content`")
    turn = {key: value for key, value in turn.items() if value is not None}
    role = turn.get("role")
    if role == "developer":
        # OpenAI's newer name for it. Templates that know it write both alike, and others leave it out in silence.
        note("role `developer` is read as `system`")
        role = "system"
    if role not in ROLES:
        raise DataError(f"{where} has the unknown role `{shown(role)}` (known: {', '.join(ROLES)}, developer)")
    unknown = [key for key, value in turn.items() if key not in _KEYS and not is_empty(value)]
    if unknown:
        raise DataError(f"{where} has {listed(unknown)}, not read here (read are: {', '.join(_KEYS)})")
    calls = _tool_calls(turn.get("tool_calls"), role, where)
    message = {"role": role, "content": _content(turn.get("content"), where, is_call=bool(calls))}
    message |= _reasoning(turn, role, where, note)
    message |= {"tool_calls": calls} if calls else {}
    message |= {key: text_value(turn[key], f"`{key}` of {where}") for key in _TEXT_KEYS if key in turn}
    return message, _may_learn(turn, role, where)


def _content(content: Any, where: str, *, is_call: bool) -> list[dict[str, Any]]:
    if is_call and (content is None or content == ""):
        return []
    parts = as_parts(content)
    if not isinstance(parts, list | tuple):
        raise DataError(f"{where} has content of type {type(parts).__name__}, must be a text or a list of parts")
    return [_part(part, where) for part in parts]


def _tool_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    calls = given_json(calls, f"`tool_calls` of {where}") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"`tool_calls` of {where} must be a list of mappings")
    if calls and role != "assistant":
        raise DataError(f"{where} has `tool_calls` and is of role `{role}`; only the assistant calls tools")
    return calls


def _reasoning(turn: Mapping[str, Any], role: str, where: str, note: Note) -> dict[str, str]:
    given = {key: text_value(turn[key], f"`{key}` of {where}") for key in _REASONING if key in turn}
    if role != "assistant":
        given = {key: text for key, text in given.items() if text}
    if not given:
        return {}
    if role != "assistant":
        raise DataError(f"{where} has {listed(given)} and is of role `{role}`; only the assistant reasons")
    if len(set(given.values())) > 1:
        raise DataError(f"{where} has {listed(given)} with different texts; keep `reasoning_content`")
    if "reasoning_content" not in given:
        note(f"{listed(given)} of a message is read as `reasoning_content`")
    return {"reasoning_content": next(iter(given.values()))}


def _may_learn(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """What `weight` (OpenAI) and `train` (axolotl) say of a message."""
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise DataError(f"{where} has `weight` `{shown(weight)}`, must be 0 or 1")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{where} has `train` `{shown(train)}`, must be true or false")
    if weight is not None and train is not None and bool(weight) != train:
        raise DataError(f"{where} has `weight: {shown(weight)}` and `train: {str(train).lower()}`; keep one of them")
    if role != "assistant" and (weight or train):
        raise DataError(f"{where} is of role `{role}` and to be learned; only messages of the assistant are")
    return weight != 0 and train is not False


def _part(part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise DataError(f"{where} has a part of the unknown type `{type(part).__name__}` ({_KNOWN_PARTS})")
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "text":
        _refuse_keys(part, ("type", "text"), where)
        return {"type": "text", "text": text_value(part.get("text"), f"a text part of {where}")}
    if kind in ("image", "image_url"):
        return _image_part(part, where)
    if kind in ("video", "video_url"):
        return _video_part(part, where)
    raise DataError(f"{where} has a part of the unknown type `{shown(kind)}` ({_KNOWN_PARTS})")


def _image_part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An image part: with its own `picture`, or one of the row's, in order (`index` may say which)."""
    _refuse_keys(part, ("type", "text", "index", "sha256", *_PICTURE_KEYS), where)
    if part.get("text"):
        raise DataError(f"{where} has a part of type `{part['type']}` with a `text`; make it a part of its own")
    own = {key: part[key] for key in _PICTURE_KEYS if not is_empty(part.get(key))}
    if not own and part["type"] == "image_url":
        raise DataError(f"{where} has a part of type `image_url` without an `image_url`")
    if not own:
        return {"type": "image", **({"index": part["index"]} if "index" in part else {})}
    if len(own) > 1 and set(own) != {"bytes", "path"}:
        raise DataError(f"{where} has a part with {listed(own)}; keep one of them")
    return {"type": "image", "picture": _picture(own, part, where)}


def _video_part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A video part: with its own `clip` (a path or a list of frames), or one of the row's, in order."""
    _refuse_keys(part, ("type", *_VIDEO_KEYS), where)
    own = {key: part[key] for key in _VIDEO_KEYS if not is_empty(part.get(key))}
    if len(own) > 1:
        raise DataError(f"{where} has a part with {listed(own)}; keep one of them")
    clip = next(iter(own.values()), None)
    if "video_url" in own and isinstance(clip, Mapping):
        _refuse_keys(clip, ("url",), f"`video_url` of {where}")
        clip = clip.get("url")
    return {"type": "video", **({} if clip is None else {"clip": clip})}


def _picture(own: dict[str, Any], part: Mapping[str, Any], where: str) -> Any:
    if "bytes" in own or "base64" in own:
        picture: Any = {"bytes": own.get("bytes", own.get("base64"))}
    else:
        picture = next(iter(own.values()))
    if "image_url" in own and isinstance(picture, Mapping):
        _refuse_keys(picture, ("url", "detail"), f"`image_url` of {where}")
        picture = picture.get("url")
    if "sha256" in part:
        entry = picture if isinstance(picture, Mapping) else {"path" if isinstance(picture, str) else "bytes": picture}
        picture = {**entry, "sha256": part["sha256"]}
    return picture


def _refuse_keys(part: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [key for key, value in part.items() if key not in known and not is_empty(value)]
    if unknown:
        raise DataError(f"{where} has a part with {listed(unknown)}, not read here (read are: {', '.join(known)})")
