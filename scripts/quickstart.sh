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
# two processes take one task each: on so small a model more threads in one process gain little
exec "${sweep[@]}" --processes 2
