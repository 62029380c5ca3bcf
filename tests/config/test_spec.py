"""Specs: every mistake at once, with a guess; paths stay below the spec's folder; overrides are recorded."""

import json
import os
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import vlsi_cache as vc
from vlsi_cache.config.sections import CacheSpec
from vlsi_cache.config.spec import apply_overrides, change, spec_from_dict, unused_by_recipe
from vlsi_cache.config.training import DistillSpec, InteractSpec, Schedule
from vlsi_cache.errors import SpecError
from vlsi_cache.sparse.divergences import Divergence
from vlsi_cache.sparse.matching import Matching

MINIMAL = {
    "name": "minimal",
    "teacher": {"model": "org/teacher", "num_layers": 4},
    "data": {"path": "rows.jsonl"},
}


def write(folder: Path, **changes: object) -> Path:
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return file


def test_defaults_are_filled_in_and_survive_a_round_trip(tmp_path: Path) -> None:
    spec = vc.load_spec(write(tmp_path))
    assert (spec.rows.top_k, spec.rows.tail_samples, spec.rows.taus) == (64, 4, (1.0,))
    assert (spec.distill.lora.rank, spec.distill.interact.temperature) == (64, "normalized")
    assert spec.verbalizer.structure == "verb-ffn"
    assert spec_from_dict(spec.model_dump(mode="json"), where="here") == spec
    assert spec.data.path == str(tmp_path / "rows.jsonl")


def test_all_mistakes_are_listed_at_once_with_guesses(tmp_path: Path) -> None:
    file = write(tmp_path, rows={"topk": 3, "tail_samples": -1}, techer={}, distill={"lora": {"rnk": 1}})
    with pytest.raises(SpecError) as caught:
        vc.load_spec(file)
    message = str(caught.value)
    assert "4 mistake(s)" in message
    for part in (
        "`rows.topk`: no such key; did you mean `top_k`?",
        "`rows.tail_samples`",
        "`techer`: no such key; did you mean `teacher`?",
        "`distill.lora.rnk`: no such key; did you mean `rank`?",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"model": "a/b"}}, "name the target layers"),
        ({"teacher": {"model": "a/b", "layers": [0, 3]}}, "greater than or equal to 1"),
        ({"data": {}}, "exactly one source"),
        ({"data": {"path": "x.jsonl", "generator": "demo"}}, "exactly one source"),
        ({"data": {"path": "x.jsonl", "options": {"a": 1}}}, "belong to a `generator`"),
        ({"data": {"path": "../x.jsonl"}}, "leaves the spec's folder"),
        ({"distill": {"batch_size": 7}}, "7 is not a multiple of `micro_batch_size` 4"),
        ({"rows": {"taus": [2.0]}}, "starts with 1.0"),
        ({"rows": {"taus": [1.0, 1.0]}}, "no value twice"),
        ({"train_verbalizers": {"schedule": {"steps": 1, "epochs": 1}}}, "one of `steps` and `epochs`, not both"),
        ({"store": {"profile": "tiny"}}, "default"),
        ({"rows": {"seed": -1}}, "`rows.seed`: Input should be greater than or equal to 0, got `-1`"),
        ({"train_verbalizers": {"seed": -1}}, "`train_verbalizers.seed`: Input should be greater"),
        ({"distill": {"seed": -1}}, "`distill.seed`: Input should be greater"),
        ({"teacher": {"model": "a/b", "layers": [2, 4], "num_layers": 3}}, "2 layers, `num_layers` is 3; drop one"),
        ({"train_verbalizers": {"checkpoint_steps": 0}}, "`train_verbalizers.checkpoint_steps`"),
    ],
)
def test_one_mistake_one_message(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=r"1 mistake\(s\)") as caught:
        vc.load_spec(write(tmp_path, **changes))
    assert message in str(caught.value)


