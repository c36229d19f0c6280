"""The norms |H_t|_F of a chunk and their gradient, for the TPU kernels, of states whose squares do not fit a float32 too.

    H_t = size_t (rho_t H0 / |H0|_max + sum_i beta_ti k_i k_i'),     rho_t + sum_i beta_ti |k_i|^2 ~ 1

(`chunked.py` also divides by the keys' lengths: here |k|^4 must fit, so |k| > 1e-9 or 0.) Squares are taken with one
factor scaled, |H_t|^2 / size_t, and no column is divided: the kernels have little time to spare.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import mosaic
from kernels_pallas.gated_kalmanet.chebyshev import empty_norm, inverse
from kernels_pallas.mosaic import NT, TN, dot, dot_parts, each, iota, row_sum
from kernels_pallas.operands import parts

EMPTY = empty_norm(jnp.float32)


class Weights(NamedTuple):
    """One head's: size, its inverse root and rho as columns [C,1], beta [C,C], 1 / |H0|_max and |H0|^2 / |H0|_max [1,1]."""

    size: jax.Array
    root: jax.Array
    rho: jax.Array
    beta: jax.Array
    weak: jax.Array
    square: jax.Array


def weights(K, H0, decay) -> list[Weights]:
    """Every head's weights."""

    def one(k, h, d):
        largest = jnp.max(jnp.max(jnp.abs(h), axis=0, keepdims=True), axis=1, keepdims=True)
        weak = inverse(largest)
        squares = dot(jnp.ones((8, k.shape[1]), jnp.bfloat16), (k * k).astype(jnp.bfloat16), NT)[:1]  # a rough size is enough
        size = row_sum(d.mask * squares) + d.reach * largest
        root = jax.lax.rsqrt(jnp.maximum(size, EMPTY))
        small = root * root
        square = jnp.sum(jnp.sum(h * (h * weak), axis=0, keepdims=True), axis=1, keepdims=True)
        return Weights(size, root, d.reach * largest * small, d.mask * small, weak, square)

    return each(one, K, H0, decay)


def inverse_norms(K, H0, decay, low) -> list[jax.Array]:
    """1 / |H_t|_F as columns [C,1], 0 of an empty state; |H_t|^2 / size = (beta (M G))_tt + 2 reach (beta u)_t + rho reach |H0|^2,
    G = (K K')^2, u_i = k_i' H0 k_i."""
    u = mosaic.as_rows(each(lambda k, h: row_sum(dot_parts((k,), parts(h, low)) * k), K, H0))
    u = [u[n : n + 1] for n in range(len(K))]
    squares = each(lambda k: dot(k, k, NT) ** 2, K)
    inside = each(lambda g, d: dot_parts(parts(d.mask, low), parts(g, low)), squares, decay)

    def one(w, i, u, d):
        square = row_sum(w.beta * (i + 2 * d.reach * u)) + w.rho * (d.reach * w.square)
        return jnp.where(w.size > EMPTY, jax.lax.rsqrt(jnp.maximum(square, EMPTY)) * w.root, 0.0)

    return each(one, weights(K, H0, decay), inside, u, decay)


def norms_backward(dF, inverse_norm, K, H0, decay, low):
    """Gradients of the norms under cotangents dF, columns [C,1]: dK, dH0, and da as a column and a row."""
    C = K[0].shape[0]
    strict = iota((C, C), 0) > iota((C, C), 1)
    W = weights(K, H0, decay)
    KH = each(lambda k, h: dot(k, h.astype(low)), K, H0)
    u = mosaic.as_rows(each(lambda k, x: row_sum(k * x), K, KH))
    u = each(lambda n, w: u[n : n + 1] * w.weak, range(len(K)), W)
    gram = each(lambda k: dot(k, k, NT), K)
    inside = each(lambda g, w: dot(w.beta.astype(low), (g * g).astype(low)), gram, W)
    eta = each(lambda d, f, w: d * (w.size * f) * w.size, dF, inverse_norm, W)  # no square of a small size
    E = each(lambda m, u, w, n: jnp.where(strict, n * w.beta * (w.rho * u + m), 0.0), inside, u, W, eta)
    cross = each(lambda u, w: row_sum(w.beta * u), u, W)
    column = each(lambda e, n, c, w: row_sum(e) + n * w.rho * (w.rho * (w.square * w.weak) + c), E, eta, cross, W)
    row = each(lambda e: -jnp.sum(e, axis=0, keepdims=True), E)
    du = mosaic.as_columns(each(lambda n, w: jnp.sum(n * w.rho * w.beta, axis=0, keepdims=True) * w.weak, eta, W))
    dgram = each(lambda n, w: dot((n * w.beta).astype(low), w.beta.astype(low), TN), eta, W)
    dK = each(lambda g, dg, k, u, x: 2 * dot((g * dg).astype(low), k) + 2 * u * x, gram, dgram, K, du, KH)
    total = each(lambda n, w: jnp.sum(n * w.rho * w.rho, axis=0, keepdims=True) * w.weak, eta, W)
    dH0 = each(lambda h, t, k, u, w: t * (h * w.weak) + dot((u * k).astype(low), k, TN), H0, total, K, du, W)
    return dK, dH0, column, row
