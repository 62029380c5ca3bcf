"""What layer-wise distillation is worth where the truth is known: students against a source with exact conditionals.

    python tests/benchmarks/acceptance.py [--cells NAME ...] [--tables NAME ...] [--seeds N] [--first-seed S] \
        [--work DIR] [--out F]

Every seed has a source, a teacher with verbalizers, a cache and students of its own; all variants of a seed start from
the same student, read the same written cache and take the same number of steps. The score is KL(truth || student) in
nats per response word on held-out rows. What is finished in `--work` is taken from there, so that several processes can
share the work by `--first-seed`. The exit code is 1 where something that must hold does not.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import acceptance_report
import markov
import torch
import yaml
from acceptance_report import ANY_DEPTH, DENSE, EARLY, FADED, FEWER, LAST, LENS, OF_DEPTH, PACKAGES, SFT, VLSI, WIDE
from layer_kl import layer_kls
from measuring import Report, setting
from tiny_models import kl_to_truth, new_model, pretrain
from transformers import AutoModelForCausalLM

import vlsi_cache as vc
from vlsi_cache.ablation.variants import IN_EVERY_TABLE, read_axes
from vlsi_cache.config.sections import EvaluateSpec
from vlsi_cache.evaluation.scores import evaluate_model
from vlsi_cache.io import write_atomically
from vlsi_cache.models.load import ModelRef
from vlsi_cache.run_files import read_metrics, read_object
from vlsi_cache.store.reader import Cache

AGAIN = "delete it and run again"
TEACHER = {"num_layers": 8, "hidden": 64}
TEACHER_STEPS = 600
TARGETS = [1, 2, 3, 4, 5, 6, 7]

# Whose layers are read through verbalizers of their own as well.
READ_ANEW = (VLSI, LAST, SFT, FADED, FEWER, *OF_DEPTH)
TABLES = ("matching", "operations", "longer", "depth")
CACHES = {
    "cache": (),
    WIDE: ("rows.top_k=16",),
    DENSE: ("rows.top_k=36", "rows.tail_samples=0", "store.profile=exact"),  # all words and marks
}


@dataclass(frozen=True)
class Regime:
    """A kind of student over a kind of data.

    `pretraining`: steps on fresh rows before it meets the cache. `sft_alone`: what recipe `sft` has instead, where all
    steps are its own; its learning rate is the best of those tried. `anew_rows`: what verbalizers of a finished student
    are trained on; `scored_rows`: what models are held against the truth on.
    """

    source: str
    num_layers: int
    targets: tuple[int, ...]
    pretraining: int
    num_rows: int
    changes: tuple[str, ...]
    sft_alone: tuple[str, ...] = ()
    heldout_rows: int = 500
    anew_rows: int = 2000
    scored_rows: int = 1000


COLD = Regime(
    "easy", 8, (2, 4, 6), 0, 3000,
    ("batch_size=64", "micro_batch_size=64", "interact.mode=layers", "sft.mode=full",
     "verbalize.learning_rate=1e-2", "interact.schedule.learning_rate=1e-2", "sft.schedule.learning_rate=1e-4"),
    sft_alone=("sft.schedule.learning_rate=1e-2",),
)  # fmt: skip
WARM = Regime(
    "easy", 4, (1, 2, 3), 400, 300,
    ("batch_size=32", "micro_batch_size=32", "verbalize.learning_rate=3e-3",
     "interact.schedule.learning_rate=3e-3", "sft.schedule.learning_rate=1e-4"),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A regime and a budget: steps of verbalize, interact and sft. `asserted`: what must hold is checked here."""

    regime: Regime
    steps: tuple[int, int, int]
    tables: tuple[str, ...]
    asserted: bool = False


CELLS = {
    "cold, 52 steps": Cell(COLD, (1, 50, 1), ("matching", "operations", "longer"), asserted=True),
    "cold, 202 steps": Cell(COLD, (1, 200, 1), ("longer",)),
    "pretrained, 260 steps": Cell(WARM, (40, 160, 60), ("matching", "operations", "longer"), asserted=True),
    "pretrained, 65 steps": Cell(WARM, (10, 40, 15), ("longer",)),
}


