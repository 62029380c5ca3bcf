"""Samples that begin alike run as one sequence that branches: each of its branches is the sample alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

import vlsi_cache as vc
from tests.helpers.families import seen_sample, tiny_model
from tests.helpers.probe_models import make_model
from tests.helpers.tiny import save_tokenizer, write_jsonl
from vlsi_cache.config.sections import DataSpec
from vlsi_cache.data import encoder as encoder_module
from vlsi_cache.data.branches import star_of
from vlsi_cache.data.collate import SEEN_UNTIL, collate, seen_until
from vlsi_cache.data.encoder import Encoder, Measured, load_encoder
from vlsi_cache.data.records import MOST_ALIKE, Record, read_records, units
from vlsi_cache.data.sequence import PADDED, Encoded, Extent, Layout, Piece, join, num_tokens, sequences
from vlsi_cache.data.vision import Prompt
from vlsi_cache.models.backbone import Backbone

TREES = Layout(row_width=4096, branches=True)
STARS = Layout(row_width=0, branches=True)


def asked(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def read(folder: Path, *rows: dict[str, Any], **options: Any) -> list[Record]:
    write_jsonl(folder / "rows.jsonl", list(rows))
    return list(read_records(DataSpec(path=str(folder / "rows.jsonl"), **options)))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return Encoder(AutoTokenizer.from_pretrained(folder), None, (), name="m")


def path_of(encoded: Encoded, place: int) -> list[int]:
    """The places that the token at `place` sees, by the rule of the mask."""
    depths_S = np.arange(len(encoded.input_ids)) if encoded.positions is None else encoded.positions
    until_S = seen_until(depths_S)
    seen = [other for other in range(place + 1) if until_S[other] > place]
    assert depths_S[seen].tolist() == list(range(len(seen)))
    return seen


def checked(encoder: Encoder, records: list[Record], layout: Layout) -> list[Encoded]:
    """The sequences of records: every sample is on its path what it is alone, and they are as long as measured."""
    found = encoder.encode_all(records, layout)
    alone = iter([encoder.encode(record) for record in records])
    for one in found:
        for span in one.spans:
            single = next(alone)
            path = path_of(one, int(span.places_R[-1]))
            np.testing.assert_array_equal(one.input_ids[path], single.input_ids)
            np.testing.assert_array_equal(span.response_ids, single.response_ids)
            assert span.before_R.tolist() == path[single.num_prompt - 1 : -1]
            assert span.places_R.tolist() == path[single.num_prompt :]
    extents = [one.extent for one in encoder.measure_all(records) if isinstance(one, Measured)]
    planned = sequences(extents, range(len(records)), layout)
    lengths = [star_of(one).num_tokens if layout == STARS else len(one.input_ids) for one in found]
    assert [num_tokens(extents, one, layout) for one in planned] == lengths
    return found


LONG = "is it true that the cat sat on the mat all day long and did not move at all?"


def test_responses_to_one_prompt_branch_from_it(tmp_path: Path, encoder: Encoder) -> None:
    answers = ("yes", "yes and no", "no", "yes")
    records = read(tmp_path, *(asked(LONG, answer, id=f"q#{n}") for n, answer in enumerate(answers)))
    (one,) = checked(encoder, records, TREES)
    alone = [encoder.encode(record) for record in records]
    assert len(one.input_ids) == alone[0].num_prompt + sum(len(single.response_ids) for single in alone)
    assert [len(found.spans) for found in checked(encoder, records, PADDED)] == [1, 1, 1, 1]
    assert [len(found.spans) for found in checked(encoder, records, Layout(4096, branches=False))] == [1, 1, 1, 1]
    # A sequence that would be wider than a row ends before.
    width = alone[0].num_prompt + sum(len(single.response_ids) for single in alone[:2])
    assert [len(found.spans) for found in checked(encoder, records, Layout(width, branches=True))] == [2, 2]
    assert [len(found.spans) for found in checked(encoder, records[::2] + records[1::2], TREES)] == [4]


def test_turns_go_on_and_branch(tmp_path: Path, encoder: Encoder) -> None:
    """Two answers to the second turn: the first turn and its answer stand once."""
    history = asked(LONG, "yes")["messages"]
    rows = [
        {"id": f"r#{n}", "messages": [*history, *asked("why so, and what of the other cats?", why)["messages"]]}
        for n, why in enumerate(("it slept", "nobody knows"))
    ]
    records = read(tmp_path, *rows)
    assert [record.id for record in records] == ["r#0/1", "r#0/2", "r#1/1", "r#1/2"]
    # The first turns are one prompt too, but lie apart: what follows the second answer begins with the first turn.
    assert [len(one.spans) for one in checked(encoder, records, PADDED)] == [2, 2]
    found = checked(encoder, [records[0], records[1], records[3]], TREES)
    assert [len(one.spans) for one in found] == [3]


def test_short_prompts_and_strangers_stay_apart(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = read(tmp_path, asked("so?", "yes"), asked("so?", "no"))
    assert [len(one.spans) for one in checked(encoder, short, TREES)] == [2]
    monkeypatch.setattr(encoder_module, "MIN_SHARED", encoder.encode(short[0]).num_prompt + 1)
    assert [len(one.spans) for one in checked(encoder, short, TREES)] == [1, 1]
    monkeypatch.undo()
    others = read(tmp_path, asked(f"{LONG} a", "yes"), asked(f"{LONG} b", "no"))  # of other rows, by text alone
    assert [len(one.spans) for one in checked(encoder, others, TREES)] == [1, 1]


@pytest.fixture(scope="module")
def seeing() -> Encoder:
    return load_encoder(Path(vc.__file__).parent / "demo" / "teacher")


def test_questions_on_one_picture_branch_from_it(tmp_path: Path, seeing: Encoder) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (252, 252), colour).save(tmp_path / f"{name}.png")
    rows = [asked(f"<image>{q}?", "this", images=["a.png"]) for q in ("which is it", "what colour is it", "where")]
    rows += [asked("<image>which is it?", "that", images=["b.png"])]
    records = read(tmp_path, *rows)
    first, second = checked(seeing, records, TREES)
    assert (len(first.spans), len(second.spans)) == (3, 1)
    assert len(first.media["image_grid_thw"]) == 1
    assert first.token_types is not None
    np.testing.assert_array_equal(np.flatnonzero(first.token_types), np.flatnonzero(second.token_types))
    # A picture behind what is shared stays with its own sample: pictures of a sequence come in one order.
    two = [asked(f"{LONG} <image> and <image> {q}", "this", images=["a.png", "b.png"]) for q in "xy"]
    late = [asked(f"<image>{LONG} {q} <image>", "this", images=["a.png", "b.png"]) for q in "xy"]
    assert [len(one.spans) for one in checked(seeing, read(tmp_path, *two), TREES)] == [2]
    assert [len(one.spans) for one in checked(seeing, read(tmp_path, *late), TREES)] == [1, 1]


def test_units_are_neighbours_that_begin_alike(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    turns = asked("p?", "1")["messages"] + asked("q?", "2")["messages"]
    rows = [
        *(asked("x?", str(n), id=f"x{n}") for n in range(3)),
        asked("y?", "1", id="y"),
        asked("x?", "again", id="x9"),
        {"id": "t", "messages": turns},
        *(asked(f"<image>{n}?", "1", id=f"a{n}", images=["a.png"]) for n in range(2)),
        asked("<image>0?", "1", id="b0", images=["b.png"]),
        asked("0?", "1", id="none"),
    ]
    records = read(tmp_path, *rows)
    found = units(records, "prompt")
    names = [[records[place].id for place in unit] for unit in found]
    assert names == [["x0", "x1", "x2"], ["y"], ["x9"], ["t/1", "t/2"], ["a0", "a1"], ["b0"], ["none"]]
    alone = [[records[place].id for place in unit] for unit in units(records, "row")]
    assert alone == [[name] for group in names[:3] for name in group] + [["t/1", "t/2"]] + [
        [name] for group in names[4:] for name in group
    ]
    many = read(tmp_path, *(asked("x?", str(n)) for n in range(2 * MOST_ALIKE + 3)))
    assert [len(unit) for unit in units(many, "prompt")] == [MOST_ALIKE, MOST_ALIKE, 3]
    long = read(tmp_path, {"messages": [m for n in range(20) for m in asked(str(n), "1")["messages"]]})
    assert [len(unit) for unit in units(long, "prompt")] == [20]  # turns of a row are never parted


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=8))
def test_any_tree_is_seen_along_its_paths(drawn: list[tuple[int, int]]) -> None:
    """Each sample takes some of the first tokens of the one before it; the oracle keeps the paths as lists."""
    pieces, paths, lengths, path, total = [], [], [], [], 0
    for wanted, more in drawn:
        shared = min(wanted, len(path) - 1) if path else 0
        shared = max(shared, 0)
        ids = np.arange(total, total + more + 1)
        pieces.append(Piece(shared, Prompt(ids[:-1], None, {}), ids[-1:]))
        path = [*path[:shared], *ids.tolist()]
        total += more + 1
        paths.append(path)
        lengths.append(Extent(len(path), shared))
    one = join(pieces)
    assert one.input_ids.tolist() == list(range(total))
    for span, path in zip(one.spans, paths, strict=True):
        assert path_of(one, span.first) == path
        assert span.before_R.tolist() == path[-2:-1]
    (whole,) = (
        sequences(lengths, range(len(lengths)), Layout(10**6, branches=True))
        if all(extent.num_shared for extent in lengths[1:])
        else [[]]
    )
    assert not whole or num_tokens(lengths, whole) == total
    # As a trunk and branches that do not branch again: every path is there, once.
    star = star_of(one)
    ways = [[*range(star.num_trunk), *branch] for branch in star.branches] or [[*range(star.num_trunk)]]
    assert len({way[-1] for way in ways}) == len(ways)
    for path in paths:
        assert any(way[: len(path)] == path for way in ways)
    assert not whole or num_tokens(lengths, whole, STARS) == star.num_tokens


def test_responses_to_one_prompt_go_on_from_one_trunk(tmp_path: Path, encoder: Encoder) -> None:
    answers = [asked(LONG, answer) for answer in ("yes", "no", "the cat sat", "a")]
    turns = [*asked(LONG, "no")["messages"], *asked("why?", "it is red")["messages"]]
    for rows in (answers, [asked(LONG, "yes"), {"messages": turns[:2]}, {"messages": turns}]):
        (one,) = checked(encoder, read(tmp_path, *rows), STARS)
        assert len(one.spans) == 4
    many = checked(encoder, read(tmp_path, *(asked(LONG, str(n)) for n in range(20))), STARS)
    assert [len(one.spans) for one in many] == [16, 4]


@pytest.mark.parametrize(
    ("shared", "wanted"),
    [
        ([0, 500, 502, 500, 503], [5]),  # questions on one picture begin alike, by more or less
        ([0, 20, 30, 20], [1, 1, 1, 1]),  # too little
        ([0, 100, 500, 500], [1, 3]),  # what comes next shares more
        ([0, 500, 100, 500], [2, 2]),
        ([0, 500, 500, 500, 300, 300], [4, 2]),  # a shorter trunk would cost the first four more than it saves
        ([0, 500, 400, 150], [3, 1]),
        ([0, 600, 500, 600], [4]),  # turns that go on
    ],
)
def test_a_trunk_is_shared_where_that_saves_tokens(shared: list[int], wanted: list[int]) -> None:
    lengths = [600, 700, 600, 700] if 600 in shared else [600] * len(shared)
    extents = [Extent(*one) for one in zip(lengths, shared, strict=True)]
    found = sequences(extents, range(len(extents)), STARS)
    assert [len(one) for one in found] == wanted
    assert sum(num_tokens(extents, one, STARS) for one in found) <= sum(
        num_tokens(extents, one) for one in sequences(extents, range(len(extents)), PADDED)
    )


WINDOWED = {"mistral": 6, "gemma3_text": 6, "gpt_oss": 6}


def tree(prompts: Any, responses: list[int], seed: int = 0) -> tuple[Encoded, list[Encoded]]:
    """A prompt of 12 tokens, then `prompts[i]` more of its own and a response, as one sequence and each alone."""
    rng = np.random.default_rng(seed)
    trunk = rng.integers(3, 200, 12)
    pieces, alone = [], []
    for number, (own, length) in enumerate(zip(prompts, responses, strict=True)):
        ids_P, ids_R = rng.integers(3, 200, own), rng.integers(3, 200, length)
        whole = np.concatenate([trunk, ids_P])
        pieces.append(Piece(12 if number else 0, Prompt(ids_P if number else whole, None, {}), ids_R))
        alone.append(Encoded(np.concatenate([whole, ids_R]), len(whole), ids_R))
    return join(pieces), alone


def states(model: Any, samples: list[Encoded], width: int = 0) -> dict[int, torch.Tensor]:
    batch = collate(samples, pad_id=0, row_width=width)
    return Backbone(model).capture(batch.inputs, [1], batch.rows_T, batch.positions_T)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "phi3", *WINDOWED])
def test_states_and_gradients_of_branches_are_those_of_each_sample_alone(family: str) -> None:
    sizes = [{}] if family not in WINDOWED else [{}, {"sliding_window": WINDOWED[family]}]
    # In float32 a gradient that nearly cancels is off by more, on some CPUs; torch has no grouped product in float64.
    dtype = torch.float32 if family == "gpt_oss" else torch.float64
    for changes in sizes:
        gradients, found = [], []
        one, alone = tree((0, 3, 0, 5), [4, 2, 7, 1])
        other = tree((2, 2), [3, 3], seed=1)
        for samples, width in (([one, other[0]], 4096), ([*alone, *other[1]], 0)):
            model = make_model(family, **changes).to(dtype).requires_grad_(True).train()
            found.append(states(model, samples, width))
            sum(state.square().sum() for state in found[-1].values()).backward()
            gradients.append(model.get_input_embeddings().weight.grad)
        for layer, state_TD in found[0].items():
            torch.testing.assert_close(state_TD, found[1][layer], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=2e-5)


def test_branches_behind_pictures_have_the_positions_of_their_own_paths() -> None:
    """Qwen2-VL counts on from its pictures, in each branch as in the sample alone."""
    model = tiny_model("qwen2_vl")
    shown = seen_sample("qwen2_vl", 20, [(4, 8)], 0)
    rng, nothing = np.random.default_rng(5), np.zeros(0, np.int64)
    types_S = shown.token_types
    assert types_S is not None
    pieces = [Piece(0, Prompt(shown.input_ids[:-3], types_S[:-3], shown.media), shown.response_ids)]
    alone = [shown]
    for own in (0, 4):
        ids_P, ids_R = rng.integers(3, 50, own), rng.integers(3, 50, 3)
        pieces.append(Piece(17, Prompt(ids_P, np.zeros_like(ids_P) if own else nothing, {}), ids_R))
        ids_S = np.concatenate([shown.input_ids[:17], ids_P, ids_R])
        alone.append(Encoded(ids_S, 17 + own, ids_R, np.concatenate([types_S[:17], ids_P * 0, ids_R * 0]), shown.media))
    before = seen_sample("qwen2_vl", 9, [(4, 4)], 3)
    found = states(model, [before, join(pieces)], 4096)
    wanted = [states(model, [one]) for one in [before, *alone]]
    assert SEEN_UNTIL in collate([join(pieces)], pad_id=0, row_width=4096).inputs
    for layer, state_TD in found.items():
        torch.testing.assert_close(state_TD, torch.cat([one[layer] for one in wanted]), rtol=1e-4, atol=2e-5)
