#!/usr/bin/env bash
# The linter, the regression sweep against results/reference/ci.json, all tests, and the tests of the hook once more on the
# oldest supported transformers. Installs what it needs into .venv.
# Usage: bash scripts/test.sh [pytest arguments]     (with arguments: pytest only)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.bash
ensure_venv test
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ "$#" -gt 0 ]; then
  exec .venv/bin/python -m pytest "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
output="$(mktemp -d)"
trap 'rm -rf "$output"' EXIT
bash scripts/quickstart.sh "$output/ci" configs/ci.yaml
.venv/bin/vlm-pruner-eval report "$output/ci" --check results/reference/ci.json
parallel=(-n 2 --dist loadfile)  # files stay whole: their tests share models
.venv/bin/python -m pytest "${parallel[@]}"
ensure_oldest
PYTHONPATH="$OLDEST" .venv/bin/python -c 'import transformers as t; assert t.__version__.startswith("4.57."), t.__version__'
PYTHONPATH="$OLDEST" .venv/bin/python -m pytest "${parallel[@]}" tests/test_hook_*.py tests/test_vlms.py