@dataclass(frozen=True)
class Variant:
    """One way to train a student: what it changes in the spec."""

    name: str
    changes: tuple[str, ...]
    recipe: str = "vlsi"


def longer() -> list[Variant]:
    """What might make the layers help for longer: they fade out, or teach only what the student does not know."""
    settings = {
        "fade 0.3-0.7": ("layers_full_until=0.3", "layers_zero_from=0.7"),
        "fade 0-0.3": ("layers_full_until=0", "layers_zero_from=0.3"),
        "mean": ("layer_reduction=mean",),
        "mean, fade 0.3-0.7": ("layer_reduction=mean", "layers_full_until=0.3", "layers_zero_from=0.7"),
    }  # fmt: skip
    found = [Variant(name, tuple(f"distill.interact.{one}" for one in keys)) for name, keys in settings.items()]
    return [*found, *depth()[:3]]


def depth() -> list[Variant]:
    """Layers that are to answer: last-layer KD, whose exits come afterwards, and what takes as many student's steps."""
    few = "distill.verbalize.steps=1"
    lens = ("verbalizer.structure=logit-lens", "distill.exits.weight=0.1", few)
    forms = {
        ANY_DEPTH: ("distill.exits.schedule.steps=1",),
        LENS: (*lens, "distill.interact.matching=uniform_stretch", "distill.interact.intermediate=jsd"),
        EARLY: (*lens, "distill.interact.intermediate=ce"),
    }
    faded = ("layer_reduction=mean", "layers_full_until=0", "layers_zero_from=0.3")
    return [
        Variant(FADED, tuple(f"distill.interact.{one}" for one in faded)),
        Variant(FEWER, (few,), recipe="last"),
        *(Variant(name, changes, recipe="any-depth") for name, changes in forms.items()),
    ]


def variants_of(cell: Cell) -> list[Variant]:
    """VLsI first, whose verbalizers the others take; every variant once."""
    tables = {
        name: [Variant(one.name, one.set, one.recipe) for one in axis.variants]
        for name, axis in read_axes(["matching", "operations"]).items()
    }
    (adaptive,) = (one for one in tables["matching"] if one.name == VLSI)
    _, *baselines = IN_EVERY_TABLE
    found = [adaptive, *(Variant(one.name, one.set, one.recipe) for one in baselines)]
    found += [replace(adaptive, name=name) for name in (WIDE, DENSE) if cell.asserted]
    for table in cell.tables:
        found += longer() if table == "longer" else depth() if table == "depth" else tables[table]
    same = {"kld+kld": VLSI, "x+kld": LAST}  # under another table's name
    return list({one.name: one for one in found if one.name not in same}.values())


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments)
    torch.set_num_threads(1)
    cells = {name: shrunk(CELLS[name]) if args.tiny else CELLS[name] for name in args.cells}
    if args.tables:
        cells = {name: replace(cell, tables=tuple(args.tables), asserted=False) for name, cell in cells.items()}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        found = {name: [run_seed(work, name, cell, seed, args.tiny) for seed in seeds] for name, cell in cells.items()}
    report = Report("Acceptance: students of a source whose truth is known")
    report.say(setting(arguments, "acceptance.py", torch.device("cpu"), PACKAGES))
    held = acceptance_report.write(report, found, {name: cell.asserted for name, cell in cells.items()})
    if args.out:
        report.write(args.out)
    return 0 if held else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--tables", nargs="+", choices=TABLES, help="these alone, and nothing that must hold")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder to keep everything in, and to go on from")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="few steps and rows: it shows that all of it runs")
    return parser.parse_args(arguments)


def shrunk(cell: Cell) -> Cell:
    """The same with next to no training."""
    regime = replace(cell.regime, num_rows=32, pretraining=min(2, cell.regime.pretraining))
    regime = replace(regime, heldout_rows=32, anew_rows=32, scored_rows=64)
    regime = replace(regime, changes=(*regime.changes, "batch_size=8", "micro_batch_size=8"))
    return replace(cell, regime=regime, steps=(1, 2, 1), tables=())


