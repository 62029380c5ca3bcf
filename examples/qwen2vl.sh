#!/usr/bin/env bash
# The paper's setting: Qwen2-VL-72B teaches Qwen2-VL-2B. ROWS is a Parquet or JSONL file of chat rows with images.
# Three kinds of machines: the first two commands want the teacher's GPUs, verify wants none, distill a small GPU.
set -euo pipefail
ROWS=${1:?usage: qwen2vl.sh ROWS.parquet [OUT]}
OUT=${2:-qwen2vl}
DATA=(--set data.path="$ROWS")

vlsi-cache plan qwen2-vl-72b-to-2b "${DATA[@]}" --gpu H100
vlsi-cache train-verbalizers qwen2-vl-72b-to-2b "${DATA[@]}" -o "$OUT/verbalizers"
# Start this line on as many nodes as there are; they share nothing but the folder, and each goes on after a kill.
vlsi-cache build-teacher qwen2-vl-72b-to-2b "${DATA[@]}" -o "$OUT/cache" \
    --set teacher.verbalizers="$OUT/verbalizers/verbalizers"
vlsi-cache verify "$OUT/cache"
vlsi-cache distill "$OUT/cache" --student Qwen/Qwen2-VL-2B-Instruct -o "$OUT/run"
vlsi-cache match "$OUT/run"
