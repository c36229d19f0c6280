#!/usr/bin/env bash
# What every host of a job runs, the same on all: makes the environment for the accelerator it finds, then
#   python -m hybrid_jax ARGUMENTS
# ACCELERATOR=tpu|cuda|cpu overrides what is found.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
if [ -z "${ACCELERATOR:-}" ]; then
  ACCELERATOR=cpu
  if compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then ACCELERATOR=tpu; fi
  if compgen -G "/dev/nvidia[0-9]*" >/dev/null; then ACCELERATOR=cuda; fi
fi
requirements=(requirements.txt)
[ "$ACCELERATOR" = cpu ] || requirements+=("launch/requirements-$ACCELERATOR.txt")
exec 9>.venv.lock
flock 9 # hosts that share the folder make its environment one after another
make_environment "${requirements[@]}"
flock -u 9
[ "$ACCELERATOR" = cpu ] && export JAX_PLATFORMS=cpu
exec python -m hybrid_jax "$@"
