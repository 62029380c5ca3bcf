"""Stage exits: verbalizers of the finished student, which stays as it is: every target layer can then answer.

Those of stage verbalize are older than the student's head and layers; these read the student that is in the run's
folder, so that a layer may answer in its place, or draft for it (`models/drafting.py`).
"""

from pathlib import Path
from typing import Any

from vlsi_cache.errors import ModelError
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.verbalizer_files import EXITS_FOLDER, RECORD, read_record

from .optim import Stage
from .student import StudentState
from .verbalize import verbalize


def exits(state: StudentState, *, num_steps: int) -> dict[str, Any]:
    """Train them, or take those of an earlier attempt; returns the stage's entry for `run.json`.

    `state` has the student as it was saved (`StudentState.finished`).
    """
    folder, settings = state.run.path / EXITS_FOLDER, state.spec.distill.exits
    assert settings is not None
    if state.processes.from_first(lambda: _are_there(state, folder)):
        return {"name": "exits", "steps": num_steps, "seconds": state.log.stage_seconds("exits")}
    distill, student = state.spec.distill, state.student_folder
    state.checkpoints.student = state.processes.from_first(lambda: ModelRef(student).digest)
    verbalizers, entry = verbalize(
        state.shared_out(state.model),
        state.exit_layers,
        lambda num_skip: state.feed("exits", num_skip),
        Stage(distill, settings.schedule, num_steps, state.checkpoints, state.log, state.compiled, state.processes),
        architecture=state.spec.verbalizer.model_copy(update={"loss": settings.loss}),
        vocab_size=state.encoder.vocab_size,
        name="exits",
    )
    facts = {"teacher_digest": state.checkpoints.student, "model": str(student), "loss": settings.loss}
    state.processes.from_first(lambda: verbalizers.save(folder, provenance=facts))
    return entry


def _are_there(state: StudentState, folder: Path) -> bool:
    """Whether an earlier attempt has written them; raises ModelError for those of another student, and for a checkpoint
    on the way to them."""
    student, newest = state.student_folder, state.checkpoints.latest()
    if (folder / RECORD).exists():
        made_for, where = read_record(folder, [])["provenance"].get("teacher_digest"), folder
        otherwise = "delete the folder and run the same command again, which trains them"
    elif newest is not None and newest[0] == "exits":
        made_for, where = state.checkpoints.student_of(*newest), state.checkpoints.folder
        otherwise = "train in another folder with -o"
    else:
        return False
    own = ModelRef(student).digest
    if made_for not in (own, None):
        raise ModelError(
            f"{where} holds verbalizers of a model whose weights are `{made_for}`, and those of {student} are `{own}`: "
            f"put the student back that was there, or {otherwise}"
        )
    return where == folder
