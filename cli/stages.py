"""Commands that run a stage, from plan and generate to distill and evaluate; the demo, and ablations."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlsi_cache.errors import SpecError, command_line
from vlsi_cache.processes import refuse_launch
from vlsi_cache.progress import say

from .output import OK, PROBLEMS, Answer

if TYPE_CHECKING:
    from vlsi_cache.config.sections import DataSpec

SpecName = Annotated[str, typer.Argument(metavar="SPEC", help="Name of a shipped spec, or a .yaml file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the spec, e.g. rows.top_k=32; repeatable."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: what the spec says.")]
Student = Annotated[str | None, typer.Option(metavar="ID", help="Folder or hub id; default: the student of the spec.")]
# Tables that are shipped.
AXES = ("matching", "operations", "verbalizer", "sft", "decoding", "loss", "k", "layers", "traversal")


def plan(
    spec: Annotated[
        str | None, typer.Argument(metavar="[SPEC]", help="Name of a shipped spec, or a .yaml file.")
    ] = None,
    exits: Annotated[
        str | None, typer.Option(metavar="CACHE", help="Instead: what its layers could draft for the last one.")
    ] = None,
    sets: Sets = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose hours: A100, B200, H100 (default), H200, L40S, MI300X or RTX 4090."),
    ] = None,
) -> Answer:
    """Price a build before it runs: bytes, memory, hours.

    Hours are those of one GPU that reaches 40 % of its dense bf16 peak. With --exits a cache tells how often each of
    its layers names the last one's word, how many of its drafted words would stand, and how many times as fast the
    model would answer, by the weights that drafts and checks read: exactly that along answers of the model itself, an
    estimate along other texts.
    """
    import vlsi_cache as vc

    if (spec is None) == (exits is None):
        raise SpecError("name a SPEC to price its build, or a cache with --exits CACHE, and not both")
    if exits is not None or spec is None:
        if idle := [name for name, value in {"--set": sets, "--gpu": gpu}.items() if value]:
            raise SpecError(f"{' and '.join(idle)} belong to the price of a SPEC, and --exits reads a cache as it is")
        from dataclasses import asdict

        from vlsi_cache.report.text import exit_plan_table

        found = [asdict(one) for one in vc.plan_exits(str(exits))]
        return Answer({"exits": found}, lambda: exit_plan_table(found))
    priced = vc.plan(vc.load_spec(spec, overrides=sets or []), gpu=gpu or "H100")
    return Answer(priced.as_dict(), str(priced))


def generate(
    spec: SpecName,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.parquet", help="Where the rows go.")],
    model: Annotated[
        str, typer.Option(metavar="teacher|RUN|ID", help="Who answers: the spec's teacher, a run's student, a model.")
    ] = "teacher",
    temperature: Annotated[float, typer.Option(min=0, metavar="T", help="0: the likeliest word; else drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(metavar="P", help="Draw from the likeliest words with this mass.")] = 1.0,
    num_samples: Annotated[int, typer.Option(min=1, metavar="N", help="Answers to each row, as ID#0, ID#1, ...")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longer answers are left out.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, metavar="B", help="Answers at a time.")] = 16,
    draft_exit: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Layer K drafts; answers at temperature 0 stay the same.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Of what is drawn.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N rows.")] = None,
    sets: Sets = None,
    device: Device = None,
) -> Answer:
    """Let a model answer the rows of a spec.

    Writes the rows with the last answer of each replaced by what the model says, ready to build a cache over:
    --set data.path=FILE.parquet. Run again after a crash to go on. Answers that do not end are left out and listed.
    One process; under torchrun only with a teacher that is cut (--set teacher.parallel=tensor).
    """
    import vlsi_cache as vc

    _refuse_twice(sets, {"run.device": device, "data.limit": limit})
    resolved = vc.load_spec(spec, overrides=sets or [])
    if model != "teacher" or resolved.teacher.parallel != "tensor":
        refuse_launch("generate")
    result = vc.generate(
        resolved,
        out=out,
        model=model,
        temperature=temperature,
        top_p=top_p,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        draft_exit=draft_exit,
        seed=seed,
        limit=limit,
        device=device,
    )
    return Answer(result, lambda: _generated_text(result, resolved.data))


def _generated_text(result: dict[str, Any], data: "DataSpec") -> str:
    from vlsi_cache.config.spec import as_override

    counts, left_out = result["counts"], result["left_out"]
    lines = [
        f"rows: {result['path']}",
        f"written {counts['written']:,} of {counts['generated']:,} responses; {counts['retokenised']:,} of them are "
        "read as other tokens than were generated",
        f"left out: {counts['left_out']:,}",
    ]
    lines += [f"  {one['id']}: {one['reason']}" for one in left_out[:10]]
    lines += [f"  ... and {len(left_out) - 10} more, listed by --json"] if len(left_out) > 10 else []
    sets = ["data.generator=null", "data.options={}"] if data.generator else []
    sets.append(as_override("data.path", str(result["path"])))
    root = result.get("media_root")  # of the pictures that the rows name; the spec's own stays in force
    if root and data.media_root is None and Path(result["path"]).resolve().parent != Path(root):
        sets.append(as_override("data.media_root", str(root)))
    return "\n".join([*lines, f"use them with: {_sets(*sets)}"])


def _sets(*overrides: str) -> str:
    """Options that can be pasted."""
    return " ".join(f"--set {shlex.quote(one)}" for one in overrides)


def _refuse_twice(sets: list[str] | None, flags: dict[str, Any]) -> None:
    """A flag and a --set of the same setting: one of them would be passed over."""
    set_keys = {one.partition("=")[0].strip() for one in sets or []}
    for key in (key for key, value in flags.items() if value is not None and key in set_keys):
        flag = f"--{key.rpartition('.')[2].replace('_', '-')}"
        raise SpecError(f"{flag} and --set {key} say the same; leave one of them out")


def train_verbalizers(
    spec: SpecName,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the verbalizers go.")],
    sets: Sets = None,
    device: Device = None,
    layers: Annotated[
        str | None, typer.Option(metavar="LIST", help="Only these target layers, e.g. 2-38 or 2,6,10.")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Number of this process, from 0.")] = 0,
    world: Annotated[
        int, typer.Option(min=1, help="How many processes share the layers: each takes every WORLDth.")
    ] = 1,
) -> Answer:
    """Train the teacher's verbalizers.

    Everything else stays frozen. Run again after a crash to go on. With --layers, or --rank and --world, several
    processes or nodes fill one DIR with the same verbalizers that a single one would train. Under torchrun all share
    every batch; with --set teacher.parallel=tensor they hold one teacher together, cut into a piece for each GPU.
    """
    import vlsi_cache as vc
    from vlsi_cache.config.spec import as_override

    _refuse_twice(sets, {"run.device": device})
    resolved = vc.load_spec(spec, overrides=sets or [])
    run = vc.train_verbalizers(resolved, out=out, device=device, layers=layers, rank=rank, world=world)
    folder = run / "verbalizers"
    text = f"verbalizers: {folder}\nuse them with: {_sets(as_override('teacher.verbalizers', str(folder)))}"
    return Answer({"verbalizers": folder, "report": _report_in(out)}, text)


def build_teacher(
    spec: SpecName,
    out: Annotated[str, typer.Option("--out", "-o", metavar="CACHE", help="Where the cache goes: a folder or a URL.")],
    sets: Sets = None,
    device: Device = None,
    rank: Annotated[int, typer.Option(min=0, help="Number of this process, from 0.")] = 0,
    world: Annotated[int, typer.Option(min=1, help="How many processes build this cache.")] = 1,
    batch_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto", help="Tokens of a batch; auto: find what suits the machine. Default: the spec's."
        ),
    ] = None,
    kernels: Annotated[
        Literal["auto", "eager", "compiled"] | None,
        typer.Option(help="Sums over the vocabulary, fused by torch.compile or not. Default: the spec's."),
    ] = None,
    sync: Annotated[
        bool,
        typer.Option("--sync", help="The data has changed: only rows that are new or other go through the teacher."),
    ] = False,
) -> Answer:
    """Run the teacher once and write the cache.

    Run again after a crash to go on. When the data has grown or changed, --sync brings a finished cache up to it.
    Several processes may work on one cache: --rank and --world say which parts each takes first. With --batch-tokens
    auto the number found is recorded in the cache, and taken again when it goes on. Under torchrun each process is one
    of them; with --set teacher.parallel=tensor they hold one teacher together, cut into a piece for each GPU, and
    --rank and --world number several such launches.
    """
    import vlsi_cache as vc

    flags = {"run.batch_tokens": batch_tokens, "run.kernels": kernels}
    _refuse_twice(sets, {**flags, "run.device": device})
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    resolved = vc.load_spec(spec, overrides=[*(sets or []), *given])
    build = vc.sync_cache if sync else vc.build_teacher
    cache = build(resolved, out=out, device=device, rank=rank, world=world)
    facts = {"cache": cache.path, "num_samples": cache.num_samples, "num_tokens": cache.num_tokens}
    counts = f"{cache.num_samples} samples, {cache.num_tokens} response tokens, {len(cache.layers)} layers"
    return Answer(facts, f"cache: {cache.path} ({counts})\nnext: {command_line('inspect', out)}")


def distill(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="The cache to train against: its folder or URL.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="Where the run goes.")],
    student: Student = None,
    recipe: Annotated[
        Literal["vlsi", "last", "sft", "trol", "any-depth"] | None,
        typer.Option(
            help="vlsi, any-depth: all layers; last: the last layer alone; sft, trol: labels only. Default: the spec's."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the spec, e.g. distill.sft.schedule.steps=10."),
    ] = None,
    device: Device = None,
) -> Answer:
    """Train a student against a cache.

    No teacher is loaded. Run again after a crash to go on from the last checkpoint.
    """
    import vlsi_cache as vc

    _refuse_twice(sets, {"run.device": device, "distill.student": student, "distill.recipe": recipe})
    run = vc.distill(cache, student=student, out=out, recipe=recipe, overrides=sets or [], device=device)
    facts = {"run": run, "student": Path(run) / "student", "report": _report_in(run)}
    lines = [f"run: {run}", f"student: {Path(run) / 'student'}", f"next: {command_line('evaluate', out)}"]
    return Answer(facts, "\n".join(lines))


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or a model folder together with --spec.")],
    spec: Annotated[str | None, typer.Option(metavar="SPEC", help="Held-out rows of this spec, not the run's.")] = None,
    cache: Annotated[
        str | None, typer.Option(metavar="CACHE", help="Also measure the distance to the teacher of this cache.")
    ] = None,
    verbalizers: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Read the layers through these, or those of this run.")
    ] = None,
    beams: Annotated[int | None, typer.Option(min=1, metavar="N", help="Answer by beam search.")] = None,
    draft_exit: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Layer K drafts the answers, which stay the same.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model run code of its own.")
    ] = False,
    sets: Sets = None,
    device: Device = None,
) -> Answer:
    """Measure a student on held-out rows.

    Exact match of the answers (all, and per kind of question), perplexity, and the loss of each verbalized layer, kept
    in RUN/evaluation.json. With --cache (built over held-out rows) also, for every token, the KL to the teacher and how
    often both name the same word first, and the KL of every layer to every layer of the teacher. Results of --limit,
    --spec, --set or --beams are shown and not kept; those of --verbalizers are, with where they come from. Starts
    again when it is run again. With --draft-exit layer K, read by RUN/exits (else by its verbalizer, else by norm and
    head), names the next words, and the whole student checks them at once: answers stay the same, and how many words a
    pass of the student gave is shown.
    """
    import vlsi_cache as vc
    from vlsi_cache.report.text import evaluation_table

    _refuse_twice(sets, {"run.device": device, "evaluate.num_beams": beams})
    resolved = vc.load_spec(spec) if spec else None
    result = vc.evaluate(
        run,
        spec=resolved,
        cache=cache,
        verbalizers=verbalizers,
        num_beams=beams,
        draft_exit=draft_exit,
        overrides=sets or [],
        device=device,
        limit=limit,
        trust_remote_code=trust_remote_code,
    )
    return Answer(result, lambda: evaluation_table(result))


def exits(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of distill.")],
    cache: Annotated[
        str | None,
        typer.Option(metavar="CACHE", help="The rows of this cache, not those of the run's spec."),
    ] = None,
    verbalizers: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Read the layers through these, trained for this very student.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model run code of its own.")
    ] = False,
    device: Device = None,
) -> Answer:
    """Show what each layer of a student would answer in its place, and what that costs.

    For every target layer: right words, nats per token, agreement with the last layer, weights that a token reads,
    measured time of a token, and what its drafts would come to. Then how deep tokens must go, on
    average, where the first layer that is sure enough says them: by the lead of its likeliest word (margin) or by its
    entropy. Layers are read by RUN/exits (distill with distill.exits.schedule.steps), else by RUN/verbalizers, else by
    norm and head. Kept in RUN/exits.json and shown in the run's report, unless --limit or --verbalizers is given or the
    run was trained on these rows.
    """
    import vlsi_cache as vc
    from vlsi_cache.report.text import exits_table

    result = vc.exits(
        run, cache=cache, verbalizers=verbalizers, limit=limit, device=device, trust_remote_code=trust_remote_code
    )
    return Answer(result, lambda: exits_table(result))


def init_student(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Folder or hub id of the model to take from.")],
    layers: Annotated[str, typer.Option(metavar="LIST", help="Decoder layers to keep, from 0, e.g. 0-5,24-29.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the student goes.")],
    gguf_file: Annotated[str | None, typer.Option(metavar="FILE", help="The .gguf file of TEACHER to read.")] = None,
) -> Answer:
    """Make a student out of some layers of a teacher."""
    import vlsi_cache as vc

    folder = vc.init_student(teacher, layers=layers, out=out, gguf_file=gguf_file)
    return Answer({"student": folder}, f"student: {folder}")


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where everything goes.")] = Path("demo-run"),
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Repeat every recipe with N seeds.")] = 1,
    device: Device = None,
) -> Answer:
    """See it all in minutes, offline, on a CPU.

    Caches a tiny teacher, trains students on labels only, on the last layer, on all layers and for answers from
    any of them, and compares them.
    """
    from vlsi_cache.demo.run import run_demo
    from vlsi_cache.report.text import demo_exits_table, demo_table

    say(f"demo in {out}: one cache, four recipes, {seeds} seed(s)")
    result: dict[str, Any] = run_demo(out=out, seeds=seeds, device=device)
    blocks = (demo_table, demo_exits_table)
    report = f"report: {out / 'report.html'}"
    return Answer(result, lambda: "\n\n".join([*filter(None, (block(result) for block in blocks)), report]))


def ablate(
    spec: SpecName,
    axis: Annotated[
        list[str],
        typer.Option(metavar="|".join([*AXES, "FILE.yaml"]), help="Which table; repeatable, runs are shared."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where cache, runs and tables go.")],
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Train every variant with N seeds.")] = 1,
    cache: Annotated[
        str | None,
        typer.Option(metavar="CACHE", help="A cache of SPEC, folder or URL; default: DIR/cache, built if missing."),
    ] = None,
    student: Student = None,
    variants: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these variants, and the default; --dry-run lists all.")
    ] = None,
    sets: Sets = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list variants, steps and remaining runs.")] = False,
) -> Answer:
    """Train and compare all variants of a table.

    One cache (or smaller ones cut from it) and the same seeds for all, and the same number of steps but for the tables
    that say so. Every student is measured on the spec's held-out rows. Run again after a crash to go on, or to add
    tables, variants and seeds: finished runs are taken. Exit code 1 when a run has diverged; the others are done all
    the same.

    A table of your own is a YAML file: `title`, and `variants`, each with `name`, `what` and a list `set` of KEY=VALUE
    changes to the spec; the shipped ones in cache_specs/ablations are examples, its README lists the other keys.
    """
    import vlsi_cache as vc
    from vlsi_cache.report.ablation import ablation_text, num_failed, preview_text

    result = vc.ablate(
        vc.load_spec(spec, overrides=sets or []),
        axes=axis,
        out=out,
        seeds=seeds,
        cache=cache,
        student=student,
        variants=None if variants is None else [name.strip() for name in variants.split(",")],
        device=device,
        dry_run=dry_run,
    )
    if dry_run:
        return Answer(result, lambda: preview_text(result))
    text = f"\n\ntable: {out / 'ablation.csv'}\nreport: {out / 'report.html'}"
    return Answer(result, lambda: ablation_text(result) + text, PROBLEMS if num_failed(result) else OK)


def _report_in(folder: Path | str) -> Path | None:
    file = Path(folder) / "report.html"
    return file if file.is_file() else None


COMMANDS = (  # in the order in which they are run; name, function, example
    ("plan", plan, "plan demo --set rows.top_k=32"),
    ("generate", generate, "generate demo -o rows.parquet --temperature 1 --num-samples 2"),
    ("train-verbalizers", train_verbalizers, "train-verbalizers demo -o runs/verbalizers"),
    ("build-teacher", build_teacher, "build-teacher demo -o caches/demo"),
    ("distill", distill, "distill caches/demo --student models/small -o runs/a"),
    ("evaluate", evaluate, "evaluate runs/a --limit 100"),
    ("exits", exits, "exits runs/a --cache caches/heldout"),
    ("init-student", init_student, "init-student models/teacher --layers 0-5,24-29 -o models/small"),
    ("demo", demo, "demo -o demo --seeds 3"),
    ("ablate", ablate, "ablate demo --axis matching --student models/small --seeds 3 -o ablation"),
)
