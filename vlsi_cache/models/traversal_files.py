"""Folders of students whose layers are traversed, which plain transformers must not open as plain models.

It would leave the gates out and say so in a line of its log. So `config.json` has a `model_type` that transformers does
not know and shows in its error, with the loader that does; and the weights have another name than it looks for, for
who calls the class of the backbone itself. Tokenizer and processor open as ever.

FOLDER/config.json           the backbone's, but for `model_type`; KEY has that, and the settings of the traversal
FOLDER/traversed.safetensors the backbone's weights (or traversed.safetensors.index.json, and the files it names)
FOLDER/gates.safetensors     the gates, fp32
FOLDER/README.md             what plain transformers cannot do with it
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlsi_cache.config.training import TraversalSpec
from vlsi_cache.errors import ModelError
from vlsi_cache.run_files import read_object

from .traversal import GATES, Traversal, add_traversal, traversal_of

KEY = "vlsi_cache_traversal"
OPEN_WITH = "open it with `vlsi_cache.load_student(FOLDER)`: plain transformers would leave the gates out"
RENAMED = {
    "traversed.safetensors": "model.safetensors",
    "traversed.safetensors.index.json": "model.safetensors.index.json",
}
GATES_FILE, CARD = "gates.safetensors", "README.md"
DAMAGED = "copy the folder again"
NOT_OF_A_MODEL = {"schedule", "gate_init"}  # settings of its training

_views: dict[tuple[str, int], "tempfile.TemporaryDirectory[str]"] = {}  # until the process ends


def traversal_in(folder: Path) -> TraversalSpec | None:
    """The settings of a folder of a traversed student; None for any other folder. Raises ModelError."""
    file = folder / "config.json"
    if not file.is_file() or KEY.encode() not in file.read_bytes():
        return None
    found: Any = read_object(file, DAMAGED).get(KEY)
    try:
        return TraversalSpec.model_validate({name: one for name, one in found.items() if name != "model_type"})
    except (ValidationError, AttributeError) as error:
        raise ModelError(f"{file}: `{KEY}` does not say how layers are traversed", hint=DAMAGED) from error


def plain_view(folder: Path) -> Path:
    """A folder of links in which transformers finds the backbone alone; the folder itself of any other model."""
    if traversal_in(folder) is None:
        return folder
    there = {file.name for file in folder.iterdir()}
    if GATES_FILE not in there or not any(name in there for name in RENAMED):
        missing = GATES_FILE if GATES_FILE not in there else " or ".join(RENAMED)
        raise ModelError(f"{folder}: a student with traversed layers, and its `{missing}` is missing", hint=DAMAGED)
    key = (str(folder.resolve()), (folder / "config.json").stat().st_mtime_ns)
    if key not in _views:
        _views[key] = tempfile.TemporaryDirectory(prefix="vlsi-cache-student-")
        view = Path(_views[key].name)
        for file in folder.iterdir():
            if file.name not in ("config.json", GATES_FILE, CARD):
                (view / RENAMED.get(file.name, file.name)).symlink_to(file.resolve())
        config = read_object(folder / "config.json", DAMAGED)
        config["model_type"] = config.pop(KEY)["model_type"]
        (view / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return Path(_views[key].name)


def identity_of(folder: Path) -> list[Path | str]:
    """What beside the backbone decides a traversed student: the file of its gates, and its settings; of others none."""
    settings = traversal_in(folder)
    if settings is None:
        return []
    return [folder / GATES_FILE, json.dumps(settings.model_dump(mode="json", exclude=NOT_OF_A_MODEL), sort_keys=True)]


def with_gates(model: Any, folder: Path) -> Any:
    """The backbone of `folder` with its layers traversed, by the gates that were trained."""
    settings = traversal_in(folder)
    assert settings is not None
    state, found = add_traversal(model, settings), load_file(folder / GATES_FILE)
    wanted = state.gates.state_dict()
    if {name: one.shape for name, one in found.items()} != {name: one.shape for name, one in wanted.items()}:
        raise ModelError(f"{folder / GATES_FILE}: its gates are not those of this model", hint=DAMAGED)
    state.gates.load_state_dict(found)
    return model


def save_traversed(model: Any, folder: Path, **options: Any) -> None:
    """Write a model whose layers are traversed into `folder`; `options` as transformers' `save_pretrained` has them."""
    state = traversal_of(model)
    assert state is not None
    weights = {name: one for name, one in model.state_dict().items() if f"{GATES}." not in name}
    model.save_pretrained(folder, state_dict=weights, **options)
    gates = {name: one.detach().float().cpu().contiguous() for name, one in state.gates.state_dict().items()}
    save_file(gates, folder / GATES_FILE)
    for name, plain in RENAMED.items():
        if (folder / plain).is_file():
            os.rename(folder / plain, folder / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    config[KEY] = {"model_type": kind, **state.settings.model_dump(mode="json", exclude={"schedule"})}
    config["model_type"] = f"{kind} whose layers are traversed; {OPEN_WITH}"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(_card(kind, state), encoding="utf-8")


def to_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model in another dtype, but for its gates."""
    state = traversal_of(model)
    kept: dict[str, Tensor] = {} if state is None else {k: v.clone() for k, v in state.gates.state_dict().items()}
    model.to(dtype)
    if state is not None:
        state.gates.float().load_state_dict(kept)
    return model


def _card(kind: str, state: Traversal) -> str:
    settings = state.settings
    where = "of the prompt" if settings.mode == "prompt" else "of prompt and answer"
    return f"""# A `{kind}` whose decoder layers run {settings.num_passes} times

For tokens {where}, each decoder layer runs again on its own output, and a gate mixes the passes (TroL,
arXiv 2406.12246). Plain transformers knows no such model: `from_pretrained` of this folder fails on purpose, since it
would leave the gates out and answer as a model that was never trained. Nothing here runs code of its own.

```python
import vlsi_cache as vc

model = vc.load_student("this/folder")  # a transformers model: model.generate(...) as ever
```

- `generate` may be greedy, sampled, with beams, with prompt lookup (`prompt_lookup_num_tokens`), padded on the left,
  without a cache; the whole prompt comes in one call: `prefill_chunk_size` and an earlier turn's `past_key_values` are
  refused.
- A call of the model by itself takes what comes on an empty cache for prompt.
- Static caches, `torch.compile` of the layers, GGUF and other engines do not know the gates.
- Settings: `{json.dumps(settings.model_dump(mode="json", exclude=NOT_OF_A_MODEL))}`
"""
