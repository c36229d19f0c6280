# Sourced by the other scripts: makes a virtual environment at the project's root (ENVIRONMENT, .venv if unset), once for each
# requirements file given, and puts it first on PATH. PYTHON chooses the interpreter (3.11 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
make_environment() {
  local python=${PYTHON:-python3} environment=${ENVIRONMENT:-.venv}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "hybrid_jax needs Python 3.11 or newer; set PYTHON to one" >&2
    return 1
  }
  [ -x "$environment/bin/python" ] || "$python" -m venv "$environment" || return 1
  local requirements stamp
  for requirements in "$@"; do
    stamp=$environment/$(echo "$requirements" | tr / _).installed
    if ! cmp -s "$requirements" "$stamp"; then
      echo "installing $requirements"
      "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" || return 1
      cp "$requirements" "$stamp"
    fi
  done
  export PATH="$PWD/$environment/bin:$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
}
