#!/usr/bin/env bash
# Aya Vision is a vision tower beside a Cohere2 language model, whose logits are multiplied by `logit_scale` (0.25 in the
# released models). Most would expect text without a picture to get the same logits from both classes over the same
# weights. In transformers 5.23.0 the vision-language class leaves the factor out: its logits are 1 / logit_scale times
# those of the language model, so log-probs, temperatures and distilled targets differ. Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 2>/dev/null
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch, transformers
from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, Cohere2ForCausalLM

SCALE = 0.25
text = dict(vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, logit_scale=SCALE, initializer_range=0.3,
            bos_token_id=1, eos_token_id=2, pad_token_id=0)
vision = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
              num_attention_heads=2, image_size=8, patch_size=4)
torch.manual_seed(0)
whole = AyaVisionForConditionalGeneration(
    AyaVisionConfig(vision_config=vision, text_config={"model_type": "cohere2", **text}, image_token_id=119)).eval()
alone = Cohere2ForCausalLM(Cohere2Config(**text)).eval()
alone.model.load_state_dict(whole.get_decoder().state_dict())
alone.lm_head.load_state_dict(whole.get_output_embeddings().state_dict())

ids = torch.tensor([[5, 17, 33, 64, 90, 2]])
with torch.no_grad():
    one, other = whole(input_ids=ids).logits, alone(input_ids=ids).logits
ratio = (one / other)[other.abs() > 0.01]  # the padding token has a row of zeros
apart = (one.log_softmax(-1) - other.log_softmax(-1)).abs().max().item()
print(f"transformers {transformers.__version__}: text-only logits of AyaVisionForConditionalGeneration over those of "
      f"Cohere2ForCausalLM: {ratio.min():.4f} to {ratio.max():.4f}; expected 1, logit_scale is {SCALE}")
print(f"largest difference of a log-prob: {apart:.2f} nats")
raise SystemExit(0 if torch.allclose(other, one * SCALE, atol=1e-5) else 1)
PY
