"""One token on TPU: both states are read once and written once, and all iterations happen in between.

From HBM, 30 iterations would read H thirty times. Here s H is split once into two bf16 parts side by side. The vectors of
all heads are the rows of one array; an iteration multiplies all of them, in two parts, with the matrix of every head and
keeps that head's row: what a product costs is loading the matrix, not its rows. The iterations are those of `tpu_solve.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.contract import States
from kernels_pallas.gated_kalmanet.chebyshev import coefficients
from kernels_pallas.gated_kalmanet.conjugate_gradients import LEAST
from kernels_pallas.gated_kalmanet.reference import gated_kalmanet_update
from kernels_pallas.gated_kalmanet.solvers import SMALLEST, unit_of
from kernels_pallas.mosaic_chunk import column_sum, dot, each, iota, row_sum
from kernels_pallas.mosaic_step import columns, head_rows, run_step, with_gradient_of
from kernels_pallas.operands import parts

HEADS = {"chebyshev": 16, "cg": 32}  # a grid step: iterations of one head wait for one another, those of many fill the units
GROUP = 8  # heads whose vectors are the rows of one array: the groups' products and sums overlap


def _product(d: jax.Array, H: Sequence[jax.Array]) -> jax.Array:
    """Returns H d of every head, rows [n,K], given both parts of H side by side, [K,2K]."""
    n, K = d.shape
    rows = jnp.concatenate(parts(d, jnp.bfloat16), axis=0)
    head, moved = iota(d.shape, 0), jnp.zeros_like(d)
    for h, matrix in enumerate(H):
        m = dot(rows, matrix)
        moved = jnp.where(head == h, m[:n, :K] + m[n:, :K] + m[:n, K:], moved)
    return moved


def _solve(q: jax.Array, H: Sequence[jax.Array], solver: str, ridge_strength: float, num_iter: int) -> jax.Array:
    """Returns (H + lambda I)^-1 q of every head, for rows q [n,K] and symmetric H [K,K]."""
    # 2^30 H: the squares of |H| from 2^-93 (a weak state's) to 2^33 fit a float32
    scaled = each(lambda h: h * 2.0**30, H)
    squared = each(lambda h: jnp.sum(column_sum(h * h), axis=1, keepdims=True), scaled)
    inverse = each(lambda n: jnp.where(n > SMALLEST, jax.lax.rsqrt(jnp.maximum(n, SMALLEST)), 0.0), squared)
    unit = unit_of(solver, ridge_strength)
    ridge = ridge_strength / unit
    s = each(lambda n: n * (2.0**30 / unit), inverse)
    H = each(lambda h, s: jnp.concatenate(parts(s * h, jnp.bfloat16), axis=1), H, s)
    n = len(H)
    at = range(0, n, GROUP)
    largest = jnp.max(jnp.abs(q), axis=1, keepdims=True)
    q = q * (1.0 / jnp.maximum(largest, SMALLEST))
    r = d = [q[g : g + GROUP] for g in at]
    matrices = [H[g : g + GROUP] for g in at]

    def products(d):
        return each(lambda d, h: _product(d, h) + ridge * d, d, matrices)

    if solver == "chebyshev":
        x = d
        for momentum, omega in coefficients(ridge_strength, num_iter).tolist():
            r = each(jnp.subtract, r, products(d))
            d = each(lambda d, r, a=momentum, b=omega: a * d + b * r, d, r)
            x = each(jnp.add, x, d)
    else:
        x, old = each(jnp.zeros_like, r), each(lambda r: row_sum(r * r), r)
        for _ in range(num_iter):
            moved = products(d)
            length = each(lambda o, d, m: o / jnp.maximum(row_sum(d * m), LEAST), old, d, moved)
            x, r = each(lambda x, a, d: x + a * d, x, length, d), each(lambda r, a, m: r - a * m, r, length, moved)
            new = each(lambda r: row_sum(r * r), r)
            d = each(lambda r, n, o, d: r + n / jnp.maximum(o, LEAST) * d, r, new, old, d)
            old = new
    return jnp.concatenate(s, axis=0) * largest * jnp.concatenate(x, axis=0)


def gated_kalmanet_step_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    log_decay: jax.Array,
    state: States,
    scale: float,
    ridge_strength: float,
    num_iter: int,
    bp_lambda: bool,
    solver: str,
) -> tuple[jax.Array, States]:
    """The `pallas_tpu` implementation of `gated_kalmanet_step`; see `kernels_pallas.contract`."""

    def update(vectors, scalars, H, S):
        q, k, v = vectors
        decay = head_rows(jnp.exp(scalars[1]))
        keys = columns(k)
        H = each(lambda h, d, k, row: d * h + k * row, H, decay, keys, head_rows(k))
        S = each(lambda s, d, k, v: d * s + k * v, S, decay, keys, head_rows(v))
        if num_iter:
            q = q + scalars[0] * (_solve(q, H, solver, ridge_strength, num_iter) - q)
        return each(lambda s, q: scale * column_sum(q * s), S, columns(q)), H, S

    def kernel(q, k, v, alpha, log_decay, state):
        o, *state = run_step(update, "gated_kalmanet_step", (q, k, v), (alpha, log_decay), state, HEADS[solver])
        return o, tuple(state)

    options = dict(scale=scale, ridge_strength=ridge_strength, num_iter=num_iter, bp_lambda=bp_lambda, solver=solver)
    reference = functools.partial(gated_kalmanet_update, **options)
    return with_gradient_of(reference, kernel)(q, k, v, alpha, log_decay, state)
