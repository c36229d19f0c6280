"""The solve of a chunk as a Pallas kernel for NVIDIA: x, r and d stay in registers for all iterations.

The iterations are `tpu_solve.py`'s, with bf16 operands and float32 sums; states, norms and the readout are the chunked form's.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from kernels_pallas import triton
from kernels_pallas.contract import States
from kernels_pallas.gated_kalmanet.chebyshev import inverse
from kernels_pallas.gated_kalmanet.chunked import Solver, gated_kalmanet_chunked
from kernels_pallas.gated_kalmanet.conjugate_gradients import LEAST
from kernels_pallas.gated_kalmanet.solvers import SMALLEST, SOLVERS, schedule_for, unit_of
from kernels_pallas.operands import dot_parts, operand_dtype, pad_axis, parts
from kernels_pallas.triton import dot


def _solve_kernel(rhs, k, high, rest, mask, reach, s, x, *, solver, ridge, num_iter, schedule):
    """Solves for the rows of a block; everything is divided by 1 / s, which makes lambda the constant `ridge`."""
    K, M, low = k[...], mask[...] * s[...][:, None], k.dtype
    far = (reach[...] * s[...])[:, None]
    H = (high[...], rest[...]) if low == jnp.bfloat16 else (high[...],)
    direction, schedule = schedule

    def rounded(d):
        return sum(p.astype(jnp.float32) for p in parts(d, low, direction))

    def applied(d, count):
        d_parts = parts(d, low, direction)
        scores = parts(dot_parts(d_parts, (K,), functools.partial(dot, trans_b=True)) * M, low, count)
        return far * dot_parts(d_parts, H[:count], dot) + dot_parts(scores, (K,), dot) + ridge * d

    def total(x):
        return jnp.sum(x, axis=1, keepdims=True)

    def chebyshev(count, _, carry):
        x, r, d, omega = carry
        r = r - applied(d, count)
        omega = 1.0 / (1.0 - (0.5 * (1.0 - ridge)) ** 2 * omega)
        d = rounded((omega - 1.0) * d + omega * r)
        return x + d, r, d, omega

    def conjugate_gradients(count, _, carry):
        x, r, d, old = carry
        moved = applied(d, count)
        length = old / jnp.maximum(total(d * moved), LEAST)
        r = r - length * moved
        new = total(r * r)
        return x + length * d, r, rounded(r + new / jnp.maximum(old, LEAST) * d), new

    q = rhs[...]
    size = jnp.max(jnp.abs(q), axis=1, keepdims=True)
    r = q / jnp.maximum(size, SMALLEST)
    d = rounded(r)
    if solver == "chebyshev":
        iterate, carry = chebyshev, (d, r, d, jnp.float32(2.0))
    else:
        iterate, carry = conjugate_gradients, (jnp.zeros_like(r), r, d, total(r * r))
    first = 0
    for iterations, count in (*schedule, (num_iter, 1)):
        last = min(first + iterations, num_iter)
        carry = jax.lax.fori_loop(first, last, functools.partial(iterate, count), carry)
        first = last
    x[...] = s[...][:, None] * size * carry[0]


def _solver(name: str, precision: str, low: DTypeLike) -> Solver:
    """Returns the named solver for `chunked.chunk_solve`, with matrices in `low`."""

    def solve(rhs, k, decay, before, norms, ridge_strength, num_iter):
        *lead, C, K = rhs.shape
        size = max(16, 1 << (K - 1).bit_length())
        rows = max(16, 1 << (C - 1).bit_length())
        if rows > 128 or size > triton.MAX_DIM:
            raise ValueError(f"gated_kalmanet: the GPU kernel takes chunks up to 128 and heads up to 256, got {C} and {K}")

        def flat(x, *sizes):
            x = x.reshape(-1, *x.shape[len(lead) :])
            for axis, n in enumerate(sizes, 1):
                x = pad_axis(x, axis, n)
            return x

        plan = schedule_for(name, precision, num_iter)
        unit = unit_of(name, ridge_strength)
        s = inverse(norms) / unit
        H = parts(flat(before, size, size), low)
        arrays = [
            flat(rhs, rows, size),
            flat(k, rows, size).astype(low),
            H[0],
            H[-1],
            flat(decay.mask, rows, rows),
            flat(decay.reach, rows),
            flat(s, rows),
        ]

        def one(x):
            return pl.BlockSpec((None, *x.shape[1:]), lambda n: (n,) + (0,) * (x.ndim - 1))

        x = triton.run(
            functools.partial(_solve_kernel, solver=name, ridge=ridge_strength / unit, num_iter=num_iter, schedule=plan),
            "gated_kalmanet_solve",
            (arrays[0].shape[0],),
            [(a, one(a)) for a in arrays],
            [(jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32), one(arrays[0]))],
            num_warps=8,
        )[0]
        return x[:, :C, :K].reshape(rhs.shape)

    return solve


BUILT = {
    (precision, low): {name: _solver(name, precision, low) for name in SOLVERS}
    for precision in ("fast", "accurate")
    for low in (jnp.bfloat16, jnp.float32)
}


def gated_kalmanet_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    log_decay: jax.Array,
    state: States,
    segments: jax.Array | None,
    scale: float,
    chunk_size: int | None,
    ridge_strength: float,
    num_iter: int,
    bp_lambda: bool,
    precision: str,
    solver: str,
) -> tuple[jax.Array, States]:
    """The `pallas_gpu` implementation of `gated_kalmanet`; see `kernels_pallas.contract`."""
    low = jnp.bfloat16 if operand_dtype(q, k, v) == jnp.bfloat16 else jnp.float32
    options = (scale, chunk_size, ridge_strength, num_iter, bp_lambda, precision, solver)
    return gated_kalmanet_chunked(q, k, v, alpha, log_decay, state, segments, *options, BUILT[precision, low])
