#!/usr/bin/env bash
# The demo step by step, offline, on two CPU cores: what `vlsi-cache demo` does for one seed and one recipe.
set -euo pipefail
OUT=${1:-demo-steps}

vlsi-cache plan demo
vlsi-cache build-teacher demo -o "$OUT/cache"
vlsi-cache verify "$OUT/cache"
vlsi-cache sample "$OUT/cache" train-0-000000
vlsi-cache init-student package:vlsi_cache/demo/teacher --layers 0-1,6-7 -o "$OUT/student"
vlsi-cache distill "$OUT/cache" --student "$OUT/student" --recipe vlsi -o "$OUT/run"
vlsi-cache evaluate "$OUT/run"
vlsi-cache match "$OUT/run"
echo "report: $OUT/run/report.html"
