"""Folders with an adapter: which model it is for, and both as one plain model.

transformers applies an `adapter_config.json` that lies in a model's folder without a word; a folder that holds an
adapter alone names its base.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlsi_cache.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def has_adapter(folder: Path) -> bool:
    """Whether opening this folder as a model applies an adapter."""
    return (folder / CONFIG).is_file()


def is_adapter_alone(folder: Path) -> bool:
    return has_adapter(folder) and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """What the adapter in `folder` is for: a folder (named from there or from here), or a hub id."""
    base = _read(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"adapter {folder}: its {CONFIG} names no `base_model_name_or_path`; write the base's folder in"
        )
    beside = folder / base
    return str(beside.resolve()) if beside.is_dir() else base


def adapter_files(folder: Path) -> dict[str, Path | str]:
    """What decides the adapter, for a digest: its weights, and its settings without where the base lies."""
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"adapter {folder}: no `{WEIGHTS}` beside its {CONFIG}; save it with `save_pretrained` again")
    settings = {key: value for key, value in _read(folder).items() if key != "base_model_name_or_path"}
    return {WEIGHTS: folder / WEIGHTS, CONFIG: json.dumps(settings, sort_keys=True)}


def merged(model: Any, folder: Path) -> Any:
    """The model with the adapter of `folder` folded into its weights; raises ModelError where that is not possible."""
    from peft import PeftModel

    adapter_files(folder)
    kind = _read(folder).get("peft_type")
    adapted = PeftModel.from_pretrained(model, str(folder))
    if not hasattr(adapted, "merge_and_unload"):
        raise ModelError(
            f"adapter {folder}: a `{kind}` cannot be merged into the weights; merge what can be, and name that"
        )
    return adapted.merge_and_unload()


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """A folder of links to all files but the adapter's, so that only the base is loaded."""
    with tempfile.TemporaryDirectory(prefix="vlsi-cache-base-") as plain:
        for file in folder.iterdir():
            if not file.name.startswith("adapter_"):
                (Path(plain) / file.name).symlink_to(file.resolve())
        yield Path(plain)


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{folder / CONFIG} is not a JSON object")
    return found
