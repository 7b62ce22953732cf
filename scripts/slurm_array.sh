#!/usr/bin/env bash
# One shard of a sweep per task of a Slurm array, over a results directory that all nodes share:
#
#   sbatch --array=1-8 --gpus-per-task=1 --time=12:00:00 scripts/slurm_array.sh configs/x.yaml --output /shared/dir
#
# All arguments are those of `vlm-pruner-eval sweep`; --output is needed. Tasks may start late, be killed or be requeued: a run
# belongs to the task that claims it, and the same command line goes on from its last whole batch. The task that makes the last
# run writes the report; if that one was killed, submit again, or: vlm-pruner-eval report /shared/dir
# A task that was killed with its node holds its run for 10 minutes; the others leave it alone for so long.
#SBATCH --ntasks=1
#SBATCH --signal=TERM@60
set -euo pipefail
if [[ $# -eq 0 || -z "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    echo "usage: sbatch --array=1-N scripts/slurm_array.sh CONFIG --output SHARED_DIR [options of vlm-pruner-eval sweep]" >&2
    exit 2
fi
step="${SLURM_ARRAY_TASK_STEP:-1}"
shard=$(((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-1}) / step + 1))
# Slurm runs a copy of this file: the repository is where it was submitted from
sweep="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}/scripts/sweep.sh"
exec bash "$sweep" "$@" --shard "$shard/${SLURM_ARRAY_TASK_COUNT:?is not set; submit with --array=1-N}"
