#!/usr/bin/env bash
# Makes scripts/requirements.lock from setup.cfg, one file for Python 3.10 to 3.13 on all platforms. Versions that are locked stay
# as far as setup.cfg lets them; --upgrade takes the newest of everything, --upgrade-package NAME of one.
# Usage: bash scripts/relock.sh [--upgrade] [--upgrade-package NAME[==VERSION]] ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv=.venv/bin/uv
if [ ! -x "$uv" ]; then uv="$(command -v uv)" || { echo "uv is needed: pip install uv, or call scripts/test.sh once." >&2; exit 2; }; fi
"$uv" pip compile --quiet --universal --python-version 3.10 --prerelease disallow --extra test --extra cluster \
  --annotation-style line --custom-compile-command "bash scripts/relock.sh" --output-file scripts/requirements.lock "$@" setup.cfg
