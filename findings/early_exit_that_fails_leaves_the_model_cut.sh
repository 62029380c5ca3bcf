#!/usr/bin/env bash
# `generate(assistant_early_exit=K)` drafts from layer K. GPT-NeoX (and GPT-2, OPT, vision-language models) cannot do that,
# and transformers 5.23.0 raises an error. Most expect the model to be what it was, since nothing of it was asked to
# change. Its configuration has K layers from then on: a plain forward pass with a cache fails, and what is saved from it
# opens as a model of K layers, whose other weights are dropped with a remark in the log. Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 2>/dev/null
"$folder/venv/bin/python" -W ignore - "$folder/saved" <<'PY' 2>/dev/null
import sys
import torch, transformers
from transformers import AutoModelForCausalLM, GPTNeoXConfig

torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(GPTNeoXConfig(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)).eval()
ids = torch.arange(3, 9)[None]
options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

def outcome(call):
    try:
        call()
        return "works"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

before = outcome(lambda: model.generate(ids, **options))
drafted = outcome(lambda: model.generate(ids, assistant_early_exit=1, **options))
after = outcome(lambda: model.generate(ids, **options))
model.save_pretrained(sys.argv[1])
opened = AutoModelForCausalLM.from_pretrained(sys.argv[1])
layers = len(model.gpt_neox.layers), model.config.num_hidden_layers, len(opened.gpt_neox.layers)
print(f"transformers {transformers.__version__}, GPT-NeoX of 4 layers: generate {before}; with assistant_early_exit=1 "
      f"{drafted}; generate again {after}. Layers in memory {layers[0]}, in its configuration {layers[1]}, of the saved "
      f"model {layers[2]}; expected 4, 4 and 4")
raise SystemExit(0 if before == "works" and drafted != "works" and after != "works" and layers == (4, 1, 1) else 1)
PY
