#!/usr/bin/env bash
# Fine-tune with a recipe on several GPUs of this machine, eight by default. Run the same command again to resume.

#   finetune/run_8gpu.sh wan2.1-14b-sla --precomputed-dir DATA
#   GPUS=2 finetune/run_8gpu.sh wan2.1-1.3b-sla --precomputed-dir DATA
set -euo pipefail
recipe=${1:?usage: run_8gpu.sh RECIPE [OPTION...], such as wan2.1-14b-sla --precomputed-dir DATA}
shift
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "${GPUS:-8}" \
	-m dit_accel.finetune --config "$recipe" "$@"
