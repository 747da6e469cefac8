#!/bin/bash
#SBATCH --job-name=specforge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# A training on several machines: sbatch runs/slurm.sh pretrain.py experiment=pretrain_qwen max_steps=20000 ...
# A requeued job runs the same command, which continues from its newest checkpoint. Two minutes
# before the time limit the processes get SIGTERM, save one and end, and the job queues itself again.
# paths.checkpoints and paths.datasets must lie on a file system that all nodes see.
set -u
PYTHON=${PYTHON:-.venv/bin/python}
GPUS=${SLURM_GPUS_ON_NODE:-8}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node="$GPUS" \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$HEAD:29500" "$@" &
job=$!
stopped=
trap 'stopped=1; kill -TERM $job' TERM
wait $job
code=$?
if [ -n "$stopped" ]; then
  wait $job
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit $code
