"""The demo's instruction set: labels are checked against the decoded pixels, never against the generator's scene."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlsi_cache.demo.data import KINDS, pictures, render, rows

Row = dict[str, Any]
NUM_ROWS = 1800

# --- an independent reader of the pictures: knows colours and geometry, nothing of the generator ----------------------

PALETTE = {
    "red": (215, 25, 35),
    "green": (30, 150, 60),
    "blue": (40, 80, 225),
    "yellow": (240, 200, 0),
    "purple": (150, 50, 190),
    "orange": (250, 125, 20),
    "black": (20, 20, 20),
}
RGB = np.array([1 << 16, 1 << 8, 1])
NAME_OF = {int(np.array(rgb) @ RGB): name for name, rgb in PALETTE.items()}
# Lit segments of a seven-segment display, a..g clockwise from the top, g the middle one.
SEVEN = {
    "abcdef": "0", "bc": "1", "abdeg": "2", "abcdg": "3", "bcfg": "4",
    "acdfg": "5", "acdefg": "6", "abc": "7", "abcdefg": "8", "abcdfg": "9",
}  # fmt: skip


def pixels_of(row: Row) -> np.ndarray:
    """Decoded uint8 [64, 64, 3]."""
    (image,) = row["images"]
    return np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))


def question_of(row: Row) -> str:
    return row["messages"][0]["content"][1]["text"]


def answer_of(row: Row) -> str:
    return row["messages"][1]["content"]


def ink_of(cell_HW: np.ndarray) -> tuple[str, np.ndarray]:
    """(name of the only colour in a cell or "", where it is as bool [H, W]); a colour is one number."""
    inked = NAME_OF.keys() & set(cell_HW.ravel().tolist())
    assert len(inked) <= 1, f"two colours in one cell: {[NAME_OF[colour] for colour in inked]}"
    if not inked:
        return "", np.zeros(cell_HW.shape, dtype=bool)
    (colour,) = inked
    return NAME_OF[colour], cell_HW == colour


def trim(mask: np.ndarray) -> np.ndarray:
    """The part of a mask inside its bounding box."""
    ys, xs = np.nonzero(mask)
    return mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def read_digit(mask: np.ndarray) -> str:
    """Digit of a seven-segment glyph from which of its seven places are lit."""
    glyph = trim(mask)
    if glyph.shape[1] <= 2:
        return "1"
    height, width = glyph.shape
    middle = width // 2
    probes = {
        "a": (0, middle), "b": (height // 4, -1), "c": (3 * height // 4, -1), "d": (-1, middle),
        "e": (3 * height // 4, 0), "f": (height // 4, 0), "g": (height // 2, middle),
    }  # fmt: skip
    return SEVEN["".join(segment for segment, place in probes.items() if glyph[place])]


def read_shape(mask: np.ndarray) -> str:
    """Shape of a blob from its geometry: hole in the middle, how full its bounding box is, where its mass lies."""
    blob = trim(mask)
    height, width = blob.shape
    fill = blob.mean()
    if not blob[height // 2, width // 2]:
        return "ring"
    if fill > 0.98:
        return "square"
    top, bottom = blob[: height // 2].sum(), blob[-(height // 2) :].sum()
    if bottom > 1.5 * top:
        return "triangle"
    return "cross" if fill < 0.6 else "circle"


def read_bars(pixels_HWC: np.ndarray) -> dict[str, int]:
    """Colour -> value of every bar: its height over the axis, 5 pixels a unit; must agree with the number below it."""
    colours_HW = pixels_HWC @ RGB
    lines_H = (colours_HW == colours_HW[:, :1]).all(1) & (pixels_HWC[:, 5].max(1) < 255)
    axis = next(y for y in range(1, 63) if lines_H[y])
    values: dict[str, int] = {}
    for left in range(0, 64, 16):
        colour, mask = ink_of(colours_HW[:axis, left : left + 16])
        if not colour:
            continue
        height, remainder = divmod(int(mask.any(axis=1).sum()), 5)
        label_colour, label = ink_of(colours_HW[axis + 1 :, left : left + 16])
        assert remainder == 0
        assert colour not in values
        assert (label_colour, read_digit(label)) == (colour, str(height))
        values[colour] = height
    return values


def read_cells(pixels_HWC: np.ndarray) -> dict[tuple[int, int], str]:
    """(row, column) -> "red circle" or "7" for every drawn cell."""
    colours_HW, cells = pixels_HWC @ RGB, {}
    for y in range(4):
        for x in range(4):
            colour, mask = ink_of(colours_HW[16 * y : 16 * y + 16, 16 * x : 16 * x + 16])
            if colour:
                cells[y, x] = read_digit(mask) if colour == "black" else f"{colour} {read_shape(mask)}"
    return cells


# --- an independent answerer ----------------------------------------------------------------------------------------

CORNERS = {"top left": (0, 0), "top right": (0, 3), "bottom left": (3, 0), "bottom right": (3, 3)}
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
COLOUR = "red|green|blue|yellow|purple|orange"
SHAPE = "circle|square|triangle|cross|ring"


def one(items: list[str]) -> str:
    """The only item; more or none means that the question is ambiguous."""
    assert len(items) == 1, items
    return items[0]


def article(phrase: str) -> str:
    return ("an " if phrase.startswith("orange") else "a ") + phrase


def place_of(question: str, cells: dict[tuple[int, int], str]) -> tuple[str, tuple[int, int]]:
    """(words of the place, its cell); the anchor of a relation must occur exactly once in the picture."""
    corner = re.search(r"(?:top|bottom) (?:left|right)", question)
    if corner:
        return corner[0], CORNERS[corner[0]]
    match = re.search(rf"directly ({'|'.join(STEPS)}) the ((?:{COLOUR}) (?:{SHAPE}))", question)
    assert match, question
    y, x = next(cell for cell, name in cells.items() if name == match[2])
    one([name for name in cells.values() if name == match[2]])
    return match[0], (y + STEPS[match[1]][0], x + STEPS[match[1]][1])


def expected_chart_answer(kind: str, question: str, bars: dict[str, int]) -> str:
    named = re.findall(COLOUR, question)
    assert len(set(bars.values())) == len(bars), "a tie"
    if kind == "bar_value":
        return f"The {one(named)} bar shows {bars[named[0]]}."
    if kind == "bar_extreme":
        word = one(re.findall("tallest|shortest", question))
        return f"The {word} bar is {sorted(bars, key=bars.__getitem__)[-1 if word == 'tallest' else 0]}."
    first, second = named
    if kind == "bar_compare":
        high, low = (first, second) if bars[first] > bars[second] else (second, first)
        return f"The {high} bar is taller than the {low} bar."
    gap = abs(bars[first] - bars[second])
    return f"The {first} bar shows {bars[first]} and the {second} bar shows {bars[second]}, so the difference is {gap}."


def expected_scene_answer(kind: str, question: str, cells: dict[tuple[int, int], str]) -> str:
    shapes = [name for name in cells.values() if not name.isdigit()]
    if kind == "count":
        word = one(re.findall(rf"{COLOUR}|(?:{SHAPE})(?=e?s\b)", question))
        count = sum(word in name.split() for name in shapes)
        assert count > 1, "the question speaks of several"
        noun = f"{word} shape" if word in PALETTE else word
        return f"There are {count} {noun}{'es' if word == 'cross' else 's'}."
    if kind == "colour":
        word = one(re.findall(SHAPE, question))
        return f"The {word} is {one([name for name in shapes if name.endswith(word)]).split()[0]}."
    where, cell = place_of(question, cells)
    found = cells[cell]
    if kind == "digit":
        assert found.isdigit()
        return f"The digit {'in the ' + where + ' corner' if where in CORNERS else where} is {found}."
    assert kind == "corner"
    assert not found.isdigit()
    return f"The {where} corner shows {article(found)}."


def value_of(row: Row) -> str:
    """The part of an answer that varies."""
    answer = answer_of(row)
    if row["kind"] == "count" or "digit" in answer or row["kind"] in ("bar_value", "bar_difference"):
        return re.findall(r"\d", answer)[-1]
    if row["kind"] == "corner":
        return answer.removesuffix(".").split(" shows ")[1]
    return re.findall(COLOUR, answer)[0]


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_split() -> dict[str, list[Row]]:
    return {split: list(rows(split=split, num_samples=NUM_ROWS)) for split in ("train", "heldout", "teacher")}


@pytest.fixture(scope="module")
def all_rows(by_split: dict[str, list[Row]]) -> list[Row]:
    return [row for split_rows in by_split.values() for row in split_rows]


def test_every_label_is_what_the_pixels_say(by_split: dict[str, list[Row]]) -> None:
    """Of the first 700 rows of each split; kinds of questions take turns."""
    first = [row for split_rows in by_split.values() for row in split_rows[:700]]
    assert {row["kind"] for row in first} == {row["kind"] for split_rows in by_split.values() for row in split_rows}
    for row in first:
        pixels = pixels_of(row)
        if row["kind"].startswith("bar_"):
            expected = expected_chart_answer(row["kind"], question_of(row), read_bars(pixels))
        else:
            expected = expected_scene_answer(row["kind"], question_of(row), read_cells(pixels))
        assert answer_of(row) == expected, row["id"]


def test_the_pixel_reader_notices_a_wrong_label() -> None:
    row = next(row for row in rows(split="train", num_samples=9) if row["kind"] == "bar_value")
    pixels = pixels_of(row).copy()
    pixels[(pixels != 255).any(axis=-1) & (np.arange(64)[:, None] < 40)] = 255
    with pytest.raises(AssertionError):
        read_bars(pixels)


def test_no_picture_comes_twice_in_or_across_splits(all_rows: list[Row]) -> None:
    digests = {hashlib.sha256(pixels_of(row).tobytes()).digest() for row in all_rows}
    assert len(digests) == len(all_rows)


def test_splits_stay_apart_for_other_seeds() -> None:
    streams = [("train", 0), ("heldout", 1), ("teacher", 2), ("heldout", 3)]
    contents = {stream: {picture.key for picture, _ in take(stream[0], seed=stream[1], num=2000)} for stream in streams}
    for first in streams:
        for second in streams:
            if first[0] != second[0]:
                assert not contents[first] & contents[second]


def take(split: str, *, seed: int, num: int) -> list[Any]:
    stream = pictures(split=split, seed=seed)
    return [next(stream) for _ in range(num)]


def test_kinds_are_even_and_no_answer_dominates(all_rows: list[Row]) -> None:
    values: dict[str, Counter[str]] = defaultdict(Counter)
    for row in all_rows:
        values[row["kind"]][value_of(row)] += 1
    assert set(values) == set(KINDS)
    for kind, counts in values.items():
        assert counts.total() == len(all_rows) / len(KINDS)
        assert counts.most_common(1)[0][1] < 0.4 * counts.total(), (kind, counts.most_common(3))


def test_no_yes_or_no_answers(all_rows: list[Row]) -> None:
    assert not [row["id"] for row in all_rows if re.match(r"(?i)(yes|no)\b", answer_of(row))]


def test_the_first_named_bar_is_not_favoured(all_rows: list[Row]) -> None:
    compared = [row for row in all_rows if row["kind"] == "bar_compare"]
    first = sum(value_of(row) == re.findall(COLOUR, question_of(row))[0] for row in compared)
    assert 0.42 < first / len(compared) < 0.58


def test_row_shape(by_split: dict[str, list[Row]]) -> None:
    ids = [row["id"] for split_rows in by_split.values() for row in split_rows]
    assert len(set(ids)) == len(ids)
    row = by_split["heldout"][0]
    assert list(row) == ["id", "kind", "messages", "images"]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"][0] == {"type": "image"}
    assert pixels_of(row).shape == (64, 64, 3)
    assert answer_of(row).endswith(".")


def test_a_longer_run_begins_with_the_shorter_one() -> None:
    assert list(rows(split="train", num_samples=40))[:15] == list(rows(split="train", num_samples=15))


def test_seeds_differ() -> None:
    first, second = (next(rows(split="train", num_samples=1, seed=seed)) for seed in (0, 1))
    assert first["images"] != second["images"]


def test_the_same_rows_in_every_process() -> None:
    program = (
        "import hashlib, json, io, numpy, PIL.Image\n"
        "from vlsi_cache.demo.data import rows\n"
        "digest = hashlib.sha256()\n"
        "for row in rows(split='heldout', num_samples=60, seed=5):\n"
        "    pixels = numpy.asarray(PIL.Image.open(io.BytesIO(row['images'][0]['bytes'])))\n"
        "    digest.update(json.dumps([row['id'], row['messages']]).encode() + pixels.tobytes())\n"
        "import sys\n"
        "print(digest.hexdigest(), 'torch' in sys.modules)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().split()[1] == "False"


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="`test`"):
        next(rows(split="test", num_samples=1))


# --- the tiny models ------------------------------------------------------------------------------------------------


def test_training_program_writes_a_folder_that_generates(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import check_teacher
    import train_teacher
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    teacher_dir = tmp_path / "teacher"
    options = "--steps 2 --vision-steps 2 --batch-size 3 --eval-samples 9"
    train_teacher.main(["-o", str(teacher_dir), *options.split()])
    shares = check_teacher.exact_match(teacher_dir, num_samples=9)
    assert set(shares) == {*KINDS, "all"}

    teacher = Qwen2VLForConditionalGeneration.from_pretrained(teacher_dir)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    assert len(tokenizer) < teacher.lm_head.weight.shape[0]
    text = "any text: h\u00e9llo \u65e5\u672c\n 12 <|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_fast_forward_is_the_library_forward() -> None:
    torch = pytest.importorskip("torch")
    from tiny_qwen2vl import build_image_processor, build_tokenizer
    from train_teacher import IGNORE_INDEX, Encoder, init_model, response_logits

    tokenizer = build_tokenizer()
    model = init_model(tokenizer, 0).eval()
    stream = pictures(split="train", num_questions=3)
    examples = [next(stream) for _ in range(9)]
    patches, ids, labels = Encoder(tokenizer).collate(examples)
    images = build_image_processor()(
        images=[Image.fromarray(render(picture)) for picture, _ in examples], return_tensors="pt"
    )
    assert torch.equal(images["pixel_values"].view_as(patches), patches)
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=images["pixel_values"],
            image_grid_thw=images["image_grid_thw"],
        ).logits[:, :-1]
        ours, targets = response_logits(model, patches, ids, labels)
    labelled = labels[:, 1:] != IGNORE_INDEX
    assert torch.equal(targets, labels[:, 1:][labelled])
    torch.testing.assert_close(ours, logits[labelled], rtol=1e-4, atol=1e-4)
