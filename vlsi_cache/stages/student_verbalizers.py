"""Verbalizers that an earlier run has trained for the same student, taken instead of training them again."""

from pathlib import Path
from typing import Any

from vlsi_cache.errors import ModelError
from vlsi_cache.models.layers import Backbone
from vlsi_cache.models.verbalizer import Verbalizers, load_verbalizers, verbalizers_digest
from vlsi_cache.models.verbalizer_files import find_folder, read_record
from vlsi_cache.progress import say
from vlsi_cache.spec import VerbalizerSpec


def check_verbalizers(
    folder: str | None, layers: list[int], architecture: VerbalizerSpec, *, student_digest: str
) -> dict[str, Any]:
    """The facts that a run records about the verbalizers it is given: `verbalizers_digest`; none without a folder.

    Raises ModelError unless they are of this student's weights, of these layers, and as `verbalizer` of the spec says.
    """
    if folder is None:
        return {}
    path = find_folder(folder)
    record = read_record(path, layers)
    made_for = record["provenance"].get("teacher_digest")
    if made_for != student_digest:
        raise ModelError(
            f"`distill.verbalizers` {path}: trained for a model whose weights are `{made_for}`, this student's are "
            f"`{student_digest}`; name the `verbalizers` folder of a run with this student, or leave it out"
        )
    found = {**record["architecture"], **record["provenance"]}
    wanted = architecture.model_dump()
    other = [
        f"{key} `{found[key]}`, not `{wanted[key]}`" for key in wanted if found.get(key, wanted[key]) != wanted[key]
    ]
    if other:
        raise ModelError(
            f"`distill.verbalizers` {path} are not what `verbalizer` of the spec says: {'; '.join(other)}; change one "
            "of the two"
        )
    if "loss" not in found:
        say(
            f"`distill.verbalizers` {path} are of an earlier release and do not say by which loss they were trained; "
            f"it is taken to be `verbalizer.loss: {architecture.loss}`"
        )
    return {"verbalizers_digest": verbalizers_digest(path, layers)}


def take_verbalizers(folder: str, into: Path, backbone: Backbone, layers: list[int]) -> Verbalizers:
    """Load them, and write them into the run folder `into` as a run does that has trained them."""
    path = find_folder(folder)
    verbalizers = load_verbalizers(path, backbone, layers)
    provenance = read_record(path, layers)["provenance"]
    verbalizers.save(into, provenance={key: value for key, value in provenance.items() if key != "head_digest"})
    return verbalizers
