"""Measures trace and compile time of a training step by depth: `python -m hybrid_jax.plan.compile_time [--layers 8 36 64]`.

Dimensions are small and the device is a CPU, as programs are compared by size, not by speed. There are three patterns: every
other layer is GDN; repeats as in the Qwen3-8B of arXiv 2605.08301; a coin is tossed for each layer. With `--written-out`,
each is also compiled without scanning over the layers that repeat.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from hybrid_jax.config import ModelConfig, parse_pattern
from hybrid_jax.data.layout import abstract_batch
from hybrid_jax.model import Decoder, abstract_decoder
from hybrid_jax.parameters import abstract_parameters, join_model
from hybrid_jax.repeats import find_repeats
from hybrid_jax.train.objectives import next_token
from kernels_pallas.recorded import recorded, without_out

RUNS = "*gggggg**ggg**************ggg*gggggg"


def patterns(layers: int) -> dict[str, str]:
    """Returns the three patterns for this many layers, by name."""
    coin = random.Random(0)
    kinds = {
        "alternating": "".join("*g"[i % 2] for i in range(layers)),
        "in repeats": (RUNS * 2)[:layers],
        "coin": "".join(coin.choice("*g") for _ in range(layers)),
    }
    return {name: "-".join("GDN" if k == "g" else "*" for k in kind) for name, kind in kinds.items()}


def model(pattern: str, scan: bool) -> Decoder:
    """Returns a small abstract model."""
    sizes: dict[str, Any] = dict(vocab_size=256, hidden_size=128, intermediate_size=256, num_heads=4, num_kv_heads=2, head_dim=32)
    decoder = abstract_decoder(ModelConfig("qwen3", layers=parse_pattern(pattern), qk_norm=True, **sizes))
    decoder.scan, decoder.remat = scan, "full"
    return decoder


def seconds(pattern: str, scan: bool) -> tuple[float, float]:
    """Returns the seconds for loss and gradients: (to trace and lower, to compile)."""
    decoder = model(pattern, scan)
    structure, _ = nnx.split(decoder)
    step = jax.jit(jax.grad(lambda p, b: next_token(join_model(structure, p), b).loss.value))
    begin = time.perf_counter()
    lowered = step.lower(abstract_parameters(decoder.config), abstract_batch(2, 256))
    traced = time.perf_counter()
    lowered.compile()
    return traced - begin, time.perf_counter() - traced


def main() -> None:
    """Prints a table of seconds by depth and pattern."""
    parser = argparse.ArgumentParser(prog="python -m hybrid_jax.plan.compile_time", description="Trace and compile time by depth")
    parser.add_argument("--layers", type=int, nargs="+", default=(8, 36, 64))
    parser.add_argument("--written-out", action="store_true", help="also without scanning (minutes)")
    parser.add_argument("--out", metavar="FILE", help="also write what is printed to this file, with versions and machine")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with recorded(options.out, "hybrid_jax.plan.compile_time", without_out(sys.argv[1:])):
        measure(options.layers, (True, False) if options.written_out else (True,))


def measure(depths: Sequence[int], scans: Sequence[bool]) -> None:
    """Prints the seconds of every depth and pattern, with and without scanning over repeats as `scans` says."""
    print(f"{'layers':>6}  {'pattern':12} {'compiled once':>13}  trace s  compile s")
    for layers in depths:
        for name, pattern in patterns(layers).items():
            bodies = sum(run.length for run in find_repeats(parse_pattern(pattern)))
            for scan in scans:
                traced, compiled = seconds(pattern, scan)
                print(f"{layers:6}  {name:12} {bodies if scan else layers:13}  {traced:7.1f}  {compiled:9.1f}", flush=True)


if __name__ == "__main__":
    main()
