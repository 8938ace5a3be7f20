# shellcheck shell=bash
# What the launch scripts share: finding a Python that has vLLM; launcher.py does the rest.

LAUNCH_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

# has_vllm COMMAND: whether it is a Python with vLLM and what this service needs.
has_vllm() {
  "$@" -c 'import sys; from importlib.util import find_spec as find
sys.exit(not (find("vllm") and find("msgspec") and find("nats")))' >/dev/null 2>&1
}

# The environment that is active, else the one that `make venv` has set up.
find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3 python "$LAUNCH_ROOT/.venv/bin/python"; do
    if has_vllm "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  cat >&2 <<MESSAGE
No Python with vLLM and this package was found. One of these helps:
  pip install $LAUNCH_ROOT          into the active environment, which has vLLM
  make -C $LAUNCH_ROOT venv         sets up .venv with vLLM for CPUs
  PYTHON=/path/to/python $0
MESSAGE
  return 1
}

# launch SCRIPT ARGUMENT...: become the program that starts and stops everything.
launch() {
  local python argument
  for argument in "$@"; do
    if [[ $argument == --help || $argument == -h ]]; then
      exec "${PYTHON:-python3}" "$LAUNCH_ROOT/deploy/launch/launcher.py" "$@"
    fi
  done
  python=$(find_python)
  export PYTHONPATH="$LAUNCH_ROOT:$LAUNCH_ROOT/connectors:$LAUNCH_ROOT/schemas${PYTHONPATH:+:$PYTHONPATH}"
  exec "$python" "$LAUNCH_ROOT/deploy/launch/launcher.py" "$@"
}
