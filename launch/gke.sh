#!/usr/bin/env bash
# Submits a command to a GKE cluster of TPU slices by XPK, one process per host:
#   ./launch/gke.sh CLUSTER v5p-128 WORKLOAD prime --config=configs/prime_tiny.py:GKA --workdir=/data/run
# XPK puts this folder into an image on BASE_IMAGE (python:3.12). Needs xpk and docker.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 4 ] || { echo "usage: $0 CLUSTER TPU_TYPE WORKLOAD COMMAND [ARGUMENTS]" >&2; exit 2; }
cluster=$1 type=$2 workload=$3
shift 3
exec xpk workload create --cluster "$cluster" --tpu-type "$type" --workload "$workload" --num-slices "${SLICES:-1}" \
  --base-docker-image "${BASE_IMAGE:-python:3.12}" --script-dir . \
  --command "ACCELERATOR=tpu ./launch/host.sh $(printf '%q ' "$@")"
