#!/usr/bin/env bash
# Breaks sweeps in every way that the world does (kills, power cuts, full disks, damaged logs, too little memory) and shows that
# nothing is lost, doubled or different afterwards. Takes a quarter of an hour of processor time; the last line is a JSON summary.
# Small file systems are tried where they may be mounted (as root). Installs what it needs into .venv.
# Usage: bash scripts/fault_campaign.sh [--seed N] [--lanes N] [--only SECTION ...]
#        bash scripts/fault_campaign.sh ray [--seed N] [--workers N] [--nodes N]    (kills workers and nodes of a Ray cluster)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.bash
ensure_venv
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
campaign=fault_campaign
if [ "${1:-}" = ray ]; then campaign=ray_campaign; shift; fi
exec .venv/bin/python "tests/$campaign.py" "$@"