def run_seed(work: Path, name: str, cell: Cell, seed: int, tiny: bool) -> dict[str, Any]:
    """All variants of a cell with one seed: scores by variant, and what else is checked."""
    regime = cell.regime
    home = work / f"{'tiny ' if tiny else ''}{regime.source}-{seed}"
    source = markov.make_source(regime.source, seed=seed)
    teacher_kl = make_teacher(home, source, regime, seed, tiny)
    folder = home / f"{regime.num_layers} layers, {regime.pretraining} pretrained, {regime.num_rows} rows"
    student_kl = make_student(folder, home, source, regime, seed, tiny)
    caches = {
        kind: vc.build_teacher(vc.load_spec(folder / "spec.yaml", overrides=changes), out=folder / kind)
        for kind, changes in (CACHES.items() if cell.asserted else [("cache", ())])
    }
    runs = folder / name
    scores = {
        variant.name: run_variant(runs, caches.get(variant.name, caches["cache"]), variant, cell, seed)
        for variant in variants_of(cell)
    }
    starts = {"start": folder / "student", "end": runs / VLSI / "student"} if cell.asserted else {}
    return {
        "seed": seed,
        "source": regime.source,
        "teacher": teacher_kl,
        "student": student_kl,
        "teacher_layers": verbalizer_losses(home / "verbalizers"),
        "variants": scores,
        "layer_kls": {when: layer_kls(caches, student, runs / VLSI) for when, student in starts.items()},
    }


def make_teacher(home: Path, source: markov.Source, regime: Regime, seed: int, tiny: bool) -> float:
    """Train the teacher unless it is there; returns its KL from the truth."""

    def train(folder: Path) -> float:
        model = new_model(folder, **TEACHER, seed=seed)
        steps = 5 if tiny else TEACHER_STEPS
        pretrain(model, source, steps=steps, batch_size=128, learning_rate=3e-3, seed=2 * seed)
        model.save_pretrained(folder)
        return kl_to_truth(model, source, num_rows=regime.scored_rows)

    return _once(home / "teacher", train)


