"""The small files that runs leave and read again: what must be in them, and one clear error when it is not.

They lie around for months, on disks that fail and beside people who edit: whatever is in one, the reader gets a record
that can be relied on, or a CacheCorruptError that names the file, what is wrong, and what to do.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from .errors import CacheCorruptError, SpecError, command_line
from .io import refuse_url
from .progress import html_text

RUN, METRICS, EVALUATION, CHECKPOINT = "run.json", "metrics.jsonl", "evaluation.json", "checkpoint.json"
EXITS = "exits.json"
STUDENT_RECORD = "vlsi_cache.json"  # in the folder of a trained student: where it comes from
SEAL = "xxh3"  # key of a record's checksum over the rest of it


class _Record(BaseModel):
    """Keys that are read somewhere; others may be there. Of those with a default, earlier releases had none."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


class FileSum(_Record):
    """Size and xxh3-64 of a file."""

    size: int
    xxh3: str


class _Stage(_Record):
    name: str
    steps: int
    seconds: float
    schedule_steps: int | None = None
    layers: list[int] | None = None
    v_real: int | None = None


class _Run(_Record):
    kind: str
    status: Literal["running", "done", "failed", "interrupted"]
    spec: dict[str, Any]
    stages: list[_Stage] = []
    versions: dict[str, str] = {}
    layers: list[int] = []
    command: str | None = None
    device: str | None = None
    message: str | None = None
    recipe: str | None = None
    cache: str | None = None
    cache_digest: str | None = None
    student: str | None = None
    student_digest: str | None = None


class _Step(_Record):
    stage: str
    step: int
    num_steps: int
    elapsed_s: float
    loss: float | None
    kl_last: float | None = None
    layers: dict[str, float | None] | None = None
    matched_layers: list[list[int] | int] | None = None
    student_layers: list[int] | None = None
    teacher_layers: list[int] | None = None
    probe: dict[str, dict[str, float | None]] | None = None
    tokens_per_s: float | None = None
    data_wait_pct: float | None = None
    memory_gib: float | None = None


class _AgainstCache(_Record):
    cache: str
    num_samples: int
    num_tokens: int
    kl: float
    teacher_entropy: float | None
    top1_agreement: float | None
    mass_on_top_k: float | None
    teacher_layers: list[int]
    layers: dict[str, list[float]]


class _Borrowed(_Record):
    path: str
    same_start: bool | None = None


class _Evaluation(_Record):
    num_samples: int | None = None
    num_skipped: int | None = None
    num_beams: int | None = None
    num_by_kind: dict[str, int] = {}
    exact_match: dict[str, float] | None = None
    nll: float | None = None
    perplexity: float | None = None
    layers: dict[str, float] = {}
    verbalizers: _Borrowed | None = None
    cache: _AgainstCache | None = None
    measured_with: dict[str, Any] | None = None


class _Checkpoint(_Record):
    stage: str
    step: int
    student: str | None = None
    files: dict[str, FileSum] | None = None


class _Verbalizers(_Record):
    format_version: int
    architecture: dict[str, str | int | float | bool]
    provenance: dict[str, str | None]
    layers: list[int]
    files: dict[str, FileSum] = {}


class _AblationRun(_Record):
    status: Literal["done", "failed"]
    run: str
    message: str | None = None
    steps: int | None = None
    seconds: float | None = None
    device: str | None = None
    versions: dict[str, str] = {}
    num_samples: int | None = None
    nll: float | None = None
    perplexity: float | None = None
    exact_match: dict[str, float] | None = None
    layers: dict[str, float] | None = None
    settings: list[str] = []


class _AblationRow(_Record):
    names: list[str]
    what: str
    run: str | None
    reason: str | None = None
    num_steps: int | None = None


class _Exit(_Record):
    layer: int
    accuracy: float
    nll: float
    agreement: float
    weights: int
    seconds: float | None
    acceptance: float | None = None
    tokens_per_pass: float | None = None
    speedup: float | None = None


class _Exits(_Record):
    student: str | None = None
    rows: str
    num_samples: int
    structure: str
    verbalizers: str | None
    exits: list[_Exit]
    rules: dict[str, list[dict[str, float]]]


class _DemoExit(_Record):
    layer: int
    accuracy: float
    nll: float


