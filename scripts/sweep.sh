#!/usr/bin/env bash
# Run a sweep: bash scripts/sweep.sh CONFIG [--output DIR] [--limit N] [--dry-run]
set -euo pipefail
if [[ $# -eq 0 ]]; then
    echo "usage: bash scripts/sweep.sh CONFIG [--output DIR] [--limit N] [--dry-run]" >&2
    exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -x "$root/.venv/bin/vlm-pruner-eval" ]]; then
    exec "$root/.venv/bin/vlm-pruner-eval" sweep "$@"
elif command -v vlm-pruner-eval >/dev/null; then
    exec vlm-pruner-eval sweep "$@"
fi
echo "vlm-pruner-eval is not installed: expected it in $root/.venv or on the PATH; 'bash scripts/quickstart.sh' creates it." >&2
exit 2
