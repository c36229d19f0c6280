"""A few training steps of a small hybrid of every mixer, against the losses that were recorded on a CPU."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator

import jax

from hybrid_jax.check.finding import Finding
from hybrid_jax.check.measuring import largest_error
from hybrid_jax.check.small_model import small_batch, small_model
from hybrid_jax.parameters import split_model
from hybrid_jax.train.loop import apply_phase_settings
from hybrid_jax.train.phase import Phase
from hybrid_jax.train.phase_layout import PhaseLayout
from hybrid_jax.train.state import TrainState
from hybrid_jax.train.step import make_step

ROWS, LENGTH, STEPS = 4, 96, 4
RECORDED = (5.743874, 5.122990, 4.484643, 3.892761)
BOUNDS = {"float32": 1e-3, "bfloat16": 2e-2}  # of the relative error of the losses together


@functools.cache  # the part `storage` saves the state of the part `steps`, and compiling takes half a minute
def trained(compute_dtype: str) -> tuple[TrainState, tuple[float, ...]]:
    """Returns the state after `STEPS` steps on the same rows, on one device, and the loss of each; float32 is not rounded to less
    in matrix products."""
    precision = "highest" if compute_dtype == "float32" else "default"
    with jax.default_device(jax.local_devices()[0]), jax.default_matmul_precision(precision):
        return _train(compute_dtype)


def _train(compute_dtype: str) -> tuple[TrainState, tuple[float, ...]]:
    phase = Phase(
        objective="next_token",
        steps=STEPS,
        batch_size=ROWS,
        seq_len=LENGTH,
        learning_rate=5e-3,
        warmup_steps=0,
        compute_dtype=compute_dtype,
    )
    model = apply_phase_settings(small_model(), phase)
    layout = PhaseLayout(model, phase)
    state, frozen, _ = layout.begin(None, split_model(model)[1])
    step, losses, batch = make_step(layout, phase), [], small_batch(ROWS, LENGTH)
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"].value))
    return state, tuple(losses)


def check(workdir: pathlib.Path) -> Iterator[Finding]:
    """Yields how far the losses are from the recorded ones, in float32 and in bfloat16."""
    del workdir
    for dtype, bound in BOUNDS.items():
        losses = trained(dtype)[1]
        error = largest_error([losses], [RECORDED])
        said = ", ".join(f"{loss:.4f}" for loss in losses)
        yield Finding(f"steps in {dtype}", f"have the recorded losses within {bound:g}", error < bound, f"{error:.1e} ({said})")
