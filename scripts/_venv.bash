# Sourced by the other scripts, in the repository's root: installs exactly scripts/requirements.lock and this package into .venv, once,
# and again when the lock or setup.cfg changes. PYTHON=/path/to/python3 chooses the interpreter.
# Usage: ensure_venv

LOCK=scripts/requirements.lock
unset PYTHONDONTWRITEBYTECODE  # else every process would compile torch and transformers again

ensure_venv() {
  local wanted python
  wanted="$(cat "$LOCK" setup.cfg pyproject.toml | cksum)"
  if [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then return; fi
  python="$(find_python)" || return
  (
    # of several tasks of a cluster that start at once, one installs
    if command -v flock >/dev/null; then exec 9>.venv.lock; flock 9; fi
    if [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then exit 0; fi
    install_lock "$python" && echo "$wanted" > .venv/installed
  ) && return
  echo "The installation into .venv did not finish, see above. It needs the package index (PyPI or a mirror) once and 7 GB of disk;" \
    "mend what is named there and call this again. What is downloaded is kept." >&2
  return 1
}

install_lock() {  # PYTHON
  echo "Installing the packages of $LOCK into .venv (7 GB with torch for CUDA) ..." >&2
  rm -f .venv/installed
  "$1" -m venv .venv || {
    echo "$1 can't make a virtual environment; install its venv module (Debian, Ubuntu: apt install python3-venv)." >&2
    return 1
  }
  SECONDS=0
  if .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep -o '^uv==[^ ;]*' "$LOCK")"; then
    # the build tools of packages without a wheel are locked, too
    .venv/bin/uv pip install --python .venv/bin/python --no-deps --build-constraints "$LOCK" --requirements "$LOCK" &&
      .venv/bin/uv pip install --python .venv/bin/python --no-deps --no-build-isolation --editable . || return
  else
    echo "uv can't be installed; pip takes its place, which takes longer." >&2
    .venv/bin/python -m pip install --disable-pip-version-check --no-deps --requirement "$LOCK" &&
      .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . || return
  fi
  # fails here rather than in the first sweep; and what is imported is compiled once, not by several processes at a time
  .venv/bin/python -c 'import lmms_eval.models, vlm_pruner_eval.lmms.model, vlm_pruner_eval.report.build
from vlm_pruner_eval import selftest
selftest.run()' 2>&1 | tail -n 1 >&2 || return
  echo "Installed and self-tested in $SECONDS s." >&2
}

find_python() {
  local python
  for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  python="${PYTHON:-python3}"
  echo "Got $("$python" --version 2>&1) at $(command -v "$python"), expected Python 3.10 to 3.13; set PYTHON=/path/to/python3." >&2
  return 2
}

# Another minor of transformers with the hub client and tokenizers that it asks for, laid over .venv in a folder of its own.
# Usage: ensure_transformers 4.57; PYTHONPATH="$OVERLAY" .venv/bin/python ...
ensure_transformers() {
  OVERLAY=".venv/transformers-$1"
  if [ -e "$OVERLAY/installed" ]; then return; fi
  local into=(.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --target "$OVERLAY") companions
  rm -rf "$OVERLAY"
  "${into[@]}" "transformers==$1.*" || return
  mapfile -t companions < <(.venv/bin/python - "$OVERLAY" <<'PYTHON'
import sys
from importlib.metadata import distributions
from packaging.requirements import Requirement

(found,) = distributions(name="transformers", path=sys.argv[1:])
for wanted in map(Requirement, found.requires):
    if wanted.name in ("huggingface-hub", "tokenizers") and wanted.marker is None:
        print(f"{wanted.name}{wanted.specifier}")
PYTHON
  )
  "${into[@]}" "${companions[@]}" && touch "$OVERLAY/installed"
}
