#!/usr/bin/env bash
# The main job on a fresh machine: installs into .venv, then prunes a real (trained) LLaVA under the stock lmms-eval and
# prints the table. Model and data are in the package: no hub, no download but pip's.
# Usage: bash scripts/quickstart.sh [--full] [OUTPUT_DIR [CONFIG]]
#   --full   every run by itself: the same scores, three times as long, with times
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
full=
if [ "${1:-}" = --full ]; then
  full=yes
  shift
fi
source "$root/scripts/_venv.bash"
(cd "$root" && ensure_venv)
sweep=("$root/.venv/bin/vlm-pruner-eval" sweep "${2:-$root/configs/quickstart.yaml}" --output "${1:-$root/output/quickstart${full:+_full}}")
echo "Loading torch, transformers and lmms-eval (15 s, longer the first time) ..." >&2
cores="$(getconf _NPROCESSORS_ONLN)"
if [ -n "$full" ]; then exec "${sweep[@]}" --no-share-prefix; fi
if [ -n "${2:-}" ] || [ "$cores" -lt 2 ] || command -v nvidia-smi >/dev/null; then exec "${sweep[@]}"; fi
# two processes answer half of the questions each: on so small a model more threads in one process gain little
export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT="$((20000 + RANDOM % 10000))" OMP_NUM_THREADS="$((cores / 2))"
log="$(mktemp)"
set -m  # in groups of their own, so that Ctrl-C reaches them through this script alone
RANK=1 "${sweep[@]}" >"$log" 2>&1 &
second="$!"
RANK=0 "${sweep[@]}" &
first="$!"
set +m
trap 'kill -INT "$first" "$second" 2>/dev/null || true' INT
trap 'kill -TERM "$first" "$second" 2>/dev/null || true' TERM
trap 'kill -TERM "$second" 2>/dev/null || true; rm -f "$log"' EXIT
while kill -0 "$first" 2>/dev/null && kill -0 "$second" 2>/dev/null; do sleep 1; done
if kill -0 "$first" 2>/dev/null && ! wait "$second"; then
  sleep 5  # what both processes meet is said by the first one
  if kill -TERM "$first" 2>/dev/null; then
    echo "The second of the two processes ended early; it said:" >&2
    tail -n 3 "$log" >&2
  fi
fi
code=0
wait "$first" || code="$?"
exit "$code"
