"""Which teacher layers a student was matched with over a run, against what the order alone would give.

Shapes: S student target layers, L teacher target layers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.errors import DataError, SpecError
from vlsi_cache.io import refuse_url
from vlsi_cache.runs.diagnostics import Metrics, is_finished
from vlsi_cache.runs.metrics import RunFiles, match_shares, next_step, read_run, teacher_layers

from .text import Table, lines_of, table

DEFAULT_SHARE = 0.1
IN_ORDER = ("vlsi", "order")  # modes of matching that keep the order of layers


def null_distribution(num_student: int, num_teacher: int, *, mode: str = "vlsi") -> np.ndarray | None:
    """P(student target s is matched with teacher target l), [S, L], if the divergences said nothing at all.

    Order preservation alone pushes matches deep; any drift must be read against this. None for the uniform modes, in
    which the divergences say nothing anyway.
    """
    if mode.startswith("uniform"):
        return None
    if mode not in ("vlsi", "order"):
        last_S = np.arange(num_student) + (num_teacher - num_student if mode == "range" else num_teacher)
        allowed_SL = np.arange(num_teacher) <= last_S[:, None]
        return allowed_SL / allowed_SL.sum(1, keepdims=True)
    match_SL = np.zeros((num_student, num_teacher))
    starts = {0: 1.0}
    for student in range(num_student):
        stop = num_teacher - num_student + student + 1  # of the search range: one teacher target for each that follows
        for start, prob in starts.items():
            match_SL[student, start:stop] += prob / (stop - start)
        starts = {match + 1: prob for match, prob in enumerate(match_SL[student]) if prob}
    return match_SL


@dataclass(frozen=True)
class Matches:
    """Shares of matches [S, M] in the first and the last steps that were matched, and what no information would give.

    `num_matches`: draws at the end. `null_SM` is None for the uniform modes, in which nothing is drawn, and where not
    all `teacher_layers` are known (`knows_teacher`): then they are those that were matched. `entropy_start`
    and `entropy_end`: nats of the distributions that layers were drawn from, by student layer, where they are logged.
    """

    run: str
    mode: str
    student_layers: list[int]
    teacher_layers: list[int]
    knows_teacher: bool
    start_SM: np.ndarray
    end_SM: np.ndarray
    null_SM: np.ndarray | None
    start_steps: tuple[int, int]
    end_steps: tuple[int, int]
    num_matches: int
    num_steps: int
    is_finished: bool
    entropy_start: dict[int, float]
    entropy_end: dict[int, float]

    def means(self, share_SM: np.ndarray) -> np.ndarray:
        """Mean matched teacher layer of every student layer."""
        return share_SM @ np.asarray(self.teacher_layers, dtype=np.float64)

    def distance(self, share_SM: np.ndarray) -> np.ndarray:
        """Total variation distance from the null by student layer, 0 to 1; NaN where there is no null."""
        null_SM = np.nan if self.null_SM is None else self.null_SM
        return 0.5 * np.abs(share_SM - null_SM).sum(1)

    def chance(self) -> np.ndarray | None:
        """The distance that so few draws from the null itself would have on average: its cells are nearly normal.

        None where there is no null, and for `bottom_k`, whose matches of one unit are not independent.
        """
        if self.null_SM is None or self.mode == "bottom_k":
            return None
        null_SM = self.null_SM
        return np.sqrt(null_SM * (1 - null_SM) / (2 * np.pi * self.num_matches)).sum(1)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        distances = None
        if self.null_SM is not None:
            found = {"start": self.distance(self.start_SM), "end": self.distance(self.end_SM), "chance": self.chance()}
            distances = {name: distance_S.tolist() for name, distance_S in found.items() if distance_S is not None}
        arrays = {"start": self.start_SM, "end": self.end_SM, "null": self.null_SM}
        keys = ("run", "mode", "student_layers", "teacher_layers", "num_matches", "num_steps", "is_finished")
        return {
            **{key: getattr(self, key) for key in keys},
            "steps": {"start": list(self.start_steps), "end": list(self.end_steps)},
            "shares": {name: None if x is None else x.tolist() for name, x in arrays.items()},
            "mean_layer": {name: None if x is None else self.means(x).tolist() for name, x in arrays.items()},
            "distance_from_null": distances,
            "sampling_entropy": {"start": self.entropy_start, "end": self.entropy_end},
        }

    def __str__(self) -> str:
        return "\n\n".join([self.heading, table(*self.rows()), "\n".join(self.notes())])

    @property
    def heading(self) -> str:
        """Which steps are compared."""
        steps = [f"{first} to {last}" for first, last in (self.start_steps, self.end_steps)]
        return f"start: steps {steps[0]}, end: steps {steps[1]} of {self.num_steps} (matching {self.mode})"

    def rows(self) -> Table:
        """Head and rows of the table."""
        columns = {"mean start": self.means(self.start_SM), "mean end": self.means(self.end_SM)}
        if self.null_SM is not None:
            columns |= {"mean null": self.means(self.null_SM)}
            columns |= {"TV start": self.distance(self.start_SM), "TV end": self.distance(self.end_SM)}
            if (chance_S := self.chance()) is not None:
                columns["TV chance"] = chance_S
        cells = {}
        for name, values_S in columns.items():
            digits = 2 if name.startswith("mean") else 3
            cells[name] = [f"{x:.{digits}f}" for x in values_S]
        if self.entropy_start and self.entropy_end:
            for name, entropy in (("entropy start", self.entropy_start), ("entropy end", self.entropy_end)):
                cells[name] = [f"{entropy[s]:.2f}" if s in entropy else "" for s in self.student_layers]
        rows = zip(map(str, self.student_layers), *cells.values(), strict=True)
        return ["layer", *cells], [list(row) for row in rows]

    def notes(self) -> list[str]:
        """What the columns mean, and what is missing."""
        return lines_of("match_notes.txt", found=self, keeps_order=self.mode in IN_ORDER)


def match(run: Path | str, *, share: float = DEFAULT_SHARE) -> Matches:
    """The matched teacher layers of a run in the first and the last `share` of its steps, beside uniform sampling.

    A stage that is still running gives what is there. Raises SpecError for a run that matches no layers and for a
    `share` outside (0, 1], DataError when no step has been logged yet, CacheNotFoundError when `run` is no run.
    """
    if not 0 < share <= 1:
        raise SpecError(f"`share` is {share}; it is the share of the steps at either end, above 0 and at most 1")
    refuse_url(run, "run")
    files = read_run(Path(run))
    _check_matches(files)
    found = matches_of(files, share=share)
    if found is None:
        if is_finished(files.metrics, "interact"):
            raise DataError(
                f"{run} has matched no layers: their weight was 0 throughout the stage interact "
                "(`distill.interact.layers_full_until` and `layers_zero_from` fade them out)"
            )
        raise DataError(
            f"{run} has matched no layers yet: no step of stage interact that compares them is logged; "
            f"{next_step(files.record)}"
        )
    return found


def matches_of(run: RunFiles, *, share: float = DEFAULT_SHARE) -> Matches | None:
    """The same for a run that has been read; None when it has no matches."""
    lines = [line for line in run.metrics if any(line.get("matched_layers") or [])]
    columns, knows_teacher = teacher_layers(run)
    num = max(1, round(share * len(lines)))
    start, end = match_shares(lines[:num], columns), match_shares(lines[-num:], columns)
    if start is None or end is None:
        return None
    interact = ((run.record.get("spec") or {}).get("distill") or {}).get("interact") or {}
    mode = interact.get("matching", "vlsi")
    null_SM = None
    if knows_teacher:
        null_SM = null_distribution(len(start[1]), len(columns), mode=mode)
    return Matches(
        run=str(run.path),
        mode=mode,
        student_layers=start[1],
        teacher_layers=columns,
        knows_teacher=knows_teacher,
        start_SM=start[0],
        end_SM=end[0],
        null_SM=null_SM,
        start_steps=(lines[0]["step"], lines[num - 1]["step"]),
        end_steps=(lines[-num]["step"], lines[-1]["step"]),
        num_matches=sum(1 for line in lines[-num:] for unit in line["matched_layers"] if unit),
        num_steps=lines[-1]["num_steps"],
        is_finished=is_finished(run.metrics, "interact"),
        entropy_start=_entropies(lines[:num], lines),
        entropy_end=_entropies(lines[-num:], lines),
    )


def _entropies(chosen: Metrics, lines: Metrics) -> dict[int, float]:
    """Mean sampling entropy by student layer, over the probed steps among the chosen ones, or else of the nearest."""
    found: dict[int, list[float]] = {}
    first, last = chosen[0]["step"], chosen[-1]["step"]
    nearest = sorted(
        (line for line in lines if line.get("probe")), key=lambda line: max(first - line["step"], line["step"] - last)
    )
    for line in [line for line in chosen if line.get("probe")] or nearest[:1]:
        for layer, values in line["probe"].items():
            if "match_entropy" in values:
                found.setdefault(int(layer), []).append(values["match_entropy"])
    return {layer: float(np.mean(values)) for layer, values in found.items()}


def _check_matches(run: RunFiles) -> None:
    record, distill = run.record, (run.record.get("spec") or {}).get("distill") or {}
    if record["kind"] != "distill":
        raise SpecError(f"{run.path} is a `{record['kind']}` run, which matches no layers; name a `distill` run")
    if record.get("recipe") not in (None, "vlsi", "any-depth"):
        raise SpecError(
            f"{run.path} is a run of recipe `{record['recipe']}`, which matches no intermediate layers; name one of "
            "recipe `vlsi` or `any-depth`"
        )
    intermediate = (distill.get("interact") or {}).get("intermediate", "forward_kl")
    if intermediate in ("ce", "none"):
        raise SpecError(
            f"{run.path} has `distill.interact.intermediate: {intermediate}`: its layers are not compared with the "
            "teacher's, so none are matched"
        )
