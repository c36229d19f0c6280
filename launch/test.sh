#!/usr/bin/env bash
# Makes the environment, checks style and types, and runs the tests in two processes; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
make_environment requirements.txt tests/requirements.txt
export JAX_PLATFORMS=cpu
ruff check .
ruff format --check .
pyright
exec python -m pytest -n 2 --dist worksteal "$@"