def test_unknown_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="did you mean `demo`"):
        vc.load_spec("demoo")
    for text, message in (("a: [", "not YAML"), ("- 1", "holds list"), ("\x00", "not YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SpecError, match=message):
            vc.load_spec(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(SpecError, match="not YAML"):
        vc.load_spec(tmp_path / "bad.yaml")


def test_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = vc.load_spec(write(tmp_path), overrides=["rows.top_k=8", "distill.interact.schedule.learning_rate=1e-3"])
    assert spec.rows.top_k == 8
    assert spec.distill.interact.schedule.learning_rate == 1e-3
    assert vc.load_spec(write(tmp_path), overrides=["distill.sft.schedule.steps=9"]).distill.sft.schedule.epochs is None
    for override, message in (
        ("rows.top_k", "write key=value"),
        ("name.x=1", "not a section"),
        ("rows.x=1", "no such"),
        ("distill.seed=[a", r"`--set distill.seed=\[a`: it is not YAML"),
        ("name=2026-13-45", "`--set name=2026-13-45`: line 1: `2026-13-45` is no value: month must be in 1..12"),
    ):
        with pytest.raises(SpecError, match=message):
            vc.load_spec(write(tmp_path), overrides=[override])
    # A path typed on the command line is relative to where it is typed.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rows.jsonl").write_text("")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert vc.load_spec(write(tmp_path), overrides=["data.path=rows.jsonl"]).data.path == str(
        Path("rows.jsonl").resolve()
    )


R = "teacher: {model: org/teacher, layers: [2]}\ndata: {path: rows.jsonl}\n"
BILLION = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BILLION, "line 1: `d.7.8.8.9`: its aliases stand for more than 10000 values"),
        ("a: &a {x: 1}\nb: {<<: [*a, *a]}\nname: x\nname: y", "`name` is named twice, in line 3 and line 4"),
        ("rows: {top_k: 1, top_k: 2}", "`rows.top_k` is named twice, in line 1 and line 1"),
        ("name: x\nzz: &t {x: *t}", "line 2: `zz.x`: it refers to itself"),
        ("name: " + "[" * 3000 + "]" * 3000, "nested more than 32 deep"),
        ("name: [" + "1, " * 20000 + "]", "more than 10000 values"),
        ("name: 2026-13-45", "line 1: `name`: `2026-13-45` is no value: month must be in 1..12"),
        ("name: 2026-11-05", "`2026-11-05` is read as a timestamp; put it in quotes if it is a text"),
        ("rows: {top_k: " + "9" * 6000 + "}", "line 1: `rows.top_k`: `9999"),
        ("rows: {top_k: 0x" + "f" * 9000 + "}", "`rows.top_k`: a number of 36000 bits is beyond any sense"),
        ("store: {part_mib: .inf}", "`store.part_mib`: `inf` is not a finite number"),
        ("data: {options: {x: [.nan]}}", "`data.options.x.0`: `nan` is not a finite number"),
        ("1: x", "the key `1` is not a text; put it in quotes"),
        ("on: x", "the key `on` is not a text"),
        ("? [a]\n: x", "the key `a list or section` is not a text"),
        ("name: !!binary aGk=", "`aGk=` is read as a binary"),
        ("name: !!set {a}", "`set` is no kind of value"),
        ("name: !!python/object:os.system x", "could not determine a constructor"),
        ("name: x\n---\nname: y", "it is not YAML: expected a single document"),
    ],
    ids=lambda text: text[:24],
)
def test_yaml_that_no_spec_needs_is_one_line_that_names_the_spec(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text + "\n")
    with pytest.raises(SpecError, match=re.escape(message)) as caught:
        vc.load_spec(tmp_path / "bad.yaml")
    assert str(caught.value).startswith(f"spec `{tmp_path / 'bad.yaml'}`")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400
    with pytest.raises(SpecError, match=r"1 mistake\(s\)"):  # the same reader reads what is set
        vc.load_spec("demo", overrides=["data.options=" + text])


