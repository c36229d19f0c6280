#!/usr/bin/env bash
# Runs a command on every host of a TPU VM slice, with this folder copied there:
#   ./launch/tpu_vm.sh NAME ZONE prime --config=configs/prime_tiny.py:GKA --workdir=/mnt/shared/run
# The workdir must be one that all hosts see (Filestore, or a bucket mounted by gcsfuse). Needs gcloud.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { echo "usage: $0 NAME ZONE COMMAND [ARGUMENTS]" >&2; exit 2; }
name=$1 zone=$2
shift 2
archive=$(mktemp -d)
trap 'rm -rf "$archive"' EXIT
git archive --format=tar.gz -o "$archive/hybrid_jax.tar.gz" HEAD
gcloud compute tpus tpu-vm scp "$archive/hybrid_jax.tar.gz" "$name:" --zone="$zone" --worker=all
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="mkdir -p hybrid_jax && tar xzf hybrid_jax.tar.gz -C hybrid_jax && cd hybrid_jax && ACCELERATOR=tpu ./launch/host.sh $(printf '%q ' "$@")"
