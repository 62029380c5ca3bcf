"""The files of verbalizers, and the checks that they are what was written.

FOLDER/layer_0002.safetensors   weights, and the architecture in the header: the file's hash covers both
FOLDER/verbalizers.json         architecture, layers, provenance (digests of the teacher's weights and head), and the
                                checksum of each file; earlier releases wrote none
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlsi_cache.errors import CacheCorruptError, ModelError, command_line
from vlsi_cache.io import checksum, difference_from, hash_of, replacing, write_atomically
from vlsi_cache.run_files import RUN, read_run, read_verbalizers

from .load import own_memory, resolve_model

FORMAT_VERSION = 1
EXITS_FOLDER = "exits"  # in a run: those that were trained for its finished student
RECORD = "verbalizers.json"
FROM_WHERE = (
    "a teacher's come from vlsi-cache train-verbalizers, a student's from a distill run of recipe `vlsi` or with "
    "`distill.exits`"
)
HEADER_KEY = "verbalizer"  # one key: the order of several in a safetensors header is not fixed


def find_folder(path: str | Path) -> Path:
    """The verbalizers that `path` names: a folder of them, the run that has trained them, or `package:NAME/...`."""
    folder = Path(resolve_model(path))
    if (folder / RECORD).is_file():
        return folder
    return next((inner for inner in (folder / "verbalizers", folder / EXITS_FOLDER) if inner.is_dir()), folder)


def of_run(run: Path) -> Path | None:
    """Those that read a run's student best: of stage exits, else of stage verbalize; None for a run without either."""
    folders = (run / EXITS_FOLDER, run / "verbalizers")
    return next((folder for folder in folders if folder.is_dir()), None)


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:04d}.safetensors"


def write(
    folder: Path, layers: dict[int, dict[str, Tensor]], architecture: dict[str, Any], provenance: dict[str, Any]
) -> Path:
    """Write the layers, then the record that names them together with those already there.

    Of several processes that write into one folder, the caller must let in one at a time.
    """
    there = _read_record(folder) if (folder / RECORD).exists() else {}
    if there and "loss" in provenance:  # an earlier release did not write it; whether it fits is for the caller to know
        there["provenance"].setdefault("loss", provenance["loss"])
    record = {"format_version": FORMAT_VERSION, "architecture": architecture, "provenance": provenance}
    if any(there.get(key, value) != value for key, value in record.items()):
        raise ModelError(f"{folder} holds verbalizers of another model or architecture; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    sums: dict[str, Any] = there.get("files", {})
    for layer, tensors in layers.items():
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with replacing(layer_file(folder, layer)) as temporary:
            save_file(on_cpu, temporary, metadata={HEADER_KEY: _canonical(architecture)})
            sums[layer_file(folder, layer).name] = checksum(temporary)
    record |= {"layers": sorted({*layers, *there.get("layers", [])}), "files": dict(sorted(sums.items()))}
    write_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")
    return folder


def read_record(folder: Path, layers: Sequence[int]) -> dict[str, Any]:
    """`verbalizers.json`; raises ModelError when it is not there or does not name all of `layers`, CacheCorruptError
    when it is damaged."""
    if not (folder / RECORD).exists():
        raise ModelError(f"no verbalizers in {folder} (`{RECORD}` is missing); {FROM_WHERE}")
    record = _read_record(folder)
    if record["format_version"] != FORMAT_VERSION:
        raise ModelError(
            f"{folder / RECORD}: format version {record['format_version']}, this release reads {FORMAT_VERSION}"
        )
    missing = [layer for layer in layers if layer not in record["layers"] or not layer_file(folder, layer).is_file()]
    there = [layer for layer in record["layers"] if layer_file(folder, layer).is_file()]
    if missing:
        numbers = ",".join(map(str, missing))
        again = command_line("train-verbalizers", "SPEC", "-o", folder.parent, "--layers", numbers)
        of_teacher = "" if _is_of_student(folder) else f"those of a teacher with {again}, "
        raise ModelError(
            f"verbalizers {folder}: none for layers {missing}, there are {there}; name target layers "
            f"that are there, or train the missing ones: {of_teacher}those of a "
            "student in a new distill run that has them in `distill.layers`"
        )
    return record


def load_layer(folder: Path, layer: int, module: nn.Module, architecture: dict[str, Any]) -> None:
    """Put the tensors of one file into `module`, which may be on the meta device; raises ModelError, CacheCorruptError
    for a file that is not what was written."""
    file = layer_file(folder, layer)
    check_layers(folder, [layer])
    try:
        with safe_open(file, framework="pt") as tensors:
            if (tensors.metadata() or {}).get(HEADER_KEY) != _canonical(architecture):
                raise ModelError(f"{file}: its architecture is not the one {RECORD} says; train the verbalizers again")
            state = {name: own_memory(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118 - no mapping
        module.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{file}: cannot be read as a verbalizer of this model: {reason}") from None


def check_layers(folder: Path, layers: Sequence[int]) -> None:
    """Raise CacheCorruptError for the first file that is not what was written, as far as the record has its sum."""
    sums = _read_record(folder).get("files", {})
    for file in (layer_file(folder, layer) for layer in layers):
        if problem := _damage(file, sums):
            raise CacheCorruptError(f"{file} is damaged: its {problem}; {_train_again(folder)}")


def whole_layers(folder: Path) -> list[int]:
    """Layers that the record names and whose files are what was written."""
    if not (folder / RECORD).exists():
        return []
    record = _read_record(folder)
    files = {layer: layer_file(folder, layer) for layer in record["layers"]}
    return [layer for layer, file in files.items() if file.is_file() and not _damage(file, record.get("files", {}))]


def verbalizers_digest(folder: str | Path, layers: Sequence[int]) -> dict[str, str]:
    """sha256 of each layer's file (key: the layer as text), which holds weights and architecture."""
    folder = Path(folder)
    read_record(folder, layers)
    check_layers(folder, layers)
    return {str(layer): hash_of(layer_file(folder, layer), hashlib.sha256)[0] for layer in layers}


def _damage(file: Path, sums: dict[str, Any]) -> str:
    """How a file differs from what was written; empty when it does not, or when the record has no sum of it."""
    return difference_from(sums[file.name], file) if file.name in sums else ""


def _is_of_student(folder: Path) -> bool:
    """Whether a distill run has trained them."""
    return (folder.parent / RUN).is_file() and read_run(folder.parent)["kind"] == "distill"


def _read_record(folder: Path) -> dict[str, Any]:
    return read_verbalizers(folder / RECORD, f"restore it from a copy, or {_train_again(folder)}")


def _train_again(folder: Path) -> str:
    """What makes damaged verbalizers anew."""
    run = folder.parent
    if _is_of_student(folder):
        if read_run(run)["status"] == "done":  # such a run is not trained again in place
            return "train again in another folder"
        if folder.name == EXITS_FOLDER:  # their checkpoint has them
            return f"delete {folder} and run the same command again in {run}"
        return f"delete {folder} and {run / 'checkpoints'} and train again in {run}, or in another folder"
    again = command_line("train-verbalizers", "SPEC", "-o", run)
    return f"run again what has trained it, which takes what it needs from its checkpoint: {again}"


def _canonical(architecture: dict[str, Any]) -> str:
    return json.dumps(architecture, sort_keys=True)
