"""Pictures of the demo: charts and scenes on a 64 x 64 canvas of 4 x 4 cells, drawn without fonts.

Every mark is stamped from a small boolean mask, so the pixels do not depend on a font file or on a Pillow version;
Pillow only writes the PNG. A cell is 16 x 16 pixels, the area of one image token of the tiny Qwen2-VL.
Shapes: H, W pixels; C = 3 colour channels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

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

# Seven segments: top, top left, top right, middle, bottom left, bottom right, bottom.
_SEGMENTS = [
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
]
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
    for on, (top, left, bottom, right) in zip(_SEGMENTS[digit], _SEGMENT_BOXES, strict=True):
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


def _blank() -> np.ndarray:
    """White canvas with a grey frame: the frame lets a border cell know that it is one."""
    canvas_HWC = np.full((SIDE, SIDE, 3), WHITE, dtype=np.uint8)
    for edge in (0, SIDE - 1):
        canvas_HWC[edge, :] = GREY
        canvas_HWC[:, edge] = GREY
    return canvas_HWC


def _draw_mark(canvas_HWC: np.ndarray, mark: Mark) -> None:
    row, column = divmod(mark.cell, GRID)
    mask = digit_mask(int(mark.name)) if mark.is_digit else shape_mask(mark.name, mark.radius)
    top = row * CELL + (CELL + 1 - mask.shape[0]) // 2 + mark.shift_y
    left = column * CELL + (CELL + 1 - mask.shape[1]) // 2 + mark.shift_x
    _stamp(canvas_HWC, mask, top=top, left=left, colour=BLACK if mark.is_digit else COLOURS[mark.colour])


def _draw_bar(canvas_HWC: np.ndarray, bar: Bar) -> None:
    left = bar.column * CELL + bar.left
    canvas_HWC[AXIS_Y - BAR_UNIT * bar.value : AXIS_Y, left : left + bar.width] = COLOURS[bar.colour]
    _stamp(
        canvas_HWC,
        digit_mask(bar.value),
        top=AXIS_Y + 2,
        left=bar.column * CELL + bar.label_x,
        colour=COLOURS[bar.colour],
    )


def render(picture: Picture) -> np.ndarray:
    """Pixels of a picture, uint8 [64, 64, 3]."""
    canvas_HWC = _blank()
    if isinstance(picture, Scene):
        for mark in picture.marks:
            _draw_mark(canvas_HWC, mark)
        return canvas_HWC
    canvas_HWC[AXIS_Y] = GREY
    for bar in picture.bars:
        _draw_bar(canvas_HWC, bar)
    return canvas_HWC


def to_png(pixels_HWC: np.ndarray) -> bytes:
    """PNG file of uint8 [H, W, 3] pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
