"""Every operation of `kernels_pallas` against its reference, token by token in float32; its time beside the laboratory's."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from hybrid_jax.check.finding import Finding
from hybrid_jax.check.measuring import largest_error, seconds_of
from hybrid_jax.hardware import chip_of
from kernels_pallas.lab.cases import CASES, Case, Shape, program, random_arrays
from kernels_pallas.lab.chips import CHIPS
from kernels_pallas.lab.predictions import PREDICTIONS

BOUNDS = {"bfloat16": 3e-2, "float32": 2e-3}  # of the relative error, gradients of Gated KalmaNet's solve included


def check(workdir: pathlib.Path) -> Iterator[Finding]:
    """Yields the error and the time of every case of the laboratory, on one device."""
    del workdir
    device = jax.local_devices()[0]
    small = device.platform == "cpu"
    with jax.default_device(device):
        for name, case in CASES.items():
            yield _error(name, case, Shape(1, 80, 2, 32, 32, "float32") if small else Shape(1, 512, 8))
            yield _time(name, case, Shape(1, 512, 4, 64, 64, "float32") if small else Shape(), chip_of(device.device_kind))


def _sized(case: Case, shape: Shape) -> Shape:
    """Returns the shape, of more sequences if the case is one token of each."""
    return shape._replace(batch=64) if case.decode else shape


def _error(name: str, case: Case, shape: Shape) -> Finding:
    shape = _sized(case, shape)
    arrays = random_arrays(case, shape)
    got = jax.jit(program(case, shape, None)[0])(*arrays)
    exact = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays]
    with jax.default_matmul_precision("highest"):
        want = jax.jit(program(case, shape, "reference")[0])(*exact)
    error, bound = largest_error(got, want), BOUNDS[shape.dtype]
    return Finding(name, f"is the reference within {bound:g}", error < bound, f"relative error {error:.1e} in {shape.dtype}")


def _time(name: str, case: Case, shape: Shape, chip: str | None) -> Finding:
    shape = _sized(case, shape)
    arrays, function = random_arrays(case, shape), jax.jit(program(case, shape, None)[0])
    seconds = seconds_of(lambda: function(*arrays))
    size = f"{shape.batch} x {1 if case.decode else shape.seq_len:,} tokens, {shape.heads} heads of {shape.key_dim}"
    value = f"{1e3 * seconds:.3f} ms ({size})"
    if chip in PREDICTIONS and name in PREDICTIONS[chip]:
        cycles = max(PREDICTIONS[chip][name])
        units = shape.batch * shape.heads * (1 if case.decode else shape.seq_len)
        predicted = cycles * units / CHIPS[chip].clock
        value += f"; kernels alone at least {1e3 * predicted:.3f} ms by the compiler's schedule: {seconds / predicted:.2f} times"
    return Finding(name, "takes", None, value)
