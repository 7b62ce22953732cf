#!/usr/bin/env bash
# A sweep by the tasks of a Slurm array, over a results directory that all nodes share: each runs the same command.
#
#   sbatch --array=1-8 --gpus-per-task=1 --time=12:00:00 scripts/slurm_array.sh configs/x.yaml --output /shared/dir
#
# All arguments are those of `vlm-pruner-eval sweep`; --output is needed. Tasks may start late, be killed or be requeued: a unit of
# work belongs to the task that holds its lock, and the same command goes on from its last whole batch. The task that finds nothing
# left writes the report; if that one was killed, submit again, or: vlm-pruner-eval report /shared/dir
#SBATCH --ntasks=1
#SBATCH --signal=TERM@60
set -euo pipefail
if [[ $# -eq 0 || -z "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    echo "usage: sbatch --array=1-N scripts/slurm_array.sh CONFIG --output SHARED_DIR [options of vlm-pruner-eval sweep]" >&2
    exit 2
fi
# Slurm runs a copy of this file: the repository is where it was submitted from
exec bash "${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}/scripts/sweep.sh" "$@"
