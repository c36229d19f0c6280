#!/usr/bin/env bash
# A Slurm job of one process a node, each with all of its GPUs; from a folder that all nodes see:
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh prime --config=configs/prime_tiny.py:GKA --workdir=runs/mine
#SBATCH --job-name=hybrid_jax
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@120
# Two minutes before the end every process gets SIGTERM: the run saves, and the same command resumes it.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch [OPTIONS] $0 COMMAND [ARGUMENTS]" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
exec srun --kill-on-bad-exit=1 ./launch/host.sh "$@"
