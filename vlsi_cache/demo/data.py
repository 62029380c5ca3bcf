"""The demo's data: drawn charts and scenes with questions and answers about them.

Pictures are 64 x 64 pixels in 4 x 4 cells, drawn without fonts. Every mark is stamped from a small boolean mask, so the
pixels do not depend on a font file or on a Pillow version; Pillow only writes the PNG. A cell is 16 x 16 pixels, the
area of one image token of the tiny Qwen2-VL.
Shapes: H, W pixels; C = 3 colour channels.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

SIDE = 64
CELL = 16
GRID = SIDE // CELL
BAR_UNIT = 5
AXIS_Y = 48
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 35),
    "green": (30, 150, 60),
    "blue": (40, 80, 225),
    "yellow": (240, 200, 0),
    "purple": (150, 50, 190),
    "orange": (250, 125, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
BLACK = (20, 20, 20)
WHITE = (255, 255, 255)
GREY = (185, 185, 185)
# Seven segments: top, top left, top right, middle, bottom left, bottom right, bottom; which are lit in each digit.
_LIT = ["1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011"]
_SEGMENT_BOXES = ((0, 0, 2, 8), (0, 0, 7, 2), (0, 6, 7, 8), (5, 0, 7, 8), (5, 0, 12, 2), (5, 6, 12, 8), (10, 0, 12, 8))


@dataclass(frozen=True)
class Mark:
    """One shape (`name` of SHAPES, `colour` of COLOURS) or one black digit (`name` "0".."9", `colour` "") in a cell."""

    cell: int
    name: str
    colour: str
    shift_x: int
    shift_y: int
    radius: int

    @property
    def is_digit(self) -> bool:
        return not self.colour

    @property
    def phrase(self) -> str:
        return f"{self.colour} {self.name}"


@dataclass(frozen=True)
class Scene:
    """Marks in cells; `focus_colour` and `focus_shape` are the two attributes whose counts were drawn evenly."""

    marks: tuple[Mark, ...]
    focus_colour: str
    focus_shape: str

    @property
    def key(self) -> str:
        """What is where, without the jitter: two scenes with one key look the same to a reader."""
        return "scene " + " ".join(f"{m.cell}:{m.colour}:{m.name}" for m in sorted(self.marks, key=lambda m: m.cell))


@dataclass(frozen=True)
class Bar:
    """One bar of value 1..9 in a column of cells, with its number in the same colour under the axis."""

    column: int
    colour: str
    value: int
    left: int
    width: int
    label_x: int


@dataclass(frozen=True)
class Chart:
    """Three or four bars of different colours and different values."""

    bars: tuple[Bar, ...]

    @property
    def key(self) -> str:
        return "chart " + " ".join(f"{b.column}:{b.colour}:{b.value}" for b in self.bars)


Picture = Scene | Chart


@cache
def digit_mask(digit: int) -> np.ndarray:
    """Seven-segment glyph as bool [12, 8]."""
    mask = np.zeros((12, 8), dtype=bool)
    for on, (top, left, bottom, right) in zip(_LIT[digit], _SEGMENT_BOXES, strict=True):
        if on == "1":
            mask[top:bottom, left:right] = True
    return mask


@cache
def shape_mask(name: str, radius: int) -> np.ndarray:
    """One of SHAPES as bool [2 * radius + 1, 2 * radius + 1]."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disc = x * x + y * y <= (radius + 0.4) ** 2
    masks = {
        "circle": disc,
        "square": np.maximum(abs(x), abs(y)) <= radius - 1,
        "triangle": 2 * abs(x) <= y + radius,
        "cross": np.minimum(abs(x), abs(y)) <= 1,
        "ring": disc & (x * x + y * y > (radius - 2.2) ** 2),
    }
    return masks[name]


