"""What the loop costs beside the bare jitted step: `python -m hybrid_jax.train.bench [--milliseconds 200] [--steps 40]`.

The same step and rows, bare (no data, metrics, health, bar) and through `train_phase`, in turn; prints the ratio of the
medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pathlib
import statistics
import sys
import tempfile
import time

import jax

from hybrid_jax import load_model
from hybrid_jax.data import Corpus, read_corpus, training_batches
from hybrid_jax.data.layout import training_batch
from hybrid_jax.model import Decoder
from hybrid_jax.parameters import split_model
from hybrid_jax.train.loop import apply_phase_settings, train_phase
from hybrid_jax.train.metrics import MetricWriter, read_metrics
from hybrid_jax.train.phase import Phase
from hybrid_jax.train.phase_layout import PhaseLayout
from hybrid_jax.train.step import make_step
from kernels_pallas.recorded import recorded, without_out

SOURCE = "launch/tiny_qwen3"
MIX = {"text": 0.7, "retrieval": 0.3}


def bare(model: Decoder, phase: Phase, corpus: Corpus) -> float:
    """Seconds a step."""
    layout = PhaseLayout(apply_phase_settings(model, phase), phase)
    state, frozen, _ = layout.begin(None, split_model(model)[1])
    step = make_step(layout, phase)
    rows = next(training_batches(corpus, MIX, batch_size=phase.batch_size, length=phase.seq_len, seed=0))
    batch = jax.device_put(training_batch(rows))
    state, metrics = step(state, frozen, batch)
    jax.block_until_ready(metrics)
    begin = time.perf_counter()
    for _ in range(phase.steps - 1):
        state, metrics = step(state, frozen, batch)
    jax.block_until_ready(metrics)
    return (time.perf_counter() - begin) / (phase.steps - 1)


def looped(model: Decoder, phase: Phase, corpus: Corpus) -> float:
    """Seconds a step."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        folder = pathlib.Path(folder)
        with contextlib.closing(MetricWriter(folder)) as writer:
            train_phase(model, "bench", phase, corpus, MIX, seed=0, directory=folder / "checkpoints" / "bench", writer=writer)
        return phase.tokens_per_step / read_metrics(folder)[-1]["tokens_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hybrid_jax.train.bench", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--milliseconds", type=float, default=200, help="about how long a step takes, by its rows")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", metavar="FILE", help="also write what is printed to this file, with versions and machine")
    options = parser.parse_args()
    with recorded(options.out, "hybrid_jax.train.bench", without_out(sys.argv[1:])):
        measure(options.milliseconds, options.steps, options.pairs)


def measure(milliseconds: float, steps: int, pairs: int) -> None:
    """Prints the seconds of a bare step and of one in the loop, medians of `pairs` pairs of `steps` steps each."""
    model = load_model(SOURCE, pattern="-".join(["*", "SWA"] * 4), dtype="float32")
    corpus = read_corpus({"text": "stdlib"}, SOURCE, 0)

    def phase(rows: int, steps: int = steps) -> Phase:
        return Phase(objective="next_token", steps=steps, batch_size=rows, seq_len=128, learning_rate=1e-5, log_every=10)

    one = bare(model, phase(4, 6), corpus)
    rows = max(1, round(4 * milliseconds / 1e3 / one))
    times = [(bare(model, phase(rows), corpus), looped(model, phase(rows), corpus)) for _ in range(pairs)]
    alone, looping = (statistics.median(t) for t in zip(*times, strict=True))
    print(f"{rows} rows of 128 tokens, {steps} steps, {pairs} pairs on {jax.devices()[0].device_kind}")
    print(f"bare step {1e3 * alone:.1f} ms, in the loop {1e3 * looping:.1f} ms: {100 * (looping / alone - 1):+.1f} %")


if __name__ == "__main__":
    main()
