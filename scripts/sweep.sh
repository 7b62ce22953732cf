#!/usr/bin/env bash
# Run a sweep, by the vlm-pruner-eval of .venv (which is made if need be), or by the one on the PATH where there is no .venv.
# Usage: bash scripts/sweep.sh CONFIG [--output DIR] [--limit N] [--dry-run]
set -euo pipefail
if [[ $# -eq 0 ]]; then
    echo "usage: bash scripts/sweep.sh CONFIG [--output DIR] [--limit N] [--dry-run]" >&2
    exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ ! -d "$root/.venv" ]] && command -v vlm-pruner-eval >/dev/null; then
    exec vlm-pruner-eval sweep "$@"
fi
source "$root/scripts/_venv.bash"
(cd "$root" && ensure_venv)
exec "$root/.venv/bin/vlm-pruner-eval" sweep "$@"
