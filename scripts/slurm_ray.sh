#!/usr/bin/env bash
# A Ray cluster inside one Slurm allocation, and a sweep on it, with one worker per GPU (per node, where there are no GPUs):
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=12:00:00 scripts/slurm_ray.sh configs/x.yaml --output /shared/dir
#
# All arguments are those of `vlm-pruner-eval sweep`. The results directory should be one that all nodes see: then a node that
# dies costs no more than the batches that it was at, and its runs go on elsewhere, after 10 minutes without a sign of life of it.
# The same command goes on where an earlier job was stopped. RAY_PORT is the port of the cluster's head; by default it follows
# from the job's number, so that jobs on one node do not meet. Where nodes start one by one, scripts/slurm_array.sh suits better.
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@60
set -euo pipefail
if [[ $# -eq 0 || -z "${SLURM_JOB_ID:-}" ]]; then
    echo "usage: sbatch --nodes=N --gpus-per-node=G scripts/slurm_ray.sh CONFIG --output SHARED_DIR [options of vlm-pruner-eval sweep]" >&2
    exit 2
fi
# Slurm runs a copy of this file: the repository is where it was submitted from
root="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
ray="$root/.venv/bin/ray"
if [[ ! -x "$ray" ]] && ! ray="$(command -v ray)"; then
    echo "Ray is not installed: expected it in $root/.venv or on the PATH; pip install 'vlm-pruner-eval[cluster]'." >&2
    exit 2
fi
export RAY_USAGE_STATS_ENABLED=0
if [[ -z "${RAY_AUTH_MODE:-}" ]]; then  # whoever reaches a cluster can run anything on it: this one answers to this job alone
    RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
fi
mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?is not set; submit this script by sbatch}")
head="${nodes[0]}"  # where this script runs, too
read -r ip _ < <(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address) || {
    echo "srun can't say the address of $head: see its message above." >&2
    exit 1
}
address="$ip:${RAY_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

steps=()
end() {  # the cluster ends with the sweep, however that ends
    trap - EXIT
    kill "${steps[@]}" 2>/dev/null || true
    wait
}
trap end EXIT
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    "$ray" start --head --node-ip-address="$ip" --port="${address##*:}" --include-dashboard=false --block >&2 &
steps+=($!)
for _ in {1..60}; do
    if "$ray" health-check --address "$address" >/dev/null 2>&1; then break; fi
    if ! kill -0 "${steps[0]}" 2>/dev/null; then break; fi
    sleep 2
done
for node in "${nodes[@]:1}"; do  # a step each, so that one that dies leaves the others alone
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" "$ray" start --address="$address" --block >&2 &
    steps+=($!)
done
# in the background and waited for, so that a signal reaches the sweep at once; nodes may join after it has begun
bash "$root/scripts/sweep.sh" --executor ray --address "$address" --processes $((${#nodes[@]} * ${SLURM_GPUS_ON_NODE:-1})) "$@" &
sweep=$!
trap 'kill -TERM "$sweep" 2>/dev/null' TERM INT
code=0
while true; do  # a trap interrupts `wait`, which is then repeated
    wait "$sweep" && code=0 || code=$?
    if ! kill -0 "$sweep" 2>/dev/null; then break; fi
done
exit "$code"
