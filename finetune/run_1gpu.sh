#!/usr/bin/env bash
# Fine-tune with a recipe on one GPU. Run the same command again to resume an interrupted run.
#   finetune/run_1gpu.sh wan2.1-1.3b-sla --precomputed-dir DATA
set -euo pipefail
recipe=${1:?usage: run_1gpu.sh RECIPE [OPTION...], such as wan2.1-1.3b-sla --precomputed-dir DATA}
shift
exec "${PYTHON:-python}" -m dit_accel.finetune --config "$recipe" "$@"
