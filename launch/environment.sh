# Sourced by the other scripts: makes .venv at the project's root, once for each requirements file given,
# and puts it first on PATH. PYTHON chooses the interpreter (3.11 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
make_environment() {
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "hybrid_jax needs Python 3.11 or newer; set PYTHON to one" >&2
    return 1
  }
  [ -x .venv/bin/python ] || "$python" -m venv .venv || return 1
  local requirements stamp
  for requirements in "$@"; do
    stamp=.venv/$(echo "$requirements" | tr / _).installed
    if ! cmp -s "$requirements" "$stamp"; then
      echo "installing $requirements"
      .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" || return 1
      cp "$requirements" "$stamp"
    fi
  done
  export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
}
