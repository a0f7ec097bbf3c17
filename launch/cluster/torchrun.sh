#!/usr/bin/env bash
# Train on all GPUs of one machine; without GPUs, on two processes of its CPU.
#
#     launch/cluster/torchrun.sh launch/train.py --check
#     launch/cluster/torchrun.sh launch/finetune_hf.py --data 2 --context 4 --engine fsdp
#     PROCESSES=2 launch/cluster/torchrun.sh launch/train.py --device cpu
#
#     RESTARTS=3 launch/cluster/torchrun.sh launch/train.py --save-every 50
#
# PROCESSES is one per GPU by default, PYTHON the interpreter; RESTARTS is how often all processes are started again after one
# has died, from the newest checkpoint (default: 0). Whatever stands behind the script are its options.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [[ $# -eq 0 || $1 == -* ]]; then
    echo "usage: launch/cluster/torchrun.sh SCRIPT [OPTIONS OF THE SCRIPT]; as in launch/train.py --check" >&2
    exit 2
fi

source "$HERE/settings.sh"
# As torch counts them: those of CUDA_VISIBLE_DEVICES alone.
PROCESSES=${PROCESSES:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')}
# Planning and reading run on the CPU: torchrun would give each process one thread, and more than the cores in sum is slower.
CORES=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES > PROCESSES ? CORES / PROCESSES : 1))}"

# USR1 is for the processes, which stop with a checkpoint; it would end their launcher.
trap "" USR1
# --standalone: a free port of this machine, so that two runs on it do not meet.
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$PROCESSES" --max-restarts "${RESTARTS:-0}" "$@"
