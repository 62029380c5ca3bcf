#!/usr/bin/env bash
# A student that is too large for one GPU with its gradients and moments: 8 GPUs hold a share each of every decoder layer
# (torch's FSDP2). Losses, matches and the student are those of one process; stop it, and go on with another number.
set -euo pipefail
CACHE=${1:?usage: sharded_student.sh CACHE STUDENT RUN}
STUDENT=$2
RUN=$3

# All weights train in fp32. The host holds the whole student once for each process while it is loaded.
torchrun --nproc-per-node "${GPUS:-8}" -m vlsi_cache_cli distill "$CACHE" --student "$STUDENT" -o "$RUN" \
    --set run.parallel=fsdp --set distill.sft.mode=full --set distill.gradient_checkpointing=true \
    --set distill.batch_size=64 --set distill.micro_batch_size=2
