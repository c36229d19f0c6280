"""One token on TPU: both states are read once and written once, and all iterations happen in between.

From HBM, 30 iterations would read H thirty times. Here s H is split once into two bf16 parts side by side, and an
iteration is one product of the step's two parts with both, in the residual form of `tpu.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.contract import States
from kernels_pallas.gated_kalmanet.chebyshev import coefficients
from kernels_pallas.gated_kalmanet.reference import gated_kalmanet_update
from kernels_pallas.mosaic import dot, each
from kernels_pallas.mosaic_step import columns, head_rows, reduce_rows, run_step, with_gradient_of
from kernels_pallas.operands import parts

HEADS = 16  # a grid step: iterations of one head wait for one another, those of many fill the matrix units
SMALLEST = 2.0**-126  # of float32's normal numbers; a smaller square is of an empty state


def _solve(q, H, ridge_strength, num_iter):
    """(H + lambda I)^-1 q for rows q [1,K] and symmetric H [K,K], of every head."""
    # 2^30 H: the squares of |H| from 2^-93 (a weak state's) to 2^33 fit a float32
    scaled = each(lambda h: h * 2.0**30, H)
    squared = each(lambda h: jnp.sum(reduce_rows(h * h), axis=1, keepdims=True), scaled)
    inverse = each(lambda n: jnp.where(n > SMALLEST, jax.lax.rsqrt(jnp.maximum(n, SMALLEST)), 0.0), squared)
    s = each(lambda n: n * (2.0**30 / (ridge_strength + 0.5)), inverse)
    ridge = ridge_strength / (ridge_strength + 0.5)
    H = each(lambda h, s: jnp.concatenate(parts(s * h, jnp.bfloat16), axis=1), H, s)  # [K, 2K]: wide matrix units take both
    r = each(jnp.multiply, s, q)
    x = d = r
    K = q[0].shape[1]
    for momentum, omega in coefficients(ridge_strength, num_iter).tolist():
        rows = each(lambda d: jnp.concatenate(parts(d, jnp.bfloat16), axis=0), d)
        products = each(dot, rows, H)
        moved = each(lambda p: reduce_rows(p[:, :K]) + p[:1, K:], products)
        r = each(lambda r, m, d: r - (m + ridge * d), r, moved, d)
        d = each(lambda d, r, a=momentum, b=omega: a * d + b * r, d, r)
        x = each(jnp.add, x, d)
    return x


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
) -> tuple[jax.Array, States]:
    """The `pallas_tpu` implementation of `gated_kalmanet_step`; see `kernels_pallas.contract`."""

    def update(vectors, scalars, H, S):
        q, k, v = vectors
        decay = head_rows(jnp.exp(scalars[1]))
        keys = columns(k)
        H = each(lambda h, d, k, row: d * h + k * row, H, decay, keys, head_rows(k))
        S = each(lambda s, d, k, v: d * s + k * v, S, decay, keys, head_rows(v))
        if num_iter:
            x = jnp.concatenate(_solve(head_rows(q), H, ridge_strength, num_iter), axis=0)
            q = q + scalars[0] * (x - q)
        return each(lambda s, q: scale * reduce_rows(q * s), S, columns(q)), H, S

    def kernel(q, k, v, alpha, log_decay, state):
        o, *state = run_step(update, "gated_kalmanet_step", (q, k, v), (alpha, log_decay), state, HEADS)
        return o, tuple(state)

    options = dict(scale=scale, ridge_strength=ridge_strength, num_iter=num_iter, bp_lambda=bp_lambda)
    reference = functools.partial(gated_kalmanet_update, **options)
    return with_gradient_of(reference, kernel)(q, k, v, alpha, log_decay, state)
