"""README.md in a trained student's folder: what it is, and whether plain transformers can draft from its layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .load import first_line, quiet
from .traversal_files import CARD

NUM_NEW = 4  # tokens that are tried
OURS = "`vlsi-cache generate SPEC --model RUN --draft-exit K` (RUN: the folder that this one was written in)"


def write_card(model: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the card of a student without traversed layers into `folder`; `facts` are those of its record."""
    made = "".join(f"- {name}: `{value}`\n" for name, value in facts.items())
    (folder / CARD).write_text(f"# A student trained with vlsi-cache\n\n{made}\n{_drafts(model)}\n", encoding="utf-8")


def _drafts(model: Any) -> str:
    if problem := why_no_early_exit(model):
        return (
            "Its layers cannot draft in plain transformers: `generate(..., assistant_early_exit=K)` was tried when "
            f"this folder was written, and {problem}. A call that ends so can leave the model in memory with fewer "
            f"layers: load it again. {OURS} drafts from the layers of many more families."
        )
    deepest = model.config.get_text_config().num_hidden_layers - 1
    return (
        f"Its layers can draft in plain transformers: `generate(..., assistant_early_exit=K)`, K from 1 to {deepest}, "
        f"gives the text of greedy decoding, one text at a time (tried with layer 1 and {NUM_NEW} tokens when this "
        "folder was written; other numbers are not refused there). A layer is read by the model's own norm and head. "
        f"{OURS} reads it by the exits of the run, if it has any, and takes several texts at once."
    )


@torch.no_grad()
def why_no_early_exit(model: Any) -> str:
    """What goes wrong when transformers drafts from layer 1 of this model; empty where the text stays what it was."""
    base = getattr(model, model.base_model_prefix, model)
    configs = {id(one): one for one in (model.config, model.config.get_text_config(), base.config)}
    depths = {key: one.num_hidden_layers for key, one in configs.items() if hasattr(one, "num_hidden_layers")}
    if model.config.get_text_config().num_hidden_layers < 2:
        return "there is no layer below the last one"
    ids = torch.arange(1, 5, device=model.device)[None]
    options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False, "num_beams": 1}
    options |= {"attention_mask": torch.ones_like(ids), "output_scores": False, "return_dict_in_generate": False}
    try:
        with quiet():
            greedy, drafted = (model.generate(ids, **options, **more) for more in ({}, {"assistant_early_exit": 1}))
    except Exception as error:  # families fail in many ways
        return f"it ended with `{type(error).__name__}: {first_line(error)}`"
    finally:
        for key, depth in depths.items():  # where it fails it can leave the model cut
            configs[key].num_hidden_layers = depth
    return "" if torch.equal(greedy, drafted) else "its text was another one"
