"""Benchmark of the data pipeline: `python -m hybrid_jax.data.bench [--tokens 20e6]`.

The documents are random tokens with lengths distributed like those of text. Measured are planning the rows, reading them, and
the complete pipeline in one process, in tokens per second and relative to what a model needs: an 8B model on a host with four
v5p at 40 % of their peak.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from tokenizers import Tokenizer, models

from hybrid_jax.data.corpus import Corpus, Source
from hybrid_jax.data.layout import training_batch
from hybrid_jax.data.packing import PACKINGS, PackedRows
from hybrid_jax.data.pipeline import training_batches
from hybrid_jax.data.tokens import Tokens
from hybrid_jax.hardware import TPUS
from kernels_pallas.recorded import recorded, without_out

NEED = 4 * TPUS["v5p"].flops * 0.4 / (6 * 8e9)


def documents(tokens: int) -> Tokens:
    """Returns documents of about `tokens` random tokens together, with log-normal lengths."""
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(6.3, 1.2, int(tokens / 1000)).astype(np.int64), 1, None)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Tokens(rng.integers(0, 150_000, starts[-1], dtype=np.uint32), starts, np.ones(starts[-1], np.uint8))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m hybrid_jax.data.bench", description="Benchmark of the data pipeline")
    parser.add_argument("--tokens", type=float, default=20e6)
    parser.add_argument("--threads", type=int, default=2, help="threads that read ahead in the pipeline")
    parser.add_argument("--out", metavar="FILE", help="also write what is printed to this file, with versions and machine")
    options = parser.parse_args()
    with recorded(options.out, "hybrid_jax.data.bench", without_out(sys.argv[1:])):
        measure(documents(int(options.tokens)), options.threads)


def measure(tokens: Tokens, threads: int) -> None:
    """Prints a table of tokens per second by row length and packing."""
    size = int(tokens.starts[-1])
    print(f"{len(tokens.starts) - 1:,} documents, {size:,} tokens; an 8B model on four v5p needs {NEED:,.0f} tokens/s")
    print(f"{'row':>8} {'packing':>10} {'filled':>7} {'planned':>15} {'read':>15} {'pipeline':>15}  tokens/s, and times the need")
    for length in (8192, 131_072):
        for packing in PACKINGS:
            begin = time.perf_counter()
            rows = PackedRows(tokens, length, packing)
            planned = size / (time.perf_counter() - begin)
            begin = time.perf_counter()
            for i in range(len(rows)):
                rows[i]
            read = len(rows) * length / (time.perf_counter() - begin)
            source = {"text": Source("", packing)}
            corpus = Corpus(Tokenizer(models.BPE()), source, {"text": [tokens]}, {}, (1, 2), (3, 100))
            batch_size = max(1, 131_072 // length)
            stream = training_batches(corpus, {"text": 1.0}, batch_size=batch_size, length=length, seed=0, threads=threads)
            training_batch(next(stream), 8)
            begin, steps = time.perf_counter(), max(8, int(size / batch_size / length))
            for _ in range(steps):
                training_batch(next(stream), 8)
            pipeline = steps * batch_size * length / (time.perf_counter() - begin)
            speeds = " ".join(f"{x / 1e6:8.1f}M {x / NEED:4.0f}x" for x in (planned, read, pipeline))
            print(f"{length:8} {packing:>10} {rows.filled:7.1%} {speeds}", flush=True)


if __name__ == "__main__":
    main()
