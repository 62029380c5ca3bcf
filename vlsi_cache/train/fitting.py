"""What a student, its verbalizers and its settings must be for a cache: checked before any weight is loaded."""

import json
from pathlib import Path
from typing import Any

from vlsi_cache.config.sections import DataSpec
from vlsi_cache.config.training import Alignment, DistillSpec, TraversalSpec, VerbalizerSpec
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.models.backbone import Backbone, target_layers
from vlsi_cache.models.load import ModelRef
from vlsi_cache.models.traversal_files import NOT_OF_A_MODEL
from vlsi_cache.models.verbalizer import Verbalizers, load_verbalizers
from vlsi_cache.models.verbalizer_files import find_folder, read_record, verbalizers_digest
from vlsi_cache.progress import say
from vlsi_cache.store.format import CacheHeader

from .aligned import same_tokenizer


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


def take_verbalizers(folder: str, into: Path | None, backbone: Backbone, layers: list[int]) -> Verbalizers:
    """Load them, and write them into the run folder `into` (None: no folder) as a run does that has trained them."""
    path = find_folder(folder)
    verbalizers = load_verbalizers(path, backbone, layers)
    if into is None:
        return verbalizers
    provenance = read_record(path, layers)["provenance"]
    verbalizers.save(into, provenance={key: value for key, value in provenance.items() if key != "head_digest"})
    return verbalizers


def check_traversal(named: ModelRef, wanted: TraversalSpec | None) -> None:
    """Raise SpecError where a student has traversed layers and the spec does not say the same ones."""
    found = named.traversal
    if found is None:
        return
    there, said = (
        {} if one is None else one.model_dump(mode="json", exclude=NOT_OF_A_MODEL) for one in (found, wanted)
    )
    if there != said:
        raise SpecError(
            f"the layers of student {named.path} are traversed as {json.dumps(there)}, and `distill.traversal` says "
            f"{json.dumps(said) if said else 'nothing'}; say the same"
        )


def say_pixels(data: DataSpec, path: str, *, trust_remote_code: bool = False) -> None:
    """Say where the spec's pixel limits take the place of other ones that the student brings along."""
    if data.min_pixels is None and data.max_pixels is None:
        return
    own = ModelRef(path, trust_remote_code=trust_remote_code).encoder().vision
    for name in ("min_pixels", "max_pixels"):
        named, brought = getattr(data, name), getattr(own, name, None)
        if named is not None and named != brought:
            say(f"pictures: `data.{name}` {named} takes the place of the student's own, {brought}")


def check_settings(header: CacheHeader, distill: DistillSpec, config: Any, *, where: Path) -> list[int]:
    """The student's target layers; raises SpecError for what the cache at `where` cannot give."""
    layers = _student_layers(distill, config, num_teacher=len(header.layers) - 1, where=where)
    if not distill.is_supervised:
        _check_interact(header, distill, where)
        if distill.alignment == "byte" and header.row_kind == "sampled":
            raise SpecError(
                f"`distill.alignment: byte` moves the teacher's kept words into the student's vocabulary, and {where} "
                "holds draws from the teacher; build a cache with `rows.kind: top-k`"
            )
        if distill.alignment == "byte" and "gold_logprob" in header.lacks:
            raise SpecError(
                f"`distill.alignment: byte` compares chunks by what the teacher gives the response's own tokens, and "
                f"{where} does not know that of all of them: it was imported; build a cache with the teacher"
            )
    return layers


def _student_layers(distill: DistillSpec, config: Any, *, num_teacher: int, where: Path) -> list[int]:
    if not distill.trains_layers:
        return []
    if not num_teacher:
        raise SpecError(
            f"recipe `{distill.recipe}` matches layers with intermediate teacher layers, and {where} has the last one "
            "alone, as imported caches have; distill that one: `--recipe last`"
        )
    layers = target_layers(distill.layers, distill.num_layers, config, where="distill.layers")
    if not layers:
        raise SpecError(
            f"`distill.layers` is empty, and recipe `{distill.recipe}` needs at least one target layer of the student; "
            "to distill the last layer alone use `recipe: last`"
        )
    if len(layers) > num_teacher:
        raise SpecError(
            f"`distill.layers` names {len(layers)} student layers and the cache holds {num_teacher} intermediate "
            "teacher layers; Algorithm 1 needs at least as many teacher layers as student layers"
        )
    return layers


def _check_interact(header: CacheHeader, distill: DistillSpec, where: Path) -> None:
    interact = distill.interact
    if distill.trains_layers and interact.bottom_k > len(header.layers) - 1:
        raise SpecError(
            f"`distill.interact.bottom_k` is {interact.bottom_k}, and {where} has {len(header.layers) - 1} "
            "intermediate layers"
        )
    if interact.tau not in header.taus:
        raise SpecError(
            f"`distill.interact.tau` is {interact.tau}, and {where} holds rows for {header.taus} alone: "
            "the tail at another temperature cannot be known from the top-k. Build a cache with "
            f"`rows.taus=[1.0,{interact.tau}]`"
        )
    used = {interact.last} if distill.recipe == "last" else {interact.intermediate, interact.last}
    operations = used - {"forward_kl", "ce", "none"}
    if header.row_kind == "sampled" and (operations or interact.tau != 1.0):
        raise SpecError(
            f"`distill.interact` asks for {' and '.join(sorted(operations)) or 'forward_kl'} at tau {interact.tau}, "
            f"and {where} holds draws from the teacher, which estimate forward_kl at tau 1 without bias and "
            "nothing else"
        )


def check_tokenizer(
    header: CacheHeader, encoder: Encoder, path: str, *, where: Path, alignment: Alignment = "tokens"
) -> None:
    """Raise ModelError unless the student at `path` has the vocabulary of the cache at `where`, or need not."""
    if alignment != "byte" and (difference := tokenizer_difference(header, encoder)):
        raise ModelError(
            f"student {path} has another tokenizer than the teacher of {where}: {difference}. "
            "Rows are over token ids, so both must share one vocabulary; choose a student of the teacher's family, or "
            "compare where the bytes are the same: `distill.alignment: byte`"
        )


def tokenizer_difference(header: CacheHeader, encoder: Encoder) -> str:
    """Both vocabularies in a few words; empty where a cache and a tokenizer have the same one."""
    if same_tokenizer(header, encoder):
        return ""
    cached, own = str(header.fingerprint.get("encoder.tokenizer")), str(encoder.fingerprint()["tokenizer"])
    return f"{encoder.vocab_size} tokens, map {own[:12]}, against {header.vocab_size} tokens, map {cached[:12]}"
