"""YAML as a spec needs it: texts, numbers, lists and sections; every key once, and nothing that grows while it is read.

A few lines of aliases can stand for more values than any memory holds, so values are counted as they are expanded.
"""

import math
import sys
from typing import Any

import yaml
from yaml.composer import ComposerError

MAX_VALUES, MAX_DEPTH = 10_000, 32
MAX_NUMBER = 2**63 - 1
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
MERGE, TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError with one line that names the key and the line of what is wrong."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Builder(loader).build(node, "")
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {short(error, 200)}") from None


def plain_problems(value: Any, key: str = "", depth: int = 0) -> list[str]:
    """What cannot stand in a spec, wherever it was read from: numbers without end, nesting without end."""
    if depth > MAX_DEPTH:
        return [f"`{short(key)}`: nested more than {MAX_DEPTH} deep"]
    if isinstance(value, dict):
        inner = [(f"{key}.{name}" if key else str(name), one) for name, one in value.items()]
        return [problem for name, one in inner for problem in plain_problems(one, name, depth + 1)]
    if isinstance(value, list | tuple):
        return [problem for i, one in enumerate(value) for problem in plain_problems(one, f"{key}.{i}", depth + 1)]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"`{key}`: `{value}` is not a finite number"]
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return [f"`{key}`: a number of {value.bit_length()} bits is beyond any sense"]
    return []


def short(value: Any, limit: int = 60) -> str:
    """A value as a message shows it: one line, not long."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class _Loader(yaml.SafeLoader):
    """The safe loader, with an end to how deep and how much it reads."""

    depth = num_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.num_nodes += 1
        if self.depth > MAX_DEPTH or self.num_nodes > MAX_VALUES:
            what = f"nested more than {MAX_DEPTH} deep" if self.depth > MAX_DEPTH else f"more than {MAX_VALUES} values"
            raise ComposerError(None, None, what, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Builder:
    """Values out of nodes; an alias is a copy of its own, so that a change of one leaves the other."""

    def __init__(self, loader: _Loader) -> None:
        self.loader, self.num_values = loader, 0
        self.open: list[yaml.Node] = []

    def build(self, node: yaml.Node, key: str) -> Any:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise _wrong(node, key, f"its aliases stand for more than {MAX_VALUES} values")
        if any(node is one for one in self.open):
            raise _wrong(node, key, "it refers to itself")
        if len(self.open) > MAX_DEPTH:
            raise _wrong(node, key, f"nested more than {MAX_DEPTH} deep")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        if node.tag not in PLAIN_TAGS:
            raise _wrong(node, key, f"`{node.tag.rpartition(':')[2]}` is no kind of value that a spec knows")
        self.open.append(node)
        if isinstance(node, yaml.SequenceNode):
            value: Any = [self.build(one, f"{key}.{index}".lstrip(".")) for index, one in enumerate(node.value)]
        else:
            value = self._mapping(node, key)
        self.open.pop()
        return value

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        try:
            value = self.loader.construct_object(node)
        except (ValueError, yaml.YAMLError) as error:
            is_endless = len(node.value) > sys.get_int_max_str_digits()
            reason = "its digits have no end" if is_endless else short(error)
            raise _wrong(node, key, f"`{short(node.value)}` is no value: {reason}") from None
        if node.tag not in PLAIN_TAGS:
            kind = node.tag.rpartition(":")[2]
            raise _wrong(node, key, f"`{short(node.value)}` is read as a {kind}; put it in quotes if it is a text")
        for problem in plain_problems(value, key):
            raise ValueError(f"line {node.start_mark.line + 1}: {problem}")
        return value

    def _mapping(self, node: yaml.Node, key: str) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, value_node in node.value:
            if name_node.tag == MERGE:
                parts = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for part in parts:
                    found = self.build(part, key)
                    if not isinstance(found, dict):
                        raise _wrong(part, key, "`<<` merges sections, and this is none")
                    merged = {**found, **merged}
                continue
            if name_node.tag != TEXT:
                shown = short(name_node.value) if isinstance(name_node, yaml.ScalarNode) else "a list or section"
                raise _wrong(name_node, key, f"the key `{shown}` is not a text; put it in quotes")
            name, line = name_node.value, name_node.start_mark.line + 1
            inner = f"{key}.{name}" if key else name
            if name in lines:
                raise ValueError(f"`{short(inner)}` is named twice, in line {lines[name]} and line {line}")
            lines[name] = line
            own[name] = self.build(value_node, inner)
        return {**merged, **own}


def _wrong(node: yaml.Node, key: str, what: str) -> ValueError:
    where = f"line {node.start_mark.line + 1}"
    return ValueError(f"{where}: `{short(key)}`: {what}" if key else f"{where}: {what}")
