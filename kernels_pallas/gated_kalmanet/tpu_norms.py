"""The norms |H_t|_F of a chunk and their gradient, for the TPU kernels, also of states whose squares do not fit a float32.

    H_t = size_t (rho_t H0 / |H0|_max + sum_i beta_ti k_i k_i'),     rho_t + sum_i beta_ti |k_i|^2 ~ 1

(`chunked.py` also divides by the keys' lengths: here |k|^4 must fit, so |k| > 1e-9 or 0.) Squares are taken with one
factor scaled, |H_t|^2 / size_t, and no column is divided: the kernels have little time to spare. The beta of a key of
zeros, which may be as large as 1 / size, is 0 in the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas import mosaic_chunk
from kernels_pallas.gated_kalmanet.chebyshev import empty_norm, inverse
from kernels_pallas.mosaic_chunk import NT, Decay, column_sum, dot, dot_parts, each, earlier, row_sum, sums_of_rows
from kernels_pallas.operands import parts

EMPTY = empty_norm(jnp.float32)


class Weights(NamedTuple):
    """One head's: rho as a row [1,C], beta [C,C] ([i,t]), 1 / |H0|_max and |H0|^2 / |H0|_max [1,1]."""

    rho: jax.Array
    beta: jax.Array
    weak: jax.Array
    square: jax.Array


def _largest(h: jax.Array) -> jax.Array:
    """Returns |H0|_max [1,1] of H0 [K,K]."""
    return jnp.max(jnp.max(jnp.abs(h), axis=0, keepdims=True), axis=1, keepdims=True)


def inverse_norms(
    K: Sequence[jax.Array], Kt: Sequence[jax.Array], H0: Sequence[jax.Array], decay: Sequence[Decay], low: DTypeLike, n: int
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Returns 1 / |H_t|_F, 0 for an empty state, size_t, 0 likewise, and |k_t|^2, as rows [1,C] of every head:

    |H_t|^2 / size = (beta (M G))_tt + 2 reach (beta u)_t + rho reach |H0|^2,     G = (K K')^2,     u_i = k_i' H0 k_i

    Args:
      low: the dtype of the products' operands, n parts of each if it is bf16.
    """
    C = K[0].shape[0]
    of_keys = each(lambda k: k.astype(jnp.float32), Kt)
    squares = each(lambda k: column_sum(k * k), of_keys)
    u = each(lambda h, x, k: column_sum(dot_parts(parts(h, low, n), (x,)) * k), H0, Kt, of_keys)
    gram = each(lambda k, x: dot(k, x) ** 2, K, Kt)
    left = each(lambda g, u, s: parts(jnp.concatenate([g, mosaic_chunk.stack_rows([u, s], 16)], axis=0), low, n), gram, u, squares)
    inside = each(lambda m, d: dot_parts(m, parts(d.mask, low, n)), left, decay)

    def one(product, h, d):
        largest = _largest(h)
        size = product[C + 1 : C + 2] + d.reach * largest
        root = jax.lax.rsqrt(jnp.maximum(size, EMPTY))
        small = root * root
        start = row_sum(column_sum(h * (h * inverse(largest))))  # |H0|^2 / |H0|_max
        far = d.reach * small
        square = column_sum((d.mask * small) * product[:C]) + 2 * far * product[C : C + 1] + (far * largest) * (d.reach * start)
        return jnp.where(size > EMPTY, jax.lax.rsqrt(jnp.maximum(square, EMPTY)) * root, 0.0), size

    pairs = each(one, inside, H0, decay)
    return [p[0] for p in pairs], [p[1] for p in pairs], squares


def norms_backward(
    dF: Sequence[jax.Array],
    inverse_norm: Sequence[jax.Array],
    size: Sequence[jax.Array],
    squares: Sequence[jax.Array],
    K: Sequence[jax.Array],
    Kt: Sequence[jax.Array],
    H0: Sequence[jax.Array],
    decay: Sequence[Decay],
    low: DTypeLike,
) -> list[tuple[jax.Array, ...]]:
    """Returns every head's gradients of the norms under cotangents dF, rows [1,C].

    Args:
      inverse_norm, size, squares: from `inverse_norms`.
      low: the dtype of the products' operands.

    Returns:
      dK [K,C], dH0 [K,K], and of the decays `pairs` [C,C] and `da` [1,C], as in `linear_attention.tpu.Gradients`.
    """

    def weights(size, square, h, d):
        largest = _largest(h)
        weak = inverse(largest)
        root = jax.lax.rsqrt(jnp.maximum(size, EMPTY))
        small = root * root
        start = row_sum(column_sum(h * (h * weak)))
        return Weights(d.reach * largest * small, jnp.where(square > 0, d.mask * small, 0.0), weak, start)

    W = each(weights, size, mosaic_chunk.as_columns(squares), H0, decay)
    start = each(lambda h, w: h * w.weak, H0, W)
    KH = each(lambda h, k: dot(h.astype(low), k), start, Kt)
    u = mosaic_chunk.as_columns(each(lambda k, x: column_sum(k * x), Kt, KH))
    gram = each(dot, K, Kt)
    inside = each(lambda g, w: dot((g * g).astype(low), w.beta.astype(low)), gram, W)
    eta = each(lambda d, f, s: d * (s * f) * s, dF, inverse_norm, size)  # no square of a small size
    B = each(lambda n, w: n * w.beta, eta, W)
    R = each(lambda b, w: w.rho * b, B, W)
    cross = each(jnp.multiply, R, u)
    pairs = each(lambda m, b, c: earlier(c + b * m), inside, B, cross)
    da = each(lambda c, n, w: column_sum(c) + n * w.rho * (w.rho * (w.square * w.weak)), cross, eta, W)
    du = sums_of_rows(R)
    dgram = each(lambda b, w: dot(b.astype(low), w.beta.astype(low), NT), B, W)
    dK = each(lambda g, dg, k, u, x: 2 * (dot(k, (g * dg).astype(low), NT) + u * x), gram, dgram, Kt, du, KH)
    total = each(lambda n, w: row_sum(n * w.rho * w.rho), eta, W)
    dH0 = each(lambda h, t, k, x, u, w: w.weak * (t * h + dot((u * x).astype(low), k)), start, total, K, Kt, du, W)
    return list(zip(dK, dH0, pairs, da, strict=True))