class _DemoRun(_Record):
    run: str
    exact_match: dict[str, float] | None = None
    perplexity: float | None = None
    seconds: float | None = None
    exits: list[_DemoExit] = []


class _Demo(_Record):
    cache: str
    seeds: list[int]
    recipes: list[str]
    runs: dict[str, list[_DemoRun]]

    @model_validator(mode="after")
    def _has_all_runs(self) -> Self:
        if missing := set(self.recipes) - self.runs.keys():
            raise ValueError(f"it has no runs of recipe {', '.join(sorted(missing))}")
        return self


class _Ablation(_Record):
    runs: dict[str, dict[str, _AblationRun]]
    spec: dict[str, Any] = {}


class _AblationTables(_Ablation):
    """One that has begun to run."""

    tables: dict[str, list[_AblationRow]]
    titles: dict[str, str] = {}
    notes: dict[str, str] = {}
    seeds: list[int]
    default: str
    budget: str
    device: str
    cache: str
    student: str
    versions: dict[str, str]


class _Response(_Record):
    ids: list[int]
    ended: bool


class _Responses(_Record):
    responses: list[_Response]


@dataclass(frozen=True)
class Run:
    """What `run.json` of a run says, and `evaluation.json` if it was evaluated (else None); made by `open_run`."""

    path: Path
    record: dict[str, Any]
    scores: dict[str, Any] | None

    @property
    def status(self) -> str:
        """`running`, `interrupted`, `failed` or `done`."""
        return str(self.record["status"])

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, one for each optimizer step; units are in the keys, losses in nats."""
        return read_metrics(self.path / METRICS)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.record['kind']}, {self.status})"

    def _repr_html_(self) -> str:
        """What a notebook shows: what was trained, how far it is, and its scores."""
        facts = {"run": str(self.path), "kind": self.record["kind"], "status": self.status}
        facts |= {
            name: self.record[name] for name in ("recipe", "student", "cache", "message") if self.record.get(name)
        }
        if steps := self.metrics():
            last = steps[-1]
            facts["last step"] = f"{last['stage']} {last['step']} of {last['num_steps']}, loss {last['loss']:.4g}"
        for name in ("exact_match", "perplexity"):
            score = (self.scores or {}).get(name)
            score = score.get("all") if isinstance(score, dict) else score
            if score is not None:
                facts[name.replace("_", " ")] = f"{score:.4g}"
        lines = "".join(f"<tr><th>{name}</th><td>{html_text(str(value))}</td></tr>" for name, value in facts.items())
        return f"<table>{lines}</table>"


def open_run(path: str | os.PathLike[str]) -> Run:
    """The run in a folder that `distill` or `train_verbalizers` has written, whatever its status.

    Raises SpecError where there is none, CacheCorruptError for a damaged file, with what to do.
    """
    refuse_url(path, "path")
    folder = Path(path)
    if not (folder / RUN).exists():
        raise SpecError(f"{folder} holds no run: it has no {RUN}; name the folder that was given with -o")
    return Run(folder, read_run(folder), read_evaluation(folder))


def read_run(folder: Path) -> dict[str, Any]:
    """`run.json` of a run folder."""
    return _read(folder / RUN, _Run, "restore it from a copy, or start again in another folder")


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """`evaluation.json` of a run folder; None when it was not evaluated. Earlier releases wrote no checksum."""
    file = folder / EVALUATION
    if not file.exists():
        return None
    todo = f"delete it and run: {command_line('evaluate', folder)}"
    return _unsealed(_read(file, _Evaluation, todo), file, todo)


def read_exits(folder: Path) -> dict[str, Any] | None:
    """`exits.json` of a run folder; None where its exits were not measured."""
    file = folder / EXITS
    if not file.exists():
        return None
    todo = f"delete it and run: {command_line('exits', folder)}"
    return _unsealed(_read(file, _Exits, todo), file, todo, required=True)


def of_this_student(exits: dict[str, Any], folder: Path) -> bool:
    """Whether the content of `exits.json` was measured on the student that is in the run folder, as far as both say."""
    file = folder / "student" / STUDENT_RECORD
    said = read_object(file, "restore it from a copy, or train again in another folder") if file.is_file() else {}
    return exits.get("student") in (None, said.get("weights", exits.get("student")))


def read_checkpoint(file: Path) -> dict[str, Any]:
    """`checkpoint.json`, which has a checksum of itself; one of an earlier release has none."""
    record = _read(file, _Checkpoint, "")
    return _unsealed(record, file, "", required="files" in record)


def read_verbalizers(file: Path, todo: str) -> dict[str, Any]:
    """`verbalizers.json`; `todo` is what to do when it is damaged."""
    return _read(file, _Verbalizers, todo)


def read_ablation(file: Path) -> dict[str, Any]:
    """`ablation.json`; it has tables from its first run on."""
    todo = "restore it from a copy, or choose another folder with -o: there --cache takes the cache that is here"
    record = _read(file, _Ablation, todo)
    return _read(file, _AblationTables, todo) if "tables" in record else record


def read_demo(file: Path, todo: str) -> dict[str, Any]:
    """`demo.json`; `todo` is what to do when it is damaged."""
    return _read(file, _Demo, todo)


def read_batch(file: Path, num: int) -> list[dict[str, Any]]:
    """The `num` responses of a batch of `generate`, as `sealed` writes them; earlier releases wrote a plain list.

    `ids` and `ended` of each.
    """
    todo = "delete it and run the same command again, which repeats this batch"
    record: Any = _read(file, list[_Response] | _Responses, todo)
    responses = _unsealed(record, file, todo, required=True)["responses"] if isinstance(record, dict) else record
    if len(responses) != num:
        raise _damaged(str(file), f"holds {len(responses)} responses, its batch has {num} prompts", todo)
    return responses


def sealed(record: dict[str, Any]) -> str:
    """JSON text of a record with its checksum in it."""
    return json.dumps({**record, SEAL: _sum_of(record)}, indent=1)


def read_object(file: Path, todo: str) -> dict[str, Any]:
    """Any other JSON object of ours."""
    return _read(file, _Record, todo)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All whole lines of `metrics.jsonl`; a last line that a kill cut short is left out, no file is no lines."""
    todo = "restore it from a copy, or delete it: no weight depends on it, only the curves up to here are lost"
    if not file.exists():
        return []
    *lines, _ = _content(file, todo).split(b"\n")
    return [_parse(line, f"{file}, line {number}", _Step, todo) for number, line in enumerate(lines, start=1) if line]


