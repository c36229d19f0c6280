"""The norms |H_t|_F of a chunk and their gradient, for the TPU kernels, of states whose squares do not fit a float32 too."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import mosaic
from kernels_pallas.gated_kalmanet.chebyshev import inverse
from kernels_pallas.mosaic import NT, TN, dot, dot_parts, each, iota, row_sum
from kernels_pallas.operands import parts


class Weights(NamedTuple):
    """One head's H_t = size_t (rho_t start + sum_i beta_ti k_i k_i' / |k_i|^2): no weight is above 1 (see `chunked.py`).

    size [C,1], beta [C,C], rho [C,1], start [K,K] = H0 / |H0|_max, weak [1,1] = 1 / |H0|_max, short = 1 / |k_i|^2 as a
    column and as a row, gram [C,C] = (k_i' k_j)^2 / (|k_i| |k_j|)^2, KH [C,K] = K start, u_i = k_i' start k_i / |k_i|^2
    as a column and as a row, square [1,1] = |start|^2.
    """

    size: jax.Array
    beta: jax.Array
    rho: jax.Array
    start: jax.Array
    weak: jax.Array
    short: tuple[jax.Array, jax.Array]
    gram: jax.Array
    KH: jax.Array
    u: jax.Array
    square: jax.Array


def weights(K, H0, decay, low, count) -> list[Weights]:
    """Every head's weights; H0 is multiplied in `count` parts."""
    n = len(K)
    largest = each(lambda h: jnp.max(jnp.max(jnp.abs(h), axis=1, keepdims=True), axis=0, keepdims=True), H0)
    weak = each(inverse, largest)
    start = each(jnp.multiply, H0, weak)
    KH = each(lambda k, h: dot_parts((k,), parts(h, low, count)), K, start)
    squares = each(lambda k: row_sum(k.astype(jnp.float32) ** 2), K)
    short = each(inverse, squares)
    rows = mosaic.as_rows(squares + each(lambda k, x, s: row_sum(k * x) * s, K, KH, short))
    short = each(lambda s, r: (s, inverse(rows[r : r + 1])), short, range(n))
    gram = each(lambda k, s: dot(k, k, NT) ** 2 * s[0] * s[1], K, short)
    beta = each(lambda d, r: d.mask * rows[r : r + 1], decay, range(n))
    rho = each(lambda d, h: d.reach * h, decay, largest)
    size = each(lambda b, r: row_sum(b) + r, beta, rho)
    beta = each(lambda b, s: b * inverse(s), beta, size)
    rho = each(lambda r, s: r * inverse(s), rho, size)
    square = each(lambda h: jnp.sum(row_sum(h * h), axis=0, keepdims=True), start)
    u = [rows[r : r + 1] for r in range(n, 2 * n)]
    return each(Weights, size, beta, rho, start, weak, short, gram, KH, u, square)


def norms_of(weights: list[Weights], low) -> list[jax.Array]:
    """|H_t|_F as columns [C,1]: size_t times the root of rho^2 |start|^2 + 2 rho (beta u)_t + (beta gram beta')_tt."""

    def norm(w: Weights):
        inside = dot_parts(parts(w.beta, low), parts(w.gram, low))
        return w.size * jnp.sqrt(row_sum(w.beta * (inside + 2 * w.rho * w.u)) + w.rho**2 * w.square)

    return each(norm, weights)


def norms_backward(dF, F, K, H0, decay, low):
    """Gradients of the norms F under cotangents dF, columns [C,1]: dK, dH0, and da as a column and a row."""
    C = K[0].shape[0]
    strict = iota((C, C), 0) > iota((C, C), 1)
    W = weights(K, H0, decay, low, 1)
    eta = each(lambda d, f, w: d * (w.size * inverse(f)) * w.size, dF, F, W)  # no square of a small size
    inside = each(lambda w: dot(w.beta.astype(low), w.gram.astype(low)), W)
    E = each(lambda m, w, n: jnp.where(strict, n * w.beta * (w.rho * w.u + m), 0.0), inside, W, eta)
    cross = each(lambda w: row_sum(w.beta * w.u), W)
    column = each(lambda e, n, c, w: row_sum(e) + n * w.rho * (w.rho * w.square + c), E, eta, cross, W)
    row = each(lambda e: -jnp.sum(e, axis=0, keepdims=True), E)
    du = mosaic.as_columns(each(lambda n, w: jnp.sum(n * w.rho * w.beta, axis=0, keepdims=True), eta, W))
    du = each(lambda d, w: d * w.short[0], du, W)
    dgram = each(lambda n, w: dot((n * w.beta).astype(low), w.beta.astype(low), TN), eta, W)
    pairs = each(lambda dg, k, w: dot(k, k, NT) * (dg * w.short[0] * w.short[1]), dgram, K, W)
    dK = each(lambda p, k, u, w: 2 * dot(p.astype(low), k) + 2 * u * w.KH, pairs, K, du, W)
    total = each(lambda n, w: jnp.sum(n * w.rho**2, axis=0, keepdims=True), eta, W)
    dH0 = each(lambda t, k, u, w: (t * w.start + dot((u * k).astype(low), k, TN)) * w.weak, total, K, du, W)
    return dK, dH0, column, row
