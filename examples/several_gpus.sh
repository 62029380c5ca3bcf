#!/usr/bin/env bash
# A student on several GPUs: all processes hold the whole student and share every batch, so the result is that of one.
# One machine with 8 GPUs; several machines start the same line, each with its NODE, and see the same files.
set -euo pipefail
CACHE=${1:?usage: several_gpus.sh CACHE STUDENT RUN}
STUDENT=$2
RUN=$3
GPUS=${GPUS:-8}
NODES=${NODES:-1}
WHERE=(--nproc-per-node "$GPUS")
if ((NODES > 1)); then
    WHERE+=(--nnodes "$NODES" --node-rank "${NODE:-${SLURM_NODEID:?set NODE to 0, 1, ...}}")
    WHERE+=(--master-addr "${HEAD:?set HEAD to the name of the first machine}" --master-port "${PORT:-29500}")
fi

# 64 samples a step in micro-batches of 2: the number of micro-batches must be a multiple of that of the processes.
torchrun "${WHERE[@]}" -m vlsi_cache_cli distill "$CACHE" --student "$STUDENT" -o "$RUN" \
    --set distill.batch_size=64 --set distill.micro_batch_size=2