def _sum_of(record: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(record, sort_keys=True).encode())


def _unsealed(record: dict[str, Any], file: Path, todo: str, *, required: bool = False) -> dict[str, Any]:
    """A record without its checksum, which must be right, if there has to be one or there is one."""
    rest = {key: value for key, value in record.items() if key != SEAL}
    if (required or SEAL in record) and record.get(SEAL) != (found := _sum_of(rest)):
        raise _damaged(str(file), f"xxh3 of the content is {found}, the file says {record.get(SEAL)}", todo)
    return rest


def _read(file: Path, schema: Any, todo: str) -> dict[str, Any]:
    return _parse(_content(file, todo), str(file), schema, todo)


def _content(file: Path, todo: str) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        what = "is missing"
    except IsADirectoryError:
        what = "is a folder and should be a file"
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
    raise _damaged(str(file), what, todo)


def _parse(content: bytes, where: str, schema: Any, todo: str) -> dict[str, Any]:
    try:
        value = json.loads(content.decode(), parse_constant=_no_number) if content.strip() else None
        if value is None:
            raise _damaged(where, "is empty", todo)
        _adapter(schema).validate_python(value)
    except UnicodeDecodeError as error:
        raise _damaged(where, f"is not UTF-8 (byte {error.start})", todo) from None
    except ValidationError as error:
        raise _damaged(where, _first_problem(error), todo) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"is not JSON ({error})", todo) from None
    return value


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _damaged(where: str, what: str, todo: str) -> CacheCorruptError:
    return CacheCorruptError(f"{where}: {what}", hint=todo)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number that JSON has")


def _first_problem(error: ValidationError) -> str:
    """What is wrong with which key, and what it is."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if not key:
        return f"should be an object and is of type {type(first['input']).__name__}"
    if first["type"] == "missing":
        return f"`{key}` is missing"
    shown = repr(first["input"])
    return f"`{key}` is {shown if len(shown) < 60 else f'{shown[:57]}...'}: {first['msg'].lower()}"