def _stamp(canvas_HWC: np.ndarray, mask: np.ndarray, *, top: int, left: int, colour: tuple[int, int, int]) -> None:
    """Paint `mask` in place; a view assignment, so it must lie inside the canvas."""
    canvas_HWC[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = colour


def render(picture: Picture) -> np.ndarray:
    """Pixels of a picture, uint8 [64, 64, 3]."""
    canvas_HWC = np.full((SIDE, SIDE, 3), WHITE, dtype=np.uint8)
    for edge in (0, SIDE - 1):  # the grey frame lets a border cell know that it is one
        canvas_HWC[edge, :] = GREY
        canvas_HWC[:, edge] = GREY
    if isinstance(picture, Scene):
        for mark in picture.marks:
            row, column = divmod(mark.cell, GRID)
            mask = digit_mask(int(mark.name)) if mark.is_digit else shape_mask(mark.name, mark.radius)
            top = row * CELL + (CELL + 1 - mask.shape[0]) // 2 + mark.shift_y
            left = column * CELL + (CELL + 1 - mask.shape[1]) // 2 + mark.shift_x
            _stamp(canvas_HWC, mask, top=top, left=left, colour=BLACK if mark.is_digit else COLOURS[mark.colour])
        return canvas_HWC
    canvas_HWC[AXIS_Y] = GREY
    for bar in picture.bars:
        left, colour = bar.column * CELL, COLOURS[bar.colour]
        canvas_HWC[AXIS_Y - BAR_UNIT * bar.value : AXIS_Y, left + bar.left : left + bar.left + bar.width] = colour
        _stamp(canvas_HWC, digit_mask(bar.value), top=AXIS_Y + 2, left=left + bar.label_x, colour=colour)
    return canvas_HWC


def to_png(pixels_HWC: np.ndarray) -> bytes:
    """PNG file of uint8 [H, W, 3] pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


# Of 256 digest values, the range that belongs to the split; "teacher" is what the demo teacher was trained on.
SPLITS: dict[str, range] = {"heldout": range(32), "train": range(32, 96), "teacher": range(96, 256)}
CHART_KINDS = ("bar_value", "bar_extreme", "bar_compare", "bar_difference")
SCENE_KINDS = ("count", "colour", "corner", "digit")
KINDS = CHART_KINDS + SCENE_KINDS
CORNERS = {"top left": 0, "top right": GRID - 1, "bottom left": GRID * (GRID - 1), "bottom right": GRID * GRID - 1}
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Question:
    """One question with its only right answer; `value` is the part of the answer that varies."""

    kind: str
    text: str
    answer: str
    value: str


def _draw_chart(rng: random.Random) -> Chart:
    columns = sorted(rng.sample(range(GRID), rng.choice((3, 4, 4))))
    colours = rng.sample(list(COLOURS), len(columns))
    values = rng.sample(range(1, 10), len(columns))
    bars = []
    for column, colour, value in zip(columns, colours, values, strict=True):
        width = rng.randint(8, 12)
        left = rng.randint(1, 15 - width)
        bars.append(Bar(column, colour, value, left=left, width=width, label_x=rng.randint(3, 5)))
    return Chart(tuple(bars))


def _planted(rng: random.Random, choices: list[str], length: int) -> tuple[list[str], str]:
    """`length` draws in which one choice, the focus, occurs 1 to 5 times, each count equally often."""
    focus = rng.choice(choices)
    others = [choice for choice in choices if choice != focus]
    count = rng.randint(1, 5)
    drawn = [focus] * count + [rng.choice(others) for _ in range(length - count)]
    rng.shuffle(drawn)
    return drawn, focus


def _draw_scene(rng: random.Random) -> Scene:
    num_shapes, num_digits = rng.randint(6, 8), rng.randint(2, 3)
    colours, focus_colour = _planted(rng, list(COLOURS), num_shapes)
    names, focus_shape = _planted(rng, list(SHAPES), num_shapes)
    names += [str(rng.randint(0, 9)) for _ in range(num_digits)]
    colours += [""] * num_digits
    cells = rng.sample(range(GRID * GRID), len(names))
    marks = tuple(
        Mark(cell, name, colour, shift_x=rng.randint(-1, 1), shift_y=rng.randint(-1, 1), radius=rng.choice((5, 6)))
        for cell, name, colour in zip(cells, names, colours, strict=True)
    )
    return Scene(marks, focus_colour, focus_shape)


# Of each kind of question: the answer, whose part that varies is `value`, and the ways to ask.
WORDINGS: dict[str, tuple[str, ...]] = {
    "bar_value": (
        "The {bar.colour} bar shows {value}.",
        "What does the {bar.colour} bar show?",
        "What is the value of the {bar.colour} bar?",
        "Which number belongs to the {bar.colour} bar?",
        "Read the {bar.colour} bar.",
    ),
    "bar_extreme": (
        "The {word} bar is {value}.",
        "Which bar is the {word}?",
        "What colour is the {word} bar?",
        "Name the {word} bar.",
    ),
    "bar_compare": (
        "The {taller.colour} bar is taller than the {shorter.colour} bar.",
        "Which bar is taller, the {first.colour} one or the {second.colour} one?",
        "Compare the {first.colour} bar and the {second.colour} bar.",
        "Is the {first.colour} or the {second.colour} bar taller?",
    ),
    "bar_difference": (
        "The {first.colour} bar shows {first.value} and the {second.colour} bar shows {second.value}, "
        "so the difference is {value}.",
        "What is the difference between the {first.colour} bar and the {second.colour} bar?",
        "How far apart are the {first.colour} bar and the {second.colour} bar?",
    ),
    "count": (
        "There are {value} {noun}.",
        "How many {noun} are there?",
        "How many {noun} do you see?",
        "Count the {noun}.",
    ),
    "colour": (
        "The {name} is {value}.",
        "What colour is the {name}?",
        "Which colour does the {name} have?",
        "Name the colour of the {name}.",
    ),
    "corner": (
        "The {corner} corner shows {article} {value}.",
        "Which shape is in the {corner} corner?",
        "What do you see in the {corner} corner?",
        "Describe the {corner} corner.",
    ),
    "digit": (
        "The digit {place} is {value}.",
        "Which digit is {place}?",
        "Read the digit {place}.",
        "What number is {place}?",
    ),
}
Words = dict[str, Any]  # what is put into a wording; `value` among them


def _bar_value(chart: Chart, rng: random.Random) -> Words:
    bar = rng.choice(chart.bars)
    return {"bar": bar, "value": bar.value}


def _bar_extreme(chart: Chart, rng: random.Random) -> Words:
    word, pick = rng.choice((("tallest", max), ("shortest", min)))
    return {"word": word, "value": pick(chart.bars, key=lambda bar: bar.value).colour}


def _bar_compare(chart: Chart, rng: random.Random) -> Words:
    first, second = rng.sample(chart.bars, 2)
    taller, shorter = (first, second) if first.value > second.value else (second, first)
    return {"first": first, "second": second, "taller": taller, "shorter": shorter, "value": taller.colour}


def _bar_difference(chart: Chart, rng: random.Random) -> Words:
    first, second = rng.sample(chart.bars, 2)
    return {"first": first, "second": second, "value": abs(first.value - second.value)}


def _count(scene: Scene, rng: random.Random) -> Words | None:
    if rng.random() < 0.5:
        count = sum(mark.colour == scene.focus_colour for mark in scene.marks)
        noun = f"{scene.focus_colour} shapes"
    else:
        count = sum(mark.name == scene.focus_shape for mark in scene.marks)
        noun = "crosses" if scene.focus_shape == "cross" else f"{scene.focus_shape}s"
    return None if count < 2 else {"noun": noun, "value": count}  # the questions speak of several


def _colour(scene: Scene, rng: random.Random) -> Words | None:
    names = [mark.name for mark in scene.marks]
    single = [mark for mark in scene.marks if mark.colour and names.count(mark.name) == 1]
    if not single:
        return None
    mark = rng.choice(single)
    return {"name": mark.name, "value": mark.colour}


def _corner(scene: Scene, rng: random.Random) -> Words | None:
    at = {mark.cell: mark for mark in scene.marks if mark.colour}
    corners = [name for name, cell in CORNERS.items() if cell in at]
    if not corners:
        return None
    corner = rng.choice(corners)
    phrase = at[CORNERS[corner]].phrase
    return {"corner": corner, "article": "an" if phrase[0] in "aeiou" else "a", "value": phrase}


def _beside(scene: Scene) -> list[tuple[Mark, str, Mark]]:
    """Every (digit, direction, anchor): the anchor's shape and colour occur once, the digit is in the next cell."""
    at = {mark.cell: mark for mark in scene.marks}
    phrases = [mark.phrase for mark in scene.marks]
    found = []
    for anchor in scene.marks:
        if anchor.is_digit or phrases.count(anchor.phrase) > 1:
            continue
        row, column = divmod(anchor.cell, GRID)
        for direction, (down, right) in DIRECTIONS.items():
            y, x = row + down, column + right
            mark = at.get(y * GRID + x) if 0 <= y < GRID and 0 <= x < GRID else None
            if mark is not None and mark.is_digit:
                found.append((mark, direction, anchor))
    return found


def _digit(scene: Scene, rng: random.Random) -> Words | None:
    found = [(f"directly {direction} the {anchor.phrase}", mark.name) for mark, direction, anchor in _beside(scene)]
    at = {mark.cell: mark for mark in scene.marks if mark.is_digit}
    found += [(f"in the {corner} corner", at[cell].name) for corner, cell in CORNERS.items() if cell in at]
    if not found:
        return None
    place, value = found[rng.randrange(len(found))]
    return {"place": place, "value": value}


_WORDS: dict[str, Callable[[Any, random.Random], Words | None]] = {
    "bar_value": _bar_value,
    "bar_extreme": _bar_extreme,
    "bar_compare": _bar_compare,
    "bar_difference": _bar_difference,
    "count": _count,
    "colour": _colour,
    "corner": _corner,
    "digit": _digit,
}


def _ask(kind: str, picture: Picture, rng: random.Random) -> Question | None:
    """A question of this kind, unless there is nothing in the picture to ask for."""
    words = _WORDS[kind](picture, rng)
    if words is None:
        return None
    answer, *texts = WORDINGS[kind]
    return Question(kind, rng.choice(texts).format(**words), answer.format(**words), str(words["value"]))


def pictures(
    *, split: str, seed: int = 0, num_questions: int = 1, kinds: tuple[str, ...] = KINDS
) -> Iterator[tuple[Picture, list[Question]]]:
    """Endless stream of new pictures of `split`, each with 1 to `num_questions` different questions.

    The first kind goes round `kinds`, the others are drawn from those of `kinds` that fit the picture; a kind named
    twice comes twice as often.
    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is `{split}`, must be one of {', '.join(SPLITS)}")
    rng = random.Random(f"vlsi-cache demo {split} {seed}")
    seen: set[bytes] = set()
    index = 0
    while True:
        kind = kinds[index % len(kinds)]
        picture = _draw_chart(rng) if kind in CHART_KINDS else _draw_scene(rng)
        digest = hashlib.blake2b(picture.key.encode(), digest_size=16).digest()
        if digest[0] not in SPLITS[split] or digest in seen:
            continue
        first = _ask(kind, picture, rng)
        if first is None:
            continue
        fitting = [other for other in kinds if (other in CHART_KINDS) == (kind in CHART_KINDS)]
        others = [_ask(rng.choice(fitting), picture, rng) for _ in range(num_questions - 1)]
        seen.add(digest)
        index += 1
        yield picture, list({q.text: q for q in (first, *others) if q is not None}.values())


def rows(*, split: str, num_samples: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`num_samples` chat rows of `split` ("train", "heldout"; "teacher" is what the demo teacher has seen).

    Each row has `id`, `kind`, `messages` (user: image and question; assistant: answer) and `images` (one PNG).
    Deterministic: the first n rows do not depend on `num_samples`. Raises ValueError for an unknown split.
    """
    stream = pictures(split=split, seed=seed)
    for index in range(num_samples):
        picture, (question, *_) = next(stream)
        yield {
            "id": f"{split}-{seed}-{index:06d}",
            "kind": question.kind,
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
                {"role": "assistant", "content": question.answer},
            ],
            "images": [{"bytes": to_png(render(picture))}],
        }
