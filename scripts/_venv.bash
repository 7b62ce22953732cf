# Sourced by the other scripts: makes .venv in the repository once, and again when the dependencies change.
# Usage: ensure_venv [EXTRA]     EXTRA: an extra of setup.cfg, for example "test"

ensure_venv() {
  local extra="${1:-core}" python="${PYTHON:-python3}" spec what="."
  spec="$(cat setup.cfg pyproject.toml | cksum)"
  if [ "$(cat ".venv/installed-$extra" 2>/dev/null)" = "$spec" ]; then return; fi
  if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))'; then
    echo "Got $("$python" --version 2>&1) at $(command -v "$python"), expected Python 3.10 to 3.13; set PYTHON=/path/to/python3." >&2
    return 2
  fi
  echo "Installing into .venv (torch and its companions: about 5 GB, a few minutes) ..." >&2
  if [ "$extra" != core ]; then what=".[$extra]"; fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$what"
  echo "$spec" > ".venv/installed-$extra"
  echo "$spec" > .venv/installed-core  # an extra comes on top of everything else
}

# The oldest supported transformers, laid over .venv in a folder of its own: everything else stays the same.
# Usage: ensure_oldest; PYTHONPATH="$OLDEST" .venv/bin/python ...
OLDEST=.venv/transformers-4.57
ensure_oldest() {
  local wanted="transformers==4.57.* huggingface-hub>=0.34,<1 tokenizers>=0.22,<0.23"
  if [ "$(cat "$OLDEST/installed" 2>/dev/null)" = "$wanted" ]; then return; fi
  rm -rf "$OLDEST"
  # shellcheck disable=SC2086  # three requirements
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$OLDEST" $wanted
  echo "$wanted" > "$OLDEST/installed"
}
