"""A run folder as it stands, for a notebook or a script: read, never written, without torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlsi_cache.errors import SpecError
from vlsi_cache.io import refuse_url
from vlsi_cache.progress import html_text
from vlsi_cache.run_files import METRICS, RUN, read_evaluation, read_metrics, read_run


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
