"""Lists of layers as people write and read them, the same everywhere: `2-6,18,last`.

Layer k is the state after k layers, and `last` the model's own output. Only `init-student` names the decoder layers
themselves, which are counted from 0.
"""

from collections.abc import Sequence

from vlsi_cache.errors import SpecError

MAX_LAYER = 4096


def parse_ranges(text: str) -> list[tuple[int, int] | str]:
    """`2-6,18,last` -> [(2, 6), (18, 18), "last"]. Raises SpecError that says how a list is written."""
    found: list[tuple[int, int] | str] = []
    for item in text.replace(" ", "").split(","):
        first, dash, last = item.partition("-")
        if item == "last":
            found.append(item)
        elif not (_is_number(first) and (_is_number(last) or not dash)):
            hint = f"; a range is written {item.replace(':', '-')}" if ":" in item else ""
            raise SpecError(f"layers `{text}`: `{item}` is neither a layer, nor a range such as 2-6, nor `last`{hint}")
        elif int(first) > int(last or first):
            raise SpecError(f"layers `{text}`: the range `{item}` runs backwards; write the shallower layer first")
        else:
            found.append((int(first), int(last or first)))
    return found


def parse_layers(text: str) -> list[int | str]:
    """`2-6,18,last` -> [2, 3, 4, 5, 6, 18, "last"]. Raises SpecError."""
    layers: list[int | str] = []
    for item in parse_ranges(text):
        layers += [item] if isinstance(item, str) else range(item[0], item[1] + 1)
    return layers


def shown_layers(layers: Sequence[int | str], *, last: int | None = None) -> str:
    """What `parse_layers` reads back: neighbours as a range, the layer of number `last` by that name."""
    pieces: list[str] = []
    run: list[int] = []
    for layer in [*layers, "end"]:
        if isinstance(layer, int) and layer != last and (not run or layer == run[-1] + 1):
            run.append(layer)
            continue
        if run:
            pieces += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
        run = [layer] if isinstance(layer, int) and layer != last else []
        if not run and layer != "end":
            pieces.append("last")
    return ",".join(pieces)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 5 and int(text) <= MAX_LAYER
