#!/usr/bin/env bash
# Primes a small Transformer into a hybrid on this machine's CPU: about 8 minutes on two cores, the first rows of its table within
# two. Run it again to resume what was interrupted or to see the results of what is done. RUNS chooses the directory of the
# results (runs/quickstart); the programs that XLA compiled are kept in its folder `compiled`, so that no step compiles twice.
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
evaluate() { hybrid evaluate --config=configs/evaluate_tiny.py --out="$runs" --model=source=launch/tiny_qwen3 "$@"; }

mkdir -p "$runs"
JAX_COMPILATION_CACHE_DIR=$(cd "$runs" && pwd)/compiled
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5

# which layers to convert, and the hybrid before any training
hybrid prime --config=configs/prime_tiny.py:GKA --workdir="$runs/initial" "--config.schedule=()"
pattern=$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['pattern'])" "$runs/initial/selection.json")
evaluate --model="GKA initial=$runs/initial/model"

# Gated KalmaNet; sliding windows that hold as many bytes; the source on the same data; and, untrained, windows in every layer
prime() { hybrid prime "--config=configs/prime_tiny.py:$1" "--workdir=$runs/$2" "--config.pattern=$3" "${@:4}"; }
prime GKA gka "$pattern"
prime SWA swa "${pattern//GKA/SWA}"
prime SWA same "${pattern//GKA/*}"
prime SWA windows "$(sed 's/GKA/SWA/g; s/\*/SWA/g' <<<"$pattern")" "--config.schedule=()"
[ -d "$runs/hybrid" ] || hybrid export "$runs/gka" "$runs/hybrid"
evaluate --model="source, same data=$runs/same/model" --model="windows everywhere=$runs/windows/model" \
  --run="GKA=$runs/gka" --model="SWA=$runs/swa/model" \
  --prompt=$'def read_file(path, encoding="utf-8"):\n    """'
echo "hybrid model: $runs/hybrid; $SECONDS s in all"
