#!/bin/bash
# Several nodes: srun starts one torchrun on each node, and each torchrun starts one process per GPU.
#
#   sbatch recipes/slurm/multi_node.sh -m recipes.arithmetic --output_dir outputs/arithmetic
#
# Submit it from the repository's root, with your Python environment active. All nodes must see the
# output directory under the same path: every process reads the gradients there.
# On nodes without GPUs set PROCESSES_PER_NODE, and ACCELERATE_USE_CPU=true.
#SBATCH --job-name=auxselect
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%j.out
set -euo pipefail

processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:?no GPUs on this node; set PROCESSES_PER_NODE}}
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000)) # differs from job to job, in case two share a node

# Since Slurm 22.05, srun does not inherit --cpus-per-task from sbatch.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$processes" \
  --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first_node:$port" "$@"
