#!/usr/bin/env bash
# Primes a small Transformer into a hybrid on this machine's CPU: about 8 minutes on two cores.
# Run it again to resume what was interrupted or to see the results of what is done. RUNS chooses the
# directory of the results (runs/quickstart).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
make_environment requirements.txt
export JAX_PLATFORMS=cpu
runs=${RUNS:-runs/quickstart}
hybrid() {
  local begin=$SECONDS
  python -m hybrid_jax "$@"
  echo "-- $1: $((SECONDS - begin)) s"
}

hybrid prime --config=configs/prime_tiny.py:GKA --workdir="$runs/gka"
pattern=$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['pattern'].replace('GKA', 'SWA'))" "$runs/gka/selection.json")
hybrid prime --config=configs/prime_tiny.py:SWA --workdir="$runs/swa" --config.pattern="$pattern"
[ -d "$runs/hybrid" ] || hybrid export "$runs/gka" "$runs/hybrid"
hybrid evaluate --model source=launch/tiny_qwen3 --run "GKA=$runs/gka" --run "SWA=$runs/swa" --out "$runs" \
  --prompt $'def read_file(path, encoding="utf-8"):\n    """'
echo "hybrid model: $runs/hybrid; $SECONDS s in all"
