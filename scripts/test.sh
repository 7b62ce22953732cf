#!/usr/bin/env bash
# The linter, the type checker, the regression sweep against results/reference/ci.json, and the tests, on exactly the locked packages,
# in .venv.
# Usage: bash scripts/test.sh
#        bash scripts/test.sh --all                 the slow tests, too: sweeps made by several processes or on Ray, whole commands; and
#                                                   many more drawn examples, other ones each time
#        bash scripts/test.sh --oldest              tests of the hook on the oldest supported transformers
#        bash scripts/test.sh --transformers 5.12   the same on another minor
#        bash scripts/test.sh --newest              what releases newer than the locked ones would break, as a table
#        bash scripts/test.sh PYTEST-ARGUMENTS      pytest alone, for example tests/test_hook_exact.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.bash
ensure_venv
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
parallel=(-n 2 --dist loadfile)  # files stay whole: their tests share models

hook_tests() {  # MINOR of transformers
  ensure_transformers "$1"
  export PYTHONPATH="$OVERLAY"
  .venv/bin/python -c 'import sys, transformers; print("transformers", transformers.__version__); sys.exit(not transformers.__version__.startswith(sys.argv[1] + "."))' "$1"
  .venv/bin/python -m pytest "${parallel[@]}" tests/test_hook_*.py tests/test_hf_compat.py tests/test_vlms.py tests/test_vision_probe.py tests/test_prefix.py tests/test_one_generate.py
}

chosen=(-m "not slow")
case "${1:-}" in
  "") ;;
  --all) chosen=(-m "" --hypothesis-profile=deep) ;;
  --oldest) hook_tests 4.57; exit ;;
  --transformers) hook_tests "${2:?expected a minor such as 5.12}"; exit ;;
  --newest) exec .venv/bin/python tests/newest.py "${@:2}" ;;
  *) exec .venv/bin/python -m pytest "$@" ;;
esac
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
output="$(mktemp -d)"
trap 'rm -rf "$output"' EXIT
bash scripts/quickstart.sh "$output/ci" configs/ci.yaml
.venv/bin/vlm-pruner-eval report "$output/ci" --check results/reference/ci.json
.venv/bin/python -m pytest "${parallel[@]}" "${chosen[@]}"
