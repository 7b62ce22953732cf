#!/usr/bin/env bash
# The main job on a fresh machine: installs into .venv, then prunes a real (trained) LLaVA under the stock lmms-eval and
# prints the table. Model and data are in the package: no hub, no download but pip's.
# Usage: bash scripts/quickstart.sh [OUTPUT_DIR [CONFIG]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.bash
ensure_venv
exec .venv/bin/vlm-pruner-eval sweep "${2:-configs/quickstart.yaml}" --output "${1:-output/quickstart}"
