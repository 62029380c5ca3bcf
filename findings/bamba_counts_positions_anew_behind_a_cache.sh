#!/usr/bin/env bash
# Without `position_ids`, models of transformers count on from the length of the cache that they are given: most would
# not pass positions when they go on from the cache of a prompt. Bamba in transformers 5.23.0 begins at 0 again there,
# for one token as for several; no error, no warning, logits off by units. With explicit positions it is right.
# (`generate` passes them, so plain generation is right too.) Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 2>/dev/null
"$folder/venv/bin/python" -W ignore - <<'PY' 2>/dev/null
import torch, transformers
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM

common = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=128)
mamba = dict(attn_layer_indices=[1, 3], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
             mamba_expand=2, mamba_chunk_size=8)
ids = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(0))

def off(model, **given):
    """The largest difference of a logit of the last token behind a cached prompt from one pass over everything."""
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    last = model(ids[:, -1:], past_key_values=cache, use_cache=True, **given).logits
    return (last[:, -1] - model(ids, use_cache=False).logits[:, -1]).abs().max().item()

torch.manual_seed(0)
bamba, llama = BambaForCausalLM(BambaConfig(**common, **mamba)).eval(), LlamaForCausalLM(LlamaConfig(**common)).eval()
with torch.no_grad():
    found = {"Llama": off(llama), "Bamba": off(bamba), "Bamba with positions": off(bamba, position_ids=torch.tensor([[23]]))}
print(f"transformers {transformers.__version__}: off by " + ", ".join(f"{value:.1e} ({name})" for name, value in found.items()))
is_so = found["Llama"] < 1e-4 and found["Bamba with positions"] < 1e-4 and found["Bamba"] > 0.1
raise SystemExit(0 if is_so else 1)
PY
