"""Rows as other tools write them, brought into the one form that is checked: turns with `role` and `content`.

Read are `messages` (OpenAI) and `conversations` (ShareGPT and LLaVA: `from` and `value`), either also as JSON text.
Every reading that is not a plain one is noted, so that it can be told.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vlsi_cache.errors import DataError

from .values import is_empty, listed, parse_json, shown

Note = Callable[[str], None]

# What is read of a row. Everything else is named in the log.
COLUMNS = ("id", "kind", "system", "messages", "conversations", "image", "images", "tools", "chat_template_kwargs")
# Media that no model here is given: rows with them are refused.
UNSUPPORTED = ("video", "videos", "audio", "audios")

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
_ANSWERS = ("completion", "chosen", "response", "output", "answer", "solution")
_WANTED = 'write `messages`: [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]'


def turns_of(row: Mapping[str, Any], note: Note) -> list[Any]:
    """The turns of a row, each as it is or as `role` and `content`; raises DataError if there are none."""
    found = [name for name in ("messages", "conversations") if not is_empty(row.get(name))]
    if len(found) == 2:
        raise DataError("has both `messages` and `conversations`; keep one of them")
    if not found:
        names = [name for name in row if row[name] is not None and name not in COLUMNS]
        raise DataError(f"`messages` is missing or empty{_advice(names)}")
    name, turns = found[0], row[found[0]]
    if isinstance(turns, str):
        try:
            turns = parse_json(turns)
        except DataError as error:
            raise DataError(f"`{name}` is a text and {error}") from None
        note(f"`{name}` is read as JSON text")
    if not isinstance(turns, list | tuple) or not turns:
        raise DataError(f"`{name}` is a {type(turns).__name__}, must be a list of messages")
    if name == "conversations":
        is_sharegpt = any(isinstance(turn, Mapping) and turn.get("from") is not None for turn in turns)
        note("rows are read as ShareGPT `conversations`" if is_sharegpt else "`conversations` is read as `messages`")
    return [_turn(turn, number) for number, turn in enumerate(turns)]


def refuse_columns(names: Iterable[str], where: str) -> None:
    """Raise DataError for a file none of whose columns holds messages."""
    names = list(names)
    if not {"messages", "conversations"} & set(names):
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