def test_files_that_are_no_spec(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge.yaml").write_bytes(b"#" * 300_000)
    (tmp_path / "binary.yaml").write_bytes(b"\x7fELF\xff\xfe")
    for name, message in (
        ("", "is a folder"),
        ("pipe", "is a pipe or device"),
        ("huge.yaml", "has 300,000 bytes"),
        ("binary.yaml", "it is no text"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("binary.yaml/more", "no spec `"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(SpecError, match=re.escape(message)) as caught:
            vc.load_spec(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        {"rows": {"top_k": 8}, "distill": {"layers": [1, 2], "interact": {"schedule": {"learning_rate": 1e-3}}}},
        {"rows.top_k": 8, "distill.layers": (1, 2), "distill.interact": {"schedule.learning_rate": 1e-3}},
    ],
)
def test_overrides_as_a_dict(tmp_path: Path, overrides: dict[str, object]) -> None:
    texts = ["rows.top_k=8", "distill.layers=[1,2]", "distill.interact.schedule.learning_rate=1e-3"]
    assert vc.load_spec(write(tmp_path), overrides=overrides) == vc.load_spec(write(tmp_path), overrides=texts)
    values = {"name": "true", "description": "a: b, 'c' = \u00e9", "distill.sft": {"schedule": {"steps": 3}}}
    spec = vc.load_spec(write(tmp_path), overrides=values)
    assert (spec.name, spec.description, spec.distill.sft.schedule.epochs) == ("true", values["description"], None)
    with pytest.raises(SpecError, match="did you mean `top_k`"):
        vc.load_spec(write(tmp_path), overrides={"rows": {"topk": 8}})


def test_an_alias_is_a_copy_and_the_last_override_counts(tmp_path: Path) -> None:
    schedules = "train_verbalizers: {schedule: &s {steps: 5}}\ndistill: {verbalize: *s}\n"
    (tmp_path / "spec.yaml").write_text("name: x\n" + R + schedules)
    spec = vc.load_spec(tmp_path / "spec.yaml", overrides=["distill.verbalize.steps=7", "evaluate.data.path=/x.jsonl"])
    assert (spec.distill.verbalize.steps, spec.train_verbalizers.schedule.steps) == (7, 5)
    again = apply_overrides(vc.load_spec(tmp_path / "spec.yaml"), ["evaluate.data.path=/x.jsonl"])
    assert again.evaluate == spec.evaluate is not None  # from a spec in which it is null
    assert vc.load_spec("demo", overrides=["rows.top_k=8", "rows.top_k=16"]).rows.top_k == 16  # the last word counts


def _numbers(section: Any, prefix: str = "") -> list[str]:
    """The dotted keys of all numbers of a section and those in it."""
    found = []
    for name, field in section.model_fields.items():
        text = str(field.annotation)
        inner = next((x for x in (field.annotation, *get_args(field.annotation)) if hasattr(x, "model_fields")), None)
        if inner is not None:
            found += _numbers(inner, f"{prefix}{name}.")
        elif ("int" in text or "float" in text) and "Any" not in text:
            found.append(f"{prefix}{name}")
    return found


def test_every_number_of_a_spec_has_bounds_and_is_no_yes_or_no() -> None:
    stored = vc.load_spec("demo").model_dump(mode="json")
    keys = _numbers(CacheSpec)
    assert len(keys) > 50
    for key in keys:
        for wrong in (10**15, -1, float("inf"), float("nan"), True):
            values = json.loads(json.dumps(stored))
            *parents, last = key.split(".")
            section = values
            for name in parents:
                section = section.setdefault(name, {})  # some are left out where they are not set
            is_list = last in ("layers", "taus")
            section[last] = [1.0, wrong] if is_list else wrong
            if {"steps", "epochs"} <= set(section):
                section["steps" if last != "steps" else "epochs"] = None
            with pytest.raises(SpecError, match=rf"the spec in run.json has \d+ mistake.*\n.*`{last}|{key}"):
                spec_from_dict(values, where="run.json")
    for wrong in ([], None, "x"):
        with pytest.raises(SpecError, match="not a section of keys"):
            spec_from_dict(wrong, where="run.json")  # type: ignore[arg-type]


def test_layers_named_twice_must_agree(tmp_path: Path) -> None:
    spec = vc.load_spec(write(tmp_path, teacher={"model": "a/b", "layers": [2, 4], "num_layers": 2}))
    assert spec.teacher.layers == (2, 4)


def test_change_validates() -> None:
    assert change(Schedule(steps=3), steps=4).steps == 4
    with pytest.raises(SpecError, match="steps"):
        change(Schedule(steps=3), steps=-1)


@given(st.integers(1, 10_000), st.integers(1, 512), st.floats(0.01, 5, allow_nan=False))
def test_an_epoch_covers_all_samples(num_samples: int, batch_size: int, epochs: float) -> None:
    steps = Schedule(epochs=epochs).num_steps(num_samples, batch_size)
    assert steps * batch_size >= epochs * num_samples - 1e-6
    assert (steps - 1) * batch_size < epochs * num_samples or steps == 1


def test_specs_are_frozen() -> None:
    spec = CacheSpec.model_validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        spec.rows.top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("interact", "message"),
    [
        ({"matching": "order", "scale": 3.0}, "`scale` belong to `matching: vlsi`"),
        ({"fixed_temperature": 2.0}, "`fixed_temperature` belongs to `temperature: fixed`"),
        ({"bottom_k": 2}, "`bottom_k` belongs to `matching: bottom_k`"),
        ({"sampler": "joint", "reliable_only": True}, "`sampler`, `reliable_only` are no longer there"),
        ({"layers_full_until": 0.8, "layers_zero_from": 0.5}, "lies behind"),
        ({"last": "none", "intermediate": "none"}, "steps with nothing to train"),
        ({"lambda_last": 0.0, "layers_full_until": 0.2, "layers_zero_from": 0.5}, "steps with nothing to train"),
        ({"beta": 0.3}, "`beta` belongs to jsd"),
        ({"skew": 0.3, "last": "jsd"}, "`skew` belongs to skewed_kl"),
        ({"tau": 2.0, "last": "ce", "intermediate": "ce"}, "`tau` belongs to forward_kl"),
        ({"alpha_ce": 0.5, "last": "ce"}, "`alpha_ce` mixes the labels into a divergence"),
        ({"intermediate": "ce", "matching": "order"}, "`matching` do nothing with `intermediate: ce`"),
        ({"intermediate": "none", "layer_reduction": "mean"}, "`layer_reduction` do nothing"),
        ({"temperature": "fixed", "scale": 9.0}, "`scale` belongs to the adaptive temperatures"),
        ({"lambda_last": 0.0, "alpha_ce": 0.5}, "`alpha_ce` do nothing with `lambda_last: 0`"),
        (
            {"layers_full_until": 0.0, "layers_zero_from": 0.0, "matching": "order"},
            "`matching` do nothing with `layers_zero_from: 0`",
        ),
    ],
)
def test_settings_of_the_interaction_that_would_do_nothing_are_refused(
    tmp_path: Path, interact: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        vc.load_spec(write(tmp_path, distill={"interact": interact}))


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="`layers` names 3 layers, `num_layers` is 2; drop one"):
        vc.load_spec(write(tmp_path, distill={"layers": [1, 2, 3], "num_layers": 2}))
    silent = {"data": {"path": "rows.jsonl"}, "generate": False, "num_beams": 5}
    with pytest.raises(SpecError, match="`num_beams` searches answers, and `generate: false` asks for none"):
        vc.load_spec(write(tmp_path, evaluate=silent))


def test_the_last_recipe_needs_a_last_layer(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="`recipe: last` trains the last layer alone"):
        vc.load_spec(write(tmp_path, distill={"recipe": "last", "interact": {"last": "none"}}))


def test_the_weight_of_the_layers_fades(tmp_path: Path) -> None:
    fading = {"layers_full_until": 0.25, "layers_zero_from": 0.75}
    interact = vc.load_spec(write(tmp_path, distill={"interact": fading})).distill.interact
    assert [interact.layer_weight(x / 8) for x in range(9)] == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0]
    interact = vc.load_spec(write(tmp_path)).distill.interact
    assert interact.layer_weight(0.999) == interact.layer_weight(0.0) == 1


def test_the_spec_s_choices_are_those_of_the_code() -> None:
    fields = InteractSpec.model_fields
    for key in ("temperature", "scale", "fixed_temperature", "bottom_k"):
        assert fields[key].default == getattr(Matching(), key)
    assert (fields["beta"].default, fields["skew"].default) == (Divergence().beta, Divergence().skew)


def test_batch_tokens_may_be_left_open(tmp_path: Path) -> None:
    spec = vc.load_spec(write(tmp_path, run={"batch_tokens": "auto"}))
    assert (spec.run.batch_tokens, spec.run.num_batch_tokens) == ("auto", 8192)
    assert spec_from_dict(spec.model_dump(mode="json"), where="here") == spec
    assert spec.run.with_batch_tokens(77).model_dump() == {**spec.run.model_dump(), "batch_tokens": 77}
    said = vc.load_spec(write(tmp_path, run={"batch_tokens": "auto"}), overrides=["run.batch_tokens=64"])
    assert (said.run.batch_tokens, said.run.num_batch_tokens) == (64, 64)
    assert apply_overrides(spec, ["run.batch_tokens=64"]).run == said.run
    assert vc.load_spec(write(tmp_path)).run.batch_tokens == 8192
    for wrong in ("automatic", 0, 1.5):
        with pytest.raises(SpecError, match=r"`run\.batch_tokens`"):
            vc.load_spec(write(tmp_path, run={"batch_tokens": wrong}))
    with pytest.raises(SpecError, match=r"`run\.kernels`.*'auto', 'eager' or 'compiled'"):
        vc.load_spec(write(tmp_path, run={"kernels": "triton"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"num_draws": 50}}, "`rows.num_draws` does nothing with `rows.kind: top-k`"),
        ({"rows": {"kind": "sampled", "top_k": 8}}, "`rows.top_k` does nothing with `rows.kind: sampled`"),
        ({"rows": {"kind": "sampled", "tail_samples": 4}}, "`rows.tail_samples` does nothing"),
        ({"data": {"generator": "demo", "media_root": "x"}}, "`data.media_root` does nothing with a `generator`"),
        (
            {"evaluate": {"data": {"generator": "demo", "media_root": "x"}}},
            "`evaluate.data.media_root` does nothing with a `generator`",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        vc.load_spec(write(tmp_path, **changes))


def test_a_stored_spec_names_all_defaults_and_stays_readable(tmp_path: Path) -> None:
    for rows in ({}, {"kind": "sampled", "num_draws": 7}, {"tail_samples": 0}):
        spec = vc.load_spec(write(tmp_path, rows=rows))
        stored = spec.model_dump(mode="json")
        assert spec_from_dict(stored, where="run.json") == spec
        # What is printed can be pasted into a file, but for what does nothing there.
        assert apply_overrides(spec, ["distill.seed=1"]).rows == spec.rows
    # Another kind of rows on the command line replaces what the file says of the old kind, and nothing else.
    file = write(tmp_path, rows={"top_k": 8, "taus": [1.0, 2.0]})
    assert vc.load_spec(file, overrides=["rows.kind=sampled", "rows.num_draws=9"]).rows.num_draws == 9
    with pytest.raises(SpecError, match=r"`rows\.top_k` does nothing with `rows\.kind: sampled`"):
        vc.load_spec(file, overrides=["rows.kind=sampled", "rows.top_k=4"])


@pytest.mark.parametrize(
    ("recipe", "used", "unused"),
    [
        (
            "sft",
            ["interact.schedule.steps=3", "verbalize.epochs=2", "lora.rank=2", "sft.mode=full", "seed=1"],
            ["interact.tau=2", "interact.schedule.warmup=0", "verbalize.learning_rate=1", "layers=[1]", "num_layers=2"],
        ),
        (
            "last",
            ["interact.last=jsd", "interact.schedule.learning_rate=1", "lora.alpha=2", "interact.alpha_ce=0.5"],
            ["interact.intermediate=jsd", "interact.matching=order", "interact.beta=0.1", "verbalize.clip_norm=2"],
        ),
        ("vlsi", ["interact.matching=order", "layers=[1]", "verbalize.learning_rate=1"], []),
    ],
)
def test_settings_of_stages_that_a_recipe_does_not_run(recipe: Any, used: list[str], unused: list[str]) -> None:
    distill = DistillSpec(recipe=recipe)
    for group, wanted in ((used, []), (unused, unused)):
        said = [f"distill.{one}" for one in group]
        assert unused_by_recipe(distill, said) == [f"distill.{one}" for one in wanted]
    assert unused_by_recipe(distill, ["verbalizer.loss=ce"]) == ([] if recipe == "vlsi" else ["verbalizer.loss=ce"])
    exits = DistillSpec.model_validate({"recipe": recipe, "exits": {}})  # which have a loss of their own
    said = ["verbalizer.loss=ce", "verbalizer.style=plain", "distill.exits.loss=ce", "distill.exits.weight=2"]
    assert unused_by_recipe(exits, said) == ([said[3]] if recipe == "vlsi" else [said[0], said[3]])
    # An adapter that no stage trains.
    full = DistillSpec.model_validate({"recipe": "sft", "sft": {"mode": "full"}})
    assert unused_by_recipe(full, ["distill.lora.rank=2"]) == ["distill.lora.rank=2"]