def make_student(folder: Path, home: Path, source: markov.Source, regime: Regime, seed: int, tiny: bool) -> float:
    """The starting student, its rows and the spec; the teacher's verbalizers unless they are there. Returns its KL."""

    def train(out: Path) -> float:
        model = new_model(out, num_layers=regime.num_layers, hidden=48, seed=50 + seed)
        pretrain(model, source, steps=regime.pretraining, batch_size=64, learning_rate=3e-3, seed=2 * seed + 1)
        model.save_pretrained(out)
        return kl_to_truth(model, source, num_rows=regime.scored_rows)

    student_kl = _once(folder / "student", train)
    for file, num, first in (("rows", regime.num_rows, 700), ("heldout", regime.heldout_rows, 800)):
        rows = markov.chat_rows(*source.rows(num, seed=first + seed), name=file)
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = {
        "name": f"markov-{regime.source}",
        "teacher": {
            "model": str(home / "teacher"),
            "dtype": "float32",
            "layers": TARGETS,
            "verbalizers": str(home / "verbalizers" / "verbalizers"),
        },
        "data": {"path": "rows.jsonl", "max_length": 64},
        "rows": {"top_k": 8, "tail_samples": 4},
        "store": {"part_mib": 512},  # one part each: sparse and dense rows come in the same order
        "train_verbalizers": {
            "schedule": {"steps": 3 if tiny else 200, "learning_rate": 3e-3},
            "batch_size": 64,
            "micro_batch_size": 64,
        },
        "distill": {"layers": list(regime.targets), "checkpoint_steps": 100_000},
        "evaluate": {"data": {"path": "heldout.jsonl", "max_length": 64}, "generate": False},
        "run": {"device": "cpu"},
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    if not (home / "verbalizers" / "verbalizers" / "verbalizers.json").is_file():
        vc.train_verbalizers(vc.load_spec(folder / "spec.yaml"), out=home / "verbalizers")
    return student_kl


def run_variant(runs: Path, teacher_cache: Cache, variant: Variant, cell: Cell, seed: int) -> dict[str, Any]:
    """Train and measure one student.

    Layers are read through the verbalizers of the VLsI run of this seed, which favours students that were trained
    through them; some are read through verbalizers that were trained for the finished student, too.
    """
    out, own = runs / variant.name, variant.name == VLSI
    if not (out / "score.json").is_file():
        verbalize, interact, sft = cell.steps
        steps = (f"verbalize.steps={verbalize}", f"interact.schedule.steps={interact}", f"sft.schedule.steps={sft}")
        alone = cell.regime.sft_alone if variant.recipe == "sft" else ()
        changes = [f"distill.{one}" for one in (*cell.regime.changes, *alone, *steps, f"seed={seed}")]
        if (
            variant.recipe in ("vlsi", "any-depth")
            and not own
            and "verbalizer.structure=logit-lens" not in variant.changes
        ):
            changes.append(f"distill.verbalizers={runs / VLSI / 'verbalizers'}")
        changes += variant.changes
        vc.distill(
            teacher_cache, student=str(runs.parent / "student"), out=out, recipe=variant.recipe, overrides=changes
        )
        model = AutoModelForCausalLM.from_pretrained(out / "student")
        source = markov.make_source(cell.regime.source, seed=seed)
        settings = vc.load_spec(runs.parent / "spec.yaml").evaluate
        assert isinstance(settings, EvaluateSpec)
        nll = evaluate_model(
            ModelRef(out / "student", dtype="auto"), settings, verbalizers=str(runs / VLSI / "verbalizers")
        )
        kl = kl_to_truth(model.eval(), source, num_rows=cell.regime.scored_rows)
        score = {"kl": kl, "layers": nll["layers"], "matched": matched(out)}
        write_atomically(out / "score.json", json.dumps(score))
    score = read_object(out / "score.json", AGAIN)
    return score | {"anew": read_anew(out, cell.regime, seed)} if variant.name in READ_ANEW else score


def read_anew(run: Path, regime: Regime, seed: int) -> dict[str, float]:
    """Loss of the response at each target layer of a finished student, through verbalizers of its own."""
    file, folder = run / "anew.json", run.parent.parent
    if not file.is_file():
        source = markov.make_source(regime.source, seed=seed)
        rows = markov.chat_rows(*source.rows(regime.anew_rows, seed=900 + seed), name="anew")
        (folder / "anew.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        changes = {
            "teacher.model": run / "student",
            "teacher.layers": list(regime.targets),
            "data.path": folder / "anew.jsonl",
        }
        spec = vc.load_spec(folder / "spec.yaml", overrides=[f"{key}={value}" for key, value in changes.items()])
        vc.train_verbalizers(spec, out=run / "anew")
        assert isinstance(spec.evaluate, EvaluateSpec)
        scores = evaluate_model(
            ModelRef(run / "student", dtype="auto"), spec.evaluate, verbalizers=str(run / "anew" / "verbalizers")
        )
        write_atomically(file, json.dumps(scores["layers"]))
    return read_object(file, AGAIN)


def matched(run: Path) -> list[list[int]]:
    """The teacher layers of every match of the run, in the order of the student's layers."""
    return [units for line in read_metrics(run / "metrics.jsonl") for units in line.get("matched_layers", []) if units]


@cache
def verbalizer_losses(run: Path) -> dict[str, dict[str, float]]:
    """Loss of each of the teacher's layers, mean over the ten steps before each share of the training."""
    lines = read_metrics(run / "metrics.jsonl")
    found = {}
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        end = max(1, round(share * len(lines)))
        near = lines[max(0, end - 10) : end]
        found[f"{share:.0%}"] = {
            layer: sum(line["layers"][layer] for line in near) / len(near) for layer in near[0]["layers"]
        }
    return found


def _once(folder: Path, make: Callable[[Path], float]) -> float:
    """What `make` returned for this folder, now or earlier."""
    file = folder / "kl.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"kl": make(folder)}))
    return float(read_object(file, AGAIN)["kl"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
