# Settings that matter to a ring on NCCL, each with its reason; sourced by torchrun.sh and slurm.sbatch. A value that is set
# already stays. docs/cluster.md says more, and which settings are left alone on purpose.

# A wrong driver, a missing adapter or a slow path is said once, at the start; INFO also lists every connection.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A ring posts a message per layer and hop, where a plain trainer posts one per bucket: the 2000 events that torch keeps by
# default may be less than one step. Without these the record of a hang begins after its cause.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-20000}"

# One rank that stops is a hang on all the others: when they time out, each writes what it was waiting for.
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# Where to: one file per rank, named by this prefix and the rank; `torchfrtrace DIR` compares them. The folder must exist.
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$PWD/runs/hangs/rank_}"
mkdir -p "$(dirname "$TORCH_FR_DUMP_TEMP_FILE")"

# Told to end, torchrun tells its processes, and kills them after so many seconds (30 by default): a step and a checkpoint must fit.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"

# Packed documents make buffers of other sizes in every batch; growing segments are not left behind as gaps.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# The interpreter: that of a virtual environment in the repository, if there is one.
VENV=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin/python
if [[ ! -x $VENV ]]; then VENV=python3; fi
export PYTHON="${PYTHON:-$VENV}"

# What only you can know; NCCL guesses, and on a machine with several networks it may guess wrong:
# The interface by which ranks find each other. If they cannot, the start of the run hangs.
# export NCCL_SOCKET_IFNAME=eth0
# The adapters that carry hops between nodes: one per GPU, those next to the GPUs, not the one of the storage.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7
# On Ethernet (RoCE) the address type of the adapters; 3 is often RoCE v2, `show_gids` tells. Not for InfiniBand.
# export NCCL_IB_GID_INDEX=3
