#!/usr/bin/env bash
# The cache of a teacher that no GPU holds whole: each process of a torchrun holds a piece of every matrix, all run the
# same batches, and the first one writes.
#
#   bash tensor_parallel.sh SPEC CACHE                    one teacher over 8 GPUs: verbalizers, then the cache
#   GPUS=4 LAUNCHES=2 bash tensor_parallel.sh SPEC CACHE VERBALIZERS
#                                                         two teachers of 4 GPUs each, on one machine, build one cache
#
# Qwen2-VL-72B in bf16 over 8 GPUs: 18 GB of weights on each, and its head once more, whole (2.5 GB). The number of GPUs
# of a teacher must divide both its attention heads and its key-value heads (64 and 8).
#
# Several launches of torchrun build one cache, each with its own parts first; one that dies does not end the others, and
# they make what it has left. --rank and --world number the launches, not the processes. Under SLURM, an array of
# machines, each with a launch of its own:
#
#   #SBATCH --array=0-3 --nodes=1 --gpus-per-node=8
#   LAUNCHES=4 LAUNCH=$SLURM_ARRAY_TASK_ID srun bash tensor_parallel.sh SPEC CACHE VERBALIZERS
set -euo pipefail
SPEC=${1:?usage: tensor_parallel.sh SPEC CACHE [VERBALIZERS]}
CACHE=$2
GPUS=${GPUS:-8}
LAUNCHES=${LAUNCHES:-1}
if [[ $# -lt 3 ]]; then
    # Every process trains all verbalizers on the same batches, and the first one saves them.
    torchrun --nproc-per-node "$GPUS" -m vlsi_cache_cli train-verbalizers "$SPEC" -o "$CACHE.verbalizers" \
        --set teacher.parallel=tensor
fi
VERBALIZERS=${3:-$CACHE.verbalizers/verbalizers}

build() { # number of the launch
    torchrun --nproc-per-node "$GPUS" --master-port $((29500 + $1)) -m vlsi_cache_cli build-teacher "$SPEC" -o "$CACHE" \
        --rank "$1" --world "$LAUNCHES" --set teacher.parallel=tensor --set "teacher.verbalizers=$VERBALIZERS"
}

if [[ -n ${LAUNCH:-} ]]; then
    build "$LAUNCH"
    exit
fi
for ((launch = 0; launch < LAUNCHES; launch++)); do
    CUDA_VISIBLE_DEVICES=$(seq -s, $((launch * GPUS)) $((launch * GPUS + GPUS - 1))) build "$launch" &
done
wait
# Files whole, and do the pieces say what is in the cache?
torchrun --nproc-per-node "$GPUS" -m vlsi_cache_cli verify "$CACHE" --recompute 8
