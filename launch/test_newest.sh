#!/usr/bin/env bash
# Runs the tests on the newest JAX and libraries that pip finds for the newest Python here, in an environment of its own
# (.venv-newest; remove it to resolve the newest versions again). Prints the versions; arguments go to pytest. PYTHON chooses
# the interpreter (3.12 or newer).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
newest_python() {
  local version command
  for version in 3.14 3.13 3.12; do
    # on PATH, where a version manager's command may only say that this version is not chosen; or where managers keep versions
    for command in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python \
      "$HOME/.local/share/uv/python/cpython-$version".*/bin/python; do
      if "$command" -c '' 2>/dev/null; then
        echo "$command"
        return
      fi
    done
  done
  echo python3
}
PYTHON=${PYTHON:-$(newest_python)}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || {
  echo "the newest JAX needs Python 3.12 or newer, and none was found; set PYTHON to one" >&2
  exit 1
}
export PYTHON ENVIRONMENT=.venv-newest
make_environment tests/requirements-newest.txt
export JAX_PLATFORMS=cpu
python - <<'END'
import importlib.metadata as metadata, platform

names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml_collections", "numpy", "libtpu", "transformers", "torch")
print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {metadata.version(name)}" for name in names))
END
exec python -m pytest -n 2 --dist worksteal "$@"
